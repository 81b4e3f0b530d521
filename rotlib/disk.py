"""Folders that the environment names, and files that are written whole or not at all."""

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from uuid import uuid4

ROOT = Path(__file__).resolve().parents[1]
_SCRATCH = re.compile(r"\..*\.([0-9a-f]{8})\.[0-9a-f]{32}\.partial")
_DAY = 24 * 3600
_SETTLED = 2e9  # nanoseconds: a younger file may be written again without its times telling
_known: dict[str, dict] = {}


def folder_of(variable: str, default: str | Path) -> Path:
    """The folder that an environment variable names, else the default.

    `~` is one's home, and a relative folder lies in this checkout, so that it is the same one from
    every working directory and in every process. Raises ValueError for the home of nobody, and for
    a name that no file system takes.

    >>> folder_of("ROTLIB_NOWHERE", "results").relative_to(ROOT)
    PosixPath('results')
    """
    named = os.environ.get(variable, "").strip() or default
    try:
        folder = ROOT / Path(named).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            folder.stat()
        return folder
    except OSError as error:
        raise ValueError(f"{variable} can't name a folder: {error.strerror}") from error
    except RuntimeError as error:
        by = variable if os.environ.get(variable, "").strip() else f"{variable}'s default"
        raise ValueError(
            f"{by} names {str(named)!r}, and there is no such user: write the folder out"
        ) from error


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """The folder of dequantized models: `ROTLIB_CACHE`, else rotlib's in the user's cache."""
    return folder_of(
        "ROTLIB_CACHE", Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rotlib"
    )


def known_digest(path: Path) -> str:
    """A file's sha256, read once, and again when its size or times change."""
    place, state = str(path.resolve()), path.stat()
    stamp = [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
    if place not in _known:
        _known.update(_kept_digests())
    found = _known.get(place, {})
    if found.get("stamp") == stamp and isinstance(found.get("sha256"), str):
        return found["sha256"]
    digest = file_digest(path)
    if time.time_ns() - max(stamp[1:]) > _SETTLED:
        _known[place] = {"stamp": stamp, "sha256": digest}
        with suppress(OSError):  # it is computed anew next time
            write_json(_digests(), _kept_digests() | _known)
    return digest


def _digests() -> Path:
    return cache_folder() / "digests.json"


def _kept_digests() -> dict[str, dict]:
    with suppress(OSError, RecursionError, ValueError):
        found = json.loads(_digests().read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {place: entry for place, entry in found.items() if isinstance(entry, dict)}
    return {}


@contextmanager
def scratch_beside(path: Path, folder: bool = False) -> Iterator[Path]:
    """A new file or folder beside `path`, to fill and to rename; else it is gone at the end.

    It is locked while its process lives. What killed ones have left there goes first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path.parent)
    name = path.name.encode()[:100].decode(errors="ignore")
    scratch = path.with_name(f".{name}.{_host()}.{uuid4().hex}.partial")
    scratch.mkdir() if folder else scratch.touch()
    lock = os.open(scratch, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: leftovers stay for a day there
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield scratch
    finally:
        os.close(lock)
        _remove(scratch)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a scratch file beside `path`, then rename it.

    A killed run leaves no half file to read. Of a file that is there the permissions stay, and a
    link goes on leading to it. Raises FileExistsError where a device, a pipe or a folder has that
    name.
    """
    if there := path.exists():
        path = path.resolve()
        if not path.is_file():
            raise FileExistsError(f"{path} is there, and is no file")
    with scratch_beside(path) as scratch:
        try:
            write(scratch)
        except RuntimeError as error:  # what torch.save makes of a full disk
            reason = str(error).splitlines()[0]
            raise OSError(
                f"{path.name} couldn't be written: is the disk full? ({reason})"
            ) from error
        if there:
            shutil.copymode(path, scratch)
        os.replace(scratch, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def write_json(path: Path, thing: object, sort_keys: bool = False) -> None:
    """Write plain data as a JSON file, atomically."""
    write_text(path, json.dumps(thing, indent=1, sort_keys=sort_keys) + "\n")


def check_writable(folder: Path, remedy: str) -> None:
    """Raises ValueError, with what to do, now rather than after hours of work."""
    try:
        with scratch_beside(folder / "writable"):
            pass
    except OSError as error:
        reason = error.strerror
        if isinstance(error, FileExistsError):  # that isn't there, either: a link
            reason = "a file, or a link to nowhere, is in its way"
        raise ValueError(f"{folder} can't be written to ({reason}): {remedy}") from error


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes have left half written in a folder.

    Of this machine's it goes at once where no living process has it locked, of others' in a day.
    """
    for path in folder.glob(".*.partial"):
        if not (ours := _SCRATCH.fullmatch(path.name)):
            continue
        with suppress(OSError):  # its owner lives, and has just renamed it
            # a process takes its lock a moment after it has made the file
            least = 1 if ours[1] == _host() else _DAY
            if time.time() - path.stat().st_mtime > least and not _locked(path):
                _remove(path)


def _locked(path: Path) -> bool:
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@cache
def _host() -> str:
    """This machine since it was started: its containers share it, process numbers they don't."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]
