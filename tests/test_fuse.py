import pytest
import torch
from conftest import CONFIGS, exact_logits, tiny_model
from transformers import AutoModelForCausalLM, Gemma2Config, GemmaConfig, GPT2Config

import rotlib as rl
from rotlib.models.supported import adapt
from rotlib.rotations.fuse import ORTHOGONALITY_TOLERANCE
from rotlib.rotations.rotation import (
    SITES,
    Rotation,
    placed_weights,
    rotate_weight,
    scale_shapes,
    times,
)


@pytest.mark.parametrize("make", [rl.hadamard_rotation, rl.random_rotation])
def test_fused_model_has_the_same_logits(any_model, tokens, make):
    before = exact_logits(any_model, tokens)
    fused = rl.fuse(any_model, make(any_model, seed=3))
    assert (exact_logits(fused, tokens) - before).abs().max() < 1e-9
    assert before.abs().max() > 0.1  # the gate means something


@pytest.mark.parametrize("only", ["R1", "R2"])
def test_each_rotation_alone_leaves_the_logits(any_model, tokens, only):
    before = exact_logits(any_model, tokens)
    rotation = rl.random_rotation(any_model)
    setattr(rotation, "R1" if only == "R2" else "R2", None)
    assert (exact_logits(rl.fuse(any_model, rotation), tokens) - before).abs().max() < 1e-9


def test_fusing_rotates_every_weight_and_bias_that_the_table_names(tokens):
    original, model = (tiny_model("llama, biases everywhere") for _ in range(2))
    rl.fuse(model, rl.random_rotation(model))
    for old, new in zip(placed_weights(adapt(original)), placed_weights(adapt(model)), strict=True):
        assert (old.folded() - new.folded()).abs().max() > 1e-3, old.site
        if SITES[old.site].writes and getattr(old.module, "bias", None) is not None:
            assert (old.module.bias - new.module.bias).abs().max() > 1e-3, old.site


def test_dropping_one_bias_rotation_breaks_the_logits(tokens):
    model = tiny_model("qwen2, biases")
    before = exact_logits(model, tokens)
    bias = model.model.layers[0].self_attn.v_proj.bias.clone()
    rl.fuse(model, rl.random_rotation(model))
    model.model.layers[0].self_attn.v_proj.bias.copy_(bias)
    assert (exact_logits(model, tokens) - before).abs().max() > 1e-3


def test_embeddings_are_not_centred():
    model = tiny_model()
    expected = model.model.embed_tokens.weight.clone()
    rotation = rl.random_rotation(model)
    rl.fuse(model, rotation)
    torch.testing.assert_close(
        model.model.embed_tokens.weight, expected @ rotation.R1, rtol=0, atol=1e-12
    )


def test_a_tied_model_is_untied_and_survives_save_and_load(tmp_path, tokens):
    model = tiny_model("qwen3, tied")
    before = exact_logits(model, tokens)
    rl.fuse(model, rl.random_rotation(model))
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert not again.config.tie_word_embeddings
    assert (exact_logits(again, tokens) - before).abs().max() < 1e-9
    with pytest.raises(ValueError, match="already rotated"):
        rl.fuse(again, rl.random_rotation(again))


def test_a_rotated_model_is_refused_by_fusing_and_by_learning():
    model = tiny_model()
    rl.fuse(model, rl.random_rotation(model))
    for act in (lambda: rl.fuse(model, rl.random_rotation(model)), lambda: rl.optrot(model)):
        with pytest.raises(ValueError, match="already rotated"):
            act()


def test_a_quantized_model_is_not_rotated():
    model = tiny_model(dtype=torch.float32)
    rl.rtn(model, rl.WeightQuant())
    with pytest.raises(ValueError, match="already quantized"):
        rl.fuse(model, rl.random_rotation(model))


