"""What a run leaves for the next one: after kills, Ctrl-C, a rival, and a user's own methods."""

import functools
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.conftest import copy_repository
from tests.workflow import SMOKE, assert_same_tables, snakemake

pytestmark = [pytest.mark.workflow, pytest.mark.slow]


def copy_with_two_methods(folder: Path, fetched: Path) -> Path:
    """A copy of the sources whose smoke experiment has two methods and no attacks."""
    copy = copy_repository(folder, fetched)
    path = copy / "config/smoke.yaml"
    values = yaml.safe_load(path.read_text())
    kept = ("lora", "gaussian_retraining")
    values["methods"] = {name: values["methods"][name] for name in kept}
    del values["attack"]
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return copy


@pytest.fixture
def untouched(tmp_path: Path, fetched: Path) -> Path:
    """A copy in which nothing ran."""
    return copy_with_two_methods(tmp_path, fetched)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, fetched: Path) -> Path:
    """A copy in which all ran undisturbed; tests leave it as they find it."""
    copy = copy_with_two_methods(tmp_path_factory.mktemp("done"), fetched)
    snakemake(copy, *SMOKE)
    return copy


@pytest.mark.fault(
    fault="kill -9 as jobs start and end",
    stage="every stage but attacks, with Snakemake",
    outcome="a rerun completes with the same tables, after `snakemake --unlock`",
)
def test_kills_as_jobs_start_and_end_change_nothing(untouched, done):
    """The other core may be in the middle of one then; `test_faults.py` kills jobs anywhere."""
    chance = random.Random(20261123)
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *SMOKE]
    for _ in range(3):
        run = subprocess.Popen(
            command, cwd=untouched, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        told = (line for line in run.stderr if line.startswith(("rule ", "Finished jobid")))
        # Of 9 jobs; fewer are left each time, and the last run has some to do.
        moment = chance.randint(2, 4)
        assert len(list(itertools.islice(told, moment))) == moment
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        # What was killed leaves its lock, at which the next run would end.
        snakemake(untouched, "--unlock", *SMOKE)
    snakemake(untouched, *SMOKE)
    assert_same_tables(untouched, done)


@pytest.mark.fault(
    fault="Ctrl-C",
    stage="pretrain, with Snakemake",
    outcome="ends without a traceback; a rerun completes with the same tables",
)
def test_ctrl_c_stops_cleanly_and_a_rerun_completes(untouched, done):
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *SMOKE]
    run = subprocess.Popen(
        command, cwd=untouched, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        # A shell without job control has its background jobs, and these tests, ignore Ctrl-C.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    started = itertools.takewhile(lambda line: "rule pretrain:" not in line, run.stderr)
    before = "".join(started)
    # Snakemake misses a signal in the instant in which it submits a job; the job takes longer.
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(timeout=2)
    # A terminal sends it to the whole group.
    os.killpg(run.pid, signal.SIGINT)
    said = before + run.stderr.read()
    run.wait()
    assert run.returncode != 0
    assert "Traceback" not in said
    snakemake(untouched, *SMOKE)
    assert_same_tables(untouched, done)


@pytest.mark.fault(
    fault="two runs in one folder",
    stage="every stage but attacks, with Snakemake",
    outcome="the second ends at once and changes nothing; the first completes",
)
def test_a_second_run_in_one_folder_is_refused(done):
    path = done / "results/smoke/tables/certified_accuracy.csv"
    before = path.read_bytes()
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--forcerun", "tables"]
    first = subprocess.Popen(
        [*command, "--until", "tables", *SMOKE], cwd=done, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    said = "".join(itertools.takewhile(lambda line: "rule tables:" not in line, first.stderr))
    os.killpg(first.pid, signal.SIGSTOP)  # so that it cannot end before the second has come
    try:
        second = snakemake(done, "--forcerun", "tables", *SMOKE, ok=False)
    finally:
        os.killpg(first.pid, signal.SIGCONT)
    assert "cannot be locked" in second or "Unable to lock" in second
    said += first.communicate()[1]
    assert first.returncode == 0, said
    assert path.read_bytes() == before
    snakemake(done, *SMOKE)


NEW_RULE = """
use rule train as train_mine with:
    input:
        data=DATA,
        base=BASE,
        code=TRAIN_CODE,
    params:
        experiment=EXPERIMENT_FILE,
        program="bench train",
        base=base_option,
        expect=planned_training,
    wildcard_constraints:
        method=methods_of("mine"),
"""


def test_a_copy_with_its_results_is_up_to_date(done, tmp_path):
    shutil.copytree(done, tmp_path / "copy", symlinks=True)
    assert "Nothing to be done" in snakemake(tmp_path / "copy", "-n", *SMOKE)


@pytest.mark.parametrize(
    ("lost", "made_by", "read_by"),
    [
        ("certificates/lora/sigma_0.50/seed_0.json", "certify", "tables"),
        ("models/lora/sigma_0.50/seed_0/training.json", "train", "certify"),
    ],
)
def test_a_lost_file_is_made_again_where_it_is_read(done, lost, made_by, read_by):
    path = done / "results/smoke" / lost
    path.rename(path.with_suffix(".away"))
    try:
        planned = snakemake(done, "-n", *SMOKE, "--forcerun", read_by, "--", "tables")
    finally:
        path.with_suffix(".away").rename(path)
    assert f"rule {made_by}:" in planned
    assert str(path.relative_to(done)) in planned


@pytest.mark.parametrize(
    ("typo", "said"),
    [
        (('methods_of("mine")', 'methods_of("mien")'), 'methods_of("mine"): correct the name'),
        (("TRAIN_CODE", 'training_code("mien")'), "there is no baselines/mien"),
    ],
)
def test_a_slip_in_a_new_rule_is_told_though_all_has_run(done, typo, said):
    """Snakemake takes what is there for sources, and would leave the new method out."""
    path = done / "config/smoke.yaml"
    original = path.read_text()
    values = yaml.safe_load(original)
    mine = {**values["methods"]["lora"], "label": "mine", "baseline": "mine"}
    values["methods"]["mine"] = mine
    (done / "baselines/mine").mkdir()
    (done / "baselines/mine/rules.smk").write_text(NEW_RULE.replace(*typo))
    try:
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        assert said in snakemake(done, "-n", *SMOKE, ok=False)
    finally:
        path.write_text(original)
        shutil.rmtree(done / "baselines/mine")


def test_a_new_folder_and_a_new_entry_reach_the_tables(done):
    path = done / "config/smoke.yaml"
    original = path.read_text()
    values = yaml.safe_load(original)
    lora = values["methods"]["lora"]
    values["methods"]["from_entry"] = {**lora, "label": "my entry"}
    values["methods"]["from_folder"] = {**lora, "label": "my folder", "baseline": "mine"}
    (done / "baselines/mine").mkdir()
    (done / "baselines/mine/rules.smk").write_text(NEW_RULE)
    try:
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        said = snakemake(done, *SMOKE)
        assert "train_mine" in said
        written = [line for line in said.splitlines() if "output: results/smoke/models/" in line]
        assert {line.split("/")[3] for line in written} == {"from_entry", "from_folder"}
        table = pd.read_csv(done / "results/smoke/tables/certified_accuracy.csv")
        assert {"my entry", "my folder"} <= set(table["label"])
        assert "my folder" in (done / "results/smoke/tables/leaderboard.md").read_text()
    finally:
        path.write_text(original)
        shutil.rmtree(done / "baselines/mine")
        snakemake(done, *SMOKE)
