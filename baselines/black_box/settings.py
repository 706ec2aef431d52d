"""Keys of `settings` for methods of this baseline."""

from typing import ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from baselines.settings import BaselineSettings
from bench.config import Access, Experiment
from bench.errors import BenchError

# Keys of the search alone.
SEARCH = {"checks", "fall", "draws", "averages", "c", "o", "alpha", "gamma", "momentum"}


class BlackBoxSettings(BaselineSettings):
    """What the black box shows, which prompt is trained, and how SPSA-GC spends the queries.

    Step k = 1, 2, ... moves by a_k = a / (k + o)^alpha and perturbs by c_k = c / k^gamma; a is the
    method's learning rate.
    """

    baseline: ClassVar[str] = "black_box"
    refused: ClassVar[tuple[str, ...]] = (
        "objective",
        "parameterization",
        "surrogates",
        "denoiser",
        "noise_resolution",
    )

    access: Access = "logits"
    prompt: Literal["coordinator", "constant", "filter"] = "coordinator"
    url: str | None = Field(default=None, pattern=r"^https?://")
    queries: PositiveInt = 500_000
    checks: PositiveInt = 8
    fall: PositiveFloat = 0.05
    draws: PositiveInt = 1
    averages: PositiveInt = 5
    c: PositiveFloat = 0.01
    o: NonNegativeFloat = 1.0
    alpha: NonNegativeFloat = 0.4
    gamma: NonNegativeFloat = 0.1
    momentum: float = Field(default=0.9, ge=0, lt=1)

    @classmethod
    def of(cls, experiment: Experiment, method: str) -> Self:
        """The settings of one method.

        Raises:
            BenchError: as that of all baselines; it trains in several processes; or it lacks a
                learning rate, or has one to no effect.
        """
        if experiment.method_training(method).processes > 1:
            raise BenchError(
                f"methods.{method}.training.processes: a search by queries is one process: set it "
                "to 1"
            )
        settings, trains = super().of(experiment, method), experiment.point(method).trains
        if settings.prompt == "filter" and trains:
            raise BenchError(
                f"methods.{method}.learning_rate: a filter is chosen, not trained: remove it"
            )
        if settings.prompt == "filter" and (idle := SEARCH & settings.model_fields_set):
            raise BenchError(
                f"methods.{method}.settings.{min(idle)}: a filter is not searched for: remove it"
            )
        if settings.prompt != "filter" and not trains:
            raise BenchError(f"methods.{method}.learning_rate is missing: a prompt is trained")
        return settings
