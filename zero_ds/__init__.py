"""zero_ds: train vision encoders against small surrogates of large language models, and graft them."""

__version__ = "0.1.0"

import os

# when a rank dies, the others' C++ stacks about it are no help; read when torch is loaded, which is after this
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
