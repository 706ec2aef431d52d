from pathlib import Path

from snakemake.utils import min_version

min_version("9.20")


if not workflow.configfiles:

    configfile: "config/quick.yaml"


report: "bench/report/workflow.rst"


# An image to install the locked environment into: `snakemake --lint` wants one named, and
# `--sdm apptainer` would run the jobs in it.
container: "docker://python:3.11"


include: "bench/rules/common.smk"
include: "bench/rules/data.smk"
include: "bench/rules/train.smk"


for baseline in sorted(Path(workflow.basedir).glob("baselines/*/rules.smk")):

    include: str(baseline)


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
