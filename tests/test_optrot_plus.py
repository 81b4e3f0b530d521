import pytest
import torch
from conftest import tiny_model

import rotlib as rl
from rotlib.learning.objectives import weight_matrices
from rotlib.learning.optrot_plus import FORMS, _Bound, _collect
from rotlib.learning.sampling import R2Rows, fourth_power
from rotlib.learning.start import starting_point
from rotlib.models.supported import adapt
from rotlib.quantization.hessian import pivots
from rotlib.rotations.rotation import Rotation, times


def bound_of(model, tokens, form, R4=False):
    family = adapt(model)
    matrices = weight_matrices(family, R4)
    return _Bound(matrices, _collect(family, tokens, R4), form)


@pytest.mark.parametrize("R4", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_objective_is_proxy_times_tr_D_of_the_rotated_model(tokens, form, R4):
    model = tiny_model("qwen2, biases")
    bound = bound_of(model, tokens, form, R4)
    rotation = rl.random_rotation(model, R4=R4)
    expected = 0.0
    for matrix, energy in zip(bound.matrices, bound.H.energies, strict=True):
        rotated = matrix.values.double()
        reads, writes = (None if R is None else R for R in rotation.at(matrix.site, matrix.layer))
        rotated = times(times(rotated, reads).mT, writes).mT
        H = {"R1": bound.H.R1, "R2": bound.H.R2}
        if matrix.site.reads in H:
            index = (
                matrix.layer
                if matrix.site.reads == "R2"
                else 2 * matrix.layer + (matrix.site.norm == "mlp_norm")
            )
            trace = pivots(
                times(times(H[matrix.site.reads][index].double(), reads).mT, reads)
            ).sum()
        else:
            trace = bound.H.down[matrix.layer]
        fourth = rotated.pow(4).sum()
        m, n = rotated.shape
        proxy = {
            "product": fourth,
            "bound": (m / n * fourth).sqrt(),
            "relative": (m / n * fourth).sqrt() / energy,
        }[form]
        expected += proxy * trace
    assert bound.value(rotation) == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_the_slopes_are_the_derivative_of_the_objective(tokens, form):
    model = tiny_model("llama")
    bound = bound_of(model, tokens, form)
    random = rl.random_rotation(model).to("cpu", torch.float32)
    bound.refresh(random)
    slope1 = bound.R1_slope(random.R1) + sum(
        m.factor * fourth_power(m.rows("R1", random), random.R1)[1] for m in bound.matrices
    )
    slope2 = bound.R2_slope(random.R2) + R2Rows(bound.matrices, random).gradient(random.R2)
    for name, slope in (("R1", slope1), ("R2", slope2)):
        R = getattr(random, name)
        S = torch.randn(R.shape, generator=torch.Generator().manual_seed(4))
        S = (S - S.mT) / 2
        moved = [getattr(random, name) @ torch.matrix_exp(sign * 1e-3 * S) for sign in (1, -1)]
        values = [
            bound.value(Rotation(**{"R1": random.R1, "R2": random.R2} | {name: R})) for R in moved
        ]
        assert (slope * (R @ S)).sum().item() == pytest.approx(
            (values[0] - values[1]) / 2e-3, rel=0.02, abs=1e-3 * abs(values[0])
        )


@pytest.mark.parametrize("form", FORMS)
def test_learning_lowers_its_own_objective_below_optrots(tokens, form):
    model = tiny_model()
    learned = rl.optrot_plus(model, tokens, seed=1, form=form, steps=200)
    bound = bound_of(model, tokens, form)
    assert learned.history[-1] == pytest.approx(bound.value(learned), rel=1e-4)
    assert learned.orthogonality_error() < 1e-6
    assert (
        learned.history[-1]
        < bound.value(rl.optrot(model, seed=1, steps=200))
        < bound.value(starting_point(adapt(model), 1, False, False))
    )


def test_too_few_tokens_and_unknown_forms_are_refused(tokens):
    model = tiny_model()
    too_few = "64 calibration tokens are too few for a stable covariance of 48 inputs"
    with pytest.raises(ValueError, match=f"{too_few}: give at least 96"):
        rl.optrot_plus(model, tokens[:2])
    with pytest.raises(
        ValueError, match="unknown form 'sum': choose one of bound, product, relative"
    ):
        rl.optrot_plus(model, tokens, form="sum")
