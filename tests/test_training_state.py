"""A killed training goes on where it stood, to the bit; what is not its own state is not used."""

import copy
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from bench.config import Sgd, TrainingSettings, parse_experiment
from bench.data import ArraySplit
from bench.errors import BenchError
from bench.jobs import pretrain, state_of
from bench.model_folder import Identity
from bench.training import batch_positions, fit, read_ahead
from bench.training_state import FILES, TrainingState, discard_state

STEPS = 8
ADAMW = TrainingSettings(images=4 * STEPS, batch_size=4, weight_decay=0.1, precision="float32")
SGD = ADAMW.model_copy(update={"optimizer": Sgd(kind="sgd", momentum=0.0)})
MOMENTUM = ADAMW.model_copy(update={"optimizer": Sgd(kind="sgd")})


class Interrupted(Exception):
    """Stands for a kill: nothing of the training runs after it."""


class Average:
    """A hook with a state: the mean weight of the last layer."""

    def __init__(self, layer):
        self.layer, self.mean = layer, torch.zeros_like(layer.weight)

    def __call__(self):
        self.mean = 0.9 * self.mean + 0.1 * self.layer.weight.detach()

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


def network():
    """Batch statistics, dropout, and weights that are not laid out row by row."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
    return nn.Sequential(
        convolution, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)
    )


def run(settings, folder=None, stop=None, meaning="own"):
    """Train, up to an interruption in step `stop` (from 0); the result and the steps it took."""
    module, steps = network(), []
    hook = Average(module[-1])
    torch.manual_seed(1)
    split = ArraySplit(
        torch.randint(0, 256, (10, 2, 6, 6), dtype=torch.uint8), torch.arange(10) % 3
    )

    def loss(images, labels, noise, progress):
        if len(steps) == stop:
            raise Interrupted
        steps.append(progress)
        noisy = images + torch.randn(images.shape, generator=noise)
        return nn.functional.cross_entropy(module(noisy), labels)

    state = None if folder is None else TrainingState(folder, meaning)
    record = fit(module, loss, split, settings, 0.01, 0, hook, state)
    return {**module.state_dict(), "mean": hook.mean}, record, steps


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def every_step(monkeypatch):
    """States are saved after every step."""
    monkeypatch.setattr("bench.training_state.SAVE_SECONDS", 0.0)


@pytest.mark.parametrize("settings", [ADAMW, SGD, MOMENTUM], ids=["adamw", "sgd", "momentum"])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(settings, tmp_path, every_step):
    whole, plain, _ = run(settings)
    for stop in (1, 3):
        with pytest.raises(Interrupted):
            run(settings, tmp_path, stop)
    parts, record, steps = run(settings, tmp_path)
    assert steps == [step / STEPS for step in range(5, STEPS + 1)]
    assert same(parts, whole)
    assert record.loss_curve == plain.loss_curve
    assert (record.images, record.sittings, plain.sittings) == (4 * STEPS, 3, 1)


@pytest.mark.parametrize(
    "part", ["step", "weights", "optimizer", "scheduler", "noise", "random", "hook"]
)
def test_every_part_of_the_state_matters(part, tmp_path, every_step, monkeypatch):
    """Negative control: with one part as it was three steps before, the end is another."""
    whole, _, _ = run(ADAMW)
    with pytest.raises(Interrupted):
        run(ADAMW, tmp_path, stop=2)
    cpu = torch.device("cpu")
    old = copy.deepcopy(TrainingState(tmp_path, "own").load(cpu))
    with pytest.raises(Interrupted):
        run(ADAMW, tmp_path, stop=3)
    load = TrainingState.load
    monkeypatch.setattr(
        TrainingState, "load", lambda self, device: load(self, device) | {part: old[part]}
    )
    assert not same(run(ADAMW, tmp_path)[0], whole)


def test_seconds_and_memory_are_those_of_all_sittings(tmp_path, every_step, monkeypatch):
    ticks, memory = itertools.count(), iter([9] * 4)
    monkeypatch.setattr("bench.training.time.perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr("bench.training.peak_memory", lambda device: next(memory, 5))
    with pytest.raises(Interrupted):
        run(ADAMW, tmp_path, stop=4)
    _, record, _ = run(ADAMW, tmp_path)
    assert (record.seconds, record.peak_memory_bytes) == (STEPS, 9)


def test_states_are_saved_now_and_then(tmp_path, monkeypatch):
    now, saved = [0.0], []
    monkeypatch.setattr("bench.training_state.time", SimpleNamespace(monotonic=lambda: now[0]))
    state = TrainingState(tmp_path, "own")

    def slow_disk(tensors, path, metadata):
        now[0] += 100
        path.touch()

    monkeypatch.setattr("bench.training_state.save_file", slow_disk)
    for step in (119.0, 120.0, 221.0, 339.0, 340.0, 441.0):
        now[0] = step
        if state.due:
            saved.append(step)
            state.save({})
    assert saved == [120.0, 340.0]


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "garbage"])
def test_what_is_not_this_trainings_state_is_not_used(damage, tmp_path, every_step, caplog):
    with pytest.raises(Interrupted):
        run(ADAMW, tmp_path, stop=4)
    path = TrainingState(tmp_path, "own").path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    spoilt = {"cut": content[:-9], "flipped": content, "garbage": b"{}"}
    path.write_bytes(spoilt.get(damage, path.read_bytes()))
    meaning = "another" if damage == "foreign" else "own"
    with caplog.at_level(logging.WARNING):
        result, _, steps = run(ADAMW, tmp_path, meaning=meaning)
    assert len(steps) == STEPS
    assert same(result, run(ADAMW)[0])
    assert ("of other settings" if damage == "foreign" else "is damaged") in caplog.text


def test_a_run_of_another_meaning_leaves_the_state_to_the_one_that_it_fits(tmp_path, every_step):
    with pytest.raises(Interrupted):
        run(ADAMW, tmp_path, stop=4)
    with pytest.raises(Interrupted):
        run(ADAMW, tmp_path, stop=2, meaning="another")
    assert len(run(ADAMW, tmp_path)[2]) == STEPS - 4
    discard_state(tmp_path)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
import bench.training, bench.training_state
from bench.cli import main

bench.training_state.SAVE_SECONDS = 0.0
step = bench.training._step

def killed(run, *arguments):
    if run.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    step(run, *arguments)

bench.training._step = killed
sys.argv = ["bench", *sys.argv[1:]]
main()
"""


