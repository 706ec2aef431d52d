"""Verdicts on claims, from tables alone.

Where a rule names several methods (or rivals), it is about the best of them. Which one is best is
not known, so every pair has an interval at the Bonferroni level of their number, and the interval
of the best is the highest over methods of the lowest over rivals, of either end: it holds whichever
is best, which an interval for the winner on the test images would not.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import pandas as pd
from pydantic import Field, NonNegativeFloat, PositiveFloat, ValidationError, model_validator

from bench.config import Name, complaints
from bench.csv_files import read_csv
from bench.errors import BenchError
from bench.files import atomic_write, read_yaml
from bench.paired import paired_difference_interval
from bench.settings import Settings
from bench.smoothing.bounds import radius_cap
from bench.statistics import (
    CONFIDENCE,
    accuracy_interval,
    independent_difference_interval,
    pool_seeds,
)

VERDICTS = ("supported", "contradicted", "undecided")
# Radii are decimal fractions; this is far below their spacing.
ROUNDING = 1e-6
CURVES = "certified_accuracy.csv"
INTRODUCTION = """
Accuracies are shares, radii l2 in [0, 1] pixels. Differences are the method minus its rival, ratios
the rival's cost over the method's. Where a claim names several methods or rivals, the best of each
counts and stands beside the number. `paper`: the experiment of the paper; `transferred`: a like
claim on another, no verdict on the paper's numbers. Every reading is judged by itself at 95 %,
uncorrected for their number; an interval over the images of one seed leaves the randomness of
training out. Out of reach: as far above the rival as asked is above the clean accuracy of every
method of the experiment. Beyond the cap: not even n equal votes certify that far. With noise at 224
pixels, or on images of seven times the side, radii are compared as printed: one of PEFT is a
seventh of a rival's. The ratios of parameters to denoisers and diffusion models stand in lines that
the authors commented out of their abstract's source. `claims.csv` has the evidence and the source
of each.
"""
NO_RATIO = "no ratio: a cost is unknown, or both are 0"
BEYOND = "beyond the cap of n draws"
LACKING = "not in the tables"
APART = ("out of reach", "not run")
Group = Annotated[list[Name], Field(min_length=1)]
Cost = Literal[
    "trainable_without_head",
    "trainable_parameters",
    "training_flops",
    "training_flops + base_training_flops",
    "inference_flops",
]


class Reading(NamedTuple):
    """One way to read a claim: where, and at which of the values that it leaves open."""

    form: Literal["paper", "transferred"]
    experiment: str
    sigma: float = np.nan
    radius: float = np.nan
    cost: str = ""


class Estimate(NamedTuple):
    """What the tables say about one reading."""

    effect: float
    low: float
    high: float
    interval_kind: str
    seeds: int
    comparisons: int
    decided_by: str
    evidence: str


class Pair(NamedTuple):
    """What a method and a rival reach, per seed: `seed, value, low, high`."""

    rows: pd.DataFrame
    interval_kind: str
    tables: list[Path]


class Lacking(BenchError):
    """The tables of an experiment lack what a claim names: it ran with other methods or sigmas."""


class Rule(Settings):
    """What a claim asserts, an effect of at least `value`, and how it is looked up."""

    value: float

    @abstractmethod
    def axes(self) -> list[dict[str, Any]]:
        """The values at which it is judged, each by itself."""

    @abstractmethod
    def tables(self, reading: Reading) -> list[str]:
        """What it reads, within a folder of results."""

    @abstractmethod
    def estimate(self, reading: Reading, tables: list[Path]) -> Estimate:
        """The effect and its interval."""

    def out_of_reach(self, reading: Reading, tables: list[Path]) -> bool:
        """Whether it asks for more than networks of the experiment do without any noise."""
        return False

    def beyond_the_cap(self, reading: Reading, tables: list[Path]) -> bool:
        """Whether too few draws were taken to certify any image there, however robust."""
        return False


class CurveRule(Rule):
    """About certified accuracy; `radii` are in units of sigma."""

    methods: Group
    sigmas: list[PositiveFloat] = Field(min_length=1)
    radii: list[NonNegativeFloat] = Field(min_length=1)

    def axes(self) -> list[dict[str, Any]]:
        """Every sigma and radius."""
        pairs = product(self.sigmas, self.radii)
        return [{"sigma": sigma, "radius": sigma * radius} for sigma, radius in pairs]

    def tables(self, reading: Reading) -> list[str]:
        """The curves, which `paired.csv` lies beside."""
        return [f"{reading.experiment}/tables/{CURVES}"]

    def beyond_the_cap(self, reading: Reading, tables: list[Path]) -> bool:
        """Whether n equal votes certify less than the radius, by `summary.csv`.

        Where images share alpha even less is certified than this cap.
        """
        path = tables[0].with_name("summary.csv")
        runs = _rows(read_csv(path), path, sigma=reading.sigma)
        caps = [
            radius_cap(int(n), alpha, reading.sigma) for n, alpha in runs[["n", "alpha"]].values
        ]
        return reading.radius > max(caps) + ROUNDING


class AtLeast(CurveRule):
    """The best method's certified accuracy is at least `value`."""

    kind: Literal["at_least"]

    def estimate(self, reading: Reading, tables: list[Path]) -> Estimate:
        """Certified accuracy with Clopper-Pearson intervals."""

        def one(method: str, _: str, confidence: float) -> Pair:
            rows = _curve_at(tables[0], method, reading, confidence)
            return Pair(rows, "Clopper-Pearson", [tables[0]])

        return _best(self.methods, [""], reading, one)


