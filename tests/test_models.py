"""Every parameterization: identity at the start, gradients, round trip, merging, counts."""

import pytest
import torch

from bench.backbones import create_classifier
from bench.config import (
    Adapter,
    BackboneSettings,
    Frozen,
    Full,
    Head,
    Lora,
    Scratch,
    VptDeep,
)
from bench.cost import count_flops, inference_flops, parameter_counts
from bench.errors import BenchError
from bench.files import read_json, write_json
from bench.jobs import merge
from bench.model_folder import (
    ClassifierSpec,
    Identity,
    check_identity,
    load_classifier,
    save_model,
)
from bench.parameterizations import adapt

WIDTH, DEPTH, CLASSES = 32, 2, 10
HEAD = WIDTH * CLASSES + CLASSES
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
# parameterization, same function at the start, trainable parameters without the head
KINDS = [
    (Frozen(), True, -HEAD),
    (Head(kind="head"), True, 0),
    (Full(kind="full"), True, None),
    (Scratch(kind="scratch"), True, None),
    (Lora(kind="lora", r=4), True, DEPTH * 4 * (4 + 2 + 3 + 3) * WIDTH),
    (VptDeep(kind="vpt_deep", prompts=5), False, DEPTH * 5 * WIDTH),
    (Adapter(kind="adapter", bottleneck=8), True, DEPTH * 2 * (2 * 8 * WIDTH + 8 + WIDTH)),
]
IDENTITY = Identity(experiment="e", method="m", sigma=0.5, seed=0, fingerprint="f")
names = [kind.kind for kind, _, _ in KINDS]


def classifier_with(kind):
    torch.manual_seed(0)
    classifier = create_classifier(BACKBONE, CLASSES, 1).eval()
    pixels = torch.rand(4, 1, 28, 28)
    before = classifier(pixels)
    classifier.network = adapt(classifier.network, kind)
    return classifier.eval(), pixels, before


def train_a_little(classifier, pixels):
    trainable = [p for p in classifier.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, 0.1)
    for _ in range(3):
        classifier(pixels).logsumexp(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def save(folder, classifier, kind, adapter=None):
    spec = ClassifierSpec(
        data="d", classes=CLASSES, channels=1, backbone=BACKBONE, parameterization=kind
    )
    save_model(folder, classifier, spec, IDENTITY, {}, {}, adapter)


@pytest.mark.parametrize(("kind", "same", "count"), KINDS, ids=names)
def test_starts_from_the_base(kind, same, count):
    classifier, pixels, before = classifier_with(kind)
    assert torch.allclose(classifier(pixels), before, atol=1e-6) == same


@pytest.mark.parametrize(("kind", "same", "count"), KINDS, ids=names)
def test_trainable_parameters_follow_the_formula(kind, same, count):
    classifier, _, _ = classifier_with(kind)
    counts = parameter_counts(classifier, classifier)
    everything = sum(p.numel() for p in create_classifier(BACKBONE, CLASSES, 1).parameters())
    expected = everything if count is None else count + HEAD
    assert counts["trainable_parameters"] == expected
    assert counts["head_parameters"] == (0 if kind.kind == "frozen" else HEAD)


@pytest.mark.parametrize(("kind", "same", "count"), KINDS[1:], ids=names[1:])
def test_training_changes_only_what_it_may(kind, same, count):
    classifier, pixels, _ = classifier_with(kind)
    frozen = {n: p.clone() for n, p in classifier.named_parameters() if not p.requires_grad}
    before = classifier(pixels)
    train_a_little(classifier, pixels)
    after = dict(classifier.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert not torch.allclose(classifier(pixels), before)


@pytest.mark.parametrize(("kind", "same", "count"), KINDS, ids=names)
def test_folder_round_trip_is_bit_equal(kind, same, count, tmp_path):
    classifier, pixels, _ = classifier_with(kind)
    if kind.kind != "frozen":
        train_a_little(classifier, pixels)
    adapter = classifier.network if kind.kind == "lora" else None
    merged = merge(classifier, adapter).eval()
    save(tmp_path, merged, kind, adapter)
    with torch.no_grad():
        assert torch.equal(load_classifier(tmp_path)(pixels), merged(pixels))
    assert not [p for p in tmp_path.iterdir() if p.suffix in (".pt", ".pth", ".pkl", ".bin")]


def test_lora_adapter_loads_with_peft_alone(tmp_path):
    from peft import PeftModel

    kind = Lora(kind="lora", r=4)
    classifier, pixels, _ = classifier_with(kind)
    base = create_classifier(BACKBONE, CLASSES, 1)
    torch.manual_seed(0)
    base = create_classifier(BACKBONE, CLASSES, 1).eval()
    train_a_little(classifier, pixels)
    merged = merge(classifier, classifier.network).eval()
    save(tmp_path, merged, kind, classifier.network)
    base.network = PeftModel.from_pretrained(base.network, tmp_path)
    with torch.no_grad():
        assert torch.allclose(base.eval()(pixels), merged(pixels), atol=1e-5)
        assert not torch.allclose(merged(pixels), classifier_with(Frozen())[2], atol=1e-3)
    plain = create_classifier(BACKBONE, CLASSES, 1).state_dict().keys()
    assert merged.state_dict().keys() == plain


def test_changed_weights_and_foreign_folders_are_refused(tmp_path):
    classifier, _, _ = classifier_with(Frozen())
    save(tmp_path, classifier, Frozen())
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


def test_folder_cannot_name_code_from_elsewhere(tmp_path):
    classifier, _, _ = classifier_with(Frozen())
    save(tmp_path, classifier, Frozen())
    spec = read_json(tmp_path / "classifier.json")
    spec["denoiser"] = {"factory": "subprocess:Popen", "arguments": {}}
    write_json(tmp_path / "classifier.json", spec)
    with pytest.raises(BenchError, match="not part of bench"):
        load_classifier(tmp_path)


def test_unknown_timm_name_is_named():
    with pytest.raises(BenchError, match=r"backbone\.timm = 'vit_nowhere'"):
        create_classifier(BackboneSettings(timm="vit_nowhere"), 10, 1)


def test_flops_are_twice_the_multiply_accumulates():
    linear = torch.nn.Linear(8, 3)
    assert count_flops(lambda: linear(torch.zeros(5, 8)), linear) == 2 * 5 * 8 * 3
    classifier, _, _ = classifier_with(Frozen())
    tokens = 17
    per_block = 2 * tokens * WIDTH * WIDTH * (3 + 1 + 2 * 2) + 2 * 2 * tokens * tokens * WIDTH
    patches = 2 * 16 * 49 * WIDTH
    expected = DEPTH * per_block + patches + 2 * WIDTH * CLASSES
    assert inference_flops(classifier, (1, 28, 28)) == expected


def test_bfloat16_keeps_the_head_in_float32():
    classifier, pixels, before = classifier_with(Frozen())
    logits = classifier.for_inference("bfloat16")(pixels)
    assert logits.dtype == torch.float32
    assert classifier.network.head.weight.dtype == torch.float32
    assert classifier.network.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert torch.allclose(logits, before, atol=0.05)


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
