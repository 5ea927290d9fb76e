"""Prints what one image installs: pyproject.toml's dependencies, and those of the extras that are named.

    python needs.py [EXTRA...] > needs.txt && pip install --constraint base.lock --requirement needs.txt

Instead of base.lock itself, ``--constraints`` prints its pins for what is not installed yet, and the installed version
of everything else: for an image whose maker has chosen versions that must stay, such as vLLM's own. Standard library
only; reads pyproject.toml and base.lock in the working directory.
"""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path


def needs(extras: list[str]) -> list[str]:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(need for name in extras for need in project["optional-dependencies"][name])]


def constraints() -> list[str]:
    here = {normal(found.metadata["Name"]): found.version for found in importlib.metadata.distributions()}
    pins = [line for line in Path("base.lock").read_text().splitlines() if "==" in line]
    missing = [pin for pin in pins if normal(pin.split("==")[0]) not in here]
    return [*missing, *(f"{name}=={version}" for name, version in here.items())]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    print("\n".join(constraints() if sys.argv[1:] == ["--constraints"] else needs(sys.argv[1:])))
