"""The verdict on every claim, from stored results alone: which hold, on which model, how surely.

A claim says that one recipe stays closer to the original than another; `tables.judge` compares
their KL divergences, and the claims of one paper on one model are judged together (Holm). Where the
papers' own grid is noise on a small model, a claim is judged on grids that carry information there,
and its setting says which. Published figures stand in columns of their own, with the model that
they are of. Tables come as Markdown, CSV and LaTeX, and a manifest says which results each file was
made from.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import nan

import pandas

from rotlib.checks import one_of
from rotlib.disk import file_digest, write_text
from rotlib.study.figures import figures_folder
from rotlib.study.files import results_folder, saved
from rotlib.study.inference import Spread, holm, noise, smallest_effect, text_spread
from rotlib.study.recipe import READS, Recipe
from rotlib.study.store import load_results
from rotlib.study.tables import Arm, Verdict, arms, beside, judge, of_class, stored

_RIVAL = {"steps": 32}  # the study's laptop preset
_SHORT = {"steps": 16, "learning_windows": 16}  # and what it could afford below four bits
_BELOW_FOUR = {"symmetric": False, "act_order": True, "calibration_windows": 8, "test_windows": 4}
_GSR_GRIDS = ({"bits": 2, "group_size": 32}, {"bits": 3, "group_size": 64})
_READ_BY_LEARNERS = ("learning_windows", "preset", "steps")  # read by some rotations alone
SETTINGS = ("text", "window", "calibration_windows", "test_windows", *_READ_BY_LEARNERS)
_W4A4KV4 = {"activation_bits": 4, "kv_bits": 4, "R3": True, "R4": True}
_W2A4 = {"activation_bits": 4, "R4": True, **_GSR_GRIDS[0]}

PLANNED = {"seeds": 10, "windows": 32}  # of what is computed next

# (paper, measure, of which model, setting) -> {arm: what its authors print}; method.md's list, none
# of them ours. OptRot's own tables were not available when this was written
PUBLISHED = {
    ("SpinQuant", "WikiText-2 perplexity", "Llama-3-8B", "W4A16 GPTQ"): {
        "none": 7.2,
        "hadamard": 6.4,
        "spinquant": 6.4,
    },
    ("SpinQuant", "WikiText-2 perplexity", "Llama-3-8B", "W4A4KV4 GPTQ"): {
        "hadamard": 8.0,
        "spinquant": 7.3,
    },
    ("OSTQuant", "WikiText-2 perplexity", "Llama-3-8B", "W4A4KV4 GPTQ"): {
        "spinquant": 7.35,
        "ostquant": 7.29,
    },
    ("GSR", "WikiText-2 perplexity", "Llama-2-7B", "W2A16 g128 GPTQ"): {
        "GH": 20.29,
        "GW": 15.38,
        "LH": 12.11,
        "GSR": 11.59,
    },
    ("GSR", "WikiText-2 perplexity", "Llama-2-7B", "W2A4 g128 GPTQ"): {"GH": 31.33, "GSR": 15.23},
}


@dataclass(frozen=True)
class Claim:
    """What a paper says, and the two recipes that decide it.

    `better` should be closer to the original than `worse`.
    """

    paper: str
    text: str
    better: Recipe
    worse: Recipe


def claims(model: str, settings: dict | None = None) -> list[Claim]:
    """Every claim of both papers that the study decides, on one model.

    `settings`, some of `SETTINGS`, replace the study's.
    """
    for name in settings or {}:
        one_of("setting", name, SETTINGS)

    def there(recipe: Recipe) -> Recipe:
        unread = set(_READ_BY_LEARNERS) - set(READS.get(recipe.rotation, ()))
        read = {name: value for name, value in (settings or {}).items() if name not in unread}
        return replace(recipe, **read, model=model)

    def on_it(claim: Claim) -> Claim:
        return replace(claim, better=there(claim.better), worse=there(claim.worse))

    return [on_it(claim) for claim in _claims()]


def _claims() -> Iterator[Claim]:
    def rotated(name: str, **settings) -> Recipe:
        own = _RIVAL if name in ("spinquant", "ostquant") else {}
        return Recipe(rotation=name, **settings | own)

    hadamard, none = rotated("hadamard"), rotated("none")
    yield Claim("OptRot", "a random Hadamard rotation is better than none", hadamard, none)
    rivals = {"hadamard": "Hadamard", "spinquant": "SpinQuant", "ostquant": "OSTQuant"}
    for rival, name in rivals.items():
        yield Claim("OptRot", f"OptRot is better than {name}", rotated("optrot"), rotated(rival))
    yield Claim("OptRot", "OptRot+ is better than OptRot", rotated("optrot+"), rotated("optrot"))
    both = ("hadamard", "optrot")
    hadamard, optrot = (rotated(name, activation_bits=8) for name in both)
    yield Claim("OptRot", "OptRot helps 8-bit activations too", optrot, hadamard)
    hadamard, optrot = (rotated(name, activation_bits=4, R4=True) for name in both)
    yield Claim("OptRot", "OptRot is worse than Hadamard with 4-bit activations", hadamard, optrot)
    hadamard, optrot = (rotated(name, **_W4A4KV4) for name in both)
    yield Claim("OptRot", "OptRot is worse than Hadamard with a 4-bit cache too", hadamard, optrot)
    spinquant, optrot = (rotated(name, rounding="rtn") for name in ("spinquant", "optrot"))
    yield Claim("OptRot", "rounded to nearest, SpinQuant is better than OptRot", spinquant, optrot)
    for grid in _GSR_GRIDS:
        none = Recipe(**_BELOW_FOUR, **grid)
        GH, GW = (replace(none, rotation="gsr", R1_order=order) for order in ("hadamard", "walsh"))
        LH, GSR = (replace(arm, block=grid["group_size"]) for arm in (GH, GW))
        yield Claim("GSR", "GSR is better than a global Hadamard rotation", GSR, GH)
        yield Claim("GSR", "a global Hadamard rotation is better than none", GH, none)
        yield Claim("GSR", "sequency helps, on the whole width", GW, GH)
        with_signs = (replace(arm, signs=True) for arm in (GW, GH))
        yield Claim("GSR", "sequency helps, on the whole width, with random signs", *with_signs)
        yield Claim("GSR", "sequency helps, within groups", GSR, LH)
        yield Claim("GSR", "grouping helps, without order", LH, GH)
        yield Claim("GSR", "grouping helps, with order", GSR, GW)
    GH = Recipe(rotation="gsr", R1_order="hadamard", **_BELOW_FOUR, **_W2A4)
    GSR = replace(GH, R1_order="walsh", block=64)  # the study's blocks here, two groups wide
    yield Claim("GSR", "GSR is better than a global Hadamard rotation", GSR, GH)
    for name, settings in {"OptRot": {}, "SpinQuant": _SHORT, "OSTQuant": _SHORT}.items():
        learned = Recipe(rotation=name.lower(), **settings, **_BELOW_FOUR, **_GSR_GRIDS[1])
        starting_there = replace(learned, start="gsr", block=64)
        text = f"GSR improves learned rotations: {name} that starts there"
        yield Claim("GSR", text, starting_there, learned)


def verdicts(model: str, settings: dict | None = None) -> tuple[pandas.DataFrame, list[Arm]]:
    """(a row a claim, the arms that they were judged on).

    A claim is *reproduced* or *not reproduced* by the p-value that Holm's method leaves it among
    its paper's, *equivalent*, *undecided*, or "not run" where its arms share no seed.
    """
    rows, used, among = [], [], arms(load_results())
    for claim in claims(model, settings):
        pair = stored([claim.better, claim.worse])
        used += pair
        setting = _setting(Arm(claim.better, ()))
        row = {"paper": claim.paper, "claim": claim.text, "model": model, "setting": setting}
        if len(pair) == 2 and pair[0].values("kl").keys() & pair[1].values("kl").keys():
            found = judge(*pair, among=among)
        else:
            found = Verdict(nan, nan, 0, against="not run")
        rows.append(row | {"stale": any(arm.stale for arm in pair), "found": found})
    for paper in {row["paper"] for row in rows}:
        judged = [row for row in rows if row["paper"] == paper and row["found"].difference]
        adjusted = holm([row["found"].difference.p for row in judged])
        for row, p in zip(judged, adjusted, strict=True):
            row["p"] = p
    return pandas.DataFrame([_told(**row) for row in rows]), [*used, *beside(used, among)]


def _told(found: Verdict, stale: bool, p: float = nan, **row: str) -> dict[str, object]:
    """A claim's row: the change of KL in per cent, with its interval, and the verdict."""
    low = high = nan
    if found.difference:
        low, high = (100 * (end - 1) for end in (found.difference.low, found.difference.high))
        word = found.difference.word(p)
        verdict = {"yes": "reproduced", "no": "not reproduced"}.get(word, word)
    else:
        verdict = "not run" if not found.seeds else found.word
    return row | {
        "KL, %": 100 * (found.ratio - 1),
        "from": low,
        "to": high,
        "adjusted p": p,
        "effect, nats": found.effect,
        "seeds": found.seeds,
        "verdict": verdict,
        "stale": stale,
    }


