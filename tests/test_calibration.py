"""The calibration study: what it says of sound certificates, and that unsound ones show."""

from pathlib import Path

import pandas as pd
import pytest
from scipy.stats import binom

from bench.calibration import SIGMA, STEP, build_calibration
from bench.smoothing import rules
from bench.smoothing.bounds import radius_cap


def study(folder: Path, draws: tuple[int, ...] = (100, 1000)) -> pd.DataFrame:
    """A small study."""
    return build_calibration(folder / "study.csv", folder / "figure", draws, 25)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Path]:
    """It and its folder."""
    folder = tmp_path_factory.mktemp("calibration")
    return study(folder), folder


def excesses(table: pd.DataFrame, mode: str) -> tuple[int, int]:
    """Certificates above the exact radius, and all, where such are likeliest."""
    part = table[(table["mode"] == mode) & (table["place"] == "just below")]
    return round((part["exceeding"] * part["certificates"]).sum()), part["certificates"].sum()


@pytest.mark.parametrize("mode", ["decide", "cohen"])
def test_certificates_exceed_no_more_often_than_alpha(
    found: tuple[pd.DataFrame, Path], mode: str
) -> None:
    hits, certificates = excesses(found[0], mode)
    assert hits <= binom.isf(1e-4, certificates, 0.05)


def test_more_draws_come_nearer_and_none_passes_its_bounds(
    found: tuple[pd.DataFrame, Path],
) -> None:
    table = found[0]
    ratios = table.pivot(index=["mode", "place", "exact"], columns="n", values="ratio")
    assert (ratios[1000] > ratios[100]).all()
    assert (table["ratio"] <= 1.05).all()
    for row in table.to_dict("records"):
        assert row["ratio"] * row["exact"] <= radius_cap(row["n"], row["alpha"], SIGMA)
    grid = table[(table["mode"] == "decide") & (table["place"] == "half-way")]
    assert (grid["ratio"] <= 1 - STEP / 2 / grid["exact"] + 1e-6).all()


def test_the_study_is_written_and_drawn_the_same_again(
    found: tuple[pd.DataFrame, Path], tmp_path: Path
) -> None:
    table, folder = found
    pd.testing.assert_frame_equal(pd.read_csv(folder / "study.csv"), table)
    study(tmp_path)
    for name in ("study.csv", "figure.svg"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_bound_that_is_no_bound_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rules, "p_a_lower", lambda n_a, n, alpha: n_a / (n + 1))
    hits, certificates = excesses(study(tmp_path, (100,)), "cohen")
    assert hits > binom.isf(1e-4, certificates, 0.05)
