"""Write a finished model as a folder that stock software runs, with nothing of ours installed.

"compressed-tensors" packs the codes of GPTQ or RTN into what transformers and vLLM read, "gguf"
into what llama.cpp reads, both exactly; "fused" is the rotated, unquantized model as a plain
Hugging Face folder, for any other quantizer. R1 and R2 are in the weights by then, and cost
nothing. The folder is written beside its place under another name, read back and compared with the
model in memory, and only then renamed: what stands there is complete.
"""

import warnings
from contextlib import redirect_stderr
from copy import deepcopy
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import psutil
import torch
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rotlib.checkpoints.folder import (
    check_room,
    checked_folder,
    entries_of,
    put_in_place,
    write_marker,
)
from rotlib.checkpoints.gguf_file import NAME, GgufFile
from rotlib.checkpoints.packed import Checkpoint, check_inputs
from rotlib.checks import one_of, yes_or_no
from rotlib.disk import scratch_beside
from rotlib.models.configured import check_as_configured
from rotlib.models.marks import is_quantized
from rotlib.models.sound import check_not_rounding, check_sound
from rotlib.models.supported import adapt
from rotlib.models.walk import final_hidden
from rotlib.models.zoo import bars_for_downloads_only
from rotlib.precision import float32_everywhere
from rotlib.quantization.activations import ActivationQuant, quantized_activations

