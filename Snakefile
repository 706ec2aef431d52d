from pathlib import Path

from snakemake.utils import min_version

min_version("9.20")


if not workflow.configfiles:

    configfile: "config/quick.yaml"


report: "bench/report/workflow.rst"


# Named because `snakemake --lint` wants one. It lacks the environment: for `--sdm apptainer` install
# requirements.lock into it (torch and torchvision first, then this project) and name that image.
container: "docker://python:3.11"


include: "bench/rules/common.smk"
include: "bench/rules/data.smk"
include: "bench/rules/train.smk"


for baseline in sorted(Path(workflow.basedir).glob("baselines/*/rules.smk")):

    include: str(baseline)


check_claimed()


include: "bench/rules/certify.smk"
include: "bench/rules/tables.smk"
include: "bench/rules/attacks.smk"
include: "bench/rules/tune.smk"
include: "bench/rules/figures.smk"


rule all:
    default_target: True
    input:
        rules.tables.output,
        rules.figures.output,
        rules.examples.output,
        rules.overview.output,
        rules.compare_published.output if REPRODUCES else [],
        rules.attacks.output if EXPERIMENT.attack else [],
