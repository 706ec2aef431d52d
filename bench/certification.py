"""The certification job: a model folder and a protocol in, a log out."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.backbones import Classifier
from bench.config import Experiment
from bench.data import Data, load_data, spread
from bench.files import atomic_write, sha256_json, write_json
from bench.model_folder import check_identity, identity_of, load_classifier, read_spec
from bench.progress import track
from bench.provenance import machine, pick_device, provenance
from bench.smoothing.engine import Certificate, Protocol, certify
from bench.smoothing.log import write_log


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
