"""The DAG as users run it: once through, nothing twice, edits rerun what they affect."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from PIL import Image

from bench.compare import agree, compare_results
from bench.errors import BenchError
from bench.files import read_json, write_json
from bench.provenance import tensors_sha256
from bench.standalone import certify_anything
from tests.browser import visit
from tests.workflow import SMOKE, snakemake

pytestmark = pytest.mark.workflow
ROOT = Path(__file__).parents[1]
SHIPPED = sorted({path.stem for path in ROOT.glob("config/*.yaml")} - {"claims"})


def planned(where: Path, *arguments: str) -> set[str]:
    """Rules that a dry run would execute."""
    said = snakemake(where, "-n", *arguments)
    known = ("fetch", "pretrain", "train", "certify", "attack", "tables", "figures")
    return {name for name in known if f"\n{name} " in said}


def test_smoke_runs_every_rule_and_fills_the_tables(done):
    experiment = yaml.safe_load((done / "config/smoke.yaml").read_text())
    for table in ("certified_accuracy", "summary", "cost"):
        frame = pd.read_csv(done / f"results/smoke/tables/{table}.csv")
        assert list(frame["method"].unique()) == list(experiment["methods"])
    cost = pd.read_csv(done / "results/smoke/tables/cost.csv").set_index("method")
    assert cost.loc["undefended", "trainable_parameters"] == 0
    assert cost.loc["gaussian_retraining", "base_training_flops"] == 0
    assert cost.loc["diffusion_denoising", "inference_flops"] > cost.loc["lora", "inference_flops"]
    beside = pd.read_csv(done / "results/smoke/tables/published.csv")
    assert set(beside["method"]) == {"gaussian_retraining"}
    checks = pd.read_csv(done / "results/smoke/tables/soundness.csv")
    assert checks["method"].tolist() == experiment["attack"]["methods"]
    assert checks["broken"].tolist() == [0]
    curves = ("certified_accuracy", "accuracy_by_method", "accuracy_vs_parameters")
    for name in (
        *curves,
        "accuracy_vs_compute",
        "base_and_smoothed",
        "per_class",
        "vote_shares",
        "examples",
        "attacks",
    ):
        assert (done / f"figures/smoke/{name}.png").read_bytes()[1:4] == b"PNG"
    pickles = [p for p in (done / "results").rglob("*") if p.suffix in (".pt", ".pth", ".pkl")]
    assert not pickles


@pytest.mark.slow
@pytest.mark.parametrize("target", ["accounting", "calibration", "claims", "tune"])
def test_targets_beside_all_are_planned(done, target):
    assert f"\n{target} " in snakemake(done, "-n", *SMOKE, "--", target)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_experiment_is_planned(name, tmp_path):
    command = ["-n", "--snakefile", str(ROOT / "Snakefile")]
    command += ["--configfile", str(ROOT / f"config/{name}.yaml")]
    said = snakemake(tmp_path, *command)
    for rule in ("fetch", "certify", "tables", "figures"):
        assert f"\n{rule}" in said


def test_a_second_run_has_nothing_to_do(done):
    assert "Nothing to be done" in snakemake(done, *SMOKE)


@pytest.mark.parametrize(
    ("module", "rerun"),
    [
        ("bench/figures.py", {"figures"}),
        ("bench/attacks.py", {"attack"}),
        ("bench/smoothing/engine.py", {"certify", "attack", "tables", "figures"}),
        ("bench/training.py", {"pretrain", "train", "certify", "attack", "tables", "figures"}),
    ],
)
def test_an_edit_reruns_what_it_affects(done, module, rerun):
    path = done / module
    original = path.read_text()
    try:
        path.write_text(original + "\n# edited\n")
        assert planned(done, *SMOKE) == rerun
    finally:
        path.write_text(original)
    assert planned(done, *SMOKE) == set()


def test_a_changed_setting_reruns_its_method_alone(done):
    path = done / "config/smoke.yaml"
    original = path.read_text()
    values = yaml.safe_load(original)
    values["methods"]["lora"]["parameterization"]["r"] = 4
    try:
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        said = snakemake(done, "-n", *SMOKE)
    finally:
        path.write_text(original)
    trained = {line for line in said.splitlines() if "output: results/smoke/models/" in line}
    assert len(trained) == 1
    assert "models/lora/" in trained.pop()


@pytest.fixture(scope="module")
def report(done: Path) -> str:
    """The text of the smoke experiment's report."""
    snakemake(done, *SMOKE, "--report", "report.html")
    return (done / "report.html").read_text()


