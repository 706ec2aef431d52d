"""One rule picks every learning rate, on the validation split."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from bench.config import parse_experiment
from bench.errors import BenchError
from bench.files import write_json
from bench.tables import build_tuning

ROOT = Path(__file__).parents[1]


@pytest.fixture
def with_grids(smoke_values):
    """The smoke experiment with sizes to tune and a budget for tuning."""
    values = copy.deepcopy(smoke_values)
    values["methods"]["lora"]["grid"] = {"r": [4, 8]}
    values["methods"]["adapter"]["grid"] = {"learning_rate": [0.1], "bottleneck": [8, 16, 32]}
    values["methods"]["denoised_smoothing_mse"]["grid"] = {"width": [8, 16]}
    values["tuning"]["training"] = {"images": 128}
    return parse_experiment(values, "mine.yaml")


def of_methods(experiment, *names):
    """`experiment` with these methods alone, so that few reports are all there are."""
    methods = {name: experiment.methods[name] for name in names}
    return experiment.model_copy(update={"methods": methods})


def reports(folder, experiment, accuracies):
    paths = []
    for (method, rate), accuracy in accuracies.items():
        path = folder / f"{method}_{rate}.json"
        point = {"method": f"{method}__lr_{rate}", "sigma": 0.5, "seed": 0}
        report = {"experiment": experiment.name, **point}
        path.write_text(json.dumps({**report, "validation_accuracy": accuracy}))
        paths.append(path)
    return paths


def rename(path, **names):
    path.write_text(json.dumps(json.loads(path.read_text()) | names))


def test_the_best_validation_accuracy_is_picked_and_ties_go_to_the_smaller_rate(smoke, tmp_path):
    rates = smoke.tuning.model_copy(update={"learning_rates": [0.001, 0.003, 0.01]})
    smoke = of_methods(smoke, "lora", "adapter").model_copy(update={"tuning": rates})
    found = {
        ("lora", "0.01"): 0.1,
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
    assert advice == ["record methods.lora.learning_rate: 1.0e-03"]


def test_a_trial_differs_from_its_method_in_the_learning_rate_alone(smoke):
    trial = smoke.point("lora__lr_0.001")
    assert trial.learning_rate == 0.001
    assert trial.parameterization == smoke.methods["lora"].parameterization
    same = smoke.point(f"lora__lr_{smoke.methods['lora'].learning_rate:g}")
    assert same == smoke.methods["lora"]
    with pytest.raises(BenchError, match=r"methods\.nothing does not exist"):
        smoke.point("nothing__lr_0.1")
    for trial in ("lora__lr_fast", "lora__lr_0.1__rank_4", "lora__lr_0.1__r_0"):
        with pytest.raises(BenchError, match=r"is no trial of methods\.lora"):
            smoke.point(trial)


def test_every_trained_method_is_tried_with_every_rate(smoke):
    trials = smoke.trials()
    trained = [name for name, method in smoke.methods.items() if method.trains]
    assert "undefended" not in trained
    assert len(set(trials)) == len(trained) * len(smoke.tuning.learning_rates)


def test_a_grid_of_its_own_crosses_sizes_with_the_rates(with_grids, smoke):
    trials = with_grids.trials()
    assert [t for t in trials if t.startswith("lora")] == [
        "lora__lr_0.001__r_4",
        "lora__lr_0.001__r_8",
        "lora__lr_0.003__r_4",
        "lora__lr_0.003__r_8",
    ]
    bottlenecks = [f"adapter__lr_0.1__bottleneck_{width}" for width in (8, 16, 32)]
    assert [t for t in trials if t.startswith("adapter")] == bottlenecks
    assert with_grids.point("adapter__lr_0.1__bottleneck_32").parameterization.bottleneck == 32
    denoiser = with_grids.point("denoised_smoothing_mse__lr_0.001__width_16")
    assert denoiser.settings == {"depth": 3, "width": 16, "objective": "mse"}
    untouched = [t for t in trials if t.startswith("full_finetuning")]
    assert untouched == [t for t in smoke.trials() if t.startswith("full_finetuning")]


def test_every_trial_has_the_budget_of_tuning_and_no_method_changes(with_grids, smoke):
    assert {with_grids.method_training(trial).images for trial in with_grids.trials()} == {128}
    small = with_grids.method_training("denoised_smoothing_mse__lr_0.001__width_8")
    assert small.batch_size == 64  # not a matter of budget: the method's own
    for name in ("lora", "adapter", "gaussian_retraining_full"):
        assert with_grids.method_training(name) == smoke.method_training(name)
        where = (name, 0.5, 0)
        assert with_grids.training_fingerprint(*where) == smoke.training_fingerprint(*where)
    # At one budget this is the same training as gaussian_retraining.
    trials = [t for t in with_grids.trials() if not t.startswith("gaussian_retraining_full")]
    assert len({with_grids.training_fingerprint(t, 0.5, 0) for t in trials}) == len(trials)


@pytest.mark.fault(
    fault="report of a trial missing, there twice or foreign",
    stage="tune",
    outcome="refused: names trial or file; nothing is picked",
)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda paths: paths.pop(), "lora__lr_0.003 at sigma 0.5, seed 0 has no results yet"),
        (lambda paths: paths.append(paths[0]), "is given more than once"),
        (lambda paths: rename(paths[0], method="lora"), "lora__lr_0.001 at .* no results yet"),
        (lambda paths: rename(paths[0], experiment="other"), "is of other, not of smoke"),
        (
            lambda paths: write_json(paths[0], {"experiment": "smoke"}),
            r"lora\S+ has no validation_accuracy",
        ),
    ],
)
def test_trials_that_are_missing_or_foreign_pick_nothing(change, said, smoke, tmp_path):
    rates = smoke.tuning.model_copy(update={"learning_rates": [0.001, 0.003]})
    only = of_methods(smoke, "lora").model_copy(update={"tuning": rates})
    paths = reports(tmp_path, only, {("lora", "0.001"): 0.8, ("lora", "0.003"): 0.7})
    change(paths)
    with pytest.raises(BenchError, match=said):
        build_tuning(only, paths, tmp_path / "tuning.csv")
    assert not (tmp_path / "tuning.csv").exists()


def test_size_and_rate_are_picked_together_and_ties_go_to_the_smaller_size(with_grids, tmp_path):
    with_grids = of_methods(with_grids, "lora", "adapter")
    found = {
        ("lora", "0.001__r_8"): 0.8,
        ("lora", "0.003__r_8"): 0.9,
        ("lora", "0.001__r_4"): 0.7,
        ("lora", "0.003__r_4"): 0.6,
        ("adapter", "0.1__bottleneck_16"): 0.6,
        ("adapter", "0.1__bottleneck_8"): 0.6,
        ("adapter", "0.1__bottleneck_32"): 0.5,
    }
    advice = build_tuning(with_grids, reports(tmp_path, with_grids, found), tmp_path / "t.csv")
    table = pd.read_csv(tmp_path / "t.csv")
    assert len(table) == len(found)
    picked = table[table["picked"]].set_index("method")
    assert picked["size"].to_dict() == {"lora": "r = 8", "adapter": "bottleneck = 8"}
    assert picked["recorded"].to_dict() == {"lora": True, "adapter": False}
    assert advice == ["record methods.adapter.learning_rate: 1.0e-01 and bottleneck = 8"]
    # The smaller size is the one of the larger rate.
    found |= {("lora", "0.003__r_4"): 0.95, ("lora", "0.001__r_8"): 0.95}
    build_tuning(with_grids, reports(tmp_path, with_grids, found), tmp_path / "t.csv")
    table = pd.read_csv(tmp_path / "t.csv").query("picked").set_index("method")
    assert table.loc["lora", ["size", "learning_rate"]].tolist() == ["r = 4", 0.003]


@pytest.mark.parametrize(
    ("method", "grid", "named"),
    [
        ("lora", {"rank": [4]}, r"methods\.lora: .*grid\.rank: 4 does not fit: Extra inputs"),
        ("lora", {"r": [4, 0]}, r"methods\.lora: .*grid\.r: 0 does not fit: .*greater than 0"),
        ("lora", {"r": []}, r"methods\.lora\.grid\.r: .*at least 1"),
        ("lora", {"learning_rate": [0.0]}, r"grid\.learning_rate: 0\.0 .*above 0"),
        ("undefended", {"r": [4]}, r"methods\.undefended: .*trains nothing"),
    ],
)
def test_a_grid_that_fits_nothing_is_named(smoke_values, method, grid, named):
    values = copy.deepcopy(smoke_values)
    values["methods"][method]["grid"] = grid
    with pytest.raises(BenchError, match=named):
        parse_experiment(values, "mine.yaml")


@pytest.mark.workflow
def test_seeds_shards_and_trials_are_planned_each_once(smoke_values, tmp_path):
    values = copy.deepcopy(smoke_values)
    names = ("undefended", "lora", "diffusion_denoising")
    values["methods"] = {name: values["methods"][name] for name in names}
    values["methods"]["lora"]["grid"] = {"r": [4, 8]}
    values["tuning"] = {"sigma": 0.5, "learning_rates": [1.0e-5, 1.0e-2]}
    values["certification"]["shards"] = 2
    values["seeds"] = [1, 0]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    command = [sys.executable, "-m", "snakemake", "-n", "--cores", "1", "--quiet", "rules"]
    command += ["--directory", str(tmp_path), "--snakefile", str(ROOT / "Snakefile")]
    command += ["--configfile", str(tmp_path / "mine.yaml"), "--", "all", "tune"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    planned = dict(re.findall(r"^(\w+) +(\d+)$", done.stdout + done.stderr, re.M))
    trainings = {
        "pretrain": 1,
        "train": 2 + 2 + 2 * 2,  # two methods of two seeds, and trials of LoRA: sizes by rates
        "train_diffusion": 2 + 2,  # of two seeds, and a trial for each rate
        "assemble_diffusion": 2 + 2,
    }
    certifications = {"certify_shard": 3 * 2 * 2, "gather_certificates": 3 * 2}
    once = dict.fromkeys(("fetch", "tune", "examples", "tables", "figures", "overview", "all"), 1)
    expected = {**trainings, **certifications, **once}
    found = {name: int(count) for name, count in planned.items()}
    assert found == {**expected, "total": sum(expected.values())}
