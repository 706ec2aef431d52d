"""Training jobs: the base classifier and one point of the product."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from bench.backbones import Classifier, create_classifier, set_fused_attention
from bench.config import CrossEntropy, Experiment, Method, Objective, TrainingSettings
from bench.cost import inference_flops, parameter_counts, training_flops
from bench.data import Data, load_data
from bench.errors import BenchError
from bench.files import read_json
from bench.model_folder import (
    Identity,
    check_identity,
    identity_of,
    load_classifier,
    save_model,
    spec_of,
    training_report,
)
from bench.objectives import OBJECTIVES
from bench.objectives.noise import Batch
from bench.parameterizations import adapt, step_hook
from bench.provenance import pick_device
from bench.training import TrainingRecord, accuracy, fit

BASE = "base"


def check_fingerprint(found: str, expected: str | None) -> None:
    """Stop when the experiment file changed after Snakemake planned this job.

    Raises:
        BenchError: the settings are not the planned ones.
    """
    if expected is not None and found != expected:
        raise BenchError(
            "the experiment file changed while the workflow ran: start snakemake again"
        )


def base_identity(experiment: Experiment) -> Identity:
    """The identity of the experiment's base classifier."""
    return Identity(
        experiment=experiment.name,
        method=BASE,
        sigma=0.0,
        seed=experiment.seeds[0],
        fingerprint=experiment.base_fingerprint,
    )


def load_base(experiment: Experiment, folder: Path) -> Classifier:
    """Load the base classifier and make sure that it is this experiment's."""
    check_identity(folder, base_identity(experiment))
    return load_classifier(folder)


def base_flops(base: Path | None) -> int:
    """Training FLOPs of the base that a method starts from; 0 without one."""
    return int(read_json(base / "cost.json")["training_flops"]) if base else 0


def cost_report(
    record: TrainingRecord | None, counts: dict[str, Any], flops: dict[str, int]
) -> dict[str, Any]:
    """`cost.json`, identity aside."""
    return {
        **counts,
        **flops,
        "training_images": record.images if record else 0,
        "training_seconds": record.seconds if record else 0.0,
        "peak_memory_bytes": record.peak_memory_bytes if record else 0,
        "queries": 0,
    }


def pretrain(experiment: Experiment, folder: Path) -> None:
    """Train the base classifier on clean images and write its model folder."""
    identity = base_identity(experiment)
    torch.manual_seed(identity.seed)
    device = pick_device()
    data = load_data(experiment.data)
    classifier = create_classifier(experiment.backbone, data.classes, data.shape[0]).to(device)
    record, cost = _fit_classifier(
        experiment.pretrain,
        classifier,
        data,
        CrossEntropy(),
        sigma=0.0,
        learning_rate=experiment.pretrain.learning_rate,
        seed=identity.seed,
    )
    report = training_report(record, device, data, experiment.pretrain.model_dump())
    classifier.eval()
    report["validation_accuracy"] = accuracy(classifier, data.validation)
    cost["base_training_flops"] = 0
    save_model(folder, classifier, spec_of(experiment, data), identity, cost, report)


def _fit_classifier(
    settings: TrainingSettings,
    classifier: Classifier,
    data: Data,
    objective: Objective,
    sigma: float,
    learning_rate: float,
    seed: int,
) -> tuple[TrainingRecord, dict[str, Any]]:
    """Train `classifier` where it requires gradients; also count what that costs."""
    device = next(classifier.parameters()).device
    classifier.train()
    minimise, hyperparameters = OBJECTIVES[objective.kind], objective.at(sigma)

    def loss(images: Tensor, labels: Tensor, noise: Generator, progress: float) -> Tensor:
        batch = Batch(images, labels, sigma, noise, progress)
        return minimise(classifier, batch, **hyperparameters)

    counts = parameter_counts(classifier, classifier)
    flops = {
        "training_flops": training_flops(loss, data.shape, settings.images, classifier),
        "inference_flops": inference_flops(classifier, data.shape),
    }
    # On CPUs the fused kernel's backward is slower than plain matrix products.
    set_fused_attention(classifier, device.type != "cpu")
    hook = step_hook(classifier.network)
    record = fit(classifier, loss, data.train, settings, learning_rate, seed, hook)
    return record, cost_report(record, counts, flops)


def train(
    experiment: Experiment,
    method: str,
    sigma: float,
    seed: int,
    base: Path | None,
    folder: Path,
) -> None:
    """Train one point of the product and write its model folder.

    Args:
        experiment: the experiment.
        method: its name in the experiment file.
        sigma: noise level in [0, 1] pixels.
        seed: of initialisation, batches and noise.
        base: folder of the base classifier; None for training from scratch.
        folder: where the model goes.
    """
    point = experiment.point(method)
    settings = experiment.method_training(method)
    torch.manual_seed(seed)
    device = pick_device()
    data = load_data(experiment.data)
    classifier = _starting_point(experiment, point, base, data)
    classifier.network = adapt(classifier.network, point.parameterization, settings.steps)
    classifier.to(device)
    record, cost = None, cost_report(None, {}, {})
    if point.learning_rate is not None:
        record, cost = _fit_classifier(
            settings, classifier, data, point.objective, sigma, point.learning_rate, seed
        )
    adapter = classifier.network if hasattr(classifier.network, "merge_and_unload") else None
    spec = spec_of(experiment, data, point.parameterization)
    merged = merge(classifier, adapter)
    cost = _certified_cost(cost, merged, data) | {"base_training_flops": base_flops(base)}
    report = training_report(record, device, data, settings.model_dump())
    merged.eval()
    report["validation_sigma"] = sigma
    report["validation_accuracy"] = accuracy(merged, data.validation, sigma, seed)
    identity = identity_of(experiment, method, sigma, seed)
    save_model(folder, merged, spec, identity, cost, report, adapter)


def _starting_point(
    experiment: Experiment, point: Method, base: Path | None, data: Data
) -> Classifier:
    """The base classifier, or a random one for training from scratch."""
    if (base is None) != (point.parameterization.kind == "scratch"):
        raise BenchError(
            f"{point.label}: --base and parameterization.kind = scratch exclude each other, and "
            "every other kind needs a base; scratch methods take `baseline: gaussian_retraining`"
        )
    if base is None:
        return create_classifier(experiment.backbone, data.classes, data.shape[0])
    return load_base(experiment, base)


def _certified_cost(cost: dict[str, Any], merged: Classifier, data: Data) -> dict[str, Any]:
    """`cost` with what concerns the certified network.

    It is counted merged: the unmerged one holds the head twice and pays for both paths.
    """
    untrained = {"trainable_parameters": 0, "head_parameters": 0, "training_flops": 0}
    total = sum(p.numel() for p in merged.parameters())
    flops = inference_flops(merged, data.shape)
    return untrained | cost | {"total_parameters": total, "inference_flops": flops}


def merge(classifier: Classifier, adapter: torch.nn.Module | None) -> Classifier:
    """A classifier with the adapter folded into plain weights; `adapter` stays as it is."""
    if adapter is None:
        return classifier
    merged = copy.deepcopy(adapter).merge_and_unload()  # type: ignore[operator]
    result = Classifier(merged, (0.0,), (1.0,), classifier.input_size, classifier.denoiser)
    result.mean, result.std = classifier.mean, classifier.std
    return result
