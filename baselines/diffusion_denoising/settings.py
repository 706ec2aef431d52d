"""Keys of `settings` for methods of this baseline."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from baselines.settings import BaselineSettings
from bench.config import Experiment
from bench.errors import BenchError


class DiffusionSettings(BaselineSettings):
    """The diffusion model, own (`channels`) or others' (`pretrained`), and how it denoises."""

    baseline: ClassVar[str] = "diffusion_denoising"
    refused: ClassVar[tuple[str, ...]] = (
        "objective",
        "parameterization",
        "denoiser",
        "surrogates",
        "noise_resolution",
    )

    channels: Annotated[str, Field(pattern=r"^[1-9]\d*(,[1-9]\d*)*$")] | None = None
    pretrained: str | None = None
    layers_per_block: PositiveInt = 1
    timesteps_low: NonNegativeInt = 0
    timesteps_high: PositiveInt = 1000
    timestep: Literal["carlini", "matched"] = "carlini"
    steps: PositiveInt = 1
    votes: PositiveInt = 1

    @property
    def stage_channels(self) -> list[int]:
        """Channels of each resolution, e.g. `16,32,32`."""
        return [int(part) for part in (self.channels or "").split(",")]

    @property
    def local_files(self) -> list[str]:
        """Weights and configuration of a `pretrained` that is a folder of this machine."""
        if self.pretrained is None:
            return []
        kinds = (".safetensors", ".json")
        return sorted(str(p) for p in Path(self.pretrained).rglob("*") if p.suffix in kinds)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.timesteps_low < self.timesteps_high <= 1000:
            raise ValueError("timesteps_low < timesteps_high <= 1000 must hold")
        if (self.channels is None) == (self.pretrained is None):
            raise ValueError("give either channels (to train a UNet) or pretrained (to take one)")
        if self.votes > 1 and self.steps == 1:
            raise ValueError("one step has no randomness to vote about: raise steps or drop votes")
        return self

    @classmethod
    def of(cls, experiment: Experiment, method: str) -> Self:
        """The settings of one method.

        Raises:
            BenchError: names the method and the offending key.
        """
        found, trains = super().of(experiment, method), experiment.point(method).trains
        if trains == (found.pretrained is not None):
            cure = "is missing: the UNet is trained" if found.channels else "has no use: remove it"
            raise BenchError(f"methods.{method}.learning_rate {cure}")
        return found
