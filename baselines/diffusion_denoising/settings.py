"""Keys of `settings` for methods of this baseline."""

from pydantic import NonNegativeInt, PositiveInt, model_validator

from bench.config import Settings


class DiffusionSettings(Settings):
    """Shape of the UNet and the window of time steps it is trained on (of 1000)."""

    channels: str
    layers_per_block: PositiveInt = 1
    timesteps_low: NonNegativeInt = 0
    timesteps_high: PositiveInt = 1000

    @property
    def stage_channels(self) -> list[int]:
        """Channels of each resolution, e.g. `16,32,32`."""
        return [int(part) for part in self.channels.split(",")]

    @model_validator(mode="after")
    def _window(self) -> "DiffusionSettings":
        if not self.timesteps_low < self.timesteps_high <= 1000:
            raise ValueError("timesteps_low < timesteps_high <= 1000 must hold")
        return self
