"""Certification logs: one TSV, read by header, beside a JSON that says what it means."""

import csv
import io
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.errors import BenchError
from bench.files import atomic_write, read_json, sha256_file
from bench.statistics import certified_accuracy

COHEN_COLUMNS = ["idx", "label", "predict", "radius", "correct", "time"]
NEEDED = ["idx", "label", "predict", "radius", "time"]
WHOLE = ["idx", "label", "predict"]
# What henba1/randomized_smoothing calls them, in its text log and in its CSVs.
ALIASES = {
    "original_idx": "idx",
    "image_id": "idx",
    "original_label": "label",
    "predicted_class": "predict",
    "epsilon_value": "radius",
    "total_time": "time",
}
CURE = "certify again or fetch it again"
LARGEST_WHOLE = 2**53
LONGEST_CURVE = 100_000
# Past the cap of 100,000 draws (3.8 sigma), so that curves of one sigma end together.
CURVE_SIGMAS = 4


def read_log(path: Path) -> pd.DataFrame:
    """Read a certification log of any dialect; radii are l2 in [0, 1] pixels, times seconds.

    `correct` is recomputed, since some published logs hold a running count there.

    Raises:
        BenchError: the file is missing, empty, garbled, cut off or lists an image twice.
    """
    frame = parse_cells(read_cells(path), path)
    twice = frame.loc[frame["idx"].duplicated(), "idx"]
    if len(twice):
        raise BenchError(f"{path} lists image {twice.iloc[0]} twice: {CURE}")
    return frame


def read_cells(path: Path) -> pd.DataFrame:
    """The texts of a log's cells, by line number, under the field's names of the columns.

    Raises:
        BenchError: the file is missing, is no table or lacks a column.
    """
    rows = _read_rows(path)
    if not rows:
        raise BenchError(f"{path} is not a certification log: it is empty")
    columns = _columns(rows.pop(min(rows)), path)
    if not rows:
        raise BenchError(f"{path} holds no images: {CURE}")
    for line, row in rows.items():
        while len(row) > len(columns) and not row[-1]:
            row.pop()
        if len(row) > len(columns):
            raise BenchError(f"{path} line {line} is longer than its header: {CURE}")
        if len(row) < len(columns):
            lacks = f"it ends before column {columns[len(row)]}"
            raise BenchError(f"{path} is cut off or garbled at line {line}: {lacks}; {CURE}")
    return pd.DataFrame(list(rows.values()), index=list(rows), columns=columns, dtype=str)


def _columns(header: list[str], path: Path) -> list[str]:
    """The field's names of the columns that the first line of a log names."""
    while not header[-1]:
        header.pop()
    columns = [name if ALIASES.get(name) in header else ALIASES.get(name, name) for name in header]
    missing = [name for name in NEEDED if name not in columns]
    if missing:
        found = f"its first line must name them, but reads {', '.join(header)[:80]!r}"
        raise BenchError(f"{path} lacks the columns {missing}: {found}")
    if len(set(columns)) < len(columns):
        raise BenchError(f"{path} names a column twice: {', '.join(columns)[:200]}")
    return columns


def _read_rows(path: Path) -> dict[int, list[str]]:
    """Stripped cells of each line that is not blank, by line number."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise BenchError(f"{path} is missing: {CURE}") from None
    except UnicodeDecodeError as error:
        raise BenchError(f"{path} is not a certification log: {error}") from None
    except OSError as error:
        raise BenchError(f"{path} cannot be read: {error.strerror}") from None
    lines = io.StringIO(text, newline="")
    # In a TSV a quotation mark is a character like any other.
    if "\t" in text.lstrip().partition("\n")[0]:
        reader = csv.reader(lines, csv.excel_tab, quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines)
    rows = {}
    try:
        for row in reader:
            if any(cells := [cell.strip() for cell in row]):
                rows[reader.line_num] = cells
    except csv.Error as error:
        raise BenchError(f"{path} is garbled at line {reader.line_num}: {error}; {CURE}") from None
    return rows


def parse_cells(cells: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Numbers of the `cells` of the log at `path`; duplicate images are left in.

    Raises:
        BenchError: a cell is not a number of its column's kind.
    """
    frame = cells.drop(columns="correct", errors="ignore")
    for name in frame.columns:
        numbers = (
            frame[name].map(_seconds)
            if name == "time"
            else pd.to_numeric(frame[name], errors="coerce")
        )
        broken = ~(numbers.astype(float).abs() < np.inf)
        if name in WHOLE:
            broken |= (numbers % 1 != 0) | (numbers.abs() > LARGEST_WHOLE)
        if name not in NEEDED and broken.all():
            continue
        if broken.any():
            first = int(np.argmax(broken))
            line, what = frame.index[first], f"{name} is {frame[name].iloc[first][:40]!r}"
            raise BenchError(f"{path} is cut off or garbled at line {line}: {what}; {CURE}")
        frame[name] = numbers.astype("int64") if name in WHOLE else numbers
    frame["correct"] = (frame["predict"] == frame["label"]).astype(int)
    return frame.reset_index(drop=True)


