"""The experiment file as typed models; the JSON schema comes from them."""

import os
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from bench.errors import BenchError
from bench.files import read_yaml, sha256_json
from bench.parameterization_settings import INSERTED, Frozen, Parameterization, Scratch
from bench.settings import Settings

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
# `auto` is bfloat16 where the machine computes in it, else float32.
Precision = Literal["auto", "float32", "bfloat16"]
Scalar = bool | int | float | str
Share = Annotated[float, Field(ge=0, le=1)]
# Noise comes in blocks of 32.
Draws = Annotated[int, Field(gt=0, multiple_of=32)]
Access = Literal["logits", "probabilities", "top1"]
# Noise is added to the data's own pixels, or to images resized to `backbone.input_size`.
NoiseResolution = Literal["native", "model"]
T = TypeVar("T")
# One value for all noise levels, or one for each.
PerSigma: TypeAlias = T | dict[PositiveFloat, T]
TRIAL = "__lr_"
# Data sets whose images vary in size.
RESIZED = ("imagenet", "image_folder")
# Where methods start from unless they name another; results hold it under this name.
BASE = "base"


def refuse_silence(n: int, alpha: float) -> None:
    """Raise where a prediction of `n` draws would always abstain."""
    if 2 * 0.5**n > alpha:
        raise ValueError(
            f"n = {n} draws cannot tell any class from another at alpha = {alpha}, even if all "
            "agree: raise n (11 is the least at 0.001)"
        )


def named_rate(rate: float) -> float:
    """The rate, which the name of its trial must give in full."""
    if float(f"{rate:g}") != rate:
        raise ValueError(f"a learning rate of a grid has at most six digits: write {rate:g}")
    return rate


def refuse_repeats(values: list[T]) -> list[T]:
    """The values, none of which may come twice."""
    if len(set(values)) != len(values):
        raise ValueError("values repeat: list each once")
    return values


class DataSettings(Settings):
    """Which images, and where they lie."""

    name: Literal["fashion_mnist", "mnist_5k", "cifar10", "cifar100", "imagenet", "image_folder"]
    directory: str = "data"
    image_size: PositiveInt | None = None
    validation_images: PositiveInt = 5000

    @field_validator("directory")
    @classmethod
    def _home(cls, directory: str) -> str:
        return os.path.normpath(os.path.expanduser(directory))

    @model_validator(mode="after")
    def _size_of_what_varies(self) -> "DataSettings":
        if self.image_size is not None and self.name not in RESIZED:
            raise ValueError(f"image_size means nothing to {self.name}, whose images have one size")
        return self

    def defining(self) -> dict[str, Any]:
        """The keys that define a training's numbers, for fingerprints: not where images lie."""
        return self.model_dump(exclude={"directory"})


