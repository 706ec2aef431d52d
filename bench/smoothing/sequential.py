"""The exact group-sequential binomial test behind `decide`, and its boundary tables.

Level j claims that the candidate's probability p exceeds t_j = Phi(r_j / sigma). Under
p <= t_j the probability that the count ever reaches level j's boundary, at any of the planned
looks, is at most alpha: it is computed exactly by a recursion over looks (Lan and DeMets 1983
spending; Lloyd 2021 for exact binomial designs) and largest at p = t_j. The levels are nested
and a false claim of any level implies the false claim of the smallest false one, so testing
all of them costs no alpha. Stopping early for any reason can only lower the probability.
"""

import json
import logging
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc
from scipy.stats import binom, norm

from bench.errors import BenchError
from bench.files import read_json, sha256_json, write_json

log = logging.getLogger(__name__)

LOOK_STEP = 32
LOOK_RATIO = 1.2
# Trimmed from each tail of each increment, and counted as false claims.
TRIMMED = 1e-15
# More than what rounding in the recursion adds up to, relative to alpha.
ROUNDING = 1e-9
TAIL = 0.02
PRIOR = 0.2

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """What is fixed before the first draw, and what a boundary table depends on.

    Args:
        z: levels r_j / sigma, increasing.
        alpha: probability of a false claim, over all looks.
        horizon: the last planned look; a run may stop before and be continued up to it.
        reserve: share of alpha kept for the look at `reserve_at` draws.
        reserve_at: that look, where spending over the looks before it ends, too; 0 means none.
    """

    z: tuple[float, ...]
    alpha: float
    horizon: int
    reserve: float = 0.0
    reserve_at: int = 0

    def as_json(self) -> dict[str, Any]:
        """All that the table depends on, looks included."""
        return {
            "z": list(self.z),
            "alpha": self.alpha,
            "reserve": self.reserve,
            "reserve_at": self.reserve_at,
            "looks": looks_until(self.horizon, self.reserve_at).tolist(),
        }


@dataclass(frozen=True)
class BoundaryTable:
    """When a level is claimed: at look k, with at most `allowed[j, k]` draws of other classes.

    `looks` is `(K,)`, `allowed` `(J, K)`; -1 means that the level cannot be claimed there.
    """

    looks: Counts
    allowed: Counts

    @cached_property
    def sha256(self) -> str:
        """Hash of the table's content, for logs."""
        return sha256_json([self.looks.tolist(), self.allowed.tolist()])

    def last_look(self, n: int) -> int:
        """Index of the last look within `n` draws.

        Raises:
            ValueError: no look is that early.
        """
        within = int(np.searchsorted(self.looks, n, side="right")) - 1
        if within < 0:
            raise ValueError(f"n = {n} is below the first look at {self.looks[0]} draws")
        return within


def looks_until(horizon: int, extra: int = 0) -> Counts:
    """Planned numbers of draws: multiples of 32 growing by a fifth, and the usual last looks.

    Those are powers of ten, `extra` and the horizon; a step near one of them gives way, since
    two looks so close would share what one of them could spend.
    """
    count = int(np.log(max(horizon, LOOK_STEP) / LOOK_STEP) / np.log(LOOK_RATIO)) + 1
    steps = LOOK_STEP * np.ceil(LOOK_RATIO ** np.arange(count))
    usual = np.unique([*10 ** np.arange(3, 3 + len(str(horizon))), horizon, extra])
    usual = usual[(usual > 0) & (usual <= horizon)]
    apart = (np.abs(steps[:, None] / usual - 1) > LOOK_RATIO / 2 - 0.5).all(axis=1)
    return np.unique(np.concatenate([steps[apart & (steps < horizon)], usual])).astype(np.int64)


def _spending(looks: Counts, plan: Plan) -> NDArray[np.float64]:
    """Alpha that may be spent up to each look: a line over looks, and the reserve."""
    end = plan.reserve_at or plan.horizon
    until, after = looks <= end, looks > end
    tail = TAIL if after.any() else 0.0
    line = np.cumsum(until) / until.sum()
    rest = np.cumsum(after) / max(1, after.sum())
    shares = (1 - plan.reserve - tail) * line + plan.reserve * (looks >= end) + tail * rest
    return plan.alpha * (1 - ROUNDING) * shares


def _increment(draws: int, q: float) -> tuple[int, NDArray[np.float64], float]:
    """Law of the failures among `draws`: first value, probabilities, trimmed mass."""
    low, high = int(binom.ppf(TRIMMED, draws, q)), int(binom.isf(TRIMMED, draws, q))
    law = binom.pmf(np.arange(low, high + 1), draws, q)
    trimmed = float(binom.cdf(low - 1, draws, q) + binom.sf(high, draws, q))
    return low, law, trimmed


