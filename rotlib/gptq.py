"""GPTQ: quantize a layer column by column, each column making up for the rounding of those before it.

With H = E[x xᵀ] of a layer's inputs the error to keep small is tr(ΔW H ΔWᵀ). Written as H = M Mᵀ with M upper
triangular, every column's rounding error is spread over the columns still to come by the rows of U = M⁻¹
(Frantar et al., arXiv 2210.17323, Algorithm 1; the same as LDLQ with D = diag(M)², QuIP, arXiv 2307.13304, Theorem 6).
Layers are walked in the order q,k,v → o → gate,up → down; every input is produced by what is already quantized, weights
that read the same input share one Hessian and one factorisation, and groups take their scale from the updated weights.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from rotlib.checks import positive, token_ids, yes_or_no
from rotlib.families import STAGES, Family
from rotlib.quant import Grid, QuantizedWeight, WeightQuant, check_quantizable, fit_grid, round_to_nearest

BLOCK = 128  # columns whose errors reach the rest of the matrix in one product
_STRIP = 32  # columns whose errors reach the rest of the block in one product
_HESSIAN_BLOCK = 384
_BATCH_TOKENS = 16384  # tokens that go through a layer at a time
_LADDER = (1, 10, 100)  # factors on the damping, tried until the Cholesky factorisation succeeds


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


@torch.no_grad()
def gptq(
    model: PreTrainedModel,
    calibration: Int[Tensor, "windows length"],
    quant: WeightQuant,
    act_order: bool = False,
    damping: float = 0.01,
) -> Report:
    """Quantize every linear of every decoder layer in place.

    `damping` is a fraction of the mean of H's diagonal. With `act_order` columns are visited by falling H_jj and groups
    keep the scales of the original weights. Raises ValueError before any work for unsuitable models, grids or tokens.
    """
    family = check_quantizable(model, quant)
    token_ids("calibration", calibration, 2, model)
    positive("damping", damping)
    yes_or_no("act_order", act_order)
    _check_masks(model, calibration.shape[1])
    model.config.rotlib_quantized = True  # first: an interrupted model is neither the original nor quantized
    start = time.perf_counter()
    report = Report()
    solve = Solver(quant, act_order, damping)
    batches = _layer_inputs(family, calibration)
    for layer in tqdm(range(len(family.layers)), desc="GPTQ", unit="layer"):
        batches = _quantize_layer(family, layer, batches, solve, report)
    report.seconds = time.perf_counter() - start
    return report


@dataclass
class Solver:
    """Quantizes the weights that share one Hessian."""

    quant: WeightQuant
    act_order: bool = False
    damping: float = 0.01

    def __call__(self, W: Float[Tensor, "out in"], H: Float[Tensor, "in in"]) -> tuple[QuantizedWeight, Tensor, float, bool]:
        """(quantized W, tr(ΔW H ΔWᵀ) of each row, damping used, fell back to RTN?)"""
        W = W.clone()
        H = H.clone()
        dead = H.diagonal() == 0
        H.diagonal()[dead] = 1.0
        W[:, dead] = 0.0
        order = H.diagonal().argsort(descending=True, stable=True) if self.act_order else torch.arange(len(H), device=H.device)
        U, damping = self._factorise(H[order][:, order])
        Q = round_to_nearest(W, self.quant) if U is None else self._solve(W, order, U)
        difference = Q.dense() - W
        error = (difference @ H * difference).sum(dim=1)
        return Q, error, damping, U is None

    def _factorise(self, H: Tensor) -> tuple[Tensor | None, float]:
        """U with Uᵀ U = H⁻¹, upper triangular, from one Cholesky factorisation of H read backwards."""
        eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
        for factor in _LADDER:
            damping = self.damping * factor
            L, info = torch.linalg.cholesky_ex((H + damping * H.diagonal().mean() * eye).flip(0, 1))
            if info == 0 and torch.isfinite(L).all():
                return torch.linalg.solve_triangular(L.flip(0, 1), eye, upper=True), damping
        return None, damping

    def _solve(self, W: Tensor, order: Tensor, U: Tensor) -> QuantizedWeight:
        """Algorithm 1 of GPTQ on columns laid out as rows, in blocks and strips."""
        n = W.shape[1]
        group = self.quant.group_size
        block = BLOCK if group is None else group * max(1, BLOCK // group)
        strip = group if group and (group < block or group % _STRIP) else _STRIP
        grid_of, grids = self._grids(W, order)
        X = W.T[order].contiguous()  # (in, out): the weights as they stand, made up for earlier errors
        E = torch.empty_like(X)  # errors over the pivots
        codes = torch.empty_like(X)
        for b in range(0, n, block):
            block_end = min(b + block, n)
            for s in range(b, block_end, strip):
                end = min(s + strip, block_end)
                X[s:end] -= U[b:s, s:end].T @ E[b:s]
                for j in range(s, end):
                    column = torch.addmv(X[j], E[s:j].T, U[s:j, j], alpha=-1)
                    X[j] = column
                    grid = grid_of(X, j)
                    codes[j] = grid.codes(column)
                    E[j] = (column - (codes[j] - grid.zero).mul_(grid.scale)) / U[j, j]
            X[block_end:] -= U[b:block_end, block_end:].T @ E[b:block_end]
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


class _Stop(Exception):
    """Ends a forward pass once its inputs have been seen."""


def _layer_inputs(family: Family, calibration: Tensor) -> list[tuple[Tensor, dict]]:
    """What the first decoder layer is called with, batch by batch: hidden states (kept on the host) and keywords."""
    batches = []

    def catch(layer, args, kwargs):
        batches.append((args[0].cpu(), kwargs))
        raise _Stop

    handle = family.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    device = family.embedding.weight.device
    try:
        for ids in calibration.split(max(1, _BATCH_TOKENS // calibration.shape[1])):
            with suppress(_Stop):
                family.decoder(input_ids=ids.to(device), use_cache=False)
    finally:
        handle.remove()
    return batches


def _quantize_layer(family: Family, index: int, batches: list, solve: Solver, report: Report) -> list[tuple[Tensor, dict]]:
    """Quantize one layer and return the outputs it then has.

    The last batch walks through the layer once. Where it meets a stage that isn't quantized it waits until the other
    batches have been there too, sees the stage quantized, and goes on: a single batch needs a single pass.
    """
    layer = family.layers[index]
    linears = family.linears(index)
    *others, last = batches
    done = set()
    hessian = _Hessian()

    def arrive(stage: tuple[str, ...]):
        def hook(module, args):
            if stage in done:
                return
            hessian.add(args[0])
            if hessian.gathering:
                raise _Stop
            hessian.gathering = True
            for batch in others:
                with suppress(_Stop):
                    _forward(layer, *batch)
            _quantize_stage(index, {name: linears[name] for name in stage}, hessian.take(), solve, report)
            done.add(stage)

        return hook

    handles = [linears[stage[0]].register_forward_pre_hook(arrive(stage)) for stage in STAGES]
    try:
        final = _forward(layer, *last)
        return [(_forward(layer, *batch), batch[1]) for batch in others] + [(final, last[1])]
    finally:
        for handle in handles:
            handle.remove()


class _Hessian:
    """H = (2/n) Σ x xᵀ over the inputs seen so far, in float32; only the lower triangle is summed, block by block."""

    def __init__(self):
        self._sum, self._tokens, self.gathering = None, 0, False

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        n = x.shape[1]
        if self._sum is None:
            self._sum = torch.zeros(n, n, device=x.device)
        for c in range(0, n, _HESSIAN_BLOCK):
            self._sum[c:, c : c + _HESSIAN_BLOCK].addmm_(x[:, c:].T, x[:, c : c + _HESSIAN_BLOCK])
        self._tokens += len(x)

    def take(self) -> Tensor:
        """The Hessian of one stage; the next starts from nothing."""
        lower = self._sum.tril()
        H = (lower + lower.tril(-1).T) * (2 / self._tokens)
        self.__init__()
        return H


def _quantize_stage(index: int, linears: dict[str, nn.Linear], H: Tensor, solve: Solver, report: Report) -> None:
    """Quantize the weights that read one input as a single tall matrix."""
    W = torch.cat([linear.weight.float() for linear in linears.values()])
    Q, error, damping, fallback = solve(W, H)
    sizes = [linear.out_features for linear in linears.values()]
    parts = zip(*(part.split(sizes) for part in Q), strict=True)
    for (site, linear), part, e in zip(linears.items(), parts, error.split(sizes), strict=True):
        name = f"layers.{index}.{site}"
        report.weights[name] = QuantizedWeight(*part)
        linear.weight.copy_(report.weights[name].dense())
        report.modules.append(ModuleReport(name, e.mean().item(), damping, fallback))


def _forward(layer: nn.Module, x: Tensor, kwargs: dict) -> Tensor:
    """A decoder layer's output hidden states, kept on the host between layers."""
    out = layer(x.to(next(layer.parameters()).device), **kwargs)
    return (out[0] if isinstance(out, tuple) else out).cpu()


def _check_masks(model: PreTrainedModel, length: int) -> None:
    """Every layer is run with the first one's attention mask, so all must share it."""
    kinds = set(getattr(model.config, "layer_types", None) or ())
    if len(kinds) > 1 and length > (model.config.sliding_window or length):
        raise ValueError(
            f"this model mixes {' and '.join(sorted(kinds))} layers: calibrate with windows of at most its "
            f"{model.config.sliding_window} tokens of sliding window, not {length}"
        )
