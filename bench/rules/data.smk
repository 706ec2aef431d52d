DATA = f"{EXPERIMENT.data.directory}/{EXPERIMENT.data.name}/manifest.json"


rule fetch:
    output:
        DATA,
    log:
        f"{RESULTS}/logs/fetch.log",
    benchmark:
        f"{RESULTS}/benchmarks/fetch.tsv"
    retries: 2
    shell:
        "python -m bench fetch --experiment {EXPERIMENT_FILE} > {log} 2>&1"
