"""What an operator can see and change of a running router, by the commands that they type."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem.sim.replay import replay, to_text
from tests.harness.answers import MODEL
from tests.harness.cluster import wait_for
from tests.harness.site import Site
from tests.harness.tenants import PROMPT, Clients, accounting, deployment, digest, engine_depths

pytestmark = pytest.mark.timeout(180)


def tandem(site: Site, *words: str, key: str = "key-ann") -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("TANDEM_")}
    env |= {"XDG_RUNTIME_DIR": str(site.folder), "TANDEM_API_KEY": key}
    command = [sys.executable, "-m", "tandem.cli.main", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def asked_json(site: Site, *words: str) -> dict[str, Any]:
    found = tandem(site, *words, "--json")
    assert found.returncode == 0, found.stderr
    answer: dict[str, Any] = json.loads(found.stdout)
    return answer


def leader(site: Site) -> str:
    name = str(wait_for(site.name_of_leader, 20.0, "a leader"))
    return next(str(router["grpc"]) for router in site.processes("router") if router["name"] == name)


@pytest.fixture
async def clients(site: Site, request: pytest.FixtureRequest) -> AsyncIterator[Clients]:
    """Of prompts that no test before has sent: what is cached costs nothing, and is sent to its engine at once."""
    async with Clients(site.grpc, seed=zlib.crc32(request.node.name.encode())) as made:
        yield made
    await asyncio.to_thread(site.settled, 60.0)


def test_explain_shows_every_candidate_with_every_term(site: Site) -> None:
    found = asked_json(site, "explain", "What is the capital of France?")
    candidates = found["candidates"]
    assert {one["decode_worker"] for one in candidates} == {"decode-1", "decode-2"}
    assert sum(one["chosen"] for one in candidates) == 1
    terms = [one["terms"] for one in candidates if not one["excluded"]]
    assert terms and all(set(each) == set(terms[0]) and len(each) >= 5 for each in terms)
    text = tandem(site, "explain", "--tokens", "700").stdout
    assert text.startswith("700 prompt tokens: ") and "decode-2" in text
    assert all(name in text for name in terms[0])


def test_explain_says_what_is_wrong(site: Site) -> None:
    for words, said in (
        (("explain",), "say a prompt"),
        (("explain", "x", "--model", "other"), "no model 'other'"),
        (("explain", "--tokens", "5", "--class", "gold"), "gold"),
        (("role", "nobody", "decode"), "no worker 'nobody'"),
        (("policy", "--apply", "/nowhere"), "cannot read"),
    ):
        found = tandem(site, *words)
        assert found.returncode == 2 and said in found.stderr, (words, found.stderr)
        assert "Traceback" not in found.stderr


async def test_policy_classes_and_tenants_change_while_it_runs(site: Site, clients: Clients) -> None:
    before = asked_json(site, "policy")
    assert [each["name"] for each in before["classes"]] == ["top", "batch"]
    for tenant, request_class, said in (("eve", "", "UNAUTHENTICATED"), ("ann", "gold", "INVALID_ARGUMENT")):
        refused = clients.ask(tenant, request_class)
        await clients.done(30.0)
        assert refused.error.startswith(said), refused.error
    waiting = [clients.ask("ann") for _ in range(40)]
    names = ("ann", "bob", "eve")
    new = deployment(tenants=[{"name": n, "weight": 2.0, "api_key_sha256": [digest(n)]} for n in names])
    new["classes"].insert(1, {"name": "gold", "rank": -1})
    new["policy"] = {"credit_s": 0.3}
    new["routers"] = 2
    file = site.folder / "new.yaml"
    file.write_text(yaml.safe_dump(new))
    applied = await asyncio.to_thread(tandem, site, "policy", "--apply", str(file))
    assert applied.returncode == 0, applied.stderr
    after = await asyncio.to_thread(asked_json, site, "policy")
    assert after["policy"] == {**before["policy"], "credit_s": 0.3}
    assert [each["name"] for each in after["classes"]] == ["top", "gold", "batch"]
    assert {each["name"]: each["weight"] for each in after["tenants"]} == dict.fromkeys(names, 2.0)
    later = [clients.ask("ann") for _ in range(40)]
    await asyncio.sleep(0.2)
    first = clients.ask("eve", "gold")
    await clients.done(60.0)
    assert first.complete, first.error
    assert all(each.complete for each in (*waiting, *later)), "what waited was served"
    assert first.ended_s < max(each.ended_s for each in later), "gold goes before what waits"


def test_what_needs_a_restart_is_refused(site: Site) -> None:
    new = {**deployment(routers=2), "limits": {"max_n": 3}}
    new["models"] = [{**new["models"][0], "name": "another"}]
    file = site.folder / "other.yaml"
    file.write_text(yaml.safe_dump(new))
    found = tandem(site, "policy", "--apply", str(file))
    assert found.returncode == 2 and "models, limits" in found.stderr, found.stderr


async def test_engines_stay_shallow_under_ten_times_their_capacity(site: Site, clients: Clients) -> None:
    """What waits, waits in the router. Thirty seconds of work come at once, and are looked at for a few."""
    router = await asyncio.to_thread(leader, site)
    for _ in range(150):
        for tenant in ("ann", "bob"):
            clients.ask(tenant)
    depths, queued = [], 0
    while queued < 100 or len(depths) < 40:
        await asyncio.sleep(0.2)
        depths += await asyncio.to_thread(engine_depths, router)
        queued = max(queued, (await asyncio.to_thread(accounting, router)).queued)
    print(f"deepest engine queue {max(depths)}, router's {queued}")
    # The credit, 0.1 s or the 0.3 s of the test before, is one prompt or two; some more await KV from the other worker.
    assert statistics.median(depths) <= 4 and 5 * max(depths) <= queued
    await clients.leave()


async def test_the_tenants_service_survives_the_leaders_death(site: Site, clients: Clients) -> None:
    """Served tokens are neither forgotten nor counted anew: the new leader goes on where the old one was."""
    old = await asyncio.to_thread(leader, site)
    name = site.name_of_leader()
    backlog = [clients.ask(tenant) for tenant in ("ann", "bob") for _ in range(60)]
    await asyncio.sleep(4.0)
    before = dict((await asyncio.to_thread(accounting, old)).service)
    assert before["ann"] > 0 and before["bob"] > 0
    await asyncio.sleep(1.5)  # counters are saved every second
    site.signal(name, signal.SIGSTOP)  # killed at once, it would be back, and lead again, before its lease is free
    new = await asyncio.to_thread(_other_leader, site, old)
    pid = site.signal(name, signal.SIGKILL)
    await asyncio.to_thread(site.wait_restarted, name, pid, 30.0)
    after = dict((await asyncio.to_thread(accounting, new)).service)
    assert all(after[tenant] >= before[tenant] for tenant in before), (before, after)
    await clients.done(90.0)
    assert all(each.complete for each in backlog), {each.error for each in backlog}
    end = dict((await asyncio.to_thread(accounting, new)).service)
    largest = PROMPT + 2 * 256  # as charged when placed, at the expected output length
    assert abs(end["ann"] - end["bob"]) <= 4 * largest, end


def _other_leader(site: Site, old: str) -> str:
    def found() -> str:
        name = site.name_of_leader()
        address = next((str(r["grpc"]) for r in site.processes("router") if r["name"] == name), "")
        return address if address != old else ""

    return str(wait_for(found, 30.0, "another leader"))


def test_what_was_recorded_meanwhile_is_decided_the_same(site: Site) -> None:
    """After all of the above, a change of policy and of leader included."""
    recordings = sorted(Path(site.folder, "recorded").glob("*.jsonl"))
    assert len(recordings) >= 3, "one of each router's start"
    found = [replay(path) for path in recordings]
    assert not any(each.different for each in found), "\n".join(to_text(each) for each in found)
    assert sum(each.decisions["place"] for each in found) > 100
    assert sum(each.lines["Reconfigured"] for each in found) >= 2
    assert MODEL in to_text(found[0])
