use rule train as train_gaussian_retraining with:
    input:
        data=DATA,
        code=TRAIN_CODE,
    params:
        program="bench train",
        base="",
        expect=planned_training,
    wildcard_constraints:
        method=methods_of("gaussian_retraining"),
