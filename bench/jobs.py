"""Training jobs: the base classifier and one point of the product."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from bench.backbones import (
    IMAGE_KEYS,
    Classifier,
    classes_answered,
    create_classifier,
    initial_weights,
    set_fused_attention,
)
from bench.config import BASE, CrossEntropy, Experiment, Method, Objective, TrainingSettings
from bench.cost import inference_flops, parameter_counts, training_flops
from bench.data import Data, load_data
from bench.errors import BenchError
from bench.files import read_json, sha256_json
from bench.model_folder import (
    Component,
    Identity,
    check_identity,
    identity_of,
    load_classifier,
    load_front,
    read_spec,
    save_model,
    spec_of,
    training_report,
)
from bench.objectives import OBJECTIVES
from bench.objectives.noise import Batch
from bench.parameterizations import adapt, step_hook
from bench.provenance import machine, pick_device, pick_precision, versions
from bench.resolution import resized
from bench.sources import sources_sha256, training_sources
from bench.training import TrainingRecord, accuracy, fit
from bench.training_state import TrainingState


def check_fingerprint(found: str, expected: str | None) -> None:
    """Stop when the experiment file changed after Snakemake planned this job.

    Raises:
        BenchError: the settings are not the planned ones.
    """
    if expected is not None and found != expected:
        raise BenchError(
            "the experiment file changed while the workflow ran: start snakemake again"
        )


def base_identity(experiment: Experiment, surrogate: str | None = None) -> Identity:
    """The identity of the experiment's base classifier, or of one that stands in for it.

    Raises:
        BenchError: the experiment has no such surrogate.
    """
    method, fingerprint = BASE, experiment.base_fingerprint
    if surrogate is not None:
        if surrogate not in experiment.surrogates:
            raise BenchError(f"--surrogate {surrogate}: {experiment.name} has no such surrogate")
        method = f"surrogates.{surrogate}"
        fingerprint = experiment.surrogate_fingerprint(surrogate)
    seed = experiment.seeds[0]
    return Identity(
        experiment=experiment.name, method=method, sigma=0.0, seed=seed, fingerprint=fingerprint
    )


def load_base(experiment: Experiment, folder: Path, surrogate: str | None = None) -> Classifier:
    """Load the base classifier, or a surrogate, and make sure that it is this experiment's."""
    check_identity(folder, base_identity(experiment, surrogate))
    return load_classifier(folder)


def load_start(
    experiment: Experiment, method: str, sigma: float, seed: int, folder: Path, data: Data
) -> Classifier:
    """The classifier that a method's training starts from, with a head for the classes of `data`.

    Raises:
        BenchError: `folder` belongs to other settings, or cannot be trained on.
    """
    start = experiment.point(method).start
    if start != BASE:
        check_identity(folder, identity_of(experiment, start, sigma, seed))
        classifier = load_classifier(folder)
        if classifier.denoiser is not None:
            raise BenchError(
                f"methods.{method}.start: {start} has a module in front, which would be lost: "
                "name a method without"
            )
        return classifier
    classifier = load_base(experiment, folder)
    if experiment.pretrain.data is not None:
        channels = read_spec(folder).channels
        if channels != data.shape[0]:
            raise BenchError(
                f"pretrain.data has {channels} channels, data has {data.shape[0]}: they must agree"
            )
        classifier.network.reset_classifier(data.classes)  # type: ignore[operator]
    return classifier


def load_denoiser(
    experiment: Experiment, method: str, sigma: float, seed: int, folder: Path | None
) -> tuple[nn.Module | None, Component | None]:
    """The denoiser that `method` takes from another one, and what builds it.

    It requires gradients where the method trains it on.

    Raises:
        BenchError: `folder` is missing, belongs to other settings or holds no denoiser.
    """
    shared = experiment.point(method).denoiser
    if shared is None or folder is None:
        if shared is not None or folder is not None:
            raise BenchError(f"methods.{method}.denoiser and --denoiser go together: give both")
        return None, None
    check_identity(folder, identity_of(experiment, shared.of, sigma, seed))
    denoiser = load_front(folder)
    if denoiser is None:
        raise BenchError(
            f"methods.{method}.denoiser.of: {shared.of} has no denoiser: name a method that has one"
        )
    return denoiser.requires_grad_(shared.trained), read_spec(folder).denoiser


def base_flops(*bases: Path | None) -> int | None:
    """Training FLOPs of base and surrogates; None where one starts from weights of others."""
    costs = [read_json(folder / "cost.json") for folder in bases if folder is not None]
    if any(cost.get("base_training_flops", 0) is None for cost in costs):
        return None
    return sum(int(cost["training_flops"]) for cost in costs)


