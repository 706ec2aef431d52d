"""Figures of a synthetic twelve-method experiment."""

import itertools
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from bench.config import Experiment, FigureSettings, Method
from bench.errors import BenchError
from bench.figures import (
    Look,
    _apart,
    _at_radius,
    _base_and_smoothed,
    _by_method,
    _classes,
    _conventions,
    _curves,
    _join_families,
    _vote_shares,
    _with_costs,
    draw_figures,
)
from bench.statistics import accuracy_interval, pool_seeds

PUBLISHED = Path(__file__).parents[1] / "results/published/fashion_mnist.csv"
SIGMAS = [0.25, 0.5, 1.0]
NAMES = (
    "certified_accuracy",
    "accuracy_by_method",
    "accuracy_vs_parameters",
    "accuracy_vs_compute",
    "base_and_smoothed",
    "per_class",
    "vote_shares",
)


@pytest.fixture(scope="module")
def experiment(smoke: Experiment) -> Experiment:
    """The smoke methods and one more, at three sigmas."""
    extra = Method(label="head, frozen", family="another")
    return smoke.model_copy(update={"methods": {**smoke.methods, "extra": extra}, "sigmas": SIGMAS})


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory, experiment: Experiment) -> Path:
    """Made-up tables of that experiment."""
    folder = tmp_path_factory.mktemp("tables")
    curves, costs, summary, classes, shares = [], [], [], [], []
    for place, (name, method) in enumerate(experiment.methods.items()):
        for sigma in SIGMAS:
            named = {"method": name, "label": method.label, "family": method.family}
            point = {**named, "sigma": sigma, "seed": 0}
            radii = np.round(np.arange(0, 4 * sigma, 0.05), 10)
            share = (0.9 - 0.04 * place - 0.2 * sigma) * (1 - radii / (4 * sigma)) ** 1.5
            hits = np.round(500 * np.clip(share, 0, 1))
            low, high = accuracy_interval(hits, 500)
            values = {"radius": radii, "value": hits / 500, "low": low, "high": high}
            whose = {"experiment": experiment.name, **point}
            curves.append(pd.DataFrame({**whose, **values, "n_images": 500}))
            trained = 0 if place == 0 else 10 ** (2 + place % 5)
            flops = {"training_flops": trained * 10**7, "base_training_flops": 10**13}
            costs.append({**point, "trainable_parameters": trained, **flops})
            right = {"smoothed_accuracy": hits[0] / 500, "abstention": 0.1}
            summary.append({**point, **right, "clean_accuracy": 0.95, "noisy_accuracy": 0.5})
            votes = np.linspace(0, 1, 101)
            at_most = votes ** (3 - place / 10) * (1 - hits[0] / 500) + (votes == 1) * hits[0] / 500
            shares.append(pd.DataFrame({**point, "p_a": votes, "value": at_most, "n_images": 500}))
            for label, multiple in itertools.product(range(10), (0, 0.5, 1, 1.5)):
                cell = {"class": label, "radius": multiple * sigma, "value": label / 10}
                classes.append({**point, **cell, "n_images": 9})
    pd.concat(curves).to_csv(folder / "certified_accuracy.csv", index=False)
    pd.DataFrame(costs).to_csv(folder / "cost.csv", index=False)
    pd.DataFrame(summary).to_csv(folder / "summary.csv", index=False)
    pd.DataFrame(classes).to_csv(folder / "per_class.csv", index=False)
    pd.concat(shares).to_csv(folder / "vote_shares.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, experiment: Experiment, tables: Path) -> Path:
    """Folder of the figures."""
    folder = tmp_path_factory.mktemp("figures")
    draw_figures(experiment, tables, PUBLISHED, folder)
    return folder


def test_every_figure_is_drawn_twice_and_closed(drawn: Path) -> None:
    assert {path.name for path in drawn.iterdir()} == {
        f"{name}.{kind}" for name in NAMES for kind in ("svg", "png")
    }
    assert plt.get_fignums() == []
    for name in NAMES:
        pixels = plt.imread(drawn / f"{name}.png")
        assert pixels.shape[1] > 1500
        assert pixels[..., :3].std() > 0.05


def test_what_no_abstention_is_known_of_is_not_called_wrong(
    tables: Path, experiment: Experiment
) -> None:
    summary = pd.read_csv(tables / "summary.csv")
    look = Look(pd.read_csv(tables / "certified_accuracy.csv"))
    for known, rest in ((True, "smoothed: wrong"), (False, "smoothed: wrong or abstains")):
        shown = summary if known else summary.assign(abstention=np.nan)
        figure = _base_and_smoothed(experiment, shown, look)
        assert rest in {text.get_text() for text in figure.legends[0].get_texts()}
        plt.close(figure)


def test_a_method_has_one_colour_of_its_own(tables: Path, experiment: Experiment) -> None:
    look = Look(pd.read_csv(tables / "certified_accuracy.csv"))
    assert list(look.colour) == list(experiment.methods)
    assert len(set(look.colour.values())) == len(experiment.methods)
    assert look.marker("lora") == look.marker("vpt_deep") != look.marker("full_finetuning")
    assert look.dash("lora") != look.dash("vpt_deep")


def test_svg_bytes_are_reproducible(
    drawn: Path, tables: Path, experiment: Experiment, tmp_path: Path
) -> None:
    draw_figures(experiment, tables, PUBLISHED, tmp_path)
    for name in NAMES:
        assert (tmp_path / f"{name}.svg").read_bytes() == (drawn / f"{name}.svg").read_bytes()


def test_published_curves_only_where_there_are_any(
    drawn: Path, tables: Path, experiment: Experiment, tmp_path: Path
) -> None:
    draw_figures(experiment, tables, None, tmp_path)
    name = "certified_accuracy.svg"
    pattern = re.compile(re.escape("<!-- published (LeNet) -->"))
    assert len(pattern.findall((drawn / name).read_text())) == 1
    assert not pattern.findall((tmp_path / name).read_text())


@pytest.mark.parametrize(("radius", "shown"), [(None, SIGMAS), (0.5, [0.5] * 3)])
def test_costs_are_shown_at_the_radius_of_the_experiment(
    tables: Path, experiment: Experiment, radius: float | None, shown: list[float]
) -> None:
    accuracy = pd.read_csv(tables / "certified_accuracy.csv")
    settings = experiment.figures.model_copy(update={"radius": radius})
    at = experiment.model_copy(update={"figures": settings})
    points = _with_costs(_at_radius(at, accuracy), pd.read_csv(tables / "cost.csv"))
    assert points.groupby("sigma")["radius"].unique().tolist() == [[r] for r in shown]
    assert len(points) == accuracy.groupby(["method", "sigma"]).ngroups


def test_methods_stand_by_name_with_the_mean_of_their_seeds(
    tables: Path, experiment: Experiment
) -> None:
    one = _at_radius(experiment, pd.read_csv(tables / "certified_accuracy.csv"))
    ends = one[["value", "low", "high"]]
    points = pd.concat([one.assign(seed=seed, **(ends + 0.1 * seed)) for seed in (0, 1)])
    figure = _by_method(experiment, points, Look(one))
    plt.close(figure)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [method.label for method in experiment.methods.values()]
    for axis, sigma in zip(figure.axes, SIGMAS, strict=True):
        assert axis.get_title() == f"σ = {sigma:g}, r = {sigma:g}"
        drawn = {line.get_ydata()[0]: line.get_xdata() for line in axis.lines}
        means = [line for line in axis.lines if len(line.get_xdata()) == 1]
        at_sigma = points[points["sigma"] == sigma]
        bars = [bar.get_segments()[0] for bar in axis.collections]
        for line, bar in zip(means, bars, strict=True):
            method = list(experiment.methods)[int(line.get_ydata()[0])]
            own = at_sigma[at_sigma["method"] == method]
            wanted = pool_seeds(own["value"], own["low"], own["high"])
            assert [line.get_xdata()[0], *bar[:, 0]] == pytest.approx(
                100 * np.clip(wanted, 0, 1), abs=1e-9
            )
        assert len(means) == len(drawn) == len(experiment.methods)


def test_lines_join_each_family_in_order_of_cost() -> None:
    rows = [("c", "big", 900, 0.7), ("a", "big", 10, 0.5), ("b", "big", 90, 0.6)]
    rows += [("a", "big", 10, 0.3), ("alone", "small", 40, 0.2)]
    points = pd.DataFrame(rows, columns=["method", "family", "x", "value"])
    look = Look(points.assign(label=points["method"]))
    figure, axis = plt.subplots()
    _join_families(axis, points, look)
    lines = [line.get_xydata().round(6).tolist() for line in axis.get_lines()]
    plt.close(figure)
    assert lines == [[[10, 40], [90, 60], [900, 70]], [[40, 20]]]


def test_families_are_joined_only_where_the_experiment_says_so(
    drawn: Path, tables: Path, experiment: Experiment, tmp_path: Path
) -> None:
    joined = experiment.model_copy(update={"figures": FigureSettings(join_families=True)})
    draw_figures(joined, tables, PUBLISHED, tmp_path)
    for name, changes in (("certified_accuracy", False), ("accuracy_vs_parameters", True)):
        pair = [(folder / f"{name}.svg").read_text() for folder in (drawn, tmp_path)]
        assert (pair[0] != pair[1]) == changes


def test_the_convention_is_drawn_where_an_experiment_has_both(
    tables: Path, experiment: Experiment, tmp_path: Path
) -> None:
    resized = experiment.methods["lora"].model_copy(update={"noise_resolution": "model"})
    both = experiment.model_copy(update={"methods": {**experiment.methods, "lora": resized}})
    curves = pd.read_csv(tables / "certified_accuracy.csv")
    factor = np.where(curves["method"] == "lora", 0.5, 1.0)
    curves = curves.assign(native_radius=curves["radius"] * factor)
    figure = _conventions(both, curves, Look(curves))
    above, below = figure.axes[:3], figure.axes[3:]
    place = list(experiment.methods).index("lora")
    for top, bottom in zip(above, below, strict=True):
        assert top.get_xlim() == bottom.get_xlim()
        for number, (printed, native) in enumerate(zip(top.lines, bottom.lines, strict=True)):
            shrunk = 0.5 if number == place else 1.0
            assert native.get_xdata() == pytest.approx(shrunk * printed.get_xdata())
            assert (native.get_ydata() == printed.get_ydata()).all()
    plt.close(figure)
    shutil.copytree(tables, tmp_path / "tables")
    curves.to_csv(tmp_path / "tables/certified_accuracy.csv", index=False)
    draw_figures(both, tmp_path / "tables", None, tmp_path / "figures")
    assert (tmp_path / "figures/noise_resolution.svg").exists()


def test_smoothed_answers_share_out_the_images(tables: Path, experiment: Experiment) -> None:
    summary = pd.read_csv(tables / "summary.csv")
    # No pilot, no noisy accuracy: the mark is missing and nothing else.
    summary.loc[summary["method"] == "lora", "noisy_accuracy"] = np.nan
    other = summary.assign(seed=1, smoothed_accuracy=summary["smoothed_accuracy"] - 0.1)
    both = pd.concat([summary, other])
    figure = _base_and_smoothed(experiment, both, Look(summary))
    plt.close(figure)
    for axis, sigma in zip(figure.axes, SIGMAS, strict=True):
        right, abstained, _ = axis.containers
        wanted = both[both["sigma"] == sigma].groupby("method")["smoothed_accuracy"].mean()
        assert [bar.get_width() for bar in right] == pytest.approx(
            [100 * wanted[name] for name in experiment.methods]
        )
        assert [bar.get_x() for bar in abstained] == [bar.get_width() for bar in right]
        assert [bar.get_width() for bar in abstained] == pytest.approx([10] * len(right))
        clean, noisy = axis.lines
        assert clean.get_xdata() == pytest.approx([95] * len(right))
        missing = np.isnan(noisy.get_xdata())
        assert [name for name, gone in zip(experiment.methods, missing, strict=True) if gone] == [
            "lora"
        ]


@pytest.mark.parametrize("methods", [2, 30])
def test_legends_fit_into_their_figures(experiment: Experiment, methods: int) -> None:
    shares = pd.DataFrame(
        {"method": f"m{place}", "label": f"method {place}", "family": "f", "sigma": sigma}
        | {"p_a": p_a, "value": p_a}
        for place, sigma, p_a in itertools.product(range(methods), SIGMAS, (0, 1))
    )
    figure = _vote_shares(experiment, shares, Look(shares))
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    plt.close(figure)
    assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_classes_are_shown_at_radius_zero_and_sigma(tables: Path, experiment: Experiment) -> None:
    table = pd.read_csv(tables / "per_class.csv")
    far = np.isclose(table["radius"], table["sigma"])
    table.loc[far & (table["method"] == "lora"), "value"] = 1.0
    # A method without images of a class leaves its cell empty.
    table = table[~((table["method"] == "head") & (table["class"] == 9))]
    figure = _classes(experiment, table, Look(table))
    plt.close(figure)
    count, methods = len(SIGMAS), list(experiment.methods)
    maps = [axis.images[0].get_array() for axis in figure.axes[:6]]
    for place, grid in enumerate(maps):
        rising = pytest.approx([*range(0, 100, 10)])
        assert grid[methods.index("undefended")].tolist() == rising
        lora = grid[methods.index("lora")].tolist()
        assert lora == (rising if place < count else [100] * 10)
        empty = np.ma.getmaskarray(grid)[methods.index("head")]
        assert np.flatnonzero(empty).tolist() == [9]


def test_a_sigma_off_the_grid_of_radii_has_an_empty_place(
    tables: Path, experiment: Experiment
) -> None:
    table = pd.read_csv(tables / "per_class.csv")
    off = np.isclose(table["radius"], SIGMAS[1]) & np.isclose(table["sigma"], SIGMAS[1])
    figure = _classes(experiment, table[~off], Look(table))
    plt.close(figure)
    drawn = [bool(axis.images) for axis in figure.axes[: 2 * len(SIGMAS)]]
    assert drawn == [place != len(SIGMAS) + 1 for place in range(2 * len(SIGMAS))]


def test_a_missing_table_is_named(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"certified_accuracy\.csv is missing"):
        draw_figures(experiment, tmp_path, PUBLISHED, tmp_path)


def test_tables_of_another_experiment_are_refused(
    tables: Path, experiment: Experiment, tmp_path: Path
) -> None:
    other = experiment.model_copy(update={"name": "another"})
    with pytest.raises(BenchError, match=r"certified_accuracy\.csv is not of another"):
        draw_figures(other, tables, None, tmp_path)


def test_curves_are_steps_that_end_at_zero(tables: Path, experiment: Experiment) -> None:
    accuracy = pd.read_csv(tables / "certified_accuracy.csv")
    few = dict(itertools.islice(experiment.methods.items(), 6))
    accuracy = accuracy[accuracy["method"].isin(few)]
    part = experiment.model_copy(update={"methods": few})
    figure = _curves(part, accuracy, pd.read_csv(PUBLISHED), Look(accuracy))
    plt.close(figure)
    for axis, sigma in zip(figure.axes, SIGMAS, strict=True):
        assert {line.get_drawstyle() for line in axis.lines} == {"steps-pre"}
        own = axis.lines[-len(few) :]
        for (_, curve), line in zip(
            accuracy[accuracy["sigma"] == sigma].groupby("method", sort=False), own, strict=True
        ):
            wanted = np.append(100 * curve["value"], 0)
            assert line.get_ydata() == pytest.approx(wanted)
            assert line.get_xdata()[-2:].tolist() == [curve["radius"].max()] * 2
    assert figure.get_supylabel() == (
        "certified accuracy (%)\n500 images: 95 % intervals up to ± 4"
    )


def test_many_methods_have_a_row_per_family_before_all_others(experiment: Experiment) -> None:
    families = [f"family {place % 3}" for place in range(15)]
    curves = pd.DataFrame(
        {"method": f"m{place}", "label": f"method {place}", "family": family, "seed": 0}
        | {"sigma": sigma, "radius": radius, "value": 0.5, "low": 0.4, "high": 0.6, "n_images": 96}
        for place, family in enumerate(families)
        for sigma, radius in itertools.product(SIGMAS, (0, 0.5))
    )
    look = Look(curves)
    figure = _curves(experiment, curves, pd.DataFrame(), look)
    plt.close(figure)
    assert [axis.get_ylabel() for axis in figure.axes[:: len(SIGMAS)]] == families[:3]
    for place, axis in enumerate(figure.axes):
        coloured = [line.get_color() != "0.85" for line in axis.lines]
        assert coloured == [family == families[place // len(SIGMAS)] for family in families]


def test_points_of_one_cost_do_not_hide_each_other() -> None:
    points = pd.DataFrame({"method": [*"abcd"], "x": [1000, 10.0, 1001, 1000]})
    moved = _apart(points).set_index("method")["x"]
    assert moved["b"] == 10
    same = moved[["a", "d", "c"]]
    assert (same.pct_change().dropna() > 0.05).all()
    assert np.log(same).mean() == pytest.approx(np.log(1000), abs=0.001)
    # However many, near one another or in a chain, none goes further than a tenth; seeds together.
    for rise in (1.0, 1.019):
        costs = 1000 * rise ** np.arange(15)
        many = pd.DataFrame({"method": [*"abcdefghijklmno"] * 2, "x": [*costs, *costs]})
        moved = _apart(many)
        assert (moved["x"] / many["x"]).between(1 / 1.1001, 1.1001).all()
        assert moved.groupby("method")["x"].nunique().eq(1).all()
        assert moved["x"][:15].nunique() == 15


def test_colours_can_be_seen_on_white_and_told_apart() -> None:
    for members in (1, 2, 9):
        names = [f"m{place}" for place in range(10 * members)]
        family = [f"f{place // members}" for place in range(10 * members)]
        look = Look(pd.DataFrame({"method": names, "label": names, "family": family}))
        for colour in look.colour.values():
            linear = [
                c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)
            ]
            luminance = np.dot(linear, [0.2126, 0.7152, 0.0722])
            assert 1.05 / (luminance + 0.05) > 1.7
        least = 0.15 if members == 1 else 0.01
        hues = [to_rgb(look.colour[name]) for name in names[: 9 * members]]
        for one, other in itertools.combinations(hues, 2):
            assert np.linalg.norm(np.subtract(one, other)) > least
        places = itertools.pairwise(names)
        assert all(look.dash(one) != look.dash(other) for one, other in places)
