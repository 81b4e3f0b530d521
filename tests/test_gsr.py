from copy import deepcopy

import pytest
import torch
from conftest import exact_logits, tiny_model

import rotlib as rl
from rotlib.learning.grouped import GroupR2Rows, GroupSampler, group_norms, sum_of_group_norms
from rotlib.learning.objectives import sum_of_fourth_powers, weight_matrices
from rotlib.learning.sampling import STEPS_A_DRAW
from rotlib.learning.start import starting_point
from rotlib.models.supported import adapt
from rotlib.rotations.fuse import ORTHOGONALITY_TOLERANCE
from rotlib.rotations.hadamard import block_sizes, sequency, walsh_order
from rotlib.rotations.rotation import as_blocks, as_matrix
from rotlib.study.store import Result
from rotlib.study.tables import Arm, judge, kl_by_precision

ARMS = {
    "GH": (None, "hadamard"),
    "GW": (None, "walsh"),
    "LH": (12, "hadamard"),
    "GSR": (12, "walsh"),
}


@pytest.mark.parametrize("n", [1, 2, 4, 32, 64, 128, 1024])
def test_the_rows_of_a_walsh_matrix_have_0_1_2_sign_changes(n):
    W = rl.walsh(n)
    assert torch.equal(sequency(W), torch.arange(n))
    torch.testing.assert_close(W @ W.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [12, 48, 576])
def test_elsewhere_walsh_is_the_constructed_matrix_sorted_by_sequency(n):
    W = rl.walsh(n)
    assert (sequency(W).diff() >= 0).all()
    assert {tuple(row) for row in W.tolist()} == {
        tuple(column) for column in rl.hadamard(n).T.tolist()
    }


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize(("block", "order"), ARMS.values(), ids=ARMS)
def test_the_four_arms_leave_the_logits(block, order, signs, any_model, tokens):
    before = exact_logits(any_model, tokens)
    rl.fuse(any_model, rl.gsr_rotation(any_model, order, block, signs, seed=3))
    assert (exact_logits(any_model, tokens) - before).abs().max() < 1e-9


@pytest.mark.parametrize(("block", "order"), ARMS.values(), ids=ARMS)
def test_an_R1_kept_as_factors_is_its_matrix_and_its_blocks(block, order):
    R1 = rl.gsr_rotation(tiny_model(), order, block, signs=True, seed=1).R1
    x = torch.randn(3, 5, 48, dtype=torch.float64)
    torch.testing.assert_close(R1(x), x @ as_matrix(R1), rtol=0, atol=1e-12)
    if block is None:
        with pytest.raises(ValueError, match="no blocks to learn within"):
            as_blocks(R1)
    else:
        assert as_blocks(R1).shape == (4, 12, 12)
        torch.testing.assert_close(as_matrix(as_blocks(R1)), as_matrix(R1), rtol=0, atol=0)
        torch.testing.assert_close(
            as_matrix(R1)[:12, :12],
            R1.signs[:12, None] * rl.hadamard(12)[:, R1.order if order == "walsh" else ...],
        )


def test_GH_with_signs_is_the_random_hadamard_rotation(tokens):
    model = tiny_model()
    one, other = (
        rl.gsr_rotation(model, "hadamard", signs=True, seed=4),
        rl.hadamard_rotation(model, seed=4),
    )
    assert torch.equal(as_matrix(one.R1), as_matrix(other.R1))
    assert torch.equal(one.R2, other.R2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"block": 5}, "blocks of 5 don't divide 48"),
        ({"block": 6}, "order 6"),
        ({"block": 12, "signs": torch.full((48,), 2.0)}, "48 numbers that are 1 or -1"),
        ({"block": 12, "signs": torch.ones(12)}, "48 numbers that are 1 or -1"),
        ({"block": 12, "order": torch.zeros(12, dtype=torch.long)}, "each of the 12 columns once"),
    ],
)
def test_factors_that_make_no_rotation_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        rl.BlockHadamard(48, **given)


def test_fusing_a_hadamard_R1_never_builds_its_matrix(monkeypatch, tokens):
    model = tiny_model()
    before = exact_logits(model, tokens)
    rotations = [
        rl.hadamard_rotation(model),
        *(rl.gsr_rotation(model, order, block) for block, order in ARMS.values()),
    ]

    def refuse(self):
        raise AssertionError("a dense matrix was built")

    monkeypatch.setattr(rl.BlockHadamard, "dense", refuse)
    for rotation in rotations:
        fused = rl.fuse(deepcopy(model), rotation)
        assert (exact_logits(fused, tokens) - before).abs().max() < 1e-9


