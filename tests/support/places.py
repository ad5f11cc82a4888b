"""Folders of the repository that tests name."""

from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parent.parent
GATHERED = str(SUPPORT / "zero3_gathered.json")
"""A DeepSpeed config under which ZeRO-3 gathers parameters even of tiny models."""
PAIRS = str(SUPPORT / "hpz_pairs.json")
"""A DeepSpeed config with hpZ groups of two ranks."""
