DATA = f"{EXPERIMENT.data.directory}/{EXPERIMENT.data.name}/manifest.json"


rule fetch:
    output:
        DATA,
    log:
        f"{RESULTS}/logs/fetch.log",
    benchmark:
        f"{RESULTS}/benchmarks/fetch.tsv"
    retries: 2
    params:
        experiment=EXPERIMENT_FILE,
    shell:
        "python -m bench fetch --experiment {params.experiment} > {log} 2>&1"
