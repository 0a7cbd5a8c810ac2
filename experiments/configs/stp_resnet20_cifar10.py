"""CIFAR ResNet-20 on CIFAR-10: fine-tune float weights, then compress them.

Starts best from published weights, for example those of akamaster/pytorch_resnet_cifar10 (float
top-1 91.7 % on the original images):

    python -m experiments.run --exp=stp_resnet20_cifar10 --set init_from=resnet20.safetensors

A folder of images works as well: ``--set data=folder --set data_dir=…``. A training epoch takes
about two minutes on two CPU cores. The documentation's results page has what this network reaches.
"""

from experiments.config import Config

CONFIG = Config(
    data="cifar10",
    augment="cifar",
    model="resnet20",
    batch_size=128,
    float_epochs=1,
    retrain_epochs=1.5,
    float_lr=0.01,
    guided_lr=0.005,
    retrain_lr=0.01,
    weight_decay=1e-4,
    terms_per_weight=0.75,
)
