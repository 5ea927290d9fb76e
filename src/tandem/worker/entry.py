"""The main of both worker services."""

from __future__ import annotations

from tandem.adapters.entry import run_service
from tandem.core.types import Role
from tandem.worker.settings import WorkerSettings
from tandem.worker.shell import run


def worker_main(role: Role) -> None:
    run_service(WorkerSettings, lambda settings: run(settings, role))
