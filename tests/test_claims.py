"""Verdicts: what the numbers say, on small tables whose every number is known and on our own."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from bench.claims import VERDICTS, build_claims, load_claims, render, verdict_of
from bench.config import load_experiment
from bench.errors import BenchError
from bench.paired import paired_difference_interval
from bench.smoothing.bounds import radius_cap
from bench.statistics import accuracy_interval, independent_difference_interval, pool_seeds

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "config/claims.yaml"
REFERENCE = ROOT / "results/reference"
IMAGES = 400
AT = {"sigmas": [0.5], "radii": [0.5]}
LEVEL = {"kind": "at_least", "methods": ["lora"], **AT, "value": 0.6}
ABOVE = {"kind": "difference_at_least", "methods": ["lora"], "rivals": ["cnn"], **AT, "value": 0.1}
NO_WORSE = {**ABOVE, "value": -0.1}
CHEAPER = {
    "kind": "ratio_at_least",
    "methods": ["lora"],
    "rivals": ["cnn"],
    "sigmas": [0.5],
    "costs": ["trainable_parameters"],
    "value": 10,
}


def write_curves(folder: Path, values: dict[str, float | list[float]]) -> None:
    """Certified accuracy at sigma 0.5, radius 0 (all right) and 0.25, a value per seed."""
    rows = []
    for method, per_seed in values.items():
        for seed, value in enumerate(np.atleast_1d(per_seed)):
            for radius, share in ((0.0, 1.0), (0.25, value)):
                point = {"method": method, "sigma": 0.5, "seed": seed, "radius": radius}
                rows.append({**point, "value": share, "n_images": IMAGES})
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / "certified_accuracy.csv", index=False)
    summary = {"sigma": 0.5, "n": 1000, "alpha": 0.001, "clean_accuracy": [0.8, 0.95]}
    pd.DataFrame(summary).to_csv(folder / "summary.csv", index=False)


def write_pairs(folder: Path, *pairs: tuple[str, str, int, int]) -> None:
    """paired.csv at sigma 0.5 and radius 0.25: a, b, images of a alone, of b alone."""
    columns = ["method_a", "method_b", "only_a", "only_b"]
    table = pd.DataFrame(pairs, columns=columns)
    table.assign(sigma=0.5, seed=0, radius=0.25, n_images=IMAGES).to_csv(
        folder / "paired.csv", index=False
    )


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Tables of an experiment `mine`: lora 0.7, cnn 0.5; every image of cnn is one of lora."""
    folder = tmp_path / "results/mine/tables"
    write_curves(folder, {"lora": 0.7, "cnn": 0.5})
    write_pairs(folder, ("cnn", "lora", 0, 80))
    cost = {"method": ["lora", "cnn"], "sigma": 0.5, "seed": 0, "trainable_parameters": [10, 100]}
    pd.DataFrame(cost).to_csv(folder / "cost.csv", index=False)
    return folder


def judge(tables: Path, rule: dict, experiment: str = "mine") -> pd.Series:
    """The one reading of one claim."""
    root = tables.parents[2]
    claim = {"text": "t", "source": "s", "transferred_to": [experiment], "rule": rule}
    (root / "claims.yaml").write_text(yaml.safe_dump({"claims": {"one": claim}}))
    table = build_claims(root / "claims.yaml", [root / "results"], root / "claims.csv")
    assert len(table) == 1
    return table.iloc[0]


@pytest.mark.parametrize(
    ("interval", "needed", "verdict"),
    [
        ((0.1, 0.2), 0.1, "supported"),
        ((0.0, 0.2), 0.1, "undecided"),
        ((0.0, 0.1), 0.1, "undecided"),
        ((0.0, 0.09), 0.1, "contradicted"),
        ((np.nan, np.nan), 0.1, "undecided"),
    ],
)
def test_a_verdict_needs_the_whole_interval(interval, needed, verdict):
    assert verdict_of(*interval, needed) == verdict


