rule certify:
    input:
        model=f"{MODEL}/classifier.json",
        weights=f"{MODEL}/model.safetensors",
        data=DATA,
        code=CERTIFY_CODE,
    output:
        log=f"{CERTIFICATES}.tsv",
        protocol=f"{CERTIFICATES}.json",
    log:
        f"{RESULTS}/logs/certify/{{method}}/sigma_{{sigma}}/seed_{{seed}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/certify/{{method}}/sigma_{{sigma}}/seed_{{seed}}.tsv"
    threads: EXPERIMENT.threads_per_job
    resources:
        gpu=EXPERIMENT.gpus_per_job,
    params:
        experiment=EXPERIMENT_FILE,
        expect=planned_certification,
    shell:
        "python -m bench certify --experiment {params.experiment}"
        " --method {wildcards.method} --sigma {wildcards.sigma} --seed {wildcards.seed}"
        " --model $(dirname {input.model}) --output {output.log}"
        " --expect {params.expect} > {log} 2>&1"
