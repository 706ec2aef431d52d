"""Networks without weights: what a pass takes, known before anything is fetched or run."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.backbones import Classifier
from bench.cost import count_flops
from bench.training import precision_context

# Tensors of one mode do not mix with those of another. What a library holds beside parameters
# and buffers, index tables for example, is real.
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pass:
    """FLOPs of a pass, and the most bytes that it holds beside the weights."""

    flops: int
    peak_bytes: int


class _LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.live:
            self.live.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.now -= size


def without_weights(module: nn.Module) -> nn.Module:
    """`module` with tensors in place that have shapes and types but no numbers, on the CPU."""
    with FAKE:
        _renew(module, CPU)
    return module


def for_inference(classifier: Classifier, precision: str) -> Classifier:
    """`Classifier.for_inference` of a classifier without weights, whose tensors refuse casts."""
    _renew(classifier, torch.device("meta"))
    without_weights(classifier.for_inference(precision))
    return classifier


def _renew(module: nn.Module, device: torch.device) -> None:
    """Put new tensors of the same shapes and types in place."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype, device=device)
                part._parameters[name] = nn.Parameter(empty, value.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                empty = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
                part._buffers[name] = empty


def follow(run: Callable[[], object], precision: str, *modules: nn.Module) -> Pass:
    """What `run` takes under autocast to `precision`, with attention written out.

    Fused attention would hold less; its FLOPs are the same.
    """
    with FAKE, _LiveBytes() as memory, precision_context(CPU, precision):
        flops = count_flops(run, *modules)
    return Pass(flops, memory.peak)
