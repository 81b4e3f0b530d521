"""Where an export goes: a free folder, or one that holds an earlier export and nothing else.

`MARKER` lists the files of an export with their sha256. Only a folder that is as it says is
replaced, and the old one is gone when the new one stands.
"""

import json
import os
import shutil
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from rotlib.disk import check_writable, file_digest, write_json

MARKER = "rotlib_export.json"


def checked_folder(folder: str | Path, overwrite: bool, source: str = "") -> Path:
    """The folder's full path, known to be free, or to hold an export that may be replaced.

    That is one whose `MARKER` lists every file that is there, unchanged. Never the model's own
    `source`, or a folder around the working directory. Raises ValueError otherwise.
    """
    if not isinstance(folder, str | Path) or not str(folder).strip():
        raise ValueError(f"the folder to write is named by a string or a Path, not {folder!r}")
    try:
        folder = Path(folder).expanduser().resolve()
        str(folder).encode()  # a card names it
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder!r} leads nowhere: name another folder ({error})") from error
    if isinstance(source, str) and source and Path(source).is_dir():
        at = Path(source).resolve()
        if folder in (at, *at.parents):
            raise ValueError(f"{folder} holds the model that is exported: name another folder")
        if at in folder.parents:
            raise ValueError(f"{folder} lies in the model's own folder: name another one")
    with suppress(FileNotFoundError):  # the working directory may be gone
        if folder in (here := Path.cwd(), *here.parents):
            raise ValueError(f"{folder} holds the working directory: name another folder")
    try:
        _recover(folder)
        if _aside(folder).exists():
            raise ValueError(f"{_aside(folder)} is in the way, and no export: move it")
        if folder.exists():
            _check_replaceable(folder, overwrite)
        check_writable(folder.parent, "name another folder")
        with suppress(FileNotFoundError):
            folder.stat()  # a name may be too long for the file system
    except OSError as error:
        raise ValueError(f"{folder} can't be written: {error.strerror}") from error
    return folder


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not folder.is_dir() or (any(folder.iterdir()) and not overwrite):
        raise ValueError(
            f"{folder} isn't an empty folder: name another one, or pass overwrite=True to "
            "replace an export"
        )
    if not any(folder.iterdir()):
        return
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        written = marker["files"] | {MARKER: ""}
        changed = [
            name
            for name in entries_of(folder)
            if name not in written
            or not (folder / name).is_file()
            or (folder / name).is_symlink()
            or (name != MARKER and file_digest(folder / name) != written[name])
        ]
        changed += [] if marker.keys() == {"made by", "format", "files"} else [MARKER]
    except (OSError, RecursionError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{folder} holds something else than an export of rotlib, which is all that "
            "overwrite=True replaces: name another folder"
        ) from error
    if changed:
        raise ValueError(
            f"{folder / changed[0]} isn't as rotlib wrote it, and overwrite=True replaces "
            "nothing else: name another folder, or move that file"
        )


def write_marker(folder: Path, format: str) -> None:
    """What the folder is, and the sha256 of every file in it."""
    files = {name: file_digest(folder / name) for name in entries_of(folder)}
    marker = {"made by": f"rotlib {version('rotlib')}", "format": format, "files": files}
    write_json(folder / MARKER, marker)


def entries_of(folder: Path) -> list[str]:
    """Every file, link and empty folder in it, by its place there."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir())
    )


def put_in_place(scratch: Path, folder: Path) -> None:
    """Rename, with an old export aside until the new one stands; who may enter stays the same."""
    aside = _aside(folder)
    if folder.exists():
        shutil.copymode(folder, scratch)
    if (folder / MARKER).exists():
        os.replace(folder, aside)
    try:
        os.replace(scratch, folder)
    except OSError:
        if aside.exists():
            os.replace(aside, folder)
        raise
    _recover(folder)


def _recover(folder: Path) -> None:
    """Put back, or else remove, an export that a killed one has put aside."""
    if not ((aside := _aside(folder)) / MARKER).is_file():
        return
    if folder.exists():
        _check_replaceable(aside, overwrite=True)  # nobody has put anything into it since
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(aside, folder)


def _aside(folder: Path) -> Path:
    whole = sha256(os.fsencode(folder.name)).hexdigest()[:16]
    return folder.with_name(f".{folder.name[:50]}.{whole}.replaced-by-rotlib")


def check_room(folder: Path, needed: int) -> None:
    """Raises ValueError where the disk has fewer bytes left."""
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise ValueError(
            f"the checkpoint takes {needed / 2**20:.0f} MiB and {folder.parent} has "
            f"{free / 2**20:.0f} MiB left: make room there"
        )
