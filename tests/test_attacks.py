"""Attacks against closed forms, certificates against attacks, and that a false one is caught."""

import copy
import shutil
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from scipy.stats import binom
from torch import nn

from bench.attack_tables import attacked_accuracy, build_attack_tables, soundness
from bench.attacks import Attack, attack_certificates, attack_method
from bench.certification import certify_method
from bench.config import AttackSettings, DataSettings, parse_experiment
from bench.data import ArraySplit, Data, load_data, spread
from bench.errors import BenchError
from bench.figures import draw_attacks
from bench.files import read_json, write_json
from bench.jobs import pretrain, train
from bench.objectives.attack import direction
from bench.smoothing import Protocol, certify
from bench.smoothing.noise import noise_key
from bench.tables import build_tables

SIGMA = 0.5
SHAPE = (1, 4, 4)


class Linear(nn.Module):
    """Class 1 where <w, x> > 0, |w| = 1: the smoothed radius is |<w, x>| exactly."""

    def __init__(self):
        super().__init__()
        weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
        self.weight = nn.Parameter(weight / weight.norm(), requires_grad=False)

    def forward(self, pixels):
        score = 8 * (pixels * self.weight).flatten(1).sum(1)
        return torch.stack([-score, score], dim=1)


def attack_on(model, classes=2, **settings):
    """An attack on `model`, cheap unless told."""
    chosen = {"steps": 4, "n": 1024, "batch_size": 4096} | settings
    model = model.eval()
    return Attack(model, model, classes, SIGMA, 11, "test", AttackSettings(**chosen), 4096)


def at_distance(margins, seed=0):
    """Images whose exact radius is |margin|, of class 1 where that is positive."""
    noise = torch.rand((len(margins), *SHAPE), generator=torch.Generator().manual_seed(seed))
    weight = Linear().weight
    across = (noise * weight).flatten(1).sum(1)
    return noise + (margins - across)[:, None, None, None] * weight


def test_the_attack_on_a_linear_classifier_reaches_the_exact_radius_and_goes_no_further():
    margins = torch.linspace(0.2, 1.5, 60) * torch.tensor([1, -1]).repeat(30)
    images, labels, ids = at_distance(margins), (margins > 0).long(), list(range(60))
    attack = attack_on(Linear(), n=4096)
    for slack, predicted in ((0.1, 1 - labels), (-0.1, labels)):
        radii = margins.abs() + slack
        points = attack.points(images, labels, radii, ids)
        away = (points - images).flatten(1)
        assert away.norm(dim=1).tolist() == pytest.approx(radii.tolist(), rel=1e-5)
        along = away @ Linear().weight.flatten() / away.norm(dim=1)
        assert along.abs().min() > 0.9999
        assert attack.predict(points, labels.tolist(), ids) == predicted.tolist()


def test_attacked_points_may_leave_the_pixel_range():
    image = torch.zeros(1, *SHAPE)
    point = attack_on(Linear()).points(image, torch.tensor([1]), torch.tensor([2.0]), [0])
    assert point.min() < 0
    assert point.norm().item() == pytest.approx(2.0, rel=1e-5)


class Ball(nn.Module):
    """Class 1 in a ball around the origin, where the gradient depends on the noise."""

    def forward(self, pixels):
        score = 4 - pixels.flatten(1).square().sum(1)
        return torch.stack([-score, score], dim=1)


def test_every_step_of_an_attack_and_its_judge_draw_apart(monkeypatch):
    """From certification too, whose seed they share."""
    domains = {"certify": set(), "attack": set(), "predict": set()}

    def watch(stage, module):
        def watched(seed, data, image, domain, block):
            domains[stage].add(domain)
            return noise_key(seed, data, image, domain, block)

        monkeypatch.setattr(f"bench.{module}.noise_key", watched)

    images, attack = at_distance(torch.tensor([0.5])), attack_on(Linear(), steps=3)
    watch("certify", "smoothing.voting")
    settings = Protocol(SIGMA, mode="cohen", n0=32, n=64, data="test", batch_size=64, seed=11)
    list(certify(Linear().eval(), images, [1], [0], settings, 2))
    watch("attack", "attacks")
    points = attack.points(images, torch.tensor([1]), torch.tensor([0.4]), [0])
    watch("predict", "smoothing.voting")
    attack.predict(points, [1], [0])
    assert [len(found) for found in domains.values()] == [2, 4, 1]
    assert len(set().union(*domains.values())) == 7


