"""Intervals and curves against closed forms and scipy's own test."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, norm, ttest_1samp

from bench.statistics import (
    accuracy_interval,
    average_certified_radius,
    average_radius_interval,
    certified_accuracy,
    independent_difference_interval,
    pool_seeds,
)

LOG = pd.DataFrame(
    {
        "label": [0, 1, 2, 3],
        "predict": [0, 1, 5, -1],
        "radius": [0.5, 0.25, 0.9, 0.0],
        "correct": [1, 1, 0, 0],
    }
)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_interval_is_clopper_pearson(confidence: float) -> None:
    successes = np.array([0, 1, 17, 49, 50])
    low, high = accuracy_interval(successes, 50, confidence)
    for k, low_k, high_k in zip(successes, low, high, strict=True):
        exact = binomtest(int(k), 50).proportion_ci(confidence, "exact")
        assert (low_k, high_k) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_interval_ends_in_closed_form() -> None:
    low, high = accuracy_interval([0, 20], 20)
    assert (low[0], high[1]) == (0.0, 1.0)
    assert high[0] == pytest.approx(1 - 0.025 ** (1 / 20))
    assert low[1] == pytest.approx(0.025 ** (1 / 20))


def test_curve_counts_correct_answers_up_to_their_radius() -> None:
    curve = certified_accuracy(LOG, [0.0, 0.25, 0.2500001, 0.5, 0.6])
    assert curve["value"].tolist() == [0.5, 0.5, 0.25, 0.25, 0.0]
    assert curve["n_images"].tolist() == [4] * 5
    assert (curve["low"] <= curve["value"]).all()
    assert (curve["value"] < curve["high"]).all()


def test_average_radius_gives_nothing_for_wrong_answers() -> None:
    assert average_certified_radius(LOG) == pytest.approx(0.75 / 4)


def average_radius_coverage(shrink: float) -> float:
    """How often intervals, shrunk towards the estimate, hold the truth of skewed radii."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        log = pd.DataFrame(
            {
                "radius": generator.exponential(0.5, 60),
                "correct": (generator.random(60) < 0.7).astype(int),
            }
        )
        low, high = average_radius_interval(log)
        estimate = average_certified_radius(log)
        hits += abs(0.35 - estimate) <= shrink * (
            estimate - low if estimate > 0.35 else high - estimate
        )
    return hits / 200


def test_the_average_radius_is_covered_and_by_half_the_interval_not() -> None:
    assert average_radius_coverage(1.0) > 0.91
    assert average_radius_coverage(0.5) < 0.8


def test_the_average_radius_interval_repeats_and_needs_two_radii() -> None:
    low, high = average_radius_interval(LOG)
    assert (low, high) == average_radius_interval(LOG)
    assert 0 <= low < 0.75 / 4 < high <= 0.5
    assert np.isnan(average_radius_interval(LOG.iloc[:1])).all()
    assert np.isnan(average_radius_interval(LOG.assign(correct=0))).all()


def test_independent_difference_is_newcombes_published_example() -> None:
    # Newcombe (1998), table II, method 10 with Wilson intervals: 56/70 - 48/80.
    wilson = [binomtest(*pair).proportion_ci(method="wilson") for pair in ((56, 70), (48, 80))]
    rows = np.array(
        [[value, ci.low, ci.high] for value, ci in zip((0.8, 0.6), wilson, strict=True)]
    )
    low, high = independent_difference_interval(*rows)
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_one_seed_keeps_its_interval() -> None:
    assert pool_seeds([0.6], [0.5], [0.65]) == pytest.approx((0.6, 0.5, 0.65))


def test_seeds_without_image_noise_have_students_interval() -> None:
    values = np.array([0.5, 0.56, 0.59, 0.52])
    student = ttest_1samp(values, 0).confidence_interval(0.95)
    mean, low, high = pool_seeds(values, values, values)
    assert (mean, low, high) == pytest.approx((values.mean(), student.low, student.high))


def test_the_parts_of_seeds_and_images_join_by_hand() -> None:
    # At confidence 1/2 Student's t of 2 seeds is 1, so that 0.3 and 0.9 give a half of 0.3; the
    # images' halves are 0.4 below and 0.125 above: 3-4-5 and 5-12-13.
    pooled = pool_seeds([0.3, 0.9], [0.0, 0.4], [0.45, 1.0], confidence=0.5)
    assert pooled == pytest.approx((0.6, 0.6 - 0.5, 0.6 + 0.325))


def seeds_coverage(seed_spread: float, part: str) -> float:
    """How often an interval over 4 seeds on the same 400 images holds the mean accuracy.

    An image is right with probability Phi(its ease + the seed's luck).
    """
    generator = np.random.default_rng(0)
    truth = norm.cdf(0.5 / np.sqrt(1 + 1 + seed_spread**2))
    hits = 0
    for _ in range(500):
        score = 0.5 + generator.normal(size=400) + generator.normal(0, seed_spread, (4, 1))
        right = generator.normal(size=(4, 400)) < score
        values = right.mean(axis=1)
        low, high = accuracy_interval(right.sum(axis=1), 400)
        if part == "seeds":
            low = high = values
        if part == "images":
            values, low, high = (np.array([x.mean()]) for x in (values, low, high))
        _, low_pooled, high_pooled = pool_seeds(values, low, high)
        hits += low_pooled <= truth <= high_pooled
    return hits / 500


@pytest.mark.parametrize("seed_spread", [0.0, 0.1, 0.3])
def test_pooled_seeds_cover(seed_spread: float) -> None:
    assert seeds_coverage(seed_spread, "both") > 0.93


def test_either_part_alone_covers_less() -> None:
    # Few seeds that agree say nothing about other images; many images nothing about other seeds.
    assert seeds_coverage(0.0, "seeds") < 0.9
    assert seeds_coverage(0.3, "images") < 0.8
