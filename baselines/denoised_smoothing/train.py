"""Train a CNN denoiser and put it in front of the frozen base classifier."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from baselines.command import BaselineJob, run_baseline
from baselines.denoised_smoothing.dncnn import DnCNN
from baselines.denoised_smoothing.memnet import MemNet
from baselines.denoised_smoothing.settings import DenoiserSettings
from bench.backbones import Classifier, set_fused_attention
from bench.cost import inference_flops, parameter_counts, training_flops
from bench.jobs import cost_report, load_base, load_denoiser, validation
from bench.model_folder import Component, save_model, spec_of, training_report
from bench.objectives.noise import add_noise
from bench.training import BatchLoss, TrainingRecord, fit

ARCHITECTURES: dict[str, type[nn.Module]] = {"dncnn": DnCNN, "memnet": MemNet}


def mse(denoiser: nn.Module, sigma: float) -> BatchLoss:
    """Squared distance to the clean pixels (Salman et al., eq. 2)."""

    def loss(images: Tensor, labels: Tensor, noise: Generator, progress: float) -> Tensor:
        return F.mse_loss(denoiser(add_noise(images, sigma, noise)), images)

    return loss


def stability(denoiser: nn.Module, judge: Classifier, sigma: float) -> BatchLoss:
    """Cross-entropy to the judge's answer on the clean image (Salman et al., eq. 3)."""

    def loss(images: Tensor, labels: Tensor, noise: Generator, progress: float) -> Tensor:
        denoised = denoiser(add_noise(images, sigma, noise))
        with torch.no_grad():
            target = judge.classify(images).argmax(1)
        return F.cross_entropy(judge.classify(denoised), target)

    return loss


def in_turn(losses: list[BatchLoss], steps: int) -> BatchLoss:
    """One loss after the other, a batch each: surrogates are asked in turn, as published."""

    def loss(images: Tensor, labels: Tensor, noise: Generator, progress: float) -> Tensor:
        return losses[round(progress * steps) % len(losses)](images, labels, noise, progress)

    return loss


def new_denoiser(settings: DenoiserSettings, channels: int) -> tuple[nn.Module, Component]:
    """A denoiser with random weights, and what builds it."""
    kind = ARCHITECTURES[settings.architecture]
    arguments: dict[str, Any] = {"channels": channels, **settings.shape}
    component = Component(factory=f"{kind.__module__}:{kind.__qualname__}", arguments=arguments)
    return kind(**arguments), component


def build_denoiser(job: BaselineJob, settings: DenoiserSettings) -> tuple[nn.Module, Component]:
    """A new denoiser, or the one of another method to be trained on."""
    found, component = load_denoiser(job.experiment, job.method, job.sigma, job.seed, job.denoiser)
    if found is not None and component is not None:
        return found, component
    return new_denoiser(settings, job.data.shape[0])


def fit_denoiser(
    job: BaselineJob, settings: DenoiserSettings, classifier: Classifier
) -> tuple[TrainingRecord, dict[str, Any]]:
    """Train the denoiser of `classifier`; the certified classifier judges without surrogates."""
    denoiser = classifier.denoiser
    assert denoiser is not None
    judges = job.load_surrogates() or [classifier]
    losses = [mse(denoiser, job.sigma)]
    if settings.objective == "stability":
        losses = [stability(denoiser, judge, job.sigma) for judge in judges]
    counts = parameter_counts(denoiser, classifier)
    inference = inference_flops(classifier.eval(), job.data.shape)
    denoiser.train()
    shape, budget = job.data.shape, job.training
    shares = [training_flops(loss, shape, budget, denoiser, *judges) for loss in losses]
    for judge in judges:
        set_fused_attention(judge, job.device.type != "cpu")
    loss = in_turn(losses, budget.steps)
    record = fit(
        denoiser, loss, job.data.train, budget, job.learning_rate, job.seed, state=job.state()
    )
    flops = {"training_flops": sum(shares) // len(shares), "inference_flops": inference}
    return record, cost_report(record, counts, flops)


def train_denoiser(job: BaselineJob) -> None:
    """Train the denoiser of one method and sigma; write the denoised classifier's folder."""
    settings = DenoiserSettings.of(job.experiment, job.method)
    classifier = load_base(job.experiment, job.base_folder).requires_grad_(False)
    denoiser, component = build_denoiser(job, settings)
    classifier.denoiser = denoiser.to(memory_format=torch.channels_last)
    classifier.to(job.device)
    record, cost = fit_denoiser(job, settings, classifier)
    classifier.eval()
    cost = job.with_route(cost, denoiser)
    report = training_report(record, job.device, job.data, job.training.model_dump())
    report |= validation(classifier, job.data, job.sigma, job.seed)
    spec = spec_of(job.experiment, job.data, denoiser=component)
    save_model(job.output, classifier, spec, job.identity, cost, report)


if __name__ == "__main__":
    run_baseline(train_denoiser, spread=True)
