"""What is wrong with a certification log, from the log alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import chisquare

from bench.errors import BenchError
from bench.files import sha256_file
from bench.smoothing.bounds import radius_cap
from bench.smoothing.log import check_positive, parse_cells, read_cells, read_protocol

# henba1/randomized_smoothing: the base misclassified the image, which then was not certified.
NOT_CERTIFIED = -2
TABLE_STEP = 0.25
# `{:.3}` drops trailing zeros, so fewer digits than 3 prove nothing; more than 7 are float noise.
DIGITS = (3, 7)
UNBALANCED = 0.01
# Below 5 expected images per class, chi-square is not to be trusted.
LEAST_EXPECTED = 5


@dataclass(frozen=True)
class Finding:
    """One defect: an error voids the log's claims, a warning asks the reader to look."""

    severity: Literal["error", "warning"]
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.message}"


@dataclass(frozen=True)
class Claim:
    """What a log is said to hold: noise level (in [0, 1] pixels), alpha, draws, sizes."""

    sigma: float
    alpha: float
    n: int
    images: int | None = None
    classes: int | None = None


def claim_of(path: Path, **given: float | None) -> Claim:
    """The claim that options and the log's sidecar make; an option goes before the sidecar.

    Raises:
        BenchError: sigma, alpha or n is nowhere given, or a value is impossible.
    """
    side = path.with_suffix(".json")
    protocol = read_protocol(path) if side.exists() else {}
    values = {name: protocol.get(name) for name in ("sigma", "alpha", "n")}
    # An alpha over the data set leaves each image a small part of it.
    values["alpha"] = protocol.get("alpha_per_image", values["alpha"])
    values["images"] = protocol.get("n_images")
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise BenchError(f"{side}: {name} must be a number, got {value!r}: give --{name}")
    merged: dict[str, Any] = values | {k: v for k, v in given.items() if v is not None}
    missing = [f"--{name}" for name in ("sigma", "alpha", "n") if merged[name] is None]
    if missing:
        raise BenchError(f"give {' and '.join(missing)}: no sidecar {side} tells them")
    check_positive(**{name: value for name, value in merged.items() if value is not None})
    if merged["alpha"] >= 1:
        raise BenchError(f"--alpha must lie below 1, got {merged['alpha']}")
    return Claim(**merged)


def audit_log(path: Path, claim: Claim) -> list[Finding]:
    """Findings about the log at `path` if it was certified as `claim` says, errors first."""
    try:
        cells = read_cells(path)
        log = parse_cells(cells, path)
    except BenchError as error:
        return [Finding("error", str(error))]
    cells.index = log.index
    findings = [
        *_sidecar(path),
        *_radii(cells, log, claim, exact=_written_for(path) is not None),
        *_images(log, claim),
        *_order(log),
        *_answers(log, claim),
        *_recorded(cells, log),
        *_balance(log, claim),
        *_ending(path),
    ]
    return sorted(findings, key=lambda finding: finding.severity)


def _sidecar(path: Path) -> Iterator[Finding]:
    written_for = _written_for(path)
    if written_for is not None and written_for != sha256_file(path):
        name = path.with_suffix(".json").name
        yield Finding("error", f"the log was changed since {name} was written for it")


def _written_for(path: Path) -> str | None:
    """The hash in the JSON beside a log of ours, of which no digits are cut; others have none."""
    found: str | None = None
    if path.with_suffix(".json").exists():
        found = read_protocol(path).get("log_sha256")
    return found


