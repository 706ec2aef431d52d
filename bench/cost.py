"""What a method costs: parameters and FLOPs (2 x multiply-accumulates)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.backbones import Classifier, head_of, plain_attention
from bench.config import TrainingSettings
from bench.errors import BenchError


def count_flops(run: Callable[[], object], *modules: nn.Module) -> int:
    """FLOPs of `run` through `modules`, in whose attention every product is counted."""
    with plain_attention(*modules), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def inference_flops(classifier: Classifier, shape: tuple[int, int, int]) -> int:
    """FLOPs of one image's forward pass, denoiser included."""
    device = next(classifier.parameters()).device
    with torch.no_grad():
        return count_flops(lambda: classifier(torch.zeros(1, *shape, device=device)), classifier)


def training_flops(
    loss: Callable[[Tensor, Tensor, torch.Generator, float], Tensor],
    shape: tuple[int, int, int],
    settings: TrainingSettings,
    *modules: nn.Module,
) -> int:
    """FLOPs of a whole training: forward, and backward where gradients flow.

    A pass does some things once however many images it has, such as putting a matrix together
    from what is trained of it. Passes of two sizes tell that from what every image takes.

    Raises:
        BenchError: what an image takes depends on how many there are.
    """
    few, more = 2, 3  # batch normalisation refuses a single image at 1 x 1
    of_few, of_more = (_pass_flops(loss, shape, count, *modules) for count in (few, more))
    of_an_image = (of_more - of_few) // (more - few)
    of_a_pass = of_few - few * of_an_image
    if of_a_pass < 0:
        raise BenchError("the FLOPs of the objective grow faster than its images: count them apart")
    return settings.images_seen * of_an_image + settings.passes * of_a_pass


def _pass_flops(
    loss: Callable[[Tensor, Tensor, torch.Generator, float], Tensor],
    shape: tuple[int, int, int],
    images: int,
    *modules: nn.Module,
) -> int:
    """FLOPs of one forward and backward pass, which leaves no trace."""
    device = next(modules[0].parameters()).device
    noise = torch.Generator(device).manual_seed(0)
    pixels = torch.zeros(images, *shape, device=device)
    labels = torch.zeros(images, dtype=torch.int64, device=device)

    def step() -> None:
        loss(pixels, labels, noise, 1.0).backward()  # type: ignore[no-untyped-call]

    # Such as in batch-norm statistics, or in the generators that drop-out draws from.
    kept = [{k: v.clone() for k, v in module.named_buffers()} for module in modules]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        flops = count_flops(step, *modules)
    for module, buffers in zip(modules, kept, strict=True):
        module.zero_grad()
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
    return flops


def parameter_counts(trained: nn.Module, classifier: Classifier) -> dict[str, Any]:
    """Trainable (with the head), trainable head and total parameters.

    Args:
        trained: the module whose parameters require gradients.
        classifier: what is certified; its size is the total.
    """
    head = sum(p.numel() for p in head_of(classifier.network).parameters() if p.requires_grad)
    return {
        "trainable_parameters": sum(p.numel() for p in trained.parameters() if p.requires_grad),
        "head_parameters": head,
        "total_parameters": sum(p.numel() for p in classifier.parameters()),
    }