def test_an_attack_does_not_depend_on_batches_or_order():
    images = at_distance(torch.linspace(0.1, 1.5, 23))
    labels, radii = torch.ones(23, dtype=torch.int64), torch.full((23,), 0.7)
    whole = attack_on(Ball()).points(images, labels, radii, list(range(23)))
    small = attack_on(Ball(), batch_size=64).points(images, labels, radii, list(range(23)))
    torch.testing.assert_close(small, whole, rtol=0, atol=1e-5)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    shuffled = attack_on(Ball()).points(images[order], labels, radii, order.tolist())
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=1e-5)
    others = attack_on(Ball()).points(images, labels, radii, list(range(23, 46)))
    assert (others - whole).abs().max() > 1e-3


CERTIFIED_ALPHA = 0.05


@pytest.fixture(scope="module")
def claims():
    """More than 5,000 certificates of the linear classifier, with their images."""
    margins = torch.linspace(0.3, 1.2, 5600) * torch.tensor([1, -1]).repeat(2800)
    images, labels = at_distance(margins), (margins > 0).long().tolist()
    settings = Protocol(
        SIGMA, mode="cohen", n0=32, n=64, alpha=CERTIFIED_ALPHA, data="test", batch_size=8192
    )
    found = certify(Linear().eval(), images, labels, list(range(5600)), settings, 2)
    log = pd.DataFrame([asdict(certificate) for certificate in found])
    return images, log.sort_values("idx", ignore_index=True)


def checked(images, log):
    """The verdict on certificates of the linear classifier."""
    attack = attack_on(Linear(), steps=1, n=128, batch_size=8192)
    return soundness(attack_certificates(attack, images, log), CERTIFIED_ALPHA, 0.001)


def test_of_5000_sound_certificates_no_more_break_than_alpha_allows(claims):
    found = checked(*claims)
    assert found["certificates"] >= 5000
    assert found["broken"] <= found["allowed"]
    rate = CERTIFIED_ALPHA + 2 * 0.001
    assert found["allowed"] == binom.isf(0.001, 5600, rate)
    assert found["p_value"] > 0.001


def test_inflated_certificates_are_caught(claims):
    images, log = claims
    found = checked(images[::8], log[::8].assign(radius=2 * log["radius"]))
    assert found["broken"] > 3 * found["allowed"]
    assert found["p_value"] < 1e-9


def log_of(*rows):
    names = ["idx", "label", "certified", "certified_radius", "target", "radius", "predict"]
    return pd.DataFrame(rows, columns=names)


def test_accuracy_under_attack_counts_what_is_proven_wrong():
    log = log_of(
        (0, 1, 1, 0.5, 1, 0.0, 1), (0, 1, 1, 0.5, 1, 0.25, 1), (0, 1, 1, 0.5, 1, 0.75, 0),
        (1, 2, -1, 0.0, 2, 0.0, -1), (1, 2, -1, 0.0, 2, 0.25, -1), (1, 2, -1, 0.0, 2, 0.75, -1),
        (2, 3, 4, 0.6, 3, 0.0, 4), (2, 3, 4, 0.6, 4, 0.6, 4),
        (3, 5, 5, 0.2, 5, 0.0, 5), (3, 5, 5, 0.2, 5, 0.25, -1), (3, 5, 5, 0.2, 5, 0.75, -1),
        (3, 5, 5, 0.2, 5, 0.2, 0),
    )  # fmt: skip
    table = attacked_accuracy(log, [0.0, 0.25, 0.75])
    # Image 2 is wrong at once, image 3 at its certified 0.2, image 0 at 0.75, image 1 never.
    assert table["value"].tolist() == [0.75, 0.5, 0.25]
    assert table["certified"].tolist() == [0.5, 0.25, 0.0]
    assert table["abstained"].tolist() == [0.25, 0.5, 0.5]
    assert (table["low"] < table["value"]).all()
    assert (table["high"] > table["value"]).all()
    assert table["n_images"].unique().tolist() == [4]


