"""The users that a cluster's servers get, against the real servers: each does its work and nothing else."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import pytest

from tandem.adapters import credentials
from tandem.adapters.embedded import NatsServer, RedisServer
from tandem.adapters.nats_bus import NatsBus
from tandem.adapters.redis_store import RedisCounters, RedisLeases, RedisPrefixIndex, RedisRegistry, connect
from tandem.errors import StoreUnavailable
from tandem.wire import subjects
from tandem.wire.permissions import permissions_of
from tests.contract.stores import MODEL, spec

CLUSTER = "c.1"
PASSWORDS = {user: f"secret-{user}" for user in permissions_of(CLUSTER)}


async def until(condition: object) -> None:
    async with asyncio.timeout(20):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_nats_users_say_and_hear_what_is_theirs() -> None:
    users = credentials.nats_users(permissions_of(CLUSTER), PASSWORDS)
    async with NatsServer(extra_config=users) as server:
        url = {user: server.url.replace("//", f"//{user}:{password}@") for user, password in PASSWORDS.items()}
        router, worker, frontend = [await NatsBus.connect(url[user]) for user in ("router", "worker", "frontend")]
        heard: list[str] = []
        await worker.subscribe(subjects.work(CLUSTER, "w"), lambda message: heard.append(message.subject))
        frontend.publish(subjects.leader(CLUSTER, "m"), b"I lead")
        router.publish(subjects.work(CLUSTER, "w"), b"do")
        await until(lambda: heard)
        await until(lambda: frontend.stats.server_errors)  # a permissions violation, and said so
        assert router.stats.server_errors == 0
        # Nobody listens: that comes back without any permission to publish the reply subject.
        bounced: list[bool] = []
        await router.subscribe(subjects.bounces(CLUSTER, "r"), lambda message: bounced.append(message.no_responders))
        router.publish(subjects.work(CLUSTER, "gone"), b"", subjects.bounce(CLUSTER, "r", "gone"))
        await until(lambda: bounced)
        for bus in (router, worker, frontend):
            await bus.close()


@pytest.mark.parametrize("user", sorted(PASSWORDS))
async def test_redis_users_run_every_script_on_their_cluster_alone(user: str) -> None:
    async with RedisServer() as server:
        admin = await connect(server.url)
        for line in credentials.redis_users(CLUSTER, PASSWORDS).splitlines():
            _, name, *rules = line.split()
            if name != "default":
                await admin.call("ACL", "SETUSER", name, "reset", *rules)
        mine = await connect(server.url.replace("//", f"//{user}:{PASSWORDS[user]}@"), timeout_s=20)
        registry, index = RedisRegistry(mine, CLUSTER), RedisPrefixIndex(mine, CLUSTER)
        leases, counters = RedisLeases(mine, CLUSTER), RedisCounters(mine, CLUSTER)
        worker = await registry.register(spec(), ttl_s=30)
        assert await registry.refresh(worker, ttl_s=30)
        assert await index.update(worker, add=[1], remove=[])
        assert await index.lookup(MODEL, b"\1" + b"\0" * 7) == {worker.slot: 1}
        assert await index.size(MODEL) == 1
        await index.drop(worker)
        lease = await leases.acquire(MODEL, "r", ttl_s=30, epoch_at_least=1)
        assert lease is not None
        assert await leases.renew(lease, ttl_s=30)
        await leases.release(lease)
        await counters.save("x", {"a": 1.0})
        assert await counters.load("x") == {"a": 1.0}
        await registry.deregister(worker)
        while await index.sweep(MODEL):
            pass
        for forbidden in (
            ("FLUSHALL",),
            ("CONFIG", "GET", "*"),
            ("KEYS", "*"),
            ("GET", "tandem:{other}:x"),
            ("GET", "x"),
        ):
            with pytest.raises(StoreUnavailable, match="permission"):
                await mine.call(*forbidden)
        with pytest.raises(StoreUnavailable):
            await connect(server.url.replace("//", f"//{user}:wrong@"))
        await mine.aclose()
        await admin.aclose()


def test_files_are_private_and_passwords_stay(tmp_path: Path) -> None:
    credentials.make(tmp_path, cluster=CLUSTER, nats="nats:4222", redis="redis:6379")
    written = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert {str(path.relative_to(tmp_path)) for path in written} == {
        "nats/users.conf",
        "redis/users.acl",
        "console/token",
        *(f"{user}/{server}-url" for user in PASSWORDS for server in ("nats", "redis")),
    }
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in written)
    secret = credentials._password(tmp_path / "router")
    assert secret in written[tmp_path / "nats" / "users.conf"]
    assert secret not in written[tmp_path / "redis" / "users.acl"]
    assert secret not in written[tmp_path / "worker" / "nats-url"]
    credentials.make(tmp_path, cluster=CLUSTER, nats="nats:4222", redis="redis:6379")
    assert {path: path.read_text() for path in written} == written
