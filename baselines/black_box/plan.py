"""What training a prompt by queries takes, for `bench plan`."""

from baselines.black_box.prompts import FILTERS
from baselines.black_box.settings import BlackBoxSettings
from baselines.black_box.train import PROMPTS
from bench.plan import Line, Planned, Planner, parameter_bytes
from bench.weightless import without_weights


def plan(planner: Planner, name: str) -> Planned:
    """The lines of a method: every query is a forward pass, none has a gradient."""
    experiment, shape = planner.experiment, planner.data.shape
    settings = BlackBoxSettings.of(experiment, name)
    channels, height, width = shape
    prompt = PROMPTS[settings.prompt](channels=channels, height=height, width=width, sigma=1.0)
    without_weights(prompt)
    classifier = planner.frozen()
    classifier.denoiser = prompt
    jobs, disk = planner.jobs(name), parameter_bytes(classifier)
    line = Line("train", name, jobs, memory_bytes=disk, disk_bytes=jobs * disk)
    queries = settings.queries
    if settings.prompt == "filter":
        queries = len(FILTERS) * experiment.data.validation_images
    return Planned([line], classifier, jobs * queries)
