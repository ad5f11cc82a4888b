"""Checkpoints of a run: their content (checkpoint.py, manifest.py), how they are written (save.py) and read (load.py).

foreign.py writes weights from elsewhere in the same layout: released.py those of the paper's authors, consolidate.py
those of DeepSpeed's own checkpoints. peft_folder.py reads and writes low-rank adapters in PEFT's format.
"""

KEYS = ("master", "exp_avg", "exp_avg_sq")
"""Tensors of each trained parameter's state, in float32: its master copy and Adam's moments."""

STATE_BYTES = 4 * len(KEYS)
"""Bytes of the state of one element of a trained parameter."""

PIECE = 2**22
"""Number of elements of a tensor that are gathered at a time while a checkpoint is saved: 16 MiB in float32."""
