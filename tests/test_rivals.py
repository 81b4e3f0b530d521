from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import exact_logits, tiny_model

import rotlib as rl
from rotlib.learning.network import Student
from rotlib.learning.ostquant import eigenvectors, kl_top_loss
from rotlib.learning.start import starting_point
from rotlib.measure.fidelity import evaluate
from rotlib.measure.slopes import slopes
from rotlib.models.supported import adapt
from rotlib.models.walk import norms_in_model_dtype
from rotlib.precision import coarse_products
from rotlib.quantization.activations import quantized_activations, round_tokens
from rotlib.quantization.hessian import hessians
from rotlib.rotations.rotation import scale_shapes

RIVALS = [rl.spinquant, rl.ostquant]
W3 = {"quant": rl.WeightQuant(bits=3)}
A4KV4 = {"activations": rl.ActivationQuant(bits=4, kv_bits=4), "R3": True, "R4": True}


def leaves(model, seed=0):
    """A random rotation with random scales whose tensors take gradients."""
    rotation = rl.random_rotation(model, seed)
    rotation.scales = {
        name: 1 + torch.rand(shape, dtype=torch.float64)
        for name, shape in scale_shapes(adapt(model)).items()
    }
    for R in (rotation.R1, rotation.R2, *rotation.scales.values()):
        R.requires_grad_()
    return rotation


def test_an_unrounded_student_computes_what_the_model_does(dense_model, tokens):
    student = Student(adapt(dense_model), None, [], checkpointing=False)
    rotation = leaves(dense_model)
    student.show(rotation)
    with norms_in_model_dtype(student.model):
        logits = student.logits(tokens[0], rotation)
    assert (logits - exact_logits(dense_model, tokens[:1])[0, :-1]).abs().max() < 1e-9


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_carried_back_is_the_derivative_of_the_students_loss(tokens, checkpointing):
    model = tiny_model("qwen3, tied")
    student = Student(adapt(model), None, [], checkpointing)
    # unrounded, the loss doesn't depend on the rotation: weigh one layer's weights themselves to
    # have a slope
    rotation = leaves(model)

    def loss(rotation):
        student.show(rotation)
        linears = student._family.linears(1)
        weighed = (
            sum(linear.weight.pow(4).sum() for linear in linears.values())
            + student._family.norms(0)["mlp_norm"].weight.pow(3).sum()
        )
        return weighed + student.logits(tokens[0], rotation).square().mean()

    loss(rotation).backward()
    student.carry_back(rotation)
    for name in ("R1", "R2", *rotation.scales):
        tensor = rotation.scales.get(name, getattr(rotation, name, None))
        direction = torch.randn(
            tensor.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        if name in ("R1", "R2"):  # off the manifold the student's logits change: move along it
            direction = tensor.detach() @ (direction - direction.mT)
        values = []
        for sign in (1, -1):
            other = deepcopy(rotation)
            moved = tensor.detach() + sign * 1e-6 * direction
            if name in rotation.scales:
                other.scales[name] = moved
            else:
                setattr(other, name, moved)
            values.append(loss(other).item())
        assert (tensor.grad * direction).sum().item() == pytest.approx(
            (values[0] - values[1]) / 2e-6, rel=1e-3, abs=1e-3
        ), name


def test_without_rounding_no_rotation_has_a_slope(tokens):
    model = tiny_model("qwen3, tied", dtype=torch.float32)
    flat = slopes(adapt(model), tokens[:1], None, None, R4=True)[0]
    rounded = slopes(adapt(model), tokens[:1], None, rl.ActivationQuant(bits=4), R4=True)[0]
    assert flat.norm() < 1e-4 * rounded.norm()


def test_windows_agree_on_the_weights_errors_more_than_on_the_activations(tokens):
    model = tiny_model(dtype=torch.float32)
    weights = rl.slope_agreement(model, tokens, quant=rl.WeightQuant(bits=3))
    activations = rl.slope_agreement(model, tokens, activations=rl.ActivationQuant(bits=4))
    assert -1 <= activations < weights <= 1
    assert rl.slope_agreement(
        model, tokens[:1].repeat(2, 1), quant=rl.WeightQuant(bits=3)
    ) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="at least two"):
        rl.slope_agreement(model, tokens[:1])


