"""The bill: FLOPs by hand and by real networks, draws in closed form, every seed and sigma."""

import itertools
import math
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from bench import expected, rates
from bench.backbones import create_classifier
from bench.config import BASE, Experiment, load_experiment, parse_experiment
from bench.cost import inference_flops, training_flops
from bench.data import describe
from bench.errors import BenchError
from bench.objectives import OBJECTIVES
from bench.objectives.noise import Batch
from bench.parameterizations import adapt
from bench.plan import Draws, build_plan, draws_at, plan, savings, stage_totals
from bench.provenance import pick_precision
from bench.rates import JOB_SECONDS, PEAKS, UTILISATION, Rate, datasheet_rate, stated_rate
from bench.smoothing.protocol import Protocol
from bench.weightless import follow, for_inference, without_weights

ROOT = Path(__file__).parents[1]
SHIPPED = sorted({path.stem for path in (ROOT / "config").glob("*.yaml")} - {"claims"})
RATE = Rate(2e12, 1e12, 5.0, "float32", "a test")


@pytest.fixture(autouse=True, scope="module")
def _few_repeats_and_one_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(expected, "REPEATS", 1)
        yield


def shallow(experiment: Experiment, depth: int = 1) -> Experiment:
    """The experiment on networks of one block: the same code, a tenth of the operations."""
    if experiment.backbone.timm == "lenet":
        return experiment
    update = {"arguments": {**experiment.backbone.arguments, "depth": depth}}
    backbone = experiment.backbone.model_copy(update=update)
    return experiment.model_copy(update={"backbone": backbone})


def vit_b16_flops(depth: int = 12, prompts: int = 0) -> int:
    """2 x multiply-accumulates of ViT-B/16 at 224 pixels with 10 classes, written out."""
    width, hidden, classes = 768, 3072, 10
    patches = 196 * (3 * 16 * 16) * width
    rows = 197 + prompts
    dense = rows * (width * 3 * width + width * width + 2 * width * hidden)
    attention = 2 * rows * rows * width
    return 2 * (patches + depth * (dense + attention) + width * classes)


@pytest.fixture(scope="module")
def vit_b16() -> tuple[pd.DataFrame, float]:
    """Three methods of cifar10.yaml, on three blocks of 12; draws of one image."""
    whole = shallow(load_experiment(ROOT / "config/cifar10.yaml"), depth=3)
    kept = {name: whole.methods[name] for name in ("undefended", "vpt_deep", "full_finetuning")}
    update = {"sigmas": [0.5], "methods": kept}
    table, draws = plan(whole.model_copy(update=update), RATE)
    return table.set_index(["stage", "method"]), draws[0.5].expected


def test_vit_b16_costs_what_its_formula_says(vit_b16):
    table, draws = vit_b16
    experiment = load_experiment(ROOT / "config/cifar10.yaml")
    assert vit_b16_flops() == 35_126_135_808
    flops = vit_b16_flops(depth=3)
    draws *= experiment.certification.test_images
    certified = table.loc["certify"]["evaluation_flops"]
    assert certified["undefended"] == pytest.approx(flops * draws)
    assert certified["vpt_deep"] == pytest.approx(vit_b16_flops(depth=3, prompts=10) * draws)
    validated = table.loc[("train", "undefended"), "evaluation_flops"]
    assert validated == flops * experiment.data.validation_images
    # Backward costs twice the forward pass, but pixels need no gradient.
    patches = 2 * 196 * 3 * 16 * 16 * 768
    images = experiment.training.images_seen
    trained = table.loc["train"]["training_flops"]
    assert trained["full_finetuning"] == (3 * flops - patches) * images
    assert trained["undefended"] == 0
    base = table.loc[("pretrain", "base")]
    assert base["training_flops"] == (3 * flops - patches) * experiment.pretrain.images_seen
    # Embeddings and last norm, blocks, head, in float32; with 12 blocks 85,798,656 and the head.
    assert 744_192 + 12 * 7_087_872 == 85_798_656
    assert base["disk_bytes"] == 4 * (744_192 + 3 * 7_087_872 + 7_690)


