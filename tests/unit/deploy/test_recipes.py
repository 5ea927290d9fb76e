"""Recipes for machines that are not here: their memory arithmetic, and that each file is one that Tandem reads."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tandem.adapters.deployment import PoolRole, read
from tandem.core.profiles import PROFILES
from tandem.engine.vllm_options import VllmOptions

RECIPES = Path(__file__).resolve().parents[3] / "deploy" / "recipes"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipes_memory", RECIPES / "memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


memory = _load()
FITS = [
    (gpus_of_a_node, found)
    for recipe, gpu_bytes, gpus_of_a_node in memory.RECIPES
    for found in memory.fits_of(recipe, read(RECIPES / recipe / "deployment.yaml"), gpu_bytes)
]
IDS = [f"{found.recipe}/{found.pool.pool_name}" for _, found in FITS]


def test_every_recipe_is_counted() -> None:
    assert {recipe for recipe, *_ in memory.RECIPES} == {path.parent.name for path in RECIPES.glob("*/deployment.yaml")}


@pytest.mark.parametrize(
    ("name", "billions", "checkpoint_gib", "kv_kib"),
    [
        # Parameters from the models' cards; gpt-oss's card gives its checkpoint, 60.8 GiB, too.
        ("Llama-3.1-8B-Instruct", 8.03, 14.96, 128),
        ("Llama-3.1-70B-Instruct-FP8", 70.55, 67.7, 320),
        ("gpt-oss-120b", 116.8, 60.8, 72),
    ],
)
def test_shapes_come_to_what_is_published(name: str, billions: float, checkpoint_gib: float, kv_kib: int) -> None:
    shape = memory.SHAPES[name]
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.002)
    assert shape.weight_bytes / 2**30 == pytest.approx(checkpoint_gib, rel=0.005)
    assert shape.kv_bytes_per_token / 1024 == kv_kib


@pytest.mark.parametrize(("gpus_of_a_node", "found"), FITS, ids=IDS)
def test_weights_fit_and_leave_room_for_a_full_context(gpus_of_a_node: int, found: object) -> None:
    assert found.full_contexts >= 1.5  # type: ignore[attr-defined]
    assert found.gpus <= gpus_of_a_node  # type: ignore[attr-defined]


@pytest.mark.parametrize("recipe", [recipe for recipe, *_ in memory.RECIPES])
def test_workers_of_a_node_share_its_gpus_and_a_kv_layout(recipe: str) -> None:
    of_recipe = [(gpus, found) for gpus, found in FITS if found.recipe == recipe]
    nodes = 2 if "two-nodes" in recipe else 1
    assert sum(found.gpus * found.pool.replicas for _, found in of_recipe) == nodes * of_recipe[0][0]
    assert len({found.gpus for _, found in of_recipe}) == 1, "KV moves between workers that are split alike"
    roles = {found.pool.role for _, found in of_recipe}
    assert roles in ({PoolRole.PREFILL, PoolRole.DECODE}, {PoolRole.AGGREGATED})


@pytest.mark.parametrize(("gpus_of_a_node", "found"), FITS, ids=IDS)
def test_performance_models_begin_at_a_known_profile(gpus_of_a_node: int, found: object) -> None:
    options, _ = VllmOptions.split(dict(found.pool.engine_args))  # type: ignore[attr-defined]
    assert options.perf_profile == "" or options.perf_profile in PROFILES


def test_the_page_has_the_table_that_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    memory.main()
    assert capsys.readouterr().out in (RECIPES / "README.md").read_text()
