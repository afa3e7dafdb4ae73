"""The compiled model: captured graphs, delta tensors, backbones."""
