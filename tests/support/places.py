"""Folders and files of the repository that tests use."""

from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parent.parent
GATHERED = str(SUPPORT / "zero3_gathered.json")
"""DeepSpeed config under which ZeRO-3 partitions and gathers parameters even of tiny models."""
PAIRS = str(SUPPORT / "hpz_pairs.json")
"""DeepSpeed config with hpZ groups of two ranks."""
