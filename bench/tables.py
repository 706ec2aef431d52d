"""Tidy tables: one row per observation, metadata in columns."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from bench.config import Experiment, split_trial
from bench.errors import BenchError
from bench.files import atomic_write, locked, read_json
from bench.paired import PAIR, paired_tests
from bench.smoothing.log import read_own_log
from bench.smoothing.protocol import radius_grid
from bench.statistics import (
    accuracy_interval,
    average_certified_radius,
    average_radius_interval,
    certified_accuracy,
    pool_seeds,
)

KEY = ["method", "label", "family", "sigma", "seed"]
COSTS = [
    "trainable_parameters",
    "head_parameters",
    "total_parameters",
    "training_flops",
    "base_training_flops",
    "inference_flops",
]
LEADERBOARD_STEPS = 4
VOTE_SHARES = 101
# What all certificates of an experiment have in common.
ALIKE = ("mode", "n0", "n", "alpha", "candidate", "family_size", "futility", "data_sha256")
Point: TypeAlias = tuple[str, float, int]  # method, sigma, seed


def build_tables(experiment: Experiment, logs: list[Path], costs: list[Path], folder: Path) -> None:
    """Write certified_accuracy and its kin, summary and the other tables, leaderboard.md.

    Raises:
        BenchError: a log or cost of a method, sigma and seed is missing, foreign or cut off, or
            logs are of several protocols.
    """
    read = [read_complete(experiment, path) for path in logs]
    check_points([protocol for protocol, _ in read], experiment.points())
    _check_alike([protocol for protocol, _ in read])
    order = {point: place for place, point in enumerate(experiment.points())}
    read.sort(key=lambda pair: order[point_of(pair[0])])
    curves = pd.concat([_curve(experiment, p, log, read) for p, log in read])
    summary = pd.DataFrame([_summary_row(experiment, p, log) for p, log in read])
    rows = [own_row(experiment, path, read_json(path)) for path in costs]
    cost = pd.DataFrame(_cost_rows(experiment, rows))
    tables = {
        "certified_accuracy": curves,
        "envelope": envelope(curves),
        "pooled": pooled(curves),
        "summary": summary,
        "per_class": pd.concat([_per_class(experiment, p, log) for p, log in read]),
        "vote_shares": pd.concat([_vote_shares(experiment, p, log) for p, log in read]),
        "paired": _paired(experiment, read),
        "cost": cost,
    }
    with locked(folder):
        for name, table in tables.items():
            with atomic_write(folder / f"{name}.csv") as temporary:
                table.to_csv(temporary, index=False)
        with atomic_write(folder / "leaderboard.md") as temporary:
            temporary.write_text(leaderboard(curves, experiment.radius_step))


def own_row(experiment: Experiment, path: Path, row: dict[str, Any]) -> dict[str, Any]:
    """`row` of the file `path`, which must say that it is the experiment's.

    Raises:
        BenchError: it is another's.
    """
    if row.get("experiment") != experiment.name:
        whose = row.get("experiment", "no experiment")
        raise BenchError(f"{path} is of {whose}, not of {experiment.name}: name files of this one")
    return row


def _check_alike(protocols: list[dict[str, Any]]) -> None:
    """Curves are compared, so they must promise the same."""
    for key in ALIKE:
        found = {str(protocol.get(key)): protocol for protocol in protocols}
        if len(found) > 1:
            (one, first), (other, second) = list(found.items())[:2]
            raise BenchError(
                f"{key} is {one} of {first['method']} and {other} of {second['method']}, sigma "
                f"{first['sigma']} and {second['sigma']}: certify both by the same settings"
            )


def read_complete(experiment: Experiment, path: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """Protocol and rows of a certification log of the experiment, which must be whole.

    Raises:
        BenchError: it is missing, damaged, cut off or of another experiment.
    """
    protocol, log = read_own_log(path)
    own_row(experiment, path, protocol)
    if len(log) != protocol["n_images"]:
        raise BenchError(f"{path} has {len(log)} of {protocol['n_images']} images: certify again")
    return protocol, log


def check_points(found: list[dict[str, Any]], points: Iterable[Point]) -> None:
    """Each point of the experiment must be there once, and no other."""
    have = Counter(map(point_of, found))
    wanted = set(points)
    problems = {
        "has no results yet": wanted - set(have),
        "is not part of the experiment": set(have) - wanted,
        "is given more than once": {point for point, times in have.items() if times > 1},
    }
    for problem, these in problems.items():
        for method, sigma, seed in sorted(these):
            raise BenchError(f"{method} at sigma {sigma}, seed {seed} {problem}")


def point_of(row: dict[str, Any]) -> Point:
    """Method, sigma and seed of a row."""
    return row["method"], row["sigma"], row["seed"]


def names_of(experiment: Experiment, row: dict[str, Any]) -> dict[str, Any]:
    """The columns `KEY` of a row that names its method, sigma and seed."""
    method = experiment.methods[row["method"]]
    return {
        "method": row["method"],
        "label": method.label,
        "family": method.family,
        "sigma": row["sigma"],
        "seed": row["seed"],
    }


def _curve(
    experiment: Experiment,
    protocol: dict[str, Any],
    log: pd.DataFrame,
    everything: list[tuple[dict[str, Any], pd.DataFrame]],
) -> pd.DataFrame:
    """Certified accuracy on one grid for all methods of a sigma."""
    sigma = protocol["sigma"]
    highest = max(frame["radius"].max() for p, frame in everything if p["sigma"] == sigma)
    shown = max(highest, *leaderboard_radii(sigma, experiment.radius_step))
    steps = int(np.ceil(shown / experiment.radius_step))
    curve = certified_accuracy(
        log, radius_grid(experiment.radius_step, steps * experiment.radius_step)
    )
    named = {"experiment": experiment.name, **names_of(experiment, protocol)}
    # Sidecars of before had native noise alone and no factor.
    native_radius = curve["radius"] * protocol.get("native_radius_factor", 1.0)
    resolution = protocol.get("noise_resolution", "native")
    ordered = curve.assign(**named)[[*named, *curve.columns]]
    return ordered.assign(noise_resolution=resolution, native_radius=native_radius)


def leaderboard_radii(sigma: float, radius_step: float) -> list[float]:
    """0, sigma / 2, sigma and 3 sigma / 2: where methods are set against each other.

    Only those on the grid of radii, which has the curves, and outside of which `decide` is silent.
    """
    radii = np.round(np.arange(LEADERBOARD_STEPS) * sigma / 2, 10)
    steps = radii / radius_step
    return [float(radius) for radius in radii[np.isclose(steps, steps.round())]]


def _per_class(experiment: Experiment, protocol: dict[str, Any], log: pd.DataFrame) -> pd.DataFrame:
    """Certified accuracy over the images of each true class, at the radii of the leaderboard."""
    radii = leaderboard_radii(protocol["sigma"], experiment.radius_step)
    named = names_of(experiment, protocol)
    parts = [
        certified_accuracy(part, radii).assign(**named, **{"class": label})
        for label, part in log.groupby("label")
    ]
    table = pd.concat(parts, ignore_index=True)
    columns = [*named, "class"]
    return table[[*columns, *table.columns.drop(columns)]]


def _vote_shares(
    experiment: Experiment, protocol: dict[str, Any], log: pd.DataFrame
) -> pd.DataFrame:
    """Share of images `value` whose true class has a p_A of at most `p_a`.

    p_A is estimated by n_a / n; where another class is the candidate it counts as 0.
    """
    right = (log["candidate"] == log["label"]) & (log["n"] > 0)
    shares = np.sort(np.where(right, log["n_a"] / log["n"].clip(lower=1), 0.0))
    grid = np.arange(VOTE_SHARES) / (VOTE_SHARES - 1)  # decimal fractions, as far as floats are
    at_most = np.searchsorted(shares, grid, side="right") / len(log)
    named = names_of(experiment, protocol)
    return pd.DataFrame({**named, "p_a": grid, "value": at_most, "n_images": len(log)})


def _paired(
    experiment: Experiment, everything: list[tuple[dict[str, Any], pd.DataFrame]]
) -> pd.DataFrame:
    """Every pair of methods on the same images, at the radii of the leaderboard.

    Where the two have their noise at different resolutions, each has its radius in its own pixels.
    """
    groups: dict[tuple[float, int], dict[str, pd.DataFrame]] = {}
    for protocol, log in everything:
        group = groups.setdefault((protocol["sigma"], protocol["seed"]), {})
        group[protocol["method"]] = log
    tables = []
    for (sigma, seed), logs in sorted(groups.items()):
        radii = leaderboard_radii(sigma, experiment.radius_step)
        tables.append(paired_tests(logs, radii).assign(sigma=sigma, seed=seed))
    table = pd.concat(tables, ignore_index=True)
    for side in ("a", "b"):
        methods = table[f"method_{side}"].map(experiment.methods.__getitem__)
        table[f"noise_resolution_{side}"] = [method.noise_resolution for method in methods]
    return table[[*PAIR, *table.columns.drop(PAIR)]]


def envelope(curves: pd.DataFrame) -> pd.DataFrame:
    """The best sigma per method, seed and radius.

    The choice is made on the test images, so the envelope is optimistic; published tables of
    denoised smoothing are such envelopes.
    """
    ordered = curves.sort_values(["value", "sigma"], ascending=[False, True], kind="stable")
    best = ordered.drop_duplicates(["method", "seed", "radius"])
    kept = best.loc[best["value"] > 0]
    place = {name: number for number, name in enumerate(curves["method"].unique())}
    kept = kept.assign(place=kept["method"].map(place)).sort_values(["place", "seed", "radius"])
    columns = ["method", "label", "family", "seed", "radius", "value", "low", "high", "sigma"]
    return kept[[*columns, "n_images"]]


def pooled(curves: pd.DataFrame) -> pd.DataFrame:
    """The mean over seeds of every curve, with the variance of images and that of seeds apart.

    `within_variance` is that of one seed's value over test images, `between_variance` that of the
    values over seeds; of one seed there is no telling, and `interval_kind` says so.
    """
    keys = ["method", "label", "family", "sigma", "radius"]
    rows = []
    for key, part in curves.groupby(keys, sort=False):
        values, seeds = part["value"], len(part)
        mean, low, high = pool_seeds(values, part["low"], part["high"])
        rows.append(
            dict(zip(keys, key, strict=True))
            | {"value": mean, "low": max(low, 0.0), "high": min(high, 1.0), "seeds": seeds}
            | {"n_images": part["n_images"].max()}
            | {"within_variance": (values * (1 - values) / part["n_images"]).mean()}
            | {"between_variance": values.var(ddof=1)}
            | {"interval_kind": "images and seeds" if seeds > 1 else "images of one seed"}
        )
    return pd.DataFrame(rows)


def _summary_row(
    experiment: Experiment, protocol: dict[str, Any], log: pd.DataFrame
) -> dict[str, Any]:
    images = len(log)
    row = {**names_of(experiment, protocol), "n_images": images}
    row |= {key: protocol[key] for key in ("mode", "n0", "n", "alpha", "precision")}
    row["noise_resolution"] = protocol.get("noise_resolution", "native")
    row["native_radius_factor"] = protocol.get("native_radius_factor", 1.0)
    by_label = protocol.get("candidate") == "label" and protocol["mode"] != "predict"
    clean = int((log["clean_predict"] == log["label"]).sum())
    smoothed = int(log["correct"].sum())
    acr_low, acr_high = average_radius_interval(log)
    for name, hits in (("clean", clean), ("smoothed", smoothed)):
        low, high = accuracy_interval(hits, images)
        row |= {f"{name}_accuracy": hits / images}
        row |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return row | {
        # Of the pilot alone: later draws stop early where the answer is clear.
        "noisy_accuracy": log["n0_label"].sum() / log["n0"].sum() if log["n0"].any() else np.nan,
        "radius_step": experiment.radius_step,
        # A test of the true class alone does not tell a wrong answer from none.
        "abstention": np.nan if by_label else float((log["predict"] == -1).mean()),
        "average_certified_radius": average_certified_radius(log),
        "acr_low": acr_low,
        "acr_high": acr_high,
        "certification_seconds": protocol["seconds"],
        "samples_per_image": float(log["samples"].mean()),
        "machine": protocol["machine"],
        "git_revision": protocol["git_revision"],
        "git_dirty": protocol["git_dirty"],
    }


def _cost_rows(experiment: Experiment, costs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per point; one training at a noise level of its own serves several sigmas."""
    models = {
        (name, sigma, seed): (name, experiment.training_sigma(name, sigma), seed)
        for name, sigma, seed in experiment.points()
    }
    check_points(costs, models.values())
    paid = {point_of(cost): cost for cost in costs}
    order = {name: place for place, name in enumerate(experiment.methods)}
    points = sorted(models, key=lambda point: (order[point[0]], *point[1:]))
    return [_cost_row(experiment, {**paid[models[p]], "sigma": p[1]}) for p in points]


