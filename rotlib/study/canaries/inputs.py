"""What canaries are computed on: made-up numbers, tokens, models and texts, the same everywhere."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rotlib.models.joined import open_joined
from rotlib.models.supported import adapt
from rotlib.rotations import drawn, rotation
from rotlib.rotations.rotation import Rotation

_device = torch.device("cpu")
WORDS = (  # of made-up texts
    *("river", "stone", "cloud", "lantern", "meadow"),
    *("harbour", "winter", "silver", "thunder", "garden"),
)


@contextmanager
def inputs_on(device: torch.device) -> Iterator[None]:
    """Make every canary's inputs on that device while open: the stage is computed there."""
    global _device
    before, _device = _device, device
    try:
        yield
    finally:
        _device = before


def here() -> torch.device:
    """Where inputs are made."""
    return _device


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian numbers from a stream that numpy has frozen."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).to(_device)


def token_windows(windows: int = 2, length: int = 12) -> Tensor:
    """Windows of token ids."""
    ids = np.random.RandomState(7).randint(0, 40, (windows, length))
    return torch.from_numpy(ids).to(_device)


def tiny(
    dtype: torch.dtype = torch.float64, qwen3: bool = False, experts: int = 0, **other: int
) -> PreTrainedModel:
    """Two layers with random norms; biases everywhere, norms on queries and keys, or experts."""
    shape = {
        "vocab_size": 40,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    } | other
    if qwen3:
        model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True))
    elif experts:
        model = MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=experts))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape, attention_bias=True, mlp_bias=True))
    model = model.to(_device, dtype).eval().requires_grad_(False)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        values = noise(*parameter.shape, seed=number)
        parameter.copy_(1 + 0.2 * values if "norm" in name else 0.2 * values)
    return open_joined(model)


def covariance(n: int, seed: int = 1) -> Tensor:
    """A positive definite matrix whose eigenvalues fall by a power law."""
    Q = torch.linalg.qr(noise(n, n, seed=seed)).Q
    return Q * torch.arange(1, n + 1, dtype=torch.float64, device=_device).pow(-1.0) @ Q.T


def profile(matrix: Tensor) -> Tensor:
    """A few sums that see every entry of a matrix and where it stands."""
    flat = matrix.detach().double().flatten()
    places = torch.arange(1, len(flat) + 1, dtype=torch.float64, device=flat.device)
    return torch.stack([flat.square().sum().sqrt(), *(flat @ (places * w).cos() for w in (0.4, 2))])


def with_scales(model: PreTrainedModel, seed: int = 3) -> Rotation:
    """A random rotation with R3, R4 and all of OSTQuant's scales."""
    turned = drawn.random_rotation(model, seed=seed, R3=True, R4=True)
    turned = turned.to(_device, torch.float64)
    shapes = rotation.scale_shapes(adapt(model))
    for number, (name, shape) in enumerate(shapes.items()):
        turned.scales[name] = 1 + 0.3 * noise(*shape, seed=number).abs()
    return turned