@pytest.mark.parametrize(
    ("value", "verdict"), [(0.7, "supported"), (0.62, "undecided"), (0.5, "contradicted")]
)
def test_a_level_follows_its_table(tables, value, verdict):
    write_curves(tables, {"lora": value})
    row = judge(tables, LEVEL)
    low, high = map(float, accuracy_interval(round(value * IMAGES), IMAGES))
    assert (row["verdict"], row["effect"]) == (verdict, value)
    assert (row["low"], row["high"]) == pytest.approx((low, high))
    assert row["interval_kind"] == "Clopper-Pearson; images of one seed"


@pytest.mark.parametrize(("n", "verdict"), [(10, "undecided"), (1000, "supported")])
def test_radii_that_no_number_of_equal_votes_certifies_decide_nothing(tables, n, verdict):
    """Nobody certifies anything there, which is no equality."""
    assert radius_cap(10, 0.001, 0.5) < 0.25 < radius_cap(1000, 0.001, 0.5)
    write_curves(tables, {"lora": 0.0, "cnn": 0.0})
    write_pairs(tables, ("cnn", "lora", 0, 0))
    summary = pd.DataFrame({"sigma": [0.5], "n": [n], "alpha": [0.001]})
    summary.to_csv(tables / "summary.csv", index=False)
    row = judge(tables, NO_WORSE)
    assert row["verdict"] == verdict
    assert (row["reason"] == "beyond the cap of n draws") == (n == 10)


@pytest.mark.parametrize(
    ("only_lora", "only_cnn", "verdict"),
    [(80, 0, "supported"), (60, 15, "undecided"), (30, 30, "contradicted")],
)
def test_a_difference_follows_the_paired_table_whichever_comes_first(
    tables, only_lora, only_cnn, verdict
):
    expected = paired_difference_interval(only_lora, only_cnn, IMAGES)
    for pair in (("cnn", "lora", only_cnn, only_lora), ("lora", "cnn", only_lora, only_cnn)):
        write_pairs(tables, pair)
        row = judge(tables, ABOVE)
        assert row["verdict"] == verdict
        assert (row["low"], row["high"]) == pytest.approx(expected)
        assert row["interval_kind"] == "paired; images of one seed"
        assert row["evidence"] == (
            f"{tables / 'paired.csv'}: sigma 0.5, radius 0.25, seed 0: lora against cnn"
        )


@pytest.mark.parametrize(("rival", "reason"), [(0.75, ""), (0.77, "out of reach")])
def test_more_than_clean_accuracy_is_told_from_what_this_method_did_not_reach(
    tables, rival, reason
):
    write_curves(tables, {"lora": 0.5, "cnn": rival})
    write_pairs(tables, ("lora", "other", 0, 0))
    row = judge(tables, {**ABOVE, "value": 0.2})
    assert row["verdict"] == "contradicted"
    assert row["reason"] == reason or (pd.isna(row["reason"]) and not reason)


def test_a_pair_that_the_table_lacks_is_independent_and_wider(tables):
    paired = judge(tables, ABOVE)
    write_pairs(tables, ("cnn", "other", 0, 80))
    apart = judge(tables, ABOVE)
    assert apart["interval_kind"] == "independent; images of one seed"
    assert "certified_accuracy.csv" in apart["evidence"]
    assert [apart["effect"], paired["effect"]] == pytest.approx([0.2, 0.2])
    assert apart["high"] - apart["low"] > 1.2 * (paired["high"] - paired["low"])


def test_a_curve_that_has_ended_is_zero(tables):
    row = judge(tables, {**LEVEL, "radii": [1.5], "value": 0.1})
    assert (row["effect"], row["verdict"]) == (0.0, "contradicted")


