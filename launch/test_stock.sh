#!/usr/bin/env bash
# Checks that exports work without this package: an environment of its own (.venv-stock) in which zero_ds is not installed
# loads exports, and has to give the answers of the runs that they come from. Not part of launch/test.sh; needs a
# finished quickstart.
#
#   launch/test_stock.sh [STEP...]
#
# Steps (default: all but vllm):
#   tiny      tiny models of every family and encoder, trained, exported, loaded: prompts, logits, answers, pipeline
#   pipeline  transformers' pipeline("image-text-to-text") on the quickstart's export
#   lmms      the command line of lmms-eval with its own model llava_hf on the same export
#   vllm      vLLM's own LlavaForConditionalGeneration on the same export, in the environment of launch/test_vllm.sh
#
#   RUNS=runs launch/test_stock.sh
#   EXPORT=some/export launch/test_stock.sh pipeline vllm
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

help_if_asked "$@"
steps=" ${*:-tiny pipeline lmms} "
for step in $steps; do
  case "$step" in tiny | pipeline | lmms | vllm) ;; *) fail "$step is not a step; choose tiny, pipeline, lmms or vllm" ;; esac
done
use_venv
export_folder="${EXPORT:-${RUNS:-runs}/quickstart/export}"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

venv="${STOCK_ENVIRONMENT:-.venv-stock}"
if [ ! -f "$venv/stock.stamp" ]; then
  say "Installing transformers and lmms-eval into $venv (several minutes the first time)"
  "$(find_python)" -m venv "$venv"
  # lmms-eval's own dependencies choose the rest; 0.7.3 uses filelock._api, which filelock 4 does not have
  grep -E '^(transformers|torch|lmms-eval)==' constraints.txt >"$scratch/constraints.txt"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$scratch/constraints.txt" \
    transformers torch pillow accelerate lmms-eval decord 'filelock<4' ||
    fail "the stock environment could not be installed; check the network and the space, then run again"
  # with another build of torch it breaks the import of transformers' processors, which do not need it
  "$venv/bin/python" -c 'import torchvision' 2>/dev/null ||
    "$venv/bin/python" -m pip uninstall --quiet --yes torchvision
  touch "$venv/stock.stamp"
fi
venv="$(cd "$venv" && pwd)"
tools="$PROJECT/tools"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TRANSFORMERS_VERBOSITY=error HF_MODULES_CACHE="$scratch/modules"
# in another folder, because Python would find zero_ds in this one
stock() { (cd "$scratch" && "$venv/bin/python" "$tools/check_stock.py" "$@"); }
"$venv/bin/python" -c 'import torch, transformers; print("transformers", transformers.__version__, "torch", torch.__version__)'

if [[ "$steps" == *" tiny "* ]]; then
  say "Tiny models of every family and encoder"
  python tools/ask_source.py tiny --out "$scratch/tiny"
  stock tiny "$scratch"
  # Gemma's tokenizer adds a token before every text, and its texts end with another token than its turns
  say "lmms-eval's llava_hf on a tiny Gemma-3"
  stock lmms "$scratch/tiny/gemma3-tied-clip" "$scratch/tiny/gemma3-tied-clip/export"
fi
[[ "$steps" =~ pipeline|lmms|vllm ]] || exit 0

demo_graft
[ -f "$export_folder/config.json" ] || fail "$export_folder holds no export; run launch/quickstart.sh first"
export_folder="$(cd "$export_folder" && pwd)"
say "The source's answers"
python tools/ask_source.py run "$run" --target "$target" --records "$records" --out "$scratch"
for step in pipeline lmms; do
  [[ "$steps" == *" $step "* ]] || continue
  say "Answers of $step"
  stock "$step" "$scratch" "$export_folder"
done
if [[ "$steps" == *" vllm "* ]]; then
  served="${VLLM_ENVIRONMENT:-.venv-vllm}"
  [ -x "$served/bin/python" ] || fail "$served does not exist; run launch/test_vllm.sh once, which makes it"
  served="$(cd "$served" && pwd)/bin/python"
  # vLLM's llava.py imports pixtral.py, which imports torchvision. PyPI's build is for CUDA: with a CPU build of torch its
  # operators are missing, and its import fails because of two of them, which are declared here. Neither is called.
  if ! "$served" -c 'import torchvision' 2>/dev/null; then
    version="$("$served" -c 'import torch; print("0.%d.*" % (int(torch.__version__.split(".")[1]) + 15))')"
    "$served" -m pip install --quiet --disable-pip-version-check --no-deps --target "$scratch/vision" "torchvision==$version" ||
      fail "torchvision $version could not be fetched; check the network and run again"
    cat >"$scratch/vision/sitecustomize.py" <<'EOF'
import sys


class Declare:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torchvision":
            import torch

            sys.meta_path.remove(Declare)
            for operator in ("nms", "qnms"):
                schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{operator}", schema)


sys.meta_path.insert(0, Declare)
EOF
    export PYTHONPATH="$scratch/vision"
  fi
  export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" VLLM_ENABLE_V1_MULTIPROCESSING=0 TORCHDYNAMO_DISABLE=1
  say "Token for token: transformers, then vLLM"
  (unset PYTHONPATH && stock tokens "$scratch" "$export_folder")
  (cd "$scratch" && "$served" "$tools/check_served.py" "$scratch" "$export_folder")
fi
