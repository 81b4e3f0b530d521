"""Where the outliers are: in every quantized weight, and in what it reads.

Weights are measured as they would be quantized, an output channel at a time. Some text runs through
the model while hooks measure every linear's input, a token at a time, so nothing larger than one
activation is held. A histogram of all weights over their matrix's root mean square shows the tails.
"""

from collections.abc import Callable
from statistics import fmean

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rotlib.measure.weights import incoherence, kurtosis
from rotlib.models.families import READERS, Family
from rotlib.models.walk import hooks, run_decoder
from rotlib.rotations.rotation import placed_weights

WINDOWS = 2  # calibration windows that run through the model: kurtosis needs no more
HISTOGRAM_EDGES = [edge / 4 for edge in range(121)]  # |w| / rms from 0 to 30


@torch.no_grad()
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


@torch.no_grad()
def input_outliers(
    family: Family, calibration: Int[Tensor, "windows length"]
) -> dict[tuple[int, str], dict[str, float]]:
    """Kurtosis of every linear's input, token by token as its grid is, by layer and site.

    `input_kurtosis` is averaged over all tokens, `sink_kurtosis` over the first of every window,
    attention's sink.
    """
    seen: dict[tuple[int, str], list[tuple[float, float]]] = {}

    def watch(layer: int, sites: tuple[str, ...]) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            both = kurtosis(args[0].flatten(0, -2)), kurtosis(args[0][:, 0])
            for site in sites:  # they read the same input
                seen.setdefault((layer, site), []).append(both)

        return hook

    watched = (
        (family.linears(layer)[sites[0]], watch(layer, sites))
        for layer in range(len(family.layers))
        for sites in READERS
    )
    with hooks(watched):
        for ids in calibration:
            run_decoder(family, ids[None])
    names = ("input_kurtosis", "sink_kurtosis")
    return {
        key: dict(zip(names, map(fmean, zip(*values, strict=True)), strict=True))
        for key, values in seen.items()
    }


@torch.no_grad()
def weight_histogram(family: Family) -> Float[Tensor, " bins"]:
    """Counts of |w| / rms over all quantized weights in the bins of `HISTOGRAM_EDGES`.

    The last bin takes the rest.
    """
    bins, largest = len(HISTOGRAM_EDGES) - 1, HISTOGRAM_EDGES[-1]
    counts = torch.zeros(bins, dtype=torch.float64)
    for placed in placed_weights(family, quantized_only=True):
        w = placed.module.weight.float()
        scaled = (w.abs() / w.square().mean().sqrt()).clamp(max=largest)
        counts += torch.histc(scaled.cpu(), bins=bins, min=0, max=largest).double()
    return counts
