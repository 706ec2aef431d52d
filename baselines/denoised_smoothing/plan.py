"""What training a CNN denoiser takes, for `bench plan`."""

import torch

from baselines.denoised_smoothing.settings import DenoiserSettings
from baselines.denoised_smoothing.train import mse, new_denoiser, stability
from bench.plan import Line, Planned, Planner, parameter_bytes, planned_denoiser
from bench.weightless import without_weights


def plan(planner: Planner, name: str) -> Planned:
    """The lines of a method of this baseline."""
    experiment = planner.experiment
    point, settings = experiment.methods[name], DenoiserSettings.of(experiment, name)
    budget, shape = experiment.method_training(name), planner.data.shape
    classifier = planner.frozen()
    if point.denoiser is not None:
        denoiser = planned_denoiser(planner, point.label, point.denoiser.of)
    else:
        with torch.device("meta"):
            denoiser, _ = new_denoiser(settings, shape[0])
        without_weights(denoiser)
    classifier.denoiser = denoiser.requires_grad_(True)
    denoiser.train()
    judges = [planner.frozen(surrogate) for surrogate in point.surrogates] or [classifier]
    losses = [mse(denoiser, 1.0)]
    if settings.objective == "stability":
        losses = [stability(denoiser, judge, 1.0) for judge in judges]
    steps = [planner.step(classifier, loss, shape, budget, *judges) for loss in losses]
    jobs, disk = planner.jobs(name), parameter_bytes(classifier)
    flops = jobs * budget.images_seen * sum(flops for flops, _ in steps) / len(steps)
    memory = max(memory for _, memory in steps)
    line = Line("train", name, jobs, flops, 0.0, memory, jobs * disk)
    return Planned([line], classifier, planner.validated(name))
