"""How much memory a recipe takes, and its checkpoint on disk, from its model's config alone.

It is what `--dry-run` says, and what a run is refused by. A run holds the model in float32, and the
reference's hidden states with a copy of its head; each stage adds what it works on, and what it
keeps beside the weights. The largest sum is the peak. A device with memory of its own need not hold
the model: where it doesn't fit, the model stays on the host and goes there a layer at a time.

`python -m rotlib.study.gpu --phases stages` measures every stage's peak and prints the estimate
beside it; `results/gpu/` has what it said.
"""

from functools import lru_cache
from typing import NamedTuple

import psutil
import torch
from transformers import AutoModelForCausalLM

from rotlib.learning.network import windows_at_once
from rotlib.learning.objectives import TOKENS
from rotlib.learning.ostquant import OSTQUANT_PRESETS
from rotlib.learning.sampling import BATCH, STEPS_A_DRAW
from rotlib.learning.spinquant import SPINQUANT_PRESETS
from rotlib.learning.tuning import HELD_OUT
from rotlib.measure.fidelity import CHUNK
from rotlib.models.content import model_content
from rotlib.models.families import Family, kind_of
from rotlib.models.folder import config_of
from rotlib.models.joined import open_joined
from rotlib.models.names import one_sentence, resolve
from rotlib.models.supported import adapt
from rotlib.models.walk import BATCH_TOKENS
from rotlib.models.zoo import free_memory
from rotlib.quantization.fp4 import FP4
from rotlib.study.files import PINNED
from rotlib.study.recipe import LEARNED, THROUGH_NETWORK, Recipe

GB = 1e9
_FLOAT, _DOUBLE = 4, 8
_PROCESS = 0.72 * GB  # Python, torch, transformers and a text before any model
SURE = 0.8  # of an estimate: what it may be too high by is no reason to refuse
# how many copies of its largest operand a stage holds at its peak, counted in the code and checked
# against measured peaks
_ROWS, _HEADS, _WIDE, _HESSIANS, _WEIGHTS = 2, 3, 3, 7, 6
_TUNED = 10, 5  # widths and inner widths that a layer keeps of a token for going back
_REFIT = 32  # bytes of an entry of refit's systems
_LOGITS = {"evaluate": 6, "spinquant": 3, "ostquant": 5}


class Stage(NamedTuple):
    """Bytes that a stage holds at its peak, besides the model and the reference."""

    working: float = 0.0  # where the model computes
    gpu: float = 0.0  # there too, on a GPU: more windows at a time
    beside: float = 0.0  # where the weights are
    host: float = 0.0  # on the host, wherever the model is


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
        config = config_of(source)
        dtype = config.dtype or torch.float32
        how = {"dtype": torch.float32, "trust_remote_code": False}
        empty = open_joined(AutoModelForCausalLM.from_config(config, **how).eval())
    if online := getattr(config, "rotlib_online", None):  # `load` would apply them
        empty.rotlib_online = online
    return adapt(empty), dtype


def estimate(recipe: Recipe) -> Memory:
    """The peaks of a recipe, untied head included.

    Raises like `load` for a model that isn't to be had.
    """
    found = stages(recipe).values()
    held = held_throughout(recipe)
    return Memory(
        host=_PROCESS + held + max(one.working + one.beside + one.host for one in found),
        beside=_PROCESS + held + max(one.beside + one.host for one in found),
        weights=held,
        working=max(one.working + one.gpu + one.beside for one in found),
        streamed=_sent_at_a_time(recipe) + max(one.working + one.gpu for one in found),
    )


def peak_of(recipe: Recipe, stage: str, device: torch.device, streamed: bool = False) -> float:
    """The peak of one stage: of the process, or of a device that holds the model or is streamed it.

    Hidden states lie on the device where there is room, so a streamed peak counts them as well.
    """
    one, held = stages(recipe)[stage], held_throughout(recipe)
    if device.type == "cpu":
        return _PROCESS + held + one.working + one.beside + one.host
    if streamed:
        beside = 0 if stage == "rotate" else one.beside  # the weights' copies are on the host
        return _sent_at_a_time(recipe) + one.working + one.gpu + beside
    return held + one.working + one.gpu + one.beside