@pytest.mark.parametrize("settings", [W3, A4KV4])
@pytest.mark.parametrize("learn", RIVALS)
def test_a_rival_beats_its_start_under_the_quantizer_it_was_trained_for(learn, settings, tokens):
    torch.manual_seed(0)
    model = tiny_model(dtype=torch.float32)
    windows = torch.randint(0, 96, (16, 32))
    before = deepcopy(model.state_dict())
    learned = learn(model, windows, seed=2, steps=60, lr=1.0, **settings)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    reference = rl.Reference(model, windows)
    losses = {}
    for name, rotation in {
        "start": starting_point(adapt(model), 2, learned.R3, learned.R4),
        "learned": learned,
    }.items():
        rotated = rl.fuse(deepcopy(model), rotation)
        if "quant" in settings:
            rl.rtn(rotated, settings["quant"])
        with quantized_activations(rotated, settings.get("activations", rl.ActivationQuant())):
            found = evaluate(rotated, windows, reference)
        losses[name] = (
            found.perplexity if learn is rl.spinquant else found.kl_divergence
        )  # what each one learns on
    assert losses["learned"] < losses["start"]
    assert learned.orthogonality_error() < 1e-6
    assert len(learned.history) == 60


@pytest.mark.parametrize("learn", RIVALS)
@pytest.mark.parametrize(
    "name",
    [
        "llama, tied",
        "llama, biases everywhere",
        "qwen2, biases",
        "qwen3, q/k norms, own head_dim",
        "mistral",
    ],
)
def test_a_learned_rotation_leaves_every_familys_logits(learn, name, tokens):
    model = tiny_model(name, dtype=torch.float32)
    rotation = learn(model, tokens[:, :8], quant=rl.WeightQuant(bits=3), steps=4)
    exact = tiny_model(name)
    before = exact_logits(exact, tokens)
    assert (exact_logits(rl.fuse(exact, rotation), tokens) - before).abs().max() < 1e-9
    if learn is rl.ostquant:
        assert all(
            (scale - 1).abs().max() > 1e-4
            for key, scale in rotation.scales.items()
            if key != "query_key"
        )


def test_checkpointing_changes_nothing_but_memory(tokens, monkeypatch):
    model = tiny_model(dtype=torch.float32)
    learned = []
    for preset in ("laptop", "paper"):
        from rotlib.learning.spinquant import SPINQUANT_PRESETS

        monkeypatch.setitem(
            SPINQUANT_PRESETS, preset, SPINQUANT_PRESETS[preset]._replace(steps=3, batch=2)
        )
        learned.append(rl.spinquant(model, tokens, preset=preset, **W3))
    torch.testing.assert_close(learned[0].history, learned[1].history)


@pytest.mark.parametrize("learn", RIVALS)
def test_a_model_that_takes_gradients_is_learned_on_and_left_alone(learn, tokens):
    model = tiny_model("llama, tied", dtype=torch.float32)
    frozen = learn(model, tokens, steps=3, **W3)
    model.requires_grad_(True)
    assert torch.equal(learn(model, tokens, steps=3, **W3).R1, frozen.R1)
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
    )


@pytest.mark.parametrize("learn", RIVALS)
def test_a_gradient_that_is_no_number_keeps_the_last_good_rotation(learn, tokens, monkeypatch):
    carry_back = Student.carry_back
    steps = []

    def poisoned(student, rotation):
        carry_back(student, rotation)
        steps.append(1)
        if len(steps) == 3:
            rotation.R2.grad[0, 0, 0, 0] = float("nan")

    monkeypatch.setattr(Student, "carry_back", poisoned)
    with pytest.raises(rl.LearningFailed, match="the gradient is no number at step 2") as failed:
        learn(tiny_model(dtype=torch.float32), tokens, steps=10, **W3)
    assert failed.value.rotation.R1.dtype == torch.float64
    assert failed.value.rotation.orthogonality_error() < 1e-12


def test_other_dtypes_are_refused(tokens):
    with pytest.raises(
        ValueError,
        match=r"needs a float32 model, not torch\.float64: load it with dtype=torch\.float32",
    ):
        rl.spinquant(tiny_model(), tokens, **W3)


