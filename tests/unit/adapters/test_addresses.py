"""Addresses and settings that are known only where a process runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.adapters import settings
from tandem.adapters.addresses import is_wildcard, own_address
from tandem.adapters.deployment import parse
from tandem.adapters.settings import CommonSettings
from tandem.cli.console_client import ConsoleClientSettings
from tandem.errors import ConfigError


def test_addresses_stay_and_localhost_is_ours() -> None:
    for host in ("", "localhost", "127.0.0.1", "0.0.0.0", "::1", "192.0.2.1"):
        assert own_address(host) == host


def test_a_name_without_an_address_of_ours_is_refused() -> None:
    with pytest.raises(ConfigError, match="not known"):
        own_address("no-such-name.invalid", wait_s=0)


def test_wildcards() -> None:
    assert [is_wildcard(host) for host in ("0.0.0.0", "::", "127.0.0.1", "name")] == [True, True, False, False]


def test_a_command_may_run_where_the_variables_are_another_processs() -> None:
    found = settings.load(
        ConsoleClientSettings, {"TANDEM_ROUTERS": "a:1", "TANDEM_CONSOLE_TOKEN": "secret"}, shared=True
    )
    assert found.console_token == "secret"


def test_a_setting_may_come_from_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "url"
    secret.write_text("nats://user:password@nats:4222\n")
    given = {"TANDEM_DEPLOYMENT": "d", "TANDEM_NATS_URL_FILE": str(secret)}
    assert settings.load(CommonSettings, given).nats_url == "nats://user:password@nats:4222"
    with pytest.raises(ConfigError, match="both set"):
        settings.load(CommonSettings, {**given, "TANDEM_NATS_URL": "nats://x"})
    with pytest.raises(ConfigError, match="cannot read"):
        settings.load(CommonSettings, {**given, "TANDEM_NATS_URL_FILE": str(tmp_path / "gone")})
    with pytest.raises(ConfigError, match="unknown setting TANDEM_NAT_URL_FILE"):
        settings.load(CommonSettings, {"TANDEM_DEPLOYMENT": "d", "TANDEM_NAT_URL_FILE": str(secret)})


_MODELS = "models: [{name: m, path: p, pools: [{role: decode}]}]\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("http: {port: 9000}", "both want port 9000"),
        ("frontends: 3\nhttp: {port: 8998}", "each of 3 frontends"),
        ("http: {host: 0.0.0.0, port: 9000}", "both want port 9000"),
        ("tenants: [{name: a, api_key_sha256: [zz]}]", "64 hex digits"),
    ],
)
def test_mistakes_of_a_deployment_file_are_found_with_it(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse(_MODELS + text)


def test_neighbouring_ports_and_other_hosts_are_fine() -> None:
    parse(_MODELS + "frontends: 2\nhttp: {port: 8998}")
    parse(_MODELS + "http: {host: 127.0.0.1, port: 9000}\ngrpc: {host: 192.0.2.1}")
