"""The certificate: closed forms, error rates that can fail, independence of scheduling."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest, kstest, norm
from torch import nn

from bench.backbones import create_classifier
from bench.config import BackboneSettings
from bench.errors import BenchError
from bench.smoothing import Protocol, certify, reachable_radii, rules
from bench.smoothing.bounds import certified_radius, p_a_lower, radius_cap
from bench.smoothing.journal import Journal, checked
from bench.smoothing.noise import BLOCK, key_tensor, noise_key, standard_normal, without_nan
from bench.smoothing.rules import plan_of
from bench.smoothing.voting import count_votes, items_of

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SHAPE = (1, 4, 4)
MODES = ["decide", "cohen", "radius", "predict"]


class Linear(nn.Module):
    """Class 1 where w.x + b > 0: its smoothed radius is |w.x + b| / ||w|| exactly."""

    def __init__(self, dimension: int = 16):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(dimension, generator=generator))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        # Row by row: a matrix product may round rows differently at another batch shape.
        score = (pixels.flatten(1) * self.weight).sum(dim=1)
        return torch.stack([-score, score], dim=1)


def protocol(**changes) -> Protocol:
    values = {"sigma": 0.5, "mode": "cohen", "n": 1000, "seed": 7, "data": "test"}
    values |= {"batch_size": 256, "horizon": 100_000} | changes
    radii = reachable_radii(0.125, values["sigma"], values["n"], values.get("alpha", 0.001))
    return Protocol(**{"radii": radii, **values})


def certificates(images, settings, ids=None, model=None, labels=None, journal=None):
    """Certificates in the order of the ids, the time column set to 0."""
    ids = ids or list(range(len(images)))
    labels = labels or [1] * len(ids)
    found = certify((model or Linear()).eval(), images, labels, ids, settings, 2, journal)
    rows = [{**asdict(certificate), "time": 0.0} for certificate in found]
    return sorted(rows, key=lambda row: row["idx"])


@pytest.mark.parametrize("n", [1, 10, 1000])
def test_the_bound_is_clopper_pearson_for_every_count(n):
    for n_a in range(n + 1):
        exact = binomtest(n_a, n, alternative="greater").proportion_ci(0.999, "exact").low
        assert p_a_lower(n_a, n, 0.001) == pytest.approx(exact, abs=1e-12)


def test_no_votes_and_bad_counts_never_certify():
    assert p_a_lower(0, 100, 0.001) == 0.0
    assert certified_radius(float("nan"), 0.5) is None
    assert certified_radius(0.5, 0.5) is None
    with pytest.raises(ValueError, match="n_a"):
        p_a_lower(11, 10, 0.001)


def test_cap_is_the_radius_of_equal_votes():
    assert radius_cap(100_000, 0.001, 1.0) == pytest.approx(3.8115, abs=5e-5)
    reached = certified_radius(p_a_lower(1000, 1000, 0.001), 0.25)
    assert reached == pytest.approx(radius_cap(1000, 0.001, 0.25), rel=1e-9)


@pytest.mark.parametrize("mode", ["decide", "cohen", "radius"])
def test_certified_radius_stays_below_the_exact_one_and_gets_near(mode):
    images = torch.rand(40, *SHAPE, generator=torch.Generator().manual_seed(1))
    model = Linear()
    score = (images.flatten(1) @ model.weight.detach()).numpy()
    exact = np.abs(score) / model.weight.norm().item()
    found = certificates(images, protocol(mode=mode, n=10_000))
    right = [row["predict"] == int(value > 0) for row, value in zip(found, score, strict=True)]
    assert sum(right) > 30
    kept = [(row["radius"], r) for row, r, ok in zip(found, exact, right, strict=True) if ok]
    # 40 certificates, each wrong with probability 0.001.
    assert sum(radius > r for radius, r in kept) <= 1
    slack = 0.25 if mode == "decide" else 0.1
    assert all(radius > r - slack for radius, r in kept if 0.1 < r < 1.2)


@pytest.mark.parametrize("mode", ["decide", "radius"])
def test_adaptive_modes_draw_less(mode):
    images = torch.rand(40, *SHAPE, generator=torch.Generator().manual_seed(1))
    found = certificates(images, protocol(mode=mode, n=10_000, tolerance=0.05))
    assert np.mean([row["samples"] for row in found]) < 0.6 * 10_100


def test_other_devices_fill_their_noise_in_one_stream(monkeypatch):
    """Threads have CUDA streams of their own."""
    monkeypatch.setattr("bench.smoothing.noise.ThreadPoolExecutor", pytest.fail)
    draws = standard_normal(torch.empty(3, dtype=torch.uint64, device="meta"), SHAPE)
    assert (draws.shape, draws.is_meta) == ((3 * BLOCK, *SHAPE), True)


def test_numbers_that_are_none_become_0_and_infinite_ones_stay():
    draws = without_nan(torch.tensor([np.nan, np.inf, -np.inf, 0.5]))
    assert draws.tolist() == [0.0, np.inf, -np.inf, 0.5]


class Biased(nn.Module):
    """Votes class 0 with probability exactly p under noise: threshold on one pixel."""

    def __init__(self, p: float):
        super().__init__()
        self.threshold = float(norm.ppf(p)) * 0.5

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        score = self.threshold - pixels[:, 0, 0, 0]
        return torch.stack([score, -score], dim=1)


RUNS, ALPHA = 2000, 0.05
MOST_FALSE = binom.isf(1e-4, RUNS, ALPHA)


def false_claims(mode: str, p: float) -> int:
    """How many of `RUNS` certificates at error probability `ALPHA` claim too much.

    They are more than are in flight at once.
    """
    exact = 0.5 * norm.ppf(p)
    grid = (0.0, exact) if exact else (0.0, 0.1)
    # A pilot as long as the test, so that its votes would count if they slipped in.
    settings = protocol(mode=mode, n0=128, n=128, alpha=ALPHA, radii=grid, batch_size=4096)
    found = certificates(torch.zeros(RUNS, *SHAPE), settings, model=Biased(p))
    assert [row["idx"] for row in found] == list(range(RUNS))
    # The test at r claims p > Phi(r / sigma), which is false at r = exact.
    false = sum(row["predict"] == 0 and row["radius"] >= exact for row in found)
    return false + sum(row["predict"] == 1 for row in found)


@pytest.mark.parametrize("mode", ["decide", "cohen", "radius"])
@pytest.mark.parametrize("p", [0.5, 0.8])
def test_engine_claims_more_than_p_no_oftener_than_alpha(mode, p):
    assert 0 < false_claims(mode, p) <= MOST_FALSE


@pytest.mark.parametrize("mode", ["cohen", "radius"])
def test_adding_the_pilots_votes_to_the_estimation_is_caught(mode, monkeypatch):
    """Negative control: importance of fresh draws, in the engine itself."""
    bound = rules._clopper_pearson

    def reusing(tally, settings):
        both = {"votes": tally.votes + tally.selection, "drawn": tally.drawn + tally.piloted}
        return bound(replace(tally, **both), settings)

    monkeypatch.setattr(rules, "_clopper_pearson", reusing)
    assert false_claims(mode, 0.5) > MOST_FALSE


def test_prediction_abstains_at_a_tie_and_answers_where_it_is_sure():
    assert 0 < false_claims("predict", 0.5) <= MOST_FALSE
    settings = protocol(mode="predict", n=1000, alpha=0.05)
    sure = certificates(torch.zeros(20, *SHAPE), settings, model=Biased(0.8))
    assert [row["predict"] for row in sure] == [0] * 20


def test_a_one_sided_test_of_predictions_is_caught(monkeypatch):
    """Negative control: the votes choose the class that they test, so both sides count."""
    one_sided = SimpleNamespace(sf=lambda *arguments: binom.sf(*arguments) / 2)
    monkeypatch.setattr(rules, "binom", one_sided)
    assert false_claims("predict", 0.5) > MOST_FALSE


def test_the_label_as_candidate_saves_the_pilot():
    images = torch.zeros(10, *SHAPE)
    wrong = certificates(images, protocol(mode="decide", candidate="label"), model=Biased(0.8))
    assert {row["predict"] for row in wrong} == {-1}
    labels = [0] * 10
    settings = protocol(mode="decide", candidate="label")
    right = certificates(images, settings, model=Biased(0.8), labels=labels)
    assert {row["predict"] for row in right} == {0}
    assert {row["n0"] for row in right} == {0}


@pytest.mark.parametrize(("label", "share"), [(0, 0.8), (1, 0.2)])
def test_the_pilot_counts_votes_for_the_label_whoever_wins(label, share):
    images = torch.zeros(4, *SHAPE)
    rows = certificates(images, protocol(n0=4096), model=Biased(0.8), labels=[label] * 4)
    assert {row["candidate"] for row in rows} == {0}
    assert [row["n0_label"] / row["n0"] for row in rows] == pytest.approx([share] * 4, abs=0.03)


def test_alpha_over_the_data_set_certifies_less():
    images = torch.zeros(20, *SHAPE)
    alone = certificates(images, protocol(), model=Biased(0.9))
    shared = certificates(images, protocol(family_size=20), model=Biased(0.9))
    for one, other in zip(alone, shared, strict=True):
        assert other["radius"] < one["radius"]


def test_alpha_over_the_data_set_answers_less():
    """Some 200 of 300 votes are surer than 0.001, and not than that over so many images."""
    images = torch.zeros(20, *SHAPE)
    settings = protocol(mode="predict", n=300)
    alone = certificates(images, settings, model=Biased(0.66))
    shared = certificates(images, replace(settings, family_size=10**12), model=Biased(0.66))
    assert {row["predict"] for row in alone} == {0}
    assert {row["predict"] for row in shared} == {-1}


@pytest.mark.parametrize("mode", MODES)
def test_results_do_not_depend_on_batch_order_or_shard(mode):
    images = torch.rand(23, *SHAPE, generator=torch.Generator().manual_seed(2)) * 0.2
    whole = certificates(images, protocol(mode=mode))
    assert certificates(images, protocol(mode=mode, batch_size=64)) == whole
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0)).tolist()
    assert certificates(images[order], protocol(mode=mode), ids=order) == whole
    sharded = []
    for shard in range(7):
        ids = list(range(shard, 23, 7))
        sharded += certificates(images[ids], protocol(mode=mode), ids=ids)
    assert sorted(sharded, key=lambda row: row["idx"]) == whole


@pytest.mark.parametrize("mode", MODES)
def test_every_batch_has_one_shape(mode):
    """Of images, blocks and draws that do not fill a batch: rounding may depend on its shape."""
    shapes = set()

    class Watched(Linear):
        def forward(self, pixels):
            shapes.add(tuple(pixels.shape))
            return super().forward(pixels)

    images = torch.rand(23, *SHAPE, generator=torch.Generator().manual_seed(2)) * 0.2
    certificates(images, protocol(mode=mode, n0=35, n=77, batch_size=128), model=Watched())
    assert shapes == {(128, *SHAPE)}


def test_a_bfloat16_vits_certificates_do_not_depend_on_order_or_shard():
    torch.manual_seed(0)
    backbone = BackboneSettings(
        timm="vit_tiny_patch16_224",
        arguments={"img_size": 28, "patch_size": 7, "embed_dim": 64, "depth": 2, "num_heads": 2},
    )
    model = create_classifier(backbone, 2, 1).for_inference("bfloat16")
    images = torch.rand(23, 1, 28, 28)
    settings = protocol(mode="decide", sigma=1.0, n=416)
    whole = certificates(images, settings, model=model)
    assert len({row["n_a"] for row in whole}) > 5
    order = torch.randperm(23).tolist()
    assert certificates(images[order], settings, ids=order, model=model) == whole
    sharded = []
    for shard in range(7):
        ids = list(range(shard, 23, 7))
        sharded += certificates(images[ids], settings, ids=ids, model=model)
    assert sorted(sharded, key=lambda row: row["idx"]) == whole


def test_estimation_selection_and_prediction_draw_apart(monkeypatch):
    """Votes that chose a class, or that were seen before an attack, must not be counted again."""
    keyed = {}

    def watched(seed, data, image, domain, block):
        keyed.setdefault(mode, set()).add(noise_key(seed, data, image, domain, block))
        return noise_key(seed, data, image, domain, block)

    monkeypatch.setattr("bench.smoothing.voting.noise_key", watched)
    images = torch.full((3, *SHAPE), 0.5)
    for mode in ("cohen", "predict"):
        certificates(images, protocol(mode=mode, n0=64, n=128))
    selection, estimation = 3 * 64 // BLOCK, 3 * 128 // BLOCK
    assert len(keyed["cohen"]) == selection + estimation
    assert len(keyed["predict"]) == estimation
    assert not keyed["cohen"] & keyed["predict"]


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from bench.smoothing.journal import Journal
from tests.test_smoothing import SHAPE, Linear, protocol
from bench.smoothing import certify
mode, path, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
journal = Journal(path, "same")
append, count = journal.append, 0
def killing(rows):
    global count
    append(rows)
    count += 1
    if count == rounds:
        with path.open("a") as stream:
            stream.write('{"idx": 3, "dom')
        os.kill(os.getpid(), signal.SIGKILL)
journal.append = killing
images = torch.rand(23, *SHAPE, generator=torch.Generator().manual_seed(2)) * 0.2
list(certify(Linear().eval(), images, [1] * 23, list(range(23)), protocol(mode=mode), 2, journal))
"""


