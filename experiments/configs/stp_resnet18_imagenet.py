"""ResNet-18 on ImageNet at 224×224: the paper's network and data, the full recipe.

The float stage follows the usual 90-epoch recipe (He et al., CVPR 2016, with linear warm-up and a
cosine as in Loshchilov & Hutter, ICLR 2017); published torchvision weights spare it:

    python -m experiments.run --exp=stp_resnet18_imagenet \\
        --set init_from=resnet18.pth --set float_epochs=0

The data come from TFDS's imagenet2012, which asks for a manual download. Nobody has run it whole:
`benchmarks/imagenet_standin.py` runs every line of it on a few generated images.
"""

from experiments.config import Config

CONFIG = Config(
    data="imagenet2012",
    augment="imagenet",
    image_size=224,
    model="resnet18",
    stem="imagenet",
    dtype="bfloat16",
    batch_size=1024,
    eval_batch_size=1000,
    float_epochs=90,
    retrain_epochs=25,
    float_lr=0.4,
    guided_lr=0.01,
    retrain_lr=0.02,
    warmup=0.05,
    weight_decay=5e-5,
    label_smoothing=0.1,
    checkpoint_every=1000,
    log_every=50,
)
