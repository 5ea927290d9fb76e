"""What a router records, the core decides again, and the same; a recording that was changed is found out."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from services.router.recording import KEPT, Recording, RecordingScheduler, recording_for
from tandem.cli.main import dispatch
from tandem.core.policy import Policy, RequestClass, Tenant
from tandem.core.profiles import PROFILES
from tandem.core.types import Role
from tandem.errors import ConfigError
from tandem.sim.replay import replay, to_text
from tests.unit.core import virtual_fleet
from tests.unit.core.virtual_fleet import VirtualFleet, request, spec

CLASSES = {
    "top": RequestClass(name="top", ttft_slo_s=0.3),
    "batch": RequestClass(name="batch", rank=1, background=True, min_share=0.05),
}
TENANTS = {"a": Tenant(name="a", weight=2.0), "b": Tenant(name="b")}
FLEET = [spec("p0", Role.PREFILL), spec("d0", Role.DECODE), spec("d1", Role.DECODE)]


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Overload with cancellations, a worker's death, lost events, and a new policy on the way."""
    path = tmp_path / "r.jsonl"
    recording = Recording(path, 1 << 26)

    def make(
        policy: Policy, *, classes: Mapping[str, RequestClass], tenants: Mapping[str, Tenant], rng: random.Random
    ) -> RecordingScheduler:
        return RecordingScheduler(
            policy, classes=classes, tenants=tenants, seed=5, profiles=PROFILES, recording=recording,
            model="m", router="r", now=0.0,
        )  # fmt: skip

    monkeypatch.setattr(virtual_fleet, "Scheduler", make)
    fleet = VirtualFleet(FLEET, policy=Policy(recalls=1), classes=CLASSES, tenants=TENANTS, lose=0.1, seed=3)
    rng = random.Random(3)
    for i in range(300):
        kind = rng.choice(["top", "batch"])
        at = rng.uniform(0.0, 20.0)
        asked = request(
            f"{i}", isl=rng.randrange(100, 6000), osl=50, at=at, tenant=rng.choice("ab"), request_class=kind
        )
        fleet.arrive(asked, {"d0": 64} if i % 3 == 0 else {})
        if i % 10 == 0:
            fleet.at(at + 0.3, lambda asked=asked: fleet.abort(asked.key))  # type: ignore[misc]
    fleet.at(6.0, lambda: fleet.kill("d1") and None)
    calmer = {**CLASSES, "top": RequestClass(name="top", best_effort=True)}
    fleet.at(10.0, lambda: fleet.scheduler.reconfigure(Policy(credit_s=0.2), classes=calmer, tenants={}, now=fleet.now))
    fleet.run(60.0)
    recording.close()
    return path


def test_the_core_decides_the_same_again(recorded: Path) -> None:
    found = replay(recorded)
    assert found.different == 0, to_text(found)
    assert found.decisions["place"] > 100
    assert found.decisions["end with a worker"] > 0
    assert found.decisions["end by an abort"] > 0
    assert found.decisions["refuse"] + found.decisions["refuse at once"] > 0
    assert dispatch(["sim", "--record", str(recorded)]) == 0


def test_a_changed_recording_is_found_out(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = recorded.read_bytes().splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if b'"kind":"place"' in line)
    for changed in (
        lines[place].replace(b'"priority":0', b'"priority":7') if b'"priority":0' in lines[place] else None,
        lines[place].replace(b'"decode_worker":"d', b'"decode_worker":"e'),
    ):
        if changed is None:
            continue
        recorded.write_bytes(b"".join([*lines[:place], changed, *lines[place + 1 :]]))
        assert dispatch(["sim", "--record", str(recorded)]) == 1
        assert f"line {place + 1}: recorded" in capsys.readouterr().out


def test_a_line_cut_off_at_the_end_is_left_out(recorded: Path) -> None:
    whole = replay(recorded)
    recorded.write_bytes(recorded.read_bytes()[:-7])
    assert sum(replay(recorded).lines.values()) == sum(whole.lines.values()) - 1


@pytest.mark.parametrize("text", ["", "{}\n", '{"type":"Polled","at":1}\n', "no json\n"])
def test_what_is_no_recording_is_said_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x"
    path.write_text(text)
    with pytest.raises(ConfigError, match="recording"):
        replay(path)
    with pytest.raises(ConfigError, match="recording"):
        replay(tmp_path / "missing")


def test_a_recording_ends_at_its_bound(recorded: Path, tmp_path: Path) -> None:
    recording = Recording(tmp_path / "small", 1000)
    lines = list(recorded.read_bytes().splitlines(keepends=True))
    assert len(lines[0]) > 1000
    scheduler = RecordingScheduler(
        Policy(), classes=CLASSES, tenants={}, seed=1, profiles=PROFILES, recording=recording,
        model="m", router="r", now=0.0,
    )  # fmt: skip
    scheduler.worker_up(FLEET[0], 1.0)
    scheduler.poll(2.0)
    recording.close()
    assert (tmp_path / "small").stat().st_size <= 1000


@pytest.mark.parametrize("instance", ["router-1", ""])
def test_old_recordings_go(tmp_path: Path, instance: str) -> None:
    for i in range(KEPT + 3):
        recording_for(tmp_path, "a/model", instance, 1_700_000_000_000 + i, 1000).close()
    recording_for(tmp_path, "other", "router-1", 1, 1000).close()
    assert len(list(tmp_path.iterdir())) == KEPT + 1
    with pytest.raises(ConfigError, match="cannot record"):
        recording_for(tmp_path / "router_1-other-1.jsonl", "m", "r", 1, 10)
