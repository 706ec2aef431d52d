from baselines.denoised_smoothing.settings import DenoiserSettings

check(DenoiserSettings)


use rule train as train_denoiser with:
    input:
        data=DATA,
        base=BASE,
        denoiser=denoiser_of,
        surrogates=surrogates_of,
        code=training_code("denoised_smoothing"),
    wildcard_constraints:
        method=methods_of("denoised_smoothing"),
    params:
        experiment=EXPERIMENT_FILE,
        program="baselines.denoised_smoothing.train",
        base=base_option,
        expect=planned_training,
