"""What the numeric code computes, a stage at a time, on inputs so small that all take 3 seconds.

A canary is a function that returns a stage's numbers; beside it stand the constants that numbers
can't show: defaults, presets, schedules. `numerics.json` holds what they should be, and a result
notes the digests of the entries it read (`numerics.py`), so code may be rewritten freely as long as
it computes the same.

Rules for a canary: pure pieces (one gradient, one step, one grid), never a trajectory; float64
where the code allows it; codes far from the edge of rounding; matrices wider than the blocks that
code works in. Then processors agree to 1e-6. A new number or constant makes no result stale, a
changed or a dropped one does.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial, partialmethod, wraps
from hashlib import sha256
from inspect import signature
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rotlib.disk import file_digest
from rotlib.learning import (
    descent,
    grouped,
    network,
    objectives,
    optrot,
    optrot_plus,
    ostquant,
    sampling,
    spinquant,
    start,
    tuning,
)
from rotlib.measure import bounds, fidelity, offline_tasks, outliers, slopes, weights, zeroshot
from rotlib.models import text, walk, zoo
from rotlib.models.reference import Reference
from rotlib.models.supported import adapt
from rotlib.precision import float32_everywhere
from rotlib.quantization import activations, fp4, gptq, grids, hessian, quantized, solver
from rotlib.rotations import drawn, fuse, hadamard, online, rotation
from rotlib.rotations.rotation import Rotation, times
from rotlib.study import recipe


@dataclass(frozen=True)
class Canary:
    """A stage's numbers, the constants behind them, and how far processors may differ.

    A number may be off by `tolerance` times the largest magnitude under its name. Of those named in
    `ties` a code may fall either way: the largest weight of every row lies half-way between two.
    """

    numbers: Callable[[], dict]
    constants: dict
    tolerance: float
    ties: tuple[str, ...] = ()

    def allowed(self, name: str) -> float:
        """How far a number may be off."""
        return TIE if name.startswith(self.ties) else self.tolerance


CANARIES: dict[str, Canary] = {}
WORDS = (  # of made-up texts
    *("river", "stone", "cloud", "lantern", "meadow"),
    *("harbour", "winter", "silver", "thunder", "garden"),
)
TIE = 0.3  # what one code of a tiny weight changes; beside it stands a number on the grid "full"


def canary(
    stage: str,
    *doors: Callable,
    tolerance: float = 1e-5,
    ties: tuple[str, ...] = (),
    **constants: object,
) -> Callable:
    """The function below computes a stage's numbers; `doors` lend their defaults as constants."""
    told = {name: plain(value) for name, value in constants.items()} | defaults(*doors)

    def register(numbers: Callable[[], dict]) -> Callable[[], dict]:
        @wraps(numbers)
        def computed() -> dict:
            with _quietly(), float32_everywhere():
                return plain(numbers())

        CANARIES[stage] = Canary(computed, told, tolerance, ties)
        return numbers

    return register


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars and no warnings: nobody waits for a canary."""
    hidden = partialmethod(tqdm.__init__, disable=True)
    with warnings.catch_warnings(), patch.object(tqdm, "__init__", hidden):
        warnings.simplefilter("ignore")
        yield


def defaults(*doors: Callable) -> dict[str, object]:
    """The defaults of functions' parameters and of dataclasses' fields."""
    found = {}
    for door in doors:
        if is_dataclass(door):
            given = {one.name: one.default for one in fields(door) if one.default is not MISSING}
        else:
            parameters = signature(door).parameters.values()
            given = {one.name: one.default for one in parameters if one.default is not one.empty}
        found |= {f"{door.__name__}({name})": plain(value) for name, value in given.items()}
    return found


def plain(thing: object) -> object:
    """A number, a tensor or a container of them as JSON keeps it; floats to nine digits."""
    if isinstance(thing, Tensor):
        return plain(thing.detach().cpu().tolist())
    if is_dataclass(thing) and not isinstance(thing, type):
        return {one.name: plain(getattr(thing, one.name)) for one in fields(thing)}
    if isinstance(thing, dict):
        return {str(name): plain(value) for name, value in thing.items()}
    if isinstance(thing, list | tuple | range):
        return [plain(value) for value in thing]
    if isinstance(thing, bool | int | str) or thing is None:
        return thing
    return float(f"{float(thing):.9g}")


# --- inputs ---------------------------------------------------------------------------------------


@contextmanager
def inputs_on(device: torch.device) -> Iterator[None]:
    """Make every canary's inputs on that device while open: the stage is computed there."""
    global _device
    before, _device = _device, device
    try:
        yield
    finally:
        _device = before


