"""Where the study's files lie, and how they are written: whole, or not at all."""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = ("ROTLIB_RESULTS", "ROTLIB_FIGURES", "ROTLIB_DATA", "ROTLIB_CACHE")


def results_folder() -> Path:
    """`ROTLIB_RESULTS`, else results/ of this checkout."""
    return ROOT / (os.environ.get("ROTLIB_RESULTS") or "results")


def spec_hash(thing: object, digits: int = 12) -> str:
    """The hexadecimal digits that name a specification, or anything else that JSON holds.

    The order of its keys doesn't matter.

    >>> spec_hash({"a": 1, "b": 2}) == spec_hash({"b": 2, "a": 1})
    True
    """
    return sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()[:digits]


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    return sha256(path.read_bytes()).hexdigest()


def local_path(spec: dict, suffix: str = ".json") -> Path:
    """Where this machine keeps the result of a specification."""
    return results_folder() / "local" / f"{spec['task']}-{spec_hash(spec)}{suffix}"


def saved(pattern: str) -> list[Path]:
    """The files that match in results/study/ and results/local/, sorted by name.

    Where both have one, it is this machine's.
    """
    folders = (results_folder() / folder for folder in ("study", "local"))
    paths = {path.name: path for folder in folders for path in folder.glob(pattern)}
    return [path for _, path in sorted(paths.items())]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a scratch file beside `path`, then rename it.

    A killed run leaves no half file to read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # on a shared folder processes of two machines may have one number
    scratch = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        write(scratch)
        os.replace(scratch, path)
    except RuntimeError as error:  # what torch.save makes of a full disk
        reason = str(error).splitlines()[0]
        raise OSError(f"{path.name} couldn't be written: is the disk full? ({reason})") from error
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def clear_leftovers() -> None:
    """Remove the scratch files that processes killed a day ago or earlier have left."""
    for path in (results_folder() / "local").glob(".*.partial"):
        with suppress(OSError):  # its owner lives, and has just renamed it
            if time.time() - path.stat().st_mtime > 24 * 3600:
                path.unlink()


def absolute_folders() -> None:
    """Let the folders that the environment names mean the same in processes that run elsewhere."""
    for name in _FOLDERS:
        if name in os.environ:
            os.environ[name] = str(Path(os.environ[name]).resolve())
