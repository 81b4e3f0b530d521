"""Tune a quantized model to its original: scales and norm gains, on the KL divergence.

GPTQ makes each layer's outputs right on its own; what all layers' errors do together to the logits
it can't see. With the codes fixed, every scale is multiplied by exp(a) and every norm's gain is
free, of both norms of a layer and the final one (the second phase of EfficientQAT, arXiv
2407.11062, on the original's logits). Both stay what they are in a plain checkpoint. Where a row
has one scale it multiplies that row's output, so no slope of a weight is formed. Windows that are
held out decide which step is kept. Step 0, the start, is a candidate: on their text nothing gets
worse.
"""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from math import isfinite
from statistics import fmean
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from rotlib.checks import all_finite, keeper, positive, whole_number
from rotlib.learning.network import check_learnable
from rotlib.models.content import weights_sample
from rotlib.models.families import Family
from rotlib.models.marks import changing
from rotlib.models.reference import Reference, check_reference
from rotlib.models.sound import check_not_rounding, check_own_forward, check_sound
from rotlib.models.supported import adapt
from rotlib.models.text import fingerprint
from rotlib.precision import coarse_products, model_products
from rotlib.quantization.fp4 import FP4
from rotlib.quantization.grids import QuantizedWeight
from rotlib.quantization.quantized import codes_of, grid_of, restore, set_weight
from rotlib.rotations.rotation import placed_weights

STEPS = 64
LR = 1e-3  # of the scales' logarithms and the gains; it falls linearly to zero
HELD_OUT = 4  # windows
WARM_UP = 4  # steps over which the rate rises
BETAS = (0.9, 0.95)
LOOKS = 4  # how often the held-out windows are looked at


@dataclass
class Tuning:
    """What tuning did: nats a token at every step, and on the held-out windows after some.

    `step` is the one that was kept, 0 where none was better than the start. `weights` have the
    codes that they had and the tuned scales, by names such as "layers.0.q"; `gains` are the norms',
    layer by layer and the final one's last; they belong together (`put_into`). `seconds` count what
    was done before an interruption.

    >>> Tuning(kl=[0.2, 0.1], held_out={0: 0.2, 2: 0.15}).step
    2
    """

    kl: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    weights: dict[str, QuantizedWeight] = field(default_factory=dict, repr=False)
    gains: list[Tensor] = field(default_factory=list, repr=False)
    seconds: float = 0.0

    @property
    def step(self) -> int:
        return min(self.held_out, key=self.held_out.get, default=0)

    def put_into(self, model: PreTrainedModel) -> PreTrainedModel:
        """Give a model prepared as the tuned one was its weights and its gains, in place.

        Raises like `restore`, before touching anything, and for gains that aren't its norms'.
        """
        gains = gains_of(adapt(model))
        wanted = [gain.shape for gain in gains]
        numbers = isinstance(self.gains, list) and all(
            isinstance(gain, Tensor) and gain.is_floating_point() and torch.isfinite(gain).all()
            for gain in self.gains
        )
        if not numbers or [gain.shape for gain in self.gains] != wanted:
            raise ValueError(
                f"these gains belong to another model: it takes {len(wanted)} floating-point "
                "tensors, as many and as wide as its norms, and finite"
            )
        restore(model, self.weights)
        with changing(model, "rotlib_quantized"), torch.no_grad():
            for gain, value in zip(gains, self.gains, strict=True):
                gain.copy_(value)
        return model


@runtime_checkable
class Steps(Protocol):
    """Keeps how far tuning has come, so that an interrupted one goes on from its last look."""

    def get(self) -> dict | None: ...

    def put(self, state: dict) -> None: ...


