"""The paper-scale experiments at toy size: same classes of networks, random weights, own data."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

from baselines.command import BaselineJob
from baselines.denoised_smoothing.train import train_denoiser
from baselines.diffusion_denoising.assemble import assemble
from baselines.diffusion_denoising.train import train_unet
from bench import expected
from bench.accounting import DDPM_CIFAR10, GUIDED_DIFFUSION_256
from bench.accounting import GUIDED_DIFFUSION_256_PARAMETERS as GUIDED_PARAMETERS
from bench.config import BackboneSettings, load_experiment
from bench.data import fetch, load_data
from bench.errors import BenchError
from bench.files import sha256_file
from bench.jobs import _starting_point, pretrain, train
from bench.model_folder import load_classifier, read_spec
from bench.plan import plan
from bench.rates import datasheet_rate
from bench.resolution import resized

ROOT = Path(__file__).parents[1]
TINY_VIT = {"img_size": 48, "embed_dim": 32, "depth": 1, "num_heads": 2}
TINY_UNET = {"layers_per_block": 1, "attn_norm_num_groups": 8, "norm_num_groups": 8}
# The rules that go with these backbones; all methods are trained below, all rules run in
# test_workflow.
THROUGH_THE_DAG = {
    "cifar10": ["lora_model", "denoised_smoothing_stability"],
    "imagenet": ["vpt_deep", "diffusion_denoising"],
}


@pytest.fixture(autouse=True)
def _few_repeats(tmp_path, monkeypatch):
    monkeypatch.setattr(expected, "REPEATS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def write_cifar(folder: Path) -> None:
    """Files of CIFAR-10's own format with ten random images each."""
    chance = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        rows = chance.integers(0, 256, (10, 1 + 3072), dtype=np.uint8)
        rows[:, 0] = np.arange(10)
        rows.tofile(folder / name)


