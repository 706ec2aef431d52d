"""The one training loop: base classifier, adapters, denoisers."""

import contextlib
import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from bench.config import Cosine, Sgd, Step, TrainingSettings
from bench.data import ImageSplit
from bench.errors import BenchError
from bench.progress import track
from bench.provenance import pick_precision

# (clean images (B, C, H, W) in [0, 1], labels (B,), noise source, share of steps) -> scalar loss
BatchLoss = Callable[[Tensor, Tensor, Generator, float], Tensor]
CURVE_POINTS = 50


@dataclass(frozen=True)
class TrainingRecord:
    """What a training run cost and how its loss went."""

    images: int
    seconds: float
    peak_memory_bytes: int
    loss_curve: list[tuple[int, float]]
    precision: str


def precision_context(
    device: torch.device, precision: str
) -> contextlib.AbstractContextManager[object]:
    """Autocast to bfloat16 where asked, on any device."""
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def batch_positions(split: ImageSplit, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Positions of `steps` batches: every image once per epoch, in a fresh order each."""
    generator = torch.Generator().manual_seed(seed)
    count = len(split.labels)
    queue = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(queue) < batch_size:
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        yield queue[:batch_size]
        queue = queue[batch_size:]


def _schedule(settings: Cosine | Step, steps: int) -> Callable[[int], float]:
    """Share of the full learning rate at each step."""
    if isinstance(settings, Step):
        return lambda step: settings.factor ** sum(step >= at * steps for at in settings.drop_at)
    warm = max(1, round(settings.warmup * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return factor


def _optimizer(
    parameters: list[nn.Parameter], settings: TrainingSettings, learning_rate: float
) -> torch.optim.Optimizer:
    decay, chosen = settings.weight_decay, settings.optimizer
    if isinstance(chosen, Sgd):
        return torch.optim.SGD(
            parameters, learning_rate, chosen.momentum, weight_decay=decay, fused=True
        )
    return torch.optim.AdamW(parameters, learning_rate, weight_decay=decay, fused=True)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: on the accelerator, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def accumulate_gradients(
    loss: BatchLoss,
    images: Tensor,
    labels: Tensor,
    noise: Generator,
    progress: float,
    settings: TrainingSettings,
) -> Tensor:
    """Add the gradients of a batch's mean loss, a micro-batch at a time; return that loss.

    The gradients are those of the whole batch, batch normalisation aside, whose statistics are
    those of a micro-batch.
    """
    precision = pick_precision(settings.precision, images.device)
    size = settings.micro_batch_size or len(images)
    total = torch.zeros((), device=images.device)
    for part, part_labels in zip(images.split(size), labels.split(size), strict=True):
        with precision_context(images.device, precision):
            value = loss(part, part_labels, noise, progress) * (len(part) / len(images))
        value.backward()  # type: ignore[no-untyped-call]
        total += value.detach()
    return total


def fit(
    module: nn.Module,
    loss: BatchLoss,
    split: ImageSplit,
    settings: TrainingSettings,
    learning_rate: float,
    seed: int,
    after_step: Callable[[], None] = lambda: None,
) -> TrainingRecord:
    """Minimise `loss` over the parameters of `module` that require gradients.

    Noise is fresh at every step and depends on `seed` alone, so runs repeat bit for bit.
    `after_step` runs while the step's gradients are still there.

    Raises:
        BenchError: the loss is no longer finite.
    """
    device = next(module.parameters()).device
    parameters = [p for p in module.parameters() if p.requires_grad]
    steps = settings.steps
    optimizer = _optimizer(parameters, settings, learning_rate)
    scheduler = LambdaLR(optimizer, _schedule(settings.schedule, steps))
    noise = torch.Generator(device).manual_seed(seed)
    curve: list[tuple[int, float]] = []
    precision = pick_precision(settings.precision, device)
    begin = time.perf_counter()
    batches = track(batch_positions(split, settings.batch_size, steps, seed), steps, "training")
    for step, positions in enumerate(batches):
        images, labels = split.batch(positions).to(device), split.labels[positions].to(device)
        share = (step + 1) / steps
        value = accumulate_gradients(loss, images, labels, noise, share, settings)
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm or math.inf)
        optimizer.step()
        scheduler.step()
        after_step()
        optimizer.zero_grad()
        if step % max(1, steps // CURVE_POINTS) == 0 or step == steps - 1:
            curve.append((step, _finite(value.item(), step, learning_rate)))
    seconds = time.perf_counter() - begin
    images_seen = steps * settings.batch_size
    return TrainingRecord(images_seen, seconds, peak_memory(device), curve, precision)


def _finite(value: float, step: int, learning_rate: float) -> float:
    if not math.isfinite(value):
        raise BenchError(
            f"training loss is {value} at step {step}: lower learning_rate (now {learning_rate})"
        )
    return value


@torch.inference_mode()
def accuracy(
    classifier: nn.Module, split: ImageSplit, sigma: float = 0.0, seed: int = 0, batch: int = 500
) -> float:
    """Share of `split` classified correctly under one noise draw of `sigma` per image."""
    device = next(classifier.parameters()).device
    noise = torch.Generator(device).manual_seed(seed)
    hits = 0
    for positions in torch.arange(len(split.labels)).split(batch):
        images = split.batch(positions).to(device)
        if sigma:
            images = images + sigma * torch.randn(images.shape, generator=noise, device=device)
        hits += int((classifier(images).argmax(1).cpu() == split.labels[positions]).sum())
    return hits / len(split.labels)
