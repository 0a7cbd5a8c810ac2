"""Processes, devices, checkpoints and logs of a run."""
