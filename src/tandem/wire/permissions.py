"""What each kind of process may say and hear on the bus. Pure; ``tests/unit/wire`` holds it against every subject.

Instances have names that nobody knows beforehand, so a permission is by kind: a frontend hears the tokens of all
frontends, but cannot place work, lead, or report load. Inboxes are by user.
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem.wire import subjects

_ANY = "*"


@dataclass(frozen=True, slots=True)
class Permissions:
    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def permissions_of(cluster: str) -> dict[str, Permissions]:
    """By user, which is the kind of process: frontend, router, worker, console."""
    space = f"tandem.{subjects.encode(cluster)}"

    def everything(kind: str, tokens: int = 1) -> str:
        return ".".join([space, kind, *[_ANY] * tokens])

    requests, bounces = everything("requests", 2), everything("bounces", 2)
    leader, work, tokens, aborts, load, events, lost = (
        everything(kind) for kind in ("leader", "work", "tokens", "aborts", "load", "events", "lost")
    )
    by_user = {
        "frontend": Permissions((requests, aborts, work), (leader, lost, tokens, bounces)),
        "router": Permissions((leader, work, tokens, aborts, lost), (leader, requests, aborts, events, load, bounces)),
        "worker": Permissions((work, tokens, load, events), (work, aborts, lost, bounces)),
        "console": Permissions((), (leader, load, events, lost)),
    }
    return {
        user: Permissions(granted.publish, (*granted.subscribe, f"{inbox_prefix(user)}.>"))
        for user, granted in by_user.items()
    }


def inbox_prefix(user: str) -> str:
    """Where answers to a user's requests go; the plain prefix without a user."""
    return f"_INBOX.{subjects.encode(user)}" if user else "_INBOX"
