import pytest
import torch
from conftest import tiny_model

import rotlib as rl


def test_perplexity_follows_the_formula_by_hand(tokens):
    model = tiny_model()
    stream = torch.cat([tokens.flatten(), torch.tensor([1, 2, 3])])  # the tail of 3 is dropped
    losses = []
    for start in range(0, 128, 32):
        ids = stream[start : start + 32]
        probabilities = model(ids[None]).logits[0].softmax(-1)
        losses.append(-sum(probabilities[t, ids[t + 1]].log() for t in range(31)) / 31)
    assert rl.perplexity(model, stream, window=32) == pytest.approx(
        (sum(losses) / 4).exp().item(), rel=1e-6
    )


def test_kl_follows_the_formula_by_hand(tokens):
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    expected = []
    for ids in tokens:
        p, q = (m(ids[None]).logits[0, :-1].softmax(-1) for m in (model, other))
        expected.append((p * (p / q).log()).sum(-1).mean())
    assert rl.kl_divergence(model, other, tokens.flatten(), window=32) == pytest.approx(
        sum(expected).item() / 4, rel=1e-5
    )


def test_kl_of_a_model_from_itself_is_zero_and_never_negative(tokens):
    stream = tokens.flatten()
    assert rl.kl_divergence(tiny_model(), tiny_model(), stream, window=32) == pytest.approx(
        0, abs=1e-6
    )
    assert rl.kl_divergence(tiny_model(), tiny_model(seed=1), stream, window=32) > 0


def test_a_reference_survives_the_rotation_of_its_model(tokens):
    model = tiny_model("llama, tied")
    reference = rl.Reference(model, tokens)
    rl.fuse(model, rl.random_rotation(model))
    assert rl.evaluate(model, tokens, reference).kl_divergence == pytest.approx(0, abs=1e-6)


def test_the_reference_reports_its_own_perplexity(tokens):
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    evaluation = rl.evaluate(other, tokens, rl.Reference(model, tokens))
    assert evaluation.reference_perplexity == pytest.approx(
        rl.perplexity(model, tokens.flatten(), window=32), rel=1e-6
    )


def test_a_reference_over_other_tokens_is_refused(tokens):
    model = tiny_model()
    with pytest.raises(ValueError, match="other tokens"):
        rl.evaluate(model, tokens, rl.Reference(model, tokens.flip(0)))


def test_a_stream_shorter_than_a_window_is_refused(tokens):
    with pytest.raises(ValueError, match="fewer than one window of 1024"):
        rl.perplexity(tiny_model(), tokens.flatten())


def test_incoherence_and_kurtosis_of_known_matrices():
    assert rl.incoherence(torch.eye(16)) == pytest.approx(4)
    assert rl.incoherence(rl.hadamard(16)) == pytest.approx(1)
    assert rl.kurtosis(rl.hadamard(16)) == pytest.approx(1)
    assert rl.kurtosis(torch.eye(16)) == pytest.approx(16)
    gaussian = torch.randn(100, 10_000, generator=torch.Generator().manual_seed(0))
    assert rl.kurtosis(gaussian) == pytest.approx(3, abs=0.05)
    assert rl.kurtosis(gaussian * torch.arange(1, 101)[:, None]) == pytest.approx(
        3, abs=0.05
    )  # row scales don't count
