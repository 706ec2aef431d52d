"""Certification logs: what is written comes back, and what is broken is refused."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from bench.cli import app
from bench.errors import BenchError
from bench.smoothing.log import COHEN_COLUMNS, import_log, read_log, write_cohen_log, write_log
from bench.statistics import certified_accuracy

SHARED = Path(os.environ.get("BENCH_SHARED", Path(__file__).parents[2] / "shared"))
REFERENCE = SHARED / "reference"
HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"


def log_of(folder: Path, text: str) -> Path:
    """A log file with this text."""
    path = folder / "log.tsv"
    path.write_text(text)
    return path


def test_radii_survive_bit_for_bit(tmp_path: Path) -> None:
    radii = np.random.default_rng(0).random(2000) * 2
    rows = [
        {"idx": i, "label": 1, "predict": 1, "radius": float(r), "correct": 1, "time": 0.5}
        for i, r in enumerate(radii)
    ]
    write_log(rows, tmp_path / "log.tsv")
    np.testing.assert_array_equal(read_log(tmp_path / "log.tsv")["radius"], radii)


def test_a_radius_is_never_rounded_up(tmp_path: Path) -> None:
    row = {"idx": 0, "label": 1, "predict": 1, "radius": 0.2499999, "correct": 1, "time": 0.5}
    write_log([row], tmp_path / "log.tsv")
    curve = certified_accuracy(read_log(tmp_path / "log.tsv"), [0.2, 0.25])
    assert curve["value"].tolist() == [1.0, 0.0]


def test_both_dialects_of_time(tmp_path: Path) -> None:
    text = HEADER + "0\t3\t3\t0.5\t1\t15.4\n1\t3\t3\t0.5\t1\t0:02:31.25\n"
    assert read_log(log_of(tmp_path, text))["time"].tolist() == [15.4, 151.25]


def test_correct_is_recomputed(tmp_path: Path) -> None:
    text = HEADER + "0\t3\t3\t0.5\t7\t1\n1\t3\t4\t0.5\t1\t1\n2\t3\t-1\t0.0\t1\t1\n"
    assert read_log(log_of(tmp_path, text))["correct"].tolist() == [1, 0, 0]


DIALECTS = {
    "CRLF, blank lines, a byte order mark": "\ufeff"
    + (HEADER + "\n0\t3\t3\t0.5\t1\t15.4\n\t\t\n20\t3\t4\t0.25\t0\t1\n  \n").replace("\n", "\r\n"),
    "no final newline": HEADER + "0\t3\t3\t0.5\t1\t0:00:15.4\n20\t3\t4\t0.25\t0\t1",
    "trailing tabs": HEADER.replace("\n", "\t\n")
    + "0\t3\t3\t0.5\t1\t15.4\t\n20\t3\t4\t0.25\t0\t1\t\t\n",
    "DDS: a running count": HEADER + "0\t3\t3\t0.5\t1\t15.4\n20\t3\t4\t0.25\t1\t1\n",
    "FT-CADIS: a count and booleans": "idx\tlabel\tpredict\tradius\tcorrect_num\tcorrect\ttime"
    "\n0\t3\t3\t0.5\t1\tTrue\t0:00:15.4\n20\t3\t4\t0.25\t1\tFalse\t0:00:01\n",
    "henba1, text": HEADER.replace("idx", "original_idx")
    + "0\t3\t3\t0.5\t1\t0:00:15.4\n20\t3\t4\t0.25\t1\t0:00:01\n",
    "henba1, CSV": "network,image_id,original_label,predicted_class,tmp_path,epsilon_value,"
    "smallest_sat_value,total_time,verifier\n"
    "RS,0,3,3,,0.5,,0:00:15.4,RS\nRS,20,3,4,,0.25,,0:00:01,RS\n",
    "another order and text": "time\tname\tradius\tpredict\tlabel\tidx\n"
    '15.4\t"a dog\t0.5\t3\t3\t0\n1\t\t0.25\t4\t3\t20\n',
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects(tmp_path: Path, dialect: str) -> None:
    path = tmp_path / "log.tsv"
    path.write_bytes(DIALECTS[dialect].encode())
    log = read_log(path)
    columns = ["idx", "label", "predict", "radius", "correct", "time"]
    assert log[columns].values.tolist() == [[0, 3, 3, 0.5, 1, 15.4], [20, 3, 4, 0.25, 0, 1]]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("idx\tlabel\tpredict\n0\t1\t1\n", "lacks the columns .*radius"),
        ("", "not a certification log"),
        (HEADER, "no images"),
        (HEADER + "0\t3\t3\t0.5\t1\t1\n1\t3\t3\t0.\n", "line 3"),
        (HEADER + "0\t3\t3\thalf\t1\t1\n", "line 2"),
        (HEADER + "0\t3\t3\t0.5\t1\tsoon\n", "line 2"),
        (HEADER + "0\t3\t3\t0.5\t1\t1\t9\n", "line 2 is longer than its header"),
        (HEADER + "\n\n0\t3\t3\thalf\t1\t1\n", "line 4: radius is 'half'"),
        (HEADER + "0\t3\t3\tinf\t1\t1\n", "line 2: radius is 'inf'"),
        (HEADER + "0\t3\t3.5\t1\t1\t1\n", "line 2: predict is '3.5'"),
        (HEADER + "0\t3\t3\t1\t1\t\n", "line 2: time is ''"),
        (HEADER + "0\t3\t3\t0.5", "line 2: it ends before column correct"),
        (
            HEADER.replace("\n", "\tn_a\n") + "0\t3\t3\t1\t1\t1\t9\n1\t3\t3\t1\t1\t1\tx\n",
            "n_a is 'x'",
        ),
        (HEADER.replace("correct", "radius") + "0\t3\t3\t1\t1\t1\n", "names a column twice"),
        ("0\t3\t3\t0.5\t1\t15.4\n", "first line must name them, but reads '0, 3"),
        (HEADER + "4\t3\t3\t0.5\t1\t1\n4\t3\t3\t0.5\t1\t1\n", "image 4 twice"),
    ],
)
def test_broken_logs_are_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(BenchError, match=complaint):
        read_log(log_of(tmp_path, text))


def test_a_missing_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"absent\.tsv is missing"):
        read_log(tmp_path / "absent.tsv")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "log.tsv").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(BenchError, match="not a certification log"):
        read_log(tmp_path / "log.tsv")
    with pytest.raises(BenchError, match="cannot be read"):
        read_log(tmp_path)


CELLS = st.one_of(
    st.integers(-3, 30).map(str),
    st.floats().map(str),
    st.sampled_from(["", " ", "0:00:15.4", "1:x", "True", '"', "1" * 400, "1e400", "0x1", "\x00"]),
    st.text(max_size=4),
)
LINES = st.lists(st.lists(CELLS, min_size=1, max_size=8).map("\t".join), max_size=6)
TABLES = st.tuples(
    st.sampled_from([HEADER, HEADER.replace("\n", "\textra\n"), HEADER.replace("\t", ","), ""]),
    st.one_of(LINES.map("\n".join), LINES.map(lambda lines: "\n".join(lines).replace("\t", ","))),
).map(lambda parts: "".join(parts).encode(errors="replace"))


@given(st.one_of(st.binary(max_size=200), TABLES))
@example((HEADER + "0\t3\t3\t0.5\t1\t1\n").encode())
@settings(
    max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "log.tsv"
    path.write_bytes(content)
    try:
        log = read_log(path)
    except BenchError:
        return
    assert len(log)
    assert np.isfinite(log[COHEN_COLUMNS].to_numpy(dtype=float)).all()


def test_cohen_export_has_his_columns_and_our_digits(tmp_path: Path) -> None:
    row = {"idx": 0, "label": 1, "predict": 1, "radius": 0.24999999999999997, "correct": 1}
    write_cohen_log([{**row, "time": 75.25, "n_a": 9}], tmp_path / "log.tsv")
    text = (tmp_path / "log.tsv").read_text()
    assert text == HEADER + "0\t1\t1\t0.24999999999999997\t1\t0:01:15.250000\n"
    assert read_log(tmp_path / "log.tsv")[[*row, "time"]].to_dict("records") == [
        {**row, "time": 75.25}
    ]


def test_import_writes_a_tidy_curve(tmp_path: Path) -> None:
    rows = [
        "0\t1\t1\t0.75\t1\t1",
        "1\t1\t1\t0.15\t1\t1",
        "2\t1\t0\t0.9\t0\t1",
        "3\t1\t-1\t0.0\t0\t1",
    ]
    log = log_of(tmp_path, HEADER + "\n".join(rows) + "\n")
    output = tmp_path / "curve.csv"
    done = CliRunner().invoke(app, ["import", str(log), "--sigma", "0.25", "--output", str(output)])
    assert done.exit_code == 0, done.output
    curve = pd.read_csv(output)
    columns = ["radius", "value", "low", "high", "n_images", "sigma", "source"]
    assert curve.columns.tolist() == columns
    assert curve["radius"].tolist() == [round(0.05 * i, 10) for i in range(21)]
    # 0.15 and 0.75 are no sums of 0.05 in floating point, and are reached all the same.
    assert curve["value"].tolist() == [0.5] * 4 + [0.25] * 12 + [0.0] * 5
    assert set(curve["source"]) == {log.as_posix()}
    assert (curve["low"] <= curve["value"]).all()
    assert (curve["value"] <= curve["high"]).all()


@pytest.mark.parametrize("output", [".", "log.tsv/curve.csv", "log.tsv/deeper/curve.csv"])
def test_an_output_that_cannot_be_is_refused(tmp_path: Path, output: str) -> None:
    log = log_of(tmp_path, HEADER + "0\t1\t1\t0.5\t1\t1\n")
    options = ["--sigma", "0.25", "--output", str(tmp_path / output)]
    done = CliRunner().invoke(app, ["import", str(log), *options])
    assert isinstance(done.exception, BenchError)
    assert "cannot be written" in str(done.exception)


def test_a_curve_covers_radii_beyond_four_sigma(tmp_path: Path) -> None:
    log = log_of(tmp_path, HEADER + "0\t1\t1\t2.02\t1\t1\n")
    assert import_log(log, 0.25, 0.25)["radius"].max() == 2.25


@pytest.mark.parametrize(
    ("sigma", "step", "complaint"),
    [
        (0.0, 0.05, "--sigma must be positive"),
        (float("nan"), 0.05, "--sigma must be positive"),
        (0.25, -1.0, "--radius-step must be positive"),
        (0.25, 1e-9, "--radius-step 1e-09 gives"),
    ],
)
def test_import_refuses_what_cannot_be_meant(
    tmp_path: Path, sigma: float, step: float, complaint: str
) -> None:
    with pytest.raises(BenchError, match=complaint):
        import_log(log_of(tmp_path, HEADER + "0\t1\t1\t0.5\t1\t1\n"), sigma, step)


def published_source(log: Path) -> tuple[str, float, str]:
    """Which rows of published.csv were computed from this log."""
    if log.parent.name == "cohen":
        dataset, network, _, sigma = log.stem.split("_")
        key = {"cifar10": "CIFAR-10", "imagenet": "ImageNet"}[dataset]
        folder = f"data/certify/{dataset}/{network}/noise_{sigma}/test/sigma_{sigma}"
        return key, float(sigma), f"locuslab/smoothing@78a4d94:{folder}"
    sigma = log.stem.split("_")[-1]
    return "Fashion-MNIST", float(sigma), "/cohen/noise_"


def test_published_logs_import_to_the_published_values() -> None:
    logs = sorted(REFERENCE.glob("logs/*/*.tsv"))
    if not logs:
        pytest.skip(f"{REFERENCE} holds no logs: set BENCH_SHARED")
    published = pd.read_csv(REFERENCE / "published.csv")
    for log in logs:
        dataset, sigma, source = published_source(log)
        rows = published[
            (published["dataset"] == dataset)
            & np.isclose(published["sigma"], sigma)
            & published["source"].str.contains(source, regex=False)
            & published["note"].str.startswith("computed from log")
        ]
        assert len(rows) >= 2, log
        curve = import_log(log, sigma, 0.05).set_index("radius").loc[rows["radius"]]
        # Percent, printed with two decimals; 0.2 % of 427 or 500 images is one image.
        reported = rows["certified_accuracy_percent"].to_numpy()
        np.testing.assert_allclose(100 * curve["value"], reported, atol=0.005 + 1e-9)
        hits = np.round(reported / 100 * curve["n_images"])
        np.testing.assert_array_equal(np.round(curve["value"] * curve["n_images"]), hits)
