"""Paired comparisons: hand-computed tables, coverage by simulation, a control that must differ."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, multinomial, norm

from bench.errors import BenchError
from bench.paired import holm, mcnemar, paired_difference_interval, paired_tests


def log(right: list[int], radius: float = 0.5) -> pd.DataFrame:
    return pd.DataFrame({"idx": range(len(right)), "correct": right, "radius": radius})


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 2**6)
    assert mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 2**8)


def test_mcnemar_is_twice_the_smaller_binomial_tail():
    for only_a in range(12):
        for only_b in range(12):
            tail = binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)
            assert mcnemar(only_a, only_b) == pytest.approx(min(2 * tail, 1.0))


def test_holm_by_hand():
    # a against b: 0 of 6 discordant (p = 1/32); c is as b, so a against c is the same; b, c equal.
    logs = {"a": log([0] * 6 + [1] * 4), "b": log([1] * 10), "c": log([1] * 10)}
    table = paired_tests(logs, [0.5])
    assert table["p_value"].tolist() == pytest.approx([1 / 32, 1 / 32, 1.0])
    assert table["p_holm"].tolist() == pytest.approx([3 / 32, 3 / 32, 1.0])
    assert table["difference"].tolist() == pytest.approx([-0.6, -0.6, 0.0])
    assert table["low"].le(table["difference"]).all()
    assert table["high"].ge(table["difference"]).all()
    low, high = paired_difference_interval([0, 0, 0], [6, 6, 0], 10)
    assert table["low"].tolist() == low.tolist()
    assert table["high"].tolist() == high.tolist()


def test_holm_steps_down_and_never_falls():
    # As statsmodels.stats.multitest.multipletests(p, method="holm") gives.
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]).tolist() == pytest.approx([1.0, 1.0])


def test_images_are_joined_by_index_and_radius_counts():
    shuffled = log([1, 0, 0, 0]).iloc[[2, 0, 3, 1]]
    table = paired_tests({"a": log([1, 1, 0, 0]), "b": shuffled}, [0.5, 0.75])
    assert table["only_a"].tolist() == [1, 0]
    assert table["only_b"].tolist() == [0, 0]
    with pytest.raises(BenchError, match="different images"):
        paired_tests({"a": log([1, 1, 0, 0]), "b": log([1, 1, 0])}, [0.5])


def test_holm_keeps_the_familywise_error_that_uncorrected_values_exceed():
    p_values = np.random.default_rng(0).random((5_000, 10))
    assert np.mean([(holm(row) < 0.05).any() for row in p_values]) < 0.06
    assert np.mean((p_values < 0.05).any(axis=1)) > 0.35


def missed(a, b, n, confidence, interval=paired_difference_interval):
    """Exact chance that the low and the high end miss a - b, over what either may."""
    only_a, only_b = np.indices((n + 1, n + 1)).reshape(2, -1)
    only_a, only_b = (cell[only_a + only_b <= n] for cell in (only_a, only_b))
    counts = np.stack([only_a, only_b, n - only_a - only_b], axis=1)
    chance = multinomial(n, [a, b, 1 - a - b]).pmf(counts)
    low, high = interval(only_a, only_b, n, confidence)
    ends = chance[low > a - b + 1e-12].sum(), chance[high < a - b - 1e-12].sum()
    return max(ends) / ((1 - confidence) / 2), sum(ends) / (1 - confidence)


CELLS = [(0.02, 0.02), (0.2, 0.05), (0.3, 0.3), (0.1, 0.0), (0.02, 0.0), (0.45, 0.02), (0.005, 0.0)]


@pytest.mark.parametrize("n", [50, 250])
@pytest.mark.parametrize("comparisons", [1, 12])
def test_either_end_of_the_interval_errs_no_oftener_than_it_may(n, comparisons):
    for a, b in CELLS:
        worse_end, both = missed(a, b, n, 1 - 0.05 / comparisons)
        assert worse_end < 1.02
        assert both < 0.95


def wald_of_bonett_and_price(only_a, only_b, n, confidence):
    a, b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = norm.isf((1 - confidence) / 2) * np.sqrt((a + b - (a - b) ** 2) / (n + 2))
    return a - b - half, a - b + half


def test_an_adjusted_wald_interval_is_caught():
    """Negative control: near its level at 95 %, and far over it where twelve share the error."""
    found = [missed(a, b, 250, 1 - 0.05 / 12, wald_of_bonett_and_price) for a, b in CELLS]
    assert max(worse_end for worse_end, _ in found) > 3


def test_a_narrower_interval_covers_less():
    cells = np.random.default_rng(0).multinomial(500, [0.3, 0.3, 0.4], size=20_000)
    low, high = paired_difference_interval(cells[:, 0], cells[:, 1], 500, confidence=0.8)
    assert ((low <= 0) & (high >= 0)).mean() == pytest.approx(0.82, abs=0.02)


def test_one_method_has_no_pairs():
    assert paired_tests({"a": log([1, 0])}, [0.0]).empty
