from importlib import import_module

import pytest
import torch
from conftest import SHAPE, tiny_model
from transformers import AutoModelForCausalLM, Qwen2Config

import rotlib as rl
from rotlib.models.supported import adapt
from rotlib.models.walk import final_hidden
from rotlib.quantization import coordinate, solver
from rotlib.quantization.coordinate import CoordinateDescent
from rotlib.quantization.grids import fit_grid, round_to_nearest
from rotlib.quantization.hessian import Hessian, token_weights
from rotlib.quantization.refit import refitted
from rotlib.quantization.solver import Solver

gptq_module = import_module(
    "rotlib.quantization.gptq"
)  # rotlib.gptq, the attribute, is the function


def problem(rows=24, n=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(4 * n, n, generator=generator) @ torch.randn(n, n, generator=generator) / n**0.5
    X[:, 7] *= 20  # an outlier channel
    return torch.randn(rows, n, generator=generator), 2 * X.T @ X / len(X)


def gptq_slowly(W, H, quant, act_order, damping):
    """GPTQ as first written: H⁻¹ updated column by column, no blocks, no shared factor, float64."""
    W, H = W.double(), H.double()
    order = (
        H.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(H))
    )
    group = quant.group_size or len(H)
    original = W.clone()
    inverse = torch.linalg.inv(H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype))
    Q = torch.zeros_like(W)
    left = order.tolist()
    grids = {}
    for step, j in enumerate(order.tolist()):
        g = j // group
        if g not in grids:
            fresh = not act_order and quant.group_size
            source = W if fresh else original
            grids[g] = fit_grid(source[:, g * group : (g + 1) * group].float().contiguous(), quant)
        Q[:, j] = grids[g].round(W[:, j : j + 1].float()).squeeze(1)
        error = (W[:, j] - Q[:, j]) / inverse[j, j]
        rest = left[step + 1 :]
        W[:, rest] -= torch.outer(error, inverse[j, rest])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j, :]) / inverse[j, j]
    return Q


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 32, 64, 128, 256])
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocked_solver_agrees_with_gptq_column_by_column(symmetric, group_size, act_order):
    W, H = problem()
    quant = rl.WeightQuant(bits=3, group_size=group_size, symmetric=symmetric)
    Q = Solver(quant, act_order)(W, H)[0].dense()
    slow = gptq_slowly(W, H, quant, act_order, 0.01)
    # float32 and float64 may round a tie apart, and everything after it moves; nearly all codes
    # must agree
    assert ((Q - slow).abs() < 1e-4).float().mean() > 0.97
    loss, slow_loss = (
        torch.trace((A - W).double() @ H.double() @ (A - W).double().T) for A in (Q, slow)
    )
    assert loss == pytest.approx(slow_loss.item(), rel=0.02)


