from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tandem.adapters.supervision import EXIT_CONFIG, GiveUp, Restart, RestartPolicy, describe_status

POLICY = RestartPolicy(first_s=0.2, factor=2.0, longest_s=10.0, healthy_s=30.0, start_attempts=3)


def after(status: int = 1, failures: int = 0, ever_ready: bool = True, ready_for_s: float = 0.0) -> Restart | GiveUp:
    return POLICY.after_exit(status=status, failures=failures, ever_ready=ever_ready, ready_for_s=ready_for_s)


def test_waits_double_up_to_the_longest() -> None:
    verdicts = [after(failures=n) for n in range(8)]
    assert [v.after_s for v in verdicts if isinstance(v, Restart)] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]


def test_a_healthy_life_clears_the_record() -> None:
    assert after(failures=7, ready_for_s=30.0) == Restart(0.2, failures=1)
    assert after(failures=7, ready_for_s=29.0) == Restart(10.0, failures=8)


def test_who_was_never_ready_is_given_up() -> None:
    assert isinstance(after(failures=1, ever_ready=False), Restart)
    assert after(failures=2, ever_ready=False, status=-9) == GiveUp("failed to start 3 times, last with SIGKILL")


def test_a_wrong_configuration_is_not_tried_again_unless_it_once_worked() -> None:
    assert after(status=EXIT_CONFIG, ever_ready=False) == GiveUp("refused its configuration")
    assert isinstance(after(status=EXIT_CONFIG), Restart)


@given(st.integers(-64, 255), st.integers(0, 10**9), st.floats(0, 1e9))
def test_who_was_ready_once_is_never_given_up_and_never_waits_too_long(
    status: int, failures: int, ready_for_s: float
) -> None:
    verdict = after(status=status, failures=failures, ready_for_s=ready_for_s)
    assert isinstance(verdict, Restart)
    assert POLICY.first_s <= verdict.after_s <= POLICY.longest_s
    assert verdict.failures >= 1


def test_statuses_in_words() -> None:
    assert [describe_status(s) for s in (0, 3, -9, -15, -250)] == [
        "status 0",
        "status 3",
        "SIGKILL",
        "SIGTERM",
        "signal 250",
    ]
