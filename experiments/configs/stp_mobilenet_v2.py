"""MobileNetV2 of few power-of-two terms on handwritten digits: depthwise layers keep all terms.

python -m experiments.run --exp=stp_mobilenet_v2

Five minutes on two CPU cores; float 93.9 % of the test images with seed 0.
Network: Sandler et al., CVPR 2018.
"""

from experiments.config import Config

CONFIG = Config(
    data="digits",
    image_size=16,
    model="mobilenet_v2",
    stem="small",
    model_options={"width_multiplier": 0.35},
    batch_size=64,
    eval_batch_size=120,
    float_epochs=5,
    retrain_epochs=3,
    float_lr=0.05,
    guided_lr=0.01,
    retrain_lr=0.01,
)
