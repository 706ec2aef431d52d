"""How many FLOPs a machine does in a second: measured, stated, or from a datasheet."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench.backbones import (
    IMAGE_KEYS,
    classes_answered,
    create_classifier,
    set_fused_attention,
)
from bench.config import Experiment
from bench.cost import inference_flops
from bench.data import describe
from bench.errors import BenchError
from bench.provenance import machine, pick_device, pick_precision
from bench.training import precision_context

# Peak FLOPs of dense bfloat16 products with float32 sums, from NVIDIA's datasheets (where a sheet
# gives the number with sparsity, half of it). SXM modules of the first three.
PEAKS = {
    "h100": 989e12,
    "h200": 989e12,
    "a100": 312e12,
    "l40s": 362e12,
    "l4": 121e12,
    "rtx4090": 165e12,
}
# An assumption, not a measurement: this project has been timed on no GPU.
UTILISATION = 0.4
# Of a job beside what is counted: process start, imports, data, writing. What is left of
# an earlier `quick` (14 min 41 s on 2 cores of a Xeon, revision 386b193), over its 71 jobs.
JOB_SECONDS = 7.1
# Of a batch: enough for a steady clock, little enough to wait for.
MEASURED_FLOPS = {"cpu": 2e10, "cuda": 2e13}
MEASURED_SECONDS = 1.0
# What a training or a certification imports.
START = "import bench.certification, bench.jobs, peft, timm"


@dataclass(frozen=True)
class Rate:
    """FLOPs per second in training and in inference, seconds per job beside, and whence.

    `precision` is what `auto` stands for there.
    """

    training: float
    inference: float
    job_seconds: float
    precision: str
    source: str


def datasheet_rate(gpu: str) -> Rate:
    """The rate of a GPU of `PEAKS` in bfloat16.

    Raises:
        BenchError: it is not among them.
    """
    if gpu not in PEAKS:
        raise BenchError(f"--gpu {gpu} is not known ({', '.join(PEAKS)}): give --rate instead")
    rate = UTILISATION * PEAKS[gpu]
    source = f"{gpu}: {PEAKS[gpu] / 1e12:g} TFLOPS by datasheet, {UTILISATION:.0%} of it assumed"
    return Rate(rate, rate, JOB_SECONDS, "bfloat16", source)


def stated_rate(flops: float) -> Rate:
    """A rate that the user knows, in this machine's precision.

    Raises:
        BenchError: it is not above 0.
    """
    if not flops > 0:
        raise BenchError(f"--rate {flops}: FLOPs per second must be above 0")
    precision = pick_precision("auto", pick_device())
    return Rate(flops, flops, JOB_SECONDS, precision, f"{flops / 1e9:g} GFLOPS as given")


def measured_rate(experiment: Experiment) -> Rate:
    """Time the experiment's backbone on this machine, with random weights, and a process' start."""
    device, data = pick_device(), describe(experiment.data)
    torch.set_num_threads(experiment.threads_per_job)
    backbone = experiment.backbone.untrained
    classifier = create_classifier(backbone, data.classes, data.shape[0]).to(device)
    classes_answered(classifier, torch.zeros(1, *data.shape, device=device), IMAGE_KEYS)
    flops = inference_flops(classifier.eval(), data.shape)
    wanted = MEASURED_FLOPS[device.type] // flops
    batch = int(min(experiment.training.pass_size, max(2, wanted)))
    pixels = torch.rand(batch, *data.shape, device=device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    precision = pick_precision(experiment.training.precision, device)
    set_fused_attention(classifier, device.type != "cpu")

    def step() -> None:
        with precision_context(device, precision):
            F.cross_entropy(classifier(pixels), labels).backward()  # type: ignore[no-untyped-call]

    def answer() -> None:
        with torch.inference_mode():
            classifier(pixels)

    # Backward costs twice the forward pass, the gradient of the pixels aside.
    training = 3 * flops * batch * _per_second(step, device)
    classifier.for_inference(pick_precision(experiment.certification.precision, device))
    set_fused_attention(classifier, True)
    inference = flops * batch * _per_second(answer, device)
    source = f"measured here ({machine(device)})"
    automatic = pick_precision("auto", device)
    return Rate(training, inference, _start_seconds(), automatic, source)


def _per_second(run: Callable[[], None], device: torch.device) -> float:
    """How often `run` passes in a second, the first time aside."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    run()
    wait()
    count, seconds, begin = 0, 0.0, time.perf_counter()
    while seconds < MEASURED_SECONDS:
        run()
        wait()
        count, seconds = count + 1, time.perf_counter() - begin
    return count / seconds


def _start_seconds() -> float:
    """Seconds until a job's process has imported what it needs."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", START], check=True, capture_output=True)
    return time.perf_counter() - begin