def _cost_row(experiment: Experiment, cost: dict[str, Any]) -> dict[str, Any]:
    if absent := [key for key in COSTS if key not in cost]:
        raise BenchError(
            f"cost.json of {cost['method']} lacks {absent[0]}: its baseline must write it "
            "(docs/adding-a-method.md)"
        )
    without = cost["trainable_parameters"] - cost["head_parameters"]
    rest = {k: v for k, v in cost.items() if k not in (*KEY, "experiment", "fingerprint")}
    return {**names_of(experiment, cost), "trainable_without_head": without, **rest}


def leaderboard(curves: pd.DataFrame, radius_step: float) -> str:
    """Markdown table of certified accuracy (%) at the leaderboard's radii, first seed."""
    first = curves[curves["seed"] == curves["seed"].iloc[0]]
    columns = {}
    for sigma, part in first.groupby("sigma"):
        for radius in leaderboard_radii(float(sigma), radius_step):
            at = part[np.isclose(part["radius"], radius)].set_index("label")["value"]
            columns[f"σ={sigma:g}, r={radius:g}"] = (100 * at).map("{:.1f}".format)
    # A method need not have every sigma.
    table = pd.DataFrame(columns).reindex(first["label"].unique()).fillna("–")
    lines = ["| method | " + " | ".join(table.columns) + " |"]
    lines.append("|---|" + "--:|" * len(table.columns))
    lines += [
        f"| {label} | " + " | ".join(row) + " |"
        for label, row in zip(table.index, table.to_numpy(), strict=True)
    ]
    return "\n".join(lines) + "\n"


