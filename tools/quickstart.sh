#!/usr/bin/env bash
# From nothing to a trained sparse GPT on a machine with two CPU cores, in a few minutes after installation:
# environment -> real text -> tokenizer and data set -> pretraining -> HTML report.
#
#   tools/quickstart.sh                     the Python standard library's own source as text
#   tools/quickstart.sh notes.txt corpus/   any .txt, .jsonl or .parquet files (or folders of them)
#
# Everything lands in runs/quickstart (MEGASPARSE_RUN changes that). A second call reuses environment and data,
# and a run that was interrupted resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh

run=${MEGASPARSE_RUN:-runs/quickstart}
if [[ $# -gt 0 ]]; then
    inputs=("$@")
else
    inputs=("$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')")
fi

if [[ ! -f $run/data/text.json ]]; then
    megasparse preprocess "${inputs[@]}" --output "$run/data/text" --train-tokenizer 2048 \
        --include '*.py' --include '*.txt' --include '*.jsonl' --include '*.parquet' \
        --exclude site-packages --exclude test --exclude tests --exclude lib2to3 --shuffle-files 0
elif [[ $# -gt 0 ]]; then
    echo "note: $run/data/text is there from an earlier call and stays as it is; for other text set MEGASPARSE_RUN" >&2
fi
megasparse pretrain configs/quickstart.yaml "run.directory=$run" "data.blend=$run/data/text" \
    "data.tokenizer=$run/data/text-tokenizer"
echo "Report: $run/report.html"
