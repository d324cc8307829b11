#!/bin/bash
# Everything that needs a GPU, in the order of worth, on one H100 or H200 and without the network: tests in some 6
# minutes, then benchmarks in 7.
#
#     PYTHON=benchmarks/.venv/bin/python bash benchmarks/on_a_gpu.sh [folder for JSON and log] [tests | benchmarks]
#
# A part that fails, or takes too long, does not stop the others; each writes its JSON as soon as it is done.
out=${1:-outputs/gpu}
what=${2:-all}
python=${PYTHON:-python}
mkdir -p "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

part() { # name, seconds, command
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    echo "--- $name ---" >>"$out/log.txt"
    timeout --kill-after=5 "$limit" "$@" >>"$out/log.txt" 2>&1
    echo "$name: exit $? after $((SECONDS - started)) s" | tee -a "$out/log.txt"
}

bench() { # name, seconds, script and flags
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" "benchmarks/$1" --device cuda --results "$out" "${@:2}"
}

if [ "$what" != benchmarks ]; then
    # DeepSpeed's AdamW for the host is compiled meanwhile: two tests at once would wait for one another
    PATH="$(dirname "$(command -v "$python")"):$PATH" "$python" tests/build_extensions.py >"$out/build.txt" 2>&1 &
    part kernels 60 "$python" -m pytest -q -m gpu tests/test_logps.py tests/test_attention.py tests/test_offload.py
    wait
    # each starts scripts of its own, and starting takes longest
    part runs 300 "$python" -m pytest -q -m gpu -n 8 tests/test_cuda.py
fi
if [ "$what" != tests ]; then
    bench loss_head 70 loss_head.py
    bench sft 100 sft.py
    bench sft_liger 45 sft.py --liger 1
    bench dpo 60 dpo.py
    bench grpo_update 50 grpo_update.py
    bench sft_large 60 sft.py --shape Qwen3-1.7B
fi
tail -c 8000 "$out/log.txt"
