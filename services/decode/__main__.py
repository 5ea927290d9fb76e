"""`python -m services.decode`: one decode worker, configured by TANDEM_* (tandem.worker.settings)."""

from __future__ import annotations

from tandem.core.types import Role
from tandem.worker.entry import worker_main


def main() -> None:
    worker_main(Role.DECODE)


if __name__ == "__main__":
    main()
