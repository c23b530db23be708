"""Writes `api.txt`, the public API: names, signatures and defaults.

`python tests/public_api.py` writes it. What is public is what `docs/api.md` shows.
"""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FILE = Path(__file__).with_name("api.txt")
HEAD = "# `python tests/public_api.py` writes this. Users see each change of it.\n"


def api() -> str:
    """Return the text of the file."""
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    lines = []
    for block in page.split("\n::: ")[1:]:
        path = block.split()[0]
        module, _, name = path.rpartition(".")
        value = getattr(importlib.import_module(module), name)
        lines.append(path + shown(value))
        for member in re.findall(r"^ +- (\w+)$", block, re.MULTILINE):
            lines.append(f"{path}.{member}{shown(getattr(value, member, None))}")
    return HEAD + "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """Return the parameters of a function or class, or the value of a constant."""
    if isinstance(value, tuple):
        return f" = {value}"
    if not callable(value):
        return ""
    signature = inspect.signature(value)
    given = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
        if parameter.name != "self"
    ]
    # Without types: how they are written depends on the version of NumPy.
    text = str(inspect.Signature(given))
    return text if len(text) < 60 else text.replace(", ", ",\n    ")


if __name__ == "__main__":
    FILE.write_text(api(), encoding="utf-8")
