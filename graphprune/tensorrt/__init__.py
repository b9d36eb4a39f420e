"""TensorRT: what to build, how, and what the build did with the sparse weights.

Nothing here imports TensorRT: whatever is foreign runs in a subprocess with a time limit (:mod:`.foreign`), because
some builds crash or hang the interpreter. The parts: :mod:`.plan` (what to build, a value), :mod:`.script` (the same as
a shell script for trtexec), :mod:`.probe` (what is installed), :mod:`.build` (build with the Python API), :mod:`.engines`
(run and time them), :mod:`.rtx` (TensorRT-RTX, which parses and builds without a GPU), :mod:`.provider` (ONNX Runtime's
TensorRT provider), and the evidence: :mod:`.log`, :mod:`.inspector`, :mod:`.verdict`.
"""
