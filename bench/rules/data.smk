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
        name=EXPERIMENT.data.name,
        directory=lambda wildcards, output: os.path.dirname(os.path.dirname(output[0])),
    shell:
        "python -m bench fetch --name {params.name} --directory {params.directory:q} > {log} 2>&1"
