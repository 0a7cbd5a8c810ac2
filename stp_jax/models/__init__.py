"""Flax NNX models, by name or by class, and import of published PyTorch weights."""

from stp_jax.models.decoder import DecoderLM, generate, load_llama2c
from stp_jax.models.efficientnet import EfficientNetLite
from stp_jax.models.lstm import LSTMLanguageModel
from stp_jax.models.mlp import MLP
from stp_jax.models.mobilenet import MobileNetV2
from stp_jax.models.registry import MODELS, create, model_options
from stp_jax.models.resnet import BasicBlock, CifarResNet, ResNet
from stp_jax.models.torch_import import load_torch, torch_variables
from stp_jax.models.vgg import VGG
from stp_jax.models.vit import VisionTransformer

__all__ = [
    "MLP",
    "MODELS",
    "VGG",
    "BasicBlock",
    "CifarResNet",
    "DecoderLM",
    "EfficientNetLite",
    "LSTMLanguageModel",
    "MobileNetV2",
    "ResNet",
    "VisionTransformer",
    "create",
    "generate",
    "load_llama2c",
    "load_torch",
    "model_options",
    "torch_variables",
]
