import pytest
import torch
from conftest import tiny_model
from test_fuse import random_scales

import rotlib as rl
from rotlib.measure.bounds import stage_bounds
from rotlib.models.families import READERS
from rotlib.models.supported import adapt
from rotlib.quantization.hessian import (
    DAMPING,
    damped,
    factorise,
    hessians,
    pivots,
    pivots_and_slope,
)
from rotlib.rotations.rotation import Rotation, placed_in_layer, times


def covariance(n: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8 * n, n, generator=generator, dtype=torch.float64) @ torch.randn(
        n, n, generator=generator, dtype=torch.float64
    )
    return x.T @ x / len(x)


def recollected(model, tokens) -> list[dict[str, torch.Tensor]]:
    """H of every linear's own inputs, by hooks, in one forward pass."""
    family = adapt(model)
    found = [{} for _ in family.layers]
    for layer in range(len(family.layers)):
        for stage in READERS:

            def hook(module, args, layer=layer, site=stage[0]):
                x = args[0].flatten(0, -2).double()
                found[layer][site] = x.T @ x / len(x)

            family.linears(layer)[stage[0]].register_forward_pre_hook(hook)
    model(tokens)
    return found


@pytest.mark.parametrize("R4", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_hessian_rotated_analytically_is_the_rotated_models_own(dense_model, tokens, scaled, R4):
    family = adapt(dense_model)
    collected = list(hessians(adapt(dense_model), tokens))
    rotation = rl.random_rotation(dense_model, R4=R4)
    rotation.scales = random_scales(dense_model) if scaled else {}
    turned = []
    for layer, H in enumerate(collected):
        turns = {
            weight.site: rotation.on_inputs(weight.at, layer)
            for weight in placed_in_layer(family, layer)
        }
        turned.append(
            {
                site: times(times(matrix.double(), turns[site]).mT, turns[site])
                for site, matrix in H.items()
            }
        )
    for ours, own in zip(turned, recollected(rl.fuse(dense_model, rotation), tokens), strict=True):
        for site in ("q", "o", "gate", "down"):
            torch.testing.assert_close(
                ours[site], own[site], rtol=1e-4, atol=1e-4 * own[site].abs().max().item()
            )


def test_the_pivots_are_those_of_the_ldl_factorisation():
    H = covariance()
    D = pivots(H)
    M, _ = factorise(H, damping=1e-12)
    U = M / M.diagonal()
    torch.testing.assert_close(U @ torch.diag(D) @ U.T, H)
    assert (U.tril(-1) == 0).all()
    left = torch.linalg.inv(
        H[-1:, -1:]
    )  # the last pivot is the last variance, the first what all others leave of the first
    assert D[-1] == pytest.approx(1 / left.item())
    assert D[0] == pytest.approx(1 / torch.linalg.inv(H)[0, 0].item())


def test_the_closed_slope_of_tr_D_is_what_autograd_finds():
    H = covariance().requires_grad_()
    pivots(H).sum().backward()
    trace, slope = pivots_and_slope(H.detach())
    assert trace == pytest.approx(pivots(H.detach()).sum().item())
    torch.testing.assert_close(slope, (H.grad + H.grad.mT) / 2)


def test_tr_D_lies_between_its_floor_and_tr_H_which_the_eigenbasis_reaches():
    H = covariance()
    floor = len(H) * (torch.logdet(H) / len(H)).exp()
    R = torch.linalg.qr(
        torch.randn(24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    )[0]
    for turned in (H, R.T @ H @ R):
        assert floor <= pivots(turned).sum() <= H.trace()
    Q = torch.linalg.eigh(H).eigenvectors
    assert pivots(Q.T @ H @ Q).sum() == pytest.approx(H.trace().item())


def test_a_covariance_that_no_damping_mends_is_refused_by_name():
    with pytest.raises(
        ValueError,
        match=r"the inputs of layers\.3\.o have no positive definite covariance, even damped by 1",
    ):
        damped(-covariance(), "layers.3.o")


def test_damping_moves_with_the_rotation():
    H = covariance()
    R = torch.linalg.qr(
        torch.randn(24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    )[0]
    torch.testing.assert_close(damped(R.T @ H @ R, "x"), R.T @ damped(H, "x") @ R)


@pytest.mark.parametrize("clip_search", [False, True])
def test_errors_stay_below_their_bounds_and_gptq_below_rtn(clip_search):
    generator = torch.Generator().manual_seed(3)
    W, H = torch.randn(40, 24, generator=generator), covariance()
    (line,) = stage_bounds({"q": W}, H, rl.WeightQuant(clip_search=clip_search))
    assert line["gptq_error"] < line["rtn_error"] < line["energy"]
    assert line["floor"] < line["tr_D"] < line["tr_H"] * (1 + DAMPING)
    assert line["row_bound"] < line["gptq_bound"] < line["rtn_bound"]
    assert line["rtn_bound"] == pytest.approx(line["gptq_bound"] * line["tr_H"] / line["tr_D"])
    if not clip_search:
        assert line["gptq_error"] < line["row_bound"]
    by_hand = W.abs().max() ** 2 * 40 * line["tr_D"] / 15**2  # μ² ‖W‖²_F / n = m · max|W|²
    assert line["gptq_bound"] == pytest.approx(by_hand.item(), rel=1e-5)


def test_a_rotation_of_nothing_leaves_hessians_alone(tokens):
    model = tiny_model()
    weight = next(placed_in_layer(adapt(model), 0))
    assert Rotation(None, None).on_inputs(weight.at, 0) is None
