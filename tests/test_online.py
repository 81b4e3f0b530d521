from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIGS, exact_logits, tiny_model
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import rotlib as rl
from rotlib.models.families import READERS
from rotlib.models.supported import adapt
from rotlib.models.walk import norms_in_model_dtype
from rotlib.models.zoo import load_tokenizer
from rotlib.quantization.hessian import Hessian
from rotlib.rotations import online
from rotlib.rotations.hadamard import hadamard
from rotlib.rotations.online import ATTENTION


def with_all_four(model, make=rl.hadamard_rotation):
    return rl.fuse(model, make(model, seed=3, R3=True, R4=True))


def test_keys_of_their_own_give_what_shared_keys_do():
    generator = torch.Generator().manual_seed(0)
    heads = (torch.randn(2, count, 5, 8, generator=generator) for count in (6, 2, 2))
    grouped = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    query, key, value = heads
    shared, _ = sdpa_attention_forward(grouped, query, key, value, None)
    apart = online._keys_of_their_own(grouped, query, key, value)
    own, _ = sdpa_attention_forward(apart[0], query, *apart[1:], None)
    torch.testing.assert_close(own, shared)


@pytest.mark.parametrize("make", [rl.hadamard_rotation, rl.random_rotation])
def test_all_four_rotations_leave_the_logits(any_model, tokens, make):
    before = exact_logits(any_model, tokens)
    assert (exact_logits(with_all_four(any_model, make), tokens) - before).abs().max() < 1e-9


@pytest.mark.parametrize("online", [{"R3": True}, {"R4": True}])
def test_each_online_rotation_alone_leaves_the_logits(any_model, tokens, online):
    before = exact_logits(any_model, tokens)
    rl.fuse(any_model, rl.Rotation(None, None, **online))
    assert (exact_logits(any_model, tokens) - before).abs().max() < 1e-9


def test_down_reads_rotated_inputs_and_its_weight_undoes_them(tokens):
    plain, turned = tiny_model(), tiny_model()
    rl.fuse(plain, rl.Rotation(None, None))
    rl.fuse(turned, rl.Rotation(None, None, R4=True))
    H = hadamard(80)
    torch.testing.assert_close(
        turned.model.layers[0].mlp.down_proj.weight, plain.model.layers[0].mlp.down_proj.weight @ H
    )
    seen = [
        _input_of(model, model.model.layers[0].mlp.down_proj, tokens) for model in (plain, turned)
    ]
    torch.testing.assert_close(seen[1], seen[0] @ H)


def _input_of(model, module, tokens):
    caught = []
    handle = module.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    exact_logits(model, tokens)
    handle.remove()
    return caught[0]


def test_attention_sees_rotated_queries_and_keys(tokens, monkeypatch):
    caught = []
    original = online.sdpa_attention_forward

    def spy(module, query, key, value, *args, **kwargs):
        caught.append((query, key, value))
        return original(module, query, key, value, *args, **kwargs)

    monkeypatch.setattr("rotlib.rotations.online.sdpa_attention_forward", spy)
    plain, turned = tiny_model(), tiny_model()
    rl.fuse(turned, rl.Rotation(None, None, R3=True))
    with rl.quantized_activations(
        plain, rl.ActivationQuant(kv_bits=8)
    ):  # through our attention, un-rotated
        exact_logits(plain, tokens)
    exact_logits(turned, tokens)
    layers = len(turned.model.layers)
    query, key, _ = caught[0]
    turned_query, turned_key, _ = caught[layers]
    torch.testing.assert_close(turned_query, query @ hadamard(8))
    assert (
        turned_key - key @ hadamard(8)
    ).abs().max() < 0.1 * key.abs().max()  # equal but for the 8 bits


