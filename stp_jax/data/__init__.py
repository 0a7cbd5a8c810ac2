"""Labelled images and text: data sets by name, and batches for training and evaluation."""

from stp_jax.data.augment import AUGMENTATIONS, Augmentation
from stp_jax.data.datasets import Dataset, load
from stp_jax.data.pipeline import eval_batches, steps_per_epoch, train_iterator
from stp_jax.data.sources import Source
from stp_jax.data.text import NAME as TEXT
from stp_jax.data.text import TextDataset, load_text, text_eval_batches, text_train_iterator

__all__ = [
    "AUGMENTATIONS",
    "TEXT",
    "Augmentation",
    "Dataset",
    "Source",
    "TextDataset",
    "eval_batches",
    "load",
    "load_text",
    "steps_per_epoch",
    "text_eval_batches",
    "text_train_iterator",
    "train_iterator",
]
