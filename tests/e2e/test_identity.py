"""Greedy output is the same, token for token, whoever prefills: a bare vLLM, the decode worker, or a prefill worker.

In float32. Where two runs differ, the bare engine's logprob gap at that position is shown; below 1e-4 the two tokens
are a tie that any change of batch shape may flip, and what follows it is not compared.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tandem.models.prepare import prepare_smollm2
from tests.e2e.prompts import CHATS, natural_prompts
from tests.harness.client import Client, describe, flush, workers
from tests.harness.cluster import Cluster, wait_for

MODEL = "SmolLM2-135M-Instruct"
MAX_TOKENS = 16
TIE = 1e-4
AT_ONCE = 6

pytestmark = pytest.mark.timeout(1500)


def deployment(model_folder: str, *, local: bool, remote: bool) -> dict[str, Any]:
    engine_args = {"kv_cache_memory_bytes": 1 << 30, "max_num_batched_tokens": 512}
    return {
        "models": [
            {
                "name": MODEL,
                "path": model_folder,
                "dtype": "float32",
                "max_model_len": 5120,
                "pools": [
                    {"role": "prefill", "engine_args": engine_args},
                    {"role": "decode", "engine_args": engine_args},
                ],
            }
        ],
        # Not flexible: a prefill worker that also decoded would make the legs something else than they claim.
        "policy": {"local_prefill": local, "remote_prefill": remote, "flexible": False},
    }


@pytest.fixture(scope="module")
def model_folder() -> str:
    return str(prepare_smollm2())


@pytest.fixture(scope="module")
def prompts(model_folder: str) -> list[list[int]]:
    return natural_prompts(Tokenizer.from_file(model_folder + "/tokenizer.json"), 20, 20, 4000)


@pytest.fixture(scope="module")
def reference(model_folder: str, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM alone answers."""
    out = tmp_path_factory.mktemp("bare") / "answers.json"
    job = {"model": model_folder, "prompts": prompts, "chats": CHATS, "max_tokens": MAX_TOKENS}
    script = Path(__file__).with_name("bare_engine.py")
    subprocess.run([sys.executable, script, out], input=json.dumps(job), text=True, check=True, timeout=900)
    answers: dict[str, Any] = json.loads(out.read_text())
    return answers


@pytest.fixture(scope="module")
def cluster(
    model_folder: str, reference: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    made = Cluster(deployment(model_folder, local=True, remote=True), tmp_path_factory.mktemp("cluster"))
    with made.start(180):
        yield made


class Legs:
    """The cluster with only one kind of prefill allowed."""

    def __init__(self, cluster: Cluster, model_folder: str, leg: str) -> None:
        self.leg = leg
        self.client = Client(cluster.grpc, MODEL)
        self._cluster = cluster
        cluster.write(deployment(model_folder, local=leg == "local", remote=leg == "remote"))
        # The routers of a local cluster read the supervisor's copy of the file.
        [copy] = cluster.folder.glob("tandem/*/deployment.yaml")
        copy.write_text(cluster.deployment_file.read_text())
        marker = f"local_prefill={leg == 'local'}, remote_prefill={leg == 'remote'}, flexible=False"
        before = cluster.log().count(marker)
        cluster.signal(cluster.processes("router")[0]["name"], signal.SIGHUP)
        wait_for(lambda: cluster.log().count(marker) > before, 10, "policy reloaded")
        [self.router] = cluster.state()["routers"]
        self.addresses = {w.info.ref.grpc_address for w in workers(self.router, MODEL)}

    def flush(self) -> None:
        for address in self.addresses:
            flush(address)


@pytest.fixture(scope="module", params=["remote", "local"])
def legs(request: pytest.FixtureRequest, cluster: Cluster, model_folder: str) -> Iterator[Legs]:
    made = Legs(cluster, model_folder, request.param)
    yield made
    made.client.close()


def check(expected: dict[str, Any], got: list[int], what: str) -> None:
    """The same tokens, up to a tie."""
    want = expected["tokens"]
    assert len(got) == len(want), f"{what}: {len(got)} tokens instead of {len(want)}"
    for i, (a, b) in enumerate(zip(want, got, strict=True)):
        if a != b:
            gap = expected["gaps"][i]
            report = (
                f"{what}: token {i} is {b} instead of {a}; logprob gap {gap:.2e}, runner-up {expected['second'][i]}"
            )
            assert gap < TIE and b == expected["second"][i], report
            print("tie:", report)
            return


def test_cold_then_warm(legs: Legs, prompts: list[list[int]], reference: dict[str, Any]) -> None:
    legs.flush()
    for state in ("cold", "warm"):
        for i, prompt in enumerate(prompts):
            answer = legs.client.generate(prompt, MAX_TOKENS)
            check(reference["prompts"][i], answer.tokens, f"{legs.leg}, {state}, prompt {i} ({len(prompt)} tokens)")
            if state == "warm" and len(prompt) > 64:
                assert answer.usage.cached_tokens >= (len(prompt) - 1) // 32 * 32, "the prefix was not reused"


def test_partly_warm(legs: Legs, prompts: list[list[int]], reference: dict[str, Any]) -> None:
    legs.flush()
    for i, prompt in enumerate(prompts[8::2]):
        legs.client.generate(prompt[: len(prompt) // 2], 2)
        answer = legs.client.generate(prompt, MAX_TOKENS)
        check(reference["prompts"][8 + 2 * i], answer.tokens, f"{legs.leg}, partly warm, {len(prompt)} tokens")
        assert 0 < answer.usage.cached_tokens <= len(prompt) // 2 + 2


def test_several_at_once(legs: Legs, prompts: list[list[int]], reference: dict[str, Any]) -> None:
    legs.flush()
    chosen = [*range(0, 20, 2), 19]
    answers = legs.client.generate_all([prompts[i] for i in chosen], MAX_TOKENS, at_once=AT_ONCE)
    for i, answer in zip(chosen, answers, strict=True):
        check(reference["prompts"][i], answer.tokens, f"{legs.leg}, {AT_ONCE} at once, {len(prompts[i])} tokens")


def test_chats(legs: Legs, reference: dict[str, Any]) -> None:
    legs.flush()
    for turn in range(3):
        for c, chat in enumerate(reference["chats"]):
            answer = legs.client.generate(chat[turn]["prompt"], MAX_TOKENS)
            check(chat[turn], answer.tokens, f"{legs.leg}, chat {c}, turn {turn}")


def test_the_legs_were_what_they_claim(legs: Legs, prompts: list[list[int]]) -> None:
    """Remote: the prefill worker computes; local: it does not."""
    by_role = {w.info.ref.id: w for w in workers(legs.router, MODEL)}
    [prefill] = [w.info.ref.grpc_address for w in by_role.values() if w.info.pool == "prefill"]
    before = describe(prefill).load.steps
    legs.flush()
    legs.client.generate(prompts[12], 2)
    stepped = describe(prefill).load.steps > before
    assert stepped == (legs.leg == "remote")
