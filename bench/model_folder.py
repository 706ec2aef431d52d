"""The model folder: what every training writes and certification reads."""

import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from bench import replicas
from bench.backbones import Classifier, build_component, create_classifier
from bench.config import (
    BackboneSettings,
    Experiment,
    NoiseResolution,
    RemoteSettings,
)
from bench.data import Data
from bench.errors import BenchError
from bench.files import locked, read_json, sha256_file, sha256_json, share, write_json
from bench.parameterization_settings import Frozen, Parameterization
from bench.parameterizations import insert_modules
from bench.provenance import provenance
from bench.remote import RemoteClassifier, RemoteModel
from bench.settings import Settings
from bench.training import TrainingRecord
from bench.training_state import discard_state

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class Component(Settings):
    """A module of this project by name, with what builds it."""

    factory: str
    arguments: dict[str, JsonValue] = Field(default_factory=dict)


class ClassifierSpec(Settings):
    """How to rebuild the classifier that `model.safetensors` fills."""

    data: str
    classes: int
    channels: int
    backbone: BackboneSettings | RemoteSettings
    parameterization: Parameterization = Frozen()
    denoiser: Component | None = None
    noise_resolution: NoiseResolution = "native"
    weights_sha256: str = ""

    @property
    def noise_size(self) -> int | None:
        """Side that images are resized to before the noise; None leaves them as they are."""
        if isinstance(self.backbone, RemoteSettings):
            return None
        return self.backbone.noise_size(self.noise_resolution)

    @property
    def answers_sha256(self) -> str:
        """Hash of what the answers come from: the weights and all that says how to use them.

        Of a served model its identity, wherever it is served.
        """
        # As written: a key that a later version adds says nothing about this model.
        described = self.model_dump(mode="json", exclude_unset=True)
        if isinstance(self.backbone, RemoteSettings):
            described["backbone"] = self.backbone.model
        return sha256_json(described)


class Identity(Settings):
    """Which job of which experiment made a model folder."""

    experiment: str
    method: str
    sigma: float
    seed: int
    fingerprint: str


def identity_of(experiment: Experiment, method: str, sigma: float, seed: int) -> Identity:
    """The identity of the folder that this method is certified from at this sigma and seed."""
    sigma = experiment.training_sigma(method, sigma)
    fingerprint = experiment.training_fingerprint(method, sigma, seed)
    return Identity(
        experiment=experiment.name, method=method, sigma=sigma, seed=seed, fingerprint=fingerprint
    )


def spec_of(
    experiment: Experiment,
    data: Data,
    parameterization: Parameterization | None = None,
    denoiser: Component | None = None,
    noise_resolution: NoiseResolution = "native",
) -> ClassifierSpec:
    """The spec of a classifier on this experiment's backbone and data."""
    return ClassifierSpec(
        data=data.name,
        classes=data.classes,
        channels=data.shape[0],
        backbone=experiment.backbone.untrained,
        parameterization=parameterization or Frozen(),
        denoiser=denoiser,
        noise_resolution=noise_resolution,
    )


def save_model(
    folder: Path,
    classifier: Classifier,
    spec: ClassifierSpec,
    identity: Identity,
    cost: dict[str, Any],
    training: dict[str, Any],
    adapter: torch.nn.Module | None = None,
) -> None:
    """Write the model folder; `classifier.json` comes last, so a cut-off folder never loads.

    The state of the training, by which it could be continued until here, is deleted. Of processes
    that trained together the first alone writes.

    Args:
        folder: where to; files of the same names are replaced.
        classifier: what inference runs, adapters merged where they can be.
        spec: how to rebuild it.
        identity: which job this is.
        cost: `cost.json`, identity aside.
        training: `training.json`, identity aside.
        adapter: the peft model, saved beside in peft's own format.

    Raises:
        BenchError: a weight is not finite, or another run writes the folder.
    """
    _check_finite(classifier, folder)
    if replicas.rank():
        return
    with locked(folder):
        (folder / "classifier.json").unlink(missing_ok=True)
        found = _replace_weights(folder, classifier, adapter)
        named = identity.model_dump()
        write_json(folder / "training.json", {**named, **training})
        write_json(folder / "cost.json", {**named, **cost})
        hashed = spec.model_copy(update={"weights_sha256": found})
        write_json(folder / "classifier.json", hashed.model_dump())
        discard_state(folder)


def _check_finite(classifier: Classifier, folder: Path) -> None:
    broken = [name for name, p in classifier.named_parameters() if not bool(p.isfinite().all())]
    if broken:
        raise BenchError(f"{folder}: training left {broken[0]} not finite: lower learning_rate")


