"""Where learning starts, a checked model and a first rotation; how it ends, an orthogonal one."""

import torch
from transformers import PreTrainedModel

from rotlib.checks import whole_number, yes_or_no
from rotlib.models.families import Family
from rotlib.models.marks import is_quantized, is_rotated
from rotlib.models.sound import check_not_rounding, check_sound
from rotlib.models.supported import adapt, check_has_R1
from rotlib.rotations.drawn import random_hadamard, random_orthogonal, sampled, signed_hadamard
from rotlib.rotations.fuse import check_rotation
from rotlib.rotations.online import check_online
from rotlib.rotations.rotation import Rotation, as_blocks, as_matrix, check_sizes

DRIFT = 1e-4  # what float32 may add up to before the projection in float64


def original(model: PreTrainedModel, needs_R1: str = "") -> Family:
    """The family of a model that a rotation can be learned on.

    Raises ValueError for one that is rotated, quantized or being rounded, or holds no numbers; and
    where R1 doesn't fit, for a method that needs it, given by its name.
    """
    family = adapt(model)
    if needs_R1:
        check_has_R1(family, needs_R1)
    if is_rotated(model) or is_quantized(model):
        raise ValueError(
            "this model is already rotated or quantized: learn the rotation on the original"
        )
    check_not_rounding(model)
    check_sound(model)
    # in float32 the fourth powers of others vanish, or overflow
    check_sizes(family, 1e-6, 1e6, "a rotation can be learned of")
    return family


def starting_point(
    family: Family,
    seed: int,
    R3: bool = False,
    R4: bool = False,
    start: Rotation | None = None,
    local: bool = False,
) -> Rotation:
    """Where learning starts, in float32: `start`, or a random Hadamard rotation.

    Where no Hadamard matrix fits it is a random orthogonal one. R1 is a matrix, or where it is to
    stay `local` the blocks on its diagonal. Raises ValueError for a start that can't be one, or an
    online rotation that the model can't carry.
    """
    whole_number("seed", seed, 0)
    yes_or_no("local", local)
    check_online(family, Rotation(None, None, R3, R4).online)
    if start is None:
        try:
            start = sampled(family, seed, signed_hadamard, random_hadamard)
        except ValueError:  # no Hadamard matrix of this width, or of head_dim
            start = sampled(family, seed, random_orthogonal, random_orthogonal)
    elif (
        not isinstance(start, Rotation)
        or (start.R1 is None) == family.has_R1
        or start.R2 is None
        or start.scales
    ):
        raise ValueError(
            f"the start must be a Rotation with {'R1 and R2' if family.has_R1 else 'R2 alone'} and "
            "without scales, such as rl.hadamard_rotation(model)"
        )
    check_rotation(family, start)
    if start.online and (start.R3, start.R4) != (R3, R4):
        raise ValueError(
            f"the start has {' and '.join(start.online)} on: "
            f"learn with R3={start.R3} and R4={start.R4}, or start without"
        )
    if local:
        check_has_R1(family, "local")
    # copies: learning may move them in place
    there = {"device": family.device, "dtype": torch.float32, "copy": True}
    R1 = (as_blocks if local else as_matrix)(start.R1) if family.has_R1 else None
    R1 = None if R1 is None else R1.detach().to(**there)
    return Rotation(R1, start.R2.detach().to(**there), R3, R4)


def finished(rotation: Rotation) -> Rotation:
    """The nearest exactly orthogonal rotation to one learned in float32.

    Raises RuntimeError where it has drifted away.
    """
    if not (drift := rotation.orthogonality_error()) < DRIFT:
        raise RuntimeError(f"learning lost orthogonality: max|R Rᵀ − I| is {drift:.1e} in float32")
    return rotation.projected(rotation.R2.device)
