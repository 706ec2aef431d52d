"""What of a network may change, as settings: one class per kind, joined in one union.

Keys of the kinds that peft makes are named as in peft. Defaults are published ones.
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from bench.settings import Settings

Share = Annotated[float, Field(ge=0, lt=0.5)]


class Frozen(Settings):
    """Nothing of the base classifier changes."""

    kind: Literal["frozen"] = "frozen"


class Head(Settings):
    """Only the classification head is trained."""

    kind: Literal["head"]


class Full(Settings):
    """Every weight is trained, starting from the base classifier."""

    kind: Literal["full"]


class Scratch(Settings):
    """Every weight is trained from a random start (Cohen 2019)."""

    kind: Literal["scratch"]


class Bias(Settings):
    """Every bias of the base classifier is trained, and the head (BitFit, Ben Zaken 2022)."""

    kind: Literal["bias"]


class VptShallow(Settings):
    """Shallow visual prompt tuning (Jia 2022): `prompts` learned tokens enter the first block."""

    kind: Literal["vpt_shallow"]
    prompts: PositiveInt = 10


class VptDeep(Settings):
    """Deep visual prompt tuning (Jia 2022): `prompts` learned tokens enter every block."""

    kind: Literal["vpt_deep"]
    prompts: PositiveInt = 10


class Adapter(Settings):
    """Bottleneck adapters (Houlsby 2019) after attention and MLP, before the skip connection."""

    kind: Literal["adapter"]
    bottleneck: PositiveInt = 16


class ParallelAdapter(Settings):
    """A scaled bottleneck beside the MLP of every block (AdaptFormer, Chen 2022)."""

    kind: Literal["parallel_adapter"]
    bottleneck: PositiveInt = 64
    scale: PositiveFloat = 0.1


# Kinds that add modules which cannot be folded into the network's own weights.
INSERTED = (VptShallow, VptDeep, Adapter, ParallelAdapter)


class Lora(Settings):
    """Low-rank adaptation of attention and MLP layers (Hu 2022)."""

    kind: Literal["lora"]
    r: PositiveInt = 8
    lora_alpha: PositiveFloat = 16


class RsLora(Settings):
    """LoRA scaled by lora_alpha / sqrt(r) (Kalajdzievski 2023)."""

    kind: Literal["rslora"]
    r: PositiveInt = 8
    lora_alpha: PositiveFloat = 16


class Pissa(Settings):
    """LoRA that starts from the principal singular vectors (Meng 2024)."""

    kind: Literal["pissa"]
    r: PositiveInt = 8
    lora_alpha: PositiveFloat = 8


class Dora(Settings):
    """LoRA of the direction of weights, with their magnitude learned apart (Liu 2024)."""

    kind: Literal["dora"]
    r: PositiveInt = 8
    lora_alpha: PositiveFloat = 16


class AdaLora(Settings):
    """LoRA whose rank is shared out by importance (Zhang 2023).

    `warmup` and `final` are the shares of training before and after the rank shrinks.
    """

    kind: Literal["adalora"]
    init_r: PositiveInt = 12
    target_r: PositiveInt = 8
    lora_alpha: PositiveFloat = 16
    warmup: Share = 0.1
    final: Share = 0.3
    orth_reg_weight: NonNegativeFloat = 0.1


class Ia3(Settings):
    """Learned scales of keys, values and MLP activations (Liu 2022)."""

    kind: Literal["ia3"]


class Oft(Settings):
    """Orthogonal fine-tuning by block-diagonal rotations (Qiu 2023)."""

    kind: Literal["oft"]
    oft_block_size: PositiveInt = 32


class Boft(Settings):
    """Scaled orthogonal fine-tuning, one butterfly factor (BOFT, Liu 2024).

    For more factors peft needs a CUDA extension, and silently takes one where that is missing.
    """

    kind: Literal["boft"]
    boft_block_size: PositiveInt = 8


class Vera(Settings):
    """Learned scales around shared random low-rank matrices (Kopiczko 2024)."""

    kind: Literal["vera"]
    r: PositiveInt = 256
    d_initial: PositiveFloat = 0.1


class Loha(Settings):
    """Low-rank Hadamard product (Hyeon-Woo 2022)."""

    kind: Literal["loha"]
    r: PositiveInt = 8
    alpha: PositiveFloat = 8


class Lokr(Settings):
    """Low-rank Kronecker product (Edalati 2022; Yeh 2024)."""

    kind: Literal["lokr"]
    r: PositiveInt = 8
    alpha: PositiveFloat = 8


class FourierFt(Settings):
    """Learned entries of the weight change's Fourier spectrum (Gao 2024)."""

    kind: Literal["fourierft"]
    n_frequency: PositiveInt = 3000
    scaling: PositiveFloat = 300


class LnTuning(Settings):
    """The normalisation layers are trained, and the head (Zhao 2024)."""

    kind: Literal["ln_tuning"]


class Hra(Settings):
    """Products of Householder reflections (Yuan 2024)."""

    kind: Literal["hra"]
    r: Annotated[int, Field(gt=0, multiple_of=2)] = 8


class VbLora(Settings):
    """LoRA composed of vectors from one shared bank (Li 2024)."""

    kind: Literal["vblora"]
    r: PositiveInt = 4
    num_vectors: PositiveInt = 256
    vector_length: PositiveInt = 256
    topk: PositiveInt = 2


Parameterization = Annotated[
    Frozen
    | Head
    | Full
    | Scratch
    | Bias
    | VptShallow
    | VptDeep
    | Adapter
    | ParallelAdapter
    | Lora
    | RsLora
    | Pissa
    | Dora
    | AdaLora
    | Ia3
    | Oft
    | Boft
    | Vera
    | Loha
    | Lokr
    | FourierFt
    | LnTuning
    | Hra
    | VbLora,
    Field(discriminator="kind"),
]
