"""Optimizers and schedules take the steps that their settings describe."""

import pytest
import torch
from scipy.stats import binom, norm
from torch import nn

from bench.augmentation import crop_and_flip
from bench.config import Sgd, Step, TrainingSettings
from bench.data import ArraySplit
from bench.training import accumulate_gradients, accuracy, fit

IMAGES = ArraySplit(torch.zeros(8, 1, 1, 1, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
SGD = {"images": 8, "batch_size": 2, "weight_decay": 0.0, "clip_norm": None}
STEP = Step(kind="step", drop_at=[0.5, 0.75], factor=0.1)


class Weight(nn.Module):
    """One weight, starting at 1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


class Recorder:
    """Keeps the weight after each step."""

    def __init__(self, module):
        self.module, self.seen = module, []

    def __call__(self):
        self.seen.append(self.module.weight.item())


def path(settings, slope=1.0):
    """The weight after each of 4 steps down a loss of constant slope, and each step's progress."""
    module, progress = Weight(), []
    recorder = Recorder(module)

    def loss(images, labels, noise, share):
        progress.append(share)
        return slope * module.weight.sum()

    fit(module, loss, IMAGES, settings, 0.1, 0, recorder)
    return recorder.seen, progress


def test_sgd_drops_its_rate_at_the_named_shares():
    plain = TrainingSettings(**SGD, optimizer=Sgd(kind="sgd", momentum=0), schedule=STEP)
    weights, progress = path(plain)
    assert weights == pytest.approx([0.9, 0.8, 0.79, 0.789])
    assert progress == [0.25, 0.5, 0.75, 1.0]


def test_sgd_has_momentum_and_weight_decay():
    constant = Step(kind="step", drop_at=[])
    heavy = TrainingSettings(**SGD, optimizer=Sgd(kind="sgd", momentum=0.9), schedule=constant)
    weights, _ = path(heavy)
    assert weights == pytest.approx([0.9, 0.71, 0.439, 0.0951])
    decay = {**SGD, "weight_decay": 0.5}
    shrinking = TrainingSettings(**decay, optimizer=Sgd(kind="sgd", momentum=0), schedule=constant)
    assert path(shrinking, slope=0.0)[0][:2] == pytest.approx([0.95, 0.9025])


def test_clipping_can_be_turned_off():
    plain = TrainingSettings(**SGD, optimizer=Sgd(kind="sgd", momentum=0), schedule=STEP)
    assert path(plain, slope=10.0)[0][0] == pytest.approx(0.0, abs=1e-6)
    clipped = plain.model_copy(update={"clip_norm": 2.0})
    assert path(clipped, slope=10.0)[0][0] == pytest.approx(0.8, rel=1e-5)


def test_the_default_is_adamw_with_a_cosine():
    weights, _ = path(TrainingSettings(images=8, batch_size=2, weight_decay=0.0))
    steps = torch.tensor([1.0, *weights]).diff()
    # AdamW moves by the rate itself on a constant slope: one warm-up step, then the cosine.
    assert steps.tolist() == pytest.approx([-0.1, -0.1, -0.075, -0.025], rel=1e-3)


class Scores(nn.Module):
    """A linear classifier of one-pixel images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(1, 2)

    def forward(self, pixels):
        return self.layer(pixels.flatten(1))


def gradients(micro: int | None, count: int = 7) -> tuple[torch.Tensor, float]:
    """Gradient of the weights and loss on one batch of `count` images."""
    module, settings = (
        Scores(),
        TrainingSettings(images=count, micro_batch_size=micro, precision="float32"),
    )
    images = torch.linspace(-1, 1, count).reshape(count, 1, 1, 1)
    labels = torch.arange(count) % 2

    def loss(pixels, targets, noise, share):
        return nn.functional.cross_entropy(module(pixels), targets)

    value = accumulate_gradients(loss, images, labels, torch.Generator(), 1.0, settings)
    return module.layer.weight.grad, value.item()


@pytest.mark.parametrize("micro", [1, 2, 3, 7, 100])
def test_micro_batches_add_up_to_the_batch(micro):
    """Also where the last one is smaller than the others."""
    whole, value = gradients(None)
    pieces, their_value = gradients(micro)
    torch.testing.assert_close(pieces, whole)
    assert their_value == pytest.approx(value)
    assert not torch.allclose(gradients(None, count=6)[0], whole)


def test_micro_batches_draw_the_noise_of_the_batch():
    drawn = []

    def loss(pixels, targets, noise, share):
        drawn.append(torch.randn(pixels.shape, generator=noise))
        return pixels.sum().requires_grad_()

    images, labels = torch.zeros(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64)
    for micro in (None, 2):
        settings = TrainingSettings(images=8, micro_batch_size=micro)
        noise = torch.Generator().manual_seed(3)
        accumulate_gradients(loss, images, labels, noise, 1.0, settings)
    assert torch.equal(torch.cat(drawn[1:]), drawn[0])


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_validation_is_under_noise_of_sigma(margin):
    """A half-space at distance `margin` is right with probability Phi(margin / sigma)."""

    class HalfSpace(nn.Module):
        def __init__(self):
            super().__init__()
            self.threshold = nn.Parameter(torch.tensor(0.5 - margin))

        def forward(self, pixels):
            score = pixels[:, 0, 0, 0] - self.threshold
            return torch.stack([-score, score], dim=1)

    count, sigma = 4000, 0.5
    grey = torch.full((count, 1, 1, 1), 255, dtype=torch.uint8)
    split = ArraySplit((grey * 0.5).round().to(torch.uint8), torch.ones(count).long())
    hits = count * accuracy(HalfSpace(), split, sigma, seed=0)
    exact = norm.cdf((128 / 255 - 0.5 + margin) / sigma)
    low, high = binom.interval(1 - 1e-4, count, exact)
    assert low <= hits <= high
    assert accuracy(HalfSpace(), split) == 1.0


def test_training_in_micro_batches_goes_the_same_way():
    paths = []
    for micro in (None, 1):
        settings = TrainingSettings(**SGD, micro_batch_size=micro, schedule=STEP)
        paths.append(path(settings)[0])
    assert paths[0] == pytest.approx(paths[1])


def test_crops_and_flips_are_those_of_the_image_itself():
    """Every result is one of the (2 x 2 + 1)^2 shifts of an image or its mirror, none preferred."""
    image = torch.arange(1.0, 1 + 3 * 16 * 16).reshape(3, 16, 16)
    batch = image.expand(2000, 3, 16, 16)
    crops = crop_and_flip(batch, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(image, (2,) * 4)
    shifts = [padded[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
    allowed = torch.stack([*shifts, *(shift.flip(2) for shift in shifts)])
    counts = (crops[:, None] == allowed).flatten(2).all(2).sum(0)
    assert counts.sum() == 2000
    # 40 of each are expected: 7 standard deviations either way.
    assert counts.min() > 0
    assert counts.max() < 85


def test_augmentation_changes_what_is_learned_and_repeats():
    pictures = torch.randint(0, 256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    split = ArraySplit(pictures.to(torch.uint8), torch.arange(8) % 2)

    def seen(**changes):
        images = []

        def loss(pixels, labels, noise, share):
            images.append(pixels)
            return module.weight.sum()

        module = Weight()
        fit(module, loss, split, TrainingSettings(**SGD, **changes), 0.1, 0)
        return torch.cat(images)

    plain, cropped = seen(), seen(augmentation="crop_and_flip")
    assert plain.shape == cropped.shape
    assert not torch.equal(plain, cropped)
    assert torch.equal(cropped, seen(augmentation="crop_and_flip"))