def tune(
    model: PreTrainedModel,
    reference: Reference,
    steps: int = STEPS,
    lr: float = LR,
    held_out: int = HELD_OUT,
    kept: Steps | None = None,
) -> Tuning:
    """Learn the scales and the norm gains of a quantized model, in place; its codes stay.

    The reference is the original's, over the text to learn from: its last `held_out` windows decide
    which step is kept, and each step reads one of the others. A loss that stops being finite ends
    it with a warning, and an interruption leaves the best step so far; with `kept` the same call on
    a model prepared alike goes on from the last look at the held-out windows. Raises ValueError
    before any work for a model without codes, or one that isn't float32, and for too few windows.

    >>> import rotlib as rl
    >>> reference = rl.Reference(model, tokens)
    >>> report = rl.rtn(model, rl.WeightQuant(bits=3))
    >>> tuning = rl.tune(model, reference, steps=4, held_out=2)
    >>> tuning.held_out[tuning.step] <= tuning.held_out[0]
    True
    """
    family = adapt(model)
    check_not_rounding(model)
    check_sound(model)
    check_tunable(family)
    check_reference(reference, model)
    whole_number("steps", steps, 1)
    positive("lr", lr)
    if lr > torch.finfo(torch.float32).max:
        raise ValueError(f"lr must be a number that float32 holds, not {lr}")
    whole_number("held_out", held_out, 1)
    if len(reference.windows) <= held_out:
        raise ValueError(
            f"{held_out} windows are held out, and the reference has {len(reference.windows)}: "
            f"take it over {held_out + 1} or more"
        )
    keeper("kept", kept, Steps, "a state")
    codes = codes_of(model)
    if grids := {*FP4} & {grid_of(weight) for weight in codes.values()}:
        raise ValueError(
            f"tuning moves scales freely, and {grids.pop()} hasn't all numbers for them"
        )
    student = _Student(family, codes, reference)
    tuning, best = Tuning(), student.state()
    looks = {steps * look // LOOKS for look in range(1, LOOKS + 1)}
    adam = torch.optim.Adam(student.leaves, betas=BETAS)
    windows = _order(len(reference.windows) - held_out, steps)
    of = [weights_sample(model), fingerprint(reference.windows), steps, lr, held_out]
    before = None if kept is None else deepcopy(kept.get())
    if before and not _is_whole(before, student):
        raise ValueError("kept.get must return None, or what kept.put was given, unchanged")
    if before and before["of"] == of:
        tuning.kl, tuning.held_out = before["kl"], before["held_out"]
        tuning.seconds = before["seconds"]
        best = [value.to(family.device) for value in before["best"]]
        student.set(before["leaves"])
        adam.load_state_dict(before["adam"])
    start = time.perf_counter() - tuning.seconds

    def look() -> bool:
        """Keep the scales if the held-out windows were never nearer; are these sound numbers?"""
        nonlocal best
        with torch.no_grad(), model_products(model.device):
            every = range(len(reference.windows) - held_out, len(reference.windows))
            found = fmean(student.divergence(number).item() for number in every)
        tuning.held_out[len(tuning.kl)] = found
        if not isfinite(found):
            _warn(len(tuning.kl), "divergence on the held-out windows is")
        elif tuning.step == len(tuning.kl):
            best = student.state()
        if kept is not None and isfinite(found):
            so_far = {"of": of, "seconds": time.perf_counter() - start, "best": best}
            so_far |= {"kl": [*tuning.kl], "held_out": dict(tuning.held_out)}
            now = {"leaves": student.state(), "adam": deepcopy(adam.state_dict())}
            kept.put(so_far | now)
        return isfinite(found)

    try:
        with torch.enable_grad(), student.learning():
            ahead = range(len(tuning.kl), steps) if tuning.held_out or look() else ()
            for step in tqdm(ahead, desc="tuning", unit="step"):
                with coarse_products():
                    loss = student.divergence(windows[step])
                    loss.backward()
                if not isfinite(loss.item()) or not student.slopes_are_finite():
                    _warn(step, "loss or slopes are")
                    break
                tuning.kl.append(loss.item())
                rate = lr * min(1, (step + 1) / WARM_UP) * (1 - step / steps)
                for group in adam.param_groups:
                    group["lr"] = rate
                adam.step()
                adam.zero_grad()
                if step + 1 in looks and not look():
                    break
    finally:
        tuning.weights = student.settle(best)
        tuning.gains = [gain.detach().cpu().clone() for gain in gains_of(family)]
        tuning.seconds = time.perf_counter() - start
    return tuning


def _is_whole(state: object, student: "_Student") -> bool:
    """Whether this is what was kept of tuning such a model, its scales finite."""
    parts = {"of", "seconds", "best", "kl", "held_out", "leaves", "adam"}
    if not isinstance(state, dict) or not parts <= state.keys():
        return False
    shapes = [leaf.shape for leaf in student.leaves]
    lists = (state["best"], state["leaves"])
    numbers = isinstance(state["seconds"], int | float) and isinstance(state["kl"], list)
    sound = numbers and all(
        isinstance(values, list)
        and [getattr(value, "shape", None) for value in values] == shapes
        and all(map(all_finite, values))
        for values in lists
    )
    steps = len(state["kl"]) if numbers else 0
    looks = state["held_out"]
    sound &= isinstance(looks, dict) and {*looks} <= {*range(steps + 1)}
    adam = state["adam"]
    sound &= isinstance(adam, dict) and {*adam} == {"state", "param_groups"}
    return sound and [len(group["params"]) for group in adam["param_groups"]] == [len(shapes)]


def _order(count: int, steps: int) -> list[int]:
    """Which window each step reads: all of them before any of them again."""
    generator, windows = torch.Generator().manual_seed(0), []
    while len(windows) < steps:
        windows += torch.randperm(count, generator=generator, device="cpu").tolist()[::-1]
    return windows


def _warn(step: int, what: str) -> None:
    message = f"tuning stopped at step {step}, whose {what} no number: the best step is kept"
    warnings.warn(message, stacklevel=3)


def check_tunable(family: Family) -> None:
    """Raises ValueError for a model that isn't float32, or not whole where it computes.

    Linears with a forward of their own are refused as well.
    """
    check_learnable(family.model)
    if family.device != family.model.device:
        raise ValueError(
            f"tuning needs the whole model on {family.device}, where it doesn't fit: take a bigger "
            "device, or leave tuning out"
        )
    for layer in range(len(family.layers)):
        for site, linear in family.linears(layer).items():
            check_own_forward(linear, f"layers.{layer}.{site}", "which tuning would replace")


def gains_of(family: Family) -> list[nn.Parameter]:
    """The weights of both norms of every layer, and the final one's last."""
    every = range(len(family.layers))
    norms = [norm for layer in every for norm in family.norms(layer).values()]
    return [norm.weight for norm in (*norms, family.final_norm)]


@torch.no_grad()
def set_gains(model: PreTrainedModel, gains: list[Tensor]) -> None:
    """Put back what `Tuning.gains` kept."""
    for gain, value in zip(gains_of(adapt(model)), gains, strict=True):
        gain.copy_(value)


class _Student:
    """The quantized model with its scales' logarithms and its gains as leaves."""

    def __init__(self, family: Family, weights: dict[str, QuantizedWeight], reference: Reference):
        self._family, self._weights, self._reference = family, weights, reference
        self._head = reference.lm_head
        if self._head.weight.device != family.device:
            self._head = deepcopy(self._head).to(family.device)
        placed = placed_weights(family, quantized_only=True)
        self._linears = {one.name: one.module for one in placed}
        self._logs = {
            name: torch.zeros(weight.scale.shape, device=family.device)
            for name, weight in weights.items()
        }
        self.leaves = [*self._logs.values(), *gains_of(family)]

    @contextmanager
    def learning(self) -> Iterator[None]:
        """While open, the scales multiply, and slopes of the leaves are followed."""
        parameters = list(self._family.model.parameters())
        before = [parameter.requires_grad for parameter in parameters]
        try:
            for name, linear in self._linears.items():
                linear.forward = _scaled(linear, self._logs[name])
            self._family.model.requires_grad_(False)
            for leaf in self.leaves:
                leaf.requires_grad_()
            yield
        finally:
            for linear in self._linears.values():
                linear.__dict__.pop("forward", None)
            for leaf in self.leaves:
                leaf.requires_grad_(False)
                leaf.grad = None
            for parameter, followed in zip(parameters, before, strict=True):
                parameter.requires_grad_(followed)

    def divergence(self, number: int) -> Float[Tensor, ""]:
        """KL(original ‖ model) over one window of the reference, in nats a token."""
        family, reference = self._family, self._reference
        ids = reference.windows[number : number + 1].to(family.device)
        hidden = family.decoder(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
        logprobs = family.lm_head(hidden * family.head_scale).log_softmax(-1)
        with torch.no_grad():
            truth = self._head(reference.hidden[number].to(family.device)).log_softmax(-1)
        return F.kl_div(logprobs, truth, reduction="sum", log_target=True) / len(truth)

    def slopes_are_finite(self) -> bool:
        slopes = (leaf.grad for leaf in self.leaves if leaf.grad is not None)
        return all(map(all_finite, slopes))

    def state(self) -> list[Tensor]:
        return [leaf.detach().clone() for leaf in self.leaves]

    @torch.no_grad()
    def set(self, state: list[Tensor]) -> None:
        for leaf, value in zip(self.leaves, state, strict=True):
            leaf.copy_(value)

    @torch.no_grad()
    def settle(self, state: list[Tensor]) -> dict[str, QuantizedWeight]:
        """Give the model these scales and gains for good."""
        self.set(state)
        found = {}
        for name, weight in self._weights.items():
            scale = weight.scale * self._logs[name].exp().to(weight.scale.device)
            weight = weight._replace(scale=scale.to(weight.scale.dtype))
            found[name] = set_weight(self._linears[name], weight)
        return found


def _scaled(linear: nn.Linear, logs: Float[Tensor, "out groups"]):
    """The forward pass of a linear whose scales are multiplied by exp(logs)."""

    def forward(x: Float[Tensor, "*n in"]) -> Float[Tensor, "*n out"]:
        factor = logs.exp()
        if logs.shape[1] == 1:
            y = F.linear(x, linear.weight) * factor.squeeze(1)
            return y if linear.bias is None else y + linear.bias
        grouped = linear.weight.unflatten(1, (logs.shape[1], -1)) * factor.unsqueeze(2)
        return F.linear(x, grouped.flatten(1), linear.bias)

    return forward
