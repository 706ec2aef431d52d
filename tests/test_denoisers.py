"""Denoisers: published shapes and time steps, what trains, who is asked, what is refused."""

import copy
import functools
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import nn

from baselines.command import BaselineJob
from baselines.denoised_smoothing.dncnn import DnCNN
from baselines.denoised_smoothing.memnet import MemNet
from baselines.denoised_smoothing.settings import DenoiserSettings
from baselines.denoised_smoothing.train import (
    build_denoiser,
    fit_denoiser,
    in_turn,
    mse,
    stability,
    train_denoiser,
)
from baselines.diffusion_denoising.assemble import assemble
from baselines.diffusion_denoising.denoiser import (
    DiffusionDenoiser,
    entry_point,
    time_steps,
    unet_config,
)
from baselines.diffusion_denoising.plan import Passes
from baselines.diffusion_denoising.settings import DiffusionSettings
from baselines.diffusion_denoising.train import (
    EMA_DECAY,
    WEIGHTS,
    WeightAverage,
    noise_prediction,
    train_unet,
)
from bench.backbones import Classifier, majority
from bench.config import parse_experiment
from bench.cost import count_flops
from bench.data import load_data
from bench.errors import BenchError
from bench.files import read_json, sha256_file
from bench.jobs import load_base, pretrain, train
from bench.model_folder import load_classifier
from bench.training_state import FILES, TrainingState

SIGMA = 0.5
LINEAR = dict(DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear").config)
ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
UNET = unet_config(channels=1, size=8, stage_channels=[8, 8], layers_per_block=1)


@pytest.mark.parametrize(
    ("denoiser", "published"),
    [
        (DnCNN(channels=3, depth=17, width=64), 558_400),
        (DnCNN(channels=3, depth=17, width=128), 2_222_720),
        (MemNet(channels=3, width=64, memory_blocks=3, residual_blocks=6), 1_436_678),
    ],
)
def test_published_sizes(denoiser, published):
    assert sum(p.numel() for p in denoiser.parameters()) == published


class Zero(nn.Module):
    """In a UNet's place; keeps what it is asked."""

    def forward(self, noisy, t):
        self.asked = noisy, t
        return SimpleNamespace(sample=torch.zeros_like(noisy))


class Half(nn.Module):
    """Class 1 where the mean pixel exceeds one half."""

    def classify(self, pixels):
        score = pixels.mean((1, 2, 3)) - 0.5
        return torch.stack([-score, score], dim=1)


def batch_and_noise():
    """Images, labels that mean nothing, and a way to get the same generator again."""
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return images, torch.zeros(16).long(), lambda: torch.Generator().manual_seed(2)


def test_the_mse_of_doing_nothing_is_that_of_the_noise():
    images, labels, noise = batch_and_noise()
    drawn = torch.randn(images.shape, generator=noise())
    loss = mse(nn.Identity(), SIGMA)(images, labels, noise(), 1.0)
    torch.testing.assert_close(loss, SIGMA**2 * drawn.square().mean())


def test_stability_asks_for_the_judges_answer_on_the_clean_image():
    images, labels, noise = batch_and_noise()
    noisy = images + SIGMA * torch.randn(images.shape, generator=noise())
    wanted = (images.mean((1, 2, 3)) > 0.5).long()
    assert 0 < wanted.sum() < len(wanted)
    logs = Half().classify(noisy).log_softmax(1)
    loss = stability(nn.Identity(), Half(), SIGMA)(images, labels, noise(), 1.0)
    torch.testing.assert_close(loss, -logs[range(len(wanted)), wanted].mean())


def test_the_diffusion_model_learns_the_noise_of_pixels_from_minus_one_to_one():
    images, labels, noise = batch_and_noise()
    unet, settings = Zero(), DiffusionSettings(channels="8", timesteps_low=10, timesteps_high=400)
    loss = noise_prediction(unet, settings)(images, labels, noise(), 1.0)
    drawn = torch.randn(images.shape, generator=noise())
    torch.testing.assert_close(loss, drawn.square().mean())
    noisy, t = unet.asked
    assert ((t >= 10) & (t < 400)).all()
    abar = ABAR[t].float().view(-1, 1, 1, 1)
    expected = abar.sqrt() * (2 * images - 1) + (1 - abar).sqrt() * drawn
    torch.testing.assert_close(noisy, expected)


def test_the_average_of_weights_follows_its_recursion():
    weight = nn.Linear(1, 1, bias=False)
    average, expected = WeightAverage(weight), 0.0
    nn.init.zeros_(weight.weight)
    average.average.shadow_params = [torch.zeros(1, 1)]
    for step, value in enumerate([1.0, 2.0, 3.0]):
        nn.init.constant_(weight.weight, value)
        average()
        decay = min(EMA_DECAY, 1 - (1 + step) ** -0.75) if step else 0.0
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(average.average.shadow_params[0].item(), expected)


def last_convolution(denoiser):
    return [m for m in denoiser.modules() if isinstance(m, nn.Conv2d)][-1]


def cnn_denoiser(kind):
    """A small denoiser whose normalisations have seen images."""
    torch.manual_seed(0)
    small = MemNet(2, width=8, memory_blocks=2, residual_blocks=2)
    denoiser = DnCNN(2, depth=4, width=8) if kind == "dncnn" else small
    denoiser(3 + 2 * torch.rand(16, 2, 9, 7))
    last_convolution(denoiser).weight.data *= 20
    return denoiser.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["dncnn", "memnet"])
