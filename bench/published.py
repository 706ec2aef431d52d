"""Our measurements beside the published numbers that they reproduce."""

from pathlib import Path

import numpy as np
import pandas as pd

from bench.compare import joint_half_width
from bench.config import Experiment
from bench.errors import BenchError
from bench.files import atomic_write
from bench.statistics import accuracy_interval

OWN = ["method", "label", "sigma", "seed", "radius", "value", "low", "high", "n_images"]
THEIRS = ["reported", "reported_low", "reported_high", "reported_n_images", "paper", "source"]
# Radii in files are decimal fractions; this is far below their spacing.
DECIMALS = 6


def build_published(
    experiment: Experiment, accuracy: Path, published: Path, output: Path
) -> pd.DataFrame:
    """Write measured, reported and their difference per method, sigma, seed and published radius.

    `within` says whether the difference is inside the joint 95 % interval; a measured curve that
    has ended counts as 0. The two are taken as independent, though they may share test images.

    Args:
        experiment: names in `methods.NAME.published` what each method reproduces.
        accuracy: our certified_accuracy.csv.
        published: certified accuracies by others (results/published/README.md has the columns).
        output: the CSV.

    Raises:
        BenchError: a named method is not in `published`, or a radius is not on our grid.
    """
    curves, everything = pd.read_csv(accuracy), pd.read_csv(published)
    parts = []
    for method, sigma, seed in experiment.points():
        name = experiment.methods[method].published
        if name is not None:
            same = (everything["method"] == name) & np.isclose(everything["sigma"], sigma)
            if not same.any():
                raise BenchError(
                    f"methods.{method}.published: {published} has no {name!r} at sigma {sigma}"
                )
            own = curves[(curves[["method", "sigma", "seed"]] == [method, sigma, seed]).all(axis=1)]
            parts.append(_side_by_side(own, _reported(everything[same])))
    table = pd.concat(parts, ignore_index=True)
    with atomic_write(output) as temporary:
        table.to_csv(temporary, index=False)
    return table


def _reported(rows: pd.DataFrame) -> pd.DataFrame:
    """Published rows with the intervals that their numbers of images give."""
    values = rows["certified_accuracy_percent"] / 100
    low, high = accuracy_interval(values * rows["n_images"], rows["n_images"])
    return pd.DataFrame(
        {
            "radius": rows["radius"].round(DECIMALS),
            "reported": values,
            "reported_low": low,
            "reported_high": high,
            "reported_n_images": rows["n_images"],
            "paper": rows["paper"],
            "source": rows["source"],
        }
    )


def _side_by_side(own: pd.DataFrame, reported: pd.DataFrame) -> pd.DataFrame:
    """One method, sigma and seed at each published radius."""
    own = own.assign(radius=own["radius"].round(DECIMALS))
    table = reported.merge(own[OWN], on="radius", how="left")
    ended = table["radius"] > own["radius"].max()
    if (table["value"].isna() & ~ended).any():
        radius = table.loc[table["value"].isna() & ~ended, "radius"].iloc[0]
        raise BenchError(f"radius_step: the published radius {radius} is not on our grid")
    images = own["n_images"].iloc[0]
    _, high = accuracy_interval(0, images)
    beyond = {"value": 0.0, "low": 0.0, "high": float(high), "n_images": images}
    names = {name: own[name].iloc[0] for name in ("method", "label", "sigma", "seed")}
    table = table.fillna({**beyond, **names})
    difference = table["value"] - table["reported"]
    half = joint_half_width(
        table[["value", "low", "high"]], table[["reported", "reported_low", "reported_high"]]
    )
    return table[[*OWN, *THEIRS]].assign(
        difference=difference, joint_half_width=half, within=difference.abs() <= half
    )
