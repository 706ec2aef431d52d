"""One battery for every kind: start, gradients, counts, round trip, merging; then the special."""

import json
import subprocess
import sys
from dataclasses import dataclass
from itertools import count
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bench.backbones import create_classifier, create_network, head_of
from bench.config import BackboneSettings, TrainingSettings
from bench.cost import parameter_counts
from bench.data import ArraySplit
from bench.errors import BenchError
from bench.jobs import merge, set_training_mode
from bench.model_folder import ClassifierSpec, Identity, load_classifier, save_model
from bench.parameterization_settings import (
    AdaLora,
    Adapter,
    Bias,
    Boft,
    Dora,
    FourierFt,
    Frozen,
    Full,
    Head,
    Hra,
    Ia3,
    LnTuning,
    Loha,
    Lokr,
    Lora,
    Oft,
    ParallelAdapter,
    Parameterization,
    Pissa,
    RsLora,
    Scratch,
    VbLora,
    Vera,
    VptDeep,
    VptShallow,
)
from bench.parameterizations import adapt, step_hook
from bench.parameterizations.tuners import TUNERS
from bench.settings import Settings
from bench.training import fit
from bench.training_state import TrainingState

WIDTH, DEPTH, CLASSES, HIDDEN, STEPS = 32, 2, 10, 64, 20
PATCH_VALUES, PATCHES = 49, 16
HEAD = WIDTH * CLASSES + CLASSES
TINY = {"img_size": 28, "patch_size": 7, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2}
TINY["mlp_ratio"] = 2
BACKBONE = BackboneSettings(timm="vit_tiny_patch16_224", arguments=TINY)
IDENTITY = Identity(experiment="e", method="m", sigma=0.5, seed=0, fingerprint="f")
# (inputs, outputs) of qkv, proj, fc1, fc2 in every block
LAYERS = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH)] * DEPTH
INPUTS, OUTPUTS = sum(i for i, _ in LAYERS), sum(o for _, o in LAYERS)
NORMS = (2 * DEPTH + 1) * 2 * WIDTH
BIASES = OUTPUTS + NORMS // 2 + WIDTH  # of layers, norms, patch embedding
EVERYTHING = (
    sum(i * o for i, o in LAYERS)
    + BIASES
    + NORMS // 2
    + PATCH_VALUES * WIDTH
    + (PATCHES + 2) * WIDTH  # positions and class token
)


def lora(r):
    return sum(r * (i + o) for i, o in LAYERS)


def bottleneck(b, width=WIDTH):
    return 2 * b * width + b + width


@dataclass(frozen=True)
class Case:
    """A kind, its trainable parameters without the head, and how far off it starts at most."""

    settings: Settings
    parameters: int
    start: float = 1e-6


CASES = [
    Case(Frozen(), 0),
    Case(Head(kind="head"), 0),
    Case(Full(kind="full"), EVERYTHING),
    Case(Scratch(kind="scratch"), EVERYTHING),
    Case(Bias(kind="bias"), BIASES),
    # Prompts are more tokens: no values of theirs leave the function as it is.
    Case(VptShallow(kind="vpt_shallow", prompts=5), 5 * WIDTH, start=1),
    Case(VptDeep(kind="vpt_deep", prompts=5), DEPTH * 5 * WIDTH, start=1),
    Case(Adapter(kind="adapter", bottleneck=8), DEPTH * 2 * bottleneck(8)),
    Case(ParallelAdapter(kind="parallel_adapter", bottleneck=8), DEPTH * bottleneck(8)),
    Case(Lora(kind="lora", r=4), lora(4)),
    Case(RsLora(kind="rslora", r=4), lora(4)),
    Case(Pissa(kind="pissa", r=4), lora(4)),
    Case(Dora(kind="dora", r=4), lora(4) + OUTPUTS),
    Case(AdaLora(kind="adalora", init_r=6, target_r=4), lora(6) + 6 * len(LAYERS)),
    Case(Ia3(kind="ia3"), DEPTH * (3 * WIDTH + HIDDEN)),
    Case(Oft(kind="oft", oft_block_size=8), INPUTS // 8 * (8 * 7 // 2)),
    Case(Boft(kind="boft", boft_block_size=4), INPUTS * 4 + OUTPUTS),
    Case(Vera(kind="vera", r=16), 16 * len(LAYERS) + OUTPUTS),
    Case(Loha(kind="loha", r=4), 2 * lora(4)),
    # A x (B C) per layer, of the factors nearest to square: 32 = 4 x 8, 64 = 8 x 8, 96 = 8 x 12
    Case(
        Lokr(kind="lokr", r=2),
        DEPTH * ((8 * 4 + 4 * 4 + 8 * 4 + 4 * 8) + 2 * ((12 + 8) + (8 + 8) + (8 + 8) + (8 + 8))),
    ),
    Case(FourierFt(kind="fourierft", n_frequency=50), 50 * len(LAYERS)),
    Case(LnTuning(kind="ln_tuning"), NORMS),
    Case(Hra(kind="hra", r=4), 4 * INPUTS),
    # A bank of zeros would get no gradients, so VB-LoRA starts from small random vectors.
    Case(
        VbLora(kind="vblora", num_vectors=16, vector_length=8),
        16 * 8 + (INPUTS + OUTPUTS) // 8 * 4 * 16,
        start=1e-2,
    ),
]
TRAINED = [case for case in CASES if not isinstance(case.settings, Frozen)]
PEFT = [case for case in CASES if type(case.settings) in TUNERS]


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.settings.kind)


