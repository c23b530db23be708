"""The libraries of the kernel: which are loaded, and what a build leaves."""

import ctypes
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from keras_rmsprop.kernel import SWITCH, build, files, loaded

CODE = bytes(range(256)) * 40
NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return the folder in which the kernel looks for its libraries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache/keras_rmsprop"


@pytest.fixture
def library(cache):
    """Return the path of a library, which is not code, in the cache."""
    with files.whole(cache, build.name(build.POINTERS)) as place:
        place.write_bytes(CODE)
    return cache / build.name(build.POINTERS)


def read(path):
    """Load a library by reading it."""
    return Path(path).read_bytes()


def test_a_library_that_was_written_whole_is_loaded(library):
    assert loaded(build.POINTERS, read) == (CODE, "")
    note = library.with_name(f"{library.name}.sha256")
    assert note.read_text().split()[1] == str(len(CODE))
    done = subprocess.run(["sha256sum", library], capture_output=True, check=True)
    assert done.stdout.split()[0].decode() == note.read_text().split()[0]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (library, note)}
    assert modes == {0o600}
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700


def change(at, new):
    def do(path):
        content = bytearray(CODE)
        content[at : at + len(new)] = new
        path.write_bytes(content)

    return do


def replace_by(make):
    def do(path):
        path.rename(path.with_name("elsewhere"))
        make(path)

    return do


def note_of(path):
    return path.with_name(f"{path.name}.sha256")


BAD = {
    "cut off": (lambda p: p.write_bytes(CODE[:100]), "not what the note"),
    "empty": (lambda p: p.write_bytes(b""), "not what the note"),
    "longer": (lambda p: p.write_bytes(CODE + b"x"), "not what the note"),
    "another byte": (change(5000, b"\0\0"), "not what the note"),
    "a named pipe": (replace_by(os.mkfifo), "not a regular file"),
    "a folder": (replace_by(Path.mkdir), "Is a directory"),
    "a link": (replace_by(lambda p: p.symlink_to("elsewhere")), "symbolic links"),
    "a link to nothing": (replace_by(lambda p: p.symlink_to("no")), "symbolic links"),
    "a device": (replace_by(lambda p: p.symlink_to("/dev/zero")), "symbolic links"),
    "for all to write": (lambda p: p.chmod(0o666), "others may write to"),
    "for a group to write": (lambda p: p.chmod(0o660), "others may write to"),
    "a folder for all": (lambda p: p.parent.chmod(0o777), "others may write to"),
    "a folder like /tmp": (lambda p: p.parent.chmod(0o1777), "others may write to"),
    "a folder above for all": (
        lambda p: p.parent.parent.chmod(0o777),
        "others may write to",
    ),
    "no note": (lambda p: note_of(p).unlink(), "has no note"),
    "a note for all": (lambda p: note_of(p).chmod(0o606), "others may write to"),
    "a long note": (lambda p: note_of(p).write_text("1" * 10**6), "note .* damaged"),
    "no digest": (lambda p: note_of(p).write_text("\xff 1"), "note .* damaged"),
    "a negative size": (lambda p: note_of(p).write_text("0 -1"), "not what the note"),
    "a note that is a pipe": (
        lambda p: (note_of(p).unlink(), os.mkfifo(note_of(p))),
        "not a regular file",
    ),
}


@pytest.mark.parametrize(("do", "why"), BAD.values(), ids=BAD)
def test_no_other_is_loaded(do, why, library):
    do(library)
    with pytest.warns(UserWarning, match=why):
        got, text = loaded(build.POINTERS, read)
    assert got is None
    assert "cannot be loaded" in text


@needs_root
@pytest.mark.parametrize("part", ["library", "note", "folder", "above"])
def test_none_of_another_user_is_loaded(part, library):
    parts = {"library": library, "note": note_of(library), "folder": library.parent}
    os.chown(parts.get(part, library.parent.parent), NOBODY, NOBODY)
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert loaded(build.POINTERS, read)[0] is None


def test_a_folder_above_may_be_like_tmp(library):
    library.parent.parent.chmod(0o1777)
    assert loaded(build.POINTERS, read)[0] == CODE


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only on Linux")
def test_what_is_loaded_is_what_was_checked(library):
    def load(path):
        library.write_bytes(b"")  # as of someone who waited for this moment
        return read(path)

    assert loaded(build.POINTERS, load) == (CODE, "")


