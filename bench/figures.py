"""Comparison figures, drawn from the tables alone."""

from collections.abc import Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullLocator

from bench.config import Experiment
from bench.csv_files import read_csv
from bench.errors import BenchError
from bench.files import atomic_write
from bench.statistics import pool_seeds

mpl.use("Agg")
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "bench",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "legend.frameon": False,
}
# After Okabe and Ito, whose colours the colour-blind tell apart; controls are grey.
HUES = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#B0528C",
    "#C98A00",
    "#3A9BD9",
    "#8B4513",
    "#4B3A9B",
    "#6B6B00",
]
CONTROL, GREY = "control", "#595959"
DASHES: list[Any] = ["-", "--", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (8, 3))]
MARKERS = ["o", "s", "D", "^", "v", "P", "X", "<", ">", "p"]
MOST_LABELS = 20
MOST_CURVES = 12  # in one panel
LEGEND_LINE, LEGEND_LETTER = 0.2, 0.066  # inches
FEWEST_BARS = 5
EDGE = [withStroke(linewidth=3.5, foreground="w")]  # of black marks on dark bars
# What is certified between two radii of a table is what is at the larger one.
STEPS = "steps-pre"
DOTS: Any = (0, (1, 1.5))
LEFT = 0.04  # of an axis of radii, below 0
# Of points: relative distance at which they are drawn apart, the step, and from their own place.
SAME, SHIFT, FARTHEST = 0.02, 1.08, 1.1
PERCENT = (-2, 102)  # else a curve at 0 is lost in the axis
BOUNDS = ["value", "low", "high", "certified"]
ATTACK_COLUMNS = 4


class Look:
    """A hue and marker per family, a shade and dash per method: one in all figures of a run."""

    def __init__(self, table: pd.DataFrame):
        methods = table.drop_duplicates("method")
        self.label = dict(zip(methods["method"], methods["label"], strict=True))
        self.family = dict(zip(methods["method"], methods["family"], strict=True))
        self.families = list(dict.fromkeys(methods["family"]))
        self.colour: dict[str, Any] = dict.fromkeys(methods["method"])
        hues = cycle(HUES)
        for family in self.families:
            members = self.members(family)
            hue = GREY if family == CONTROL else next(hues)
            self.colour |= dict(zip(members, _shades(hue, len(members)), strict=True))

    def members(self, family: str) -> list[str]:
        """The methods of a family, in the experiment's order."""
        return [name for name, of in self.family.items() if of == family]

    def dash(self, method: str) -> Any:
        """Line style of the method; neighbours differ, whatever their hues look like."""
        return DASHES[list(self.colour).index(method) % len(DASHES)]

    def marker(self, method: str) -> str:
        """Marker of the method's family."""
        return MARKERS[self.families.index(self.family[method]) % len(MARKERS)]

    def handles(self, lines: bool) -> list[Line2D]:
        """Legend entries, family by family."""
        ordered = [name for family in self.families for name in self.members(family)]
        return [
            Line2D(
                [],
                [],
                color=self.colour[method],
                linestyle=self.dash(method) if lines else "none",
                marker="" if lines else self.marker(method),
                label=self.name(method),
            )
            for method in ordered
        ]

    def name(self, method: str) -> str:
        """Label of the method, with its family where that says more."""
        label, family = self.label[method], self.family[method]
        return label if family.lower() in label.lower() else f"{label} ({family})"


def _shades(hue: str, count: int) -> list[Any]:
    """A family's colours, from darker to lighter than its hue; the palest can be seen on white."""
    if count == 1:
        return [hue]
    dark, light = sns.dark_palette(hue, 5)[2], sns.light_palette(hue, 5)[2]
    return [*sns.blend_palette([dark, hue, light], count)]


