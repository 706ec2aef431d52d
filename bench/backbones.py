"""A timm model with its preprocessing is a classifier of native pixels."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bench.config import BackboneSettings
from bench.errors import BenchError
from bench.files import sha256_file
from bench.memory import out_of_memory
from bench.resolution import resize

# Components named in a model folder come from this checkout, never from elsewhere.
TRUSTED_PACKAGES = ("bench.", "baselines.")
# What decides on the size of the images that the network of an experiment sees and takes.
IMAGE_KEYS = "backbone.arguments and backbone.input_size"


class Classifier(nn.Module):
    """Denoise, resize, normalise, classify; noise enters before all of it.

    `forward` maps `(B, C, H, W)` float32 pixels in [0, 1] plus noise, never clamped, to
    `(B, K)` float32 logits. A denoiser may offer V images for each, `(V, B, C, H, W)`: their
    classes are then put to the vote.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        input_size: int | None = None,
        denoiser: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.network = network
        self.input_size = input_size
        shape = (1, len(mean), 1, 1)
        self.register_buffer("mean", torch.tensor(mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(shape), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits `(B, K)` in float32."""
        if self.denoiser is not None:
            pixels = self.denoiser(pixels)
        if pixels.ndim == 4:
            return self.classify(pixels)
        logits = self.classify(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        # Votes have no gradient.
        return logits.mean(0) if self.training else majority(logits)

    def classify(self, pixels: Tensor) -> Tensor:
        """Logits of `pixels`, the denoiser left out."""
        if self.input_size is not None:
            pixels = resize(pixels, self.input_size)
        normalised = (pixels - self.mean) / self.std
        dtype = next(self.network.parameters()).dtype
        features = self.network.forward_features(normalised.to(dtype))  # type: ignore[operator]
        pooled = self.network.forward_head(features, pre_logits=True)  # type: ignore[operator]
        # bf16 logits tie often and argmax then favours low classes, so the head is float32.
        with torch.autocast(pixels.device.type, enabled=False):
            return head_of(self.network)(pooled.float())

    def for_inference(self, precision: str) -> "Classifier":
        """Set evaluation mode and cast the network (not its head) to `precision`.

        It can be trained no more, nor saved: a denoiser may rearrange its layers for speed.
        """
        self.eval().requires_grad_(False)
        if precision == "bfloat16":
            self.network.bfloat16()
            head_of(self.network).float()
        # A denoiser says itself what of it runs in which precision.
        if self.denoiser is not None and hasattr(self.denoiser, "for_inference"):
            self.denoiser.for_inference(precision)  # type: ignore[operator]
        return self


def majority(logits: Tensor) -> Tensor:
    """Votes for each class `(B, K)` of V answers `(V, B, K)`; probability decides a tie."""
    votes = F.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
    counted = votes + logits.softmax(-1).mean(0) / 2
    # An answer that is not finite must stay so: it votes for nobody.
    return torch.where(logits.isfinite().all(0), counted, torch.nan)


def compile_for_inference(classifier: nn.Module, batch: Tensor) -> None:
    """Compile for the one shape of `batch` `(B, C, H, W)`, weights frozen into the kernels.

    What is compiled rounds differently from what is not: certificates hold for the compiled
    network, and their sidecar says so.
    """
    import torch._inductor.config as inductor

    inductor.freezing = True
    # Kernels chosen by timing them could be others in a rerun or another shard: another network.
    inductor.deterministic = True
    # On GPUs the mode adds CUDA graphs, which one static shape allows.
    mode = "reduce-overhead" if batch.device.type == "cuda" else None
    classifier.compile(dynamic=False, mode=mode)
    with torch.inference_mode():
        # A tensor made outside would be guarded as another kind, and all be compiled again.
        classifier(batch.clone())


def head_of(network: nn.Module) -> nn.Module:
    """The classification head of a timm model."""
    head: nn.Module = network.get_classifier()  # type: ignore[operator]
    return head


def create_network(settings: BackboneSettings, classes: int, channels: int) -> nn.Module:
    """Build the timm network; it resamples weights to another size or number of channels.

    Raises:
        BenchError: timm does not know the name or refuses an argument, or weights do not fit.
    """
    import timm

    import bench.lenet  # noqa: F401  (adds itself to timm's names)

    arguments: dict[str, Any] = {"in_chans": channels, "num_classes": classes}
    arguments |= settings.arguments
    names = _weight_names(settings.weights) if settings.weights is not None else None
    if names is not None:
        arguments["pretrained_cfg_overlay"] = {"file": settings.weights}
    try:
        network: nn.Module = timm.create_model(
            settings.timm,
            pretrained=settings.pretrained or names is not None,
            **arguments,
        )
    except OSError as error:
        raise BenchError(
            f"backbone.pretrained: the weights of {settings.timm} cannot be fetched ({error}): "
            "docs/paper-scale.md tells how to bring them to a machine without a network"
        ) from None
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise BenchError(
            f"backbone.timm = {settings.timm!r} with backbone.arguments = {settings.arguments}"
            f"{f' and backbone.weights = {settings.weights}' if names is not None else ''}: "
            f"timm cannot build it ({error}); `timm.list_models()` lists the names"
        ) from None
    if names is not None:
        _check_names(network, names, settings)
    for module in network.modules():
        # Else BEiT and EVA multiply by `qkv.weight` itself, past any adapter of that layer.
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True  # type: ignore[assignment]
    return network


def _weight_names(path: str) -> set[str]:
    """The names in a file of weights.

    Raises:
        BenchError: it is missing or no safetensors file.
    """
    try:
        with safe_open(path, "pt") as stored:
            return set(stored.keys())
    except FileNotFoundError:
        raise BenchError(
            f"backbone.weights = {path} is missing: put it there (`bench weights` makes the one "
            "that config/dinov2.yaml names)"
        ) from None
    except (OSError, SafetensorError) as error:
        raise BenchError(f"backbone.weights = {path} is no safetensors file ({error})") from None


def _check_names(network: nn.Module, found: set[str], settings: BackboneSettings) -> None:
    """Refuse weights that leave a part of `network` random, head aside, or that it cannot hold."""
    head = {id(p) for p in head_of(network).parameters()}
    own = network.named_parameters()
    wanted = {name for name, p in own if id(p) not in head}
    wanted |= {name for name, _ in network.named_buffers()} & network.state_dict().keys()
    missing, unknown = wanted - found, found - network.state_dict().keys()
    for problem, names in (("lacks", missing), ("has unknown", unknown)):
        if names:
            raise BenchError(
                f"backbone.weights = {settings.weights} {problem} {', '.join(sorted(names)[:3])} "
                f"({len(names)} in all): it must hold timm's names of {settings.timm}"
            )


def initial_weights(settings: BackboneSettings, network: nn.Module) -> dict[str, str] | None:
    """Where the weights that `network` was built with come from, and their file's sha256.

    None if they are random.

    Raises:
        BenchError: timm did not fetch them as safetensors from the Hugging Face hub.
    """
    if settings.weights is not None:
        return {"source": settings.weights, "sha256": sha256_file(Path(settings.weights))}
    if not settings.pretrained:
        return None
    from huggingface_hub import try_to_load_from_cache

    config: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
    source = str(config.get("hf_hub_id"))
    found = try_to_load_from_cache(source, "model.safetensors")
    if not isinstance(found, str):
        raise BenchError(
            f"backbone.pretrained: {config['architecture']} has no model.safetensors on the hub "
            "of Hugging Face, so what was loaded is not known: name another model"
        )
    return {"source": source, "sha256": sha256_file(Path(found))}


def create_classifier(settings: BackboneSettings, classes: int, channels: int) -> Classifier:
    """Build the classifier that the experiment's backbone settings describe."""
    network = create_network(settings, classes, channels)
    config: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if len(mean) != channels:
        # Gray is the mean of the colours; timm sums the weights of the first layer over them.
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return Classifier(network, mean, std, settings.input_size)


def classes_answered(classifier: Classifier, image: Tensor, given: str) -> int:
    """Number of classes that `classifier` answers on `image` `(B, C, H, W)`.

    Raises:
        BenchError: it cannot take such images; `given` names what decides on them.
    """
    training = classifier.training
    try:
        with torch.inference_mode():
            return int(classifier.eval()(image).shape[1])
    # What networks raise where the shape does not fit; timm asserts.
    except (RuntimeError, AssertionError, ValueError) as error:
        if out_of_memory(error):
            raise
        shape = " x ".join(map(str, image.shape[1:]))
        raise BenchError(f"{given}: the model cannot take images {shape} ({error})") from None
    finally:
        classifier.train(training)


@contextmanager
def plain_attention(*networks: nn.Module) -> Iterator[None]:
    """Attention written out, for FLOP counters, which do not see fused kernels."""
    modules = [module for network in networks for module in network.modules()]
    flags = [(m, m.fused_attn) for m in modules if isinstance(getattr(m, "fused_attn", None), bool)]
    processors = [(m, m.processor) for m in modules if _of_diffusers(m)]
    for network in networks:
        set_fused_attention(network, False)
    try:
        yield
    finally:
        for module, flag in flags:
            module.fused_attn = flag
        for module, processor in processors:
            module.set_processor(processor)  # type: ignore[operator]


def set_fused_attention(network: nn.Module, fused: bool) -> None:
    """Switch fused attention (timm, diffusers): CPU training and FLOP counts need it off."""
    for module in network.modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = fused  # type: ignore[assignment]
        elif _of_diffusers(module):
            from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

            module.set_processor(AttnProcessor2_0() if fused else AttnProcessor())  # type: ignore[operator]


def _of_diffusers(module: nn.Module) -> bool:
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("diffusers.models.attention_processor", "Attention")


def build_component(factory: str, arguments: dict[str, Any]) -> nn.Module:
    """Build the module that a model folder names as `package.module:Class`.

    Raises:
        BenchError: the name is of no network of this project, or cannot be built.
    """
    module_name, _, attribute = factory.partition(":")
    if not module_name.startswith(TRUSTED_PACKAGES):
        raise BenchError(f"{factory!r} is not part of bench or baselines: it is not loaded")
    try:
        network = getattr(importlib.import_module(module_name), attribute)
        # Also what a module imports has a name in it, and a model folder may come from anyone.
        own = isinstance(network, type) and network.__module__ == module_name
        if not own or not issubclass(network, nn.Module):
            raise BenchError(f"{factory!r} is no network of this project: it is not loaded")
        component: nn.Module = network(**arguments)
    except (ImportError, AttributeError, TypeError) as error:
        raise BenchError(f"{factory!r} cannot be built with {arguments} ({error})") from None
    return component
