"""Certification jobs: a classifier and a protocol in, a log and its sidecar out."""

import logging
from collections import deque
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from bench.backbones import Classifier, compile_for_inference
from bench.config import CertificationSettings, Experiment, NoiseResolution
from bench.data import ImageSplit, load_data, spread
from bench.errors import BenchError
from bench.files import sha256_file, sha256_json, write_json
from bench.memory import out_of_memory, release_memory
from bench.model_folder import (
    ClassifierSpec,
    check_identity,
    identity_of,
    load_classifier,
    read_spec,
)
from bench.progress import track
from bench.provenance import (
    code_sha256,
    machine,
    model_sources,
    pick_device,
    pick_precision,
    provenance,
)
from bench.remote import RemoteClassifier
from bench.resolution import Resized, resized
from bench.smoothing.engine import Certificate, certify
from bench.smoothing.journal import Journal, kept_meaning
from bench.smoothing.log import (
    check_log_name,
    check_positive,
    cohen_path,
    read_own_log,
    write_cohen_log,
    write_log,
)
from bench.smoothing.noise import BLOCK
from bench.smoothing.protocol import Protocol, reachable_radii
from bench.smoothing.rules import Decide, plan_of
from bench.statistics import accuracy_interval

log = logging.getLogger(__name__)
# What a continued run may change: both only decide when to stop, see sequential.py.
STOPPING = ("n", "futility")
# Images do not affect each other; where they share alpha, `family_size` stays behind.
IMAGES = ("n_images", "images_sha256", "all_images_sha256")


@dataclass(frozen=True)
class Task:
    """What is certified, and the words for it in the sidecar."""

    classifier: Classifier
    model_sha256: str
    test: ImageSplit
    classes: int
    data_sha256: str
    wanted: Tensor
    protocol: Protocol
    settings: CertificationSettings
    names: dict[str, Any]


def protocol_of(
    settings: CertificationSettings,
    data: str,
    sigma: float,
    seed: int,
    radius_step: float,
    images: int,
) -> Protocol:
    """The protocol of certification settings at one sigma and seed."""
    family = images if settings.family == "dataset" else 1
    copied = ("mode", "n0", "n", "alpha", "horizon", "reserve", "reserve_at", "futility")
    return Protocol(
        sigma=sigma,
        # Of the horizon, not of n: a continued run must keep its grid.
        radii=reachable_radii(radius_step, sigma, settings.horizon, settings.alpha / family),
        family_size=family,
        seed=settings.noise_seed + seed,
        data=data,
        tolerance=settings.tolerance,
        candidate=settings.candidate,
        batch_size=settings.batch_size,
        **{name: getattr(settings, name) for name in copied},
    )


def certify_method(
    experiment: Experiment,
    method: str,
    sigma: float,
    seed: int,
    model: Path,
    output: Path,
    shard: int = 1,
) -> None:
    """Certify a model folder of an experiment; write the log and its JSON sidecar.

    Args:
        experiment: says how; its `certification.shards` deals images out to shards.
        method: its name in the experiment file.
        sigma: noise level in [0, 1] pixels.
        seed: of the model and the noise.
        model: the model folder.
        output: the log. Votes are kept beside it, and a rerun continues from them.
        shard: which share of the images, from 1.

    Raises:
        BenchError: the model folder is another's, sigma is 0, or there is no such shard.
    """
    check_positive(sigma=sigma)
    task = _task_of(experiment, method, sigma, seed, model, shard)
    run_task(task, output, experiment.gpus_per_job)


def _task_of(
    experiment: Experiment, method: str, sigma: float, seed: int, model: Path, shard: int
) -> Task:
    """What is certified for an experiment, and how."""
    spec = _spec_at(model, method, experiment.point(method).noise_resolution)
    data = resized(load_data(experiment.data), spec.noise_size)
    check_identity(model, identity_of(experiment, method, sigma, seed), data)
    settings, step = experiment.certification, experiment.radius_step
    wanted = spread(len(data.test.labels), settings.test_images)
    return Task(
        classifier=load_classifier(model),
        model_sha256=spec.answers_sha256,
        test=data.test,
        classes=data.classes,
        data_sha256=data.sha256,
        wanted=_dealt(wanted, settings.shards, shard),
        protocol=protocol_of(settings, data.name, sigma, seed, step, len(wanted)),
        settings=settings,
        names={
            "experiment": experiment.name,
            "method": method,
            "sigma": sigma,
            "seed": seed,
            "all_images_sha256": sha256_json(wanted.tolist()),
        },
    )


def _dealt(wanted: Tensor, shards: int, shard: int) -> Tensor:
    """The share of the images `wanted` that is this shard's, from 1."""
    if not 1 <= shard <= min(shards, len(wanted)):
        raise BenchError(
            f"--shard {shard}: certification.shards deals {len(wanted)} images out to {shards} "
            "shards, each of which needs one"
        )
    return wanted[shard - 1 :: shards]


