"""The committed reference: what README and docs/results.md show is what the tables hold."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bench.config import load_experiment, sigma_text
from bench.smoothing.log import read_own_log
from bench.statistics import certified_accuracy, pool_seeds
from bench.tables import leaderboard

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "results/reference"
LOGS = "certificates"
RUNS = sorted(path.name for path in REFERENCE.iterdir() if path.is_dir())


def folder(name):
    """The tables of a committed run."""
    return REFERENCE / name / "tables"


def test_the_readme_shows_the_leaderboard_of_the_tables():
    curves = pd.read_csv(folder("quick") / "certified_accuracy.csv")
    assert leaderboard(curves, 0.125) == (folder("quick") / "leaderboard.md").read_text()
    assert leaderboard(curves, 0.125) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", [name for name in RUNS if (folder(name) / "tuning.csv").exists()])
def test_the_file_records_what_tuning_picked(name):
    experiment = load_experiment(ROOT / f"config/{name}.yaml")
    tuning = pd.read_csv(folder(name) / "tuning.csv")
    assert (tuning["recorded"] == tuning["picked"]).all()
    picked = tuning[tuning["picked"]].set_index("method")["learning_rate"].to_dict()
    trained = {name: m.learning_rate for name, m in experiment.methods.items() if m.trains}
    assert picked == trained


@pytest.mark.parametrize("name", RUNS)
def test_the_reference_holds_every_point_of_a_clean_run(name):
    experiment = load_experiment(ROOT / f"config/{name}.yaml")
    summary = pd.read_csv(folder(name) / "summary.csv")
    points = list(zip(summary["method"], summary["sigma"], summary["seed"], strict=True))
    assert points == list(experiment.points())
    assert not summary["git_dirty"].any()
    assert summary["git_revision"].nunique() == 1


@pytest.mark.parametrize("name", [name for name in RUNS if (REFERENCE / name / LOGS).exists()])
def test_the_tables_are_those_of_the_committed_logs(name):
    curves = pd.read_csv(folder(name) / "certified_accuracy.csv")
    summary = pd.read_csv(folder(name) / "summary.csv").set_index(["method", "sigma", "seed"])
    columns = ["value", "low", "high", "n_images"]
    for (method, sigma, seed), own in curves.groupby(["method", "sigma", "seed"]):
        place = REFERENCE / name / LOGS / method / f"sigma_{sigma_text(sigma)}" / f"seed_{seed}.tsv"
        protocol, log = read_own_log(place)
        found = certified_accuracy(log, own["radius"])
        pd.testing.assert_frame_equal(found[columns], own[columns].reset_index(drop=True))
        assert protocol["git_revision"] == summary.loc[(method, sigma, seed), "git_revision"]
        assert protocol["sigma"] == sigma


def shown_table(corner, page="docs/results.md"):
    """The table of a page with this text in its corner: each row's cells by its first."""
    lines = (ROOT / page).read_text().splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith(f"| {corner} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {first: rest for first, *rest in [cells[0], *cells[2:]]}


def at(table, sigma, radius, **where):
    """The one row of a table at a sigma and radius."""
    chosen = np.isclose(table["sigma"], sigma) & np.isclose(table["radius"], radius)
    for column, value in where.items():
        chosen &= table[column] == value
    [row] = table[chosen].to_dict("records")
    return row


def percent(share):
    """In per cent, to one digit; halves go up."""
    return f"{np.floor(1000 * share + 0.5 + 1e-9) / 10:.1f}"


def numbers_in(cells):
    """The numbers of column heads such as `σ = 0.5` or `r = 1`."""
    return [float(cell.partition("=")[2]) for cell in cells]


def test_the_shown_objectives_are_those_of_the_tables():
    curves = pd.read_csv(folder("objectives") / "certified_accuracy.csv")
    pairs = pd.read_csv(folder("objectives") / "paired.csv")
    cost = pd.read_csv(folder("objectives") / "cost.csv").set_index(["method", "sigma"])
    flops = cost["training_flops"] / cost["training_flops"]["cross_entropy"].iloc[0]
    methods = dict(zip(curves["label"], curves["method"], strict=True))
    (*sigmas, _), *rows = (table := shown_table("objective")).values()
    assert table.keys() - {"objective"} == methods.keys()
    for label, (*cells, units) in zip(list(table)[1:], rows, strict=True):
        for sigma, cell in zip(numbers_in(sigmas), cells, strict=True):
            text = f"{100 * at(curves, sigma, sigma, label=label)['value']:.0f}"
            if methods[label] != "cross_entropy":
                pair = at(pairs, sigma, sigma, method_a="cross_entropy", method_b=methods[label])
                ends = (0.0 - 100 * pair[key] for key in ("difference", "high", "low"))
                text += ", {:+.0f} [{:+.0f}, {:+.0f}]".format(*ends)
            assert cell == text, label
        assert int(units) == pytest.approx(flops[methods[label]].iloc[0], abs=0.5)


def test_the_shown_pretrained_vit_is_that_of_the_tables():
    curves = pd.read_csv(folder("dinov2") / "certified_accuracy.csv")
    (heads, *rows) = (table := shown_table("dinov2")).values()
    points = [numbers_in(head.split(", ")) for head in heads]
    assert list(table)[1:] == curves["label"].drop_duplicates().tolist()
    for label, cells in zip(list(table)[1:], rows, strict=True):
        for (sigma, radius), cell in zip(points, cells, strict=True):
            assert cell == percent(at(curves, sigma, radius, label=label)["value"])


def test_the_shown_resolutions_are_those_of_the_tables():
    curves = pd.read_csv(folder("noise_resolution") / "certified_accuracy.csv")
    (heads, *rows) = (table := shown_table("noise_resolution")).values()
    points = [numbers_in(head.split(", ")) for head in heads]
    assert set(list(table)[1:]) == set(curves["label"])
    for label, cells in zip(list(table)[1:], rows, strict=True):
        for (sigma, radius), cell in zip(points, cells, strict=True):
            assert cell == percent(at(curves, sigma, radius, label=label)["value"])


def test_the_shown_seeds_are_those_of_the_tables():
    curves = pd.read_csv(folder("seeds") / "certified_accuracy.csv")
    pairs = pd.read_csv(folder("seeds") / "paired.csv")
    (*heads, _, _), *rows = (table := shown_table("seeds")).values()
    assert list(table)[1:] == curves["label"].drop_duplicates().tolist()
    for label, (*cells, spread, above) in zip(list(table)[1:], rows, strict=True):
        own = curves[curves["label"] == label]
        values = [own.loc[np.isclose(own["radius"], r), "value"] for r in numbers_in(heads)]
        assert cells == [percent(value.mean()) for value in values]
        assert spread == f"{100 * values[2].std():.1f}"
        pair = pairs[np.isclose(pairs["radius"], 0.5) & (pairs["method_a"] == "lora")]
        pair = pair[pair["method_b"] == own["method"].iloc[0]]
        if len(pair):
            ends = pool_seeds(pair["difference"], pair["low"], pair["high"])
            assert above == "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * end for end in ends))
        else:
            assert not above


def test_the_shown_black_box_is_that_of_the_tables():
    curves = pd.read_csv(folder("black_box") / "certified_accuracy.csv")
    pairs = pd.read_csv(folder("black_box") / "paired.csv")
    cost = pd.read_csv(folder("black_box") / "cost.csv").set_index("label")["trainable_parameters"]
    table = shown_table("black_box", "docs/black-box.md")
    (_, *heads, _), *rows = table.values()
    radii, ours = numbers_in(heads), "coordinator_logits"
    assert list(table)[1:] == curves["label"].drop_duplicates().tolist()
    for label, (weights, *cells, above) in zip(list(table)[1:], rows, strict=True):
        assert int(weights.replace(",", "")) == cost[label]
        shown = [at(curves, 0.5, radius, label=label) for radius in radii]
        assert cells == [percent(row["value"]) for row in shown]
        if (method := shown[0]["method"]) == ours:
            assert not above
            continue
        names = sorted((ours, method), key=curves["method"].tolist().index)
        pair = at(pairs, 0.5, radii[-1], method_a=names[0], method_b=names[1])
        ends = [100 * pair[key] for key in ("difference", "low", "high")]
        if names[0] == method:
            ends = [-ends[0], -ends[2], -ends[1]]
        assert above == "{:+.1f} [{:+.1f}, {:+.1f}]".format(*ends)


def test_the_shown_denoisers_are_those_of_the_tables():
    curves = pd.read_csv(folder("denoisers") / "certified_accuracy.csv")
    fronts = ("none", "mse", "stability", "diffusion")
    rows = list(shown_table("in front").values())[1:]
    for front, cells in zip(fronts, rows, strict=True):
        for kind, cell in zip(("frozen", "lora"), cells, strict=True):
            values = [at(curves, s, s, method=f"{front}_{kind}")["value"] for s in (0.25, 0.5, 1)]
            assert cell == " / ".join(f"{100 * value:.0f}" for value in values)


@pytest.mark.parametrize(
    ("name", "corner"),
    [("fashion_mnist", "σ"), ("fashion_mnist_regularised", "σ = 0.5, measured / reported")],
)
def test_the_shown_reproductions_are_those_of_the_tables(name, corner):
    found = pd.read_csv(folder(name) / "published.csv")
    (heads, *rows), shown = (table := shown_table(corner)).values(), 0
    for first, cells in zip(list(table)[1:], rows, strict=True):
        where = {"method": first} if "regularised" in name else {}
        for radius, cell in zip(numbers_in(heads), cells, strict=True):
            if cell != "–":
                row = at(found, 0.5 if where else float(first), radius, **where)
                assert cell == f"{percent(row['value'])} / {percent(row['reported'])}"
                shown += 1
    assert shown > 15


def test_the_shown_reduced_runs_are_those_of_the_tables():
    curves, cost = (
        pd.read_csv(folder("fashion_mnist_reduced") / f"{name}.csv").assign(
            label=lambda rows: rows["label"].str.replace(r" \(1 epoch.*\)", "", regex=True)
        )
        for name in ("certified_accuracy", "cost")
    )
    (heads, *rows) = (table := shown_table("σ = 0.5, 1 epoch")).values()
    assert set(list(table)[1:]) == set(curves["label"])
    for label, (*cells, seconds) in zip(list(table)[1:], rows, strict=True):
        for radius, cell in zip(numbers_in(heads[:-1]), cells, strict=True):
            assert cell == percent(at(curves, 0.5, radius, label=label)["value"])
        assert seconds == f"{cost.set_index('label')['training_seconds'][label]:.0f}"
