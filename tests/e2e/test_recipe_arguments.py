"""vLLM's own argument parser accepts what the recipes and compose files give each worker. Nothing is started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tandem.adapters.deployment import read
from tandem.engine.vllm_options import VllmOptions

pytest.importorskip("vllm")

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
FILES = sorted(
    [*DEPLOY.glob("recipes/*/deployment.yaml"), DEPLOY / "compose" / "gpu.yaml", DEPLOY / "compose" / "deployment.yaml"]
)
#: As deploy/recipes/README.md has them for a worker that spans nodes.
SPANNING: dict[str, Any] = {
    "tensor_parallel_size": 8,
    "pipeline_parallel_size": 2,
    "distributed_executor_backend": "mp",
    "nnodes": 2,
    "node_rank": 0,
    "master_addr": "10.0.0.1",
}
_PARSE = """
import dataclasses, json, sys
from vllm import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
fields = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
for name, given in json.load(sys.stdin).items():
    unknown = set(given) - fields
    assert not unknown, f"{name}: no engine argument {unknown}"
    argv = [word for key, value in given.items() for word in ("--" + key.replace("_", "-"), str(value))]
    parsed = AsyncEngineArgs.from_cli_args(parser.parse_args(argv))
    for key, value in given.items():
        assert getattr(parsed, key) == value, f"{name}: {key} became {getattr(parsed, key)!r}"
print("accepted")
"""


@pytest.mark.timeout(900)
def test_the_parser_takes_them_as_they_are() -> None:
    given = {"a worker that spans nodes": SPANNING}
    for file in FILES:
        for model in read(file).models:
            for pool in model.pools:
                if pool.engine == "vllm":
                    _, arguments = VllmOptions.split(dict(pool.engine_args))
                    common = {"model": model.path, "max_model_len": model.max_model_len, "dtype": model.dtype}
                    given[f"{file.parent.name} {pool.pool_name}"] = {**arguments, **common}
    assert len(given) >= 10
    done = subprocess.run(
        [sys.executable, "-c", _PARSE], input=json.dumps(given), capture_output=True, text=True, timeout=840
    )
    assert done.stdout.strip().endswith("accepted"), done.stderr[-3000:]
