"""A few test images as the methods saw them, with each one's answer and certified radius."""

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bench.config import Experiment
from bench.data import load_data, spread
from bench.figures import STYLE, Look, fit_bars, save_figure
from bench.files import atomic_write, read_json
from bench.model_folder import load_front
from bench.smoothing.engine import PILOT
from bench.smoothing.log import read_protocol
from bench.smoothing.noise import key_tensor, noise_key, standard_normal
from bench.smoothing.rules import ABSTAIN
from bench.tables import read_complete

# Of each sigma, evenly spaced over the certified images: the choice must not flatter anyone.
IMAGES = 2
TITLE_WIDTH = 16  # letters over a picture
ANSWER = ["idx", "class", "clean_predict", "predict", "radius", "correct"]


class Example(NamedTuple):
    """One image at one sigma: every method's answer, and pixels `(1, C, H, W)` by their name."""

    sigma: float
    answers: pd.DataFrame
    pixels: dict[str, Tensor]


def build_examples(
    experiment: Experiment, logs: list[Path], models: list[Path], table: Path, figure: Path
) -> None:
    """Write what every method answers on a few images (CSV), and draw it (SVG and PNG).

    Args:
        experiment: the one that logs and models are of.
        logs: certification logs of one seed.
        models: the model folders that were certified.
        table: the CSV.
        figure: path of the figure, without its ending.

    Raises:
        BenchError: a file is missing, damaged or of another experiment.
    """
    answers = _answers(experiment, logs)
    with atomic_write(table) as temporary:
        answers.to_csv(temporary, index=False)
    examples = _examples(experiment, answers, _folders(models), read_protocol(logs[0]))
    with mpl.rc_context(STYLE):
        save_figure(_draw(examples, Look(answers)), figure)


def _answers(experiment: Experiment, logs: list[Path]) -> pd.DataFrame:
    """What each method answers on the chosen images, in the experiment's order."""
    parts = {}
    for path in logs:
        protocol, log = read_complete(experiment, path)
        log = log.sort_values("idx")
        name, sigma = protocol["method"], protocol["sigma"]
        method = experiment.point(name)
        point = {"method": name, "label": method.label, "family": method.family}
        point |= {"sigma": sigma, "seed": protocol["seed"]}
        chosen = log.iloc[spread(len(log), IMAGES).tolist()].rename(columns={"label": "class"})
        parts[name, sigma] = chosen[ANSWER].assign(**point)[[*point, *ANSWER]]
    points = dict.fromkeys((name, sigma) for name, sigma, _ in experiment.points())
    ordered = [parts[point] for point in points if point in parts]
    return pd.concat(ordered, ignore_index=True)


def _folders(models: list[Path]) -> dict[tuple[str, float], Path]:
    """Model folders by method and noise level of their training."""
    named = [(read_json(folder / "training.json"), folder) for folder in models]
    return {(identity["method"], identity["sigma"]): folder for identity, folder in named}


@torch.inference_mode()
def _examples(
    experiment: Experiment,
    answers: pd.DataFrame,
    folders: dict[tuple[str, float], Path],
    protocol: dict[str, Any],
) -> list[Example]:
    """Each image with the noise of its first pilot draw, before and after every front."""
    test = load_data(experiment.data).test
    examples = []
    for _, part in answers.groupby(["sigma", "idx"]):
        sigma, idx = float(part["sigma"].iloc[0]), int(part["idx"].iloc[0])
        image = test.batch(torch.tensor([idx]))
        key = noise_key(protocol["noise_seed"], protocol["data"], idx, PILOT, 0)
        noise = standard_normal(key_tensor([key], torch.device("cpu")), image.shape[1:])[:1]
        examples.append(Example(sigma, part, {"image": image, "with noise": image + sigma * noise}))
    for (method, level), folder in folders.items():
        seen = [
            example
            for example in examples
            if experiment.training_sigma(method, example.sigma) == level
            and not _drawn_for_its_owner(experiment, method, level, example)
        ]
        _add_front(seen, method, folder)
    return examples


def _drawn_for_its_owner(
    experiment: Experiment, method: str, level: float, example: Example
) -> bool:
    """Whether the front of `method` is that of another method with an answer on this example."""
    shared = experiment.point(method).denoiser
    if shared is None or shared.trained:
        return False
    owns = experiment.training_sigma(shared.of, example.sigma) == level
    return owns and shared.of in set(example.answers["method"])


def _add_front(examples: list[Example], method: str, folder: Path) -> None:
    """Add what stands in front of `method`, which is gone before the next one is loaded."""
    if (front := load_front(folder)) is None:
        return
    for example in examples:
        own = example.answers[example.answers["method"] == method]
        if len(own):
            noisy = example.pixels["with noise"]
            # Of several candidates (V, B, C, H, W) the first.
            pixels = front(noisy).reshape(-1, *noisy.shape[1:])[:1]
            example.pixels[own["label"].iloc[0]] = pixels


def _draw(examples: list[Example], look: Look) -> Figure:
    """A row per image: its pixels, then every method's radius and predicted class."""
    columns = list(dict.fromkeys(name for example in examples for name in example.pixels))
    height = max(1.8, 0.17 * len(look.colour) + 0.5)
    figure, axes = plt.subplots(
        len(examples),
        len(columns) + 1,
        figsize=(1.5 * len(columns) + 5, height * len(examples)),
        squeeze=False,
        layout="constrained",
        width_ratios=[1.5] * len(columns) + [3],
    )
    for row, example in zip(axes, examples, strict=True):
        for axis, name in zip(row, columns, strict=False):
            axis.axis("off")
            if name in example.pixels:
                shown = example.pixels[name][0].clamp(0, 1).permute(1, 2, 0).numpy()
                axis.imshow(shown, cmap="gray", vmin=0, vmax=1)
                axis.set_title(textwrap.fill(name, TITLE_WIDTH), fontsize=8)
        first = example.answers.iloc[0]
        row[0].set_title(f"image {first['idx']}, class {first['class']}", fontsize=8)
        row[1].set_title(f"with noise, σ = {example.sigma:g}", fontsize=8)
        _draw_answers(row[-1], example, look)
        row[-1].set_title("predicted class (hollow: wrong)", fontsize=8)
        largest = max(e.answers["radius"].max() for e in examples if e.sigma == example.sigma)
        row[-1].set_xlim(0, max(2 * example.sigma, 1.25 * largest))
    axes[-1, -1].set_xlabel("certified ℓ2 radius, in pixels as certified", fontsize=8)
    return figure


def _draw_answers(axis: Axes, example: Example, look: Look) -> None:
    for place, answer in enumerate(example.answers.to_dict("records")):
        colour = look.colour[answer["method"]]
        face = colour if answer["correct"] else "none"
        axis.barh(place, answer["radius"], facecolor=face, edgecolor=colour)
        said = "abstains" if answer["predict"] == ABSTAIN else f"{answer['predict']}"
        if not answer["correct"] and answer["predict"] != ABSTAIN:
            said += ", wrong"  # a bar of radius 0 cannot be seen to be hollow
        axis.text(answer["radius"], place, f" {said}", fontsize=7, va="center")
    axis.set_yticks(range(len(example.answers)), example.answers["label"], fontsize=7)
    fit_bars(axis, len(example.answers))
    axis.tick_params(axis="x", labelsize=7)
