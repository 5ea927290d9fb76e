"""Writes base.lock and dev.lock: every package that pyproject.toml's dependencies come to, at one version.

    python requirements/lock.py

base.lock runs everything but the engine; dev.lock adds what tests and checks need. Both keep to the versions in
engine-cpu.lock, since all of them go into one environment, and so to what an earlier lock says, unless --upgrade.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
RUN_EXTRAS = ("frontend", "local", "compile")
#: The engine pins setuptools; an editable install needs it too.
BUILD = ["setuptools==78.1.1"]


def pins(path: Path) -> list[str]:
    if not path.exists():
        return []
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(requirements: list[str], constraints: list[str]) -> list[str]:
    with tempfile.TemporaryDirectory() as scratch:
        wanted, bounds, report = (Path(scratch, name) for name in ("wanted", "bounds", "report"))
        wanted.write_text("\n".join(requirements))
        bounds.write_text("\n".join(constraints))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "--constraint", str(bounds), "--requirement", str(wanted)]
        subprocess.run(command, check=True, timeout=900)
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return sorted((f"{item['name']}=={item['version']}" for item in found), key=str.lower)


def main() -> None:
    upgrade = "--upgrade" in sys.argv[1:]
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    base, dev = HERE / "base.lock", HERE / "dev.lock"
    engine = pins(HERE / "engine-cpu.lock")
    taken = {normal(pin.split("==")[0]) for pin in engine}
    earlier = [] if upgrade else [p for p in pins(base) + pins(dev) if normal(p.split("==")[0]) not in taken]

    run = resolve([*project["dependencies"], *(p for e in RUN_EXTRAS for p in extras[e]), *BUILD], engine + earlier)
    text = "# Written by requirements/lock.py from pyproject.toml.\n"
    base.write_text(text + "\n".join(run) + "\n")
    more = resolve(extras["dev"], engine + run + [p for p in earlier if p not in run])
    dev.write_text(text + "\n".join(pin for pin in more if pin not in run) + "\n")


if __name__ == "__main__":
    main()