def test_cnn_denoisers_add_to_the_image_they_get(kind):
    denoiser, pixels = cnn_denoiser(kind), torch.rand(3, 2, 9, 7)
    assert denoiser(pixels).shape == pixels.shape
    nn.init.zeros_(last_convolution(denoiser).weight)
    assert torch.equal(denoiser(pixels), pixels)


@pytest.mark.parametrize(("precision", "apart"), [("float32", 1e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize("kind", ["dncnn", "memnet"])
def test_what_is_certified_of_cnn_denoisers_is_what_was_trained(kind, precision, apart):
    denoiser, pixels = cnn_denoiser(kind), torch.rand(3, 2, 9, 7)
    plain = denoiser(pixels)
    assert (plain - pixels).abs().mean() > 0.05
    network = nn.Linear(1, 1)
    network.get_classifier = lambda: network
    classifier = Classifier(network, (0.5, 0.5), (0.2, 0.2), denoiser=denoiser)
    for _ in range(2):  # it may have been prepared before
        classifier.for_inference(precision)
        assert not any(part.training for part in classifier.modules())  # `certify` refuses it
        certified = denoiser(pixels)
        assert certified.dtype == torch.float32
        assert (certified - plain).abs().max() < apart


@pytest.mark.parametrize(("sigma", "t"), [(0.12, 70), (0.25, 145), (0.5, 259), (1.0, 396)])
def test_time_steps_of_ddpm_cifar10_32(sigma, t):
    abar = DDPMScheduler.from_config(LINEAR).alphas_cumprod
    found, level = entry_point(abar, sigma, "carlini")
    assert found == t
    assert level == pytest.approx(float(ABAR[t]), rel=1e-4)
    # The loop of cifar10/certify.py of the published code.
    step, real = 0, 0.0
    while real < 2 * sigma:
        step += 1
        real = math.sqrt((1 - ABAR[step]) / ABAR[step])
    assert step == t
    between, exact = entry_point(abar, sigma, "matched")
    assert t - 1 < between <= t
    assert math.sqrt((1 - exact) / exact) == pytest.approx(2 * sigma, rel=1e-12)


def test_small_sigmas_enter_at_one_and_large_ones_are_refused():
    assert entry_point(ABAR, 1e-4, "carlini")[0] == 1
    assert entry_point(ABAR, 1e-4, "matched")[0] == 0
    with pytest.raises(BenchError, match="exceeds the highest noise level"):
        entry_point(ABAR, 1000.0, "carlini")
    assert [t for t, _ in time_steps(ABAR, 0.25, "carlini", 3)] == [145, 97, 48]
    with pytest.raises(BenchError, match=r"settings\.steps = 500"):
        time_steps(ABAR, 0.25, "carlini", 500)


def denoiser(**options):
    torch.manual_seed(1)
    return DiffusionDenoiser(SIGMA, UNET, LINEAR, **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"steps": 2}, {"steps": 3, "votes": 2}])
def test_the_bill_counts_the_passes_that_a_draw_makes(options):
    real, pixels = denoiser(**options), torch.rand(2, 1, 8, 8)
    planned = Passes(real.unet, options.get("steps", 1), options.get("votes", 1))
    assert planned(pixels).shape == real(pixels).shape
    counted = [count_flops(functools.partial(one, pixels)) for one in (planned, real)]
    assert counted[0] == counted[1] > 0


@torch.no_grad()
def test_one_step_is_the_closed_form():
    model, noisy = denoiser(), torch.rand(3, 1, 8, 8)
    t, abar = 259, float(ABAR[259])
    x_t = abar**0.5 * (2 * noisy - 1)
    noise = model.unet(x_t, t).sample
    expected = (((x_t - (1 - abar) ** 0.5 * noise) / abar**0.5).clamp(-1, 1) + 1) / 2
    assert torch.allclose(model(noisy), expected, atol=1e-5)
    assert torch.equal(denoiser(steps=1, votes=1)(noisy), model(noisy))
    assert not torch.allclose(denoiser(steps=3)(noisy), model(noisy), atol=1e-3)


class PointMass(nn.Module):
    """The exact noise predictor for a data distribution of one image."""

    def __init__(self, image):
        super().__init__()
        self.image = image

    def forward(self, x_t, t):
        abar = ABAR[round(float(t))].float()
        noise = (x_t - abar.sqrt() * self.image) / (1 - abar).sqrt()
        return type("Output", (), {"sample": noise})


@torch.no_grad()
def test_several_steps_find_the_only_image_there_is():
    model, image = denoiser(steps=5, votes=3), torch.rand(1, 1, 8, 8)
    model.unet = PointMass(2 * image - 1)
    noisy = image + SIGMA * torch.randn(4, 1, 8, 8)
    found = model(noisy)
    assert found.shape == (3, 4, 1, 8, 8)
    assert torch.allclose(found, image.expand_as(found), atol=1e-3)


def test_neighbouring_steps_follow_the_posterior_of_ddpm():
    model = denoiser(steps=2)
    model.times = [(t, float(ABAR[t])) for t in (200, 199)]
    x_t, x_0 = torch.tensor(0.7), torch.tensor(-0.3)
    (_, before), (_, after) = model.times
    beta = 1 - before / after
    mean = after**0.5 * beta * x_0 + (before / after) ** 0.5 * (1 - after) * x_t
    variance = (1 - after) / (1 - before) * beta
    zero, one = (model._descend(x_t, x_0, 1, torch.tensor(z)) for z in (0.0, 1.0))
    assert float(zero) == pytest.approx(float(mean / (1 - before)), rel=1e-5)
    assert float(one - zero) ** 2 == pytest.approx(variance, rel=1e-4)


def test_majority_counts_votes_and_breaks_ties_by_probability():
    first, second, third = torch.tensor([[9.0, 0, 0], [0.0, 1, 0], [0.0, 1, 0]])[:, None]
    assert majority(torch.stack([first, second, third])).argmax(1).tolist() == [1]
    assert torch.stack([first, second, third]).mean(0).argmax(1).tolist() == [0]
    assert majority(torch.stack([second, first])).argmax(1).tolist() == [0]
    single = torch.randn(1, 50, 3)
    assert torch.equal(majority(single).argmax(1), single[0].argmax(1))
    single[0, 0, 1] = math.nan
    assert not majority(single)[0].isfinite().all()


class Plain(nn.Module):
    """A linear network with timm's interface."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward_features(self, pixels):
        return pixels

    def forward_head(self, features, pre_logits):
        return features.flatten(1)

    def get_classifier(self):
        return self.head


@torch.no_grad()
def test_votes_are_counted_per_draw_and_repeat():
    front = denoiser(steps=3, votes=3)
    classifier = Classifier(Plain(), (0.0,), (1.0,), denoiser=front).eval()
    noisy = torch.rand(16, 1, 8, 8) + torch.randn(16, 1, 8, 8)
    votes = torch.stack([classifier.classify(images).argmax(1) for images in front(noisy)])
    logits = classifier(noisy)
    assert torch.equal(logits.floor(), nn.functional.one_hot(votes, 3).sum(0).float())
    assert torch.equal(classifier(noisy), logits)
    assert torch.allclose(classifier(noisy[3:5]), logits[3:5], atol=1e-4)
    restored = denoiser(steps=3, votes=3)
    restored.inner_noise.zero_()
    restored.load_state_dict(front.state_dict())
    assert torch.equal(restored(noisy), front(noisy))


LORA = {"kind": "lora", "r": 2, "lora_alpha": 4}
METHODS = {
    "mse": {"baseline": "denoised_smoothing", "settings": {"depth": 3, "width": 4}},
    "front": {"parameterization": LORA, "denoiser": {"of": "mse"}},
    "joint": {"parameterization": LORA, "denoiser": {"of": "mse", "trained": True}},
    "fine": {
        "baseline": "denoised_smoothing",
        "denoiser": {"of": "mse", "trained": True},
        "settings": {"objective": "stability"},
    },
    "black_box": {
        "baseline": "denoised_smoothing",
        "surrogates": ["other"],
        "settings": {"architecture": "memnet", "width": 4, "memory_blocks": 1}
        | {"residual_blocks": 1, "objective": "stability"},
    },
    "diffusion": {
        "baseline": "diffusion_denoising",
        "settings": {"channels": "8,8", "steps": 2, "votes": 2, "timestep": "matched"},
    },
    "behind_votes": {"parameterization": LORA, "denoiser": {"of": "diffusion"}},
}


@pytest.fixture
def values(smoke_values):
    """An experiment with every use of a denoiser."""
    changed = copy.deepcopy(smoke_values)
    changed["pretrain"]["images"] = changed["training"]["images"] = 64
    changed["training"]["batch_size"] = 16
    changed["data"]["validation_images"] = 64
    changed["surrogates"] = {"other": {"timm": "lenet"}}
    named = {"family": "f", "learning_rate": 1.0e-3}
    changed["methods"] = {n: {"label": n, **named, **m} for n, m in copy.deepcopy(METHODS).items()}
    return changed


class World:
    """The experiment's folders, made on demand."""

    def __init__(self, values, fetched, folder):
        values["data"]["directory"] = str(fetched.parent)
        self.experiment, self.folder = parse_experiment(values, "x"), folder
        self.data = load_data(self.experiment.data)
        self.base = folder / "base"
        pretrain(self.experiment, self.base)

    def job(self, method, sigma=SIGMA, denoiser=None, surrogates=(), unet=False):
        place = self.folder / method / ("unet" if unet else "sigma") / "seed_0"
        return BaselineJob(
            self.experiment, method, sigma, 0, place, self.base, self.data,
            torch.device("cpu"), denoiser, list(surrogates),
        )  # fmt: skip

    def train(self, method, source):
        folder = self.folder / method
        denoiser = source.output
        train(self.experiment, method, SIGMA, 0, self.base, folder, denoiser)
        return load_classifier(folder).state_dict(), load_classifier(denoiser).state_dict(), folder


@pytest.fixture
def world(values, fetched, tmp_path):
    return World(values, fetched, tmp_path)


def changed(before, after, part):
    return {k for k in before if k.startswith(part) and not torch.equal(before[k], after[k])}


def test_a_hybrid_trains_only_the_peft_weights_and_joint_training_both(world):
    source = world.job("mse")
    train_denoiser(source)
    paid = read_json(source.output / "cost.json")
    after, before, folder = world.train("front", source)
    assert changed(before, after, "denoiser.") == set()
    assert changed(before, after, "network.")
    cost = read_json(folder / "cost.json")
    assert cost["base_training_flops"] == paid["base_training_flops"] > 0
    assert cost["training_flops"] > paid["training_flops"] > 0
    assert cost["training_images"] == 2 * paid["training_images"] > 0
    assert cost["total_parameters"] == paid["total_parameters"]
    weights = sum(p.numel() for p in load_classifier(source.output).denoiser.parameters())
    joint, _, folder = world.train("joint", source)
    assert changed(before, joint, "denoiser.layers.0.weight")
    assert changed(before, joint, "network.")
    both = read_json(folder / "cost.json")["trainable_parameters"]
    assert both == cost["trainable_parameters"]
    assert paid["trainable_parameters"] == weights
    fine = world.job("fine", denoiser=source.output)
    train_denoiser(fine)
    tuned = load_classifier(fine.output).state_dict()
    assert changed(before, tuned, "denoiser.")
    assert changed(before, tuned, "network.") == set()
    with pytest.raises(BenchError, match=r"methods\.front\.denoiser and --denoiser go together"):
        train(world.experiment, "front", SIGMA, 0, world.base, world.folder / "x")
    with pytest.raises(BenchError, match="method is 'base', this run needs 'mse'"):
        train(world.experiment, "front", SIGMA, 0, world.base, world.folder / "x", world.base)


def test_surrogates_are_asked_and_the_certified_classifier_never(world):
    surrogate = world.folder / "other"
    pretrain(world.experiment, surrogate, "other")
    with pytest.raises(BenchError, match=r"needs 'surrogates\.other'"):
        world.job("black_box", surrogates=[world.base]).load_surrogates()
    with pytest.raises(BenchError, match="needs one for each"):
        world.job("black_box").load_surrogates()

    def fit_with_useless_base(method, **options):
        job = world.job(method, **options)
        settings = DenoiserSettings.of(world.experiment, method)
        classifier = load_base(world.experiment, world.base).requires_grad_(False)
        for parameter in classifier.parameters():
            parameter.fill_(math.nan)
        classifier.denoiser, _ = build_denoiser(job, settings)
        return fit_denoiser(job, settings, classifier)

    record, _ = fit_with_useless_base("black_box", surrogates=[surrogate])
    assert all(math.isfinite(value) for _, value in record.loss_curve)
    job = world.job("mse")
    train_denoiser(job)
    with pytest.raises(BenchError, match="training loss is nan"):
        fit_with_useless_base("fine", denoiser=job.output)


def test_surrogates_take_turns():
    def judge(number):
        return lambda images, labels, noise, progress: number

    loss = in_turn([judge(0), judge(1), judge(2)], 6)
    seen = [loss(None, None, None, (step + 1) / 6) for step in range(6)]
    assert seen == [1, 2, 0, 1, 2, 0]


def test_votes_can_be_trained_behind(world):
    unet, source = world.job("diffusion", sigma=0.0, unet=True), world.job("diffusion")
    train_unet(unet)
    assemble(source)
    after, before, _ = world.train("behind_votes", source)
    assert changed(before, after, "denoiser.") == set()
    assert changed(before, after, "network.")


@pytest.mark.fault(
    fault="diffusion model cut, or a bit of it changed",
    stage="train",
    outcome="refused before a classifier is made of it",
)
def test_a_cut_or_changed_diffusion_model_is_refused(world):
    unet = world.job("diffusion", sigma=0.0, unet=True)
    train_unet(unet)
    weights = unet.output / WEIGHTS
    content = weights.read_bytes()
    for damaged in (content[:-4], content[:-1] + bytes([content[-1] ^ 1])):
        weights.write_bytes(damaged)
        with pytest.raises(BenchError, match="changed or cut off"):
            assemble(world.job("diffusion"))
    assert not (world.job("diffusion").output / "classifier.json").exists()
    weights.write_bytes(content)
    assemble(world.job("diffusion"))
    load_classifier(world.job("diffusion").output)


@pytest.mark.parametrize(
    ("method", "train_job"), [("mse", train_denoiser), ("diffusion", train_unet)]
)
def test_an_interrupted_denoiser_is_trained_on(method, train_job, world, monkeypatch, caplog):
    def job():
        return world.job(method, 0.0 if method == "diffusion" else SIGMA)

    monkeypatch.setattr("bench.training_state.SAVE_SECONDS", 0.0)
    save = TrainingState.save

    def killed(state, kept):
        save(state, kept)
        if kept["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save", killed)
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        train_job(job())
    monkeypatch.setattr(TrainingState, "save", lambda state, kept: None)
    [weights] = [p for p in job().output.iterdir() if p.suffix == ".safetensors"]
    assert weights in job().output.glob(FILES)
    found = []
    caplog.set_level("INFO")
    for _ in range(2):
        torch.manual_seed(0)
        train_job(job())
        assert "training goes on at step 2 of 4" in caplog.text
        [weights] = [p for p in job().output.iterdir() if p.suffix == ".safetensors"]
        found.append(sha256_file(weights))
    assert found[0] == found[1]


def test_a_diffusers_folder_is_taken_from_disk(world, values, tmp_path):
    torch.manual_seed(2)
    own = UNet2DModel.from_config(unet_config(1, 28, [8, 8], 1))
    scheduler = DDPMScheduler.from_config(LINEAR)
    flat, nested, color = (tmp_path / name for name in ("flat", "nested", "color"))
    own.save_pretrained(flat)
    scheduler.save_pretrained(flat)
    DDPMPipeline(own, scheduler).save_pretrained(nested)
    UNet2DModel.from_config(unet_config(3, 28, [8, 8], 1)).save_pretrained(color)
    scheduler.save_pretrained(color)

    def take(source):
        method = values["methods"]["diffusion"]
        method["settings"] = {"pretrained": str(source)}
        method.pop("learning_rate", None)
        world.experiment = parse_experiment(values, "x")
        train_unet(world.job("diffusion", sigma=0.0, unet=True))
        assemble(world.job("diffusion"))
        return world.job("diffusion").output

    for source in (flat, nested):
        folder = take(source)
        front, pixels = load_classifier(folder).denoiser, torch.rand(2, 1, 28, 28)
        assert all(torch.equal(a, b) for a, b in zip(
            front.unet.state_dict().values(), own.state_dict().values(), strict=True
        ))  # fmt: skip
        assert front(pixels).shape == pixels.shape
        cost = read_json(folder / "cost.json")
        assert cost["trainable_parameters"] == cost["training_flops"] == 0
    with pytest.raises(BenchError, match=r"settings\.pretrained = .*color has .*'in_channels': 3"):
        take(color)
    weights = flat / "diffusion_pytorch_model.safetensors"
    weights.rename(flat / "diffusion_pytorch_model.bin")
    with pytest.raises(BenchError, match="no diffusers model with safetensors"):
        take(flat)


def test_time_steps_outside_of_the_training_are_refused(world, values):
    values["methods"]["diffusion"]["settings"] |= {"timesteps_low": 200}
    world.experiment = parse_experiment(values, "x")
    train_unet(world.job("diffusion", sigma=0.0, unet=True))
    with pytest.raises(BenchError, match=r"sigma = 0\.5 needs time step 129, outside"):
        assemble(world.job("diffusion"))


@pytest.mark.parametrize(
    ("method", "changes", "named"),
    [
        ("mse", {"objective": {"kind": "cross_entropy"}}, "mse.objective means nothing"),
        ("mse", {"parameterization": LORA}, "mse.parameterization means nothing"),
        ("mse", {"learning_rate": None}, "mse.learning_rate is missing"),
        ("mse", {"settings": {"architecture": "memnet", "depth": 3}}, "memnet has no depth"),
        ("mse", {"surrogates": ["other"]}, "mse.surrogates: the mse objective asks no classifier"),
        ("fine", {"denoiser": {"of": "mse"}}, "fine.denoiser.trained must be true"),
        ("fine", {"settings": {"depth": 3}}, "fine.settings: the shape is that of denoiser.of"),
        ("diffusion", {"objective": {"kind": "macer"}}, "diffusion.objective means nothing"),
        ("diffusion", {"denoiser": {"of": "mse"}}, "diffusion.denoiser means nothing"),
        ("diffusion", {"learning_rate": None}, "learning_rate is missing: the UNet is trained"),
        ("diffusion", {"settings": {"pretrained": "x"}}, "learning_rate has no use"),
        ("diffusion", {"settings": {"channels": "8", "pretrained": "x"}}, "either channels"),
        ("diffusion", {"settings": {"channels": "8", "votes": 3}}, "raise steps or drop votes"),
    ],
)
def test_keys_without_effect_are_refused(values, method, changes, named):
    values["methods"][method] |= changes
    experiment = parse_experiment(values, "x")
    settings = DiffusionSettings if method == "diffusion" else DenoiserSettings
    with pytest.raises(BenchError) as error:
        settings.check(experiment)
    assert f"methods.{method}." in str(error.value)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (
            ("methods", "front", "denoiser", "of"),
            "nobody",
            "front.denoiser.of: nobody is no method",
        ),
        (("methods", "front", "denoiser", "of"), "front", "waits for front's own denoiser"),
        (("methods", "mse", "denoiser"), {"of": "joint"}, "own denoiser"),
        (("methods", "joint", "learning_rate"), None, "learning_rate is missing"),
        (("methods", "front", "surrogates"), ["other"], "surrogates belong to a baseline"),
        (("methods", "black_box", "surrogates"), ["x"], "black_box.surrogates: x is not in"),
    ],
)
def test_a_wrong_name_is_refused(values, path, value, named):
    target = values
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(BenchError, match=r"mine\.yaml") as error:
        parse_experiment(values, "mine.yaml")
    assert named in str(error.value)


