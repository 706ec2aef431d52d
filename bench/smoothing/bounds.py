"""The statistics of a certificate, in float64."""

import numpy as np
from scipy.stats import beta, norm


def p_a_lower(n_a: int, n: int, alpha: float) -> float:
    """One-sided (1 - alpha) Clopper-Pearson lower bound on P(f(x + noise) = A).

    `n_a` of `n` fresh draws voted A (Cohen 2019, LowerConfBound).
    """
    if not 0 <= n_a <= n:
        raise ValueError(f"n_a must lie in 0..{n}, got {n_a}")
    # scipy gives nan at n_a = 0, and nan would slip through a `< 0.5` abstention test.
    return 0.0 if n_a == 0 else float(beta.isf(1 - alpha, n_a, n - n_a + 1))


def certified_radius(p_lower: float, sigma: float) -> float | None:
    """L2 radius sigma * Phi^-1(p_lower) in [0, 1]-pixel units; None means abstain."""
    if not p_lower > 0.5:
        return None
    return float(sigma * norm.ppf(p_lower))


def radius_cap(n: int, alpha: float, sigma: float) -> float:
    """The largest radius that n draws can certify: n equal votes."""
    return float(sigma * norm.isf(-np.expm1(np.log(alpha) / n)))
