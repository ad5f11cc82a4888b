"""Small random copies of decoders: same class, same kinds of layers, few units, on the CPU in float32.

The computation of a class does not follow from its widths. So a claim about the class (where its final norm is, whether
a cut is right) is checked on a copy with a few thousand parameters before a model of any size relies on
it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

HIDDEN, HEADS, HEAD, INNER, WORDS, EXPERTS, POSITIONS = 32, 4, 8, 32, 64, 4, 128
"""Width, heads, width of a head, inner width, vocabulary, experts and positions of a small copy."""

_WIDTHS: tuple[tuple[str, int], ...] = (
    (r"hidden_size|n_embd|d_model|n_embed|word_embed_proj_dim|embedding_size|embedding_dim|lru_width", HIDDEN),
    (r"attention_hidden_size|(moe_)?latent_size|emb_dim", HIDDEN),
    (r"(num|n)_(attention_)?heads?|num_query_heads|num_heads|(swa|global|sliding)_num_attention_heads", HEADS),
    (r"qk_head_dim", 2 * HEAD),
    (r"(\w+_)?head_dim|kv_channels|attention_head_size|attention_key_dim|v_dim", HEAD),
    (r"(\w+_)?(intermediate|inner|ffn)_(size|dim)|(\w+_)?ffn_hidden_size|ffn_dim|n_inner|d_ff|mlp_hidden_size", INNER),
    (r"(\w+_)?(vocab_size|vocab_size_per_layer_input)", WORDS),
    (r"hidden_size_per_layer_input", 8),
    (r"(kv|q|o)_lora_rank|(\w+_)?lora_rank|lora_rank_\w+", 8),
    (r"rotary_dim|time_step_rank|dt_rank|mamba_dt_rank|index_(n_heads|topk)|index_num_heads", 4),
    (r"(mamba_)?(d_state|state_size|state_dim)|ssm_state_size", 8),
    (r"mamba_(n|num)_heads|n_mamba_heads", 8),
    (r"mamba_d_(head|ssm)|mamba_headdim", 8),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads|linear_num_heads", 4),
    (r"(mamba_)?chunk_size", 8),
    (r"(\w+_)?(sliding_window(_size)?|attention_window_size|attention_chunk_size|window_size|local_attention)", 4),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq(uence)?_len(gth)?|max_seq_len", POSITIONS),
    (r"original_max_position_embeddings", POSITIONS),
)
"""Names of config entries, as patterns, each with the value of a small copy, which is never larger than the entry."""

_EXPERTS = r"(num|n)_(local_|routed_)?experts|moe_num_experts|num_routed_experts|n_routed_experts"
_CHOSEN = r"num_experts_per_tok(en)?|(moe_)?top_?k(_experts)?|experts_per_token|moe_k|num_selected_experts|moe_topk"
_GROUPS = r"(n|num)_(expert_)?groups?"
_TOKENS = r"\w+_token_id|\w+_token_ids|\w+_token_index|(pad|bos|eos|sep|cls|mask)_id"


def shrunk(config: Any, words: int | None = None) -> Any:
    """Returns a copy of a decoder's config with the same depth and the same kinds of layers, but small widths.

    words: size of the vocabulary; by default WORDS.
    """
    small = copy.deepcopy(config)
    overrides = layer_overrides(small)
    small.per_layer_config = None  # until then entries that layers override cannot be read
    names = config.attribute_map
    heads = vars(config).get(names.get("num_attention_heads", "num_attention_heads"))
    for name, value in list(vars(small).items()):
        if not name.startswith("_"):
            setattr(small, name, _small(name, value, heads))
    for name, value in (("initializer_range", 0.2), ("use_cache", False)):
        if hasattr(small, name):
            setattr(small, name, value)
    _fit_state_space(small)
    if hasattr(small, "qk_dim_factor"):  # the widths of its states are rounded up to multiples of 64, its layers' not
        small.hidden_size = small.embedding_dim = min(2 * WORDS, config.hidden_size)
    if words is not None:
        small.vocab_size = words
    if overrides:
        small.per_layer_config = {
            number: {name: _override(name, value, config, heads) for name, value in entries.items()}
            for number, entries in overrides.items()
        }
    return small


def layer_overrides(config: Any) -> dict[int, dict[str, Any]]:
    """Returns the entries that single layers have in place of the config's own, by layer."""
    spec = vars(config).get("_heterogeneity_spec")
    return {} if spec is None else {int(number): dict(entries) for number, entries in spec.per_layer_overrides.items()}


def _override(name: str, value: Any, config: Any, heads: Any) -> Any:
    """Returns the small value of an entry of one layer: twice the others' where the layer's is larger."""
    small, others = _small(name, value, heads), vars(config).get(name)
    larger = isinstance(value, int) and isinstance(others, int) and value > others > 0
    return min(value, 2 * small) if larger else small


