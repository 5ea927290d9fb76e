"""Users and passwords of a cluster's NATS and Redis, made once, and the files that the servers and services read.

    python -m tandem.adapters.credentials FOLDER [--cluster NAME] [--nats HOST:PORT] [--redis HOST:PORT]

    FOLDER/nats/users.conf       for nats-server: a user per kind of process, with what it may say and hear
    FOLDER/redis/users.acl       for Redis: the same users, on the cluster's keys only; Redis holds no plain password
    FOLDER/<kind>/nats-url       for TANDEM_NATS_URL_FILE of that kind of process
    FOLDER/<kind>/redis-url      for TANDEM_REDIS_URL_FILE
    FOLDER/console/token         for TANDEM_CONSOLE_TOKEN_FILE, and for the operator's browser

Each subfolder is one party's secret and may lie on a volume of its own. Passwords that are there already stay, so
that it may run at each start; nothing is ever printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from tandem.wire.permissions import Permissions, permissions_of
from tandem.wire.subjects import encode

#: What the scripts of ``adapters/lua`` and the client need; neither the keyspace as a whole nor the server's business.
_REDIS_COMMANDS = "-@all +@connection +@string +@hash +@set +@keyspace +eval +evalsha -@dangerous -@admin"
#: For a health check that has no secret.
_REDIS_HEALTH = "user health on nopass -@all +ping"


def make(folder: Path, *, cluster: str, nats: str, redis: str) -> None:
    """Writes all files. OSError when it cannot."""
    users = permissions_of(cluster)
    passwords = {user: _password(folder / user) for user in users}
    for user, password in passwords.items():
        _write(folder / user / "nats-url", f"nats://{user}:{password}@{nats}\n")
        _write(folder / user / "redis-url", f"redis://{user}:{password}@{redis}/0\n")
    if not (folder / "console" / "token").exists():
        _write(folder / "console" / "token", secrets.token_urlsafe(24) + "\n")
    _write(folder / "nats" / "users.conf", nats_users(users, passwords))
    _write(folder / "redis" / "users.acl", redis_users(cluster, passwords))


def nats_users(users: Mapping[str, Permissions], passwords: Mapping[str, str]) -> str:
    """For an ``include`` in nats-server's configuration."""
    lines = ["authorization {", "  users: ["]
    for user, granted in users.items():
        allowed = f"publish: {json.dumps([*granted.publish])}, subscribe: {json.dumps([*granted.subscribe])}"
        lines.append(f'    {{user: "{user}", password: "{passwords[user]}", permissions: {{{allowed}}}}}')
    return "\n".join([*lines, "  ]", "}", ""])


def redis_users(cluster: str, passwords: Mapping[str, str]) -> str:
    """For ``aclfile``."""
    lines = ["user default off", _REDIS_HEALTH]
    for user, password in passwords.items():
        digest = hashlib.sha256(password.encode()).hexdigest()
        lines.append(f"user {user} on #{digest} resetchannels ~tandem:{{{encode(cluster)}}}* {_REDIS_COMMANDS}")
    return "\n".join([*lines, ""])


def _password(folder: Path) -> str:
    """The one in the files, or a new one."""
    try:
        found = urlsplit((folder / "nats-url").read_text().strip()).password
    except FileNotFoundError:
        found = None
    return found or secrets.token_urlsafe(24)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.touch(mode=0o600)
    fresh.write_text(text)
    fresh.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cluster", default="default", help="as in the deployment file")
    parser.add_argument("--nats", default="nats:4222", help="where services find NATS")
    parser.add_argument("--redis", default="redis:6379", help="where services find Redis")
    args = parser.parse_args()
    try:
        make(args.folder, cluster=args.cluster, nats=args.nats, redis=args.redis)
    except OSError as error:
        print(f"error: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