class DifferenceAtLeast(CurveRule):
    """The best method is above the best rival of the same experiment, so of the same base."""

    kind: Literal["difference_at_least"]
    rivals: Group

    def estimate(self, reading: Reading, tables: list[Path]) -> Estimate:
        """On the same images where `paired.csv` has the pair at this radius, else independent."""

        def one(method: str, rival: str, confidence: float) -> Pair:
            path = tables[0].with_name("paired.csv")
            rows = _paired_at(path, method, rival, reading, confidence)
            if len(rows):
                return Pair(rows, "paired", [path])
            rows = _independent_at(tables[0], method, rival, reading, confidence)
            return Pair(rows, "independent", tables)

        return _best(self.methods, self.rivals, reading, one)

    def out_of_reach(self, reading: Reading, tables: list[Path]) -> bool:
        """Whether `value` above the best rival is above every method's clean accuracy."""
        curves = [_curve_at(tables[0], rival, reading, CONFIDENCE) for rival in self.rivals]
        path = tables[0].with_name("summary.csv")
        clean = _rows(read_csv(path), path, sigma=reading.sigma)["clean_accuracy"].max()
        needed = max(curve["value"].mean() for curve in curves) + self.value
        return bool(needed > clean + ROUNDING)


class RatioAtLeast(Rule):
    """The cheapest rival costs `value` times what the cheapest method does, in `cost.csv`."""

    kind: Literal["ratio_at_least"]
    methods: Group
    rivals: Group
    sigmas: list[PositiveFloat] = Field(min_length=1)
    costs: list[Cost] = Field(min_length=1)

    def axes(self) -> list[dict[str, Any]]:
        """Every sigma and cost."""
        pairs = product(self.sigmas, self.costs)
        return [{"sigma": sigma, "cost": cost} for sigma, cost in pairs]

    def tables(self, reading: Reading) -> list[str]:
        """The costs."""
        return [f"{reading.experiment}/tables/cost.csv"]

    def estimate(self, reading: Reading, tables: list[Path]) -> Estimate:
        """Counts, which have no interval."""
        (method, cost), (rival, rival_cost) = (
            _cheapest(names, tables[0], reading) for names in (self.methods, self.rivals)
        )
        names = f"{', '.join(self.methods)} against {', '.join(self.rivals)}"
        # A method may cost nothing: the ratio is infinite, or unknown where the rival does too.
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = float(np.divide(rival_cost, cost))
        found = f"{tables[0]}: sigma {reading.sigma:g}, {reading.cost}: {names}"
        return Estimate(ratio, ratio, ratio, "exact", 1, 1, f"{method} against {rival}", found)