@pytest.mark.fault(
    fault="kill -9 after a round, the next line half written",
    stage="certify",
    outcome="a rerun continues to the same certificates",
)
@pytest.mark.parametrize("mode", ["decide", "cohen"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_a_killed_run_continues_to_the_same_certificates(mode, rounds, tmp_path):
    path = tmp_path / "votes.jsonl"
    command = [sys.executable, "-c", KILLED, mode, str(path), str(rounds)]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    images = torch.rand(23, *SHAPE, generator=torch.Generator().manual_seed(2)) * 0.2
    whole = certificates(images, protocol(mode=mode))
    before = len(path.read_text().splitlines())
    assert before > 23
    assert certificates(images, protocol(mode=mode), journal=Journal(path, "same")) == whole


class Forbidden(nn.Module):
    """Answers clean images and fails on noisy ones."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        assert (pixels == 0).all()
        return torch.zeros(len(pixels), 2)


def test_a_finished_journal_needs_no_draw_and_another_meaning_all_of_them(tmp_path, caplog):
    images, path = torch.zeros(4, *SHAPE), tmp_path / "votes.jsonl"
    settings = protocol(mode="decide")
    first = certificates(images, settings, model=Biased(0.8), journal=Journal(path, "a"))
    again = certificates(images, settings, model=Forbidden(), journal=Journal(path, "a"))
    assert [row["radius"] for row in again] == [row["radius"] for row in first]
    kept = path.read_bytes()
    with pytest.raises(AssertionError):
        certificates(images, settings, model=Forbidden(), journal=Journal(path, "b"))
    assert path.with_name("votes.jsonl.a").read_bytes() == kept
    assert "votes.jsonl.a" in caplog.text
    other = certificates(images, settings, model=Biased(0.7), journal=Journal(path, "b"))
    # The machine of before is back: its votes count, and those in between are not lost.
    back = certificates(images, settings, model=Forbidden(), journal=Journal(path, "a"))
    assert [row["radius"] for row in back] == [row["radius"] for row in first]
    again = certificates(images, settings, model=Forbidden(), journal=Journal(path, "b"))
    assert [row["n_a"] for row in again] == [row["n_a"] for row in other]


def test_a_finished_run_extends_to_what_a_longer_one_finds(tmp_path):
    images = torch.rand(23, *SHAPE, generator=torch.Generator().manual_seed(1))
    path = tmp_path / "votes.jsonl"
    plan = {"mode": "decide", "reserve_at": 1000, "radii": reachable_radii(0.125, 0.5, 4000, 1e-3)}
    short = certificates(images, protocol(n=1000, **plan), journal=Journal(path, "a"))
    extended = certificates(images, protocol(n=4000, **plan), journal=Journal(path, "a"))
    assert extended == certificates(images, protocol(n=4000, **plan))
    assert certificates(images, protocol(n=1000, **plan), journal=Journal(path, "a")) == short
    gains = [a["radius"] - b["radius"] for a, b in zip(extended, short, strict=True)]
    assert min(gains) >= 0
    assert max(gains) > 0


@pytest.mark.fault(
    fault="votes that do not add up, or lack a round",
    stage="certify",
    outcome="refused: damaged, with the cure",
)
def test_a_damaged_or_held_journal_certifies_nothing(tmp_path):
    images, settings = torch.zeros(3, *SHAPE), protocol(mode="decide")
    path = tmp_path / "votes.jsonl"
    certificates(images, settings, model=Biased(0.8), journal=Journal(path, "a"))
    lines = path.read_text().splitlines(keepends=True)
    estimates = [place for place, line in enumerate(lines) if '"estimation"' in line]
    row = json.loads(lines[estimates[0]].partition(" ")[2])
    row["votes"]["0"] = row["votes"].get("0", 0) + 3
    damages = {
        "a row is missing": [line for place, line in enumerate(lines) if place != estimates[0]],
        "votes do not add up": [*lines[: estimates[0]], checked(row).decode()],
        "a line is garbled": [lines[0], "garbled\n", *lines[1:]],
    }
    for damage, kept in damages.items():
        path.write_text("".join(kept))
        with pytest.raises(BenchError, match="damaged"):
            certificates(images, settings, model=Biased(0.8), journal=Journal(path, "a"))
        assert path.read_text() == "".join(kept), damage
    path.unlink()
    held = Journal(path, "a")
    with pytest.raises(BenchError, match="another run"):
        Journal(path, "a")
    del held
    Journal(path, "a")


def test_a_family_shares_alpha_in_the_sequential_test_too():
    assert plan_of(protocol(mode="decide", family_size=10)).alpha == pytest.approx(0.0001)


@pytest.mark.parametrize(
    "changes",
    [
        {"reserve": -0.5},
        {"reserve": 1.0},
        {"futility": -0.1},
        {"tolerance": 0.0},
        {"radii": (-0.5, 0.0, 0.25)},
        {"radii": (0.0, 0.5, 0.25)},
        {"radii": (0.0, float("nan"))},
        {"family_size": 0},
        {"family_size": 0.5},
        {"reserve_at": -1},
        {"reserve_at": 0},
    ],
    ids=str,
)
def test_a_protocol_that_would_void_the_guarantee_is_refused(changes):
    with pytest.raises(
        ValueError, match=r"out of range|radii must increase|counts images|counts draws"
    ):
        protocol(mode="decide", **changes)


def test_what_cannot_be_certified_is_refused():
    images, settings = torch.zeros(2, *SHAPE), protocol(mode="decide")
    for model, labels, ids, message in (
        (Linear().train(), [0, 1], [0, 1], "training mode"),
        (Linear().eval(), [0, 2], [0, 1], "labels"),
        (Linear().eval(), [0, -1], [0, 1], "labels"),
        (Linear().eval(), [0, 1], [5, 5], "every id"),
        (Linear().eval(), [0], [0, 1], "as many"),
    ):
        with pytest.raises(ValueError, match=message):
            list(certify(model, images, labels, ids, settings, 2))
    with pytest.raises(ValueError, match="expected 3 per image"):
        list(certify(Linear().eval(), images, [0, 1], [0, 1], settings, 3))


def test_partial_blocks_count_exactly_the_wanted_draws():
    images = torch.zeros(3, *SHAPE)

    def votes(*ranges):
        items = [
            item
            for row in range(3)
            for start, stop in ranges
            for item in items_of(row, row, (7, "test", row, "estimation"), start, stop)
        ]
        return count_votes(Linear(), images, items, 0.5, 256, 2)

    assert votes((0, 100)).sum(axis=1).tolist() == [100, 100, 100]
    assert (votes((0, 40), (40, 41), (41, 100)) == votes((0, 100))).all()


class Broken(nn.Module):
    """Half of the answers are not numbers."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        good = torch.zeros(len(pixels), 2)
        good[:, 0] = 1
        good[pixels[:, 0, 0, 0] > 0] = float("nan")
        return good


def test_non_finite_logits_vote_for_nobody():
    (row,) = certificates(torch.zeros(1, *SHAPE), protocol(), model=Broken())
    assert row["predict"] == -1
    assert 400 < row["non_finite"] < 600
    assert row["n_a"] + row["non_finite"] == 1000


def test_noise_is_standard_normal_and_its_blocks_independent():
    keys = [noise_key(0, "d", image, "estimation", 0) for image in range(200)]
    draws = standard_normal(key_tensor(keys, CPU), SHAPE)
    assert draws.shape == (200 * BLOCK, *SHAPE)
    flat = draws.flatten().numpy()
    assert kstest(flat[:50_000], "norm").pvalue > 1e-4
    blocks = draws.view(200, -1)
    correlation = np.corrcoef(blocks.numpy())[np.triu_indices(200, 1)]
    assert np.abs(correlation).max() < 0.27
    assert len(np.unique(flat)) > 0.98 * len(flat)


def test_every_part_of_the_key_changes_the_noise():
    base = (0, "d", 1, "selection", 2)
    others = [
        (1, "d", 1, "selection", 2),
        (0, "e", 1, "selection", 2),
        (0, "d", 2, "selection", 2),
        (0, "d", 1, "estimation", 2),
        (0, "d", 1, "selection", 3),
    ]
    keys = {noise_key(*parts) for parts in [base, *others]}
    assert len(keys) == 6
    one = standard_normal(key_tensor([noise_key(*base)], CPU), SHAPE)
    alone = standard_normal(key_tensor([noise_key(*others[0]), noise_key(*base)], CPU), SHAPE)[
        BLOCK:
    ]
    assert torch.equal(one, alone)
