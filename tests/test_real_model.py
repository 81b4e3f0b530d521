"""The real model: what the notebooks have just computed of it, and what the study holds."""

from dataclasses import replace

import pytest

import rotlib as rl
from rotlib.disk import ROOT
from rotlib.study import store, tables

pytestmark = pytest.mark.real_model
SMOKE = rl.Recipe(calibration_windows=2, test_windows=1)  # as 00_quickstart runs it

# measured on 2 CPU cores; another processor's rounding moves GPTQ's codes, and these by a few
# percent
KL = {"none": 0.75, "hadamard": 0.285, "optrot": 0.226}


def kl(rotation, **changes):
    return rl.run(replace(SMOKE, rotation=rotation, **changes)).metrics["kl"]


@pytest.mark.parametrize("rotation", KL)
def test_gptq_reaches_the_known_divergence(rotation):
    assert kl(rotation) == pytest.approx(KL[rotation], rel=0.15)


def test_unrotated_is_worst_and_optrot_best():
    assert kl("optrot") < kl("hadamard") < kl("none")


def test_no_layer_fell_back_to_rounding():
    for rotation in KL:
        assert rl.run(replace(SMOKE, rotation=rotation)).metrics["fallbacks"] == 0


def test_optrot_reaches_its_objective():
    """120.05k is the best that twenty times the cost reached; a random rotation has 152.5k."""
    model, _ = rl.load("smollm2-135m")
    rotation, _ = rl.make_rotation(replace(SMOKE, rotation="optrot"), model)
    assert rotation.history[-1] < 1.007 * 120_049


@pytest.fixture(scope="module")
def rotated():
    """(the model with all four rotations, its tokenizer, some text, its perplexity before)"""
    model, tokenizer = rl.load("smollm2-135m")
    tokens = rl.load_tokens("wikipedia-mini", tokenizer, "test")[:256]
    before = rl.perplexity(model, tokens, 256)
    fused = rl.fuse(model, rl.hadamard_rotation(model, R3=True, R4=True))
    return fused, tokenizer, tokens, before


def test_all_four_rotations_leave_four_digits_of_the_perplexity(rotated):
    fused, _, tokens, before = rotated
    assert rl.perplexity(fused, tokens, 256) == pytest.approx(before, rel=5e-5)


def test_the_cache_changes_nothing_in_what_a_model_with_quantized_keys_writes(rotated):
    model, tokenizer, *_ = rotated
    prompt = tokenizer("The river Thames flows through", return_tensors="pt")
    how = {"max_new_tokens": 12, "do_sample": False}
    with rl.quantized_activations(model, rl.ActivationQuant(bits=8, kv_bits=4)):
        written = [model.generate(**prompt, **how, use_cache=cached) for cached in (True, False)]
    texts = [tokenizer.decode(ids[0]) for ids in written]
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def study() -> dict[tuple[str, str, str], tables.Arm]:
    """The committed arms whose name, precision and rounding tell all."""
    paths = sorted((ROOT / "results" / "study").glob("quantize-*.json"))
    arms = tables.arms(store.read(path) for path in paths)
    return {
        (arm.rotation, arm.recipe.precision, arm.rounding): arm
        for arm in arms
        if not arm.settings.removesuffix("stale")
    }


def test_the_study_holds_three_seeds_of_every_arm_and_the_papers_order(study):
    four = ("none", "random", "hadamard", "optrot")
    gptq = [study[rotation, "W4A16", "GPTQ"] for rotation in four]
    assert all(len(arm.results) >= 3 for arm in gptq)
    assert all(len(study[name, "W4A16", "RTN"].results) >= 3 for name in four[1:])
    assert tables.judge(gptq[3], gptq[2]).word == "yes"
    assert tables.judge(gptq[2], gptq[0]).word == "yes"
    for precision in ("W4A16", "W4A8", "W4A4", "W4A4KV4"):
        online = " + R3 R4" if "KV" in precision else " + R4"
        for name in ("none", f"hadamard{online}", f"optrot{online}"):
            assert len(study[name, precision, "GPTQ"].results) >= 3
    for name in ("hadamard + R4", "optrot + R4"):
        assert len(study[name, "W16A4", "none"].results) >= 3


def kl_of(arm):
    return arm.summary("kl")[0]


@pytest.mark.parametrize("rotation", ["none", "random", "hadamard", "optrot"])
def test_in_the_study_gptq_beats_rounding_to_nearest(study, rotation):
    gptq, rtn = (study[rotation, "W4A16", rounding] for rounding in ("GPTQ", "RTN"))
    assert kl_of(gptq) < 0.75 * kl_of(rtn)


@pytest.mark.parametrize("rotation", ["hadamard + R4", "optrot + R4"])
def test_in_the_study_eight_bit_activations_are_nearly_free_with_R4(study, rotation):
    a8, a16 = (study[rotation, precision, "GPTQ"] for precision in ("W4A8", "W4A16"))
    assert kl_of(a8) < 1.1 * kl_of(a16)


def test_in_the_study_rotations_save_the_model_at_four_bits_and_R4_pays(study):
    none, fused, online = (
        kl_of(study[name, "W4A4", "GPTQ"]) for name in ("none", "hadamard", "hadamard + R4")
    )
    assert none > 3 * fused
    assert online < 0.8 * fused


def test_in_the_study_weights_and_activations_pull_apart(study):
    """OptRot's paper: better than Hadamard at W4A16, worse at W4A4."""
    optrot, hadamard = "optrot + R4", "hadamard + R4"
    assert kl_of(study[optrot, "W4A16", "GPTQ"]) < kl_of(study[hadamard, "W4A16", "GPTQ"])
    assert kl_of(study[optrot, "W4A4", "GPTQ"]) > kl_of(study[hadamard, "W4A4", "GPTQ"])


def test_in_the_study_R3_pays_where_keys_have_four_bits(study):
    with_R3, without = "hadamard + R3 R4", "hadamard + R4"
    assert kl_of(study[with_R3, "W4A4KV4", "GPTQ"]) < kl_of(study[without, "W4A4KV4", "GPTQ"])
