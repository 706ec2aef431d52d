"""Votes on disk as rounds end: a kill loses at most one round, a finished run can go on."""

import json
import logging
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.errors import BenchError
from bench.files import UNWRITABLE, atomic_write, lock, make_folder

log = logging.getLogger(__name__)


class Kept(NamedTuple):
    """Draws, votes `(bins,)` and seconds of one image in one domain after a round."""

    drawn: int
    votes: NDArray[np.int64]
    seconds: float


class Journal:
    """Append-only file of cumulative votes, valid for one meaning, held by one run at a time.

    Args:
        path: JSON lines, each after its checksum; the first names the meaning.
        meaning: hash of all that the votes depend on. Votes of another meaning are put aside, as
            the log says, and taken back by the run that they fit.

    Raises:
        BenchError: another run writes the file, it cannot be written, or it is damaged.
    """

    def __init__(self, path: Path, meaning: str):
        make_folder(path.parent)
        self.path = path
        # One descriptor for the whole run: what another run does to the name cannot mix votes.
        try:
            self._stream = path.open("a+b")
        except UNWRITABLE as error:
            raise BenchError(f"{path} cannot be written: {error.strerror}") from None
        lock(self._stream.fileno(), path)
        self._stream.seek(0)
        # The last piece is empty, or a line that a kill cut off.
        *lines, torn = self._stream.read().split(b"\n")
        head = {"meaning": meaning}
        if lines[:1] != [checked(head).rstrip(b"\n")]:
            if lines[1:]:
                self._put_aside(b"\n".join([*lines, b""]))
            *lines, torn = self._left_by_another_run(head).split(b"\n")
            self._stream.truncate(0)
            self._append(b"\n".join([*lines, torn]))
        if torn:
            self._stream.truncate(self._stream.tell() - len(torn))
        self._rows: dict[tuple[int, str], list[dict[str, Any]]] = {}
        for row in self._parse(lines[1:]):
            self._rows.setdefault((row["idx"], row["domain"]), []).append(row)

    @property
    def holds_votes(self) -> bool:
        """Whether a round was kept, by this run or an earlier one."""
        return bool(self._rows)

    def _aside(self, meaning: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{meaning[:8]}")

    def _put_aside(self, content: bytes) -> None:
        aside = self._aside(kept_meaning(self.path) or "damaged")
        with atomic_write(aside) as temporary:
            temporary.write_bytes(content)
        log.warning(
            "%s holds votes drawn under other settings, model, data, code, versions, machine or "
            "number of threads: they are put aside as %s and do not count here",
            self.path,
            aside.name,
        )

    def _left_by_another_run(self, head: dict[str, str]) -> bytes:
        """What a run of the same meaning left, or the first line alone."""
        aside = self._aside(head["meaning"])
        if kept_meaning(aside) != head["meaning"]:
            return checked(head)
        log.info("certification goes on from %s", aside)
        return aside.read_bytes()

    def close(self) -> None:
        """Let another run have the file."""
        self._stream.close()

    def _parse(self, lines: list[bytes]) -> list[dict[str, Any]]:
        try:
            return [unchecked(line) for line in lines]
        except ValueError:
            raise self.damaged() from None

    def damaged(self) -> BenchError:
        """What to raise when a row cannot be."""
        return BenchError(f"{self.path} is damaged: delete it and certify again")

    def read(self, idx: int, domain: str, bins: int) -> list[Kept]:
        """What an earlier run kept of an image, round by round.

        Raises:
            BenchError: votes do not add up to draws, or take back earlier ones.
        """
        found: list[Kept] = []
        before = np.zeros(bins, np.int64)
        for row in self._rows.get((idx, domain), []):
            votes = np.zeros(bins, np.int64)
            for place, count in row["votes"].items():
                votes[int(place)] = count
            if votes.sum() != row["drawn"] or (votes < before).any() or (votes == before).all():
                raise self.damaged()
            found.append(Kept(int(row["drawn"]), votes, float(row["seconds"])))
            before = votes
        return found

    def append(self, rows: list[tuple[int, str, Kept]]) -> None:
        """Keep a round: image, domain and votes so far of each image that it touched."""
        written = []
        for idx, domain, kept in rows:
            sparse = {str(place): int(kept.votes[place]) for place in np.flatnonzero(kept.votes)}
            row = {"idx": idx, "domain": domain, "drawn": kept.drawn, "votes": sparse}
            written.append({**row, "seconds": round(kept.seconds, 6)})
            self._rows.setdefault((idx, domain), [])
        self._append(b"".join(map(checked, written)))

    def _append(self, content: bytes) -> None:
        self._stream.write(content)
        self._stream.flush()
        os.fsync(self._stream.fileno())


def kept_meaning(path: Path) -> str | None:
    """The meaning of the votes in the journal at `path`, if it has a first line."""
    try:
        with path.open("rb") as stream:
            return str(unchecked(stream.readline().rstrip(b"\n"))["meaning"])
    except (FileNotFoundError, ValueError, KeyError):
        return None


def checked(row: dict[str, Any]) -> bytes:
    """A line of the journal: its checksum, then the row."""
    text = json.dumps(row).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def unchecked(line: bytes) -> dict[str, Any]:
    """The row of a line.

    Raises:
        ValueError: it is garbled.
    """
    checksum, _, text = line.partition(b" ")
    if int(checksum, 16) != zlib.crc32(text):
        raise ValueError("the checksum differs")
    row: dict[str, Any] = json.loads(text)
    return row
