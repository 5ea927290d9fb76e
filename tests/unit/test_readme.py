"""What the README shows works as it stands."""

from __future__ import annotations

import re
from pathlib import Path

from tandem.adapters import deployment
from tandem.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_deployment_file_is_valid() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert [model.name for model in deployment.parse(text).models] == ["SmolLM2-135M-Instruct", "small-talk"]


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_commands_and_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = set(re.findall(r"\btandem (up|[a-z]+)\b(?=`| )", README)) & set(main.COMMANDS)
    assert {"up", "chat", "status"} <= commands
    for target in set(re.findall(r"\bmake ([a-z-]+)\b", README)):
        assert re.search(rf"^([a-z -]* )?{target}[ :]", makefile, re.MULTILINE), target
    for script in re.findall(r"\.venv/bin/python ([\w/]+\.py)", README):
        assert (ROOT / script).exists()
