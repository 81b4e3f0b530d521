"""How much each token counts, for Hessians that weigh tokens by it.

GPTQ counts an error at every token alike. To first order an error e in what a linear puts out costs
the loss gᵀe, g the loss's slope there, so GuidedQuant (arXiv 2505.07004) weighs H = E[‖g‖² x xᵀ] a
token. Here a token counts by ‖g‖: the same weights, whose few largest don't drown the others.

What o and down put out goes into the residual stream, whose readers divide it by its size: there a
token counts by 1/‖stream‖. Attention's sink has a stream so large that its inputs' energy would
drown all others, and slopes don't see that what reads it hardly moves.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from rotlib.models.families import Family
from rotlib.models.sound import check_has_slopes
from rotlib.models.walk import hooks, layer_inputs, run_layer
from rotlib.precision import coarse_products

# whose slopes count; an expert is given tokens of its own, which all count alike
BY_SLOPE = {"q": ("q", "k", "v"), "gate": ("gate", "up")}

Shares = dict[str, Float[Tensor, "windows length 1"]]
States = list[Float[Tensor, "1 length d"]]


def token_shares(
    family: Family, windows: Int[Tensor, "windows length"], slopes: bool
) -> list[Shares]:
    """For each layer and input how much every token counts there, as shares of their mean.

    At o's and down's by one over the size of the residual stream that they are added to, where
    nothing but norms reads it. With `slopes` also by the size of the loss's slope at what q, k and
    v, and gate and up, put out; the loss is that of the next token. A window goes through the model
    (and back), a layer at a time, so that only its states between layers are kept.
    """
    found = [{} for _ in family.layers]
    batches = layer_inputs(family, windows, at_a_time=1)
    pairs = zip(windows.split(1), batches, strict=True)
    for ids, (x, keywords) in tqdm(
        pairs, total=len(windows), desc="weighing tokens", unit="window"
    ):
        with coarse_products():
            states, of_layers = _streams(family, x, keywords)
            if slopes:
                for layer, sizes in _slopes(family, ids, states, keywords):
                    of_layers[layer] |= sizes
        for layer, sizes in enumerate(of_layers):
            for site, size in sizes.items():
                found[layer].setdefault(site, []).append(size)
    return [
        {site: _of_mean_one(torch.cat(sizes)) for site, sizes in layer.items()} for layer in found
    ]


def check_slopes(family: Family) -> None:
    """Raises ValueError for a model, or surroundings, without such slopes."""
    check_has_slopes(family.model)
    if family.model.dtype == torch.float16:
        raise ValueError(
            "loss_weighted needs slopes, many of which are too small for float16: load the model "
            "in float32 or bfloat16"
        )


def _of_mean_one(sizes: Tensor) -> Tensor:
    return sizes / sizes.mean().clamp(min=torch.finfo(sizes.dtype).tiny)


@torch.no_grad()
def _streams(family: Family, x: Tensor, keywords: dict) -> tuple[States, list[Shares]]:
    """(what every layer reads, and what the last puts out; one over the streams' sizes)"""
    states, of_layers = [x], []
    for index, layer in enumerate(family.layers):
        added_to = {}

        def keep(norm, args, added_to=added_to):
            added_to["o"] = args[0]

        watched = [(family.norms(index)["mlp_norm"], keep)] if family.has_R1 else []
        with family.on_device(layer), hooks(watched):
            states.append(run_layer(layer, states[-1], keywords, coarse=True))
        if family.has_R1 and "down" in family.linears(index):
            added_to["down"] = states[-1]
        of_layers.append({site: _one_over(stream) for site, stream in added_to.items()})
    return states, of_layers


def _one_over(stream: Float[Tensor, "... d"]) -> Float[Tensor, "... 1"]:
    size = stream.float().norm(dim=-1, keepdim=True)
    return 1 / size.clamp(min=torch.finfo(size.dtype).tiny ** 0.5)


def _slopes(
    family: Family, ids: Int[Tensor, "1 length"], states: States, keywords: dict
) -> Iterator[tuple[int, Shares]]:
    """(layer, the size of the loss's slope at what its readers put out), from the last layer."""
    slope = _slope_of_loss(family, states.pop(), ids)
    for index in reversed(range(len(family.layers))):
        linears = family.linears(index)
        put_out = {}

        def keep(module, args, output, put_out=put_out):
            put_out[module] = output

        sites = {site: names for site, names in BY_SLOPE.items() if site in linears}
        watched = ((linears[name], keep) for names in sites.values() for name in names)
        layer = family.layers[index]
        with family.on_device(layer), torch.enable_grad(), hooks(watched, after=True):
            x = states.pop().detach().requires_grad_()
            y = run_layer(layer, x, keywords, coarse=True)
            slope, *slopes = torch.autograd.grad(y, [x, *put_out.values()], slope)
        size = {
            linear: one.float().norm(dim=-1, keepdim=True)
            for linear, one in zip(put_out, slopes, strict=True)
        }
        yield (
            index,
            {
                site: torch.stack([size[linears[name]] for name in names]).norm(dim=0)
                for site, names in sites.items()
            },
        )


def _slope_of_loss(family: Family, x: Tensor, ids: Int[Tensor, "1 length"]) -> Tensor:
    """The slope of all next tokens' cross-entropy in what comes out of the last layer."""
    with family.on_device(family.final_norm, family.lm_head), torch.enable_grad():
        x = x.detach().requires_grad_()
        states = family.final_norm(x.to(family.device)) * family.head_scale
        logits = family.lm_head(states[0, :-1]).float()
        loss = cross_entropy(logits, ids[0, 1:].to(logits.device), reduction="sum")
        return torch.autograd.grad(loss, x)[0]