class BackboneSettings(Settings):
    """Any timm model; `input_size` is what images are resized to inside the classifier.

    Its training starts from random weights, from those that timm fetches (`pretrained`), or from
    those of a file with timm's names (`weights`).
    """

    timm: str
    arguments: dict[str, Scalar | list[int]] = Field(default_factory=dict)
    input_size: PositiveInt | None = None
    pretrained: bool = False
    weights: Annotated[str, Field(pattern=r"\.safetensors$")] | None = None

    @field_validator("weights")
    @classmethod
    def _home(cls, weights: str | None) -> str | None:
        return None if weights is None else os.path.expanduser(weights)

    @field_validator("arguments")
    @classmethod
    def _data_decide(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for key in ("num_classes", "in_chans"):
            if key in arguments:
                raise ValueError(f"{key} is that of the data: remove it")
        return arguments

    @model_validator(mode="after")
    def _one_start(self) -> "BackboneSettings":
        if self.pretrained and self.weights is not None:
            raise ValueError("pretrained and weights exclude each other: remove one")
        return self

    @property
    def untrained(self) -> "BackboneSettings":
        """The same network, whatever weights it starts from."""
        return self.model_copy(update={"pretrained": False, "weights": None})

    def noise_size(self, resolution: NoiseResolution) -> int | None:
        """Side that images are resized to before the noise; None leaves them as they are."""
        return self.input_size if resolution == "model" else None


class RemoteSettings(Settings):
    """A classifier that answers over HTTP; `access` and `model`, where given, must be its own."""

    url: str = Field(pattern=r"^https?://")
    access: Access | None = None
    model: str | None = None
    timeout: PositiveFloat = 60.0
    attempts: PositiveInt = 6


class AdamW(Settings):
    """AdamW with torch's momenta."""

    kind: Literal["adamw"] = "adamw"


class Sgd(Settings):
    """Stochastic gradient descent; its weight decay acts through the gradient."""

    kind: Literal["sgd"]
    momentum: float = Field(default=0.9, ge=0, lt=1)


class Cosine(Settings):
    """Linear warm-up over a share of the steps, then cosine to zero."""

    kind: Literal["cosine"] = "cosine"
    warmup: float = Field(default=0.1, ge=0, lt=1)


class Step(Settings):
    """The learning rate is multiplied by `factor` at each of these shares of the steps."""

    kind: Literal["step"]
    drop_at: list[Share]
    factor: PositiveFloat = 0.1


class TrainingSettings(Settings):
    """Budget and optimizer; `images` counts the training images seen, however noisy each.

    `micro_batch_size` images of a batch pass at once; their gradients add up to the batch's.
    `processes` share each batch, on a GPU each where there are GPUs, and average their gradients.
    `augmentation: crop_and_flip` shifts and mirrors each image at random, as published trainings
    on CIFAR-10 and ImageNet do.
    """

    images: PositiveInt
    batch_size: PositiveInt = 128
    micro_batch_size: PositiveInt | None = None
    processes: PositiveInt = 1
    optimizer: Annotated[AdamW | Sgd, Field(discriminator="kind")] = AdamW()
    schedule: Annotated[Cosine | Step, Field(discriminator="kind")] = Cosine()
    weight_decay: float = Field(default=0.05, ge=0)
    clip_norm: PositiveFloat | None = 1.0
    precision: Precision = "auto"
    augmentation: Literal["none", "crop_and_flip"] = "none"

    @property
    def steps(self) -> int:
        """Optimizer steps that the budget pays for."""
        return max(1, self.images // self.batch_size)

    @property
    def process_batch_size(self) -> int:
        """Images of a batch that one process takes."""
        return self.batch_size // self.processes

    @property
    def pass_size(self) -> int:
        """Most images of one forward and backward pass."""
        return min(self.micro_batch_size or self.batch_size, self.process_batch_size)

    @property
    def passes(self) -> int:
        """Forward and backward passes of all steps and processes."""
        return self.steps * self.processes * -(-self.process_batch_size // self.pass_size)

    @property
    def images_seen(self) -> int:
        """Training images of all steps, which take whole batches and at least one."""
        return self.steps * self.batch_size

    def defining(self) -> dict[str, Any]:
        """What defines a training's numbers, for fingerprints.

        With what is made of the keys, since this module is not among the sources of a training.
        """
        made = {"steps": self.steps, "pass_size": self.pass_size}
        return {**self.model_dump(exclude={"data"}), **made}


class PretrainSettings(TrainingSettings):
    """Clean training of the base classifier that every other method starts from.

    With `data` of its own, methods adapt the base to the experiment's data, with a new head.
    With 0 images the base is the backbone as it comes.
    """

    images: NonNegativeInt
    learning_rate: PositiveFloat | None = None
    data: DataSettings | None = None

    @model_validator(mode="after")
    def _learning_rate_where_trained(self) -> "PretrainSettings":
        if self.images and self.learning_rate is None:
            raise ValueError("learning_rate is missing: the base is trained on images")
        if not self.images and self.learning_rate is not None:
            raise ValueError("learning_rate is given, but 0 images train nothing: remove it")
        return self


class TrainingOverrides(Settings):
    """Keys of `training` that one method sets differently."""

    images: PositiveInt | None = None
    batch_size: PositiveInt | None = None
    micro_batch_size: PositiveInt | None = None
    processes: PositiveInt | None = None
    weight_decay: float | None = Field(default=None, ge=0)
    precision: Precision | None = None


class ObjectiveSettings(Settings):
    """Base of all objectives: every hyperparameter may differ by sigma."""

    def at(self, sigma: float) -> dict[str, Any]:
        """The hyperparameters at `sigma`, by name.

        Raises:
            ValueError: one of them has no value there.
        """
        values = self.model_dump(exclude={"kind"})
        for key, value in values.items():
            if isinstance(value, dict):
                if sigma not in value:
                    raise ValueError(f"{key} has no value for sigma = {sigma}")
                values[key] = value[sigma]
        return values


class CrossEntropy(ObjectiveSettings):
    """Cross-entropy on Gaussian-noised images (Cohen 2019; eq. 4 of PEFTSmoothing)."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    noises: PerSigma[PositiveInt] = 1


class Stability(ObjectiveSettings):
    """Stability training (Li 2019); `weight` is lambda."""

    kind: Literal["stability"]
    weight: PerSigma[NonNegativeFloat] = 2.0


class SmoothAdv(ObjectiveSettings):
    """SmoothAdv by PGD (Salman 2019); `radius` is epsilon in [0, 1] pixels."""

    kind: Literal["smoothadv"]
    noises: PerSigma[PositiveInt] = 4
    radius: PerSigma[NonNegativeFloat] = 1.0
    steps: PerSigma[PositiveInt] = 10
    warmup: PerSigma[Share] = 0.067


class Macer(ObjectiveSettings):
    """MACER (Zhai 2020): lambda = `weight`, gamma = `margin`, beta = `temperature`."""

    kind: Literal["macer"]
    noises: PerSigma[PositiveInt] = 16
    weight: PerSigma[NonNegativeFloat] = 12.0
    margin: PerSigma[PositiveFloat] = 8.0
    temperature: PerSigma[PositiveFloat] = 16.0
    start: PerSigma[Share] = 0.0


class Consistency(ObjectiveSettings):
    """Consistency (Jeong & Shin 2020): lambda = `weight`, eta = `entropy_weight`."""

    kind: Literal["consistency"]
    noises: PerSigma[PositiveInt] = 2
    weight: PerSigma[NonNegativeFloat] = 10.0
    entropy_weight: PerSigma[NonNegativeFloat] = 0.5


class SmoothMix(ObjectiveSettings):
    """SmoothMix (Jeong 2021): alpha = `step_size`, T = `steps`, eta = `weight`."""

    kind: Literal["smoothmix"]
    noises: PerSigma[PositiveInt] = 2
    steps: PerSigma[PositiveInt] = 4
    step_size: PerSigma[PositiveFloat] = 1.0
    weight: PerSigma[NonNegativeFloat] = 5.0
    one_step: PerSigma[bool] = False
    warmup: PerSigma[Share] = 0.067


class CatRs(ObjectiveSettings):
    """CAT-RS (Jeong 2023): epsilon = `radius` in [0, 1] pixels, lambda = `weight`."""

    kind: Literal["cat_rs"]
    noises: PerSigma[PositiveInt] = 4
    radius: PerSigma[NonNegativeFloat] = 1.0
    steps: PerSigma[PositiveInt] = 4
    weight: PerSigma[NonNegativeFloat] = 1.0


Objective = Annotated[
    CrossEntropy | Stability | SmoothAdv | Macer | Consistency | SmoothMix | CatRs,
    Field(discriminator="kind"),
]


class SharedDenoiser(Settings):
    """The denoiser of another method, of the same sigma and seed, as front or as start."""

    of: Name
    trained: bool = False


# They stand in Markdown tables and legends.
Words = Annotated[str, Field(pattern=r"^[^|\n]+$")]


class Method(Settings):
    """One point of backbone x parameterization x objective x denoiser, as named by the user."""

    label: Words
    family: Words
    sigmas: list[PositiveFloat] | None = Field(default=None, min_length=1)
    published: str | None = None
    baseline: Name | None = None
    parameterization: Parameterization = Frozen()
    objective: Objective = CrossEntropy()
    train_sigma: NonNegativeFloat | None = None
    noise_resolution: NoiseResolution = "native"
    start: Name = BASE
    denoiser: SharedDenoiser | None = None
    surrogates: list[Name] = Field(default_factory=list)
    learning_rate: PositiveFloat | None = None
    training: TrainingOverrides = TrainingOverrides()
    settings: dict[str, Scalar] = Field(default_factory=dict)
    grid: dict[str, Annotated[list[int | float], Field(min_length=1)]] = Field(default_factory=dict)

    @property
    def trains(self) -> bool:
        """Whether there is a learning rate to tune."""
        return self.learning_rate is not None

    @model_validator(mode="after")
    def _learning_rate_where_trained(self) -> "Method":
        front = self.denoiser is not None and self.denoiser.trained
        weights = front or self.parameterization.kind != "frozen"
        if weights and not self.trains:
            raise ValueError("learning_rate is missing: this method trains weights")
        # A baseline knows itself whether it trains anything.
        if self.trains and not weights and self.baseline is None:
            raise ValueError("learning_rate is given, but a frozen method trains nothing")
        return self

    @field_validator("sigmas")
    @classmethod
    def _no_repeats(cls, values: list[float] | None) -> list[float] | None:
        return values if values is None else refuse_repeats(values)

    @model_validator(mode="after")
    def _scratch_needs_rules_without_a_base(self) -> "Method":
        if isinstance(self.parameterization, Scratch) and self.baseline is None:
            raise ValueError(
                "parameterization.kind = scratch starts from no base: add "
                "`baseline: gaussian_retraining`"
            )
        return self

    @model_validator(mode="after")
    def _start_is_used(self) -> "Method":
        if self.start == BASE:
            return self
        if isinstance(self.parameterization, Scratch):
            raise ValueError("start is given, but scratch starts from random weights: remove it")
        for key in ("baseline", "denoiser"):
            if getattr(self, key) is not None:
                raise ValueError(f"start and {key} exclude each other: remove one")
        return self

    @model_validator(mode="after")
    def _denoisers_are_native(self) -> "Method":
        if self.noise_resolution != "native" and self.denoiser is not None:
            raise ValueError(
                "noise_resolution: model and denoiser exclude each other, since denoisers are "
                "trained on native pixels: remove one"
            )
        return self

    @model_validator(mode="after")
    def _baseline_where_needed(self) -> "Method":
        for key in ("settings", "surrogates"):
            if getattr(self, key) and self.baseline is None:
                raise ValueError(f"{key} belong to a baseline: set `baseline` or remove them")
        return self

    @model_validator(mode="after")
    def _grid_fits(self) -> "Method":
        if self.grid and not self.trains:
            raise ValueError("grid is given, but a frozen method trains nothing")
        for key, values in self.grid.items():
            refuse_repeats(values)
            for value in values:
                if key == "learning_rate":
                    named_rate(value)
                try:
                    self.with_values({key: value})
                except ValueError as error:
                    raise ValueError(f"grid.{key}: {value} does not fit: {error}") from None
        return self

    def with_values(self, values: dict[str, int | float]) -> "Method":
        """The method with another `learning_rate`, or other keys of what it trains.

        A key of the baseline's `settings`, where those have it, is meant there; else one of the
        parameterization.

        Raises:
            ValueError: a key does not exist there, or its value does not fit.
        """
        rest = dict(values)
        changed: dict[str, Any] = {}
        if "learning_rate" in rest:
            changed["learning_rate"] = float(rest.pop("learning_rate"))
            if changed["learning_rate"] <= 0:
                raise ValueError("learning_rate must be above 0")
        own = {key: rest.pop(key) for key in list(rest) if key in self.settings}
        if own:
            changed["settings"] = {**self.settings, **own}
        # What stays as it was must not seem set: see `refuse_keys`.
        if rest:
            kind = type(self.parameterization)
            now = self.parameterization.model_dump(exclude_unset=True)
            try:
                changed["parameterization"] = kind.model_validate({**now, **rest})
            except ValidationError as error:
                raise ValueError("; ".join(item["msg"] for item in error.errors())) from None
        return self.model_copy(update=changed)


PRESETS: dict[str, dict[str, int | float]] = {
    "default": {"n": 100_000, "reserve": 0.3, "futility": 0.042},
    "exact": {"n": 100_000, "reserve": 0.5, "futility": 0.001},
    "quick": {"n": 10_000, "reserve": 0.3, "futility": 0.05},
}


class CertificationSettings(Settings):
    """How certificates are made; the noise seed is that of certificates and attacks alone.

    A preset gives `n`, `reserve` and `futility`; each may be set beside it.
    """

    mode: Literal["decide", "cohen", "radius", "predict"] = "decide"
    preset: Literal["default", "exact", "quick"] = "default"
    candidate: Literal["pilot", "label"] = "pilot"
    family: Literal["image", "dataset"] = "image"
    n0: PositiveInt = 100
    n: PositiveInt = 100_000
    alpha: float = Field(default=0.001, gt=0, lt=0.5)
    horizon: PositiveInt = 1_000_000
    reserve: float = Field(default=0.3, ge=0, lt=1)
    reserve_at: PositiveInt | None = None
    futility: float = Field(default=0.042, ge=0, lt=1)
    tolerance: PositiveFloat = 0.01
    noise_seed: int = Field(default=2_000_003, ge=0)
    test_images: PositiveInt = 500
    shards: PositiveInt = 1
    batch_size: Draws = 1024
    precision: Precision = "auto"
    compile: bool = False

    @model_validator(mode="before")
    @classmethod
    def _preset_values(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {**PRESETS.get(values.get("preset", "default"), {}), **values}

    @property
    def alpha_per_image(self) -> float:
        """Error probability of one certificate."""
        return self.alpha / (self.test_images if self.family == "dataset" else 1)

    @model_validator(mode="after")
    def _can_certify(self) -> "CertificationSettings":
        if self.alpha_per_image ** (1 / self.n) <= 0.5:
            raise ValueError(
                f"n = {self.n} draws can certify nothing at alpha = {self.alpha_per_image} per "
                "image: even n equal votes give a bound below 1/2; raise n (10 is the least at "
                "0.001)"
            )
        if self.shards > self.test_images:
            raise ValueError(f"shards = {self.shards} exceeds test_images = {self.test_images}")
        if self.mode == "decide" and self.n > self.horizon:
            raise ValueError(f"n = {self.n} exceeds horizon = {self.horizon}: raise horizon")
        if self.mode == "decide" and self.n < min(32, self.horizon):
            raise ValueError(f"n = {self.n} is below the first look at 32: raise n, or set horizon")
        return self

    @model_validator(mode="after")
    def _reserve_is_spent(self) -> "CertificationSettings":
        if self.mode == "decide" and (self.reserve_at or 0) > self.horizon:
            raise ValueError(
                f"reserve_at = {self.reserve_at} exceeds horizon = {self.horizon}: there is no "
                "such look, and what is kept for it would be lost"
            )
        return self

    @model_validator(mode="after")
    def _can_answer(self) -> "CertificationSettings":
        if self.mode == "predict":
            refuse_silence(self.n, self.alpha_per_image)
        return self


class TuningSettings(Settings):
    """One rule for all: the highest validation accuracy under noise of this sigma.

    `training` is the budget of a trial, the same for every method; a grid of the method's own
    replaces `learning_rates` or adds keys of its size.
    """

    sigma: PositiveFloat
    learning_rates: list[PositiveFloat] = Field(min_length=1)
    training: TrainingOverrides = TrainingOverrides()

    @field_validator("learning_rates")
    @classmethod
    def _names_tell_rates_apart(cls, rates: list[float]) -> list[float]:
        return refuse_repeats([named_rate(rate) for rate in rates])


class AttackSettings(Settings):
    """The attack on smoothed classifiers; a prediction of `n` draws at level `alpha` judges it.

    `radii` are l2 in [0, 1] pixels; each certificate is attacked at its own radius besides.
    """

    methods: list[Name] | None = Field(default=None, min_length=1)
    sigmas: list[PositiveFloat] | None = Field(default=None, min_length=1)
    radii: list[PositiveFloat] = Field(default_factory=list)
    images: PositiveInt | None = None
    steps: PositiveInt = 20
    draws: Draws = 32
    n: PositiveInt = 10_000
    alpha: float = Field(default=0.001, gt=0, lt=0.5)
    batch_size: Draws = 256

    @field_validator("radii")
    @classmethod
    def _radii_increase(cls, radii: list[float]) -> list[float]:
        if radii != sorted(set(radii)):
            raise ValueError("radii must increase")
        return radii

    @model_validator(mode="after")
    def _can_answer(self) -> "AttackSettings":
        refuse_silence(self.n, self.alpha)
        if self.batch_size < self.draws:
            raise ValueError(f"batch_size must hold the draws of an image: {self.draws} or more")
        return self

    @property
    def part_of_log(self) -> dict[str, Any]:
        """What an attack log depends on; which points are attacked is the experiment's matter."""
        return self.model_dump(exclude={"methods", "sigmas"})


class FigureSettings(Settings):
    """How the figures show accuracy at one radius: this one, or that of each sigma."""

    radius: NonNegativeFloat | None = None
    join_families: bool = False


class Experiment(Settings):
    """Everything that defines an experiment's numbers."""

    name: Name
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    sigmas: list[PositiveFloat] = Field(min_length=1)
    radius_step: PositiveFloat = 0.05
    threads_per_job: PositiveInt = 1
    gpus_per_job: int = Field(default=0, ge=0)
    data: DataSettings
    backbone: BackboneSettings
    surrogates: dict[Name, BackboneSettings] = Field(default_factory=dict)
    pretrain: PretrainSettings
    training: TrainingSettings
    certification: CertificationSettings
    tuning: TuningSettings
    attack: AttackSettings | None = None
    figures: FigureSettings = FigureSettings()
    methods: dict[Name, Method] = Field(min_length=1)

    @field_validator("sigmas", "seeds")
    @classmethod
    def _no_repeats(cls, values: list[Any]) -> list[Any]:
        return refuse_repeats(values)

    @field_validator("methods")
    @classmethod
    def _no_trial_names(cls, methods: dict[str, Method]) -> dict[str, Method]:
        if taken := [name for name in methods if TRIAL in name]:
            raise ValueError(f"{taken[0]}: names with {TRIAL} are those of trials: choose another")
        return methods

    @field_validator("methods")
    @classmethod
    def _labels_differ(cls, methods: dict[str, Method]) -> dict[str, Method]:
        labels = [method.label for method in methods.values()]
        if len(set(labels)) != len(labels):
            raise ValueError("two methods have the same label: tables could not tell them apart")
        return methods

    @model_validator(mode="after")
    def _figures_have_a_radius(self) -> "Experiment":
        if (radius := self.figures.radius) is not None:
            nearest = self.figures_radius(radius)
            if abs(radius - nearest) > 1e-6 * self.radius_step:
                raise ValueError(
                    f"figures.radius = {radius} is no multiple of radius_step = "
                    f"{self.radius_step}: set it to {nearest:g}"
                )
        return self

    def figures_radius(self, sigma: float) -> float:
        """Radius of figures at one: `figures.radius`, else `sigma`; of the curves the nearest."""
        wanted = sigma if self.figures.radius is None else self.figures.radius
        return round(round(wanted / self.radius_step) * self.radius_step, 10)

    @cached_property
    def base_fingerprint(self) -> str:
        """Hash of the settings that define the base classifier."""
        return self._pretraining_fingerprint(self.backbone)

    def surrogate_fingerprint(self, name: str) -> str:
        """Hash of the settings that define a surrogate classifier."""
        return self._pretraining_fingerprint(self.surrogates[name])

    def _pretraining_fingerprint(self, backbone: BackboneSettings) -> str:
        parts = [self.base_data.defining(), backbone.model_dump()]
        return sha256_json([*parts, self.pretrain.defining(), self.seeds[0]])

    @property
    def base_data(self) -> DataSettings:
        """The data that the base classifier is trained on."""
        return self.pretrain.data or self.data

    @model_validator(mode="after")
    def _a_base_of_other_data_is_adapted(self) -> "Experiment":
        if self.pretrain.data is None:
            return self
        places = {(data.directory, data.name) for data in (self.data, self.pretrain.data)}
        if len(places) == 1:
            raise ValueError("pretrain.data is data itself: remove it")
        for name, method in self.methods.items():
            if method.start == BASE and isinstance(method.parameterization, Frozen):
                raise ValueError(
                    f"methods.{name} keeps the base's head, which answers the classes of "
                    "pretrain.data: choose a parameterization that trains one"
                )
        return self

    @model_validator(mode="after")
    def _sigmas_are_of_the_experiment(self) -> "Experiment":
        if self.tuning.sigma not in self.sigmas:
            raise ValueError(f"tuning.sigma = {self.tuning.sigma} must be one of sigmas")
        for name, method in self.methods.items():
            for sigma in sorted(set(method.sigmas or ()) - set(self.sigmas)):
                raise ValueError(f"methods.{name}.sigmas: {sigma} is not one of sigmas: add it")
        used = {sigma for name in self.methods for sigma in self.sigmas_of(name)}
        for sigma in sorted(set(self.sigmas) - used):
            raise ValueError(f"sigmas: no method runs at {sigma}: remove it")
        return self

    @model_validator(mode="after")
    def _attacked_is_what_there_is(self) -> "Experiment":
        if self.attack is None:
            return self
        for name in self.attack.methods or ():
            if name not in self.methods:
                raise ValueError(f"attack.methods: {name} is no method of this experiment")
        for sigma in self.attack.sigmas or ():
            if sigma not in self.sigmas:
                raise ValueError(f"attack.sigmas: {sigma} is not one of sigmas")
        if not self.attacked():
            raise ValueError("attack: none of its methods runs at any of its sigmas")
        return self

    @model_validator(mode="after")
    def _denoisers_exist(self) -> "Experiment":
        for name in self.methods:
            chain = [name]
            while (shared := self.methods[chain[-1]].denoiser) is not None:
                key = f"methods.{chain[-1]}.denoiser.of"
                if shared.of not in self.methods:
                    raise ValueError(f"{key}: {shared.of} is no method of this experiment")
                if shared.of in chain:
                    raise ValueError(f"{key}: {shared.of} waits for {name}'s own denoiser")
                chain.append(shared.of)
            if len(chain) > 1 and self.methods[chain[-1]].baseline is None:
                raise ValueError(f"{key}: {chain[-1]} has no denoiser: name a method that has one")
        return self

    @model_validator(mode="after")
    def _processes_share_a_batch_evenly(self) -> "Experiment":
        named = {"pretrain": self.pretrain, "training": self.training}
        named |= {f"methods.{n}.training": self.method_training(n) for n in self.methods}
        named |= {f"tuning.training, {n}": self.method_training(n) for n in self.trials()}
        for key, settings in named.items():
            if settings.batch_size % settings.processes:
                raise ValueError(
                    f"{key}: {settings.processes} processes cannot share a batch of "
                    f"{settings.batch_size} images evenly: change processes or batch_size"
                )
        return self

    @model_validator(mode="after")
    def _starts_exist(self) -> "Experiment":
        if BASE in self.methods:
            raise ValueError(f"methods.{BASE}: so the base classifier is called: rename it")
        for name in self.methods:
            chain = [name]
            while (start := self.methods[chain[-1]].start) != BASE:
                key = f"methods.{chain[-1]}.start"
                if start not in self.methods:
                    raise ValueError(f"{key}: {start} is no method of this experiment")
                if start in chain:
                    raise ValueError(f"{key}: {start} waits for {name} itself")
                first = self.methods[start]
                if first.denoiser or isinstance(first.parameterization, (Frozen, *INSERTED)):
                    raise ValueError(
                        f"{key}: {start} is no network of trained weights alone, which is all "
                        "that can be trained on: name a method of another kind"
                    )
                chain.append(start)
        return self

    @model_validator(mode="after")
    def _the_model_has_a_resolution(self) -> "Experiment":
        for name, method in self.methods.items():
            if method.noise_resolution == "model" and self.backbone.input_size is None:
                raise ValueError(
                    f"methods.{name}.noise_resolution: model needs backbone.input_size, which "
                    "images are resized to before the noise: set it"
                )
        return self

    @model_validator(mode="after")
    def _objectives_know_every_sigma(self) -> "Experiment":
        for name, sigma in sorted(self.models()):
            try:
                self.methods[name].objective.at(sigma)
            except ValueError as error:
                raise ValueError(f"methods.{name}.objective.{error}") from None
        return self

    @model_validator(mode="after")
    def _surrogates_stand_in_for_another(self) -> "Experiment":
        for name, backbone in self.surrogates.items():
            if backbone.untrained == self.backbone.untrained:
                raise ValueError(f"surrogates.{name} is the certified backbone: name another")
        for name, method in self.methods.items():
            for surrogate in method.surrogates:
                if surrogate not in self.surrogates:
                    raise ValueError(f"methods.{name}.surrogates: {surrogate} is not in surrogates")
        return self

    def refuse_keys(self, name: str, *keys: str) -> None:
        """Refuse keys of a method that its baseline would ignore.

        Raises:
            BenchError: names the first of them that is set.
        """
        method = self.point(name)
        for key in keys:
            if key in method.model_fields_set:
                raise BenchError(
                    f"methods.{name}.{key} means nothing to baseline {method.baseline}: remove it; "
                    f"baselines/{method.baseline}/README.md says what is trained there"
                )

    @property
    def noise_resolutions(self) -> set[NoiseResolution]:
        """Those that the methods' noise is added at."""
        return {method.noise_resolution for method in self.methods.values()}

    def sigmas_of(self, method: str) -> list[float]:
        """The noise levels that a method runs at: the experiment's, or those it names."""
        return self.methods[method].sigmas or self.sigmas

    def training_sigma(self, method: str, sigma: float) -> float:
        """The noise level of the training whose model is certified, or started from, at `sigma`."""
        own = self.point(method).train_sigma
        return sigma if own is None else own

    def models(self) -> set[tuple[str, float]]:
        """Every (method, noise level of training) that tables, tuning or other methods need."""
        return self._needed(
            [(n, s) for n in self.methods for s in (*self.sigmas_of(n), self.tuning.sigma)]
        )

    def trained_models(self) -> set[tuple[str, float]]:
        """Those of `models` that tables or other methods need; each is trained once per seed."""
        return self._needed([(n, s) for n in self.methods for s in self.sigmas_of(n)])

    def _needed(self, asked: list[tuple[str, float]]) -> set[tuple[str, float]]:
        found: set[tuple[str, float]] = set()
        while asked:
            name, sigma = asked.pop()
            sigma = self.training_sigma(name, sigma)
            found.add((name, sigma))
            method = self.methods[name]
            before = [method.start, method.denoiser.of if method.denoiser else BASE]
            asked += [(other, sigma) for other in before if other != BASE]
        return found

    def points(self) -> list[tuple[str, float, int]]:
        """Every (method, sigma, seed) that the tables hold."""
        return [
            (name, sigma, seed)
            for name in self.methods
            for sigma in self.sigmas_of(name)
            for seed in self.seeds
        ]

    def attacked(self) -> list[tuple[str, float, int]]:
        """Every (method, sigma, seed) that is attacked; none without `attack`."""
        if self.attack is None:
            return []
        methods = self.attack.methods or list(self.methods)
        sigmas = self.attack.sigmas or self.sigmas
        return [p for p in self.points() if p[0] in methods and p[1] in sigmas]

    def point(self, name: str) -> Method:
        """The method `name`, or its trial with other values, `NAME__lr_RATE[__KEY_VALUE...]`.

        Raises:
            BenchError: the experiment has no such method, or its kind no such value.
        """
        method = name.partition(TRIAL)[0]
        if method not in self.methods:
            known = ", ".join(self.methods)
            raise BenchError(f"methods.{method} does not exist in {self.name}; it has {known}")
        try:
            return self.methods[method].with_values(split_trial(name)[1])
        except ValueError as error:
            raise BenchError(f"{name} is no trial of methods.{method}: {error}") from None

    def trials(self) -> list[str]:
        """Every trained method with every learning rate and size that tuning tries."""
        found = []
        for name, method in self.methods.items():
            sizes = {key: values for key, values in method.grid.items() if key != "learning_rate"}
            rates = method.grid.get("learning_rate", self.tuning.learning_rates)
            for rate, *size in product(rates if method.trains else [], *sizes.values()):
                parts = [f"{key}_{value}" for key, value in zip(sizes, size, strict=True)]
                found.append("__".join([f"{name}{TRIAL}{rate:g}", *parts]))
        return found

    def method_training(self, method: str) -> TrainingSettings:
        """`training` with the method's overrides; in a trial, then with those of `tuning`."""
        overrides = self.point(method).training.model_dump(exclude_none=True)
        if TRIAL in method:
            overrides |= self.tuning.training.model_dump(exclude_none=True)
        return self.training.model_copy(update=overrides)

    def training_processes(self, method: str) -> int:
        """Processes that share the batches of a method's training, if it has one."""
        return self.method_training(method).processes if self.point(method).trains else 1

    @property
    def pretraining_processes(self) -> int:
        """Processes that share the batches of the base's training, if it has one."""
        return self.pretrain.processes if self.pretrain.images else 1

    def lender(self, method: str) -> str | None:
        """The baseline whose denoiser `method` borrows, if any."""
        shared = self.point(method).denoiser
        return None if shared is None else self.point(shared.of).baseline

    def training_fingerprint(self, method: str, sigma: float, seed: int) -> str:
        """Hash of the settings that define one model folder (labels do not)."""
        chosen, sigma = self.point(method), self.training_sigma(method, sigma)
        labels = {"label", "family", "sigmas", "published", "grid"}
        own = {"training", "objective", "train_sigma", "start", "noise_resolution"}
        point = chosen.model_dump(exclude=labels | own)
        try:
            objective = [chosen.objective.kind, chosen.objective.at(sigma)]
        except ValueError as error:
            raise BenchError(f"methods.{method}.objective.{error}") from None
        training = self.method_training(method).defining()
        scratch = isinstance(chosen.parameterization, Scratch)
        start = [sha256_json([self.data.defining(), self.backbone.model_dump()])]
        start += [] if scratch else [self.base_fingerprint]
        start += map(self.surrogate_fingerprint, chosen.surrogates)
        if chosen.noise_resolution != "native":
            start.append(chosen.noise_resolution)
        if chosen.start != BASE:
            start.append(self.training_fingerprint(chosen.start, sigma, seed))
        if chosen.denoiser is not None:
            start.append(self.training_fingerprint(chosen.denoiser.of, sigma, seed))
        return sha256_json([start, point, objective, training, sigma, seed])

    def certification_fingerprint(self, sigma: float, seed: int) -> str:
        """Hash of the settings that define one certification, the model's own aside."""
        settings = self.certification.model_dump()
        return sha256_json([self.data.name, self.radius_step, settings, sigma, seed])

    @property
    def attack_settings(self) -> AttackSettings:
        """The section `attack`.

        Raises:
            BenchError: the experiment has none.
        """
        if self.attack is None:
            raise BenchError(
                f"{self.name} has no section `attack`: add one, config/README.md has its keys"
            )
        return self.attack

    def attack_fingerprint(self, sigma: float, seed: int) -> str:
        """Hash of the settings that define one attack, the model's own aside."""
        settings = self.attack_settings.part_of_log
        return sha256_json([self.certification_fingerprint(sigma, seed), settings])


def split_trial(name: str) -> tuple[str, dict[str, int | float]]:
    """The method of a trial and the values that it tries; a method itself tries none."""
    method, found, rest = name.partition(TRIAL)
    if not found:
        return method, {}
    rate, *sizes = rest.split("__")
    pairs = [size.rpartition("_")[::2] for size in sizes]
    values = {key: float(text) for key, text in [("learning_rate", rate), *pairs]}
    return method, {key: int(v) if v.is_integer() else v for key, v in values.items()}


def sigma_text(sigma: float) -> str:
    """The one spelling of sigma in paths: at least two decimals."""
    return f"{sigma:.2f}" if round(sigma, 2) == sigma else repr(sigma)


def complaints(error: ValidationError) -> str:
    """One line per offending key."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        text = isinstance(item["input"], str) and item["type"] in ("float_type", "int_type")
        cure = "; YAML reads 1e-3 and numbers in quotes as text: write 1.0e-3" if text else ""
        if isinstance(item["input"], float) and item["type"] == "int_type":
            cure = "; write it without a point or an exponent"
        lines.append(f"  {key}: {item['msg']} (found: {item['input']!r:.80}){cure}")
    return "\n".join(lines)


def parse_experiment(values: object, source: str) -> Experiment:
    """Validate a mapping as an experiment.

    Raises:
        BenchError: names the file and each offending key.
    """
    try:
        # Strict, as the JSON schema is: a number in quotes is a mistake.
        return Experiment.model_validate(values, strict=True)
    except ValidationError as error:
        raise BenchError(
            f"{source} is not a valid experiment:\n{complaints(error)}\n"
            "config/README.md explains every key"
        ) from None


def load_experiment(path: Path) -> Experiment:
    """Read an experiment file.

    Raises:
        BenchError: the file is missing, is not YAML, or breaks the schema.
    """
    return parse_experiment(read_yaml(path), str(path))


def json_schema() -> dict[str, Any]:
    """The JSON schema that Snakemake validates an experiment file against."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Experiment.model_json_schema(),
    }
