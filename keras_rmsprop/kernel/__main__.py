"""Build the kernel for the installed TensorFlow: python -m keras_rmsprop.kernel."""

import argparse
import shutil
import sys
from pathlib import Path

from keras_rmsprop.kernel import build


def main() -> None:
    """Build it unless it is there."""
    parser = argparse.ArgumentParser(prog="python -m keras_rmsprop.kernel")
    parser.description = "Build the native step for CPUs, for the installed TensorFlow."
    text = "where to put the library (default: the user's cache)"
    parser.add_argument("--folder", type=Path, help=text)
    text = "build it even if it is there"
    parser.add_argument("--force", action="store_true", help=text)
    given = parser.parse_args()

    path = None if given.force else build.found()
    if path is not None:
        if given.folder:
            given.folder.mkdir(parents=True, exist_ok=True)
            path = Path(shutil.copy(path, given.folder))
        print(f"The kernel is there already: {path}")
        return
    try:
        print(f"Built the kernel: {build.build(given.folder)}")
    except RuntimeError as error:
        sys.exit(f"No kernel, so steps take the portable way: {error}")


if __name__ == "__main__":
    main()
