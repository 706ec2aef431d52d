"""The command line that trained baselines share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from bench.backbones import Classifier
from bench.cli import (
    BaseFolder,
    DenoiserFolder,
    Expect,
    ExperimentFile,
    MethodName,
    Output,
    Seed,
    Sigma,
    experiment_with,
    run_guarded,
)
from bench.config import Experiment, TrainingSettings
from bench.data import Data, load_data
from bench.errors import BenchError
from bench.jobs import base_flops, check_fingerprint, load_base, route_cost, state_of
from bench.model_folder import Identity, identity_of, read_spec
from bench.provenance import pick_device
from bench.replicas import in_processes
from bench.training_state import TrainingState


@dataclass(frozen=True)
class BaselineJob:
    """One method, sigma and seed of an experiment, with all that training needs."""

    experiment: Experiment
    method: str
    sigma: float
    seed: int
    output: Path
    base: Path | None
    data: Data
    device: torch.device
    denoiser: Path | None = None
    surrogates: list[Path] = field(default_factory=list)

    @property
    def training(self) -> TrainingSettings:
        """The method's budget."""
        return self.experiment.method_training(self.method)

    @property
    def learning_rate(self) -> float:
        """The method's learning rate.

        Raises:
            BenchError: it has none.
        """
        rate = self.experiment.point(self.method).learning_rate
        if rate is None:
            raise BenchError(f"methods.{self.method}.learning_rate is missing: weights are trained")
        return rate

    @property
    def identity(self) -> Identity:
        """What the model folder must say of itself."""
        return identity_of(self.experiment, self.method, self.sigma, self.seed)

    @property
    def base_folder(self) -> Path:
        """Model folder of the base classifier.

        Raises:
            BenchError: the command line did not name it.
        """
        if self.base is None:
            raise BenchError("--base is missing: name the base classifier's model folder")
        return self.base

    def load_surrogates(self) -> list[Classifier]:
        """The method's surrogates, frozen, in evaluation mode.

        Raises:
            BenchError: the command line did not name each once, in order.
        """
        names = self.experiment.point(self.method).surrogates
        if len(names) != len(self.surrogates):
            raise BenchError(f"--surrogate: methods.{self.method} needs one for each of {names}")
        pairs = zip(names, self.surrogates, strict=True)
        loaded = [load_base(self.experiment, folder, name) for name, folder in pairs]
        return [surrogate.requires_grad_(False).to(self.device) for surrogate in loaded]

    def state(self) -> TrainingState:
        """Where an interrupted training of this job stands, for `fit`."""
        folders = [f for f in (self.base, self.denoiser, *self.surrogates) if f is not None]
        starts = [read_spec(folder).weights_sha256 for folder in folders]
        baselines = self.experiment.point(self.method).baseline, self.experiment.lender(self.method)
        place = (self.output, self.identity, self.data, self.training, self.device)
        return state_of(*place, starts, *baselines)

    def with_route(self, cost: dict[str, Any], front: nn.Module | None) -> dict[str, Any]:
        """`cost` with that of base, surrogates and the denoiser `front` that it starts from."""
        point = self.experiment.point(self.method)
        whole = route_cost(cost, point, self.base_folder, self.denoiser, front)
        paid = self.experiment.point(point.denoiser.of).surrogates if point.denoiser else []
        named = zip(point.surrogates, self.surrogates, strict=True)
        surrogates = base_flops(*(folder for name, folder in named if name not in paid))
        parts = [whole["base_training_flops"], surrogates]
        return whole | {"base_training_flops": None if None in parts else sum(parts)}


def run_baseline(train: Callable[[BaselineJob], None], spread: bool = False) -> None:
    """Parse the arguments, which are those of `bench train`, and run `train(job)`.

    Args:
        train: makes the model folder.
        spread: whether it runs in the method's `training.processes` processes at once, which it
            may where `bench.training.fit` trains.
    """
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def command(
        experiment: ExperimentFile,
        method: MethodName,
        sigma: Sigma,
        output: Output,
        base: BaseFolder = None,
        denoiser: DenoiserFolder = None,
        surrogate: Annotated[
            list[Path] | None, typer.Option(help="Model folder of a surrogate; repeat.")
        ] = None,
        seed: Seed = 0,
        expect: Expect = None,
    ) -> None:
        settings = experiment_with(experiment, method)
        sigma = settings.training_sigma(method, sigma)
        check_fingerprint(settings.training_fingerprint(method, sigma, seed), expect)

        def work() -> None:
            torch.manual_seed(seed)
            data, device = load_data(settings.data), pick_device(settings.gpus_per_job)
            named = (settings, method, sigma, seed, output, base, data, device, denoiser)
            train(BaselineJob(*named, surrogate or []))

        in_processes(settings.training_processes(method) if spread else 1, work)

    run_guarded(app)
