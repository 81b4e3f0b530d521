"""Quantized weights in a model: rounded to nearest (RTN), put back, and checked."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from rotlib.checks import FLOATS, shown
from rotlib.models.families import Family
from rotlib.models.marks import changing, is_quantized
from rotlib.models.sound import check_sound
from rotlib.models.supported import adapt
from rotlib.quantization.fp4 import E4M3, FP4, UNIT_SPAN
from rotlib.quantization.grids import GRIDS, QuantizedWeight, WeightQuant, round_to_nearest
from rotlib.rotations.rotation import check_sizes, placed_weights

# between a weight and what its codes stand for: rounding leaves 0.9, GPTAQ at two bits a row, far
# beyond use, 0.09 of the worst weight, and the codes of another weight are at 0
LEAST_COSINE = 0.05
# of a weight's sketch: rounding it to 16 bits moves it by 0.002
MOST_OFF = 0.01


@torch.no_grad()
def rtn(model: PreTrainedModel, quant: WeightQuant) -> dict[str, QuantizedWeight]:
    """Round every linear of every decoder layer to its nearest grid point, in place.

    Returns what was stored, by names such as "layers.0.q". Raises like `check_quantizable`.

    >>> weights = rtn(model, WeightQuant(bits=4))
    >>> weights["layers.1.down"].codes.shape == model.model.layers[1].mlp.down_proj.weight.shape
    True
    """
    family = adapt(model)
    check_quantizable(family, quant)
    with changing(model, "rotlib_quantized"):
        weights = {}
        for layer in tqdm(range(len(family.layers)), desc="RTN", unit="layer"):
            linears = family.linears(layer)
            for sites in family.readers:
                together = {f"layers.{layer}.{site}": linears[site] for site in sites}
                W = tall(together, family.device)
                weights |= set_together(together, round_to_nearest(W, quant))
    return weights


@torch.no_grad()
def restore(
    model: PreTrainedModel, weights: dict[str, QuantizedWeight], quant: WeightQuant | None = None
) -> PreTrainedModel:
    """Put quantized weights into a model prepared as theirs was, in place.

    They are what `rtn` returned, or `gptq` in its report's `weights`. Raises ValueError before
    touching anything where they don't fit, or aren't on the grid `quant` where it is given; where
    they are of other weights than these; where scales or zero points aren't finite; where the model
    is quantized already.

    >>> from copy import deepcopy
    >>> original = deepcopy(model)
    >>> weights = rtn(model, WeightQuant(bits=4))
    >>> torch.equal(restore(original, weights)(tokens).logits, model(tokens).logits)
    True
    """
    family = adapt(model)
    if is_quantized(model):
        raise ValueError(
            "this model is already quantized: load the original again and prepare it as theirs was"
        )
    if not isinstance(weights, dict):
        raise ValueError(
            "quantized weights come as a dictionary, such as report.weights, "
            f"not as a {type(weights).__name__}"
        )
    linears = {placed.name: placed.module for placed in placed_weights(family, quantized_only=True)}
    if missing := [name for name in linears if name not in weights]:
        raise ValueError(f"these quantized weights lack {missing[0]}: give those of a whole model")
    for name in linears.keys() | weights.keys():
        if name not in linears or not fits(weights.get(name), linears[name].weight):
            raise ValueError(
                f"these quantized weights belong to another model: {name} doesn't fit, or is no "
                "rl.QuantizedWeight"
            )
    if quant is not None and not isinstance(quant, WeightQuant):
        raise ValueError(f"quant must be a WeightQuant or None, not {shown(quant)}")
    for name, weight in weights.items():
        check_on_grid(name, weight, quant, model.dtype)
        check_alike(name, weight, linears[name].weight)
    with changing(model, "rotlib_quantized"):
        for name, (codes, *others) in weights.items():
            # whatever reads a checkpoint multiplies in 32 bits
            wide = (one if one is None or one.itemsize > 4 else one.float() for one in others)
            set_weight(linears[name], QuantizedWeight(codes, *wide))
    return model


def codes_of(model: PreTrainedModel) -> dict[str, QuantizedWeight]:
    """The codes of every quantized weight, by names such as "layers.0.q".

    Raises ValueError where one has none, or another weight by now than its codes stand for.
    """
    weights = {}
    for placed in placed_weights(adapt(model), quantized_only=True):
        weights[placed.name] = getattr(placed.module, "quantized", None)
        if not isinstance(weights[placed.name], QuantizedWeight):
            how = "quantize the model with rl.gptq or rl.rtn first, or export it as 'fused'"
            if is_quantized(model):
                how = "it was saved without them; load the original again and quantize it"
            raise ValueError(f"{placed.name} has no codes: {how}")
        check_on_grid(placed.name, weights[placed.name])
        if not _stands_for(weights[placed.name], placed.module.weight):
            raise ValueError(
                f"the weight of {placed.name} was changed since it was quantized, so its codes "
                "aren't its own: load the original again and quantize it"
            )
    return weights


def check_quantizable(family: Family, quant: WeightQuant) -> None:
    """Raises ValueError where a model's weights can't be quantized so.

    It is quantized already, the groups don't divide a width, or its weights aren't finite.
    """
    if not isinstance(quant, WeightQuant):
        raise ValueError(
            f"quant must be a WeightQuant such as WeightQuant(bits=4), not {shown(quant)}"
        )
    if is_quantized(family.model):
        raise ValueError(
            "this model is already quantized: load the original again and quantize it once"
        )
    for name, linear in family.linears(0).items():
        quant.check_width(linear.in_features, f"{name}_proj")
    check_sound(family.model)
    check_sizes(family, 1e-30, 1e30, "grids are computed with (float32)")
    if quant.grid == "nvfp4":
        _check_units(family)


def _check_units(family: Family) -> None:
    """Raises ValueError where weights that share NVFP4's unit are too far apart for its scales."""
    for layer in range(len(family.layers)):
        linears = family.linears(layer)
        for sites in family.readers:
            size = {site: linears[site].weight.abs().max().item() for site in sites}
            small, large = (choose(size, key=size.get) for choose in (min, max))
            if 0 < size[small] * UNIT_SPAN < size[large]:
                raise ValueError(
                    f"the weights of layers.{layer}.{small} are more than {UNIT_SPAN} times "
                    f"smaller than those of {large}, and nvfp4 has one unit for both: take mxfp4"
                )