@pytest.mark.parametrize(
    ("config", "module"),
    [
        (Gemma2Config, "lm_head puts out logits that are capped"),
        (GemmaConfig, "model.layers.0.input_layernorm is a GemmaRMSNorm"),
        (GPT2Config, "transformer.wte has no place"),
    ],
)
def test_an_architecture_that_cannot_be_rotated_names_the_module_in_the_way(config, module):
    names = (
        {"n_embd": 32, "n_layer": 1, "n_head": 2}
        if config is GPT2Config
        else {"hidden_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    )
    model = AutoModelForCausalLM.from_config(config(vocab_size=32, pad_token_id=0, **names))
    with pytest.raises(ValueError, match=module) as refusal:
        rl.hadamard_rotation(model)
    assert "\n" not in str(refusal.value)


def test_a_bad_rotation_is_refused_before_the_model_is_touched():
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    good = rl.random_rotation(model)
    bent = Rotation(good.R1 * (1 + 10 * ORTHOGONALITY_TOLERANCE), good.R2)
    for rotation, message in [
        (Rotation(good.R1[:-1, :-1], good.R2), "R1 has shape"),
        (bent, "isn't orthogonal"),
        (Rotation(good.R1 * float("nan"), good.R2), "isn't orthogonal"),
    ]:
        with pytest.raises(ValueError, match=message):
            rl.fuse(model, rotation)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("wrong", ["no", 1, [1.0]])
def test_an_online_rotation_is_on_or_off(wrong):
    with pytest.raises(ValueError, match="R3 must be True or False"):
        Rotation(None, None, R3=wrong)


def test_non_finite_weights_are_named():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    for act in (
        rl.optrot,
        lambda m: rl.rtn(m, rl.WeightQuant()),
        lambda m: rl.fuse(m, rl.random_rotation(m)),
    ):
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
            act(model)


def test_times_repeats_a_heads_rotation_over_its_query_heads():
    R = torch.linalg.qr(torch.randn(2, 4, 4, dtype=torch.float64))[0]
    x = torch.randn(5, 24, dtype=torch.float64)  # 2 KV heads × 3 query heads × 4
    blocks = torch.block_diag(*[R[0]] * 3, *[R[1]] * 3)
    torch.testing.assert_close(times(x, R), x @ blocks)
    W = torch.randn(24, 24, dtype=torch.float64)
    torch.testing.assert_close(rotate_weight(W, R, R), blocks.T @ W @ blocks)


def test_the_configurations_cover_what_breaks_peers():
    configs = list(CONFIGS.values())
    covered = {"llama", "mistral", "qwen2", "qwen3", "granite", "smollm3", "phi3"}
    covered |= {"mixtral", "qwen3_moe", "olmoe"}
    assert {config.model_type for config in configs} == covered
    assert any(config.tie_word_embeddings for config in configs)
    assert all(config.num_key_value_heads < config.num_attention_heads for config in configs)
    assert any(
        getattr(config, "head_dim", 8) != config.hidden_size // config.num_attention_heads
        for config in configs
    )


def random_scales(model) -> dict[str, torch.Tensor]:
    """Every scale that the model can take, drawn between ½ and 2."""
    return {
        name: 2 ** (2 * torch.rand(shape, dtype=torch.float64) - 1)
        for name, shape in scale_shapes(adapt(model)).items()
    }


@pytest.mark.parametrize("R4", [False, True])
def test_random_scales_leave_the_logits(any_model, tokens, R4):
    before = exact_logits(any_model, tokens)
    rotation = rl.random_rotation(any_model, R4=R4)
    rotation.scales = random_scales(any_model)
    family = adapt(any_model)
    spanning = family.config.model_type == "olmoe"  # its norms on queries and keys span the heads
    assert len(rotation.scales) == 4 + family.rotary - (family.experts > 0) - spanning
    assert (exact_logits(rl.fuse(any_model, rotation), tokens) - before).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["attention_norm", "mlp_norm", "up", "value", "query_key"])
def test_every_scale_reaches_the_weights(name):
    for config in ("llama", "qwen3, q/k norms, own head_dim"):
        plain, scaled = (tiny_model(config) for _ in range(2))
        rotation = rl.random_rotation(plain)
        rl.fuse(plain, rotation)
        rotation.scales = {name: random_scales(scaled)[name]}
        rl.fuse(scaled, rotation)
        changed = {
            path
            for path, value in scaled.named_parameters()
            if (value - plain.get_parameter(path)).abs().max() > 1e-3
        }
        assert len(changed) >= 2 * len(plain.model.layers), (config, changed)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"vo": torch.ones(2, 2, 8)}, "unknown scale 'vo': a rotation may carry attention_norm"),
        (
            {"value": torch.ones(2, 2, 4)},
            r"the scale 'value' has shape \(2, 2, 4\), but this model needs \(2, 2, 8\)",
        ),
        ({"value": torch.zeros(2, 2, 8)}, "'value' must lie between 1e-6 and 1e6"),
    ],
)
def test_unsuitable_scales_are_refused_before_anything_changes(scales, message):
    model = tiny_model()
    rotation = rl.random_rotation(model)
    rotation.scales = scales
    with pytest.raises(ValueError, match=message):
        rl.fuse(model, rotation)
    assert not rl.is_rotated(model)
