"""How long certification takes against the field's procedure, as ratios within one run.

    pytest tests/benchmarks --benchmark-only --benchmark-json results.json

Every network runs in full, but the class comes from one noisy pixel, so that p_A is known: it is
spread as on Cohen's CIFAR-10 log at sigma = 0.5 (48 quantiles of its p_A). Both procedures
certify the same images with the same noise level, alpha and N. The plain procedure is timed on
`PLAIN_DRAWS` draws per image and scaled to N, since it does the same work for each draw.
"""

import subprocess
import sys
import time
from functools import cache

import numpy as np
import pytest
import timm
import torch
from scipy.stats import norm
from torch import Tensor, nn

import bench.lenet  # noqa: F401  (adds itself to timm's names)
from bench.backbones import Classifier, compile_for_inference
from bench.cost import inference_flops
from bench.provenance import pick_precision
from bench.smoothing import Protocol, certify, reachable_radii
from bench.smoothing.noise import BLOCK, key_tensor, standard_normal

SIGMA, ALPHA, N, STEP = 0.5, 0.001, 100_000, 0.25
PLAIN_DRAWS = 4000
PRECISION = pick_precision("auto", torch.device("cpu"))
# fmt: off
P_A = [
    0.27529, 0.33112, 0.37465, 0.39534, 0.42047, 0.45157, 0.47953, 0.49874, 0.50583, 0.52808,
    0.55581, 0.57408, 0.5884, 0.61266, 0.63439, 0.66189, 0.68203, 0.71352, 0.73176, 0.75097,
    0.7627, 0.78036, 0.79732, 0.81284, 0.82613, 0.83343, 0.86338, 0.87844, 0.88872, 0.90396,
    0.91302, 0.92966, 0.94441, 0.95418, 0.96464, 0.97045, 0.97687, 0.98244, 0.98635, 0.98939,
    0.99225, 0.99571, 0.99708, 0.99822, 0.99918, 0.99958, 0.99981, 0.99988,
]
# fmt: on
CLASSES = 10


def lenet() -> nn.Module:
    return timm.create_model("lenet", num_classes=CLASSES)


def small_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=28, patch_size=7, embed_dim=128, depth=4, num_heads=4,
        mlp_ratio=2, in_chans=1, num_classes=CLASSES,
    )  # fmt: skip


def vit_s() -> nn.Module:
    return timm.create_model(
        "vit_small_patch14_dinov2", img_size=56, in_chans=1, num_classes=CLASSES
    )


SHAPE = (1, 28, 28)
NETWORKS = {"LeNet": (lenet, None), "small ViT": (small_vit, None), "ViT-S": (vit_s, 56)}


class KnownVotes(Classifier):
    """A network whose answer is class 0 with probability Phi((1/2 - pixel) / sigma)."""

    def forward(self, pixels: Tensor) -> Tensor:
        logits = super().forward(pixels)
        score = 0.5 - pixels[:, 0, 0, 0]
        return 0 * logits + torch.stack([score, *([-score] * (CLASSES - 1))], dim=1)


def setting(name: str) -> tuple[KnownVotes, Tensor]:
    build, input_size = NETWORKS[name]
    torch.manual_seed(0)
    model = KnownVotes(build(), (0.5,), (0.5,), input_size).eval()
    images = torch.rand(len(P_A), *SHAPE)
    images[:, 0, 0, 0] = 0.5 - SIGMA * torch.tensor(norm.ppf(P_A), dtype=torch.float32)
    return model, images


@torch.inference_mode()
def plain_votes(model: nn.Module, image: Tensor, draws: int, batch: int = 1000) -> np.ndarray:
    """Cohen's SampleUnderNoise as the field runs it: one image, batches of 1000, float32."""
    counts = np.zeros(CLASSES, int)
    for start in range(0, draws, batch):
        size = min(batch, draws - start)
        copies = image.repeat(size, 1, 1, 1)
        noisy = copies + torch.randn_like(copies) * SIGMA
        counts += np.bincount(model(noisy).argmax(1).numpy(), minlength=CLASSES)
    return counts


