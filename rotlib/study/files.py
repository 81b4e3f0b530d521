"""What the study's files are named by, and where they lie."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from io import TextIOWrapper
from pathlib import Path

from rotlib.disk import check_writable, folder_of
from rotlib.models.content import model_content
from rotlib.models.names import PACKAGED
from rotlib.models.text import text_content

# models and texts that are the same everywhere, and have an entry among the canaries
PINNED = (*PACKAGED, "wikipedia-mini")
_CONTENT = {"model": model_content, "text": text_content}


def results_folder() -> Path:
    """`ROTLIB_RESULTS`, else results/ of this checkout."""
    return folder_of("ROTLIB_RESULTS", "results")


def print_any_name() -> None:
    """Let this process print names that its terminal has no letters for."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Print lines of which the reader takes as many as it likes, as `head` does."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # what is still to be flushed goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_results_folder() -> None:
    """Raises ValueError where this machine's results can't be written."""
    check_writable(results_folder() / "local", "let ROTLIB_RESULTS name a writable folder")


def spec_hash(thing: object, digits: int = 12) -> str:
    """The hexadecimal digits that name a specification, or anything else that JSON holds.

    The order of its keys doesn't matter.

    >>> spec_hash({"a": 1, "b": 2}) == spec_hash({"b": 2, "a": 1})
    True
    """
    return sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()[:digits]


def content_of(spec: dict) -> dict[str, str]:
    """What a specification's model and text are, by their bytes, where they aren't pinned.

    Raises like `rl.load` and `load_tokens` for what isn't to be had.

    >>> content_of({"task": "quantize", "model": "smollm2-135m"})
    {}
    """
    return {
        name: digest(spec[name])
        for name, digest in _CONTENT.items()
        if name in spec and spec[name] not in PINNED
    }


def file_name(spec: dict, content: dict[str, str], suffix: str = ".json") -> str:
    """The name of what is kept of a specification; another content is another file."""
    return f"{spec['task']}-{spec_hash(spec | content)}{suffix}"


def local_path(spec: dict, suffix: str = ".json") -> Path:
    """Where this machine keeps the result of a specification; raises like `content_of`."""
    return results_folder() / "local" / file_name(spec, content_of(spec), suffix)


def saved(pattern: str) -> list[Path]:
    """The files that match in results/study/ and results/local/, sorted by name.

    Where both have one, it is this machine's.
    """
    folders = (results_folder() / folder for folder in ("study", "local"))
    paths = {path.name: path for folder in folders for path in folder.glob(pattern)}
    return [path for _, path in sorted(paths.items())]
