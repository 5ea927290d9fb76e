"""Debian's Prometheus, scraping a cluster's processes."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from tandem.adapters.embedded import free_port
from tests.harness.cluster import Cluster, wait_for

SCRAPE_S = 1


class Prometheus:
    """Started by ``with``; finds the processes as a user's would, by the targets file of ``tandem up``."""

    def __init__(self, cluster: Cluster, folder: Path, rules: Path) -> None:
        [targets] = cluster.folder.glob("tandem/*/prometheus.json")
        self._folder = folder
        self._url = f"http://127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None
        config = {
            "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
            "rule_files": [str(rules)],
            "scrape_configs": [{"job_name": "tandem", "file_sd_configs": [{"files": [str(targets)]}]}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))

    def __enter__(self) -> Prometheus:
        command = [
            "prometheus",
            f"--config.file={self._folder}/prometheus.yml",
            f"--storage.tsdb.path={self._folder}/data",
            f"--web.listen-address={self._url.removeprefix('http://')}",
            "--log.level=warn",
        ]
        self._process = subprocess.Popen(command, cwd=self._folder, stdin=subprocess.DEVNULL)
        wait_for(self._ready, 60, "Prometheus ready")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The vector that it is now. AssertionError for what Prometheus refuses."""
        answer = self._get("/api/v1/query", query=expression)
        assert answer["status"] == "success", answer
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def targets(self) -> dict[str, str]:
        """Health by process."""
        active = self._get("/api/v1/targets")["data"]["activeTargets"]
        return {target["labels"]["process"]: target["health"] for target in active}

    def _ready(self) -> bool:
        assert self._process is not None and self._process.poll() is None, "Prometheus ended"
        try:
            with urllib.request.urlopen(self._url + "/-/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _get(self, path: str, **query: str) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(f"{self._url}{path}?{urllib.parse.urlencode(query)}", timeout=20) as answer:
                body: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from None
        return body
