"""What has been done to a model: rotated, quantized, or half of either. Its config remembers."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

from transformers import PreTrainedModel


def is_rotated(model: PreTrainedModel) -> bool:
    """True once a rotation has been fused; the config carries the mark through save and load.

    >>> import rotlib as rl
    >>> is_rotated(model), is_rotated(rl.fuse(model, rl.random_rotation(model)))
    (False, True)
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a transformers model is needed, not something of type {type(model).__name__}"
        )
    return bool(getattr(model.config, "rotlib_rotated", False))


def is_quantized(model: PreTrainedModel) -> bool:
    """True once the weights have been put on a grid; the config carries the mark."""
    return bool(getattr(model.config, "rotlib_quantized", False))


@contextmanager
def changing(model: PreTrainedModel, mark: str) -> Iterator[None]:
    """Mark a model while it is changed, in a config of its own: others may share that one.

    Left by an error it is neither the original nor done, which `adapt` refuses, saved and loaded
    as well.
    """
    shared, own = model.config, deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    setattr(own, mark, True)
    own.rotlib_unfinished = True
    yield
    del own.rotlib_unfinished


def online_of(model: PreTrainedModel) -> list[str]:
    """The online rotations that a model's config names; raises ValueError for anything else."""
    online = getattr(model.config, "rotlib_online", None) or []
    if not isinstance(online, list | tuple) or not all(name in ("R3", "R4") for name in online):
        raise ValueError(
            f"the config's rotlib_online must name R3 or R4, not {online!r}: it was changed by hand"
        )
    return online
