"""A character language model of few power-of-two terms on Python's language reference.

python -m experiments.run --exp=stp_lstm_lm

Test accuracy with seed 0, next characters: float 44.9 %, int8 44.9 %, retrained 46.3 % at 0.75
terms per weight, in under two minutes on two CPU cores. Network: Zaremba et al., 2014.
"""

from experiments.config import Config

CONFIG = Config(
    data="python_docs",
    window=32,
    model="lstm_lm",
    model_options={"embedding": 64, "hidden": 128, "depth": 1},
    optimizer="adamw",
    batch_size=64,
    eval_batch_size=128,
    float_epochs=2,
    retrain_epochs=0.75,
    float_lr=5e-3,
    guided_lr=1e-3,
    retrain_lr=2e-3,
    weight_decay=0.01,
    error_weighting="measured",
)
