POINTS = [
    dict(method=method, sigma=sigma_text(sigma), seed=seed)
    for method, sigma, seed in EXPERIMENT.points()
]
LOGS = [f"{CERTIFICATES}.tsv".format(**point) for point in POINTS]
TABLES = f"{RESULTS}/tables"
# bench/report/workflow.rst, the front page, includes it.
OVERVIEW = f"{RESULTS}/overview.rst"


rule tables:
    input:
        logs=LOGS,
        protocols=sidecars(LOGS),
        costs=list(dict.fromkeys(model_file("cost.json", **point) for point in POINTS)),
        code=code_of(
            "bench/paired.py",
            "bench/statistics.py",
            "bench/smoothing/log.py",
            "bench/tables.py",
        ),
    output:
        certified_accuracy=report(
            f"{TABLES}/certified_accuracy.csv",
            category="Tables",
            caption="../report/certified_accuracy.rst",
        ),
        summary=report(
            f"{TABLES}/summary.csv", category="Tables", caption="../report/summary.rst"
        ),
        cost=report(
            f"{TABLES}/cost.csv", category="Tables", caption="../report/cost.rst"
        ),
        envelope=report(
            f"{TABLES}/envelope.csv",
            category="Tables",
            caption="../report/envelope.rst",
        ),
        pooled=report(
            f"{TABLES}/pooled.csv", category="Tables", caption="../report/pooled.rst"
        ),
        per_class=report(
            f"{TABLES}/per_class.csv",
            category="Tables",
            caption="../report/per_class.rst",
        ),
        vote_shares=report(
            f"{TABLES}/vote_shares.csv",
            category="Tables",
            caption="../report/vote_shares.rst",
        ),
        paired=report(
            f"{TABLES}/paired.csv", category="Tables", caption="../report/paired.rst"
        ),
        leaderboard=f"{TABLES}/leaderboard.md",
    log:
        f"{RESULTS}/logs/tables.log",
    benchmark:
        f"{RESULTS}/benchmarks/tables.tsv"
    params:
        experiment=EXPERIMENT_FILE,
        folder=subpath(output.summary, parent=True),
        logs=lambda wildcards, input: [f"--log {path}" for path in input.logs],
        costs=lambda wildcards, input: [f"--cost {path}" for path in input.costs],
        names={name: (m.label, m.family) for name, m in EXPERIMENT.methods.items()},
        step=EXPERIMENT.radius_step,
    shell:
        "python -m bench tables --experiment {params.experiment:q} --output {params.folder}"
        " {params.logs} {params.costs} > {log} 2>&1"


rule accounting:
    input:
        code=code_of(
            "bench/accounting.py",
            "bench/parameterization_settings.py",
            "bench/parameterizations",
        ),
    output:
        report(
            "results/accounting.csv",
            category="Tables",
            caption="../report/accounting.rst",
        ),
    log:
        "results/logs/accounting.log",
    benchmark:
        "results/benchmarks/accounting.tsv"
    shell:
        "python -m bench accounting --output {output} 2>&1 | tee {log}"


rule compare_published:
    input:
        accuracy=rules.tables.output.certified_accuracy,
        published=published_results(),
        code=code_of(
            "bench/compare.py",
            "bench/csv_files.py",
            "bench/published.py",
            "bench/statistics.py",
        ),
    output:
        report(
            f"{TABLES}/published.csv",
            category="Tables",
            caption="../report/published.rst",
        ),
    log:
        f"{RESULTS}/logs/compare_published.log",
    benchmark:
        f"{RESULTS}/benchmarks/compare_published.tsv"
    params:
        experiment=EXPERIMENT_FILE,
        names={name: m.published for name, m in EXPERIMENT.methods.items()},
    shell:
        "python -m bench published --experiment {params.experiment:q} --accuracy {input.accuracy}"
        " --published {input.published:q} --output {output} > {log} 2>&1"


rule claims:
    input:
        claims=os.path.relpath(f"{workflow.basedir}/config/claims.yaml"),
        tables=judged_tables,
        code=code_of(
            "bench/claims.py",
            "bench/csv_files.py",
            "bench/paired.py",
            "bench/smoothing/bounds.py",
            "bench/statistics.py",
        ),
    output:
        verdicts=report(
            CLAIMS,
            category="Claims",
            caption="../report/claims.rst",
        ),
        page="results/claims/claims.md",
    log:
        "results/claims/claims.log",
    benchmark:
        "results/claims/claims.tsv"
    params:
        reference=REFERENCE,
    shell:
        "python -m bench claims --claims {input.claims:q} --results results"
        " --results {params.reference:q} --output {output.verdicts} 2>&1 | tee {log}"


rule overview:
    input:
        tables=rules.tables.output,
        logs=LOGS,
        protocols=sidecars(LOGS),
        claims=judged_claims,
        code=code_of("bench/csv_files.py", "bench/overview.py"),
    output:
        OVERVIEW,
    log:
        f"{RESULTS}/logs/overview.log",
    benchmark:
        f"{RESULTS}/benchmarks/overview.tsv"
    params:
        experiment=EXPERIMENT_FILE,
        settings=EXPERIMENT.certification.model_dump(),
        tables=lambda wildcards, input: os.path.dirname(input.tables[0]),
        logs=lambda wildcards, input: [f"--log {path}" for path in input.logs],
        claims=lambda wildcards, input: (
            f"--claims {input.claims}" if input.claims else ""
        ),
    shell:
        "python -m bench overview --experiment {params.experiment:q} --tables {params.tables}"
        " {params.logs} {params.claims} --output {output} > {log} 2>&1"
