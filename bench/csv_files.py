"""Tables are read whole, or the reader says what is wrong with the file."""

from pathlib import Path

import pandas as pd

from bench.errors import BenchError


def read_csv(path: Path) -> pd.DataFrame:
    """A table.

    Raises:
        BenchError: the file is missing, or is no table.
    """
    try:
        return pd.read_csv(path)
    except OSError as error:
        raise BenchError(
            f"{path} is missing or cannot be read ({error.strerror}): `bench tables` writes "
            "tables, published results are in git"
        ) from None
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise BenchError(f"{path} is no table ({error}): run its experiment again") from None