def test_the_certified_backbone_is_no_surrogate_and_plain_methods_have_no_denoiser(values):
    values["surrogates"]["same"] = {**values["backbone"], "pretrained": True}
    with pytest.raises(BenchError, match=r"surrogates\.same is the certified backbone"):
        parse_experiment(values, "x")
    del values["surrogates"]["same"]
    values["methods"]["plain"] = {"label": "plain", "family": "f"}
    values["methods"]["front"]["denoiser"]["of"] = "plain"
    with pytest.raises(BenchError, match="plain has no denoiser"):
        parse_experiment(values, "x")


def test_fingerprints_follow_the_denoiser_and_the_surrogates(values):
    def fingerprints():
        experiment = parse_experiment(values, "x")
        return {name: experiment.training_fingerprint(name, SIGMA, 0) for name in METHODS}

    first = fingerprints()
    values["methods"]["mse"]["settings"]["depth"] = 4
    second = fingerprints()
    values["surrogates"]["other"]["input_size"] = 28
    third = fingerprints()
    assert {n for n in METHODS if first[n] != second[n]} == {"mse", "front", "joint", "fine"}
    assert {n for n in METHODS if second[n] != third[n]} == {"black_box"}


@pytest.mark.workflow
def test_the_dag_waits_for_what_a_method_starts_from(repository):
    def plan():
        command = [sys.executable, "-m", "snakemake", "--cores", "1", "-n", "-p"]
        command += ["--configfile", "config/denoisers.yaml"]
        run = subprocess.run(command, cwd=repository, capture_output=True, text=True)
        return run.stdout + run.stderr

    said = plan()
    models = "results/denoisers/models"
    trainings = {
        re.search("--method (.*?) ", line)[1]: line
        for line in said.splitlines()
        if "--output" in line and "--method" in line and "certify" not in line
    }
    assert f"--denoiser {models}/mse_frozen/sigma_" in trainings["mse_lora"]
    assert f"--denoiser {models}/mse_frozen/sigma_" in trainings["mse_then_stability"]
    assert f"--denoiser {models}/diffusion_frozen/sigma_" in trainings["diffusion_lora"]
    surrogates = [f"--surrogate {models}/surrogates/{name}" for name in ("small_vit", "lenet")]
    assert " ".join(surrogates) in trainings["surrogates"]
    assert "--denoiser" not in trainings["none_lora"]
    assert re.search(r"pretrain_surrogate +2\n", said)
    path = repository / "config/denoisers.yaml"
    text = path.read_text().replace("mse}\n", "mse}\n    objective: {kind: macer}\n")
    path.write_text(text)
    assert "methods.mse_frozen.objective means nothing" in plan()
