"""`python -m services.frontend`, configured by TANDEM_* (services/frontend/config.py)."""

from __future__ import annotations

from services.frontend.app import run
from services.frontend.config import FrontendSettings
from tandem.adapters.entry import run_service


def main() -> None:
    run_service(FrontendSettings, run)


if __name__ == "__main__":
    main()
