"""What fails at any moment of a stage: it completes on a rerun, or says what to do."""

import ast
import contextlib
import io
import os
import random
import resource
import signal
import sys
import tarfile
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from hashlib import md5
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from bench.backbones import Classifier, create_classifier
from bench.certification import Progress, Task, gather, protocol_of, run_task
from bench.cli import run_guarded
from bench.config import BackboneSettings, CertificationSettings, DataSettings, TrainingSettings
from bench.data import ArraySplit, data_folder, fetch, load_data
from bench.errors import BenchError
from bench.files import locked, read_json, sha256_json, write_json
from bench.model_folder import (
    ClassifierSpec,
    Identity,
    check_identity,
    load_classifier,
    save_model,
)
from bench.provenance import pick_precision
from bench.smoothing.journal import Journal
from bench.smoothing.log import read_own_log
from bench.tables import build_tables
from bench.training import accuracy, fit
from tests.reliability import PAGE, ROOT, reliability
from tests.test_tables import results  # noqa: F401  (a fixture)

COMPLETED, REFUSED, NO_SPACE = 0, 1, 3
Work = Callable[[], object]


def in_child(work: Work, prepare: Work) -> int:
    """Exit status of a forked child that runs `work` after `prepare`, as `os.waitpid` has it."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    code = REFUSED
    try:
        prepare()
        run_guarded(work)  # type: ignore[arg-type]
        code = COMPLETED
    except SystemExit as exit_:
        code = NO_SPACE if "no space left" in str(exit_) else REFUSED
    finally:
        os._exit(code)


def killed_at(moment: int, folder: Path, work: Work) -> bool:
    """Run `work`, with SIGKILL at its `moment`-th use of a file in `folder`; False if it ended."""
    used = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal used
        if event not in ("open", "os.rename", "os.remove", "shutil.move", "os.rmdir"):
            return
        if any(isinstance(a, str | Path) and str(folder) in str(a) for a in arguments):
            used += 1
            if used == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    status = in_child(work, lambda: sys.addaudithook(hook))
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == COMPLETED
    return os.WIFSIGNALED(status)


def limit_files(size: int, action: signal.Handlers) -> None:
    """Files cannot exceed `size` bytes: writing on fails, as on a full disk, or kills."""
    signal.signal(signal.SIGXFSZ, action)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def on_a_full_disk(size: int, work: Work) -> int:
    """Exit code of `work` where files of more than `size` bytes do not fit."""
    return os.WEXITSTATUS(in_child(work, lambda: limit_files(size, signal.SIG_IGN)))


def test_ctrl_c_ends_a_command_whose_libraries_swallow_it():
    def swallow():
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.monotonic()  # a handler in Python runs between two steps of the interpreter

    def as_in_a_terminal():
        signal.signal(signal.SIGINT, signal.default_int_handler)

    status = in_child(swallow, as_in_a_terminal)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGINT


# --- Certification -------------------------------------------------------------------------


class Stripes(Classifier):
    """Class 1 where the mean pixel exceeds one half, row by row."""

    def __init__(self, fits: int = 10**9, wrong: float | None = None) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.ones(1))
        self.fits, self.wrong, self.calls = fits, wrong, 0

    def for_inference(self, precision: str) -> "Stripes":
        return self.eval()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > self.fits:
            self.refused = weakref.ref(pixels)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.calls += 1
        score = pixels.flatten(1).mean(1) - 0.5
        if self.wrong is not None:
            score = torch.full_like(score, self.wrong)
        return torch.stack([-score, score], dim=1)


def task(classifier: Classifier | None = None, sigma: float = 0.5, **changes: object) -> Task:
    """Six images of two pixels, certified with 1,000 draws each."""
    values = {"mode": "cohen", "n": 1000, "batch_size": 256, "test_images": 6, **changes}
    settings = CertificationSettings.model_validate(values)
    shades = torch.linspace(0, 255, 6).round().to(torch.uint8)
    test = ArraySplit(shades.repeat_interleave(2).reshape(6, 1, 1, 2), torch.tensor([0, 1] * 3))
    return Task(
        classifier=classifier or Stripes(),
        model_sha256="m",
        test=test,
        classes=2,
        data_sha256="d",
        wanted=torch.arange(6),
        protocol=protocol_of(settings, "test", sigma, 0, 0.25, 6),
        settings=settings,
        names={"method": "m", "sigma": sigma, "seed": 0},
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The log of a run that nothing disturbed, without its times."""
    return certified(tmp_path_factory.mktemp("whole") / "log.tsv")


