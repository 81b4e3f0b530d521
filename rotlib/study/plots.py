"""Figures, drawn from saved results: one function a figure, the same bytes on every run.

Their colours are safe for the colour-blind. A function takes arms and results rather than numbers
made of them (but for rotation matrices and files' sizes, which no result holds). Its figure
remembers them, so that `figures.py` can draw it again without the notebook that called it.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from itertools import cycle
from statistics import fmean

import matplotlib.pyplot as plt
import pandas
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from rotlib.measure.outliers import HISTOGRAM_EDGES
from rotlib.models.families import Family
from rotlib.study.store import Result
from rotlib.study.tables import Arm, judge, recipe_of

# load the backend now: loaded inside the first figure's rc_context, its settings would end with it,
# and notebooks show no second figure
plt.switch_backend(plt.get_backend())

WIDTH = 7.0  # inches
# Okabe and Ito's palette, one colour and marker a rotation in every figure
STYLE = {
    "none": ("#000000", "o"),
    "random": ("#56B4E9", "s"),
    "hadamard": ("#E69F00", "^"),
    "optrot": ("#009E73", "D"),
    "kurtail": ("#CC79A7", "v"),
    "mixed": ("#0072B2", "P"),
    "optrot+": ("#005F45", "d"),
    "spinquant": ("#D55E00", "X"),
    "ostquant": ("#7F6BB3", "p"),
    "klt": ("#999933", "h"),
    "GH": ("#E69F00", "^"),
    "GW": ("#A86F00", "<"),
    "LH": ("#56B4E9", "s"),
    "GSR": ("#0072B2", "D"),
}
# rotations as their papers write them; others as recipes do
NAMES = {
    "none": "no rotation",
    "hadamard": "Hadamard",
    "optrot": "OptRot",
    "optrot+": "OptRot+",
    "kurtail": "KurTail",
    "spinquant": "SpinQuant",
    "ostquant": "OSTQuant",
    "klt": "KLT × Hadamard",
}
# the inputs of a layer, by the first weight that reads each
_INPUTS = {"q": "q, k, v", "o": "o", "gate": "gate, up", "down": "down"}
_RC = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "figure.dpi": 110,
}


def _figure(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the study's style, and let the figure know from what.

    `figure.drawn_from` is (the function's name, its arguments by name).
    """

    @wraps(draw)
    def drawn(*given, **named) -> Figure:
        with plt.rc_context(_RC):
            figure = draw(*given, **named)
        figure.drawn_from = (draw.__name__, signature(draw).bind(*given, **named).arguments)
        return figure

    return drawn


@_figure
def kl_bars(arms: Sequence[Arm]) -> Figure:
    """KL divergence of each arm from the original, one bar an arm."""
    figure, axis = plt.subplots(figsize=(WIDTH * 0.6, 2.2), layout="constrained")
    for height, arm in enumerate(reversed(arms)):
        value, _ = arm.summary("kl")
        axis.barh(height, value, color=_style(arm.rotation)["color"], height=0.6)
        beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        axis.annotate(f"{value:.2f}", (value, height), **beside)
    axis.set_yticks(range(len(arms)), [_shown(arm.rotation) for arm in reversed(arms)])
    axis.set_xlabel("KL divergence from the original, nats per token")
    axis.margins(x=0.15)
    return figure


