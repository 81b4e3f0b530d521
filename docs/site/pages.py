"""The pages that are made from the study and from the code: a claim each, and the public names."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path

import pandas
import yaml

import rotlib as rl
from rotlib.disk import ROOT
from rotlib.study import claims, tables
from rotlib.study.recipe import Recipe
from rotlib.study.sweep_file import read_sweep

DOCS = ROOT / "docs"
MODEL = Recipe.model
CLAIMS = DOCS / "claims"  # neither is committed
API = DOCS / "api.md"
LINE = "\n"
CHAPTERS = {
    "Notebooks": ("notebooks/*",),
    "What it found": ("results/study/README", "docs/claims/index"),
    "Using it": (
        *("docs/your_model", "docs/export", "docs/library", "docs/own_rotation", "docs/sweeps"),
        *("docs/gpu", "docs/commands", "docs/api"),
    ),
    "The project": (
        *("docs/code", "docs/statistics"),
        "docs/results",
        ".github/CONTRIBUTING",
        "SECURITY",
        "docs/changelog",
    ),
}


def write() -> None:
    """All of them, anew."""
    shutil.rmtree(CLAIMS, ignore_errors=True)
    CLAIMS.mkdir()
    judged, _ = claims.verdicts(MODEL)
    named = {}
    for (_, row), claim in zip(judged.iterrows(), claims.claims(MODEL), strict=True):
        title = f"{claim.text[0].upper()}{claim.text[1:]} ({row.setting})"
        name = re.sub("[^a-z0-9]+", "-", title.lower().replace("+", " plus")).strip("-")
        cells = (row.verdict, _effect(row), _p(row), row.seeds)
        named[name] = f"| [{title}]({name}.md) | {' | '.join(map(str, cells))} |"
        (CLAIMS / f"{name}.md").write_text(_claim_page(title, claim, row), encoding="utf-8")
    text = f"""# Every claim

On `{MODEL}`, whose weights were [4-bit already](../results.md#the-packaged-model-and-text). The
effect is what the first side's divergence (KL) has over the other's: below zero is in favour of the
claim. With it stand its 95 % interval and the p-value after [Holm's correction](../statistics.md).

| claim | verdict | KL, % | adjusted p | seeds |
|---|---|---|---|---|
{LINE.join(named.values())}

```{{toctree}}
:hidden:

{LINE.join(named)}
```
"""
    (CLAIMS / "index.md").write_text(text, encoding="utf-8")
    API.write_text(LINE.join(_api()), encoding="utf-8")


def contents() -> str:
    """What the landing page gets for the menu at the side."""
    text = ""
    for caption, names in CHAPTERS.items():
        glob = ":glob:\n" if any("*" in name for name in names) else ""
        listed = "\n".join(f"/{name}" for name in names)
        text += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n{glob}\n{listed}\n```\n"
    return text


def _effect(row: pandas.Series) -> str:
    if not row["seeds"]:
        return "–"
    interval = f" ({row['from']:+.0f} to {row['to']:+.0f})" if row["from"] == row["from"] else ""
    return f"{row['KL, %']:+.0f}{interval}"


def _p(row: pandas.Series) -> str:
    p = row["adjusted p"]
    return "–" if p != p else f"{p:.2g}" if p >= 1e-4 else "< 0.0001"


def _claim_page(title: str, claim: claims.Claim, row: pandas.Series) -> str:
    text = f"# {title}\n\nA claim of {claim.paper}'s paper, on `{MODEL}`: **{row.verdict}**."
    if row.seeds:
        text += (
            f" Over {row.seeds} seeds the divergence (KL) from the original is {_effect(row)} % on "
            f"the first side, adjusted p {_p(row)} ([how that is judged](../statistics.md))."
        )
    sides = {
        "The side that should be nearer to the original": claim.better,
        "The other": claim.worse,
    }
    for side, recipe in sides.items():
        text += f"\n\n## {side}\n\n{''.join(map(_runs, tables.stored([recipe])))}"
        text += f"```yaml\n{yaml.safe_dump(_changed(recipe), sort_keys=False)}```\n"
        if command := command_for(recipe):
            text += f"\nTo run it again:\n\n```\n{command}\n```\n"
    return text


def _runs(arm: tables.Arm) -> str:
    rows = [
        f"| {result.spec.get('seed', Recipe.seed)} | {result.metrics['kl']:.4f} "
        f"| {result.metrics['perplexity']:.3f} | `{str(result.provenance.get('commit'))[:7]}` "
        f"| {result.provenance.get('device', '–')} |"
        for result in arm.results
    ]
    mean, error = arm.summary("kl")
    return f"""{arm.rotation}: {mean:.4f} ± {error:.4f} nats.{" Stale." * arm.stale}

| seed | KL, nats | perplexity | commit | on |
|---|---|---|---|---|
{LINE.join(rows)}

"""


def _changed(recipe: Recipe) -> dict:
    """What a recipe says beside the defaults."""
    told = {"model", "rotation", "bits", *recipe.spec()}
    return {name: value for name, value in asdict(recipe).items() if name in told}


def command_for(recipe: Recipe) -> str | None:
    """The sweep that holds this recipe, with the filters that leave its seeds alone."""
    for name in ("main", "gsr"):  # the study's
        path = ROOT / "configs" / "sweeps" / f"{name}.yaml"
        chosen = _recipes(path)
        if recipe in (replace(other, seed=recipe.seed) for other in chosen):
            filters = []
            for field in fields(recipe):
                value = getattr(recipe, field.name)
                if field.name != "seed" and any(getattr(o, field.name) != value for o in chosen):
                    filters.append(f"{field.name}={yaml.safe_dump(value).splitlines()[0]}")
                    chosen = [other for other in chosen if getattr(other, field.name) == value]
            only = " ".join(f"--only {text}" for text in filters)
            return f".venv/bin/python -m rotlib.study.sweep {path.relative_to(ROOT)} {only}".strip()
    return None


@cache
def _recipes(path: Path) -> list[Recipe]:
    return read_sweep(path)


def _api() -> Iterator[str]:
    """Every public name, by its package."""
    yield "# The public names\n"
    package = None
    for module, names in rl._PUBLIC.items():
        if package != (package := module.partition(".")[0]):
            yield f"\n## rotlib.{package}\n"
        for name in names:
            value = getattr(rl, name)
            kind = "autoclass" if isinstance(value, type) else "autofunction"
            if not callable(value):
                kind = "data"  # its docstring would be its type's
            yield f"```{{eval-rst}}\n.. {kind}:: rotlib.{name}\n```\n"
