"""The front page of the report: what was run, what came out, by which code on which machine."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from bench.claims import VERDICTS
from bench.config import Experiment
from bench.csv_files import read_csv
from bench.errors import BenchError
from bench.files import atomic_write
from bench.smoothing.log import read_protocol

CLAIMS = """
`paper` readings are of the paper's own experiments, `transferred` ones of like claims on
experiments that ran here. A reading is supported if its whole 95 % interval satisfies the claim,
contradicted if none of it does, else undecided; readings are not corrected for their number, so
of many true ones some look false. claims.csv_ has the evidence and the sources.
"""
BOARD = """
Share of test images, in %, that are answered correctly with a certified l2 radius of at least r,
in [0, 1] pixels of the images that the noise was added to. First seed; certified_accuracy.csv_ has
all of them with their 95 % intervals, paired.csv_ says which differences are certain.
"""


def write_overview(
    experiment: Experiment, tables: Path, logs: list[Path], claims: Path | None, output: Path
) -> None:
    """Write the page as reStructuredText, which `bench/report/workflow.rst` includes.

    Args:
        experiment: what was run.
        tables: folder of its tables.
        logs: its certification logs.
        claims: claims.csv, if claims were judged.
        output: the page.

    Raises:
        BenchError: a table or the JSON of a log is missing.
    """
    summary, board = tables / "summary.csv", tables / "leaderboard.md"
    for path in (summary, board):
        if not path.exists():
            raise BenchError(f"{path} is missing: `bench tables` writes it")
    parts = [
        *_claims(claims),
        *_section("Certified accuracy", BOARD),
        *_table(*_cells(board.read_text())),
        *_section("Protocol"),
        *_table(("", ""), _protocol(experiment)),
        *_section("Provenance"),
        *_table(("", ""), _provenance(read_csv(summary), logs)),
    ]
    with atomic_write(output) as temporary:
        temporary.write_text("\n".join(parts) + "\n")


def _section(title: str, text: str = "") -> list[str]:
    return [title, "-" * len(title), text]


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A list-table; its first column is its rows' names."""
    lines = [".. list-table::", "   :stub-columns: 1", "   :widths: auto"]
    if any(header):
        lines.append("   :header-rows: 1")
        rows = [header, *rows]
    lines.append("")
    for row in rows:
        marks = ["   * -", *["     -"] * (len(row) - 1)]
        lines += [f"{mark} {_plain(cell)}" for mark, cell in zip(marks, row, strict=True)]
    return [*lines, ""]


def _plain(cell: object) -> str:
    """A text that reStructuredText takes for no markup, in the line or of a list."""
    text = re.sub(r"([\\*`_|:])", r"\\\1", str(cell))
    # An escaped space is none.
    return re.sub(r"^(?=[^\w\\]|\w+[.)](\s|$))", r"\\ ", text)


def _cells(markdown: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a Markdown table."""
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()
    ]
    return header, rows


def _claims(path: Path | None) -> list[str]:
    """Verdicts by claim and form, counted over the readings; nothing where none were judged."""
    if path is None:
        return []
    table = read_csv(path)
    keys = ["text", "form"]
    counts = table.groupby([*keys, "verdict"], sort=False).size().unstack(fill_value=0)
    counts = counts.reindex(columns=[*VERDICTS], fill_value=0)
    counts["not run"] = (table["reason"] == "not run").groupby([table[k] for k in keys]).sum()
    counts["undecided"] -= counts["not run"]
    header = ["claim", "form", *counts.columns]
    rows = counts.reset_index().to_numpy().tolist()
    return [*_section("The paper's claims: readings by verdict", CLAIMS), *_table(header, rows)]


def _protocol(experiment: Experiment) -> list[tuple[str, object]]:
    settings = experiment.certification
    return [
        ("data", experiment.data.name),
        ("test images", settings.test_images),
        ("sigma", ", ".join(f"{sigma:g}" for sigma in experiment.sigmas)),
        ("seeds", ", ".join(map(str, experiment.seeds))),
        ("mode", settings.mode),
        ("pilot draws n0", settings.n0),
        ("estimation draws n, at most", settings.n),
        ("alpha", f"{settings.alpha:g} per {settings.family}"),
    ]


def _provenance(summary: pd.DataFrame, logs: list[Path]) -> list[tuple[str, object]]:
    """What the certifications say about their code, data and machine; each value once."""
    # Neither true nor false where there was no git.
    changed = summary["git_dirty"].map({True: " with local changes", False: ""}).fillna("")
    revisions = summary["git_revision"] + changed
    sidecars = [read_protocol(path) for path in logs]
    seconds = summary["certification_seconds"].sum()
    versions = [
        ", ".join(f"{name} {version}" for name, version in sidecar["versions"].items())
        for sidecar in sidecars
    ]
    return [
        ("machine", _distinct(summary["machine"])),
        ("revision", _distinct(revisions)),
        ("precision", _distinct(summary["precision"])),
        ("versions", _distinct(versions)),
        ("sha256 of the data", _distinct(sidecar["data_sha256"] for sidecar in sidecars)),
        ("seconds of certification", f"{seconds:.0f}"),
    ]


def _distinct(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values))
