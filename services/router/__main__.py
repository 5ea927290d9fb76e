"""`python -m services.router`, configured by TANDEM_* (services/router/config.py)."""

from __future__ import annotations

from services.router.app import run
from services.router.config import RouterSettings
from tandem.adapters.entry import run_service


def main() -> None:
    run_service(RouterSettings, run)


if __name__ == "__main__":
    main()
