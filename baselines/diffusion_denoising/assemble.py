"""Put the trained diffusion model in front of the frozen base classifier, for one sigma."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from baselines.command import BaselineJob, run_baseline
from baselines.diffusion_denoising.denoiser import DiffusionDenoiser
from baselines.diffusion_denoising.settings import DiffusionSettings
from baselines.diffusion_denoising.train import WEIGHTS
from bench.cost import inference_flops
from bench.errors import BenchError
from bench.files import read_json, sha256_file
from bench.jobs import base_flops, load_base, validation
from bench.model_folder import Component, save_model, spec_of, training_report


def denoiser_at(
    job: BaselineJob, settings: DiffusionSettings, trained: Path
) -> tuple[DiffusionDenoiser, Component]:
    """The diffusion model of folder `trained` as the denoiser of the job's sigma.

    Raises:
        BenchError: the UNet never saw one of the time steps in its training.
    """
    arguments: dict[str, Any] = {
        "sigma": job.sigma,
        "unet": read_json(trained / "config.json"),
        "scheduler": read_json(trained / "scheduler_config.json"),
        "timestep": settings.timestep,
        "steps": settings.steps,
        "votes": settings.votes,
    }
    denoiser = DiffusionDenoiser(**arguments)
    denoiser.unet.load_state_dict(load_file(trained / WEIGHTS))
    for t, _ in denoiser.times:
        if not settings.timesteps_low <= t < settings.timesteps_high:
            raise BenchError(
                f"methods.{job.method}.settings: sigma = {job.sigma} needs time step {t:g}, "
                "outside of timesteps_low and timesteps_high, which the training sees: widen them"
            )
    factory = f"{DiffusionDenoiser.__module__}:{DiffusionDenoiser.__qualname__}"
    return denoiser, Component(factory=factory, arguments=arguments)


def assemble(job: BaselineJob) -> None:
    """Write the model folder of one sigma; the UNet lies where the workflow puts it.

    Raises:
        BenchError: it is missing, or of other settings.
    """
    settings = DiffusionSettings.of(job.experiment, job.method)
    trained = job.output.absolute().parents[1] / "unet" / job.output.name
    if not (trained / "cost.json").exists():
        raise BenchError(
            f"{trained} is missing: train the UNet there (baselines.diffusion_denoising.train "
            "--sigma 0), for an --output like METHOD/sigma_0.50/seed_0 next to METHOD/unet/seed_0"
        )
    cost = read_json(trained / "cost.json")
    expected = job.experiment.training_fingerprint(job.method, 0.0, job.seed)
    if cost.pop("fingerprint") != expected:
        raise BenchError(f"{trained} was trained with other settings: train it again")
    if cost.pop("weights_sha256", None) != sha256_file(trained / WEIGHTS):
        raise BenchError(f"{trained / WEIGHTS} was changed or cut off: train it again")
    classifier = load_base(job.experiment, job.base_folder).requires_grad_(False)
    classifier.denoiser, component = denoiser_at(job, settings, trained)
    classifier.to(job.device).eval()
    cost |= {
        "head_parameters": 0,
        "total_parameters": sum(p.numel() for p in classifier.parameters()),
        "inference_flops": inference_flops(classifier, job.data.shape),
        # What others' UNets have cost is not known, and is not nothing.
        "base_training_flops": base_flops(job.base_folder) if settings.pretrained is None else None,
        "queries": 0,
    }
    report = training_report(None, job.device, job.data, job.training.model_dump())
    report |= validation(classifier, job.data, job.sigma, job.seed)
    spec = spec_of(job.experiment, job.data, denoiser=component)
    save_model(job.output, classifier, spec, job.identity, cost, report)


if __name__ == "__main__":
    run_baseline(assemble)
