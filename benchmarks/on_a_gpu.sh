#!/bin/bash
# Everything that needs a GPU, in the order of worth, within 8 minutes on one H100 or H200, without the network:
#
#     PYTHON=benchmarks/.venv/bin/python bash benchmarks/on_a_gpu.sh [folder for JSON and logs]
#
# A part that fails, or takes too long, does not stop the others; each writes its JSON as soon as it is done.
out=${1:-outputs/gpu}
python=${PYTHON:-python}
mkdir -p "$out"
rm -f "$out/parts.txt"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

part() { # name, seconds, command
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    echo "$name: exit $? after $((SECONDS - started)) s" | tee -a "$out/parts.txt"
}

bench() { # name, seconds, script and flags
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" "benchmarks/$1" --device cuda --results "$out" "${@:2}"
}

part kernels 40 "$python" -m pytest -q -m gpu tests/test_logps.py tests/test_attention.py tests/test_offload.py
bench loss_head 40 loss_head.py
bench sft 100 sft.py
bench sft_liger 45 sft.py --liger 1
bench dpo 60 dpo.py
bench grpo_update 50 grpo_update.py
bench sft_large 60 sft.py --shape Qwen3-1.7B
part runs 80 "$python" -m pytest -q -m gpu tests/test_cuda.py
tail -n 3 "$out"/*.log