_device = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian numbers from a stream that numpy has frozen."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).to(_device)


def token_windows(windows: int = 2, length: int = 12) -> Tensor:
    """Windows of token ids."""
    ids = np.random.RandomState(7).randint(0, 40, (windows, length))
    return torch.from_numpy(ids).to(_device)


def tiny(dtype: torch.dtype = torch.float64, qwen3: bool = False, **other: int) -> PreTrainedModel:
    """Two layers with random norms, and biases everywhere or norms on queries and keys."""
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
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape, attention_bias=True, mlp_bias=True))
    model = model.to(_device, dtype).eval().requires_grad_(False)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        values = noise(*parameter.shape, seed=number)
        parameter.copy_(1 + 0.2 * values if "norm" in name else 0.2 * values)
    return model


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


# --- rotations ------------------------------------------------------------------------------------


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
    named = {name: turned.to(_device, torch.float64) for name, turned in named.items()}
    numbers = {name: times(x, turned.R1) for name, turned in named.items()}
    numbers |= {f"{name}, R2": profile(turned.R2) for name, turned in named.items()}
    for n in (1, 2, 16, 20, 28, 36, 60, 104):  # Sylvester, Paley I and II, prime powers, products
        numbers[f"order {n}"] = profile(hadamard.hadamard(n))
    for n in (8, 12):
        numbers[f"walsh {n}"] = profile(hadamard.walsh(n))
    return numbers | {"block sizes": hadamard.block_sizes(48)}


@canary("fusing", Rotation, orthogonality=fuse.ORTHOGONALITY_TOLERANCE)
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
    blocks = drawn.gsr_rotation(tiny(), block=8)
    learned = Rotation(rotation.as_blocks(blocks.R1) + 1e-8, None)
    numbers["projected"] = profile(learned.projected().R1)
    numbers["defect"] = learned.orthogonality_error() < 1e-6
    numbers["blocks as a matrix"] = profile(rotation.as_matrix(learned.R1))
    numbers["factors as a matrix"] = profile(rotation.as_matrix(blocks.R1))
    model = fuse.fuse(tiny(), learned)
    numbers["by blocks"] = profile(model.model.layers[0].self_attn.q_proj.weight)
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


# --- quantization ---------------------------------------------------------------------------------


@canary(
    "grids",
    grids.WeightQuant,
    clip_norm=grids.CLIP_NORM,
    clip_factors=grids.CLIP_FACTORS,
    search=grids.SEARCH,
    conventions=grids.CONVENTIONS[:2],  # a further choice makes no result stale
    short_of=grids.SHORT_OF,
    ties=("put back",),
)
def _grids() -> dict:
    W = noise(6, 48).pow(3)
    W[5] = 0
    numbers = {}
    for name, settings in {
        "symmetric": {},
        "full": {"convention": "full"},
        "asymmetric": {"symmetric": False, "bits": 3},
        "groups": {"group_size": 16, "bits": 2},
        "unclipped": {"clip_search": False},
        "signed": {"convention": "signed"},
    }.items():
        quant = grids.WeightQuant(**settings)
        rounded = grids.round_to_nearest(W, quant)
        numbers[f"{name}, codes"] = profile(rounded.codes)
        numbers[f"{name}, range"] = quant.codes
        numbers[f"{name}, scale"] = rounded.scale
        numbers[f"{name}, dense"] = profile(rounded.dense())
    model = tiny(torch.float32)
    stored = quantized.rtn(model, grids.WeightQuant(bits=8))
    numbers["model"] = profile(torch.cat([weight.scale.flatten() for weight in stored.values()]))
    put_back = quantized.restore(tiny(torch.float32), stored)
    numbers["put back"] = profile(adapt(put_back).linears(1)["down"].weight)
    stored = quantized.rtn(tiny(torch.float32), grids.WeightQuant(bits=8, convention="full"))
    put_back = quantized.restore(tiny(torch.float32), stored)
    numbers["full, put back"] = profile(adapt(put_back).linears(1)["down"].weight)
    return numbers


