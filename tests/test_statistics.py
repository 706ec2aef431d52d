"""Intervals and curves against closed forms and scipy's own test."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from bench.statistics import accuracy_interval, average_certified_radius, certified_accuracy

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
