"""Build the kernel for what is installed: python -m keras_rmsprop.kernel."""

import argparse
import contextlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from keras_rmsprop.kernel import build


def main() -> None:
    """Build what is not there."""
    parser = argparse.ArgumentParser(prog="python -m keras_rmsprop.kernel")
    parser.description = (
        "Build the native step for CPUs: for the installed TensorFlow, and for PyTorch."
    )
    text = "where to put the libraries (default: the user's cache)"
    parser.add_argument("--folder", type=Path, help=text)
    text = "build them even if they are there"
    parser.add_argument("--force", action="store_true", help=text)
    given = parser.parse_args()

    def made(library: build.Library) -> str:
        found = None
        with contextlib.suppress(RuntimeError, OSError):  # what is bad is replaced
            found = None if given.force else build.found(library)
        if found is None:
            return f"Built the kernel: {build.build(library, given.folder)}"
        path = build.copy(found, given.folder) if given.folder else found.path
        return f"The kernel is there already: {path}"

    errors = []
    with ThreadPoolExecutor() as pool:
        for future in [pool.submit(made, library) for library in build.LIBRARIES]:
            try:
                print(future.result())
            except (RuntimeError, OSError) as error:
                errors.append(error)
    if errors:
        sys.exit(f"No kernel, so steps take the portable way: {errors[0]}")


if __name__ == "__main__":
    main()