def _radii(cells: pd.DataFrame, log: pd.DataFrame, claim: Claim, exact: bool) -> Iterator[Finding]:
    """Radii are judged up to the rounding of the digits that the log prints, if any are cut."""
    radius = log["radius"]
    if (radius < 0).any():
        yield Finding("error", f"negative radii: {(radius < 0).sum()}, down to {radius.min()}")
    digits = _printed_digits(cells["radius"])
    # Half a unit of the last printed digit.
    slack = 0.5 * 10.0 ** (np.floor(np.log10(radius.where(radius > 0, 1))) - digits + 1)
    cap = radius_cap(claim.n, claim.alpha, claim.sigma)
    above = (radius > 0) & (radius - slack > cap)
    if above.any():
        yield Finding(
            "error",
            f"radii above {cap:.6g}, the cap of sigma = {claim.sigma}, alpha = {claim.alpha}, "
            f"n = {claim.n}: {above.sum()}, up to {radius.max()}",
        )
    if digits == DIGITS[1] or exact:
        return
    printed = np.floor(radius / TABLE_STEP)
    lifted = (radius > 0) & (log["correct"] == 1) & (printed > (radius - slack) // TABLE_STEP)
    if lifted.any():
        yield Finding(
            "warning",
            f"correct radii that their {digits} printed digits may have rounded up to a multiple "
            f"of {TABLE_STEP}, where tables read them: {lifted.sum()} of {len(log)}",
        )


def _printed_digits(radii: pd.Series) -> int:
    """Significant digits that a log prints its radii with."""
    mantissas = radii.str.lower().str.partition("e")[0].str.replace(r"[^0-9]", "", regex=True)
    return int(np.clip(mantissas.str.lstrip("0").str.len().max(), *DIGITS))


def _images(log: pd.DataFrame, claim: Claim) -> Iterator[Finding]:
    """Which images are there: none twice, none left out of a regular stride."""
    twice = log.loc[log["idx"].duplicated(), "idx"]
    if len(twice):
        yield Finding(
            "error", f"rows that repeat an image: {len(twice)}, first image {twice.iloc[0]}"
        )
    indices = np.unique(log["idx"])
    if claim.images is not None and len(indices) != claim.images:
        yield Finding("error", f"the log holds {len(indices)} of {claim.images} images")
    if len(indices) < 3:
        return
    if claim.images == len(indices) and _evenly_spread(indices):
        return
    steps = np.diff(indices)
    stride = int(np.median(steps))
    # Strides may alternate: 300 images spread evenly over 10,000 lie 33 or 34 apart.
    if (abs(steps - stride) <= (stride > 2)).mean() < 0.5:
        yield Finding("warning", "the images follow no regular stride: none can be missed")
        return
    gaps = steps > 1.5 * stride
    if gaps.any():
        absent = int(np.round(steps[gaps] / stride - 1).sum())
        first = indices[:-1][gaps][0]
        message = f"images missing from the stride {stride}: {absent}, the first after {first}"
        yield Finding("error", message)
    if indices[0] >= stride:
        message = f"the log starts at image {indices[0]}: compare it with logs of the same images"
        yield Finding("warning", message)


def _evenly_spread(indices: NDArray[np.int64]) -> bool:
    """Whether some test set of M images gives these N as the i M // N, i from 0."""
    wanted = len(indices)
    counted = np.arange(1, wanted)
    # i M // N = idx holds for idx N / i <= M < (idx + 1) N / i.
    least = -(-indices[1:] * wanted // counted)
    most = -(-(indices[1:] + 1) * wanted // counted) - 1
    return bool(indices[0] == 0 and least.max() <= most.min())


def _order(log: pd.DataFrame) -> Iterator[Finding]:
    """Shards joined in another order than the test set's."""
    if (log["idx"].diff() < 0).any():
        after = log["idx"].shift()[log["idx"].diff() < 0].iloc[0]
        yield Finding("warning", f"the images are not in order, the first after image {after:.0f}")


def _answers(log: pd.DataFrame, claim: Claim) -> Iterator[Finding]:
    """Labels and predictions must be classes, or abstentions."""
    for name, least in (("label", 0), ("predict", NOT_CERTIFIED)):
        outside = log[name] < least
        if claim.classes is not None:
            outside |= log[name] >= claim.classes
        if outside.any():
            first = log.loc[outside].iloc[0]
            where = f"the first is {first[name]:.0f} at image {first['idx']:.0f}"
            yield Finding("error", f"{name} is no class in {outside.sum()} rows, {where}")
    skipped = (log["predict"] == NOT_CERTIFIED).sum()
    if skipped:
        message = f"images not certified because the base is wrong there: {skipped}"
        yield Finding("warning", f"{message} (predict {NOT_CERTIFIED}); they count as wrong")
    labels = np.unique(log["label"])
    # A subset of a sorted test set may skip classes, so allow for the spacing of its labels.
    spacing = labels[-1] - labels[-2] if len(labels) > 1 else 1
    beyond = (log["predict"] >= labels[-1] + spacing).sum()
    if claim.classes is None and beyond:
        message = f"predictions beyond the largest label, {labels[-1]}: {beyond}"
        cure = "the log is cut off, or they are no classes (--images and --classes tell)"
        yield Finding("warning", f"{message}; {cure}")


def _recorded(cells: pd.DataFrame, log: pd.DataFrame) -> Iterator[Finding]:
    """The column `correct` should say whether predict is the label."""
    if "correct" not in cells:
        return
    truth = cells["correct"].str.lower().replace({"true": "1", "false": "0"})
    recorded = pd.to_numeric(truth, errors="coerce")
    wrong = (recorded != log["correct"]).sum()
    if len(log) > 1 and wrong and (recorded == log["correct"].cumsum()).all():
        yield Finding("warning", "`correct` is a running count: take predict == label instead")
    elif wrong:
        yield Finding("warning", f"`correct` disagrees with predict == label in {wrong} rows")


def _balance(log: pd.DataFrame, claim: Claim) -> Iterator[Finding]:
    """A subset with more of some classes is no fair sample of a balanced test set."""
    counts = log["label"].value_counts().to_numpy()
    classes = max(claim.classes or 0, len(counts))
    if len(log) < LEAST_EXPECTED * classes or classes < 2:
        return
    counts = np.pad(counts, (0, classes - len(counts)))
    p = float(chisquare(counts).pvalue)
    if p < UNBALANCED:
        spread = f"{counts.min()} to {counts.max()} images per class"
        yield Finding("warning", f"the classes are unbalanced: {spread} (chi-square p = {p:.2g})")


def _ending(path: Path) -> Iterator[Finding]:
    """A cut inside the last cell leaves a row that still parses."""
    if not path.read_bytes().endswith((b"\n", b"\r")):
        yield Finding("warning", "the last line does not end: the log may be cut off inside it")
