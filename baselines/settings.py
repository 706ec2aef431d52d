"""What the `settings` of all baselines can do."""

from typing import ClassVar, Self

from pydantic import ValidationError

from bench.config import Experiment, Settings, complaints
from bench.errors import BenchError


class BaselineSettings(Settings):
    """Base of a baseline's settings, which is named like its folder."""

    baseline: ClassVar[str]
    # Keys of a method that would have no effect here.
    refused: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(cls, experiment: Experiment, method: str) -> Self:
        """The settings of one method.

        Raises:
            BenchError: names the method and each offending key.
        """
        experiment.refuse_keys(method, *cls.refused)
        try:
            return cls.model_validate(experiment.point(method).settings, strict=True)
        except ValidationError as error:
            raise BenchError(f"methods.{method}.settings:\n{complaints(error)}") from None

    @classmethod
    def check(cls, experiment: Experiment) -> None:
        """Check every method of this baseline, and its trials.

        Raises:
            BenchError: as `of`; or `baseline` is not the name of the folder.
        """
        folder = cls.__module__.split(".")[1]
        if getattr(cls, "baseline", None) != folder:
            raise BenchError(
                f'{cls.__module__}.{cls.__name__}: set `baseline: ClassVar[str] = "{folder}"`'
            )
        for name in (*experiment.methods, *experiment.trials()):
            if experiment.point(name).baseline == cls.baseline:
                cls.of(experiment, name)