def test_the_report_says_what_ran_and_what_came_out(report):
    assert "System Message" not in report  # of docutils: a page that it could not render
    description = report.split("var workflow_desc = ")[1].split("</script>")[0]
    for words in ("Certified robustness: smoke", "fashion_mnist", "decide", "0.001 per image"):
        assert words in description


def test_the_report_opens_in_a_browser_without_a_network(report, done, tmp_path):
    seen = visit(report, tmp_path)
    assert seen["errors"] == []
    assert seen["requests"] == []
    assert seen["top"] >= 0  # the title can be reached
    experiment = yaml.safe_load((done / "config/smoke.yaml").read_text())
    for method in experiment["methods"].values():
        assert method["label"] in seen["front"]
    assert set(seen["categories"]) == {"Figures", "Tables"}
    assert "results/smoke/tables/summary.csv" in seen["categories"]["Tables"]
    for path, description in seen["descriptions"].items():
        caption = description.partition("DESCRIPTION")[2].partition("SIZE")[0]
        assert len(caption.split()) > 5, path
    drawn = {str(path.relative_to(done)) for path in (done / "figures/smoke").iterdir()}
    assert set(seen["widths"]) == drawn
    assert min(seen["widths"].values()) > 200  # a broken image has no width


def test_the_browser_notices_what_is_wrong_with_a_report(report, tmp_path):
    start = report.index("data:image/png", report.index("var results"))
    wrong = report[:start] + "data:image/png;base64,AAAA" + report[report.index('"', start) :]
    wrong += "<img src='http://example.invalid/x.png'><script>nonsense()</script>"
    seen = visit(wrong, tmp_path)
    assert sum(width == 0 for width in seen["widths"].values()) == 1
    assert seen["requests"] == ["http://example.invalid/x.png"]
    assert ["nonsense" in message for message in seen["errors"]] == [True]


def test_attacks_need_their_section(done):
    path = done / "config/smoke.yaml"
    original = path.read_text()
    values = yaml.safe_load(original)
    del values["attack"]
    try:
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        assert "Nothing to be done" in snakemake(done, *SMOKE)
        said = snakemake(done, "-n", "attacks", *SMOKE, ok=False)
    finally:
        path.write_text(original)
    assert "smoke has no section `attack`: add one" in said


def test_command_line_overrides_are_refused(done):
    said = snakemake(done, *SMOKE, "--config", "radius_step=0.0625", ok=False)
    assert "config/smoke.yaml is the whole experiment" in said


def bench(where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=where, capture_output=True, text=True)


LORA = ["--experiment", "config/smoke.yaml", "--method", "lora", "--sigma", "0.5"]


def test_mistakes_on_the_command_line_are_one_line(done, tmp_path):
    model = "results/smoke/models/head/sigma_0.50/seed_0"
    cases = {
        "methods.nothing does not exist": ["train", *LORA[:2], "--method", "nothing", "--sigma",
                                           "0.5", "--output", str(tmp_path / "x")],
        "method is 'head', this run needs 'lora'": ["certify-method", *LORA, "--model", model,
                                                    "--output", str(tmp_path / "x.tsv")],
        "the experiment file changed": ["train", *LORA, "--output", str(tmp_path / "x"),
                                        "--expect", "other"],
        "training.json is missing": ["train", *LORA, "--output", str(tmp_path / "x"),
                                       "--base", str(tmp_path)],
        "is no data set": ["fetch", "--name", "mnest"],
    }  # fmt: skip
    for message, arguments in cases.items():
        answer = bench(done, *arguments)
        assert answer.returncode == 1, message
        assert "Traceback" not in answer.stderr
        last = answer.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert message in last


