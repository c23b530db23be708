"""For mkdocstrings: the docstrings have `Example:`, where it expects `Examples:`."""

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Calls the section as it expects, so that the examples are shown as code."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Change the docstring of an object, if it has one."""
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = text.replace("\nExample:\n", "\nExamples:\n")
