"""What `rotlib.study.gpu` needs on a machine without a network, in parts to be sent one by one.

``python -m rotlib.study.bundle pack FOLDER`` (make gpu-bundle) puts into FOLDER/1, FOLDER/2 … the
wheels that a machine with Python 3.12, torch, transformers and what they need lacks, the packaged
model's file and the text. There, beside a checkout, ``python -m rotlib.study.bundle unpack PLACE
PART …`` joins them, checks every file's sha256 and says which variables to set. Unpacking needs
nothing but Python and pip.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePosixPath

from rotlib.disk import ROOT, check_writable, file_digest, write_atomically, write_json

# what such a machine lacks of what the suite imports
WHEELS = (
    *("annotated-types", "compressed-tensors", "geoopt", "gguf", "greenlet", "loguru", "pydantic"),
    *("pydantic-core", "typing-inspection"),
)
PYTHON = "3.12"
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MANIFEST = "manifest.json"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rotlib.study.bundle",
        description="Pack what rotlib.study.gpu needs without a network, or unpack it.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="gather the files, and cut them into parts")
    packing.add_argument("folder", type=Path, help="a folder that isn't there yet")
    packing.add_argument("--part-mb", type=int, default=50, help="MiB of a part at most")
    unpacking = commands.add_parser("unpack", help="join the parts, on the machine")
    unpacking.add_argument("place", help="where the files go")
    unpacking.add_argument("parts", type=Path, nargs="+", help="the folders 1, 2 …")
    options = parser.parse_args(arguments)
    try:
        if options.command == "pack":
            pack(options.folder, options.part_mb)
        else:
            if not options.place:
                raise ValueError("the place is named by an empty word: is its variable unset?")
            unpack(options.parts, Path(options.place))
    except (ValueError, OSError) as error:
        parser.error(str(error))


def pack(folder: Path, part_mb: int) -> None:
    """Fill the folder with parts.

    Raises ValueError for a folder that is there already or parts below 1 MiB.
    """
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"{folder} is there already: name a new folder")
    check_writable(folder.parent, "name a folder elsewhere")
    if part_mb < 1:
        raise ValueError(f"--part-mb must be at least 1, not {part_mb}")
    with tempfile.TemporaryDirectory() as scratch:
        gather(Path(scratch))
        manifest = cut(Path(scratch), folder, part_mb * 2**20)
    for part in sorted(folder.iterdir()):
        size = sum(path.stat().st_size for path in part.iterdir())
        print(f"{part}: {size / 2**20:.1f} MiB")
    print(f"{len(manifest['files'])} files, cut at commit {manifest['commit']}")


def gather(place: Path) -> None:
    """The wheels, the packaged model's file and the text, in folders of these names."""
    from rotlib.models.names import PACKAGED, package_folder
    from rotlib.models.text import CORPORA, SPLITS  # unpacking does without torch

    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pins = [re.search(rf"^{name}==\S+", lock, re.MULTILINE)[0] for name in WHEELS]
    platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
    only = ["--only-binary=:all:", "--python-version", PYTHON, *platforms]
    _pip("download", *pins, *only, "--dest", str(place / "wheels"))
    for packaged in PACKAGED.values():
        package = place / "packages" / packaged.package
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        shutil.copy(package_folder(packaged) / packaged.file, package)
    text = place / "data" / "wikipedia-mini"
    text.mkdir(parents=True)
    for split in SPLITS:
        (text / f"{split}.txt").write_text(CORPORA["wikipedia-mini"](split), encoding="utf-8")


def cut(place: Path, folder: Path, part_size: int) -> dict:
    """Write the files of a place, cut where a part is full, and what is where beside them."""
    from rotlib.study.store import commit  # unpacking does without torch

    files, part, room = {}, 0, 0
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        name = path.relative_to(place).as_posix()
        pieces = []
        with path.open("rb") as source:
            while (data := source.read(room or part_size)) or not pieces:
                if not room:
                    part, room = part + 1, part_size
                    (folder / str(part)).mkdir(parents=True)
                piece = f"{len(files)}.{len(pieces)}"
                (folder / str(part) / piece).write_bytes(data)
                pieces.append(piece)
                room -= len(data)
        files[name] = {"sha256": file_digest(path), "pieces": pieces}
    manifest = {"commit": commit(), "parts": part, "files": files}
    for number in range(1, part + 1):
        write_json(folder / str(number) / MANIFEST, manifest)
    return manifest


