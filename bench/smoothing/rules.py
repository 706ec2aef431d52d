"""How many draws an image gets in each mode, and what its votes prove.

A rule sees the votes of one image, cumulative and at the number of draws it asked for. It must
never let estimation votes choose the candidate: the bounds hold for fresh draws only.
"""

from dataclasses import dataclass
from typing import Protocol as Interface

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, norm

from bench.smoothing.bounds import certified_radius, p_a_lower
from bench.smoothing.protocol import Protocol
from bench.smoothing.sequential import Plan, boundary_table, futility, looks_until

ABSTAIN = -1


@dataclass
class Tally:
    """Votes of one image so far; the last bin of `(K + 1,)` counts non-finite logits."""

    idx: int
    label: int
    position: int
    selection: NDArray[np.int64]
    votes: NDArray[np.int64]
    piloted: int = 0
    drawn: int = 0
    goal: int = 0
    level: int = 0
    candidate: int = ABSTAIN
    seconds: float = 0.0
    done: bool = False

    @property
    def failures(self) -> int:
        """Estimation draws that voted for something else."""
        return self.drawn - self.n_a

    @property
    def n_a(self) -> int:
        """Estimation votes for the candidate."""
        return int(self.votes[self.candidate])


@dataclass(frozen=True)
class Verdict:
    """Answer (-1: abstain), radius in [0, 1]-pixel l2, and the proven lower bound of p_A."""

    predict: int
    radius: float
    p_a_lower: float


class Rule(Interface):
    """One mode's sampling and decision."""

    domain: str

    def next_goal(self, tally: Tally) -> int:
        """Draws wanted in all; the present number means that the image is done."""

    def verdict(self, tally: Tally) -> Verdict:
        """What the votes prove."""


def _clopper_pearson(tally: Tally, protocol: Protocol) -> Verdict:
    lower = p_a_lower(tally.n_a, tally.drawn, protocol.alpha_per_image)
    radius = certified_radius(lower, protocol.sigma)
    if radius is None:
        return Verdict(ABSTAIN, 0.0, lower)
    return Verdict(tally.candidate, radius, lower)


class Cohen:
    """`n` draws for every image, one Clopper-Pearson bound (Cohen 2019, algorithm 1)."""

    domain = "estimation"

    def __init__(self, protocol: Protocol):
        self.protocol = protocol

    def next_goal(self, tally: Tally) -> int:
        """Always `n`."""
        return self.protocol.n

    def verdict(self, tally: Tally) -> Verdict:
        """Radius sigma * Phi^-1 of the bound."""
        return _clopper_pearson(tally, self.protocol)


class Radius:
    """As many draws as the pilot's guess of p_A says are needed (Chen 2022, made sound).

    The number depends on pilot draws alone, so the bound on fresh draws keeps its level.
    """

    domain = "estimation"

    def __init__(self, protocol: Protocol):
        self.protocol = protocol
        choices = looks_until(protocol.n)
        self.choices = [int(n) for n in choices]

    def next_goal(self, tally: Tally) -> int:
        """The fewest planned draws expected to come within the tolerance of `n` draws."""
        n0 = int(tally.selection.sum())
        p = (tally.selection[tally.candidate] + 0.5) / (n0 + 1)
        best = self._expected(p, self.protocol.n)
        near = best - self.protocol.tolerance * self.protocol.sigma
        return next(n for n in self.choices if self._expected(p, n) >= near)

    def _expected(self, p: float, n: int) -> float:
        lower = p_a_lower(int(p * n), n, self.protocol.alpha_per_image)
        return certified_radius(lower, self.protocol.sigma) or 0.0

    def verdict(self, tally: Tally) -> Verdict:
        """Radius sigma * Phi^-1 of the bound."""
        return _clopper_pearson(tally, self.protocol)


class Decide:
    """Exact group-sequential test of a grid of radii, with free give-up."""

    domain = "estimation"

    def __init__(self, protocol: Protocol):
        self.protocol = protocol
        self.table = boundary_table(plan_of(protocol))
        self.last = self.table.last_look(protocol.n)
        self.give_up = futility(self.table, protocol.n, protocol.futility)

    def next_goal(self, tally: Tally) -> int:
        """The next look, unless every radius is certified or the next one is hopeless."""
        if tally.drawn == 0:
            return int(self.table.looks[0])
        look = int(np.searchsorted(self.table.looks, tally.drawn))
        reached = int((tally.failures <= self.table.allowed[:, look]).sum())
        tally.level = max(tally.level, reached)
        if tally.level == len(self.table.allowed) or look >= self.last:
            return tally.drawn
        if tally.failures >= self.give_up[tally.level, look]:
            return tally.drawn
        return int(self.table.looks[look + 1])

    def verdict(self, tally: Tally) -> Verdict:
        """The largest certified radius of the grid."""
        if tally.level == 0:
            return Verdict(ABSTAIN, 0.0, 0.0)
        radius = self.protocol.radii[tally.level - 1]
        return Verdict(tally.candidate, radius, float(norm.cdf(radius / self.protocol.sigma)))


class Predict:
    """The most frequent class, or abstention where the runner-up is too near (Cohen 2019)."""

    domain = "prediction"

    def __init__(self, protocol: Protocol):
        self.protocol = protocol

    def next_goal(self, tally: Tally) -> int:
        """Always `n`."""
        return self.protocol.n

    def verdict(self, tally: Tally) -> Verdict:
        """The top class if a two-sided binomial test tells it from the second."""
        votes = tally.votes[:-1]
        order = np.argsort(-votes, kind="stable")
        first, second = (int(votes[order[0]]), int(votes[order[1]]))
        chance = min(1.0, 2 * float(binom.sf(first - 1, first + second, 0.5)))
        tally.candidate = int(order[0])
        sure = chance <= self.protocol.alpha_per_image
        return Verdict(tally.candidate if sure else ABSTAIN, 0.0, 0.0)


def plan_of(protocol: Protocol) -> Plan:
    """The sequential test of a `decide` protocol."""
    return Plan(
        z=tuple(radius / protocol.sigma for radius in protocol.radii),
        alpha=protocol.alpha_per_image,
        horizon=protocol.horizon,
        reserve=protocol.reserve,
        reserve_at=protocol.reserve_at or protocol.n,
    )


RULES: dict[str, type[Cohen] | type[Radius] | type[Decide] | type[Predict]] = {
    "decide": Decide,
    "cohen": Cohen,
    "radius": Radius,
    "predict": Predict,
}


def rule_of(protocol: Protocol) -> Rule:
    """The rule of a protocol's mode."""
    return RULES[protocol.mode](protocol)
