"""Verification: what was removed is all that changed, shown in ONNX Runtime on every run."""
