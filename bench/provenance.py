"""Which code, versions and machine made a number."""

import hashlib
import inspect
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import BenchError
from bench.files import sha256_file, sha256_json

PACKAGES = ("torch", "timm", "peft", "diffusers", "numpy", "scipy", "pillow")


def machine(device: torch.device) -> str:
    """The accelerator's name, or the processor's with its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [row for row in info.read_text().splitlines() if row.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _git(*arguments: str) -> str | None:
    """What git says of this checkout; None where there is no git, or it refuses."""
    here = Path(__file__).parent
    try:
        answer = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True)
    except OSError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def versions() -> dict[str, str]:
    """Versions of the packages that numbers come from; on a GPU of cuDNN as well."""
    found = {name: version(name) for name in PACKAGES}
    if torch.cuda.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def provenance(device: torch.device) -> dict[str, Any]:
    """Versions, git revision with dirty flag (None: unknown), machine and device."""
    changes = _git("status", "--porcelain")
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "git_revision": _git("rev-parse", "HEAD") or "unknown",
        "git_dirty": None if changes is None else bool(changes),
        "machine": machine(device),
        "device": device.type,
    }


def model_sources(model: nn.Module) -> set[Path]:
    """The files of this project that a model's answers come from."""
    root = Path(__file__).parent
    files = {root / "model_folder.py"}
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    written = (kind for kind in kinds if kind.__module__ != "builtins")
    for source in map(Path, map(inspect.getfile, written)):
        # Not the checkout: it may hold the environment as well.
        if any(source.is_relative_to(place) for place in (root, root.parent / "baselines")):
            files.add(source)
    return files


def code_sha256(files: set[Path]) -> str:
    """Hex sha256 of files' names and contents, wherever they lie."""
    return sha256_json(sorted((path.name, sha256_file(path)) for path in files))


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hex sha256 of tensors by name: their kinds, shapes and values, in whatever file."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def pick_precision(asked: str, device: torch.device) -> str:
    """`asked`, where `auto` is bfloat16 on hardware that computes in it, else float32.

    Emulated bfloat16 is slower than float32: ten times on a CPU with AVX2 alone.
    """
    if asked != "auto":
        return asked
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities()
        native = any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return "bfloat16" if native else "float32"


def pick_device(gpus: int = 0) -> torch.device:
    """CUDA where there is one, with matrix products of float32 in float32; else the CPU.

    Raises:
        BenchError: `gpus` says that the job was given one, and torch sees none.
    """
    if torch.cuda.is_available():
        # Images of NVIDIA's containers set a variable that makes them TF32.
        torch.set_float32_matmul_precision("highest")
        return torch.device("cuda")
    if gpus:
        raise BenchError(
            f"gpus_per_job is {gpus} and torch sees no GPU: install a driver for CUDA "
            f"{torch.version.cuda} or a torch for yours, or set gpus_per_job: 0 for the CPU"
        )
    return torch.device("cpu")
