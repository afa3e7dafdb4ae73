"""ONNX out: tasks, graphs, weights, parity."""