def certified(output: Path, **changes: object) -> pd.DataFrame:
    """Certify and read back; the times left out."""
    run_task(task(**changes), output)
    return read_own_log(output)[1].drop(columns="time")


def equal_or_refused(read: Callable[[], pd.DataFrame], expected: pd.DataFrame) -> None:
    """Reading must find all of `expected` or end in one clear error."""
    try:
        found = read()
    except BenchError:
        return
    pd.testing.assert_frame_equal(found.drop(columns="time", errors="ignore"), expected)


@pytest.mark.fault(
    fault="kill -9 at every use of a file",
    stage="certify",
    outcome="what is there is whole or refused; a rerun completes with the same log",
)
def test_certification_killed_at_every_use_of_a_file(tmp_path, whole):
    moment = 1
    while True:
        output = tmp_path / str(moment) / "log.tsv"
        # Results of another noise level lie there: no mixture may be read.
        run_task(task(sigma=0.25), output)
        other = read_own_log(output)[1].drop(columns="time")
        if not killed_at(moment, output.parent, partial(run_task, task(), output)):
            break
        try:
            protocol, found = read_own_log(output)
        except BenchError:
            pass
        else:
            expected = whole if protocol["sigma"] == 0.5 else other
            pd.testing.assert_frame_equal(found.drop(columns="time"), expected)
        pd.testing.assert_frame_equal(certified(output), whole)
        moment += 1
    # Journal, log, the field's log and sidecar: each opened, each but the first renamed.
    assert moment > 7


def test_progress_shows_a_share_of_images_that_were_not_picked_by_being_fast():
    shown, ids = Progress([0, 2, 4, 6]), iter([6, 2, 0, 4])
    assert shown.text() == ""

    def certificate(idx: int, correct: int) -> SimpleNamespace:
        return SimpleNamespace(idx=idx, correct=correct, samples=100)

    for correct in (0, 0):
        shown.add(certificate(next(ids), correct))  # type: ignore[arg-type]
    assert shown.text() == "100 samples per image"
    shown.add(certificate(next(ids), 1))  # type: ignore[arg-type]
    assert shown.text().startswith("certified 50.0 % [1.3, 98.7] of the first 2,")
    shown.add(certificate(next(ids), 1))  # type: ignore[arg-type]
    assert shown.text().startswith("certified 50.0 % [6.8, 93.2] of the first 4,")


