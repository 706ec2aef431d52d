"""The classifier and its folder: what is refused, what is counted, what precision does."""

import shutil
import subprocess

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch._dynamo.utils import counters

from baselines.denoised_smoothing.dncnn import DnCNN
from bench.backbones import Classifier, compile_for_inference, create_classifier
from bench.certification import _sources
from bench.config import BackboneSettings, RemoteSettings, TrainingSettings
from bench.cost import count_flops, inference_flops, training_flops
from bench.errors import BenchError
from bench.files import read_json, write_json
from bench.model_folder import (
    ADAPTER_FILES,
    ClassifierSpec,
    Component,
    Identity,
    check_identity,
    load_classifier,
    save_model,
)
from bench.provenance import pick_device, pick_precision, provenance

WIDTH, DEPTH, CLASSES = 32, 2, 10
BACKBONE = BackboneSettings(
    timm="vit_tiny_patch16_224",
    arguments={
        "img_size": 28,
        "patch_size": 7,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": 2,
        "mlp_ratio": 2,
    },
)
BUDGET = TrainingSettings(images=100, batch_size=10)
IDENTITY = Identity(experiment="e", method="m", sigma=0.5, seed=0, fingerprint="f")


def base_classifier():
    torch.manual_seed(0)
    classifier = create_classifier(BACKBONE, CLASSES, 1).eval()
    pixels = torch.rand(4, 1, 28, 28)
    return classifier, pixels, classifier(pixels)


def save(folder, classifier):
    spec = ClassifierSpec(data="d", classes=CLASSES, channels=1, backbone=BACKBONE)
    save_model(folder, classifier, spec, IDENTITY, {}, {})


@pytest.mark.fault(
    fault="model folder of another job",
    stage="train, certify",
    outcome="refused: names the key that differs",
)
def test_changed_weights_and_foreign_folders_are_refused(tmp_path):
    classifier, _, _ = base_classifier()
    save(tmp_path, classifier)
    check_identity(tmp_path, IDENTITY)
    with pytest.raises(BenchError, match="method is 'm', this run needs 'other'"):
        check_identity(tmp_path, IDENTITY.model_copy(update={"method": "other"}))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(BenchError, match="changed or cut off"):
        load_classifier(tmp_path)
    weights.unlink()
    with pytest.raises(BenchError, match="missing"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("subprocess:Popen", "not part of bench"),
        ("bench.model_folder:save_file", "no network of this project"),
        ("bench.backbones:create_network", "no network of this project"),
        ("bench.lenet:nn.Linear", "cannot be built"),
        ("bench.backbones:BackboneSettings", "no network of this project"),
    ],
)
def test_folder_cannot_name_code_from_elsewhere(tmp_path, factory, message):
    """Nor anything else that a module of this project has imported or defined."""
    classifier, _, _ = base_classifier()
    save(tmp_path, classifier)
    spec = read_json(tmp_path / "classifier.json")
    written = tmp_path / "written"
    spec["denoiser"] = {
        "factory": factory,
        "arguments": {"tensors": {}, "filename": str(written)},
    }
    write_json(tmp_path / "classifier.json", spec)
    with pytest.raises(BenchError, match=message):
        load_classifier(tmp_path)
    assert not written.exists()


def test_a_retrained_folder_keeps_no_adapter_of_before(tmp_path):
    classifier, _, _ = base_classifier()
    for name in ADAPTER_FILES:
        (tmp_path / name).write_text("of another method")
    save(tmp_path, classifier)
    assert not [name for name in ADAPTER_FILES if (tmp_path / name).exists()]


def test_attention_of_diffusers_is_counted():
    attention = Attention(query_dim=8, heads=2, dim_head=4)
    tokens = torch.rand(1, 16, 8)
    dense, products = 4 * 2 * 16 * 8 * 8, 2 * 2 * 16 * 16 * 8
    assert count_flops(lambda: attention(tokens), attention) == dense + products


def test_unknown_timm_name_is_named():
    with pytest.raises(BenchError, match=r"backbone\.timm = 'vit_nowhere'"):
        create_classifier(BackboneSettings(timm="vit_nowhere"), 10, 1)


