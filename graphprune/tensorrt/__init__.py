"""TensorRT: what to build, how, and what the build did with the sparse weights.

Nothing here imports TensorRT: whatever is foreign runs in a subprocess with a time limit (:mod:`.foreign`), because
some builds crash or hang the interpreter.

- :mod:`.plan`: what to build, a value; :mod:`.profiles`: for which shapes; :mod:`.script`: the same for trtexec.
- :mod:`.probe`: what is installed here.
- :mod:`.build`: build with the Python API; :mod:`.engines`: run engines and time them.
- :mod:`.numbers`: what an engine computes, against ONNX Runtime; :mod:`.bench`: how fast, against others.
- :mod:`.provider`: ONNX Runtime's TensorRT provider, the other way in.
- :mod:`.rtx`: TensorRT-RTX, which parses and builds without a GPU, as a check of form.
- :mod:`.handover`: all of it in order, for one network; :mod:`.tables`: what the command line prints.
- :mod:`.log`, :mod:`.inspector`, :mod:`.verdict`: what the build did with sparse weights, and how that is known.
"""