@canary(
    "4-bit floats",
    choices=grids.GRIDS[:3],
    groups=fp4.FP4,
    halves=fp4.HALVES,
    largest=fp4.FP4_LARGEST,
    room=fp4.E4M3_ROOM,
    scales=str(fp4.E4M3),
    tolerance=5e-3,
)
def _floats() -> dict:
    W = noise(6, 96).pow(3)
    W[5] = 0
    numbers = {}
    for grid in fp4.FP4:
        for clip_search in (True, False):
            quant = grids.WeightQuant(grid=grid, clip_search=clip_search)
            rounded = grids.round_to_nearest(W, quant)
            name = f"{grid}{', clipped' if clip_search else ''}"
            numbers[f"{name}, codes"] = profile(rounded.codes.double())
            numbers[f"{name}, scale"] = rounded.scale
            numbers[f"{name}, dense"] = profile(rounded.dense())
        numbers[f"{grid}, nearest"] = quant.nearest_(torch.arange(-80, 80) / 10.0)
        numbers[f"{grid}, held"] = quant.held(torch.logspace(-3, 2, 30))
        numbers[f"{grid}, unit"] = quant.in_units(1000 * W)[1]
        numbers[f"{grid}, unit of scales"] = quant.unit_of(rounded.scale)
        inputs = activations.ActivationQuant(4, grid=grid).input_grid()
        numbers[f"{grid}, inputs"] = activations.round_tokens(
            1e-4 * noise(3, 96), *inputs, quant.group_size
        )
        W_solved, H = noise(4, 160, seed=2), covariance(160, seed=3)
        Q, error, _, _ = solver.Solver(quant, descent=1)(W_solved, H)
        numbers |= {f"{grid}, solved": profile(Q.codes.double()), f"{grid}, error": error}
    return numbers


@canary("covariance", damping=hessian.DAMPING, ladder=hessian.LADDER, tolerance=1e-4)
def _covariance() -> dict:
    seen = hessian.Hessian()
    wide = noise(3, 4, 400)
    for part in wide.split(2):
        seen.add(part)
    numbers = {"sum": profile(seen.take())}
    H = covariance(12)
    M, damping = hessian.factorise(H)
    trace, slope = hessian.pivots_and_slope(H)
    numbers |= {"M": profile(M), "damping": damping, "damped": profile(hessian.damped(H, "x"))}
    numbers |= {"pivots": hessian.pivots(H), "trace": trace, "slope": profile(slope)}
    flat = torch.diag(torch.tensor([1.0, 0.5, -0.02], dtype=torch.float64))
    numbers["ladder"] = hessian.factorise(flat)[1]
    numbers["lost"] = hessian.factorise(-H)[0] is None
    for layer, of in enumerate(hessian.hessians(adapt(tiny()), token_windows())):
        numbers |= {f"{site} {layer}": profile(matrix) for site, matrix in of.items()}
    return numbers


def _solved(solve: solver.Solver, C: Tensor | None = None) -> dict:
    W, H = noise(4, 136, seed=2), covariance(136, seed=3)
    H[7], H[:, 7] = 0, 0  # an input that is always zero
    Q, error, _, fallback = solve(W, H, C)
    return {"codes": profile(Q.codes), "scale": profile(Q.scale), "error": error, "fell": fallback}


@canary("gptq", gptq.gptq, solver.Solver, tolerance=5e-3, ties=("errors", "again"))
def _gptq() -> dict:
    numbers = {}
    for name, settings, how in (
        ("rows", {}, {}),
        ("rows, act-order", {}, {"act_order": True}),
        ("groups", {"group_size": 68, "symmetric": False}, {}),
        ("narrow groups", {"group_size": 8, "bits": 3}, {}),
        ("groups, act-order", {"group_size": 68}, {"act_order": True}),
        ("groups, static", {"group_size": 68}, {"static_groups": True}),
    ):
        solve = solver.Solver(grids.WeightQuant(**settings), **how)
        numbers |= {f"{name}, {key}": value for key, value in _solved(solve).items()}
    W = noise(2, 6)
    numbers["fallback"] = solver.Solver(grids.WeightQuant())(W, -covariance(6))[3]
    batch, walk.BATCH_TOKENS = walk.BATCH_TOKENS, 12  # two batches: one waits for the other
    try:
        for name, convention in (("", "half"), ("full, ", "full")):
            quant = grids.WeightQuant(bits=8, clip_search=False, convention=convention)
            kept = _Kept()
            report = gptq.gptq(tiny(torch.float32), token_windows(), quant, kept=kept)
            again = gptq.gptq(tiny(torch.float32), token_windows(), quant, kept=kept)
            numbers[f"{name}errors"] = [module.error for module in report.modules]
            numbers[f"{name}again"] = [module.error for module in again.modules]
            numbers[f"{name}fallbacks"] = report.fallbacks
    finally:
        walk.BATCH_TOKENS = batch
    return numbers


