"""Train a DnCNN and put it in front of the frozen base classifier."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from baselines.command import BaselineJob, run_baseline
from baselines.denoised_smoothing.dncnn import DnCNN
from baselines.denoised_smoothing.settings import DenoiserSettings
from bench.backbones import Classifier, set_fused_attention
from bench.cost import inference_flops, parameter_counts, training_flops
from bench.jobs import base_flops, cost_report, load_base
from bench.model_folder import Component, save_model, spec_of, training_report
from bench.objectives.noise import add_noise
from bench.training import accuracy, fit


def batch_loss(
    classifier: Classifier,
    objective: str,
    sigma: float,
    images: Tensor,
    noise: Generator,
) -> Tensor:
    """Salman et al., eq. 2 (`mse`) or eq. 3 (`stability`: the clean prediction is the target)."""
    assert classifier.denoiser is not None
    denoised = classifier.denoiser(add_noise(images, sigma, noise))
    if objective == "mse":
        return F.mse_loss(denoised, images)
    with torch.no_grad():
        target = classifier.classify(images).argmax(1)
    return F.cross_entropy(classifier.classify(denoised), target)


def train_denoiser(job: BaselineJob) -> None:
    """Train the denoiser of one method and sigma; write the denoised classifier's folder."""
    settings = job.settings_as(DenoiserSettings)
    classifier = load_base(job.experiment, job.base_folder).requires_grad_(False)
    arguments = {"channels": job.data.shape[0], "depth": settings.depth, "width": settings.width}
    denoiser = DnCNN(**arguments)
    classifier.denoiser = denoiser
    classifier.to(job.device)
    denoiser.to(memory_format=torch.channels_last)
    denoiser.train()

    def loss(images: Tensor, labels: Tensor, noise: Generator, progress: float) -> Tensor:
        return batch_loss(classifier, settings.objective, job.sigma, images, noise)

    counts = parameter_counts(denoiser, classifier)
    flops = {
        "training_flops": training_flops(loss, job.data.shape, job.training.images, classifier),
        "inference_flops": inference_flops(classifier.eval(), job.data.shape),
    }
    denoiser.train()
    set_fused_attention(classifier, job.device.type != "cpu")
    record = fit(denoiser, loss, job.data.train, job.training, job.learning_rate, job.seed)
    classifier.eval()
    cost = cost_report(record, counts, flops)
    cost["base_training_flops"] = base_flops(job.base_folder)
    report = training_report(record, job.device, job.data, job.training.model_dump())
    report["validation_sigma"] = job.sigma
    report["validation_accuracy"] = accuracy(classifier, job.data.validation, job.sigma, job.seed)
    factory = f"{DnCNN.__module__}:{DnCNN.__qualname__}"
    component = Component(factory=factory, arguments=dict(arguments))
    spec = spec_of(job.experiment, job.data, denoiser=component)
    save_model(job.output, classifier, spec, job.identity, cost, report)


if __name__ == "__main__":
    run_baseline(train_denoiser)