def draw_figures(
    experiment: Experiment, tables: Path, published: Path | None, folder: Path
) -> None:
    """Draw every comparison as SVG and PNG; noise_resolution where methods differ in it.

    Raises:
        BenchError: a table is missing, or the curves are of another experiment.
    """
    accuracy = _own(experiment, tables / "certified_accuracy.csv")
    cost = read_csv(tables / "cost.csv")
    reported = pd.DataFrame() if published is None else read_csv(published)
    summary, per_class = read_csv(tables / "summary.csv"), read_csv(tables / "per_class.csv")
    shares = read_csv(tables / "vote_shares.csv")
    look = Look(accuracy)
    with mpl.rc_context(STYLE):
        save_figure(_curves(experiment, accuracy, reported, look), folder / "certified_accuracy")
        at_one = _at_radius(experiment, accuracy)
        save_figure(_by_method(experiment, at_one, look), folder / "accuracy_by_method")
        points = _with_costs(at_one, cost)
        parameters = "trained parameters, head included"
        figure = _scatter(experiment, points, "trainable_parameters", parameters, look)
        save_figure(figure, folder / "accuracy_vs_parameters")
        points["own_and_base"] = points["training_flops"] + points["base_training_flops"]
        flops = "training FLOPs"
        if (points["base_training_flops"] > 0).any():
            flops += " (hollow: with the base's pretraining)"
        if points["base_training_flops"].isna().any():
            flops += " (without the base's pretraining, which is unknown)"
        figure = _scatter(experiment, points, "training_flops", flops, look, "own_and_base")
        save_figure(figure, folder / "accuracy_vs_compute")
        save_figure(_base_and_smoothed(experiment, summary, look), folder / "base_and_smoothed")
        save_figure(_classes(experiment, per_class, look), folder / "per_class")
        save_figure(_vote_shares(experiment, shares, look), folder / "vote_shares")
        if len(experiment.noise_resolutions) > 1:
            save_figure(_conventions(experiment, accuracy, look), folder / "noise_resolution")


def _own(experiment: Experiment, path: Path) -> pd.DataFrame:
    """A table of curves, which must be the experiment's."""
    columns = ["radius", "value", "low", "high"]
    table = read_csv(path, ["experiment", "method", "label", "family"], ["sigma", "seed", *columns])
    if set(table["experiment"]) != {experiment.name}:
        raise BenchError(f"{path} is not of {experiment.name}: name tables of this experiment")
    return table


