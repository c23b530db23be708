"""For mkdocstrings: what it needs to show the docstrings of this package in full."""

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Calls a section as it expects, and shows types without checks."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Change the docstring of an object, if it has one."""
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = text.replace("\nExample:\n", "\nExamples:\n")

    def on_function(self, *, func: Any, **_: Any) -> None:
        """Leave the type of `Annotated[type, ...]`."""
        for parameter in func.parameters:
            parameter.annotation = _plain(parameter.annotation)


def _plain(annotation: Any) -> Any:
    if getattr(annotation, "canonical_path", "") == "typing.Annotated":
        return annotation.slice.elements[0]
    return annotation
