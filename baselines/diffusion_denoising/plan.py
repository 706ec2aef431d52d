"""What a diffusion model takes, trained or taken, for `bench plan`."""

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from baselines.diffusion_denoising.denoiser import unet_config
from baselines.diffusion_denoising.settings import DiffusionSettings
from baselines.diffusion_denoising.train import noise_prediction
from bench.accounting import DDPM_CIFAR10, GUIDED_DIFFUSION_256
from bench.errors import BenchError
from bench.files import read_json
from bench.plan import Line, Planned, Planner, parameter_bytes
from bench.weightless import without_weights

# By the side of their images: what is planned with where the folder's own config is not at hand.
PUBLISHED = {32: DDPM_CIFAR10, 256: GUIDED_DIFFUSION_256}


class Passes(nn.Module):
    """As many passes as `DiffusionDenoiser` makes, in its shapes; what they make means nothing."""

    def __init__(self, unet: UNet2DModel, steps: int, votes: int):
        super().__init__()
        self.unet, self.votes, self.passes = unet, votes, 1 + votes * (steps - 1)

    def forward(self, noisy: Tensor) -> Tensor:
        """Pixels `(B, C, H, W)`, or V of them, `(V, B, C, H, W)`."""
        for _ in range(self.passes):
            noisy = self.unet(noisy, torch.zeros(())).sample
        return torch.stack([noisy] * self.votes) if self.votes > 1 else noisy


def config_of(planner: Planner, name: str, settings: DiffusionSettings) -> dict[str, Any]:
    """The UNet's configuration: the user's, that of a local folder, or a published one's.

    Raises:
        BenchError: `pretrained` is no local folder, and no model of that image size is known.
    """
    channels, size, _ = planner.data.shape
    if settings.pretrained is None:
        return unet_config(channels, size, settings.stage_channels, settings.layers_per_block)
    for folder in (Path(settings.pretrained) / "unet", Path(settings.pretrained)):
        if (folder / "config.json").exists():
            return read_json(folder / "config.json")
    if size not in PUBLISHED:
        raise BenchError(
            f"methods.{name}.settings.pretrained: {settings.pretrained} is no folder here, and its "
            f"size is not known for images of {size} pixels: bring the folder"
        )
    return PUBLISHED[size]


def plan(planner: Planner, name: str) -> Planned:
    """The lines of a method of this baseline: the UNet once per seed, a folder per sigma."""
    experiment = planner.experiment
    settings, budget = DiffusionSettings.of(experiment, name), experiment.method_training(name)
    shape, seeds = planner.data.shape, len(experiment.seeds)
    with torch.device("meta"):
        unet = UNet2DModel.from_config(config_of(planner, name, settings))
    without_weights(unet)
    made = Line("train", f"{name} (unet)", seeds, disk_bytes=seeds * parameter_bytes(unet))
    if settings.channels is not None:
        flops, memory = planner.step(unet, noise_prediction(unet, settings), shape, budget)
        made = made._replace(training_flops=seeds * budget.images_seen * flops, memory_bytes=memory)
    classifier = planner.frozen()
    passes = Passes(unet.requires_grad_(False), settings.steps, settings.votes)
    classifier.denoiser = passes.eval()
    jobs, disk = planner.jobs(name), parameter_bytes(classifier)
    assembled = Line("train", name, jobs, memory_bytes=disk, disk_bytes=jobs * disk)
    return Planned([made, assembled], classifier, planner.validated(name))