def test_the_best_of_a_group_pays_for_the_choice(tables):
    methods = [f"m{number}" for number in range(4)]
    write_curves(tables, dict.fromkeys(methods, 0.62))
    row = judge(tables, {**LEVEL, "methods": methods})
    low, high = map(float, accuracy_interval(248, IMAGES, 1 - 0.05 / 4))
    assert (row["low"], row["high"]) == pytest.approx((low, high))
    assert row["comparisons"] == 4


def test_the_best_of_several_meets_the_best_of_several_rivals(tables):
    """Effect and ends are those of the best method against the rival that it beats by least."""
    values = {"m0": 0.60, "m1": 0.70, "r0": 0.40, "r1": 0.55}
    only = {("m0", "r0"): (90, 10), ("m0", "r1"): (30, 10)}
    only |= {("m1", "r0"): (125, 5), ("m1", "r1"): (64, 4)}
    write_curves(tables, values)
    write_pairs(tables, *((*pair, *counts) for pair, counts in only.items()))
    row = judge(tables, {**ABOVE, "methods": ["m0", "m1"], "rivals": ["r0", "r1"]})
    counts = np.array([only["m0", "r0"], only["m0", "r1"], only["m1", "r0"], only["m1", "r1"]])
    ends = paired_difference_interval(*counts.T, IMAGES, 1 - 0.05 / 4)
    low, high = (np.max([min(end[:2]), min(end[2:])]) for end in ends)
    assert row["effect"] == pytest.approx(0.15)
    assert row["decided_by"] == "m1 against r1"
    assert (row["low"], row["high"]) == pytest.approx((low, high))
    assert row["comparisons"] == 4


def test_the_best_pays_for_the_choice_in_the_part_of_seeds_too(tables):
    values = {"m0": [0.5, 0.7, 0.6], "m1": [0.6, 0.8, 0.7]}
    write_curves(tables, values)
    row = judge(tables, {**LEVEL, "methods": ["m0", "m1"]})
    hits = np.array(values["m1"]) * IMAGES
    ends = accuracy_interval(hits, IMAGES, 1 - 0.05 / 2)
    expected = pool_seeds(values["m1"], *ends, 1 - 0.05 / 2)
    assert (row["effect"], row["low"], row["high"]) == pytest.approx(expected)
    assert (row["high"] - row["low"]) > 1.3 * np.ptp(pool_seeds(values["m1"], *ends)[1:])


def test_pairs_that_the_table_lacks_pay_for_the_choice_as_well(tables):
    write_curves(tables, {"m0": 0.5, "m1": 0.7, "cnn": 0.5})
    write_pairs(tables, ("cnn", "other", 0, 80))
    row = judge(tables, {**ABOVE, "methods": ["m0", "m1"]})
    confidence = 1 - 0.05 / 2
    a, b = (
        np.array([[share], *np.transpose([accuracy_interval(share * IMAGES, IMAGES, confidence)])])
        for share in (0.7, 0.5)
    )
    low, high = independent_difference_interval(a, b)
    assert (row["low"], row["high"]) == pytest.approx((low[0], high[0]))


def best_coverage(corrected: bool) -> float:
    """How often the interval of the best of 8 equal methods holds their accuracy."""
    hits = np.random.default_rng(0).binomial(IMAGES, 0.6, size=(4_000, 8))
    if corrected:
        low, high = (e.max(axis=1) for e in accuracy_interval(hits, IMAGES, 1 - 0.05 / 8))
    else:
        low, high = accuracy_interval(hits.max(axis=1), IMAGES)
    return ((low <= 0.6) & (high >= 0.6)).mean()


def test_the_winner_covers_only_when_it_pays():
    assert best_coverage(corrected=True) > 0.95
    assert best_coverage(corrected=False) < 0.9


def test_several_seeds_are_pooled(tables):
    values = [0.7, 0.5, 0.9]
    write_curves(tables, {"lora": values})
    row = judge(tables, LEVEL)
    low, high = accuracy_interval(np.array(values) * IMAGES, IMAGES)
    expected = pool_seeds(values, low, high)
    assert (row["effect"], row["low"], row["high"]) == pytest.approx(expected)
    assert (row["verdict"], row["seeds"]) == ("undecided", 3)
    assert row["interval_kind"] == "Clopper-Pearson; images and seeds"
    assert "seed 0, 1, 2" in row["evidence"]


