"""GPTQ of a model: its layers walked in order, every input made by what is already quantized.

The order within a layer is q,k,v → o → gate,up → down; weights that read the same input share one
Hessian and one factorisation (`solver.py`). For GPTAQ (arXiv 2504.02692) every batch goes through
the unquantized model as well.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from rotlib.checks import keeper, positive, share, shown, token_ids, whole_number, yes_or_no
from rotlib.models.families import Family, is_experts, kind_of
from rotlib.models.marks import changing
from rotlib.models.sound import check_can_be_copied
from rotlib.models.supported import adapt
from rotlib.models.text import fingerprint
from rotlib.models.walk import Batch, Passes, batches_that_wait, layer_inputs, walk_layer
from rotlib.precision import exact_products
from rotlib.quantization.coordinate import MOST_SWEEPS
from rotlib.quantization.fp4 import FP4
from rotlib.quantization.grids import QuantizedWeight, WeightQuant
from rotlib.quantization.hessian import DAMPING, LEAST_CAP, Hessian, token_weights
from rotlib.quantization.importance import Shares, check_slopes, token_shares
from rotlib.quantization.quantized import (
    check_alike,
    check_on_grid,
    check_quantizable,
    fits,
    set_together,
    set_weight,
    tall,
)
from rotlib.quantization.solver import Solver


@dataclass
class ModuleReport:
    """One quantized weight: tr(ΔW H ΔWᵀ) an output, the damping it took, whether it fell to RTN.

    `tokens` is how many of the calibration's it read; without any the error is Σ ΔW² an output.
    """

    name: str
    error: float
    damping: float
    fallback: bool
    tokens: int = 0


@dataclass
class Report:
    """What GPTQ did, a line a weight, and what it stored, by names such as "layers.0.q".

    One that `gptq` hands to its `kept` also says what it is `of`: text and settings.

    >>> report = gptq(model, tokens, WeightQuant(bits=3))
    >>> report.modules[0].name, report.fallbacks
    ('layers.0.q', 0)
    """

    modules: list[ModuleReport] = field(default_factory=list)
    weights: dict[str, QuantizedWeight] = field(default_factory=dict, repr=False)
    seconds: float = 0.0
    of: str = ""

    @property
    def fallbacks(self) -> int:
        """How many weights could not be factorised and were rounded to nearest instead."""
        return sum(module.fallback for module in self.modules)

    def add(self, other: "Report") -> None:
        """Append what was done elsewhere; raises ValueError for what is no report."""
        if not isinstance(other, Report):
            raise ValueError(f"a Report takes up another, not {shown(other)}")
        self.modules += other.modules
        self.weights |= other.weights
        self.seconds += other.seconds


@runtime_checkable
class Layers(Protocol):
    """Keeps finished layers' reports, so that an interrupted run goes on from the last of them."""

    def get(self, layer: int) -> Report | None: ...

    def put(self, layer: int, report: Report) -> None: ...


