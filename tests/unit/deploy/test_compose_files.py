"""The compose files as Compose itself renders them; no engine is needed for that."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem.adapters.deployment import read
from tandem.adapters.settings import load
from tandem.worker.settings import WorkerSettings

ROOT = Path(__file__).resolve().parents[3]
COMPOSE, RECIPES = ROOT / "deploy" / "compose", ROOT / "deploy" / "recipes"
OBSERVABILITY = ROOT / "deploy" / "observability"
HOST = {"TANDEM_MODELS": "/models", "NODE_A": "192.0.2.1", "NODE_B": "192.0.2.2", "TANDEM_SECRETS": "/secrets"}
ONE_NODE = ("llama-3.1-8b-one-gpu", "llama-3.1-70b-fp8-one-node", "gpt-oss-120b-one-node")


@cache
def rendered(*files: str, profile: str = "cpu", deployment: str = "") -> Any:
    """Paths are relative to deploy/compose."""
    package = importlib.util.find_spec("compose")
    assert package is not None
    assert package.origin is not None
    command = [str(Path(package.origin).parent / "docker-compose"), "--profile", profile]
    for file in files:
        command += ["-f", file]
    env = {"PATH": os.environ["PATH"], **HOST, **({"TANDEM_DEPLOYMENT_FILE": deployment} if deployment else {})}
    done = subprocess.run(
        [*command, "config", "--format", "json"], cwd=COMPOSE, env=env, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)["services"]


def gpus(service: dict[str, Any]) -> list[str]:
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    return list(device["device_ids"])


def recipe(name: str) -> Any:
    return rendered(
        "compose.yaml", "compose.gpu.yaml", f"../recipes/{name}/compose.yaml",
        deployment=f"../recipes/{name}/deployment.yaml",
    )  # fmt: skip


def test_the_default_is_the_cpu_profile_and_the_file_names_it() -> None:
    assert "COMPOSE_PROFILES=cpu" in (COMPOSE / ".env").read_text()
    assert {"prefill", "decode", "model"} <= set(rendered("compose.yaml"))
    assert not {"sim-prefill", "sim-decode"} & set(rendered("compose.yaml"))


def test_the_sim_profile_is_four_and_eight() -> None:
    services = rendered("compose.yaml", profile="sim")
    replicas = {name: service.get("deploy", {}).get("replicas", 1) for name, service in services.items()}
    assert (replicas["sim-prefill"], replicas["sim-decode"], replicas["router"]) == (4, 8, 2)
    assert "prefill" not in services


@pytest.mark.parametrize("profile", ["cpu", "sim"])
def test_every_service_is_confined_and_published_on_loopback_only(profile: str) -> None:
    for name, service in rendered("compose.yaml", profile=profile).items():
        assert service["user"] == "10001:10001", name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", [])), name
        assert service["image"].count(":") == 1, f"{name}: an image without a version"
        assert not service["image"].endswith(":latest"), name


@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.yaml", "compose.gpu.yaml")], ids=["cpu", "gpu"])
def test_workers_get_settings_and_pools_that_exist(files: tuple[str, ...]) -> None:
    services = rendered(*files)
    for name in ("prefill", "decode"):
        source = next(v["source"] for v in services[name]["volumes"] if v["target"] == "/etc/tandem/deployment.yaml")
        environment = {k: v for k, v in services[name]["environment"].items() if not k.endswith("_URL_FILE")}
        settings = load(WorkerSettings, environment)
        pools = {pool.pool_name for pool in read(source).model(settings.model).pools}
        assert (settings.pool or name) in pools


@pytest.mark.parametrize("name", ONE_NODE)
def test_recipes_give_each_worker_the_gpus_that_its_arguments_want(name: str) -> None:
    services = recipe(name)
    deployment = read(RECIPES / name / "deployment.yaml")
    (model,) = deployment.models
    taken: list[str] = []
    for worker in ("prefill", "decode"):
        if services[worker]["deploy"].get("replicas") == 0:
            continue
        environment = services[worker]["environment"]
        pool = next(p for p in model.pools if p.pool_name == environment.get("TANDEM_POOL", worker))
        assert environment["TANDEM_MODEL"] == model.name
        assert len(gpus(services[worker])) == pool.engine_args.get("tensor_parallel_size", 1)
        assert services[worker]["image"].startswith("tandem-worker-cuda:")
        taken += gpus(services[worker])
    assert len(taken) == len(set(taken)), "two workers on one GPU"
    assert services["model"]["command"] == [model.path]


def test_the_recipe_for_two_nodes_keeps_to_the_private_addresses() -> None:
    folder = "../recipes/llama-3.1-70b-fp8-two-nodes"
    a = rendered(
        "compose.yaml", "compose.gpu.yaml", f"{folder}/node-a.yaml", deployment=f"{folder}/deployment.yaml"
    )  # fmt: skip
    b = rendered(f"{folder}/node-b.yaml")
    assert a["prefill"]["environment"]["TANDEM_KV_HOST"] == HOST["NODE_A"]
    assert b["decode"]["environment"]["TANDEM_KV_HOST"] == HOST["NODE_B"]
    assert a["decode"]["deploy"]["replicas"] == 0
    for service in ("nats", "redis"):
        assert [port["host_ip"] for port in a[service]["ports"]] == [HOST["NODE_A"]]
    for worker in (a["prefill"], b["decode"]):
        assert worker["network_mode"] == "host"
        assert set(worker["extra_hosts"]) == {f"nats={HOST['NODE_A']}", f"redis={HOST['NODE_A']}"}
        environment = {k: v for k, v in worker["environment"].items() if not k.endswith("_URL_FILE")}
        assert load(WorkerSettings, environment).model == "Llama-3.1-70B-Instruct-FP8"


def test_observability_is_wired() -> None:
    services = rendered("compose.yaml", "compose.observability.yaml")
    collector = yaml.safe_load((OBSERVABILITY / "otel-collector.yaml").read_text())
    pipeline = collector["service"]["pipelines"]["traces"]
    for kind in ("receivers", "processors", "exporters"):
        assert set(pipeline[kind]) == set(collector[kind])
    assert collector["exporters"]["otlp/tempo"]["endpoint"] == "tempo:4317"
    for name in ("router", "prefill", "decode", "frontend"):
        assert services[name]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://otel-collector:4317"
    prometheus = yaml.safe_load((OBSERVABILITY / "prometheus.yaml").read_text())
    (job,) = prometheus["scrape_configs"]
    aliases = {
        alias
        for s in services.values()
        for n in (s.get("networks") or {}).values()
        for alias in (n or {}).get("aliases", [])
    }
    (discovery,) = job["dns_sd_configs"]
    assert set(discovery["names"]) <= aliases | set(services)
    assert {services[name]["environment"]["TANDEM_METRICS_PORT"] for name in ("router", "decode")} == {
        str(discovery["port"])
    }
    for name in ("otel-collector", "tempo", "prometheus", "grafana"):
        for volume in services[name]["volumes"]:
            assert volume["type"] == "volume" or Path(volume["source"]).exists(), volume["source"]
        assert all(port["host_ip"] == "127.0.0.1" for port in services[name].get("ports", []))
    sources = yaml.safe_load((OBSERVABILITY / "grafana-provisioning/datasources/tandem.yaml").read_text())[
        "datasources"
    ]
    assert {source["url"] for source in sources} == {"http://prometheus:9090", "http://tempo:3200"}
