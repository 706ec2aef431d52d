"""Measured beside reported: joined by method, sigma and radius, with an interval that can fail."""

import copy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from typer.testing import CliRunner

from bench.cli import app
from bench.config import Experiment, parse_experiment
from bench.errors import BenchError
from bench.published import build_published, check_published, compare_with_published
from bench.statistics import accuracy_interval

PUBLISHED = Path(__file__).parents[1] / "results/published/fashion_mnist.csv"
NAME = "Gaussian augmentation (log shipped with CAT-RS)"


@pytest.fixture
def experiment(smoke_values) -> Experiment:
    """The smoke experiment, in which `head` says that it reproduces the Gaussian log."""
    return saying(smoke_values, NAME)


def saying(smoke_values: dict, published: str) -> Experiment:
    values = copy.deepcopy(smoke_values)
    for name, method in values["methods"].items():
        method["published"] = published if name == "head" else None
    return parse_experiment(values, "test")


def curve(folder: Path, values: dict[float, float], images: int = 500) -> Path:
    """certified_accuracy.csv of `head` at sigma 0.5."""
    hits = np.rint(np.array(list(values.values())) * images)
    low, high = accuracy_interval(hits, images)
    point = {"method": "head", "label": "head only", "sigma": 0.5, "seed": 0}
    numbers = {"radius": list(values), "value": hits / images, "low": low, "high": high}
    pd.DataFrame({**point, **numbers, "n_images": images}).to_csv(folder / "own.csv", index=False)
    return folder / "own.csv"


def reported() -> dict[float, float]:
    table = pd.read_csv(PUBLISHED)
    rows = table[(table["method"] == NAME) & (table["sigma"] == 0.5)]
    shares = rows["certified_accuracy_percent"] / 100
    return dict(zip(rows["radius"], shares, strict=True))


def test_the_published_numbers_agree_with_themselves_and_not_with_worse_ones(experiment, tmp_path):
    theirs = reported()
    same = build_published(experiment, curve(tmp_path, theirs), PUBLISHED, tmp_path / "a.csv")
    assert same["within"].all()
    assert same["radius"].tolist() == list(theirs)
    worse = {radius: share - 0.06 for radius, share in theirs.items() if share > 0.1}
    table = build_published(experiment, curve(tmp_path, worse), PUBLISHED, tmp_path / "b.csv")
    assert not table.loc[table["radius"].isin(worse), "within"].any()
    assert table["difference"].iloc[0] == pytest.approx(-0.06, abs=0.002)
    pd.testing.assert_frame_equal(table, pd.read_csv(tmp_path / "b.csv"))


def test_a_result_folder_is_compared_with_published_results(experiment, tmp_path):
    theirs, tables = reported(), tmp_path / "tables"
    tables.mkdir()
    for fall, agreeing in ((0.0, True), (0.06, False)):
        values = {radius: max(share - fall, 0.0) for radius, share in theirs.items()}
        own = curve(tmp_path, values).rename(tables / "certified_accuracy.csv")
        build_published(experiment, own, PUBLISHED, tables / "published.csv")
        result = CliRunner().invoke(app, ["compare", str(tmp_path), str(PUBLISHED)])
        assert (result.exception is None) == agreeing
    assert "disagree" in str(result.exception)
    other = tmp_path / "other.csv"
    pd.read_csv(PUBLISHED).query("sigma == 1").to_csv(other, index=False)
    with pytest.raises(BenchError, match=r"other\.csv has no 'Gaussian augmentation"):
        compare_with_published(tmp_path, other)
    (tables / "published.csv").unlink()
    with pytest.raises(BenchError, match=r"set methods\.NAME\.published"):
        compare_with_published(tmp_path, PUBLISHED)


def test_a_curve_that_ended_counts_as_zero(experiment, tmp_path):
    theirs = reported()
    short = {radius: share for radius, share in theirs.items() if radius <= 0.5}
    table = build_published(experiment, curve(tmp_path, short), PUBLISHED, tmp_path / "a.csv")
    beyond = table[table["radius"] > 0.5]
    assert (beyond["value"] == 0).all()
    assert (beyond["method"] == "head").all()
    # Below theirs: the halves that face each other are our upper and their lower one.
    ours = binomtest(0, 500).proportion_ci().high
    hits = [round(10_000 * theirs[radius]) for radius in beyond["radius"]]
    lows = [binomtest(hit, 10_000).proportion_ci().low for hit in hits]
    halves = np.hypot(ours, np.array(hits) / 10_000 - lows)
    assert beyond["joint_half_width"].tolist() == pytest.approx(halves.tolist())
    assert not beyond["within"].any()


def test_other_grids_and_unknown_names_are_errors(experiment, smoke_values, tmp_path):
    off = curve(tmp_path, {0.0: 0.8, 0.2: 0.7, 0.4: 0.6})
    with pytest.raises(BenchError, match="radius_step"):
        build_published(experiment, off, PUBLISHED, tmp_path / "a.csv")
    with pytest.raises(BenchError, match=r"methods\.head\.published"):
        build_published(saying(smoke_values, "nobody"), off, PUBLISHED, tmp_path / "a.csv")
    # Both are found before anything runs as well.
    check_published(experiment, PUBLISHED)
    with pytest.raises(BenchError, match=r"methods\.head\.published"):
        check_published(saying(smoke_values, "nobody"), PUBLISHED)
    with pytest.raises(BenchError, match=r"radius_step: the published radius 0\.25"):
        check_published(experiment.model_copy(update={"radius_step": 0.1}), PUBLISHED)
