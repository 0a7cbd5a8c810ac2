"""EfficientNet-Lite0 of few power-of-two terms on handwritten digits.

python -m experiments.run --exp=stp_efficientnet_lite0

Six minutes on two CPU cores; float 88.6 % of the test images with seed 0.
Network: Tan and Le, ICML 2019, in TensorFlow's Lite variant.
"""

from experiments.config import Config

CONFIG = Config(
    data="digits",
    model="efficientnet_lite0",
    stem="small",
    model_options={"width_multiplier": 0.5},
    batch_size=16,  # many steps, since the network's statistics forget 1 % a step
    eval_batch_size=120,
    float_epochs=5,
    retrain_epochs=3,
    float_lr=0.02,
    guided_lr=0.005,
    retrain_lr=0.005,
)
