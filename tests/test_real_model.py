"""The main job on the real model at smoke scale; reads what the notebooks have just computed, or
computes it.
"""

from dataclasses import replace

import pytest

import rotlib as rl
from rotlib.study import files, store, tables

SMOKE = rl.Recipe(calibration_windows=2, test_windows=2)

# measured on 2 CPU cores; another processor's rounding moves GPTQ's codes, and these by a few
# percent
KL = {"none": 0.74, "random": 0.33, "hadamard": 0.27, "optrot": 0.21}


def kl(rotation, **changes):
    return rl.run(replace(SMOKE, rotation=rotation, **changes)).metrics["kl"]


@pytest.mark.parametrize("rotation", KL)
def test_gptq_reaches_the_known_divergence(rotation):
    assert kl(rotation) == pytest.approx(KL[rotation], rel=0.15)


def test_unrotated_is_worst_and_optrot_best():
    assert kl("optrot") < kl("hadamard") < kl("none")
    assert kl("optrot") < kl("random") < kl("none")


@pytest.mark.parametrize("rotation", ["none", "optrot"])
def test_gptq_beats_rounding_to_nearest(rotation):
    assert kl(rotation) < 0.75 * kl(rotation, rounding="rtn")


def test_no_layer_fell_back_to_rounding():
    assert all(
        rl.run(replace(SMOKE, rotation=rotation)).metrics["fallbacks"] == 0 for rotation in KL
    )


def test_optrot_reaches_its_objective():
    """120.05k is the best that a run of twenty times the cost reached; a random rotation has
    152.5k.
    """
    model, _ = rl.load("smollm2-135m")
    rotation, _ = rl.make_rotation(replace(SMOKE, rotation="optrot"), model)
    assert rotation.history[-1] < 1.007 * 120_049


def test_all_four_rotations_leave_four_digits_of_the_perplexity():
    model, tokenizer = rl.load("smollm2-135m")
    tokens = rl.load_tokens("wikipedia-mini", tokenizer, "test")[:1024]
    before = rl.perplexity(model, tokens)
    after = rl.perplexity(rl.fuse(model, rl.hadamard_rotation(model, R3=True, R4=True)), tokens)
    assert after == pytest.approx(before, rel=5e-5)


def test_the_cache_changes_nothing_in_what_a_model_with_quantized_keys_writes():
    model, tokenizer = rl.load("smollm2-135m")
    rl.fuse(model, rl.hadamard_rotation(model, R3=True, R4=True))
    prompt = tokenizer("The river Thames flows through", return_tensors="pt")
    with rl.quantized_activations(model, rl.ActivationQuant(bits=8, kv_bits=4)):
        texts = [
            tokenizer.decode(
                model.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=cached)[0]
            )
            for cached in (True, False)
        ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("rotation", ["hadamard", "optrot"])
def test_eight_bit_activations_are_nearly_free_with_R4(rotation):
    assert kl(rotation, R4=True, activation_bits=8) < 1.1 * kl(rotation, R4=True)


def test_at_four_bits_rotations_save_the_model_and_R4_pays():
    assert kl("none", activation_bits=4) > 3 * kl("hadamard", activation_bits=4)
    assert kl("hadamard", R4=True, activation_bits=4) < 0.8 * kl("hadamard", activation_bits=4)


def test_weights_and_activations_pull_apart():
    """OptRot's paper: better than Hadamard at W4A16, worse at W4A4."""
    assert kl("optrot", R4=True) < kl("hadamard", R4=True)
    assert kl("optrot", R4=True, activation_bits=4) > kl("hadamard", R4=True, activation_bits=4)


def test_R3_pays_where_keys_have_four_bits():
    kv4 = {"R4": True, "activation_bits": 4, "kv_bits": 4}
    assert kl("hadamard", R3=True, **kv4) < kl("hadamard", **kv4)


def test_the_committed_study_holds_three_seeds_of_every_arm_and_the_papers_order():
    study = [
        store._read(path)
        for path in sorted((files.ROOT / "results" / "study").glob("quantize-*.json"))
    ]
    arms = {
        (arm.rotation, arm.recipe.precision, arm.rounding): arm
        for arm in tables.arms(study)
        if not arm.settings.removesuffix("stale")
    }
    gptq = [
        arms[rotation, "W4A16", "GPTQ"] for rotation in ("none", "random", "hadamard", "optrot")
    ]
    assert all(len(arm.results) >= 3 for arm in gptq)
    assert all(
        len(arms[rotation, "W4A16", "RTN"].results) >= 3
        for rotation in ("random", "hadamard", "optrot")
    )
    assert tables.judge(gptq[3], gptq[2]).verdict == "reproduced"
    assert tables.judge(gptq[2], gptq[0]).verdict == "reproduced"
    for precision in ("W4A16", "W4A8", "W4A4", "W4A4KV4"):
        online = " + R3 R4" if "KV" in precision else " + R4"
        assert all(
            len(arms[name, precision, "GPTQ"].results) >= 3
            for name in ("none", f"hadamard{online}", f"optrot{online}")
        )
    assert all(
        len(arms[name, "W16A4", "none"].results) >= 3 for name in ("hadamard + R4", "optrot + R4")
    )
