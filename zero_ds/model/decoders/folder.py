"""Model folders of the Hugging Face format: their config, their tensors by name, and loading without gaps.

A folder of a multimodal class counts as the decoder in it: its text config, and the tensors of its text tower under the
names that the causal LM has for them (`Family.towers`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from zero_ds.model.decoders import family_of
from zero_ds.model.layer_plan import read_surrogate
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.safetensors import FLOATS, Span, Stored, locate, shard_files, spans

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)


def text_config(folder: Path) -> Any:
    """The decoder's config with every default filled in, also where the folder is of a multimodal class.

    Raises:
        ConfigError: an unregistered family, or a config.json that transformers does not take.
    """
    from transformers import AutoConfig

    family_of(folder)
    depth_of(folder)
    try:
        whole = AutoConfig.from_pretrained(folder)
        config = whole.get_text_config(decoder=True)
        assert config.hidden_size and config.vocab_size
        config.tie_word_embeddings = whole.tie_word_embeddings  # said by the outer class where there is one
    except Exception as error:  # whatever the library makes of what somebody wrote
        raise ConfigError(
            f"{folder / 'config.json'} cannot be used ({_reason(error)}); fetch the model again."
        ) from None
    if getattr(whole, "quantization_config", None):
        raise ConfigError(f"{folder} is quantized; give the model in bfloat16, float16 or float32.")
    return config


def depth_of(folder: Path) -> int:
    """Number of decoder layers that config.json names.

    Raises:
        ConfigError: no readable config.json, or it names none.
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        depth = content.get("text_config", content).get("num_hidden_layers")
    except (OSError, ValueError, AttributeError):
        raise ConfigError(f"{path} is missing or damaged; fetch the model again.") from None
    if not isinstance(depth, int) or depth < 1:
        raise ConfigError(f"{path} does not say how many layers there are (num_hidden_layers={depth!r}).")
    return depth


def is_multimodal(folder: Path) -> bool:
    """Whether the folder holds a decoder as one tower of several."""
    return "text_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))


def decoder_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's decoder under the causal LM's name.

    Raises:
        ConfigError: as `shard_files` and `family_of`; a multimodal folder without a text tower that is known.
    """
    files = shard_files(folder)
    if not is_multimodal(folder):
        return {name: Stored(file, name) for name, file in files.items()}
    family = family_of(folder)
    tensors = {}
    for name, file in files.items():
        prefix = next(((old, new) for old, new in family.towers if name.startswith(old)), None)
        if prefix is not None:
            tensors[prefix[1] + name.removeprefix(prefix[0])] = Stored(file, name)
    if not tensors:
        raise ConfigError(
            f"no tensor in {folder} has a name of a text tower ({', '.join(old for old, _ in family.towers)}); "
            f"name its prefix in families/ ({family.name})."
        )
    return tensors


def expected_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the folder's config.json makes a causal LM have, without making it.

    Raises:
        ConfigError: a config.json that no model can be made of.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = text_config(folder)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever the library makes of what somebody wrote
        raise ConfigError(
            f"{folder / 'config.json'} cannot be used ({_reason(error)}); fetch the model again."
        ) from None
    family = family_of(folder)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop(family.head, None)
    return shapes


def load_tokenizer(folder: Path) -> Any:
    """Raises ConfigError where the folder's tokenizer cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the library raises many kinds
        raise ConfigError(
            f"the tokenizer in {folder} cannot be loaded ({_reason(error)}); fetch the model again."
        ) from None


def _reason(error: Exception) -> str:
    """A library's error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def load_decoder(folder: Path, *, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    """The folder's causal LM, also out of a multimodal folder; straight into partitions where ZeRO-3 is active.

    attention: an implementation that the family does not have is replaced by its first one.

    Raises:
        ConfigError: as `load_complete`; flash attention where it is not installed.
    """
    from transformers import AutoModelForCausalLM

    family = family_of(folder)
    if attention not in family.attentions:
        logger.info("%s has no %s attention; %s is used", family.name, attention, family.attentions[0])
        attention = family.attentions[0]
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            "attention=flash_attention_2 needs flash-attn, which is not installed; with a GPU: pip install "
            "'zero_ds[flash]', else attention=sdpa."
        )
    more: dict[str, Any] = {}
    if is_multimodal(folder):
        renamed = {f"^{re.escape(old)}": new for old, new in family.towers}
        more = {"config": text_config(folder), "key_mapping": renamed}
    return load_complete(
        AutoModelForCausalLM.from_pretrained, folder, dtype=dtype, attn_implementation=attention, **more
    )


def load_complete(load: Any, folder: Path, **arguments: Any) -> nn.Module:
    """`from_pretrained` that refuses weights with missing or mismatched tensors instead of leaving them random.

    Raises:
        ConfigError: a folder that cannot be loaded, or weights that do not fill the model.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging as library

    verbosity = library.get_verbosity()
    library.set_verbosity(logging.CRITICAL)  # its report of missing tensors is a page; ours is a sentence
    try:
        model, info = load(str(folder), output_loading_info=True, **arguments)
    except (OSError, LookupError, ValueError, TypeError, AttributeError, ImportError, SafetensorError) as error:
        raise ConfigError(
            f"the model in {folder} cannot be loaded ({_reason(error)}); fetch it again, or look at its config.json."
        ) from None
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ConfigError(
            f"the weights in {folder} have other shapes than its config.json says; fetch it again."
        ) from None
    finally:
        library.set_verbosity(verbosity)
    missing = sorted(info.get("missing_keys", ())) + sorted(str(key) for key in info.get("mismatched_keys", ()))
    if missing:
        raise ConfigError(
            f"the weights in {folder} do not fill the model: {missing[0]} and {len(missing) - 1} more are missing."
        )
    return cast("nn.Module", model)