@pytest.mark.parametrize(("rival", "verdict"), [(100, "supported"), (99, "contradicted")])
def test_a_ratio_of_counts_is_exact(tables, rival, verdict):
    cost = pd.read_csv(tables / "cost.csv")
    cost["trainable_parameters"] = [10, rival]
    cost.to_csv(tables / "cost.csv", index=False)
    row = judge(tables, CHEAPER)
    assert (row["verdict"], row["effect"], row["interval_kind"]) == (verdict, rival / 10, "exact")
    assert pd.isna(row["low"])


def test_a_cost_that_is_not_known_decides_nothing(tables):
    cost = pd.read_csv(tables / "cost.csv")
    cost["training_flops"], cost["base_training_flops"] = [10, 100], [np.nan, 0]
    cost.to_csv(tables / "cost.csv", index=False)
    known = judge(tables, {**CHEAPER, "costs": ["training_flops"]})
    assert (known["verdict"], known["effect"]) == ("supported", 10)
    row = judge(tables, {**CHEAPER, "costs": ["training_flops + base_training_flops"]})
    why = "no ratio: a cost is unknown, or both are 0"
    assert (row["verdict"], row["reason"]) == ("undecided", why)
    assert f"| {why} |" in (tables.parents[2] / "claims.md").read_text()
    cost["training_flops"] = 0
    cost.to_csv(tables / "cost.csv", index=False)
    assert judge(tables, {**CHEAPER, "costs": ["training_flops"]})["reason"] == why


@pytest.mark.parametrize(
    ("costs", "effect", "verdict"),
    [([0, 100], np.inf, "supported"), ([0, 0], None, "undecided"), ([10, 0], 0, "contradicted")],
)
def test_a_method_may_cost_nothing(tables, costs, effect, verdict):
    cost = pd.read_csv(tables / "cost.csv").assign(trainable_parameters=costs)
    cost.to_csv(tables / "cost.csv", index=False)
    row = judge(tables, CHEAPER)
    assert (row["verdict"], row["effect"]) == (verdict, effect)
    assert row["decided_by"] == (None if verdict == "undecided" else "lora against cnn")


@pytest.mark.parametrize(("ratio", "verdict"), [(10, "supported"), (9.9, "contradicted")])
def test_accounting_takes_the_smallest_parameterization(tables, ratio, verdict):
    row = {"kind": ["lora", "bias"], "settings": ["r=1", ""], "ratio_with_head": [2, ratio]}
    path = tables.parents[1] / "accounting.csv"
    pd.DataFrame({**row, "data": "mine", "denoiser": "cnn"}).to_csv(path, index=False)
    rule = {
        "kind": "accounting_ratio_at_least",
        "parameterizations": {"lora": "r=1", "bias": ""},
        "denoiser": "cnn",
        "costs": ["with_head"],
        "value": 10,
    }
    row = judge(tables, rule)
    assert (row["verdict"], row["effect"]) == (verdict, ratio)
    with pytest.raises(BenchError, match=r"accounting\.csv has no kind lora, settings r=2"):
        judge(tables, {**rule, "parameterizations": {"lora": "r=2"}})


@pytest.mark.parametrize("rule", [LEVEL, ABOVE, CHEAPER], ids=lambda rule: rule["kind"])
def test_what_has_not_run_is_undecided(tables, rule):
    row = judge(tables, rule, "absent")
    assert (row["verdict"], row["reason"]) == ("undecided", "not run")
    assert pd.isna(row["effect"])


