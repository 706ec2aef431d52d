"""Certification of many images at once: a pool in flight, rounds of full batches."""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.smoothing.journal import Journal, Kept
from bench.smoothing.noise import BLOCK
from bench.smoothing.protocol import Protocol
from bench.smoothing.rules import Rule, Tally, Verdict, rule_of
from bench.smoothing.voting import Item, clean_votes, count_votes, items_of

PILOT = "selection"
POOL = 512
ROUND_BATCHES = 64


@dataclass(frozen=True)
class Certificate:
    """One image's certificate; `predict` -1 and radius 0 mean abstention.

    `samples` counts all noisy forward passes: `n0` of the pilot, of which `n0_label` voted for
    the true class, and `n` for estimation, of which `n_a` voted for `candidate`.
    """

    idx: int
    label: int
    predict: int
    radius: float
    correct: int
    time: float
    samples: int
    n_a: int
    p_a_lower: float
    n: int
    candidate: int
    n0: int
    n0_label: int
    non_finite: int
    clean_predict: int


def certify(
    classifier: nn.Module,
    images: Tensor,
    labels: Sequence[int] | Tensor,
    ids: Sequence[int] | Tensor,
    protocol: Protocol,
    classes: int,
    journal: Journal | None = None,
) -> Iterator[Certificate]:
    """Yield a certificate per image as each is done; sort by `idx` where order matters.

    Args:
        classifier: maps `(B, C, H, W)` pixels in [0, 1] plus noise to `(B, classes)` logits,
            each row by itself (evaluation mode, no batch statistics).
        images: clean images `(N, C, H, W)`, float32, on the classifier's device.
        labels: true classes; with the candidate `pilot` they decide nothing but columns.
        ids: indices in the test set; they key the noise.
        protocol: what the certificates mean.
        classes: number of classes.
        journal: keeps votes as rounds end and gives back those of an interrupted run.

    Raises:
        ValueError: a layer is in training mode, whose batch statistics would couple the draws;
            labels are no classes; ids repeat; or the lengths differ.
        BenchError: the journal is damaged.
    """
    labels, ids = [int(label) for label in labels], [int(idx) for idx in ids]
    _check(classifier, images, labels, ids, classes)
    run = _Run(classifier, images, protocol, classes, journal)
    clean = clean_votes(classifier, images, protocol.batch_size, classes)
    waiting = iter([run.open(*image) for image in zip(ids, labels, range(len(ids)), strict=True)])
    pool: list[Tally] = []
    while pool := [*pool, *itertools.islice(waiting, POOL - len(pool))]:
        for tally in pool:
            if tally.done:
                yield _certificate(tally, run.rule.verdict(tally), int(clean[tally.position]))
        pool = [tally for tally in pool if not tally.done]
        if pool:
            run.draw_round(pool)


def _check(
    classifier: nn.Module, images: Tensor, labels: list[int], ids: list[int], classes: int
) -> None:
    if any(module.training for module in classifier.modules()):
        raise ValueError("the classifier is in training mode: call eval() first")
    if not len(images) == len(labels) == len(ids) == len(set(ids)):
        raise ValueError("images, labels and ids must be as many, and every id another")
    if not all(0 <= label < classes for label in labels):
        raise ValueError(f"labels must lie in 0..{classes - 1}")


def _certificate(tally: Tally, verdict: Verdict, clean_predict: int) -> Certificate:
    return Certificate(
        idx=tally.idx,
        label=tally.label,
        predict=verdict.predict,
        radius=verdict.radius,
        correct=int(verdict.predict == tally.label),
        time=tally.seconds,
        samples=tally.piloted + tally.drawn,
        n_a=tally.n_a,
        p_a_lower=verdict.p_a_lower,
        n=tally.drawn,
        candidate=tally.candidate,
        n0=tally.piloted,
        n0_label=int(tally.selection[tally.label]),
        non_finite=int(tally.votes[-1]),
        clean_predict=clean_predict,
    )


def needs_pilot(protocol: Protocol) -> bool:
    """Whether draws that prove nothing come first, to choose a class or a number of draws."""
    if protocol.mode == "predict":
        return False
    return protocol.candidate == "pilot" or protocol.mode == "radius"