@pytest.mark.parametrize("group_size", [None, 32, 128])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_has_less_proxy_loss_than_rounding_to_nearest(group_size, act_order):
    W, H = problem(seed=1)
    quant = rl.WeightQuant(bits=4, group_size=group_size)
    Q, error, damping, fallback = Solver(quant, act_order)(W, H)
    E = round_to_nearest(W, quant).dense() - W
    assert error.sum() < 0.7 * (E @ H * E).sum()
    assert not fallback
    assert damping == 0.01
    for row in Q.dense():
        assert len(row.unique()) <= 16 * (256 // (group_size or 256))


def test_an_identity_hessian_gives_rounding_to_nearest():
    W, _ = problem()
    Q, *_ = Solver(rl.WeightQuant())(W, torch.eye(256))
    torch.testing.assert_close(Q.dense(), round_to_nearest(W, rl.WeightQuant()).dense())


def test_dead_inputs_get_zero_weights_and_do_no_harm():
    W, H = problem()
    H[5, :] = H[:, 5] = 0
    Q = Solver(rl.WeightQuant())(W, H)[0].dense()
    assert Q[:, 5].abs().max() == 0
    assert torch.isfinite(Q).all()


def test_a_singular_hessian_climbs_the_damping_ladder():
    W, H = problem()
    H = H - 0.05 * H.diagonal().mean() * torch.eye(256)  # no longer positive
    _, _, damping, fallback = Solver(rl.WeightQuant())(W, H)
    assert damping in (0.1, 1.0)
    assert not fallback


def test_a_hopeless_hessian_falls_back_to_rtn_and_is_counted(tokens, monkeypatch):
    W, H = problem()
    Q, _, _, fallback = Solver(rl.WeightQuant())(W, -H)
    assert fallback
    torch.testing.assert_close(Q.dense(), round_to_nearest(W, rl.WeightQuant()).dense())

    monkeypatch.setattr(solver, "factorise", lambda H, damping: (None, 1.0))
    report = rl.gptq(tiny_model(dtype=torch.float32), tokens, rl.WeightQuant())
    assert report.fallbacks == len(report.modules) == 14


def gptaq_slowly(W, H, C, quant, damping):
    """GPTAQ column by column: each one's rounding error and its share of the inputs' drift go to
    all columns behind it.
    """
    W, H, C = W.double(), H.double(), C.double()
    inverse = torch.linalg.inv(H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype))
    U = torch.linalg.cholesky(inverse, upper=True)
    grid = fit_grid(W.float(), quant)
    W, Q = W.clone(), torch.zeros_like(W)
    for j in range(len(H)):
        w = W[:, j].clone()
        Q[:, j] = grid.round(w.float().unsqueeze(1)).squeeze(1)
        drift = (C[j] @ U.T) * (torch.arange(len(H)) > j) @ U
        W[:, j + 1 :] -= torch.outer((w - Q[:, j]) / U[j, j], U[j, j + 1 :])
        W[:, j + 1 :] += torch.outer(w, drift[j + 1 :])
    return Q


def test_blocked_gptaq_agrees_with_gptaq_column_by_column():
    W, H = problem()
    C = 0.05 * torch.randn(256, 256, generator=torch.Generator().manual_seed(2)) @ H
    quant = rl.WeightQuant(bits=4, clip_search=False)
    Q, _, _, _ = Solver(quant)(W, H, C)
    slow = gptaq_slowly(W, H, C, quant, 0.01).float()
    assert (Q.dense() - slow).abs().gt(1e-4).float().mean() < 0.01  # ties and rounding aside
    plain, _, _, _ = Solver(quant)(W, H)
    assert (Q.dense() - plain.dense()).abs().gt(1e-4).float().mean() > 0.05


