import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rotlib.rotations.hadamard import apply_hadamard, hadamard, hadamard_factors

PAPER_WIDTHS = [576, 1536, 4864, 9728, 18944, 25600, 29568]
OTHER_WIDTHS = [
    64,
    128,
    768,
    896,
    960,
    2048,
    2560,
    3072,
    3584,
    4096,
    5120,
    5632,
    8192,
    8960,
    11008,
    13824,
    14336,
    17408,
    28672,
]


@pytest.mark.parametrize("n", PAPER_WIDTHS + OTHER_WIDTHS)
def test_factors_of_every_model_width_are_hadamard_in_exact_integers(n):
    order = 1
    for factor in hadamard_factors(n):
        m = len(factor)
        assert factor.abs().eq(1).all()
        assert torch.equal(factor.int() @ factor.int().T, m * torch.eye(m, dtype=torch.int32))
        order *= m
    assert order == n


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 36, 100, 576, 1536, 344])
def test_hadamard_has_entries_of_one_over_root_n_and_orthogonal_rows(n):
    H = hadamard(n)
    assert H.dtype == torch.float64
    signs = (H * n**0.5).round()
    torch.testing.assert_close(H, signs / n**0.5, rtol=0, atol=1e-15)
    assert torch.equal(signs @ signs.T, n * torch.eye(n, dtype=torch.float64))


def test_the_missing_orders_below_500_are_those_that_neither_paley_nor_a_product_gives():
    missing = (
        "92 116 156 172 184 188 232 236 260 268 292 324 356 372 376 404 412 428 436 452 472 476"
    )
    assert [n for n in range(4, 500, 4) if _fails(n)] == [int(n) for n in missing.split()]


def _fails(n):
    try:
        hadamard_factors(n)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("n", [2, 12, 64, 576, 1536])
def test_applying_through_factors_equals_the_dense_product(n):
    x = torch.randn(3, 5, n, dtype=torch.float64)
    torch.testing.assert_close(apply_hadamard(x), x @ hadamard(n), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_no_gain(dtype):
    for n in (576, 11008):
        x = torch.randn(64, n, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert apply_hadamard(x).float().norm() / x.float().norm() == pytest.approx(1, abs=2e-4)


def operations(act) -> int:
    """How many of them torch counts in a call: no clock, so nothing beside it matters."""
    with FlopCounterMode(display=False) as counter:
        act()
    return counter.get_total_flops()


@pytest.mark.parametrize("n", PAPER_WIDTHS)
def test_the_online_hadamard_costs_less_than_a_quarter_of_the_dense_product(n):
    x, H = torch.randn(3, n), torch.empty(n, n)
    assert 0 < operations(lambda: apply_hadamard(x)) < operations(lambda: x @ H) / 4


def test_an_impossible_order_names_its_neighbours_and_the_block_alternative():
    with pytest.raises(ValueError, match=r"order 92 .* 88 and 96.* blocks of 4"):
        hadamard(92)


@pytest.mark.parametrize("n", [0, -4, 2.0, "64", True, 10**9 + 7])
def test_a_size_that_is_no_positive_integer_is_refused(n):
    with pytest.raises(ValueError, match="whole number from 1"):
        hadamard(n)
