"""Router, frontend, CLI and simulated workers need neither torch nor vLLM: they run where neither can be imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

_FORBID = """
import importlib.abc, sys

class Forbid(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "vllm", "transformers", "nixl", "numpy"}:
            raise ImportError(f"{name} must not be needed here")

sys.meta_path.insert(0, Forbid())
"""


@pytest.mark.parametrize(
    "imports",
    [
        "services.router.app, services.router.__main__",
        "services.frontend.app, services.frontend.__main__",
        "services.console.app, services.console.__main__",
        "services.prefill.__main__, services.decode.__main__, tandem.worker.shell, tandem.engine.sim",
        "tandem.cli.main, tandem.cli.up, tandem.cli.chat, tandem.cli.status",
    ],
)
def test_imports_without_torch_or_vllm(imports: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{_FORBID}\nimport {imports}"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
