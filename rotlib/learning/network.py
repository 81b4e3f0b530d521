"""The fake-quantized network as a function of its rotation.

SpinQuant and OSTQuant learn through it. A student, a copy of the decoder layers, holds the rotated
weights as its quantizer rounds them; gradients pass every rounding straight through, and no scale
of a grid is differentiated (SpinQuant, arXiv 2405.16406). The weights are rotated once a step for
all of its windows, and the gradient that has gathered in them is carried to R1, R2 and the scales
once a step, a layer at a time, so no graph of the whole model's rotation exists. Embedding and head
are neither copied nor rounded: the stream is turned behind the one and turned back before the
other.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from math import cos, isfinite, pi
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from rotlib.checks import all_finite, one_of, positive, token_ids, whole_number
from rotlib.learning.start import finished, original, starting_point
from rotlib.models.families import Family
from rotlib.models.sound import check_has_slopes, check_not_hooked
from rotlib.models.supported import adapt, check_no_experts
from rotlib.models.walk import NOT_FINITE, hooks
from rotlib.precision import coarse_products, exact_products
from rotlib.quantization.activations import (
    ActivationQuant,
    check_activations,
    quantized_activations,
)
from rotlib.quantization.fp4 import FP4
from rotlib.quantization.grids import WeightQuant, fit_grid, grid_at
from rotlib.quantization.quantized import check_quantizable
from rotlib.rotations.online import attach
from rotlib.rotations.rotation import Rotation, norm_gains, placed_in_layer, times


class Preset(NamedTuple):
    """How long to learn, and how fast."""

    steps: int
    batch: int  # windows a step
    lr: float  # of the first step; a cosine takes it to zero
    checkpointing: bool  # are layers run again going back?


# logits that exist at a time, beyond those of one window: a processor gains nothing by more
_LOGITS = {"cuda": 2**29}
# "paper": the authors' settings; "laptop": what 2 CPU cores do in minutes
PRESETS = ("paper", "laptop")


class LearningFailed(RuntimeError):
    """The loss stopped being finite; `rotation` is the last one whose loss was, or None.

    >>> import rotlib as rl
    >>> try:
    ...     rotation = rl.spinquant(model, tokens, quant=WeightQuant(bits=3), steps=2)
    ... except LearningFailed as failure:
    ...     rotation = failure.rotation
    """

    def __init__(self, message: str, rotation: Rotation | None):
        super().__init__(message)
        self.rotation = rotation

    def __reduce__(self):  # a pool of processes sends it as a pickle
        return type(self), (str(self), self.rotation)


@runtime_checkable
class Optimizer(Protocol):
    """A rotation of leaf tensors, and the step that moves them along their gradients."""

    rotation: Rotation

    def step(self, anneal: float) -> None: ...


class Student:
    """A copy of a model whose layers are shown one rotation after another."""

    def __init__(
        self, family: Family, quant: WeightQuant | None, online: list[str], checkpointing: bool
    ):
        model = family.model
        if family.device != model.device:
            raise ValueError(
                f"learning through the network needs the whole model on {family.device}, where "
                "it doesn't fit: take a bigger device, or a rotation learned without it, such as "
                "rl.optrot(model)"
            )
        if quant is not None and quant.grid in FP4:
            raise ValueError(f"rotations are learned through integer grids, not {quant.grid}")
        self._original = family
        shared = [module.weight for module in (self._original.embedding, self._original.lm_head)]
        self.model = deepcopy(model, {id(weight): weight for weight in shared})
        for parameter in self.model.parameters():
            if all(parameter is not weight for weight in shared):
                parameter.requires_grad_(False)
        self._family = adapt(self.model)
        self._family.final_norm.weight.fill_(1.0)
        self._quant = quant
        self._clip: dict[nn.Module, Tensor] = {}
        attach(self._family, online)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            for layer in self._family.layers:  # checkpointing asks for it; what's inside evaluates
                layer.training = True

    @torch.no_grad()
    def show(self, rotation: Rotation) -> None:
        """Put the rotated and rounded weights into the layers."""
        for layer in range(len(self._family.layers)):
            for module, name, value in self._rotated(rotation, layer):
                parameter = getattr(module, name)
                shown = self._rounded(module, value) if value.ndim == 2 else value
                parameter.requires_grad_().copy_(shown)
                parameter.grad = None

    def carry_back(self, rotation: Rotation) -> None:
        """Add the gradients that gathered in the layers to those of the rotation's tensors."""
        for layer in range(len(self._family.layers)):
            met = [
                (value, getattr(module, name).grad)
                for module, name, value in self._rotated(rotation, layer)
                if value.requires_grad
            ]
            torch.autograd.backward([value for value, _ in met], [gradient for _, gradient in met])

    def logits(
        self, ids: Int[Tensor, "*windows length"], rotation: Rotation
    ) -> Float[Tensor, "*windows length-1 vocabulary"]:
        """Of every position that has a next token."""
        embedding, head = (
            module.weight.detach() for module in (self._original.embedding, self._original.lm_head)
        )
        windows = ids.reshape(-1, ids.shape[-1]).to(embedding.device)
        x = times(F.embedding(windows, embedding), rotation.R1)
        hidden = self._family.decoder(inputs_embeds=x, use_cache=False).last_hidden_state[:, :-1]
        gain = self._original.final_norm.weight.detach() * self._original.head_scale
        logits = F.linear(times(hidden, rotation.R1.mT) * gain, head, self._original.lm_head.bias)
        return logits.view(*ids.shape[:-1], *logits.shape[1:])

    def not_finite(self, ids: Int[Tensor, "*windows length"], rotation: Rotation) -> str:
        """The first module whose weight, or else whose output, holds a NaN or an infinity."""
        modules = [
            (f"layers.{layer}.{name}", linear)
            for layer in range(len(self._family.layers))
            for name, linear in self._family.linears(layer).items()
        ]
        found = [name for name, linear in modules if not all_finite(linear.weight)]

        def watch(name: str) -> Callable:
            return lambda module, args, output: (
                None if torch.isfinite(output).all() else found.append(name)
            )

        watched = ((linear, watch(name)) for name, linear in modules)
        with torch.no_grad(), hooks(watched, after=True):
            self.logits(ids, rotation)
        return found[0] if found else "lm_head"

    def _rotated(self, rotation: Rotation, layer: int) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """(module of the student, parameter, its value under the rotation) of one layer."""
        twins = self._family.linears(layer)
        for placed in placed_in_layer(self._original, layer):
            for name, value in placed.rotated(rotation):
                yield twins[placed.site], name, value
        both = zip(
            norm_gains(self._family, rotation, layer),
            norm_gains(self._original, rotation, layer),
            strict=True,
        )
        for (twin, _), (_, gain) in both:
            yield twin, "weight", gain

    def _rounded(self, linear: nn.Module, W: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W on its grid.

        What clip search finds for the first rotation serves all, as a share of the rows' largest.
        """
        if self._quant is None:
            return W
        rows = W.reshape(-1, self._quant.group_size or W.shape[1])
        if linear not in self._clip:
            unclipped = grid_at(rows, self._quant, 1.0).scale
            self._clip[linear] = fit_grid(rows, self._quant).scale / unclipped
        return grid_at(rows, self._quant, self._clip[linear]).round(rows).view_as(W)


@exact_products()
def learn_through(
    student: Student,
    optimizer: Optimizer,
    calibration: Int[Tensor, "windows length"],
    activations: ActivationQuant,
    loss: Callable[[Float[Tensor, "windows length-1 vocabulary"], list[int]], Tensor],
    preset: Preset,
    seed: int,
) -> Rotation:
    """Descend `loss(logits, the windows' numbers)` over batches of windows, all in turn.

    A GPU is given as many windows of a batch at once as it has room for logits. `history` holds the
    mean loss of every step's windows. Raises LearningFailed, naming step and module, where it isn't
    finite.
    """
    generator = torch.Generator().manual_seed(seed)
    order, history, good = [], [], None
    logits = student.model.config.vocab_size * calibration.shape[1]
    at_once = windows_at_once(student.model.device.type, logits)
    with torch.enable_grad(), quantized_activations(student.model, activations):
        for step in tqdm(range(preset.steps), desc="learning", unit="step"):
            if len(order) < preset.batch:
                mixed = torch.randperm(len(calibration), generator=generator, device="cpu")
                order += mixed.tolist()
            batch, order = order[: preset.batch], order[preset.batch :]
            rotation = optimizer.rotation
            with coarse_products():
                student.show(rotation)
                history.append(0.0)
                for begin in range(0, len(batch), at_once):
                    numbers = batch[begin : begin + at_once]
                    windows = calibration[numbers]
                    value = loss(student.logits(windows, rotation), numbers)
                    value = value * len(numbers) / len(batch)
                    history[-1] += value.item()
                    if not isfinite(history[-1]):
                        where = student.not_finite(windows, rotation)
                        what = f"the loss is {history[-1]} at step {step}, first in {where}"
                        raise _failure(what, preset, good)
                    value.backward()
                student.carry_back(rotation)
            leaves = (rotation.R1, rotation.R2, *rotation.scales.values())
            slopes = [leaf.grad for leaf in leaves if leaf.grad is not None]
            if not all(map(all_finite, slopes)):
                raise _failure(f"the gradient is no number at step {step}", preset, good)
            good = _kept(rotation, history)
            optimizer.step(0.5 * (1 + cos(pi * step / preset.steps)))
    return finished(_kept(optimizer.rotation, history)).to("cpu", torch.float64)


def windows_at_once(device: str, logits: int) -> int:
    """How many windows, each of so many logits, a kind of device is given."""
    return max(1, _LOGITS.get(device, 0) // logits)


def _failure(what: str, preset: Preset, good: Rotation | None) -> LearningFailed:
    if good is None:  # nothing has moved yet
        return LearningFailed(f"{what}, where learning starts: {NOT_FINITE}", None)
    return LearningFailed(f"{what}: learn with a lower rate than {preset.lr:g}", good.projected())


def _kept(rotation: Rotation, history: list[float]) -> Rotation:
    """A copy that later steps don't move."""
    return replace(
        rotation,
        R1=rotation.R1.detach().clone(),
        R2=rotation.R2.detach().clone(),
        history=list(history),
        scales={name: scale.detach().clone() for name, scale in rotation.scales.items()},
    )


def check_learnable(model: PreTrainedModel) -> None:
    """Raises ValueError for a model of another dtype than float32, or without slopes of its own."""
    if not isinstance(model, PreTrainedModel):
        return  # which `adapt` says better
    check_has_slopes(model)
    if model.dtype != torch.float32:
        raise ValueError(
            f"learning through the network needs a float32 model, not {model.dtype}: "
            "load it with dtype=torch.float32"
        )


def check_rounds(family: Family, quant: WeightQuant | None, activations: ActivationQuant) -> None:
    """Raises ValueError where nothing is rounded, or the model can't be rounded so."""
    check_activations(family, activations)
    if quant is not None:
        check_quantizable(family, quant)
    elif not activations.rounds:
        raise ValueError(
            "nothing is rounded, so there is nothing to learn from: "
            "give a WeightQuant, or activations below 16 bits"
        )


def chosen(presets: dict[str, Preset], preset: str, steps: int | None, lr: float | None) -> Preset:
    """A preset with its steps and rate replaced where they are given."""
    one_of("preset", preset, presets)
    given = {name: value for name, value in {"steps": steps, "lr": lr}.items() if value is not None}
    return presets[preset]._replace(**given)


def prepare(
    model: PreTrainedModel,
    calibration: Int[Tensor, "windows length"],
    quant: WeightQuant | None,
    activations: ActivationQuant,
    preset: Preset,
    seed: int,
    R3: bool,
    R4: bool,
    start: Rotation | None,
    local: bool,
) -> tuple[Family, Rotation]:
    """The checked model and the start of learning; raises ValueError for what can't be done."""
    token_ids("calibration", calibration, 2, model)
    whole_number("steps", preset.steps, 1)
    positive("lr", preset.lr)
    check_learnable(model)
    family = original(model, needs_R1="learning through the network")
    check_no_experts(family, "learning through the network")
    check_not_hooked(model)
    check_rounds(family, quant, activations)
    if len(calibration) < preset.batch:
        raise ValueError(
            f"{len(calibration)} calibration windows are too few for batches of {preset.batch}"
        )
    return family, starting_point(family, seed, R3, R4, start, local)
