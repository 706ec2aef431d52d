rule tune:
    input:
        training=[
            model_file(
                "training.json", trial, EXPERIMENT.tuning.sigma, EXPERIMENT.seeds[0]
            )
            for trial in EXPERIMENT.trials()
        ],
        code=code_of("bench/tables.py"),
    output:
        f"{TABLES}/tuning.csv",
    log:
        f"{RESULTS}/logs/tune.log",
    benchmark:
        f"{RESULTS}/benchmarks/tune.tsv"
    params:
        experiment=EXPERIMENT_FILE,
        training=lambda wildcards, input: [f"--training {p}" for p in input.training],
        recorded={n: m.model_dump_json() for n, m in EXPERIMENT.methods.items()},
    shell:
        "python -m bench tuning --experiment {params.experiment:q} --output {output}"
        " {params.training} 2>&1 | tee {log}"