class AccountingRatioAtLeast(Rule):
    """A ViT-B/16 trains `value` times fewer parameters than `denoiser`, in `accounting.csv`.

    `parameterizations` are kinds with their settings as that table spells them; the one that trains
    least counts. The experiments of the claim are the table's data sets.
    """

    kind: Literal["accounting_ratio_at_least"]
    parameterizations: dict[str, str] = Field(min_length=1)
    denoiser: str
    costs: list[Literal["without_head", "with_head"]] = Field(min_length=1)

    def axes(self) -> list[dict[str, Any]]:
        """Every way to count."""
        return [{"cost": cost} for cost in self.costs]

    def tables(self, reading: Reading) -> list[str]:
        """The accounting, which no experiment is needed for."""
        return ["accounting.csv"]

    def estimate(self, reading: Reading, tables: list[Path]) -> Estimate:
        """Counts, which have no interval."""
        table = read_csv(tables[0]).fillna({"settings": ""})
        ratios: dict[str, float] = {}
        for kind, settings in self.parameterizations.items():
            wanted = {"kind": kind, "settings": settings, "data": reading.experiment}
            rows = _rows(table, tables[0], **wanted, denoiser=self.denoiser)
            ratios[kind] = float(rows[f"ratio_{reading.cost}"].iloc[0])
        names = "; ".join(f"{k} {s}".strip() for k, s in self.parameterizations.items())
        found = f"{tables[0]}: {reading.experiment}, {self.denoiser}, {reading.cost}: {names}"
        kind, ratio = max(ratios.items(), key=lambda item: item[1])
        by = f"{kind} against {self.denoiser}"
        return Estimate(ratio, ratio, ratio, "exact", 1, 1, by, found)


class Claim(Settings):
    """A claim: whose words, where it is judged as made, and where a like one is."""

    text: str
    source: str
    experiments: list[Name] = Field(default_factory=list)
    transferred_to: list[Name] = Field(default_factory=list)
    rule: Annotated[
        AtLeast | DifferenceAtLeast | RatioAtLeast | AccountingRatioAtLeast,
        Field(discriminator="kind"),
    ]

    @model_validator(mode="after")
    def _is_judged_somewhere(self) -> Self:
        if not [*self.experiments, *self.transferred_to]:
            raise ValueError("name an experiment in experiments or transferred_to")
        return self

    def readings(self) -> Iterator[Reading]:
        """Every reading, those of the paper's own experiments first."""
        for experiment, axes in product(self.experiments, self.rule.axes()):
            yield Reading("paper", experiment, **axes)
        for experiment, axes in product(self.transferred_to, self.rule.axes()):
            yield Reading("transferred", experiment, **axes)


class Claims(Settings):
    """The claim file."""

    claims: dict[Name, Claim] = Field(min_length=1)


def load_claims(path: Path) -> Claims:
    """Read a claim file.

    Raises:
        BenchError: the file is missing, is not YAML, or breaks the schema.
    """
    try:
        return Claims.model_validate(read_yaml(path))
    except ValidationError as error:
        raise BenchError(f"{path} is not a valid claim file:\n{complaints(error)}") from None


def build_claims(claims_file: Path, results: list[Path], output: Path) -> pd.DataFrame:
    """Write a verdict on every reading of every claim as CSV, and as Markdown beside it.

    Args:
        claims_file: the claims (config/claims.yaml).
        results: folders that hold NAME/tables of experiments; the first that has one counts.
        output: the CSV.

    Raises:
        BenchError: the claim file is invalid, a folder is missing, or a table is none. What an
            experiment has run without stays undecided.
    """
    for folder in results:
        if not folder.is_dir():
            raise BenchError(f"--results {folder} is no folder: name one that holds NAME/tables")
    rows = []
    for name, claim in load_claims(claims_file).claims.items():
        for reading in claim.readings():
            try:
                rows.append(_judged(name, claim, reading, results))
            except BenchError as error:
                raise BenchError(f"{claims_file}: claims.{name}: {error}") from None
    table = pd.DataFrame(rows).astype({"seeds": "Int64", "comparisons": "Int64"})
    with atomic_write(output) as temporary:
        table.to_csv(temporary, index=False)
    with atomic_write(output.with_suffix(".md")) as temporary:
        temporary.write_text(render(table))
    return table