def test_votes_where_nothing_may_be_written_are_one_error(tmp_path, monkeypatch):
    def refused(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied", "log.votes.jsonl")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(BenchError, match=r"votes\.jsonl cannot be written: Permission denied"):
        Journal(tmp_path / "log.votes.jsonl", "meaning")


@pytest.mark.parametrize(
    "part", ["model", "data", "noise", "code", "versions", "machine", "precision"]
)
def test_votes_of_something_else_are_not_continued(part, tmp_path, monkeypatch):
    """Votes that certify nothing lie there; a run that took them up would certify nothing."""
    output = tmp_path / "log.tsv"
    run_task(task(Stripes(wrong=float("nan"))), output)
    assert not (certified(output)["predict"] >= 0).any()
    changed = task()
    if part in ("model", "data"):
        changed = replace(changed, **{f"{part}_sha256": "another"})
    elif part == "noise":
        changed = replace(
            changed, protocol=replace(changed.protocol, seed=changed.protocol.seed + 1)
        )
    elif part == "code":
        monkeypatch.setattr("bench.certification.code_sha256", lambda files: "another")
    elif part == "precision":
        other = {"float32": "bfloat16"}.get(pick_precision("auto", torch.device("cpu")), "float32")
        settings = changed.settings.model_copy(update={"precision": other})
        changed = replace(changed, settings=settings)
    elif part == "machine":
        monkeypatch.setattr("bench.certification.machine", lambda device: "another")
    else:
        monkeypatch.setattr("bench.provenance.versions", lambda: {"torch": "another"})
    run_task(changed, output)
    run_task(changed, tmp_path / "fresh.tsv")
    found, fresh = (
        read_own_log(tmp_path / name)[1].drop(columns="time") for name in ("log.tsv", "fresh.tsv")
    )
    assert (fresh["predict"] >= 0).any()
    pd.testing.assert_frame_equal(found, fresh)
    assert len(list(tmp_path.glob("log.votes.jsonl.*"))) == 1


def test_a_compiled_network_is_compiled_for_its_batches_and_has_votes_of_its_own(
    tmp_path, monkeypatch
):
    shapes, output = [], tmp_path / "log.tsv"
    monkeypatch.setattr(
        "bench.certification.compile_for_inference",
        lambda classifier, batch: shapes.append(tuple(batch.shape)),
    )
    run_task(task(Stripes(wrong=float("nan"))), output)
    assert shapes == []
    run_task(task(Stripes(fits=128), compile=True), output)
    protocol, log = read_own_log(output)
    assert shapes == [(256, 1, 1, 2), (128, 1, 1, 2)]
    assert (protocol["compile"], protocol["batch_size"]) == ("inductor", 128)
    assert (log["predict"] >= 0).any()


@pytest.mark.fault(
    fault="kill in the middle of a write",
    stage="certify",
    outcome="a rerun continues from the whole rounds and finds the same log",
)
@pytest.mark.fault(
    fault="full disk",
    stage="certify",
    outcome="one line names the folder; a rerun completes with the same log",
)
def test_certification_interrupted_at_any_byte(tmp_path, whole):
    chance = random.Random(1)
    for case in range(8):
        output = tmp_path / str(case) / "log.tsv"
        size = chance.randrange(1, 1500)
        kill = case % 2 == 0
        limit = partial(limit_files, size, signal.SIG_DFL if kill else signal.SIG_IGN)
        status = in_child(partial(run_task, task(), output), limit)
        assert os.WIFSIGNALED(status) if kill else os.WEXITSTATUS(status) == NO_SPACE
        assert not output.with_suffix(".json").exists()
        pd.testing.assert_frame_equal(certified(output), whole)


@pytest.mark.fault(
    fault="votes cut, or a random bit of them changed",
    stage="certify",
    outcome="refused by checksum, or drawn again",
)
def test_no_changed_byte_of_the_votes_reaches_a_certificate(tmp_path, whole):
    chance, output = random.Random(2), tmp_path / "log.tsv"
    run_task(task(), output)
    votes = output.with_suffix(".votes.jsonl")
    content = votes.read_bytes()
    refused = 0
    for case in range(40):
        place = chance.randrange(len(content))
        changed = bytearray(content)
        changed[place] ^= 1 << chance.randrange(8)
        votes.write_bytes(content[:place] if case % 4 == 0 else changed)
        try:
            pd.testing.assert_frame_equal(certified(output), whole)
        except BenchError:
            refused += 1
    assert refused > 20


@pytest.mark.fault(
    fault="out of memory",
    stage="certify",
    outcome="batches are halved until they fit; the log is that of a run with such batches",
)
def test_batches_are_halved_until_they_fit(tmp_path, monkeypatch):
    released = []

    def reset() -> None:
        released.append(asked.refused())  # the batch that did not fit, unless nothing holds it

    monkeypatch.setattr("bench.memory.torch.compiler.reset", reset)
    asked, small = Stripes(fits=100), tmp_path / "small.tsv"
    run_task(task(asked), tmp_path / "log.tsv")
    # Of 256, then of 128 images.
    assert released == [None, None]
    run_task(task(batch_size=64), small)
    logs, sidecars = [], []
    for path in (tmp_path / "log.tsv", small):
        protocol, log = read_own_log(path)
        logs.append(log.drop(columns="time"))
        sidecars.append({k: v for k, v in protocol.items() if k not in ("seconds", "log_sha256")})
        text = path.with_suffix(".votes.jsonl").read_text()
        assert len(text.splitlines()) > 6
    pd.testing.assert_frame_equal(*logs)
    assert sidecars[0] == sidecars[1]
    assert sidecars[0]["batch_size"] == 64
    # A rerun goes on from those votes, though the larger batches would fit it now.
    again = Stripes()
    run_task(task(again), tmp_path / "log.tsv")
    assert again.calls == 1
    assert read_own_log(tmp_path / "log.tsv")[0]["batch_size"] == 64


@pytest.mark.fault(
    fault="out of memory at any batch size",
    stage="certify",
    outcome="one line",
)
def test_no_batch_fits(tmp_path):
    with pytest.raises(BenchError, match="even for batches of 32"):
        run_task(task(Stripes(fits=31)), tmp_path / "log.tsv")


@pytest.mark.fault(
    fault="out of memory after batches had fit",
    stage="certify",
    outcome="one line; a rerun continues from the votes that are kept",
)
def test_memory_that_others_take_later_mixes_no_batch_shapes(tmp_path, whole, monkeypatch):
    monkeypatch.setattr("bench.smoothing.engine.ROUND_BATCHES", 4)
    output, classifier = tmp_path / "log.tsv", Stripes()
    forward = classifier.forward

    def crowded(pixels: torch.Tensor) -> torch.Tensor:
        if classifier.calls > 10:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(pixels)

    monkeypatch.setattr(classifier, "forward", crowded)
    with pytest.raises(BenchError, match="did fit before"):
        run_task(task(classifier), output)
    votes = output.with_suffix(".votes.jsonl").read_bytes()
    pd.testing.assert_frame_equal(certified(output), whole)
    assert output.with_suffix(".votes.jsonl").read_bytes().startswith(votes)


@pytest.mark.fault(
    fault="other errors of the network",
    stage="certify",
    outcome="raised as they are, no batch is halved",
)
def test_other_errors_are_not_taken_for_memory(tmp_path, monkeypatch):
    classifier = Stripes()

    def broken(pixels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(classifier, "forward", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        run_task(task(classifier), tmp_path / "log.tsv")


@pytest.mark.fault(
    fault="model returns non-finite logits",
    stage="certify",
    outcome="each such draw votes for nobody; the log counts them; nothing is certified",
)
def test_a_model_of_non_finite_logits_is_certified_nowhere(tmp_path):
    log = certified(tmp_path / "log.tsv", classifier=Stripes(wrong=float("nan")))
    assert (log["predict"] == -1).all()
    assert (log["clean_predict"] == 2).all()
    assert read_json(tmp_path / "log.json")["non_finite_votes"] == 6 * 1000


@pytest.mark.fault(
    fault="clock jumps back and forth",
    stage="certify",
    outcome="the same log; durations stay positive",
)
def test_a_jumping_clock_changes_nothing(tmp_path, whole, monkeypatch):
    chance = random.Random(3)
    monkeypatch.setattr(time, "time", lambda: chance.uniform(-1e9, 4e9))
    monkeypatch.setattr(time, "time_ns", lambda: int(chance.uniform(0, 4e18)))
    output, begin = tmp_path / "log.tsv", time.perf_counter()
    pd.testing.assert_frame_equal(certified(output), whole)
    times, whole_time = read_own_log(output)[1]["time"], time.perf_counter() - begin
    assert times.between(0, whole_time, inclusive="neither").all()


@pytest.mark.fault(
    fault="clock jumps back and forth",
    stage="every stage",
    outcome="no code reads the time of day",
)
def test_no_duration_comes_from_the_time_of_day():
    clocks = {"time", "time_ns", "now", "today", "utcnow", "localtime", "gmtime"}
    for path in [*ROOT.glob("bench/**/*.py"), *ROOT.glob("baselines/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                wall = owner in ("time", "datetime", "datetime.datetime", "date", "datetime.date")
                assert not (wall and node.func.attr in clocks), f"{path}:{node.lineno}"


@pytest.mark.fault(
    fault="two runs write one log",
    stage="certify",
    outcome="the second ends in one line, the first goes on",
)
def test_a_second_certification_of_one_log_is_refused(tmp_path, whole, monkeypatch):
    output, classifier = tmp_path / "log.tsv", Stripes()
    forward, complaints = classifier.forward, []

    def answer(pixels: torch.Tensor) -> torch.Tensor:
        if classifier.calls == 3:
            with pytest.raises(BenchError, match="another run") as refused:
                run_task(task(), output)
            complaints.append(str(refused.value))
        return forward(pixels)

    monkeypatch.setattr(classifier, "forward", answer)
    pd.testing.assert_frame_equal(certified(output, classifier=classifier), whole)
    assert len(complaints) == 1
    assert "\n" not in complaints[0]


# --- Logs ----------------------------------------------------------------------------------


@pytest.mark.fault(
    fault="log cut, or a random bit of it changed",
    stage="gather, tables",
    outcome="refused: the hash in its JSON differs",
)
@pytest.mark.fault(
    fault="JSON of a log cut, or a random bit of it changed",
    stage="gather, tables",
    outcome="refused: it has a hash of its own",
)
def test_no_changed_byte_of_a_log_or_its_json_is_read(tmp_path, whole):
    chance, output = random.Random(4), tmp_path / "log.tsv"
    run_task(task(), output)
    protocol = read_own_log(output)[0]
    for path in (output, output.with_suffix(".json")):
        content = path.read_bytes()
        for case in range(60):
            place = chance.randrange(len(content) - 1)
            changed = bytearray(content)
            changed[place] ^= 1 << chance.randrange(7)
            path.write_bytes(content[:place] if case % 4 == 0 else changed)
            try:
                found = read_own_log(output)
            except BenchError:
                continue
            # Blanks of a JSON mean nothing, and its last key is the hash itself.
            assert path.suffix == ".json"
            kept = {k: v for k, v in found[0].items() if not k.startswith("content_")}
            assert {k: v for k, v in kept.items() if k in protocol} == protocol
        path.write_bytes(content)
    pd.testing.assert_frame_equal(read_own_log(output)[1].drop(columns="time"), whole)


@pytest.mark.fault(
    fault="kill -9 at every use of a file",
    stage="gather",
    outcome="what is there is whole or refused; a rerun completes with the same log",
)
def test_gathering_killed_at_every_use_of_a_file(tmp_path, whole):
    shards = []
    for shard in (0, 1):
        wanted = torch.arange(6)[shard::2]
        shards.append(tmp_path / f"{shard}.tsv")
        names = {**task().names, "all_images_sha256": sha256_json(list(range(6)))}
        run_task(replace(task(), wanted=wanted, names=names), shards[-1])
    output, moment = tmp_path / "gathered/log.tsv", 1
    with pytest.raises(BenchError, match="lack images of the run"):
        gather(shards[:1], output)
    for wrong, why in ((output.with_suffix(".json"), "must end in"), (shards[1], "is one of")):
        with pytest.raises(BenchError, match=why):
            gather(shards, wrong)
    assert not output.exists()
    while killed_at(moment, output.parent, lambda: gather(shards, output)):
        equal_or_refused(lambda: read_own_log(output)[1], whole)
        moment += 1
    assert moment > 6
    pd.testing.assert_frame_equal(read_own_log(output)[1].drop(columns="time"), whole)


# --- Model folders -------------------------------------------------------------------------

LENET = BackboneSettings(timm="lenet")
SPEC = ClassifierSpec(data="d", classes=3, channels=1, backbone=LENET)
PIXELS = torch.linspace(0, 1, 2 * 28 * 28).reshape(2, 1, 28, 28)


@pytest.fixture(scope="module")
def lenets() -> list[Classifier]:
    """Two networks of one shape and different weights."""
    torch.manual_seed(0)
    return [create_classifier(LENET, 3, 1).eval() for _ in range(2)]


def identity(method: str) -> Identity:
    return Identity(experiment="e", method=method, sigma=0.5, seed=0, fingerprint=method)


def save(folder: Path, classifier: Classifier, method: str) -> None:
    save_model(folder, classifier, SPEC, identity(method), {"flops": 1}, {"loss_curve": []})


def answers(folder: Path, method: str) -> torch.Tensor | None:
    """What the model of a method answers, None where the folder is refused."""
    try:
        check_identity(folder, identity(method))
        with torch.no_grad():
            return load_classifier(folder)(PIXELS)
    except BenchError:
        return None


@pytest.mark.fault(
    fault="kill -9 at every use of a file",
    stage="pretrain, train",
    outcome="the folder is whole or refused, never a mixture of two; a rerun completes",
)
def test_saving_a_model_killed_at_every_use_of_a_file(tmp_path, lenets):
    with torch.no_grad():
        old, new = (lenet(PIXELS) for lenet in lenets)
    moment, refused = 1, 0
    while True:
        save(tmp_path, lenets[0], "old")
        if not killed_at(moment, tmp_path, lambda: save(tmp_path, lenets[1], "new")):
            break
        for method, expected in (("old", old), ("new", new)):
            found = answers(tmp_path, method)
            refused += found is None
            assert found is None or torch.equal(found, expected)
        moment += 1
    assert moment > 8
    assert refused > moment
    assert torch.equal(answers(tmp_path, "new"), new)
    assert not list(tmp_path.rglob(".partial-*"))


@pytest.mark.fault(
    fault="full disk",
    stage="pretrain, train",
    outcome="one line names the folder; what it held is refused or whole; a rerun completes",
)
def test_saving_a_model_on_a_full_disk(tmp_path, lenets):
    for size in (100, 100_000):
        assert on_a_full_disk(size, lambda: save(tmp_path, lenets[0], "m")) == NO_SPACE
        assert answers(tmp_path, "m") is None
    save(tmp_path, lenets[0], "m")
    assert answers(tmp_path, "m") is not None


def unchanged_or_refused(path: Path, expected: dict[str, object]) -> None:
    """Reading must find `expected`, beside a hash of another name, or end in one clear error."""
    with contextlib.suppress(BenchError):
        assert expected.items() <= read_json(path).items()


@pytest.mark.fault(
    fault="any file of a model folder cut, or a random bit of it changed",
    stage="train, certify",
    outcome="refused: weights and JSON have hashes",
)
def test_no_changed_byte_of_a_model_folder_is_loaded(tmp_path, lenets):
    chance = random.Random(5)
    save(tmp_path, lenets[0], "m")
    expected = answers(tmp_path, "m")
    for name in ("model.safetensors", "classifier.json", "training.json", "cost.json"):
        path, cases = tmp_path / name, 4 if name.startswith("model") else 20
        content = path.read_bytes()
        for case in range(cases):
            place = chance.randrange(len(content) - 1)
            changed = bytearray(content)
            changed[place] ^= 1 << chance.randrange(7)
            path.write_bytes(content[:place] if case % 4 == 0 else changed)
            found = answers(tmp_path, "m")
            assert found is None or torch.equal(found, expected), name
            if name == "cost.json":
                unchanged_or_refused(path, {**identity("m").model_dump(), "flops": 1})
        path.write_bytes(content)


@pytest.mark.fault(
    fault="two runs write one folder",
    stage="train, tables",
    outcome="the second ends in one line",
)
def test_a_folder_that_another_run_writes_is_left_alone(tmp_path, lenets, request):
    save(tmp_path, lenets[0], "m")
    expected = answers(tmp_path, "m")
    with locked(tmp_path), pytest.raises(BenchError, match="another run"):
        save(tmp_path, lenets[1], "m")
    assert torch.equal(answers(tmp_path, "m"), expected)
    tables = tmp_path / "tables"
    found = request.getfixturevalue("results")
    with locked(tables), pytest.raises(BenchError, match="another run"):
        build_tables(*found, tables)


# --- Training ------------------------------------------------------------------------------

IMAGES = ArraySplit(torch.zeros(400, 1, 1, 1, dtype=torch.uint8), torch.zeros(400).long())


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


def train_with(loss: Callable[[nn.Module, int], torch.Tensor]) -> nn.Module:
    """A weight after 200 steps of a loss of (module, step)."""
    module, step = Weight(), 0

    def value(*batch: object) -> torch.Tensor:
        nonlocal step
        step += 1
        return loss(module, step)

    fit(module, value, IMAGES, TrainingSettings(images=400, batch_size=2), 0.1, 0)
    return module


@pytest.mark.fault(
    fault="NaN loss",
    stage="pretrain, train",
    outcome="one line names step and learning rate; no model is written",
)
@pytest.mark.parametrize("at", [1, 2, 199])
def test_a_loss_that_is_not_a_number_ends_training(at):
    def loss(module: nn.Module, step: int) -> torch.Tensor:
        return module.weight.sum() * (float("nan") if step == at else 1)

    with pytest.raises(BenchError, match="loss is nan at step"):
        train_with(loss)


@pytest.mark.fault(
    fault="gradient not finite at the last step",
    stage="pretrain, train",
    outcome="one line; no model is written",
)
def test_weights_that_are_not_finite_are_never_saved(tmp_path, lenets):
    def loss(module: nn.Module, step: int) -> torch.Tensor:
        # The square root has no slope at 0.
        here = module.weight.sum()
        return here if step < 200 else (here - here.detach()).abs().sqrt()

    module = train_with(loss)
    assert module.weight.isnan().all()
    classifier = create_classifier(LENET, 3, 1)
    with torch.no_grad():
        next(classifier.network.parameters())[0] = module.weight.item()
    with pytest.raises(BenchError, match="not finite: lower learning_rate"):
        save(tmp_path, classifier, "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(
    fault="model returns non-finite logits",
    stage="validation, tuning",
    outcome="counts as a wrong answer",
)
def test_an_answer_that_is_not_a_number_is_wrong():
    test = ArraySplit(torch.zeros(6, 1, 1, 2, dtype=torch.uint8), torch.zeros(6).long())
    assert accuracy(Stripes(), test) == 1.0
    assert accuracy(Stripes(wrong=float("nan")), test) == 0.0


def test_a_validation_in_halves_sees_the_noise_of_a_whole_one():
    class Seen(Stripes):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            answers = super().forward(pixels)
            seen.append(pixels)
            return answers

    split = ArraySplit(torch.zeros(1100, 1, 3, 3, dtype=torch.uint8), torch.zeros(1100).long())
    inputs = []
    for fits in (500, 130):
        seen: list[torch.Tensor] = []
        accuracy(Seen(fits), split, sigma=0.5)
        inputs.append(torch.cat(seen))
        assert len(seen[-1]) == 100  # of 1,100, in any case
        assert len(seen) == {500: 3, 130: 9}[fits]
    assert torch.equal(*inputs)


def of_another(error: Exception, cause: Exception) -> Exception:
    error.__context__ = cause
    return error


@pytest.mark.fault(
    fault="out of memory",
    stage="pretrain, train",
    outcome="one line that names the key; batches are not split unasked",
)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError("no"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
        RuntimeError("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"),
        of_another(RuntimeError("CUDA error: operation failed"), torch.OutOfMemoryError("no")),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_training_out_of_memory_is_one_line(error):
    def loss(module: nn.Module, step: int) -> torch.Tensor:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_guarded(lambda: train_with(loss))
    assert str(ended.value).startswith("error: out of memory")
    assert "micro_batch_size of `pretrain` or `training`" in str(ended.value)


def test_what_the_cpu_cannot_allocate_is_memory_running_out():
    with pytest.raises(SystemExit, match="out of memory"):
        run_guarded(lambda: torch.empty(10**16))


# --- Data ----------------------------------------------------------------------------------

CIFAR = DataSettings(name="cifar10", directory="data", validation_images=10)


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny archive in the place and form of CIFAR-10's."""
    monkeypatch.chdir(tmp_path)
    rng, packed = np.random.default_rng(0), io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as members:
        for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
            rows = rng.integers(0, 10, (10, 3073), dtype=np.uint8).tobytes()
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(rows)
            members.addfile(member, io.BytesIO(rows))
    path = data_folder(CIFAR) / "cifar-10-binary.tar.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(packed.getvalue())
    monkeypatch.setitem(
        sys.modules["bench.data"].CIFAR_MD5, "cifar10", md5(packed.getvalue()).hexdigest()
    )
    return path


def ten_images() -> torch.Tensor:
    return load_data(CIFAR).test.batch(torch.arange(10))


@pytest.mark.fault(
    fault="kill -9 at every use of a file",
    stage="fetch",
    outcome="the data set is whole or refused; fetching again completes it",
)
def test_fetching_killed_at_every_use_of_a_file(archive):
    moment = 1
    while killed_at(moment, Path("data"), lambda: fetch(CIFAR)):
        with pytest.raises(BenchError, match="missing"):
            load_data(CIFAR)
        moment += 1
    assert moment > 14
    assert ten_images().shape == (10, 3, 32, 32)


@pytest.mark.fault(
    fault="full disk",
    stage="fetch",
    outcome="one line; fetching again completes",
)
@pytest.mark.fault(
    fault="tampered or cut data file",
    stage="fetch, train, certify",
    outcome="refused by hash or length; fetching again repairs what has a source",
)
def test_data_that_is_cut_or_changed_is_refused_and_repaired(archive):
    assert on_a_full_disk(5000, lambda: fetch(CIFAR)) == NO_SPACE
    fetch(CIFAR)
    expected = ten_images()
    path = data_folder(CIFAR) / "test_batch.bin"
    content = path.read_bytes()
    for damaged in (content[:-1], b"", content[:50] + b"\xff" + content[51:]):
        path.write_bytes(damaged)
        with pytest.raises(BenchError, match=r"test_batch\.bin is missing or changed"):
            load_data(CIFAR)
        if len(damaged) < len(content):
            fetch(CIFAR)
            assert torch.equal(ten_images(), expected)
    path.unlink()
    archive.write_bytes(archive.read_bytes()[:-9])
    with pytest.raises(BenchError, match="corrupt"):
        fetch(CIFAR)


# --- Tables --------------------------------------------------------------------------------


@pytest.mark.fault(
    fault="kill -9 at every use of a file",
    stage="tables",
    outcome="each table is whole or not there; a rerun completes with the same tables",
)
@pytest.mark.fault(
    fault="full disk",
    stage="tables",
    outcome="one line; each table is whole or not there",
)
def test_tables_killed_at_every_use_of_a_file(tmp_path, request):
    found, tables = request.getfixturevalue("results"), tmp_path / "tables"
    build_tables(*found, tmp_path / "whole")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}

    def written() -> dict[str, bytes]:
        return {
            path.name: path.read_bytes() for path in tables.iterdir() if path.suffix != ".partial"
        }

    def work() -> None:
        build_tables(*found, tables)

    for moment in (1, 2, 3, 7, 14):
        assert killed_at(moment, tables, work)
        assert written().items() <= whole.items()
        for path in tables.iterdir():
            path.unlink()
    assert on_a_full_disk(300, work) == NO_SPACE
    assert written().items() <= whole.items()
    work()
    assert written() == whole


# --- The page ------------------------------------------------------------------------------


def test_the_reliability_page_is_that_of_the_tests():
    assert PAGE.read_text() == reliability(), "run: python -m tests.reliability"


def test_a_sealed_file_reads_as_it_was_written(tmp_path):
    path = tmp_path / "some.json"
    value = {"b": [1, 2.5, None], "a": {"10": "x", "9": float("inf")}}
    write_json(path, value)
    assert read_json(path) == value
    path.write_text('{"written": "by hand"}')
    assert read_json(path) == {"written": "by hand"}
