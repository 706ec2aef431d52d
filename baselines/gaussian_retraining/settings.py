"""What methods of this baseline must have; keys of `settings` there are none."""

from typing import ClassVar, Self

from baselines.settings import BaselineSettings
from bench.config import Experiment
from bench.errors import BenchError


class RetrainingSettings(BaselineSettings):
    """No keys: the whole backbone is trained."""

    baseline: ClassVar[str] = "gaussian_retraining"
    refused: ClassVar[tuple[str, ...]] = ("surrogates",)

    @classmethod
    def of(cls, experiment: Experiment, method: str) -> Self:
        """The settings of one method.

        Raises:
            BenchError: it does not start from random weights.
        """
        kind = experiment.point(method).parameterization.kind
        if kind != "scratch":
            raise BenchError(
                f"methods.{method}.parameterization.kind is {kind}: gaussian_retraining trains all "
                "weights from a random start, so make it scratch, or leave `baseline` out"
            )
        return super().of(experiment, method)