def test_a_killed_job_is_finished_by_a_rerun(smoke_values, fetched, tmp_path):
    values = copy.deepcopy(smoke_values)
    values["data"]["directory"] = str(fetched.parent)
    values["data"]["validation_images"] = 64
    values["pretrain"]["images"] = 6 * 128
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(values))
    folder, plain = tmp_path / "killed", tmp_path / "plain"
    command = [sys.executable, "-c", KILLED, "pretrain", "--experiment", str(file)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    answer = subprocess.run(
        [*command, "--output", str(folder)], cwd=Path(__file__).parents[1],
        env={**os.environ, **threads}, capture_output=True, text=True,
    )  # fmt: skip
    assert answer.returncode == -signal.SIGKILL, answer.stderr
    assert list(folder.iterdir()) == list(folder.glob(FILES))
    experiment = parse_experiment(values, "x")
    pretrain(experiment, folder)
    pretrain(experiment, plain)
    assert (folder / "classifier.json").read_bytes() == (plain / "classifier.json").read_bytes()
    assert not list(folder.glob(FILES))
    left, right = (json.loads((f / "training.json").read_text()) for f in (folder, plain))
    assert (left["sittings"], right["sittings"]) == (2, 1)
    for key in ("images", "loss_curve", "validation_accuracy"):
        assert left[key] == right[key]


def test_a_state_is_of_all_that_its_training_depends_on(tmp_path, monkeypatch):
    identity = Identity(experiment="e", method="m", sigma=0.5, seed=0, fingerprint="f")
    data, cpu = SimpleNamespace(sha256="d"), torch.device("cpu")
    given = {"identity": identity, "data": data, "settings": ADAMW, "device": cpu, "starts": ["w"]}

    def place(**changes):
        return state_of(tmp_path, **{**given, **changes}).path

    found = {
        place(identity=identity.model_copy(update={"fingerprint": "other"})),
        place(data=SimpleNamespace(sha256="other")),
        place(starts=["other"]),
    }
    for name in ("sources_sha256", "versions", "machine", "pick_precision"):
        with monkeypatch.context() as patch:
            patch.setattr(f"bench.jobs.{name}", lambda *arguments: "other")
            found.add(place())
    assert place() == place()
    assert len(found | {place()}) == 3 + 4 + 1


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    split = ArraySplit(torch.zeros(10, 1, 1, 1, dtype=torch.uint8), torch.zeros(10))
    batches = [list(map(int, b)) for b in batch_positions(split, 4, 5, seed=3)]
    assert [len(batch) for batch in batches] == [4] * 5
    seen = list(itertools.chain(*batches))
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert batches == [list(map(int, b)) for b in batch_positions(split, 4, 5, seed=3)]
    assert batches != [list(map(int, b)) for b in batch_positions(split, 4, 5, seed=4)]


def test_a_batch_is_read_while_the_one_before_is_trained_on():
    begun = [threading.Event() for _ in range(3)]

    class Watched(ArraySplit):
        def batch(self, positions):
            begun[int(positions[0]) // 2].set()
            return super().batch(positions)

    split = Watched(torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1), torch.arange(6))
    with read_ahead(split, torch.arange(6).split(2), torch.device("cpu")) as read:
        for step, (images, labels) in enumerate(read):
            assert begun[min(step + 1, 2)].wait(timeout=60)
            assert labels.tolist() == [2 * step, 2 * step + 1]
            assert torch.equal(images.flatten(), labels / 255)
    assert step == 2


def test_a_training_that_fails_leaves_no_thread():
    before = threading.active_count()
    with pytest.raises(Interrupted) as kept:
        run(ADAMW, stop=2)
    assert kept.value.__traceback__ is not None
    assert threading.active_count() == before


def test_an_image_that_cannot_be_read_ends_the_reading():
    class Broken(ArraySplit):
        def batch(self, positions):
            raise BenchError("cannot be read")

    split = Broken(torch.zeros(2, 1, 1, 1), torch.zeros(2))
    with read_ahead(split, torch.arange(2).split(1), torch.device("cpu")) as read:
        with pytest.raises(BenchError, match="cannot be read"):
            next(read)
