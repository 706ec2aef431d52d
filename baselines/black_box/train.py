"""Train a prompt in front of a black box and write the model folder of both."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from baselines.black_box.prompts import FILTERS, ConstantPrompt, Coordinator, Filter
from baselines.black_box.search import Progress, Prompted, Search, pick_filter
from baselines.black_box.settings import BlackBoxSettings
from baselines.command import BaselineJob, run_baseline
from bench.backbones import Classifier
from bench.config import RemoteSettings
from bench.cost import count_flops
from bench.jobs import base_flops, cost_report, load_base
from bench.model_folder import Component, save_model, spec_of, training_report
from bench.provenance import pick_precision
from bench.remote import Ledger, RemoteClassifier, RemoteModel, as_scores, show
from bench.training import TrainingRecord, peak_memory

PROMPTS = {"coordinator": Coordinator, "constant": ConstantPrompt, "filter": Filter}


def black_box(
    job: BaselineJob, settings: BlackBoxSettings, ledger: Ledger
) -> tuple[Classifier, Prompted]:
    """The classifier that is to be saved, and the way to query it that training gets."""
    if settings.url is not None:
        remote = RemoteSettings(url=settings.url, access=settings.access)
        served = RemoteModel(remote, ledger)
        return RemoteClassifier(served).to(job.device), Prompted(nn.Identity(), served)
    classifier = load_base(job.experiment, job.base_folder).requires_grad_(False).to(job.device)
    precision = pick_precision(job.training.precision, job.device)
    asked = copy.deepcopy(classifier).for_inference(precision)

    def ask(pixels: Tensor) -> Tensor:
        ledger.spend(len(pixels))
        shown = show(asked(pixels), settings.access)
        return as_scores(shown, settings.access, job.data.classes)

    return classifier, Prompted(nn.Identity(), ask)


def train_black_box(job: BaselineJob) -> None:
    """Train the prompt of one method and sigma; write the prompted classifier's folder."""
    settings = BlackBoxSettings.of(job.experiment, job.method)
    ledger = Ledger(settings.queries)
    classifier, model = black_box(job, settings, ledger)
    factory = PROMPTS[settings.prompt]
    channels, height, width = job.data.shape
    arguments: dict[str, Any] = {"channels": channels, "height": height, "width": width}
    arguments["sigma"] = job.sigma
    if settings.prompt == "filter":
        chosen, progress = choose_filter(job, settings, model, arguments)
        arguments["choice"] = FILTERS.index(chosen)
    else:
        model.prompt = factory(**arguments).to(job.device)
        named = (model, job.data, settings, job.training, job.learning_rate, job.sigma, job.seed)
        progress = Search(*named).run()
    classifier.denoiser = model.prompt
    component = Component(
        factory=f"{factory.__module__}:{factory.__qualname__}", arguments=arguments
    )
    spec = spec_of(job.experiment, job.data, denoiser=component)
    if isinstance(classifier, RemoteClassifier):
        spec = spec.model_copy(update={"backbone": classifier.network.pinned})
    cost = cost_of(job, classifier, ledger.spent, progress)
    save_model(job.output, classifier, spec, job.identity, cost, report_of(job, progress))


def choose_filter(
    job: BaselineJob, settings: BlackBoxSettings, model: Prompted, arguments: dict[str, Any]
) -> tuple[str, Progress]:
    """`pick_filter` among those of the coordinator's encoder."""
    filters: dict[str, nn.Module] = {
        name: Filter(**arguments, choice=i).to(job.device) for i, name in enumerate(FILTERS)
    }
    # Where a model is, its first weight tells, and a filter has none.
    model.place = nn.Parameter(torch.empty(0, device=job.device))
    return pick_filter(model, filters, job.data, settings, job.sigma, job.seed)


def cost_of(
    job: BaselineJob, classifier: Classifier, queries: int, progress: Progress
) -> dict[str, Any]:
    """`cost.json`, identity aside; of a served model nothing but its queries is known here."""
    prompt = classifier.denoiser
    assert prompt is not None
    pixels = torch.zeros(1, *job.data.shape, device=job.device)
    served = isinstance(classifier, RemoteClassifier)
    counted = prompt if served else classifier
    with torch.no_grad():
        flops = count_flops(lambda: counted(pixels), counted)
    counts = {
        "trainable_parameters": sum(p.numel() for p in prompt.parameters()),
        "head_parameters": 0,
        "total_parameters": sum(p.numel() for p in classifier.parameters()),
    }
    # Forward passes alone: there is no gradient.
    spent = {"training_flops": queries * flops, "inference_flops": flops}
    cost = cost_report(record_of(progress, job), counts, spent)
    base = None if served else base_flops(job.base)
    return cost | {"base_training_flops": base, "queries": queries}


def record_of(progress: Progress, job: BaselineJob) -> TrainingRecord:
    """The search as `training.json` and `cost.json` report any training."""
    precision = pick_precision(job.training.precision, job.device)
    memory = peak_memory(job.device)
    return TrainingRecord(progress.images, progress.seconds, memory, progress.loss_curve, precision)


def report_of(job: BaselineJob, progress: Progress) -> dict[str, Any]:
    """`training.json`, identity aside: also every check, divergence and how the search ended."""
    record, settings = record_of(progress, job), job.training.model_dump()
    return training_report(record, job.device, job.data, settings) | {
        "validation_sigma": job.sigma,
        "validation_accuracy": progress.best_accuracy,
        "checks": progress.checks,
        "divergences": progress.divergences,
        "ended": progress.ended,
    }


if __name__ == "__main__":
    run_baseline(train_black_box)
