use rule train as train_gaussian_retraining with:
    input:
        data=DATA,
        code=TRAIN_CODE,
    wildcard_constraints:
        method=methods_of("gaussian_retraining"),
    params:
        experiment=EXPERIMENT_FILE,
        program="bench train",
        base="",
        expect=planned_training,
