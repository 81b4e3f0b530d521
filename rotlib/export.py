"""Write a finished model as a folder that stock software runs, with nothing of ours installed.

"compressed-tensors" packs the codes of GPTQ or RTN into what transformers and vLLM read, "gguf" into what llama.cpp reads, both exactly;
"fused" is the rotated, unquantized model as a plain Hugging Face folder, for any other quantizer. R1 and R2 are in the weights by then,
and cost nothing. The folder is written beside its place under another name, read back and compared with the model in memory, and only
then renamed: what stands there is complete.
"""

import os
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotlib.card import model_card
from rotlib.checkpoint import Checkpoint
from rotlib.checks import one_of, yes_or_no
from rotlib.families import adapt, check_finite
from rotlib.fuse import check_not_rounding, is_quantized
from rotlib.gguf_file import NAME, GgufFile, check_holds, cut_of
from rotlib.pipeline import build, run
from rotlib.recipe import Recipe
from rotlib.zoo import load_tokenizer

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

    `dtype` is of all that isn't packed, scales included (None: the model's own; GGUF has its own types). Raises ValueError before
    writing anything for a folder that isn't empty (unless `overwrite`), too little room on the disk, a model that needs online
    rotations, or one that the format can't hold; RuntimeError, leaving nothing behind, where what was written reads back as something else.
    """
    one_of("format", format, FORMATS)
    yes_or_no("overwrite", overwrite)
    adapt(model)
    check_not_rounding(model)
    if online := getattr(model.config, "rotlib_online", None):
        raise ValueError(f"this model needs {' and '.join(online)} while it runs, which no plain checkpoint has: rotate it without them")
    if format == "gguf" and dtype is not None:
        raise ValueError("GGUF has its own types: leave dtype out")
    if format == "fused" and is_quantized(model):
        raise ValueError("this model is quantized already: 'fused' writes the rotated model before that, for another quantizer")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, or None for the model's own, not {dtype!r}")
    check_finite(model)
    folder = _checked(folder, overwrite)
    content = GgufFile(model, tokenizer) if format == "gguf" else Checkpoint(model, tokenizer, dtype or model.dtype, format != "fused")
    _check_room(folder, content.size)
    scratch, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{what}") for what in ("partial", "old"))
    scratch.mkdir()
    try:
        content.write(scratch)
        (scratch / "README.md").write_text(card, encoding="utf-8")
        if name := content.differing(scratch):
            raise RuntimeError(f"{name} doesn't read back as it is in memory, so nothing was kept: is the disk sound?")
        if overwrite and folder.exists():
            os.rename(folder, old)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def export_recipe(
    recipe: Recipe,
    folder: str | Path,
    format: str = "compressed-tensors",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    device: str = "auto",
) -> Path:
    """Run a recipe and export its model with its tokenizer and a card that says what it is and what was measured.

    Kept rotations, weights and results are used again. Raises like `run` and `export`, before the run where the recipe can't be exported.
    """
    one_of("format", format, FORMATS)
    folder = _checked(folder, overwrite)
    if recipe.online:
        raise ValueError(f"a plain checkpoint has no {' and '.join(recipe.online)}: leave the online rotations out of the recipe")
    if format == "gguf":
        check_holds(recipe.quant)
        cut_of(load_tokenizer(recipe.model))
    if (format == "fused") != (recipe.rounding == "none"):
        raise ValueError("'fused' goes with the rounding 'none', the packed formats with 'rtn' and 'gptq'")
    result = run(recipe, device)
    model, tokenizer = build(recipe, device)
    return export(model, folder, format, tokenizer, model_card(recipe, result, format), dtype, overwrite)


def _checked(folder: str | Path, overwrite: bool) -> Path:
    """The folder's full path, known to be free, or to hold a checkpoint that may be replaced, where something can be written."""
    folder = Path(folder).resolve()
    if folder.exists():
        if not folder.is_dir() or (any(folder.iterdir()) and not overwrite):
            raise ValueError(f"{folder} isn't an empty folder: name another one, or pass overwrite=True to replace a checkpoint")
        if any(folder.iterdir()) and not any((folder / name).exists() for name in ("config.json", NAME)):
            raise ValueError(
                f"{folder} holds something else than a checkpoint, which is all that overwrite=True replaces: name another folder"
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
            f"the checkpoint takes {needed / 2**20:.0f} MiB and {folder.parent} has {free / 2**20:.0f} MiB left: make room there"
        )
