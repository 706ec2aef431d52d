"""The committed reference: what README shows is what the tables hold."""

from pathlib import Path

import pandas as pd
import pytest

from bench.config import load_experiment
from bench.tables import leaderboard

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "results/reference"
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
