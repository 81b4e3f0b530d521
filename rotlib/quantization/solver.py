"""GPTQ of one matrix, column by column: each makes up for the rounding of those before it.

With H = E[x xᵀ] of a layer's inputs the error to keep small is tr(ΔW H ΔWᵀ). Written as H = M Mᵀ
with M upper triangular, every column's rounding error is spread over the columns still to come by
the rows of U = M⁻¹ (Frantar et al., arXiv 2210.17323, Algorithm 1; the same as LDLQ with D =
diag(M)², QuIP, arXiv 2307.13304, Theorem 6). Groups take their scale from the updated weights.
GPTAQ (arXiv 2504.02692) also makes up for the inputs' own drift: with x̃ what the unquantized model
would read, column q hands ``w_q P_q`` on to the columns behind it, P = α · triu(E[(x̃ − x) xᵀ] Uᵀ,
1) U. Scales can be chosen by the error that GPTQ then makes, row by row, among some that are wider
or narrower than those of clip search (as Samsung's TICO 0.3 does).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from rotlib.quantization.coordinate import CoordinateDescent, row_errors
from rotlib.quantization.grids import Grid, QuantizedWeight, WeightQuant, fit_grid, round_to_nearest
from rotlib.quantization.hessian import DAMPING, factorise
from rotlib.quantization.refit import refitted
from rotlib.quantization.replayed import Replayed

BLOCK = 128  # columns whose errors reach the rest of the matrix in one product
_STRIP = 32  # columns whose errors reach the rest of the block in one product
# of clip search's scales, for `scale_search` to choose from; without it the first
WIDTHS = (1.0, 0.85, 0.9, 0.95, 1.05)


@dataclass
class Solver:
    """Quantizes the weights that share one Hessian."""

    quant: WeightQuant
    act_order: bool = False
    damping: float = DAMPING
    static_groups: bool = False
    scale_search: bool = False
    descent: int = 0
    refit: bool = False

    def __post_init__(self):
        self._round_strip = Replayed(partial(round_strip, self.quant))
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
        W, unit = self.quant.in_units(W.clone())
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
            if self.scale_search or self.descent or self.refit:
                sound = H + damping * H.diagonal().mean() * eye
                Q = _best_rows(tried, W, sound, C) if self.scale_search else Q
                Q = self._descend(Q, W, sound, C)
                if self.refit:
                    Q = self._descend(refitted(Q, W, sound, C), W, sound, C)
        difference = (Q.dense() - W) * unit
        error = (difference @ H * difference).sum(dim=1)
        return Q._replace(scale=Q.scale * unit), error, damping, M is None

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

        def shared(grid: Grid, strip: slice) -> tuple[Tensor, Tensor]:
            columns = strip.stop - strip.start
            return grid.scale.expand(columns, -1), grid.zero.expand(columns, -1)

        grids = [grid.widened(width) for grid in fixed]
        if group is None:
            return lambda X, strip: shared(grids[0], strip), grids
        if grids:
            scale, zero = (torch.stack([grid[part] for grid in grids]) for part in (0, 1))
            of_column = order // group
            return lambda X, strip: (scale[of_column[strip]], zero[of_column[strip]]), grids

        def fresh(X: Tensor, strip: slice) -> tuple[Tensor, Tensor]:
            j = strip.start
            if j % group == 0:
                updated = X[j : j + group].T.contiguous()
                grids.append(fit_grid(updated, self.quant).row().widened(width))
            return shared(grids[-1], strip)

        return fresh, grids


def _best_rows(
    tried: list[QuantizedWeight], W: Tensor, H: Tensor, C: Tensor | None
) -> QuantizedWeight:
    """Every row as the try has it whose outputs are nearest to the original's."""
    best = torch.stack([row_errors(Q, W, H, C) for Q in tried]).argmin(dim=0)
    rows = torch.arange(len(W), device=W.device)
    return QuantizedWeight(
        *(
            torch.stack(parts)[best, rows]
            for parts in zip(*(one.stored for one in tried), strict=True)
        )
    )


def round_strip(
    quant: WeightQuant,
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
    for j, x in enumerate(X.unbind()):
        x -= U[:j, j] @ E[:j]
        if P is not None:
            x += P[:j, j] @ X[:j]
        grid = Grid(scale[j], zero[j], quant)
        codes[j] = rounded = grid.codes(x)
        E[j] = (x - rounded.sub_(grid.zero).mul_(grid.scale)).div_(U[j, j])
    return X, codes, E
