FIRST = [point for point in POINTS if point["seed"] == EXPERIMENT.seeds[0]]
SHOWN = [f"{CERTIFICATES}.tsv".format(**point) for point in FIRST]


rule figures:
    input:
        tables=rules.tables.output,
        published=published_results(),
        code=code_of("bench/csv_files.py", "bench/figures.py"),
    output:
        curves=report(
            multiext(f"{FIGURES}/certified_accuracy", ".svg", ".png"),
            category="Figures",
            caption="../report/curves.rst",
        ),
        methods=report(
            multiext(f"{FIGURES}/accuracy_by_method", ".svg", ".png"),
            category="Figures",
            caption="../report/by_method.rst",
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
        base=report(
            multiext(f"{FIGURES}/base_and_smoothed", ".svg", ".png"),
            category="Figures",
            caption="../report/base_and_smoothed.rst",
        ),
        classes=report(
            multiext(f"{FIGURES}/per_class", ".svg", ".png"),
            category="Figures",
            caption="../report/per_class_figure.rst",
        ),
        shares=report(
            multiext(f"{FIGURES}/vote_shares", ".svg", ".png"),
            category="Figures",
            caption="../report/vote_shares.rst",
        ),
        resolution=(
            report(
                multiext(f"{FIGURES}/noise_resolution", ".svg", ".png"),
                category="Figures",
                caption="../report/noise_resolution.rst",
            )
            if len(EXPERIMENT.noise_resolutions) > 1
            else []
        ),
    log:
        f"{RESULTS}/logs/figures.log",
    benchmark:
        f"{RESULTS}/benchmarks/figures.tsv"
    params:
        experiment=EXPERIMENT_FILE,
        settings=EXPERIMENT.figures.model_dump(),
        named={name: m.published for name, m in EXPERIMENT.methods.items()},
        tables=lambda wildcards, input: os.path.dirname(input.tables[0]),
        published=published_option,
        folder=lambda wildcards, output: os.path.dirname(output.curves[0]),
    shell:
        "python -m bench figures --experiment {params.experiment:q} --tables {params.tables}"
        " {params.published:q} --output {params.folder} > {log} 2>&1"


rule examples:
    input:
        logs=SHOWN,
        protocols=sidecars(SHOWN),
        models=list(
            dict.fromkeys(model_file("classifier.json", **point) for point in FIRST)
        ),
        weights=list(
            dict.fromkeys(model_file("model.safetensors", **point) for point in FIRST)
        ),
        data=DATA,
        code=code_of("bench/examples.py", "bench/figures.py", "bench/tables.py"),
    output:
        table=report(
            f"{TABLES}/examples.csv",
            category="Tables",
            caption="../report/examples_table.rst",
        ),
        figure=report(
            multiext(f"{FIGURES}/examples", ".svg", ".png"),
            category="Figures",
            caption="../report/examples.rst",
        ),
    log:
        f"{RESULTS}/logs/examples.log",
    benchmark:
        f"{RESULTS}/benchmarks/examples.tsv"
    resources:
        mem_mb=job_memory,
    params:
        experiment=EXPERIMENT_FILE,
        names={name: (m.label, m.family) for name, m in EXPERIMENT.methods.items()},
        logs=lambda wildcards, input: [f"--log {path}" for path in input.logs],
        models=lambda wildcards, input: [
            f"--model {os.path.dirname(path)}" for path in input.models
        ],
        stem=lambda wildcards, output: os.path.splitext(output.figure[0])[0],
    shell:
        "python -m bench examples --experiment {params.experiment:q} {params.logs}"
        " {params.models} --table {output.table} --figure {params.stem} > {log} 2>&1"


rule calibration:
    input:
        code=[*CERTIFY_CODE, *code_of("bench/calibration.py", "bench/figures.py")],
    output:
        table=report(
            "results/calibration/calibration.csv",
            category="Tables",
            caption="../report/calibration.rst",
        ),
        figure=report(
            multiext("figures/calibration/calibration", ".svg", ".png"),
            category="Figures",
            caption="../report/calibration.rst",
        ),
    log:
        "results/calibration/calibration.log",
    benchmark:
        "results/calibration/calibration.tsv"
    params:
        stem=lambda wildcards, output: os.path.splitext(output.figure[0])[0],
    shell:
        "python -m bench calibration --table {output.table} --figure {params.stem} > {log} 2>&1"