class _Run:
    """Draws for a pool of images, in rounds of at most `ROUND_BATCHES` batches."""

    def __init__(
        self,
        classifier: nn.Module,
        images: Tensor,
        protocol: Protocol,
        classes: int,
        journal: Journal | None,
    ):
        self.classifier, self.images, self.protocol = classifier, images, protocol
        self.classes, self.journal = classes, journal
        self.rule: Rule = rule_of(protocol)
        self.pilot = protocol.n0 if needs_pilot(protocol) else 0

    def open(self, idx: int, label: int, position: int) -> Tally:
        """A tally with the votes that the journal kept."""
        bins = self.classes + 1
        tally = Tally(idx, label, position, np.zeros(bins, np.int64), np.zeros(bins, np.int64))
        self._advance(tally)
        if self.journal is not None:
            for domain in (PILOT, self.rule.domain):
                for kept in self.journal.read(idx, domain, bins):
                    # A run that was to draw more may have left rows beyond this one's end.
                    if not tally.done:
                        self._resume(tally, domain, kept)
        return tally

    def _advance(self, tally: Tally) -> None:
        """Choose the candidate once the pilot is complete; ask the rule at each goal."""
        if tally.piloted < self.pilot:
            return
        if tally.drawn == 0 and self.protocol.mode != "predict":
            by_label = self.protocol.candidate == "label"
            tally.candidate = tally.label if by_label else int(tally.selection[:-1].argmax())
        if tally.drawn == tally.goal:
            tally.goal = self.rule.next_goal(tally)
            tally.done = tally.goal == tally.drawn

    def _resume(self, tally: Tally, domain: str, kept: Kept) -> None:
        """Take over a round of the journal, if it is one that this run would draw next.

        A round that jumps over a look would be judged by another look's boundary.
        """
        assert self.journal is not None
        wanted, start, stop = self._pending(tally)
        if domain != wanted or not start < kept.drawn <= stop:
            raise self.journal.damaged()
        self._absorb(tally, domain, kept)

    def _absorb(self, tally: Tally, domain: str, kept: Kept) -> None:
        tally.seconds = kept.seconds
        if domain == PILOT:
            tally.piloted, tally.selection = kept.drawn, kept.votes
        else:
            tally.drawn, tally.votes = kept.drawn, kept.votes
        self._advance(tally)

    def _pending(self, tally: Tally) -> tuple[str, int, int]:
        if tally.piloted < self.pilot:
            return PILOT, tally.piloted, self.pilot
        return self.rule.domain, tally.drawn, tally.goal

    def draw_round(self, pool: list[Tally]) -> None:
        """Draw what the images of `pool` need next, as far as one round goes."""
        begin = time.perf_counter()
        room = ROUND_BATCHES * self.protocol.batch_size // BLOCK
        items: list[Item] = []
        touched: list[tuple[Tally, str, int, int]] = []
        for tally in pool:
            if len(items) >= room:
                break
            domain, start, stop = self._pending(tally)
            stop = min(stop, (start // BLOCK + room - len(items)) * BLOCK)
            stream = (self.protocol.seed, self.protocol.data, tally.idx, domain)
            new = items_of(len(touched), tally.position, stream, start, stop)
            touched.append((tally, domain, stop, len(new)))
            items += new
        votes = count_votes(
            self.classifier,
            self.images,
            items,
            self.protocol.sigma,
            self.protocol.batch_size,
            self.classes,
        )
        seconds = time.perf_counter() - begin
        self._settle(touched, votes, seconds / len(items))

    def _settle(
        self,
        touched: list[tuple[Tally, str, int, int]],
        votes: NDArray[np.int64],
        seconds_per_item: float,
    ) -> None:
        kept = []
        for (tally, domain, drawn, items), new in zip(touched, votes, strict=True):
            before = tally.selection if domain == PILOT else tally.votes
            seconds = tally.seconds + seconds_per_item * items
            kept.append((tally.idx, domain, Kept(drawn, before + new, seconds)))
            self._absorb(tally, *kept[-1][1:])
        if self.journal is not None:
            self.journal.append(kept)
