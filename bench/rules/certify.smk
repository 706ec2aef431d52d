# With braces that are left for the wildcards when `gather` has put its own in.
SHARD = CERTIFICATES.replace("{", "{{").replace("}", "}}") + ".shards/{scatteritem}"
SHARDS = EXPERIMENT.certification.shards
CERTIFY = (
    "python -m bench certify-method --experiment {params.experiment:q}"
    " --method {wildcards.method} --sigma {wildcards.sigma} --seed {wildcards.seed}"
    " --model $(dirname {input.model}) --output {output.log} --expect {params.expect}"
    " --shard {params.shard} > {log} 2>&1"
)


scattergather:
    images=SHARDS,


if SHARDS == 1:

    rule certify:
        input:
            model=certified("classifier.json"),
            weights=certified("model.safetensors"),
            training=certified("training.json"),
            data=DATA,
            code=CERTIFY_CODE,
        output:
            log=f"{CERTIFICATES}.tsv",
            protocol=f"{CERTIFICATES}.json",
            cohen=f"{CERTIFICATES}.cohen.tsv",
        log:
            f"{RESULTS}/logs/certify/{{method}}/sigma_{{sigma}}/seed_{{seed}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/certify/{{method}}/sigma_{{sigma}}/seed_{{seed}}.tsv"
        threads: EXPERIMENT.threads_per_job
        resources:
            gpu=GPUS_PER_JOB,
            mem_mb=job_memory,
            runtime=job_minutes,
        params:
            experiment=EXPERIMENT_FILE,
            expect=planned_certification,
            shard=1,
        shell:
            CERTIFY

else:

    rule certify_shard:
        input:
            model=certified("classifier.json"),
            weights=certified("model.safetensors"),
            training=certified("training.json"),
            data=DATA,
            code=CERTIFY_CODE,
        output:
            log=f"{CERTIFICATES}.shards/{{scatteritem}}.tsv",
            protocol=f"{CERTIFICATES}.shards/{{scatteritem}}.json",
        log:
            f"{RESULTS}/logs/certify/{{method}}/sigma_{{sigma}}/seed_{{seed}}/{{scatteritem}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/certify/{{method}}/sigma_{{sigma}}/seed_{{seed}}/{{scatteritem}}.tsv"
        threads: EXPERIMENT.threads_per_job
        resources:
            gpu=GPUS_PER_JOB,
            mem_mb=job_memory,
            runtime=job_minutes,
        params:
            experiment=EXPERIMENT_FILE,
            expect=planned_certification,
            shard=lambda wildcards: wildcards.scatteritem.partition("-of-")[0],
        shell:
            CERTIFY

    rule gather_certificates:
        input:
            logs=gather.images(f"{SHARD}.tsv"),
            protocols=gather.images(f"{SHARD}.json"),
        output:
            log=f"{CERTIFICATES}.tsv",
            protocol=f"{CERTIFICATES}.json",
            cohen=f"{CERTIFICATES}.cohen.tsv",
        log:
            f"{RESULTS}/logs/gather/{{method}}/sigma_{{sigma}}/seed_{{seed}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/gather/{{method}}/sigma_{{sigma}}/seed_{{seed}}.tsv"
        localrule: True
        params:
            shards=lambda wildcards, input: [f"--shard {path}" for path in input.logs],
        shell:
            "python -m bench gather --output {output.log} {params.shards} > {log} 2>&1"
