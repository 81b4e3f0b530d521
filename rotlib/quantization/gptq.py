"""GPTQ: quantize column by column, each column making up for the rounding of those before it.

With H = E[x xᵀ] of a layer's inputs the error to keep small is tr(ΔW H ΔWᵀ). Written as H = M Mᵀ
with M upper triangular, every column's rounding error is spread over the columns still to come by
the rows of U = M⁻¹ (Frantar et al., arXiv 2210.17323, Algorithm 1; the same as LDLQ with D =
diag(M)², QuIP, arXiv 2307.13304, Theorem 6). Layers are walked in the order q,k,v → o → gate,up →
down; every input is produced by what is already quantized, weights that read the same input share
one Hessian and one factorisation, and groups take their scale from the updated weights. GPTAQ
(arXiv 2504.02692) also makes up for the inputs' own drift: with x̃ what the unquantized model would
read, column q hands ``w_q P_q`` on to the columns behind it, P = α · triu(E[(x̃ − x) xᵀ] Uᵀ, 1) U.
Scales can be chosen by the error that GPTQ then makes, row by row, among some that are wider or
narrower than those of clip search (as Samsung's TICO 0.3 does).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from rotlib.checks import keeper, positive, share, token_ids, whole_number, yes_or_no
from rotlib.models.families import READERS, Family, adapt, mark
from rotlib.models.walk import Batch, Passes, batches_that_wait, layer_inputs, walk_layer
from rotlib.precision import exact_products
from rotlib.quantization.coordinate import CoordinateDescent
from rotlib.quantization.grids import (
    Grid,
    QuantizedWeight,
    WeightQuant,
    check_on_grid,
    check_quantizable,
    fit_grid,
    fits,
    round_to_nearest,
    set_weight,
)
from rotlib.quantization.hessian import DAMPING, Hessian, factorise
from rotlib.quantization.replayed import Replayed

BLOCK = 128  # columns whose errors reach the rest of the matrix in one product
_STRIP = 32  # columns whose errors reach the rest of the block in one product
# of clip search's scales, for `scale_search` to choose from; without it the first
WIDTHS = (1.0, 0.85, 0.9, 0.95, 1.05)


@dataclass
class ModuleReport:
    """One quantized weight: tr(ΔW H ΔWᵀ) an output, the damping it took, whether it fell to RTN."""

    name: str
    error: float
    damping: float
    fallback: bool


@dataclass
class Report:
    """What GPTQ did, a line a weight, and what it stored, by names such as "layers.0.q".

    >>> report = gptq(model, tokens, WeightQuant(bits=3))
    >>> report.modules[0].name, report.fallbacks
    ('layers.0.q', 0)
    """

    modules: list[ModuleReport] = field(default_factory=list)
    weights: dict[str, QuantizedWeight] = field(default_factory=dict, repr=False)
    seconds: float = 0.0

    @property
    def fallbacks(self) -> int:
        """How many weights could not be factorised and were rounded to nearest instead."""
        return sum(module.fallback for module in self.modules)

    def add(self, other: "Report") -> None:
        """Append what was done elsewhere."""
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
    kept: Layers | None = None,
) -> Report:
    """Quantize every linear of every decoder layer in place (Frantar et al., arXiv 2210.17323).

    `damping` is a fraction of the mean of H's diagonal. With `act_order` columns are visited by
    falling H_jj; then, and with `static_groups`, groups keep the scales of the original weights.
    `asymmetry` is GPTAQ's α (0.25 in its paper, 0 for GPTQ); every batch then goes through the
    original layer as well. With `scale_search` every row takes the best of several scales, and
    `descent` sweeps of coordinate descent follow. Layers that `kept` holds are put back instead of
    quantized, and the others are handed to it. Raises ValueError before any work for unsuitable
    models, grids or tokens.

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
    whole_number("descent", descent, 0)
    keeper("kept", kept, Layers, "layers")
    solve = Solver(quant, act_order, damping, static_groups, scale_search, descent)
    batches = layer_inputs(family, calibration)
    # marked before it is: an interrupted model is neither the original nor quantized
    mark(model, "rotlib_quantized")
    waiting = batches_that_wait(family, batches, streams=2 if asymmetry else 1)
    unrounded = _Unrounded(family, batches, asymmetry, waiting) if asymmetry else None
    report = Report()
    for layer in tqdm(range(len(family.layers)), desc="GPTQ", unit="layer"):
        start = time.perf_counter()
        if done := _kept(kept, layer, family, quant):
            if unrounded:
                unrounded.walk(layer)
            for site, linear in family.linears(layer).items():
                set_weight(linear, done.weights[f"layers.{layer}.{site}"])
            batches = walk_layer(family, layer, batches)
        else:
            done = Report()
            with family.on_device(family.layers[layer], changed=True):
                batches = _quantize_layer(family, layer, batches, waiting, solve, done, unrounded)
            done.seconds = time.perf_counter() - start
            if kept is not None:
                kept.put(layer, done)
        report.add(done)
    return report


