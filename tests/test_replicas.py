"""Processes that train together make what one makes, noise aside, and a kill loses nothing."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from bench import replicas, training, training_state
from bench.config import TrainingSettings, parse_experiment
from bench.errors import BenchError
from bench.jobs import pretrain
from bench.model_folder import load_classifier
from tests.test_training_state import ADAMW, STEPS, network, run, same
from tests.workflow import SMOKE, snakemake

ROOT = Path(__file__).parents[1]
TOGETHER = ADAMW.model_copy(update={"processes": 2})
PROGRAM = """
import functools, sys
from bench.replicas import in_processes
from tests import test_replicas

in_processes(2, functools.partial(getattr(test_replicas, sys.argv[1]), *sys.argv[2:]))
"""


def launch(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command line of Python that trains in two processes."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip


def report_primitives() -> None:
    """What each of two processes sees and gets."""
    own = replicas.rank()
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    weights[0].grad = torch.tensor([1.0, 2.0]) * (own + 1)
    if own:
        weights[1].grad = torch.tensor([8.0, 4.0])
    loss = torch.tensor(2.0 + own)
    replicas.average(weights, [loss])
    start = training._start(network(), ADAMW, 0.1, 3, None, None)
    report = {
        "rank": own,
        "threads": torch.get_num_threads(),
        "share": replicas.share(torch.arange(6)).tolist(),
        "noise": torch.rand(4, generator=start.noise).tolist(),
        "dropout": torch.rand(4).tolist(),
        "gradients": [
            weight.grad if weight.grad is None else weight.grad.tolist() for weight in weights
        ],
        "loss": loss.item(),
        "agreed": [replicas.agreed(own == 0), replicas.agreed(own == 1)],
        "gathered": [state.tolist() for state in replicas.gathered(torch.tensor([own, 7]))],
    }
    # In one write: the other process has the same stdout.
    os.write(1, (json.dumps(report) + "\n").encode())


def test_two_processes_share_a_batch_and_agree():
    done = launch("-c", PROGRAM, "report_primitives")
    assert done.returncode == 0, done.stderr
    first, second = sorted(map(json.loads, done.stdout.splitlines()), key=lambda r: r.pop("rank"))
    assert (first.pop("share"), second.pop("share")) == ([0, 2, 4], [1, 3, 5])
    # The first draws as a process that trains alone.
    start = training._start(network(), ADAMW, 0.1, 3, None, None)
    drawn = {
        "noise": torch.rand(4, generator=start.noise).tolist(),
        "dropout": torch.rand(4).tolist(),
    }
    for name, numbers in drawn.items():
        assert first.pop(name) == numbers != second.pop(name)
    assert first == second == {
        "threads": 1,
        "gradients": [[1.5, 3.0], [4.0, 2.0], None],
        "loss": 2.5,
        "agreed": [True, False],
        "gathered": [[0, 7], [1, 7]],
    }  # fmt: skip


def outlive_the_launcher() -> None:
    """Wait, for longer than anybody who is killed can."""
    os.write(1, b"ready\n")
    time.sleep(60)
    os.write(1, b"alive\n")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of such an end")
def test_processes_end_with_a_launcher_that_is_killed():
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "outlive_the_launcher"], cwd=ROOT, stdout=subprocess.PIPE
    ) as launcher:
        assert [launcher.stdout.readline() for _ in range(2)] == [b"ready\n"] * 2
        launcher.kill()
        # It ends when the last process that holds it does.
        assert launcher.stdout.read() == b""


def train_noisily(folder: str, kill_in: str) -> None:
    """A training with noise and dropout, whose second process may be killed in a step."""
    training_state.SAVE_SECONDS = 0.0
    step = training._step

    def watched(state, *arguments):
        if replicas.rank() == 1 and state.step == int(kill_in):
            os.kill(os.getpid(), signal.SIGKILL)
        step(state, *arguments)

    training._step = watched
    weights, record, _ = run(TOGETHER, Path(folder))
    end = {name: weight.contiguous() for name, weight in weights.items()}
    end["sittings"] = torch.tensor(record.sittings)
    save_file(end, f"{folder}/{replicas.rank()}")


@pytest.mark.fault(
    fault="kill -9 of one of a training's processes",
    stage="train",
    outcome="the others end as well; a rerun goes on and ends at the same weights, to the bit",
)
def test_a_training_whose_process_was_killed_is_finished_by_a_rerun(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    killed = launch("-c", PROGRAM, "train_noisily", parts, "3")
    assert killed.returncode == 1
    # Which of the two ends the launcher sees first.
    assert re.search("exitcode: -9|another process of this training has ended", killed.stderr)
    assert not (parts / "0").exists()
    for folder in (whole, parts):
        done = launch("-c", PROGRAM, "train_noisily", folder, str(STEPS))
        assert done.returncode == 0, done.stderr
    ends = [load_file(folder / name) for folder in (whole, parts) for name in "01"]
    assert [int(end.pop("sittings")) for end in ends] == [1, 1, 2, 2]
    # Batch statistics included.
    assert all(same(end, ends[0]) for end in ends)


def test_clean_training_by_two_processes_is_that_of_one(smoke_values, fetched, tmp_path):
    values = copy.deepcopy(smoke_values)
    values["data"] |= {"directory": str(fetched.parent), "validation_images": 64}
    # Each process splits its half of the batch of 12 unevenly.
    values["pretrain"] |= {"images": 72, "batch_size": 12, "micro_batch_size": 4, "processes": 2}
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(values))
    done = launch(
        "-m", "bench", "pretrain", "--experiment", file, "--output", tmp_path / "together"
    )
    assert done.returncode == 0, done.stderr
    del values["pretrain"]["processes"]
    pretrain(parse_experiment(values, "x"), tmp_path / "alone")
    together, alone = (tmp_path / name for name in ("together", "alone"))
    weights = load_classifier(alone).state_dict()
    for name, weight in load_classifier(together).state_dict().items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-5)
    left, right = (json.loads((f / "training.json").read_text()) for f in (together, alone))
    assert left["loss_curve"] == [
        [step, pytest.approx(value, rel=1e-5)] for step, value in right["loss_curve"]
    ]
    assert left["settings"]["processes"] == 2
    costs = [json.loads((f / "cost.json").read_text()) for f in (together, alone)]
    assert costs[0]["training_flops"] == costs[1]["training_flops"]


def test_what_every_process_refuses_is_said_without_a_traceback(smoke_values, fetched, tmp_path):
    values = copy.deepcopy(smoke_values)
    values["data"]["directory"] = str(fetched.parent)
    values["pretrain"] |= {"images": 8, "batch_size": 2, "learning_rate": 1e30, "processes": 2}
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(values))
    done = launch("-m", "bench", "pretrain", "--experiment", file, "--output", tmp_path / "base")
    assert done.returncode == 1
    assert "error: training loss is nan at step" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "base/classifier.json").exists()


def test_there_is_a_gpu_for_each_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BenchError, match=r"training\.processes is 4, GPUs that the job sees: 2"):
        replicas.in_processes(4, lambda: None)


def test_a_process_takes_its_gpu_and_the_networks_of_both_devices(monkeypatch):
    taken = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", taken.append)
    replicas._join()
    assert taken == [3, "cpu:gloo,cuda:nccl"]


def test_a_process_that_loses_the_others_says_so():
    with pytest.raises(BenchError, match=r"another process .* ended \(Connection closed\)"):
        with replicas._together():
            raise RuntimeError("Connection closed\nand more")


def test_no_other_number_of_processes_trains():
    with pytest.raises(BenchError, match=r"training\.processes is 2, and 1 train here"):
        run(TOGETHER)


def test_passes_of_all_processes_are_counted():
    # Two processes take 6 images each: 4, then 2.
    settings = TrainingSettings(images=36, batch_size=12, micro_batch_size=4, processes=2)
    assert (settings.pass_size, settings.passes) == (4, 3 * 2 * 2)
    whole = settings.model_copy(update={"micro_batch_size": None})
    assert (whole.pass_size, whole.passes) == (6, 3 * 2)


def test_jobs_ask_for_what_their_processes_take(smoke_values, sources):
    values = copy.deepcopy(smoke_values)
    values["methods"]["black_box"]["training"] = {"processes": 1}
    values |= {"gpus_per_job": 1, "threads_per_job": 2}
    values["training"]["processes"] = 2
    values["pretrain"]["processes"] = 4
    (sources / "config/smoke.yaml").write_text(yaml.safe_dump(values))
    limits = ["--cores", "16", "--resources", "gpu=8"]
    said = snakemake(sources, "--dry-run", *SMOKE, *limits)
    found = {}
    for job in re.split(r"^(?:local)?rule ", said, flags=re.MULTILINE)[1:]:
        asked = re.search(r"threads: (\d+)\n +resources: .*gpu=(\d)", job)
        if asked and "wildcards: method=undefended" not in job:
            found[job.partition(":")[0]] = tuple(map(int, asked.groups()))
    assert found["pretrain"] == (8, 4)
    two = {"train", "train_gaussian_retraining", "train_denoiser", "train_diffusion"}
    one = {"train_black_box", "assemble_diffusion", "certify"}
    assert {rule: found[rule] for rule in two | one} == (
        dict.fromkeys(two, (4, 2)) | dict.fromkeys(one, (2, 1))
    )


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("pretrain", {"processes": 3}),
        ("training", {"processes": 3}),
        ("methods.denoised_smoothing_mse.training", {"processes": 2, "batch_size": 63}),
        ("tuning.training", {"batch_size": 33}),
    ],
)
def test_processes_share_a_batch_evenly(section, changes, smoke_values):
    values = copy.deepcopy(smoke_values)
    values["training"]["processes"] = 2
    parse_experiment(values, "x")
    place = values
    for key in section.split("."):
        place = place.setdefault(key, {})
    place |= changes
    with pytest.raises(BenchError, match=f"{section}.*: . processes cannot share a batch of"):
        parse_experiment(values, "x")