def test_rounding_passes_gradients_straight_through():
    x = torch.randn(4, 16, requires_grad=True)
    weight = torch.randn(4, 16)
    rounded = round_tokens(x, rl.ActivationQuant(bits=4).input_grid()[0], 0.9)
    (rounded * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    assert not torch.equal(rounded, x)


def test_kl_top_agrees_with_the_formula_by_hand():
    truth, logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for t, q in zip(truth, logits, strict=True):
        top = t.argsort(descending=True)[:4]
        p, q = (v.exp() / v.exp().sum() for v in (t, q))
        expected += sum(p[i] * (p[i] / q[i]).log() for i in top) / 3
    assert kl_top_loss(logits, truth, top=4) == pytest.approx(expected.item(), rel=1e-5)
    full = torch.nn.functional.kl_div(
        logits.log_softmax(-1), truth.softmax(-1), reduction="batchmean"
    ).item()
    assert kl_top_loss(logits, truth, top=1000) == pytest.approx(full, rel=1e-5)


def test_the_klt_diagonalises_the_mean_covariance_of_what_R1_turns(tokens):
    model = tiny_model(dtype=torch.float32)
    Q = eigenvectors(adapt(model), tokens, 48).float()
    H = sum(
        H[site] / H[site].diagonal().mean()
        for H in hessians(adapt(model), tokens)
        for site in ("q", "gate")
    )
    turned = Q.T @ H @ Q
    assert (turned - torch.diag(turned.diagonal())).abs().max() < 1e-4 * turned.abs().max()


@pytest.mark.parametrize("learn", RIVALS)
def test_a_loss_that_explodes_names_step_and_module_and_keeps_the_last_good_rotation(
    learn, tokens, monkeypatch
):
    model = tiny_model(dtype=torch.float32)
    show = Student.show
    shown = []

    def poisoned(student, rotation):
        show(student, rotation)
        shown.append(1)
        if len(shown) > 3:
            student._family.linears(1)["gate"].weight.data.fill_(float("inf"))

    monkeypatch.setattr(Student, "show", poisoned)
    with pytest.raises(
        rl.LearningFailed,
        match=r"the loss is nan at step 3, first in layers\.1\.gate: learn with a lower rate",
    ) as failed:
        learn(model, tokens, steps=10, **W3)
    assert len(failed.value.rotation.history) == 3
    assert rl.fuse(model, failed.value.rotation)


@pytest.mark.parametrize("learn", RIVALS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing is rounded, so there is nothing to learn from"),
        (
            {"quant": rl.WeightQuant(), "preset": "gpu"},
            "unknown preset 'gpu': choose one of paper, laptop",
        ),
        (
            {"quant": rl.WeightQuant(), "steps": 0},
            "steps must be a whole number of at least 1, not 0",
        ),
        ({"quant": rl.WeightQuant(), "lr": float("nan")}, "lr must be a positive number, not nan"),
        ({"quant": rl.WeightQuant(group_size=7)}, "group_size 7 doesn't divide the 48 inputs"),
        ({"quant": 4}, "quant must be a WeightQuant"),
        ({"activations": 4}, "an ActivationQuant such as"),
        (
            {"quant": rl.WeightQuant(), "preset": "paper"},
            "4 calibration windows are too few for batches of 8",
        ),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(learn, settings, message, tokens, monkeypatch):
    monkeypatch.setattr(Student, "__init__", lambda *args: pytest.fail("learning had begun"))
    with pytest.raises(ValueError, match=message):
        learn(tiny_model(dtype=torch.float32), tokens, **settings)


def test_the_klt_turns_what_r1_reads_into_uncorrelated_coordinates_before_hadamard(tokens):
    model = tiny_model(dtype=torch.float32)
    rotation = rl.klt_rotation(model, tokens, seed=3)
    start = starting_point(adapt(model), seed=3)
    with coarse_products():
        KLT = eigenvectors(adapt(model), tokens, 48)
    torch.testing.assert_close(rotation.R1 @ start.R1.double().T, KLT, atol=1e-6, rtol=0)
    torch.testing.assert_close(rotation.R2.float(), start.R2)


def test_a_rotation_can_be_learned_on_rounded_activations_and_evaluated_without(folder):
    how = {"steps": 2, "learning_windows": 2, "learned_on": "activations"}
    weights_alone = rl.Recipe(
        model=str(folder / "model"), text="wikitext2", rotation="spinquant", window=32,
        calibration_windows=2, test_windows=2, learned_bits=4, **how,
    )  # fmt: skip
    rounded = replace(weights_alone, learned_bits=None, activation_bits=4)
    model, _ = rl.load(str(folder / "model"))
    one, other = (rl.make_rotation(recipe, model)[0] for recipe in (weights_alone, rounded))
    assert torch.equal(one.R1, other.R1)
    assert weights_alone.precision == "W4A16"
    assert replace(weights_alone, activation_bits=8).rotation_reads == weights_alone.rotation_reads
    assert rl.run(weights_alone).metrics["kl"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learned_bits": 4}, "learned_bits belongs to the rotations spinquant, ostquant"),
        ({"learned_bits": 4, "rotation": "spinquant"}, "they need learned_on 'activations'"),
        (
            {"learned_bits": 1, "rotation": "spinquant", "learned_on": "activations"},
            r"learned_bits \(unless it is None\)",
        ),
        (
            {
                **{"learned_bits": 8, "activation_bits": 8},
                **{"rotation": "spinquant", "learned_on": "activations"},
            },
            "learned_bits 8 are the activation_bits",
        ),
    ],
)
def test_bits_that_nothing_is_learned_on_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        rl.Recipe(**settings)
