"""``python -m services.frontend`` as an operating-system process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tandem.adapters.embedded import EmbeddedServer, free_port

ROOT = Path(__file__).parents[3]
#: What the frontend's environment does not have.
FORBIDDEN = ("torch", "vllm", "transformers", "redis", "numpy")


@pytest.fixture
def environment(nats_server: EmbeddedServer, byte_level_folder: Path, tmp_path: Path) -> dict[str, str]:
    deployment = tmp_path / "deployment.yaml"
    deployment.write_text(
        f"models: [{{name: m, path: {byte_level_folder}, pools: [{{role: aggregated, engine: sim}}]}}]\n"
    )
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
        "TANDEM_DEPLOYMENT": str(deployment),
        "TANDEM_NATS_URL": nats_server.url,
        "TANDEM_HTTP_PORT": str(free_port()),
        "TANDEM_GRPC_PORT": "0",
    }


@contextmanager
def running(environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "services.frontend"], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def test_starts_tells_its_state_and_leaves_on_sigterm(environment: dict[str, str]) -> None:
    url = f"http://127.0.0.1:{environment['TANDEM_HTTP_PORT']}"
    with running(environment) as process:
        deadline = time.monotonic() + 30
        while True:
            try:
                assert httpx.get(f"{url}/healthz").status_code == 200
                break
            except httpx.TransportError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
        ready = httpx.get(f"{url}/readyz")
        assert (ready.status_code, ready.json()["leaders"]) == (503, {"m": False})
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("TANDEM_HTP_PORT", "1", "TANDEM_HTTP_PORT"),
        ("TANDEM_HTTP_PORT", "eighty", "TANDEM_HTTP_PORT"),
        ("TANDEM_DEPLOYMENT", "/nowhere.yaml", "/nowhere.yaml"),
        ("TANDEM_HTTP_PORT", "taken", "TANDEM_HTTP_PORT"),
    ],
)
def test_a_users_mistake_is_one_line(
    environment: dict[str, str], nats_server: EmbeddedServer, name: str, value: str, words: str
) -> None:
    if value == "taken":
        value = nats_server.url.rpartition(":")[2]
    with running({**environment, name: value}) as process:
        _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert words in err and "Traceback" not in err


def test_it_needs_no_engine_and_no_store(environment: dict[str, str]) -> None:
    """Everything of the frontend imports, and a model loads, where none of these can be imported."""
    code = (
        "import sys, pkgutil, importlib\n"
        f"sys.modules.update(dict.fromkeys({FORBIDDEN!r}))\n"
        "import services.frontend\n"
        "for module in pkgutil.iter_modules(services.frontend.__path__):\n"
        "    if module.name != '__main__':\n"
        "        importlib.import_module('services.frontend.' + module.name)\n"
        "from services.frontend import served_model\n"
        "from tandem.adapters.deployment import read\n"
        f"model = served_model.load(read({environment['TANDEM_DEPLOYMENT']!r}).models[0])\n"
        "print(model.render([{'role': 'user', 'content': 'hi'}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "<|im_start|>user\nhi" in done.stdout
