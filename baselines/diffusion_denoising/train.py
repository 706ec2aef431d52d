"""Train the diffusion model once for all sigmas (`--sigma 0` names no noise level), or take one."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Generator, Tensor

from baselines.command import BaselineJob, run_baseline
from baselines.diffusion_denoising.denoiser import ddpm_scheduler, unet_config
from baselines.diffusion_denoising.settings import DiffusionSettings
from bench import replicas
from bench.cost import training_flops
from bench.errors import BenchError
from bench.files import atomic_write, sha256_file, share, write_json
from bench.training import BatchLoss, TrainingRecord, fit
from bench.training_state import discard_state

EMA_DECAY = 0.995
WEIGHTS = "diffusion_pytorch_model.safetensors"  # so diffusers calls them


class WeightAverage:
    """An exponential moving average of the UNet's weights, as a hook of the training."""

    def __init__(self, unet: UNet2DModel) -> None:
        self.unet = unet
        self.average = EMAModel(unet.parameters(), decay=EMA_DECAY, use_ema_warmup=True, power=0.75)

    def __call__(self) -> None:
        """Take a step's weights in."""
        self.average.step(self.unet.parameters())

    def state_dict(self) -> dict[str, Any]:
        """The average so far."""
        state: dict[str, Any] = self.average.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.average.load_state_dict(state)


def noise_prediction(unet: UNet2DModel, settings: DiffusionSettings) -> BatchLoss:
    """The simple DDPM loss (Ho 2020, eq. 14) with t uniform in the settings' window."""
    scheduler = ddpm_scheduler()

    def loss(images: Tensor, labels: Tensor, generator: Generator, progress: float) -> Tensor:
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        window = (settings.timesteps_low, settings.timesteps_high)
        t = torch.randint(*window, (len(images),), generator=generator, device=images.device)
        noisy = scheduler.add_noise(2 * images - 1, noise, t)
        return F.mse_loss(unet(noisy, t).sample, noise)

    return loss


def take_pretrained(job: BaselineJob, source: str) -> tuple[UNet2DModel, DDPMScheduler]:
    """The UNet and schedule of a diffusers folder, or of one on the Hugging Face hub.

    Raises:
        BenchError: it cannot be had without pickle, or does not fit the data.
    """
    key = f"methods.{job.method}.settings.pretrained = {source}"
    nested = (Path(source) / "unet").is_dir()
    places = {"unet": "unet", "scheduler": "scheduler"} if nested else {}
    try:
        unet = UNet2DModel.from_pretrained(
            source, subfolder=places.get("unet"), use_safetensors=True
        )
        scheduler = DDPMScheduler.from_pretrained(source, subfolder=places.get("scheduler"))
    except (OSError, ValueError) as error:
        raise BenchError(f"{key}: no diffusers model with safetensors there ({error})") from None
    channels, size = job.data.shape[:2]
    wanted: dict[str, object] = {
        "in_channels": channels,
        "out_channels": channels,
        "sample_size": size,
        "prediction_type": "epsilon",
    }
    config = {**unet.config, **scheduler.config}
    found = {name: config[name] for name in wanted}
    if found != wanted:
        raise BenchError(f"{key} has {found}; {job.data.name} needs {wanted}: name another model")
    return unet, scheduler


def fit_unet(
    job: BaselineJob, settings: DiffusionSettings, unet: UNet2DModel
) -> tuple[TrainingRecord, int]:
    """Train the UNet, leave its averaged weights in it; also count the FLOPs."""
    unet.to(job.device)
    average = WeightAverage(unet)
    loss = noise_prediction(unet, settings)
    flops = training_flops(loss, job.data.shape, job.training, unet)
    record = fit(
        unet,
        loss,
        job.data.train,
        job.training,
        job.learning_rate,
        job.seed,
        after_step=average,
        state=job.state(),
    )
    average.average.copy_to(unet.parameters())
    return record, flops


def train_unet(job: BaselineJob) -> None:
    """Train or take the UNet, and write its folder."""
    settings = DiffusionSettings.of(job.experiment, job.method)
    cost: dict[str, Any] = dict.fromkeys(
        ("training_flops", "trainable_parameters", "training_images", "peak_memory_bytes"), 0
    )
    cost["training_seconds"], curve = 0.0, []
    if settings.pretrained is not None:
        unet, scheduler = take_pretrained(job, settings.pretrained)
    else:
        channels, size = job.data.shape[:2]
        shape = (channels, size, settings.stage_channels, settings.layers_per_block)
        unet, scheduler = UNet2DModel.from_config(unet_config(*shape)), ddpm_scheduler()
        record, flops = fit_unet(job, settings, unet)
        curve = record.loss_curve
        cost |= {
            "training_flops": flops,
            "trainable_parameters": sum(p.numel() for p in unet.parameters()),
            "training_images": record.images,
            "training_seconds": record.seconds,
            "peak_memory_bytes": record.peak_memory_bytes,
        }
    if replicas.rank() == 0:
        write_unet(job, unet, scheduler, cost, curve)


def write_unet(
    job: BaselineJob,
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    cost: dict[str, Any],
    curve: list[tuple[int, float]],
) -> None:
    """Write the folder in diffusers' format, the loss curve of a training, and `cost.json`."""
    if curve:
        with atomic_write(job.output / "loss.txt") as temporary:
            temporary.write_text("".join(f"{step} {value}\n" for step, value in curve))
    unet.save_pretrained(job.output)
    share(job.output / WEIGHTS)
    scheduler.save_pretrained(job.output)
    named = {
        "fingerprint": job.identity.fingerprint,
        "weights_sha256": sha256_file(job.output / WEIGHTS),
    }
    write_json(job.output / "cost.json", {**cost, **named})
    discard_state(job.output)


if __name__ == "__main__":
    run_baseline(train_unet, spread=True)
