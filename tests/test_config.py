"""Mistakes in an experiment file are named; changes that matter change fingerprints."""

import copy
import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bench.config import (
    AttackSettings,
    BackboneSettings,
    CertificationSettings,
    DataSettings,
    Experiment,
    FigureSettings,
    Method,
    TrainingSettings,
    TuningSettings,
    json_schema,
    load_experiment,
    parse_experiment,
    sigma_text,
)
from bench.errors import BenchError
from bench.files import read_yaml

ROOT = Path(__file__).parents[1]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("lora")
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=4,
)
SIGNS = st.text(alphabet="[]{}:-,&*!?|>%@'\"# \n\tname0", max_size=300)
FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def places(values: object, path: tuple = ()) -> list[tuple]:
    """The path of everything below `values`."""
    items: list = []
    if isinstance(values, dict):
        items = list(values.items())
    elif isinstance(values, list):
        items = list(enumerate(values))
    below = [place for key, value in items for place in places(value, (*path, key))]
    return ([path] if path else []) + below


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("typo",), 1, "typo"),
        (("methods", "lora", "rank"), 4, "methods.lora.rank"),
        (("methods", "lora", "parameterization"), {"kind": "lorra"}, "parameterization"),
        (("sigmas",), [0.5, -1.0], "sigmas.1"),
        (("sigmas",), [0.5, 0.5], "repeat"),
        (("certification", "n"), 9, "raise n"),
        (("certification", "n"), 1000.0, "without a point or an exponent"),
        (("certification", "batch_size"), 100, "certification.batch_size"),
        (("certification", "shards"), 10_001, "exceeds test_images"),
        (("certification", "alpha"), 0.0, "certification.alpha"),
        (("methods", "lora", "learning_rate"), None, "learning_rate is missing"),
        (("methods", "../up"), {"label": "x", "family": "y"}, "methods"),
        (("methods", "undefended", "learning_rate"), 0.1, "trains nothing"),
        (("tuning", "sigma"), 0.3, "must be one of sigmas"),
        (("methods", "lora", "sigmas"), [0.3], "methods.lora.sigmas: 0.3"),
        (("methods", "lora", "label"), "adapter", "same label"),
        (("pretrain", "learning_rate"), "1e-3x", "pretrain.learning_rate"),
        (("pretrain", "learning_rate"), "1e-3", "write 1.0e-3"),
        (("sigmas",), [float("inf"), 0.5], "sigmas.0"),
        (("data", "image_size"), 64, "image_size means nothing to fashion_mnist"),
        (("methods", "lora", "sigmas"), [0.5, 0.5], "methods.lora.sigmas"),
        (("methods", "lora", "parameterization"), {"kind": "scratch"}, "gaussian_retraining"),
        (("methods", "head__lr_3"), {"label": "x", "family": "y"}, "those of trials"),
        (("backbone", "arguments", "num_classes"), 100, "num_classes is that of the data"),
        (("certification", "reserve_at"), 2_000_000, "exceeds horizon"),
        (("certification",), {"mode": "predict", "n": 10}, "11 is the least"),
        (("tuning", "learning_rates"), [1.0e-3, 0.001], "repeat"),
        (("tuning", "learning_rates"), [0.00123456789], "write 0.00123457"),
        (("methods", "lora", "grid"), {"r": [2, 2]}, "repeat"),
    ],
)
def test_a_mistake_is_named_with_file_and_key(smoke_values, path, value, named):
    values = copy.deepcopy(smoke_values)
    target = values
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(BenchError) as error:
        parse_experiment(values, "mine.yaml")
    assert "mine.yaml" in str(error.value)
    assert named in str(error.value)


def test_noise_that_no_method_sees_is_refused(smoke_values):
    values = copy.deepcopy(smoke_values) | {"sigmas": [0.5, 1.0]}
    for method in values["methods"].values():
        method["sigmas"] = [0.5]
    with pytest.raises(BenchError, match=r"sigmas: no method runs at 1\.0"):
        parse_experiment(values, "x")
    values["methods"]["lora"]["sigmas"] = [1.0]
    attack = {"methods": ["lora"], "sigmas": [0.5]}
    with pytest.raises(BenchError, match="attack: none of its methods"):
        parse_experiment(values | {"attack": attack}, "x")


