"""Keys of `settings` for methods of this baseline."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from baselines.settings import BaselineSettings
from bench.config import Experiment
from bench.errors import BenchError

SHAPES = {"dncnn": ("depth", "width"), "memnet": ("width", "memory_blocks", "residual_blocks")}


class DenoiserSettings(BaselineSettings):
    """Shape and training objective of the denoiser; defaults are the published shapes."""

    baseline: ClassVar[str] = "denoised_smoothing"
    refused: ClassVar[tuple[str, ...]] = ("objective", "parameterization", "noise_resolution")

    architecture: Literal["dncnn", "memnet"] = "dncnn"
    depth: Annotated[int, Field(ge=2)] = 17
    width: PositiveInt = 64
    memory_blocks: PositiveInt = 3
    residual_blocks: PositiveInt = 6
    objective: Literal["mse", "stability"] = "mse"

    @property
    def shape(self) -> dict[str, Any]:
        """The keys that the architecture has."""
        return {key: getattr(self, key) for key in SHAPES[self.architecture]}

    @model_validator(mode="after")
    def _keys_of_this_architecture(self) -> Self:
        known = {"architecture", "objective", *SHAPES[self.architecture]}
        if foreign := sorted(self.model_fields_set - known):
            raise ValueError(f"{self.architecture} has no {', '.join(foreign)}")
        return self

    @classmethod
    def of(cls, experiment: Experiment, method: str) -> Self:
        """The settings of one method.

        Raises:
            BenchError: names the method and the offending key.
        """
        found, point = super().of(experiment, method), experiment.point(method)
        problem = None
        if point.learning_rate is None:
            problem = "learning_rate is missing: the denoiser is trained"
        elif point.surrogates and found.objective == "mse":
            problem = "surrogates: the mse objective asks no classifier: take objective: stability"
        elif point.denoiser is not None and not point.denoiser.trained:
            problem = "denoiser.trained must be true: this baseline trains it on"
        elif point.denoiser is not None and found.model_fields_set - {"objective"}:
            problem = "settings: the shape is that of denoiser.of: leave `objective` alone"
        if problem is not None:
            raise BenchError(f"methods.{method}.{problem}")
        return found