@torch.no_grad()
def gptq(
    model: PreTrainedModel,
    calibration: Int[Tensor, "windows length"],
    quant: WeightQuant,
    act_order: bool = False,
    damping: float = DAMPING,
    asymmetry: float = 0.0,
    static_groups: bool = False,
    scale_search: bool = False,
    descent: int = 0,
    refit: bool = False,
    token_cap: float | None = None,
    stream_weighted: bool = False,
    loss_weighted: bool = False,
    kept: Layers | None = None,
) -> Report:
    """Quantize every linear of every decoder layer in place (Frantar et al., arXiv 2210.17323).

    `damping` is a fraction of the mean of H's diagonal. With `act_order` columns are visited by
    falling H_jj; then, and with `static_groups`, groups keep the scales of the original weights.
    `asymmetry` is GPTAQ's α (0.25 in its paper, 0 for GPTQ); every batch then goes through the
    original layer as well. With `scale_search` every row takes the best of several scales, and
    `descent` sweeps of coordinate descent follow; `refit` then gives the codes the scales of least
    error, and the sweeps follow once more. `token_cap` is how many times the energy |x|² of its
    window's median token a token counts at most: attention's sink can have so much of it that the
    codes serve it alone. With `stream_weighted` a token counts, at o and down, by one over the size
    of the residual stream that they are added to, which takes a pass through the model; with
    `loss_weighted` also by the slope of the model's own loss at what q, k, v, gate and up put out,
    which takes a pass there and back. Where blocks end in a norm o and down aren't weighed. Layers
    that `kept` holds, of this text and these settings, are put back instead of quantized, and the
    others are handed to it. An expert
    is quantized by the tokens that it is given, all alike and without GPTAQ, and rounded to nearest
    where that is none; a warning says how many have fewer tokens than inputs. Raises ValueError
    before any work for unsuitable models, grids or tokens.

    >>> report = gptq(model, tokens, WeightQuant(bits=4, group_size=16))
    >>> report.fallbacks, report.weights["layers.0.q"].codes.dtype
    (0, torch.int8)
    """
    family = adapt(model)
    check_quantizable(family, quant)
    token_ids("calibration", calibration, 2, model)
    positive("damping", damping)
    yes_or_no("act_order", act_order)
    share("asymmetry", asymmetry)
    yes_or_no("static_groups", static_groups)
    if static_groups and quant.group_size is None:
        raise ValueError("static_groups keeps the scales of groups: the grid needs a group_size")
    yes_or_no("scale_search", scale_search)
    if scale_search and quant.grid == "mxfp4":
        raise ValueError("scale_search tries scales nearby, and mxfp4's are powers of two")
    whole_number("descent", descent, 0, MOST_SWEEPS)
    yes_or_no("refit", refit)
    if refit and quant.grid in FP4:
        raise ValueError(f"refit moves scales freely, and {quant.grid} hasn't all numbers for them")
    if token_cap is not None:
        positive("token_cap", token_cap, LEAST_CAP)
    yes_or_no("stream_weighted", stream_weighted)
    yes_or_no("loss_weighted", loss_weighted)
    if stream_weighted and loss_weighted:
        raise ValueError("loss_weighted weighs o's and down's tokens, too: leave stream_weighted")
    if loss_weighted:
        check_slopes(family)
    keeper("kept", kept, Layers, "layers")
    if asymmetry:
        check_can_be_copied(model, "the model")
    settings = (quant, act_order, damping, static_groups, scale_search, descent, refit)
    how = (asymmetry, token_cap, stream_weighted, loss_weighted)
    of = f"{fingerprint(calibration)} {settings} {how}"
    solve = Solver(*settings)
    batches = layer_inputs(family, calibration)
    start = time.perf_counter()
    weighted = stream_weighted or loss_weighted
    shares = token_shares(family, calibration, loss_weighted) if weighted else None
    report = Report(seconds=time.perf_counter() - start)
    weigh = _Weigh(token_cap, shares, [len(x) for x, _ in batches])
    with changing(model, "rotlib_quantized"):
        waiting = batches_that_wait(family, batches, streams=2 if asymmetry else 1)
        unrounded = _Unrounded(family, batches, asymmetry, waiting) if asymmetry else None
        for layer in tqdm(range(len(family.layers)), desc="GPTQ", unit="layer"):
            start = time.perf_counter()
            if done := _kept(kept, layer, family, quant, of):
                if unrounded:
                    unrounded.walk(layer)
                for site, linear in family.linears(layer).items():
                    set_weight(linear, done.weights[f"layers.{layer}.{site}"])
                batches = walk_layer(family, layer, batches)
            else:
                done = Report(of=of)
                with family.on_device(family.layers[layer], changed=True):
                    batches = _quantize_layer(
                        family, layer, batches, waiting, solve, weigh, done, unrounded
                    )
                done.seconds = time.perf_counter() - start
                if kept is not None:
                    kept.put(layer, done)
            report.add(done)
    _warn_of_starved(family, report)
    return report


def _warn_of_starved(family: Family, report: Report) -> None:
    """Say it where experts were given fewer tokens than they have inputs."""
    wide = max(family.width, family.inner_width)
    given = {
        one.name.removesuffix(".down"): one.tokens
        for one in report.modules
        if is_experts(one.name) and kind_of(one.name) == "down"
    }
    short = {name: tokens for name, tokens in given.items() if tokens < wide}
    if not short:
        return
    least = min(short, key=short.get)
    none = sum(not tokens for tokens in short.values())
    warnings.warn(
        f"{len(short)} of {len(given)} experts were given fewer calibration tokens than they have "
        f"inputs ({wide}), {least} the fewest, {short[least]}; {none} were given none and are "
        "rounded to nearest: give more calibration text",
        stacklevel=3,
    )


def _kept(
    kept: Layers | None, layer: int, family: Family, quant: WeightQuant, of: str
) -> Report | None:
    """What is kept of a layer, if it is of the same text and settings.

    Raises ValueError where it isn't this layer's, or on another grid.
    """
    if kept is None or (done := kept.get(layer)) is None:
        return None
    if not isinstance(done, Report) or not isinstance(done.weights, dict):
        raise ValueError(f"kept.get must return a whole Report or None, not {shown(done)}")
    for site, linear in family.linears(layer).items():
        weight = done.weights.get(name := f"layers.{layer}.{site}")
        if not fits(weight, linear.weight):
            raise ValueError(f"what is kept of layer {layer} lacks {name}, or has another shape")
        check_on_grid(name, weight, quant, family.model.dtype)
        check_alike(name, weight, linear.weight)
    return done if done.of == of else None


