"""How much memory a recipe takes, from its model's config alone.

It is what `--dry-run` says, and what a run is refused by.

A run holds the model in float32, the reference's hidden states with a copy of its head, and one
stage's working set: OptRot's folded weights and drawn rows, the embedding in float64 while fusing,
a layer's inputs, Hessian and factors in GPTQ, a chunk of logits while evaluating. The largest sum
is the peak. A device with memory of its own need not hold the model: where it doesn't fit, the
model stays on the host and goes there a layer at a time.
"""

from functools import lru_cache
from typing import NamedTuple

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rotlib.learning.sampling import BATCH, STEPS_A_DRAW
from rotlib.measure.fidelity import CHUNK
from rotlib.models.content import model_content
from rotlib.models.families import Family, adapt
from rotlib.models.walk import BATCH_TOKENS
from rotlib.models.zoo import free_memory, one_sentence, resolve
from rotlib.study.files import PINNED
from rotlib.study.recipe import LEARNED, THROUGH_NETWORK, Recipe

GB = 1e9
_FLOAT, _DOUBLE = 4, 8
_PROCESS = 0.72 * GB  # Python, torch, transformers and a text before any model
SURE = 0.8  # of an estimate: what it may be too high by is no reason to refuse
# how many copies of its largest operand a stage holds at its peak, counted in the code and checked
# against measured peaks
_ROWS, _LOGITS, _WIDE, _HESSIANS, _WEIGHTS = 2, 6, 3, 7, 6


class Memory(NamedTuple):
    """Peaks in bytes, of a process and of a device.

    `host` is of a process on the CPU, `beside` of one that computes on a device. A device holds the
    `weights` with what is `working` on them, or is `streamed` a layer at a time.
    """

    host: float
    beside: float
    weights: float
    working: float
    streamed: float

    @property
    def device(self) -> float:
        """Of a device that holds the whole model."""
        return self.weights + self.working


def outline(model: str) -> tuple[Family, torch.dtype]:
    """(the model without its weights, the dtype of its checkpoint); raises like `load`."""
    return _outline(model, None if model in PINNED else model_content(model))


@lru_cache
def _outline(model: str, content: str | None) -> tuple[Family, torch.dtype]:
    source = resolve(model)  # not on "meta": it may be unpacked first
    with one_sentence(model), torch.device("meta"):
        safely = {"trust_remote_code": False}
        config = AutoConfig.from_pretrained(source, **safely)
        dtype = config.dtype or torch.float32
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **safely).eval()
    if online := getattr(config, "rotlib_online", None):  # `load` would apply them
        empty.rotlib_online = online
    return adapt(empty), dtype


def estimate(recipe: Recipe) -> Memory:
    """The peaks of a recipe, untied head included.

    Raises like `load` for a model that isn't to be had.
    """
    family, dtype = outline(recipe.model)
    layers, d = len(family.layers), family.width
    sizes = {name: linear.weight.numel() for name, linear in family.linears(0).items()}
    wide = family.linears(0)["down"].in_features
    head = family.lm_head.weight.numel()
    linears = layers * sum(sizes.values())
    weights = _FLOAT * (linears + 2 * head)
    reference = _FLOAT * (recipe.test_windows * recipe.window * d + head)

    def layer_run(tokens: int) -> float:
        return _FLOAT * tokens * (3 * d + _WIDE * wide)

    logits = _FLOAT * _LOGITS * min(CHUNK, recipe.window) * head / d
    stages = {"evaluate": layer_run(recipe.window) + logits}
    codes = linears if recipe.rounding != "none" else 0
    host = {
        "evaluate": 2 * _FLOAT * recipe.test_windows * recipe.window * d + codes,
        "load": (linears + head) * _on_disk(dtype),
    }
    if recipe.rotation != "none":
        stages["fuse"] = _DOUBLE * 3 * head
    if recipe.rotation in THROUGH_NETWORK:
        # a copy and its gradients; what the layers keep for going back comes on top
        stages["rotate"] = _FLOAT * 2 * linears
    elif recipe.rotation in LEARNED:
        rows = min(STEPS_A_DRAW * BATCH, STEPS_A_DRAW * linears // d) * d
        heads = layers * (sizes["o"] + sizes["v"])
        stages["rotate"] = _FLOAT * (_ROWS * rows + 4 * heads)
        folded = sum(sizes[name] for name in ("q", "k", "v", "gate", "up"))
        host["rotate"] = _FLOAT * layers * folded
    if recipe.rounding == "gptq":
        tokens = recipe.calibration_windows * recipe.window
        solve = max(
            _HESSIANS * wide**2 + _WEIGHTS * sizes["down"],
            _HESSIANS * d**2 + _WEIGHTS * (sizes["gate"] + sizes["up"]),
        )
        stages["quantize"] = layer_run(min(tokens, BATCH_TOKENS)) + _FLOAT * solve
        host["quantize"] = _FLOAT * 2 * tokens * d + codes
    held = _PROCESS + weights + reference
    return Memory(
        host=held + max(stages.get(stage, 0) + host.get(stage, 0) for stage in stages | host),
        beside=held + max(host.values()),
        weights=weights + reference,
        working=max(stages.values()),
        streamed=max(_FLOAT * sum(sizes.values()), _FLOAT * 2 * head) + max(stages.values()),
    )


def least_on_disk(recipe: Recipe, dtype: torch.dtype) -> int:
    """Bytes that a checkpoint of the recipe takes at least, in whatever format."""
    family, _ = outline(recipe.model)
    linears = sum(linear.weight.numel() for linear in family.linears(0).values())
    bits = 8 * dtype.itemsize if recipe.rounding == "none" else recipe.bits
    ends = 2 * family.lm_head.weight.numel() * min(2, dtype.itemsize)
    return len(family.layers) * linears * bits // 8 + ends


def _on_disk(dtype: torch.dtype) -> int:
    """Bytes a weight in the checkpoint, whose pages are resident until its weights are float32.

    Those of float32 are the weights.
    """
    return 0 if dtype == torch.float32 else dtype.itemsize


def check_fits(recipe: Recipe, device: torch.device) -> None:
    """Raises ValueError where this machine or the device surely has less than a recipe needs.

    The error names what it needs.
    """
    needed = estimate(recipe)
    # an earlier model makes room
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    _check(recipe, needed.host if device.type == "cpu" else needed.beside, free, "of memory")
    if device.type == "cuda":
        whole = recipe.rotation in THROUGH_NETWORK
        least = needed.device if whole else min(needed.streamed, needed.device)
        _check(recipe, least, free_memory(device), f"on {device}")


def _check(recipe: Recipe, needed: float, free: float, where: str) -> None:
    if SURE * needed > free:
        raise ValueError(
            f"{recipe.model} needs about {needed / GB:.1f} GB {where} for this recipe, "
            f"and {free / GB:.1f} GB are free: take a bigger machine, a smaller model, "
            "or fewer and shorter windows"
        )
