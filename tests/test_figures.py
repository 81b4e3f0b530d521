"""Figures drawn again from what was kept of them: the same bytes, or one sentence."""

import hashlib
import inspect
import json

import matplotlib.pyplot as plt
import pytest
import torch

from rotlib import disk
from rotlib.measure.outliers import HISTOGRAM_EDGES
from rotlib.models.families import Family
from rotlib.study import figures, files, numerics, plots, store, tables
from rotlib.study.recipe import Recipe

FUNCTIONS = [
    name
    for name, thing in vars(plots).items()
    if inspect.isfunction(thing)
    and not name.startswith("_")
    and "Figure" in str(thing.__annotations__)
]


CLAIM = {
    **{"paper": "OptRot", "claim": "first", "setting": "W4A16 GPTQ", "verdict": "reproduced"},
    **{"KL, %": -14.0, "from": -20.0, "to": -7.0, "model": "smollm2-135m"},
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ROTLIB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("ROTLIB_FIGURES", str(tmp_path / "figures"))
    return tmp_path


def stored(spec, metrics):
    result = store.Result(
        spec,
        metrics,
        {"rotate": 10.0 + spec.get("seed", 0)},
        0.0,
        {"stages": numerics.digests(["recipe"])},
    )
    store.save(result, files.local_path(spec))
    return result


def arm(rotation, kl=0.3, seeds=3, perplexity=20.0, **settings):
    """An arm of made-up seeds."""
    specs = [Recipe(rotation=rotation, seed=seed, **settings).spec() for seed in range(seeds)]
    metrics = {"perplexity": perplexity, "reference_perplexity": 19.0}
    metrics |= {"objective": 5.5, "objective_history": [8.25, 7, 1 / 3 * 20, 6]}
    return tables.arms(
        stored(spec, metrics | {"kl": kl + seed / 70}) for seed, spec in enumerate(specs)
    )[0]


def modules(task, rotation):
    """A made-up result of every module."""
    names = (
        *(
            "kurtosis",
            "incoherence",
            "input_kurtosis",
            "sink_kurtosis",
            "rtn_bound",
            "rtn_error",
            "gptq_bound",
            "gptq_error",
        ),
        *("floor", "tr_D", "tr_H", "energy"),
    )
    measured = [
        {"site": site, "layer": layer}
        | {name: (5 + len(rotation) + layer + place) / 7 for place, name in enumerate(names)}
        for site in Family.linear_paths
        for layer in range(3)
    ]
    energies = [1 + place % 3 / len(rotation) for place in range(8)]
    return stored(
        {"task": task, "rotation": rotation},
        {"modules": measured, "histogram": [9] * len(HISTOGRAM_EDGES), "energies": energies},
    )


def example(name):
    """Arguments for a function of `plots`."""
    if name in ("kl_bars", "arm_comparison", "training_losses"):
        return ([arm("hadamard"), arm("optrot", 0.2, seeds=1), arm("optrot", 0.2, rounding="rtn")],)
    if name == "learning_curves":
        return (arm("optrot"),)
    if name == "pareto":
        return (
            [
                (arm(name), arm(name, 0.6, activation_bits=4))
                for name in ("hadamard", "optrot", "kurtail")
            ],
        )
    if name == "effects":
        return (
            {
                "learned": {
                    "W4A16": (arm("optrot", 0.2), arm("hadamard")),
                    "one seed": [arm("optrot", seeds=1, bits=3), arm("random")],
                }
            },
            [arm("random")],
        )
    if name == "claims":
        nan = float("nan")
        unknown = {"KL, %": nan, "from": nan, "to": nan, "verdict": "not run", "paper": "GSR"}
        return ([CLAIM, CLAIM | {"KL, %": 8.0, "from": nan, "to": nan}, CLAIM | unknown],)
    if name == "ladder":
        step = [arm("none", 0.9), arm("optrot", 0.2, seeds=1)]
        return ({"first": step, "second": [arm("optrot", bits=3)]},)
    if name == "tools":
        line = {"tool": "rotlib, best", "seconds": 900.0, "kl": 0.08}
        return ([line, line | {"tool": "another", "seconds": 90.0}],)
    if name == "budget_curves":
        return (
            {
                "spinquant": [arm("spinquant", steps=steps) for steps in (8, 16)],
                "optrot": [arm("optrot")],
            },
        )
    if name == "time_by_step":
        return ({"said before": {"rotate": 30.0, "quantize": 90}, "taken": {"rotate": 29.5}},)
    if name == "checkpoint_sizes":
        return (
            {
                "OptRot, gguf": {"codes": 60.5, "scales": 3},
                "OptRot, fused": {"codes": 480, "scales": 0},
            },
            {"OptRot, gguf": 64, "OptRot, fused": 481.5},
        )
    if name == "matrices":
        return (
            {
                "hadamard": torch.tensor([[1, 1], [1, -1]]) / 2**0.5,
                "identity": torch.eye(3, dtype=torch.float64),
            },
        )
    results = {name: modules("bounds", name) for name in ("none", "hadamard", "optrot")}
    if name == "errors_against_kl":
        return results, [
            arm(name, len(name) / 9, rounding=rounding)
            for name in results
            for rounding in ("rtn", "gptq")
        ]
    others = {
        "outliers_by_layer": ("kurtosis", "kurtosis of the weights"),
        "coordinate_energies": (4,),
    }
    return results, *others.get(name, ())


def digests():
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in figures.figures_folder().iterdir()
    }


