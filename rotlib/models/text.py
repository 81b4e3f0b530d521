"""Corpora as token streams, split into calibration and test text by a fixed rule.

A stream is known by its sha256. `wikipedia-mini` is a slice of English Wikipedia that ships inside
gensim: every fourth article is test, the others are calibration. `wikitext2` follows the usual
protocol (all rows of wikitext-2-raw-v1 joined with a blank line; train calibrates, test tests) and
`c4` takes the first shards of its English train and validation sets. Both come through `datasets`,
or from the folder `ROTLIB_DATA`: `wikitext2/wiki.{train,test}.raw`,
`c4/c4-train.00000-of-01024.json.gz`, `c4/c4-validation.00000-of-00008.json.gz`. There may also lie
`wikipedia-mini/{calibration,test}.txt`, for a machine without gensim.
"""

import bz2
import gzip
import json
import os
import re
import zlib
from collections.abc import Sequence
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha256
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rotlib.checks import one_of, token_ids, whole_number
from rotlib.disk import folder_of
from rotlib.models.names import on_hub

WHOLE = 1024
SPLITS = ("calibration", "test")
_GENSIM_SLICE = (
    "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)
C4_DOCUMENTS = 4000
# what a damaged file raises
_DAMAGE = (OSError, EOFError, LookupError, RecursionError, TypeError, ValueError, zlib.error)
# of the corpora that may lie in ROTLIB_DATA
_FILES = {
    "wikitext2": {"calibration": "wiki.train.raw", "test": "wiki.test.raw"},
    "c4": {
        "calibration": "c4-train.00000-of-01024.json.gz",
        "test": "c4-validation.00000-of-00008.json.gz",
    },
}


def load_tokens(
    name: str, tokenizer: PreTrainedTokenizerBase, split: str = "calibration"
) -> Int[Tensor, " n"]:
    """One split of a corpus as a single stream of token ids.

    The text is tokenized once, with special tokens as the tokenizer adds them. The tail beyond a
    multiple of 1024 is dropped, so that `tokens.view(-1, 1024)` works; windows of that size lose
    nothing. Raises ValueError for an unknown corpus or split, or where the corpus is neither in
    `ROTLIB_DATA` nor in reach.

    >>> load_tokens("wikipedia-mini", tokenizer, split="test").view(-1, 1024).shape[1]
    1024
    """
    check_text(name, split)
    check_tokenizer(tokenizer)
    text = CORPORA[name](split)
    _check_text(name, split, text)
    try:
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    except Exception as error:  # whatever a tokenizer raises that doesn't know all letters
        reason = " ".join(str(error).split())
        raise ValueError(f"this tokenizer can't cut the text {name}: {reason}") from error
    return ids[: len(ids) // WHOLE * WHOLE] if len(ids) >= WHOLE else ids


def _check_text(name: str, split: str, text: str) -> None:
    """Raises ValueError for what is no text, or not the text that other machines read."""
    begin = text.lstrip()[:100].lower()
    faults = {
        "is empty": not text.strip(),
        "holds NUL characters": "\0" in text,
        "is a git-LFS pointer": begin.startswith("version https://git-lfs"),
        "is a web page": begin.startswith(("<!doctype html", "<html")),
        "has a byte order mark, or line ends of Windows": text[:1] == "\ufeff" or "\r\n" in text,
    }
    for fault, found in faults.items():
        if found:
            raise ValueError(f"the {split} split of {name} {fault}: check the files in ROTLIB_DATA")


def check_tokenizer(tokenizer: object) -> None:
    """Raises ValueError for what is no tokenizer of transformers."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"a tokenizer of transformers is needed, not a {type(tokenizer).__name__}: rl.load "
            "returns (model, tokenizer)"
        )


def check_text(name: str, split: str = "calibration") -> None:
    """Raises ValueError for an unknown corpus or split."""
    one_of("text", name, CORPORA)
    one_of("split", split, SPLITS)


def windows(
    tokens: Int[Tensor, " n"], length: int, count: int, seed: int | None = None
) -> Int[Tensor, "count length"]:
    """`count` disjoint windows of a stream: the first ones, or with a seed a random choice.

    Raises ValueError where the stream is too short.

    >>> windows(torch.arange(9), length=4, count=2)
    tensor([[0, 1, 2, 3],
            [4, 5, 6, 7]])
    """
    token_ids("tokens", tokens, 1)
    available = len(tokens) // whole_number("a window's length", length, 2)
    whole_number("the number of windows", count, 1)
    if not available:
        raise ValueError(
            f"this text has {len(tokens)} tokens, fewer than one window of {length}: "
            "use shorter windows or a longer text"
        )
    if count > available:
        raise ValueError(
            f"{count} windows of {length} tokens were asked for, but this text has {available}: "
            f"choose 1 to {available}"
        )
    cut = tokens[: available * length].view(available, length)
    if seed is None:
        return cut[:count]
    whole_number("seed", seed, 0)
    generator = torch.Generator().manual_seed(seed)
    return cut[torch.randperm(available, generator=generator, device="cpu")[:count]]


def text_content(name: str) -> str:
    """The sha256 of both splits of a corpus; raises like `load_tokens`.

    >>> text_content("wikipedia-mini").split()[0]
    'sha256'
    """
    check_text(name)
    states = [(path, _state(path)) for path in _files_of(name)]
    return _text_content(
        name, tuple((path, at.st_size, at.st_mtime_ns, at.st_ctime_ns) for path, at in states)
    )


def _files_of(name: str) -> list[Path]:
    """The files in ROTLIB_DATA that a corpus is read from, where it is."""
    if not _data():
        return []
    if name in _FILES:
        return [_local(name, file).resolve() for file in _FILES[name].values()]
    return [packed / f"{split}.txt" for split in SPLITS] if (packed := _packed()) else []


def _state(path: Path) -> os.stat_result:
    with _one_sentence(path):
        return path.stat()


@lru_cache
def _text_content(name: str, stamps: tuple) -> str:
    """It is computed again when the files' stamps change."""
    calibration, test = (sha256(CORPORA[name](split).encode()).digest() for split in SPLITS)
    if calibration == test:
        raise ValueError(f"both splits of {name} are one text: check the files in ROTLIB_DATA")
    return f"sha256 {sha256(calibration + test).hexdigest()}"


def fingerprint(tokens: Int[Tensor, "..."]) -> str:
    """sha256 of the token ids as little-endian 64-bit integers."""
    return sha256(tokens.cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def _wikipedia_mini(split: str) -> str:
    if packed := _packed():
        text = packed / f"{split}.txt"
        if not text.is_file():
            raise ValueError(
                f"ROTLIB_DATA is set, and there is no file {text.name} in {packed.name}"
            )
        with _one_sentence(text):
            return text.read_text(encoding="utf-8")
    return "\n\n".join(split_articles(_articles())[split])


def _packed() -> Path | None:
    """The folder of wikipedia-mini, on machines without gensim."""
    folder = _data()
    packed = folder and folder / "wikipedia-mini"
    return packed if packed and packed.is_dir() else None


def split_articles(articles: Sequence[str]) -> dict[str, list[str]]:
    """Every fourth article is test, the others are calibration."""
    return {
        "calibration": [article for i, article in enumerate(articles) if i % 4 != 3],
        "test": [article for i, article in enumerate(articles) if i % 4 == 3],
    }


@lru_cache
def _articles() -> tuple[str, ...]:
    """The slice's articles as prose: no redirects, no markup, no reference lists."""
    # slow to import, and only this corpus needs it
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    path = Path(find_spec("gensim").submodule_search_locations[0]) / _GENSIM_SLICE
    with bz2.open(path, "rt", encoding="utf-8") as dump:
        pages = [
            text
            for _, text, _ in extract_pages(dump, ("0",))
            if not re.match(r"\s*#redirect", text, re.IGNORECASE)
        ]
    cleaned = (prose(filter_wiki(page)) for page in pages)
    return tuple(article for article in cleaned if article)


def prose(text: str) -> str:
    """An article without headings' marks, bold, italics, and what stands from "See also" on."""
    tail = r"\n=+ *(?:See also|Notes|References|Further reading|External links|Bibliography) *=+"
    text = re.split(tail, text)[0]
    text = re.sub(r"'{2,}", "", text)  # bold and italics
    text = re.sub(r"^(=+) *(.*?) *\1$", r"\2", text, flags=re.MULTILINE)  # headings
    return re.sub(r"\s*\n\s*", "\n\n", text).strip()


def _wikitext2(split: str) -> str:
    file = _FILES["wikitext2"][split]
    if raw := _local("wikitext2", file):
        with _one_sentence(raw), raw.open(encoding="utf-8", newline="\n") as lines:
            rows = list(lines)  # str.splitlines would also split at form feeds and their like
        return "\n\n".join(line if line.strip() else "" for line in rows)
    part = "train" if split == "calibration" else "test"
    dataset = "Salesforce/wikitext", "wikitext-2-raw-v1"
    rows = _from_hub(f"wikitext2/{file}", *dataset, split=part)
    return "\n\n".join(row["text"] for row in rows)


def _c4(split: str) -> str:
    file = _FILES["c4"][split]
    if raw := _local("c4", file):
        with _one_sentence(raw), gzip.open(raw, "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in islice(lines, C4_DOCUMENTS)]
            return "\n\n".join(texts).encode().decode()  # half a surrogate pair is no text
    part = "train" if split == "calibration" else "validation"
    how = {"data_files": {part: f"en/{file}"}, "split": part, "streaming": True}
    rows = _from_hub(f"c4/{file}", "allenai/c4", **how)
    return "\n\n".join(row["text"] for row in islice(rows, C4_DOCUMENTS))


def _data() -> Path | None:
    """The folder that ROTLIB_DATA names; raises ValueError where there is none of that name."""
    if not os.environ.get("ROTLIB_DATA", "").strip():
        return None
    folder = folder_of("ROTLIB_DATA", "")
    if not folder.is_dir():
        raise ValueError(f"ROTLIB_DATA names {str(folder)!r}, which is no folder")
    return folder


def _local(corpus: str, file: str) -> Path | None:
    if (folder := _data()) is None:
        return None
    path = folder / corpus / file
    if not path.is_file():
        raise ValueError(f"ROTLIB_DATA is set, but there is no file {corpus}/{file} in it")
    return path


@contextmanager
def _one_sentence(raw: Path):
    """Turn whatever is wrong with a corpus's file into one sentence."""
    try:
        yield
    except _DAMAGE as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{raw} isn't the file that its name says: download it again ({reason})"
        ) from error


def _from_hub(file: str, dataset: str, *args, **kwargs):
    """A dataset, or one sentence that names the file to supply in its place."""
    if not on_hub(dataset, repo_type="dataset"):
        raise ValueError(
            f"the dataset {dataset} can't be reached: connect to the Hugging Face Hub, "
            f"put the file {file} into a folder named by ROTLIB_DATA, "
            "or use the text 'wikipedia-mini', which needs no network"
        )
    from datasets import load_dataset  # slow to import, and only needed here

    return load_dataset(dataset, *args, **kwargs)


CORPORA = {"wikipedia-mini": _wikipedia_mini, "wikitext2": _wikitext2, "c4": _c4}