def test_the_first_folder_that_has_an_experiment_counts(tables, tmp_path):
    judge(tables, LEVEL)
    write_curves(tmp_path / "live/mine/tables", {"lora": 0.2})
    for folders, verdict in ((["live", "results"], "contradicted"), (["results"], "supported")):
        paths = [tmp_path / folder for folder in folders]
        table = build_claims(tmp_path / "claims.yaml", paths, tmp_path / "claims.csv")
        assert table["verdict"].tolist() == [verdict]
        assert table["evidence"].iloc[0].startswith(str(paths[0]))


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        ({**LEVEL, "kind": "most"}, r"claims\.one\.rule"),
        ({**LEVEL, "methods": []}, r"claims\.one\.rule\.at_least\.methods"),
        ({**LEVEL, "margin": 1}, r"claims\.one\.rule\.at_least\.margin"),
        ({**CHEAPER, "costs": ["seconds"]}, r"rule\.ratio_at_least\.costs"),
        (
            {**CHEAPER, "costs": ["training_flops"]},
            r"claims\.one: .*cost\.csv has no column training_flops",
        ),
    ],
)
def test_a_mistake_is_named_with_file_and_key(tables, rule, named):
    with pytest.raises(BenchError, match=rf"(?s)claims\.yaml.*{named}"):
        judge(tables, rule)


@pytest.mark.parametrize(
    ("rule", "lacking"),
    [
        ({**LEVEL, "methods": ["lorra"]}, "certified_accuracy.csv has no method lorra, sigma 0.5"),
        ({**LEVEL, "sigmas": [1.0]}, "summary.csv has no sigma 1.0"),
        ({**LEVEL, "radii": [0.3]}, "certified_accuracy.csv has no radius 0.15"),
        ({**ABOVE, "rivals": ["cnm"]}, "certified_accuracy.csv has no method cnm, sigma 0.5"),
        ({**CHEAPER, "rivals": ["cnm"]}, "cost.csv has no method cnm, sigma 0.5"),
    ],
)
def test_what_an_experiment_ran_without_is_undecided_and_named(tables, rule, lacking):
    """Whoever leaves a method or a sigma out of quick.yaml has a report all the same."""
    row = judge(tables, rule)
    assert (row["verdict"], row["reason"]) == ("undecided", "not in the tables")
    assert row["evidence"].endswith(lacking)
    assert lacking in (tables.parents[2] / "claims.md").read_text()


def test_missing_files_and_claims_judged_nowhere_are_named(tables, tmp_path):
    with pytest.raises(BenchError, match=r"absent\.yaml"):
        load_claims(tmp_path / "absent.yaml")
    (tmp_path / "nowhere.yaml").write_text(
        yaml.safe_dump({"claims": {"one": {"text": "t", "source": "s", "rule": LEVEL}}})
    )
    with pytest.raises(BenchError, match=r"nowhere\.yaml.*\n.*claims\.one.*name an experiment"):
        load_claims(tmp_path / "nowhere.yaml")
    judge(tables, ABOVE)
    with pytest.raises(BenchError, match=r"--results .*nothing is no folder"):
        build_claims(tmp_path / "claims.yaml", [tmp_path / "nothing"], tmp_path / "claims.csv")
    (tables / "paired.csv").unlink()
    with pytest.raises(BenchError, match=r"claims\.one: .*paired\.csv is missing"):
        judge(tables, ABOVE)


def test_every_shipped_claim_fits_its_experiments():
    """A misspelled experiment would stay undecided for good."""
    for name, claim in load_claims(SHIPPED).claims.items():
        for reading in claim.readings():
            if claim.rule.kind == "accounting_ratio_at_least":
                continue
            own = load_experiment(ROOT / f"config/{reading.experiment}.yaml")
            named = {*claim.rule.methods, *getattr(claim.rule, "rivals", [])}
            assert named <= set(own.methods), name
            assert reading.sigma in own.sigmas, name
            if not reading.cost:
                steps = reading.radius / own.radius_step
                assert steps == pytest.approx(round(steps)), name


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> pd.DataFrame:
    """Verdicts on the committed tables."""
    output = tmp_path_factory.mktemp("reference") / "claims.csv"
    return build_claims(SHIPPED, [REFERENCE], output)


