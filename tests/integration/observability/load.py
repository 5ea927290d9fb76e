"""The deployment that is looked at, and what is asked of it."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import httpx

from tests.harness.cluster import Cluster

MODEL = "m"
KEYS = {"acme": "key-of-acme", "other": "key-of-other"}
CLASSES = ("interactive", "batch")
#: The console's process has an endpoint only where it is told to.
SERVICES = ("frontend", "router", "prefill", "decode")
SIM = {"step_s": 0.01}
#: Rounds of ``load`` that the cluster has served, each with one request of every tenant, class and operation.
served: list[int] = []


def deployment() -> dict[str, Any]:
    """Prompts are computed remotely where that is possible: every request of two tokens and more has a handoff."""
    return {
        "policy": {"local_prefill": False},
        "console": {"enabled": True},
        "classes": [
            {"name": "interactive", "ttft_slo_s": 30.0, "tpot_slo_s": 5.0},
            {"name": "batch", "rank": 1, "ttft_slo_s": 0.000001, "best_effort": True},
        ],
        "tenants": [{"name": n, "api_key_sha256": [hashlib.sha256(k.encode()).hexdigest()]} for n, k in KEYS.items()],
        "models": [
            {
                "name": MODEL,
                "path": "SmolLM2-135M-Instruct",
                "max_model_len": 4096,
                "pools": [
                    {"role": "prefill", "engine": "sim", "engine_args": SIM},
                    {"role": "decode", "engine": "sim", "engine_args": SIM},
                ],
            }
        ],
    }


async def load(cluster: Cluster, rounds: int) -> None:
    """Chats and completions of both tenants in both classes, with prefixes in common; and some mistakes."""
    begun = len(served)
    async with httpx.AsyncClient(base_url=cluster.url, timeout=60.0) as client:
        for n in range(begun, begun + rounds):
            await asyncio.gather(
                *(
                    _ask(client, path, tenant, request_class, f"{'a long story about rivers ' * 40} {n}")
                    for path in ("/v1/chat/completions", "/v1/completions")
                    for tenant in KEYS
                    for request_class in CLASSES
                )
            )
            served.append(n)
        unknown = await client.post("/v1/chat/completions", json={"model": MODEL}, headers=_key("nobody"))
        wrong = await client.post("/v1/completions", json={"model": "?", "prompt": "?"}, headers=_key("acme"))
        assert (unknown.status_code, wrong.status_code) == (401, 404)


async def _ask(client: httpx.AsyncClient, path: str, tenant: str, request_class: str, text: str) -> None:
    what: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    body = {"model": MODEL, "max_tokens": 8, "stream": True, "request_class": request_class, "ignore_eos": True, **what}
    answer = await client.post(path, json=body, headers=_key(tenant))
    assert answer.status_code == 200, answer.text
    assert answer.text.rstrip().endswith("data: [DONE]"), answer.text[-300:]


def _key(tenant: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS.get(tenant, tenant)}"}