def test_hours_follow_from_the_rates_and_the_jobs(vit_b16):
    table, _ = vit_b16
    row = table.loc[("train", "full_finetuning")]
    seconds = row["training_flops"] / 2e12 + row["evaluation_flops"] / 1e12 + 5.0
    assert row["hours"] == pytest.approx(seconds / 3600)
    shards = load_experiment(ROOT / "config/cifar10.yaml").certification.shards
    certified = table.loc[("certify", "vpt_deep")]
    seconds = certified["evaluation_flops"] / 1e12 + shards * 5.0
    assert shards > 1
    assert certified["hours"] == pytest.approx(seconds / 3600)
    totals = stage_totals(table.reset_index()).set_index("stage")
    assert totals.loc["all", "hours"] == pytest.approx(table["hours"].sum())
    assert totals.loc["all", "memory_gib"] == table["memory_bytes"].max() / 2**30
    assert totals.loc["all", "disk_gib"] == table["disk_bytes"].sum() / 2**30
    flops = (table["training_flops"] + table["evaluation_flops"]).sum()
    assert totals.loc["all", "pflop"] == pytest.approx(flops / 1e15)


def test_draws_that_are_saved_save_no_starts_of_processes(smoke):
    # Two jobs of 5 s, and 10 s of 100 draws per image.
    row = {"stage": "certify", "evaluation_flops": 1e13, "jobs": 2, "hours": 20 / 3600}
    only = smoke.model_copy(update={"methods": {"lora": smoke.methods["lora"]}})
    said = savings(only, pd.DataFrame([row]), {0.5: Draws(100.0, 72_000)}, RATE)
    assert f"would then take {(7200 + 10) / 3600:.2f} hours instead of 0.01" in said


def test_the_bill_is_that_of_every_seed_and_sigma(smoke_values):
    names = ["lora", "denoised_smoothing_stability", "black_box", "diffusion_denoising"]
    methods = {name: smoke_values["methods"][name] for name in names}

    def bill(sigmas: list[float], seeds: list[int]) -> pd.DataFrame:
        changes = {"methods": methods, "sigmas": sigmas, "seeds": seeds}
        changes["tuning"] = {**smoke_values["tuning"], "sigma": sigmas[0]}
        table = plan(parse_experiment({**smoke_values, **changes}, "x"), RATE)[0]
        columns = ["jobs", "training_flops", "evaluation_flops", "disk_bytes"]
        chosen = table[table["stage"].isin(["train", "certify"])]
        return chosen.set_index(["stage", "method"])[columns]

    whole, one, other = bill([0.25, 0.5], [0, 1]), bill([0.25], [0]), bill([0.5], [3])
    expected, for_all_sigmas = 2 * (one + other), ("train", "diffusion_denoising (unet)")
    expected.loc[for_all_sigmas] = 2 * one.loc[for_all_sigmas]
    pd.testing.assert_frame_equal(whole, expected, check_dtype=False)


@pytest.mark.parametrize("name", ["lora", "vpt_deep", "adapter", "full_finetuning"])
def test_what_is_planned_is_what_jobs_count_on_real_weights(smoke, name):
    """`training_flops` and `inference_flops` write cost.json."""
    only = smoke.model_copy(update={"methods": {name: smoke.methods[name]}})
    table = plan(only, RATE)[0].set_index(["stage", "method"])
    point, data = smoke.methods[name], describe(smoke.data)
    classifier = create_classifier(smoke.backbone, data.classes, data.shape[0])
    classifier.network = adapt(classifier.network, point.parameterization, 10)

    def loss(images, labels, noise, progress):
        batch = Batch(images, labels, 0.5, noise, progress)
        return OBJECTIVES["cross_entropy"](classifier, batch, noises=1)

    counted = training_flops(loss, data.shape, smoke.training, classifier)
    assert table.loc[("train", name), "training_flops"] == counted
    network = classifier.network
    if hasattr(network, "merge_and_unload"):
        classifier.network = network.merge_and_unload()
    per_image = inference_flops(classifier.eval(), data.shape)
    validated = smoke.data.validation_images * per_image
    assert table.loc[("train", name), "evaluation_flops"] == validated


