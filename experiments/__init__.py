"""Experiments: ``python -m experiments.run --exp=NAME``."""
