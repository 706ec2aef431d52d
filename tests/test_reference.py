"""The committed reference: what README shows is what the tables hold."""

from pathlib import Path

import pandas as pd

from bench.config import load_experiment
from bench.tables import leaderboard

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "results/reference/quick/tables"


def test_the_readme_shows_the_leaderboard_of_the_tables():
    curves = pd.read_csv(TABLES / "certified_accuracy.csv")
    assert leaderboard(curves) == (TABLES / "leaderboard.md").read_text()
    assert leaderboard(curves) in (ROOT / "README.md").read_text()


def test_quick_records_what_tuning_picked():
    experiment = load_experiment(ROOT / "config/quick.yaml")
    tuning = pd.read_csv(TABLES / "tuning.csv")
    picked = tuning[tuning["picked"]].set_index("method")["learning_rate"].to_dict()
    trained = {name: m.learning_rate for name, m in experiment.methods.items() if m.trains}
    assert picked == trained


def test_the_reference_holds_every_point_of_a_clean_run():
    experiment = load_experiment(ROOT / "config/quick.yaml")
    summary = pd.read_csv(TABLES / "summary.csv")
    points = set(zip(summary["method"], summary["sigma"], strict=True))
    assert points == {(m, s) for m in experiment.methods for s in experiment.sigmas}
    assert not summary["git_dirty"].any()
    assert summary["git_revision"].nunique() == 1
