"""`docker compose up` and what an operator does to it, while streams run whose every token is known beforehand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.containers.engine import HERE, ROOT, image_names, run
from tests.containers.stack import UP_S, Stack, written_sizes
from tests.harness.answers import MODEL, SimAnswers
from tests.harness.client import Client
from tests.harness.load import Address, Load

pytestmark = pytest.mark.timeout(2400)

TOKENS = 60
LONG_S = 90.0


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    made = Stack("tandem-test", "sim", HERE / "compose.yaml")
    try:
        made.build()
        made.up()
        yield made
    except BaseException:
        with contextlib.suppress(Exception):
            print(made.logs())
        raise
    finally:
        made.down()


@pytest.fixture
async def load(stack: Stack) -> AsyncIterator[Load]:
    await until(lambda: len(stack.workers()) >= 3, "all workers alive")
    async with Load([Address(stack.grpc, stack.url)], SimAnswers(), timeout_s=LONG_S, http_every=4) as made:
        yield made


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LONG_S
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.2)


async def disturbed(load: Load, disturb: Callable[[], object]) -> None:
    """Streams before, during and after what is done to the cluster."""
    await load.flowing(load.start(8, TOKENS))
    arrivals = asyncio.create_task(load.arrive(0.25, TOKENS))
    try:
        await asyncio.to_thread(disturb)
        await asyncio.sleep(1.0)
    finally:
        arrivals.cancel()
    load.start(4, TOKENS)


# --- it answers


def test_the_openai_client_is_answered(stack: Stack) -> None:
    client = OpenAI(base_url=f"{stack.url}/v1", api_key="none", timeout=LONG_S)
    assert [model.id for model in client.models.list()] == [MODEL]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, temperature=0)  # type: ignore[call-overload]
    parts = client.chat.completions.create(  # type: ignore[call-overload]
        model=MODEL, messages=messages, max_tokens=12, temperature=0, stream=True
    )
    assert whole.usage.completion_tokens == 12
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content


async def test_the_grpc_client_is_answered_and_kv_moves_between_containers(stack: Stack) -> None:
    await until(lambda: len(stack.workers()) >= 3, "all workers alive")
    client = Client(stack.grpc, MODEL)
    prompt = list(range(400, 2400))
    answer = await asyncio.to_thread(client.generate, prompt, 20, timeout_s=LONG_S)
    client.close()
    assert answer.tokens == SimAnswers().expected(prompt, 20)
    assert await asyncio.to_thread(stack.kv_bytes, "sim-decode") > 0, "over the `kv` network"


def test_the_console_wants_its_token(stack: Stack) -> None:
    console = f"http://127.0.0.1:{stack.console_port}"
    (container,) = stack.containers("console")
    token = stack.inside(container, "cat", "/run/tandem/token").strip()
    assert httpx.get(f"{console}/api/cluster", timeout=20).status_code == 401
    seen = httpx.get(f"{console}/api/cluster", headers={"Authorization": f"Bearer {token}"}, timeout=20)
    assert seen.status_code == 200
    assert seen.json()["bus"] is True


def test_the_slowest_request_is_told_as_the_page_says(stack: Stack) -> None:
    (command,) = re.findall(r"exec console (.+trace --slowest.+)", (ROOT / "docs" / "compose.md").read_text())
    client = OpenAI(base_url=f"{stack.url}/v1", api_key="none", timeout=LONG_S)
    asked = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=8)
    (console,) = stack.containers("console")
    deadline = time.monotonic() + LONG_S
    while asked.id not in (listed := stack.inside(console, *command.split())):
        assert time.monotonic() < deadline, listed
        time.sleep(0.5)
    told = stack.inside(console, *command.replace("--slowest", asked.id).split())
    assert "First token after" in told and "tokens cached, predicted" in told


# --- it is shut


def test_containers_have_no_more_rights_than_they_need(stack: Stack) -> None:
    for container in stack.containers():
        about = stack.inspect(container)
        host = about["HostConfig"]
        assert about["Config"]["User"] == "10001:10001", container
        assert host["ReadonlyRootfs"], container
        assert host["CapDrop"] == ["ALL"], container
        assert not host["Privileged"], container
        ports = [binding for bindings in (host["PortBindings"] or {}).values() for binding in bindings]
        assert {binding["HostIp"] for binding in ports} <= {"127.0.0.1"}, container
        published = container.split("-")[-2] in ("frontend", "console")
        assert bool(ports) == published, container


def test_no_secret_is_in_an_image_or_an_environment(stack: Stack) -> None:
    (frontend,) = stack.containers("frontend")
    password = stack.inside(frontend, "cat", "/run/tandem/nats-url").split(":")[2].split("@")[0]
    assert len(password) > 20
    for container in stack.containers():
        about = stack.inspect(container)
        assert password not in str(about)
        assert password not in run("docker", "history", "--no-trunc", about["Image"]).stdout
    router = stack.containers("router")[0]
    assert password not in stack.inside(router, "cat", "/run/tandem/nats-url")


@pytest.mark.parametrize("service", ["frontend", "router", "console"])
def test_light_images_have_no_torch(stack: Stack, service: str) -> None:
    container = stack.containers(service)[0]
    found = stack.inside(
        container, "sh", "-c", "find / -xdev -name torch -type d -o -name vllm -type d 2>/dev/null || true"
    )
    assert found == ""
    # The base image may be another than the one that was weighed.
    assert stack.size_of_image(container) == pytest.approx(written_sizes()[service], rel=0.25)


def test_only_workers_reach_the_kv_plane(stack: Stack) -> None:
    networks = {
        container: set(stack.inspect(container)["NetworkSettings"]["Networks"]) for container in stack.containers()
    }
    on_kv = {container for container, names in networks.items() if any(name.endswith("_kv") for name in names)}
    assert on_kv == {*stack.containers("sim-prefill"), *stack.containers("sim-decode")}
    for network in ("bus", "kv"):
        about = json.loads(run("docker", "network", "inspect", f"{stack.project}_{network}").stdout)[0]
        assert about["Internal"], f"{network} reaches the outside"


# --- it is watched


def asked(stack: Stack, path: str, **parameters: str) -> Any:
    answer = httpx.get(f"http://127.0.0.1:{stack.prometheus_port}/api/v1/{path}", params=parameters, timeout=20)
    return answer.raise_for_status().json()["data"]


async def test_prometheus_of_the_observability_file_finds_every_process(stack: Stack) -> None:
    *_, image = image_names()
    try:
        run("docker", "image", "inspect", image)
    except subprocess.CalledProcessError:
        try:
            await asyncio.to_thread(run, "docker", "pull", image, timeout_s=300)
        except subprocess.CalledProcessError:
            pytest.skip(f"NOT TESTED: no {image} to be had, nor Debian's prometheus to make a stand-in of")
    up = ("up", "-d", "--wait", "--no-deps", "--no-recreate", "prometheus")
    await asyncio.to_thread(stack.observed, *up, timeout_s=UP_S)
    wanted = sum(len(stack.containers(name)) for name in ("router", "sim-prefill", "sim-decode", "frontend"))

    def all_found() -> bool:
        return [r["value"][1] for r in asked(stack, "query", query='sum(up{job="tandem"})')["result"]] == [str(wanted)]

    await until(all_found, "every process is scraped, found by its service's name")
    assert {target["health"] for target in asked(stack, "targets")["activeTargets"]} == {"up"}
    rules = [rule for group in asked(stack, "rules")["groups"] for rule in group["rules"]]
    assert rules and not [rule for rule in rules if rule.get("lastError")]


# --- it is operated


async def test_scaled_up_under_load(stack: Stack, load: Load) -> None:
    before = len(stack.workers())
    await disturbed(load, lambda: stack.up("--no-recreate", "--scale", "sim-decode=3"))
    await until(lambda: len(stack.workers()) == before + 1, "the new worker joins")
    await load.all_complete(LONG_S)


async def test_routers_restarted_under_load(stack: Stack, load: Load) -> None:
    await disturbed(load, lambda: stack.compose("restart", "router"))
    # Nobody leads for as long as both are away; a request that comes just then may be told to come again.
    completed = await load.complete_or_retryable(LONG_S)
    assert completed >= 12, "those that streamed, and those after it"
    await until(lambda: len(stack.workers()) >= 3, "a leader knows the workers")


async def test_prefill_worker_stopped_under_load(stack: Stack, load: Load) -> None:
    began = time.monotonic()
    await disturbed(load, lambda: stack.compose("stop", "sim-prefill"))
    assert time.monotonic() - began < 60, "SIGTERM was handled: it did not wait to be killed"
    assert stack.inspect(f"{stack.project}-sim-prefill-1")["State"]["ExitCode"] == 0
    await load.all_complete(LONG_S)
    await asyncio.to_thread(stack.compose, "start", "sim-prefill")


async def test_decode_workers_killed_under_load(stack: Stack, load: Load) -> None:
    victim = stack.containers("sim-decode")[0]
    await disturbed(load, lambda: run("docker", "kill", victim))
    await load.all_complete(LONG_S)
    await asyncio.to_thread(run, "docker", "start", victim)


async def test_nats_paused_under_load(stack: Stack, load: Load) -> None:
    def pause() -> None:
        stack.compose("pause", "nats")
        time.sleep(2.0)
        stack.compose("unpause", "nats")

    await disturbed(load, pause)
    completed = await load.complete_or_retryable(LONG_S)
    assert completed >= 8
    await until(lambda: len(stack.workers()) >= 3, "nobody was declared dead for good")


def test_up_again_changes_nothing_and_keeps_the_secrets(stack: Stack) -> None:
    (frontend,) = stack.containers("frontend")
    about = stack.inspect(frontend)
    secret = stack.inside(frontend, "cat", "/run/tandem/nats-url")
    stack.up("--no-recreate")
    assert stack.inspect(frontend)["State"]["StartedAt"] == about["State"]["StartedAt"]
    assert stack.inside(frontend, "cat", "/run/tandem/nats-url") == secret
