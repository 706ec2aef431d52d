"""Tables of attacks: robust accuracy from above, and what became of the certificates."""

from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import binom

from bench.config import Experiment
from bench.errors import BenchError
from bench.files import atomic_write, read_json, sha256_file
from bench.smoothing.rules import ABSTAIN
from bench.statistics import accuracy_interval
from bench.tables import check_points, names_of, own_row, point_of

# Sound certificates break more often than `allowed` with less than this probability.
LEVEL = 0.001


def build_attack_tables(experiment: Experiment, logs: list[Path], folder: Path) -> pd.DataFrame:
    """Write `attacks.csv` and `soundness.csv`; return the latter.

    Raises:
        BenchError: a log of a method, sigma and seed is missing, foreign or cut off, or of another
            attack.
    """
    read = [_read_complete(experiment, path) for path in logs]
    check_points([sidecar for sidecar, _ in read], experiment.attacked())
    order = {point: place for place, point in enumerate(experiment.attacked())}
    read.sort(key=lambda pair: order[point_of(pair[0])])
    radii = [0.0, *experiment.attack_settings.radii]
    curves = pd.concat([_curve(experiment, sidecar, log, radii) for sidecar, log in read])
    checks = pd.DataFrame([_soundness_row(experiment, sidecar, log) for sidecar, log in read])
    for name, table in (("attacks", curves), ("soundness", checks)):
        with atomic_write(folder / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False)
    return checks


def _read_complete(experiment: Experiment, path: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    sidecar = own_row(experiment, path, read_json(path.with_suffix(".json")))
    if not path.exists() or sidecar.get("log_sha256") != sha256_file(path):
        raise BenchError(f"{path} is missing or not what its .json was written for: attack again")
    planned, made = experiment.attack_settings.part_of_log, sidecar.get("attack")
    if made is None:
        raise BenchError(f"{path} is no log of an attack: name those of `bench attack`")
    for key, value in planned.items():
        if made.get(key) != value:
            raise BenchError(
                f"{path}: {key} of the attack is {made.get(key)}, the experiment has {value}: "
                "attack again"
            )
    return sidecar, pd.read_csv(path, sep="\t")


def _curve(
    experiment: Experiment, sidecar: dict[str, Any], log: pd.DataFrame, radii: list[float]
) -> pd.DataFrame:
    curve = attacked_accuracy(log, radii)
    first = {"experiment": experiment.name, **names_of(experiment, sidecar)}
    ordered = curve.assign(**first)[[*first, *curve.columns]]
    return ordered.assign(noise_resolution=sidecar["noise_resolution"])


def _soundness_row(
    experiment: Experiment, sidecar: dict[str, Any], log: pd.DataFrame
) -> dict[str, Any]:
    found = soundness(log, sidecar["certificate_alpha"], sidecar["attack"]["alpha"])
    copied = ("machine", "git_revision", "git_dirty")
    return {
        **names_of(experiment, sidecar),
        **found,
        **{key: sidecar["attack"][key] for key in ("steps", "draws", "n", "alpha")},
        "certificate_alpha": sidecar["certificate_alpha"],
        "precision": sidecar["precision"],
        "attack_seconds": sidecar["seconds"],
        **{key: sidecar[key] for key in copied},
    }


def attacked_accuracy(log: pd.DataFrame, radii: list[float]) -> pd.DataFrame:
    """Robust accuracy of the images of an attack log, from above and below, for each of `radii`.

    An image is lost at r once any point within r has another answer than its label; one where
    the prediction abstains is kept, since the bound must not fall below what is true.

    Args:
        log: as `bench.attacks.attack_certificates` returns it.
        radii: l2 in [0, 1] pixels.

    Returns:
        `radius, value` with its 95 % interval `low, high`, `certified` on the same images, the
        share `abstained` of images without an answer at that radius, `n_images`.
    """
    images = log.drop_duplicates("idx")
    wrong = log[~log["predict"].isin([ABSTAIN]) & (log["predict"] != log["label"])]
    lost_at = images["idx"].map(wrong.groupby("idx")["radius"].min())
    sure = (images["certified"] == images["label"]).to_numpy()
    at_label = log[(log["target"] == log["label"]) & (log["predict"] == ABSTAIN)]
    rows = []
    for radius in radii:
        kept = int((~(lost_at <= radius)).sum())
        low, high = accuracy_interval(kept, len(images))
        certified = (sure & (images["certified_radius"] >= radius)).mean()
        abstained = (at_label["radius"] == radius).sum() / len(images)
        rows.append(
            {"radius": radius, "value": kept / len(images), "low": float(low), "high": float(high)}
            | {"certified": certified, "abstained": abstained, "n_images": len(images)}
        )
    return pd.DataFrame(rows)


def soundness(log: pd.DataFrame, certificate_alpha: float, alpha: float) -> dict[str, Any]:
    """How many certificates of an attack log were broken, and how many may be.

    A certificate of positive radius is broken if an answer within it is another class than the
    certified one; abstention breaks none. An image gets a false certificate with probability
    `certificate_alpha` at most, and each prediction errs with `alpha` at most. An image whose
    certificate breaks has at most the sum of these; images have noise of their own, so the number
    of broken certificates is at most binomial over all images, certified or not.

    Returns:
        `n_images, certificates, attacks` within their radii, the `predictions` there (clean
        images have one too), `broken`, `allowed` (more has probability below 0.001) and `p_value`
        of that many or more.
    """
    claimed = (log["certified"] != ABSTAIN) & (log["certified_radius"] > 0)
    inside = log[claimed & (log["radius"] <= log["certified_radius"])]
    other = ~inside["predict"].isin([ABSTAIN]) & (inside["predict"] != inside["certified"])
    broken, images = inside.loc[other, "idx"].nunique(), log["idx"].nunique()
    most = inside.groupby("idx").size().max() if len(inside) else 0
    rate = min(1.0, certificate_alpha + most * alpha)
    return {
        "n_images": images,
        "certificates": inside["idx"].nunique(),
        "attacks": int((inside["radius"] > 0).sum()),
        "predictions": len(inside),
        "broken": broken,
        "allowed": int(binom.isf(LEVEL, images, rate)),
        "p_value": float(binom.sf(broken - 1, images, rate)),
    }
