"""Converts a run into a Hugging Face folder; this is `zero-ds export` under the name that other trainers use.

python tools/convert_to_hf.py runs/quickstart/encoder --out my-model --format llava --dtype bfloat16
"""

from __future__ import annotations

import sys

from zero_ds.cli.main import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