class _Kept(dict):
    """Layers in memory."""

    put = dict.__setitem__


@canary("gptaq", tolerance=5e-3)
def _gptaq() -> dict:
    C = 0.1 * noise(136, 136, seed=5)
    numbers = _solved(solver.Solver(grids.WeightQuant()), C)
    quant = grids.WeightQuant(bits=3)
    report = gptq.gptq(tiny(torch.float32), token_windows(), quant, asymmetry=0.5)
    return numbers | {"errors": [module.error for module in report.modules][7:]}


def _refined(**how: object) -> dict:
    C = 0.1 * noise(136, 136, seed=5)
    numbers = {}
    for name, settings, drift in (("rows", {}, None), ("drift", {}, C), ("groups", {"bits": 3}, C)):
        quant = grids.WeightQuant(group_size=68 if name == "groups" else None, **settings)
        found = _solved(solver.Solver(quant, **how), drift)
        numbers |= {f"{name}, {key}": value for key, value in found.items()}
    return numbers


@canary("scale search", widths=solver.WIDTHS, tolerance=5e-3)
def _scale_search() -> dict:
    return _refined(scale_search=True)


@canary("coordinate descent", tolerance=5e-3)
def _coordinate_descent() -> dict:
    return _refined(descent=2)


@canary(
    "tuning",
    tuning.tune,
    steps=tuning.STEPS,
    lr=tuning.LR,
    held_out=tuning.HELD_OUT,
    warm_up=tuning.WARM_UP,
    betas=tuning.BETAS,
    looks=tuning.LOOKS,
    tolerance=2e-3,
)
def _tuning() -> dict:
    numbers = {}
    for name, group_size in (("rows", None), ("groups", 8)):
        model = tiny(torch.float32)
        ids = token_windows(4, 24)
        seen = Reference(model, ids)
        quantized.rtn(model, grids.WeightQuant(bits=3, group_size=group_size, convention="full"))
        found = tuning.tune(model, seen, steps=3, held_out=2)
        numbers[f"{name}, kl"] = found.kl
        numbers[f"{name}, held out"] = [float(kl) for kl in found.held_out.values()]
        numbers[f"{name}, scales"] = [profile(one.scale) for one in found.weights.values()]
        numbers[f"{name}, gains"] = [profile(gain) for gain in found.gains]
        tuning.set_gains(model, [2 * gain for gain in found.gains])
        numbers[f"{name}, doubled"] = [profile(gain) for gain in tuning.gains_of(adapt(model))]
    return numbers


@canary("activations", activations.ActivationQuant, protocols=activations.PROTOCOLS, tolerance=2e-2)
def _activations() -> dict:
    x, numbers = noise(2, 3, 16), {}
    for name in activations.PROTOCOLS:
        quant = activations.ActivationQuant(bits=4, kv_bits=3, protocol=name)
        for side, (grid, clip) in {"x": quant.input_grid(), "kv": quant.kv_grid()}.items():
            numbers[f"{name}, {side}"] = activations.round_tokens(x, grid, clip)
            numbers[f"{name}, {side}, clip"] = clip
    numbers["by heads"] = activations.round_tokens(x, *quant.input_grid(), 4)
    leaf = x.clone().requires_grad_()
    (activations.round_tokens(leaf, *quant.input_grid()) * x).sum().backward()
    numbers["straight through"] = profile(leaf.grad)
    for protocol, sinks in (("spinquant", 0), ("rotlib", 2)):
        model = tiny(torch.float32)
        quant = activations.ActivationQuant(8, 8, protocol, sinks)
        with activations.quantized_activations(model, quant):
            numbers[f"logits, {protocol}"] = profile(model(token_windows(1)).logits)
    return numbers


