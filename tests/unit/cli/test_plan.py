"""A small plan, whole: the same for the same seed, and its deployment file is one that `tandem up` takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandem.adapters import deployment as deployment_file
from tandem.adapters import timing
from tandem.adapters.deployment import PoolRole
from tandem.cli.main import dispatch
from tandem.core.profiles import PROFILES
from tandem.sim.fleet import make_fleet
from tandem.sim.plan_report import Plan, chart
from tandem.sim.planning import Candidate, Found, Group, Level, between, levels, models, sizes
from tandem.wire import profile_file

SMALL = ("--requests", "300", "--quiet", "--isl", "1500", "--osl", "60", "--model", "8b", "--jobs", "1")


def plan(*words: str) -> int:
    return dispatch(["plan", *SMALL, *words])


def test_the_cheapest_fleet_comes_with_its_deployment_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page, figures = tmp_path / "d.yaml", tmp_path / "p.html", tmp_path / "p.json"
    words = ("--gpus", "h100=2", "--rate", "3", "--deployment", str(file), "--html", str(page), "--json", str(figures))
    assert plan(*words) == 0
    out = capsys.readouterr().out
    for said in ("cheapest:", "best goodput per GPU:", "what breaks first", "frontier", "h100 $3/h", "simulated"):
        assert said in out
    assert out.count("(1.0x)") == 1 and "% attained" in out
    wanted = deployment_file.read(file)
    assert timing.known(wanted).keys() == PROFILES.keys()
    assert wanted.classes[0].ttft_slo_per_token_s == 0.25e-3
    assert dispatch(["up", "-f", str(file), "--print-deployment"]) == 0
    assert "<svg" in page.read_text() and "cheapest" in page.read_text()
    first = figures.read_text()
    found = json.loads(first)
    assert [level["gpus"] for level in found["levels"]] == [{"h100": 1}, {"h100": 2}]
    first_enough = next(level for level in found["levels"] if level["meets"])
    assert found["cheapest"] in (first_enough["aggregated"]["fleet"], first_enough["split"]["fleet"])
    assert plan(*words, "--jobs", "2") == 0
    assert figures.read_text() == first, "the same seed, the same plan, however many processes"


def test_too_much_for_these_gpus_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--gpus", "a100=1", "--rate", "500") == 1
    assert "no fleet of these GPUs serves that" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpus", "h100=two", "--rate", "1"), "TYPE=N"),
        (("--gpus", "b200=2", "--rate", "1"), "no timing profile of 8b on 'b200'"),
        (("--gpus", "h100=1", "--gpus", "h100=2", "--rate", "1"), "twice"),
        (("--gpus", "h100=1"), "say what to serve"),
        (("--gpus", "h100=1", "--rate", "0"), "--rate must be positive"),
        (("--gpus", "h100=1", "--rate", "1", "--price", "a100=2"), "--price"),
        (("--gpus", "h100=1", "--workload", "smooth-chat"), "--isl and --osl"),
        (("--gpus", "h100=1", "--rate", "1", "--slo", "fast"), "no SLO 'fast'"),
        (("--gpus", "/nowhere.json=1", "--rate", "1"), "timing profile"),
    ],
)
def test_a_mistake_is_named(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*words) == 2
    assert said in capsys.readouterr().err


def test_all_ways_to_use_the_gpus_are_there() -> None:
    assert set(models()["70b"]) == {"h100", "a100"}
    kinds = sizes("70b", "h100")
    assert [size.gpus for size in kinds] == [4, 8]
    assert [str(level) for level in levels([(kinds, 16)])] == ["4 H100", "8 H100", "12 H100", "16 H100"]
    mixed = levels([(kinds, 8), (sizes("70b", "a100"), 8)])
    assert len(mixed) == 8 and str(mixed[-1]) == "8 H100 + 8 A100"
    many = levels([(sizes("8b", "h100"), 64)])
    assert len(many) == 8 and many[-1].total == 64, "thinned out"


def test_levels_in_between_are_looked_at_where_the_cheapest_may_be() -> None:
    offered = [(sizes("8b", "h100"), 64)]
    [size] = sizes("8b", "h100")
    fleet = Candidate((Group(size, 0, 1),))
    found = [Found(level, fleet, 1.0 * level.total, None, 0.0, 1) for level in levels(offered)]
    finer = between(offered, found, {"h100": 1.0}, 20.5)
    assert [level.total for level in finer] == [23, 22, 21, 20]
    assert between(offered, found, {"h100": 1.0}, 1000.0) == []


def test_the_frontier_leaves_out_what_is_dearer_and_serves_no_more() -> None:
    [size] = sizes("8b", "h100")
    fleet = Candidate((Group(size, 0, 1),))
    rates = {1: 4.0, 2: 3.0, 3: 9.0}
    found = [Found(Level((("h100", n),), (size,)), fleet, rate, None, 0.0, 1) for n, rate in rates.items()]
    made = Plan(found, {"h100": 2.0}, 3.0, 3.5)
    assert [each.rate for each in made.frontier] == [4.0, 9.0]
    assert [each.rate for each in made.cheapest] == [4.0, 9.0]
    assert made.best_per_gpu is found[0]
    assert sum(line.count("A") for line in chart(made)[:-1]) == 2


def test_candidates_are_fleets_of_the_simulator() -> None:
    h100, a100 = sizes("70b", "h100")[0], sizes("70b", "a100")[0]
    mixed = Candidate((Group(h100, 2, 1), Group(a100, 0, 3)))
    fleet = make_fleet(h100.kind, mixed.split)
    assert str(fleet) == "2P4D" and fleet.gpus == 24
    assert str(mixed) == "2 prefill + 1 decode on H100 x4, 3 decode on A100 x4"


def test_a_measured_profile_is_a_gpu_type(tmp_path: Path) -> None:
    kind = profile_file.Kind("vllm", "1", "m", "bfloat16", 32, 500, 23040, 256, 32, 4096, 1e9)
    file = tmp_path / "box.json"
    file.write_text(profile_file.dump(profile_file.ProfileFile(PROFILES["cpu-smollm2"], kind)))
    [size] = sizes("anything", str(file))
    assert (size.gpu, size.gpus, size.hardware.kv_tokens, size.hardware.chunk_tokens) == ("box", 1, 16_000, 256)
    assert PoolRole.AGGREGATED.value == "aggregated"