def _kept(kept: Layers | None, layer: int, family: Family, quant: WeightQuant) -> Report | None:
    """What is kept of a layer; raises ValueError where that isn't this layer's, on this grid."""
    if kept is None or (done := kept.get(layer)) is None:
        return None
    if not isinstance(done, Report):
        raise ValueError(f"kept.get must return a Report or None, not a {type(done).__name__}")
    for site, linear in family.linears(layer).items():
        weight = done.weights.get(name := f"layers.{layer}.{site}")
        if not fits(weight, linear.weight):
            raise ValueError(f"what is kept of layer {layer} lacks {name}, or has another shape")
        check_on_grid(name, weight, quant, family.model.dtype)
    return done


@dataclass
class Solver:
    """Quantizes the weights that share one Hessian."""

    quant: WeightQuant
    act_order: bool = False
    damping: float = DAMPING
    static_groups: bool = False
    scale_search: bool = False
    descent: int = 0

    def __post_init__(self):
        self._round_strip = Replayed(partial(round_strip, *self.quant.codes))
        self._descend = CoordinateDescent(self.quant, self.descent)

    def __call__(
        self,
        W: Float[Tensor, "out in"],
        H: Float[Tensor, "in in"],
        C: Float[Tensor, "in in"] | None = None,
    ) -> tuple[QuantizedWeight, Float[Tensor, " out"], float, bool]:
        """(quantized W, tr(ΔW H ΔWᵀ) of each row, damping used, fell back to RTN?)

        C is GPTAQ's α E[(x̃ − x) xᵀ].
        """
        W = W.clone()
        H = H.clone()
        dead = H.diagonal() == 0
        H.diagonal()[dead] = 1.0
        W[:, dead] = 0.0
        order = torch.arange(len(H), device=H.device)
        if self.act_order:
            order = H.diagonal().argsort(descending=True, stable=True)
        M, damping = factorise(H[order][:, order], self.damping)
        if M is None:
            Q = round_to_nearest(W, self.quant)
        else:
            eye = torch.eye(len(M), dtype=M.dtype, device=M.device)
            U = torch.linalg.solve_triangular(M, eye, upper=True)  # Uᵀ U = H⁻¹
            P = None if C is None else (C[order][:, order] @ U.T).triu(1) @ U
            fixed = self._fixed_grids(W)
            widths = WIDTHS if self.scale_search else WIDTHS[:1]
            tried = [self._solve(W, order, U, P, fixed, width) for width in widths]
            Q = tried[0]
            if self.scale_search or self.descent:
                sound = H + damping * H.diagonal().mean() * eye
                Q = _best_rows(tried, W, sound, C) if self.scale_search else Q
                Q = self._descend(Q, W, sound, C)
        difference = Q.dense() - W
        error = (difference @ H * difference).sum(dim=1)
        return Q, error, damping, M is None

    def _solve(
        self, W: Tensor, order: Tensor, U: Tensor, P: Tensor | None, fixed: list[Grid], width: float
    ) -> QuantizedWeight:
        """Algorithm 1 of GPTQ, or with P of GPTAQ, on columns laid out as rows, block by block."""
        n = W.shape[1]
        group = self.quant.group_size
        block = BLOCK if group is None else group * max(1, BLOCK // group)
        strip = group if group and (group < block or group % _STRIP) else _STRIP
        grids_of, grids = self._grids(order, fixed, width)
        X = W.T[order].contiguous()  # (in, out): the weights, made up for earlier errors
        E = torch.empty_like(X)  # errors over the pivots
        codes = torch.empty_like(X)

        def carried(done: slice, to: slice) -> Tensor:
            """What finished columns hand on to those of `to`."""
            rounding = U.T[to, done] @ E[done]
            return rounding if P is None else rounding - P.T[to, done] @ X[done]

        for b in range(0, n, block):
            block_end = min(b + block, n)
            for s in range(b, block_end, strip):
                end = min(s + strip, block_end)
                here = slice(s, end)
                X[here] -= carried(slice(b, s), here)
                hands_on = [U[here, here]] + ([] if P is None else [P[here, here]])
                X[here], codes[here], E[here] = self._round_strip(
                    X[here], *grids_of(X, here), *hands_on
                )
            X[block_end:] -= carried(slice(b, block_end), slice(block_end, n))
        scale = torch.stack([grid.scale for grid in grids], dim=1)
        zero = torch.stack([grid.zero for grid in grids], dim=1)
        codes = codes[order.argsort()].T.contiguous()
        return QuantizedWeight(codes.to(self.quant.storage), scale, zero)

    def _fixed_grids(self, W: Tensor) -> list[Grid]:
        """The rows' or the groups' grids; none where a group's wait for its updated weights."""
        group = self.quant.group_size
        if group and not (self.act_order or self.static_groups):
            return []
        parts = W.split(group or W.shape[1], dim=1)
        return [fit_grid(part, self.quant).row() for part in parts]

    def _grids(
        self, order: Tensor, fixed: list[Grid], width: float
    ) -> tuple[Callable[[Tensor, slice], tuple[Tensor, Tensor]], list[Grid]]:
        """Scale and zero point of every column of a strip, and all grids in the inputs' order.

        A column's grid is the row's, its own group's (act-order, static groups), or one fitted to
        the group's updated weights; then the list is complete once every column has been asked
        for. `width` multiplies all scales.
        """
        group = self.quant.group_size

        def widened(grid: Grid) -> Grid:
            return grid if width == 1 else grid._replace(scale=width * grid.scale)

        def shared(grid: Grid, strip: slice) -> tuple[Tensor, Tensor]:
            columns = strip.stop - strip.start
            return grid.scale.expand(columns, -1), grid.zero.expand(columns, -1)

        grids = [widened(grid) for grid in fixed]
        if group is None:
            return lambda X, strip: shared(grids[0], strip), grids
        if grids:
            scale, zero = (torch.stack([grid[part] for grid in grids]) for part in (0, 1))
            of_column = order // group
            return lambda X, strip: (scale[of_column[strip]], zero[of_column[strip]]), grids

        def fresh(X: Tensor, strip: slice) -> tuple[Tensor, Tensor]:
            j = strip.start
            if j % group == 0:
                grids.append(widened(fit_grid(X[j : j + group].T.contiguous(), self.quant).row()))
            return shared(grids[-1], strip)

        return fresh, grids


def _best_rows(
    tried: list[QuantizedWeight], W: Tensor, H: Tensor, C: Tensor | None
) -> QuantizedWeight:
    """Every row as the try has it whose outputs are nearest to the original's."""

    drift = 0 if C is None else 2 * W @ C

    def error(Q: QuantizedWeight) -> Float[Tensor, " out"]:
        difference = Q.dense() - W
        return ((difference @ H - drift) * difference).sum(dim=1)

    best = torch.stack([error(Q) for Q in tried]).argmin(dim=0)
    rows = torch.arange(len(W), device=W.device)
    return QuantizedWeight(*(torch.stack(parts)[best, rows] for parts in zip(*tried, strict=True)))


def round_strip(
    low: int,
    high: int,
    X: Float[Tensor, "k out"],
    scale: Float[Tensor, "k out"],
    zero: Float[Tensor, "k out"],
    U: Float[Tensor, "k k"],
    P: Float[Tensor, "k k"] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round a few columns, laid out as rows, one after the other, each on its grid.

    Returns what they were when they were rounded, their codes, their errors over the pivots.
    """
    X, codes, E = X.clone(), torch.empty_like(X), torch.empty_like(X)
    for j in range(len(X)):
        X[j] -= U[:j, j] @ E[:j]
        if P is not None:
            X[j] += P[:j, j] @ X[:j]
        grid = Grid(scale[j], zero[j], low, high)
        codes[j] = grid.codes(X[j])
        E[j] = (X[j] - (codes[j] - grid.zero).mul_(grid.scale)) / U[j, j]
    return X, codes, E


class _Drift:
    """α E[(x̃ − x) xᵀ] over the batches seen so far: x̃ is what the unquantized model reads."""

    def __init__(self, originals: Iterator[Tensor], asymmetry: float):
        self._originals, self._asymmetry = originals, asymmetry
        self._sum, self._tokens = 0, 0

    def add(self, x: Float[Tensor, "... n"]) -> None:
        original, read = (values.flatten(0, -2).float() for values in (next(self._originals), x))
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
                inputs = passes.inputs(twin.get_submodule(self._family.linear_paths[site]))
                return _Drift(inputs, self._asymmetry)

            yield drift
            self._batches = passes.outputs()


def _quantize_layer(
    family: Family,
    index: int,
    batches: list[Batch],
    waiting: int,
    solve: Solver,
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
            for sites in READERS:
                hessian, drift = Hessian(), drift_at(sites[0]) if unrounded else None
                for x in passes.inputs(linears[sites[0]]):
                    hessian.add(x)
                    if drift:
                        drift.add(x)
                weights = {name: linears[name] for name in sites}
                C = drift.take() if drift else None
                with exact_products():
                    _quantize_together(index, weights, hessian.take(), C, solve, report)
        return passes.outputs()


def _quantize_together(
    index: int,
    linears: dict[str, nn.Linear],
    H: Float[Tensor, "in in"],
    C: Float[Tensor, "in in"] | None,
    solve: Solver,
    report: Report,
) -> None:
    """Quantize the weights that read one input as a single tall matrix."""
    W = torch.cat([linear.weight.float() for linear in linears.values()])
    Q, error, damping, fallback = solve(W, H, C)
    sizes = [linear.out_features for linear in linears.values()]
    parts = zip(*(part.split(sizes) for part in Q), strict=True)
    for (site, linear), part, e in zip(linears.items(), parts, error.split(sizes), strict=True):
        name = f"layers.{index}.{site}"
        report.weights[name] = set_weight(linear, QuantizedWeight(*part))
        report.modules.append(ModuleReport(name, e.mean().item(), damping, fallback))