def held_throughout(recipe: Recipe) -> float:
    """The model, and the reference with its head."""
    family, _ = outline(recipe.model)
    head = family.lm_head.weight.numel()
    hidden = recipe.test_windows * recipe.window * family.width
    return _FLOAT * (len(family.layers) * _of_a_layer(family) + 3 * head + hidden)


def _of_a_layer(family: Family) -> int:
    """Weights of one layer."""
    return sum(linear.weight.numel() for linear in family.linears(0).values())


def _sent_at_a_time(recipe: Recipe) -> float:
    """A layer, or the heads of the model and of the reference."""
    family, _ = outline(recipe.model)
    return _FLOAT * max(_of_a_layer(family), 2 * family.lm_head.weight.numel())


def stages(recipe: Recipe) -> dict[str, Stage]:
    """What each stage of a recipe holds; raises like `estimate`."""
    family, dtype = outline(recipe.model)
    layers, d = len(family.layers), family.width
    # an expert is like the others
    sizes = {kind_of(name): linear.weight.numel() for name, linear in family.linears(0).items()}
    wide = family.inner_width
    head = family.lm_head.weight.numel()
    linears = layers * _of_a_layer(family)
    codes = linears if recipe.rounding != "none" else 0

    def states(windows: int) -> float:
        return _FLOAT * windows * recipe.window * d

    def layer_run(tokens: int) -> float:
        return _FLOAT * tokens * (3 * d + _WIDE * wide)

    def logits(tokens: int, of: str) -> float:
        return _FLOAT * _LOGITS[of] * tokens * head / d

    found = {
        "load": Stage(host=(linears + head) * _paged(dtype)),
        "evaluate": Stage(
            layer_run(recipe.window) + logits(min(CHUNK, recipe.window), "evaluate"),
            beside=2 * states(recipe.test_windows),
            host=codes,
        ),
    }
    if recipe.rotation != "none":
        copies = 2 if recipe.rotation in LEARNED else 3  # a Hadamard matrix is kept as its factors
        found["fuse"] = Stage(_DOUBLE * copies * head)
    if recipe.rotation in THROUGH_NETWORK:
        presets = {"spinquant": SPINQUANT_PRESETS, "ostquant": OSTQUANT_PRESETS}
        preset = presets[recipe.rotation][recipe.preset]

        def learning(windows: int) -> float:
            """A copy, what its layers keep for going back, and the logits or a layer's slopes.

            Gradients gather from a batch's first windows on.
            """
            tokens, gradients = windows * recipe.window, _FLOAT * linears
            kept = layers * (states(windows) if preset.checkpointing else layer_run(tokens))
            at_logits = logits(tokens, recipe.rotation)
            at_logits += gradients if windows < preset.batch else 0
            going_back = gradients + layer_run(tokens)
            return _FLOAT * linears + kept + max(at_logits, going_back)

        at_once = windows_at_once("cuda", family.config.vocab_size * recipe.window)
        at_once = min(preset.batch, at_once)
        found["rotate"] = Stage(here := learning(1), max(0.0, learning(at_once) - here))
    elif recipe.rotation == "klt":
        covariances = _FLOAT * (3 * d**2 + wide**2)
        found["rotate"] = Stage(
            layer_run(BATCH_TOKENS) + covariances, beside=2 * states(recipe.learning_windows)
        )
    elif recipe.rotation in LEARNED:
        rows = min(STEPS_A_DRAW * BATCH, STEPS_A_DRAW * linears // d) * d
        heads = layers * (sizes["o"] + sizes["v"])
        covariances = 3 * layers * d**2 if recipe.rotation == "optrot+" else 0
        learned_on = 0 if recipe.rotation == "kurtail" else linears
        if recipe.rotation in ("kurtail", "mixed"):
            learned_on += TOKENS * layers * (2 * d + family.linears(0)["o"].in_features)
        found["rotate"] = Stage(
            _FLOAT * (_ROWS * rows + _HEADS * heads + covariances), beside=_FLOAT * learned_on
        )
    if recipe.rounding == "gptq":
        windows = recipe.calibration_windows
        at_once = min(windows, max(1, BATCH_TOKENS // recipe.window))
        # a better code is looked for under the damped Hessian
        hessians = _HESSIANS + bool(recipe.scale_search or recipe.descent or recipe.refit)
        solve = _FLOAT * max(
            hessians * wide**2 + _WEIGHTS * sizes["down"],
            hessians * d**2 + _WEIGHTS * (sizes["gate"] + sizes["up"]),
        )
        if recipe.refit:  # a system of equations a row, in float32 and float64, and its solution
            of = {"down": d, "gate": 2 * wide}
            groups = {"down": wide, "gate": d}
            size = recipe.group_size
            systems = (of[site] * (groups[site] // size if size else 1) ** 2 for site in of)
            solve += _REFIT * max(systems)
        # one batch: further ones wait in a quarter of the memory that is free, or start anew
        working, streams = layer_run(at_once * recipe.window), 1
        if recipe.asymmetry:  # the original layer, what it computes, and the drift of what is read
            working = 2 * working + _FLOAT * (_of_a_layer(family) + 2 * wide**2)
            streams = 2
        working += solve
        if recipe.stream_weighted or recipe.loss_weighted:  # a window's way, and back, before
            way = layer_run(recipe.window) + layers * states(1)
            if recipe.loss_weighted:
                way += layer_run(recipe.window) + logits(recipe.window, "ostquant")
            working = max(working, way)
        found["quantize"] = Stage(working, beside=streams * 2 * states(windows), host=codes)
    if recipe.tuning:  # the original's states and head are there from before the rotation on
        original = states(recipe.tuning + HELD_OUT) + _FLOAT * head
        for stage in {"fuse", "quantize"} & found.keys():
            found[stage] = found[stage]._replace(beside=found[stage].beside + original)
        kept = layers * _FLOAT * recipe.window * (_TUNED[0] * d + _TUNED[1] * wide)
        kept += _FLOAT * linears if recipe.group_size else 0  # as the scales make them
        learning = kept + logits(recipe.window, "ostquant")
        found["tune"] = Stage(learning, beside=original, host=codes)
    return found


def on_disk(
    recipe: Recipe, format: str = "compressed-tensors", dtype: torch.dtype | None = None
) -> dict[str, float]:
    """Bytes of a checkpoint's tensors by kind, tokenizer and config apart; raises like `estimate`.

    `dtype` is of what isn't packed, as in `rl.export`.

    >>> sizes = on_disk(Recipe(model=tiny, group_size=16))
    >>> {kind: round(size) for kind, size in sizes.items()}
    {'embedding, head, norms': 148416, 'codes': 17664, 'scales': 8832}
    """
    family, _ = outline(recipe.model)
    head, model = family.lm_head.weight, family.model
    codes = len(family.layers) * _of_a_layer(family)
    others = sum(parameter.numel() for parameter in model.parameters()) - codes
    if recipe.rotation != "none" and family.has_R1 and head is model.model.embed_tokens.weight:
        others += head.numel()  # R1 unties them
    floats = recipe.grid in FP4
    dtype = dtype or (torch.bfloat16 if floats else torch.float32)
    itemsize = 2 if format == "gguf" else dtype.itemsize
    sizes = {"embedding, head, norms": others * itemsize}
    if format == "fused":
        return sizes | {"weights": codes * itemsize}
    bits = 4 if recipe.bits <= 4 and recipe.of_runtime is None else 8
    rows = sum(linear.out_features for linear in family.linears(0).values()) * len(family.layers)
    group = 32 if format == "gguf" else FP4.get(recipe.grid, recipe.group_size)
    scales = codes / group if group else rows
    of_scale = 1 if floats else itemsize
    if not recipe.symmetric:  # zero points are codes; GGUF's blocks have a minimum
        of_scale += itemsize if format == "gguf" else bits / 8
    return sizes | {"codes": codes * bits / 8, "scales": scales * of_scale}


def _paged(dtype: torch.dtype) -> int:
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
        whole = recipe.rotation in THROUGH_NETWORK or recipe.tuning
        least = needed.device if whole else min(needed.streamed, needed.device)
        _check(recipe, least, free_memory(device), f"on {device}")


def _check(recipe: Recipe, needed: float, free: float, where: str) -> None:
    if SURE * needed > free:
        raise ValueError(
            f"{recipe.model} needs about {needed / GB:.1f} GB {where} for this recipe, "
            f"and {free / GB:.1f} GB are free: take a bigger machine, a smaller model, "
            "or fewer and shorter windows"
        )
