"""Knobs, targets, and what counts as met."""

from __future__ import annotations

import dataclasses

import pytest

from tandem.core.demand import OutputLengths
from tandem.core.policy import Policy, RequestClass, Tenant, policy_from
from tandem.core.slo import Attainment, Outcome, attainment, deadline_s, targets, ttft_slo_s
from tandem.errors import ConfigError
from tests.unit.core.virtual_fleet import request


@pytest.mark.parametrize("kind", [Policy, RequestClass, Tenant])
def test_every_knob_has_a_default_and_a_meaning(kind: type) -> None:
    for knob in dataclasses.fields(kind):
        assert knob.default is not dataclasses.MISSING
        assert len(knob.metadata["help"]) > 8, knob.name


def test_a_policy_comes_from_the_deployment_file() -> None:
    policy = policy_from({"credit_s": 1, "scan_depth": 3, "learn": False})
    assert (policy.credit_s, policy.scan_depth, policy.learn) == (1.0, 3, False)
    assert policy_from({}) == Policy()


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"credits": 1}, "no knob 'credits'"),
        ({"credit_s": "fast"}, "type float"),
        ({"scan_depth": 1.5}, "type int"),
        ({"scan_depth": True}, "type int"),
        ({"credit_s": -1.0}, "negative"),
        ({"kv_share": 1.5}, r"\(0, 1\]"),
    ],
)
def test_a_wrong_knob_is_the_users_mistake(values: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        policy_from(values)


def test_slos_are_opt_in() -> None:
    plain = RequestClass(ordering_deadline_s=4.0)
    tiered = RequestClass(ttft_slo_s=1.0, ttft_slo_per_token_s=0.00025)
    r = request("r", isl=2000, at=10.0)
    assert ttft_slo_s(r, plain) is None
    assert ttft_slo_s(r, tiered) == 1.5
    assert ttft_slo_s(request("r", ttft_slo_s=0.3), tiered) == 0.3
    assert (deadline_s(r, plain), deadline_s(r, tiered)) == (14.0, 11.5)


def test_targets_without_an_slo_are_what_the_fleet_can_do() -> None:
    r, policy = request("r"), Policy()
    plain = RequestClass()
    assert targets(r, plain, policy, 0.1, 0.01).ttft_s == 0.2
    assert targets(r, RequestClass(background=True), policy, 0.1, 0.01).ttft_s == 5.0
    assert targets(r, plain, policy, 0.1, 0.01).tpot_s == 0.1
    assert targets(r, plain, policy, 8.0, 0.2).ttft_s == 16.0
    assert targets(r, plain, policy, 8.0, 0.2).tpot_s == 0.4
    assert not targets(r, plain, policy, 8.0, 0.2).binding
    tight = RequestClass(ttft_slo_s=1.0, tpot_slo_s=0.05)
    for idle_s in (8.0, 0.0):
        aim = targets(r, tight, policy, idle_s, idle_s / 40)
        assert (aim.ttft_s, aim.tpot_s, aim.binding, aim.near) == (1.0, 0.05, True, False)
    assert targets(r, tight, policy, 8.0, 0.2, late=True).ttft_s == 16.0


def outcome(isl: int, ttft: float | None, tpot: float = 0.02) -> Outcome:
    return Outcome(isl, 100, ttft, tpot, 1.0, 0.05)


def test_goodput_counts_requests_tokens_and_every_length() -> None:
    assert attainment([]).good
    short = [outcome(100, 0.5)] * 95
    assert attainment(short + [outcome(100, None)] * 5).good
    # Dropping the giants leaves request attainment high, and is not good.
    giants = attainment(short + [outcome(30000, None)] * 5)
    assert giants.by_requests == 0.95
    assert giants.by_tokens < 0.2
    assert not giants.good
    assert not attainment([outcome(100, 0.5, tpot=0.06)]).good
    one_late = attainment([outcome(i, 0.5 if i != 3 else 2.0) for i in range(8)])
    assert one_late == Attainment(0.875, one_late.by_tokens, (1.0, 0.5, 1.0, 1.0))
    assert one_late.by_tokens == pytest.approx(1 - 103 / 828)


def test_output_lengths_are_learnt_and_bounded_by_the_request() -> None:
    lengths = OutputLengths(Policy())
    assert lengths.expected("a", request("r", osl=1000)) == 256
    assert lengths.expected("a", request("r", osl=10)) == 10
    for i in range(300):
        lengths.learn("a", 90 if i % 2 else 110)
    assert lengths.expected("a", request("r", osl=1000)) == pytest.approx(100, abs=3)
    assert 110 <= lengths.generous("a", request("r", osl=1000)) <= 140
    assert lengths.generous("a", request("r", osl=50)) == 50
    assert lengths.expected("b", request("r", osl=1000)) == 256
