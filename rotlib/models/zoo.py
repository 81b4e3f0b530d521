"""Load a model and its tokenizer, on the device where it fits."""

import gc
import re
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from rotlib.checks import FLOATS
from rotlib.models.folder import check_files, check_tokenizer_files, config_of, safely
from rotlib.models.joined import open_joined
from rotlib.models.names import one_sentence, resolve, source_of

# a buffer that old checkpoints hold, and transformers computes
_RECOMPUTED = "rotary_emb.inv_freq"
# any of them is a tokenizer's
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
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
    if dtype not in FLOATS:
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
        check_files(Path(source))
    tokenizer = load_tokenizer(name)
    with one_sentence(name), bars_for_downloads_only(source):
        model, loading = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            config=config,
            **safely(source),
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
    folder = Path(source)
    if folder.is_dir() and not any((folder / file).is_file() for file in _TOKENIZERS):
        raise ValueError(
            f"the folder {name!r} holds no tokenizer ({', '.join(_TOKENIZERS)}): save the model's "
            "there, tokenizer.save_pretrained(folder)"
        )
    with one_sentence(name, "tokenizer"):
        check_tokenizer_files(folder)
        tokenizer = AutoTokenizer.from_pretrained(source, **safely(source))
    if not len(tokenizer):
        raise ValueError(f"the tokenizer of {name!r} has no tokens: download its files again")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and getattr(backend.model, "dropout", None):
        raise ValueError(
            f"the tokenizer of {name!r} leaves merges out at random: set its model's dropout to "
            "null in tokenizer.json"
        )
    return tokenizer


@contextmanager
def bars_for_downloads_only(source: str):
    """Hide the progress bar where a local folder is read, which takes a second."""
    hide = Path(source).is_dir() and logging.is_progress_bar_enabled()
    if hide:
        logging.disable_progress_bar()
    yield
    if hide:
        logging.enable_progress_bar()


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
