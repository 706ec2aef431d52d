"""The audit: each defect is found, and an honest log passes."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from bench.cli import app
from bench.errors import BenchError
from bench.files import sha256_file
from bench.smoothing.audit import Claim, audit_log, claim_of
from bench.smoothing.bounds import certified_radius, p_a_lower
from bench.smoothing.log import write_cohen_log, write_log

LOGS = Path(os.environ.get("BENCH_SHARED", Path(__file__).parents[2] / "shared")) / "reference/logs"
CLAIM = Claim(sigma=0.25, alpha=0.001, n=100_000)
HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"


def honest(count: int = 100, stride: int = 20) -> list[list[object]]:
    """Rows of a balanced three-digit log without defects: cells in the header's order."""
    return [[stride * i, i % 10, i % 10, "0.953", 1, "0:00:15.4"] for i in range(count)]


def found(
    folder: Path, rows: list[list[object]], claim: Claim = CLAIM, end: str = "\n"
) -> list[str]:
    """Findings about a log of these rows, as they are printed."""
    path = folder / "log.tsv"
    path.write_text(HEADER + "\n".join("\t".join(map(str, row)) for row in rows) + end)
    return [str(finding) for finding in audit_log(path, claim)]


def only(findings: list[str]) -> str:
    """The single finding."""
    assert len(findings) == 1, findings
    return findings[0]


def test_an_honest_log_passes(tmp_path: Path) -> None:
    assert found(tmp_path, honest()) == []


def test_radii_above_the_cap(tmp_path: Path) -> None:
    rows = honest()
    rows[3][3], rows[4][3] = "0.978", "0.955"
    finding = only(found(tmp_path, rows))
    assert finding.startswith("error: radii above 0.952864, the cap")
    assert finding.endswith(": 2, up to 0.978")


@pytest.mark.parametrize(
    ("radius", "above"),
    # The cap is 0.9528641.
    [("0.953", False), ("0.954", True), ("0.9530", True), ("0.95286", False), ("0.95287", True)],
)
def test_the_cap_allows_for_the_printed_digits(tmp_path: Path, radius: str, above: bool) -> None:
    rows = honest()
    for row in rows:
        row[3] = "0.9"
    rows[0][3] = radius
    assert any("cap" in finding for finding in found(tmp_path, rows)) == above


def test_an_alpha_over_the_data_set_leaves_each_image_its_part(tmp_path: Path) -> None:
    sidecar = {"sigma": 0.25, "alpha": 0.001, "alpha_per_image": 1e-5, "n": 1000}
    (tmp_path / "log.json").write_text(json.dumps(sidecar))
    assert claim_of(tmp_path / "log.tsv").alpha == 1e-5
    assert claim_of(tmp_path / "log.tsv", alpha=0.01).alpha == 0.01


def test_equal_votes_lie_at_the_cap(tmp_path: Path) -> None:
    for n in (100, 1000, 100_000):
        radius = certified_radius(p_a_lower(n, n, 0.001), 0.25)
        rows = [
            {"idx": i, "label": i, "predict": i, "radius": radius, "correct": 1, "time": 1.5}
            for i in range(10)
        ]
        for write in (write_log, write_cohen_log):
            write(rows, tmp_path / "log.tsv")
            assert audit_log(tmp_path / "log.tsv", Claim(0.25, 0.001, n)) == []


def test_negative_radii(tmp_path: Path) -> None:
    rows = honest()
    rows[5][3] = "-0.25"
    assert only(found(tmp_path, rows)) == "error: negative radii: 1, down to -0.25"


def test_radii_rounded_up_to_a_multiple_of_a_quarter(tmp_path: Path) -> None:
    rows = honest()
    rows[0][3], rows[1][3], rows[2][3] = "0.25", "0.5", "0.75"
    rows[1][2], rows[1][4] = 9, 0  # wrong answers are no over-claim
    finding = only(found(tmp_path, rows))
    assert finding.startswith("warning: correct radii that their 3 printed digits may have rounded")
    assert finding.endswith(": 2 of 100")


def test_full_precision_is_no_rounding(tmp_path: Path) -> None:
    rows = honest()
    rows[0][3], rows[1][3] = "0.25", "0.12345678901234567"
    for row in rows[2:]:
        row[3] = "0.95"
    assert found(tmp_path, rows) == []