def test_soundness_judges_certificates_within_their_radii_alone():
    log = log_of(
        (0, 1, 1, 0.5, 1, 0.0, 1), (0, 1, 1, 0.5, 1, 0.25, 1), (0, 1, 1, 0.5, 1, 0.75, 0),
        (1, 2, -1, 0.0, 2, 0.0, 0),
        (2, 3, 4, 0.6, 3, 0.0, 4), (2, 3, 4, 0.6, 4, 0.6, -1),
        (3, 5, 5, 0.0, 5, 0.0, 0),
    )  # fmt: skip
    sound = soundness(log, 0.001, 0.001)
    assert (sound["n_images"], sound["certificates"], sound["attacks"]) == (4, 2, 2)
    assert sound["predictions"] == 4  # at radius 0 nothing is attacked, but an answer can be wrong
    assert (sound["broken"], sound["p_value"]) == (0, 1.0)
    broken = soundness(pd.concat([log, log_of((2, 3, 4, 0.6, 4, 0.6, 3))]), 0.001, 0.001)
    assert broken["broken"] == 1
    assert broken["p_value"] == pytest.approx(1 - (1 - 0.004) ** 4)


def test_without_certificates_there_is_nothing_to_break():
    found = soundness(log_of((0, 1, -1, 0.0, 1, 0.0, 1)), 0.001, 0.001)
    assert (found["certificates"], found["broken"], found["p_value"]) == (0, 0, 1.0)


def test_an_image_is_attacked_until_it_is_lost():
    log = pd.DataFrame({"idx": [4, 7, 9], "label": [1, 1, 0], "predict": [1, -1, 1]})
    log["radius"] = [0.5, 0.0, 0.3]
    images = at_distance(torch.tensor([1.0, 0.3, 0.6]))
    rows = attack_certificates(attack_on(Linear(), radii=[0.5, 0.7, 0.9]), images, log)
    found = rows.groupby("idx")["radius"].apply(lambda radii: sorted(radii.round(6)))
    # 9 is wrong without an attack; its certificate is attacked as 4's was at 0.5 already.
    assert found.to_dict() == {4: [0, 0.5, 0.7, 0.9], 7: [0, 0.5], 9: [0, 0.3]}
    assert rows.loc[rows["idx"] == 9, "target"].tolist() == [0, 1]
    assert rows.loc[(rows["idx"] == 7) & (rows["radius"] == 0.5), "predict"].item() == 0
    assert rows["distance"].to_numpy() == pytest.approx(rows["radius"].to_numpy(), rel=1e-5)


@pytest.fixture(scope="module")
def undefended(fetched):
    """A small network trained on clean Fashion-MNIST, and 60 test images with labels."""
    settings = DataSettings(name="fashion_mnist", directory=str(fetched.parent))
    data = load_data(settings)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for positions in torch.arange(20_000).split(100):
        optimizer.zero_grad()
        logits = network(data.train.batch(positions))
        nn.functional.cross_entropy(logits, data.train.labels[positions]).backward()
        optimizer.step()
    chosen = spread(len(data.test.labels), 60)
    network.eval().requires_grad_(False)
    return network, data.test.batch(chosen), data.test.labels[chosen]


def test_the_attack_breaks_an_undefended_model_where_random_steps_do_not(undefended):
    model, images, labels = undefended
    settings = AttackSettings(steps=8, n=128, batch_size=1024)
    attack = Attack(model, model, 10, 0.1, 11, "test", settings, 1024)
    radius, ids = 2.0, list(range(60))
    random = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    places = {
        "none": images,
        "random": images + radius * direction(random),
        "attack": attack.points(images, labels, torch.full((60,), radius), ids),
    }
    right = {
        name: int((torch.tensor(attack.predict(points, labels.tolist(), ids)) == labels).sum())
        for name, points in places.items()
    }
    assert right["none"] > 40
    assert right["random"] > 0.9 * right["none"]
    assert right["attack"] < 0.1 * right["none"]


