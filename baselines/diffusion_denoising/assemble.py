"""Put the trained diffusion model in front of the frozen base classifier, for one sigma."""

from typing import Any

from safetensors.torch import load_file

from baselines.command import BaselineJob, run_baseline
from baselines.diffusion_denoising.denoiser import OneStepDenoiser
from baselines.diffusion_denoising.settings import DiffusionSettings
from bench.cost import inference_flops
from bench.errors import BenchError
from bench.files import read_json
from bench.jobs import base_flops, load_base
from bench.model_folder import Component, save_model, spec_of, training_report
from bench.training import accuracy


def assemble(job: BaselineJob) -> None:
    """Write the model folder of one sigma; the UNet lies where `train` wrote it."""
    settings = job.settings_as(DiffusionSettings)
    trained = job.output.parents[1] / "unet" / job.output.name
    cost = read_json(trained / "cost.json")
    expected = job.experiment.training_fingerprint(job.method, 0.0, job.seed)
    if cost.pop("fingerprint") != expected:
        raise BenchError(f"{trained} was trained with other settings: train it again")
    arguments: dict[str, Any] = {
        "sigma": job.sigma,
        "channels": job.data.shape[0],
        "size": job.data.shape[1],
        "stage_channels": settings.stage_channels,
        "layers_per_block": settings.layers_per_block,
    }
    denoiser = OneStepDenoiser(**arguments)
    denoiser.unet.load_state_dict(load_file(trained / "diffusion_pytorch_model.safetensors"))
    classifier = load_base(job.experiment, job.base_folder).requires_grad_(False)
    classifier.denoiser = denoiser
    classifier.to(job.device).eval()
    cost |= {
        "head_parameters": 0,
        "total_parameters": sum(p.numel() for p in classifier.parameters()),
        "inference_flops": inference_flops(classifier, job.data.shape),
        "base_training_flops": base_flops(job.base_folder),
        "queries": 0,
    }
    report = training_report(None, job.device, job.data, job.training.model_dump())
    report["validation_sigma"] = job.sigma
    report["validation_accuracy"] = accuracy(classifier, job.data.validation, job.sigma, job.seed)
    factory = f"{OneStepDenoiser.__module__}:{OneStepDenoiser.__qualname__}"
    spec = spec_of(
        job.experiment, job.data, denoiser=Component(factory=factory, arguments=arguments)
    )
    save_model(job.output, classifier, spec, job.identity, cost, report)


if __name__ == "__main__":
    run_baseline(assemble)