def pooled(network, pixels):
    return network.forward_head(network.forward_features(pixels))


def adapted(settings):
    torch.manual_seed(0)
    classifier = create_classifier(BACKBONE, CLASSES, 1).eval()
    pixels = torch.rand(4, 1, 28, 28)
    before = classifier(pixels)
    classifier.network = adapt(classifier.network, settings, STEPS)
    return classifier.eval(), pixels, before


def train_a_little(module, run):
    trainable = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, 1e-2)
    for _ in range(3):
        run().logsumexp(1).mean().backward()
        assert all(p.grad is not None for p in trainable)
        optimizer.step()
        optimizer.zero_grad()


def save(folder, classifier, settings, adapter=None):
    spec = ClassifierSpec(
        data="d", classes=CLASSES, channels=1, backbone=BACKBONE, parameterization=settings
    )
    save_model(folder, classifier, spec, IDENTITY, {}, {}, adapter)


def trained_and_merged(settings):
    classifier, pixels, _ = adapted(settings)
    if not isinstance(settings, Frozen):
        train_a_little(classifier, lambda: classifier(pixels))
    adapter = classifier.network if type(settings) in TUNERS else None
    return classifier, merge(classifier, adapter).eval(), adapter, pixels


def test_the_battery_has_every_kind_once():
    kinds = get_args(get_args(Parameterization)[0])
    assert {type(case.settings) for case in CASES} == set(kinds)
    assert len(CASES) == len(kinds)


@each(CASES)
def test_starts_from_the_base(case):
    classifier, pixels, before = adapted(case.settings)
    assert (classifier(pixels) - before).abs().max() <= case.start


@each(CASES)
def test_trainable_parameters_follow_the_formula(case):
    classifier, _, _ = adapted(case.settings)
    counts = parameter_counts(classifier, classifier)
    head = 0 if isinstance(case.settings, Frozen) else HEAD
    assert counts["head_parameters"] == head
    assert counts["trainable_parameters"] == case.parameters + head