class _Weigh:
    """What a token is multiplied by before it counts, or None where all count alike."""

    def __init__(self, cap: float | None, shares: list[Shares] | None, windows: list[int]):
        self._cap, self._shares, self._windows = cap, shares, windows

    def __call__(
        self, layer: int, site: str, number: int, x: Float[Tensor, "... n"]
    ) -> Float[Tensor, "... 1"] | None:
        """Those of one batch at the inputs of a site."""
        weight = None if self._cap is None else token_weights(x, self._cap)
        if self._shares and (shares := self._shares[layer].get(site)) is not None:
            share = shares.split(self._windows)[number].sqrt()
            weight = share if weight is None else weight * share
        return weight


def _weighted(
    x: Float[Tensor, "... n"], weight: Float[Tensor, "... 1"] | None
) -> Float[Tensor, "... n"]:
    return x if weight is None else x * weight


class _Drift:
    """α E[(x̃ − x) xᵀ] over the batches seen so far: x̃ is what the unquantized model reads."""

    def __init__(self, originals: Iterator[Tensor], asymmetry: float):
        self._originals, self._asymmetry = originals, asymmetry
        self._sum, self._tokens = 0, 0

    def add(self, x: Float[Tensor, "... n"], weight: Float[Tensor, "... 1"] | None) -> None:
        both = (_weighted(values, weight) for values in (next(self._originals), x))
        original, read = (values.flatten(0, -2).float() for values in both)
        self._sum = self._sum + (original - read).T @ read
        self._tokens += len(read)

    def take(self) -> Float[Tensor, "n n"]:
        self._originals.close()
        return self._sum * (self._asymmetry / self._tokens)


class _Unrounded:
    """GPTAQ's second stream: what the unquantized model reads, beside the quantized one's."""

    def __init__(self, family: Family, batches: list[Batch], asymmetry: float, waiting: int):
        self._family, self._batches = family, batches
        self._asymmetry, self._room = asymmetry, waiting

    def walk(self, layer: int) -> None:
        """Go through a layer that isn't quantized yet."""
        self._batches = walk_layer(self._family, layer, self._batches)

    @contextmanager
    def beside(self, layer: int) -> Iterator[Callable[[str], _Drift]]:
        """While open, hold a copy of a layer that is about to be quantized; then walk it.

        Gives a function of a site, which returns the drift of what is read there.
        """
        twin = deepcopy(self._family.layers[layer])
        with closing(Passes(twin, self._batches, self._room)) as passes:

            def drift(site: str) -> _Drift:
                paths = self._family.layout(self._family.config)
                inputs = passes.inputs(twin.get_submodule(paths[site]))
                return _Drift(inputs, self._asymmetry)

            yield drift
            self._batches = passes.outputs()


def _quantize_layer(
    family: Family,
    index: int,
    batches: list[Batch],
    waiting: int,
    solve: Solver,
    weigh: _Weigh,
    report: Report,
    unrounded: _Unrounded | None,
) -> list[Batch]:
    """Quantize one layer and return the outputs it then has.

    What o, gate, up and down read depends on the weights before them, so all batches must reach an
    input before its weights are quantized, and none may pass before.
    """
    linears = family.linears(index)
    beside = unrounded.beside(index) if unrounded else nullcontext()
    with closing(Passes(family.layers[index], batches, waiting)) as passes:
        with beside as drift_at:
            for sites in family.readers:
                # the unquantized model gives an expert other tokens
                has_twin = unrounded and not is_experts(sites[0])
                hessian, drift = Hessian(), drift_at(sites[0]) if has_twin else None
                for number, x in enumerate(passes.inputs(linears[sites[0]])):
                    weight = weigh(index, sites[0], number, x)
                    hessian.add(_weighted(x, weight))
                    if drift:
                        drift.add(x, weight)
                together = {f"layers.{index}.{site}": linears[site] for site in sites}
                C = drift.take() if drift else None
                tokens = hessian.tokens
                H = hessian.take() if tokens else None
                # nothing was read but zeros: they tell as little as no tokens do
                H = None if H is None or not H.any() else H
                with exact_products():
                    _quantize_together(together, H, C, solve, report, tokens)
        return passes.outputs()


def _quantize_together(
    linears: dict[str, nn.Linear],
    H: Float[Tensor, "in in"] | None,
    C: Float[Tensor, "in in"] | None,
    solve: Solver,
    report: Report,
    tokens: int,
) -> None:
    """Quantize the weights that read one input as a single tall matrix.

    Without H they are rounded to nearest, as GPTQ does where no input tells of another.
    """
    W = tall(linears, next(iter(linears.values())).weight.device)
    known = torch.eye(W.shape[1], device=W.device) if H is None else H
    Q, error, damping, fallback = solve(W, known, C)
    stored = set_together(linears, Q)
    report.weights |= stored
    sizes = [len(weight.codes) for weight in stored.values()]
    for name, e in zip(stored, error.split(sizes), strict=True):
        fell = fallback or H is None
        report.modules.append(ModuleReport(name, e.mean().item(), damping, fell, tokens))