def test_gptaq_brings_the_outputs_nearer_to_those_of_unquantized_inputs():
    W, H = problem()
    generator = torch.Generator().manual_seed(5)
    original = torch.linalg.cholesky(H) @ torch.randn(256, 8192, generator=generator)
    x = original + 0.3 * original.flip(0) + 0.1 * torch.randn(256, 8192, generator=generator)
    H, C = x @ x.T / 8192, (original - x) @ x.T / 8192
    quant = rl.WeightQuant(bits=4)
    errors = [
        (Solver(quant)(W, H, drift)[0].dense() @ x - W @ original).square().mean()
        for drift in (None, 0.25 * C, C)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_static_groups_keep_the_scales_of_the_original_weights():
    W, H = problem()
    quant = rl.WeightQuant(group_size=32)
    original = round_to_nearest(W, quant).scale
    static = Solver(quant, static_groups=True)(W, H)[0]
    assert torch.equal(static.scale, original)
    assert torch.equal(Solver(quant, act_order=True)(W, H)[0].scale, original)
    updated = Solver(quant)(W, H)[0]
    assert not torch.equal(updated.scale[:, 1:], original[:, 1:])


def test_static_groups_without_groups_are_refused(tokens):
    with pytest.raises(ValueError, match="the grid needs a group_size"):
        rl.gptq(tiny_model(dtype=torch.float32), tokens, rl.WeightQuant(), static_groups=True)


def descended_slowly(Q, W, H, WC, sweeps):
    """Coordinate descent one code at a time, each chosen among all codes by the whole error."""
    target = W + WC @ torch.linalg.inv(H)  # completes the square
    codes, scale = Q.codes.double(), Q.scale.double()
    candidates = torch.arange(-8, 8, dtype=torch.double)
    for _ in range(sweeps):
        for row in range(len(W)):
            for j in range(len(H)):
                tried = codes[row].repeat(16, 1)
                tried[:, j] = candidates
                apart = tried * scale[row] - target[row]
                codes[row] = tried[((apart @ H) * apart).sum(dim=1).argmin()]
    return codes


def test_coordinate_descent_takes_the_best_code_of_each_column_in_turn():
    W, H = problem(rows=3, n=72)
    H += 0.05 * H.diagonal().mean() * torch.eye(72)
    C = 0.05 * torch.randn(72, 72, generator=torch.Generator().manual_seed(2)) @ H
    Q = round_to_nearest(W, rl.WeightQuant())
    fast = CoordinateDescent(rl.WeightQuant(), 2)(Q, W, H, C)
    slow = descended_slowly(Q, W.double(), H.double(), W.double() @ C.double(), 2)
    assert (fast.codes != slow).float().mean() < 0.01  # ties and rounding aside
    assert (fast.codes != Q.codes).float().mean() > 0.1


@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("better", [{"scale_search": True}, {"descent": 3}])
def test_better_codes_have_less_error_in_every_row(group_size, symmetric, better):
    W, H = problem()
    quant = rl.WeightQuant(bits=3, group_size=group_size, symmetric=symmetric)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(256)
    errors = []
    for how in ({}, better):
        E = Solver(quant, **how)(W, H)[0].dense() - W
        errors.append((E @ damped * E).sum(dim=1))
    assert (errors[1] <= errors[0] * (1 + 1e-4)).all()
    assert errors[1].sum() < 0.99 * errors[0].sum()


def test_better_codes_bring_gptaqs_outputs_nearer_too():
    W, H = problem()
    C = 0.01 * torch.randn(256, 256, generator=torch.Generator().manual_seed(2)) @ H

    def error(**how):
        E = Solver(rl.WeightQuant(), **how)(W, H, C)[0].dense() - W
        return ((E @ H - 2 * W @ C) * E).sum()

    assert error(descent=2) < error()
    assert error(scale_search=True) < error()


def test_gptaq_on_a_model_is_gptq_where_inputs_have_not_drifted(tokens):
    by_gptq, by_gptaq = tiny_model(dtype=torch.float32), tiny_model(dtype=torch.float32)
    rl.gptq(by_gptq, tokens, rl.WeightQuant(bits=4))
    rl.gptq(by_gptaq, tokens, rl.WeightQuant(bits=4), asymmetry=0.25)
    same = [
        (a == b).all().item()
        for a, b in zip(
            by_gptq.model.layers.parameters(), by_gptaq.model.layers.parameters(), strict=True
        )
    ]
    assert all(same[:3])  # q, k and v of the first layer read the embedding
    assert not all(same)


def test_one_batch_and_many_give_the_same_model(tokens, monkeypatch):
    models = []
    for batch_tokens in (10**6, 32):
        monkeypatch.setattr("rotlib.models.walk.BATCH_TOKENS", batch_tokens)
        model = tiny_model(dtype=torch.float32)
        rl.gptq(model, tokens, rl.WeightQuant(bits=8), asymmetry=0.25)
        models.append(model)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("asymmetry", [0.0, 0.25])
def test_batches_that_wait_and_batches_that_start_anew_give_the_same_bits(
    tokens, monkeypatch, asymmetry
):
    monkeypatch.setattr("rotlib.models.walk.BATCH_TOKENS", 32)
    models, calls = [], []
    for waiting in (1, 2, 100):
        monkeypatch.setattr(
            gptq_module, "batches_that_wait", lambda *_, waiting=waiting, **__: waiting
        )
        model = tiny_model(dtype=torch.float32)
        linear = model.model.layers[0].self_attn.q_proj
        linear.register_forward_hook(lambda *_, waiting=waiting: calls.append(waiting))
        rl.gptq(model, tokens, rl.WeightQuant(bits=4), asymmetry=asymmetry)
        models.append(model)
    for a, *others in zip(*(model.parameters() for model in models), strict=True):
        assert all(torch.equal(a, other) for other in others)
    # each linear once a batch where all wait; the others go through q_proj again for o, gate, down
    # and on to the next layer. The stream of GPTAQ has q_proj of its own, with the same hook
    streams = 2 if asymmetry else 1
    assert calls.count(100) == streams * len(tokens)
    assert calls.count(1) == streams * (1 + 4 * (len(tokens) - 1))


def test_an_error_inside_a_waiting_batch_reaches_the_caller(tokens, monkeypatch):
    monkeypatch.setattr("rotlib.models.walk.BATCH_TOKENS", 32)
    model = tiny_model(dtype=torch.float32)

    def interrupt(*_):
        raise KeyboardInterrupt

    model.model.layers[1].mlp.act_fn.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        rl.gptq(model, tokens, rl.WeightQuant(bits=4))


def test_every_hessian_is_of_inputs_made_by_what_is_already_quantized(tokens, monkeypatch):
    seen = {}
    original = gptq_module._quantize_together

    def spy(linears, H, *others):
        seen[next(iter(linears))] = H
        original(linears, H, *others)

    monkeypatch.setattr(gptq_module, "_quantize_together", spy)
    model = tiny_model(dtype=torch.float32)
    rl.gptq(model, tokens, rl.WeightQuant(bits=3))
    # the quantized model's own inputs to the last down_proj: q, k, v, o, gate, up of both layers
    # are as they were then
    inputs = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].flatten(0, 1))
    )
    model(tokens)
    expected = inputs[0].T @ inputs[0] / inputs[0].shape[0]
    torch.testing.assert_close(seen["layers.1.down"], expected, rtol=1e-3, atol=1e-3)


