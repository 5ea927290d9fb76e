"""vLLM's pooling engine behind Tandem gives the vectors that transformers computes from the same weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

import openai
import pytest

from tandem.models.prepare import prepare_smollm2
from tests.harness.cluster import Cluster

MODEL = "SmolLM2-135M-Instruct"
TEXTS = ["The cat sat on the mat.", "quarterly revenue fell sharply", "x " * 700]

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def folder() -> str:
    pytest.importorskip("vllm")
    return str(prepare_smollm2())


@pytest.fixture(scope="module")
def cluster(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    model = {"name": MODEL, "path": folder, "task": "embed", "dtype": "float32", "max_model_len": 1024}
    pools = [{"role": "aggregated", "engine_args": {"kv_cache_memory_bytes": 256 << 20}}]
    with Cluster({"models": [{**model, "pools": pools}]}, tmp_path_factory.mktemp("embed")).start(180) as made:
        yield made


def reference(folder: str, texts: list[str]) -> list[list[float]]:
    """The last token's last hidden state, of length one: how vLLM pools a decoder that says nothing else."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, torch_dtype=torch.float32)
    found = []
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids
            state = model(input_ids=ids).last_hidden_state[0, -1]
            found.append((state / state.norm()).tolist())
    return found


def test_vectors_are_those_of_transformers(cluster: Cluster, folder: str) -> None:
    with openai.OpenAI(base_url=cluster.url + "/v1", api_key="x", max_retries=0, timeout=60) as client:
        together = [one.embedding for one in client.embeddings.create(model=MODEL, input=TEXTS).data]
        alone = [client.embeddings.create(model=MODEL, input=text).data[0].embedding for text in TEXTS]
        usage = client.embeddings.create(model=MODEL, input=TEXTS[2]).usage
    for vector, again, wanted in zip(together, alone, reference(folder, TEXTS), strict=True):
        assert math.hypot(*vector) == pytest.approx(1.0, abs=1e-3)
        assert vector == pytest.approx(again, abs=1e-3)
        assert vector == pytest.approx(wanted, abs=2e-3)
    assert usage.prompt_tokens > 700
