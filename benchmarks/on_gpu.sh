#!/usr/bin/env bash
# Checks and measures everything on the GPU of this machine, without a network, in under 8 minutes.
#
#   bash benchmarks/on_gpu.sh RESULTS_DIR
#
# Writes JSON, the printed tables and auto.json, the table that mode "auto" chooses by. PYTHON names the interpreter,
# which needs torch, triton and numpy. Ends with the number of parts that failed.
set -uo pipefail
results=${1:?usage: bash benchmarks/on_gpu.sh RESULTS_DIR}
mkdir -p "$results"
results=$(cd "$results" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=".:kernels:convert:benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
failed=0

part() { # name, command …
    local name=$1 started=$SECONDS
    shift
    echo "== $name"
    if ! "$@" 2>&1 | tee "$results/$name.txt"; then
        echo "== $name FAILED"
        failed=$((failed + 1))
    fi
    echo "== $name: $((SECONDS - started)) s"
}

"$python" - <<'PYTHON' 2>&1 | tee "$results/machine.txt"
import torch, triton, numpy
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), "driver", torch.version.cuda or torch.version.hip)
print("torch", torch.__version__, "triton", triton.__version__, "numpy", numpy.__version__)
PYTHON
if [ $? -ne 0 ]; then
    echo "no GPU that torch and triton can use; see $results/machine.txt" >&2
    exit 2
fi

# Seconds after which a part starts nothing new; what it left out is said in its output.
part check "$python" benchmarks/check_gpu.py --seconds "${CHECK_SECONDS:-160}" --json "$results/check.json"
part kernels "$python" benchmarks/bench_kernels.py --seconds "${KERNELS_SECONDS:-240}" \
    --json "$results/kernels.json" --auto "$results/auto.json"

echo "== done: $failed parts failed, results in $results"
exit "$failed"
