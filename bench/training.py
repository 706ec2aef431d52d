"""The one training loop: base classifier, adapters, denoisers."""

import contextlib
import logging
import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from bench import replicas
from bench.augmentation import crop_and_flip
from bench.config import Cosine, Sgd, Step, TrainingSettings
from bench.data import ImageSplit
from bench.errors import BenchError
from bench.memory import out_of_memory
from bench.progress import track
from bench.provenance import pick_precision
from bench.training_state import FILES, TrainingState

log = logging.getLogger(__name__)
# (clean images (B, C, H, W) in [0, 1], labels (B,), noise source, share of steps) -> scalar loss
BatchLoss = Callable[[Tensor, Tensor, Generator, float], Tensor]
CURVE_POINTS = 50
NOISE_IMAGES = 500  # that noise is drawn for at once in a validation


@dataclass(frozen=True)
class TrainingRecord:
    """What a training run cost, over all its sittings, and how its loss went.

    `seconds` are those of all its processes; the peak is that of the first.
    """

    images: int
    seconds: float
    peak_memory_bytes: int
    loss_curve: list[tuple[int, float]]
    precision: str
    sittings: int = 1


class StepHook(Protocol):
    """What runs after every step while its gradients are there; its state is saved with the rest.

    The state is of tensors on the device of the training, numbers, texts, lists, and dicts of
    text.
    """

    def __call__(self) -> None:
        """Run after a step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What it keeps between steps."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        ...


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


@contextlib.contextmanager
def read_ahead(
    split: ImageSplit, batches: Iterable[Tensor], device: torch.device
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """Images and labels of each batch on `device`; the next is read while one is trained on.

    Decoding a batch of photographs takes longer than a GPU's step.
    """

    def read(positions: Tensor) -> list[Tensor]:
        found = [split.batch(positions), split.labels[positions]]
        # The GPU then copies them in its own time.
        return [part.pin_memory() for part in found] if device.type == "cuda" else found

    def in_order(pool: ThreadPoolExecutor) -> Iterator[tuple[Tensor, Tensor]]:
        reading = (pool.submit(read, positions) for positions in batches)
        # The second of a pair is being read when the first is waited for.
        for first, _ in pairwise(chain(reading, [Future()])):
            images, labels = first.result()
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    with ThreadPoolExecutor(1) as pool:
        yield in_order(pool)


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


@dataclass
class _Run:
    """What the steps of a training change, and what they have cost so far."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    noise: Generator
    hook: StepHook | None
    step: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    sittings: int = 1
    curve: list[tuple[int, float]] = field(default_factory=list)

    def _weights(self) -> dict[str, Tensor]:
        trained = {n: p.detach() for n, p in self.module.named_parameters() if p.requires_grad}
        return trained | dict(self.module.named_buffers())

    def state_dict(self) -> dict[str, Any]:
        """All that the steps to come depend on."""
        device = self.noise.device
        cuda = device.type == "cuda"
        return {
            "step": self.step,
            "seconds": self.seconds,
            "peak_memory_bytes": max(self.peak_memory_bytes, peak_memory(device)),
            "sittings": self.sittings,
            "curve": self.curve,
            "weights": self._weights(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "noise": replicas.gathered(self.noise.get_state()),
            # Dropout draws from the global generators.
            "random": replicas.gathered(torch.get_rng_state()),
            "random_cuda": replicas.gathered(torch.cuda.get_rng_state(device)) if cuda else None,
            "hook": self.hook.state_dict() if self.hook else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in a new sitting from what `state_dict` gave."""
        self.step, self.seconds = state["step"], state["seconds"]
        self.peak_memory_bytes, self.sittings = state["peak_memory_bytes"], state["sittings"] + 1
        self.curve = [(step, value) for step, value in state["curve"]]
        for name, weight in self._weights().items():
            weight.copy_(state["weights"][name])
        kept = state["optimizer"]
        self.optimizer.load_state_dict(
            {**kept, "state": {int(index): values for index, values in kept["state"].items()}}
        )
        self._lay_out_optimizer_state()
        self.scheduler.load_state_dict(state["scheduler"])
        own = replicas.rank()
        self.noise.set_state(state["noise"][own].cpu())
        torch.set_rng_state(state["random"][own].cpu())
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"][own].cpu(), self.noise.device)
        if self.hook:
            self.hook.load_state_dict(state["hook"])

    def _lay_out_optimizer_state(self) -> None:
        """Give moments the strides of their weights: fused kernels pair the two by address."""
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                if value is not None and value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter).copy_(value)


def _start(
    module: nn.Module,
    settings: TrainingSettings,
    learning_rate: float,
    seed: int,
    hook: StepHook | None,
    state: TrainingState | None,
) -> _Run:
    """A training before its first step, or where an interrupted one left `state`."""
    device = next(module.parameters()).device
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = _optimizer(trained, settings, learning_rate)
    scheduler = LambdaLR(optimizer, _schedule(settings.schedule, settings.steps))
    own = replicas.seed_of(seed)
    run = _Run(module, optimizer, scheduler, Generator(device).manual_seed(own), hook)
    if own != seed:  # the first goes on from where the module was made
        torch.manual_seed(own)
    if state is not None and (kept := state.load(device)) is not None:
        run.load_state_dict(kept)
        log.info("training goes on at step %d of %d", run.step, settings.steps)
    if len(set(map(int, replicas.gathered(torch.tensor(run.step))))) > 1:
        raise BenchError(
            "the processes of a training are of different machines or GPUs, and would go on from "
            f"different steps: delete {FILES} in the model's folder"
        )
    return run


def accumulate_gradients(
    loss: BatchLoss,
    images: Tensor,
    labels: Tensor,
    noise: Generator,
    progress: float,
    settings: TrainingSettings,
) -> Tensor:
    """Add the gradients of a batch's mean loss, a micro-batch at a time; return that loss.

    The gradients are those of the whole batch, but batch normalisation sees a micro-batch, and an
    objective that draws several noises per image draws others, of the same distribution.
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
    after_step: StepHook | None = None,
    state: TrainingState | None = None,
) -> TrainingRecord:
    """Minimise `loss` over the parameters of `module` that require gradients.

    Called in each of `settings.processes` processes (`bench.replicas`), all do so together. Noise
    is fresh at every step and depends on `seed` and the process alone, so runs repeat bit for bit,
    also those that go on from a `state` which an interrupted one left.

    Raises:
        BenchError: the loss is no longer finite, or other than `settings.processes` processes
            train here.
    """
    replicas.check_count(settings.processes)
    run = _start(module, settings, learning_rate, seed, after_step, state)
    device = run.noise.device
    before, begin = run.seconds, time.perf_counter()
    batches = batch_positions(split, settings.batch_size, settings.steps, seed)
    shares = map(replicas.share, islice(batches, run.step, None))
    with read_ahead(split, shares, device) as read:
        for images, labels in track(read, settings.steps - run.step, "training"):
            _step(run, loss, images, labels, settings)
            run.seconds = before + time.perf_counter() - begin
            if state is not None and replicas.agreed(state.due):
                state.save(run.state_dict())
    return TrainingRecord(
        images=settings.images_seen,
        seconds=run.seconds * replicas.count(),
        peak_memory_bytes=max(run.peak_memory_bytes, peak_memory(device)),
        loss_curve=run.curve,
        precision=pick_precision(settings.precision, device),
        sittings=run.sittings,
    )


def _step(
    run: _Run,
    loss: BatchLoss,
    images: Tensor,
    labels: Tensor,
    settings: TrainingSettings,
) -> None:
    """One step of the optimizer on a batch; a point of the loss curve now and then."""
    if settings.augmentation == "crop_and_flip":
        images = crop_and_flip(images, run.noise)
    steps, [group] = settings.steps, run.optimizer.param_groups
    share = (run.step + 1) / steps
    value = accumulate_gradients(loss, images, labels, run.noise, share, settings)
    replicas.average(group["params"], [value, *replicas.batch_statistics(run.module)])
    torch.nn.utils.clip_grad_norm_(group["params"], settings.clip_norm or math.inf)
    run.optimizer.step()
    run.scheduler.step()
    if run.hook:
        run.hook()
    run.optimizer.zero_grad()
    if run.step % max(1, steps // CURVE_POINTS) == 0 or run.step == steps - 1:
        run.curve.append((run.step, _finite(value.item(), run.step, group["initial_lr"])))
    run.step += 1


def _finite(value: float, step: int, learning_rate: float) -> float:
    if not math.isfinite(value):
        raise BenchError(
            f"training loss is {value} at step {step}: lower learning_rate (now {learning_rate})"
        )
    return value


@torch.inference_mode()
def accuracy(
    classifier: nn.Module,
    split: ImageSplit,
    sigma: float = 0.0,
    seed: int = 0,
    batch: int = NOISE_IMAGES,
) -> float:
    """Share of `split` classified correctly under one noise draw of `sigma` per image.

    Batches that do not fit into memory are halved, which changes no noise.
    """
    try:
        return _accuracy(classifier, split, sigma, seed, batch)
    except RuntimeError as error:
        if not out_of_memory(error) or batch == 1:
            raise
    return accuracy(classifier, split, sigma, seed, batch // 2)


def _accuracy(
    classifier: nn.Module, split: ImageSplit, sigma: float, seed: int, batch: int
) -> float:
    device = next(classifier.parameters()).device
    noise = torch.Generator(device).manual_seed(seed)
    hits = 0
    for positions in torch.arange(len(split.labels)).split(NOISE_IMAGES):
        images = split.batch(positions)
        drawn = sigma * torch.randn(images.shape, generator=noise, device=device)
        pairs = zip(images.split(batch), drawn.split(batch), strict=True)
        answers = torch.cat([classifier(part.to(device) + more).cpu() for part, more in pairs])
        # Where some logit is not a number, argmax names it: that is no answer.
        right = (answers.argmax(1) == split.labels[positions]) & answers.isfinite().all(1)
        hits += int(right.sum())
    return hits / len(split.labels)
