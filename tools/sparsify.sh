#!/usr/bin/env bash
# A dense SiLU Llama made sparse, at a size that two CPU cores train in minutes: train it with transformers, import it
# with ReLU in SiLU's place, train on with an L1 term, export, and validate at every stage on the same data
# (docs/huggingface.md has the figures). Everything lands in runs/sparsify.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh

run=runs/sparsify
validation=("data.blend=$run/data/text" "data.split='96,4,0'" data.sequence_length=128 training.eval_steps=64)
if [[ ! -f $run/data/text.json ]]; then
    megasparse preprocess "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
        --output $run/data/text --train-tokenizer 2048 --include '*.py' \
        --exclude site-packages --exclude test --exclude tests --exclude lib2to3 --shuffle-files 0
fi
if [[ ! -d $run/dense ]]; then
    python tools/train_silu_llama.py $run/data/text $run/data/text-tokenizer $run/dense
fi
megasparse evaluate $run/dense "${validation[@]}"                            # dense, SiLU
megasparse convert from-hf $run/dense $run/imported --overwrite --verify
megasparse evaluate $run/imported "${validation[@]}" training.global_batch_size=8   # ReLU in its place, untrained
megasparse pretrain tools/sparsify.yaml "$@"
megasparse evaluate $run training.eval_steps=64                              # recovered and sparse
megasparse convert to-hf $run $run/sparse --overwrite --verify
megasparse evaluate $run/sparse "${validation[@]}"                           # the same, by transformers
