"""Scales and gains tuned on the divergence from the original, with the codes fixed."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import save_short_text, save_tiny_model, tiny_model

import rotlib as rl
from rotlib.learning import tuning
from rotlib.quantization.quantized import codes_of
from rotlib.study import checkpoint, numerics, recipe


@pytest.fixture
def texts():
    """Windows to learn from, the held-out ones last."""
    return torch.randint(96, (20, 32), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def reference(texts):
    return rl.Reference(tiny_model(dtype=torch.float32), texts)


def quantized(bits=3, group_size=None, rotation=False):
    model = tiny_model(dtype=torch.float32)
    if rotation:
        rl.fuse(model, rl.random_rotation(model))
    rl.rtn(model, rl.WeightQuant(bits=bits, group_size=group_size))
    return model


@pytest.mark.parametrize("group_size", [None, 16])
def test_a_tuned_model_is_nearer_to_the_original_on_other_text(reference, group_size):
    model = quantized(group_size=group_size, rotation=True)
    other = torch.randint(96, (8, 32), generator=torch.Generator().manual_seed(4))
    of_original = rl.Reference(tiny_model(dtype=torch.float32), other)
    before = rl.evaluate(model, other, of_original).kl_divergence
    codes = {name: weight.codes.clone() for name, weight in codes_of(model).items()}
    found = rl.tune(model, reference, steps=32, lr=3e-3)
    assert rl.evaluate(model, other, of_original).kl_divergence < 0.95 * before
    assert found.held_out[found.step] < found.held_out[0]
    for name, weight in codes_of(model).items():  # the codes stand for the weights
        assert torch.equal(weight.codes, codes[name])
        assert torch.equal(weight.scale, found.weights[name].scale)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_divergence_it_follows_is_the_one_that_is_measured(reference):
    model = quantized()
    found = rl.tune(model, reference, steps=1, lr=1e-12, held_out=20 - 1)
    held_out = rl.Reference(tiny_model(dtype=torch.float32), reference.windows[1:])
    measured = rl.evaluate(quantized(), held_out.windows, held_out).kl_divergence
    assert found.held_out[0] == pytest.approx(measured, rel=1e-4)


def test_slopes_of_rows_and_of_a_single_group_agree(reference):
    """The two ways to multiply a scale."""
    model = quantized()
    linear = model.model.layers[0].mlp.up_proj
    x = torch.randn(5, linear.in_features)
    slopes = []
    for logs in (torch.zeros(linear.out_features, 1), torch.zeros(linear.out_features, 2)):
        logs.requires_grad_()
        y = tuning._scaled(linear, logs)(x)
        torch.testing.assert_close(y, linear(x), rtol=1e-5, atol=1e-6)
        y.square().sum().backward()
        slopes.append(logs.grad.sum(1))
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)


def test_where_no_step_helps_the_start_is_kept(reference):
    model, untouched = quantized(), quantized()
    found = rl.tune(model, reference, steps=8, lr=3.0)
    assert found.step == 0
    for a, b in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loss_that_is_no_number_ends_it_with_the_best_step(reference, monkeypatch):
    model = quantized()
    divergence = tuning._Student.divergence
    # a look at the start, two steps, a look, a third step
    sound = iter([1] * (tuning.HELD_OUT + 2 + tuning.HELD_OUT + 1))

    def spoiled(self, number):
        return divergence(self, number) * next(sound, math.nan)

    monkeypatch.setattr(tuning._Student, "divergence", spoiled)
    with pytest.warns(UserWarning, match="tuning stopped at step 3"):
        found = rl.tune(model, reference, steps=8)
    assert len(found.kl) == 3
    assert sorted(found.held_out) == [0, 2]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    codes_of(model)


def test_weights_and_gains_are_put_into_another_model_together(reference):
    model = quantized()
    tuned = rl.tune(model, reference, steps=4, lr=1e-2)
    other = tuned.put_into(tiny_model(dtype=torch.float32))
    ids = reference.windows
    assert torch.equal(other(ids).logits, model(ids).logits)


def interrupt(monkeypatch, number):
    """Interrupt the optimiser's step of this number; returns a list with an entry a step."""
    step, taken = torch.optim.Adam.step, []

    def interrupted(self, *args):
        taken.append(self)
        if len(taken) == number:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    return taken