def test_random_signs_flatten_the_expected_energy_of_every_coordinate_whatever_the_order():
    smooth = torch.arange(48, dtype=torch.float64).div(8).cos() + 2
    model = tiny_model()
    for block, order in ARMS.values():
        fixed = rl.gsr_rotation(model, order, block).R1(smooth).square()
        drawn = torch.stack(
            [
                rl.gsr_rotation(model, order, block, signs=True, seed=seed).R1(smooth).square()
                for seed in range(600)
            ]
        )
        for energies in (fixed, drawn.mean(0)):
            assert energies.sum().item() == pytest.approx(smooth.square().sum().item())
        blocks = (
            drawn.mean(0)
            / smooth.square().view(-1, block or 48).mean(1).repeat_interleave(block or 48)
        ).log()
        assert fixed.log().std() > 5 * blocks.std(), (
            "without signs, a smooth input's energy lies in few coordinates"
        )
        assert blocks.abs().max() < 0.35  # 600 draws of a χ²-like energy: 6 % a coordinate


def test_order_alone_changes_nothing_per_channel(tokens):
    model = tiny_model(dtype=torch.float32)
    quantized = []
    for order in ("hadamard", "walsh"):
        quantized.append(rl.fuse(deepcopy(model), rl.gsr_rotation(model, order)))
        rl.rtn(quantized[-1], rl.WeightQuant(bits=4))
    one, other = (model(tokens).logits for model in quantized)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3)
    assert (one - model(tokens).logits).abs().max() > 0.1


def test_order_changes_what_shares_a_group():
    model = tiny_model()
    codes = []
    for order in ("hadamard", "walsh"):
        rotated = rl.fuse(deepcopy(model), rl.gsr_rotation(model, order)).float()
        codes.append(rl.rtn(rotated, rl.WeightQuant(bits=2, group_size=8))["layers.0.q"])
    assert not torch.equal(codes[0].scale.sort().values, codes[1].scale.sort().values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"block": 5},
            "blocks of 5 don't divide the width 48: choose one of 2, 4, 8, 12, 16, 24, 48",
        ),
        (
            {"block": 6},
            "blocks of 6 have no Hadamard matrix, though they divide the width 48: "
            "choose one of 2, 4, 8, 12, 16, 24, 48",
        ),
        ({"block": 1}, "blocks of 1 have no Hadamard matrix"),
        ({"block": 0}, "block .* whole number of at least 1"),
        (
            {"block": 12, "order": "natural"},
            "unknown order 'natural': choose one of walsh, hadamard",
        ),
        ({"block": 12, "signs": "no"}, "signs must be True or False"),
        ({"block": 12, "seed": -1}, "seed must be a whole number"),
    ],
)
def test_an_impossible_arm_is_one_sentence_that_names_what_would_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        rl.gsr_rotation(tiny_model(), **arguments)


def test_a_width_without_a_walsh_matrix_names_the_orders_that_have_one():
    with pytest.raises(ValueError, match=r"order 92 .* 88 and 96.* blocks of 4"):
        rl.walsh(92)
    assert block_sizes(92) == [2, 4]
    assert walsh_order(1).tolist() == [0]


def test_learning_within_blocks_stays_in_them_and_reaches_less_than_learning_freely():
    model = tiny_model()
    start = rl.gsr_rotation(model, block=12)
    weights = weight_matrices(adapt(model), False)
    local, free = (
        rl.optrot(model, start=start, local=within, steps=150) for within in (True, False)
    )
    assert local.R1.shape == (4, 12, 12)
    assert free.R1.shape == (48, 48)
    assert local.orthogonality_error() < ORTHOGONALITY_TOLERANCE
    assert free.history[-1] < local.history[-1] < 0.99 * sum_of_fourth_powers(weights, start)
    dense = rl.Rotation(as_matrix(local.R1), local.R2)
    assert local.history[-1] == pytest.approx(sum_of_fourth_powers(weights, dense), rel=1e-4)


