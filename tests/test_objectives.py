"""Every objective equals its formula, computed here by loops and by derivatives taken by hand."""

import copy
import inspect
import math
from typing import get_args

import pytest
import torch
from scipy.stats import norm
from torch import nn

from bench.backbones import create_classifier
from bench.config import BackboneSettings, Objective, parse_experiment
from bench.errors import BenchError
from bench.objectives import OBJECTIVES
from bench.objectives.cross_entropy import cross_entropy
from bench.objectives.noise import Batch
from bench.parameterization_settings import Lora
from bench.parameterizations import adapt

SIGMA, SEED, CLASSES = 0.5, 3, 3
SETTINGS = {
    get_args(settings.model_fields["kind"].annotation)[0]: settings
    for settings in get_args(get_args(Objective)[0])
}


class Linear(nn.Module):
    """Logits W x, in float64 so that formulas can be compared closely."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        weight = 2 * torch.randn(CLASSES, 4, generator=generator)
        self.weight = nn.Parameter(weight.double())
        self.seen = []

    def forward(self, pixels):
        self.seen.append(pixels.detach())
        return pixels.double().flatten(1) @ self.weight.T


def images_and_labels():
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(6, 1, 2, 2, generator=generator)
    return images, (Linear()(images).argmax(1) + torch.tensor([0, 0, 0, 0, 0, 1])) % CLASSES


def batch_at(sigma=SIGMA, progress=1.0):
    images, labels = images_and_labels()
    return Batch(images, labels, sigma, torch.Generator().manual_seed(SEED), progress)


def noise_and_generator(count):
    """The draws that an objective meets first, and the generator behind them."""
    generator = torch.Generator().manual_seed(SEED)
    return SIGMA * torch.randn(count, 6, 1, 2, 2, generator=generator), generator


def probabilities(pixels, scale=1.0):
    return torch.softmax(scale * Linear()(pixels[None]).detach()[0], 0)


def entropy(p, q):
    return -sum(float(a) * math.log(b) for a, b in zip(p, q, strict=True))


def kl(p, q):
    return entropy(p, q) - entropy(p, p)


def value(kind, batch=None, model=None, **hyperparameters):
    return OBJECTIVES[kind](model or Linear(), batch or batch_at(), **hyperparameters).item()


def outer(pixels, target):
    """Derivative by W of the cross-entropy of softmax(W x) with `target`."""
    return torch.outer((probabilities(pixels) - target).double(), pixels.flatten().double())


def ascent(x, y, noise):
    """Unit gradient of -log mean_i softmax(W(x + e_i))_y: W^T sum_i w_i (p_i - onehot_y)."""
    weight = Linear().weight.detach()
    ps = [probabilities(x + e) for e in noise]
    total = sum(float(p[y]) for p in ps)
    gradient = sum(p[y] / total * ((p - torch.eye(CLASSES)[y]) @ weight) for p in ps)
    return (gradient / gradient.norm()).float().view(1, 2, 2)


def ball(delta, radius):
    return delta * min(1.0, radius / float(delta.norm()))


def test_cross_entropy_is_its_formula():
    noise, _ = noise_and_generator(3)
    images, labels = images_and_labels()
    terms = [
        -math.log(probabilities(x + e)[y])
        for draw in noise
        for x, y, e in zip(images, labels, draw, strict=True)
    ]
    assert value("cross_entropy", noises=3) == pytest.approx(sum(terms) / 18, rel=1e-5)


def test_stability_is_its_formula():
    noise, _ = noise_and_generator(1)
    expected = 0.0
    for x, y, e in zip(*images_and_labels(), noise[0], strict=True):
        clean, noisy = probabilities(x), probabilities(x + e)
        expected += -math.log(clean[y]) + 2.5 * entropy(clean, noisy)
    assert value("stability", weight=2.5) == pytest.approx(expected / 6, rel=1e-5)


def test_consistency_is_its_formula():
    noise, _ = noise_and_generator(3)
    expected = 0.0
    for i, (x, y) in enumerate(zip(*images_and_labels(), strict=True)):
        ps = [probabilities(x + draw[i]) for draw in noise]
        mean = sum(ps) / 3
        expected += sum(-math.log(p[y]) + 10 * kl(mean, p) for p in ps) / 3
        expected += 0.5 * entropy(mean, mean)
    found = value("consistency", noises=3, weight=10.0, entropy_weight=0.5)
    assert found == pytest.approx(expected / 6, rel=1e-5)


@pytest.mark.parametrize("kind", ["cross_entropy", "stability", "macer", "consistency"])
def test_gradients_are_those_of_the_whole_value(kind):
    """No part of these is a constant: a small step changes the value as the gradient says."""
    settings = SETTINGS[kind](kind=kind).at(SIGMA)
    model = Linear()
    OBJECTIVES[kind](model, batch_at(), **settings).backward()
    step = 1e-5 * torch.randn(CLASSES, 4, generator=torch.Generator().manual_seed(4)).double()
    values = []
    for sign in (1, -1):
        moved = Linear()
        moved.weight.data += sign * step
        values.append(value(kind, None, moved, **settings))
    predicted = 2 * float((model.weight.grad * step).sum())
    assert values[0] - values[1] == pytest.approx(predicted, rel=1e-3)


def macer_gaps(noise, temperature):
    """Phi^-1 of the best minus Phi^-1 of the second, None where the best is wrong."""
    gaps = []
    for i, (x, y) in enumerate(zip(*images_and_labels(), strict=True)):
        mean = sum(probabilities(x + draw[i], temperature) for draw in noise) / len(noise)
        second, best = sorted(float(p) for p in mean)[-2:]
        gaps.append(norm.ppf(best) - norm.ppf(second) if mean.argmax() == y else None)
    return gaps


def test_macer_is_its_formula():
    noise, _ = noise_and_generator(4)
    gaps = macer_gaps(noise, 2.0)
    assert None in gaps
    assert any(g is not None and g > 4.0 for g in gaps)
    assert any(g is not None and g < 4.0 for g in gaps)
    robustness = sum(max(4.0 - g, 0) for g in gaps if g is not None)
    classification = 0.0
    for i, (x, y) in enumerate(zip(*images_and_labels(), strict=True)):
        classification -= math.log(sum(probabilities(x + draw[i])[y] for draw in noise) / 4)
    late = {"noises": 4, "weight": 12.0, "margin": 4.0, "temperature": 2.0, "start": 0.5}
    expected = (classification + 12 * SIGMA / 2 * robustness) / 6
    assert value("macer", **late) == pytest.approx(expected, rel=1e-4)
    early = value("macer", batch_at(progress=0.4), **late)
    assert early == pytest.approx(classification / 6, rel=1e-5)


def test_macer_has_finite_gradients_where_the_classifier_is_certain():
    model = Linear()
    model.weight.data *= 1e4
    settings = SETTINGS["macer"](kind="macer").at(SIGMA)
    OBJECTIVES["macer"](model, batch_at(sigma=1e-6), **settings).backward()
    assert model.weight.grad.isfinite().all()


@pytest.mark.parametrize("progress", [0.05, 1.0])
def test_smoothadv_is_its_formula(progress):
    noise, _ = noise_and_generator(3)
    radius = 0.8 * min(1, progress / 0.1)
    expected = 0.0
    for i, (x, y) in enumerate(zip(*images_and_labels(), strict=True)):
        adversary = x
        for _ in range(4):
            step = adversary + 2 * radius / 4 * ascent(adversary, y, noise[:, i])
            adversary = x + ball(step.clamp(0, 1) - x, radius)
        expected += sum(-math.log(probabilities(adversary + e)[y]) for e in noise[:, i]) / 3
    settings = {"noises": 3, "radius": 0.8, "steps": 4, "warmup": 0.1}
    found = value("smoothadv", batch_at(progress=progress), **settings)
    assert found == pytest.approx(expected / 6, rel=1e-4)


@pytest.mark.parametrize("one_step", [False, True])
def test_smoothmix_is_its_formula(one_step):
    noise, generator = noise_and_generator(2)
    shares = torch.rand(6, 1, generator=generator)[:, 0] / 2
    ramp, size = 0.5, 0.4
    expected, rights, slope = 0.0, [], torch.zeros(CLASSES, 4, dtype=torch.float64)
    for i, (x, y) in enumerate(zip(*images_and_labels(), strict=True)):
        path = [x]
        for _ in range(3):
            path.append((path[-1] + size * ascent(path[-1], y, noise[:, i])).clamp(0, 1))
        start = x + ball(path[1] - x, ramp * size) if one_step else x
        ps = [probabilities(start + e) for e in noise[:, i]]
        mean, share = sum(ps) / 2, float(shares[i])
        mixed = (1 - share) * start + share * path[-1]
        target = (1 - share) * mean + share / CLASSES
        rights.append(bool(mean.argmax() == y))
        apart = sum(kl(target, probabilities(mixed + e)) for e in noise[:, i]) / 2
        expected += sum(-math.log(p[y]) for p in ps) / 2 + 5 * ramp * rights[-1] * apart
        slope += sum(outer(start + e, torch.eye(CLASSES)[y]) for e in noise[:, i]) / 2
        for e in noise[:, i] if rights[-1] else []:
            slope += 5 * ramp * outer(mixed + e, target) / 2
            for p, own in zip(ps, noise[:, i], strict=True):  # the target moves with W as well
                surplus = (1 - share) / 4 * p * (target / probabilities(mixed + e)).log()
                pull = torch.outer(surplus - p * surplus.sum(), (start + own).flatten().double())
                slope += 5 * ramp * pull
    assert set(rights) == {True, False}
    model = Linear()
    found = OBJECTIVES["smoothmix"](
        model,
        batch_at(progress=0.05),
        noises=2,
        steps=3,
        step_size=size,
        weight=5.0,
        one_step=one_step,
        warmup=0.1,
    )
    found.backward()
    assert found.item() == pytest.approx(expected / 6, rel=1e-4)
    assert torch.allclose(model.weight.grad, slope / 6, atol=1e-5)


def worst_noise(x, noise, target, radius, steps):
    """Ascent of KL(target || softmax(W(x + e))), whose derivative is W^T (p - target)."""
    worst = noise
    for _ in range(steps):
        gradient = (probabilities(x + worst) - target) @ Linear().weight.detach()
        direction = (gradient / gradient.norm()).float().view(1, 2, 2)
        worst = noise + ball(worst + 2 * radius / steps * direction - noise, radius)
        worst = (worst - worst.mean()) / worst.std() * noise.std() + noise.mean()
    return worst


def test_cat_rs_is_its_formula():
    noise, generator = noise_and_generator(4)
    images, labels = images_and_labels()
    ps = [[probabilities(x + e) for e in noise[:, i]] for i, x in enumerate(images)]
    right = [sum(bool(p.argmax() == y) for p in own) for own, y in zip(ps, labels, strict=True)]
    shares = torch.tensor(right) / 4
    kept = torch.binomial(torch.full((6,), 4.0), shares, generator=generator).clamp(min=1)
    assert 4 in kept
    assert any(k < 4 for k in kept)
    expected, slope = 0.0, torch.zeros(CLASSES, 4, dtype=torch.float64)
    for i, (x, y) in enumerate(zip(images, labels, strict=True)):
        easy = sorted(noise[:, i], key=lambda e: -probabilities(x + e)[y])[: int(kept[i])]
        expected -= sum(math.log(probabilities(x + e)[y]) for e in easy) / 4
        slope += sum(outer(x + e, torch.eye(CLASSES)[y]) for e in easy) / 4
        if kept[i] == 4:
            target = sum(ps[i]) / 4
            worst = [worst_noise(x, e, target, 0.6, 3) for e in noise[:, i]]
            hardest = max(worst, key=lambda e: kl(target, probabilities(x + e)))
            expected += 2 * kl(target, probabilities(x + hardest))
            slope += 2 * outer(x + hardest, target)  # the target is a constant
    model = Linear()
    found = OBJECTIVES["cat_rs"](model, batch_at(), noises=4, radius=0.6, steps=3, weight=2.0)
    found.backward()
    assert found.item() == pytest.approx(expected / 6, rel=1e-4)
    assert torch.allclose(model.weight.grad, slope / 6, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "hyperparameters", "noises"),
    [
        ("consistency", {"noises": 2, "weight": 0, "entropy_weight": 0}, 2),
        ("smoothadv", {"noises": 2, "radius": 0, "steps": 2, "warmup": 0}, 2),
        (
            "smoothmix",
            {
                "noises": 2,
                "steps": 1,
                "step_size": 1.0,
                "weight": 0,
                "one_step": False,
                "warmup": 0,
            },
            2,
        ),
        (
            "macer",
            {"noises": 1, "weight": 0, "margin": 8, "temperature": 16, "start": 0},
            1,
        ),
    ],
)
def test_weight_or_radius_zero_leaves_cross_entropy(kind, hyperparameters, noises):
    expected = value("cross_entropy", noises=noises)
    assert value(kind, **hyperparameters) == pytest.approx(expected, rel=1e-6)


def test_stability_of_weight_zero_is_clean_cross_entropy():
    clean = value("cross_entropy", batch_at(sigma=0.0), noises=1)
    assert value("stability", weight=0.0) == pytest.approx(clean, rel=1e-6)


def test_attacks_stay_in_the_ball_and_in_pixels_and_do_harm():
    model, batch = Linear(), batch_at(sigma=0.0)
    settings = {"noises": 1, "radius": 0.3, "steps": 10, "warmup": 0}
    harmed = value("smoothadv", batch, model, **settings)
    moved = model.seen[-1] - batch.images
    assert moved.flatten(1).norm(dim=1).max() <= 0.3 + 1e-6
    assert moved.flatten(1).norm(dim=1).min() > 0.2
    assert model.seen[-1].min() >= 0
    assert model.seen[-1].max() <= 1
    assert harmed > value("cross_entropy", batch_at(sigma=0.0), noises=1)


@pytest.mark.parametrize("kind", ["smoothadv", "smoothmix"])
def test_attacks_do_not_move_pixels_that_a_resize_has_put_outside(kind):
    flat = Linear()
    flat.weight.data.zero_()
    seen = []
    flat.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    batch = batch_at(sigma=1e-9)
    batch.images[0, 0, 0], batch.images[1, 0, 1] = -0.1, 1.2
    settings = SETTINGS[kind](kind=kind).at(SIGMA)
    OBJECTIVES[kind](flat, batch, **settings)
    for pixels in seen:
        torch.testing.assert_close(pixels, batch.images.repeat(len(pixels) // 6, 1, 1, 1))


def test_every_objective_has_settings_with_its_keywords():
    assert SETTINGS.keys() == OBJECTIVES.keys()
    for kind, settings in SETTINGS.items():
        parameters = inspect.signature(OBJECTIVES[kind]).parameters.values()
        keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert keywords == settings.model_fields.keys() - {"kind"}, kind


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_noise_comes_from_the_generator_alone(kind):
    settings = SETTINGS[kind](kind=kind).at(SIGMA)
    torch.manual_seed(0)
    first = value(kind, **settings)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert value(kind, **settings) == first
    assert torch.equal(torch.get_rng_state(), state)
    images, labels = images_and_labels()
    other = Batch(images, labels, SIGMA, torch.Generator().manual_seed(SEED + 1))
    assert value(kind, other, **settings) != first


VIT = BackboneSettings(
    timm="vit_tiny_patch16_224",
    arguments={
        "img_size": 28,
        "patch_size": 7,
        "embed_dim": 32,
        "depth": 1,
        "num_heads": 2,
        "mlp_ratio": 2,
    },
)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_gradients_reach_what_lora_trains_and_nothing_else(kind, precision):
    torch.manual_seed(0)
    classifier = create_classifier(VIT, 10, 1)
    classifier.network = adapt(classifier.network, Lora(kind="lora", r=2), 1)
    classifier.train()
    images, labels = torch.rand(4, 1, 28, 28), torch.arange(4)
    batch = Batch(images, labels, SIGMA, torch.Generator().manual_seed(SEED))
    settings = SETTINGS[kind](kind=kind).at(SIGMA)
    with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
        OBJECTIVES[kind](classifier, batch, **settings).backward()
    for name, parameter in classifier.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
        elif "lora_A" not in name:  # their gradient passes through lora_B, which starts at zero
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
    assert all(module.training for module in classifier.modules())


class Normalised(nn.Module):
    """A network with batch statistics and dropout; one part is held in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.batch = nn.BatchNorm2d(1)
        self.held = nn.Dropout(0.5).eval()
        self.linear = nn.Linear(4, CLASSES)

    def forward(self, pixels):
        return self.linear(self.held(self.batch(pixels)).flatten(1))


