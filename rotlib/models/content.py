"""What a model's name stands for: a digest of its files.

The same folder may hold other weights tomorrow, and two folders of one name are two models. What is
kept of a model is therefore named by its content.
"""

import json
import os
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from rotlib.disk import file_digest, write_json
from rotlib.models.zoo import cache_folder, hub_commit, resolve

_FILES = (
    *("config.json", "**/*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*"),
    *("merges.txt", "special_tokens_map.json", "added_tokens.json"),
)
_SETTLED = 2e9  # nanoseconds: a younger file may be written again without its times telling
_known: dict[str, dict] = {}


def model_content(name: str) -> str:
    """The sha256 of the files that make up a model and its tokenizer, or its commit on the Hub.

    A file is read once, and again when its size or times change. Raises like `rl.load`.

    >>> model_content(tiny) == model_content(tiny)
    True
    """
    if not os.path.isdir(name):
        return f"commit {hub_commit(name)}"
    source = Path(resolve(name))
    files = sorted({path for pattern in _FILES for path in source.glob(pattern) if path.is_file()})
    digests = {str(path.relative_to(source)): _digest(path) for path in files}
    return f"sha256 {sha256(json.dumps(digests).encode()).hexdigest()}"


def _digest(path: Path) -> str:
    place, state = str(path.resolve()), path.stat()
    stamp = [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
    if place not in _known:
        _known.update(_read())
    found = _known.get(place, {})
    if found.get("stamp") == stamp and isinstance(found.get("sha256"), str):
        return found["sha256"]
    digest = file_digest(path)
    if time.time_ns() - max(stamp[1:]) > _SETTLED:
        _known[place] = {"stamp": stamp, "sha256": digest}
        with suppress(OSError):  # it is computed anew next time
            write_json(_file(), _read() | _known)
    return digest


def _file() -> Path:
    return cache_folder() / "digests.json"


def _read() -> dict[str, dict]:
    with suppress(OSError, RecursionError, ValueError):
        found = json.loads(_file().read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {place: entry for place, entry in found.items() if isinstance(entry, dict)}
    return {}
