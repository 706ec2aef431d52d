from baselines.diffusion_denoising.settings import DiffusionSettings

check(DiffusionSettings)


rule train_diffusion:
    input:
        data=DATA,
        pretrained=lambda wildcards: DiffusionSettings.of(
            EXPERIMENT, wildcards.method
        ).local_files,
        code=training_code("diffusion_denoising"),
    output:
        unet=f"{RESULTS}/models/{{method}}/unet/seed_{{seed}}/diffusion_pytorch_model.safetensors",
        config=f"{RESULTS}/models/{{method}}/unet/seed_{{seed}}/config.json",
        scheduler=f"{RESULTS}/models/{{method}}/unet/seed_{{seed}}/scheduler_config.json",
        cost=f"{RESULTS}/models/{{method}}/unet/seed_{{seed}}/cost.json",
    log:
        f"{RESULTS}/logs/train_diffusion/{{method}}/seed_{{seed}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/train_diffusion/{{method}}/seed_{{seed}}.tsv"
    wildcard_constraints:
        method=methods_of("diffusion_denoising"),
    priority: 100
    threads: training_threads
    resources:
        gpu=training_gpus,
        mem_mb=training_memory,
        runtime=job_minutes,
    params:
        experiment=EXPERIMENT_FILE,
        folder=subpath(output.unet, parent=True),
        expect=lambda wildcards: EXPERIMENT.training_fingerprint(
            wildcards.method, 0.0, int(wildcards.seed)
        ),
    shell:
        "python -m baselines.diffusion_denoising.train --experiment {params.experiment:q}"
        " --method {wildcards.method} --sigma 0 --seed {wildcards.seed}"
        " --output {params.folder} --expect {params.expect}"
        " > {log} 2>&1"


use rule train as assemble_diffusion with:
    input:
        data=DATA,
        base=BASE,
        unet=rules.train_diffusion.output,
        code=training_code("diffusion_denoising"),
    wildcard_constraints:
        method=methods_of("diffusion_denoising"),
    priority: 90
    threads: EXPERIMENT.threads_per_job
    resources:
        gpu=GPUS_PER_JOB,
        mem_mb=job_memory,
        runtime=job_minutes,
    params:
        experiment=EXPERIMENT_FILE,
        program="baselines.diffusion_denoising.assemble",
        base=base_option,
        expect=planned_training,
