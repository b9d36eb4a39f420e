#!/usr/bin/env bash
# Builds net.plan from net.onnx
# with trtexec of TensorRT 10. Written by graphprune.
# The program is found on PATH, or named by TRTEXEC. Files lie beside this script unless their paths are absolute.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

engine=net.plan
log=net.plan.log
partial="$engine.partial"
trap 'rm -f -- "$partial"' EXIT

"${TRTEXEC:-trtexec}" \
    --onnx=net.onnx \
    --saveEngine="$partial" \
    --stronglyTyped \
    --sparsity=enable \
    --memPoolSize=workspace:2048 \
    --timingCacheFile=net.plan.timing \
    --profilingVerbosity=detailed \
    --dumpLayerInfo \
    --exportLayerInfo=net.plan.layers.json \
    --verbose \
    --skipInference 2>&1 | tee -- "$log"
mv -f -- "$partial" "$engine"

echo
echo "What TensorRT says of the sparse weights; the last two lines count:"
grep -aF '(Sparsity)' -- "$log" || echo "nothing: look at $log"
