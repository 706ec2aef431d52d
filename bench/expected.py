"""How many draws a protocol takes of images whose p_A is known: its own rule, replayed."""

import numpy as np
from numpy.typing import NDArray

from bench.smoothing.engine import needs_pilot
from bench.smoothing.protocol import Protocol
from bench.smoothing.rules import Tally, rule_of

REPEATS = 10


def expected_draws(protocol: Protocol, p_a: NDArray[np.float64], seed: int = 0) -> float:
    """Mean draws per image, pilot included, over images of which `p_a` `(N,)` vote for one class.

    The pilot finds that class; of real images it may miss it where p_A is small.
    """
    chance, rule = np.random.default_rng(seed), rule_of(protocol)
    piloted = protocol.n0 if needs_pilot(protocol) else 0

    def votes(draws: int, p: float) -> NDArray[np.int64]:
        right = int(chance.binomial(draws, p))
        return np.array([right, draws - right, 0], np.int64)

    total = 0
    for p in np.repeat(p_a, REPEATS):
        pilot, none = votes(piloted, p), np.zeros(3, np.int64)
        tally = Tally(0, 0, 0, pilot, none, piloted=piloted, candidate=0)
        while (goal := rule.next_goal(tally)) > tally.drawn:
            tally.votes = tally.votes + votes(goal - tally.drawn, p)
            tally.drawn = goal
        total += piloted + tally.drawn
    return total / (len(p_a) * REPEATS)
