"""Write a finished model as a folder that stock software runs, with nothing of ours installed.

"compressed-tensors" packs the codes of GPTQ or RTN into what transformers and vLLM read, "gguf"
into what llama.cpp reads, both exactly; "fused" is the rotated, unquantized model as a plain
Hugging Face folder, for any other quantizer. R1 and R2 are in the weights by then, and cost
nothing. The folder is written beside its place under another name, read back and compared with the
model in memory, and only then renamed: what stands there is complete.
"""

import os
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotlib.checkpoints.gguf_file import NAME, GgufFile
from rotlib.checkpoints.packed import Checkpoint
from rotlib.checks import one_of, yes_or_no
from rotlib.models.families import adapt, check_finite, check_not_rounding, is_quantized

FORMATS = ("compressed-tensors", "gguf", "fused")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.no_grad()
def export(
    model: PreTrainedModel,
    folder: str | Path,
    format: str = "compressed-tensors",
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: str = "",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the model, its tokenizer and its card (README.md) to a folder; returns the folder.

    `dtype` is of all that isn't packed, scales included (None: the model's own; GGUF has its own
    types). Raises ValueError before writing anything for a folder that isn't empty (unless
    `overwrite`), too little room on the disk, a model that needs online rotations, or one that the
    format can't hold; RuntimeError, leaving nothing behind, where what was written reads back as
    something else.

    >>> from rotlib.quantization.grids import WeightQuant, rtn
    >>> weights = rtn(model, WeightQuant(bits=4))
    >>> sorted(file.name for file in export(model, folder / "W4").iterdir())
    ['README.md', 'config.json', 'generation_config.json', 'model.safetensors']
    """
    one_of("format", format, FORMATS)
    yes_or_no("overwrite", overwrite)
    adapt(model)
    check_not_rounding(model)
    if online := getattr(model.config, "rotlib_online", None):
        raise ValueError(
            f"this model needs {' and '.join(online)} while it runs, "
            "which no plain checkpoint has: rotate it without them"
        )
    if format == "gguf" and dtype is not None:
        raise ValueError("GGUF has its own types: leave dtype out")
    if format == "fused" and is_quantized(model):
        raise ValueError(
            "this model is quantized already: 'fused' writes the rotated model before that, "
            "for another quantizer"
        )
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(
            f"dtype must be one of {', '.join(map(str, DTYPES))}, or None for the model's own, "
            f"not {dtype!r}"
        )
    check_finite(model)
    folder = checked_folder(folder, overwrite)
    if format == "gguf":
        content = GgufFile(model, tokenizer)
    else:
        content = Checkpoint(model, tokenizer, dtype or model.dtype, packed=format != "fused")
    _check_room(folder, content.size)
    beside = f".{folder.name}.{os.getpid()}"
    scratch, old = (folder.with_name(f"{beside}.{what}") for what in ("partial", "old"))
    scratch.mkdir()
    try:
        content.write(scratch)
        (scratch / "README.md").write_text(card, encoding="utf-8")
        if name := content.differing(scratch):
            raise RuntimeError(
                f"{name} doesn't read back as it is in memory, so nothing was kept: "
                "is the disk sound?"
            )
        if overwrite and folder.exists():
            os.rename(folder, old)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def checked_folder(folder: str | Path, overwrite: bool) -> Path:
    """The folder's full path, known to be free, or to hold a checkpoint that may be replaced."""
    folder = Path(folder).resolve()
    if folder.exists():
        if not folder.is_dir() or (any(folder.iterdir()) and not overwrite):
            raise ValueError(
                f"{folder} isn't an empty folder: name another one, or pass overwrite=True to "
                "replace a checkpoint"
            )
        checkpoint = any((folder / name).exists() for name in ("config.json", NAME))
        if any(folder.iterdir()) and not checkpoint:
            raise ValueError(
                f"{folder} holds something else than a checkpoint, which is all that "
                "overwrite=True replaces: name another folder"
            )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder.parent} can't be made a folder: {error.strerror}") from error
    if not os.access(folder.parent, os.W_OK):
        raise ValueError(f"{folder.parent} can't be written to: name another folder")
    return folder


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise ValueError(
            f"the checkpoint takes {needed / 2**20:.0f} MiB and {folder.parent} has "
            f"{free / 2**20:.0f} MiB left: make room there"
        )
