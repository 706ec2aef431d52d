"""One rule picks every learning rate, on the validation split."""

import json

import pandas as pd
import pytest

from bench.errors import BenchError
from bench.tables import build_tuning


def reports(folder, experiment, accuracies):
    paths = []
    for (method, rate), accuracy in accuracies.items():
        path = folder / f"{method}_{rate}.json"
        report = {"method": f"{method}__lr_{rate}", "sigma": 0.5, "seed": 0}
        path.write_text(json.dumps({**report, "validation_accuracy": accuracy}))
        paths.append(path)
    return paths


def test_the_best_validation_accuracy_is_picked_and_ties_go_to_the_smaller_rate(smoke, tmp_path):
    found = {
        ("lora", "0.003"): 0.8,
        ("lora", "0.001"): 0.7,
        ("adapter", "0.01"): 0.6,
        ("adapter", "0.003"): 0.6,
        ("adapter", "0.001"): 0.5,
    }
    advice = build_tuning(smoke, reports(tmp_path, smoke, found), tmp_path / "tuning.csv")
    table = pd.read_csv(tmp_path / "tuning.csv")
    picked = table[table["picked"]].set_index("method")["learning_rate"].to_dict()
    assert picked == {"lora": 0.003, "adapter": 0.003}
    assert advice == ["the experiment file records every pick"]
    found["lora", "0.001"] = 0.9
    advice = build_tuning(smoke, reports(tmp_path, smoke, found), tmp_path / "tuning.csv")
    assert advice == ["record methods.lora.learning_rate: 1.000e-03"]


def test_a_trial_differs_from_its_method_in_the_learning_rate_alone(smoke):
    trial = smoke.point("lora__lr_0.001")
    assert trial.learning_rate == 0.001
    assert trial.parameterization == smoke.methods["lora"].parameterization
    same = smoke.point(f"lora__lr_{smoke.methods['lora'].learning_rate:g}")
    assert same == smoke.methods["lora"]
    with pytest.raises(BenchError, match=r"methods\.nothing does not exist"):
        smoke.point("nothing__lr_0.1")


def test_every_trained_method_is_tried_with_every_rate(smoke):
    trials = smoke.trials()
    trained = [name for name, method in smoke.methods.items() if method.trains]
    assert "undefended" not in trained
    assert len(set(trials)) == len(trained) * len(smoke.tuning.learning_rates)
