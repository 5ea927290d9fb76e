"""Two real engines exchange their roles under load, by an operator's command, without a restart: no request is lost,
none is answered otherwise than before."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tandem.models.prepare import prepare_smollm2
from tests.faults.recorded import recorded_answers, tie
from tests.harness.answers import BLOCK, MODEL
from tests.harness.client import describe, workers
from tests.harness.load import Load
from tests.harness.site import VLLM, Site

pytestmark = pytest.mark.timeout(900)
STREAMS, TOKENS = 8, 24
ISL = (40, 300)
#: Who has which role when: exchanged, both decode, back again.
CHANGES = (("prefill-1", "decode"), ("decode-1", "prefill"), ("decode-1", "decode"), ("prefill-1", "prefill"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    pools = [{"role": role, "engine_args": VLLM} for role in ("prefill", "decode")]
    model = {
        "name": MODEL, "path": str(prepare_smollm2()), "dtype": "float32", "max_model_len": 4096, "block_size": BLOCK,
        "pools": pools,
    }  # fmt: skip
    wanted: dict[str, Any] = {"models": [model], "policy": {"local_prefill": False}}
    made = Site(wanted, tmp_path_factory.mktemp("roles"))
    made.start(240.0)
    try:
        yield made
    finally:
        made.stop()


def change(site: Site, worker: str, role: str) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("TANDEM_")}
    command = [sys.executable, "-m", "tandem.cli.main", "role", worker, role]
    done = subprocess.run(
        command, env={**env, "XDG_RUNTIME_DIR": str(site.folder)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert f"-> {role}" in done.stdout


async def test_roles_change_under_load(site: Site) -> None:
    answers = await asyncio.to_thread(recorded_answers, site, TOKENS, ISL)
    pids = {name: site.pid_of(name) for name in ("prefill-1", "decode-1")}
    steps = {name: load.load.steps for name, load in site.loads().items()}
    async with Load(site.addresses, answers, seed=8, timeout_s=240.0) as load:
        streams = load.start(STREAMS, TOKENS, isl=ISL)
        await load.flowing(streams, 120.0)
        for worker, role in CHANGES:
            await asyncio.to_thread(change, site, worker, role)
            streams = load.start(STREAMS, TOKENS, isl=ISL)
            await load.flowing(streams, 120.0)
        hanging = await load.ended(240.0)
        assert not hanging, f"{len(hanging)} of {len(load.streams)} requests hang"
        assert not [stream.error for stream in load.streams if stream.error is not None]
        wrong = [s for s in load.streams if s.wrong and not await tie(site, answers, s)]
        assert not wrong, [(s.wrong, s.tokens, s.expected) for s in wrong]
        print(f"{len(load.streams)} requests over {len(CHANGES)} changes of role, all as expected")
    await asyncio.to_thread(site.settled, 60.0)
    assert {name: site.pid_of(name) for name in pids} == pids, "nobody was restarted"
    [router] = site.state()["routers"]
    assert {w.info.ref.id: w.info.role for w in workers(router)} == {
        name: describe(next(p["grpc"] for p in site.workers() if p["name"] == name)).info.role for name in pids
    }
    after = {name: load.load.steps for name, load in site.loads().items()}
    assert all(after[name] > steps[name] for name in pids), "each worked in both roles"