def test_gptq_gathers_the_hessian_behind_R4(tokens, monkeypatch):
    model = tiny_model(dtype=torch.float32)
    rl.fuse(model, rl.Rotation(None, None, R4=True))
    down = model.model.layers[0].mlp.down_proj
    seen, taken = [], []
    monkeypatch.setattr(
        Hessian, "take", lambda self, take=Hessian.take: taken.append(take(self)) or taken[-1]
    )
    handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    rl.gptq(model, tokens, rl.WeightQuant(bits=8))
    handle.remove()
    x = seen[0].flatten(0, 1)
    torch.testing.assert_close(taken[len(READERS) - 1], x.T @ x / len(x), rtol=1e-3, atol=1e-4)
    model = tiny_model(dtype=torch.float32)
    rl.fuse(model, rl.Rotation(None, None))
    taken.clear()
    rl.gptq(model, tokens, rl.WeightQuant(bits=8))
    H = hadamard(80).float()
    turned = H.T @ taken[len(READERS) - 1] @ H
    torch.testing.assert_close(
        turned, x.T @ x / len(x), rtol=0.1, atol=0.05 * turned.abs().max().item()
    )


@pytest.mark.parametrize("quant", [None, rl.ActivationQuant(bits=4, kv_bits=4)])
@pytest.mark.parametrize("name", CONFIGS)
def test_generation_with_the_cache_gives_the_tokens_of_generation_without(name, tokens, quant):
    model = with_all_four(tiny_model(name))
    prompt = tokens[:1, 1:12]

    def generate(use_cache):
        with (
            rl.quantized_activations(model, quant or rl.ActivationQuant()),
            norms_in_model_dtype(model),
        ):
            return model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                use_cache=use_cache,
                max_new_tokens=16,
                min_new_tokens=16,
                do_sample=False,
            )

    assert torch.equal(generate(True), generate(False))


def test_an_online_model_survives_save_and_load_and_is_refused_without_its_rotations(
    tmp_path, tokens
):
    model = with_all_four(tiny_model(dtype=torch.float32))
    before = model(tokens).logits
    model.save_pretrained(tmp_path)
    load_tokenizer("smollm2-135m").save_pretrained(tmp_path)
    again, _ = rl.load(str(tmp_path), device="cpu")
    torch.testing.assert_close(again(tokens).logits, before)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"saved with the online rotations R3, R4 on: rl\.load restores them"
    ):
        adapt(bare)


def test_a_copy_of_an_online_model_computes_the_same(tokens):
    model = with_all_four(tiny_model())
    copy = deepcopy(model)
    assert torch.equal(copy(tokens).logits, model(tokens).logits)
    with rl.quantized_activations(copy, rl.ActivationQuant(kv_bits=2)):
        assert not torch.equal(copy(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("implementation", ["eager", "flash_attention_2", "flex_attention"])
def test_an_attention_out_of_reach_is_refused(implementation):
    model = tiny_model()
    model.config._attn_implementation_internal = implementation
    acts = (
        lambda: rl.fuse(model, rl.Rotation(None, None, R3=True)),
        lambda: rl.quantized_activations(model, rl.ActivationQuant(kv_bits=4)).__enter__(),
    )
    refusal = (
        f"attention implementation '{implementation}': "
        "load the model with attn_implementation='sdpa'"
    )
    for act in acts:
        with pytest.raises(ValueError, match=refusal):
            act()
    assert not rl.is_rotated(model)


def test_an_attention_switched_later_is_noticed(tokens):
    model = with_all_four(tiny_model())
    model.set_attn_implementation("sdpa")
    with pytest.raises(
        RuntimeError, match=r"'sdpa' was set since: call model.set_attn_implementation\('rotlib'\)"
    ):
        model(tokens)
    model.set_attn_implementation(ATTENTION)
    model(tokens)


def test_R3_needs_rotary_embeddings_and_R4_a_hadamard_matrix():
    model = tiny_model()
    del model.model.rotary_emb
    with pytest.raises(
        ValueError,
        match="R3 turns queries and keys behind rotary embeddings, and this model has none",
    ):
        rl.fuse(model, rl.Rotation(None, None, R3=True))
    odd = deepcopy(CONFIGS["llama"])
    odd.intermediate_size, odd.head_dim = 92, 92
    for on, part in (
        ({"R4": True}, "R4 turns the 92 inputs of down_proj"),
        ({"R3": True}, "R3 turns the 92 coordinates of a head"),
    ):
        model = AutoModelForCausalLM.from_config(odd).eval()
        with pytest.raises(ValueError, match=f"{part}: no Hadamard matrix of order 92"):
            rl.fuse(model, rl.Rotation(None, None, **on))
        assert not rl.is_rotated(model)
        with pytest.raises(ValueError, match=part):
            rl.optrot(model, **on)