FORMATS = ("compressed-tensors", "gguf", "fused")
CARD = "README.md"
# what transformers doesn't learn from a GGUF file; llama.cpp reads it off the tensors
_UNTOLD = ("attention_bias", "mlp_bias", "rope_parameters")
# how far logits read from a checkpoint may be off, by its dtype or the model's
_OFF = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.06}
_GGUF = 0.01
_NOISE = 2  # times what the model in memory is off in the checkpoint's dtype
_TEXT = (
    "The first maps of the coast were drawn by sailors who had never seen it whole. They measured "
    "what they could from the deck, guessed the rest, and wrote down the depth of the water where "
    "a ship had run aground. Later surveyors walked along the shore with chains and a compass. In "
    "1795 a small office in London began to collect these sheets, to compare them, and to print "
    "new ones; within thirty years it had published nearly two thousand charts. Some of the "
    "numbers are still in use, although the sand has moved since then."
)
# what transformers raises, and a full disk
_UNWRITTEN = (OSError, OverflowError, RuntimeError, SafetensorError, TypeError, ValueError)
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
    activations: ActivationQuant | None = None,
) -> Path:
    """Write the model, its tokenizer and its card (README.md) to a folder; returns the folder.

    What was written is compared with the model in memory, tensor by tensor and by its logits,
    before it gets its name. `overwrite` replaces an earlier export, and nothing else. `dtype` is of
    all that isn't packed, scales included (None: the model's own; bfloat16 beside 4-bit floats,
    which compressed-tensors reads as that; GGUF has its own types). `activations` is what whoever
    runs it shall round (None: nothing), `ActivationQuant(bits=8, protocol="compressed-tensors")`;
    codes then take a byte each. Raises ValueError before writing anything for a folder that isn't
    empty (unless `overwrite`), too little room on the disk, a model that needs online rotations, or
    one that the format can't hold; RuntimeError, leaving nothing behind, where what was written
    reads back as something else.

    >>> from rotlib.quantization.grids import WeightQuant
    >>> from rotlib.quantization.quantized import rtn
    >>> weights = rtn(model, WeightQuant(bits=4))
    >>> sorted(file.suffix for file in export(model, folder / "W4").iterdir())
    ['.json', '.json', '.json', '.md', '.safetensors']
    """
    one_of("format", format, FORMATS)
    yes_or_no("overwrite", overwrite)
    family = adapt(model)
    check_not_rounding(model)
    if online := getattr(model.config, "rotlib_online", None):
        raise ValueError(
            f"this model needs {' and '.join(online)} while it runs, "
            "which no plain checkpoint has: rotate it without them"
        )
    check_dtype(format, dtype)
    inputs = check_inputs(format, activations)
    if not isinstance(card, str) or card.encode(errors="ignore").decode() != card:
        raise ValueError(f"the card is a text that UTF-8 holds, not {str(card)[:50]!r}")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"the tokenizer must be of transformers, not a {type(tokenizer).__name__}")
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.config)
    if family.experts and (dtype or model.dtype) == torch.float64 and format != "gguf":
        raise ValueError("transformers runs no experts in float64: pass dtype=torch.float32")
    if format == "fused" and is_quantized(model):
        raise ValueError(
            "this model is quantized already: 'fused' writes the rotated model before that, "
            "for another quantizer"
        )
    check_sound(model)
    check_as_configured(model)
    try:
        model.config.to_json_string()
    except (TypeError, ValueError) as error:
        raise ValueError(f"the model's config can't be written as JSON: {error}") from error
    if model.generation_config is not None:
        try:
            model.generation_config.validate(strict=True)
        except ValueError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"the model's generation_config contradicts itself: {reason}"
            ) from error
    folder = checked_folder(folder, overwrite, source=model.config.name_or_path)
    if format == "gguf":
        content = GgufFile(model, tokenizer)
    else:
        content = Checkpoint(model, tokenizer, dtype, format != "fused", inputs)
    check_room(folder, content.size)
    with scratch_beside(folder, folder=True) as scratch:
        try:
            content.write(scratch)
        except _UNWRITTEN as error:
            reason = " ".join(str(error).split())[:300]
            raise RuntimeError(
                f"the checkpoint can't be written, so nothing was kept: {reason}"
            ) from error
        (scratch / CARD).write_text(card or _short_card(model, format), encoding="utf-8")
        if name := content.differing(scratch):
            raise RuntimeError(
                f"{name} doesn't read back as it is in memory, so nothing was kept: its numbers "
                f"are beyond what {format} holds, or the disk isn't sound"
            )
        dtype = model.dtype if format == "gguf" else content.dtype
        tokens, activations = _some_tokens(model, tokenizer), activations or ActivationQuant()
        _check_logits(model, scratch, format, dtype, tokens, activations)
        usual = (scratch / CARD).stat().st_mode  # safetensors lets nobody else read its files
        for name in entries_of(scratch):
            (scratch / name).chmod(usual)
        write_marker(scratch, format)
        put_in_place(scratch, folder)
    return folder


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Raises ValueError for a tokenizer with other tokens than the model, or none."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"this tokenizer has {len(tokenizer)} tokens and the model "
            f"{config.vocab_size}: it belongs to another model"
        )
    largest = max(tokenizer.get_vocab().values(), default=None)
    if largest is None or largest >= config.vocab_size:
        found = "no tokens" if largest is None else f"a token {largest}"
        raise ValueError(
            f"this tokenizer has {found}, and the model those from 0 to {config.vocab_size - 1}: "
            "it belongs to another model"
        )


def check_dtype(format: str, dtype: torch.dtype | None) -> None:
    """Raises ValueError for a dtype that a checkpoint of this format can't have."""
    if format == "gguf" and dtype is not None:
        raise ValueError("GGUF has its own types: leave dtype out")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(
            f"dtype must be one of {', '.join(map(str, DTYPES))}, or None for the model's own, "
            f"not {dtype!r}"
        )


def _some_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Int[Tensor, "2 length"]:
    """Two windows of text, or of made-up tokens where there is no tokenizer.

    A model's numbers are steady on text: made-up tokens make some so large that 16 bits move
    logits by half.
    """
    length = max(2, min(256, model.config.max_position_embeddings))
    if tokenizer is None:
        return (torch.arange(2 * length) * 7919 % model.config.vocab_size).view(2, length)
    try:
        ids = tokenizer(_TEXT, return_tensors="pt", verbose=False).input_ids[0]
    except Exception:  # whatever a tokenizer raises that doesn't know all letters
        ids = torch.tensor([])
    if len(ids.unique()) < 2:
        return _some_tokens(model, None)
    return ids.repeat(2 * length // len(ids) + 1)[: 2 * length].view(2, length)


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids.to(model.device)).logits[:, :-1].cpu().double()