@each(TRAINED)
def test_training_changes_only_what_it_may(case):
    classifier, pixels, _ = adapted(case.settings)
    frozen = {n: p.clone() for n, p in classifier.named_parameters() if not p.requires_grad}
    before, head = classifier(pixels), head_of(classifier.network)
    heads = [p.clone() for p in head.parameters() if p.requires_grad]
    train_a_little(classifier, lambda: classifier(pixels))
    after = dict(classifier.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    now = [p for p in head.parameters() if p.requires_grad]
    assert not any(torch.equal(a, b) for a, b in zip(heads, now, strict=True))
    assert not torch.allclose(classifier(pixels), before)


@each(CASES)
def test_folder_round_trip_is_bit_equal(case, tmp_path):
    _, merged, adapter, pixels = trained_and_merged(case.settings)
    save(tmp_path, merged, case.settings, adapter)
    with torch.no_grad():
        assert torch.equal(load_classifier(tmp_path)(pixels), merged(pixels))
    assert not [p for p in tmp_path.iterdir() if p.suffix in (".pt", ".pth", ".pkl", ".bin")]
    # safetensors writes for the owner alone; who may read one file may read all.
    assert len({p.stat().st_mode for p in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        (Lora(kind="lora", r=4, lora_alpha=12), 12 / 4),
        (RsLora(kind="rslora", r=4, lora_alpha=12), 12 / 2),
        (ParallelAdapter(kind="parallel_adapter", bottleneck=8, scale=0.3), 0.3),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_what_is_added_is_scaled_as_published(settings, scale):
    classifier, _, _ = adapted(settings)
    block = classifier.network.blocks[0]
    tokens = torch.rand(2, 5, WIDTH)
    torch.manual_seed(1)
    with torch.no_grad():
        if isinstance(settings, ParallelAdapter):
            nn.init.normal_(block.mlp.side.up.weight)
            plain, added = block.mlp.main(tokens), block.mlp.side(tokens)
            found = block.mlp(tokens)
        else:
            layer = block.mlp.fc1
            nn.init.normal_(layer.lora_B["default"].weight)
            plain, found = layer.base_layer(tokens), layer(tokens)
            added = layer.lora_B["default"](layer.lora_A["default"](tokens))
    assert added.abs().max() > 0.1
    assert torch.allclose(found - plain, scale * added, atol=1e-5)


def block_input(block, run):
    """The tokens that `block` gets in a run."""
    seen = []
    hook = block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        run()
    hook.remove()
    (tokens,) = seen
    return tokens


def with_prompts_of(block, tokens):
    """The class token of `tokens`, the prompts of `block`, then the patches of `tokens`."""
    prompts = block.prompts.tokens.expand(len(tokens), 5, WIDTH)
    return torch.cat([tokens[:, :1], prompts, tokens[:, -PATCHES:]], dim=1)


@pytest.mark.parametrize(
    "settings",
    [VptShallow(kind="vpt_shallow", prompts=5), VptDeep(kind="vpt_deep", prompts=5)],
    ids=lambda settings: settings.kind,
)
def test_prompts_lie_between_the_class_token_and_the_patches(settings):
    classifier, pixels, _ = adapted(settings)
    block = classifier.network.blocks[0]
    tokens = block_input(block, lambda: classifier(pixels))
    torch.manual_seed(0)
    plain = create_classifier(BACKBONE, CLASSES, 1).eval()
    assert torch.equal(tokens, block_input(plain.network.blocks[0], lambda: plain(pixels)))
    found = block_input(block.block, lambda: classifier(pixels))
    assert torch.equal(found, with_prompts_of(block, tokens))


def test_deep_prompts_replace_those_of_the_block_before():
    classifier, pixels, _ = adapted(VptDeep(kind="vpt_deep", prompts=5))
    first, second = classifier.network.blocks
    tokens = block_input(second, lambda: classifier(pixels))
    found = block_input(second.block, lambda: classifier(pixels))
    assert torch.equal(found, with_prompts_of(second, tokens))
    assert tokens.shape == found.shape == (4, 1 + 5 + PATCHES, WIDTH)
    assert not torch.equal(second.prompts.tokens, first.prompts.tokens)


def test_pissa_takes_the_principal_part_out_of_the_base():
    classifier, _, _ = adapted(Pissa(kind="pissa", r=4))
    torch.manual_seed(0)
    base = create_classifier(BACKBONE, CLASSES, 1).network.blocks[0].mlp.fc1.weight
    layer = classifier.network.blocks[0].mlp.fc1
    values = torch.linalg.svdvals(base)
    left = torch.linalg.svdvals(layer.base_layer.weight)
    assert torch.allclose(left[: len(values) - 4], values[4:], atol=1e-4)


@each(PEFT)
def test_merging_keeps_the_function_and_leaves_a_plain_timm_model(case):
    classifier, merged, _, pixels = trained_and_merged(case.settings)
    # float32 sums in another order
    assert torch.allclose(merged(pixels), classifier(pixels), atol=1e-5)
    plain = create_classifier(BACKBONE, CLASSES, 1).state_dict()
    assert {k: v.shape for k, v in merged.state_dict().items()} == {
        k: v.shape for k, v in plain.items()
    }


PLAIN_SCRIPT = """
import json, sys
from pathlib import Path
sys.modules["bench"] = None  # importing it now fails
import peft, timm, torch
from safetensors.torch import load_file
root = Path(sys.argv[1])
given = load_file(root / "given.safetensors")
pixels = given.pop("pixels")
for folder in sorted(p for p in root.iterdir() if p.is_dir()):
    model = timm.create_model("vit_tiny_patch16_224", **json.loads(sys.argv[2]))
    model.load_state_dict(given)
    model = peft.PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        off = (model(pixels) - load_file(folder / "expected.safetensors")["logits"]).abs().max()
    print(folder.name, off.item())
"""


def test_adapters_load_with_timm_and_peft_alone(tmp_path):
    for case in PEFT:
        classifier, merged, adapter, _ = trained_and_merged(case.settings)
        folder = tmp_path / case.settings.kind
        save(folder, merged, case.settings, adapter)
        torch.manual_seed(1)
        pixels = torch.rand(4, 1, 28, 28)
        with torch.no_grad():
            logits = pooled(classifier.network, pixels)
        save_file({"logits": logits}, folder / "expected.safetensors")
    torch.manual_seed(0)
    base = create_network(BACKBONE, CLASSES, 1).state_dict()
    save_file({**base, "pixels": pixels}, tmp_path / "given.safetensors")
    arguments = json.dumps({**TINY, "in_chans": 1, "num_classes": CLASSES})
    command = [sys.executable, "-I", "-c", PLAIN_SCRIPT, str(tmp_path), arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    off = {name: float(value) for name, value in map(str.split, run.stdout.splitlines())}
    assert set(off) == {case.settings.kind for case in PEFT}
    assert max(off.values()) <= 1e-6, off


# Other backbones, tiny, and the kinds that do not fit them.
OTHERS = {
    "deit3_small_patch16_224": (TINY, ()),
    "vit_small_patch14_dinov2": (TINY, ()),
    "eva02_tiny_patch14_224": (TINY, ()),
    "beit_base_patch16_224": (TINY, (VptShallow, VptDeep)),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 28, "patch_size": 2, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 2]},
        (VptShallow, VptDeep),
    ),
    "convnext_tiny": (
        {"depths": [1, 1, 1, 1], "dims": [16, 16, 32, 32], "ls_init_value": 1.0, "patch_size": 1},
        (VptShallow, VptDeep, Adapter, Oft),
    ),
    "convnext_atto": (
        {"depths": [1, 1, 1, 1], "dims": [16, 16, 32, 32], "patch_size": 1},
        (VptShallow, VptDeep, Adapter, ParallelAdapter, Oft, Pissa, Vera, FourierFt, VbLora),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
@each(TRAINED)
def test_other_backbones(case, name):
    arguments, misfits = OTHERS[name]
    torch.manual_seed(0)
    network = create_network(BackboneSettings(timm=name, arguments=arguments), CLASSES, 1).eval()
    plain = set(network.state_dict())
    pixels = torch.rand(2, 1, 28, 28)
    before = pooled(network, pixels)
    if isinstance(case.settings, misfits):
        with pytest.raises(BenchError, match=rf"{case.settings.kind}.*{type(network).__name__}"):
            adapt(network, case.settings, STEPS)
        return
    network = adapt(network, case.settings, STEPS).eval()
    assert (pooled(network, pixels) - before).abs().max() <= case.start
    train_a_little(network, lambda: pooled(network, pixels))
    after = pooled(network, pixels)
    assert not torch.allclose(after, before)
    if type(case.settings) in TUNERS:
        merged = network.merge_and_unload()
        assert torch.allclose(pooled(merged, pixels), after, atol=1e-5)
        assert set(merged.state_dict()) == plain


def test_published_sizes_of_vit_b_16():
    def count(settings, classes=10):
        with torch.device("meta"):
            backbone = BackboneSettings(timm="vit_base_patch16_224")
            network = adapt(create_network(backbone, classes, 3), settings, STEPS)
        head = sum(p.numel() for p in head_of(network).parameters())
        return sum(p.numel() for p in network.parameters() if p.requires_grad) - head, head

    for prompts, expected in ((5, 46_080), (10, 92_160), (50, 460_800)):
        assert count(VptDeep(kind="vpt_deep", prompts=prompts)) == (expected, 7_690)
        assert count(VptShallow(kind="vpt_shallow", prompts=prompts)) == (prompts * 768, 7_690)
    for width, expected in ((8, 156_768), (64, 1_189_632), (96, 1_779_840)):
        settings = ParallelAdapter(kind="parallel_adapter", bottleneck=width)
        assert count(settings) == (expected, 7_690)
    assert count(Head(kind="head"), classes=1000) == (0, 769_000)


def test_networks_without_blocks_are_refused_with_a_cure():
    network = create_network(BackboneSettings(timm="resnet18"), CLASSES, 1)
    with pytest.raises(BenchError, match=r"'kind': 'lora'.*ResNet.*change its keys or its kind"):
        adapt(network, Lora(kind="lora"), STEPS)


def test_keys_that_do_not_fit_are_named():
    network = create_network(BACKBONE, CLASSES, 1)
    with pytest.raises(BenchError, match=r"'vector_length': 7.*divisible"):
        adapt(network, VbLora(kind="vblora", vector_length=7), STEPS)


class Interrupted(Exception):
    """Stands for a kill."""


def fitted(settings, state=None, stop=None):
    """A classifier after a training, which an interruption in step `stop` may cut off."""
    classifier, _, _ = adapted(settings)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8)
    split = ArraySplit(images, torch.arange(64) % CLASSES)
    budget = TrainingSettings(images=8 * STEPS, batch_size=8, precision="float32")
    steps = count()

    def loss(images, labels, noise, progress):
        if next(steps) == stop:
            raise Interrupted
        return nn.functional.cross_entropy(classifier(images), labels)

    fit(classifier, loss, split, budget, 1e-2, 0, step_hook(classifier.network), state)
    return classifier


@each(TRAINED)
def test_an_interrupted_training_goes_on_to_the_same_weights(case, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.training_state.SAVE_SECONDS", 0.0)
    with pytest.raises(Interrupted):
        fitted(case.settings, TrainingState(tmp_path, "m"), stop=12)
    resumed = fitted(case.settings, TrainingState(tmp_path, "m"))
    whole = fitted(case.settings).state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in resumed.state_dict().items())
    if isinstance(case.settings, AdaLora):
        pattern = resumed.network.peft_config["default"].rank_pattern
        assert sum(map(sum, pattern.values())) == 4 * len(LAYERS)


def test_adalora_ends_at_its_budget():
    classifier = fitted(AdaLora(kind="adalora", init_r=6, target_r=4))
    singular = [p for n, p in classifier.named_parameters() if ".lora_E." in n]
    assert sum(int((p != 0).sum()) for p in singular) == 4 * len(LAYERS)


def test_adalora_pulls_its_factors_to_orthogonality():
    """The hooks add what backward gives for peft's penalty."""
    classifier, pixels, _ = adapted(AdaLora(kind="adalora", init_r=6, target_r=4))
    factors = {n: p for n, p in classifier.named_parameters() if ".lora_A." in n or ".lora_B." in n}
    classifier(pixels).mean().backward()  # lora_E is zero: nothing else reaches the factors
    once = {name: factor.grad.clone() for name, factor in factors.items()}
    classifier(pixels).mean().backward()  # a second micro-batch of the same step
    assert all(torch.equal(factor.grad, once[name]) for name, factor in factors.items())
    for name, factor in factors.items():
        copy = factor.detach().requires_grad_()  # the hooks would act on the factor once more
        gram = copy @ copy.T if ".lora_A." in name else copy.T @ copy
        penalty = 0.1 * torch.norm(gram - torch.eye(6)) / len(factors)
        assert torch.allclose(factor.grad, torch.autograd.grad(penalty, copy)[0], atol=1e-7)


@pytest.mark.parametrize(("kind", "moves"), [(Head, False), (Full, True)])
def test_batch_statistics_of_a_frozen_network_stay(kind, moves):
    classifier = create_classifier(BackboneSettings(timm="resnet18"), CLASSES, 1)
    adapt(classifier.network, kind(kind=kind.__name__.lower()), 1)
    before = {k: v.clone() for k, v in classifier.named_buffers() if "running" in k}
    set_training_mode(classifier)
    classifier(torch.rand(2, 1, 64, 64))
    after = dict(classifier.named_buffers())
    assert all((not torch.equal(before[k], after[k])) == moves for k in before)