def unseen(experiment: Experiment, seen: set[str]) -> Experiment:
    """The experiment without methods of a make that is in `seen`, up to their sizes."""
    kept: list[str] = []
    route = f"{experiment.pretrain.data is None} {experiment.backbone.timm == 'lenet'} "
    for name, point in experiment.methods.items():
        make = f"{point.baseline} {point.parameterization.kind} {point.objective.kind} "
        make += f"{point.noise_resolution} {point.denoiser} {sorted(point.settings)} "
        make += route + f"{point.start} {point.train_sigma}"
        if make not in seen or point.surrogates:
            seen.add(make)
            kept.append(name)
    for name in kept:
        point = experiment.methods[name]
        others = [point.start, point.denoiser.of if point.denoiser else point.start]
        kept += [other for other in others if other != BASE and other not in kept]
    methods = {name: point for name, point in experiment.methods.items() if name in kept}
    return experiment.model_copy(update={"methods": methods})


@cache
def shipped_makes() -> dict[str, Experiment]:
    """Shipped experiments by name, each with the methods whose like no other before it has."""
    seen: set[str] = set()
    every = {name: load_experiment(ROOT / f"config/{name}.yaml") for name in SHIPPED}
    return {name: unseen(shallow(experiment), seen) for name, experiment in every.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_every_make_of_the_shipped_experiments_has_a_bill(name):
    experiment = shipped_makes()[name]
    if not experiment.methods:
        pytest.skip("the like of each of its methods is planned in others")
    table, draws = plan(experiment, RATE)
    certified = table[table["stage"] == "certify"].set_index("method")
    assert set(certified.index) == set(experiment.methods)
    jobs = len(experiment.points()) * experiment.certification.shards
    assert certified["jobs"].sum() == jobs
    assert (certified["evaluation_flops"] > 0).all()
    trained = table[table["stage"] == "train"].groupby("method")["training_flops"].sum()
    for method, point in experiment.methods.items():
        parts = [row for row in trained.index if row.split(" ")[0] == method]
        spent = trained[parts].sum()
        assert (spent > 0) == (point.trains and point.baseline != "black_box"), method
    assert all(draw.expected <= draw.fixed for draw in draws.values())


def test_an_experiment_all_from_scratch_has_a_bill_without_a_base():
    experiment = shallow(load_experiment(ROOT / "config/fashion_mnist_regularised.yaml"))
    totals = stage_totals(plan(experiment, RATE)[0]).set_index("stage")
    assert totals.loc["pretrain", "jobs"] == 0
    assert totals.loc["all", "hours"] == pytest.approx(totals.drop("all")["hours"].sum())


def test_a_denoiser_of_another_method_counts_in_front():
    experiment = load_experiment(ROOT / "config/denoisers.yaml")
    shared = {n: m.denoiser.of for n, m in experiment.methods.items() if m.denoiser}
    name, source = next((n, of) for n, of in shared.items() if not experiment.methods[n].baseline)
    kept = {key: experiment.methods[key] for key in (name, source)}
    only = shallow(experiment.model_copy(update={"methods": kept, "sigmas": [0.5]}))
    certified = plan(only, RATE)[0].query("stage == 'certify'").set_index("method")
    assert certified.loc[name, "evaluation_flops"] == certified.loc[source, "evaluation_flops"]


def protocol(**changes) -> Protocol:
    values = {"sigma": 0.5, "mode": "decide", "radii": (0.0, 0.5), "n": 1000, "horizon": 1000}
    return Protocol(**{**values, **changes})


def test_a_surrogate_that_is_the_base_again_costs_what_the_base_does(smoke_values):
    stability = {
        "label": "stability", "family": "denoiser", "baseline": "denoised_smoothing",
        "settings": {"depth": 3, "width": 8, "objective": "stability"}, "learning_rate": 1.0e-3,
    }  # fmt: skip
    methods = {"own": stability, "twin": {**stability, "label": "t", "surrogates": ["again"]}}
    backbone = smoke_values["backbone"]
    # Drop-out takes nothing; the very backbone that is certified would be refused.
    again = {**backbone, "arguments": {**backbone["arguments"], "drop_rate": 0.1}}
    values = {**smoke_values, "methods": methods, "surrogates": {"again": again}}
    table = plan(parse_experiment(values, "x"), RATE)[0].set_index(["stage", "method"])
    own, twin = (table.loc[("train", name), "training_flops"] for name in methods)
    assert own == twin > 0


def test_draws_are_exact_where_chance_has_no_part():
    sure, never = np.ones(3), np.zeros(3)
    assert expected.expected_draws(protocol(mode="cohen"), sure) == 1100
    assert expected.expected_draws(protocol(mode="cohen", candidate="label"), sure) == 1000
    assert expected.expected_draws(protocol(mode="predict"), never) == 1000
    # All wrong is hopeless at the first look; all right ends where the farther radius is certain.
    assert expected.expected_draws(protocol(candidate="label"), never) == 32
    votes = math.log(0.001) / math.log(0.8413)
    right = expected.expected_draws(protocol(candidate="label"), sure)
    assert votes < right <= 2 * votes
    assert expected.expected_draws(protocol(), sure) == right + 100


@pytest.mark.parametrize(
    ("mode", "candidate", "fixed"),
    [
        ("decide", "pilot", 64 + 32),
        ("decide", "label", 64),
        ("radius", "label", 64 + 32),
        ("predict", "pilot", 64),
    ],
)
def test_a_fixed_number_has_a_pilot_where_there_is_one(smoke, mode, candidate, fixed):
    update = {"mode": mode, "candidate": candidate}
    settings = smoke.certification.model_copy(update=update)
    asked = smoke.model_copy(update={"certification": settings})
    assert draws_at(asked, 0.5).fixed == fixed


def test_easier_images_and_coarser_grids_take_fewer_draws():
    easy, hard = np.array([0.99]), np.array([0.86])
    assert expected.expected_draws(protocol(), easy) < expected.expected_draws(protocol(), hard)
    coarse = protocol(radii=(0.0,))
    assert expected.expected_draws(coarse, hard) < expected.expected_draws(protocol(), hard)


def test_the_assumed_images_take_what_cohens_do(monkeypatch):
    """Replayed image by image, the CIFAR-10 and the ImageNet log at each sigma need so many."""
    monkeypatch.setattr(expected, "REPEATS", 10)
    experiment = load_experiment(ROOT / "config/cifar10.yaml")
    coarse = experiment.model_copy(update={"radius_step": 0.25})
    for sigma, logs in {0.25: (6_181, 6_192), 0.5: (9_366, 16_931), 1.0: (11_716, 18_129)}.items():
        assert 0.75 * min(logs) < draws_at(coarse, sigma).expected < 1.25 * max(logs)


class Square(nn.Module):
    """y = x W with W 8 x 8."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 8))

    def forward(self, x):
        return x @ self.weight


def test_memory_is_the_peak_of_what_lives_at_once():
    module = without_weights(Square())

    def forward():
        with torch.no_grad():
            first = module(torch.zeros(4, 8))
            second = module(first)
            del first
            module(second)

    taken = follow(forward, "float32", module)
    assert taken.flops == 3 * 2 * 4 * 8 * 8
    # At most input, first and second, or two of them: 4 x 8 floats each.
    assert taken.peak_bytes == 2 * 4 * 8 * 4 or taken.peak_bytes == 3 * 4 * 8 * 4
    half = follow(lambda: module(torch.zeros(4, 8)), "bfloat16", module)
    assert half.flops == 2 * 4 * 8 * 8


def test_memory_grows_with_the_micro_batch_alone(smoke_values):
    peaks = {}
    for batch, micro in ((256, None), (256, 64), (64, None)):
        values = {**smoke_values, "methods": {"lora": smoke_values["methods"]["lora"]}}
        values["training"] = {"images": 256, "batch_size": batch, "micro_batch_size": micro}
        table = plan(parse_experiment(values, "x"), RATE)[0].set_index(["stage", "method"])
        peaks[batch, micro] = table.loc[("train", "lora"), "memory_bytes"]
    assert peaks[256, 64] == peaks[64, None]
    assert peaks[256, None] > 2 * peaks[256, 64]


def test_a_base_that_nothing_starts_from_costs_nothing(smoke_values):
    methods = smoke_values["methods"]
    scratch = {"gaussian_retraining": methods["gaussian_retraining"]}
    for chosen, stages in ((scratch, 0), ({**scratch, "lora": methods["lora"]}, 1)):
        table, _ = plan(parse_experiment({**smoke_values, "methods": chosen}, "x"), RATE)
        assert (table["stage"] == "pretrain").sum() == stages


@pytest.mark.parametrize(
    ("baseline", "named"),
    [
        (
            "gaussian_retraining",
            "methods.mine.parameterization trains nothing: set it",
        ),
        (
            "gaussian_retrain",
            "mine.baseline: there is no baselines/gaussian_retrain/rules",
        ),
    ],
)
def test_a_baseline_that_cannot_be_planned_is_named(smoke_values, baseline, named):
    mine = {"label": "m", "family": "f", "baseline": baseline, "learning_rate": 0.1}
    experiment = parse_experiment({**smoke_values, "methods": {"mine": mine}}, "x")
    with pytest.raises(BenchError, match=named):
        plan(experiment, RATE)


def test_inference_halves_the_network_but_not_the_head(smoke):
    data = describe(smoke.data)
    classifier = create_classifier(smoke.backbone, data.classes, data.shape[0])
    for_inference(without_weights(classifier), "bfloat16")
    kinds = {name: p.dtype for name, p in classifier.network.named_parameters()}
    assert kinds.pop("head.weight") == kinds.pop("head.bias") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}


def test_a_backbone_for_images_of_another_size_is_told(smoke_values):
    backbone = smoke_values["backbone"]
    larger = {**backbone, "arguments": {**backbone["arguments"], "img_size": 32}}
    experiment = parse_experiment({**smoke_values, "backbone": larger}, "x")
    message = r"backbone\.arguments and backbone\.input_size: .* cannot take images 1 x 28 x 28"
    with pytest.raises(BenchError, match=message):
        plan(experiment, RATE)
    with pytest.raises(BenchError, match=message):
        rates.measured_rate(experiment)
    scratch = {n: m for n, m in smoke_values["methods"].items() if n == "gaussian_retraining"}
    values = {**smoke_values, "backbone": larger, "methods": scratch}
    with pytest.raises(BenchError, match=message):
        plan(parse_experiment(values, "x"), RATE)


def test_rates_say_where_they_come_from(smoke, tmp_path):
    rate = datasheet_rate("h100")
    assert rate.training == UTILISATION * PEAKS["h100"] == 0.4 * 989e12
    assert "datasheet" in rate.source
    assert rate.job_seconds == JOB_SECONDS
    assert stated_rate(1e11).inference == 1e11
    with pytest.raises(BenchError, match=r"--gpu h900 is not known \(h100, "):
        datasheet_rate("h900")
    with pytest.raises(BenchError, match=r"--rate 0\.0: .* above 0"):
        stated_rate(0.0)
    only = smoke.model_copy(update={"methods": {"lora": smoke.methods["lora"]}})
    lines = build_plan(only, rate, tmp_path / "bill.csv")
    assert "Cohen" in lines[-2]
    assert lines[-1].startswith("attacks are billed as processes alone")
    written = pd.read_csv(tmp_path / "bill.csv")
    assert list(written["stage"].unique()) == ["pretrain", "train", "certify", "other"]
    assert set(written["rate"]) == {rate.source}


def test_folders_of_images_are_counted_only_when_they_are_there(smoke_values, tmp_path):
    values = {**smoke_values}
    values["data"] = {"name": "image_folder", "directory": str(tmp_path), "image_size": 28}
    with pytest.raises(BenchError, match="holds no images: bring the data first"):
        plan(parse_experiment(values, "x"), RATE)


def test_a_measured_rate_is_of_this_machine_and_its_own_passes(smoke, monkeypatch):
    monkeypatch.setattr(rates, "MEASURED_SECONDS", 0.01)
    monkeypatch.setattr(rates, "START", "pass")
    ticks = itertools.count()
    monkeypatch.setattr(rates.time, "perf_counter", lambda: float(next(ticks)))
    automatic = pick_precision("auto", torch.device("cpu"))
    [other] = {"float32", "bfloat16"} - {automatic}
    training = smoke.training.model_copy(update={"precision": other})
    rate = rates.measured_rate(smoke.model_copy(update={"training": training}))
    assert rate.precision == automatic
    data = describe(smoke.data)
    network = create_classifier(smoke.backbone, data.classes, data.shape[0])
    flops = inference_flops(network.eval(), data.shape)
    # One pass of a batch in a second of this clock.
    assert rate.inference == flops * smoke.training.batch_size
    assert rate.training == 3 * rate.inference
    assert rate.job_seconds == 1
    assert rate.source.startswith("measured here (")
