"""A model's own files: its config and its weights', checked before transformers reads them."""

import json
from collections.abc import Iterator
from math import isfinite
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from rotlib.models.names import hub_commit

# whatever a config asks for: other implementations may be code of the Hub, or compile first
_ATTENTION = "sdpa"
# whichever of a tokenizer's files are JSON
_OF_TOKENIZERS = (
    *("tokenizer.json", "vocab.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
# of a config, what can't be zero
_COUNTS = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"),
}


def config_of(source: str) -> PreTrainedConfig:
    """A model's config, under which torch's own attention runs."""
    if (file := Path(source) / "config.json").is_file():
        told = _settings(file)
        for name in _COUNTS & told.keys():
            count = told[name]
            if count is not None and (type(count) is not int or count < 1):
                raise ValueError(f"its config.json says {name} {count!r}, no number above 0")
        _check_kinds(told)
    if (file := Path(source) / "generation_config.json").is_file():
        _settings(file)
    config = AutoConfig.from_pretrained(source, **safely(source))
    config._attn_implementation = _ATTENTION
    config.return_dict = True
    return config


def check_tokenizer_files(folder: Path) -> None:
    """Raises ValueError for files of a tokenizer that transformers would fall over."""
    told = {name: _settings(folder / name) for name in _OF_TOKENIZERS if (folder / name).is_file()}
    settings = told.get("tokenizer_config.json", {})
    longest, kind = settings.get("model_max_length"), settings.get("tokenizer_class", "")
    if longest is not None and (isinstance(longest, bool | str) or not longest > 0):
        raise ValueError(
            f"its tokenizer_config.json says model_max_length {longest!r}, no number above 0"
        )
    if not isinstance(kind, str | None):
        raise ValueError(f"its tokenizer_config.json says tokenizer_class {kind!r}, no word")


def _settings(file: Path) -> dict:
    told, reason = None, ""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        reason = f" ({error})"
    if not isinstance(told, dict):
        raise ValueError(f"its {file.name} is not a valid JSON file of settings by name{reason}")
    return told


def _check_kinds(told: dict) -> None:
    """Raises ValueError for settings that transformers would fall over without naming them."""
    if not isinstance(told.get("model_type"), str | None):
        raise ValueError(f"its config.json says model_type {told['model_type']!r}, no word")
    for name in ("is_encoder_decoder", "add_cross_attention"):
        if told.get(name):
            raise ValueError(
                f"its config.json says {name} {told[name]!r}, and only decoders alone are read here"
            )
    pad, size = told.get("pad_token_id"), told.get("vocab_size")
    if isinstance(pad, int) and isinstance(size, int) and not -size <= pad < size:
        raise ValueError(
            f"its config.json says pad_token_id {pad}, beyond its vocab_size of {size}"
        )
    for name in ("dtype", "torch_dtype"):
        dtype = told.get(name) or "float32"
        if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"its config.json says {name} {dtype!r}, no dtype of torch")
    for name, value in _inside(told):
        if isinstance(value, float) and not isfinite(value):
            raise ValueError(f"its config.json says {name} {value!r}, no finite number")
    turns = {of: told.get(of) for of in ("rope_parameters", "rope_scaling", "rope_theta")}
    for name, value in _inside(turns):
        if isinstance(value, str) and name not in ("rope_type", "type"):
            raise ValueError(f"its config.json says {name} {value!r}, no number")
        if name in ("rope_theta", "factor") and isinstance(value, int | float) and not value > 0:
            raise ValueError(f"its config.json says {name} {value!r}, no number above 0")


def _inside(settings: dict) -> Iterator[tuple[str, object]]:
    """(name, value) of settings that may be apart for each type of layer."""
    for name, value in settings.items():
        yield from _inside(value) if isinstance(value, dict) else [(name, value)]


def check_files(folder: Path) -> None:
    """Raises ValueError for weights that are whole numbers, or that stand in two files.

    So it does where an index names files elsewhere, or other files than safetensors.
    """
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            "an adapter lies beside its weights (adapter_config.json), and isn't read with them: "
            "merge it into them (peft's merge_and_unload), or take it away"
        )
    for index in folder.glob("*.safetensors.index.json") if folder.is_dir() else ():
        told = _settings(index)
        if not isinstance(told.get("weight_map"), dict):
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
        if file.exists() and not file.is_file():
            raise ValueError(f"its {file.name} is no file: take it away")
        for key, dtype in _types_in(file).items():
            if owner.setdefault(key, file.name) != file.name:
                raise ValueError(f"its weight {key} is in {owner[key]} and in {file.name}")
            if dtype[0] not in "FB" or dtype == "BOOL":
                raise ValueError(
                    f"its weight {key} is of the type {dtype}, not of floating-point numbers"
                )


def _types_in(file: Path) -> dict[str, str]:
    """The type of every tensor in a file of weights."""
    try:
        with safe_open(file, "pt") as weights:
            names = weights.keys()
            return {name: weights.get_slice(name).get_dtype() for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"its {file.name} is damaged, or only a pointer to weights: download it again, or take "
            f"it away where it isn't the model's ({error})"
        ) from error


def safely(source: str) -> dict:
    """How transformers is asked for a model: none of its code is run, and one commit is read."""
    pinned = {} if Path(source).is_dir() else {"revision": hub_commit(source)}
    return {"trust_remote_code": False, **pinned}
