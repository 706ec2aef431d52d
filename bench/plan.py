"""The bill of an experiment before it runs: jobs, FLOPs, hours, memory and disk per stage.

FLOPs are counted on networks without weights, so nothing is fetched; hours follow from a rate.
How many draws an image takes is expected by replaying the sequential test on assumed p_A.
"""

import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import norm
from torch import Generator, Tensor, nn

from bench.backbones import IMAGE_KEYS, Classifier, classes_answered, create_classifier
from bench.certification import protocol_of
from bench.config import (
    BackboneSettings,
    CrossEntropy,
    Experiment,
    Method,
    Objective,
    Sgd,
    TrainingSettings,
)
from bench.data import Description, describe
from bench.errors import BenchError
from bench.expected import expected_draws
from bench.files import atomic_write
from bench.objectives import OBJECTIVES
from bench.objectives.noise import Batch
from bench.parameterization_settings import Boft
from bench.parameterizations import adapt, insert_modules
from bench.rates import Rate
from bench.smoothing.engine import needs_pilot
from bench.sources import baseline_folder
from bench.training import BatchLoss
from bench.weightless import Pass, follow, for_inference, without_weights

# Phi^-1(p_A) by noise level, at 30 evenly spaced quantiles of the images in Cohen's six logs of
# CIFAR-10 and ImageNet at these levels (locuslab/smoothing@78a4d94, N = 100,000; 927, 1,000 and
# 1,000 images). Where a log abstains, p_A is taken as uniform between 0.25 and 0.505, since it
# does not tell.
ASSUMED_Z = {
    0.25: (
        -0.46, -0.23, -0.00, 0.17, 0.26, 0.43, 0.54, 0.69, 0.84, 0.99,
        1.13, 1.34, 1.58, 1.77, 1.94, 2.17, 2.35, 2.59, 2.80, 2.99,
        3.24, 3.55, 3.92, 4.42, 4.42, 4.42, 4.42, 4.42, 4.42, 4.42,
    ),
    0.5: (
        -0.57, -0.38, -0.25, -0.13, -0.03, 0.07, 0.19, 0.27, 0.39, 0.50,
        0.61, 0.71, 0.81, 0.91, 1.04, 1.23, 1.38, 1.60, 1.78, 1.96,
        2.19, 2.38, 2.64, 2.88, 3.18, 3.55, 4.12, 4.42, 4.42, 4.42,
    ),
    1.0: (
        -0.62, -0.52, -0.43, -0.34, -0.26, -0.21, -0.13, -0.06, 0.00, 0.06,
        0.11, 0.19, 0.25, 0.35, 0.42, 0.53, 0.66, 0.76, 0.85, 1.00,
        1.10, 1.26, 1.46, 1.68, 1.93, 2.16, 2.49, 2.95, 3.66, 4.42,
    ),
}  # fmt: skip
ASSUMPTION = "p_A as in Cohen's logs of 2019 at the nearest sigma"
STAGES = ("pretrain", "train", "certify", "other")


class Line(NamedTuple):
    """Jobs of one stage and method: FLOPs and disk of all together, memory of one.

    `evaluation_flops` are forward passes without gradient, which have a rate of their own.
    """

    stage: str
    method: str
    jobs: int
    training_flops: float = 0.0
    evaluation_flops: float = 0.0
    memory_bytes: float = 0.0
    disk_bytes: float = 0.0


@dataclass(frozen=True)
class Planned:
    """What training a method takes, and the classifier that is certified, without weights.

    `evaluated` images pass through that classifier in all trainings together, without gradient;
    what they take is added to the last of `lines`.
    """

    lines: list[Line]
    classifier: Classifier
    evaluated: int


