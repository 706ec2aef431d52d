rule attack:
    input:
        model=certified("classifier.json"),
        weights=certified("model.safetensors"),
        training=certified("training.json"),
        certificates=f"{CERTIFICATES}.tsv",
        protocol=f"{CERTIFICATES}.json",
        data=DATA,
        code=ATTACK_CODE,
    output:
        log=f"{ATTACKS}.tsv",
        protocol=f"{ATTACKS}.json",
    log:
        f"{RESULTS}/logs/attack/{{method}}/sigma_{{sigma}}/seed_{{seed}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/attack/{{method}}/sigma_{{sigma}}/seed_{{seed}}.tsv"
    threads: EXPERIMENT.threads_per_job
    resources:
        gpu=GPUS_PER_JOB,
        mem_mb=job_memory,
        runtime=job_minutes,
    params:
        experiment=EXPERIMENT_FILE,
        expect=planned_attack,
    shell:
        "python -m bench attack --experiment {params.experiment:q} --method {wildcards.method}"
        " --sigma {wildcards.sigma} --seed {wildcards.seed} --model $(dirname {input.model})"
        " --certificates {input.certificates} --output {output.log} --expect {params.expect}"
        " > {log} 2>&1"


rule attack_tables:
    input:
        logs=attack_logs,
        protocols=lambda wildcards: sidecars(attack_logs(wildcards)),
        code=code_of("bench/attack_tables.py", "bench/statistics.py", "bench/tables.py"),
    output:
        attacks=report(
            f"{TABLES}/attacks.csv", category="Tables", caption="../report/attacks.rst"
        ),
        soundness=report(
            f"{TABLES}/soundness.csv",
            category="Tables",
            caption="../report/soundness.rst",
        ),
    log:
        f"{RESULTS}/logs/attack_tables.log",
    benchmark:
        f"{RESULTS}/benchmarks/attack_tables.tsv"
    params:
        experiment=EXPERIMENT_FILE,
        folder=subpath(output.attacks, parent=True),
        logs=lambda wildcards, input: [f"--log {path}" for path in input.logs],
        names={name: (m.label, m.family) for name, m in EXPERIMENT.methods.items()},
    shell:
        "python -m bench attack-tables --experiment {params.experiment:q} --output {params.folder}"
        " {params.logs} 2>&1 | tee {log}"


rule attacks:
    input:
        attacks=rules.attack_tables.output.attacks,
        code=code_of("bench/csv_files.py", "bench/figures.py"),
    output:
        report(
            multiext(f"{FIGURES}/attacks", ".svg", ".png"),
            category="Figures",
            caption="../report/attack_figure.rst",
        ),
    log:
        f"{RESULTS}/logs/attacks.log",
    benchmark:
        f"{RESULTS}/benchmarks/attacks.tsv"
    params:
        experiment=EXPERIMENT_FILE,
        tables=subpath(input.attacks, parent=True),
        folder=subpath(output[0], parent=True),
    shell:
        "python -m bench attack-figure --experiment {params.experiment:q} --tables {params.tables}"
        " --output {params.folder} > {log} 2>&1"