def test_gptq_beats_rtn_on_a_models_own_outputs(tokens):
    original = tiny_model(dtype=torch.float32)
    by_gptq, by_rtn = tiny_model(dtype=torch.float32), tiny_model(dtype=torch.float32)
    rl.gptq(by_gptq, tokens, rl.WeightQuant(bits=4))
    rl.rtn(by_rtn, rl.WeightQuant(bits=4))
    stream = tokens.flatten()
    assert rl.kl_divergence(original, by_gptq, stream, window=32) < rl.kl_divergence(
        original, by_rtn, stream, window=32
    )


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.zeros(64, dtype=torch.long), "shape"),
        (torch.zeros(2, 32), "LongTensor"),
        (torch.full((2, 32), 96), "token ids from 0 to 95"),
        (torch.zeros(9, 1, dtype=torch.long), "2 tokens or more"),
        (torch.zeros(1, 65, dtype=torch.long), "reads 64 at most"),
        (None, "not NoneType"),
        (torch.zeros(0, 32, dtype=torch.long), "at least one window"),
    ],
)
def test_unusable_calibration_is_refused_before_any_work(calibration, message):
    model = tiny_model(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        rl.gptq(model, calibration, rl.WeightQuant())
    assert not getattr(model.config, "rotlib_quantized", False)


def test_an_interrupted_model_is_refused_everywhere_and_saved_as_well(
    tokens, monkeypatch, tmp_path
):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gptq_module, "_quantize_layer", interrupt)
    model = tiny_model(dtype=torch.float32)
    weights = rl.rtn(tiny_model(dtype=torch.float32), rl.WeightQuant())
    with pytest.raises(KeyboardInterrupt):
        rl.gptq(model, tokens, rl.WeightQuant())
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    for half in (model, saved):
        for use in (
            lambda it: rl.gptq(it, tokens, rl.WeightQuant()),
            lambda it: rl.restore(it, weights),
            lambda it: rl.perplexity(it, tokens.flatten(), 32),
            lambda it: rl.export(it, tmp_path / "out"),
        ):
            with pytest.raises(ValueError, match="was interrupted, so it is neither the original"):
                use(half)