def check_on_grid(
    name: str,
    weight: QuantizedWeight,
    quant: WeightQuant | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Raises ValueError for codes outside their grid, or a scale that no weight has.

    Without `quant` every code that their type holds is allowed. The weight is for a model of
    `dtype`.
    """
    codes, scale, zero = parts = weight.stored
    if not all(part.layout == torch.strided and not part.is_meta for part in parts):
        raise ValueError(f"the quantized weight {name} holds no values: it is meta or sparse")
    if not all(part.dtype in FLOATS for part in (scale, zero)):
        raise ValueError(
            f"the quantized weight {name} has scales of {scale.dtype} and zero points of "
            f"{zero.dtype}: both must be of a floating-point type"
        )
    whole = (
        (zero == zero.round()) & (zero >= 0) & (zero <= (255 if codes.dtype == torch.uint8 else 0))
    )
    floats = codes.dtype == E4M3
    # the farthest code that a type holds is 255 steps away
    largest = torch.finfo(dtype).max / 256
    usable = torch.isfinite(scale) & (scale != 0) & (scale.abs() < largest) & whole
    if codes.dtype not in (torch.int8, torch.uint8, E4M3) or not usable.all():
        raise ValueError(
            f"the quantized weight {name} is damaged: its codes must be int8, uint8 or 4-bit "
            f"floats, its scales not zero and within {dtype}, its zero points whole (0 where codes "
            "have a sign)"
        )
    values = codes.float() if floats else codes
    if floats and not _all_fp4(weight):
        raise ValueError(
            f"the quantized weight {name} is damaged: its codes must be 4-bit floats (E2M1) in "
            "groups of 16 or 32, its scales numbers that NVFP4 or MXFP4 has"
        )
    if quant is not None:
        low, high = quant.codes
        inside = low <= values.min() and values.max() <= high
        groups = codes.shape[1] // (quant.group_size or codes.shape[1])
        if codes.dtype != quant.storage or not inside or scale.shape[1] != groups:
            raise ValueError(
                f"the quantized weight {name} has codes outside {low} … {high}, or other groups: "
                "it is damaged, or of another grid"
            )


def check_alike(name: str, weight: QuantizedWeight, W: Tensor) -> None:
    """Raises ValueError for codes of another weight, such as of the same before it was rotated.

    Where codes were made by hand and have no sketch, their direction has to do.
    """
    if weight.sketch is None:
        dense = weight.dense().float().to(W.device)
        cosine = torch.cosine_similarity(dense.flatten(), W.detach().float().flatten(), dim=0)
        alike = cosine >= LEAST_COSINE or not W.any()
    else:
        sketch = sketch_of(W)
        off = (weight.sketch.to(sketch) - sketch).norm()
        alike = off <= MOST_OFF * sketch.norm()
    if not alike:
        raise ValueError(
            f"the quantized weight {name} was made from another weight than this model's: prepare "
            "the model as theirs was, the same weights under the same rotation"
        )


def fits(weight: QuantizedWeight | None, shape_of: Tensor) -> bool:
    """Whether these are a quantized weight's parts, of the shapes that this weight asks for."""
    if not isinstance(weight, QuantizedWeight):
        return False
    if not all(isinstance(part, Tensor) for part in weight.stored):
        return False
    if weight.codes.shape != shape_of.shape:
        return False
    if weight.scale.ndim != 2 or weight.scale.shape != weight.zero.shape:
        return False
    if weight.sketch is not None and weight.sketch.shape != (len(shape_of), 1):
        return False
    rows, groups = weight.scale.shape
    return rows == len(shape_of) and groups > 0 and shape_of.shape[1] % groups == 0


def grid_of(weight: QuantizedWeight) -> str:
    """Which of `GRIDS` a weight is on, by its codes' type and its groups."""
    group = weight.codes.shape[1] // weight.scale.shape[1]
    floats = weight.codes.dtype == E4M3
    return next((grid for grid, of in FP4.items() if floats and of == group), GRIDS[0])


def tall(linears: dict[str, nn.Linear], device: torch.device) -> Float[Tensor, "out in"]:
    """The weights that read one input as a single matrix, which has one unit."""
    return torch.cat([linear.weight.to(device).float() for linear in linears.values()])


def set_together(
    linears: dict[str, nn.Linear], weight: QuantizedWeight
) -> dict[str, QuantizedWeight]:
    """Give each its rows of the matrix that `tall` made of them, by their names."""
    sizes = [linear.out_features for linear in linears.values()]
    parts = zip(*(part.split(sizes) for part in weight.stored), strict=True)
    return {
        name: set_weight(linear, QuantizedWeight(*part))
        for (name, linear), part in zip(linears.items(), parts, strict=True)
    }


def set_weight(linear: nn.Linear, weight: QuantizedWeight) -> QuantizedWeight:
    """Give a linear the weight that its codes stand for, and the codes, kept on the host."""
    if weight.sketch is None:
        weight = weight._replace(sketch=sketch_of(linear.weight))
    linear.weight.copy_(weight.dense())
    linear.quantized = QuantizedWeight(*(part.cpu() for part in weight))
    return linear.quantized


def sketch_of(W: Float[Tensor, "out in"]) -> Float[Tensor, "out 1"]:
    """W times fixed signs: two weights differ by as much as their sketches, nearly.

    A matrix times random signs keeps its size on the average (Johnson and Lindenstrauss).
    """
    generator = torch.Generator("cpu").manual_seed(0)  # whatever the default device is
    bits = torch.randint(2, (W.shape[1], 1), generator=generator, device="cpu")
    return W.detach().float() @ (2.0 * bits - 1).to(W.device)


def _stands_for(codes: QuantizedWeight, weight: Tensor) -> bool:
    """Whether a weight is what its codes stand for, in its own dtype or rounded to 16 bits once."""
    dense, weight = codes.dense(), weight.to(codes.codes.device)
    return dense.shape == weight.shape and any(
        torch.equal(dense.to(dtype).to(weight.dtype), weight)
        for dtype in (weight.dtype, torch.bfloat16, torch.float16)
    )


def _all_fp4(weight: QuantizedWeight) -> bool:
    """Whether these are E2M1's floats, with scales of NVFP4 or MXFP4."""
    if (grid := grid_of(weight)) not in FP4 or not (weight.scale > 0).all():
        return False
    quant, codes = WeightQuant(grid=grid), weight.codes.float()
    scale = weight.scale / quant.unit_of(weight.scale)
    nearest = quant.nearest_(codes.clone()), quant.held(scale)
    return torch.equal(nearest[0], codes) and torch.equal(nearest[1], scale)
