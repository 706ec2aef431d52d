"""The base of all settings; imports nothing of bench, so that every module may import it."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values finite and never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
