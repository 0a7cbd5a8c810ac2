"""A character language model of few power-of-two terms on Python's language reference.

python -m experiments.run --exp=stp_lstm_lm

Two minutes on two CPU cores; float 44.9 % of the next characters in the test text with seed 0.
Network: Zaremba et al., 2014.
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
)
