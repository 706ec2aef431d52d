from baselines.black_box.settings import BlackBoxSettings

check(BlackBoxSettings)


use rule train as train_black_box with:
    input:
        data=DATA,
        base=BASE,
        code=[*training_code("black_box"), *code_of("bench/remote.py")],
    wildcard_constraints:
        method=methods_of("black_box"),
    params:
        experiment=EXPERIMENT_FILE,
        program="baselines.black_box.train",
        base=base_option,
        expect=planned_training,