# --- learning -------------------------------------------------------------------------------------


def _leaves(seed: int = 1, local: bool = False) -> Rotation:
    """A rotation to learn from, in float64."""
    given = drawn.gsr_rotation(tiny(), block=8, signs=True, seed=seed)
    R1 = (rotation.as_blocks if local else rotation.as_matrix)(given.R1)
    return Rotation(R1, given.R2, R4=True).to(_device, torch.float64)


@canary("objective", Rotation, tolerance=1e-4)
def _objective() -> dict:
    model, numbers = tiny(), {}
    family = adapt(model)
    turned = _leaves()
    for R4 in (False, True):
        matrices = objectives.weight_matrices(family, R4)
        numbers[f"R4 {R4}"] = objectives.sum_of_fourth_powers(matrices, turned)
    rows = matrices[2].rows("R1", turned)
    value, slope = sampling.fourth_power(rows, turned.R1.float())
    numbers |= {"rows": profile(rows), "value": value, "slope": profile(slope)}
    blocks = rotation.as_blocks(drawn.gsr_rotation(model, block=8).R1).to(_device).float()
    numbers["slope of blocks"] = profile(sampling.fourth_power(rows, blocks)[1])
    numbers["as random"] = [matrix.as_random(turned) for matrix in matrices[:7]]
    begun = {
        "drawn": start.starting_point(family, seed=1, R4=True),
        "given": start.starting_point(family, 1, start=_leaves(), R4=True),
        "local": start.starting_point(family, 1, start=_leaves(local=True), R4=True, local=True),
    }
    numbers |= {f"start, {name}": profile(found.R1) for name, found in begun.items()}
    odd = tiny(hidden_size=22, num_attention_heads=2)  # a width without a Hadamard matrix
    numbers["start, odd"] = profile(start.starting_point(adapt(odd), seed=1).R1)
    return numbers


@canary("token sample", optrot.kurtail, optrot.mixed, tokens=objectives.TOKENS, tolerance=1e-4)
def _token_sample() -> dict:
    model = tiny()
    matrices = objectives.token_matrices(adapt(model), token_windows(), seed=1, tokens=9)
    numbers = {f"{number}": profile(matrix.values) for number, matrix in enumerate(matrices)}
    turned = _leaves()
    weighed = objectives.weight_matrices(adapt(model), R4=True)
    blend = objectives.blended(weighed, matrices, 0.25, turned)
    numbers["blended"] = objectives.sum_of_fourth_powers(blend, turned)
    return numbers


@canary("row sampling", batch=sampling.BATCH, steps_a_draw=sampling.STEPS_A_DRAW, tolerance=1e-4)
def _row_sampling() -> dict:
    matrices, turned = objectives.weight_matrices(adapt(tiny()), True), _leaves()
    matrices[3].factor = 2.5
    numbers = {}
    for name, how in {"rows": {}, "runs": {"unit": 4, "power": 2, "batch": 64}}.items():
        rows = sampling.RowSampler(matrices, turned, 1, **how)
        rows.draw(turned)
        value, slope = rows.slope(1, turned.R1.float())
        numbers |= {f"{name}, scale": rows.scale, f"{name}, batch": profile(rows.batch(1))}
        numbers |= {f"{name}, value": value, f"{name}, slope": profile(slope)}
    matrices[3].factor = 1.0
    rows.reweigh()
    R2 = sampling.R2Rows(matrices, turned).gradient(turned.R2.float())
    return numbers | {"reweighed": rows.scale, "R2": profile(R2)}


