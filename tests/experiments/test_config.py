"""Configurations: every wrong key or value is named before any work starts."""

import dataclasses

import pytest

from experiments import configs
from experiments.config import Config, ConfigError, differences, override
from experiments.configs import hw_compare
from stp_jax import hwmodel


@pytest.mark.parametrize("name", configs.names())
def test_every_experiment_is_sound_and_says_what_it_is(name):
    experiment = configs.load(name)
    assert isinstance(experiment.CONFIG, Config) or callable(experiment.run)
    assert configs.summary(name).endswith(".")


def test_values_take_the_type_of_their_key():
    config = override(Config(), ["seed=7", "float_lr=1e-3", "budget=6", "width=none", "data=mnist"])
    assert (config.seed, config.float_lr, config.budget) == (7, 1e-3, 6)
    assert (config.width, config.data) == (None, "mnist")


WRONG = [
    ("bugdet=3", "unknown key 'bugdet'; did you mean budget"),
    ("BOOKKEEPING=3", "unknown key 'BOOKKEEPING'; --help lists the keys"),
    ("zzz=3", "unknown key 'zzz'; --help lists the keys"),
    ("seed", "--set takes key=value, got 'seed'"),
    ("seed=x", "seed must be a whole number, got 'x'"),
    ("seed=-1", "seed must be in"),
    ("float_lr=fast", "float_lr must be a number, got 'fast'"),
    ("float_lr=0", "float_lr must be positive"),
    ("guided_lr=-1", "guided_lr must be positive"),
    ("budget=-1", "budget must be from 0 to 32"),
    ("budget=33", "budget must be from 0 to 32"),
    ("budget=1.5", "budget must be a whole number"),
    ("terms_per_weight=0", "terms_per_weight must be from 0.125"),
    ("budget_step=0", "budget_step must be from 1 to 32"),
    ("budget_step=8", "terms_per_weight must be from 1 "),
    ("terms_per_weight=5", "terms_per_weight must be from 0.125 .* to 4"),
    ("group_size=0", "group_size must be 1 or more"),
    ("encoding=csd", "encoding must be one of binary, booth4, naf, hese, got 'csd'"),
    ("method=best", "method must be one of optimal, greedy"),
    ("method=greedy", "set budget or budgets"),
    ("allocate_for=speed", "allocate_for must be one of terms, cycles, energy, balanced"),
    ("activation_bits=1", "activation_bits must be from 2 to 8"),
    ("activation_bits=9", "activation_bits must be from 2 to 8"),
    ("model=resnet19", "model must be one of resnet18"),
    ("stem=big", "stem must be one of imagenet, small, None"),
    ("width=0", "width must be 1 or more"),
    ("dtype=float64", "dtype must be one of float32, bfloat16"),
    ("init_from=/no/such/file", "init_from must be an existing file"),
    ("budgets=/no/such/file", "budgets must be an existing file"),
    ("data=folder", "data=folder needs data_dir"),
    ("augment=mixup", "augment must be one of none"),
    ("image_size=0", "image_size must be 1 or more"),
    ("on_corrupt=ignore", "on_corrupt must be one of error, skip"),
    ("batch_size=0", "batch_size must be 1 or more"),
    ("eval_batch_size=0", "eval_batch_size must be 1 or more"),
    ("float_epochs=-1", "float_epochs must be 0 or more"),
    ("weight_decay=-1", "weight_decay must be 0 or more"),
    ("momentum=1", r"momentum must be in \[0, 1\)"),
    ("label_smoothing=1", "label_smoothing must be in"),
    ("distill=2", "distill must be in"),
    ("guidance=-0.1", "guidance must be in"),
    ("temperature=0", "temperature must be positive"),
    ("warmup=2", "warmup must be in"),
    ("rows=0", "rows must be 1 or more"),
    ("activation_sram=-1", "activation_sram must be from 0 to below"),
    ("cols=-4", "cols must be 1 or more"),
    ("checkpoint_every=0", "checkpoint_every must be 1 or more"),
    ("log_every=0", "log_every must be 1 or more"),
    ("calibration_batches=0", "calibration_batches must be 1 or more"),
    ("bn_batches=-1", "bn_batches must be 0 or more"),
    ("optimizer=adam", "optimizer must be one of sgd, adamw"),
    ("measured=pruned", "measured must be among the stages float, int8"),
    ("validation=0.6", "validation must be from 0 to 0.5"),
    ("budgets_by=row", "budgets_by must be one of layer, filter"),
    ("window=0", "window must be 1 or more"),
    ("model_options=depth", "one by one, as model_options.depth=4"),
    ("model_options.depth=4", "resnet18 has no depth; it has stem, width"),
    ("model_options.width=4", "set the key width"),
    ("model_options.in_channels=4", "it follows from the data"),
    ("int8_layers=(", "int8_layers is no regular expression"),
    ("float_lr=nan", "float_lr must be positive"),
]


