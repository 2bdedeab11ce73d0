#!/usr/bin/env bash
# Checks and measures everything on the GPU of this machine, without a network, made to end within 8 minutes.
#
#   bash benchmarks/gpu/on_gpu.sh RESULTS_DIR
#
# Leaves results.json, summary.txt (printed at the end), log.txt, auto.json (what mode "auto" goes by) and pictures.png
# there, and nothing elsewhere but Triton's cache. Ends with the number of parts that failed.
#
# PYTHON names the interpreter; it needs torch, triton, numpy, transformers, safetensors, Pillow and tqdm. gguf is
# needed for the pictures, gguf and diffusers for the baselines; what is missing is said. MINUTES is the time for all
# (7.5), CHECK_SECONDS, KERNELS_SECONDS, TUNE_SECONDS, PICTURE_SECONDS, STREAM_SECONDS and STEP_SECONDS that for a part:
# after it it starts nothing new, and says what it left out. DEVICE=cpu runs all of it on tiny sizes without a GPU, to test this script.
set -uo pipefail
results=${1:?usage: bash benchmarks/gpu/on_gpu.sh RESULTS_DIR}
mkdir -p "$results"
results=$(cd "$results" && pwd)
cd "$(dirname "$0")/../.."
export PYTHONPATH=".:kernels:convert${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
unset TRITON_INTERPRET
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
total=$("$python" -c "print(int(60 * ${MINUTES:-7.5}))")
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
failed=0

seconds() { # share of the total in per cent, that share or what is left of the total
    local share=$((total * $1 / 100)) left=$((total - SECONDS - 10))
    echo $((share < left ? share : left > 5 ? left : 5))
}

part() { # name, seconds, command …; ended where it hangs
    local name=$1 limit=$2 started=$SECONDS status
    shift 2
    echo "== $name, $limit s"
    timeout --kill-after=5 $((limit + 60)) "$python" "$@" --device "$device" --json "$parts/$name.json" \
        --seconds "$limit"
    status=$?
    [ $status -eq 0 ] || { echo "== $name FAILED, exit status $status"; failed=$((failed + 1)); }
    echo "$name $status $((SECONDS - started))" >>"$parts/status"
    "$python" -m benchmarks.gpu.report "$parts" "$results" # so that what was found survives what comes
}

everything() {
    local started=$SECONDS
    if ! "$python" -m benchmarks.gpu.machine --device "$device" --json "$parts/machine.json"; then
        echo "no GPU that torch and triton can use" >&2
        return 2
    fi
    echo "machine 0 $((SECONDS - started))" >"$parts/status"
    local check=() kernels=() picture=() step=()
    if [ "$device" = cpu ]; then
        check=(--processes 0 --qtype Q4_0)
        kernels=(--only "linear 1x160x128" --qtype Q8_0)
        picture=(--processes 0 --prompts 1 --steps 2)
        step=(--mode fused --mode torch --qtype Q4_0 --no-compile)
    fi
    export GGUF_SD_CACHE="$parts/cache" # the table measured here is installed there, for the parts after it
    part check "${CHECK_SECONDS:-$(seconds 28)}" -m benchmarks.gpu.check_gpu "${check[@]}"
    part kernels "${KERNELS_SECONDS:-$(seconds 26)}" -m benchmarks.gpu.bench_kernels "${kernels[@]}" \
        --auto "$results/auto.json" --install
    part tune "${TUNE_SECONDS:-$(seconds 15)}" -m benchmarks.gpu.tune_model
    part picture "${PICTURE_SECONDS:-$(seconds 13)}" -m benchmarks.gpu.bench_picture "${picture[@]}" \
        --sheet "$results/pictures.png"
    part stream "${STREAM_SECONDS:-$(seconds 10)}" -m benchmarks.gpu.bench_stream
    part step "${STEP_SECONDS:-$(seconds 100)}" -m benchmarks.gpu.bench_step "${step[@]}"
    cat "$results/summary.txt"
    echo "== done in $SECONDS s: $failed parts failed, results in $results"
    return "$failed"
}

everything 2>&1 | tee "$results/log.txt"
exit "${PIPESTATUS[0]}"