def _panels(
    experiment: Experiment, legend: Sequence[Artist], rows: int = 1
) -> tuple[Figure, list[Axes]]:
    """Panels with a column per sigma, row by row."""
    count = len(experiment.sigmas)
    height = 3.6 if rows == 1 else 2.7
    letters = max(len(str(entry.get_label())) for entry in legend)
    beside = 1.3 + LEGEND_LETTER * letters
    size = (2.7 * count + beside, max(height * rows, LEGEND_LINE * (len(legend) + 2)))
    figure, axes = plt.subplots(
        rows, count, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    figure.legend(handles=legend, loc="outside right center", fontsize=9)
    for axis, sigma in zip(axes[0], experiment.sigmas, strict=True):
        axis.set_title(f"σ = {sigma:g}", fontsize=11)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    return figure, list(axes.flat)


def _curves(
    experiment: Experiment, accuracy: pd.DataFrame, reported: pd.DataFrame, look: Look
) -> Figure:
    """Certified accuracy against radius; 95 % intervals are in the table: bands would overlap."""
    legend = look.handles(lines=True)
    if len(reported):
        label = f"published ({', '.join(reported['backbone'].dropna().unique())})"
        legend.append(Line2D([], [], color="0.7", linewidth=0.8, label=label))
    known = set(reported["method"]) if len(reported) else set()
    named = {n: m.published for n, m in experiment.methods.items() if m.published in known}
    if named:
        label = "published, beside the method of its colour"
        legend.append(Line2D([], [], color="0.3", linestyle=DOTS, label=label))
    rows = _rows(look)
    figure, axes = _panels(experiment, legend, len(rows))
    for axis, (members, sigma) in zip(axes, product(rows, experiment.sigmas), strict=True):
        if len(reported):
            _draw_reported(axis, reported[np.isclose(reported["sigma"], sigma)], named, look)
        part = accuracy[accuracy["sigma"] == sigma]
        _draw_methods(axis, part, "radius", look, STEPS, members)
        axis.set(ylim=PERCENT, xlim=(-LEFT * part["radius"].max(), 1.02 * part["radius"].max()))
    figure.supxlabel(_radius_label(experiment), fontsize=10)
    _label_rows(
        figure,
        axes[:: len(experiment.sigmas)],
        rows,
        look,
        f"certified accuracy (%)\n{_sample(accuracy)}",
    )
    return figure


def _label_rows(
    figure: Figure, first: list[Axes], rows: list[list[str]], look: Look, words: str
) -> None:
    """Name the vertical axis, once for all rows, and the family of each where there are many."""
    figure.supylabel(words, fontsize=10)
    if len(rows) > 1:
        for axis, members in zip(first, rows, strict=True):
            axis.set_ylabel(look.family[members[0]])


def _rows(look: Look) -> list[list[str]]:
    """The methods of each row of panels: all in one, or a row per family where they are many."""
    if len(look.colour) <= MOST_CURVES:
        return [list(look.colour)]
    return [look.members(family) for family in look.families]


def _radius_label(experiment: Experiment) -> str:
    """Of an axis of radii: those of noise at two resolutions are no longer of one unit."""
    if len(experiment.noise_resolutions) > 1:
        return "ℓ2 radius as certified ([0, 1] pixels of the noise's resolution)"
    return "ℓ2 radius ([0, 1] pixels)"


def _sample(accuracy: pd.DataFrame) -> str:
    """What the values rest on: images, seeds and the widest interval of one seed."""
    images, seeds = accuracy["n_images"].max(), accuracy["seed"].nunique()
    half = 50 * (accuracy["high"] - accuracy["low"]).max()
    each = f"{images:,} images" + (f", {seeds} seeds" if seeds > 1 else "")
    return f"{each}: 95 % intervals up to ± {half:.{0 if half >= 3 else 1}f}"


def _draw_reported(
    axis: Axes, reported: pd.DataFrame, named: dict[str, str | None], look: Look
) -> None:
    """Published curves in grey, and again in the colour of each method that has one."""
    curves = {str(name): c.sort_values("radius") for name, c in reported.groupby("method")}
    for curve in curves.values():
        values = curve["certified_accuracy_percent"]
        axis.plot(curve["radius"], values, color="0.75", lw=0.8, zorder=1, drawstyle=STEPS)
    for method, published in named.items():
        if (own := curves.get(str(published))) is not None:
            style = {"color": look.colour[method], "linestyle": DOTS, "linewidth": 1.4}
            axis.plot(own["radius"], own["certified_accuracy_percent"], drawstyle=STEPS, **style)


def _vote_shares(experiment: Experiment, shares: pd.DataFrame, look: Look) -> Figure:
    """Distribution over the images of the true class's share of votes."""
    rows = _rows(look)
    figure, axes = _panels(experiment, look.handles(lines=True), len(rows))
    for axis, (members, sigma) in zip(axes, product(rows, experiment.sigmas), strict=True):
        part = shares[np.isclose(shares["sigma"], sigma)]
        _draw_methods(axis, part, "p_a", look, members=members)
        axis.axvline(0.5, color="0.6", lw=0.8)
        axis.set(xlim=(0, 1), ylim=PERCENT)
    figure.supxlabel("share of votes for the true class (up to 0.5: no certificate)", fontsize=10)
    words = "images at or below that share (%)"
    _label_rows(figure, axes[:: len(experiment.sigmas)], rows, look, words)
    return figure


def _draw_methods(
    axis: Axes,
    curves: pd.DataFrame,
    x: str,
    look: Look,
    drawstyle: str = "default",
    members: Sequence[str] = (),
) -> None:
    """`value` in % against the column `x`, seeds averaged; grey for all but `members`, if given."""
    for method, colour in look.colour.items():
        own = curves[curves["method"] == method].groupby(x)["value"].mean()
        style = {"color": colour, "linestyle": look.dash(method), "lw": 1.6}
        if members and method not in members:
            # As pixels: in every panel of an SVG the lines of all others would fill megabytes.
            style = {"color": "0.85", "lw": 0.8, "zorder": 1, "rasterized": True}
        if drawstyle == STEPS and len(own):
            # Nothing is certified beyond the last radius; the first step is as wide as a point.
            own = pd.concat([own, pd.Series([0.0], [own.index[-1]])])
            style |= {"marker": "_", "markevery": [0], "markersize": 9}
        axis.plot(own.index, 100 * own, drawstyle=drawstyle, **style)


def _conventions(experiment: Experiment, accuracy: pd.DataFrame, look: Look) -> Figure:
    """The same curves against the radius as certified (above) and in native pixels."""
    figure, axes = _panels(experiment, look.handles(lines=True), rows=2)
    count = len(experiment.sigmas)
    rows = {"radius": "radius as certified", "native_radius": "radius in native [0, 1] pixels"}
    for place, (column, words) in enumerate(rows.items()):
        row = axes[place * count : (place + 1) * count]
        for axis, sigma in zip(row, experiment.sigmas, strict=True):
            part = accuracy[accuracy["sigma"] == sigma]
            _draw_methods(axis, part, column, look, STEPS)
            # The same axis in both rows, so that a curve is seen to shrink.
            limits = (-LEFT * part["radius"].max(), part["radius"].max())
            axis.set(xlabel=f"ℓ2 {words}", xlim=limits, ylim=PERCENT)
    figure.supylabel(f"certified accuracy (%)\n{_sample(accuracy)}", fontsize=10)
    return figure


def _base_and_smoothed(experiment: Experiment, summary: pd.DataFrame, look: Look) -> Figure:
    """What smoothing answers, as bars, behind what the base classifier gets right."""
    # A test of the true class alone does not tell the two apart.
    rest = "wrong or abstains" if summary["abstention"].isna().any() else "wrong"
    legend = [
        Patch(facecolor="0.4", label="smoothed: right"),
        Patch(facecolor="0.9", label="smoothed: abstains"),
        Patch(facecolor="none", edgecolor="0.8", label=f"smoothed: {rest}"),
        Line2D([], [], color="k", marker="D", ls="none", mfc="w", label="base, clean"),
        Line2D([], [], color="k", marker="|", ls="none", ms=12, mew=2, label="base, noisy"),
    ]
    figure, axes = _panels(experiment, legend)
    names = list(look.colour)
    columns = ["smoothed_accuracy", "abstention", "clean_accuracy", "noisy_accuracy"]
    for axis, sigma in zip(axes, experiment.sigmas, strict=True):
        part = summary[np.isclose(summary["sigma"], sigma)]
        shares = 100 * part.groupby("method")[columns].mean().reindex(names)
        right = shares["smoothed_accuracy"]
        axis.barh(names, right, color=[*look.colour.values()], height=0.7)
        axis.barh(names, shares["abstention"], left=right, color="0.9", height=0.7)
        axis.barh(names, 100, facecolor="none", edgecolor="0.8", height=0.7, linewidth=0.5)
        axis.plot(shares["clean_accuracy"], names, "kD", mfc="w", ms=5, clip_on=False, zorder=3)
        axis.plot(shares["noisy_accuracy"], names, "k|", ms=12, mew=2, path_effects=EDGE)
        axis.set(xlim=(0, 100), axisbelow=True)
        axis.set_yticks(range(len(names)), [look.label[name] for name in names])
    fit_bars(axes[0], len(names))
    figure.supxlabel("test images (%)", fontsize=10)
    return figure


def fit_bars(axis: Axes, count: int) -> None:
    """Put horizontal bars 0 to `count` - 1 from the top down; a few do not fill the panel."""
    spare = max(0, FEWEST_BARS - count) / 2
    axis.set_ylim(count - 0.5 + spare, -0.5 - spare)


def _classes(experiment: Experiment, per_class: pd.DataFrame, look: Look) -> Figure:
    """Heat-maps of certified accuracy, methods by classes, at radii 0 (above) and sigma."""
    count, names = len(experiment.sigmas), list(look.colour)
    width = min(0.32 * per_class["class"].nunique(), 6)
    size = (width * count + 3.5, 0.5 * len(names) + 1.8)
    figure, axes = plt.subplots(
        2, count, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for row, multiple in zip(axes, (0, 1), strict=True):
        for axis, sigma in zip(row, experiment.sigmas, strict=True):
            at = per_class[
                np.isclose(per_class["sigma"], sigma)
                & np.isclose(per_class["radius"], multiple * sigma)
            ]
            if at.empty:  # sigma is not on the grid of radii
                axis.set_axis_off()
                continue
            means = 100 * at.pivot_table(index="method", columns="class", values="value")
            grid = means.reindex(names).rename(index=look.label)
            picture = axis.imshow(grid, vmin=0, vmax=100, aspect="auto")
            axis.set_title(f"σ = {sigma:g}, r = {multiple * sigma:g}", fontsize=11)
            # Labels of 1000 classes would be a smear.
            shown = slice(None, None, -(-grid.shape[1] // MOST_LABELS))
            axis.set_xticks(np.arange(grid.shape[1])[shown], grid.columns[shown])
            axis.set_yticks(range(len(names)), grid.index)
    few, many = per_class["n_images"].min(), per_class["n_images"].max()
    images = f"{few} to {many}" if few < many else f"{few}"
    figure.supxlabel(f"true class ({images} images each)", fontsize=10)
    figure.colorbar(picture, ax=axes, label="certified accuracy (%)")
    return figure


def draw_attacks(experiment: Experiment, tables: Path, folder: Path) -> None:
    """Draw robust accuracy between certificates and attacks, as SVG and PNG.

    Raises:
        BenchError: a table is missing, or the curves are of another experiment.
    """
    attacks = _own(experiment, tables / "attacks.csv")
    with mpl.rc_context(STYLE):
        save_figure(_attacks(experiment, attacks), folder / "attacks")


def _attacks(experiment: Experiment, attacks: pd.DataFrame) -> Figure:
    """A panel per method: certified and attacked accuracy of the same images; seeds averaged."""
    sigmas = sorted(attacks["sigma"].unique())
    colours = dict(zip(sigmas, sns.color_palette("viridis", len(sigmas) + 1), strict=False))
    columns = min(ATTACK_COLUMNS, attacks["method"].nunique())
    grid = sns.relplot(
        attacks.assign(percent=100 * attacks["certified"]), x="radius", y="percent", hue="sigma",
        col="method", col_wrap=columns, kind="line", errorbar=None, palette=colours, height=2.5,
        aspect=1.15, legend=False, drawstyle=STEPS, marker="_", markers=False,
    )  # fmt: skip
    for method, axis in grid.axes_dict.items():
        axis.set_title(experiment.methods[method].label, fontsize=10)
        for sigma, points in attacks[attacks["method"] == method].groupby("sigma"):
            _draw_bounds(axis, 100 * points.groupby("radius")[BOUNDS].mean(), colours[sigma])
        axis.set(ylim=PERCENT, xlim=(-LEFT * attacks["radius"].max(), None))
        axis.set_xticks(sorted(attacks["radius"].unique()))
        axis.grid(alpha=0.25)
    grid.set_axis_labels(
        "ℓ2 radius ([0, 1] pixels)", f"accuracy (%, n = {attacks['n_images'].max()})"
    )
    handles = [Line2D([], [], color=colours[s], label=f"σ = {s:g}, certified") for s in sigmas]
    handles += [
        Line2D([], [], color="0.3", marker="o", label="not broken, 95 % interval"),
        Line2D([], [], color="0.3", alpha=0.2, linewidth=6, label="neither"),
    ]
    # Else the legend lies on the panels.
    grid.figure.set_layout_engine("constrained")
    grid.figure.legend(handles=handles, loc="outside right center", fontsize=9)
    return grid.figure


def _draw_bounds(axis: Axes, bounds: pd.DataFrame, colour: Any) -> None:
    """Points with intervals where attacks ended, and what lies between them and certificates."""
    value = bounds["value"]
    error = [value - bounds["low"], bounds["high"] - value]
    axis.errorbar(value.index, value, error, color=colour, marker="o", ls="none", elinewidth=0.8)
    axis.vlines(value.index, bounds["certified"], value, color=colour, alpha=0.2, linewidth=6)


def _at_radius(experiment: Experiment, accuracy: pd.DataFrame) -> pd.DataFrame:
    """Certified accuracy at the one radius of each sigma; no row where the curves have ended."""
    radii = accuracy["sigma"].map(experiment.figures_radius)
    return accuracy[np.isclose(accuracy["radius"], radii)]


def _with_costs(accuracy: pd.DataFrame, cost: pd.DataFrame) -> pd.DataFrame:
    columns = ["method", "sigma", "seed"]
    return accuracy.merge(cost.drop(columns=["label", "family"]), on=columns)


def _name_radii(experiment: Experiment, axes: list[Axes]) -> None:
    """Title each panel with its sigma and the radius of what it shows."""
    for axis, sigma in zip(axes, experiment.sigmas, strict=True):
        axis.set_title(f"σ = {sigma:g}, r = {experiment.figures_radius(sigma):g}", fontsize=11)


def _words(experiment: Experiment, points: pd.DataFrame) -> str:
    """Of the axis of certified accuracy at one radius."""
    as_what = " as certified" if len(experiment.noise_resolutions) > 1 else ""
    return f"certified accuracy (%) at r{as_what}\n{_sample(points)}"


def _by_method(experiment: Experiment, points: pd.DataFrame, look: Look) -> Figure:
    """Certified accuracy of every method by name, its seeds as ticks around their mean."""
    legend = [Line2D([], [], color="0.3", marker="o", label="95 % interval")]
    if points["seed"].nunique() > 1:
        legend.append(Line2D([], [], color="0.3", marker="|", ls="none", label="one seed"))
    figure, axes = _panels(experiment, legend)
    names = list(look.colour)
    figure.set_figheight(max(figure.get_figheight(), 1.4 + 0.23 * len(names)))
    for axis, sigma in zip(axes, experiment.sigmas, strict=True):
        part = points[np.isclose(points["sigma"], sigma)]
        for place, method in enumerate(names):
            own, colour = part[part["method"] == method], look.colour[method]
            if own.empty:
                continue
            ends = np.clip(pool_seeds(own["value"], own["low"], own["high"]), 0, 1)
            mean, low, high = (100 * float(end) for end in ends)
            error = [[mean - low], [high - mean]]
            style = {"color": colour, "marker": look.marker(method), "mec": "w", "mew": 0.5}
            axis.errorbar(mean, place, xerr=error, markersize=5, elinewidth=1.2, **style)
            if len(own) > 1:
                axis.plot(100 * own["value"], [place] * len(own), "|", color=colour, ms=11)
        axis.set(xlim=PERCENT)
        axis.set_yticks(range(len(names)), [look.label[name] for name in names])
    fit_bars(axes[0], len(names))
    _name_radii(experiment, axes)
    figure.supxlabel(_words(experiment, points), fontsize=10)
    return figure


def _scatter(
    experiment: Experiment,
    points: pd.DataFrame,
    column: str,
    xlabel: str,
    look: Look,
    hollow: str | None = None,
) -> Figure:
    figure, axes = _panels(experiment, look.handles(lines=False))
    positive = points.loc[points[column] > 0, column]
    # A logarithm has no place for 0: half a decade below the axis, where no label is.
    zero = 10 ** (np.floor(np.log10(positive.min())) - 0.5) if len(positive) else 1.0
    for axis, sigma in zip(axes, experiment.sigmas, strict=True):
        part = _apart(points[points["sigma"] == sigma].assign(x=lambda p: p[column].clip(zero)))
        if experiment.figures.join_families:
            _join_families(axis, part, look)
        for row in part.to_dict("records"):
            colour, marker = look.colour[row["method"]], look.marker(row["method"])
            y = 100 * row["value"]
            error = [[y - 100 * row["low"]], [100 * row["high"] - y]]
            style = {"color": colour, "marker": marker, "mec": "w", "mew": 0.5, "elinewidth": 0.7}
            axis.errorbar(row["x"], y, error, markersize=7, **style)
            if hollow is not None and row[hollow] > row[column]:
                axis.plot(row[hollow], y, color=colour, marker=marker, mfc="none", zorder=1)
        axis.set(xscale="log", ylim=PERCENT)
        _label_decades(axis)
        if (points[column] == 0).any():
            _mark_zero(axis, zero)
    _name_radii(experiment, axes)
    figure.supxlabel(xlabel, fontsize=10)
    figure.supylabel(_words(experiment, points), fontsize=10)
    return figure


def _apart(points: pd.DataFrame) -> pd.DataFrame:
    """Move methods of nearly one mean `x` apart, by a tenth at most: one would hide another."""
    groups: list[list[str]] = []
    first = -np.inf
    for method, x in points.groupby("method")["x"].mean().sort_values(kind="stable").items():
        if x > first * (1 + SAME):
            groups.append([])
            first = x
        groups[-1].append(str(method))
    factors: dict[str, float] = {}
    for group in groups:
        middle = (len(group) - 1) / 2
        step = min(SHIFT, FARTHEST ** (1 / max(middle, 0.5)))
        factors |= {method: step ** (place - middle) for place, method in enumerate(group)}
    return points.assign(x=points["x"] * points["method"].map(factors))


def _label_decades(axis: Axes) -> None:
    """Label powers of ten alone, two at least: labels between them would overlap."""
    low, high = np.log10(axis.get_xlim())
    if np.floor(high) - np.ceil(low) < 1:
        axis.set_xlim(10 ** np.floor(low), 10 ** np.ceil(high))
    axis.xaxis.set_minor_locator(NullLocator())


def _mark_zero(axis: Axes, place: float) -> None:
    """Label what lies at `place` of a logarithmic axis with 0."""
    axis.set_xlim(left=place / 1.6)
    axis.axvline(place, color="0.8", linewidth=0.8, zorder=0)
    axis.text(place, -0.025, "0", transform=axis.get_xaxis_transform(), ha="center", va="top")


def _join_families(axis: Axes, points: pd.DataFrame, look: Look) -> None:
    """A line through the members of each family, in order of `x`; seeds are averaged."""
    means = points.groupby(["family", "method"], sort=False, as_index=False)[["x", "value"]].mean()
    for _, members in means.groupby("family", sort=False):
        members = members.sort_values("x")
        colour = look.colour[members["method"].iloc[0]]
        axis.plot(members["x"], 100 * members["value"], color=colour, linewidth=1, zorder=1)


def save_figure(figure: Figure, stem: Path) -> None:
    """Write STEM.svg, without a date, and STEM.png; close the figure."""
    for kind, extra in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
        with atomic_write(stem.with_suffix(f".{kind}")) as temporary:
            figure.savefig(temporary, format=kind, **extra)  # type: ignore[arg-type]
    plt.close(figure)