def _small(name: str, value: Any, heads: Any) -> Any:
    """Returns the small value of one entry."""
    if isinstance(value, list):
        return [_small(name, item, heads) for item in value]
    if isinstance(value, dict):
        if name.startswith("rope"):
            return _plain_rotation(value)
        return {
            key: _small(key, item, item.get("n_head") if isinstance(item, dict) else heads)
            for key, item in value.items()
        }
    if hasattr(value, "to_dict") and hasattr(value, "model_type"):
        return shrunk(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if re.fullmatch(_TOKENS, name):
        return value if value < 0 else min(value, 3)
    if value <= 0:
        return value
    if re.fullmatch(r"(\w+_)?num_(global_)?key_value_heads|n_head_kv|num_kv_heads|n_kv_heads|kv_n_heads", name):
        return _few_heads(value, heads)
    if re.fullmatch(_EXPERTS, name):
        return min(value, EXPERTS)
    if re.fullmatch(_CHOSEN, name) or re.fullmatch(_GROUPS, name):
        return min(value, 2)
    if name == "topk_group":
        return 1
    return next((min(value, size) for pattern, size in _WIDTHS if re.fullmatch(pattern, name)), value)


def _few_heads(value: int, heads: Any) -> int:
    """Returns the number of heads with keys: one for all queries, one each, or something between, as in the model."""
    if value == 1:
        return 1
    return HEADS if value == heads else 2


def _plain_rotation(rotation: dict[str, Any]) -> dict[str, Any]:
    """Returns rotary settings without tables of factors, which would have to have the length of a head."""
    if any(isinstance(value, dict) for value in rotation.values()):
        return {k: _plain_rotation(v) if isinstance(v, dict) else v for k, v in rotation.items()}
    tables = ("rope_type", "type", "factor", "long_factor", "short_factor", "attention_factor", "mrope_section")
    kept = {key: value for key, value in rotation.items() if key not in tables and not isinstance(value, list)}
    kept["rope_theta"] = kept.get("rope_theta") or 10000.0
    if "mrope_section" in rotation:
        pairs = max(3, int(HEAD * float(rotation.get("partial_rotary_factor") or 1)) // 2)
        kept["mrope_section"] = [pairs - 2, 1, 1]
    if rotation and rotation.get("rope_type", "default") == "proportional":
        return {**kept, "rope_type": "proportional"}
    return {**kept, "rope_type": "default"} if rotation else rotation


def _fit_state_space(small: Any) -> None:
    """Makes the sizes of a state space layer fit each other: its heads share `expand` times the hidden size."""
    inner = int(getattr(small, "mamba_expand", 0) or getattr(small, "expand", 0) or 0) * HIDDEN
    if not inner:
        return
    for heads, width in (
        ("mamba_n_heads", "mamba_d_head"),
        ("mamba_num_heads", "mamba_head_dim"),
        ("n_mamba_heads", "mamba_headdim"),
    ):
        if hasattr(small, heads):
            setattr(small, heads, 4)
            if hasattr(small, width):
                setattr(small, width, inner // 4)
    if hasattr(small, "mamba_d_ssm") and small.mamba_d_ssm:
        small.mamba_d_ssm = inner
    if hasattr(small, "num_heads") and hasattr(small, "state_size") and hasattr(small, "head_dim"):
        small.num_heads, small.head_dim = 4, inner // 4
    if (
        getattr(small, "intermediate_size", None)
        and hasattr(small, "state_size")
        and not hasattr(small, "num_attention_heads")
    ):
        small.intermediate_size = inner


def position_limit(config: Any) -> int | None:
    """Returns the number of positions that a text config states; None for a decoder that reads texts of any length."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
    found = next((value for name in names if (value := getattr(config, name, None))), None)
    return found if isinstance(found, int) and found > 0 else None


def active_share(config: Any) -> float:
    """Returns the share of a layer's experts that compute a token; 1 for a decoder without experts."""
    counts = [
        next((v for k, v in vars(config).items() if re.fullmatch(pattern, k) and isinstance(v, int) and v > 0), 0)
        for pattern in (_CHOSEN, _EXPERTS)
    ]
    return counts[0] / counts[1] if all(counts) else 1.0


def is_expert(name: str) -> bool:
    """Returns whether a parameter or tensor, by its name, belongs to experts of which a router chooses."""
    return re.search(r"(^|\.)experts(\.|$)", name) is not None


def causal_class(config: Any) -> Any:
    """Returns transformers' causal LM class for a text config; None if it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        return None


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Makes random numbers inside the block follow from `seed`, and leaves those outside as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """Makes tensors inside the block real ones in float32 on the CPU, regardless of the caller's defaults."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.inference_mode(False):
            yield
    finally:
        torch.set_default_dtype(dtype)


def small_model(config: Any, *, attention: str = "eager", seed: int = 0) -> nn.Module:
    """Builds the causal LM of a small config with random weights; its class's own errors pass through.

    The class is called directly, since `from_config` would partition the model where ZeRO-3 is active.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    with seeded(seed):
        model = causal_class(config)(config).float().eval()
        for parameter in model.parameters():  # norms and gates that start at a constant would hide a wrong order
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model.requires_grad_(False)


_AUGMENTATION = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
"""Config entries with which vision encoders move rotary positions at random in training."""


def without_dropout_(model: nn.Module) -> None:
    """Switches off the dropout, and the noise on positions or the input of routers, that some models' configs ask for.

    The method uses neither. Besides, checkpoints do not store the state of random generators, so a run with dropout
    would not continue in the same way after it is resumed.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if ("dropout" in name or "jitter" in name or name == "drop_prob") and isinstance(value, float):
                setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        for name in _AUGMENTATION:
            if getattr(config, name, None) is not None:
                setattr(config, name, None)