def test_a_log_of_ours_cuts_no_digits(tmp_path: Path) -> None:
    rows = honest()
    rows[0][3] = "0.25"
    assert "printed digits" in only(found(tmp_path, rows))
    log, side = tmp_path / "log.tsv", tmp_path / "log.json"
    claim = {"sigma": 0.25, "alpha": 0.001, "n": 100_000}
    side.write_text(json.dumps({**claim, "log_sha256": sha256_file(log)}))
    assert "printed digits" not in audit(log).output


def test_missing_images(tmp_path: Path) -> None:
    rows = honest()
    del rows[50:52], rows[20]
    finding = "error: images missing from the stride 20: 3, the first after 380"
    assert only(found(tmp_path, rows)) == finding


def test_a_missing_image_of_a_full_test_set(tmp_path: Path) -> None:
    rows = honest(stride=1)
    del rows[20]
    finding = "error: images missing from the stride 1: 1, the first after 19"
    assert only(found(tmp_path, rows)) == finding


@pytest.mark.parametrize("wanted", [7_000, 9_000, 9_999])
def test_most_of_a_test_set_is_spread_evenly(tmp_path: Path, wanted: int) -> None:
    rows = (honest() * 100)[:wanted]
    rows = [[10_000 * i // wanted, *row[1:]] for i, row in enumerate(rows)]
    claim = replace(CLAIM, images=wanted)
    assert not any("missing" in line for line in found(tmp_path, rows, claim))
    del rows[wanted // 2]
    assert any("images missing" in line for line in found(tmp_path, rows, claim))


def test_strides_that_alternate_are_regular(tmp_path: Path) -> None:
    rows = honest()
    for i, row in enumerate(rows):
        row[0] = 67 * i // 2
    assert found(tmp_path, rows) == []
    del rows[40], rows[20]
    finding = "error: images missing from the stride 34: 2, the first after 636"
    assert only(found(tmp_path, rows)) == finding


def test_subsets_that_skip_classes_may_be_answered_with_them(tmp_path: Path) -> None:
    rows = honest()
    for row in rows:
        row[1] = row[2] = 2 * int(str(row[1]))
    rows[9][2], rows[9][4] = 19, 0
    assert found(tmp_path, rows) == []
    rows[9][2] = 20
    assert only(found(tmp_path, rows)).startswith("warning: predictions beyond the largest label")


def test_random_subsets_are_told(tmp_path: Path) -> None:
    rows = honest()
    for i, row in enumerate(rows):
        row[0] = 3 * i * i
    assert only(found(tmp_path, rows)).startswith("warning: the images follow no regular stride")


def test_a_subset_from_the_middle_is_told(tmp_path: Path) -> None:
    rows = honest()
    for row in rows:
        row[0] = int(str(row[0])) + 500
    assert only(found(tmp_path, rows)).startswith("warning: the log starts at image 500")


def test_repeated_images(tmp_path: Path) -> None:
    rows = honest()
    rows[21:21] = [rows[20], rows[20]]
    assert only(found(tmp_path, rows)) == "error: rows that repeat an image: 2, first image 400"


def test_images_out_of_order(tmp_path: Path) -> None:
    rows = honest()
    rows = rows[50:] + rows[:50]
    finding = "warning: the images are not in order, the first after image 1980"
    assert only(found(tmp_path, rows)) == finding


def test_too_few_images(tmp_path: Path) -> None:
    claim = Claim(0.25, 0.001, 100_000, images=500)
    assert only(found(tmp_path, honest(), claim)) == "error: the log holds 100 of 500 images"
    assert found(tmp_path, honest(500), claim) == []


@pytest.mark.parametrize(
    ("rows", "end", "complaint"),
    [
        (honest(), "\n1\t2", "error: .*cut off or garbled at line 102: it ends before"),
        ([[*honest()[0][:3], "high", 1, 1]], "\n", "error: .* line 2: radius is 'high'"),
        ([], "", "error: .* holds no images"),
        (honest(), "", "warning: the last line does not end"),
    ],
)
def test_cut_or_garbled_files(
    tmp_path: Path, rows: list[list[object]], end: str, complaint: str
) -> None:
    assert re.match(complaint, only(found(tmp_path, rows, end=end)))


def test_predictions_that_are_no_classes(tmp_path: Path) -> None:
    rows = honest()
    rows[7][2], rows[7][4] = 10, 0
    ten = Claim(0.25, 0.001, 100_000, classes=10)
    finding = "error: predict is no class in 1 rows, the first is 10 at image 140"
    assert only(found(tmp_path, rows, ten)) == finding
    assert only(found(tmp_path, rows)).startswith("warning: predictions beyond the largest label")
    rows[7][2] = -3
    finding = "error: predict is no class in 1 rows, the first is -3 at image 140"
    assert only(found(tmp_path, rows)) == finding


def test_labels_that_are_no_classes(tmp_path: Path) -> None:
    rows = honest()
    rows[7][1], rows[7][4] = -1, 0
    finding = "error: label is no class in 1 rows, the first is -1 at image 140"
    assert finding in found(tmp_path, rows)


def test_abstentions_and_uncertified_images(tmp_path: Path) -> None:
    rows = honest()
    rows[7][2:5] = [-1, "0.0", 0]
    assert found(tmp_path, rows) == []
    rows[8][2:5] = [-2, "0.0", 0]
    assert only(found(tmp_path, rows)).startswith("warning: images not certified")


def test_correct_that_disagrees(tmp_path: Path) -> None:
    rows = honest()
    rows[7][4], rows[8][4] = 0, "maybe"
    finding = "warning: `correct` disagrees with predict == label in 2 rows"
    assert only(found(tmp_path, rows)) == finding


def test_correct_as_a_running_count(tmp_path: Path) -> None:
    rows = honest()
    for i, row in enumerate(rows):
        row[4] = i + 1
    assert only(found(tmp_path, rows)).startswith("warning: `correct` is a running count")


def test_correct_as_booleans(tmp_path: Path) -> None:
    rows = honest()
    for row in rows:
        row[4] = True
    assert found(tmp_path, rows) == []


def test_unbalanced_classes(tmp_path: Path) -> None:
    rows = honest()
    for row in rows[:40]:
        row[1] = row[2] = 0
    finding = only(found(tmp_path, rows))
    assert finding.startswith("warning: the classes are unbalanced: 6 to 46 images per class")


def test_absent_classes_are_unbalanced(tmp_path: Path) -> None:
    twenty = Claim(0.25, 0.001, 100_000, classes=20)
    finding = only(found(tmp_path, honest(), twenty))
    assert finding.startswith("warning: the classes are unbalanced: 0 to 10 images per class")


WHOLE = st.one_of(st.integers(-3, 12), st.integers(-(2**54), 2**54))
ROWS = st.tuples(WHOLE, WHOLE, WHOLE, st.floats(), st.sampled_from([0, 1, "", "True"]), st.just(1))


@given(st.lists(ROWS.map(list), max_size=12), st.sampled_from([None, 10, 2**40]))
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_cells_can_be_audited(
    tmp_path: Path, rows: list[list[object]], classes: int | None
) -> None:
    for finding in found(tmp_path, rows, Claim(0.25, 0.001, 100_000, classes=classes)):
        assert re.match("(error|warning): .", finding)


def test_errors_come_first(tmp_path: Path) -> None:
    rows = honest()
    rows[3][3], rows[4][3] = "0.25", "0.978"
    rows = [*rows[50:], *rows[:50], rows[0]]
    kinds = [finding.partition(":")[0] for finding in found(tmp_path, rows)]
    assert kinds == ["error", "error", "warning", "warning"]


def audit(log: Path, *options: str) -> Result:
    """`bench audit LOG ...` in this process."""
    return CliRunner().invoke(app, ["audit", str(log), *options])


def test_the_command_fails_on_errors_alone(tmp_path: Path) -> None:
    protocol = ["--sigma", "0.25", "--alpha", "0.001", "--n", "100000"]
    rows = honest()
    rows[0][3] = "0.25"
    found(tmp_path, rows)
    done = audit(tmp_path / "log.tsv", *protocol)
    assert (done.exit_code, done.output.count("\n")) == (0, 1)
    rows[0][3] = "0.978"
    found(tmp_path, rows)
    done = audit(tmp_path / "log.tsv", *protocol)
    assert (done.exit_code, done.output.partition(":")[0]) == (1, "error")


def test_the_sidecar_tells_the_protocol(tmp_path: Path) -> None:
    found(tmp_path, honest())
    log, side = tmp_path / "log.tsv", tmp_path / "log.json"
    side.write_text(json.dumps({"sigma": 0.25, "alpha": 0.001, "n": 100_000, "n_images": 100}))
    assert audit(log).exit_code == 0
    done = audit(log, "--n", "1000")
    assert (done.exit_code, "n = 1000: 100, up to 0.953" in done.output) == (1, True)
    side.write_text(json.dumps({"sigma": 0.25, "alpha": 0.001, "n": 100_000, "n_images": 101}))
    assert "holds 100 of 101 images" in audit(log).output


def test_a_log_that_was_changed_after_its_sidecar_is_an_error(tmp_path: Path) -> None:
    found(tmp_path, honest())
    log, side = tmp_path / "log.tsv", tmp_path / "log.json"
    claim = {"sigma": 0.25, "alpha": 0.001, "n": 100_000}
    side.write_text(json.dumps({**claim, "log_sha256": sha256_file(log)}))
    assert audit(log).exit_code == 0
    log.write_text(log.read_text().replace("0.9", "0.8", 1))
    done = audit(log)
    assert (done.exit_code, "changed since log.json was written" in done.output) == (1, True)


@pytest.mark.parametrize(
    ("side", "given", "complaint"),
    [
        (None, {"alpha": 0.001}, "give --sigma and --n"),
        ("{}", {"sigma": 0.25, "n": 100}, "give --alpha"),
        ("{", {}, "not valid JSON"),
        ('{"sigma": "big"}', {}, "sigma must be a number, got 'big'"),
        (None, {"sigma": 0.25, "alpha": 1.0, "n": 100}, "--alpha must lie below 1"),
        (None, {"sigma": -1.0, "alpha": 0.1, "n": 100}, "--sigma must be positive"),
        (None, {"sigma": 0.25, "alpha": 0.1, "n": 0}, "--n must be positive"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    tmp_path: Path, side: str | None, given: dict[str, float], complaint: str
) -> None:
    if side is not None:
        (tmp_path / "log.json").write_text(side)
    with pytest.raises(BenchError, match=complaint):
        claim_of(tmp_path / "log.tsv", **given)


def shipped(name: str) -> Path:
    """A shipped log of the field; skips where none are beside this checkout."""
    if not LOGS.is_dir():
        pytest.skip(f"{LOGS} is absent: set BENCH_SHARED")
    return LOGS / name


@pytest.mark.parametrize(
    ("name", "above"),
    [
        ("cohen/cifar10_resnet110_sigma_0.12", 0),
        ("cohen/cifar10_resnet110_sigma_0.25", 77),
        ("cohen/cifar10_resnet110_sigma_0.50", 9),
        # Its largest radius is 3.56, below either cap.
        ("cohen/cifar10_resnet110_sigma_1.00", 0),
        ("cohen/imagenet_resnet50_sigma_0.25", 128),
        ("cohen/imagenet_resnet50_sigma_0.50", 88),
        ("cohen/imagenet_resnet50_sigma_1.00", 38),
        ("catrs-fashion-mnist/gaussian_sigma_0.25", 0),
        ("catrs-fashion-mnist/gaussian_sigma_0.5", 0),
        ("catrs-fashion-mnist/gaussian_sigma_1.0", 0),
    ],
)
def test_shipped_logs_against_the_cap(name: str, above: int) -> None:
    log, sigma = shipped(f"{name}.tsv"), float(name.rpartition("_")[2])
    errors = [f for f in audit_log(log, Claim(sigma, 0.001, 100_000)) if f.severity == "error"]
    assert len(errors) == (above > 0)
    assert all(f": {above}, up to " in finding.message for finding in errors)
    # All of them obey the cap of alpha = 0.01.
    loose = audit_log(log, Claim(sigma, 0.01, 100_000))
    assert [finding for finding in loose if finding.severity == "error"] == []


def test_the_cut_imagenet_log() -> None:
    log = shipped("cohen/imagenet_resnet50_sigma_0.25.tsv")
    hints = [str(finding) for finding in audit_log(log, Claim(0.25, 0.01, 100_000))]
    assert any("beyond the largest label, 852: 5; the log is cut off" in hint for hint in hints)
    findings = audit_log(log, Claim(0.25, 0.01, 100_000, images=500, classes=1000))
    assert str(findings[0]) == "error: the log holds 427 of 500 images"
    for sigma in (0.5, 1.0):
        whole = shipped(f"cohen/imagenet_resnet50_sigma_{sigma:.2f}.tsv")
        claim = Claim(sigma, 0.01, 100_000)
        assert not any("cut off" in str(finding) for finding in audit_log(whole, claim))
