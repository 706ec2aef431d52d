"""Shared fixtures: a tiny experiment, and real data fetched once."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from hypothesis import settings as hypothesis_settings

from bench.config import DataSettings, Experiment, load_experiment
from bench.data import data_folder, fetch
from bench.errors import BenchError

ROOT = Path(__file__).parents[1]
# Every run tries the same examples: one that fails, fails again.
hypothesis_settings.register_profile("repeatable", derandomize=True)
hypothesis_settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """One thread per test process: the workers share the cores, and forks outlive no thread.

    Forks cannot share a GPU either, so tests run on the CPU wherever they do. What other runs left
    in the user's cache is not read: a table there may be of other code or another scipy.
    """
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not hasattr(config, "workerinput"):  # workers inherit what the first process set
        cache = tempfile.TemporaryDirectory(prefix="bench-tests-")
        config.add_cleanup(cache.cleanup)
        os.environ["XDG_CACHE_HOME"] = cache.name
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{cache.name}/inductor"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest file first, so that it does not run alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("workflow") is None)


@pytest.fixture(scope="session")
def smoke_values() -> dict:
    """The smoke experiment as plain values, for tests that change some.

    Without its attacks, which name methods: tests replace those.
    """
    values = yaml.safe_load((ROOT / "config/smoke.yaml").read_text())
    del values["attack"]
    return values


@pytest.fixture(scope="session")
def smoke() -> Experiment:
    """The smoke experiment."""
    return load_experiment(ROOT / "config/smoke.yaml")


@pytest.fixture(scope="session")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that holds a fetched Fashion-MNIST; skips where no source can be reached."""
    settings = DataSettings(name="fashion_mnist", directory=str(ROOT / "data"))
    try:
        # The workers start together; the folder above theirs is common to all.
        with FileLock(tmp_path_factory.getbasetemp().parent / "fetch.lock"):
            fetch(settings)
    except BenchError as error:
        pytest.skip(f"Fashion-MNIST cannot be fetched here: {error}")
    return data_folder(settings)


def copy_sources(folder: Path) -> Path:
    """A copy of this checkout's sources in `folder`, of no git revision."""
    copy = folder / "repository"
    copy.mkdir()
    for name in ("bench", "baselines", "config", "profiles"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "results/published", copy / "results/published")
    shutil.copy(ROOT / "Snakefile", copy)
    return copy


def copy_repository(folder: Path, data: Path) -> Path:
    """A copy of this checkout's sources in `folder`, with the data in place."""
    copy = copy_sources(folder)
    shutil.copytree(data, copy / "data/fashion_mnist")
    return copy


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A temporary copy of this checkout's sources, without data."""
    return copy_sources(tmp_path)


@pytest.fixture
def repository(tmp_path: Path, fetched: Path) -> Path:
    """A temporary copy of this checkout's sources."""
    return copy_repository(tmp_path, fetched)


# A method of every rule; the others of the smoke experiment go through the same ones.
EVERY_RULE = [
    "undefended",
    "head",
    "lora",
    "gaussian_retraining",
    "denoised_smoothing_stability",
    "black_box",
    "diffusion_denoising",
]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, fetched: Path) -> Path:
    """A copy in which the smoke experiment ran by every rule; tests leave it as they find it.

    Two of its trainings ran in two processes each.
    """
    copy = copy_repository(tmp_path_factory.mktemp("smoke"), fetched)
    values = yaml.safe_load((copy / "config/smoke.yaml").read_text())
    values["methods"] = {name: values["methods"][name] for name in EVERY_RULE}
    for name in ("denoised_smoothing_stability", "diffusion_denoising"):
        values["methods"][name]["training"]["processes"] = 2
    (copy / "config/smoke.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    command = [sys.executable, "-m", "snakemake", "--cores", "2"]
    command += ["--configfile", "config/smoke.yaml"]
    run = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return copy