def route_cost(
    cost: dict[str, Any],
    point: Method,
    base: Path | None,
    denoiser: Path | None,
    front: nn.Module | None,
) -> dict[str, Any]:
    """`cost` with what came before; `front` is the denoiser of the folder `denoiser`.

    Another method that the training starts from, or whose denoiser it takes, is paid for from the
    base on. What a borrowed denoiser trained is part of the model; of a route of several steps
    the parameters are those of the last.
    """
    start = base if point.start != BASE else None
    before = [read_json(folder / "cost.json") for folder in (start, denoiser) if folder is not None]
    if not before:
        return {**cost, "base_training_flops": base_flops(base)}
    keys = ["training_flops", "training_seconds", "training_images", "queries"]
    spent = {key: cost[key] + sum(earlier[key] for earlier in before) for key in keys}
    spent["peak_memory_bytes"] = max(c["peak_memory_bytes"] for c in (cost, *before))
    if front is not None and point.denoiser is not None and not point.denoiser.trained:
        # One that comes pretrained has trained nothing here.
        size = sum(p.numel() for p in front.parameters())
        borrowed = min(size, before[-1]["trainable_parameters"])
        spent["trainable_parameters"] = cost["trainable_parameters"] + borrowed
    # Both began with the same base.
    return {**cost, **spent, "base_training_flops": before[0]["base_training_flops"]}


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


def state_of(
    folder: Path,
    identity: Identity,
    data: Data,
    settings: TrainingSettings,
    device: torch.device,
    starts: list[str],
    *baselines: str | None,
) -> TrainingState:
    """Where an interrupted training of this very model folder stands.

    Args:
        folder: the model folder to come.
        identity: which training this is.
        data: what is trained on.
        settings: of the training.
        device: where it runs.
        starts: hashes of the weights that it starts from or asks.
        baselines: folders under `baselines/` whose code trains, or is trained or passed through.
    """
    meaning = {
        **identity.model_dump(),
        "data": data.sha256,
        "starts": starts,
        "sources": sources_sha256(*training_sources(*baselines)),
        "versions": versions(),
        "machine": machine(device),
        "precision": pick_precision(settings.precision, device),
    }
    return TrainingState(folder, sha256_json(meaning))


def pretrain(experiment: Experiment, folder: Path, surrogate: str | None = None) -> None:
    """Train the base classifier, or a surrogate, on clean images and write its model folder."""
    identity = base_identity(experiment, surrogate)
    if surrogate is not None:
        update = {"backbone": experiment.surrogates[surrogate]}
        experiment = experiment.model_copy(update=update)
    torch.manual_seed(identity.seed)
    device = pick_device(experiment.gpus_per_job)
    data = load_data(experiment.base_data)
    classifier = create_classifier(experiment.backbone, data.classes, data.shape[0]).to(device)
    classes_answered(classifier, torch.zeros(1, *data.shape, device=device), IMAGE_KEYS)
    settings = experiment.pretrain
    initial = initial_weights(experiment.backbone, classifier.network)
    starts = [initial["sha256"]] if initial is not None else []
    record, cost = None, cost_report(None, {}, {})
    if settings.learning_rate is not None:
        record, cost = _fit_classifier(
            settings,
            classifier,
            data,
            CrossEntropy(),
            sigma=0.0,
            learning_rate=settings.learning_rate,
            seed=identity.seed,
            state=state_of(folder, identity, data, settings, device, starts),
        )
    report = training_report(record, device, data, settings.model_dump())
    report["initial_weights"] = initial
    # What others' weights have cost is not known, and is not nothing.
    before = None if initial is not None else 0
    cost = _certified_cost(cost, classifier.eval(), data) | {"base_training_flops": before}
    report["validation_accuracy"] = accuracy(classifier, data.validation)
    save_model(folder, classifier, spec_of(experiment, data), identity, cost, report)