def test_flops_are_twice_the_multiply_accumulates():
    linear = torch.nn.Linear(8, 3)
    assert count_flops(lambda: linear(torch.zeros(5, 8)), linear) == 2 * 5 * 8 * 3
    classifier, _, _ = base_classifier()
    tokens = 17
    per_block = 2 * tokens * WIDTH * WIDTH * (3 + 1 + 2 * 2) + 2 * 2 * tokens * tokens * WIDTH
    patches = 2 * 16 * 49 * WIDTH
    expected = DEPTH * per_block + patches + 2 * WIDTH * CLASSES
    assert inference_flops(classifier, (1, 28, 28)) == expected


def test_bfloat16_keeps_the_head_in_float32():
    classifier, pixels, before = base_classifier()
    logits = classifier.for_inference("bfloat16")(pixels)
    assert logits.dtype == torch.float32
    assert classifier.network.head.weight.dtype == torch.float32
    assert classifier.network.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert torch.allclose(logits, before, atol=0.05)


def test_counting_training_flops_leaves_no_trace_in_batch_statistics():
    denoiser = DnCNN(channels=1, depth=4, width=8).train()
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}

    def loss(images, labels, noise, progress):
        return denoiser(images).square().mean()

    assert training_flops(loss, (1, 8, 8), BUDGET, denoiser) > 0
    assert all(torch.equal(before[name], value) for name, value in denoiser.state_dict().items())
    assert all(parameter.grad is None for parameter in denoiser.parameters())


class Product(torch.nn.Module):
    """A linear map whose matrix is put together in every pass, from two that are trained."""

    def __init__(self, width):
        super().__init__()
        self.left, self.right = (torch.nn.Parameter(torch.ones(width, width)) for _ in range(2))

    def forward(self, rows):
        return rows @ (self.left @ self.right)


@pytest.mark.parametrize(("micro", "passes"), [(None, 10), (4, 30)])
def test_what_a_pass_does_once_is_counted_once_a_pass(micro, passes):
    width, product = 8, Product(8)
    budget = BUDGET.model_copy(update={"micro_batch_size": micro})

    def loss(images, labels, noise, progress):
        return product(images.flatten(1)).square().mean()

    # The matrix forward and to either factor; every image forward and to the matrix.
    once, each = 3 * 2 * width**3, 2 * 2 * width**2
    counted = training_flops(loss, (1, 2, 4), budget, product)
    assert counted == passes * once + 100 * each


def test_counting_training_flops_draws_nothing_from_the_generator():
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(8, 1))

    def loss(images, labels, noise, progress):
        return classifier(images).mean()

    torch.manual_seed(0)
    before = torch.get_rng_state()
    training_flops(loss, (1, 2, 4), BUDGET, classifier)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_objective_that_pairs_images_cannot_be_counted():
    classifier = torch.nn.Linear(8, 8)

    def loss(images, labels, noise, progress):
        rows = classifier(images.flatten(1))
        return (rows @ rows.T).mean()

    with pytest.raises(BenchError, match="grow faster than its images"):
        training_flops(loss, (1, 2, 4), BUDGET, classifier)


def test_lenet_is_the_published_one():
    torch.manual_seed(0)
    lenet = BackboneSettings(timm="lenet")
    classifier = create_classifier(lenet, CLASSES, 1).eval()
    sizes = {name: tuple(p.shape) for name, p in classifier.network.named_parameters()}
    assert [size for name, size in sizes.items() if name.endswith("weight")] == [
        (20, 1, 5, 5),
        (50, 20, 5, 5),
        (500, 800),
        (10, 500),
    ]
    assert sum(p.numel() for p in classifier.parameters()) == 431_080
    pixels = torch.rand(4, 1, 28, 28)
    assert torch.allclose(classifier(pixels), classifier.network(pixels))  # pixels as they are
    convolutions = 20 * 25 * 24 * 24 + 50 * 20 * 25 * 8 * 8
    assert inference_flops(classifier, (1, 28, 28)) == 2 * (convolutions + 800 * 500 + 500 * 10)
    with pytest.raises(BenchError, match="no pretrained weights"):
        create_classifier(lenet.model_copy(update={"pretrained": True}), CLASSES, 1)