def unpack(parts: list[Path], place: Path) -> None:
    """Join the files and install the wheels.

    Raises ValueError before anything is written, naming the file, for parts of several bundles, a
    piece that is missing, a file whose sha256 is another one, or another file in its place.
    """
    for part in parts:
        if not (part / MANIFEST).is_file():
            raise ValueError(f"{part} holds no {MANIFEST}: it is no part of a bundle")
    manifests = [_manifest(part) for part in parts]
    if any(manifest != manifests[0] for manifest in manifests):
        raise ValueError("these parts are of several bundles: pack one anew, and send all of it")
    at = {path.name: path for part in parts for path in part.iterdir()}
    files = manifests[0]["files"]
    for name, file in files.items():
        if missing := [piece for piece in file["pieces"] if not at.get(piece, place).is_file()]:
            raise ValueError(
                f"the piece {missing[0]} of {name} is missing: the bundle has "
                f"{manifests[0]['parts']} parts, and {len(parts)} were given"
            )
        path = place / name
        if PurePosixPath(name).as_posix() != name:  # else two names could stand for one file
            raise ValueError(f"{name!r} isn't written out plainly: the bundle isn't one of rotlib")
        if inside := [str(above) for above in PurePosixPath(name).parents if str(above) in files]:
            raise ValueError(f"{inside[0]} and {name} can't both be files: pack the bundle anew")
        if not path.resolve().is_relative_to(place.resolve()) or not path.name:
            raise ValueError(
                f"{name!r} would lie outside {place}: the bundle isn't one of rotlib, or a link "
                "there leads elsewhere"
            )
        digest = sha256()
        for piece in file["pieces"]:
            digest.update(at[piece].read_bytes())
        if digest.hexdigest() != file["sha256"]:
            raise ValueError(f"{name} isn't what was packed (its sha256 differs): send it again")
        if blocked := [above for above in path.parents if above.exists() and not above.is_dir()]:
            raise ValueError(f"{blocked[0]} is no folder: name another place")
        if path.exists() and not (path.is_file() and file_digest(path) == file["sha256"]):
            raise ValueError(f"{path} is there already, and is another one: name a new folder")
    if (here := "{}.{}".format(*sys.version_info)) != PYTHON:
        raise ValueError(f"the bundle's wheels are for Python {PYTHON}, and this is {here}")
    for name, file in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place / name, partial(_join, [at[piece] for piece in file["pieces"]]))
    packages = place / "packages"
    wheels = [str(place / name) for name in files if name.endswith(".whl")]
    _pip("install", "--no-index", "--upgrade", "--target", str(packages), *wheels)
    told = {"PYTHONPATH": packages, "ROTLIB_DATA": place / "data", "ROTLIB_CACHE": place / "cache"}
    set_to = (f"{name}={shlex.quote(str(path.resolve()))}" for name, path in told.items())
    print(f"export {' '.join(set_to)}")


def _pip(command: str, *arguments: str) -> None:
    """Raises ValueError with what pip said last, where it fails."""
    run = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *arguments]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise ValueError(f"pip can't {command} the bundle's wheels: {said[-1]}")


def _join(pieces: list[Path], target: Path) -> None:
    with target.open("wb") as joined:
        for piece in pieces:
            joined.write(piece.read_bytes())


def _manifest(part: Path) -> dict:
    try:
        manifest = json.loads((part / MANIFEST).read_text(encoding="utf-8"))
        if not manifest["files"]:
            raise ValueError("it names no files")
        for name, file in manifest["files"].items():
            pieces = [*file["pieces"]]
            words = all(isinstance(word, str) and "\0" not in word for word in (name, *pieces))
            if not name or not isinstance(file["sha256"], str) or not pieces or not words:
                raise ValueError(f"of {name!r}")
        manifest["parts"]
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{part / MANIFEST} is damaged ({error}): send the part again") from None
    return manifest


if __name__ == "__main__":
    main()