def write_imagenet(folder: Path) -> None:
    """Photographs of no known size, in three class folders."""
    chance = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 4)):
        for name in ("n01440764", "n01443537", "n01484850"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = chance.integers(0, 256, (70, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.JPEG")


def write_unet(folder: Path, config: dict, size: int) -> None:
    """A diffusers folder with the block types of a published model, a few channels wide."""
    torch.manual_seed(0)
    stages = len(config["block_out_channels"])
    small = {**config, **TINY_UNET, "sample_size": size, "block_out_channels": (16,) * stages}
    if config["attention_head_dim"]:
        small["attention_head_dim"] = 8
    unet = UNet2DModel(**small)
    assert {type(block).__name__ for block in unet.down_blocks} == set(config["down_block_types"])
    unet.save_pretrained(folder / "unet")
    DDPMScheduler(num_train_timesteps=1000).save_pretrained(folder / "scheduler")


def toy_values(name: str, folder: Path) -> dict:
    """The shipped experiment with everything that takes time cut down, its data in `folder`."""
    values = yaml.safe_load((ROOT / f"config/{name}.yaml").read_text())
    values |= {"sigmas": [0.5], "radius_step": 0.25, "threads_per_job": 1, "gpus_per_job": 0}
    values["data"] |= {"directory": str(folder / "data"), "validation_images": 8}
    values["backbone"] |= {"arguments": TINY_VIT, "input_size": 48, "pretrained": False}
    values["pretrain"]["images"] = min(16, values["pretrain"]["images"])
    for budget in (
        values["training"],
        *(m.get("training", {}) for m in values["methods"].values()),
    ):
        budget |= {key: 16 for key in ("images", "batch_size") if key in budget}
        budget |= {key: 8 for key in ("micro_batch_size",) if key in budget}
    small = {"n0": 8, "n": 32, "horizon": 32, "test_images": 4, "batch_size": 32}
    values["certification"] |= {**small, "shards": min(2, values["certification"]["shards"])}
    for method in values["methods"].values():
        if method.get("baseline") == "denoised_smoothing" and "denoiser" not in method:
            method["settings"] |= {"depth": 3, "width": 8}
    values["methods"]["diffusion_denoising"]["settings"]["pretrained"] = str(folder / "unet")
    return values


def toy(name: str, folder: Path) -> dict:
    """Values of the toy experiment, with data and diffusion model in place."""
    values = toy_values(name, folder)
    if name == "cifar10":
        write_cifar(folder / "data/cifar10")
        write_unet(folder / "unet", DDPM_CIFAR10, 32)
        # One shard here, two on ImageNet: both ways through the DAG.
        values["certification"]["shards"] = 1
    else:
        values["data"]["image_size"] = 64
        write_imagenet(folder / "data/imagenet")
        write_unet(folder / "unet", GUIDED_DIFFUSION_256, 64)
    return values


@pytest.mark.workflow
@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_a_toy_run_goes_through_the_whole_workflow(name, tmp_path, sources):
    values = toy(name, tmp_path)
    values["methods"] = {key: values["methods"][key] for key in THROUGH_THE_DAG[name]}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    # A copy, since a commit in this checkout meanwhile would tell the shards of a run apart.
    command = [sys.executable, "-m", "snakemake", "--cores", "2"]
    command += ["--configfile", str(tmp_path / "toy.yaml")]
    done = subprocess.run(command, cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    curves = pd.read_csv(sources / f"results/{name}/tables/certified_accuracy.csv")
    assert list(curves["method"].unique()) == THROUGH_THE_DAG[name]
    assert (curves["n_images"] == 4).all()
    made = load_classifier(
        sources / f"results/{name}/models/{THROUGH_THE_DAG[name][1]}/sigma_0.50/seed_0"
    )
    assert type(made.network).__name__ == "VisionTransformer"
    assert made.denoiser is not None


@pytest.fixture(scope="module", params=["cifar10", "imagenet"])
def pretrained(request, tmp_path_factory):
    """A toy experiment with its base: (experiment, base folder, data)."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "toy.yaml").write_text(yaml.safe_dump(toy(request.param, folder)))
    experiment = load_experiment(folder / "toy.yaml")
    fetch(experiment.data)
    pretrain(experiment, folder / "models/base")
    return experiment, folder / "models/base", load_data(experiment.data)


def model_of(base: Path, method: str) -> Path:
    """Where the toy experiment's model of one method lies."""
    return base.parent / method / "sigma_0.50/seed_0"


def test_every_method_trains_at_toy_size(pretrained):
    experiment, base, data = pretrained
    for name, point in experiment.methods.items():
        output = model_of(base, name)
        shared = model_of(base, point.denoiser.of) if point.denoiser else None
        job = BaselineJob(experiment, name, 0.5, 0, output, base, data, torch.device("cpu"), shared)
        if point.baseline == "denoised_smoothing":
            train_denoiser(job)
        elif point.baseline == "diffusion_denoising":
            unet = base.parent / name / "unet/seed_0"
            train_unet(BaselineJob(experiment, name, 0.0, 0, unet, base, data, job.device))
            assemble(job)
        else:
            scratch = point.parameterization.kind == "scratch"
            train(experiment, name, 0.5, 0, None if scratch else base, output)
        spec = read_spec(output)
        assert spec.noise_resolution == point.noise_resolution
        pixels = resized(data, spec.noise_size).test.batch(torch.tensor([0]))
        assert load_classifier(output)(pixels).isfinite().all()


def test_a_base_without_training_is_the_backbone_as_it_comes(pretrained):
    experiment, base, _ = pretrained
    report = json.loads((base / "training.json").read_text())
    cost = json.loads((base / "cost.json").read_text())
    assert (report["images"] == 0) == (experiment.pretrain.images == 0)
    assert (cost["training_flops"] == 0) == (experiment.pretrain.images == 0)
    assert cost["inference_flops"] > 0


@pytest.mark.workflow
@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_a_dry_run_lists_every_job_of_the_bill(name, tmp_path):
    command = [sys.executable, "-m", "snakemake", "-n", "--cores", "1", "--quiet", "rules"]
    command += ["--directory", str(tmp_path), "--snakefile", str(ROOT / "Snakefile")]
    command += ["--configfile", str(ROOT / f"config/{name}.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    counts = {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", said, re.M)}
    experiment = load_experiment(ROOT / f"config/{name}.yaml")
    backbone = BackboneSettings(timm="vit_base_patch16_224", arguments={"depth": 1}, input_size=224)
    table, _ = plan(experiment.model_copy(update={"backbone": backbone}), datasheet_rate("h100"))
    bill = table.groupby("stage")["jobs"].sum()
    trained = [count for rule, count in counts.items() if rule.startswith(("train", "assemble"))]
    assert bill["train"] == sum(trained)
    assert bill["pretrain"] == counts["pretrain"] == 1
    assert bill["certify"] == counts["certify_shard"] == 4 * len(experiment.points())
    # `all` is a job to Snakemake alone.
    assert bill.sum() == counts["total"] - counts["all"]


def test_the_256_pixel_model_is_guided_diffusions_without_its_variance():
    with torch.device("meta"):
        ours = sum(p.numel() for p in UNet2DModel(**GUIDED_DIFFUSION_256).parameters())
    variance = 3 * (3 * 3 * 256 + 1)
    assert ours == GUIDED_PARAMETERS - variance


def test_scratch_is_random_however_the_base_came(pretrained, monkeypatch):
    """Retraining from scratch must not start from the weights that the base was fetched with."""
    experiment, _, data = pretrained
    backbone = experiment.backbone.model_copy(update={"pretrained": True})
    asked = []
    monkeypatch.setattr(
        "bench.jobs.create_classifier", lambda settings, *_: asked.append(settings.pretrained)
    )
    own = experiment.model_copy(update={"backbone": backbone})
    scratch = {n for n, m in own.methods.items() if m.parameterization.kind == "scratch"}
    for name in scratch:
        with pytest.raises(AttributeError):
            _starting_point(own, name, 0.5, 0, None, data)
    assert asked == [False] * len(scratch)


HUB_SCRIPT = """
import json, sys
from pathlib import Path
import timm
from bench.config import load_experiment
from bench.data import fetch
from bench.errors import BenchError
from bench.files import sha256_file
from bench.jobs import pretrain
experiment = load_experiment(Path(sys.argv[1]))
fetch(experiment.data)
try:
    pretrain(experiment, Path(sys.argv[2]))
except BenchError as error:
    sys.exit(f"error: {error}")
"""


def write_hub_cache(home: Path, name: str) -> dict[str, torch.Tensor]:
    """What the hub's client leaves of a timm model in HF_HOME, with random weights."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(1)
    weights = timm.create_model(name).state_dict()
    repository = home / f"hub/models--timm--{name}"
    snapshot = repository / "snapshots/0123456789012345678901234567890123456789"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(snapshot.name)
    save_file(weights, snapshot / "model.safetensors")
    return weights


@pytest.mark.workflow
def test_weights_come_from_hf_home_without_a_network_and_are_named_by_hash(tmp_path):
    name = "test_vit.r160_in1k"
    values = toy("cifar10", tmp_path)
    values["backbone"] = {"timm": name, "pretrained": True, "input_size": 160}
    values["pretrain"] = {"images": 0}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(values))
    weights = write_hub_cache(tmp_path / "home", name)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

    def run(home: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", HUB_SCRIPT, "toy.yaml", "base"]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True,
            env={**environment, "HF_HOME": str(home)},
        )  # fmt: skip

    elsewhere = run(tmp_path / "empty")
    assert elsewhere.returncode == 1
    assert (
        "backbone.pretrained: the weights of test_vit.r160_in1k cannot be fetched"
        in elsewhere.stderr
    )
    assert not (tmp_path / "base").exists()
    done = run(tmp_path / "home")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "base/training.json").read_text())
    (file,) = (tmp_path / "home").rglob("model.safetensors")
    wanted = {"source": f"timm/{name}", "sha256": sha256_file(file)}
    assert report["initial_weights"] == wanted
    kept = load_classifier(tmp_path / "base").network.state_dict()
    assert torch.equal(kept["blocks.0.attn.qkv.weight"], weights["blocks.0.attn.qkv.weight"])


def test_a_pretrain_rate_is_there_exactly_where_images_are(pretrained):
    experiment, _, _ = pretrained
    kind = type(experiment.pretrain)
    assert kind(images=0).learning_rate is None
    with pytest.raises(ValueError, match="learning_rate is missing"):
        kind(images=10)
    with pytest.raises(ValueError, match="0 images train nothing"):
        kind(images=0, learning_rate=0.1)


def test_unknown_sizes_of_diffusion_models_are_refused(pretrained):
    experiment, _, _ = pretrained
    point = experiment.methods["diffusion_denoising"]
    nowhere = point.model_copy(update={"settings": {"pretrained": "nowhere"}})
    data = experiment.data.model_copy(update={"name": "imagenet", "image_size": 64})
    changed = experiment.model_copy(
        update={"methods": {"diffusion_denoising": nowhere}, "data": data}
    )
    with pytest.raises(BenchError, match=r"settings\.pretrained: nowhere is no folder here"):
        plan(changed, datasheet_rate("a100"))
