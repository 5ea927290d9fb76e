"""Every NATS subject, one function each.

``tandem.<cluster>.<kind>.<token>...``; each variable token is encoded, because model names hold ``.`` and ``/``.
"""

from __future__ import annotations

import re
from functools import lru_cache

_UNSAFE = re.compile(rb"[^a-zA-Z0-9-]")
_SPACE = "_20"  # encoded


def _encode(token: str) -> str:
    if token.isascii() and token.replace("-", "").isalnum():  # as most are: nothing to do
        return token
    if not token:
        return "_"
    return _UNSAFE.sub(lambda found: b"_%02x" % found[0][0], token.encode()).decode()


@lru_cache(maxsize=4096)  # names of models and processes come again with every message
def encode(token: str) -> str:
    """One subject token: letters, digits and ``-`` stay, every other UTF-8 byte becomes ``_xx``. Injective."""
    return _encode(token)


def decode(token: str) -> str:
    """Inverse of ``encode``. ValueError for what encode never makes."""
    if token == "_":
        return ""
    head, *rest = token.split("_")
    data = bytearray(head.encode("ascii"))
    for part in rest:
        data.append(int(part[:2], 16))
        data += part[2:].encode("ascii")
    return data.decode()


def last_token(subject: str) -> str:
    """The last token of a subject, decoded: the worker of a load report, the ``about`` of a bounce."""
    return decode(subject.rpartition(".")[2])


def leader(cluster: str, model: str) -> str:
    """router leader -> everyone: LeaderAnnouncement."""
    return f"tandem.{encode(cluster)}.leader.{encode(model)}"


def all_leaders(cluster: str) -> str:
    return f"tandem.{encode(cluster)}.leader.*"


def requests(cluster: str, model: str, router: str) -> str:
    """frontend -> one router instance: Submit."""
    return f"tandem.{encode(cluster)}.requests.{encode(model)}.{encode(router)}"


@lru_cache(maxsize=4096)
def work(cluster: str, worker: str) -> str:
    """router, prefill worker or frontend -> one worker: WorkerMessage."""
    return f"tandem.{encode(cluster)}.work.{encode(worker)}"


def tokens(cluster: str, frontend: str) -> str:
    """worker or router -> one frontend: TokenFrame."""
    return f"tandem.{encode(cluster)}.tokens.{encode(frontend)}"


def bounces(cluster: str, sender: str) -> str:
    """Prefix of the reply subjects of one sender, whose last token says what it was sent about."""
    return f"tandem.{encode(cluster)}.bounces.{encode(sender)}.*"


@lru_cache(maxsize=4096)
def bounce_of(cluster: str, sender: str, peer: str) -> str:
    """``bounce`` about a process: the same with every message to it."""
    return bounce(cluster, sender, peer)


def bounce(cluster: str, sender: str, *about: str) -> str:
    """Reply subject of a message: the server's 503 (no responders) comes back here. ``about`` = whom it was for, and
    what: its last token decodes to these, with a space between."""
    return f"tandem.{encode(cluster)}.bounces.{encode(sender)}.{_SPACE.join(map(_encode, about))}"


def and_number(bounce: str, number: int) -> str:
    """A bounce about a process made one about a message to it: only what is new with every message is spelt out."""
    return f"{bounce}{_SPACE}{number}"


def aborts(cluster: str, model: str) -> str:
    """frontend -> router and workers of the model: Abort."""
    return f"tandem.{encode(cluster)}.aborts.{encode(model)}"


def load(cluster: str, worker: str) -> str:
    """worker -> routers, console: LoadReport."""
    return f"tandem.{encode(cluster)}.load.{encode(worker)}"


def all_loads(cluster: str) -> str:
    return f"tandem.{encode(cluster)}.load.*"


def events(cluster: str, model: str) -> str:
    """worker -> routers, console: LifecycleEvents."""
    return f"tandem.{encode(cluster)}.events.{encode(model)}"


def lost(cluster: str, model: str) -> str:
    """router leader -> frontends and workers: WorkerLost."""
    return f"tandem.{encode(cluster)}.lost.{encode(model)}"


def all_lost(cluster: str) -> str:
    return f"tandem.{encode(cluster)}.lost.*"