@pytest.mark.parametrize(("kind", "forwards"), [("smoothadv", 1), ("smoothmix", 2), ("cat_rs", 2)])
def test_attacks_leave_the_network_as_it_was(kind, forwards):
    model = Normalised()
    value(kind, None, model, **SETTINGS[kind](kind=kind).at(SIGMA))
    assert model.batch.num_batches_tracked == forwards
    assert model.batch.training
    assert not model.held.training
    assert all(p.grad is None for p in model.parameters())


def with_objective(values, objective):
    changed = copy.deepcopy(values)
    changed["sigmas"] = [0.25, 0.5]
    changed["methods"]["lora"]["objective"] = objective
    return parse_experiment(changed, "mine.yaml")


def test_a_hyperparameter_may_differ_by_sigma(smoke_values):
    both = with_objective(smoke_values, {"kind": "consistency", "weight": {0.25: 20, 0.5: 10}})
    objective = both.methods["lora"].objective
    assert objective.at(0.25) == {"noises": 2, "weight": 20.0, "entropy_weight": 0.5}
    assert objective.at(0.5)["weight"] == 10.0
    one = with_objective(smoke_values, {"kind": "consistency", "weight": 10})
    fingerprints = [[e.training_fingerprint("lora", s, 0) for s in e.sigmas] for e in (both, one)]
    assert fingerprints[0][0] != fingerprints[1][0]
    assert fingerprints[0][1] == fingerprints[1][1]


@pytest.mark.parametrize(
    ("objective", "named"),
    [
        ({"kind": "consistency", "weight": {0.5: 10}}, "objective.weight has no value for sigma"),
        ({"kind": "consistency", "eta": 1}, "objective.consistency.eta"),
        ({"kind": "macer", "weight": -1}, "objective.macer.weight"),
        ({"kind": "trades"}, "methods.lora.objective"),
    ],
)
def test_mistakes_in_an_objective_are_named(smoke_values, objective, named):
    with pytest.raises(BenchError) as error:
        with_objective(smoke_values, objective)
    assert named in str(error.value)


def test_cross_entropy_gradient_of_a_linear_model():
    """The mean of (p_i - onehot_y) x_i^T over noisy copies."""
    model = Linear()
    cross_entropy(model, batch_at(), noises=2).backward()
    noise, _ = noise_and_generator(2)
    images, labels = images_and_labels()
    expected = torch.zeros(CLASSES, 4, dtype=torch.float64)
    for draw in noise:
        for x, y, e in zip(images, labels, draw, strict=True):
            expected += outer(x + e, torch.eye(CLASSES)[y]) / 12
    assert torch.allclose(model.weight.grad, expected, atol=1e-6)
