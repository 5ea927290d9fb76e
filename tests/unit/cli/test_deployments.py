"""From the command line to a deployment, and from a deployment to processes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tandem.adapters import deployment as deployment_file
from tandem.adapters.deployment import Deployment, PoolRole
from tandem.cli.cluster import Kind, Service, Surroundings, foreign_environment, named_ports, services_of
from tandem.cli.deployments import Overrides, default, overridden, with_paths
from tandem.errors import ConfigError

TWO_MODELS = """
models:
  - name: org/Big.Model
    path: /models/big
    pools:
      - {role: prefill, replicas: 2, engine_args: {tensor_parallel_size: 2}, env: {OMP_NUM_THREADS: "2"}}
      - {role: decode}
  - name: small
    path: /models/small
    pools: [{role: aggregated, replicas: 2}]
frontends: 2
routers: 2
"""


def services(deployment: Deployment) -> list[Service]:
    ports = itertools.count(50_000)
    around = Surroundings(
        deployment_file=Path("/run/x/deployment.yaml"),
        nats_url="nats://n",
        redis_url="redis://r",
        log_level="INFO",
        worker_dir=lambda name: Path("/run/x", name),
        free_port=lambda: next(ports),
    )
    return services_of(deployment, around)


def test_the_built_in_deployment_is_one_prefill_and_one_decode_worker() -> None:
    assert [s.name for s in services(default())] == ["router", "prefill-1", "decode-1", "frontend", "console"]
    assert deployment_file.parse(default().to_yaml()) == default()


def test_replicas_and_ports_from_the_command_line() -> None:
    changed = overridden(default(), Overrides(prefill=2, decode=3, http_port=8100, grpc_port=9100, cluster="x"))
    names = [s.name for s in services(changed)]
    assert names == ["router", "prefill-1", "prefill-2", "decode-1", "decode-2", "decode-3", "frontend", "console"]
    assert (changed.http.port, changed.grpc.port, changed.cluster) == (8100, 9100, "x")
    assert overridden(default(), Overrides()) == default()


def test_ports_that_a_deployment_names_are_its_frontends_and_its_consoles() -> None:
    text = TWO_MODELS + "http: {port: 21000}\ngrpc: {port: 22000}\nprocesses: 3\nconsole: {port: 23000}\n"
    named = named_ports(deployment_file.parse(text))
    assert named == {21000, 21001, *range(22000, 22006), 23000}


def test_another_engine_does_not_get_the_arguments_of_this_one() -> None:
    base = deployment_file.parse(TWO_MODELS)
    pools = [pool for model in overridden(base, Overrides(engine="sim")).models for pool in model.pools]
    assert {pool.engine for pool in pools} == {"sim"}
    assert not any(pool.engine_args or pool.env for pool in pools)
    assert overridden(base, Overrides(engine="vllm")) == base


@pytest.mark.parametrize("by", [Overrides(prefill=3), Overrides(decode=1)])
def test_an_override_that_could_mean_several_pools_is_refused(by: Overrides) -> None:
    both = deployment_file.parse(TWO_MODELS.replace("aggregated", "decode"))
    pools = [pool for model in both.models for pool in model.pools]
    several = by.decode is not None
    assert sum(pool.role is PoolRole.DECODE for pool in pools) == 2
    if several:
        with pytest.raises(ConfigError, match="--decode needs exactly one decode pool, and the deployment has 2"):
            overridden(both, by)
    else:
        overridden(both, by)


def test_several_models_have_workers_of_their_own() -> None:
    found = {s.name: s for s in services(deployment_file.parse(TWO_MODELS))}
    assert list(found) == [
        "router-1", "router-2",
        "org-big-model-prefill-1", "org-big-model-prefill-2", "org-big-model-decode-1",
        "small-aggregated-1", "small-aggregated-2",
        "frontend-1", "frontend-2", "console",
    ]  # fmt: skip
    aggregated = found["small-aggregated-1"]
    assert aggregated.kind is Kind.DECODE
    assert (aggregated.env["TANDEM_MODEL"], aggregated.env["TANDEM_POOL"]) == ("small", "aggregated")
    assert found["org-big-model-prefill-1"].env["OMP_NUM_THREADS"] == "2"
    assert (found["frontend-2"].http_port, found["frontend-2"].grpc_port) == (8001, 9001)
    assert len({s.grpc_port for s in found.values()}) == len(found)


def test_models_whose_names_look_alike_still_get_different_workers() -> None:
    text = TWO_MODELS.replace("org/Big.Model", "m.1").replace("name: small", "name: m-1")
    names = [s.name for s in services(deployment_file.parse(text.replace("aggregated", "decode")))]
    assert len(names) == len(set(names))


def test_every_service_knows_every_variable_that_it_is_given() -> None:
    from services.console.config import ConsoleSettings
    from services.frontend.config import FrontendSettings
    from services.router.config import RouterSettings
    from tandem.adapters import settings
    from tandem.worker.settings import WorkerSettings

    kinds = {Kind.ROUTER: RouterSettings, Kind.FRONTEND: FrontendSettings, Kind.CONSOLE: ConsoleSettings}
    for service in services(default()):
        loaded = settings.load(kinds.get(service.kind, WorkerSettings), service.env)
        assert loaded.instance == service.name
        assert loaded.grpc_port == service.grpc_port


def test_everybody_sends_traces_to_the_console_and_it_knows_whom_to_ask() -> None:
    found = {s.name: s for s in services(deployment_file.parse(TWO_MODELS))}
    console = found.pop("console")
    assert {s.env["TANDEM_TRACE_CONSOLE"] for s in found.values()} == {console.grpc}
    assert console.env["TANDEM_ROUTERS"] == f"{found['router-1'].grpc},{found['router-2'].grpc}"
    assert console.env["TANDEM_FRONTENDS"] == "127.0.0.1:9000,127.0.0.1:9001"


@pytest.mark.parametrize(("port", "console"), [(None, True), (0, False), (8123, True)])
def test_the_console_can_be_moved_or_left_out(port: int | None, console: bool) -> None:
    changed = overridden(default(), Overrides(console_port=port))
    found = {s.name: s for s in services(changed)}
    assert ("console" in found) is console
    assert ("TANDEM_TRACE_CONSOLE" in found["router"].env) is console
    if port:
        assert found["console"].http_port == port


def test_only_foreign_variables_are_passed_on() -> None:
    assert foreign_environment({"PATH": "/bin", "TANDEM_POOL": "x"}) == {"PATH": "/bin"}


def test_paths_are_written_out() -> None:
    text = TWO_MODELS.replace("path: /models/small", "path: small\n    chat_template: t.jinja")
    base = deployment_file.parse(text)
    placed = with_paths(base, {"org/Big.Model": Path("/m/b"), "small": Path("/m/s")}, Path("/files"))
    assert [m.path for m in placed.models] == ["/m/b", "/m/s"]
    assert [m.chat_template for m in placed.models] == ["", "/files/t.jinja"]


def test_a_wrong_pool_is_one_complaint() -> None:
    with pytest.raises(ConfigError) as caught:
        deployment_file.parse("models: [{name: m, path: p, pools: [{role: prefil}]}]")
    assert caught.value.message.count("\n") == 1 and "models.0.pools.0.role" in caught.value.message
    with pytest.raises(ConfigError, match="at least 1 item"):
        deployment_file.parse("models: []")