METHODS = ("undefended", "undefended_model")


@pytest.fixture(scope="module")
def world(smoke_values, tmp_path_factory):
    """A finished experiment on random images: models, certificates and a section `attack`."""
    values = copy.deepcopy(smoke_values)
    values["backbone"] |= {"input_size": 56}
    values["backbone"]["arguments"] |= {"img_size": 56, "patch_size": 14}
    values["pretrain"]["images"] = 64
    values["certification"]["test_images"] = 6
    values["attack"] = {"radii": [0.25, 1.0], "steps": 2, "n": 64, "images": 4, "batch_size": 64}
    plain = values["methods"]["undefended"]
    resized = {**plain, "label": "at 56 pixels", "noise_resolution": "model"}
    values["methods"] = {"undefended": plain, "undefended_model": resized}
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 1, 28, 28), generator=generator, dtype=torch.uint8)
    split = ArraySplit(images, torch.randint(0, 10, (64,), generator=generator))
    data = Data("random", 10, (1, 28, 28), "d", split, split, split)
    experiment, folder = parse_experiment(values, "x"), tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        for module in ("jobs", "certification", "attacks"):
            patch.setattr(f"bench.{module}.load_data", lambda settings: data)
        pretrain(experiment, folder / "base")
        for method in METHODS:
            model, log = folder / method, folder / f"{method}.tsv"
            train(experiment, method, SIGMA, 0, folder / "base", model)
            certify_method(experiment, method, SIGMA, 0, model, log)
        yield experiment, folder


def attacked(world, method, certificates=None):
    experiment, folder = world
    output = folder / "attacks" / f"{method}.tsv"
    log = folder / f"{certificates or method}.tsv"
    attack_method(experiment, method, SIGMA, 0, folder / method, log, output)
    return output


def test_an_experiment_is_attacked_tabulated_and_drawn(world):
    experiment, folder = world
    logs = [attacked(world, method) for method in METHODS]
    for method, log in zip(METHODS, logs, strict=True):
        rows, sidecar = pd.read_csv(log, sep="\t"), read_json(log.with_suffix(".json"))
        certified = pd.read_csv(folder / f"{method}.tsv", sep="\t")
        assert set(rows["idx"]) <= set(certified["idx"])
        assert rows["idx"].nunique() == sidecar["n_images"] == 4
        assert (rows["distance"] <= rows["radius"] * (1 + 1e-5)).all()
        assert sidecar["seconds"] > 0
        assert sidecar["attack"]["radii"] == [0.25, 1.0]
    assert read_json(logs[1].with_suffix(".json"))["noise_resolution"] == "model"
    costs = [folder / method / "cost.json" for method in METHODS]
    build_tables(experiment, [folder / f"{m}.tsv" for m in METHODS], costs, folder / "tables")
    checks = build_attack_tables(experiment, logs, folder / "tables")
    assert checks["broken"].sum() == 0
    table = pd.read_csv(folder / "tables/attacks.csv")
    assert table["method"].tolist() == [m for m in METHODS for _ in range(3)]
    assert table["radius"].tolist() == [0.0, 0.25, 1.0] * 2
    assert (table["certified"] <= table["value"]).all()
    draw_attacks(experiment, folder / "tables", folder / "figures")
    assert plt.get_fignums() == []
    drawing = plt.imread(folder / "figures/attacks.png")
    assert drawing[..., :3].std() > 0.05
    assert "at 56 pixels" in (folder / "figures/attacks.svg").read_text()


def test_an_attack_is_repeatable(world):
    first = pd.read_csv(attacked(world, "undefended"), sep="\t")
    pd.testing.assert_frame_equal(pd.read_csv(attacked(world, "undefended"), sep="\t"), first)