def _check_logits(
    model: PreTrainedModel,
    folder: Path,
    format: str,
    dtype: torch.dtype,
    ids: Tensor,
    activations: ActivationQuant,
) -> None:
    """Raises RuntimeError where transformers computes something else from the folder.

    To what the numbers' width explains, as this model itself shows it in so many bits. Where there
    is no memory for a second model, that is said and the tensors' comparison stands alone.
    """
    family = adapt(model)
    size = 4 * model.num_parameters()
    if psutil.virtual_memory().available < 1.3 * size:
        what = f"no memory for a second model ({size / 1e9:.1f} GB): its logits aren't compared"
        warnings.warn(what, stacklevel=3)
        return
    how = {"trust_remote_code": False}
    if format == "gguf":
        # the whole path: transformers would take a file of this name in the working directory
        how |= {"gguf_file": str(folder / NAME), "dtype": torch.float32}
        how |= {key: value for key in _UNTOLD if (value := getattr(model.config, key, None))}
    else:
        how |= {"dtype": dtype, "use_safetensors": True}
    gguf_bar = patch("transformers.modeling_gguf_pytorch_utils.tqdm", lambda them, **_: them)
    with gguf_bar, bars_for_downloads_only(str(folder)), redirect_stderr(StringIO()):
        read, keys = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    if unread := sorted(keys["unexpected_keys"]):
        raise RuntimeError(
            f"transformers reads no {unread[0]} from the folder, so nothing was kept: the config "
            "doesn't announce it"
        )
    with quantized_activations(model, activations):
        if hasattr(model, "rotlib_device"):  # it goes to its device a layer at a time
            with float32_everywhere(), family.on_device(family.lm_head):
                hidden = final_hidden(family, ids)
                wanted = torch.stack([family.lm_head(x.to(family.device)).cpu() for x in hidden])
                wanted = wanted.double()
        else:
            wanted = _logits(model, ids)
    spread = wanted - wanted.mean(-1, keepdim=True)
    if not (spread.norm() > 0 and torch.isfinite(spread).all()):
        raise RuntimeError(
            "this model's logits are all alike, or no numbers, so nothing was kept: its config is "
            "of another model, or its states are beyond float16 (load it in float32)"
        )

    def off(other: PreTrainedModel) -> float:
        apart = _logits(other.eval(), ids) - wanted
        if family.experts:  # rounding gives some tokens to other experts: most of them tell
            return (apart.norm(dim=-1).median() / spread.square().sum(-1).mean().sqrt()).item()
        return (apart.norm() / spread.norm()).item()

    error = off(read)
    del read
    allowed = max(_GGUF if format == "gguf" else _OFF[dtype], _OFF[model.dtype])
    if error > allowed and dtype.itemsize < model.dtype.itemsize:
        narrower = deepcopy(model).to(dtype)
        with quantized_activations(narrower, activations):
            allowed = max(allowed, _NOISE * off(narrower))
    if not error < allowed:
        raise RuntimeError(
            "transformers computes other logits from the folder than the model has "
            f"({100 * error:.2g} % off), so nothing was kept: a hook, a module of your own or a "
            "changed config takes part in it"
        )


def _short_card(model: PreTrainedModel, format: str) -> str:
    name = Path(str(model.config.name_or_path or "")).name or model.config.model_type
    return (
        f"# {name}, {format}\n\nMade by rotlib {version('rotlib')} with `rl.export`. "
        "Nothing was measured: `rl.export_recipe` writes a card with perplexity and divergence.\n"
    )