def referenced(thing):
    """The files of the results among a function's arguments."""
    if isinstance(thing, store.Result):
        return {files.local_path(thing.spec).name}
    inner = (
        thing.values()
        if isinstance(thing, dict)
        else thing.results
        if isinstance(thing, tables.Arm)
        else thing
    )
    return (
        set().union(*(referenced(part) for part in inner))
        if isinstance(inner, list | tuple | type({}.values()))
        else set()
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_figure_redrawn_from_its_saved_data_has_the_bytes_it_was_saved_and_drawn_with(name):
    given = example(name)
    figures.save(getattr(plots, name)(*given), "figure")
    saved = digests()
    assert set(saved) == {"figure.pdf", "figure.png"}
    for path in figures.figures_folder().iterdir():
        path.unlink()
    assert figures.redraw() == {"figure": ["figures/figure.json", *sorted(referenced(given))]}
    assert digests() == saved
    figure = getattr(plots, name)(*given)
    for kind, metadata in figures._METADATA.items():
        figure.savefig(figures.figures_folder() / f"figure.{kind}", metadata=metadata, dpi=200)
    plt.close(figure)
    assert digests() == saved


def test_a_model_whose_arms_have_all_diverged_gets_a_figure_that_says_so():
    figure = plots.arm_comparison([arm("none", perplexity=1e6), arm("hadamard", perplexity=1e7)])
    assert "every arm has diverged" in figure.axes[0].texts[0].get_text()


def test_what_is_kept_of_a_figure_names_its_results_and_copies_none_of_them():
    figures.save(plots.learning_curves(arm("optrot")), "figure")
    kept = json.loads((files.results_folder() / "local" / "figures" / "figure.json").read_text())
    named = [
        files.local_path(Recipe(rotation="optrot", seed=seed).spec()).name for seed in range(3)
    ]
    assert kept == {"function": "learning_curves", "arguments": {"arm": {"arm of": named}}}


def test_a_matrix_is_kept_to_half_a_shade_of_its_picture():
    torch.manual_seed(0)
    R = torch.randn(96, 96)
    figures.save(plots.matrices({"random": R}), "figure")
    path = files.results_folder() / "local" / "figures" / "figure.json"
    assert path.stat().st_size < 14_000
    kept = figures._kept(R)
    assert json.loads(path.read_text())["arguments"]["named"]["random"] == kept
    assert kept["largest"] == R.abs().max().item()


def test_a_result_that_was_recomputed_is_drawn_as_it_is_now():
    figures.save(plots.kl_bars([arm("optrot", 0.2)]), "figure")
    before = digests()
    arm("optrot", 0.4)
    figures.redraw()
    assert digests() != before


def test_a_figure_whose_result_has_gone_is_left_as_it_is_and_the_file_is_named(caplog):
    figures.save(plots.kl_bars([arm("hadamard")]), "kept")
    gone = arm("optrot")
    figures.save(plots.kl_bars([gone]), "lost")
    (figures.figures_folder() / "lost.pdf").write_text("committed")
    missing = files.local_path(gone.results[1].spec)
    missing.unlink()
    assert list(figures.redraw()) == ["kept"]
    assert (figures.figures_folder() / "lost.pdf").read_text() == "committed"
    (said,) = caplog.messages
    assert said == (
        f"rotlib: the figure lost is left as it is: the result {missing.name} "
        "is neither in results/local nor in results/study"
    )


def test_what_this_machine_drew_wins_over_what_the_study_drew():
    study = files.results_folder() / "study" / "figures"
    figures.save(plots.kl_bars([arm("hadamard")]), "figure")
    (study.parent).mkdir()
    (files.results_folder() / "local" / "figures").rename(study)
    committed = digests()
    figures.save(plots.kl_bars([arm("optrot", 0.2)]), "figure")
    local = digests()
    figures.redraw()
    assert digests() == local != committed
    (files.results_folder() / "local" / "figures" / "figure.json").unlink()
    figures.redraw()
    assert digests() == committed


def test_a_draft_touches_neither_the_reproduced_figure_nor_its_data(folder, monkeypatch):
    figures.save(plots.kl_bars([arm("hadamard")]), "figure")
    reproduced = digests()
    kept = (files.results_folder() / "local" / "figures" / "figure.json").read_bytes()
    monkeypatch.delenv("ROTLIB_FIGURES")
    monkeypatch.setattr(disk, "ROOT", folder / "checkout")
    figures.save(plots.kl_bars([arm("optrot", 0.2)]), "figure")
    assert figures.figures_folder() == folder / "checkout" / "figures" / "draft"
    assert set(digests()) == {"figure.pdf", "figure.png"}
    monkeypatch.setenv("ROTLIB_FIGURES", str(folder / "figures"))
    assert digests() == reproduced
    assert (files.results_folder() / "local" / "figures" / "figure.json").read_bytes() == kept


def test_kept_figures_are_no_results():
    figures.save(plots.kl_bars([arm("hadamard")]), "figure")
    assert len(store.load_results()) == 3


def test_a_figure_of_ones_own_or_a_file_of_another_version_is_refused_in_one_sentence():
    refusal = (
        "the figure mine couldn't be drawn again: "
        r"let a function of rotlib/study/plots\.py draw it"
    )
    with pytest.raises(ValueError, match=refusal):
        figures.save(plt.figure(), "mine")
    plt.close("all")
    with pytest.raises(TypeError, match="not from a set"):
        figures.save(plots.claims([CLAIM | {"seeds": {0}}]), "odd")
    path = files.results_folder() / "local" / "figures" / "old.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"function": "pie", "arguments": {}}')
    with pytest.raises(
        ValueError, match=r"old.json can't be drawn: delete it and run its notebook again"
    ):
        figures.redraw()
