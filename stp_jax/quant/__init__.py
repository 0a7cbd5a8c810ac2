"""Quantization of Flax models: from a model and a policy to an STP model."""