@canary(
    "descent",
    optrot.optrot,
    optrot.learn_sampled,
    momentum=descent.MOMENTUM,
    iterations=descent.FIXED_POINT_ITERATIONS,
    steps_to_polar=descent.STEPS_TO_POLAR,
    passes=optrot.PASSES,
    R2_every=optrot.R2_EVERY,
    R2_steps=optrot.R2_STEPS,
    R2_length=optrot.R2_LENGTH,
    lr=optrot.PAPER_LR,
    steps={name: steps for name, (_, steps) in optrot.METHODS.items()},
    drift=start.DRIFT,
    tolerance=1e-3,
)
def _descent() -> dict:
    R, slope = drawn.random_rotation(tiny(), 1).R1.to(_device), noise(24, 24, seed=4)
    walker = descent.Descent(R)
    walker.step(slope, 0.5)
    walker.step(slope.mT, 0.3)
    numbers = {"two steps": profile(walker.R), "cayley": profile(descent.cayley(slope - slope.mT))}
    walker.R = walker.R + 0.02 * slope
    walker.project()
    numbers["projected"] = profile(walker.R)
    for lr in (1e-3, 10.0):
        numbers[f"cayley sgd {lr}"] = profile(descent.cayley_sgd_step(R, slope, lr))
    model = tiny(torch.float32)
    learned = {
        "sampled": optrot.optrot(model, steps=3),
        "paper": optrot.optrot(model, method="cayley-sgd", steps=1),
        "local": optrot.optrot(model, steps=2, start=_leaves(local=True), R4=True, local=True),
    }
    for name, found in learned.items():
        numbers |= {f"{name}, R1": profile(found.R1), f"{name}, R2": profile(found.R2)}
        numbers[f"{name}, history"] = found.history
    return numbers


@canary("grouped", tolerance=1e-3)
def _grouped() -> dict:
    family, turned = adapt(tiny(torch.float32)), _leaves()
    matrices = objectives.weight_matrices(family, True)
    numbers = {"objective": grouped.sum_of_group_norms(matrices, turned, 4)}
    for across in (False, True):
        value, slope = grouped.group_norms(noise(8, 12), 4, across)
        numbers |= {f"value, {across}": value, f"slope, {across}": profile(slope)}
    rows = grouped.GroupSampler(matrices, turned, 1, 8)
    rows.draw(turned)
    value, slope = rows.slope(1, turned.R1.float())
    numbers |= {"value": value, "slope": profile(slope), "scale": rows.scale}
    for size in (4, 12):  # one that divides a head, and one that doesn't
        R2 = grouped.GroupR2Rows(matrices, turned, size)
        numbers[f"R2, {size}"] = profile(R2.gradient(turned.R2.float()))
    learned = optrot.optrot(tiny(torch.float32), steps=2, group_size=8)
    return numbers | {"history": learned.history, "R1": profile(learned.R1)}


@canary(
    "optrot+",
    optrot_plus.optrot_plus,
    forms=optrot_plus.FORMS,
    steps=optrot_plus.STEPS,
    R1_length=optrot_plus.R1_LENGTH,
    inputs=optrot_plus.INPUTS,
    refresh=optrot_plus.REFRESH,
    tolerance=1e-3,
)
def _optrot_plus() -> dict:
    numbers = {}
    ids = token_windows(4, 24)
    for form in optrot_plus.FORMS:
        learned = optrot_plus.optrot_plus(tiny(torch.float32), ids, form=form, steps=2, R4=True)
        numbers[f"{form}, history"] = learned.history
        numbers[f"{form}, R1"] = profile(learned.R1)
        numbers[f"{form}, R2"] = profile(learned.R2)
    return numbers


@canary("network", presets=network.PRESETS, tolerance=1e-3, ties=("weights",))
def _network() -> dict:
    numbers = {}
    for name, quant, activation, checkpointing in (
        ("weights", grids.WeightQuant(bits=3, group_size=8), {}, False),
        ("full", grids.WeightQuant(bits=3, group_size=8, convention="full"), {}, False),
        ("activations", None, {"bits": 8, "kv_bits": 8}, True),
    ):
        family = adapt(tiny())
        turned = with_scales(family.model)
        for leaf in (turned.R1, turned.R2, *turned.scales.values()):
            leaf.requires_grad_()
        student = network.Student(family, quant, turned.online, checkpointing)
        student.show(turned)
        ids = token_windows()[0]
        quantized = activations.ActivationQuant(**activation)
        with torch.enable_grad(), activations.quantized_activations(student.model, quantized):
            logits = student.logits(ids, turned)
            loss = F.cross_entropy(logits, ids[1:])
            loss.backward()
        student.carry_back(turned)
        numbers |= {f"{name}, loss": loss, f"{name}, R1": profile(turned.R1.grad)}
        numbers[f"{name}, R2"] = profile(turned.R2.grad)
        numbers[f"{name}, scales"] = {n: profile(s.grad) for n, s in turned.scales.items()}
        student.show(with_scales(family.model, seed=5))  # on the grids that the first one found
        numbers[f"{name}, shown"] = profile(adapt(student.model).linears(1)["up"].weight)
    return numbers


