"""A reference server: any model folder as a black box over HTTP (docs/black-box.md)."""

import logging
from pathlib import Path

import torch
from fastapi import FastAPI, HTTPException

from bench.backbones import Classifier
from bench.config import Access
from bench.errors import BenchError
from bench.files import sha256_json
from bench.memory import out_of_memory
from bench.model_folder import load_classifier, read_spec
from bench.provenance import (
    code_sha256,
    machine,
    model_sources,
    pick_device,
    pick_precision,
    versions,
)
from bench.remote import Answer, Description, Question, WireArray, show

log = logging.getLogger(__name__)


def create_app(classifier: Classifier, described: Description) -> FastAPI:
    """The application that answers for `classifier`, one request at a time, one pass each.

    The handlers are coroutines: inference stays in one thread, so that answers do not depend on
    which thread a request meets.
    """
    app = FastAPI(title="bench serve")
    device = classifier.mean.device
    taken: set[tuple[int, ...]] = set()

    @app.get("/v1/model")
    async def model() -> Description:
        return described

    @app.post("/v1/answers")
    async def answers(question: Question) -> Answer:
        images = question.images
        if images.dtype != "float32" or len(images.shape) != 4 or not images.shape[0]:
            raise HTTPException(422, "images must be float32 of shape (B, C, H, W)")
        if images.shape[1] != described.channels:
            raise HTTPException(422, f"images must have {described.channels} channels")
        if images.shape[0] > described.max_batch:
            raise HTTPException(413, f"at most {described.max_batch} images at a time")
        shape = tuple(images.shape[1:])
        try:
            with torch.inference_mode():
                shown = show(classifier(images.tensor().to(device)), described.access)
        # What networks raise where the shape does not fit; timm asserts.
        except (RuntimeError, AssertionError, ValueError) as error:
            if shape in taken or out_of_memory(error):
                raise
            log.exception("images of shape %s", shape)
            told = " x ".join(map(str, shape))
            raise HTTPException(422, f"the model cannot take images {told}") from error
        taken.add(shape)
        return Answer(model=described.model, answers=WireArray.of(shown))

    return app


def app_of(folder: Path, access: Access, precision: str, max_batch: int = 1024) -> FastAPI:
    """The application that serves a model folder, `max_batch` images at a time.

    Raises:
        BenchError: the folder is no model folder, or takes images that are resized outside.
    """
    spec, device = read_spec(folder), pick_device()
    if spec.noise_size is not None:
        raise BenchError(
            f"{folder} takes images resized to {spec.noise_size} pixels before the noise, which "
            "its clients cannot know: serve a model with noise_resolution: native"
        )
    precision = pick_precision(precision, device)
    classifier = load_classifier(folder).for_inference(precision).to(device)
    # All that the answers' bits depend on, the shape of a pass included.
    code = code_sha256({*model_sources(classifier), Path(__file__)})
    parts = [spec.model_dump(), access, precision, max_batch, code, versions(), machine(device)]
    described = Description(
        model=sha256_json(parts),
        access=access,
        classes=spec.classes,
        channels=spec.channels,
        max_batch=max_batch,
    )
    return create_app(classifier, described)


def serve(
    folder: Path, access: Access, precision: str, max_batch: int, host: str, port: int
) -> None:
    """Serve a model folder until interrupted."""
    import uvicorn

    uvicorn.run(
        app_of(folder, access, precision, max_batch), host=host, port=port, log_level="warning"
    )
