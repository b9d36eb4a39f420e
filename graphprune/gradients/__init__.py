"""Gradients inside of ONNX: gates, objectives, vector-Jacobian products."""
