"""Readers of networks: Flax models, ONNX files, SCALE-Sim topologies."""