def _spec_at(model: Path, method: str, resolution: NoiseResolution) -> ClassifierSpec:
    """The folder's spec; a baseline may have ignored where the method's noise is to be."""
    spec = read_spec(model)
    if spec.noise_resolution != resolution:
        raise BenchError(
            f"{model}/classifier.json: noise_resolution is {spec.noise_resolution}, "
            f"methods.{method} needs {resolution}, which its baseline must support"
        )
    return spec


def run_task(task: Task, output: Path, gpus: int = 0) -> pd.DataFrame:
    """Certify the wanted images, write log and sidecar, return the log.

    Where the device runs out of memory, batches are halved; the sidecar has the size that ran.

    Raises:
        BenchError: the experiment gives the job `gpus` and torch sees none; `output` does not end
            in .tsv, so its companions could overwrite others'; or no batch fits.
    """
    check_log_name(output)
    device = pick_device(gpus)
    images = task.test.batch(task.wanted).to(device)
    task.classifier.for_inference(pick_precision(task.settings.precision, device)).to(device)
    planned, votes = _meaning(task, device), output.with_suffix(".votes.jsonl")
    for size in _batch_sizes(planned, kept_meaning(votes)):
        meaning = {**planned, "batch_size": size}
        with closing(Journal(votes, sha256_json(_planned(meaning)))) as journal:
            try:
                rows = _certify_in_batches(task, size, images, journal)
            except RuntimeError as error:
                _expect_smaller_batches_to_fit(error, size, journal)
            else:
                _write_results(rows, meaning, device, output)
                return pd.DataFrame(rows)
        # Not while the error lives, whose traceback holds what did not fit.
        release_memory()
    raise BenchError(f"{device} is out of memory even for batches of {size}: free some and rerun")


def _batch_sizes(planned: dict[str, Any], kept: str | None) -> list[int]:
    """Images per batch to try in turn: first as planned, or as the votes that are kept had it."""
    sizes = [int(planned["batch_size"])]
    while half := sizes[-1] // 2 // BLOCK * BLOCK:
        sizes.append(half)
    for size in sizes:
        if sha256_json(_planned({**planned, "batch_size": size})) == kept:
            return sizes[sizes.index(size) :]
    return sizes


def _expect_smaller_batches_to_fit(error: RuntimeError, size: int, journal: Journal) -> None:
    """Return where `error` means that batches of `size` never fit.

    All votes of an image come from one batch shape, so those that are kept are not mixed.

    Raises:
        RuntimeError: `error`, which means something else.
        BenchError: such batches did fit before.
    """
    if not out_of_memory(error):
        raise error
    if journal.holds_votes:
        raise BenchError(
            f"out of memory, though batches of {size} images did fit before: free some and rerun, "
            "it continues; or lower certification.batch_size, which starts anew"
        )
    log.warning("batches of %d images do not fit into memory: halving them", size)


def _certify_in_batches(
    task: Task, size: int, images: Tensor, journal: Journal
) -> list[dict[str, Any]]:
    """Certificates of `images` `(N, C, H, W)` by batches of `size`, sorted by image."""
    if task.settings.compile:
        batch = images[:1].expand(size, *images.shape[1:]).clone()
        compile_for_inference(task.classifier, batch)
    protocol = replace(task.protocol, batch_size=size)
    labels, ids = task.test.labels[task.wanted].tolist(), task.wanted.tolist()
    stream = certify(task.classifier, images, labels, ids, protocol, task.classes, journal)
    state = Progress(ids)
    rows = [
        asdict(state.add(certificate))
        for certificate in track(stream, len(labels), "certifying", state.text)
    ]
    return sorted(rows, key=lambda row: int(row["idx"]))


def _write_results(
    rows: list[dict[str, Any]], meaning: dict[str, Any], device: torch.device, output: Path
) -> None:
    write_log(rows, output)
    write_cohen_log(rows, cohen_path(output))
    spent = {name: sum(row[key] for row in rows) for name, key in SPENT.items()}
    told = {**meaning, **spent, "log_sha256": sha256_file(output), **provenance(device)}
    write_json(output.with_suffix(".json"), told)


# Says where the code is from; what votes depend on is in `code_sha256` and `versions`.
CHECKOUT = ("git_revision", "git_dirty", "python")
SPENT = {"seconds": "time", "samples": "samples", "non_finite_votes": "non_finite"}


def _meaning(task: Task, device: torch.device) -> dict[str, Any]:
    """The sidecar: all that the certificates depend on."""
    protocol, settings = task.protocol, task.settings
    described = {key: value for key, value in asdict(protocol).items() if key != "seed"}
    if protocol.mode == "decide":
        # The plan holds it, resolved: writing it out for a continued run changes nothing.
        del described["reserve_at"]
        described["plan"] = plan_of(protocol).as_json()
        described["boundaries_sha256"] = Decide(protocol).table.sha256
    return {
        **described,
        **task.names,
        "noise_seed": protocol.seed,
        "alpha_per_image": protocol.alpha_per_image,
        **_resolution(task.test),
        "precision": _precision(task, device),
        "compile": "inductor" if settings.compile else "none",
        "n_images": len(task.wanted),
        "image_shape": list(task.test.batch(task.wanted[:1]).shape[1:]),
        "model_sha256": task.model_sha256,
        "data_sha256": task.data_sha256,
        "images_sha256": sha256_json(task.wanted.tolist()),
        "code_sha256": code_sha256(_sources(task.classifier)),
        "machine": machine(device),
        "versions": provenance(device)["versions"],
    }


