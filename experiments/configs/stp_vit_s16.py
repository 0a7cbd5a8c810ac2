"""A small vision transformer of few power-of-two terms on handwritten digits.

python -m experiments.run --exp=stp_vit_s16

A good minute on two CPU cores; float 94.7 % of the test images with seed 0.
Network: Dosovitskiy et al., ICLR 2021.
"""

from experiments.config import Config

CONFIG = Config(
    data="digits",
    model="vit_s16",
    width=48,
    model_options={"patch_size": 2, "depth": 3, "heads": 4},
    optimizer="adamw",
    batch_size=64,
    eval_batch_size=120,
    float_epochs=25,
    retrain_epochs=9,
    float_lr=3e-3,
    guided_lr=3e-4,
    retrain_lr=5e-4,
    weight_decay=0.05,
)
