#!/usr/bin/env bash
# Training steps on one large GPU with random weights of the real shapes: tokens/s, MFU and peak memory of ours and the peer.
#
#   tools/bench/gpu.sh OUT_FOLDER [PART ...]
#
# Parts: encoder-5b pretrain-5b (Llama-8B, T(17,30)), encoder-37b pretrain-37b (Llama-70B, T(40,78)), decoder-3b
# (Llama-3.2-3B, everything trains). Ours and the peer of each part may take ten minutes each; if one does not fit or
# fails, that is reported and the next one starts. The peer of the 37b parts is the full Llama-70B, which fits no single
# GPU. WAYS names the measurements of each part, "ours peer" by default; ours:key=value is ours with another setting:
#
#   WAYS="ours ours:kernels=liger ours:compile=true peer" tools/bench/gpu.sh OUT_FOLDER encoder-5b
set -u

case "${1:-}" in "" | -h | --help)
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
  exit 0 ;;
esac
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out="$1"
shift
mkdir -p "$out"
[ $# -gt 0 ] || set -- encoder-5b pretrain-5b decoder-3b encoder-37b pretrain-37b

failed=0
for part in "$@"; do
  case "$part" in
    *-5b) recipe="llama-3.1-8b/${part%-5b}" replace=(--replace 17:30) ;;
    *-37b) recipe="llama-3.1-70b/${part%-37b}" replace=(--replace 40:78) ;;
    decoder-3b) recipe="llama-3.2-3b/decoder" replace=() ;;
    *)
      echo "unknown part $part; see --help" >&2
      exit 2 ;;
  esac
  for who in ${WAYS:-ours peer}; do
    case "$who" in
      ours) words=() ;;
      ours:*) words=(--setting "${who#ours:}") ;;
      peer) words=(--peer) ;;
      *)
        echo "WAYS contains $who; use ours, ours:key=value or peer" >&2
        exit 2 ;;
    esac
    echo "== $part, $who"
    timeout 600 "${PYTHON:-python}" "$here/gpu.py" --recipe "$recipe" "${replace[@]}" "${words[@]}" \
      --out "$out/$part-$who.json" || {
      echo "$part, $who: failed or took more than ten minutes (exit status $?)" >&2
      failed=1
    }
  done
done
exit "$failed"
