"""Our measurements beside the published numbers that they reproduce."""

from pathlib import Path

import numpy as np
import pandas as pd

from bench.compare import CURVE, POINT, find_table, joint_half_width, read_table
from bench.config import Experiment
from bench.csv_files import read_csv
from bench.errors import BenchError
from bench.files import atomic_write
from bench.statistics import accuracy_interval

OWN = [*POINT, "label", "radius", "value", "low", "high", "n_images"]
REPORTED = ["reported", "reported_low", "reported_high", "reported_n_images"]
THEIRS = ["published", *REPORTED, "paper", "source"]
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
    curves = read_csv(accuracy, ["method", "label"], ["sigma", "seed", *CURVE])
    everything = _published(published)
    parts = []
    for method, sigma, seed in experiment.points():
        name = experiment.methods[method].published
        if name is not None:
            own = curves[(curves[POINT] == [method, sigma, seed]).all(axis=1)]
            parts.append(_side_by_side(own, _named(everything, published, method, name, sigma)))
    if not parts:
        raise BenchError("no methods.NAME.published says what is reproduced: set one")
    table = pd.concat(parts, ignore_index=True)
    with atomic_write(output) as temporary:
        table.to_csv(temporary, index=False)
    return table


def check_published(experiment: Experiment, published: Path) -> None:
    """Check that what methods name can be compared, before anything runs.

    Raises:
        BenchError: a named method is not in `published` at a sigma, or a radius is not on our grid.
    """
    everything = _published(published)
    for method, sigma, _ in experiment.points():
        if (name := experiment.methods[method].published) is None:
            continue
        radii = _named(everything, published, method, name, sigma)["radius"]
        steps = radii / experiment.radius_step
        for radius in radii[(steps - steps.round()).abs() > 10.0**-DECIMALS]:
            raise BenchError(f"radius_step: the published radius {radius} is not on our grid")


def compare_with_published(folder: Path, published: Path) -> pd.DataFrame:
    """The results in `folder` against the numbers that its methods name, as `compare_results`.

    Raises:
        BenchError: no method of `folder` names a published one, or `published` lacks it.
    """
    curves = read_table(folder, "certified_accuracy.csv", [*CURVE], ["label"])
    if find_table(folder, "published.csv") is None:
        raise BenchError(
            f"{folder} does not say what its methods reproduce: set methods.NAME.published in the "
            "experiment and run it again"
        )
    named = read_table(folder, "published.csv", words=["published"])
    named = named[[*POINT, "published"]].drop_duplicates()
    everything, parts = _published(published), []
    for row in named.to_dict("records"):
        own = curves[(curves[POINT] == [row[key] for key in POINT]).all(axis=1)]
        name, sigma = row["published"], row["sigma"]
        reported = _reported(everything, name, sigma)
        if own.empty:
            raise BenchError(f"{folder} has no {row['method']!r} at sigma {sigma}: run it again")
        if reported.empty:
            raise BenchError(f"{published} has no {name!r} at sigma {sigma}")
        parts.append(_side_by_side(own, reported))
    table = pd.concat(parts, ignore_index=True).assign(quantity="certified_accuracy")
    table = table.rename(columns={"value": "a", "reported": "b", "within": "agrees"})
    return table[
        [*POINT, "radius", "quantity", "a", "b", "difference", "joint_half_width", "agrees"]
    ]


def _published(path: Path) -> pd.DataFrame:
    words, numbers = ["method", "paper", "source"], ["sigma", "radius", "n_images"]
    return read_csv(path, words, [*numbers, "certified_accuracy_percent"])


def _named(
    everything: pd.DataFrame, published: Path, method: str, name: str, sigma: float
) -> pd.DataFrame:
    """The published rows that a method names."""
    reported = _reported(everything, name, sigma)
    if reported.empty:
        raise BenchError(
            f"methods.{method}.published: {published} has no {name!r} at sigma {sigma}"
        )
    return reported


def _reported(everything: pd.DataFrame, name: str, sigma: float) -> pd.DataFrame:
    """Published rows of a method with the intervals that their numbers of images give."""
    rows = everything[(everything["method"] == name) & np.isclose(everything["sigma"], sigma)]
    values = rows["certified_accuracy_percent"] / 100
    low, high = accuracy_interval(values * rows["n_images"], rows["n_images"])
    return pd.DataFrame(
        {
            "radius": rows["radius"].round(DECIMALS),
            "published": name,
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
    half = joint_half_width(table[["value", "low", "high"]], table[REPORTED[:3]])
    return table[[*OWN, *THEIRS]].assign(
        difference=difference, joint_half_width=half, within=difference.abs() <= half
    )
