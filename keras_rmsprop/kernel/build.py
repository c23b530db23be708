"""Compiling the kernel, and finding it again.

There are two libraries: ops of TensorFlow, bound to its version, and functions of C
that take pointers. The name of a library says for which version, sources and flags it
is.
"""

import hashlib
import itertools
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from keras_rmsprop.kernel import files

HERE = Path(__file__).parent
HEADERS = (
    *("processors.h", "blocks.h", "step.h", "rows.h", "search.h"),
    *("variables.h", "ops.h"),
)
FLAGS = (
    # Warnings, of TensorFlow's headers, would hide errors.
    *("-fPIC", "-O3", "-w"),
    # So that loops are vectorised, and results stay those of IEEE arithmetic.
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)
LINK_FLAGS = "-shared", "-s"
"""Without symbols (-s) it is loaded sooner."""
COMPILERS = "c++", "g++", "clang++"


class Framework(NamedTuple):
    """What a library is compiled for."""

    version: tuple[str, ...] = ()
    compile_flags: tuple[str, ...] = ("-std=c++17",)
    link_flags: tuple[str, ...] = ()

    @classmethod
    def tensorflow(cls) -> "Framework":
        """Return the TensorFlow that is installed."""
        try:
            tf = import_module("tensorflow")  # only here: on PyTorch it may be missing
        except ImportError as error:
            raise RuntimeError(f"TensorFlow cannot be imported: {error}") from error
        flags = [
            # What TensorFlow's headers are warned of is not ours.
            f"-isystem{flag.removeprefix('-I')}" if flag.startswith("-I") else flag
            for flag in tf.sysconfig.get_compile_flags()
        ]
        version = tf.version.VERSION, tf.version.GIT_VERSION
        return cls(version, (*flags,), (*tf.sysconfig.get_link_flags(),))


class Library(NamedTuple):
    """A library of the kernel."""

    prefix: str
    """Of its file name."""
    sources: tuple[str, ...]
    framework: Callable[[], Framework]
    """Returns what it is compiled for."""


OPS = Library(
    "tensorflow",
    ("blocks.cc", "step.cc", "rows.cc", "search.cc", "ops.cc", "row_ops.cc"),
    Framework.tensorflow,
)
"""For TensorFlow."""
POINTERS = Library(
    "pointers", ("blocks.cc", "step.cc", "search.cc", "pointers.cc"), Framework
)
"""For everyone who has pointers, such as PyTorch."""
LIBRARIES = OPS, POINTERS


def name(library: Library) -> str:
    """Return the file name of a library for what is installed and these sources."""
    version = library.framework().version
    known = [*version, platform.machine(), *FLAGS, *LINK_FLAGS, *_flags_of_compiler()]
    known += [(HERE / source).read_text() for source in (*HEADERS, *library.sources)]
    digest = hashlib.sha256("\n".join(known).encode()).hexdigest()
    return "-".join([library.prefix, *version[:1], digest[:12]]) + ".so"


def _flags_of_compiler() -> list[str]:
    """Return the flags in `CXX`, and of which processor `native` speaks in them."""
    named = os.environ.get("CXX", "")
    try:
        words = shlex.split(named)
    except ValueError:  # a quote is not closed; a build will say so
        words = named.split()
    flags = [*itertools.dropwhile(lambda word: not word.startswith("-"), words)]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    features = [x for x in lines if x.startswith(("flags", "Features"))] or lines
    return [*flags, *features[: any("native" in flag for flag in flags)]]


def cache() -> Path:
    """Return the user's folder for libraries that were built.

    Raises:
        RuntimeError: The user has no home.
    """
    # The specification of XDG_CACHE_HOME says to ignore a relative path.
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = given if given.is_absolute() else Path.home() / ".cache"
    if not base.is_absolute():
        raise RuntimeError(f"the home folder is no absolute path: {Path.home()}")
    return base / "keras_rmsprop"


def found(library: Library) -> files.Checked | None:
    """Return the file that fits: one that came in the wheel, or one in the cache.

    Raises:
        OSError: It cannot be looked for.
        RuntimeError: There are some, but none that may be loaded.
    """
    file, refused = name(library), []
    folders: tuple[Callable[[], Path], ...] = (lambda: HERE, cache)
    for folder in folders:
        try:
            path = folder() / file
            if os.path.lexists(path):
                return files.read(path)
        except (OSError, RuntimeError) as error:
            refused.append(str(error))
    if refused:
        raise RuntimeError("; ".join(refused))
    return None


def compiler() -> str | None:
    """Return the C++ compiler: `CXX`, or the first one there is."""
    named = os.environ.get("CXX", "").strip()
    return named or next(filter(shutil.which, COMPILERS), None)


def copy(library: files.Checked, folder: Path) -> Path:
    """Copy a library to a folder; return where it is.

    Raises:
        RuntimeError: It cannot be copied.
    """
    copied = folder / library.path.name
    if not (copied.is_file() and copied.samefile(library.path)):
        with files.whole(folder, copied.name) as path:
            path.write_bytes(library.content)
    return copied


def build(library: Library, folder: Path | None = None) -> Path:
    """Compile a library, which takes a minute or so on two cores.

    Args:
        library: Which one.
        folder: Where to put it; None: the user's cache.

    Returns:
        Its path.

    Raises:
        RuntimeError: There is no compiler, or it fails.
    """
    command = compiler()
    if command is None:
        raise RuntimeError("there is no C++ compiler; set CXX, or install g++")
    if os.name != "posix":
        raise RuntimeError("it is for Linux and macOS only")
    if folder is None:
        folder = cache()
        files.make_private(folder)
    framework, file = library.framework(), name(library)

    def run(arguments: Iterable[str | Path]) -> None:
        try:
            subprocess.run(
                [*shlex.split(command), *FLAGS, *framework.compile_flags, *arguments],
                check=True,
                capture_output=True,
                text=True,
            )
        except (OSError, ValueError) as error:  # ValueError: a quote is not closed
            raise RuntimeError(f"{command} cannot be run: {error}") from error
        except subprocess.CalledProcessError as error:
            last = error.stderr.strip().splitlines()[-20:]
            raise RuntimeError("\n".join([f"{command} failed:", *last])) from error

    def compiled(source: str) -> Path:
        to = made.with_name(f"{source}.o")
        run(["-c", HERE / source, "-o", to])
        return to

    with files.whole(folder, file) as made, ThreadPoolExecutor(os.cpu_count()) as pool:
        # The longest are last.
        objects = [*pool.map(compiled, reversed(library.sources))]
        run([*LINK_FLAGS, *objects, "-o", made, *framework.link_flags])
    return folder / file
