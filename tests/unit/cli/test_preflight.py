"""What is seen to be wrong before anything is started."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.adapters import deployment as deployment_file
from tandem.adapters.deployment import Console, Deployment, Endpoint
from tandem.cli import preflight
from tandem.cli.deployments import Overrides, default, overridden
from tandem.errors import ConfigError


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_taken_port_is_named_with_the_setting_that_moves_it(taken: int) -> None:
    with pytest.raises(ConfigError, match=rf"HTTP port {taken} .* taken .* --http-port"):
        preflight.check_ports(overridden(default(), Overrides(http_port=taken, grpc_port=free())))
    with pytest.raises(ConfigError, match=rf"gRPC port {taken} .* taken .* --grpc-port"):
        preflight.check_ports(overridden(default(), Overrides(http_port=free(), grpc_port=taken)))
    preflight.check_ports(overridden(default(), Overrides(http_port=free(), grpc_port=free())))


def test_the_ports_of_all_frontends_are_looked_at(taken: int) -> None:
    two = default().model_copy(update={"frontends": 2, "http": Endpoint(port=taken - 1), "grpc": Endpoint(port=free())})
    with pytest.raises(ConfigError, match="taken"):
        preflight.check_ports(two)


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        (Endpoint(port=0), "http.port must be a port number"),
        (Endpoint(host="no-such-host.invalid", port=1), "no address of this machine"),
        (Endpoint(host="203.0.113.1", port=18999), "cannot listen on 203.0.113.1:18999"),
    ],
)
def test_addresses_that_cannot_be(endpoint: Endpoint, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        preflight.check_ports(default().model_copy(update={"http": endpoint}))


def with_model(path: str, engine: str = "vllm") -> Deployment:
    return deployment_file.parse(
        f"models: [{{name: m, path: {path!r}, pools: [{{role: aggregated, engine: {engine}}}]}}]"
    )


def test_a_model_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a folder nor one that Tandem brings"):
        preflight.find_models(with_model("nowhere"), tmp_path, print)


def test_a_broken_model_folder_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(ConfigError, match=r"config.json is missing"):
        preflight.find_models(with_model("m"), tmp_path, print)
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no \*.safetensors"):
        preflight.find_models(with_model("m"), tmp_path, print)
    assert preflight.find_models(with_model("m", "sim"), tmp_path, print) == {"m": tmp_path / "m"}


def test_a_policy_knob_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="no knob 'credits'"):
        preflight.check_policy(default().model_copy(update={"policy": {"credits": 1}}))
    preflight.check_policy(default())


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preflight.check_room(tmp_path)
    monkeypatch.setattr(preflight, "_ROOM_BYTES", 1 << 62)
    with pytest.raises(ConfigError, match="XDG_STATE_HOME"):
        preflight.check_room(tmp_path)


@pytest.mark.parametrize(
    ("host", "token", "complaint"),
    [
        ("127.0.0.1", "", None),
        ("0.0.0.0", "a-token-of-some-length", None),
        ("0.0.0.0", "", "TANDEM_CONSOLE_TOKEN"),
        ("127.0.0.1", "short", "16 characters"),
    ],
)
def test_a_console_beyond_loopback_needs_a_token(host: str, token: str, complaint: str | None) -> None:
    wanted = default().model_copy(update={"console": Console(host=host)})
    if complaint is None:
        preflight.check_console(wanted, token)
    else:
        with pytest.raises(ConfigError, match=complaint):
            preflight.check_console(wanted, token)
