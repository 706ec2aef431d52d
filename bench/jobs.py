"""The steps that rules run: pretrain, train, certify."""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from bench.backbones import Classifier, create_classifier, set_fused_attention
from bench.config import Experiment, TrainingSettings
from bench.cost import inference_flops, parameter_counts, training_flops
from bench.data import Data, load_data, spread
from bench.errors import BenchError
from bench.files import atomic_write, read_json, sha256_json, write_json
from bench.model_folder import (
    Identity,
    check_identity,
    identity_of,
    load_classifier,
    read_spec,
    save_model,
    spec_of,
    training_report,
)
from bench.objectives import OBJECTIVES
from bench.parameterizations import adapt
from bench.progress import track
from bench.provenance import machine, pick_device, provenance
from bench.smoothing.engine import Certificate, Protocol, certify
from bench.smoothing.log import write_log
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
        "cross_entropy",
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
    objective: str,
    sigma: float,
    learning_rate: float,
    seed: int,
) -> tuple[TrainingRecord, dict[str, Any]]:
    """Train `classifier` where it requires gradients; also count what that costs."""
    device = next(classifier.parameters()).device
    classifier.train()
    minimise = OBJECTIVES[objective]

    def loss(images: Tensor, labels: Tensor, noise: Generator) -> Tensor:
        return minimise(classifier, images, labels, sigma, noise)

    counts = parameter_counts(classifier, classifier)
    flops = {
        "training_flops": training_flops(loss, data.shape, settings.images, classifier),
        "inference_flops": inference_flops(classifier, data.shape),
    }
    # On CPUs the fused kernel's backward is slower than plain matrix products.
    set_fused_attention(classifier, device.type != "cpu")
    record = fit(classifier, loss, data.train, settings, learning_rate, seed)
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
    if base is None:
        classifier = create_classifier(experiment.backbone, data.classes, data.shape[0])
    else:
        classifier = load_base(experiment, base)
    classifier.network = adapt(classifier.network, point.parameterization)
    classifier.to(device)
    record: TrainingRecord | None = None
    cost: dict[str, Any] = {}
    if point.trains:
        assert point.learning_rate is not None
        record, cost = _fit_classifier(
            settings, classifier, data, point.objective.kind, sigma, point.learning_rate, seed
        )
    adapter = classifier.network if hasattr(classifier.network, "merge_and_unload") else None
    spec = spec_of(experiment, data, point.parameterization)
    merged = merge(classifier, adapter)
    if record is None:
        flops = {"training_flops": 0, "inference_flops": inference_flops(merged, data.shape)}
        cost = cost_report(None, parameter_counts(merged.requires_grad_(False), merged), flops)
    # Counted on the merged network: the unmerged one holds the head twice and pays for both paths.
    cost["total_parameters"] = sum(p.numel() for p in merged.parameters())
    cost["inference_flops"] = inference_flops(merged, data.shape)
    cost["base_training_flops"] = base_flops(base)
    report = training_report(record, device, data, settings.model_dump())
    merged.eval()
    report["validation_sigma"] = sigma
    report["validation_accuracy"] = accuracy(merged, data.validation, sigma, seed)
    identity = identity_of(experiment, method, sigma, seed)
    save_model(folder, merged, spec, identity, cost, report, adapter)


def merge(classifier: Classifier, adapter: torch.nn.Module | None) -> Classifier:
    """A classifier with the adapter folded into plain weights; `adapter` stays as it is."""
    if adapter is None:
        return classifier
    merged = copy.deepcopy(adapter).merge_and_unload()  # type: ignore[operator]
    result = Classifier(merged, (0.0,), (1.0,), classifier.input_size, classifier.denoiser)
    result.mean, result.std = classifier.mean, classifier.std
    return result


def protocol_of(experiment: Experiment, sigma: float, seed: int) -> Protocol:
    """The certification protocol of this experiment, sigma and seed."""
    settings = experiment.certification
    return Protocol(
        sigma=sigma,
        n0=settings.n0,
        n=settings.n,
        alpha=settings.alpha,
        seed=settings.noise_seed + seed,
        data=experiment.data.name,
        batch_size=settings.batch_size,
    )


def certify_model(
    experiment: Experiment, method: str, sigma: float, seed: int, model: Path, output: Path
) -> None:
    """Certify a model folder on the test images; write the log and its JSON sidecar.

    Finished images are kept in `<output>.partial`, from which a rerun continues.
    """
    check_identity(model, identity_of(experiment, method, sigma, seed))
    device = pick_device()
    data = load_data(experiment.data)
    classifier = load_classifier(model).for_inference(experiment.certification.precision)
    classifier.to(device)
    protocol = protocol_of(experiment, sigma, seed)
    wanted = spread(len(data.test.labels), experiment.certification.test_images)
    meaning = {
        "experiment": experiment.name,
        "method": method,
        "seed": seed,
        "mode": experiment.certification.mode,
        **{key: value for key, value in asdict(protocol).items() if key != "seed"},
        "noise_seed": protocol.seed,
        "noise_resolution": "native",
        "precision": experiment.certification.precision,
        "weights_sha256": read_spec(model).weights_sha256,
        "data_sha256": data.sha256,
        "images_sha256": sha256_json(wanted.tolist()),
        "machine": machine(device),
        "torch": torch.__version__,
    }
    rows = _certify_rows(classifier, data, wanted, protocol, device, meaning, output)
    sidecar = {
        **meaning,
        "n_images": len(rows),
        "seconds": sum(row["time"] for row in rows),
        **provenance(device),
    }
    write_log(rows, output)
    write_json(output.with_suffix(".json"), sidecar)
    _partial(output).unlink(missing_ok=True)


def _certify_rows(
    classifier: Classifier,
    data: Data,
    wanted: Tensor,
    protocol: Protocol,
    device: torch.device,
    meaning: dict[str, Any],
    output: Path,
) -> list[dict[str, Any]]:
    rows = _resume(output, sha256_json(meaning))
    rest = wanted[len(rows) :]
    if not len(rest):
        return rows
    stream = certify(
        classifier,
        data.test.batch(rest).to(device),
        data.test.labels[rest].tolist(),
        rest.tolist(),
        protocol,
        data.classes,
    )
    with _partial(output).open("a") as partial:
        for certificate in track(stream, len(rest), "certifying"):
            rows.append(_row(certificate))
            partial.write(json.dumps(rows[-1]) + "\n")
            partial.flush()
    return rows


def _row(certificate: Certificate) -> dict[str, Any]:
    values = asdict(certificate)
    first = ("idx", "label", "predict", "radius")
    return {
        **{key: values.pop(key) for key in first},
        "correct": certificate.correct,
        **values,
    }


def _partial(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def _resume(output: Path, meaning: str) -> list[dict[str, Any]]:
    """Rows of an interrupted run with the same meaning; otherwise start afresh."""
    path = _partial(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().split("\n") if path.exists() else []
    # The last piece is empty, or a line that a kill cut off.
    complete = [json.loads(line) for line in lines[:-1]]
    rows = complete[1:] if complete[:1] == [{"meaning": meaning}] else []
    with atomic_write(path) as temporary:
        kept = [{"meaning": meaning}, *rows]
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return rows
