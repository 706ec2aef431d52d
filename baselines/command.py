"""The command line that trained baselines share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from pydantic import ValidationError

from bench.cli import (
    Expect,
    ExperimentFile,
    MethodName,
    Output,
    Seed,
    Sigma,
    experiment_with,
    run_guarded,
)
from bench.config import Experiment, Settings, TrainingSettings
from bench.data import Data, load_data
from bench.errors import BenchError
from bench.jobs import check_fingerprint
from bench.model_folder import Identity, identity_of
from bench.provenance import pick_device

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class BaselineJob:
    """One method, sigma and seed of an experiment, with all that training needs."""

    experiment: Experiment
    method: str
    sigma: float
    seed: int
    output: Path
    learning_rate: float
    base: Path | None
    data: Data
    device: torch.device

    @property
    def training(self) -> TrainingSettings:
        """The method's budget."""
        return self.experiment.method_training(self.method)

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

    def settings_as(self, model: type[S]) -> S:
        """The method's `settings`, validated.

        Raises:
            BenchError: names the method and each offending key.
        """
        try:
            return model.model_validate(self.experiment.point(self.method).settings)
        except ValidationError as error:
            raise BenchError(f"methods.{self.method}.settings: {error}") from None


def run_baseline(train: Callable[[BaselineJob], None]) -> None:
    """Parse the arguments, which are those of `bench train`, and run `train(job)`."""
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def command(
        experiment: ExperimentFile,
        method: MethodName,
        sigma: Sigma,
        output: Output,
        base: Annotated[Path | None, typer.Option(help="Model folder of the base.")] = None,
        seed: Seed = 0,
        expect: Expect = None,
    ) -> None:
        settings = experiment_with(experiment, method)
        check_fingerprint(settings.training_fingerprint(method, sigma, seed), expect)
        rate = settings.point(method).learning_rate
        assert rate is not None
        torch.manual_seed(seed)
        data = load_data(settings.data)
        device = pick_device()
        train(BaselineJob(settings, method, sigma, seed, output, rate, base, data, device))

    run_guarded(app)
