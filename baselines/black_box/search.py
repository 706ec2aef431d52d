"""Training by queries alone: SPSA-GC, checks on the validation split, a guard, a budget."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils import parameters_to_vector

from baselines.black_box.settings import BlackBoxSettings
from baselines.black_box.spsa import GradientCorrection, spsa_gradient
from bench.config import Access, TrainingSettings
from bench.data import Data
from bench.errors import BenchError
from bench.objectives.noise import add_noise
from bench.progress import track
from bench.remote import BudgetSpent
from bench.training import accuracy, batch_positions

# Apart from the noise's seed, or directions and noise would come from one stream.
DIRECTIONS = 1_000_003
CALIBRATION_IMAGES = 512
CURVE_POINTS = 50


def score_loss(scores: Tensor, labels: Tensor, access: Access) -> Tensor:
    """Cross-entropy of what is shown `(B, K)`; of top1 answers, the share that is not right."""
    if access == "logits":
        return F.cross_entropy(scores, labels)
    if access == "probabilities":
        return F.nll_loss(scores.clamp(min=1e-12).log(), labels)
    return 1 - scores.nan_to_num(0.0).gather(1, labels[:, None]).mean()


class Prompted(nn.Module):
    """Noisy pixels to the black box's scores, through the prompt."""

    def __init__(self, prompt: nn.Module, ask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.prompt, self.ask = prompt, ask

    def forward(self, noisy: Tensor) -> Tensor:
        """Scores `(B, K)`; every image is a query."""
        return self.ask(self.prompt(noisy))


@dataclass
class Progress:
    """Where a search stands, and what `training.json` says of it."""

    best: Tensor
    images: int = 0
    seconds: float = 0.0
    loss_curve: list[tuple[int, float]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    divergences: list[dict[str, Any]] = field(default_factory=list)
    ended: str = "all planned steps done"

    @property
    def best_accuracy(self) -> float:
        """Validation accuracy of the weights that are kept."""
        return max((check["validation_accuracy"] for check in self.checks), default=0.0)


class Search:
    """Minimise the loss of prompted noisy images over the prompt's weights, by queries alone.

    The weights with the highest validation accuracy under noise are kept, the start included.
    When a check finds `fall` less than the best so far, or a loss is not finite, the search goes
    back to the best weights, forgets its momentum and halves its learning rate.
    """

    def __init__(
        self,
        model: Prompted,
        data: Data,
        settings: BlackBoxSettings,
        training: TrainingSettings,
        learning_rate: float,
        sigma: float,
        seed: int,
    ) -> None:
        self.model, self.data, self.settings = model, data, settings
        self.sigma, self.seed, self.batch_size = sigma, seed, training.batch_size
        self.optimizer = GradientCorrection(settings, learning_rate)
        self.parameters = list(model.prompt.parameters())
        self.device = self.parameters[0].device
        self.noise = Generator(self.device).manual_seed(seed)
        self.directions = Generator().manual_seed(seed + DIRECTIONS)
        self.progress = Progress(best=parameters_to_vector(self.parameters).detach().cpu())

    @property
    def steps(self) -> int:
        """Steps that the budget pays for, after all checks.

        Raises:
            BenchError: it pays for none.
        """
        checking = (self.settings.checks + 1) * len(self.data.validation.labels)
        per_step = 2 * self.settings.averages * self.settings.draws * self.batch_size
        steps = (self.settings.queries - checking) // per_step
        if steps < self.settings.checks:
            least = checking + self.settings.checks * per_step
            raise BenchError(
                f"settings.queries = {self.settings.queries} leaves less than a step per check: "
                f"give at least {least}, or lower checks, averages or data.validation_images"
            )
        return steps

    @torch.no_grad()
    def run(self) -> Progress:
        """Spend the budget; the prompt ends with the best weights."""
        steps, progress, begin = self.steps, self.progress, time.perf_counter()
        checks = self.settings.checks
        check_after = {round(steps * i / checks) for i in range(1, checks + 1)}
        weights = progress.best
        batches = batch_positions(self.data.train, self.batch_size, steps, self.seed)
        try:
            self._calibrate()
            weights = self._check(weights, 0)
            for step, positions in enumerate(track(batches, steps, "training"), start=1):
                weights = self._step(weights, positions, step)
                if step in check_after:
                    weights = self._check(weights, step)
        except BudgetSpent:
            # Only requests that had to be repeated bring the search here.
            progress.ended = "query budget spent"
        self._fill(progress.best)
        progress.seconds = time.perf_counter() - begin
        every = max(1, len(progress.loss_curve) // CURVE_POINTS)
        progress.loss_curve = progress.loss_curve[::every]
        return progress

    def _calibrate(self) -> None:
        count = min(CALIBRATION_IMAGES, len(self.data.train.labels))
        images = self.data.train.batch(torch.arange(count)).to(self.device)
        noise = Generator(self.device).manual_seed(self.seed)
        self.model.prompt.calibrate(add_noise(images, self.sigma, noise))  # type: ignore[operator]

    def _fill(self, weights: Tensor) -> None:
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, part in zip(self.parameters, weights.split(sizes), strict=True):
            parameter.copy_(part.view_as(parameter))

    def _step(self, weights: Tensor, positions: Tensor, step: int) -> Tensor:
        images = self.data.train.batch(positions).to(self.device)
        images = images.repeat(self.settings.draws, 1, 1, 1)
        labels = self.data.train.labels[positions].to(self.device).repeat(self.settings.draws)
        noisy: list[Tensor] = []
        losses: list[float] = []

        def loss(candidate: Tensor, pair: int) -> float:
            # Both evaluations of a pair see the same noise: its share of the loss cancels.
            if pair == len(noisy):
                noisy.append(add_noise(images, self.sigma, self.noise))
            self._fill(candidate)
            scores = self.model(noisy[pair])
            losses.append(float(score_loss(scores, labels, self.settings.access)))
            return losses[-1]

        c, pairs = self.optimizer.perturbation(step), self.settings.averages
        gradient = spsa_gradient(loss, weights, c, pairs, self.directions)
        self.progress.images += len(positions)
        moved = self.optimizer.update(weights, gradient, step)
        if not bool(torch.isfinite(moved).all()):
            return self._recover(step, "loss is not finite")
        self.progress.loss_curve.append((step, sum(losses) / len(losses)))
        return moved

    def _check(self, weights: Tensor, step: int) -> Tensor:
        """Measure the validation accuracy; the weights to go on with."""
        self._fill(weights)
        before = self.progress.best_accuracy
        found = accuracy(self.model, self.data.validation, self.sigma, self.seed)
        self.progress.checks.append({"step": step, "validation_accuracy": found})
        if found > before:
            self.progress.best = weights.clone()
        if found < before - self.settings.fall:
            return self._recover(step, f"validation accuracy fell from {before} to {found}")
        return weights

    def _recover(self, step: int, reason: str) -> Tensor:
        self.optimizer.momentum = None
        self.optimizer.learning_rate /= 2
        rate = self.optimizer.learning_rate
        event = {"step": step, "reason": reason, "learning_rate": rate}
        self.progress.divergences.append(event)
        return self.progress.best.clone()


def pick_filter(
    model: Prompted,
    filters: dict[str, nn.Module],
    data: Data,
    settings: BlackBoxSettings,
    sigma: float,
    seed: int,
) -> tuple[str, Progress]:
    """Name of the filter with the highest validation accuracy under noise; `model` ends with it.

    Raises:
        BenchError: the budget does not pay for a check of each, or repeats have spent it.
    """
    least = len(filters) * len(data.validation.labels)
    if settings.queries < least:
        raise BenchError(
            f"settings.queries = {settings.queries} does not pay for checking {len(filters)} "
            f"filters: give at least {least}, or lower data.validation_images"
        )
    progress, begin = Progress(torch.empty(0), ended="all filters tried"), time.perf_counter()
    try:
        for name, prompt in filters.items():
            model.prompt = prompt
            found = accuracy(model, data.validation, sigma, seed)
            progress.checks.append({"filter": name, "validation_accuracy": found})
    except BudgetSpent:
        # Only requests that had to be repeated bring it here.
        progress.ended = "query budget spent"
    if not progress.checks:
        raise BenchError("not one filter was checked within settings.queries: see to the server")
    best = max(progress.checks, key=lambda check: check["validation_accuracy"])["filter"]
    model.prompt, progress.seconds = filters[best], time.perf_counter() - begin
    return best, progress