def build_tuning(experiment: Experiment, reports: list[Path], output: Path) -> list[str]:
    """Write every trial with the picks; return what the experiment should record.

    The rule for every method: the highest accuracy on the validation split under one noise draw
    per image at `tuning.sigma`, the smaller size, then the smaller rate, on ties.

    Raises:
        BenchError: a trial's report is missing, there twice, or foreign.
    """
    found = [own_row(experiment, path, read_json(path)) for path in reports]
    for path, report in zip(reports, found, strict=True):
        if "validation_accuracy" not in report:
            raise BenchError(f"{path} has no validation_accuracy: name training.json of a trial")
    sigma, seed = experiment.tuning.sigma, experiment.seeds[0]
    at = {trial: experiment.training_sigma(trial, sigma) for trial in experiment.trials()}
    check_points(found, [(trial, level, seed) for trial, level in at.items()])
    rows = sorted(found, key=lambda report: _trial_order(report["method"]))
    table = pd.DataFrame([_trial_row(experiment, report) for report in rows])
    best = table.groupby("method")["validation_accuracy"].idxmax()
    table["picked"] = table.index.isin(best)
    points = [experiment.point(report["method"]) for report in rows]
    table["recorded"] = [
        point == experiment.methods[name]
        for point, name in zip(points, table["method"], strict=True)
    ]
    with atomic_write(output) as temporary:
        table.to_csv(temporary, index=False)
    picks = table[table["picked"] & ~table["recorded"]]
    return [
        # With a point: YAML reads 1e-05 as text.
        f"record methods.{row['method']}.learning_rate: "
        + np.format_float_scientific(row["learning_rate"], trim="0")
        + (f" and {row['size']}" if row["size"] else "")
        for row in picks.to_dict("records")
    ] or ["the experiment file records every pick"]


def _trial_order(name: str) -> tuple[str, list[float], float]:
    method, values = split_trial(name)
    rate = values.pop("learning_rate")
    return method, list(values.values()), rate


def _trial_row(experiment: Experiment, report: dict[str, Any]) -> dict[str, Any]:
    method, values = split_trial(report["method"])
    rate = values.pop("learning_rate")
    return {
        **names_of(experiment, {**report, "method": method}),
        "size": ", ".join(f"{key} = {value:g}" for key, value in values.items()),
        "learning_rate": float(rate),
        "validation_accuracy": report["validation_accuracy"],
    }
