"""Noise at the model's resolution: the norm of the resize, native radii, and what is refused."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bench.jobs
from bench.backbones import Classifier
from bench.certification import certify_method
from bench.config import parse_experiment
from bench.data import ArraySplit, Data
from bench.errors import BenchError
from bench.files import read_json, write_json
from bench.jobs import pretrain, train
from bench.model_folder import identity_of, load_classifier, read_spec
from bench.resolution import (
    INTERPOLATIONS,
    Resized,
    operator_norm,
    resize,
    resize_matrix,
    resolution_table,
)
from bench.serving import app_of
from bench.smoothing.engine import certify
from bench.smoothing.protocol import Protocol
from bench.standalone import certify_anything

ROOT = Path(__file__).parents[1]
NATIVE, SIZE, SIGMA = 28, 56, 0.5
METHODS = ("undefended", "undefended_model")


def interpolated(pixels, size, kind):
    """Independent of the module: torch's own call."""
    return F.interpolate(pixels, (size, size), mode=kind, antialias=kind != "nearest")


def power_iteration(shape, size, kind, steps=2000):
    """Norm of the resize on 2-D images, without its matrix: v <- A^T A v."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((1, 1, *shape), generator=generator, dtype=torch.float64)
    for _ in range(steps):
        image = (image / image.norm()).requires_grad_()
        stretched = interpolated(image, size, kind)
        image = torch.autograd.grad(stretched, image, stretched.detach())[0]
    return float(image.norm().sqrt())


@pytest.mark.parametrize("kind", INTERPOLATIONS)
@pytest.mark.parametrize(
    ("shape", "size"), [((28, 28), 56), ((8, 8), 56), ((32, 20), 48), ((40, 40), 24)]
)
def test_the_norm_is_that_of_the_resize_itself(shape, size, kind):
    found, reached = operator_norm(*shape, size, kind), power_iteration(shape, size, kind)
    assert reached <= found * (1 + 1e-9)
    assert reached == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize(("side", "size"), [(28, 56), (32, 224)])
def test_nearest_neighbours_stretch_by_the_scale(side, size):
    assert operator_norm(side, side, size, "nearest") == pytest.approx(size / side, rel=1e-12)


def test_the_resize_is_the_kronecker_product_of_its_matrices():
    image = torch.rand(1, 1, 20, NATIVE, dtype=torch.float64)
    rows, columns = resize_matrix(20, SIZE), resize_matrix(NATIVE, SIZE)
    assert torch.allclose(resize(image, SIZE)[0, 0], rows @ image[0, 0] @ columns.T)
    same = torch.rand(2, 1, NATIVE, NATIVE)
    assert torch.equal(resize(same, NATIVE), same)


def test_the_documented_table_is_computed_and_the_noise_left_is_right():
    table = resolution_table(32, 224, 0.25)
    documented = re.findall(
        r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) r \| ([\d.]+) \|$",
        (ROOT / "docs/design.md").read_text(),
        re.MULTILINE,
    )
    rows = table.itertuples(index=False, name=None)
    assert documented == [(kind, *(f"{value:.6f}" for value in rest)) for kind, *rest in rows]
    noise = 0.25 * torch.randn(8, 1, 224, 224, generator=torch.Generator().manual_seed(0))
    left = F.avg_pool2d(noise, 7).std().item()
    assert table["averaged_sigma"].tolist() == pytest.approx([left] * 3, rel=0.03)


class Linear(nn.Module):
    """A network of two classes, the sign of <w, x> + b, as timm shapes one."""

    def __init__(self, weight, bias):
        super().__init__()
        self.head = nn.Linear(weight.numel(), 2)
        with torch.no_grad():
            self.head.weight.copy_(torch.stack([-weight.flatten(), weight.flatten()]) / 2)
            self.head.bias.copy_(torch.tensor([-bias, bias]) / 2)

    def get_classifier(self):
        return self.head

    def forward_features(self, pixels):
        return pixels.flatten(1)

    def forward_head(self, features, pre_logits):
        return features


def top_direction(side=NATIVE, size=SIZE):
    """Top singular vectors of the resize, as images: at the model's and the native resolution."""
    left, _, right = torch.linalg.svd(resize_matrix(side, size), full_matrices=False)
    return torch.outer(left[:, 0], left[:, 0]), torch.outer(right[0], right[0])


