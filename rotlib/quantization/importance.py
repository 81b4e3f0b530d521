"""How much the loss hangs on each token, for Hessians that weigh tokens by it.

GPTQ counts an error at every token alike. To first order an error e in what a linear puts out costs
the loss gᵀe, g the loss's slope there, so GuidedQuant (arXiv 2505.07004) weighs H = E[‖g‖² x xᵀ] a
token. Here a token counts by ‖g‖: the same weights, whose few largest don't drown the others.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from rotlib.models.families import Family
from rotlib.models.sound import check_has_slopes
from rotlib.models.walk import Batch, hooks, layer_inputs, run_layer

# what they read is normed: elsewhere tokens differ by their size already, and `token_cap` is there;
# an expert is given tokens of its own, which all count alike
WEIGHTED = {"q": ("q", "k", "v"), "gate": ("gate", "up")}

Slopes = dict[str, Float[Tensor, "windows length 1"]]


def loss_slopes(family: Family, windows: Int[Tensor, "windows length"]) -> list[Slopes]:
    """For each layer the size of the loss's slope at what q, k and v, and gate and up, put out.

    The loss is that of the next token, and sizes are shares of their mean. A window goes through
    the model and back, a layer at a time, so that only its states between layers are kept.
    """
    found = [{} for _ in family.layers]
    batches = layer_inputs(family, windows, at_a_time=1)
    for ids, batch in zip(windows.split(1), batches, strict=True):
        for layer, squares in _backwards(family, ids, batch):
            for site, square in squares.items():
                found[layer].setdefault(site, []).append(square.sqrt())
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


def _backwards(
    family: Family, ids: Int[Tensor, "1 length"], batch: Batch
) -> Iterator[tuple[int, Slopes]]:
    """(layer, squared slopes there), from the last layer to the first."""
    x, keywords = batch
    read = []
    for layer in family.layers:
        read.append(x)
        with family.on_device(layer), torch.no_grad():
            x = run_layer(layer, x, keywords)
    slope = _slope_of_loss(family, x, ids)
    for index in reversed(range(len(family.layers))):
        linears = family.linears(index)
        put_out = {}

        def keep(module, args, output, put_out=put_out):
            put_out[module] = output

        sites = {site: names for site, names in WEIGHTED.items() if site in linears}
        watched = ((linears[name], keep) for names in sites.values() for name in names)
        layer = family.layers[index]
        with family.on_device(layer), torch.enable_grad(), hooks(watched, after=True):
            x = read.pop().detach().requires_grad_()
            y = run_layer(layer, x, keywords)
            slope, *slopes = torch.autograd.grad(y, [x, *put_out.values()], slope)
        square = {
            linear: one.float().square().sum(-1, keepdim=True)
            for linear, one in zip(put_out, slopes, strict=True)
        }
        of_site = {site: [square[linears[name]] for name in sites[site]] for site in sites}
        yield index, {site: sum(squares) for site, squares in of_site.items()}


def _slope_of_loss(family: Family, x: Tensor, ids: Int[Tensor, "1 length"]) -> Tensor:
    """The slope of all next tokens' cross-entropy in what comes out of the last layer."""
    with family.on_device(family.final_norm, family.lm_head), torch.enable_grad():
        x = x.detach().requires_grad_()
        states = family.final_norm(x.to(family.device)) * family.head_scale
        logits = family.lm_head(states[0, :-1]).float()
        loss = cross_entropy(logits, ids[0, 1:].to(logits.device), reduction="sum")
        return torch.autograd.grad(loss, x)[0]
