"""VGG-16 with BatchNorm, of few power-of-two terms, on enlarged handwritten digits.

python -m experiments.run --exp=stp_vgg16_bn

Two minutes on two CPU cores; float 98.6 % of the test images with seed 0.
Network: Simonyan and Zisserman, ICLR 2015.
"""

from experiments.config import Config

CONFIG = Config(
    data="digits",
    image_size=32,  # the network halves the image five times
    model="vgg16_bn",
    width=8,
    model_options={"head": "small"},
    batch_size=64,
    eval_batch_size=120,
    float_epochs=5,
    retrain_epochs=3,
    float_lr=0.05,
    guided_lr=0.01,
    retrain_lr=0.01,
)
