"""A classifier behind an HTTP endpoint: what it shows, the wire format, the client that counts."""

import base64
import logging
from collections.abc import Callable
from typing import Any, Literal

import httpx2
import numpy as np
import tenacity
import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt, ValidationError, model_validator
from torch import Tensor, nn

from bench.backbones import Classifier
from bench.config import Access, RemoteSettings
from bench.errors import BenchError
from bench.settings import Settings

log = logging.getLogger(__name__)
# Answers that say that no image of the request was answered.
REFUSALS = (429, 503)
# Raised before a byte of the request has left.
UNSENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
# Little-endian on the wire, whatever the machine.
WIRE_TYPES = {"float32": "<f4", "int64": "<i8"}
NO_CLASS = -1
BACKOFF = tenacity.wait_random_exponential(multiplier=0.5, max=30)


class BudgetSpent(Exception):
    """The next images would exceed the query budget."""


class Unanswered(Exception):
    """An attempt brought no usable answer; another may."""


class Ledger:
    """Counts every image that a black box answered or may have answered."""

    def __init__(self, budget: int | None = None) -> None:
        self.budget, self.spent = budget, 0

    def spend(self, images: int) -> None:
        """Count `images`, before they are sent.

        Raises:
            BudgetSpent: they would exceed the budget; nothing is counted then.
        """
        if self.budget is not None and self.spent + images > self.budget:
            raise BudgetSpent
        self.spent += images

    def refund(self, images: int) -> None:
        """Take back `images` that certainly were not answered."""
        self.spent -= images


class WireArray(Settings):
    """An array as base64 of its raw little-endian bytes, so that every bit survives JSON."""

    dtype: Literal["float32", "int64"]
    shape: list[NonNegativeInt]
    data: str

    @model_validator(mode="after")
    def _bytes_fit(self) -> "WireArray":
        size = np.dtype(WIRE_TYPES[self.dtype]).itemsize * int(np.prod(self.shape))
        if len(base64.b64decode(self.data, validate=True)) != size:
            raise ValueError(f"data must hold {size} bytes for this shape and dtype")
        return self

    @classmethod
    def of(cls, values: Tensor) -> "WireArray":
        """Encode a float32 or int64 tensor."""
        dtype = str(values.dtype).removeprefix("torch.")
        raw = values.cpu().numpy().astype(WIRE_TYPES[dtype]).tobytes()
        data = base64.b64encode(raw).decode()
        return cls.model_validate({"dtype": dtype, "shape": list(values.shape), "data": data})

    def tensor(self) -> Tensor:
        """The tensor, on the CPU."""
        wire = np.frombuffer(base64.b64decode(self.data), WIRE_TYPES[self.dtype])
        return torch.from_numpy(wire.astype(self.dtype)).view(self.shape)


class Description(Settings):
    """What an endpoint says of itself; `model` changes whenever its answers may change."""

    model: str
    access: Access
    classes: PositiveInt
    channels: PositiveInt
    max_batch: PositiveInt


class Question(Settings):
    """Noisy images `(B, C, H, W)`, float32."""

    images: WireArray


class Answer(Settings):
    """Logits or probabilities `(B, K)`, float32, or classes `(B,)`, int64, -1 for none.

    `model` is the description's: a server that was started again may have become another one.
    """

    model: str
    answers: WireArray


def show(logits: Tensor, access: Access) -> Tensor:
    """What a black box shows of logits `(B, K)`: `(B, K)` float32, or classes `(B,)` for top1.

    Where some logit is not finite, the class is -1.
    """
    if access == "top1":
        return torch.where(logits.isfinite().all(1), logits.argmax(1), NO_CLASS)
    return logits.softmax(1) if access == "probabilities" else logits


def as_scores(shown: Tensor, access: Access, classes: int) -> Tensor:
    """Scores `(B, classes)` float32 that vote as the black box does: top1 becomes one-hot.

    No class becomes nan, which votes for nobody.
    """
    if access != "top1":
        return shown
    scores = F.one_hot(shown.clamp_min(0), classes).float()
    return scores.masked_fill((shown < 0)[:, None], torch.nan)


