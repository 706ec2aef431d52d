"""The report's front page, rendered from tables whose content is known."""

import json
from pathlib import Path

import pandas as pd
import pytest
from docutils import nodes
from docutils.core import publish_doctree

from bench.config import Experiment
from bench.errors import BenchError
from bench.overview import write_overview

LEADERBOARD = """| method | σ=0.5, r=0 | σ=0.5, r=0.25 |
|---|--:|--:|
| undefended | 12.0 | 3.0 |
| a *very* `odd` label_ | 99.0 | 98.5 |
| + LoRA:: | 1.0 | – |
| 1. run | -1.0 | 2. |
"""
CLAIM = {"text": "PEFT wins_", "form": "paper"}
VERDICTS = [
    {**CLAIM, "verdict": "supported", "reason": ""},
    {**CLAIM, "verdict": "undecided", "reason": "interval"},
    {**CLAIM, "verdict": "undecided", "reason": "not run"},
    {**CLAIM, "verdict": "undecided", "reason": "not run"},
    {"text": "other", "form": "transferred", "verdict": "contradicted", "reason": ""},
]
LINKS = """
.. _certified_accuracy.csv: here
.. _paired.csv: here
.. _claims.csv: here
"""


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """A leaderboard and a summary of two certifications."""
    (tmp_path / "leaderboard.md").write_text(LEADERBOARD)
    row = {"machine": "a CPU", "git_revision": "abc", "precision": "float32"}
    rows = [row | {"git_dirty": dirty, "certification_seconds": 20} for dirty in (False, True)]
    pd.DataFrame(rows).to_csv(tmp_path / "summary.csv", index=False)
    for name, version in (("a", "2.0"), ("b", "2.1"), ("c", "2.1")):
        sidecar = {"versions": {"torch": version, "timm": "1.0"}, "data_sha256": "cafe"}
        (tmp_path / f"{name}.json").write_text(json.dumps(sidecar))
    return tmp_path


def cells(experiment: Experiment, tables: Path, claims: Path | None) -> list[list[str]]:
    """Every row of every table of the rendered page."""
    page, logs = tables / "overview.rst", [tables / f"{name}.tsv" for name in "abc"]
    write_overview(experiment, tables, logs, claims, page)
    # Whatever it cannot render stops it.
    tree = publish_doctree(page.read_text() + LINKS, settings_overrides={"halt_level": 2})
    return [[cell.astext() for cell in row] for row in tree.findall(nodes.row)]


def test_tables_and_settings_reach_the_page(smoke: Experiment, tables: Path) -> None:
    rows = cells(smoke, tables, None)
    assert ["a *very* `odd` label_", "99.0", "98.5"] in rows
    assert ["+ LoRA::", "1.0", "–"] in rows
    assert ["1. run", "-1.0", "2."] in rows
    settings = smoke.certification
    assert ["estimation draws n, at most", str(settings.n)] in rows
    assert ["test images", str(settings.test_images)] in rows
    assert ["revision", "abc; abc with local changes"] in rows
    assert ["versions", "torch 2.0, timm 1.0; torch 2.1, timm 1.0"] in rows
    assert ["sha256 of the data", "cafe"] in rows
    assert ["seconds of certification", "40"] in rows


def test_claims_come_first_and_only_once_judged(smoke: Experiment, tables: Path) -> None:
    assert cells(smoke, tables, None)[0][0] == "method"
    claims = tables / "claims.csv"
    pd.DataFrame(VERDICTS).to_csv(claims, index=False)
    header, first, second, *_ = cells(smoke, tables, claims)
    assert header[2:] == ["supported", "contradicted", "undecided", "not run"]
    assert first == ["PEFT wins_", "paper", "1", "0", "1", "2"]
    assert second == ["other", "transferred", "0", "1", "0", "0"]


@pytest.mark.parametrize("name", ["leaderboard.md", "summary.csv"])
def test_a_missing_table_is_named(smoke: Experiment, tables: Path, name: str) -> None:
    (tables / name).unlink()
    with pytest.raises(BenchError, match=rf"{name} is missing"):
        write_overview(smoke, tables, [], None, tables / "overview.rst")
