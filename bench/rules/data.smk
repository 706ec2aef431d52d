DATA = manifest_of(EXPERIMENT.data)
BASE_DATA = manifest_of(EXPERIMENT.base_data)


# Nodes of a cluster may have no network.
rule fetch:
    output:
        DATA,
    log:
        f"{RESULTS}/logs/fetch.log",
    benchmark:
        f"{RESULTS}/benchmarks/fetch.tsv"
    retries: 2
    localrule: True
    params:
        name=EXPERIMENT.data.name,
        directory=lambda wildcards, output: os.path.dirname(os.path.dirname(output[0])),
    shell:
        "python -m bench fetch --name {params.name} --directory {params.directory:q} > {log} 2>&1"


if BASE_DATA != DATA:

    use rule fetch as fetch_base_data with:
        output:
            BASE_DATA,
        log:
            f"{RESULTS}/logs/fetch_base_data.log",
        benchmark:
            f"{RESULTS}/benchmarks/fetch_base_data.tsv"
        params:
            name=EXPERIMENT.base_data.name,
            directory=lambda wildcards, output: os.path.dirname(
                os.path.dirname(output[0])
            ),


if FETCHED_WEIGHTS is not None:

    rule fetch_weights:
        input:
            code=code_of("bench/weights.py"),
        output:
            FETCHED_WEIGHTS,
        log:
            f"{RESULTS}/logs/fetch_weights.log",
        benchmark:
            f"{RESULTS}/benchmarks/fetch_weights.tsv"
        retries: 2
        localrule: True
        shell:
            "python -m bench weights --output {output:q} > {log} 2>&1"