def test_ten_draws_are_enough_at_one_in_a_thousand(smoke_values):
    values = copy.deepcopy(smoke_values)
    values["certification"] |= {"n": 10, "horizon": 10}
    assert parse_experiment(values, "x").certification.n == 10


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(BenchError, match=r"absent\.yaml"):
        load_experiment(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [")
    with pytest.raises(BenchError, match=r"broken\.yaml is not valid YAML"):
        load_experiment(broken)


@given(data=st.data())
@FUZZ
def test_an_experiment_with_anything_anywhere_loads_or_is_refused(smoke_values, data):
    values = copy.deepcopy(smoke_values)
    *path, key = data.draw(st.sampled_from(places(values)))
    target = values
    for step in path:
        target = target[step]
    target[key] = data.draw(ANYTHING)
    said = None
    try:
        parse_experiment(values, "mine.yaml")
    except BenchError as error:
        said = str(error)
    assert said is None or "mine.yaml" in said


@given(content=st.one_of(st.binary(max_size=200), SIGNS.map(str.encode)))
@example(content=b"[" * 2000)
@example(content=b"&a [*a]")
@example(content=b"name: 0000-00-00")
@example(content=b"name: !!bool x")
@example(content=b"name: !!timestamp x")
@FUZZ
def test_a_file_of_anything_is_refused(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(BenchError, match=r"mine\.yaml"):
        load_experiment(path)


def test_a_key_that_is_given_twice_is_named_with_its_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: &base {a: 1}\nmethods:\n  lora: {<<: *base, a: 2}\n")
    assert read_yaml(path)["methods"] == {"lora": {"a": 2}}
    path.write_text("methods:\n  lora: {a: 1}\n  head: {}\n  lora: {a: 2}\n")
    with pytest.raises(BenchError, match=r"mine.yaml.*: lora is given twice(.|\n)*line 4"):
        read_yaml(path)


def test_yaml_cannot_build_python_objects(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("name: !!python/object/apply:os.getcwd []")
    with pytest.raises(BenchError, match="not valid YAML"):
        load_experiment(path)


def test_the_committed_schema_is_the_models():
    assert json.loads((ROOT / "bench/experiment.schema.json").read_text()) == json_schema()


@pytest.mark.parametrize(
    "name", sorted({path.stem for path in (ROOT / "config").glob("*.yaml")} - {"claims"})
)
def test_shipped_experiments_load(name):
    assert load_experiment(ROOT / f"config/{name}.yaml").name == name


def test_fingerprint_follows_what_defines_the_numbers(smoke_values, monkeypatch):
    original = parse_experiment(smoke_values, "x")

    def fingerprint(change) -> str:
        values = copy.deepcopy(smoke_values)
        change(values)
        return parse_experiment(values, "x").training_fingerprint("lora", 0.5, 0)

    same = original.training_fingerprint("lora", 0.5, 0)
    assert fingerprint(lambda v: v["methods"]["lora"].update(label="other")) == same
    assert fingerprint(lambda v: v["methods"]["adapter"].update(learning_rate=0.5)) == same
    assert fingerprint(lambda v: v["methods"]["lora"].update(learning_rate=0.5)) != same
    assert fingerprint(lambda v: v["training"].update(images=1024)) != same
    assert fingerprint(lambda v: v["pretrain"].update(images=1024)) != same
    assert fingerprint(lambda v: v["data"].update(validation_images=9)) != same
    # Where images lie changes no number; how steps are counted is no training's source file.
    assert fingerprint(lambda v: v["data"].update(directory="/elsewhere")) == same
    monkeypatch.setattr(TrainingSettings, "steps", 7)
    assert fingerprint(lambda v: None) != same
    monkeypatch.undo()
    assert original.training_fingerprint("lora", 0.5, 1) != same


def test_a_training_from_scratch_owes_nothing_to_the_base(smoke_values):
    def fingerprints(**pretrain) -> list[str]:
        values = copy.deepcopy(smoke_values)
        values["pretrain"] |= pretrain
        experiment = parse_experiment(values, "x")
        names = ("gaussian_retraining", "lora")
        return [experiment.training_fingerprint(name, 0.5, 0) for name in names]

    (scratch, lora), (same, other) = fingerprints(), fingerprints(learning_rate=0.5)
    assert scratch == same
    assert lora != other


def test_places_of_files_are_those_of_the_shell(smoke_values):
    values = copy.deepcopy(smoke_values)
    values["data"]["directory"] = "./data/"
    values["backbone"]["weights"] = "~/w.safetensors"
    experiment = parse_experiment(values, "x")
    assert experiment.data.directory == "data"
    assert experiment.backbone.weights == str(Path("~/w.safetensors").expanduser())


def test_a_noise_level_that_an_objective_lacks_is_named(smoke_values):
    values = copy.deepcopy(smoke_values)
    values["methods"]["lora"]["objective"] = {"kind": "stability", "weight": {0.5: 2.0}}
    experiment = parse_experiment(values, "x")
    with pytest.raises(BenchError, match=r"methods\.lora\.objective\.weight has no .* 0\.3"):
        experiment.training_fingerprint("lora", 0.3, 0)


def test_figures_take_a_radius_of_the_curves(smoke_values):
    experiment = parse_experiment({**smoke_values, "radius_step": 0.2}, "x")
    assert [experiment.figures_radius(sigma) for sigma in (0.25, 0.5, 1)] == [0.2, 0.4, 1]
    fixed = parse_experiment({**smoke_values, "figures": {"radius": 0.5}}, "x")
    assert [fixed.figures_radius(sigma) for sigma in (0.25, 1)] == [0.5, 0.5]
    with pytest.raises(BenchError, match=r"figures\.radius = 0\.25 .* set it to 0\.2"):
        parse_experiment({**smoke_values, "radius_step": 0.1, "figures": {"radius": 0.25}}, "x")


def test_a_method_may_run_at_some_sigmas_only(smoke_values):
    values = copy.deepcopy(smoke_values)
    values["sigmas"] = [0.25, 0.5]
    values["methods"]["lora"]["sigmas"] = [0.5]
    experiment = parse_experiment(values, "test")
    points = experiment.points()
    assert [sigma for name, sigma, _ in points if name == "lora"] == [0.5]
    assert [sigma for name, sigma, _ in points if name == "head"] == [0.25, 0.5]
    everywhere = parse_experiment(smoke_values, "test")
    where = ("lora", 0.5, 0)
    assert experiment.training_fingerprint(*where) == everywhere.training_fingerprint(*where)


def test_sigma_has_one_spelling():
    assert [sigma_text(s) for s in (0.5, 0.25, 1, 0.125)] == ["0.50", "0.25", "1.00", "0.125"]


def test_a_micro_batch_changes_the_fingerprints_of_its_method_alone(smoke_values):
    experiment = parse_experiment(smoke_values, "x")
    values = copy.deepcopy(smoke_values)
    values["methods"]["lora"]["training"] = {"micro_batch_size": 32}
    split = parse_experiment(values, "x")
    where = ("lora", 0.5, 0)
    assert split.training_fingerprint(*where) != experiment.training_fingerprint(*where)
    assert split.method_training("lora").micro_batch_size == 32
    assert split.base_fingerprint == experiment.base_fingerprint


def documented_keys():
    """The keys that config/README.md has a row for; `a.b`, `c` stands for a.b and a.c."""
    found = set()
    for line in (ROOT / "config/README.md").read_text().splitlines():
        keys = re.findall(r"`([\w.]+)`", line.split("|")[1]) if line.startswith("| `") else []
        for key in keys:
            prefix = keys[0].rpartition(".")[0]
            found.add(key if "." in key or not prefix else f"{prefix}.{key}")
    return found


@pytest.mark.parametrize(
    ("prefix", "model"),
    [
        ("", Experiment),
        ("data", DataSettings),
        ("backbone", BackboneSettings),
        ("training", TrainingSettings),
        ("certification", CertificationSettings),
        ("tuning", TuningSettings),
        ("attack", AttackSettings),
        ("figures", FigureSettings),
        ("methods.NAME", Method),
    ],
)
def test_every_key_is_documented(prefix, model):
    sections = {"data", "backbone", "training", "certification", "tuning", "figures", "methods"}
    wanted = {f"{prefix}.{name}".strip(".") for name in model.model_fields} - sections
    assert wanted <= documented_keys() | {"surrogates"}