def _judged(name: str, claim: Claim, reading: Reading, results: list[Path]) -> dict[str, Any]:
    row = {"claim": name, **reading._asdict(), "kind": claim.rule.kind}
    row["needed"] = claim.rule.value
    nothing = dict.fromkeys(Estimate._fields)
    about = {"text": claim.text, "source": claim.source}
    tables = [_find(table, results) for table in claim.rule.tables(reading)]
    ran = [table for table in tables if table is not None]
    if len(ran) < len(tables):
        return row | {"verdict": "undecided", "reason": "not run", **nothing, **about}
    try:
        if claim.rule.beyond_the_cap(reading, ran):
            return row | {"verdict": "undecided", "reason": BEYOND, **nothing, **about}
        estimate = claim.rule.estimate(reading, ran)
    except Lacking as error:
        if isinstance(claim.rule, AccountingRatioAtLeast):  # whose table no user's run makes
            raise
        lacking = {**nothing, "evidence": str(error)}
        return row | {"verdict": "undecided", "reason": LACKING, **lacking, **about}
    if np.isnan(estimate.effect):
        return row | {"verdict": "undecided", "reason": NO_RATIO, **nothing, **about}
    verdict = verdict_of(estimate.low, estimate.high, claim.rule.value)
    row |= {"verdict": verdict, "reason": "interval" if verdict == "undecided" else ""}
    if verdict == "contradicted" and claim.rule.out_of_reach(reading, ran):
        row["reason"] = "out of reach"
    if estimate.interval_kind == "exact":
        return row | estimate._asdict() | {"low": None, "high": None} | about
    return row | estimate._asdict() | about


def verdict_of(low: float, high: float, needed: float) -> str:
    """Whether an interval lies at or above what is needed, below it, or neither."""
    if low >= needed:
        return "supported"
    return "contradicted" if high < needed else "undecided"


def _find(table: str, results: list[Path]) -> Path | None:
    return next((folder / table for folder in results if (folder / table).exists()), None)


def _best(
    methods: list[str],
    rivals: list[str],
    reading: Reading,
    one: Callable[[str, str, float], Pair],
) -> Estimate:
    """The best method against the best rival, of which `one` knows each pair."""
    confidence = 1 - (1 - CONFIDENCE) / (len(methods) * len(rivals))
    pairs = [one(method, rival, confidence) for method, rival in product(methods, rivals)]
    pooled = [
        pool_seeds(rows["value"], rows["low"], rows["high"], confidence) for rows, *_ in pairs
    ]
    ends = np.reshape(pooled, (len(methods), len(rivals), 3))
    effect, low, high = (float(end) for end in ends.min(axis=1).max(axis=0))
    best = int(ends[..., 0].min(axis=1).argmax())
    decisive = methods[best], rivals[int(ends[best, :, 0].argmin())]
    kinds = " and ".join(dict.fromkeys(pair.interval_kind for pair in pairs))
    kinds += "; images and seeds" if len(pairs[0].rows) > 1 else "; images of one seed"
    paths = dict.fromkeys(str(path) for pair in pairs for path in pair.tables)
    seeds = ", ".join(map(str, pairs[0].rows["seed"]))
    groups = " against ".join(", ".join(names) for names in (methods, rivals) if any(names))
    at = f"sigma {reading.sigma:g}, radius {reading.radius:g}, seed {seeds}: {groups}"
    found = f"{' and '.join(paths)}: {at}"
    by = " against ".join(filter(None, decisive))
    return Estimate(effect, low, high, kinds, len(pairs[0].rows), len(pairs), by, found)


def _rows(table: pd.DataFrame, path: Path, **wanted: str | float) -> pd.DataFrame:
    """The rows in which every column has its wanted value; there must be some."""
    chosen = pd.Series(True, index=table.index)
    for column, value in wanted.items():
        cells = table[column]
        chosen &= cells == value if isinstance(value, str) else np.isclose(cells, value)
    if not chosen.any():
        sought = ", ".join(f"{column} {value}" for column, value in wanted.items())
        raise Lacking(f"{path} has no {sought}")
    return table[chosen]


def _curve_at(path: Path, method: str, reading: Reading, confidence: float) -> pd.DataFrame:
    """Certified accuracy per seed, 0 where the curve has ended."""
    own = _rows(read_csv(path), path, method=method, sigma=reading.sigma)
    if reading.radius > own["radius"].max() + ROUNDING:
        at = own.drop_duplicates("seed").assign(value=0.0)
    else:
        at = _rows(own, path, radius=reading.radius)
    hits = (at["value"] * at["n_images"]).round()
    low, high = accuracy_interval(hits, at["n_images"], confidence)
    return at[["seed", "value"]].assign(low=low, high=high)


def _paired_at(
    path: Path, method: str, rival: str, reading: Reading, confidence: float
) -> pd.DataFrame:
    """The difference per seed on the same images; empty if the table has not the pair there."""
    table = read_csv(path)
    at = table[
        np.isclose(table["sigma"], reading.sigma) & np.isclose(table["radius"], reading.radius)
    ]
    same = at[(at["method_a"] == method) & (at["method_b"] == rival)]
    turned = at[(at["method_a"] == rival) & (at["method_b"] == method)]
    swap = {"only_a": "only_b", "only_b": "only_a"}
    rows = pd.concat([same, turned.rename(columns=swap)])
    only, only_rival, n = rows["only_a"], rows["only_b"], rows["n_images"]
    low, high = paired_difference_interval(only, only_rival, n, confidence)
    return rows[["seed"]].assign(value=(only - only_rival) / n, low=low, high=high)