@canary(
    "spinquant",
    spinquant.spinquant,
    presets=spinquant.SPINQUANT_PRESETS,
    tolerance=1e-3,
    ties=("history", "R1", "R2"),
)
def _spinquant() -> dict:
    numbers = {}
    for name, convention in (("", "half"), ("full, ", "full")):
        quant, ids = grids.WeightQuant(bits=8, convention=convention), token_windows(4)
        learned = spinquant.spinquant(tiny(torch.float32), ids, quant, steps=3, lr=0.7)
        numbers |= {f"{name}history": learned.history}
        numbers |= {f"{name}R1": profile(learned.R1), f"{name}R2": profile(learned.R2)}
    return numbers


@canary(
    "ostquant",
    ostquant.ostquant,
    presets=ostquant.OSTQUANT_PRESETS,
    top=ostquant.TOP,
    scale_lr=ostquant.SCALE_LR,
    tolerance=1e-2,
    ties=("first loss",),
)
def _ostquant() -> dict:
    logits, truth = noise(3, 9, seed=1), noise(3, 9, seed=2)
    numbers = {"loss": ostquant.kl_top_loss(logits, truth, top=4)}
    KLT = ostquant.eigenvectors(adapt(tiny()), token_windows(4), 8)
    numbers["KLT"] = profile(KLT.abs())  # an eigenvector's sign is anyone's
    turned = with_scales(tiny())
    optimizer = ostquant.RotationAdam(turned, lr=0.3)
    leaves = (optimizer.rotation.R1, optimizer.rotation.R2, *optimizer.rotation.scales.values())
    for number, leaf in enumerate(leaves):
        leaf.grad = noise(*leaf.shape, seed=number).to(leaf.dtype)
    optimizer.step(0.5)
    numbers |= {"R1": profile(optimizer.rotation.R1), "R2": profile(optimizer.rotation.R2)}
    numbers["scales"] = {n: profile(s) for n, s in optimizer.rotation.scales.items()}
    for name, convention in (("", "half"), ("full, ", "full")):
        quant = grids.WeightQuant(bits=8, convention=convention)
        learned = ostquant.ostquant(tiny(torch.float32), token_windows(4), quant, steps=1)
        numbers[f"{name}first loss"] = learned.history[0]
    return numbers


# --- measures -------------------------------------------------------------------------------------


@canary("evaluation", tolerance=1e-4)
def _evaluation() -> dict:
    model, other, ids = tiny(torch.float32), tiny(torch.float32), token_windows(2, 20)
    other.model.layers[1].mlp.down_proj.weight.mul_(0.7)
    found = fidelity.evaluate(other, ids, Reference(model, ids))
    stream = ids.flatten()
    return {
        "cross-entropy": found.cross_entropy,
        "reference": found.reference_cross_entropy,
        "kl": found.kl,
        "means": [found.perplexity, found.reference_perplexity, found.kl_divergence],
        "perplexity": fidelity.perplexity(model, stream, window=8),
        "kl of a stream": fidelity.kl_divergence(model, other, stream, window=8),
    }


@canary("outliers", edges=outliers.HISTOGRAM_EDGES, windows=outliers.WINDOWS)
def _outliers() -> dict:
    family = adapt(tiny())
    inputs = outliers.input_outliers(family, token_windows())
    return {
        "weights": [list(line.values())[2:] for line in outliers.weight_outliers(family)],
        "inputs": [list(values.values()) for values in inputs.values()],
        "histogram": outliers.weight_histogram(family)[:16],
        "kurtosis": weights.kurtosis(noise(3, 40)),
        "incoherence": weights.incoherence(noise(3, 40)),
    }