def test_a_relative_cache_is_ignored(library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert "not built it yet" in loaded(build.POINTERS, read)[1]
    assert build.cache() == tmp_path / "home/.cache/keras_rmsprop"


def test_it_is_looked_for_beside_the_package_first(library, tmp_path, monkeypatch):
    name, own = library.name, tmp_path / "package"
    monkeypatch.setattr(build, "HERE", own)
    monkeypatch.setattr(build, "name", lambda _: name)
    with files.whole(own, name) as place:
        place.write_bytes(b"own")
    assert loaded(build.POINTERS, read) == (b"own", "")
    (own / name).write_bytes(b"bad")
    assert loaded(build.POINTERS, read) == (CODE, "")
    library.write_bytes(b"bad")
    with pytest.warns(UserWarning, match="package.*; .*cache"):
        assert loaded(build.POINTERS, read)[0] is None


def test_flags_in_cxx_are_part_of_the_name(monkeypatch):
    def name(cxx):
        monkeypatch.setenv("CXX", cxx)
        return build.name(build.POINTERS)

    assert name("g++") == name("ccache clang++") == name("")
    flags = ["g++ -O2", "g++ -march=native", "g++ -march=haswell", 'g++ "-O3"']
    assert len({name(cxx) for cxx in ["g++", *flags]}) == 5
    assert name("g++  -O2  -g") == name("clang++ -O2 -g")


def compiler(tmp_path, script):
    """Return a compiler of a few lines of shell, which is given `$out`."""
    path = tmp_path / "compiler"
    find = 'while [ "$1" != -o ]; do shift; done\nout=$2\n'
    path.write_text(f"#!/bin/sh\n{find}{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("umask", [0, 0o077, 0o277])
def test_whatever_the_umask_files_are_private(umask, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler(tmp_path, 'echo code > "$out"'))
    before = os.umask(umask)
    try:
        path = build.build(build.POINTERS)
    finally:
        os.umask(before)
    assert loaded(build.POINTERS, read) == (b"code\n", "")
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in (cache, cache.parent)}
    assert {*modes.values()} == {0o700}
    assert {stat.S_IMODE(p.stat().st_mode) for p in cache.iterdir()} == {0o600}
    assert sorted(cache.iterdir()) == [path, note_of(path)]


def test_a_build_mends_the_folder_and_what_is_in_it(library, tmp_path, monkeypatch):
    library.parent.chmod(0o777)
    library.chmod(0o666)
    monkeypatch.setenv("CXX", compiler(tmp_path, 'echo code > "$out"'))
    build.build(build.POINTERS)
    assert loaded(build.POINTERS, read) == (b"code\n", "")


def test_nothing_is_built_where_it_would_not_be_loaded(cache, tmp_path, monkeypatch):
    cache.parent.mkdir()
    cache.parent.chmod(0o777)
    monkeypatch.setenv("CXX", compiler(tmp_path, 'echo code > "$out"'))
    with pytest.raises(RuntimeError, match="others may write to"):
        build.build(build.POINTERS)


def test_what_a_killed_build_leaves_is_swept_up(cache, tmp_path):
    program = f"""
        import sys, types
        package = types.ModuleType("keras_rmsprop")
        package.__path__ = [{str(build.HERE.parent)!r}]
        sys.modules["keras_rmsprop"] = package
        from keras_rmsprop.kernel import build
        build.build(build.POINTERS)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    slow = compiler(tmp_path, 'echo half > "$out"; exec sleep 60')

    def start():
        before = {*cache.glob("*/*")}
        builder = subprocess.Popen(
            command, env=os.environ | {"CXX": slow}, start_new_session=True
        )
        while len({*cache.glob("*/*")} - before) < 1:
            assert builder.poll() is None
            time.sleep(0.05)
        return builder

    def kill(builder):
        os.killpg(builder.pid, signal.SIGKILL)
        builder.wait()

    killed = start()
    kill(killed)
    left = {*cache.iterdir()}
    going = start()
    being_built = {*cache.iterdir()}
    assert not being_built & left
    fast = {"CXX": compiler(tmp_path, 'echo code > "$out"')}
    subprocess.run(command, env=os.environ | fast, check=True, capture_output=True)
    made = {cache / f"{build.name(build.POINTERS)}{end}" for end in ("", ".sha256")}
    assert {*cache.iterdir()} == made | being_built
    kill(going)


def test_code_that_is_no_library_is_told_of(library):
    with pytest.warns(UserWarning, match="invalid ELF header|cannot be loaded"):
        assert loaded(build.POINTERS, ctypes.CDLL)[0] is None
