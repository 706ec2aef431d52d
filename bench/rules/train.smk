rule pretrain:
    input:
        data=BASE_DATA,
        weights=weights_of("backbone", EXPERIMENT.backbone),
        code=TRAIN_CODE,
    output:
        multiext(
            f"{RESULTS}/models/base/",
            "classifier.json",
            "model.safetensors",
            "training.json",
            "cost.json",
        ),
    log:
        f"{RESULTS}/logs/pretrain.log",
    benchmark:
        f"{RESULTS}/benchmarks/pretrain.tsv"
    priority: 200
    threads: training_threads
    resources:
        gpu=training_gpus,
        mem_mb=training_memory,
        runtime=job_minutes,
    params:
        experiment=EXPERIMENT_FILE,
        folder=subpath(output[0], parent=True),
        surrogate="",
        expect=EXPERIMENT.base_fingerprint,
    shell:
        "python -m bench pretrain --experiment {params.experiment:q} {params.surrogate}"
        " --output {params.folder} --expect {params.expect} > {log} 2>&1"


BASE = rules.pretrain.output


use rule pretrain as pretrain_surrogate with:
    input:
        data=BASE_DATA,
        weights=lambda wildcards: weights_of(
            f"surrogates.{wildcards.surrogate}",
            EXPERIMENT.surrogates[wildcards.surrogate],
        ),
        code=TRAIN_CODE,
    output:
        multiext(
            f"{SURROGATE}/",
            "classifier.json",
            "model.safetensors",
            "training.json",
            "cost.json",
        ),
    log:
        f"{RESULTS}/logs/pretrain_surrogate/{{surrogate}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/pretrain_surrogate/{{surrogate}}.tsv"
    wildcard_constraints:
        surrogate="|".join(EXPERIMENT.surrogates) or NEVER,
    params:
        experiment=EXPERIMENT_FILE,
        folder=subpath(output[0], parent=True),
        surrogate="--surrogate {surrogate}",
        expect=lambda wildcards: EXPERIMENT.surrogate_fingerprint(wildcards.surrogate),


rule train:
    input:
        data=DATA,
        base=start_of,
        denoiser=denoiser_of,
        code=TRAIN_CODE,
    output:
        classifier=f"{MODEL}/classifier.json",
        weights=f"{MODEL}/model.safetensors",
        training=f"{MODEL}/training.json",
        cost=f"{MODEL}/cost.json",
    log:
        f"{RESULTS}/logs/train/{{method}}/sigma_{{sigma}}/seed_{{seed}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/train/{{method}}/sigma_{{sigma}}/seed_{{seed}}.tsv"
    wildcard_constraints:
        method=methods_of(None),
    threads: training_threads
    resources:
        gpu=training_gpus,
        mem_mb=training_memory,
        runtime=job_minutes,
    params:
        experiment=EXPERIMENT_FILE,
        program="bench train",
        base=base_option,
        expect=planned_training,
    shell:
        "python -m {params.program} --experiment {params.experiment:q} {params.base}"
        " --method {wildcards.method} --sigma {wildcards.sigma} --seed {wildcards.seed}"
        " --output $(dirname {output.classifier}) --expect {params.expect} > {log} 2>&1"