@pytest.mark.fault(
    fault="full disk",
    stage="certify",
    outcome="one line, no torn file; a rerun continues to the same log",
)
def test_a_full_disk_is_one_line_and_leaves_no_torn_file(done, tmp_path):
    script = (
        "import resource, signal, sys;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000));"
        "sys.argv = ['bench', *sys.argv[1:]];"
        "from bench.cli import main; main()"
    )
    output = tmp_path / "log.tsv"
    model = "results/smoke/models/lora/sigma_0.50/seed_0"
    arguments = ["certify-method", *LORA, "--model", model, "--output", str(output)]
    command = [sys.executable, "-c", script, *arguments]
    answer = subprocess.run(command, cwd=done, capture_output=True, text=True)
    assert answer.returncode == 1, answer.stderr
    assert "no space left" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not output.exists()
    again = bench(done, *arguments)
    assert again.returncode == 0, again.stderr
    reference = done / "results/smoke/certificates/lora/sigma_0.50/seed_0.tsv"
    left, right = (pd.read_csv(p, sep="\t").drop(columns="time") for p in (output, reference))
    pd.testing.assert_frame_equal(left, right)


def test_a_result_folder_agrees_with_itself(done):
    assert agree(compare_results(done / "results/smoke", done / "results/smoke"))


def test_scratch_and_a_base_exclude_each_other(done, tmp_path):
    scratch = ["train", "--experiment", "config/smoke.yaml", "--method", "gaussian_retraining"]
    scratch += ["--sigma", "0.5", "--output", str(tmp_path / "x")]
    for arguments in (
        [*scratch, "--base", "results/smoke/models/base"],
        ["train", *LORA, "--output", str(tmp_path / "y")],
    ):
        answer = bench(done, *arguments)
        assert answer.returncode == 1
        assert "exclude each other" in answer.stderr
        assert "Traceback" not in answer.stderr


@pytest.mark.fault(
    fault="shards of other protocols, or one twice",
    stage="gather",
    outcome="refused",
)
def test_shards_gather_to_the_unsharded_log(done, tmp_path):
    values = yaml.safe_load((done / "config/smoke.yaml").read_text())
    values["certification"]["shards"] = 3
    sharded = tmp_path / "sharded.yaml"
    sharded.write_text(yaml.safe_dump(values, sort_keys=False))
    model = "results/smoke/models/lora/sigma_0.50/seed_0"
    common = ["certify-method", "--experiment", str(sharded), *LORA[2:], "--model", model]
    logs = [tmp_path / f"{shard}.tsv" for shard in (1, 2, 3)]
    for shard, log in enumerate(logs, start=1):
        answer = bench(done, *common, "--shard", str(shard), "--output", str(log))
        assert answer.returncode == 0, answer.stderr
    whole = tmp_path / "whole.tsv"
    shards = [text for log in logs for text in ("--shard", str(log))]
    assert bench(done, "gather", "--output", str(whole), *shards).returncode == 0
    reference = done / "results/smoke/certificates/lora/sigma_0.50/seed_0.tsv"
    left, right = (pd.read_csv(p, sep="\t").drop(columns="time") for p in (whole, reference))
    pd.testing.assert_frame_equal(left, right)
    twice = bench(done, "gather", "--output", str(whole), *shards, "--shard", str(logs[0]))
    assert twice.returncode == 1
    assert "same image" in twice.stderr
    sidecar = logs[1].with_suffix(".json")
    # A commit between two shards changes neither code nor versions.
    other = {"git_revision": "another", "git_dirty": True, "machine": "another"}
    write_json(sidecar, {**read_json(sidecar), **other})
    assert bench(done, "gather", "--output", str(whole), *shards).returncode == 0
    merged = read_json(whole.with_suffix(".json"))
    assert merged["git_revision"].endswith("; another")
    assert merged["machine"].endswith("; another")
    assert merged["git_dirty"]
    write_json(sidecar, {**read_json(sidecar), "alpha": 0.5})
    foreign = bench(done, "gather", "--output", str(whole), *shards)
    assert foreign.returncode == 1
    assert "alpha differs" in foreign.stderr
    planned = snakemake(done, "-n", "--configfile", str(sharded), "--forcerun", "certify_shard")
    assert "gather_certificates" in planned