def _independent_at(
    path: Path, method: str, rival: str, reading: Reading, confidence: float
) -> pd.DataFrame:
    """The difference per seed, as if the two had been certified on images of their own."""
    sides = [
        _curve_at(path, name, reading, confidence).set_index("seed") for name in (method, rival)
    ]
    if not sides[0].index.equals(sides[1].index):
        raise BenchError(f"{method} and {rival} have other seeds: give both the same `seeds`")
    a, b = (side.to_numpy().T for side in sides)
    low, high = independent_difference_interval(a, b)
    return pd.DataFrame({"seed": sides[0].index, "value": a[0] - b[0], "low": low, "high": high})


def _cheapest(methods: list[str], path: Path, reading: Reading) -> tuple[str, float]:
    """Name and cost of the cheapest; a cost that is not known (nan) could be the smallest."""
    costs = [_cost_of(path, method, reading) for method in methods]
    place = int(np.argmin(costs))  # which takes nan for the smallest
    return methods[place], costs[place]


def _cost_of(path: Path, method: str, reading: Reading) -> float:
    """A count, the same for every seed."""
    rows = _rows(read_csv(path), path, method=method, sigma=reading.sigma)
    columns = reading.cost.split(" + ")
    if absent := sorted(set(columns) - set(rows)):
        raise BenchError(f"{path} has no column {absent[0]}: make the tables again")
    return float(rows[columns].iloc[0].sum(skipna=False))


def render(table: pd.DataFrame) -> str:
    """Markdown: a tally of every claim, and the readings by verdict, as the claim file has them."""
    lines = ["# Claims", INTRODUCTION, *_tally(table), ""]
    for verdict in VERDICTS:
        part = table[table["verdict"] == verdict]
        absent = part["reason"] == "not run"
        share = f", {absent.sum()} of them not run" if absent.any() else ""
        lines += [f"## {verdict}: {len(part)}{share}", ""]
        if len(part[~absent]):
            lines += ["| claim | where | needed | found | 95 % interval |", "|---|---|--:|--:|---|"]
            lines += [*(_line(row) for _, row in part[~absent].iterrows()), ""]
        if absent.any():
            lines += ["| not run | where | readings |", "|---|---|--:|"]
            keys = ["text", "experiment"]
            counts = part[absent].groupby(keys, sort=False, as_index=False).size()
            cells = counts.astype(str).to_numpy()
            lines += [*("| " + " | ".join(row) + " |" for row in cells), ""]
    return "\n".join(lines)


def _tally(table: pd.DataFrame) -> list[str]:
    """How often each claim is supported, contradicted (out of reach or not), undecided, not run."""
    place = table["verdict"].where(~table["reason"].isin(APART), table["reason"])
    columns = ["supported", "contradicted", "out of reach", "undecided", "not run"]
    counts = pd.crosstab(table["text"], place).reindex(table["text"].unique())
    shown = counts.reindex(columns=columns, fill_value=0).replace(0, "").astype(str)
    lines = [f"| claim | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    return [*lines, *(f"| {text} | {' | '.join(row)} |" for text, *row in shown.itertuples())]


def _line(row: pd.Series) -> str:
    known = [f"{axis} {row[axis]:g}" for axis in ("sigma", "radius") if pd.notna(row[axis])]
    where = ", ".join(filter(None, [f"{row['experiment']} ({row['form']})", *known, row["cost"]]))
    needed = f">= {row['needed']:g}"
    if row["reason"] == "out of reach":
        needed += " (out of reach)"
    if row["reason"] in (NO_RATIO, BEYOND):
        return f"| {row['text']} | {where} | {needed} | {row['reason']} | |"
    if row["reason"] == LACKING:
        return f"| {row['text']} | {where} | {needed} | {row['evidence']} | |"
    interval = "exact"
    if pd.notna(row["low"]):
        interval = f"{row['low']:.3f} to {row['high']:.3f} ({row['interval_kind']})"
    found = f"{row['effect']:.3g} ({row['decided_by']})"
    return f"| {row['text']} | {where} | {needed} | {found} | {interval} |"