@cache
def plain_seconds(name: str) -> float:
    """Seconds per image of the plain procedure, scaled to its N + 100 draws."""
    model, images = setting(name)
    plain_votes(model, images[0], 1000)
    chosen = images[::16]
    begin = time.perf_counter()
    for image in chosen:
        plain_votes(model, image, PLAIN_DRAWS)
    return (time.perf_counter() - begin) / len(chosen) * (N + 100) / PLAIN_DRAWS


def engine_seconds(name: str, mode: str, n: int, compiled: bool = True) -> tuple[float, float]:
    """Seconds and samples per image of the engine, its compilation not counted."""
    model, images = setting(name)
    model.for_inference(PRECISION)
    # What an earlier test compiled would make this one recompile for shapes it never sees.
    torch.compiler.reset()
    radii = reachable_radii(STEP, SIGMA, N, ALPHA)
    protocol = Protocol(sigma=SIGMA, mode=mode, n=n, alpha=ALPHA, radii=radii, batch_size=512)
    if compiled:
        compile_for_inference(model, images[:1].expand(512, -1, -1, -1).clone())
    ids = list(range(len(images)))
    if mode == "cohen":  # every image takes the same draws
        images, ids = images[::4], ids[::4]
    list(certify(model, images[:1], [0], [99], protocol, CLASSES))
    begin = time.perf_counter()
    rows = list(certify(model, images, [0] * len(images), ids, protocol, CLASSES))
    seconds = time.perf_counter() - begin
    return seconds / len(rows), sum(row.samples for row in rows) / len(rows)


@pytest.mark.parametrize("name", NETWORKS)
def test_decide_against_the_plain_procedure(benchmark, name):
    plain = plain_seconds(name)
    seconds, samples = benchmark.pedantic(engine_seconds, args=(name, "decide", N), rounds=1)
    per_draw = {}
    for compiled in (False, True):
        fixed, fixed_samples = engine_seconds(name, "cohen", PLAIN_DRAWS, compiled)
        per_draw[compiled] = plain / (N + 100) / (fixed / fixed_samples)
    benchmark.extra_info |= {
        "precision": PRECISION,
        "plain_seconds_per_image": plain,
        "seconds_per_image": seconds,
        "samples_per_image": samples,
        "times_faster": plain / seconds,
        "times_faster_per_draw_eager": per_draw[False],
        "times_faster_per_draw_compiled": per_draw[True],
    }


def test_equal_draws_against_art(benchmark):
    """ART's PyTorchRandomizedSmoothing at its own batch size of 32 and at 1000, equal N."""
    smoothing = pytest.importorskip("art.estimators.certification.randomized_smoothing")
    model, images = setting("ViT-S")
    estimator = smoothing.PyTorchRandomizedSmoothing(
        model, nn.CrossEntropyLoss(), tuple(images.shape[1:]), CLASSES, device_type="cpu",
        sample_size=100, scale=SIGMA, alpha=ALPHA,
    )  # fmt: skip
    estimator.certify(images[-1:].numpy(), n=32, batch_size=32)
    for batch in (32, 1000):
        begin = time.perf_counter()
        estimator.certify(images[-1:].numpy(), n=PLAIN_DRAWS, batch_size=batch)
        benchmark.extra_info[f"art_draws_per_second_batch_{batch}"] = (PLAIN_DRAWS + 100) / (
            time.perf_counter() - begin
        )
    best = max(v for k, v in benchmark.extra_info.items() if k.startswith("art_"))
    seconds, samples = benchmark.pedantic(
        engine_seconds, args=("ViT-S", "cohen", PLAIN_DRAWS), rounds=1
    )
    eager_seconds, eager_samples = engine_seconds("ViT-S", "cohen", PLAIN_DRAWS, compiled=False)
    benchmark.extra_info |= {
        "precision": PRECISION,
        "draws_per_second": samples / seconds,
        "times_faster_than_art_per_draw_eager": eager_samples / eager_seconds / best,
        "times_faster_than_art_per_draw_compiled": samples / seconds / best,
    }