@canary("bounds", tolerance=5e-3, ties=("edge_codes", "rtn_error"))
def _bounds() -> dict:
    family, numbers = adapt(tiny()), {}
    turned = drawn.hadamard_rotation(family.model, R4=True)
    for of, convention in (("", "half"), ("full, ", "full")):
        quant = grids.WeightQuant(bits=8, convention=convention)
        lines = bounds.module_bounds(family, turned, token_windows(8, 24), quant, every=2)
        numbers |= {f"{of}{name}": [line[name] for line in lines] for name in lines[0]}
    return numbers


@canary("group spread", shown_layer=weights.SHOWN_LAYER)
def _group_spread() -> dict:
    flat = weights.group_spread(torch.ones(2, 8), 4)
    return {"noise": weights.group_spread(noise(6, 24).pow(3), 8), "flat": flat}


@canary("slopes", slopes.slope_agreement, tolerance=1e-2, ties=("slopes", "agreement"))
def _slopes() -> dict:
    model, numbers = tiny(torch.float32), {}
    for name, convention in (("", "half"), ("full, ", "full")):
        quant = grids.WeightQuant(bits=8, convention=convention)
        found = slopes.slopes(adapt(model), token_windows(3), quant, None)
        numbers[f"{name}slopes"] = [profile(slope) for slope in found]
        numbers[f"{name}agreement"] = slopes.slope_agreement(model, token_windows(3), quant)
    return numbers


@canary(
    "zero-shot",
    zeroshot.zero_shot,
    lists=zeroshot.TASK_LISTS,
    items=zeroshot.ITEMS,
    metric=offline_tasks.METRIC,
    choices=offline_tasks.CHOICES,
    wrong=offline_tasks.WRONG,
    short=offline_tasks.SHORT,
    away=offline_tasks.AWAY,
)
def _zero_shot() -> dict:
    draw = np.random.RandomState(3)

    def sentence(length: int) -> str:
        chosen = [WORDS[i] for i in draw.randint(0, len(WORDS), length)]
        return f"{' '.join(chosen).capitalize()}."

    paragraphs = [" ".join(sentence(int(n)) for n in draw.randint(8, 24, 5)) for _ in range(90)]
    corpus = "A heading\n\n" + "\n\n".join(paragraphs)
    made = {task: offline_tasks.items_of(task, corpus) for task in offline_tasks.METRIC}
    numbers = {f"{task}, items": len(items) for task, items in made.items()}
    numbers |= {task: sha256(str(items[:20]).encode()).hexdigest() for task, items in made.items()}
    found = {"a": {"acc,none": 0.5}, "b": {"acc,none": 0.2, "acc_norm,none": 0.75}}
    scored = zeroshot.scored("mine", found, {"a": [4, 4, 1], "b": [2] * 9})
    return numbers | {"scored": scored.metrics, "names": zeroshot.task_names("eight")}


# --- texts, models, recipes -----------------------------------------------------------------------


@canary("text", text.windows, whole=text.WHOLE, documents=text.C4_DOCUMENTS)
def _text() -> dict:
    stream = torch.arange(100)
    markup = "== Title ==\nSome '''bold''' words.\n\n\n* more\n== See also ==\nlost"
    return {
        "first": text.windows(stream, 10, 3),
        "drawn": text.windows(stream, 10, 3, seed=2),
        "prose": text.prose(markup),
        "splits": text.split_articles(list("abcdefgh")),
        "fingerprint": text.fingerprint(stream),
    }


@canary("recipe", recipe.Recipe, learned=recipe.LEARNED, through_network=recipe.THROUGH_NETWORK)
def _recipe() -> dict:
    run = recipe.Recipe(rotation="spinquant", activation_bits=4, R4=True)
    return {"rotation reads": run.rotation_reads, "weights": run.sharing_weights().spec()}


def _packaged(name: str) -> dict:
    """The file that a packaged model is dequantized from; its tokenizer is in it."""
    packaged = zoo.PACKAGED[name]
    return {"file": file_digest(zoo.package_folder(packaged) / packaged.file)}


def _wikipedia_mini() -> dict:
    return {
        split: sha256(text.CORPORA["wikipedia-mini"](split).encode()).hexdigest()
        for split in text.SPLITS
    }


# what runs read besides code: the same bytes everywhere
INPUTS = {name: Canary(partial(_packaged, name), {}, 0.0) for name in zoo.PACKAGED}
INPUTS["wikipedia-mini"] = Canary(_wikipedia_mini, {}, 0.0)