def noise_by_class(model: str, settings: dict | None = None) -> pandas.DataFrame:
    """A row a class of the claims: its noise, and the least change of KL that a claim there shows.

    Noise is the standard deviation of a run about arm and seed, in per cent of KL, of its arms and
    of the windows of text, in the median over the claims. The least change is one that so many
    seeds show four times of five, by the first of Holm's levels, on this text or on more.
    """
    judged, among, found = claims(model, settings), arms(load_results()), {}
    for claim in judged:
        pair = stored([claim.better, claim.worse])
        if len(pair) == 2 and not any(arm.diverged for arm in pair):
            plain = replace(claim.better, R3=False, R4=False)
            found.setdefault((claim.paper, _setting(Arm(plain, ()))), []).append(pair)
    rows = []
    for (paper, setting), pairs in found.items():
        several = [arm for arm in of_class(pairs[0][0], among) if len(arm.results) > 1]
        shared = noise([arm.runs for arm in several])
        texts = [text for a, b in pairs if (text := text_spread(a.runs, b.runs))]
        if shared is None:
            continue
        text = sorted(texts)[len(texts) // 2] if texts else None
        arm = sorted(shared.arms)[len(shared.arms) // 2]
        row = {"class": setting, "arms": len(shared.arms), "noise, %": 100 * arm.variance**0.5}
        row |= {"degrees of freedom": arm.freedom, "alike": shared.whole.freedom}
        row["text, %"] = 100 * text.variance**0.5 if text else nan
        tests = sum(other.paper == paper for other in judged)
        for seeds in (3, 5):
            row[f"{seeds} seeds, %"] = 100 * smallest_effect(arm, seeds, text, tests)
        if text:  # more windows of the same kind
            more = text.variance * (text.freedom + 1) / PLANNED["windows"]
            text = Spread(more, PLANNED["windows"] - 1)
        planned = f"{PLANNED['seeds']} seeds, {PLANNED['windows']} windows, %"
        row[planned] = 100 * smallest_effect(arm, PLANNED["seeds"], text, tests)
        rows.append(row)
    return pandas.DataFrame(rows)


def compared(
    model: str, paper: str, settings: dict | None = None
) -> tuple[pandas.DataFrame, list[Arm]]:
    """(a paper's table, the arms measured).

    The table has an arm a row, what is published and what was measured side by side. Measured is KL
    divergence in nats, mean ± standard error, with perplexity in brackets.
    """
    judged = [claim for claim in claims(model, settings) if claim.paper == paper]
    used = [arm for claim in judged for arm in stored([claim.better, claim.worse])]
    table: dict[str, dict[str, str]] = {}
    for (source, measure, of, setting), figures in PUBLISHED.items():
        if (source == "GSR") == (paper == "GSR"):
            column = f"{source}'s paper: {of}, {setting}, {measure}"
            for arm, figure in figures.items():
                table.setdefault(arm, {})[column] = f"{figure:g}"
    for arm in used:
        mean, error = arm.summary("kl")
        spread = f" ± {error:.3f}" if error == error else ""
        cell = f"{mean:.3f}{spread} ({arm.summary('perplexity')[0]:.2f})"
        cell += " diverged" * arm.diverged + " stale" * arm.stale
        # whatever the block, and with R4 on or off: the column says
        words = arm.rotation.split(" + ")[0].split()
        row = " ".join(word for word in words if not word.isdigit())
        table.setdefault(row, {})[f"{model}, {_setting(arm)}"] = cell
    frame = pandas.DataFrame.from_dict(table, orient="index").fillna("")
    frame.index.name = "rotation"
    return frame.reset_index(), used


def _setting(arm: Arm) -> str:
    """Such as "W4A16 GPTQ" or "W3A16 g64 GPTQ act-order"."""
    online = " ".join(arm.recipe.online)
    return f"{arm.grid} {arm.rounding}" + (f", {online}" if online else "")


def save_table(frame: pandas.DataFrame, name: str) -> None:
    """figures/<name>.md, .csv and .tex."""
    forms = {
        "md": frame.to_markdown(index=False, floatfmt=".3f") + "\n",
        "csv": frame.to_csv(index=False, float_format="%.6g"),
        "tex": frame.to_latex(index=False, float_format="%.3f", escape=True),
    }
    for kind, text in forms.items():
        write_text(figures_folder() / f"{name}.{kind}", text)


def _digest(used: str) -> str | None:
    """Of a result, or of another file that is named by its path under results/."""
    found = saved(used) or [path for path in [results_folder() / used] if path.is_file()]
    return file_digest(found[-1]) if found else None


def save_manifest(made_from: dict[str, Iterable[Arm]], redrawn: dict[str, list[str]]) -> None:
    """figures/manifest.json: of every file named, its sha256 and its results'.

    `redrawn` names its files' results already, as `figures.redraw` does.
    """
    named = {
        name: sorted({result.file for arm in arms for result in arm.results})
        for name, arms in made_from.items()
    }
    files = {}
    for name, names in (redrawn | named).items():
        results = {used: _digest(used) for used in names}
        for path in sorted(figures_folder().glob(f"{name}.*")):
            files[path.name] = {"results": results, "sha256": file_digest(path)}
    manifest = {"files": files}
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    write_text(figures_folder() / "manifest.json", text)
