"""python -m services.console"""

from __future__ import annotations

from services.console.app import run
from services.console.config import ConsoleSettings
from tandem.adapters.entry import run_service


def main() -> None:
    run_service(ConsoleSettings, run, nice=10)


if __name__ == "__main__":
    main()
