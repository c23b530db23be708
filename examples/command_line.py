"""The command line of the examples: complaints are one line."""

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

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
    name: str, description: str, *, steps: int, short: int, unit: str, gives: str
) -> OptionParser:
    """Return a parser with the options that the short examples have in common.

    Args:
        name: The program's name, without `.py`.
        description: What it does.
        steps: How many steps it takes unless told otherwise.
        short: How many are enough to see that it runs.
        unit: What a step is.
        gives: What a run of all steps comes to.
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
        action=Short,
        nargs=0,
        dest="steps",
        const=(short, gives),
        default=argparse.SUPPRESS,
        help=f"--steps={short}: see that it runs",
    )
    add("--seed", type=whole(0), default=0, help="decides all that is random")
    add("--output", type=folder, default=f"runs/{name}", help="folder for the results")
    return parser


class Short(argparse.Action):
    """Few steps, and a word that they are few."""

    def __call__(self, parser: Any, namespace: Any, *_: Any) -> None:
        """Set the number of steps."""
        steps, gives = self.const
        setattr(namespace, self.dest, steps)
        announce_short(gives)


def announce_short(gives: str) -> None:
    """Say that a run is short.

    Args:
        gives: What the long one gives, and how long it takes.
    """
    print("A short run: it shows that the program works, and learns next to nothing.")
    print(f"Without --short: {gives}.")


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


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """Keep off the terminal what TensorFlow says of the machine when it starts.

    It writes that past Python, and before it reads `TF_CPP_MIN_LOG_LEVEL`.
    """
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as remarks:
        os.dup2(remarks.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