def _precision(task: Task, device: torch.device) -> str:
    """Of the network; a served one's is its server's business, and not known here."""
    if isinstance(task.classifier, RemoteClassifier):
        return "served"
    return pick_precision(task.settings.precision, device)


def _resolution(test: ImageSplit) -> dict[str, Any]:
    """Where the noise is added, and what turns radii there into native ones."""
    if isinstance(test, Resized):
        return {"noise_resolution": "model", "native_radius_factor": 1 / test.operator_norm}
    return {"noise_resolution": "native", "native_radius_factor": 1.0}


def _planned(meaning: dict[str, Any]) -> dict[str, Any]:
    """What votes kept from an earlier run must have been drawn under; more images may join."""
    free = IMAGES + (STOPPING if meaning["mode"] == "decide" else ())
    return {key: value for key, value in meaning.items() if key not in free}


def _sources(classifier: Classifier) -> set[Path]:
    """What votes and decisions come from."""
    root = Path(__file__).parent
    stages = (root / f"{name}.py" for name in ("data", "resolution"))
    return {*model_sources(classifier), *root.glob("smoothing/*.py"), *stages, Path(__file__)}


class Progress:
    """Running text: certified correctly of the first images, with interval; samples per image.

    Images end in an order that depends on how clear their votes are, so those that have ended are
    no sample of all; the first ones of `ids` that have all ended are.
    """

    def __init__(self, ids: list[int]) -> None:
        self.waiting, self.ended = deque(ids), dict[int, int]()
        self.first, self.right, self.samples = 0, 0, 0

    def add(self, certificate: Certificate) -> Certificate:
        """Count one certificate and hand it on."""
        self.ended[certificate.idx] = certificate.correct
        self.samples += certificate.samples
        while self.waiting and self.waiting[0] in self.ended:
            self.first += 1
            self.right += self.ended[self.waiting.popleft()]
        return certificate

    def text(self) -> str:
        """For the progress bar."""
        if not self.ended:
            return ""
        drawn = f"{self.samples / len(self.ended):.0f} samples per image"
        if not self.first:
            return drawn
        low, high = accuracy_interval(self.right, self.first)
        share = 100 * self.right / self.first
        interval = f"[{100 * float(low):.1f}, {100 * float(high):.1f}]"
        return f"certified {share:.1f} % {interval} of the first {self.first}, {drawn}"


def _any_known(values: list[bool | None]) -> bool | None:
    """Whether any is true; None where one that is not known could be."""
    return True if True in values else None if None in values else False


# Where shards differ in these, all values are told.
EACH = ("git_revision", "machine")


def _check_apart(output: Path, shards: list[Path]) -> None:
    """Refuse to write over a shard, or a log over its own sidecar."""
    check_log_name(output)
    if output.resolve() in [path.resolve() for path in shards]:
        raise BenchError(f"--output {output} is one of the shards: name another file")


def gather(shards: list[Path], output: Path) -> None:
    """Put the logs of all shards together.

    Raises:
        BenchError: they do not belong together or do not cover the images; or `output` is one of
            them, or does not end in .tsv.
    """
    _check_apart(output, shards)
    read = [read_own_log(path) for path in shards]
    sidecars = [protocol for protocol, _ in read]
    own = {"n_images", "images_sha256", "log_sha256", *SPENT, "machine", "batch_size", *CHECKOUT}
    first = {key: value for key, value in sidecars[0].items() if key not in own}
    for path, sidecar in zip(shards, sidecars, strict=True):
        for key, value in first.items():
            if sidecar.get(key) != value:
                raise BenchError(f"{path}: {key} differs from {shards[0]}: certify both again")
    whole = pd.concat([log for _, log in read]).sort_values("idx")
    if whole["idx"].duplicated().any():
        raise BenchError(f"{shards[0]} and others list the same image: certify again")
    images = sha256_json(whole["idx"].tolist())
    if images != first.get("all_images_sha256", images):
        raise BenchError(f"{shards[0]} and others lack images of the run: name every shard")
    totals = {name: float(sum(s[name] for s in sidecars)) for name in SPENT}
    rows = whole[[field.name for field in fields(Certificate)]].to_dict("records")
    write_log(rows, output)
    write_cohen_log(rows, cohen_path(output))
    merged = {
        **sidecars[0],
        **totals,
        # A shard whose device had less memory may have halved its batches.
        "batch_size": min(sidecar["batch_size"] for sidecar in sidecars),
        "n_images": len(whole),
        "images_sha256": images,
        "log_sha256": sha256_file(output),
        **{key: "; ".join(dict.fromkeys(s[key] for s in sidecars)) for key in EACH},
        "git_dirty": _any_known([sidecar["git_dirty"] for sidecar in sidecars]),
        "shards": len(shards),
    }
    write_json(output.with_suffix(".json"), merged)