def _seconds(text: str) -> float:
    """Seconds of `15.4` or `0:00:15.4`; nan where it is neither."""
    total = 0.0
    for part in text.split(":"):
        total = 60 * total + float(pd.to_numeric(part, errors="coerce"))
    return total


def write_log(rows: Sequence[Mapping[Any, Any]], path: Path) -> None:
    """Write rows at full precision: three digits would round some radii up, an over-claim."""
    with atomic_write(path) as temporary:
        pd.DataFrame(rows).to_csv(temporary, sep="\t", index=False)


def cohen_path(path: Path) -> Path:
    """Where the field's six columns of the log at `path` go."""
    return path.with_suffix(".cohen.tsv")


def write_cohen_log(rows: Sequence[Mapping[Any, Any]], path: Path) -> None:
    """Write the six columns that the field's scripts read; radii keep their full precision."""
    frame = pd.DataFrame(rows)[COHEN_COLUMNS]
    frame["time"] = [str(timedelta(seconds=float(seconds))) for seconds in frame["time"]]
    with atomic_write(path) as temporary:
        frame.to_csv(temporary, sep="\t", index=False)


def import_log(path: Path, sigma: float, radius_step: float) -> pd.DataFrame:
    """Certified accuracy of any log at every multiple of `radius_step` up to 4 sigma or beyond.

    Raises:
        BenchError: the log cannot be read, or sigma or the step cannot be meant.
    """
    check_positive(sigma=sigma, radius_step=radius_step)
    log = read_log(path)
    steps = float(np.ceil(max(CURVE_SIGMAS * sigma, log["radius"].max()) / radius_step))
    if steps > LONGEST_CURVE:
        raise BenchError(f"--radius-step {radius_step} gives {steps:.0f} radii: take a larger one")
    # Multiples, not sums: a radius printed 0.15 must reach the grid's 0.15.
    curve = certified_accuracy(log, np.round(np.arange(steps + 1) * radius_step, 10))
    return curve.assign(sigma=sigma, source=path.as_posix())


def check_log_name(output: Path) -> None:
    """Refuse a log whose companions could overwrite it or others'.

    Raises:
        BenchError: it does not end in .tsv.
    """
    if output.suffix != ".tsv":
        raise BenchError(f"--output {output} must end in .tsv: its companions replace that ending")


def check_positive(**options: float) -> None:
    """Refuse a command-line number that is not positive and finite.

    Raises:
        BenchError: naming the option.
    """
    for name, value in options.items():
        if not 0 < value < np.inf:
            raise BenchError(f"--{name.replace('_', '-')} must be positive, got {value}")


def read_protocol(path: Path) -> dict[str, Any]:
    """The sidecar JSON of the log at `path`."""
    return read_json(path.with_suffix(".json"))


def read_own_log(path: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """A log that this project wrote, after its sidecar, which must be of this very log.

    Raises:
        BenchError: either is missing, damaged or not the other's.
    """
    protocol, log = read_protocol(path), read_log(path)
    # Sidecars of before have no hash.
    if protocol.get("log_sha256", found := sha256_file(path)) != found:
        raise BenchError(f"{path} is not what its .json was written for: certify again")
    return protocol, log