def _replace_weights(folder: Path, classifier: Classifier, adapter: nn.Module | None) -> str:
    """Write the weights into `folder` by renames; the sha256 of `model.safetensors`."""
    for left in folder.glob(".partial-*"):  # by a run that was killed while it wrote
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as scratch:
        partial = Path(scratch)
        _write_weights(partial, classifier, adapter)
        found = sha256_file(partial / "model.safetensors")
        for name in ADAPTER_FILES:  # an earlier method's: this one may have none
            (folder / name).unlink(missing_ok=True)
        for path in partial.iterdir():
            shutil.move(path, folder / path.name)
            share(folder / path.name)
    return found


def _write_weights(partial: Path, classifier: Classifier, adapter: nn.Module | None) -> None:
    """`model.safetensors`, and peft's own files beside it."""
    weights = {k: v.detach().cpu().contiguous() for k, v in classifier.state_dict().items()}
    save_file(weights, partial / "model.safetensors")
    if adapter is not None:
        adapter.save_pretrained(partial)  # type: ignore[operator]
        (partial / "README.md").unlink(missing_ok=True)


def training_report(
    record: TrainingRecord | None, device: torch.device, data: Data, settings: dict[str, Any]
) -> dict[str, Any]:
    """`training.json`: settings, loss curve, data hash and provenance."""
    run = asdict(record) if record else {"images": 0, "seconds": 0.0, "loss_curve": []}
    return {"settings": settings, **run, "data_sha256": data.sha256, **provenance(device)}


def load_classifier(folder: Path) -> Classifier:
    """Rebuild the classifier of a model folder, in float32 on the CPU, in evaluation mode.

    Raises:
        BenchError: a file is missing, was changed or does not fit.
    """
    spec = read_spec(folder)
    weights = _weights(folder, spec)
    classifier = _build(spec)
    classifier.denoiser = _front(spec)
    try:
        classifier.load_state_dict(weights)
    except RuntimeError as error:
        raise _unfit(folder, error) from None
    return classifier.eval()


def load_front(folder: Path) -> nn.Module | None:
    """What stands in front of the classifier of a model folder, without the classifier itself.

    In evaluation mode; None where nothing does.

    Raises:
        BenchError: a file is missing, was changed or does not fit.
    """
    spec = read_spec(folder)
    front = _front(spec)
    if front is None:
        return None
    prefix = "denoiser."
    weights = _weights(folder, spec)
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    try:
        front.load_state_dict(own)
    except RuntimeError as error:
        raise _unfit(folder, error) from None
    return front.eval()


def _weights(folder: Path, spec: ClassifierSpec) -> dict[str, torch.Tensor]:
    path = folder / "model.safetensors"
    if not path.exists():
        raise BenchError(f"{path} is missing: rerun the training that writes {folder}")
    if sha256_file(path) != spec.weights_sha256:
        raise BenchError(f"{path} was changed or cut off: delete {folder} and train again")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _unfit(folder, error) from None


def _unfit(folder: Path, error: Exception) -> BenchError:
    return BenchError(
        f"{folder}/model.safetensors does not fit classifier.json beside it ({error})"
    )


def _front(spec: ClassifierSpec) -> nn.Module | None:
    if spec.denoiser is None:
        return None
    return build_component(spec.denoiser.factory, spec.denoiser.arguments)


def _build(spec: ClassifierSpec) -> Classifier:
    if isinstance(spec.backbone, RemoteSettings):
        return RemoteClassifier(RemoteModel(spec.backbone))
    classifier = create_classifier(spec.backbone, spec.classes, spec.channels)
    if spec.noise_size is not None:
        # Images come resized.
        classifier.input_size = None
    insert_modules(classifier.network, spec.parameterization)
    return classifier


def read_spec(folder: Path) -> ClassifierSpec:
    """Read `classifier.json`.

    Raises:
        BenchError: it is missing or breaks the schema.
    """
    path = folder / "classifier.json"
    try:
        return ClassifierSpec.model_validate(read_json(path))
    except ValidationError as error:
        raise BenchError(f"{path} is not a model folder of this version:\n{error}") from None


def check_identity(folder: Path, expected: Identity, data: Data | None = None) -> None:
    """Refuse a model folder that another experiment, method, sigma, seed or setting made.

    Args:
        folder: the model folder.
        expected: whose it must be.
        data: on what it must have been trained, if that counts: settings name no images.

    Raises:
        BenchError: names the first key that differs.
    """
    found = read_json(folder / "training.json")
    images = {} if data is None else {"data_sha256": data.sha256}
    for key, value in {**expected.model_dump(), **images}.items():
        if found.get(key) != value:
            raise BenchError(
                f"{folder}/training.json: {key} is {found.get(key)!r}, this run needs {value!r}; "
                "the folder belongs to other settings: train again or name the right folder"
            )