def test_the_committed_verdicts_are_those_of_the_committed_tables(reference):
    committed = pd.read_csv(REFERENCE / "claims.csv")
    keys = ["claim", "experiment", "form", "verdict"]
    pd.testing.assert_frame_equal(reference[keys], committed[keys])
    numbers = ["sigma", "radius", "effect", "low", "high", "needed"]
    pd.testing.assert_frame_equal(
        reference[numbers].astype(float), committed[numbers].astype(float)
    )
    assert (REFERENCE / "claims.md").read_text() == render(reference)


def test_the_readme_counts_the_committed_verdicts(reference):
    counts, absent = reference["verdict"].value_counts(), (reference["reason"] == "not run").sum()
    readme = " ".join((ROOT / "README.md").read_text().split())
    supported, contradicted, undecided = (counts[verdict] for verdict in VERDICTS)
    assert f"{supported} of {len(reference)} readings are supported" in readme
    assert f"{contradicted} contradicted, {undecided} undecided, {absent} of which" in readme


def test_verdicts_on_the_reference_are_what_its_numbers_say(reference):
    ran = reference[reference["reason"] != "not run"]
    measured = {path.name for path in REFERENCE.iterdir() if path.is_dir()}
    assert set(ran["experiment"]) - measured == {"cifar10", "imagenet"}
    counts = ran.loc[~ran["experiment"].isin(measured), "kind"]
    assert set(counts) == {"accounting_ratio_at_least"}
    verdicts = ran[ran["experiment"] == "quick"].groupby("claim")["verdict"].agg(list)
    # README: LoRA is at most level with the small DnCNN, which trains 10 k weights, not 500 k.
    assert verdicts["over_cnn_denoiser_by_20"] == ["contradicted"] * 3
    assert verdicts["over_cnn_denoiser_by_30"] == ["contradicted"] * 3
    assert verdicts["tenth_of_cnn_denoiser_measured"] == ["contradicted"] * 2
    assert verdicts["fraction_of_retraining"] == ["supported", "contradicted"]
    counted = ran[ran["kind"] == "accounting_ratio_at_least"]
    accounting = pd.read_csv(REFERENCE / "accounting.csv")
    lora = accounting[
        (accounting["settings"] == "r=8, lora_alpha=16") & (accounting["kind"] == "lora")
    ].set_index(["data", "denoiser"])
    found = counted[counted["claim"] == "tenth_of_cnn_denoiser_lora"]
    assert found["effect"].tolist() == pytest.approx(
        lora.loc[[("cifar10", "DnCNN"), ("imagenet", "DnCNN")]][
            ["ratio_without_head", "ratio_with_head"]
        ]
        .to_numpy()
        .ravel()
    )
    assert set(found["verdict"]) == {"contradicted"}


def test_the_page_leaves_out_no_reading(reference):
    page = render(reference)
    for verdict, number in reference["verdict"].value_counts().items():
        assert re.search(rf"^## {verdict}: {number}(, \d+ of them not run)?$", page, re.M)
    absent = reference["reason"] == "not run"
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    _, *tally = [row[1:] for row in rows if len(row) == 6]
    counted = [[int(cell.strip(" |") or 0) for cell in row] for row in tally]
    reach = reference["reason"] == "out of reach"
    verdicts = reference["verdict"].value_counts()
    assert np.sum(counted, axis=0).tolist() == [
        verdicts["supported"],
        verdicts["contradicted"] - reach.sum(),
        reach.sum(),
        verdicts["undecided"] - absent.sum(),
        absent.sum(),
    ]
    counts = [int(row[-1].rstrip(" |")) for row in rows if len(row) == 3 and row[0] != "| not run"]
    assert sum(counts) == absent.sum()
    assert sum(len(row) == 5 for row in rows) == 3 + (~absent).sum()
