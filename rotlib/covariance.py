"""What the weights read: H = E[x xᵀ] of every input, and the factor of H that GPTQ's error is made of.

A model is walked a layer at a time, so that only one layer's inputs and Hessians exist at once. With H = M Mᵀ, M upper
triangular, GPTQ (= LDLQ; QuIP, arXiv 2307.13304, Theorem 6) pays for column j by D_j = M_jj², the part of x_j's variance that
the columns still to come can't explain. A rotation turns H into Rᵀ H R: it is collected once, on the folded un-rotated model,
and rotated analytically. tr(D) has a closed slope: D_j = min vᵀ H v over v with v_j = 1 and v_i = 0 for i < j, so by the
envelope theorem ∂tr(D)/∂H = Σ_j v_j v_jᵀ = Vᵀ V, V the inverse of M's unit-triangular part; det(Rᵀ H R) = det(H), so the product
of the pivots stays and tr(D) ≥ n·det(H)^{1/n}.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from accelerate.utils import send_to_device
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotlib.checks import token_ids
from rotlib.families import Family, adapt

DAMPING = 0.01  # of the mean of H's diagonal, which no rotation changes
_LADDER = (1, 10, 100)  # factors on the damping, tried until the Cholesky factorisation succeeds
_BLOCK = 384
BATCH_TOKENS = 16384  # tokens that go through a layer at a time


class Stop(Exception):
    """Ends a forward pass once its inputs have been seen."""


class Hessian:
    """H = E[x xᵀ] over the inputs seen so far, in float32; only the lower triangle is summed, block by block."""

    def __init__(self):
        self._sum, self._tokens = None, 0

    def add(self, x: Float[Tensor, "... n"]) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        n = x.shape[1]
        if self._sum is None:
            self._sum = torch.zeros(n, n, device=x.device)
        for c in range(0, n, _BLOCK):
            self._sum[c:, c : c + _BLOCK].addmm_(x[:, c:].T, x[:, c : c + _BLOCK])
        self._tokens += len(x)

    def take(self) -> Float[Tensor, "n n"]:
        """The Hessian of what was seen; the next starts from nothing."""
        lower = self._sum.tril()
        H = (lower + lower.tril(-1).T) / self._tokens
        self.__init__()
        return H


@torch.no_grad()
def hessians(model: PreTrainedModel, calibration: Int[Tensor, "windows length"]) -> Iterator[dict[str, Float[Tensor, "n n"]]]:
    """For each layer in turn, H of what q (k and v), o, gate (and up) and down read, where the model computes.

    The model is the original: it runs as it is, and the norms' gains are left out of H as folding leaves them out. Raises
    ValueError for windows that it can't take.
    """
    family = adapt(model)
    token_ids("calibration", calibration, 2, model)
    batches = layer_inputs(family, calibration)
    for layer in range(len(family.layers)):
        sums = {site: Hessian() for site in ("q", "o", "gate", "down")}
        norms, linears = family.norms(layer), family.linears(layer)
        readers = {"q": norms["attention_norm"], "o": linears["o"], "gate": norms["mlp_norm"], "down": linears["down"]}
        handles = [module.register_forward_pre_hook(_sum_into(sums[site])) for site, module in readers.items()]
        try:
            batches = walk_layer(family, layer, batches)
        finally:
            for handle in handles:
                handle.remove()
        yield {site: hessian.take() for site, hessian in sums.items()}


def _sum_into(hessian: Hessian) -> Callable:
    def hook(module: nn.Module, args: tuple) -> None:
        x = args[0].float()
        if hasattr(module, "variance_epsilon"):  # a norm: what it puts out before its gain
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
        hessian.add(x)

    return hook


def factorise(H: Float[Tensor, "n n"], damping: float = DAMPING) -> tuple[Float[Tensor, "n n"] | None, float]:
    """(M upper triangular with M Mᵀ = H + damping · mean(diag H) · I, the damping it took): one Cholesky read backwards.

    M is None where even the last rung of the ladder of dampings fails.
    """
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    for factor in _LADDER:
        L, info = torch.linalg.cholesky_ex((H + damping * factor * H.diagonal().mean() * eye).flip(0, 1))
        if info == 0 and torch.isfinite(L).all():
            return L.flip(0, 1), damping * factor
    return None, damping * _LADDER[-1]


def damped(H: Float[Tensor, "n n"], name: str, damping: float = DAMPING) -> Float[Tensor, "n n"]:
    """H with the damping that makes it positive definite; raises ValueError naming what reads it where none does."""
    M, damping = factorise(H.double(), damping)
    if M is None:
        raise ValueError(
            f"the inputs of {name} have no positive definite covariance, even damped by {damping:g}: give more or other tokens"
        )
    return H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)


def pivots(H: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n"]:
    """D of H = (U + I) D (U + I)ᵀ, for a positive definite H."""
    return torch.linalg.cholesky(H.flip(-2, -1)).diagonal(dim1=-2, dim2=-1).flip(-1).square()


def pivots_and_slope(H: Float[Tensor, "*batch n n"]) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch n n"]]:
    """(tr(D), ∂tr(D)/∂H) of positive definite matrices, in closed form."""
    M = torch.linalg.cholesky(H.flip(-2, -1)).flip(-2, -1)
    m = M.diagonal(dim1=-2, dim2=-1)
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    V = m.unsqueeze(-1) * torch.linalg.solve_triangular(M, eye.expand_as(M), upper=True)
    return m.square().sum(-1), V.mT @ V


def layer_inputs(family: Family, windows: Int[Tensor, "windows length"], at_a_time: int | None = None) -> list[tuple[Tensor, dict]]:
    """What the first decoder layer is called with, batch by batch: hidden states (kept on the host) and keywords.

    A batch has `at_a_time` windows, or as many as make up `BATCH_TOKENS`. Raises ValueError for windows
    that need more than one attention mask.
    """
    _check_masks(family.model, windows.shape[1])
    batches = []

    def catch(layer, args, kwargs):
        batches.append((args[0].cpu(), kwargs))
        raise Stop

    handle = family.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    device = family.embedding.weight.device
    try:
        for ids in windows.split(at_a_time or max(1, BATCH_TOKENS // windows.shape[1])):
            with suppress(Stop):
                family.decoder(input_ids=ids.to(device), use_cache=False)
    finally:
        handle.remove()
    return batches


def walk_layer(family: Family, layer: int, batches: list[tuple[Tensor, dict]]) -> list[tuple[Tensor, dict]]:
    """What the next layer is called with."""
    with family.on_device(family.layers[layer]):
        return [(run_layer(family.layers[layer], *batch), batch[1]) for batch in batches]


def run_layer(layer: nn.Module, x: Tensor, kwargs: dict) -> Tensor:
    """A decoder layer's output hidden states, kept on the host between layers."""
    device = next(layer.parameters()).device
    out = layer(x.to(device), **send_to_device(kwargs, device))
    return (out[0] if isinstance(out, tuple) else out).cpu()


def _check_masks(model: PreTrainedModel, length: int) -> None:
    """Every layer is run with the first one's attention mask, so all must share it."""
    kinds = set(getattr(model.config, "layer_types", None) or ())
    if len(kinds) > 1 and length > (model.config.sliding_window or length):
        raise ValueError(
            f"this model mixes {' and '.join(sorted(kinds))} layers: use windows of at most its "
            f"{model.config.sliding_window} tokens of sliding window, not {length}"
        )
