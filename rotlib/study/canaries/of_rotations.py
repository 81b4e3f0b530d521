"""Drawn rotations, fusing, online rotations."""

from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from rotlib.models import walk
from rotlib.models.supported import adapt
from rotlib.rotations import drawn, files, fuse, hadamard, online, rotation
from rotlib.rotations.rotation import Rotation, times
from rotlib.study.canaries.inputs import here, noise, profile, tiny, token_windows, with_scales
from rotlib.study.canaries.register import canary


@canary(
    "drawn rotations",
    drawn.hadamard_rotation,
    drawn.random_rotation,
    drawn.gsr_rotation,
    R1_orders=drawn.R1_ORDERS,
    largest_order=hadamard.LARGEST,
)
def _drawn_rotations() -> dict:
    model = tiny()
    named = {
        "random": drawn.random_rotation(model, seed=1),
        "hadamard": drawn.hadamard_rotation(model, seed=1),
        "GW": drawn.gsr_rotation(model, seed=1),
        "GSR": drawn.gsr_rotation(model, block=8),
        "LH signed": drawn.gsr_rotation(model, order="hadamard", block=4, signs=True, seed=1),
    }
    x = noise(2, 24)
    named = {name: turned.to(here(), torch.float64) for name, turned in named.items()}
    numbers = {name: times(x, turned.R1) for name, turned in named.items()}
    numbers |= {f"{name}, R2": profile(turned.R2) for name, turned in named.items()}
    for n in (1, 2, 16, 20, 28, 36, 60, 104):  # Sylvester, Paley I and II, prime powers, products
        numbers[f"order {n}"] = profile(hadamard.hadamard(n))
    for n in (8, 12):
        numbers[f"walsh {n}"] = profile(hadamard.walsh(n))
    return numbers | {"block sizes": hadamard.block_sizes(48)}


@canary("fusing", Rotation, orthogonality=fuse.ORTHOGONALITY_TOLERANCE, largest=fuse.LARGEST)
def _fusing() -> dict:
    numbers = {"sites": {name: list(site) for name, site in rotation.SITES.items()}}
    for qwen3 in (False, True):
        model = tiny(qwen3=qwen3)
        with walk.norms_in_model_dtype(model):
            before = model(token_windows()).logits
            fuse.fuse(model, with_scales(model))
            change = (model(token_windows()).logits - before).abs().max().item()
        numbers[f"exact, qwen3 {qwen3}"] = change < 1e-9
        for name, parameter in model.named_parameters():
            if ".0." not in name:
                numbers[f"{name}, qwen3 {qwen3}"] = profile(parameter)
    model = fuse.fuse(mixture := tiny(experts=4), with_scales(mixture))
    for name, module in model.model.layers[1].mlp.named_modules():
        if hasattr(module, "weight"):
            numbers[f"{name} of experts"] = profile(module.weight)
    with walk.norms_in_model_dtype(model):
        numbers["logits of experts"] = profile(model(token_windows()).logits)
    blocks = drawn.gsr_rotation(tiny(), block=8)
    learned = Rotation(rotation.as_blocks(blocks.R1) + 1e-8, None)
    numbers["projected"] = profile(learned.projected().R1)
    numbers["defect"] = learned.orthogonality_error() < 1e-6
    numbers["blocks as a matrix"] = profile(rotation.as_matrix(learned.R1))
    numbers["factors as a matrix"] = profile(rotation.as_matrix(blocks.R1))
    model = fuse.fuse(tiny(), learned)
    numbers["by blocks"] = profile(model.model.layers[0].self_attn.q_proj.weight)
    with TemporaryDirectory() as folder:
        file = files.save_rotation(
            Rotation(drawn.random_rotation(tiny()).R1, None), f"{folder}/R.bin"
        )
        numbers["of a file"] = profile(files.load_rotation(file, tiny()).R1)
    return numbers


@canary("online rotations", tolerance=1e-4)
def _online_rotations() -> dict:
    seen: dict[str, Tensor] = {}

    def keep(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for name, heads in {"query": query, "key": key, "value": value}.items():
            seen.setdefault(name, profile(heads))
        return query, key, value

    model = tiny(torch.float32)
    fuse.fuse(model, drawn.hadamard_rotation(model, R3=True, R4=True))
    down = model.model.layers[0].mlp.down_proj

    def keep_input(module: torch.nn.Module, args: tuple) -> None:
        seen.setdefault("down", profile(args[0]))

    with online.head_steps(adapt(model), keep), walk.hooks([(down, keep_input)]):
        model(token_windows())
    return seen | {"R4": profile(hadamard.apply_hadamard(noise(2, 40)))}