class RemoteModel(nn.Module):
    """Sends images to an endpoint (docs/black-box.md) and counts them in `ledger`.

    An image counts once per attempt in which it may have been answered: always, unless no
    connection was made or the endpoint refused the request (429, 503 or another 4xx).

    Raises:
        BenchError: nothing answers, or something else than `settings` describes.
    """

    def __init__(
        self,
        settings: RemoteSettings,
        ledger: Ledger | None = None,
        wait: Callable[[tenacity.RetryCallState], float] = BACKOFF,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.ledger = ledger or Ledger()
        try:
            self.client = httpx2.Client(base_url=settings.url, timeout=settings.timeout)
        except httpx2.InvalidURL as error:
            raise BenchError(f"{settings.url} is no address ({error}): correct it") from None
        self.retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(settings.attempts),
            wait=wait,
            retry=tenacity.retry_if_exception_type((httpx2.TransportError, Unanswered)),
            before_sleep=tenacity.before_sleep_log(log, logging.WARNING),
            reraise=True,
        )
        self.description = self._describe()

    def _describe(self) -> Description:
        url, expected = self.settings.url, self.settings
        try:
            response = self.retrying(self.client.get, "/v1/model")
            found = Description.model_validate_json(response.content)
        except (httpx2.HTTPError, ValidationError) as error:
            raise BenchError(
                f"{url}/v1/model does not describe a model ({error}): start `bench serve`, or "
                "correct the address"
            ) from None
        if expected.access not in (None, found.access):
            raise BenchError(f"{url} shows {found.access}, but {expected.access} is asked for")
        if expected.model not in (None, found.model):
            raise BenchError(f"{url} serves another model than the one that was trained against")
        return found

    @property
    def pinned(self) -> RemoteSettings:
        """The settings, with what the endpoint is now."""
        found = self.description
        return self.settings.model_copy(update={"access": found.access, "model": found.model})

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores `(B, K)` float32 of `(B, C, H, W)` pixels, on their device."""
        shown = [self._ask(part) for part in pixels.split(self.description.max_batch)]
        access, classes = self.description.access, self.description.classes
        return as_scores(torch.cat(shown), access, classes).to(pixels.device)

    def _ask(self, pixels: Tensor) -> Tensor:
        question = Question(images=WireArray.of(pixels.float())).model_dump_json()
        try:
            return self.retrying(self._attempt, question, len(pixels))
        except (httpx2.TransportError, Unanswered) as error:
            raise BenchError(
                f"{self.settings.url} gave no answer in {self.settings.attempts} attempts "
                f"({error!r}): see to the server and rerun; start it with a smaller --max-batch if "
                f"{self.description.max_batch} images take it more than {self.settings.timeout:g} s"
            ) from None

    def _attempt(self, question: str, images: int) -> Tensor:
        self.ledger.spend(images)
        headers = {"Content-Type": "application/json"}
        try:
            response = self.client.post("/v1/answers", content=question, headers=headers)
        except UNSENT:
            self.ledger.refund(images)
            raise
        if response.status_code in REFUSALS:
            self.ledger.refund(images)
            raise Unanswered(f"status {response.status_code}")
        if response.is_client_error:
            self.ledger.refund(images)
            raise BenchError(f"{self.settings.url} refuses the images: {response.text:.300}")
        if response.status_code != 200:
            raise Unanswered(f"status {response.status_code}")
        return self._shown(response.content, images)

    def _shown(self, content: bytes, images: int) -> Tensor:
        """The answers to all images; a part of them is no answer."""
        described = self.description
        top1 = described.access == "top1"
        wanted: list[Any] = (
            ["int64", [images]] if top1 else ["float32", [images, described.classes]]
        )
        try:
            answer = Answer.model_validate_json(content)
        except ValidationError as error:
            raise Unanswered(f"not an answer: {error}") from None
        if answer.model != described.model:
            raise BenchError(
                f"{self.settings.url} serves another model than when this run began: start the "
                "first one again and rerun"
            )
        found = answer.answers
        if [found.dtype, found.shape] != wanted:
            raise Unanswered(f"{found.dtype} {found.shape} instead of {wanted}")
        shown = found.tensor()
        if top1 and not bool(((shown >= NO_CLASS) & (shown < described.classes)).all()):
            raise Unanswered("a class that does not exist")
        return shown


class RemoteClassifier(Classifier):
    """A served classifier, with what stands in front of it here."""

    def __init__(self, model: RemoteModel) -> None:
        channels = model.description.channels
        super().__init__(model, (0.0,) * channels, (1.0,) * channels)

    def classify(self, pixels: Tensor) -> Tensor:
        """Scores `(B, K)`, the prompt left out."""
        scores: Tensor = self.network(pixels)
        return scores

    def for_inference(self, precision: str) -> "Classifier":
        """Set evaluation mode; the precision of a served network is the server's business."""
        return self.eval().requires_grad_(False)
