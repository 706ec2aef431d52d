PUBLISHED = str(Path(workflow.basedir) / f"results/published/{EXPERIMENT.data.name}.csv")


rule figures:
    input:
        tables=rules.tables.output,
        published=[PUBLISHED] if Path(PUBLISHED).exists() else [],
        code=code_of("bench/figures.py"),
    output:
        curves=report(
            multiext(f"{FIGURES}/certified_accuracy", ".svg", ".png"),
            category="Figures",
            caption="../report/curves.rst",
        ),
        parameters=report(
            multiext(f"{FIGURES}/accuracy_vs_parameters", ".svg", ".png"),
            category="Figures",
            caption="../report/parameters.rst",
        ),
        compute=report(
            multiext(f"{FIGURES}/accuracy_vs_compute", ".svg", ".png"),
            category="Figures",
            caption="../report/compute.rst",
        ),
    log:
        f"{RESULTS}/logs/figures.log",
    benchmark:
        f"{RESULTS}/benchmarks/figures.tsv"
    shell:
        "python -m bench figures --experiment {EXPERIMENT_FILE} --tables {TABLES}"
        " --published {PUBLISHED} --output {FIGURES} > {log} 2>&1"
