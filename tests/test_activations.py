import pytest
import torch
from conftest import exact_logits, tiny_model

import rotlib as rl
from rotlib.models.supported import adapt
from rotlib.quantization.activations import PROTOCOLS, round_tokens
from rotlib.quantization.grids import WeightQuant
from rotlib.rotations import online


def grid(bits, symmetric):
    return WeightQuant(bits, None, symmetric, "full", clip_search=False)


def round_slowly(token, bits, symmetric, clip):
    """One token by the definition (method: QuaRot symmetric, SpinQuant asymmetric)."""
    if symmetric:
        step = max(abs(v) for v in token) * clip / (2 ** (bits - 1) - 1) or 1.0
        return [
            min(max(round(v / step), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1) * step for v in token
        ]
    low, high = min(0.0, min(token)) * clip, max(0.0, max(token)) * clip
    step = (high - low) / (2**bits - 1) or 1.0
    zero = round(-low / step)
    return [(min(max(round(v / step + zero), 0), 2**bits - 1) - zero) * step for v in token]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", [1.0, 0.9])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_tokens_agrees_with_the_definition(bits, symmetric, clip):
    x = torch.randn(3, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 0
    x[1] += 2
    slow = torch.tensor(
        [[round_slowly(token, bits, symmetric, clip) for token in part] for part in x.tolist()],
        dtype=torch.float64,
    )
    torch.testing.assert_close(round_tokens(x, grid(bits, symmetric), clip), slow)
    for token in round_tokens(x, grid(bits, symmetric), clip).flatten(0, 1):
        assert len(token.unique()) <= 2**bits


def test_a_group_of_coordinates_has_a_grid_of_its_own():
    x = torch.randn(2, 4, 24)
    rounded = round_tokens(x, grid(4, False), 1.0, width=8)
    torch.testing.assert_close(rounded[..., 8:16], round_tokens(x[..., 8:16], grid(4, False), 1.0))


def inputs_of_one_layer(model, tokens):
    seen = {}
    linears = adapt(model).linears(0)
    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name, linear in linears.items()
    ]
    exact_logits(model, tokens)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_quantized_linear_reads_rounded_tokens(tokens, protocol):
    model = rl.fuse(tiny_model(), rl.hadamard_rotation(tiny_model(), R4=True))
    with rl.quantized_activations(model, rl.ActivationQuant(bits=3, protocol=protocol)):
        seen = inputs_of_one_layer(model, tokens)
    assert set(seen) == {"q", "k", "v", "o", "gate", "up", "down"}
    for name, x in seen.items():
        units = x.unflatten(-1, (-1, 8)) if name == "o" and PROTOCOLS[protocol].o_per_head else x
        for unit in units.reshape(-1, units.shape[-1]):
            assert len(unit.unique()) <= 8, name
    if not PROTOCOLS[protocol].symmetric:
        assert any((token.min() + token.max()).abs() > 1e-6 for token in seen["down"].flatten(0, 1))


def test_keys_and_values_are_rounded_head_by_head(tokens, monkeypatch):
    caught = []
    original = online.sdpa_attention_forward
    monkeypatch.setattr(
        "rotlib.rotations.online.sdpa_attention_forward",
        lambda *a, **k: caught.append(a) or original(*a, **k),
    )
    model = tiny_model()
    with rl.quantized_activations(model, rl.ActivationQuant(kv_bits=2)):
        exact_logits(model, tokens)
    _, query, key, value, *_ = caught[0]
    for rounded in (key, value):
        assert all(len(head.unique()) <= 4 for head in rounded.reshape(-1, 8))
    assert any(len(head.unique()) > 4 for head in query.reshape(-1, 8))


def test_the_model_is_as_it_was_afterwards_also_after_an_error(tokens):
    model = tiny_model()
    before = exact_logits(model, tokens)

    def interrupted():
        with rl.quantized_activations(model, rl.ActivationQuant(bits=4, kv_bits=4)):
            assert (exact_logits(model, tokens) - before).abs().max() > 1e-3
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(exact_logits(model, tokens), before)


def test_eight_bits_cost_less_than_four(tokens):
    model = tiny_model()
    before = exact_logits(model, tokens)
    errors = []
    for bits in (8, 4):
        with rl.quantized_activations(model, rl.ActivationQuant(bits=bits, kv_bits=bits)):
            errors.append((exact_logits(model, tokens) - before).square().mean())
    assert 0 < errors[0] < 0.05 * errors[1]


def test_calibration_sees_rounded_activations_only_when_asked(tokens):
    def codes(bits):
        model = tiny_model(dtype=torch.float32)
        with rl.quantized_activations(model, rl.ActivationQuant(bits=bits)):
            return rl.gptq(model, tokens, rl.WeightQuant(bits=4)).weights["layers.1.down"].codes

    assert not torch.equal(codes(3), codes(16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"bits": 9},
            "activation_bits must be a whole number from 2 to 8, or 16 to leave them alone, not 9",
        ),
        ({"bits": 1}, "activation_bits must be"),
        ({"bits": 16.0}, "activation_bits must be"),
        ({"kv_bits": 3.5}, "kv_bits must be"),
        (
            {"protocol": "quarrot"},
            "unknown protocol 'quarrot': choose one of quarot, spinquant, rotlib",
        ),
    ],
)
def test_an_activation_grid_outside_the_choices_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rl.ActivationQuant(**arguments)


def test_what_a_model_cannot_carry_is_refused_before_it_runs():
    model = tiny_model()
    with pytest.raises(ValueError, match="an ActivationQuant such as"):
        rl.quantized_activations(model, 4).__enter__()


def test_rounding_activations_twice_or_rotating_under_them_is_refused(tokens):
    model = tiny_model()
    rotation = rl.random_rotation(model, R3=True)
    with rl.quantized_activations(model, rl.ActivationQuant(bits=4)):
        acts = (
            lambda: rl.quantized_activations(model, rl.ActivationQuant(kv_bits=4)).__enter__(),
            lambda: rl.fuse(model, rotation),
            lambda: rl.kurtail(model, tokens),
        )
        for act in acts:
            with pytest.raises(
                ValueError, match="activations are being rounded: leave quantized_activations first"
            ):
                act()
    rl.fuse(model, rotation)


def test_sinks_are_left_unrounded_and_need_whole_sequences(tokens):
    model = tiny_model()
    before = inputs_of_one_layer(model, tokens)["q"]
    with rl.quantized_activations(model, rl.ActivationQuant(bits=2, sinks=2)):
        after = inputs_of_one_layer(model, tokens)["q"]
        assert torch.equal(after[:, :2], before[:, :2])
        assert (after[:, 2:] != before[:, 2:]).any(dim=-1).float().mean() > 0.9
        with pytest.raises(ValueError, match="2 sinks need sequences of more tokens than the 2"):
            model(tokens[:, :2])
        with pytest.raises(ValueError, match="and a cache holds them already: give whole"):
            model.generate(tokens[:1], max_new_tokens=4, use_cache=True)
        begun = model(tokens[:, :16], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="and a cache holds them already: give whole"):
            model(tokens[:, 16:], past_key_values=begun)
        model.generate(tokens[:1], max_new_tokens=4, use_cache=False)


def test_the_attention_implementation_is_given_back(tokens):
    model = tiny_model()
    for _ in range(2):
        with rl.quantized_activations(model, rl.ActivationQuant(kv_bits=4)):
            model(tokens)
        assert model.config._attn_implementation == "sdpa"
        model(tokens)