def test_lenet_folder_round_trip_is_bit_equal(tmp_path):
    classifier = create_classifier(BackboneSettings(timm="lenet"), CLASSES, 1).eval()
    pixels = torch.rand(4, 1, 28, 28)
    spec = ClassifierSpec(
        data="d", classes=CLASSES, channels=1, backbone=BackboneSettings(timm="lenet")
    )
    save_model(tmp_path, classifier, spec, IDENTITY, {}, {})
    with torch.no_grad():
        assert torch.equal(load_classifier(tmp_path)(pixels), classifier(pixels))


@pytest.mark.parametrize(
    ("asked", "able", "picked"),
    [
        ("auto", {"avx2": True, "amx_bf16": False}, "float32"),
        ("auto", {"avx512_bf16": True}, "bfloat16"),
        ("float32", {"avx512_bf16": True}, "float32"),
        ("bfloat16", {"avx2": True}, "bfloat16"),
    ],
)
def test_auto_precision_follows_the_hardware(monkeypatch, asked, able, picked):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert pick_precision(asked, torch.device("cpu")) == picked


def test_a_job_that_was_given_a_gpu_does_not_run_without_one():
    assert pick_device().type == "cpu"
    with pytest.raises(BenchError, match="gpus_per_job is 1 and torch sees no GPU"):
        pick_device(1)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_what_is_compiled_for_inference_is_not_compiled_again(monkeypatch):
    monkeypatch.setattr(torch._inductor.config, "freezing", False)
    monkeypatch.setattr(torch._inductor.config, "deterministic", False)
    torch._dynamo.reset()
    counters.clear()
    classifier = create_classifier(BackboneSettings(timm="lenet"), CLASSES, 1).eval()
    batch = torch.rand(2, 1, 28, 28)
    compile_for_inference(classifier, batch)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 0
    with torch.inference_mode():
        classifier(batch + torch.rand_like(batch))
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize("answer", ["absent", "refuses"])
def test_without_git_the_revision_is_unknown_and_not_clean(monkeypatch, answer):
    def run(command, **options):
        if answer == "absent":
            raise FileNotFoundError("git")
        return subprocess.CompletedProcess(command, 128, "", "dubious ownership")

    monkeypatch.setattr(subprocess, "run", run)
    found = provenance(torch.device("cpu"))
    assert (found["git_revision"], found["git_dirty"]) == ("unknown", None)


def test_models_of_the_same_weights_that_use_them_otherwise_are_told_apart():
    """Votes are kept and certificates attacked by this hash."""
    spec = ClassifierSpec(
        data="d", classes=2, channels=1, backbone=BackboneSettings(timm="lenet"), weights_sha256="w"
    )
    others = [
        {"weights_sha256": "v"},
        {"denoiser": Component(factory="bench.lenet:LeNet", arguments={"timestep": 3})},
        {"denoiser": Component(factory="bench.lenet:LeNet", arguments={"timestep": 4})},
        {"backbone": BackboneSettings(timm="lenet", arguments={"drop": 1})},
    ]
    found = {spec.model_copy(update=changes).answers_sha256 for changes in ({}, *others)}
    assert len(found) == 5
    served = [
        spec.model_copy(update={"backbone": RemoteSettings(url=url, model=model)}).answers_sha256
        for url, model in (("http://a", "m"), ("http://b", "m"), ("http://a", "n"))
    ]
    assert served[0] == served[1] != served[2]


def test_votes_are_kept_by_the_code_that_a_network_inherits_too():
    class Derived(Classifier):
        """As the classifier that is served."""

    layers = torch.nn.ModuleDict({"a": torch.nn.Identity()})
    seen = {path.name for path in _sources(Derived(layers, (0.0,), (1.0,)))}
    assert {"backbones.py", "certification.py", "engine.py"} <= seen
    assert not {"container.py", "test_models.py"} & seen
