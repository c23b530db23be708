"""Files of code: written whole, and read only if nobody else can have written them.

Beside a file is a note of its size and SHA-256. A file is read if it and its note are
regular files of this user or of root, in folders that nobody else may write to, and if
the note is right. So no damaged file is loaded, and none of somebody else.
"""

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

PARTIAL = "building-"
"""The name of a folder in which a file is being written begins with this."""
NOTE = ".sha256"
"""The name of a note is that of its file, and this."""
MAX_NOTE = 100
"""The largest size of a note."""


class Checked(NamedTuple):
    """A file that was read and may be loaded."""

    path: Path
    content: bytes
    digest: str
    """SHA-256 of the content."""


def read(path: Path) -> Checked:
    """Read a file and check it. What is returned is what was checked.

    Args:
        path: Where the file is.

    Raises:
        OSError: It cannot be opened.
        RuntimeError: Others may have written it, or it is damaged.
    """
    folder = path.parent.resolve(strict=True)
    check_folder(folder)
    try:
        note = _content(folder / f"{path.name}{NOTE}", MAX_NOTE)
        digest, size = note.decode("ascii").split()
        content = _content(folder / path.name, int(size))
    except FileNotFoundError as error:
        raise RuntimeError(f"{path} has no note of its SHA-256 beside it") from error
    except ValueError as error:
        raise RuntimeError(f"the note beside {path} is damaged") from error
    if len(content) != int(size) or hashlib.sha256(content).hexdigest() != digest:
        raise RuntimeError(f"{path} is not what the note beside it says")
    return Checked(path, content, digest)


def check_folder(folder: Path) -> None:
    """Fail if others may write to a folder or replace it.

    Args:
        folder: Its path, without symbolic links.
    """
    for part in (folder, *folder.parents):
        _check(part, part.stat(), is_above=part != folder)


def _content(path: Path, size: int) -> bytes:
    """Return what a file holds; of one that is larger than `size`, one byte more."""
    # A symbolic link is an error. A named pipe does not wait for someone who writes.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise RuntimeError(f"{path} is not a regular file")
        _check(path, status)
        return file.read(max(size, 0) + 1)


def _check(path: Path, status: os.stat_result, *, is_above: bool = False) -> None:
    """Fail if others than this user and root may write to a file or a folder.

    Args:
        path: Its path.
        status: Its status.
        is_above: Whether it is a folder above that of the file. There it is enough if
            others cannot replace what is not theirs, as in `/tmp`.
    """
    if status.st_uid not in (0, os.geteuid()):
        raise RuntimeError(f"{path} belongs to another user (uid {status.st_uid})")
    if is_above and status.st_mode & stat.S_ISVTX:
        return
    by_group = status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid)
    if by_group or status.st_mode & stat.S_IWOTH:
        raise RuntimeError(f"others may write to {path}")


def _is_private(gid: int) -> bool:
    """Whether a group is of this user alone; many systems make one for each user."""
    try:
        user = import_module("pwd").getpwuid(os.geteuid())
        group = import_module("grp").getgrgid(gid)
    except KeyError:
        return False
    is_own = gid == user.pw_gid and group.gr_name == user.pw_name
    return user.pw_uid != 0 and is_own and {*group.gr_mem} <= {user.pw_name}


_IN_MEMORY: dict[str, str] = {}
"""By their SHA-256, the paths of contents that are in memory."""


def loadable(checked: Checked) -> str:
    """Return a path from which to load what was checked.

    On Linux that is a copy in memory, which nobody can change or cut off meanwhile. It
    stays for good, since the loader takes what has the same path for the same.

    Args:
        checked: The file.
    """
    if not hasattr(os, "memfd_create") or not Path("/proc/self/fd").is_dir():
        return str(checked.path)
    if checked.digest not in _IN_MEMORY:
        fd = os.memfd_create("keras_rmsprop")
        with open(fd, "wb", closefd=False) as memory:
            memory.write(checked.content)
        _IN_MEMORY[checked.digest] = f"/proc/self/fd/{fd}"
    return _IN_MEMORY[checked.digest]


def make_private(folder: Path) -> None:
    """Make a folder to which only this user may write.

    Raises:
        RuntimeError: That cannot be.
    """
    try:
        _make(folder)
        folder.chmod(0o700)
        check_folder(folder.resolve(strict=True))
    except OSError as error:
        raise RuntimeError(f"{folder} cannot be written to: {error}") from error


@contextlib.contextmanager
def whole(folder: Path, name: str) -> Iterator[Path]:
    """Give a path for a file; once it is written, put it and its note into a folder.

    So nobody finds half a file. What others left there who were killed is removed.

    Args:
        folder: The folder; it is made if it is not there.
        name: The name of the file.

    Raises:
        RuntimeError: The folder cannot be written to.
    """
    try:
        _make(folder)
        with contextlib.ExitStack() as stack:
            with _locked(folder):
                _sweep(folder)
                partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder))
                stack.callback(shutil.rmtree, partial, ignore_errors=True)
                stack.enter_context(_locked(partial))
            made, note = partial / name, partial / f"{name}{NOTE}"
            yield made
            made.chmod(0o600)
            content = made.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            note.touch(0o600)
            note.chmod(0o600)
            note.write_text(f"{digest} {len(content)}\n")
            with _locked(folder):
                made.replace(folder / made.name)
                note.replace(folder / note.name)
    except OSError as error:
        raise RuntimeError(f"{folder} cannot be written to: {error}") from error


def _make(folder: Path) -> None:
    """Make a folder and those above it, whatever the umask for this user alone."""
    for part in (*reversed(folder.absolute().parents), folder):
        if not part.is_dir():
            part.mkdir(0o700, exist_ok=True)
            part.chmod(0o700)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; a process that dies gives it up."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems have none
            _lock(fd)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, *, wait: bool = True) -> None:
    fcntl = import_module("fcntl")
    fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _sweep(folder: Path) -> None:
    """Remove what builds left that were killed: nobody holds its lock."""
    for partial in folder.glob(f"{PARTIAL}*"):
        with contextlib.suppress(OSError):
            fd = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                _lock(fd, wait=False)
                shutil.rmtree(partial, ignore_errors=True)
            finally:
                os.close(fd)
