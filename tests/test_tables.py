"""Tables from small logs whose every number is known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bench.config import Experiment
from bench.errors import BenchError
from bench.smoothing.log import read_own_log, write_log
from bench.statistics import pool_seeds
from bench.tables import COSTS, _summary_row, build_tables, leaderboard_radii, pooled

SIGMAS = [0.25, 0.5]
METHODS = ["undefended", "lora"]
Results = tuple[Experiment, list[Path], list[Path]]


def log_rows(radii: list[float]) -> list[dict[str, Any]]:
    """One correct image per radius, one abstention and one wrong answer."""
    answers = [(1, radius) for radius in radii] + [(-1, 0.0), (2, 0.9)]
    return [
        {
            "idx": idx,
            "label": 1,
            "predict": predict,
            "radius": radius,
            "correct": int(predict == 1),
            "time": 0.5,
            "samples": 110,
            "n_a": 90,
            "p_a_lower": 0.8,
            "n": 100,
            "candidate": 2 if predict == 2 else 1,
            "n0": 10,
            "n0_label": 6,
            "clean_predict": 1 if predict != 2 else 2,
        }
        for idx, (predict, radius) in enumerate(answers)
    ]


def write_point(
    folder: Path, method: str, sigma: float, radii: list[float], seed: int = 0, **more: Any
) -> tuple[Path, Path]:
    """Log, sidecar and cost of one method and sigma; the path tells nothing."""
    number = len(list(folder.glob("*.tsv")))
    log, cost = folder / f"{number}.tsv", folder / f"cost{number}.json"
    rows = log_rows(radii)
    write_log(rows, log)
    identity = {"experiment": "smoke", "method": method, "sigma": sigma, "seed": seed}
    protocol = {
        "mode": "cohen",
        "n0": 10,
        "n": 100,
        "alpha": 0.001,
        "precision": "float32",
        "noise_seed": 7,
        "n_images": len(rows),
    }
    run = {"seconds": 9.0, "machine": "m", "git_revision": "r", "git_dirty": False}
    log.with_suffix(".json").write_text(json.dumps({**identity, **protocol, **run, **more}))
    counts = {**dict.fromkeys(COSTS, 0), "trainable_parameters": 130, "head_parameters": 30}
    counts["training_flops"] = 5
    cost.write_text(json.dumps({**identity, **counts}))
    return log, cost


@pytest.fixture
def results(tmp_path: Path, smoke: Experiment) -> Results:
    """Two methods at two sigmas, listed in the wrong order."""
    methods = {name: smoke.methods[name] for name in METHODS}
    update = {"methods": methods, "sigmas": SIGMAS, "radius_step": 0.25}
    files = [
        write_point(tmp_path, "lora", 0.5, [0.4, 1.1]),
        write_point(tmp_path, "undefended", 0.5, [0.1, 0.2]),
        write_point(
            tmp_path,
            "lora",
            0.25,
            [0.3, 0.8],
            noise_resolution="model",
            native_radius_factor=0.5,
        ),
        write_point(tmp_path, "undefended", 0.25, [0.1, 0.6]),
    ]
    return smoke.model_copy(update=update), [f[0] for f in files], [f[1] for f in files]


@pytest.fixture
def tables(tmp_path: Path, results: Results) -> Path:
    """Folder of the tables of `results`."""
    build_tables(*results, tmp_path / "tables")
    return tmp_path / "tables"


def test_curves_share_a_grid_and_keep_the_order(tables: Path) -> None:
    frame = pd.read_csv(tables / "certified_accuracy.csv")
    order = frame[["method", "sigma"]].drop_duplicates()
    expected = [(method, sigma) for method in METHODS for sigma in SIGMAS]
    assert list(order.itertuples(index=False, name=None)) == expected
    for sigma, radii in ((0.25, [0, 0.25, 0.5, 0.75, 1.0]), (0.5, [0, 0.25, 0.5, 0.75, 1.0, 1.25])):
        for method in METHODS:
            part = frame[(frame["method"] == method) & (frame["sigma"] == sigma)]
            assert part["radius"].tolist() == radii
    lora = frame[(frame["method"] == "lora") & (frame["sigma"] == 0.5)]
    assert lora["value"].tolist() == [0.5, 0.5, 0.25, 0.25, 0.25, 0.0]


def test_native_radii_follow_from_the_sidecar(tables: Path) -> None:
    frame = pd.read_csv(tables / "certified_accuracy.csv").set_index(["method", "sigma"])
    assert list(frame.columns[-2:]) == ["noise_resolution", "native_radius"]
    resized = frame.loc[("lora", 0.25)]
    assert set(resized["noise_resolution"]) == {"model"}
    assert resized["radius"].tolist() == [0, 0.25, 0.5, 0.75, 1.0]
    assert resized["native_radius"].tolist() == [0, 0.125, 0.25, 0.375, 0.5]
    native = frame.drop(index=("lora", 0.25))
    assert set(native["noise_resolution"]) == {"native"}
    assert (native["native_radius"] == native["radius"]).all()


def test_envelope_takes_the_best_sigma_at_each_radius(tables: Path) -> None:
    frame = pd.read_csv(tables / "envelope.csv")
    lora = frame[frame["method"] == "lora"].set_index("radius")
    assert lora["value"].to_dict() == {0.0: 0.5, 0.25: 0.5, 0.5: 0.25, 0.75: 0.25, 1.0: 0.25}
    assert lora.loc[[0.25, 1.0], "sigma"].tolist() == [0.25, 0.5]


@pytest.mark.parametrize(
    ("asked", "known"),
    [
        ({"candidate": "pilot"}, True),
        ({"candidate": "label"}, False),
        ({"candidate": "label", "mode": "predict"}, True),
    ],
)
def test_a_test_of_the_true_class_alone_knows_no_abstentions(smoke, tmp_path, asked, known):
    log, _ = write_point(tmp_path, "lora", 0.5, [0.4], **asked)
    row = _summary_row(smoke, *read_own_log(log))
    assert row["abstention"] == pytest.approx(1 / 3 if known else np.nan, nan_ok=True)


def test_summary_numbers(tables: Path) -> None:
    row = pd.read_csv(tables / "summary.csv").query("method == 'lora' and sigma == 0.5").iloc[0]
    assert row["clean_accuracy"] == 0.75
    assert row["noisy_accuracy"] == pytest.approx(0.6)
    assert row["smoothed_accuracy"] == 0.5
    assert row["abstention"] == 0.25
    assert row["average_certified_radius"] == pytest.approx(1.5 / 4)
    assert row["smoothed_low"] < 0.5 < row["smoothed_high"]
    assert row["acr_low"] < row["average_certified_radius"] < row["acr_high"]
    assert (row["samples_per_image"], row["certification_seconds"]) == (110, 9.0)


def test_classes_share_out_the_images(tmp_path: Path, results: Results) -> None:
    log = results[1][0]  # lora at sigma 0.5: radii 0.4 and 1.1, an abstention, a wrong answer
    frame = pd.read_csv(log, sep="\t")
    frame.loc[frame["radius"] == 0.4, ["label", "predict"]] = 7
    frame.to_csv(log, sep="\t", index=False)
    build_tables(*results, tmp_path / "tables")
    table = pd.read_csv(tmp_path / "tables/per_class.csv")
    lora = table.query("method == 'lora' and sigma == 0.5")
    assert lora["radius"].unique().tolist() == [0, 0.25, 0.5, 0.75]
    values = lora.pivot(index="class", columns="radius", values="value")
    assert values.loc[7].tolist() == [1, 1, 0, 0]
    assert values.loc[1].tolist() == pytest.approx([1 / 3] * 4)
    assert lora.groupby("class")["n_images"].first().to_dict() == {1: 3, 7: 1}
    curve = pd.read_csv(tmp_path / "tables/certified_accuracy.csv").query(
        "method == 'lora' and sigma == 0.5 and radius <= 0.75"
    )
    weighted = (lora["value"] * lora["n_images"]).groupby(lora["radius"]).sum() / 4
    assert weighted.tolist() == pytest.approx(curve["value"].tolist())


def test_vote_shares_count_votes_of_the_true_class_alone(tables: Path) -> None:
    table = pd.read_csv(tables / "vote_shares.csv")
    lora = table.query("method == 'lora' and sigma == 0.5").set_index("p_a")["value"]
    # 90 of 100 votes for three images, one of them abstained; the fourth has another candidate.
    assert set(lora[lora.index < 0.9]) == {0.25}
    assert set(lora[lora.index >= 0.9]) == {1.0}
    assert (lora.index[0], lora.index[-1]) == (0, 1)


def test_pooling_one_seed_changes_nothing_and_says_so(tables: Path) -> None:
    curves = pd.read_csv(tables / "certified_accuracy.csv")
    frame = pd.read_csv(tables / "pooled.csv")
    columns = ["method", "sigma", "radius", "value", "low", "high"]
    pd.testing.assert_frame_equal(frame[columns], curves[columns])
    assert set(frame["interval_kind"]) == {"images of one seed"}
    assert frame["between_variance"].isna().all()


def test_pooling_keeps_the_variance_of_seeds_and_of_images_apart(tables: Path) -> None:
    curves = pd.read_csv(tables / "certified_accuracy.csv")
    other = curves.assign(seed=1, value=curves["value"] / 2, low=curves["low"] / 2)
    frame = pooled(pd.concat([curves, other], ignore_index=True))
    assert len(frame) == len(curves)
    row = frame.query("method == 'lora' and sigma == 0.5 and radius == 0").iloc[0]
    one = curves.query("method == 'lora' and sigma == 0.5 and radius == 0").iloc[0]
    assert (row["seeds"], row["interval_kind"]) == (2, "images and seeds")
    assert row["value"] == 0.375
    assert row["between_variance"] == pytest.approx(0.25**2 / 2)
    assert row["within_variance"] == pytest.approx((0.5 * 0.5 + 0.25 * 0.75) / 2 / 4)
    expected = pool_seeds([0.5, 0.25], [one["low"], one["low"] / 2], [one["high"]] * 2)
    assert (row["low"], row["high"]) == (max(expected[1], 0), min(expected[2], 1))


def test_cost_leaves_the_head_out(tables: Path) -> None:
    frame = pd.read_csv(tables / "cost.csv")
    assert frame["trainable_without_head"].tolist() == [100] * 4
    assert frame["label"].tolist() == ["undefended"] * 2 + ["LoRA"] * 2


def test_leaderboard_is_a_markdown_table(tables: Path) -> None:
    lines = (tables / "leaderboard.md").read_text().splitlines()
    assert len(lines) == 2 + len(METHODS)
    assert len({line.count("|") for line in lines}) == 1
    columns = [cell.strip() for cell in lines[0].split("|")]
    lora = [cell.strip() for cell in lines[3].split("|")]
    assert lora[1] == "LoRA"
    assert lora[columns.index("σ=0.5, r=0.25")] == "50.0"
    assert lora[columns.index("σ=0.5, r=0.5")] == "25.0"


def test_a_method_may_lack_a_sigma(tmp_path: Path, results: Results) -> None:
    experiment, logs, costs = results
    methods = dict(experiment.methods)
    methods["lora"] = methods["lora"].model_copy(update={"sigmas": [0.5]})
    partial = experiment.model_copy(update={"methods": methods})
    logs, costs = ([files[place] for place in (0, 1, 3)] for files in (logs, costs))
    build_tables(partial, logs, costs, tmp_path / "out")
    lines = (tmp_path / "out/leaderboard.md").read_text().splitlines()
    columns = [cell.strip() for cell in lines[0].split("|")]
    lora = [cell.strip() for cell in lines[3].split("|")]
    assert lora[columns.index("σ=0.25, r=0.25")] == "–"
    assert lora[columns.index("σ=0.5, r=0.25")] == "50.0"


@pytest.mark.parametrize(
    ("sigma", "step", "radii"),
    [
        (0.5, 0.125, [0, 0.25, 0.5, 0.75]),
        (0.25, 0.25, [0, 0.25]),
        (0.25, 0.1, [0]),
        (0.2, 0.05, [0, 0.1, 0.2, 0.3]),  # 3 * 0.2 / 2 is above the float of 0.3
    ],
)
def test_methods_are_compared_where_radii_were_decided(
    sigma: float, step: float, radii: list[float]
) -> None:
    assert leaderboard_radii(sigma, step) == radii


def test_pairs_say_where_each_has_its_noise(tmp_path: Path, results: Results) -> None:
    experiment, *written = results
    methods = dict(experiment.methods)
    methods["lora"] = methods["lora"].model_copy(update={"noise_resolution": "model"})
    build_tables(experiment.model_copy(update={"methods": methods}), *written, tmp_path / "mixed")
    pairs = pd.read_csv(tmp_path / "mixed/paired.csv")
    for side in ("a", "b"):
        model = pairs[f"noise_resolution_{side}"] == "model"
        assert (model == (pairs[f"method_{side}"] == "lora")).all()
    assert model.any()  # the second of a pair: `undefended` comes first in the experiment


@pytest.mark.fault(
    fault="log or cost of a method missing",
    stage="tables",
    outcome="refused: names method, sigma and seed",
)
@pytest.mark.parametrize("kind", [0, 1])
def test_a_missing_point_is_named(tmp_path: Path, results: Results, kind: int) -> None:
    results[1:][kind].pop(0)
    with pytest.raises(BenchError, match=r"lora at sigma 0\.5, seed 0 has no results"):
        build_tables(*results, tmp_path / "tables")


def test_a_point_given_twice_is_refused(tmp_path: Path, results: Results) -> None:
    results[1].append(results[1][0])
    with pytest.raises(BenchError, match=r"lora at sigma 0\.5.* more than once"):
        build_tables(*results, tmp_path / "tables")


def test_a_foreign_log_is_refused(tmp_path: Path, results: Results) -> None:
    results[1].append(write_point(tmp_path, "other", 0.5, [0.1])[0])
    with pytest.raises(BenchError, match=r"other at sigma 0\.5.* not part"):
        build_tables(*results, tmp_path / "tables")


@pytest.mark.fault(
    fault="log or cost of another experiment",
    stage="tables",
    outcome="refused: names the file",
)
@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("experiment", ["other", None])
def test_a_file_of_another_experiment_is_refused(tmp_path, results, kind, experiment):
    path = results[1:][kind][0]
    sidecar = path.with_suffix(".json")
    values = json.loads(sidecar.read_text()) | {"experiment": experiment}
    if experiment is None:
        # As the sidecars of `bench certify`.
        del values["experiment"], values["method"]
    sidecar.write_text(json.dumps(values))
    whose = experiment or "no experiment"
    with pytest.raises(BenchError, match=rf"{path.name} is of {whose}, not of smoke"):
        build_tables(*results, tmp_path / "tables")


@pytest.mark.fault(
    fault="logs of several protocols",
    stage="tables",
    outcome="refused: names the key and two methods",
)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mode", "decide"),
        ("n0", 9),
        ("n", 99),
        ("alpha", 0.01),
        ("candidate", "label"),
        ("family_size", 3),
    ],
)
def test_logs_of_several_protocols_are_refused(tmp_path, results, key, value):
    sidecar = results[1][0].with_suffix(".json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {key: value}))
    with pytest.raises(BenchError, match=rf"{key} is {value} of lora and .* of undefended"):
        build_tables(*results, tmp_path / "tables")


def test_seeds_are_kept_apart(tmp_path, results):
    experiment, logs, costs = results
    for method, sigma, radii in (
        ("lora", 0.5, [0.1, 0.1]),
        ("undefended", 0.5, [0.7, 0.8]),
        ("lora", 0.25, [0.3, 0.3]),
        ("undefended", 0.25, [0.3, 0.3]),
    ):
        log, cost = write_point(tmp_path, method, sigma, radii, seed=1)
        logs.append(log)
        costs.append(cost)
    both = experiment.model_copy(update={"seeds": [0, 1]})
    build_tables(both, logs, costs, tmp_path / "out")
    pairs = pd.read_csv(tmp_path / "out/paired.csv").query("sigma == 0.5 and radius == 0.25")
    found = pairs.set_index("seed")[["only_a", "only_b"]]
    assert found.to_dict("index") == {0: {"only_a": 0, "only_b": 2}, 1: {"only_a": 2, "only_b": 0}}
    best = pd.read_csv(tmp_path / "out/envelope.csv").query("radius == 0.5")
    values = best.set_index(["method", "seed"])["value"].to_dict()
    assert values == {("undefended", 0): 0.25, ("undefended", 1): 0.5, ("lora", 0): 0.25}
    board = (tmp_path / "out/leaderboard.md").read_text()
    build_tables(experiment, logs[:4], costs[:4], tmp_path / "first")
    assert board == (tmp_path / "first/leaderboard.md").read_text()


@pytest.mark.fault(
    fault="log cut at the end of a line",
    stage="tables",
    outcome="refused: images are missing",
)
def test_a_log_cut_at_a_line_end_is_refused(tmp_path: Path, results: Results) -> None:
    log = results[1][0]
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(BenchError, match="3 of 4 images"):
        build_tables(*results, tmp_path / "tables")
