"""A multi-layer perceptron of few power-of-two terms on handwritten digits.

python -m experiments.run --exp=stp_mlp

Half a minute on two CPU cores; float 95.3 % of the test images with seed 0.
"""

from experiments.config import Config

CONFIG = Config(
    data="digits",
    augment="shift",
    model="mlp",
    model_options={"hidden": [256, 256]},
    batch_size=64,
    eval_batch_size=120,
    float_epochs=20,
    retrain_epochs=12,
    float_lr=0.05,
    guided_lr=0.01,
    retrain_lr=0.01,
)