def test_a_missing_or_foreign_log_is_named(world, tmp_path):
    experiment, folder = world
    for method in METHODS:
        attacked(world, method)
    shutil.copytree(folder / "attacks", tmp_path / "attacks")
    logs = [tmp_path / "attacks" / f"{method}.tsv" for method in METHODS]
    with pytest.raises(BenchError, match=r"undefended at sigma 0\.5, seed 0 has no results yet"):
        build_attack_tables(experiment, logs[1:], Path("nowhere"))
    with pytest.raises(BenchError, match=r"is of .*, not of another"):
        build_attack_tables(experiment.model_copy(update={"name": "another"}), logs, Path("no"))
    attack = experiment.attack_settings
    longer = experiment.model_copy(update={"attack": attack.model_copy(update={"steps": 3})})
    with pytest.raises(BenchError, match="steps of the attack is 2, the experiment has 3"):
        build_attack_tables(longer, logs, Path("nowhere"))
    with pytest.raises(BenchError, match="is no log of an attack"):
        build_attack_tables(experiment, [folder / "undefended.tsv"], Path("nowhere"))
    # Cut at the end of a line, where no image is missing but what became of one's certificate.
    logs[0].write_text("".join(logs[0].read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(BenchError, match=r"undefended\.tsv is missing or not what its"):
        build_attack_tables(experiment, logs, Path("nowhere"))


def test_an_attack_log_needs_its_ending(world):
    experiment, folder = world
    log = folder / "undefended.tsv"
    with pytest.raises(BenchError, match="must end in"):
        attack_method(experiment, "undefended", SIGMA, 0, log, log, folder / "attack.json")


def test_certificates_of_another_model_are_refused(world):
    with pytest.raises(BenchError, match="method is 'undefended_model', this run needs"):
        attacked(world, "undefended", certificates="undefended_model")
    _, folder = world
    sidecar = read_json(folder / "undefended.json")
    other = {**sidecar, "model_sha256": "of another training"}
    write_json(folder / "foreign.json", other)
    shutil.copy(folder / "undefended.tsv", folder / "foreign.tsv")
    with pytest.raises(BenchError, match="model_sha256 is 'of another training'"):
        attacked(world, "undefended", certificates="foreign")


def test_attacked_points_are_judged_in_the_batches_that_certified(world, monkeypatch):
    """Certification may have halved them to fit, and another shape may round differently."""
    _, folder = world
    sidecar = read_json(folder / "undefended.json")
    write_json(folder / "halved.json", {**sidecar, "batch_size": 64})
    shutil.copy(folder / "undefended.tsv", folder / "halved.tsv")
    sizes, run = [], attack_certificates

    def seen(attack, *rest):
        sizes.append(attack.batch_size)
        return run(attack, *rest)

    monkeypatch.setattr("bench.attacks.attack_certificates", seen)
    attacked(world, "undefended", certificates="halved")
    assert sidecar["batch_size"] > 64
    assert sizes == [64]


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"methods": ["nobody"]}, r"attack\.methods: nobody"),
        ({"sigmas": [0.3]}, r"attack\.sigmas: 0\.3"),
        ({"radii": [0.5, 0.25]}, "radii must increase"),
        ({"n": 10}, "raise n"),
        ({"draws": 16}, r"attack\.draws"),
        ({"batch_size": 32, "draws": 64}, "batch_size must hold"),
    ],
)
def test_a_mistake_in_the_section_is_named(smoke_values, section, named):
    with pytest.raises(BenchError, match=named):
        parse_experiment({**smoke_values, "attack": section}, "x")


def test_the_fingerprint_follows_what_defines_an_attack(smoke_values):
    def fingerprint(**section):
        experiment = parse_experiment({**smoke_values, "attack": section}, "x")
        return experiment.attack_fingerprint(0.5, 0)

    same = fingerprint()
    assert fingerprint(methods=["lora"], sigmas=[0.5]) == same
    assert fingerprint(steps=3) != same
    experiment = parse_experiment(smoke_values, "x")
    assert experiment.attacked() == []
    with pytest.raises(BenchError, match="no section `attack`"):
        experiment.attack_fingerprint(0.5, 0)