@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize("group_size", [None, 8])
def test_refitted_scales_have_the_least_error_that_these_codes_can_have(group_size, drift):
    generator = torch.Generator().manual_seed(0)
    W, X = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((6, 32), (99, 32))
    )
    H = X.T @ X / len(X)
    C = 0.05 * torch.randn(32, 32, generator=generator, dtype=torch.float64) if drift else None
    Q = round_to_nearest(W, rl.WeightQuant(bits=3, group_size=group_size, symmetric=False))
    found = refitted(Q, W, H, C)
    assert torch.equal(found.codes, Q.codes)
    assert torch.equal(found.zero, Q.zero)
    scale = found.scale.clone().requires_grad_()
    with torch.enable_grad():
        off = found._replace(scale=scale).dense() - W
        error = (off @ H * off).sum() - (0 if C is None else 2 * (off * (W @ C)).sum())
        (slope,) = torch.autograd.grad(error, scale)
    changed = (found.scale != Q.scale).all(1)
    assert changed.sum() >= 5
    assert slope[changed].abs().max() < 1e-3 * (W @ H).abs().max()


def test_refit_makes_gptqs_error_smaller(tokens):
    errors = {}
    for refit in (False, True):
        model = tiny_model(dtype=torch.float32)
        report = rl.gptq(model, tokens, rl.WeightQuant(bits=3, group_size=8), refit=refit)
        errors[refit] = sum(module.error for module in report.modules if "layers.0" in module.name)
    assert errors[True] < 0.99 * errors[False]


def test_descent_ends_where_no_code_changes(tokens, monkeypatch):
    visited = []
    visit = coordinate.visit_strip
    monkeypatch.setattr(
        coordinate, "visit_strip", lambda *given: visited.append(1) or visit(*given)
    )
    quant = rl.WeightQuant(bits=2)
    W, H = torch.randn(8, 32), torch.eye(32)
    Q = round_to_nearest(W, quant)
    CoordinateDescent(quant, 100)(Q, W, H)
    assert len(visited) == 1  # of a strip of 32 columns: nothing is better than the nearest


def test_a_token_counts_at_most_as_the_cap_says():
    x = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    x[0, 0] *= 1000
    x[1] = 0
    energy = (x * token_weights(x, 4.0)).square().sum(-1)
    assert torch.allclose(energy[0, 0], 4 * x[0].square().sum(-1).median())
    assert torch.equal(token_weights(x, 1e9), torch.ones(2, 9, 1))
    assert not energy[1].any()


def test_capped_a_sink_no_longer_takes_the_codes_from_all_other_tokens():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(16, 96, generator=generator)
    x = torch.randn(1, 256, 96, generator=generator)
    x[0, 0] *= torch.logspace(4, 1, 96)
    error = {}
    for cap in (4.0, 1e9):
        hessian = Hessian()
        hessian.add(x * token_weights(x, cap))
        Q = Solver(rl.WeightQuant(bits=3))(W, hessian.take(), None)[0]
        error[cap] = ((x[0, 1:] @ (Q.dense() - W).T).norm() / (x[0, 1:] @ W.T).norm()).item()
    assert error[4.0] < 0.92 * error[1e9]


@pytest.mark.parametrize("asymmetry", [0.0, 0.5])
def test_a_cap_that_no_token_reaches_changes_no_code(tokens, asymmetry):
    plain, capped = (tiny_model(dtype=torch.float32) for _ in range(2))
    quant = rl.WeightQuant(bits=3)
    one = rl.gptq(plain, tokens, quant, asymmetry=asymmetry)
    other = rl.gptq(capped, tokens, quant, asymmetry=asymmetry, token_cap=1e9)
    assert all(
        torch.equal(one.weights[name].codes, other.weights[name].codes) for name in one.weights
    )


@pytest.mark.parametrize("cap", [0, -1.0, float("nan"), "4", True])
def test_a_cap_that_is_no_positive_number_is_refused(tokens, cap):
    with pytest.raises(ValueError, match="token_cap must be a positive number"):
        rl.gptq(tiny_model(dtype=torch.float32), tokens, rl.WeightQuant(), token_cap=cap)
    with pytest.raises(ValueError, match="token_cap must be a positive number"):
        rl.Recipe(token_cap=cap)


def test_layers_with_different_masks_are_each_given_their_own(tokens):
    config = Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    wanted = model(tokens).logits[:, :-1]
    for windows in (tokens, tokens[:, :8]):
        found = model.lm_head(torch.stack(final_hidden(adapt(model), windows)))
        assert (found - wanted[:, : windows.shape[1] - 1]).abs().max() < 1e-5
