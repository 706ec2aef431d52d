"""Tables are read whole, or the reader says what is wrong with the file."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from bench.errors import BenchError


def read_csv(path: Path, words: Sequence[str] = (), numbers: Sequence[str] = ()) -> pd.DataFrame:
    """A table.

    Args:
        path: the file.
        words: columns that there must be, and rows.
        numbers: likewise, of numbers.

    Raises:
        BenchError: the file is missing, is no table, lacks a column or rows, or has text where
            numbers must be.
    """
    table = _read(path)
    if absent := [name for name in (*words, *numbers) if name not in table]:
        raise BenchError(f"{path} has no column {absent[0]}: name a table that has it")
    if (words or numbers) and table.empty:
        raise BenchError(f"{path} has no rows: run its experiment again")
    for name in numbers:
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise BenchError(f"{path}: {name} must hold numbers: run its experiment again")
    return table


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except OSError as error:
        raise BenchError(
            f"{path} is missing or cannot be read ({error.strerror}): `bench tables` writes "
            "tables, published results are in git"
        ) from None
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise BenchError(f"{path} is no table ({error}): run its experiment again") from None
