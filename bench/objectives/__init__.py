"""What training minimises on noisy images: one file per objective, `OBJECTIVES` for all.

Each is `objective(classifier, batch, **hyperparameters)`, a scalar; its hyperparameters are those
of its settings in `bench/config.py`. All noise comes from the batch's generator.
"""

from collections.abc import Callable

from torch import Tensor

from bench.objectives.cat_rs import cat_rs
from bench.objectives.consistency import consistency
from bench.objectives.cross_entropy import cross_entropy
from bench.objectives.macer import macer
from bench.objectives.smoothadv import smoothadv
from bench.objectives.smoothmix import smoothmix
from bench.objectives.stability import stability

OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "stability": stability,
    "smoothadv": smoothadv,
    "macer": macer,
    "consistency": consistency,
    "smoothmix": smoothmix,
    "cat_rs": cat_rs,
}
