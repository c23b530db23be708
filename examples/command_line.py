"""The command line of the examples: complaints are one line."""

import argparse
import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

LARGEST = 2**32 - 1  # the largest seed of NumPy


class OptionParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """End the program with exit code 2.

        Args:
            message: What is wrong.
        """
        self.exit(2, f"{self.prog}: error: {message}\n")


def example_parser(
    name: str, description: str, *, steps: int, short: int, unit: str
) -> OptionParser:
    """Return a parser with the options that the short examples have in common.

    Args:
        name: The program's name, without `.py`.
        description: What it does.
        steps: How many steps it takes unless told otherwise.
        short: How many are enough to see that it runs.
        unit: What a step is.
    """
    parser = OptionParser(
        prog=f"{name}.py",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=whole(1), default=steps, help=unit)
    add(
        "--short",
        action="store_const",
        dest="steps",
        const=short,
        default=argparse.SUPPRESS,
        help=f"--steps={short}: see that it runs",
    )
    add("--seed", type=whole(0), default=0, help="decides all that is random")
    add("--output", type=folder, default=f"runs/{name}", help="folder for the results")
    return parser


def whole(smallest: int) -> Callable[[str], int]:
    """Return a converter of text to a whole number not below `smallest`.

    Args:
        smallest: The smallest number that passes.
    """

    def convert(text: str) -> int:
        with contextlib.suppress(ValueError):
            if smallest <= int(text) <= LARGEST:
                return int(text)
        raise argparse.ArgumentTypeError(
            f"must be a whole number from {smallest} to {LARGEST}. Received: {text}"
        )

    return convert


def folder(text: str) -> Path:
    """Convert text to the path of a folder to write in, made if it is not there.

    Args:
        text: The path.
    """
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=text).close()
    except OSError as error:
        message = f"cannot write to {text}: {error.strerror}"
        raise argparse.ArgumentTypeError(message) from error
    return Path(text)
