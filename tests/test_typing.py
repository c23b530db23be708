"""A user's program runs, and type checkers find its mistakes and nothing else."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tensorflow("a program for it, whose types are everybody's")

ROOT = Path(__file__).parent.parent
TYPED = ROOT / "tests/typed"
# As one finds an installed package: its own types are used, but not checked.
MYPY = "--strict --follow-imports=silent --ignore-missing-imports --config-file="
CHECKERS = {
    "mypy": [*MYPY.split(), f"--cache-dir={ROOT / '.mypy_cache/user'}"],
    "pyright": ["--pythonpath", sys.executable],
}


@pytest.mark.slow
def test_the_program_runs(tmp_path):
    runpy.run_path(str(TYPED / "program.py"))["main"](tmp_path)
    assert (tmp_path / "readings.csv").stat().st_size


@pytest.mark.parametrize(
    "checker",
    # Its first run takes half a minute; `make lint` runs it on the package.
    [pytest.param("mypy", marks=pytest.mark.rest), "pyright"],
)
def test_type_checkers_find_mistakes_and_nothing_else(checker, tmp_path):
    pytest.importorskip(checker)
    shutil.copytree(TYPED, tmp_path, dirs_exist_ok=True)
    settings = json.dumps({"extraPaths": [str(ROOT)]})
    (tmp_path / "pyrightconfig.json").write_text(settings)
    command = [sys.executable, "-m", checker, *CHECKERS[checker]]
    out = subprocess.run(
        [*command, "program.py", "mistakes.py"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    ).stdout
    found = re.findall(r"(\w+\.py):(\d+)(?::\d+)?[: -]+error", out)
    lines = enumerate((TYPED / "mistakes.py").read_text().splitlines(), 1)
    made = [("mistakes.py", str(n)) for n, line in lines if "# mistake" in line]
    assert made
    assert sorted(found) == sorted(made), out
