"""Compiles what `tandem.compiled` lists with mypyc, into the virtual environment; what is there already is kept.

    python scripts/compile.py

Needs mypy and a C compiler; about a minute.
"""

import os
import shutil
import tempfile
from pathlib import Path

from mypyc.build import mypycify
from setuptools import setup

from tandem import compiled


def build() -> None:
    with tempfile.TemporaryDirectory(prefix="tandem-compiled-") as scratch:
        # A copy, since mypyc works in the current directory and would read the project's configuration of mypy.
        shutil.copytree(compiled.SOURCES, Path(scratch, "tandem"), ignore=shutil.ignore_patterns("__pycache__"))
        os.chdir(scratch)
        files = [str(Path("tandem", path.relative_to(compiled.SOURCES))) for path in compiled.sources()]
        options = ["--follow-imports=silent", "--ignore-missing-imports", "--config-file=", "--cache-dir=/dev/null"]
        modules = mypycify([*options, *files], opt_level="2", debug_level="0", group_name="tandem")
        where = ["--build-lib", "made", "--build-temp", "temp"]
        setup(name="compiled", packages=[], ext_modules=modules, script_args=["--quiet", "build_ext", *where])
        shutil.rmtree(compiled.STORE, ignore_errors=True)
        # Under another name first: whoever starts meanwhile finds all of it, or nothing.
        new = compiled.STORE / "new"
        shutil.copytree(Path("made", "tandem"), new / "modules" / "tandem")
        (new / "library").mkdir()
        for library in Path("made").glob("*.so"):
            shutil.copy(library, new / "library")
        new.rename(compiled.folder())


if __name__ == "__main__":
    if not compiled.folder().is_dir():
        build()
    print(compiled.folder())