def test_options_of_models_take_the_types_of_their_constructors():
    settings = ["model_options.hidden=64,32", "model=mlp", "data=mnist"]
    assert override(Config(), settings).model_options == {"hidden": [64, 32]}
    mobile = Config(model="mobilenet_v2", model_options={"width_multiplier": 0.5})
    settings = ["model_options.dropout_rate=0.2", "model_options.width_multiplier=1"]
    changed = override(mobile, settings).model_options
    assert changed == {"dropout_rate": 0.2, "width_multiplier": 1.0}
    with pytest.raises(ConfigError, match=r"model_options\.dropout_rate must be a number"):
        override(mobile, ["model_options.dropout_rate=much"])


def test_another_model_starts_without_options():
    mobile = Config(model="mobilenet_v2", model_options={"width_multiplier": 0.5})
    assert override(mobile, ["model=resnet20"]).model_options == {}
    with pytest.raises(ConfigError, match=r"vgg16_bn has no stem \(unset it: stem=none\); it has"):
        override(Config(stem="small"), ["model=vgg16_bn"])


@pytest.mark.parametrize(("setting", "message"), WRONG, ids=[setting for setting, _ in WRONG])
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(ConfigError, match=message):
        override(Config(), [setting])


def test_memories_of_the_hardware_comparison_are_settings():
    settings = ["activation_sram=4096", "activation_bits=4", "partial_sum_bits=24"]
    array = hw_compare._array(override(hw_compare.CONFIG, settings), hwmodel.BitParallel())
    assert array.activation_sram == 4096
    widths = hwmodel.Widths(inputs=4, outputs=4, partial_sums=24)
    assert array.dram_bits == array.sram_bits == widths
    assert hw_compare._array(hw_compare.CONFIG, array.pe) == hwmodel.Array(rows=32, cols=32)
    for setting in ("activation_sram=-1", "activation_bits=0", "partial_sum_bits=65"):
        with pytest.raises(ConfigError, match=f"{setting.partition('=')[0]} must be from"):
            override(hw_compare.CONFIG, [setting])


def test_both_kinds_of_budget_exclude_each_other(tmp_path):
    path = tmp_path / "budgets.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match="exclude each other"):
        override(Config(), ["budget=6", f"budgets={path}"])


def test_embedding_tables_have_no_integers_to_check():
    with pytest.raises(ConfigError, match="embeddings=true needs check_integers=false"):
        override(Config(), ["embeddings=true"])
    assert override(Config(), ["embeddings=true", "check_integers=false"]).embeddings


def test_unknown_experiments_are_named():
    with pytest.raises(ConfigError, match="did you mean stp_resnet18"):
        configs.load("stp_resnet_18")


def test_differences_leave_bookkeeping_out():
    ours = Config(seed=1, log_every=7)
    theirs = dataclasses.asdict(Config())
    assert differences(ours, theirs) == ["seed: 0 → 1"]
