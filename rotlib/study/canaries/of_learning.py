"""Objectives, steps and starts of every rotation that is learned."""

import torch
import torch.nn.functional as F

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
)
from rotlib.models.supported import adapt
from rotlib.quantization import activations, grids
from rotlib.rotations import drawn, rotation
from rotlib.rotations.rotation import Rotation
from rotlib.study.canaries.inputs import here, noise, profile, tiny, token_windows, with_scales
from rotlib.study.canaries.register import canary


def _leaves(seed: int = 1, local: bool = False) -> Rotation:
    """A rotation to learn from, in float64."""
    given = drawn.gsr_rotation(tiny(), block=8, signs=True, seed=seed)
    R1 = (rotation.as_blocks if local else rotation.as_matrix)(given.R1)
    return Rotation(R1, given.R2, R4=True).to(here(), torch.float64)


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
    blocks = rotation.as_blocks(drawn.gsr_rotation(model, block=8).R1).to(here()).float()
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
    R, slope = drawn.random_rotation(tiny(), 1).R1.to(here()), noise(24, 24, seed=4)
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
    start = ostquant.klt_rotation(tiny(torch.float32), token_windows(4))
    numbers["start's defect"] = start.orthogonality_error() < 1e-6
    numbers["start's R2"] = profile(start.R2)
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
