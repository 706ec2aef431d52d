"""The front page of the report: what was run, what came out, by which code on which machine."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from bench.claims import VERDICTS
from bench.config import Experiment
from bench.errors import BenchError
from bench.files import atomic_write

CLAIMS = """
`paper` readings are of the paper's own experiments, `transferred` ones of like claims on
experiments that ran here. A reading is supported if its whole 95 % interval satisfies the claim,
contradicted if none of it does, else undecided. claims.csv_ has the evidence and the sources.
"""
BOARD = """
Share of test images, in %, that are answered correctly with a certified l2 radius of at least r,
in [0, 1] pixels of the images that the noise was added to. First seed; certified_accuracy.csv_ has
all of them with their 95 % intervals, paired.csv_ says which differences are certain.
"""


def write_overview(experiment: Experiment, tables: Path, claims: Path | None, output: Path) -> None:
    """Write the page as reStructuredText, which `bench/report/workflow.rst` includes.

    Args:
        experiment: what was run.
        tables: folder of its tables.
        claims: claims.csv, if claims were judged.
        output: the page.

    Raises:
        BenchError: a table is missing.
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
        *_table(("", ""), _provenance(pd.read_csv(summary))),
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
    """A text that reStructuredText takes for no markup."""
    return re.sub(r"([\\*`_|])", r"\\\1", str(cell))


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
    table = pd.read_csv(path)
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


def _provenance(summary: pd.DataFrame) -> list[tuple[str, object]]:
    """What the tables say about the code and machine that certified."""
    changed = summary["git_dirty"].astype(bool)
    revisions = summary["git_revision"] + changed.map({True: " with local changes", False: ""})
    seconds = summary["certification_seconds"].sum()
    return [
        ("machine", "; ".join(summary["machine"].unique())),
        ("revision", "; ".join(revisions.unique())),
        ("precision", "; ".join(summary["precision"].unique())),
        ("seconds of certification", f"{seconds:.0f}"),
    ]