def test_certify_takes_any_model_folder(done, tmp_path):
    log = tmp_path / "own.tsv"
    arguments = ["certify", "--model", "results/smoke/models/base", "--sigma", "0.25"]
    arguments += ["--output", str(log), "--images", "8", "--set", "batch_size=64"]
    small = ["--set", "n=64", "--set", "horizon=128"]
    answer = bench(done, *arguments, "--data", "fashion_mnist", *small)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[0].split() == ["radius", "value", "low", "high", "n_images"]
    assert len(pd.read_csv(log, sep="\t")) == 8
    votes = log.with_suffix(".votes.jsonl")
    kept = votes.read_text()
    answer = bench(done, *arguments, "--data", "fashion_mnist", *small, "--images", "16")
    assert answer.returncode == 0, answer.stderr
    assert len(pd.read_csv(log, sep="\t")) == 16
    assert votes.read_text().startswith(kept)  # more images do not redraw the first
    kept = votes.read_text()
    longer = ["--set", "n=128", "--set", "horizon=128", "--set", "reserve_at=64"]
    answer = bench(done, *arguments, "--data", "fashion_mnist", *longer, "--images", "16")
    assert answer.returncode == 0, answer.stderr
    assert votes.read_text().startswith(kept)  # nor do more draws
    nonsense = bench(done, *arguments, "--data", "fashion_mnist", "--set", "nonsense=1")
    assert nonsense.returncode == 1
    assert "Traceback" not in nonsense.stderr
    assert "nonsense" in nonsense.stderr


def test_what_certify_cannot_take_is_refused(done, tmp_path):
    folder = tmp_path / "images/cat"
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(folder / "one.png")
    model = str(done / "results/smoke/models/base")
    cases = {
        "neither a folder nor a data set": (model, "nowhere"),
        "give --image-size": (model, str(folder.parent)),
        "give --image-size, which": (model, "imagenet"),
        "timm has no pretrained weights": ("timm:nothing", "fashion_mnist"),
        "weights of that name": ("timm:vit_base_patch16_224.nothing", "fashion_mnist"),
        "classifier.json is missing": (str(tmp_path), "fashion_mnist"),
    }
    for message, (named, data) in cases.items():
        with pytest.raises(BenchError, match=message):
            certify_anything(named, data, 0.25, 8, 0.25, {}, tmp_path / "log.tsv")


def test_pretrained_timm_models_certify_on_image_folders(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    config = timm.models.generate_default_cfgs(
        {"tiny": {"num_classes": 2, "input_size": (3, 28, 28)}}
    )
    create = timm.create_model
    network = create(
        "vit_tiny_patch16_224", img_size=28, patch_size=7, embed_dim=32, depth=1, num_heads=2,
        num_classes=2,
    )  # fmt: skip
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: config["tiny"].default)
    built = []
    monkeypatch.setattr(timm, "create_model", lambda name, **given: built.append(given) or network)
    for name, shade in (("cat", 30), ("dog", 220)):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (40, 30), (shade,) * 3).save(tmp_path / name / f"{number}.png")
    # Before it is certified: that may cast it to bfloat16.
    weights = tensors_sha256({f"network.{k}": v for k, v in network.state_dict().items()})
    changes = {"n": "64", "horizon": "64", "batch_size": "64"}
    asked = ("timm:tiny", str(tmp_path), 0.25, 6, 0.125, {}, tmp_path / "log.tsv")
    with pytest.raises(BenchError, match="cannot take images 3 x 56 x 56"):
        certify_anything(*asked, image_size=56)
    with pytest.raises(BenchError, match="--step must be positive"):
        certify_anything(*asked[:4], 0.0, *asked[5:])
    with pytest.raises(BenchError, match=r"makes [0-9]+ radii"):
        certify_anything(*asked[:4], 1e-7, *asked[5:])
    with pytest.raises(BenchError, match="--images has the number"):
        certify_anything(*asked[:5], {"shards": "2"}, asked[6])
    with pytest.raises(BenchError, match="test_images"):
        certify_anything(*asked[:3], 0, *asked[4:])
    table = certify_anything(
        "timm:tiny", str(tmp_path), 0.25, 6, 0.125, changes, tmp_path / "log.tsv"
    )
    assert table["n_images"].tolist() == [6] * len(table)
    assert all(given["pretrained"] and given["num_classes"] == 2 for given in built)
    assert read_json(tmp_path / "log.json")["model_sha256"] == weights
    log = pd.read_csv(tmp_path / "log.tsv", sep="\t")
    assert log["label"].tolist() == [0, 0, 0, 1, 1, 1]