def native_gradient(weight):
    """A^T w, from the resize itself."""
    image = torch.zeros(1, 1, NATIVE, NATIVE, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad((resize(image, SIZE) * weight).sum(), image)[0]


@pytest.mark.parametrize("seed", range(5))
def test_native_radii_of_linear_classifiers_are_sound(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    image = torch.rand(1, 1, NATIVE, NATIVE, generator=generator, dtype=torch.float64)
    margin = float((resize(image, SIZE) * weight).sum().abs())
    certified = margin / float(weight.norm()) / operator_norm(NATIVE, NATIVE, SIZE)
    assert 0 < certified <= margin / float(native_gradient(weight).norm())


def test_the_native_radius_is_attained_in_the_direction_that_is_stretched_most():
    weight, direction = top_direction()
    exact = 0.75 / float(native_gradient(weight).norm())
    assert 0.75 / operator_norm(NATIVE, NATIVE, SIZE) == pytest.approx(exact, rel=1e-12)
    image = torch.rand(1, 1, NATIVE, NATIVE, dtype=torch.float64)
    bias = 0.75 - float((resize(image, SIZE) * weight).sum())
    for share, side in ((0.999, 1), (1.001, -1)):
        score = (resize(image - share * exact * direction, SIZE) * weight).sum() + bias
        assert torch.sign(score) == side


def test_a_certificate_never_exceeds_the_exact_native_radius():
    weight, _ = top_direction()
    chance = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 1, NATIVE, NATIVE), generator=chance, dtype=torch.uint8)
    test = Resized(ArraySplit(images, torch.ones(24, dtype=torch.int64)), SIZE)
    pixels = test.batch(torch.arange(24))
    scores = (pixels.double()[:, 0] * weight).sum((1, 2))
    bias = -float(scores.median()) + 0.3
    network = Linear(weight.float(), bias)
    classifier = Classifier(network, (0.0,), (1.0,)).eval()
    protocol = Protocol(SIGMA, mode="cohen", n0=32, n=1000, batch_size=256)
    rows = list(certify(classifier, pixels, [1] * 24, list(range(24)), protocol, 2))
    exact = (scores + bias).abs() / native_gradient(weight).norm()
    sure = [row for row in rows if row.predict != -1]
    assert len(sure) > 12
    above = [row.idx for row in sure if row.radius / test.operator_norm > exact[row.idx]]
    # Each errs with probability 0.001.
    assert len(above) <= 1


@pytest.fixture
def values(smoke_values):
    """The smoke experiment on a ViT of 56 pixels, two methods in both conventions."""
    changed = copy.deepcopy(smoke_values)
    changed["backbone"] |= {"input_size": SIZE}
    changed["backbone"]["arguments"] |= {"img_size": SIZE, "patch_size": 14}
    changed["pretrain"]["images"], changed["training"] = 64, {"images": 64, "batch_size": 16}
    changed["certification"]["test_images"] = 4
    kept = {name: changed["methods"][name] for name in ("undefended", "lora")}
    resized = {
        f"{name}_model": {**method, "label": f"{name}, model", "noise_resolution": "model"}
        for name, method in kept.items()
    }
    changed["methods"] = {**kept, **resized}
    return changed


def random_split(count, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 1, NATIVE, NATIVE), generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return ArraySplit(images.to(torch.uint8), labels)


@pytest.fixture
def world(values, tmp_path, monkeypatch):
    """The experiment on random images, and the folder of its base."""
    splits = [random_split(count, seed) for seed, count in enumerate((64, 16, 8))]
    data = Data("random", 10, (1, NATIVE, NATIVE), "d", *splits)
    for module in ("jobs", "certification", "standalone"):
        monkeypatch.setattr(f"bench.{module}.load_data", lambda settings: data)
    experiment = parse_experiment(values, "x")
    pretrain(experiment, tmp_path / "base")
    return experiment, data, tmp_path


def trained(world, method):
    experiment, _, folder = world
    train(experiment, method, SIGMA, 0, folder / "base", folder / method)
    return folder / method


def test_without_a_size_of_the_model_it_is_refused(values):
    del values["backbone"]["input_size"]
    with pytest.raises(BenchError, match=r"undefended_model\.noise_resolution.*input_size"):
        parse_experiment(values, "x")


def test_modules_in_front_refuse_it(values, smoke_values):
    from baselines.denoised_smoothing.settings import DenoiserSettings

    values["methods"]["lora_model"]["denoiser"] = {"of": "lora"}
    with pytest.raises(BenchError, match="noise_resolution: model and denoiser exclude"):
        parse_experiment(values, "x")
    del values["methods"]["lora_model"]["denoiser"]
    name = "denoised_smoothing_mse"
    denoiser = {**smoke_values["methods"][name], "noise_resolution": "model"}
    values["methods"][name] = denoiser
    with pytest.raises(BenchError, match=rf"methods\.{name}\.noise_resolution means nothing"):
        DenoiserSettings.check(parse_experiment(values, "x"))