_BEGINS = "begins_texts"
"""Key of an export's tokenizer_config.json: its texts began with a token before it was fitted to written prompts."""


def for_templates_(tokenizer: Any, end: int) -> None:
    """Fits a tokenizer to prompts that its chat template has written, as software for Llava reads them.

    Such software (lmms-eval's `llava_hf`) tokenises a written prompt without saying that its special tokens stand in
    it already, so the first one must not be put there twice. And it ends an answer at the tokenizer's own end, not at
    those of generation_config.json: that becomes `end`, the token which closes a turn.
    """
    if tokenizer.num_special_tokens_to_add():
        tokenizer.init_kwargs[_BEGINS] = bool(tokenizer("").input_ids[:1] == [tokenizer.bos_token_id])
        _begin_(tokenizer, False)
    if tokenizer.eos_token_id != end:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)


def for_texts_(tokenizer: Any) -> None:
    """Lets an export's tokenizer begin texts as its base model's does, for measures on texts without a template."""
    if tokenizer.init_kwargs.get(_BEGINS) is True:
        _begin_(tokenizer, True)


def _begin_(tokenizer: Any, begin: bool) -> None:
    tokenizer.add_bos_token, tokenizer.add_eos_token = begin, False
    tokenizer.init_kwargs |= {"add_bos_token": begin, "add_eos_token": False}  # what is saved


def decoder_spans(folder: Path) -> dict[str, Span]:
    """The bytes of every tensor of a folder's decoder, which is whole and of the shapes that its config.json says.

    Raises:
        ConfigError: damaged files; tensors that are missing, of another shape, quantized, or of more layers than that.
    """
    tensors = locate(decoder_tensors(folder))
    expected = expected_shapes(folder)
    family = family_of(folder)
    for name, shape in expected.items():
        if name not in tensors:
            raise ConfigError(f"the weights in {folder} lack {name}; fetch the model again.")
        if tensors[name].shape != shape:
            raise ConfigError(
                f"{name} in {folder} has shape {tensors[name].shape}, by config.json {shape}; fetch the model again."
            )
        if tensors[name].dtype not in FLOATS:
            raise ConfigError(f"{name} in {folder} is quantized ({tensors[name].dtype}); give the unquantized model.")
    beyond = [name for name in tensors if name.startswith(family.layer_prefix) and name not in expected]
    layers = {name for name in beyond if not name.endswith(".inv_freq")}  # stored by old versions, never read
    if layers:
        raise ConfigError(
            f"the weights in {folder} hold {min(layers)}, which config.json knows nothing of; fetch it again."
        )
    return {name: span for name, span in tensors.items() if name not in beyond}


HASH_VERSION = "2-"
"""How `target_hash` takes its sample, written before it."""


_EARLY_HASH = re.compile(r"[0-9a-f]{32}")


def target_hash(folder: Path, like: str = "") -> str:
    """Hash of config.json and of every tensor's name, type, shape and a sample of its bytes: 16 pieces of 4 KB.

    Tensors of up to 64 KB are read whole. It tells one model from another in no time; a change of some bytes in the
    middle of a large tensor may escape it. like: a recorded hash that this one will be compared with, and is taken as
    that one was: early versions left out the end of tensors between 4 and 64 KB.
    """
    early = _EARLY_HASH.fullmatch(like) is not None
    digest = hashlib.sha256((folder / "config.json").read_bytes())
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


def text_hashes(folder: Path) -> dict[str, str]:
    """Hashes of a folder's vocabulary and chat template; an empty text where there is none.

    Raises:
        ConfigError: a tokenizer_config.json that is damaged.
    """
    files = [folder / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")]
    vocabulary = b"".join(file.read_bytes() for file in files if file.is_file())
    template = b""
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_bytes()
    elif (path := folder / "tokenizer_config.json").is_file():
        try:
            template = json.dumps(json.loads(path.read_text(encoding="utf-8")).get("chat_template") or "").encode()
        except (ValueError, AttributeError):
            raise ConfigError(f"{path} is damaged; fetch the model again.") from None
    return {
        "tokenizer": hashlib.sha256(vocabulary).hexdigest()[:32] if vocabulary else "",
        "template": hashlib.sha256(template).hexdigest()[:32] if template else "",
    }


def relied_on(folder: Path) -> dict[str, str]:
    """Hashes of what an encoder trained against this decoder relies on: `text_hashes`, and a surrogate's `embeddings`.

    Raises:
        ConfigError: a damaged file.
    """
    found = text_hashes(folder)
    if (folder / "surrogate.json").is_file():
        found["embeddings"] = read_surrogate(folder).hashes.get("embeddings", "")
    return found
