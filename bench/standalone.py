"""Certify any classifier on any images, outside an experiment."""

from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from pydantic import ValidationError

from bench.backbones import Classifier, classes_answered, create_classifier
from bench.certification import Task, protocol_of, run_task
from bench.config import (
    RESIZED,
    BackboneSettings,
    CertificationSettings,
    DataSettings,
    RemoteSettings,
    complaints,
)
from bench.data import ImageSplit, data_folder, fetch, labelled_folder, load_data, spread
from bench.errors import BenchError
from bench.files import YAML_ERRORS, sha256_file, sha256_json
from bench.model_folder import load_classifier, read_spec
from bench.provenance import tensors_sha256
from bench.remote import RemoteClassifier, RemoteModel
from bench.resolution import Resized
from bench.smoothing.log import check_positive
from bench.statistics import certified_accuracy

TIMM = "timm:"
HTTP = ("http://", "https://")


def certify_anything(
    model: str,
    data: str,
    sigma: float,
    images: int,
    step: float,
    changes: dict[str, str],
    output: Path,
    image_size: int | None = None,
) -> pd.DataFrame:
    """Certify `model` on `data`, write log and sidecar, return the certified accuracy.

    Args:
        model: a model folder, `timm:NAME` for that model's pretrained weights, or the address
            of a served model (docs/black-box.md).
        data: a data set that `bench fetch` knows, or a folder of `CLASS/IMAGE` files whose
            sorted class names are the classifier's outputs.
        sigma: noise level in [0, 1] pixels of the images as the classifier takes them. Radii
            are in these pixels; the sidecar has the factor that makes them native ones.
        images: how many test images, evenly spread.
        step: of the radius grid, l2 in [0, 1] pixels.
        changes: keys of `certification` with values as YAML text.
        output: the log.
        image_size: images of folders and of ImageNet are resized (short side) and cropped to it;
            None: to what the `timm:` model takes.

    Raises:
        BenchError: a value, a file or the pair of model and data cannot work.
    """
    check_positive(sigma=sigma, step=step)
    settings = _settings(changes, images)
    classifier, size, identity = _classifier(model)
    test, classes, name, digest = _test_images(data, image_size, size)
    test = _noised_images(model, test)
    _check_outputs(classifier, test, model, data, classes)
    wanted = spread(len(test.labels), settings.test_images)
    protocol = protocol_of(settings, name, sigma, 0, step, len(wanted))
    names: dict[str, Any] = {"model": model, "sigma": sigma, "seed": 0}
    task = Task(classifier, identity, test, classes, digest, wanted, protocol, settings, names)
    return certified_accuracy(run_task(task, output), protocol.radii)


def _settings(changes: dict[str, str], images: int) -> CertificationSettings:
    if taken := {"shards", "test_images"} & changes.keys():
        raise BenchError(f"--set {taken.pop()} means nothing here: --images has the number")
    try:
        values = {key: yaml.safe_load(text) for key, text in changes.items()}
        return CertificationSettings.model_validate({**values, "test_images": images})
    except ValidationError as error:
        raise BenchError(f"--images or --set:\n{complaints(error)}") from None
    except YAML_ERRORS as error:
        raise BenchError(f"--set: {error}") from None


def _classifier(model: str) -> tuple[Classifier, int | None, str]:
    """The classifier, the image size it takes (None: the data's own), and a hash of the model."""
    if model.startswith(HTTP):
        served = RemoteModel(RemoteSettings(url=model))
        return RemoteClassifier(served).eval(), None, served.description.model
    if not model.startswith(TIMM):
        return load_classifier(Path(model)), None, read_spec(Path(model)).answers_sha256
    import timm

    name = model.removeprefix(TIMM)
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # of a tag that it does not know
        config = None
    if config is None:
        raise BenchError(f"--model {model}: timm has no pretrained weights of that name")
    backbone = BackboneSettings(timm=name, pretrained=True)
    classifier = create_classifier(backbone, config.num_classes, 3)
    weights = tensors_sha256(classifier.state_dict())
    return classifier.eval(), int(config.input_size[-1]), weights


def _noised_images(model: str, test: ImageSplit) -> ImageSplit:
    """What noise is added to: `test`, resized where the model folder says so."""
    if model.startswith((*HTTP, TIMM)):
        return test
    size = read_spec(Path(model)).noise_size
    return test if size is None else Resized(test, size)


def _check_outputs(
    classifier: Classifier, test: ImageSplit, model: str, data: str, classes: int
) -> None:
    """Refuse a classifier that cannot take the first image or answers other classes."""
    image = test.batch(torch.tensor([0]))
    outputs = classes_answered(classifier, image, f"--model {model} --data {data}")
    if outputs != classes:
        raise BenchError(f"{model} answers {outputs} classes, {data} has {classes}")


def _test_images(
    data: str, asked: int | None, takes: int | None
) -> tuple[ImageSplit, int, str, str]:
    """Images, number of classes, the name that keys the noise, and a hash.

    Images that vary in size are resized to what was `asked` for, else to what the model takes.
    """
    folder = Path(data)
    varies = folder.is_dir() or data in RESIZED
    size = takes if asked is None and varies else asked
    if size is None and varies:
        raise BenchError(f"--data {data}: give --image-size, which its images are resized to")
    if folder.is_dir() and size is not None:
        split, classes = labelled_folder(folder, size)
        hashes = [[str(p.relative_to(folder)), sha256_file(p)] for p in split.paths]
        return split, classes, folder.name, sha256_json(hashes)
    try:
        # No image is trained or validated on here, and a folder may have few.
        values = {"name": data, "image_size": size, "validation_images": 1}
        settings = DataSettings.model_validate(values)
    except ValidationError as error:
        why = f"is neither a folder nor a data set here:\n{complaints(error)}"
        raise BenchError(f"--data {data} {why}") from None
    if not (data_folder(settings) / "manifest.json").exists():
        fetch(settings)
    found = load_data(settings)
    return found.test, found.classes, found.name, found.sha256