def _fit_classifier(
    settings: TrainingSettings,
    classifier: Classifier,
    data: Data,
    objective: Objective,
    sigma: float,
    learning_rate: float,
    seed: int,
    state: TrainingState,
) -> tuple[TrainingRecord, dict[str, Any]]:
    """Train `classifier` where it requires gradients; also count what that costs."""
    device = next(classifier.parameters()).device
    minimise, hyperparameters = OBJECTIVES[objective.kind], objective.at(sigma)

    def loss(images: Tensor, labels: Tensor, noise: Generator, progress: float) -> Tensor:
        batch = Batch(images, labels, sigma, noise, progress)
        return minimise(classifier, batch, **hyperparameters)

    counts = parameter_counts(classifier, classifier)
    inference = inference_flops(classifier.eval(), data.shape)
    set_training_mode(classifier)
    flops = {
        "training_flops": training_flops(loss, data.shape, settings, classifier),
        "inference_flops": inference,
    }
    # On CPUs the fused kernel's backward is slower than plain matrix products.
    set_fused_attention(classifier, device.type != "cpu")
    hook = step_hook(classifier.network)
    record = fit(classifier, loss, data.train, settings, learning_rate, seed, hook, state)
    return record, cost_report(record, counts, flops)


def set_training_mode(classifier: Classifier) -> None:
    """Training mode, but what is frozen keeps its batch statistics."""
    classifier.train()
    front = classifier.denoiser
    if front is not None and not any(p.requires_grad for p in front.parameters()):
        front.eval()
    for module in classifier.modules():
        frozen = [not p.requires_grad for p in module.parameters(recurse=False)]
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and frozen and all(frozen):
            module.eval()


def train(
    experiment: Experiment,
    method: str,
    sigma: float,
    seed: int,
    base: Path | None,
    folder: Path,
    denoiser: Path | None = None,
) -> None:
    """Train one point of the product and write its model folder.

    Args:
        experiment, method: the experiment, and a name in its file.
        sigma: noise level in [0, 1] pixels; one that the method fixes for its training wins.
        seed: of initialisation, batches and noise.
        base: folder of the base, or of the method in `start`; None for training from scratch.
        folder: where the model goes.
        denoiser: folder of the method whose denoiser stands in front, if one does.
    """
    point, sigma = experiment.point(method), experiment.training_sigma(method, sigma)
    settings = experiment.method_training(method)
    torch.manual_seed(seed)
    size = experiment.backbone.noise_size(point.noise_resolution)
    device, data = pick_device(experiment.gpus_per_job), resized(load_data(experiment.data), size)
    classifier = _starting_point(experiment, method, sigma, seed, base, data)
    classifier.denoiser, component = load_denoiser(experiment, method, sigma, seed, denoiser)
    classifier.to(device)
    identity = identity_of(experiment, method, sigma, seed)
    record, cost = None, cost_report(None, {}, {})
    if (rate := point.learning_rate) is not None:
        starts = [read_spec(f).weights_sha256 for f in (base, denoiser) if f is not None]
        place = (folder, identity, data, settings, device)
        state = state_of(*place, starts, experiment.lender(method))
        how = (point.objective, sigma, rate, seed, state)
        record, cost = _fit_classifier(settings, classifier, data, *how)
    adapter = classifier.network if hasattr(classifier.network, "merge_and_unload") else None
    spec = spec_of(experiment, data, point.parameterization, component, point.noise_resolution)
    merged = merge(classifier, adapter).eval()
    cost = route_cost(_certified_cost(cost, merged, data), point, base, denoiser, merged.denoiser)
    report = training_report(record, device, data, settings.model_dump())
    report |= validation(merged, data, sigma, seed)
    save_model(folder, merged, spec, identity, cost, report, adapter)


def validation(classifier: Classifier, data: Data, sigma: float, seed: int) -> dict[str, float]:
    """Part of `training.json`: accuracy under noise of `sigma`, by which tuning chooses."""
    found = accuracy(classifier, data.validation, sigma, seed)
    return {"validation_sigma": sigma, "validation_accuracy": found}


def _starting_point(
    experiment: Experiment, method: str, sigma: float, seed: int, base: Path | None, data: Data
) -> Classifier:
    """What the method starts from, or a random classifier for `scratch`, ready to be trained."""
    point = experiment.point(method)
    if (base is None) != (point.parameterization.kind == "scratch"):
        raise BenchError(
            f"{point.label}: --base and parameterization.kind = scratch exclude each other, and "
            "every other kind needs a base; scratch methods take `baseline: gaussian_retraining`"
        )
    if base is None:
        backbone = experiment.backbone.untrained
        classifier = create_classifier(backbone, data.classes, data.shape[0])
    else:
        classifier = load_start(experiment, method, sigma, seed, base, data)
    # At the model's resolution images come resized, whatever the start took.
    native = point.noise_resolution == "native"
    classifier.input_size = experiment.backbone.input_size if native else None
    classes_answered(classifier, torch.zeros(1, *data.shape), IMAGE_KEYS)
    steps = experiment.method_training(method).steps
    classifier.network = adapt(classifier.network, point.parameterization, steps)
    return classifier


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
