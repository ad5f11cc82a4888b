"""Hugging Face model folders: loading that refuses missing tensors, and the hash that identifies a model."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from zero_ds.runtime.errors import ConfigError, one_line
from zero_ds.runtime.safetensors import shard_files, spans
from zero_ds.runtime.trust import code_is_allowed

if TYPE_CHECKING:
    from torch import nn


def load_complete(load: Any, folder: Path, **arguments: Any) -> nn.Module:
    """Calls a `from_pretrained`, and refuses missing or mismatched tensors instead of leaving them random.

    Raises:
        ConfigError: the folder cannot be loaded, or its weights do not fill the model.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging as library

    from zero_ds.runtime.zero3 import loads_as_without_zero3

    verbosity = library.get_verbosity()
    library.set_verbosity(logging.CRITICAL)  # the library reports missing tensors on a page; our error is a sentence
    try:
        with loads_as_without_zero3():
            model, info = load(str(folder), output_loading_info=True, **arguments)
    except (OSError, LookupError, ValueError, TypeError, AttributeError, ImportError, SafetensorError) as error:
        raise ConfigError(
            f"the model in {folder} cannot be loaded ({one_line(error)}); fetch it again, or check its config.json."
        ) from None
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ConfigError(
            f"the weights in {folder} do not have the shapes that its config.json describes; fetch it again."
        ) from None
    finally:
        library.set_verbosity(verbosity)
    missing = sorted(info.get("missing_keys", ())) + sorted(str(key) for key in info.get("mismatched_keys", ()))
    if missing:
        raise ConfigError(
            f"the weights in {folder} do not fill the model: {missing[0]} and {len(missing) - 1} more are missing."
        )
    return cast("nn.Module", model)


def load_tokenizer(folder: Path, config: Any = None) -> Any:
    """Loads the tokenizer of a folder.

    config: transformers' config of the folder, if it has been loaded already; it names the tokenizer's class.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=code_is_allowed())
    except Exception as error:  # the library raises many kinds of errors
        raise ConfigError(
            f"the tokenizer in {folder} cannot be loaded ({one_line(error)}); fetch the model again."
        ) from None


HASH_VERSION = "2-"
"""Prefix of hashes, which names the way in which `model_hash` samples bytes."""
_EARLY_HASH = re.compile(r"[0-9a-f]{32}")


def model_hash(folder: Path, like: str = "", config: bytes | None = None) -> str:
    """Returns a hash of config.json and of every tensor's name, dtype, shape and a sample of its bytes.

    The sample is 16 pieces of 4 KB spread over the tensor; tensors of up to 64 KB are read whole. The hash therefore
    tells models apart within a second, but may miss a change of a few bytes in the middle of a large tensor.

    like: a recorded hash that the result will be compared with, and is taken in the same way as (early versions did not
    sample the end of tensors between 4 and 64 KB). config: content of config.json, if it has been read already.
    """
    early = _EARLY_HASH.fullmatch(like) is not None
    digest = hashlib.sha256((folder / "config.json").read_bytes() if config is None else config)
    for file in sorted(set(shard_files(folder).values())):
        with file.open("rb") as handle:
            for name, span in sorted(spans(file).items()):
                digest.update(f"{name}{span.dtype}{span.shape}".encode())
                pieces = min(16, -(-span.size // 4096))
                steps = 15 if early else max(1, pieces - 1)
                for piece in range(pieces):
                    handle.seek(span.start + piece * max(0, span.size - 4096) // steps)
                    digest.update(handle.read(min(4096, span.size)))
    return ("" if early else HASH_VERSION) + digest.hexdigest()[:32]
