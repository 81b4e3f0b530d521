"""GPTQ: quantize a layer column by column, each column making up for the rounding of those before it.

With H = E[x xᵀ] of a layer's inputs the error to keep small is tr(ΔW H ΔWᵀ). Written as H = M Mᵀ with M upper
triangular, every column's rounding error is spread over the columns still to come by the rows of U = M⁻¹
(Frantar et al., arXiv 2210.17323, Algorithm 1; the same as LDLQ with D = diag(M)², QuIP, arXiv 2307.13304, Theorem 6).
Layers are walked in the order q,k,v → o → gate,up → down; every input is produced by what is already quantized, weights
that read the same input share one Hessian and one factorisation, and groups take their scale from the updated weights.
GPTAQ (arXiv 2504.02692) also makes up for the inputs' own drift: with x̃ what the unquantized model would read, column q hands
``w_q P_q`` on to the columns behind it, P = α · triu(E[(x̃ − x) xᵀ] Uᵀ, 1) U.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from rotlib.checks import positive, share, token_ids, yes_or_no
from rotlib.covariance import DAMPING, Hessian, Stop, factorise, layer_inputs, run_layer, walk_layer
from rotlib.families import STAGES, Family
from rotlib.quant import Grid, QuantizedWeight, WeightQuant, check_quantizable, fit_grid, round_to_nearest, set_weight

BLOCK = 128  # columns whose errors reach the rest of the matrix in one product
_STRIP = 32  # columns whose errors reach the rest of the block in one product


@dataclass
class ModuleReport:
    """One quantized weight: tr(ΔW H ΔWᵀ) per output, the damping it took, and whether it fell back to RTN."""

    name: str
    error: float
    damping: float
    fallback: bool


@dataclass
class Report:
    """What GPTQ did, a line per weight, and what it stored, by names such as "layers.0.q"."""

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


class Layers(Protocol):
    """Keeps the reports of finished layers, so that an interrupted run goes on from the last of them."""

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
    kept: Layers | None = None,
) -> Report:
    """Quantize every linear of every decoder layer in place.

    `damping` is a fraction of the mean of H's diagonal. With `act_order` columns are visited by falling H_jj and groups
    keep the scales of the original weights. `asymmetry` is GPTAQ's α (0.25 in its paper, 0 for GPTQ); it costs a second pass
    through every layer, and one layer's inputs of the whole calibration text on the host. Layers that `kept` holds are put back instead
    of quantized, and the others are handed to it. Raises ValueError before any work for unsuitable models, grids or tokens.
    """
    family = check_quantizable(model, quant)
    token_ids("calibration", calibration, 2, model)
    positive("damping", damping)
    yes_or_no("act_order", act_order)
    share("asymmetry", asymmetry)
    solve = Solver(quant, act_order, damping)
    batches = layer_inputs(family, calibration)
    model.config.rotlib_quantized = True  # already: an interrupted model is neither the original nor quantized
    unrounded = _Unrounded(family, batches, asymmetry) if asymmetry else None
    report = Report()
    for layer in tqdm(range(len(family.layers)), desc="GPTQ", unit="layer"):
        start = time.perf_counter()
        if unrounded:
            unrounded.walk(layer)
        if done := kept and kept.get(layer):
            for site, linear in family.linears(layer).items():
                set_weight(linear, done.weights[f"layers.{layer}.{site}"])
            batches = walk_layer(family, layer, batches)
        else:
            done = Report()
            with family.on_device(family.layers[layer]):
                batches = _quantize_layer(family, layer, batches, solve, done, unrounded)
            done.seconds = time.perf_counter() - start
            if kept:
                kept.put(layer, done)
        report.add(done)
    return report


@dataclass
class Solver:
    """Quantizes the weights that share one Hessian."""

    quant: WeightQuant
    act_order: bool = False
    damping: float = 0.01

    def __call__(
        self, W: Float[Tensor, "out in"], H: Float[Tensor, "in in"], C: Float[Tensor, "in in"] | None = None
    ) -> tuple[QuantizedWeight, Tensor, float, bool]:
        """(quantized W, tr(ΔW H ΔWᵀ) of each row, damping used, fell back to RTN?); C is GPTAQ's α E[(x̃ − x) xᵀ]."""
        W = W.clone()
        H = H.clone()
        dead = H.diagonal() == 0
        H.diagonal()[dead] = 1.0
        W[:, dead] = 0.0
        order = H.diagonal().argsort(descending=True, stable=True) if self.act_order else torch.arange(len(H), device=H.device)
        M, damping = factorise(H[order][:, order], self.damping)
        if M is None:
            Q = round_to_nearest(W, self.quant)
        else:
            U = torch.linalg.solve_triangular(M, torch.eye(len(M), dtype=M.dtype, device=M.device), upper=True)  # Uᵀ U = H⁻¹
            P = None if C is None else (C[order][:, order] @ U.T).triu(1) @ U
            Q = self._solve(W, order, U, P)
        difference = Q.dense() - W
        error = (difference @ H * difference).sum(dim=1)
        return Q, error, damping, M is None

    def _solve(self, W: Tensor, order: Tensor, U: Tensor, P: Tensor | None) -> QuantizedWeight:
        """Algorithm 1 of GPTQ (with P: of GPTAQ) on columns laid out as rows, in blocks and strips."""
        n = W.shape[1]
        group = self.quant.group_size
        block = BLOCK if group is None else group * max(1, BLOCK // group)
        strip = group if group and (group < block or group % _STRIP) else _STRIP
        grid_of, grids = self._grids(W, order)
        X = W.T[order].contiguous()  # (in, out): the weights as they stand, made up for earlier errors
        E = torch.empty_like(X)  # errors over the pivots
        codes = torch.empty_like(X)

        def carried(done: slice, to: slice | int) -> Tensor:
            """What finished columns hand on to those of `to`."""
            rounding = U.T[to, done] @ E[done]
            return rounding if P is None else rounding - P.T[to, done] @ X[done]

        for b in range(0, n, block):
            block_end = min(b + block, n)
            for s in range(b, block_end, strip):
                end = min(s + strip, block_end)
                X[s:end] -= carried(slice(b, s), slice(s, end))
                for j in range(s, end):
                    X[j] -= carried(slice(s, j), j)
                    column = X[j]
                    grid = grid_of(X, j)
                    codes[j] = grid.codes(column)
                    E[j] = (column - (codes[j] - grid.zero).mul_(grid.scale)) / U[j, j]
            X[block_end:] -= carried(slice(b, block_end), slice(block_end, n))
        scale, zero = (torch.stack(parts, dim=1) for parts in ([grid.scale for grid in grids], [grid.zero for grid in grids]))
        return QuantizedWeight(codes[order.argsort()].T.contiguous().to(self.quant.storage), scale, zero)

    def _grids(self, W: Tensor, order: Tensor) -> tuple[Callable[[Tensor, int], Grid], list[Grid]]:
        """Which grid a column is rounded to: the row's, its own group's (act-order), or one fitted to fresh weights.

        The list holds the groups' grids in the order of the inputs, complete once every column has been asked for.
        """
        group = self.quant.group_size
        if group is None:
            grid = fit_grid(W, self.quant).row()
            return lambda X, j: grid, [grid]
        if self.act_order:
            static = [fit_grid(part, self.quant).row() for part in W.split(group, dim=1)]
            of_column = (order // group).tolist()
            return lambda X, j: static[of_column[j]], static
        fitted = []

        def fresh(X: Tensor, j: int) -> Grid:
            if j % group == 0:
                fitted.append(fit_grid(X[j : j + group].T.contiguous(), self.quant).row())
            return fitted[-1]

        return fresh, fitted


class _Unrounded:
    """GPTAQ's second stream: what the unquantized model reads, one layer at a time, and how far it is from what is read."""

    def __init__(self, family: Family, batches: list[tuple[Tensor, dict]], asymmetry: float):
        self._family, self._batches, self._asymmetry = family, batches, asymmetry

    def walk(self, layer: int) -> None:
        """Go through a layer that isn't quantized yet, and keep what each stage reads there."""
        self._inputs = defaultdict(list)
        linears = self._family.linears(layer)
        handles = [
            linears[stage[0]].register_forward_pre_hook(lambda module, args, stage=stage: self._inputs[stage].append(args[0].cpu()))
            for stage in STAGES
        ]
        try:
            self._batches = walk_layer(self._family, layer, self._batches)
        finally:
            for handle in handles:
                handle.remove()

    def drift(self, stage: tuple[str, ...], seen: list[Tensor]) -> Float[Tensor, "n n"]:
        """α E[(x̃ − x) xᵀ] of one stage, from what it read of every batch."""
        device = self._family.device
        total, tokens = 0, 0
        for original, x in zip(self._inputs.pop(stage), seen, strict=True):
            original, x = (values.to(device).flatten(0, -2).float() for values in (original, x))
            total, tokens = total + (original - x).T @ x, tokens + len(x)
        return total * (self._asymmetry / tokens)


def _quantize_layer(
    family: Family, index: int, batches: list, solve: Solver, report: Report, unrounded: _Unrounded | None
) -> list[tuple[Tensor, dict]]:
    """Quantize one layer and return the outputs it then has.

    The last batch walks through the layer once. Where it meets a stage that isn't quantized it waits until the other
    batches have been there too, sees the stage quantized, and goes on: a single batch needs a single pass.
    """
    layer = family.layers[index]
    linears = family.linears(index)
    *others, last = batches
    done, gathering = set(), set()
    hessian = Hessian()
    seen: list[Tensor] = []

    def arrive(stage: tuple[str, ...]):
        def hook(module, args):
            if stage in done:
                return
            hessian.add(args[0])
            if unrounded:
                seen.append(args[0].cpu())
            if stage in gathering:
                raise Stop
            gathering.add(stage)
            for batch in others:
                with suppress(Stop):
                    run_layer(layer, *batch)
            C = unrounded.drift(stage, seen[1:] + seen[:1]) if unrounded else None  # the last batch came first
            seen.clear()
            _quantize_stage(index, {name: linears[name] for name in stage}, hessian.take(), C, solve, report)
            done.add(stage)

        return hook

    handles = [linears[stage[0]].register_forward_pre_hook(arrive(stage)) for stage in STAGES]
    try:
        final = run_layer(layer, *last)
        return [(run_layer(layer, *batch), batch[1]) for batch in others] + [(final, last[1])]
    finally:
        for handle in handles:
            handle.remove()


def _quantize_stage(index: int, linears: dict[str, nn.Linear], H: Tensor, C: Tensor | None, solve: Solver, report: Report) -> None:
    """Quantize the weights that read one input as a single tall matrix."""
    W = torch.cat([linear.weight.float() for linear in linears.values()])
    Q, error, damping, fallback = solve(W, H, C)
    sizes = [linear.out_features for linear in linears.values()]
    parts = zip(*(part.split(sizes) for part in Q), strict=True)
    for (site, linear), part, e in zip(linears.items(), parts, error.split(sizes), strict=True):
        name = f"layers.{index}.{site}"
        report.weights[name] = set_weight(linear, QuantizedWeight(*part))
        report.modules.append(ModuleReport(name, e.mean().item(), damping, fallback))
