"""Example images: the noise that certification used, the front of the folder, everyone's answer."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from baselines.denoised_smoothing.dncnn import DnCNN
from bench import examples
from bench.backbones import create_classifier
from bench.config import Experiment
from bench.data import ArraySplit, Data
from bench.errors import BenchError
from bench.examples import _answers, _draw, _examples, build_examples
from bench.figures import Look
from bench.model_folder import (
    Component,
    identity_of,
    load_classifier,
    load_front,
    save_model,
    spec_of,
)
from bench.smoothing import Protocol, certify
from bench.smoothing.log import write_log

METHODS = ["lora", "denoised_smoothing_mse"]
DNCNN = {"channels": 1, "depth": 3, "width": 4}
SEED = 2_000_003
IDS = [3, 0, 1, 2]


@pytest.fixture
def experiment(smoke: Experiment) -> Experiment:
    """Two methods of the smoke experiment, of which one has a denoiser."""
    return smoke.model_copy(update={"methods": {name: smoke.methods[name] for name in METHODS}})


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Data:
    """Four random test images in place of Fashion-MNIST."""
    pixels = torch.randint(256, (4, 1, 28, 28), generator=torch.Generator().manual_seed(1))
    split = ArraySplit(pixels.to(torch.uint8), torch.tensor([0, 1, 2, 3]))
    made = Data("fashion_mnist", 10, (1, 28, 28), "hash", split, split, split)
    monkeypatch.setattr(examples, "load_data", lambda settings: made)
    return made


def write_model(experiment: Experiment, method: str, data: Data, folder: Path) -> Path:
    """A model folder with random weights."""
    torch.manual_seed(0)
    classifier = create_classifier(experiment.backbone, data.classes, 1)
    component = None
    if method != "lora":
        component = Component(factory="baselines.denoised_smoothing.dncnn:DnCNN", arguments=DNCNN)
        classifier.denoiser = DnCNN(**DNCNN)
    identity = identity_of(experiment, method, 0.5, 0)
    save_model(folder, classifier, spec_of(experiment, data, None, component), identity, {}, {})
    return folder


def log_of(method: str, answers: dict[int, tuple[int, float]], path: Path) -> Path:
    """A log with these answers and radii; image i has class i."""
    rows = [
        {"idx": idx, "label": idx, "predict": predict, "radius": radius, "time": 0.1}
        | {"clean_predict": 5}
        for idx, (predict, radius) in answers.items()
    ]
    write_log(rows, path)
    sidecar = {"method": method, "sigma": 0.5, "seed": 0, "noise_seed": SEED, "data": "toy"}
    sidecar |= {"experiment": "smoke", "n_images": len(rows)}
    path.with_suffix(".json").write_text(json.dumps(sidecar))
    return path


@pytest.fixture
def files(experiment: Experiment, data: Data, tmp_path: Path) -> tuple[list[Path], list[Path]]:
    """Logs and model folders, in another order than the experiment's."""
    answers = {
        "denoised_smoothing_mse": {3: (3, 0.5), 0: (7, 0.25), 1: (1, 0.1), 2: (-1, 0.0)},
        "lora": {3: (3, 0.2), 0: (0, 0.75), 1: (1, 0.1), 2: (-1, 0.0)},
    }
    logs = [log_of(name, found, tmp_path / f"{name}.tsv") for name, found in answers.items()]
    models = [write_model(experiment, name, data, tmp_path / name) for name in answers]
    return logs, models


def test_answers_are_those_of_the_logs(
    experiment: Experiment, files: tuple[list[Path], list[Path]], tmp_path: Path
) -> None:
    build_examples(experiment, *files, tmp_path / "examples.csv", tmp_path / "figure")
    table = pd.read_csv(tmp_path / "examples.csv")
    assert table["method"].tolist() == [name for name in METHODS for _ in range(2)]
    # The first and the third of four.
    assert table["idx"].tolist() == table["class"].tolist() == [0, 2, 0, 2]
    assert table["predict"].tolist() == [0, -1, 7, -1]
    assert table["radius"].tolist() == [0.75, 0, 0.25, 0]
    assert table["correct"].tolist() == [1, 0, 0, 0]
    assert (tmp_path / "figure.svg").exists()


def test_pixels_are_those_that_certification_saw(
    experiment: Experiment, data: Data, files: tuple[list[Path], list[Path]], tmp_path: Path
) -> None:
    table = _answers(experiment, files[0])
    denoised = load_classifier(tmp_path / "denoised_smoothing_mse")
    folders = {("denoised_smoothing_mse", 0.5): tmp_path / "denoised_smoothing_mse"}
    protocol = {"noise_seed": SEED, "data": "toy"}
    shown = {
        int(e.answers["idx"].iloc[0]): e for e in _examples(experiment, table, folders, protocol)
    }

    class Spy(nn.Module):
        """Keeps the first noisy image of each batch."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []

        def forward(self, pixels: Tensor) -> Tensor:
            self.seen.append(pixels[0].clone())
            return torch.zeros(len(pixels), 10)

    spy = Spy().eval()
    settings = Protocol(sigma=0.5, mode="cohen", n=32, n0=32, seed=SEED, data="toy", batch_size=32)
    list(certify(spy, data.test.batch(torch.tensor([2])), [2], [2], settings, 10))
    clean, pilot, _ = spy.seen
    pixels = {name: batch[0] for name, batch in shown[2].pixels.items()}
    assert list(pixels) == ["image", "with noise", "DnCNN, MSE"]
    assert torch.equal(pixels["image"], clean)
    assert torch.allclose(pixels["with noise"], pilot, atol=1e-6)
    with torch.inference_mode():
        expected = denoised.denoiser(pixels["with noise"][None])[0]
    assert torch.equal(pixels["DnCNN, MSE"], expected)


def test_bars_tell_right_from_wrong_from_abstention(
    experiment: Experiment, files: tuple[list[Path], list[Path]]
) -> None:
    table = _answers(experiment, files[0])
    found = [*_examples(experiment, table, {}, {"noise_seed": 1, "data": "toy"})]
    figure = _draw(found, Look(table))
    plt.close(figure)
    bars = [axis for axis in figure.axes if axis.patches]
    lora, other = bars[0].patches
    assert (lora.get_width(), other.get_width()) == (0.75, 0.25)
    assert lora.get_facecolor()[3] == 1
    assert other.get_facecolor()[3] == 0
    assert [text.get_text().strip() for text in bars[0].texts] == ["0", "7, wrong"]
    assert [text.get_text().strip() for text in bars[1].texts] == ["abstains", "abstains"]


def test_a_front_is_loaded_without_its_classifier(
    experiment: Experiment, data: Data, files: tuple[list[Path], list[Path]]
) -> None:
    plain, denoised = sorted(files[1], reverse=True)
    assert load_front(plain) is None
    front, whole = load_front(denoised), load_classifier(denoised).denoiser
    assert isinstance(front, DnCNN)
    assert not front.training
    for name, weight in whole.state_dict().items():
        assert torch.equal(front.state_dict()[name], weight)
    (denoised / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(BenchError, match=r"model\.safetensors was changed or cut off"):
        load_front(denoised)
