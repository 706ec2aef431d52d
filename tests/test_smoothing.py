"""The certificate: closed forms, error rates that can fail, independence of scheduling."""

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest, kstest, norm
from torch import nn

from bench.smoothing.bounds import certified_radius, p_a_lower, radius_cap
from bench.smoothing.engine import Protocol, certify, count_votes
from bench.smoothing.noise import BLOCK, noise_key, standard_normal

CPU = torch.device("cpu")
SHAPE = (1, 4, 4)


class Linear(nn.Module):
    """Class 1 where w.x + b > 0: its smoothed radius is |w.x + b| / ||w|| exactly."""

    def __init__(self, dimension: int = 16):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(dimension, generator=generator))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        score = pixels.flatten(1) @ self.weight
        return torch.stack([-score, score], dim=1)


def protocol(**changes) -> Protocol:
    values = {
        "sigma": 0.5,
        "n0": 100,
        "n": 1000,
        "alpha": 0.001,
        "seed": 7,
        "data": "test",
        "batch_size": 256,
    }
    return Protocol(**{**values, **changes})


def certificates(images, settings, ids=None, pool=32, model=None):
    ids = ids or list(range(len(images)))
    model = model or Linear()
    return list(certify(model, images, [1] * len(ids), ids, settings, classes=2, pool=pool))


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


def test_certified_radius_stays_below_the_exact_one_and_gets_near():
    images = torch.rand(40, *SHAPE, generator=torch.Generator().manual_seed(1))
    model = Linear()
    score = images.flatten(1) @ model.weight.detach()
    exact = (score.abs() / model.weight.norm()).detach().numpy()
    found = certificates(images, protocol(n=10_000))
    right = (score > 0).long().tolist()
    kept = [(c, r) for c, r, label in zip(found, exact, right, strict=True) if c.predict == label]
    assert len(kept) > 30
    # 40 certificates, each wrong with probability 0.001.
    assert sum(c.radius > r for c, r in kept) <= 1
    reachable = [(c, r) for c, r in kept if 0.1 < r < 1.2]
    assert all(c.radius > r - 0.1 for c, r in reachable)


def false_certificates(runs: int, p: float, n: int, alpha: float, reuse: bool) -> int:
    """Two classes with probabilities p and 1 - p <= 1/2 each side: any claim of p is false."""
    rng = np.random.default_rng(5)
    pilot = rng.binomial(100, p, runs)
    first = pilot > 50
    fresh = np.where(first, rng.binomial(n, p, runs), rng.binomial(n, 1 - p, runs))
    reused = np.where(first, pilot, 100 - pilot)
    votes, draws = (reused, 100) if reuse else (fresh, n)
    radii = [certified_radius(p_a_lower(int(v), draws, alpha), 1.0) for v in votes]
    return sum(radius is not None for radius in radii)


def test_false_certificates_stay_within_alpha():
    runs, alpha = 5000, 0.05
    bound = binom.isf(1e-4, runs, alpha)
    assert false_certificates(runs, 0.5, 100, alpha, reuse=False) <= bound


def test_reusing_the_pilot_is_caught_by_the_same_bound():
    runs, alpha = 5000, 0.05
    bound = binom.isf(1e-4, runs, alpha)
    assert false_certificates(runs, 0.5, 100, alpha, reuse=True) > bound


class Biased(nn.Module):
    """Votes class 0 with probability exactly p under noise: threshold on one pixel."""

    def __init__(self, p: float):
        super().__init__()
        self.threshold = float(norm.ppf(p)) * 0.5

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        score = self.threshold - pixels[:, 0, 0, 0]
        return torch.stack([score, -score], dim=1)


@pytest.mark.parametrize("p", [0.5, 0.8])
def test_engine_claims_more_than_p_no_oftener_than_alpha(p):
    runs, alpha = 2000, 0.05
    images = torch.zeros(runs, *SHAPE)
    settings = protocol(n0=32, n=128, alpha=alpha, batch_size=4096)
    found = certificates(images, settings, model=Biased(p))
    exact = 0.5 * norm.ppf(p)
    false = sum(c.predict == 0 and c.radius > exact for c in found)
    false += sum(c.predict == 1 for c in found)
    assert false <= binom.isf(1e-4, runs, alpha)


def test_results_do_not_depend_on_batch_order_pool_or_shard():
    images = torch.rand(23, *SHAPE, generator=torch.Generator().manual_seed(2)) * 0.2

    def counts(found):
        return {c.idx: (c.predict, c.radius, c.n_a, c.n_label) for c in found}

    whole = counts(certificates(images, protocol()))
    assert counts(certificates(images, protocol(batch_size=64), pool=5)) == whole
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0)).tolist()
    assert counts(certificates(images[order], protocol(), ids=order)) == whole
    sharded = {}
    for shard in range(7):
        ids = list(range(shard, 23, 7))
        sharded |= counts(certificates(images[ids], protocol(), ids=ids))
    assert sharded == whole


def test_partial_blocks_count_exactly_the_wanted_draws():
    images = torch.zeros(3, *SHAPE)
    votes = count_votes(Linear(), images, [0, 1, 2], 100, "estimation", protocol(), 2)
    assert votes.sum(dim=1).tolist() == [100, 100, 100]


class Broken(nn.Module):
    """Half of the answers are not numbers."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        good = torch.zeros(len(pixels), 2)
        good[:, 0] = 1
        good[pixels[:, 0, 0, 0] > 0] = float("nan")
        return good


def test_non_finite_logits_vote_for_nobody():
    votes = count_votes(Broken(), torch.zeros(1, *SHAPE), [0], 1000, "estimation", protocol(), 2)
    assert votes[0, 1] == 0
    assert 400 < votes[0, 2] < 600
    assert [
        c.predict for c in certificates(torch.zeros(1, *SHAPE), protocol(), model=Broken())
    ] == [-1]


def test_noise_is_standard_normal_and_its_blocks_independent():
    keys = [noise_key(0, "d", image, "estimation", 0) for image in range(200)]
    draws = standard_normal(keys, SHAPE, CPU)
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
    one = standard_normal([noise_key(*base)], SHAPE, CPU)
    alone = standard_normal([noise_key(*others[0]), noise_key(*base)], SHAPE, CPU)[BLOCK:]
    assert torch.equal(one, alone)
