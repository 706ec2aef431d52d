"""Where a training stands, on disk now and then: a kill loses minutes, and a rerun goes on."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bench import replicas
from bench.files import atomic_write, sha256_json
from bench.provenance import tensors_sha256

log = logging.getLogger(__name__)
FILES = "training_state*.safetensors"
SAVE_SECONDS = 120.0
# Stands in the JSON where a tensor stood.
TENSOR = "__tensor__"


class TrainingState:
    """A file beside the model to come, valid for one meaning.

    Args:
        folder: the model folder to come.
        meaning: hash of all that the training depends on. It is part of the file's name, so that
            a run on another machine, say, leaves this state for a run that it fits.
    """

    def __init__(self, folder: Path, meaning: str) -> None:
        self.path = folder / FILES.replace("*", f".{meaning[:8]}")
        self.meaning = meaning
        self._saved = time.monotonic()

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """What was saved last, its tensors on `device`.

        None where there is nothing, or nothing of this training; the log says why.
        """
        if not self.path.exists():
            for other in self.path.parent.glob(FILES):
                log.warning(
                    "%s is of other settings, weights, data, code or machine, and is left aside: "
                    "training starts from the beginning",
                    other,
                )
            return None
        try:
            with safe_open(self.path, "pt", device=str(device)) as stored:
                described = stored.metadata() or {}
                if described["meaning"] != self.meaning:
                    raise ValueError("it is of another training")
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            if described["sha256"] != _digest(described["state"], tensors):
                raise ValueError("its sha256 differs")
            state: dict[str, Any] = _unpack(json.loads(described["state"]), tensors)
        except (SafetensorError, KeyError, ValueError) as error:
            log.warning("%s is damaged (%s): training starts from the beginning", self.path, error)
            return None
        return state

    @property
    def due(self) -> bool:
        """Whether `SAVE_SECONDS` have passed since the last save."""
        return time.monotonic() - self._saved >= SAVE_SECONDS

    def save(self, state: dict[str, Any]) -> None:
        """Save a state of tensors, numbers, texts, lists and dicts, if this process leads."""
        if replicas.rank():
            return
        tensors: dict[str, Tensor] = {}
        text = json.dumps(_pack(state, tensors))
        described = {"meaning": self.meaning, "state": text, "sha256": _digest(text, tensors)}
        with atomic_write(self.path) as temporary:
            save_file(tensors, temporary, metadata=described)
        # After it: where saving takes long, not every step saves.
        self._saved = time.monotonic()


def discard_state(folder: Path) -> None:
    """Delete all states in the folder of a finished model, killed saves included."""
    for path in (*folder.glob(FILES), *folder.glob(f".{FILES}.*.partial")):
        path.unlink(missing_ok=True)


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON allows it, its tensors moved to `tensors`."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # safetensors refuses views of one storage.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {TENSOR: name}
    if isinstance(value, dict):
        return {str(key): _pack(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(item, tensors) for item in value]
    return value


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_pack`; keys are text, and tuples are lists."""
    if isinstance(value, dict):
        if TENSOR in value:
            return tensors[value[TENSOR]]
        return {key: _unpack(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    return value


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    return sha256_json([text, tensors_sha256(tensors)])
