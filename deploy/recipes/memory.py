"""What fits on the GPUs of each recipe: weights, KV and what is left for it, by arithmetic from published figures.

    python deploy/recipes/memory.py

Weights are counted from the model's published shape, not taken from a file; KV is the engine's own layout. What a
process needs besides (CUDA context, activations of one step, CUDA graphs, NCCL, NIXL) is an assumption: ``OVERHEAD``.
Nothing of this was measured on a GPU.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tandem.adapters.deployment import Deployment, Model, Pool, PoolRole, read
from tandem.core.profiles import PROFILES
from tandem.engine.vllm_options import VllmOptions
from tandem.enginemodel.profile import context_sum, step_s

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
#: A GPU's memory beyond weights and KV.
OVERHEAD = 4096 * MIB
#: What the table of times is about.
PROMPT, STREAMS = 4000, 64


@dataclass(frozen=True, slots=True)
class Shape:
    """From a model's published config.json and card. Bytes are those of one parameter."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    experts: int = 1
    #: Of what the quantisation covers, and of the rest: embedding, output and, for a mixture of experts, attention.
    linear_bytes: float = 2.0
    other_bytes: float = 2.0
    #: Quantised: attention and MLP (False), or the experts alone (True).
    experts_only: bool = False
    kv_bytes: float = 2.0

    @property
    def attention_parameters(self) -> int:
        return self.layers * self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def mlp_parameters(self) -> int:
        """Gate, up and down of every expert."""
        return self.layers * self.experts * 3 * self.hidden * self.mlp

    @property
    def embedding_parameters(self) -> int:
        """In and out, not tied."""
        return 2 * self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.attention_parameters + self.mlp_parameters + self.embedding_parameters

    @property
    def weight_bytes(self) -> float:
        attention_bytes = self.other_bytes if self.experts_only else self.linear_bytes
        return (
            self.mlp_parameters * self.linear_bytes
            + self.attention_parameters * attention_bytes
            + self.embedding_parameters * self.other_bytes
        )

    @property
    def kv_bytes_per_token(self) -> float:
        """All layers count in full: also those that attend to a window only."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_bytes


#: By the model's name in the deployment files.
SHAPES = {
    "Llama-3.1-8B-Instruct": Shape(32, 4096, 32, 8, 128, 14336, 128256),
    "Llama-3.1-70B-Instruct-FP8": Shape(80, 8192, 64, 8, 128, 28672, 128256, linear_bytes=1.0),
    # MXFP4: 4 bits, and a scale of 8 bits for every 32.
    "gpt-oss-120b": Shape(
        36, 2880, 64, 8, 64, 2880, 201088, experts=128, linear_bytes=4.25 / 8, experts_only=True
    ),
}  # fmt: skip
#: Total memory as the driver reports it, MiB.
H100_80GB, RTX_4090 = 81559 * MIB, 24564 * MIB
#: (folder, GPU, GPUs of a node).
RECIPES = (
    ("llama-3.1-8b-one-gpu", RTX_4090, 1),
    ("llama-3.1-70b-fp8-one-node", H100_80GB, 8),
    ("llama-3.1-70b-fp8-two-nodes", H100_80GB, 8),
    ("gpt-oss-120b-one-node", H100_80GB, 8),
)


@dataclass(frozen=True, slots=True)
class Fit:
    """Of one worker; bytes are of one of its GPUs."""

    recipe: str
    model: Model
    pool: Pool
    gpus: int
    weights: float
    kv_room: float
    kv_per_token: float

    @property
    def kv_tokens(self) -> int:
        return int(self.kv_room / self.kv_per_token)

    @property
    def full_contexts(self) -> float:
        return self.kv_tokens / self.model.max_model_len


def fits_of(recipe: str, deployment: Deployment, gpu_bytes: int) -> list[Fit]:
    return [fit(recipe, model, pool, gpu_bytes) for model in deployment.models for pool in model.pools]


def fit(recipe: str, model: Model, pool: Pool, gpu_bytes: int) -> Fit:
    shape, gpus = SHAPES[model.name], int(pool.engine_args.get("tensor_parallel_size", 1))
    weights = shape.weight_bytes / gpus
    room = gpu_bytes * float(pool.engine_args["gpu_memory_utilization"]) - weights - OVERHEAD
    # Tensor parallelism splits by KV heads; beyond their number it copies.
    return Fit(recipe, model, pool, gpus, weights, room, shape.kv_bytes_per_token / min(gpus, shape.kv_heads))


def table(header: str, rows: list[tuple[object, ...]]) -> None:
    print(f"| {header} |")
    print("|---|---|" + "--:|" * (header.count("|") - 1))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")


def memory_row(found: Fit) -> tuple[object, ...]:
    return (
        *(found.recipe, found.pool.pool_name, found.gpus),
        *(f"{found.weights / 1e9:.1f} GB", f"{found.kv_room / 1e9:.1f} GB", f"{found.kv_per_token / 1024:.0f} KiB"),
        *(f"{found.kv_tokens:,}", f"{found.full_contexts:.1f}"),
    )


def time_row(found: Fit) -> tuple[object, ...]:
    """By the profile that the performance model begins with, and the link that the deployment file states."""
    options, _ = VllmOptions.split(dict(found.pool.engine_args))
    profile = PROFILES[options.perf_profile]
    prefill_s = step_s(profile, PROMPT, context_sum(0, PROMPT), 0, 0)
    transfer_s = PROMPT * SHAPES[found.model.name].kv_bytes_per_token / options.link_bytes_per_s
    decode_s = step_s(profile, 0, 0, STREAMS, STREAMS * PROMPT)
    mixed_s = step_s(profile, PROMPT, context_sum(0, PROMPT), STREAMS, STREAMS * PROMPT)
    return (
        *(found.recipe, found.pool.pool_name),
        *(f"{seconds * 1e3:.1f} ms" for seconds in (prefill_s, transfer_s, decode_s, mixed_s)),
    )


def main() -> int:
    fits = [
        found
        for recipe, gpu_bytes, _ in RECIPES
        for found in fits_of(recipe, read(HERE / recipe / "deployment.yaml"), gpu_bytes)
    ]
    table(
        "recipe | worker | GPUs | weights a GPU | KV room a GPU | KV a token and GPU | tokens | full contexts",
        [memory_row(found) for found in fits],
    )
    print()
    table(
        f"recipe | worker | prefill of {PROMPT:,} tokens | their KV over the link | decode step, {STREAMS} such streams"
        " | both in one step",
        [time_row(found) for found in fits if found.pool.role is PoolRole.DECODE],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
