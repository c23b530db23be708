"""Compiling the kernel, and finding it again.

It is bound to a version of TensorFlow: a library's name says for which one it is, and
for which sources.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import tensorflow as tf

HERE = Path(__file__).parent
SOURCES = (
    *("processors.h", "blocks.h", "step.h", "rows.h", "search.h"),
    *("blocks.cc", "step.cc", "rows.cc", "search.cc", "ops.cc"),
)
FLAGS = (
    *("-shared", "-fPIC", "-O3", "-Wall"),
    # So that loops are vectorised, and results stay those of IEEE arithmetic.
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)
COMPILERS = "c++", "g++", "clang++"


def name() -> str:
    """Return the file name of the library for this TensorFlow and these sources."""
    known = [tf.version.VERSION, tf.version.GIT_VERSION, platform.machine(), *FLAGS]
    known += [(HERE / source).read_text() for source in SOURCES]
    digest = hashlib.sha256("\n".join(known).encode()).hexdigest()
    return f"tensorflow-{tf.version.VERSION}-{digest[:12]}.so"


def cache() -> Path:
    """Return the user's folder for libraries that were built."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "keras_rmsprop"


def found() -> Path | None:
    """Return the library that fits: one that came in the wheel, or one in the cache."""
    library = name()
    places = (HERE / library, cache() / library)
    return next((path for path in places if path.exists()), None)


def compiler() -> str | None:
    """Return the C++ compiler: `CXX`, or the first one there is."""
    named = os.environ.get("CXX", "").strip()
    return named or next(filter(shutil.which, COMPILERS), None)


def build(folder: Path | None = None) -> Path:
    """Compile the library, which takes half a minute or so.

    Args:
        folder: Where to put it; None: the user's cache.

    Returns:
        Its path.

    Raises:
        RuntimeError: There is no compiler, or it fails.
    """
    command = compiler()
    if command is None:
        raise RuntimeError("there is no C++ compiler; set CXX, or install g++")
    folder = cache() if folder is None else folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(f"{folder} cannot be made: {error}") from error
    flags = [
        # What TensorFlow's headers are warned of is not ours.
        f"-isystem{flag.removeprefix('-I')}" if flag.startswith("-I") else flag
        for flag in tf.sysconfig.get_compile_flags()
    ]
    sources = [str(HERE / source) for source in SOURCES if source.endswith(".cc")]
    # In a folder of its own, so that nobody finds half a library.
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        library = name()
        made = Path(partial) / library
        arguments = [*FLAGS, *flags, *sources, "-o", str(made)]
        try:
            subprocess.run(
                [*shlex.split(command), *arguments, *tf.sysconfig.get_link_flags()],
                check=True,
                capture_output=True,
                text=True,
            )
        except OSError as error:
            raise RuntimeError(f"{command} cannot be run: {error}") from error
        except subprocess.CalledProcessError as error:
            last = error.stderr.strip().splitlines()[-20:]
            raise RuntimeError("\n".join([f"{command} failed:", *last])) from error
        return made.replace(folder / library)
