import pytest
import torch
from conftest import exact_logits, tiny_model

import rotlib as rl
from rotlib.learning.descent import Descent, cayley, cayley_sgd_step
from rotlib.learning.objectives import (
    blended,
    sum_of_fourth_powers,
    token_matrices,
    weight_matrices,
)
from rotlib.learning.optrot import METHODS
from rotlib.learning.sampling import R2Rows, fourth_power
from rotlib.learning.start import starting_point
from rotlib.models.supported import adapt
from rotlib.rotations.rotation import Rotation, placed_weights


def weights_of(model, R4=False):
    return weight_matrices(adapt(model), R4)


def test_the_objective_is_the_fourth_power_of_the_fused_weights(any_model):
    rotation = rl.random_rotation(any_model, seed=5)
    objective = sum_of_fourth_powers(weights_of(any_model), rotation)
    rl.fuse(any_model, rotation)
    fused = sum(
        placed.module.weight.pow(4).sum().item()
        for placed in placed_weights(adapt(any_model), quantized_only=True)
    )
    assert objective == pytest.approx(fused, rel=1e-5)


@pytest.mark.parametrize("name", ["R1", "R2"])
def test_the_closed_gradient_is_the_derivative_of_the_objective(name):
    model = tiny_model("qwen2, biases")
    weights = weights_of(model)
    rotation = rl.random_rotation(model)
    R1, R2 = (R.float().requires_grad_() for R in (rotation.R1, rotation.R2))
    probe = Rotation(R1, R2)
    value = sum((matrix.rows("R1", probe) @ R1).pow(4).sum() for matrix in weights)
    value.backward()
    plain = Rotation(R1.detach(), R2.detach())
    if name == "R1":
        closed = sum(fourth_power(matrix.rows("R1", plain), plain.R1)[1] for matrix in weights)
        torch.testing.assert_close(closed, R1.grad, rtol=1e-3, atol=1e-2)
    else:
        torch.testing.assert_close(
            R2Rows(weights, plain).gradient(plain.R2), R2.grad, rtol=1e-3, atol=1e-2
        )


@pytest.mark.parametrize("method", METHODS)
def test_learning_lowers_the_objective_and_stays_orthogonal(method):
    model = tiny_model()
    rotation = rl.optrot(model, seed=1, method=method, steps=60)
    weights = weights_of(model)
    assert rotation.history[-1] < 0.97 * sum_of_fourth_powers(
        weights, starting_point(adapt(model), 1, False, False)
    )
    assert rotation.history[-1] == pytest.approx(sum_of_fourth_powers(weights, rotation), rel=1e-4)
    assert rotation.orthogonality_error() < 1e-6
    assert rotation.R1.dtype == torch.float64
    assert rotation.R1.shape == (48, 48)
    assert rotation.R2.shape == (2, 2, 8, 8)


def test_the_default_reaches_the_papers_objective():
    model = tiny_model()
    ours = rl.optrot(model, seed=0, steps=300).history[-1]
    papers = rl.optrot(model, seed=0, method="cayley-sgd", steps=300).history[-1]
    assert ours < 1.005 * papers


def test_the_same_seed_learns_the_same_rotation_and_another_seed_another():
    model = tiny_model()
    first, again, other = (rl.optrot(model, seed=seed, steps=20) for seed in (0, 0, 1))
    assert torch.equal(first.R1, again.R1)
    assert torch.equal(first.R2, again.R2)
    assert not torch.allclose(first.R1, other.R1)


def test_learning_leaves_the_model_alone(tokens):
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rl.optrot(model, steps=5)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_with_R4_the_objective_is_that_of_the_weights_behind_it():
    model = tiny_model()
    rotation = rl.optrot(model, seed=0, steps=40, R4=True)
    assert rotation.online == ["R4"]
    rl.fuse(model, rotation)
    fused = sum(
        placed.module.weight.pow(4).sum().item()
        for placed in placed_weights(adapt(model), quantized_only=True)
    )
    assert rotation.history[-1] == pytest.approx(fused, rel=1e-4)


def test_sampled_tokens_are_what_the_folded_model_reads(tokens):
    model = tiny_model("qwen2, biases")
    matrices = token_matrices(adapt(model), tokens, seed=0, tokens=50)
    assert [matrix.values.shape[0] for matrix in matrices] == [50] * 6
    folded = tiny_model("qwen2, biases")
    rl.fuse(folded, rl.Rotation(None, None))
    read = {}
    for layer in range(2):
        for name, linear in adapt(folded).linears(layer).items():
            linear.register_forward_pre_hook(
                lambda _, args, key=(layer, name): read.update({key: args[0].flatten(0, 1)})
            )
    exact_logits(folded, tokens)
    order = torch.randperm(tokens.numel(), generator=torch.Generator().manual_seed(0))
    positions = (
        torch.cat([torch.tensor([0, 32, 64, 96]), order[order % 32 > 0]])[:50].sort().values
    )  # each window's first, then others
    for matrix, key in zip(
        matrices, [(layer, name) for layer in range(2) for name in ("q", "o", "gate")], strict=True
    ):
        expected = read[key][positions]
        expected = expected / expected.square().mean(dim=1, keepdim=True).sqrt().clamp_min(
            1e-12
        )  # the pad token's embedding is zero
        torch.testing.assert_close(matrix.values, expected, rtol=1e-4, atol=1e-4)


