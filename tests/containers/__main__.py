"""Runs tests/containers, with the Docker engine that answers or else with one of our own:

    python -m tests.containers [--light] [PYTEST ARGUMENTS]

``--light`` leaves out the image with vLLM in it: 3 GB to build.

On a machine without an engine, where one can be started (root, and Debian's docker.io), this makes a network namespace,
starts dockerd in it, makes stand-ins for the base images and collects the wheels that the images are built from, since
nothing is reached from in there. The tests then run in the same namespace. Where no engine can be had, the tests are
skipped, and say why.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.containers.engine import HERE, ROOT, NoEngine, answers, compose_plugin, image_names, missing, own_engine, run

_INSIDE = "TANDEM_TESTS_IN_NAMESPACE"
#: Why the tests are skipped, for conftest.py.
REASON = "CONTAINER_TESTS_REASON"
_WHEELS = ROOT / "deploy" / "wheels"
_LIGHT, _ENGINE = ("base", "model"), ("torch", "engine-cpu")
_LIMIT_S = 3600


def main() -> int:
    arguments = sys.argv[1:]
    if answers():
        with tempfile.TemporaryDirectory(prefix="tandem-docker-") as folder:
            return tests(arguments, compose_plugin(Path(folder)))
    if os.environ.get(_INSIDE):
        return inside(arguments)
    if reason := missing():
        return tests(arguments, {REASON: reason})
    began = time.monotonic()
    try:
        for lock in _LIGHT if "--light" in arguments else _LIGHT + _ENGINE:
            collect(lock)
    except subprocess.CalledProcessError as error:
        return tests(arguments, {REASON: f"the wheels for the images cannot be collected: {error.stderr[-500:]}"})
    say(f"wheels collected after {time.monotonic() - began:.0f} s")
    # A namespace of our own, and everything in it ends with it.
    command = ["unshare", "--net", "--kill-child", sys.executable, "-m", "tests.containers", *arguments]
    return subprocess.run(command, env={**os.environ, _INSIDE: "1"}, cwd=ROOT, timeout=_LIMIT_S).returncode


def inside(arguments: list[str]) -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tandem-docker-") as folder:
        try:
            with own_engine(Path(folder)) as env:
                env |= compose_plugin(Path(folder))
                nats_server = Path(sys.executable).parent / "nats-server"
                run(
                    str(HERE / "standins.sh"),
                    *image_names(),
                    str(nats_server),
                    env={**os.environ, **env},
                    timeout_s=600,
                )
                say(f"engine and stand-ins ready after {time.monotonic() - began:.0f} s")
                return tests(arguments, env)
        except NoEngine as error:
            return tests(arguments, {REASON: str(error)})


def collect(lock: str) -> None:
    """The wheels of one lock file into deploy/wheels, unless they are there."""
    stamp, locked = _WHEELS / f".{lock}", ROOT / "requirements" / f"{lock}.lock"
    if stamp.exists() and stamp.read_text() == locked.read_text():
        return
    run(
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "-d",
        str(_WHEELS),
        "-r",
        str(locked),
        timeout_s=1800,
    )
    stamp.write_text(locked.read_text())


def tests(arguments: list[str], env: dict[str, str]) -> int:
    given = [argument for argument in arguments if argument != "--light"]
    if "--light" in arguments:
        given.append(f"--ignore={HERE / 'test_real_engine.py'}")
    if all(argument.startswith("-") for argument in given):
        given.append(str(HERE))
    command = [sys.executable, "-m", "pytest", *given]
    environ = {name: value for name, value in os.environ.items() if name != _INSIDE}
    return subprocess.run(command, env={**environ, **env}, cwd=ROOT, timeout=_LIMIT_S).returncode


def say(what: str) -> None:
    print(f"containers: {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