def test_local_learning_by_the_papers_method_agrees():
    model = tiny_model()
    start = rl.gsr_rotation(model, block=12)
    ours = rl.optrot(model, start=start, local=True, steps=300).history[-1]
    papers = rl.optrot(model, start=start, local=True, method="cayley-sgd", steps=300).history[-1]
    assert ours < 1.01 * papers


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("learn", [rl.optrot, rl.spinquant, rl.ostquant])
def test_every_method_learns_from_a_gsr_start(learn, local, tokens):
    model = tiny_model(dtype=torch.float32)
    data = () if learn is rl.optrot else (tokens,)
    how = {} if learn is rl.optrot else {"quant": rl.WeightQuant(bits=3)}
    start = rl.gsr_rotation(model, block=12)
    learned = learn(model, *data, start=start, local=local, steps=3, **how)
    assert learned.R1.shape == ((4, 12, 12) if local else (48, 48))
    assert learned.orthogonality_error() < ORTHOGONALITY_TOLERANCE
    other = learn(model, *data, steps=3, **how)
    assert not torch.allclose(as_matrix(learned.R1), as_matrix(other.R1), atol=1e-2)
    exact = tiny_model()
    before = exact_logits(exact, tokens)
    assert (exact_logits(rl.fuse(exact, learned), tokens) - before).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"start": "gsr"}, "the start must be a Rotation"),
        ({"start": rl.Rotation(None, None)}, "the start must be a Rotation with R1 and R2"),
        ({"local": True}, "no blocks to learn within"),
        ({"local": 1}, "local must be True or False"),
        (
            {"start": rl.random_rotation(tiny_model(), R4=True)},
            "the start has R4 on: learn with R3=False and R4=True",
        ),
        ({"group_size": 7}, "group_size 7 doesn't divide the 48 inputs of q_proj"),
        ({"group_size": 8, "method": "cayley-sgd"}, "descended by the method 'sampled'"),
    ],
)
def test_learning_refuses_what_it_cannot_start_from(how, message):
    with pytest.raises(ValueError, match=message):
        rl.optrot(tiny_model(), **how)


def test_learning_leaves_its_start_alone(tokens):
    model = tiny_model(dtype=torch.float32)
    start = rl.gsr_rotation(model, block=12).to("cpu", torch.float32)
    before = start.R2.clone()
    for learn in (rl.spinquant, rl.ostquant):
        learn(model, tokens, quant=rl.WeightQuant(bits=3), start=start, steps=2)
    assert torch.equal(start.R2, before)
    assert not start.R2.requires_grad


def test_a_group_whose_fourth_powers_vanish_has_no_slope():
    _, slope = group_norms(torch.full((1, 4), 5e-12), 4, across=False)
    assert slope.abs().max() < 1e-10


@pytest.mark.parametrize("across", [False, True])
def test_the_slope_of_group_norms_is_their_derivative(across):
    x = torch.randn(2, 8, 12, dtype=torch.float64, requires_grad=True)
    value, slope = group_norms(x, 4, across)
    by_hand = sum(
        x[b, i : i + 4, j].pow(4).sum().sqrt() if across else x[b, i, j : j + 4].pow(4).sum().sqrt()
        for b in range(2)
        for i in range(0, 8, 4 if across else 1)
        for j in range(0, 12, 1 if across else 4)
    )
    by_hand.backward()
    assert value.item() == pytest.approx(by_hand.item())
    torch.testing.assert_close(slope, x.grad)


def test_the_slopes_of_the_objective_for_groups_are_its_derivatives():
    model = tiny_model("qwen2, biases")
    matrices = weight_matrices(adapt(model), False)
    rotation = starting_point(adapt(model), 0)
    sampler = GroupSampler(matrices, rotation, 0, 8)
    value, slope = 0.0, 0.0
    for _ in range(20):  # draws
        sampler.draw(rotation)
        for number in range(STEPS_A_DRAW):
            part, gradient = sampler.slope(number, rotation.R1)
            value, slope = (
                value + part / (20 * STEPS_A_DRAW),
                slope + gradient / (20 * STEPS_A_DRAW),
            )
    assert value.item() == pytest.approx(sum_of_group_norms(matrices, rotation, 8), rel=0.01)
    S = torch.randn(48, 48, generator=torch.Generator().manual_seed(1))
    S2 = torch.randn(rotation.R2.shape, generator=torch.Generator().manual_seed(2))
    slopes = {"R1": slope, "R2": GroupR2Rows(matrices, rotation, 8).gradient(rotation.R2)}
    for name, skew, tolerance in (("R1", S - S.T, 0.05), ("R2", S2 - S2.mT, 0.01)):
        R = getattr(rotation, name).double()
        values = []
        for sign in (1, -1):
            moved = deepcopy(rotation)
            setattr(moved, name, R @ torch.linalg.matrix_exp(sign * 1e-3 * skew.double()))
            values.append(sum_of_group_norms(matrices, moved, 8))
        found = (slopes[name] * (R @ skew.double())).sum().item()
        assert found == pytest.approx((values[0] - values[1]) / 2e-3, rel=tolerance), name


