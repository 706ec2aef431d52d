"""Certification logs: one TSV, read by header, beside a JSON that says what it means."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd

from bench.errors import BenchError
from bench.files import atomic_write, read_json

COHEN_COLUMNS = ["idx", "label", "predict", "radius", "correct", "time"]


def read_log(path: Path) -> pd.DataFrame:
    """Read a certification log, ours or one with Cohen's six columns.

    `correct` is recomputed, since some published logs hold a running count there. `time` becomes
    seconds, from `15.4` or `0:00:15.4`.

    Raises:
        BenchError: the file is missing, empty, garbled, cut off or lists an image twice.
    """
    try:
        frame = pd.read_csv(path, sep="\t")
    except FileNotFoundError:
        raise BenchError(f"{path} is missing: certify again") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise BenchError(f"{path} is not a certification log: {error}") from None
    missing = [c for c in COHEN_COLUMNS if c not in frame.columns and c != "correct"]
    if missing:
        raise BenchError(f"{path} lacks the columns {missing}: it is not a certification log")
    if frame.empty:
        raise BenchError(f"{path} holds no images: certify again")
    # Rows longer than the header make pandas take their first field for the index.
    if not isinstance(frame.index, pd.RangeIndex):
        raise BenchError(f"{path} has rows longer than its header: certify again")
    frame["time"] = frame["time"].map(_seconds)
    # Other columns are free text to us: some dialects write booleans as words.
    numbers = frame[[c for c in COHEN_COLUMNS if c != "correct"]].apply(
        pd.to_numeric, errors="coerce"
    )
    broken = numbers.isna().any(axis=1) | frame.isna().any(axis=1)
    if broken.any():
        raise BenchError(f"{path} is cut off or garbled at line {broken.argmax() + 2}")
    if numbers["idx"].duplicated().any():
        twice = numbers.loc[numbers["idx"].duplicated(), "idx"].iloc[0]
        raise BenchError(f"{path} lists image {twice} twice")
    frame[numbers.columns] = numbers
    frame["correct"] = (frame["predict"] == frame["label"]).astype(int)
    return frame


def _seconds(text: object) -> float:
    """Seconds of `15.4` or `0:00:15.4`; nan where it is neither."""
    total = 0.0
    for part in str(text).split(":"):
        total = 60 * total + float(pd.to_numeric(part, errors="coerce"))
    return total


def write_log(rows: Sequence[dict[Any, Any]], path: Path) -> None:
    """Write rows at full precision: three digits would round some radii up, an over-claim."""
    with atomic_write(path) as temporary:
        pd.DataFrame(rows).to_csv(temporary, sep="\t", index=False)


def cohen_path(path: Path) -> Path:
    """Where the field's six columns of the log at `path` go."""
    return path.with_suffix(".cohen.tsv")


def write_cohen_log(log: pd.DataFrame, path: Path) -> None:
    """Write the field's six columns alone, time as its tools print it, radii at full precision."""
    frame = log[COHEN_COLUMNS].assign(
        time=[str(timedelta(seconds=float(seconds))) for seconds in log["time"]]
    )
    with atomic_write(path) as temporary:
        frame.to_csv(temporary, sep="\t", index=False)


def read_protocol(path: Path) -> dict[str, Any]:
    """The sidecar JSON of the log at `path`."""
    return read_json(path.with_suffix(".json"))
