"""Keys of `settings` for methods of this baseline."""

from typing import Literal

from pydantic import PositiveInt

from bench.config import Settings


class DenoiserSettings(Settings):
    """Shape and training objective of the DnCNN."""

    depth: PositiveInt = 17
    width: PositiveInt = 64
    objective: Literal["mse", "stability"] = "mse"
