"""Labelled images and text: data sets by name, and batches for training and evaluation."""

from stp_jax.data.augment import AUGMENTATIONS as AUGMENTATIONS
from stp_jax.data.augment import Augmentation as Augmentation
from stp_jax.data.datasets import Dataset as Dataset
from stp_jax.data.datasets import load as load
from stp_jax.data.pipeline import ImageData as ImageData
from stp_jax.data.pipeline import eval_batches as eval_batches
from stp_jax.data.pipeline import steps_per_epoch as steps_per_epoch
from stp_jax.data.pipeline import train_iterator as train_iterator
from stp_jax.data.protocol import TrainingData as TrainingData
from stp_jax.data.sources import Source as Source
from stp_jax.data.text import TEXT as TEXT
from stp_jax.data.text import TextDataset as TextDataset
from stp_jax.data.text import load_text as load_text