def test_a_random_rotation_has_the_value_that_blending_divides_by(tokens):
    model = tiny_model()
    for matrices in (weights_of(model), token_matrices(adapt(model), tokens, seed=0)):
        probe = rl.random_rotation(model)
        expected = sum(matrix.as_random(probe) for matrix in matrices)
        found = [
            sum_of_fourth_powers(matrices, rl.random_rotation(model, seed)) for seed in range(40)
        ]
        assert sum(found) / 40 == pytest.approx(expected, rel=0.03)


def test_blending_weighs_both_sides_as_its_share_says(tokens):
    model = tiny_model()
    rotation = rl.random_rotation(model)
    sides = weights_of(model), token_matrices(adapt(model), tokens, seed=0)
    weights, activations = (
        sum_of_fourth_powers(side, rotation) / sum(m.as_random(rotation) for m in side)
        for side in sides
    )
    blend = sum_of_fourth_powers(blended(*sides, 0.3, rotation), rotation)
    assert blend == pytest.approx(0.7 * weights + 0.3 * activations, rel=1e-5)


def test_kurtail_lowers_the_tokens_optrot_the_weights_and_mixed_both(tokens):
    model = tiny_model()
    weights, activations = weights_of(model), token_matrices(adapt(model), tokens, seed=0)
    rotations = {
        "kurtail": rl.kurtail(model, tokens),
        "optrot": rl.optrot(model),
        "mixed": rl.mixed(model, tokens, 0.5),
    }
    W, A = (
        {name: sum_of_fourth_powers(side, R) for name, R in rotations.items()}
        for side in (weights, activations)
    )
    assert W["optrot"] < W["mixed"] < W["kurtail"]
    assert A["kurtail"] < A["mixed"] < A["optrot"]
    assert all(rotation.orthogonality_error() < 1e-6 for rotation in rotations.values())


@pytest.mark.parametrize("share", [0, 1, -0.1, "0.5", True, None])
def test_a_share_outside_zero_and_one_is_refused(share, tokens):
    with pytest.raises(ValueError, match="share must be a number between 0 and 1, both excluded"):
        rl.mixed(tiny_model(), tokens, share)


def test_cayley_is_orthogonal_and_follows_the_exponential():
    S = torch.randn(3, 16, 16, dtype=torch.float64)
    S = S - S.mT
    Q = cayley(S)
    torch.testing.assert_close(Q @ Q.mT, torch.eye(16, dtype=torch.float64).expand(3, -1, -1))
    torch.testing.assert_close(cayley(1e-3 * S), torch.matrix_exp(-1e-3 * S), rtol=0, atol=1e-7)


def test_a_descent_step_lowers_a_smooth_function():
    A = torch.randn(12, 12, dtype=torch.float64)
    descent = Descent(torch.eye(12, dtype=torch.float64))
    values = []
    for _ in range(200):
        values.append((descent.R - A).square().sum().item())
        descent.step(2 * (descent.R - A), 0.02)
    U, _, Vh = torch.linalg.svd(A)
    assert values[-1] < values[0]
    assert values[-1] < (U @ Vh - A).square().sum().item() * 1.5


def test_rows_in_bfloat16_give_the_slope_to_a_hundredth():
    R = torch.linalg.qr(torch.randn(64, 64))[0]
    rows = torch.randn(500, 64)
    exact, rounded = (fourth_power(x, R)[1] for x in (rows, rows.bfloat16()))
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.01 * exact.norm()


def test_the_papers_step_descends_and_stays_orthogonal():
    rows = torch.randn(200, 16, dtype=torch.float64) ** 3
    R = torch.eye(16, dtype=torch.float64)
    first, _ = fourth_power(rows, R)
    for _ in range(50):
        value, gradient = fourth_power(rows, R)
        R = cayley_sgd_step(R, gradient, 1.0)
    assert value < first
    assert (R @ R.T - torch.eye(16, dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "adam"}, "unknown method 'adam': choose one of sampled, cayley-sgd"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"seed": -1}, "seed must be a whole number"),
    ],
)
def test_unknown_choices_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rl.optrot(tiny_model(), **arguments)