@dataclass(frozen=True)
class Planner:
    """Counts what the jobs of an experiment take; `auto` is what `precision: auto` means there."""

    experiment: Experiment
    auto: str

    @property
    def data(self) -> Description:
        """The experiment's data."""
        return describe(self.experiment.data)

    def shape_of(self, method: Method) -> tuple[int, int, int]:
        """Shape of the images that a method's noise is added to."""
        channels, height, width = self.data.shape
        size = self.experiment.backbone.noise_size(method.noise_resolution)
        return (channels, height, width) if size is None else (channels, size, size)

    def network(self, backbone: BackboneSettings, data: Description) -> Classifier:
        """A plain classifier on the meta device, where `without_weights` takes it up."""
        with torch.device("meta"):
            return create_classifier(backbone.untrained, data.classes, data.shape[0])

    def frozen(self, surrogate: str | None = None) -> Classifier:
        """The base classifier, or one that stands in for it, as baselines take it."""
        backbone = self.experiment.backbone
        if surrogate is not None:
            backbone = self.experiment.surrogates[surrogate]
        classifier = self.network(backbone, describe(self.experiment.base_data))
        without_weights(classifier.requires_grad_(False))
        return classifier.eval()

    def precision(self, asked: str) -> str:
        """`asked`, where `auto` is what the planned machine makes of it."""
        return self.auto if asked == "auto" else asked

    def jobs(self, method: str) -> int:
        """Trainings of a method: one per noise level that it is trained at, and seed."""
        return len(self.sigmas(method)) * len(self.experiment.seeds)

    def sigmas(self, method: str) -> list[float]:
        """Noise levels that a method is trained at for the tables or for other methods."""
        return sorted(s for name, s in self.experiment.trained_models() if name == method)

    def step(
        self,
        module: nn.Module,
        loss: BatchLoss,
        shape: tuple[int, ...],
        settings: TrainingSettings,
        *judges: nn.Module,
    ) -> tuple[float, float]:
        """FLOPs of one training image, and bytes that the training of `module` holds.

        `judges` are other networks that the loss asks.
        """
        count = settings.pass_size

        def run() -> None:
            pixels, labels = torch.zeros(count, *shape), torch.zeros(count, dtype=torch.int64)
            loss(pixels, labels, Generator(), 1.0).backward()  # type: ignore[no-untyped-call]

        taken = follow(run, self.precision(settings.precision), module, *judges)
        module.zero_grad()
        # Moments, and where processes average their gradients a copy of these.
        kept = (1 if isinstance(settings.optimizer, Sgd) else 2) + (settings.processes > 1)
        held = parameter_bytes(module) + kept * parameter_bytes(module, trained=True)
        return taken.flops / count, held + taken.peak_bytes

    def answer(self, classifier: Classifier, shape: tuple[int, ...], batch: int) -> Pass:
        """A forward pass of `batch` images without gradient; FLOPs of one of them."""

        def run() -> None:
            classes_answered(classifier, torch.zeros(batch, *shape), IMAGE_KEYS)

        taken = follow(run, "float32", classifier)
        return replace(taken, flops=taken.flops // batch)

    def validated(self, method: str) -> int:
        """Images of all the validations that end a method's trainings."""
        return self.jobs(method) * self.experiment.data.validation_images


def parameter_bytes(module: nn.Module, trained: bool = False) -> int:
    """Bytes of all parameters, or of those that are trained."""
    chosen = [p for p in module.parameters() if p.requires_grad or not trained]
    return sum(p.numel() * p.element_size() for p in chosen)


def objective_loss(classifier: nn.Module, objective: Objective, sigma: float) -> BatchLoss:
    """The loss of a training as `bench/jobs.py` minimises it."""
    minimise, hyperparameters = OBJECTIVES[objective.kind], objective.at(sigma)

    def loss(images: Tensor, labels: Tensor, noise: Generator, progress: float) -> Tensor:
        return minimise(
            classifier, Batch(images, labels, sigma, noise, progress), **hyperparameters
        )

    return loss


def plan_method(planner: Planner, name: str) -> Planned:
    """What a method's trainings take; a baseline with a module `plan` counts for itself."""
    baseline = planner.experiment.methods[name].baseline
    if baseline is not None and (baseline_folder(name, baseline) / "plan.py").exists():
        module = importlib.import_module(f"baselines.{baseline}.plan")
        planned: Planned = module.plan(planner, name)
        return planned
    return _plan_product(planner, name)


def _plan_product(planner: Planner, name: str) -> Planned:
    """A point of the product, as the rule `train` makes it."""
    point, seeds = planner.experiment.methods[name], len(planner.experiment.seeds)
    certified = _certified(planner, point)
    planner.answer(certified, planner.shape_of(point), 1)  # says so where images do not fit
    disk = parameter_bytes(certified)
    flops, memory = 0.0, float(disk)
    if point.trains:
        settings = planner.experiment.method_training(name)
        trained = _trained(planner, point, settings)
        if not any(parameter.requires_grad for parameter in trained.parameters()):
            raise BenchError(
                f"methods.{name}.parameterization trains nothing: set it or, if "
                f"baselines/{point.baseline} trains something else, give that a plan.py"
            )
        if hasattr(trained.network, "merge_and_unload"):
            # The adapter is kept beside the merged weights.
            disk += parameter_bytes(trained, trained=True)
        for per_image, held in _steps(planner, name, trained):
            flops += seeds * settings.images_seen * per_image
            memory = max(memory, held)
    jobs = planner.jobs(name)
    line = Line("train", name, jobs, flops, 0.0, memory, jobs * disk)
    return Planned([line], certified, planner.validated(name))


def _steps(planner: Planner, name: str, trained: Classifier) -> list[tuple[float, float]]:
    """`Planner.step` at every noise level; the same hyperparameters take the same."""
    point, settings = planner.experiment.methods[name], planner.experiment.method_training(name)
    shape, sigmas = planner.shape_of(point), planner.sigmas(name)
    keys = [json.dumps(point.objective.at(sigma)) for sigma in sigmas]
    counted = {}
    for key, sigma in dict(zip(keys, sigmas, strict=True)).items():
        loss = objective_loss(trained, point.objective, sigma)
        counted[key] = planner.step(trained, loss, shape, settings)
    return [counted[key] for key in keys]


def _classifier(planner: Planner, point: Method) -> Classifier:
    """A plain classifier with the input size and the denoiser of `point`, on the meta device."""
    classifier = planner.network(planner.experiment.backbone, planner.data)
    if point.noise_resolution == "model":
        classifier.input_size = None
    return classifier


def _join_denoiser(planner: Planner, point: Method, classifier: Classifier) -> None:
    if point.denoiser is not None:
        front = planned_denoiser(planner, point.label, point.denoiser.of)
        classifier.denoiser = front.requires_grad_(point.denoiser.trained)


def planned_denoiser(planner: Planner, label: str, of: str) -> nn.Module:
    """The denoiser of the method `of`, which the method with this label takes.

    Raises:
        BenchError: it has none.
    """
    front = plan_method(planner, of).classifier.denoiser
    if front is None:
        raise BenchError(f"{label}: denoiser.of = {of} has no denoiser")
    return front


def _certified(planner: Planner, point: Method) -> Classifier:
    """What inference runs: adapters are merged where they can be, and cost nothing."""
    classifier = _classifier(planner, point)
    insert_modules(classifier.network, point.parameterization)
    without_weights(classifier)
    _join_denoiser(planner, point, classifier)
    return classifier.eval()


def _trained(planner: Planner, point: Method, settings: TrainingSettings) -> Classifier:
    """What is trained, gradients on where the parameterization allows them."""
    classifier = _classifier(planner, point)
    # peft reads values of its own permutations when it builds BOFT.
    with torch.device("cpu" if isinstance(point.parameterization, Boft) else "meta"):
        classifier.network = adapt(classifier.network, point.parameterization, settings.steps)
    without_weights(classifier)
    _join_denoiser(planner, point, classifier)
    # In training mode VB-LoRA looks at the values of its logits, of which there are none.
    return classifier.eval()


def _pretrain_lines(planner: Planner) -> Iterator[Line]:
    """The base, where a method starts from it, and what stands in for it."""
    experiment, settings = planner.experiment, planner.experiment.pretrain
    data = describe(experiment.base_data)
    kinds = {method.parameterization.kind for method in experiment.methods.values()}
    base = {"base": experiment.backbone} if kinds != {"scratch"} else {}
    for name, backbone in {**base, **experiment.surrogates}.items():
        classifier = planner.network(backbone, data)
        without_weights(classifier)
        validation = experiment.base_data.validation_images
        tested = validation * planner.answer(classifier.eval(), data.shape, 1).flops
        disk, flops, memory = parameter_bytes(classifier), 0.0, 0.0
        if settings.images:
            loss = objective_loss(classifier.train(), CrossEntropy(), 0.0)
            per_image, memory = planner.step(classifier, loss, data.shape, settings)
            flops = per_image * settings.images_seen
        yield Line("pretrain", name, 1, flops, tested, max(memory, disk), disk)


class Draws(NamedTuple):
    """Expected draws per image at one sigma, and those of a fixed number."""

    expected: float
    fixed: int


def draws_at(experiment: Experiment, sigma: float) -> Draws:
    """What the experiment's protocol takes at `sigma` under the assumed p_A."""
    settings = experiment.certification
    images = min(settings.test_images, describe(experiment.data).test_images)
    step = experiment.radius_step
    protocol = protocol_of(settings, experiment.data.name, sigma, 0, step, images)
    nearest = min(ASSUMED_Z, key=lambda level: abs(np.log(level / sigma)))
    expected = expected_draws(protocol, norm.cdf(np.array(ASSUMED_Z[nearest])))
    return Draws(expected, settings.n + (settings.n0 if needs_pilot(protocol) else 0))


def _method_lines(planner: Planner, name: str, draws: dict[float, Draws]) -> list[Line]:
    """All trainings and certifications of a method; shards add jobs and change nothing else."""
    experiment, settings = planner.experiment, planner.experiment.certification
    planned = plan_method(planner, name)
    classifier = for_inference(planned.classifier, planner.precision(settings.precision))
    shape = planner.shape_of(experiment.methods[name])
    taken = planner.answer(classifier, shape, settings.batch_size)
    *lines, last = planned.lines
    last = last._replace(evaluation_flops=planned.evaluated * taken.flops)
    images = min(settings.test_images, planner.data.test_images) * len(experiment.seeds)
    sigmas = experiment.sigmas_of(name)
    flops = taken.flops * images * sum(draws[sigma].expected for sigma in sigmas)
    jobs = len(sigmas) * len(experiment.seeds) * settings.shards
    memory = parameter_bytes(classifier) + taken.peak_bytes
    certified = Line("certify", name, jobs, evaluation_flops=flops, memory_bytes=memory)
    return [*lines, last, certified]


def _other_lines(experiment: Experiment) -> Iterator[Line]:
    """Jobs whose time is that of their process."""
    yield Line("other", "fetch", 1 if experiment.pretrain.data is None else 2)
    if experiment.certification.shards > 1:
        yield Line("other", "gather", len(experiment.points()))
    reproduces = any(method.published for method in experiment.methods.values())
    yield Line("other", "tables, figures, examples, overview", 5 if reproduces else 4)
    if experiment.attack is not None:
        yield Line("other", "attacks", len(experiment.attacked()) + 2)


def plan(experiment: Experiment, rate: Rate) -> tuple[pd.DataFrame, dict[float, Draws]]:
    """One row per stage and method, with hours at `rate`; and the expected draws by sigma."""
    planner = Planner(experiment, rate.precision)
    draws = {sigma: draws_at(experiment, sigma) for sigma in experiment.sigmas}
    lines = [*_pretrain_lines(planner)]
    for name in experiment.methods:
        lines += _method_lines(planner, name, draws)
    table = pd.DataFrame([*lines, *_other_lines(experiment)])
    seconds = (
        table["training_flops"] / rate.training
        + table["evaluation_flops"] / rate.inference
        + table["jobs"] * rate.job_seconds
    )
    return table.assign(hours=seconds / 3600), draws


def stage_totals(table: pd.DataFrame) -> pd.DataFrame:
    """One row per stage and one for all: what a person reads."""
    flops = table["training_flops"] + table["evaluation_flops"]
    parts = table.assign(pflop=flops / 1e15)
    how = {
        "jobs": "sum",
        "pflop": "sum",
        "hours": "sum",
        "memory_bytes": "max",
        "disk_bytes": "sum",
    }
    totals = parts.groupby("stage").agg(how).reindex([*STAGES], fill_value=0)
    totals.loc["all"] = parts.agg(how)
    totals["jobs"] = totals["jobs"].astype(int)
    for kind in ("memory", "disk"):
        totals[f"{kind}_gib"] = totals.pop(f"{kind}_bytes") / 2**30
    return totals.reset_index()


def savings(
    experiment: Experiment, table: pd.DataFrame, draws: dict[float, Draws], rate: Rate
) -> str:
    """What the protocol saves over the same number of draws for every image."""
    expected = np.mean([draws[sigma].expected for _, sigma, _ in experiment.points()])
    fixed = next(iter(draws.values())).fixed
    certified = table[table["stage"] == "certify"]
    hours = certified["hours"].sum()
    # What jobs take beside the draws stays.
    drawing = certified["evaluation_flops"].sum() / rate.inference / 3600
    return (
        f"{expected:,.0f} draws per image expected of {experiment.certification.mode} "
        f"({ASSUMPTION}), {fixed:,} if every image had n: certification would then take "
        f"{hours + drawing * (fixed / expected - 1):,.2f} hours instead of {hours:,.2f}"
    )


def build_plan(experiment: Experiment, rate: Rate, output: Path | None) -> list[str]:
    """The bill as lines of text; every row of it as CSV where `output` is given."""
    table, draws = plan(experiment, rate)
    attacked = experiment.attack is not None
    if output is not None:
        with atomic_write(output) as temporary:
            table.assign(rate=rate.source).to_csv(temporary, index=False)
    return [
        stage_totals(table).to_string(index=False, float_format="{:,.3g}".format),
        f"rate: {rate.source}; {rate.training / 1e12:,.3g} TFLOPS in training, "
        f"{rate.inference / 1e12:,.3g} in inference, {rate.job_seconds:.1f} s per job beside",
        "hours: of one device, one job after the other; memory: the largest job's tensors "
        "on a device, with attention written out; disk: model folders",
        savings(experiment, table, draws, rate),
        *(["attacks are billed as processes alone: what they compute is not counted"] * attacked),
    ]