@_figure
def outliers_by_layer(results: dict[str, Result], quantity: str, ylabel: str) -> Figure:
    """A quantity of every module over the layers, a panel a site.

    `quantity` is "kurtosis", "incoherence" or "input_kurtosis".
    """
    sites = {site: site for site in Family.linear_paths}
    if quantity == "input_kurtosis":
        sites = _INPUTS
    columns = min(4, len(sites))
    rows = -(-len(sites) // columns)
    size = (WIDTH, 1.9 * rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for axis, (site, title) in zip(axes.flat, sites.items(), strict=False):
        for rotation, result in results.items():
            modules = _modules_at(site, result)
            at = [[module[side] for module in modules] for side in ("layer", quantity)]
            axis.plot(*at, ms=2.5, lw=0.8, label=_shown(rotation), **_style(rotation))
        axis.set_title(title)
        if quantity != "incoherence":
            axis.axhline(3, color="0.7", lw=0.8, zorder=0)
    shown = [result.metrics["modules"] for result in results.values()]
    values = [module[quantity] for modules in shown for module in modules]
    if max(values) > 10 * min(values):
        axes.flat[0].set_yscale("log")  # the panels share it
        if max(values) < 1000:
            _plain_log_ticks(axes.flat[0].yaxis, (1, 2, 5))
    for axis in axes.flat[len(sites) :]:
        axis.set_axis_off()
    figure.supxlabel("layer")
    figure.supylabel(ylabel)
    _legend_above(figure, axes.flat[0])
    return figure


@_figure
def weight_tails(results: dict[str, Result]) -> Figure:
    """The share of weights larger than k times their matrix's root mean square."""
    figure, axis = plt.subplots(figsize=(WIDTH * 0.6, 2.6), layout="constrained")
    for rotation, result in results.items():
        counts = result.metrics["histogram"]
        above = [sum(counts[i:]) / sum(counts) for i in range(len(counts))]
        points = zip(HISTOGRAM_EDGES, above, strict=False)
        kept = [(edge, share) for edge, share in points if share > 0]
        axis.plot(*zip(*kept, strict=True), color=_style(rotation)["color"], label=_shown(rotation))
    axis.set_yscale("log")
    axis.set_xlabel("|w| / root mean square of its matrix")
    axis.set_ylabel("share of weights above")
    axis.legend()
    return figure


@_figure
def learning_curves(arm: Arm) -> Figure:
    """The objective, estimated at every draw of rows, a curve a seed.

    The points are the exact values at the end.
    """
    figure, axis = plt.subplots(figsize=(WIDTH * 0.6, 2.6), layout="constrained")
    for result, dashes in zip(arm.results, cycle(("-", "--", ":")), strict=False):
        history = result.metrics["objective_history"]
        color, marker = STYLE["optrot"]
        label = f"seed {recipe_of(result).seed}"
        axis.plot(range(len(history)), history, dashes, lw=0.9, color=color, label=label)
        axis.plot(len(history), result.metrics["objective"], marker, color=color, ms=4)
    axis.set_xlabel("draw of rows")
    axis.set_ylabel("sum of fourth powers")
    axis.legend()
    return figure


@_figure
def ladder(rows: dict[str, Sequence[Arm]]) -> Figure:
    """KL divergence of arms, a named row after the other: mean, standard error, seeds behind."""
    size = (WIDTH, 1.2 + 0.24 * len(rows))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    named: dict[str, ErrorbarContainer] = {}
    for place, arms in enumerate(rows.values()):
        for arm in arms:
            named[_shown(arm.rotation)] = _mean_and_seeds(axis, arm, place, ls="none")
    axis.set_yticks(range(len(rows)), rows)
    axis.invert_yaxis()
    axis.margins(y=0.08)
    axis.set_xlim(0, 1.05 * axis.get_xlim()[1])
    axis.grid(axis="x", color="0.9", lw=0.6)
    axis.set_xlabel("KL divergence from the original, nats per token")
    if len(named) > 1:
        columns = {"loc": "outside upper center", "ncols": len(named)}
        figure.legend(named.values(), named, **columns)
    return figure


@_figure
def tools(lines: Sequence[dict]) -> Figure:
    """KL divergence of each tool's checkpoint against the seconds that making it took."""
    figure, axis = plt.subplots(figsize=(WIDTH * 0.75, 2.8), layout="constrained")
    for line in lines:
        own = line["tool"].startswith("rotlib")
        colour, marker = STYLE["optrot" if own else "none"]
        axis.plot(line["seconds"], line["kl"], color=colour, marker=marker, ls="none")
        beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        axis.annotate(line["tool"], (line["seconds"], line["kl"]), color=colour, **beside)
    axis.set_xscale("log")
    _plain_log_ticks(axis.xaxis, (1, 2, 5))
    axis.margins(x=0.3, y=0.15)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("seconds to make it, on the same threads")
    axis.set_ylabel("KL divergence, nats per token")
    return figure


@_figure
def arm_comparison(arms: Sequence[Arm]) -> Figure:
    """KL divergence of every arm, a line a rotation, a panel a grid and rounding.

    Shown are mean and standard error, with the seeds behind. Diverged arms are left out.
    """
    arms = [arm for arm in arms if not arm.diverged]
    if not arms:
        figure, axis = plt.subplots(figsize=(WIDTH, 0.8), layout="constrained")
        axis.set_axis_off()
        axis.text(0.5, 0.5, "every arm has diverged: there is nothing to compare", ha="center")
        return figure
    panels: dict[tuple[str, str], list[Arm]] = {}
    for arm in arms:
        panels.setdefault((arm.grid, arm.rounding), []).append(arm)
    rotations = list(dict.fromkeys(arm.rotation for arm in arms))
    means = [[arm.summary("kl")[0] for arm in shown] for shown in panels.values()]
    wide = any(max(panel) > 8 * min(panel) for panel in means)
    size = (WIDTH, 0.9 + 0.24 * len(rotations))
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, layout="constrained", squeeze=False, sharey=True
    )
    for axis, ((grid, rounding), shown) in zip(axes[0], panels.items(), strict=True):
        for arm in shown:
            _mean_and_seeds(axis, arm, rotations.index(arm.rotation))
        if wide:
            axis.set_xscale("log")
            _plain_log_ticks(axis.xaxis, (1, 2, 5))
        else:
            axis.set_xlim(0, 1.08 * axis.get_xlim()[1])
            axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set_title(grid + ("" if rounding == "none" else f", {rounding}"))
        axis.grid(axis="x", color="0.9", lw=0.6)
    axes[0][0].set_yticks(range(len(rotations)), [_shown(name) for name in rotations])
    axes[0][0].invert_yaxis()
    axes[0][0].margins(y=0.12)
    figure.supxlabel("KL divergence from the original, nats per token", fontsize=9)
    return figure


@_figure
def weights_against_inputs(results: dict[str, Result], quantity: str = "input_kurtosis") -> Figure:
    """Kurtosis of what a module reads against that of its weight, a point a layer.

    `quantity` is "input_kurtosis", over all tokens, or "sink_kurtosis", of the first one.
    """
    inputs = {
        "input_kurtosis": "kurtosis of the inputs",
        "sink_kurtosis": "kurtosis of the first token",
    }
    sites = ("q", "o", "gate", "down")
    figure, axes = plt.subplots(
        1, len(sites), figsize=(WIDTH, 2.5), layout="constrained", sharex=True, sharey=True
    )
    for axis, site in zip(axes, sites, strict=True):
        for rotation, result in results.items():
            modules = _modules_at(site, result)
            at = [[module[side] for module in modules] for side in ("kurtosis", quantity)]
            axis.plot(*at, ls="", ms=3, alpha=0.7, label=_shown(rotation), **_style(rotation))
        axis.axhline(3, color="0.8", lw=0.8, zorder=0)
        axis.axvline(3, color="0.8", lw=0.8, zorder=0)
        axis.set_title(site)
    axes[0].xaxis.set_major_locator(MaxNLocator(4))
    axes[0].set_yscale("log")
    _plain_log_ticks(axes[0].yaxis, (1, 3))
    figure.supxlabel("kurtosis of the weights", fontsize=9)
    figure.supylabel(inputs[quantity], fontsize=9)
    _legend_above(figure, axes[0])
    return figure


@_figure
def pareto(pairs: Sequence[tuple[Arm, Arm]]) -> Figure:
    """Each rotation's KL at one precision against its KL at another, mean and standard error.

    "mixed" in λ's order is one line.
    """
    figure, axis = plt.subplots(figsize=(WIDTH * 0.7, 3.4), layout="constrained")
    line = []
    for pair in pairs:
        (x, dx), (y, dy) = (arm.summary("kl") for arm in pair)
        errors = {"xerr": dx, "yerr": dy} if dx == dx else {}
        axis.errorbar(x, y, **errors, ms=6, capsize=2, lw=0.8, **_style(pair[0].rotation))
        axis.annotate(_shown(pair[0].rotation), (x, y), xytext=(6, 5), textcoords="offset points")
        recipe = pair[0].recipe
        if recipe.rotation in ("optrot", "mixed", "kurtail"):
            share = recipe.activation_share or float(recipe.rotation == "kurtail")
            line.append((share, x, y))
    points = [point[1:] for point in sorted(line)]
    axis.plot(*zip(*points, strict=True), color="0.7", lw=1, zorder=0)
    xlabel, ylabel = (f"KL at {arm.recipe.precision}, nats per token" for arm in pairs[0])
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.margins(0.2)
    return figure


@_figure
def bounds_against_errors(results: dict[str, Result]) -> Figure:
    """The error of every module against its bound, a panel a rounding.

    On the grey line the bound would be reached.
    """
    roundings = {"rtn": "RTN", "gptq": "GPTQ"}
    figure, axes = plt.subplots(
        1, 2, figsize=(WIDTH, 3.0), layout="constrained", sharex=True, sharey=True
    )
    for axis, (rounding, title) in zip(axes, roundings.items(), strict=True):
        for rotation, result in results.items():
            modules = result.metrics["modules"]
            sides = (f"{rounding}_bound", f"{rounding}_error")
            at = [[module[side] for module in modules] for side in sides]
            axis.plot(*at, ls="", ms=3, alpha=0.6, label=_shown(rotation), **_style(rotation))
        axis.axline((1e-3, 1e-3), (1, 1), color="0.7", lw=0.8, zorder=0)
        axis.set(xscale="log", yscale="log", title=title)
    figure.supxlabel("bound on the error", fontsize=9)
    figure.supylabel("error tr(ΔW H ΔWᵀ)", fontsize=9)
    _legend_above(figure, axes[0])
    return figure


@_figure
def pivots_by_layer(results: dict[str, Result]) -> Figure:
    """tr(D) / tr(H) of what every module reads, over the layers.

    The grey area lies below the floor that no rotation passes.
    """
    sites = _INPUTS
    figure, axes = plt.subplots(
        1, len(sites), figsize=(WIDTH, 2.3), layout="constrained", sharex=True, sharey=True
    )
    for axis, (site, title) in zip(axes, sites.items(), strict=True):
        for rotation, result in results.items():
            modules = _modules_at(site, result)
            layers = [module["layer"] for module in modules]
            pivots = [module["tr_D"] / module["tr_H"] for module in modules]
            axis.plot(layers, pivots, ms=2.5, lw=0.8, label=_shown(rotation), **_style(rotation))
        floor = [module["floor"] / module["tr_H"] for module in modules]
        axis.fill_between(layers, floor, color="0.85", lw=0, zorder=0)
        axis.set_title(title)
    axes[0].set_ylim(0, 1)
    figure.supxlabel("layer", fontsize=9)
    figure.supylabel("tr(D) / tr(H)", fontsize=9)
    _legend_above(figure, axes[0])
    return figure


@_figure
def errors_against_kl(bounds: dict[str, Result], arms: Sequence[Arm]) -> Figure:
    """Each arm's KL against the errors of its rotation, summed over the layers.

    Markers are filled for GPTQ, hollow for rounding to nearest.
    """
    figure, axis = plt.subplots(figsize=(WIDTH * 0.7, 3.2), layout="constrained")
    for arm in arms:
        kl, _ = arm.summary("kl")
        rounding = arm.recipe.rounding
        modules = bounds[arm.rotation].metrics["modules"]
        error = sum(module[f"{rounding}_error"] / module["energy"] for module in modules)
        fill = {"label": _shown(arm.rotation)} if rounding == "gptq" else {"mfc": "white"}
        axis.plot(error, kl, ls="", ms=6, **_style(arm.rotation) | fill)
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel("sum of the layers' errors, each over its energy tr(W H Wᵀ)")
    axis.set_ylabel("KL divergence, nats per token")
    _plain_log_ticks(axis.xaxis, (1, 2, 5))
    _plain_log_ticks(axis.yaxis, (1, 2, 5))
    axis.margins(0.15)
    axis.legend()
    return figure


@_figure
def coordinate_energies(named: dict[str, Result], group_size: int) -> Figure:
    """Energy of every coordinate that q reads in one layer, over their mean, a panel a rotation.

    A grey line stands between every two groups.
    """
    rows = -(-len(named) // 2)
    size = (WIDTH, 0.6 + 1.1 * rows)
    figure, axes = plt.subplots(
        rows, 2, figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for axis, (name, result) in zip(axes.flat, named.items(), strict=False):
        energies = result.metrics["energies"]
        axis.plot(energies, lw=0.6, color=_style(name)["color"])
        for edge in range(group_size, len(energies), group_size):
            axis.axvline(edge, color="0.85", lw=0.6, zorder=0)
        axis.set_title(_shown(name))
        axis.margins(x=0)
    for axis in axes.flat[len(named) :]:
        axis.set_axis_off()
    figure.supxlabel("coordinate", fontsize=9)
    figure.supylabel("energy / mean energy", fontsize=9)
    return figure


@_figure
def effects(changes: dict[str, dict[str, tuple[Arm, Arm]]], among: Sequence[Arm]) -> Figure:
    """What a change makes of KL, as a ratio, with its 95 % interval.

    There is a panel a change, a line a grid with the arms after and before it. Left of 1 it helps.
    `among` are the arms that tell the noise, as `tables.beside` finds them.
    """
    grids = list(dict.fromkeys(grid for pairs in changes.values() for grid in pairs))
    size = (WIDTH, 0.9 + 0.22 * len(grids))
    figure, axes = plt.subplots(
        1, len(changes), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for axis, (change, pairs) in zip(axes[0], changes.items(), strict=True):
        axis.axvline(1, color="0.7", lw=0.8, zorder=0)
        for grid, pair in pairs.items():
            found = judge(*pair, among=among)
            ends = (found.difference.low, found.difference.high) if found.difference else None
            _ratio(axis, found.ratio, ends, grids.index(grid), "#0072B2")
        axis.set_title(change)
        axis.xaxis.set_major_locator(MaxNLocator(2))
    axes[0][0].set_yticks(range(len(grids)), grids)
    axes[0][0].invert_yaxis()
    axes[0][0].margins(y=0.15)
    figure.supxlabel(
        "KL divergence behind the change over that before it, 95 % interval", fontsize=9
    )
    return figure


@_figure
def claims(found: Sequence[dict]) -> Figure:
    """Every claim's ratio of divergences with its 95 % interval, a line a claim, by paper.

    `found` are the rows of `claims.verdicts`, of one model or of several, each with its own marker.
    Left of 1 it goes the claimed way.
    """
    colors = {"reproduced": "#009E73", "not reproduced": "#D55E00", "equivalent": "#0072B2"}
    papers, models = (dict.fromkeys(row[name] for row in found) for name in ("paper", "model"))
    marks = dict(zip(models, cycle("osD^v"), strict=False))
    labels, places = [], {}
    for paper in papers:
        labels.append(f"{paper}’s paper")
        for row in (row for row in found if row["paper"] == paper):
            if (line := (paper, row["claim"], row["setting"])) not in places:
                places[line] = len(labels)
                labels.append(f"{row['claim']}, {row['setting'].split(' GPTQ')[0]}")
    size = (WIDTH, 1.0 + 0.2 * len(labels))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    axis.axvline(1, color="0.7", lw=0.8, zorder=0)
    for row in found:
        place = places[row["paper"], row["claim"], row["setting"]]
        place += 0.36 * (list(models).index(row["model"]) - (len(models) - 1) / 2)
        ratio, *ends = (1 + row[name] / 100 for name in ("KL, %", "from", "to"))
        spread = ends if ends[0] == ends[0] else None
        color = colors.get(row["verdict"], "0.5")
        _ratio(axis, ratio, spread, place, color, marks[row["model"]])
    axis.set_yticks(range(len(labels)), labels)
    for text in axis.get_yticklabels():
        if text.get_text().endswith("’s paper"):
            text.set_fontweight("bold")
    axis.tick_params(axis="y", length=0, labelsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    _plain_log_ticks(axis.xaxis, (1, 3, 5, 7))
    figure.supxlabel(
        "KL divergence of the side that should be nearer, over the other’s (95 % interval)",
        fontsize=9,
    )
    point = {"ls": "", "ms": 4}
    handles = [
        Line2D([], [], marker="o", color=color, label=word, **point)
        for word, color in (colors | {"undecided": "0.5"}).items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    if len(models) > 1:
        named = [
            Line2D([], [], marker=mark, color="0.2", mfc="none", label=model, **point)
            for model, mark in marks.items()
        ]
        axis.legend(handles=named, loc="lower left")
    return figure


def _ratio(
    axis: Axes,
    ratio: float,
    ends: Sequence[float] | None,
    place: float,
    color: str,
    mark: str = "o",
) -> None:
    """A point with its interval, where it has one."""
    spread = None if ends is None else [[ratio - ends[0]], [ends[1] - ratio]]
    axis.errorbar(ratio, place, xerr=spread, fmt=mark, ms=4, capsize=2, lw=0.9, color=color)


@_figure
def checkpoint_sizes(predicted: dict[str, dict[str, float]], on_disk: dict[str, float]) -> Figure:
    """Megabytes that the bits predict, by kind, a bar a checkpoint.

    The black marks are the files.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 2.4), layout="constrained")
    pandas.DataFrame(predicted).T[::-1].plot.barh(
        stacked=True, color=["#999999", "#009E73", "#E69F00"], width=0.6, ax=axis, legend=False
    )
    axis.plot(list(on_disk.values())[::-1], range(len(on_disk)), "k|", ms=14, label="on disk")
    axis.set_xlabel("megabytes")
    figure.legend(loc="outside upper center", ncols=4)
    return figure


@_figure
def time_by_step(seconds: dict[str, dict[str, float]]) -> Figure:
    """Minutes by the steps that take them, a bar a row."""
    figure, axis = plt.subplots(figsize=(WIDTH, 1.8), layout="constrained")
    steps = pandas.DataFrame(seconds).T[::-1] / 60
    steps.plot.barh(stacked=True, colormap="viridis", width=0.6, ax=axis, legend=False)
    axis.set_xlabel("minutes")
    figure.legend(loc="outside upper center", ncols=len(steps.columns))
    return figure


@_figure
def budget_curves(methods: dict[str, Sequence[Arm]]) -> Figure:
    """KL against the seconds that the rotation was learned for.

    There is a line a method, a point a number of steps.
    """
    figure, axis = plt.subplots(figsize=(WIDTH * 0.7, 3.2), layout="constrained")
    for name, arms in methods.items():
        at = sorted((arm.seconds("rotate"), *arm.summary("kl")) for arm in arms)
        seconds, means, errors = zip(*at, strict=True)
        spreads = [error if error == error else 0 for error in errors]
        style = {"ms": 5, "lw": 0.9, "capsize": 2, "label": _shown(name)} | _style(name)
        axis.errorbar(seconds, means, yerr=spreads, **style)
    axis.set(xscale="log", xlabel="seconds of learning", ylabel="KL divergence, nats per token")
    _plain_log_ticks(axis.xaxis, (1, 2, 5))
    axis.legend()
    return figure


@_figure
def training_losses(arms: Sequence[Arm]) -> Figure:
    """Each method's own loss over its steps, smoothed over an eighth of them, a thin line a seed.

    It is shown as a share of its mean over the first eighth.
    """
    figure, axis = plt.subplots(figsize=(WIDTH * 0.7, 2.8), layout="constrained")
    for arm in arms:
        for number, result in enumerate(arm.results):
            history = result.metrics["objective_history"]
            width = max(1, len(history) // 8)
            smooth = [fmean(history[i : i + width]) for i in range(len(history) - width + 1)]
            steps = [(i + width / 2) / len(history) for i in range(len(smooth))]
            shares = [value / smooth[0] for value in smooth]
            color = _style(arm.rotation)["color"]
            label = _shown(arm.rotation) if number == 0 else None
            axis.plot(steps, shares, lw=0.9, color=color, label=label)
    axis.set(xlabel="share of the steps", ylabel="loss / loss at the start")
    axis.legend()
    return figure


def _mean_and_seeds(axis: Axes, arm: Arm, height: float, **style: str) -> ErrorbarContainer:
    """An arm's KL at this height: mean and standard error, its seeds behind; returns the former."""
    values = list(arm.values("kl").values())
    mean, error = arm.summary("kl")
    axis.plot(values, [height] * len(values), ".", color="0.75", ms=4, zorder=1)
    spread = error if error == error else None
    style |= {"ms": 5, "capsize": 3} | _style(arm.rotation)
    return axis.errorbar(mean, height, xerr=spread, **style)


def _shown(rotation: str) -> str:
    """A rotation's name in a figure: "optrot + R4" is OptRot + R4."""
    first, *rest = rotation.split(" ")
    return " ".join([NAMES.get(first, first), *rest])


def _style(rotation: str) -> dict:
    """Color and marker of a rotation by its first word.

    The marker is hollow where R3 or R4 is on, or signs are drawn, or it is a variant.
    """
    color, marker = STYLE.get(rotation.split()[0], ("#666666", "h"))
    variant = any(mark in rotation for mark in (" + ", "±", " from ", " within ", " for "))
    return {"color": color, "marker": marker} | ({"mfc": "white"} if variant else {})


def _modules_at(site: str, result: Result) -> list[dict]:
    """What a result says of one site, layer by layer."""
    return [module for module in result.metrics["modules"] if module["site"] == site]


def _legend_above(figure: Figure, axis: Axes) -> None:
    """What the lines of one panel are, in a row above all of them."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))


def _plain_log_ticks(axis: Axis, steps: Sequence[int]) -> None:
    """Label a logarithmic axis at these multiples of the powers of ten, as ordinary numbers.

    A short one gets more of them.
    """
    low, high = axis.get_view_interval()
    if high < 4 * low:
        steps = (1, 1.5, 2, 3, 5, 7)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())


@_figure
def matrices(named: dict[str, object]) -> Figure:
    """Rotation matrices as pictures, each on the scale of its own largest entry."""
    figure, axes = plt.subplots(
        1, len(named), figsize=(WIDTH, 2.6), layout="constrained", squeeze=False
    )
    for axis, (name, R) in zip(axes[0], named.items(), strict=True):
        limit = R.abs().max().item()
        axis.imshow(R, cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set(title=f"{_shown(name)}\nlargest entry {limit:.2f}", xticks=[], yticks=[])
    return figure
