from baselines.gaussian_retraining.settings import RetrainingSettings

check(RetrainingSettings)


use rule train as train_gaussian_retraining with:
    input:
        data=DATA,
        denoiser=denoiser_of,
        code=TRAIN_CODE,
    wildcard_constraints:
        method=methods_of("gaussian_retraining"),
    # It waits for no base, so it fills the other cores while the base is trained.
    priority: 100
    params:
        experiment=EXPERIMENT_FILE,
        program="bench train",
        base=denoiser_option,
        expect=planned_training,