def test_the_convention_is_in_the_fingerprint_where_it_is_not_the_default(values):
    experiment = parse_experiment(values, "x")
    values["methods"]["lora"]["noise_resolution"] = "native"
    written = parse_experiment(values, "x")
    native = experiment.training_fingerprint("lora", SIGMA, 0)
    assert written.training_fingerprint("lora", SIGMA, 0) == native
    assert experiment.training_fingerprint("lora_model", SIGMA, 0) != native


def test_the_folder_keeps_the_convention(world):
    _, data, _ = world
    pixels = data.test.batch(torch.arange(8))
    native, resized = (load_classifier(trained(world, name)) for name in METHODS)
    assert [read_spec(world[2] / name).noise_resolution for name in METHODS] == ["native", "model"]
    assert (native.input_size, resized.input_size) == (SIZE, None)
    # Without noise the two conventions are one function of native pixels.
    with torch.no_grad():
        assert torch.equal(native(pixels), resized(resize(pixels, SIZE)))


@pytest.mark.parametrize(("method", "side"), [("lora", NATIVE), ("lora_model", SIZE)])
def test_training_noise_is_added_at_the_resolution(world, monkeypatch, method, side):
    batches, minimise = [], bench.jobs.OBJECTIVES["cross_entropy"]

    def recorded(classifier, batch, **hyperparameters):
        batches.append((batch.images, batch.noise(1)[0]))
        return minimise(classifier, batch, **hyperparameters)

    monkeypatch.setitem(bench.jobs.OBJECTIVES, "cross_entropy", recorded)
    folder = trained(world, method)
    images, noise = batches[-1]
    assert images.shape == noise.shape == (16, 1, side, side)
    neighbours = torch.corrcoef(torch.stack([noise[..., 1:].ravel(), noise[..., :-1].ravel()]))
    assert noise.std().item() == pytest.approx(SIGMA, rel=0.05)
    assert abs(neighbours[0, 1].item()) < 0.03
    assert read_json(folder / "cost.json")["inference_flops"] > 0


@pytest.mark.parametrize(
    ("method", "said", "factor"),
    [
        ("lora", "native", 1.0),
        ("lora_model", "model", 1 / operator_norm(NATIVE, NATIVE, SIZE)),
    ],
)
def test_the_sidecar_says_where_the_noise_was(world, method, said, factor):
    experiment, _, folder = world
    log = folder / f"{method}.tsv"
    certify_method(experiment, method, SIGMA, 0, trained(world, method), log)
    sidecar = read_json(log.with_suffix(".json"))
    assert sidecar["noise_resolution"] == said
    assert sidecar["native_radius_factor"] == factor


@pytest.mark.parametrize("shard", [-1, 0, 2])
def test_a_shard_that_there_is_not_is_refused(world, shard):
    experiment, _, folder = world
    model = trained(world, "undefended")
    with pytest.raises(BenchError, match=rf"--shard {shard}: .* out to 1 shards"):
        certify_method(experiment, "undefended", SIGMA, 0, model, folder / "log.tsv", shard)


def test_shards_share_alpha_over_all_images(world):
    experiment, _, folder = world
    update = {"family": "dataset", "shards": 2, "n": 128, "horizon": 128}
    settings = experiment.certification.model_copy(update=update)
    sharing = experiment.model_copy(update={"certification": settings})
    model, log = trained(world, "undefended"), folder / "shared.tsv"
    certify_method(sharing, "undefended", SIGMA, 0, model, log, 2)
    sidecar = read_json(log.with_suffix(".json"))
    assert sidecar["n_images"] < settings.test_images
    assert sidecar["family_size"] == settings.test_images
    assert sidecar["alpha_per_image"] == settings.alpha / settings.test_images


def test_a_baseline_that_ignored_it_is_found_out(world):
    experiment, _, folder = world
    model = trained(world, "lora")
    identity = identity_of(experiment, "lora_model", SIGMA, 0).model_dump()
    write_json(model / "training.json", {**read_json(model / "training.json"), **identity})
    with pytest.raises(BenchError, match=r"noise_resolution is native, methods\.lora_model needs"):
        certify_method(experiment, "lora_model", SIGMA, 0, model, folder / "log.tsv")


def test_a_folder_alone_is_certified_where_its_noise_was_and_not_served(world, monkeypatch):
    _, _, folder = world
    model = trained(world, "undefended_model")
    monkeypatch.setattr("bench.standalone.fetch", lambda settings: None)
    settings = {"mode": "cohen", "n": "32", "n0": "32", "batch_size": "32"}
    certify_anything(str(model), "mnist_5k", SIGMA, 2, 0.25, settings, folder / "alone.tsv")
    assert read_json(folder / "alone.json")["noise_resolution"] == "model"
    with pytest.raises(BenchError, match="resized to 56 pixels before the noise"):
        app_of(model, "logits", "auto")
