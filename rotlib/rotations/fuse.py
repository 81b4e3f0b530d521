"""Fuse a rotation into a model, in place, without changing what the model computes.

Each weight is read once, lifted to float64, given the gain of the norm it reads, multiplied by its
rotations and stored back in the model's dtype. Norm gains become ones (or what a diagonal scale
leaves there), tied embeddings are untied first, biases turn with their output. With R1 and R2 the
result is an ordinary transformers model of the same family: it needs no code of ours and costs
nothing to run. R3 and R4, where they are on, are applied while the model runs (`online.py`); saved
and read by plain transformers such a model is wrong, since its R4 would be missing: read it with
`rl.load`.
"""

import torch
from transformers import PreTrainedModel

from rotlib.checks import floats, shown
from rotlib.models.families import Family
from rotlib.models.marks import changing, is_quantized, is_rotated
from rotlib.models.sound import check_not_hooked, check_not_rounding, check_sound
from rotlib.models.supported import adapt, check_has_R1
from rotlib.rotations.hadamard import BlockHadamard
from rotlib.rotations.online import attach, check_online
from rotlib.rotations.rotation import Rotation, norm_gains, placed_weights, scale_shapes

ORTHOGONALITY_TOLERANCE = 1e-6
LARGEST = 1e30  # of a rotated weight: sums of larger ones leave float32's range


@torch.no_grad()
def fuse(model: PreTrainedModel, rotation: Rotation) -> PreTrainedModel:
    """Fold the norms, untie the head and fuse R1, R2 and R4's inverse in float64, in place.

    Returns the model. Raises ValueError before touching anything for: a model that is already
    rotated, an architecture that can't be rotated, a rotation of the wrong shape or not orthogonal
    to 1e-6, an online rotation that the model can't carry, non-finite weights.

    >>> before = model(tokens).logits
    >>> rotated = fuse(model, Rotation(torch.eye(model.config.hidden_size).flip(0), None))
    >>> torch.allclose(rotated(tokens).logits, before, atol=1e-4)
    True
    """
    family = adapt(model)
    if not isinstance(rotation, Rotation):
        raise ValueError(
            "fuse needs a Rotation, such as rl.optrot(model) returns, "
            f"not a {type(rotation).__name__}"
        )
    if is_rotated(model):
        raise ValueError(
            "this model is already rotated: load the original again and fuse one rotation into it"
        )
    if is_quantized(model):
        raise ValueError(
            "this model is already quantized: load the original again, rotate it, then quantize it"
        )
    check_not_rounding(model)
    check_rotation(family, rotation)
    check_online(family, rotation.online)
    check_sound(model)
    check_not_hooked(model)
    told = rotation.told()
    rotation = rotation.projected(family.device)
    _check_range(family, rotation)
    with changing(model, "rotlib_rotated"):
        family.config.rotation = told
        if family.has_R1:
            family.untie()
        for placed in placed_weights(family):
            for name, value in placed.rotated(rotation, family.device):
                getattr(placed.module, name).copy_(value)
        for layer in range(len(family.layers)):
            for norm, gain in norm_gains(family, rotation, layer):
                norm.weight.copy_(gain)
        if family.has_R1:
            family.final_norm.weight.fill_(1.0)
        attach(family, rotation.online)
    return model


def _check_range(family: Family, rotation: Rotation) -> None:
    """Raises ValueError where a rotated weight is beyond the model's dtype, or sums of it are.

    A rotation can make that of a float16 weight, and a norm's gain of any. A pass of its own tells
    before any weight is changed, where the largest numbers don't rule it out.
    """
    largest = min(torch.finfo(family.model.dtype).max, LARGEST)
    ends = (end for parameter in family.model.parameters() for end in parameter.aminmax())
    size = max(abs(end.item()) for end in ends)
    scales = max((scale.abs().max().item() for scale in rotation.scales.values()), default=1.0)
    if (size + 1) ** 2 * scales**2 * max(family.width, family.inner_width) < largest:
        return
    for placed in placed_weights(family):
        for name, value in placed.rotated(rotation, family.device):
            if not value.abs().max() <= largest:
                raise ValueError(
                    f"the rotated {name} of {placed.name} is beyond {family.model.dtype}: "
                    "load the model with a dtype that has room for it"
                )


def check_rotation(family: Family, rotation: Rotation) -> None:
    """Raises ValueError for a rotation that doesn't fit the model, or isn't one."""
    expected = {
        "R1": (family.width, family.width),
        "R2": (len(family.layers), family.kv_heads, family.head_dim, family.head_dim),
    }
    if rotation.R1 is not None:
        check_has_R1(family, "this rotation")
    for name, shape in expected.items():
        R = getattr(rotation, name)
        if R is None:
            continue
        if name == "R1" and isinstance(R, BlockHadamard):
            found = (R.n, R.n)
        elif not isinstance(R, torch.Tensor) or not R.is_floating_point():
            found = R.dtype if isinstance(R, torch.Tensor) else f"a {type(R).__name__}"
            raise ValueError(f"{name} must be a real floating-point tensor or None, not {found}")
        else:
            floats(name, R)
            blocks, *square = R.shape if name == "R1" and R.ndim == 3 else (1, *R.shape)
            found = tuple(blocks * size for size in square)
        if found != shape:
            raise ValueError(f"{name} has shape {found}, but this model needs {shape}")
    if not isinstance(rotation.history, list | tuple) or not all(
        isinstance(value, int | float) for value in rotation.history
    ):
        raise ValueError(f"history must list objectives as numbers, not {shown(rotation.history)}")
    allowed = scale_shapes(family)
    if not isinstance(rotation.scales, dict):
        raise ValueError(f"scales must be a dictionary of tensors, not {shown(rotation.scales)}")
    for name, scale in rotation.scales.items():
        dense = isinstance(scale, torch.Tensor) and scale.layout == torch.strided
        if not dense or not scale.is_floating_point():
            raise ValueError(f"the scale {name!r} must be a floating-point tensor")
        if name not in allowed:
            raise ValueError(f"unknown scale {name!r}: a rotation may carry {', '.join(allowed)}")
        if tuple(scale.shape) != allowed[name]:
            raise ValueError(
                f"the scale {name!r} has shape {tuple(scale.shape)}, "
                f"but this model needs {allowed[name]}"
            )
        if not ((scale > 1e-6) & (scale < 1e6)).all():
            raise ValueError(f"the scale {name!r} must lie between 1e-6 and 1e6 everywhere")
    check_orthogonal(rotation)


def check_orthogonal(rotation: Rotation) -> None:
    """Raises ValueError for matrices that aren't orthogonal."""
    error = rotation.orthogonality_error()
    if not error < ORTHOGONALITY_TOLERANCE:
        raise ValueError(
            f"the rotation isn't orthogonal: max|R Rᵀ − I| is {error:.1e}, "
            f"it must be below {ORTHOGONALITY_TOLERANCE:.0e}"
        )
