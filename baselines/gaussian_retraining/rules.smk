use rule train as train_gaussian_retraining with:
    input:
        data=DATA,
        denoiser=denoiser_of,
        code=TRAIN_CODE,
    wildcard_constraints:
        method=methods_of("gaussian_retraining"),
    params:
        experiment=EXPERIMENT_FILE,
        program="bench train",
        base=denoiser_option,
        expect=planned_training,
