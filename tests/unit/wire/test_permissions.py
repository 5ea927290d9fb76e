"""Who may say and hear what: every subject has somebody for each, and nobody can pose as another kind of process."""

from __future__ import annotations

import inspect

import pytest

from tandem.adapters.memory_bus import matches
from tandem.wire import subjects
from tandem.wire.permissions import inbox_prefix, permissions_of

CLUSTER = "c.1"
USERS = permissions_of(CLUSTER)
#: A subject of each kind, made by the one function that there is for it.
MADE = {
    name: function(CLUSTER, *(f"{parameter}.x/1" for parameter in [*inspect.signature(function).parameters][1:]))
    for name, function in vars(subjects).items()
    if inspect.isfunction(function) and [*inspect.signature(function).parameters][:1] == ["cluster"]
}


def may(action: str, user: str, subject: str) -> bool:
    return any(matches(granted, subject) for granted in getattr(USERS[user], action))


@pytest.mark.parametrize("name", sorted(MADE))
def test_somebody_hears_every_subject_and_somebody_says_it(name: str) -> None:
    subject = MADE[name]
    assert any(may("subscribe", user, subject) for user in USERS)
    # Bounces are the server's own words to the publisher; a wildcard is for listening only.
    if "*" not in subject and name != "bounce":
        assert any(may("publish", user, subject) for user in USERS)


def test_only_routers_lead_place_and_declare_dead() -> None:
    for subject in (subjects.leader(CLUSTER, "m"), subjects.lost(CLUSTER, "m")):
        assert [user for user in USERS if may("publish", user, subject)] == ["router"]


def test_only_workers_report_load_and_nobody_but_frontends_submits() -> None:
    assert [user for user in USERS if may("publish", user, subjects.load(CLUSTER, "w"))] == ["worker"]
    assert [user for user in USERS if may("publish", user, subjects.requests(CLUSTER, "m", "r"))] == ["frontend"]


def test_prompts_are_for_routers_and_workers_only() -> None:
    assert [user for user in USERS if may("subscribe", user, subjects.requests(CLUSTER, "m", "r"))] == ["router"]
    assert [user for user in USERS if may("subscribe", user, subjects.work(CLUSTER, "w"))] == ["worker"]


def test_another_cluster_is_out_of_reach() -> None:
    for user in USERS:
        for subject in (subjects.leader("other", "m"), subjects.work("other", "w"), "anything", "$SYS.REQ.SERVER.PING"):
            assert not may("publish", user, subject)
            assert not may("subscribe", user, subject)


def test_inboxes_are_by_user() -> None:
    assert may("subscribe", "router", f"{inbox_prefix('router')}.abc.1")
    assert not may("subscribe", "frontend", f"{inbox_prefix('router')}.abc.1")


@pytest.mark.parametrize("peer", ["w1", "a w.1/é"])
def test_a_bounce_about_a_message_is_spelt_as_any_other(peer: str) -> None:
    made = subjects.and_number(subjects.bounce_of(CLUSTER, "r/m", peer), 31)
    assert made == subjects.bounce(CLUSTER, "r/m", peer, "31")
    assert subjects.last_token(made) == f"{peer} 31"
