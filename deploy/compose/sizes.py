"""Prints what the images of the compose files weigh, those that have been built here.

    python deploy/compose/sizes.py

Standard library only; needs the docker command.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    text = "".join(path.read_text() for path in sorted(HERE.glob("compose*.yaml")))
    print("| image | MB |\n|---|--:|")
    for image in sorted(set(re.findall(r"image: (?:&\S+ )?(tandem-\S+)", text))):
        found = subprocess.run(["docker", "image", "inspect", image], capture_output=True, text=True, timeout=60)
        if found.returncode == 0:
            print(f"| {image.split(':')[0]} | {json.loads(found.stdout)[0]['Size'] / 1e6:,.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
