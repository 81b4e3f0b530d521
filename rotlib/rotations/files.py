"""Rotations as files, laid out as SpinQuant's code writes and reads them.

One file of torch's holds ``R1`` and, for every layer, ``model.layers.N.self_attn.R2``: a matrix of
the width of the residual stream, and one of a head's width for all heads of the layer
(github.com/facebookresearch/SpinQuant). They are applied as here: readers become W R, writers Rᵀ W.
"""

from contextlib import suppress
from errno import EINVAL
from pathlib import Path
from stat import S_ISREG

import torch
from transformers import PreTrainedModel

from rotlib.checks import shown
from rotlib.disk import check_writable, write_atomically
from rotlib.models.supported import adapt
from rotlib.rotations.fuse import check_orthogonal, check_rotation
from rotlib.rotations.rotation import Rotation, as_matrix

_R2 = "model.layers.{}.self_attn.R2"


def save_rotation(rotation: Rotation, file: str | Path) -> Path:
    """Write R1 and R2 as SpinQuant's code reads them, over a rotation's file of that name.

    Returns the file. Raises ValueError for what such a file can't hold: scales, online rotations,
    and an R2 that differs between the heads of a layer, as OptRot's does; where there is no R1; and
    where another file has that name.

    >>> rotation = Rotation(torch.eye(48), torch.eye(8).expand(2, 2, 8, 8))
    >>> sorted(torch.load(save_rotation(rotation, folder / "R.bin"), weights_only=True))
    ['R1', 'model.layers.0.self_attn.R2', 'model.layers.1.self_attn.R2']
    """
    if not isinstance(rotation, Rotation):
        raise ValueError(f"save_rotation takes a Rotation, not a {type(rotation).__name__}")
    if rotation.scales or rotation.online:
        beside = ", ".join([*rotation.scales, *rotation.online])
        raise ValueError(
            f"SpinQuant's file holds R1 and R2, and this rotation has {beside} as well"
        )
    path = _path(file)
    if path.exists() and not (path.stat().st_size and _is_rotations(_held(path))):
        raise ValueError(f"{path} is there, and holds no rotation: name another file")
    check_writable(path.parent, "name another file")
    check_orthogonal(rotation)
    if rotation.R1 is None:
        raise ValueError("SpinQuant's file holds R1, and this rotation has none")
    held = {"R1": as_matrix(rotation.R1).detach().double().cpu()}
    R2 = () if rotation.R2 is None else rotation.R2.detach().double().cpu()
    for layer, heads in enumerate(R2):
        if not torch.equal(heads, heads[:1].expand_as(heads)):
            raise ValueError(
                "SpinQuant's file holds one R2 a layer, and this rotation has another for each "
                "head: fuse it and export the model"
            )
        held[_R2.format(layer)] = heads[0].clone()
    write_atomically(path, lambda scratch: torch.save(held, scratch))
    return path


def _path(file: object) -> Path:
    """Raises ValueError for what no file can be named, and for a folder or a pipe."""
    if not isinstance(file, str | Path) or not Path(file).name:
        raise ValueError(f"a rotation is kept in a file with a name, not in {shown(file)}")
    try:
        path = Path(file).expanduser()
        str(path).encode()
        with suppress(FileNotFoundError):
            if not S_ISREG(path.stat().st_mode):
                raise ValueError("it is a folder or a pipe")
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{shown(file)} is no place for a rotation ({error})") from error
    return path


def _held(path: Path) -> dict:
    """The tensors of a file; raises ValueError for another one."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        seen = error.strerror if error.errno != EINVAL else None  # torch seeks before the beginning
        reason = seen or "it is damaged or cut short"
        raise ValueError(f"{path} isn't a file of tensors: {reason}") from error
    except Exception as error:  # whatever bytes make torch raise
        raise ValueError(f"{path} isn't a file of tensors as torch.save writes them") from error
    return held if isinstance(held, dict) else {}


def _is_rotations(held: dict) -> bool:
    """Whether a file holds R1, layers' R2 and nothing else."""
    of_layers = [name for name in held if name != "R1"]
    known = {_R2.format(layer) for layer in range(len(of_layers))}
    return isinstance(held.get("R1"), torch.Tensor) and {*of_layers} == known


def load_rotation(file: str | Path, model: PreTrainedModel) -> Rotation:
    """The rotation of such a file, for this model; `fuse` takes it.

    Raises ValueError, naming the file, where it holds something else, or what doesn't fit the model
    or isn't orthogonal.

    >>> rotation = Rotation(torch.eye(48), None)
    >>> load_rotation(save_rotation(rotation, folder / "R.bin"), model).R1.shape
    torch.Size([48, 48])
    """
    family = adapt(model)
    layers = len(family.layers)
    path = _path(file)
    held = _held(path)
    known = {"R1", *map(_R2.format, range(layers))}
    if not held or not held.keys() <= known:
        raise ValueError(
            f"{file} must hold R1 and {_R2.format(0)} to {layers - 1}, as SpinQuant's code "
            "writes them"
        )
    if any(
        R is None or getattr(R, "layout", torch.strided) != torch.strided for R in held.values()
    ):
        raise ValueError(f"{file} must hold dense tensors")
    held = {name: R.detach() if isinstance(R, torch.Tensor) else R for name, R in held.items()}
    R2 = [held[name] for name in map(_R2.format, range(layers)) if name in held]
    if len(R2) not in (0, layers):
        raise ValueError(f"{file} holds R2 of {len(R2)} layers, and this model has {layers}")
    shape = (family.head_dim, family.head_dim)
    if not all(isinstance(R, torch.Tensor) and R.shape == shape for R in R2):
        raise ValueError(f"{file} must hold R2 of {shape[0]} x {shape[1]}, a head of this model")
    heads = torch.stack(R2).unsqueeze(1).repeat(1, family.kv_heads, 1, 1) if R2 else None
    rotation = Rotation(held.get("R1"), heads)
    try:
        check_rotation(family, rotation)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return rotation
