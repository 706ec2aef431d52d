"""Votes on disk as rounds end: a kill loses at most one round, a finished run can go on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.files import atomic_write


class Journal:
    """Append-only file of cumulative votes, valid for one meaning.

    Args:
        path: JSON lines; the first names the meaning.
        meaning: hash of all that the votes depend on. A file with another one starts afresh.
    """

    def __init__(self, path: Path, meaning: str):
        self.path = path
        lines = path.read_text().split("\n") if path.exists() else []
        # The last piece is empty, or a line that a kill cut off.
        rows = [json.loads(line) for line in lines[:-1]]
        kept = rows[1:] if rows[:1] == [{"meaning": meaning}] else []
        with atomic_write(path) as temporary:
            text = [json.dumps(row) + "\n" for row in [{"meaning": meaning}, *kept]]
            temporary.write_text("".join(text))
        self._rows: dict[tuple[int, str], list[dict[str, Any]]] = {}
        for row in kept:
            self._rows.setdefault((row["idx"], row["domain"]), []).append(row)

    def read(self, idx: int, domain: str, bins: int) -> list[tuple[int, NDArray[np.int64]]]:
        """Draws and votes `(bins,)` of an image after each round of an earlier run."""
        found = []
        for row in self._rows.get((idx, domain), []):
            votes = np.zeros(bins, np.int64)
            for place, count in row["votes"].items():
                votes[int(place)] = count
            found.append((int(row["drawn"]), votes))
        return found

    def append(self, rows: list[tuple[int, str, int, NDArray[np.int64]]]) -> None:
        """Keep a round: image, domain, draws and votes so far of each image that it touched."""
        text = []
        for idx, domain, drawn, votes in rows:
            sparse = {str(place): int(votes[place]) for place in np.flatnonzero(votes)}
            row = {"idx": idx, "domain": domain, "drawn": drawn, "votes": sparse}
            text.append(json.dumps(row) + "\n")
        with self.path.open("a") as stream:
            stream.write("".join(text))
