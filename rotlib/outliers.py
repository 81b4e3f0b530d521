"""Where the outliers are: kurtosis and incoherence of every quantized weight, and kurtosis of what it reads.

A model is rotated (or not), its weights are measured as they would be quantized, an output channel at a time, and some text
runs through it while hooks measure every linear's input, a token at a time, so nothing larger than one activation is held.
A histogram of all weights over their matrix's root mean square shows the tails.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from statistics import fmean

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotlib import store
from rotlib.families import STAGES, Family, adapt
from rotlib.fuse import fuse
from rotlib.measure import incoherence, kurtosis
from rotlib.pipeline import calibration_tokens, rotation_of
from rotlib.recipe import Recipe
from rotlib.rotation import placed_weights
from rotlib.store import Record, Result
from rotlib.text import fingerprint
from rotlib.zoo import load, pick_device

WINDOWS = 2  # calibration windows that run through the model: kurtosis needs no more
HISTOGRAM_EDGES = [edge / 4 for edge in range(121)]  # |w| / rms from 0 to 30


def outliers(recipe: Recipe, device: str = "auto") -> Result:
    """Outliers of the recipe's model under its rotation (`rotation`, `seed`), over its first calibration windows; kept like a run."""
    recipe = recipe.of_rotation("text", "window", "calibration_windows")
    picked = pick_device(device)
    return store.once(recipe.spec() | {"task": "outliers"}, picked, lambda record: _compute(recipe, picked, record))


def compare_outliers(recipe: Recipe, rotations: tuple[str, ...]) -> dict[str, Result]:
    """`outliers` of the same recipe under several rotations; a name such as "hadamard + R4" turns R4 on."""
    online = " + R4"
    return {name: outliers(replace(recipe, rotation=name.removesuffix(online), R4=name.endswith(online))) for name in rotations}


@torch.no_grad()
def _compute(recipe: Recipe, device: torch.device, record: Record) -> None:
    calibration = calibration_tokens(recipe)
    model, _ = load(recipe.model, str(device))
    rotation = rotation_of(recipe, model, record)
    if rotation is not None:
        fuse(model, rotation)
    family = adapt(model)
    with record.stage("weights"):
        record.metrics["modules"] = weight_outliers(family)
        record.metrics["histogram"] = _histogram(family).tolist()
    with record.stage("activations"):
        inputs = input_outliers(model, calibration[:WINDOWS])
    for module in record.metrics["modules"]:
        module |= inputs[module["layer"], module["site"]]
    record.tokens["calibration"] = fingerprint(calibration)


def weight_outliers(family: Family) -> list[dict]:
    """Kurtosis and incoherence of every quantized weight as it stands."""
    return [
        {
            "site": placed.site,
            "layer": placed.layer,
            "kurtosis": kurtosis(placed.module.weight),
            "incoherence": incoherence(placed.module.weight),
        }
        for placed in placed_weights(family, quantized_only=True)
    ]


def input_outliers(model: PreTrainedModel, calibration: Int[Tensor, "windows length"]) -> dict[tuple[int, str], dict[str, float]]:
    """Kurtosis of every linear's input, token by token as its grid is, by layer and site.

    `input_kurtosis` is averaged over all tokens, `sink_kurtosis` over the first of every window, attention's sink.
    """
    family = adapt(model)
    seen: dict[tuple[int, str], list[tuple[float, float]]] = {}

    def watch(layer: int, stage: tuple[str, ...]) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            both = kurtosis(args[0].flatten(0, -2)), kurtosis(args[0][:, 0])
            for site in stage:  # they read the same input
                seen.setdefault((layer, site), []).append(both)

        return hook

    with ExitStack() as stack:
        for layer in range(len(family.layers)):
            for stage in STAGES:
                handle = family.linears(layer)[stage[0]].register_forward_pre_hook(watch(layer, stage))
                stack.callback(handle.remove)
        for ids in calibration:
            family.decoder(input_ids=ids[None].to(family.embedding.weight.device), use_cache=False)
    names = ("input_kurtosis", "sink_kurtosis")
    return {key: dict(zip(names, map(fmean, zip(*values, strict=True)), strict=True)) for key, values in seen.items()}


def _histogram(family: Family) -> Tensor:
    """Counts of |w| / rms over all quantized weights in the bins of `HISTOGRAM_EDGES`; the last bin takes the rest."""
    edges = torch.tensor(HISTOGRAM_EDGES)
    counts = torch.zeros(len(edges) - 1, dtype=torch.float64)
    for placed in placed_weights(family, quantized_only=True):
        w = placed.module.weight.float()
        scaled = (w.abs() / w.square().mean().sqrt()).clamp(max=HISTOGRAM_EDGES[-1])
        counts += torch.histc(scaled.cpu(), bins=len(edges) - 1, min=0, max=HISTOGRAM_EDGES[-1]).double()
    return counts