def _allowed_failures(z: float, looks: Counts, spending: NDArray[np.float64]) -> list[int]:
    """Boundary of one level by forward recursion over the law of the runs still open.

    Whatever is trimmed counts as a false claim, so the boundary errs on the safe side.
    """
    q = float(norm.sf(z))
    law, low, spent = np.ones(1), 0, 0.0
    allowed = []
    for draws, budget in zip(np.diff(looks, prepend=0), spending, strict=True):
        first, step, trimmed = _increment(int(draws), q)
        law, low, spent = np.convolve(law, step), low + first, spent + trimmed
        crossing = int(np.searchsorted(spent + np.cumsum(law), budget, side="right"))
        # Below `low` lies only what was claimed at an earlier look, or was trimmed.
        allowed.append(low + crossing - 1)
        spent += float(law[:crossing].sum())
        law, low = law[crossing:], low + crossing
        tail = int(np.searchsorted(np.cumsum(law[::-1]), TRIMMED))
        spent += float(law[len(law) - tail :].sum())
        law = law[: len(law) - tail]
    return allowed


def compute_boundaries(plan: Plan) -> BoundaryTable:
    """The table of a plan; nested levels get nested boundaries by a running minimum."""
    looks = np.array(plan.as_json()["looks"], np.int64)
    spending = _spending(looks, plan)
    rows = np.array([_allowed_failures(z, looks, spending) for z in plan.z], np.int64)
    return BoundaryTable(looks, np.minimum.accumulate(rows, axis=0))


def cache_folder() -> Path:
    """Where computed tables are kept: `$XDG_CACHE_HOME/peftsmoothing-bench`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "peftsmoothing-bench"


def boundary_table(plan: Plan) -> BoundaryTable:
    """The table of a plan, from the cache or computed and cached.

    Raises:
        ValueError: levels are not increasing, or alpha is no probability.
    """
    if list(plan.z) != sorted(set(plan.z)):
        raise ValueError(f"levels must increase, got {plan.z}")
    if not 0 < plan.alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {plan.alpha}")
    # Another version of this file may compute other tables from the same plan.
    source = sha256_json([plan.as_json(), Path(__file__).read_text()])
    path = cache_folder() / f"boundaries-{source[:24]}.json"
    table = _read_cached(path)
    if table is None:
        table = compute_boundaries(plan)
        content = {"looks": table.looks.tolist(), "allowed": table.allowed.tolist()}
        try:
            write_json(path, {"sha256": table.sha256, "plan": plan.as_json(), **content})
        except (BenchError, OSError) as error:
            log.warning("%s cannot be kept, and is computed again next time (%s)", path, error)
    return table


def _read_cached(path: Path) -> BoundaryTable | None:
    """A cached table whose content matches its hash; anything else is computed again."""
    try:
        value = read_json(path)
        looks = np.array(value["looks"], np.int64)
        table = BoundaryTable(looks, np.array(value["allowed"], np.int64))
    except (BenchError, KeyError, ValueError, TypeError, json.JSONDecodeError):
        return None
    return table if table.sha256 == value.get("sha256") else None


def futility(table: BoundaryTable, n: int, gamma: float) -> Counts:
    """Failures `(J, K)` from which level j is not worth drawing on: chance below `gamma`.

    The chance is of reaching level j at the last look within `n`, predicted from the draws so
    far (prior: a beta of `PRIOR` twice; the beta-binomial is replaced by the beta of the same mean
    and variance). It decides only when to give up, so its error cannot make a claim false.
    """
    last = table.last_look(n)
    looks = table.looks[:last].astype(float)
    goal = table.allowed[:, last, None].astype(float)
    low = np.zeros((len(table.allowed), last))
    high = np.broadcast_to(looks, low.shape).copy()
    for _ in range(int(np.ceil(np.log2(float(table.looks[last])))) + 1):
        middle = np.floor((low + high) / 2)
        promising = _chance(middle, goal, looks, float(table.looks[last])) >= gamma
        low, high = np.where(promising, middle + 1, low), np.where(promising, high, middle)
    result = np.full(table.allowed.shape, 0, np.int64)
    result[:, :last] = high
    return result


def _chance(
    failures: NDArray[np.float64],
    goal: NDArray[np.float64],
    looks: NDArray[np.float64],
    last: float,
) -> NDArray[np.float64]:
    """Predicted probability of at most `goal` failures at the last look."""
    rest = last - looks
    a, b = failures + PRIOR, looks - failures + PRIOR
    mean, size = a / (a + b), a + b
    variance = mean * (1 - mean) * (size + rest) / (rest * (size + 1))
    matched = mean * (1 - mean) / variance - 1
    share = np.clip((goal - failures + 0.5) / rest, 0, 1)
    possible = failures <= goal
    chance = betainc(mean * matched, (1 - mean) * matched, share)
    return np.asarray(np.where(possible, chance, 0.0))