def matmul_flops_per_second(size: int = 2048, repeats: int = 20) -> float:
    """Peak of matrix products in the precision certified, best of `repeats`."""
    a, b = (torch.randn(size, size, dtype=getattr(torch, PRECISION)) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def test_share_of_the_matmul_peak_and_of_the_noise(benchmark):
    peak = matmul_flops_per_second()
    model, images = setting("ViT-S")
    flops = inference_flops(model, tuple(images.shape[1:]))
    seconds, samples = benchmark.pedantic(
        engine_seconds, args=("ViT-S", "cohen", PLAIN_DRAWS), rounds=1
    )
    keys = key_tensor(range(512 // BLOCK), torch.device("cpu"))
    begin = time.perf_counter()
    for _ in range(10):
        standard_normal(keys, images.shape[1:])
    noise = (time.perf_counter() - begin) / 10 / 512
    benchmark.extra_info |= {
        "precision": PRECISION,
        "matmul_teraflops_per_second": peak / 1e12,
        "network_share_of_peak": flops * samples / seconds / peak,
        "noise_share_of_time": noise * samples / seconds,
    }


@torch.inference_mode()
def test_votes_that_the_batch_shape_flips(benchmark):
    """Rounding differs with the batch's shape: how many votes of the plain network it changes."""
    shares = {}
    for name, (build, input_size) in NETWORKS.items():
        torch.manual_seed(0)
        network = Classifier(build(), (0.5,), (0.5,), input_size).for_inference(PRECISION)
        noisy = torch.rand(4096, *SHAPE) + SIGMA * torch.randn(4096, *SHAPE)
        small = torch.cat([network(part).argmax(1) for part in noisy.split(64)])
        large = torch.cat([network(part).argmax(1) for part in noisy.split(512)])
        shares[name] = (small != large).float().mean().item()
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info |= {"flipped_votes": shares}


MEMORY = """
import pathlib, re, sys, torch
from bench.smoothing import Protocol, certify
from torch import nn
network = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.Flatten(), nn.Linear(784, 10)).eval()
images = torch.rand(4, 3, 224, 224)
# Not getrusage, which counts what the process was before exec: the tests' own memory.
def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) / 2**20
before = peak()
protocol = Protocol(sigma=0.5, mode="cohen", n=int(sys.argv[1]), batch_size=256)
list(certify(network, images, [0] * 4, [0, 1, 2, 3], protocol, 10))
print(peak() - before)
"""


def test_memory_does_not_grow_with_draws(benchmark):
    """GiB above the process before certification, at 3 x 224 x 224."""
    grown = {}
    for draws in (512, 5120):
        command = [sys.executable, "-c", MEMORY, str(draws)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        grown[draws] = float(answer.stdout)
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info |= {"gib_above_start": grown}
    assert grown[5120] < grown[512] + 0.1
    assert grown[5120] < 2


@pytest.mark.parametrize("mode", ["decide", "cohen", "radius"])
def test_samples_and_seconds_by_mode(benchmark, mode):
    seconds, samples = benchmark.pedantic(
        engine_seconds, args=("small ViT", mode, 10_000, False), rounds=1
    )
    benchmark.extra_info |= {"seconds_per_image": seconds, "samples_per_image": samples}


def growth_seconds(n: int = 1000, images: int = 32, classes: int = 10, shards: int = 1) -> float:
    """Seconds of fixed-N certification of a linear model, whose own share is small."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, classes)).eval()
    pixels = torch.rand(images, *SHAPE)
    protocol = Protocol(sigma=SIGMA, mode="cohen", n=n, alpha=ALPHA, batch_size=512)
    begin = time.perf_counter()
    for shard in range(shards):
        ids = list(range(shard, images, shards))
        list(certify(model, pixels[shard::shards], [0] * len(ids), ids, protocol, classes))
    return time.perf_counter() - begin


@pytest.mark.parametrize(
    ("what", "values"),
    [
        ("n", (1000, 4000, 16_000)),
        ("images", (32, 128, 512)),
        ("classes", (10, 100, 1000)),
        ("shards", (1, 2, 7)),
    ],
)
def test_growth(benchmark, what, values):
    """Time grows within twice of proportion; shards and classes do not double it."""
    growth_seconds()
    seconds = {value: growth_seconds(**{what: value}) for value in values}
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info |= {"seconds_by_" + what: seconds}
    first, last = values[0], values[-1]
    proportional = last / first if what in ("n", "images") else 1
    assert seconds[last] / seconds[first] < 2 * proportional