def test_an_interrupted_tuning_leaves_a_model_whose_codes_are_its_weights(reference, monkeypatch):
    model = quantized()
    interrupt(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        rl.tune(model, reference, steps=8, lr=3e-3)
    codes_of(model)
    assert "forward" not in vars(model.model.layers[0].mlp.up_proj)
    assert not any(parameter.requires_grad for parameter in model.parameters())


class Steps(list):
    """States in memory."""

    put = list.append

    def get(self):
        return self[-1] if self else None


def test_an_interrupted_tuning_goes_on_and_ends_with_the_same_bits(reference, monkeypatch):
    whole = rl.tune(quantized(), reference, steps=8, lr=3e-3)
    kept, taken = Steps(), interrupt(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        rl.tune(quantized(), reference, steps=8, lr=3e-3, kept=kept)
    assert len(kept) == 3  # at the start, after two steps and after four
    found = rl.tune(quantized(), reference, steps=8, lr=3e-3, kept=kept)
    assert len(taken) == 6 + 4  # of which two had been lost
    assert (found.kl, found.held_out) == (whole.kl, whole.held_out)
    for name, weight in found.weights.items():
        assert torch.equal(weight.scale, whole.weights[name].scale)


def test_a_tuning_interrupted_twice_ends_with_the_same_bits(reference, monkeypatch):
    whole = rl.tune(quantized(), reference, steps=8, lr=3e-3)
    kept = Steps()
    for number in (6, 2):  # the second time before the next look
        with monkeypatch.context() as patch:
            interrupt(patch, number)
            with pytest.raises(KeyboardInterrupt):
                rl.tune(quantized(), reference, steps=8, lr=3e-3, kept=kept)
    found = rl.tune(quantized(), reference, steps=8, lr=3e-3, kept=kept)
    assert found.kl == whole.kl
    assert found.seconds > kept[-1]["seconds"]


def test_what_is_kept_of_another_tuning_is_left(reference, monkeypatch):
    kept = Steps()
    rl.tune(quantized(), reference, steps=4, lr=3e-3, kept=kept)
    for model, how in ((quantized(bits=4), {}), (quantized(), {"lr": 1e-3})):
        found = rl.tune(model, reference, steps=4, **{"lr": 3e-3} | how, kept=Steps(kept))
        assert len(found.kl) == 4
    interrupted = quantized()
    with monkeypatch.context() as patch:
        interrupt(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            rl.tune(interrupted, reference, steps=8, lr=3e-3, kept=kept)
    again = rl.tune(interrupted, reference, steps=8, lr=3e-3, kept=kept)  # its scales are tuned
    assert sorted(again.held_out) == [0, 2, 4, 6, 8]
    best = min(kept[-6]["held_out"].values())
    assert again.held_out[0] == pytest.approx(best, rel=1e-4)


def test_a_recipes_interrupted_tuning_goes_on_from_its_file(tmp_path, monkeypatch):
    save_tiny_model(tmp_path / "model", "qwen3, tied")
    save_short_text(tmp_path)
    monkeypatch.setenv("ROTLIB_DATA", str(tmp_path))
    monkeypatch.setenv("ROTLIB_RESULTS", str(tmp_path / "results"))
    small = {"calibration_windows": 3, "test_windows": 2, "window": 64, "text": "wikitext2"}
    tuned = recipe.Recipe(model=str(tmp_path / "model"), tuning=4, **small)
    numerics.check(numerics.stages_of(tuned.spec()))  # its canaries take steps as well
    taken = interrupt(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        rl.run(tuned)
    assert list((tmp_path / "results" / "local").glob("*.tuning.pt"))
    assert rl.run(tuned).metrics["tuning_held_out"].keys() == {"0", "1", "2", "3", "4"}
    assert len(taken) == 3 + 2
    assert not list((tmp_path / "results" / "local").glob("*.tuning.pt"))


def test_a_tuned_model_is_exported_like_any_other(reference, tmp_path):
    model = quantized(rotation=True)
    rl.tune(model, reference, steps=4, lr=3e-3)
    rl.export(model, tmp_path / "W3")  # compares the logits that transformers reads from it


@pytest.mark.parametrize(
    ("prepare", "how", "message"),
    [
        (lambda: tiny_model(dtype=torch.float32), {}, "layers.0.q has no codes: quantize"),
        (lambda: quantized().double(), {}, "needs a float32 model, not torch.float64"),
        (quantized, {"held_out": 20}, "20 windows are held out, and the reference has 20"),
        (quantized, {"steps": 0}, "steps"),
        (quantized, {"lr": -1}, "lr"),
        (quantized, {"kept": {}}, "kept must hold a state by get and put"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_any_work(prepare, how, message, reference):
    with pytest.raises(ValueError, match=message):
        rl.tune(prepare(), reference, **how)


def test_a_weight_that_was_changed_since_has_no_codes_to_tune(reference):
    model = quantized()
    model.model.layers[1].mlp.down_proj.weight *= 1.1
    with pytest.raises(ValueError, match=r"layers\.1\.down was changed since it was quantized"):
        rl.tune(model, reference)


def test_a_model_kept_on_the_host_cannot_be_tuned(reference):
    model = quantized()
    model.rotlib_device = torch.device("meta")
    with pytest.raises(ValueError, match="tuning needs the whole model on meta"):
        rl.tune(model, reference)


def test_a_checkpoint_of_every_quality_is_one_command(tmp_path, monkeypatch, capsys):
    save_tiny_model(tmp_path / "model", "qwen3, tied")
    save_short_text(tmp_path)
    monkeypatch.setenv("ROTLIB_DATA", str(tmp_path))
    monkeypatch.setenv("ROTLIB_RESULTS", str(tmp_path / "results"))
    small = {"calibration_windows": 3, "test_windows": 2, "tuning": 2}
    monkeypatch.setitem(recipe.QUALITIES, "best", recipe.QUALITIES["best"] | small | {"steps": 4})
    command = [str(tmp_path / "model"), str(tmp_path / "out"), "--window", "64"]
    assert checkpoint.main([*command, "--text", "wikitext2"]) == 0
    assert "GB in all" in capsys.readouterr().out
    again = [*command[:1], str(tmp_path / "again"), *command[2:]]
    assert checkpoint.main([*again, "--text", "wikitext2", "--seed", "1"]) == 0
    assert "1 minutes where nothing is kept" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "tuning: 2" in card
    assert "asymmetry: 0.25" in card
    assert "loss_weighted: true" in card


@pytest.mark.parametrize("quality", recipe.QUALITIES)
def test_a_quality_can_be_had_on_an_asymmetric_grid_as_well(quality):
    signed = recipe.Recipe.of_quality(quality)
    assert signed.convention == "signed"
    asymmetric = recipe.Recipe.of_quality(quality, symmetric=False)
    assert asymmetric == replace(signed, symmetric=False, convention="half")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quality", "better"], "invalid choice: 'better'"),
        (["--bits", "9"], "bits must be a whole number from 2 to 8"),
        (["--format", "zip"], "invalid choice: 'zip'"),
        (["--group-size", "7"], "group_size 7 doesn't divide"),
    ],
)
def test_a_mistyped_option_is_refused_at_once(options, message, tmp_path, capsys, monkeypatch):
    save_tiny_model(tmp_path / "model", "qwen3, tied")
    monkeypatch.setenv("ROTLIB_RESULTS", str(tmp_path / "results"))
    with pytest.raises(SystemExit):
        checkpoint.main([str(tmp_path / "model"), str(tmp_path / "out"), *options])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