def test_learning_for_groups_lowers_their_objective_below_what_plain_optrot_reaches():
    model = tiny_model()
    matrices = weight_matrices(adapt(model), False)
    plain = rl.optrot(model, seed=1, steps=300)
    grouped = rl.optrot(model, seed=1, steps=300, group_size=8)
    assert grouped.history[-1] == pytest.approx(sum_of_group_norms(matrices, grouped, 8), rel=1e-4)
    assert grouped.history[-1] < sum_of_group_norms(matrices, plain, 8)
    assert sum_of_fourth_powers(matrices, plain) < sum_of_fourth_powers(matrices, grouped)


def test_group_spread_by_hand():
    W = torch.tensor([[1.0, 1.0, 4.0, 4.0], [1.0, -1.0, 4.0, -4.0]])
    assert rl.group_spread(W, 2) == pytest.approx({"within": 0.0, "peak": 8.5 / 8.5})
    assert rl.group_spread(W[:, [0, 2, 1, 3]], 2) == pytest.approx(
        {"within": 1.0, "peak": 16 / 8.5}
    )
    assert rl.group_spread(torch.ones(2, 4), 2)["within"] == 1.0


def test_arms_are_named_as_the_paper_names_them():
    names = {
        "GH": {"R1_order": "hadamard"},
        "GW": {},
        "LH 64": {"R1_order": "hadamard", "block": 64},
        "GSR 32 ±": {"block": 32, "signs": True},
    }
    for name, settings in names.items():
        assert Arm(rl.Recipe(rotation="gsr", **settings), ()).rotation == name
    learned = {"rotation": "optrot", "start": "gsr", "block": 64}
    assert Arm(rl.Recipe(**learned), ()).rotation == "optrot from GSR 64"
    assert Arm(rl.Recipe(**learned, local=True), ()).rotation == "optrot within GSR 64"
    assert (
        Arm(rl.Recipe(rotation="optrot", grouped=True, group_size=32), ()).rotation
        == "optrot for groups"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rotation": "hadamard", "block": 64}, "block describes a Hadamard R1"),
        ({"rotation": "optrot", "signs": True}, "signs describes a Hadamard R1"),
        ({"rotation": "optrot", "start": "gsr", "local": True}, "local keeps R1 in blocks"),
        (
            {"rotation": "gsr", "start": "gsr"},
            "start belongs to the rotations optrot, spinquant, ostquant",
        ),
        ({"rotation": "optrot", "grouped": True}, "needs a group_size"),
        ({"rotation": "gsr", "R1_order": "paley"}, "unknown R1_order 'paley'"),
        ({"rotation": "gsr", "block": 0}, "block .* whole number of at least 1"),
    ],
)
def test_a_recipe_refuses_what_would_go_unread(settings, message):
    with pytest.raises(ValueError, match=message):
        rl.Recipe(**settings)


def test_a_diverged_arm_is_flagged_and_no_claim_is_judged_on_it():
    def arm(rotation, perplexity, bits=2):
        recipes = [rl.Recipe(rotation=rotation, bits=bits, seed=seed) for seed in range(3)]
        return Arm(
            recipes[0],
            tuple(
                Result(r.spec(), {"kl": 1.0, "perplexity": perplexity}, {}, 0, {"stages": {}})
                for r in recipes
            ),
        )

    broken, unreadable, working = (
        arm("none", 2e4),
        arm("random", float("nan")),
        arm("hadamard", 40.0),
    )
    assert broken.diverged
    assert unreadable.diverged
    assert not working.diverged
    assert "diverged" in broken.settings
    assert str(judge(working, broken)) == "undecided, none diverged"
    assert "(diverged)" in kl_by_precision({"none": {"W2": broken}})
