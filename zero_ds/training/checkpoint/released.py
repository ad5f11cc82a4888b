"""The checkpoints that the paper's authors released: their layout -> a result folder of ours, and back.

A file of `torch.save` holds one flat dictionary of the tensors that trained, in one of two kinds:

    adapter.{0,2}.{weight,bias}           both kinds: Linear, GELU, Linear
    embd_soi, embd_eoi                    both kinds: the embeddings around an image's tokens
    encoder.vision_model.post_layernorm.* both kinds: CLIP's last norm, applied to the patch tokens
    decoder.model.layers.<k>.*            *_adapter_translator: the translator, by its layer number in the surrogate
    encoder.vision_model.*                *_surrogate-trained-encoder: CLIP, all of it or its last layers

Stage 1 makes the first kind, stage 2 the second (Table A.2). Nothing of the authors' code is used here.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from zero_ds.config.loading import load_run, validate
from zero_ds.config.schema import RunConfig
from zero_ds.model.adapter import BOUNDARY
from zero_ds.model.decoders import FAMILIES
from zero_ds.model.decoders.folder import depth_of
from zero_ds.model.layer_plan import LayerPlan, Replaced, read_surrogate
from zero_ds.model.loading import model_hash
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import check_vacant
from zero_ds.runtime.hub import local_folder
from zero_ds.runtime.torch_files import read_torch_file
from zero_ds.training.blueprint import blueprint, weights_names
from zero_ds.training.checkpoint.checkpoint import Checkpoint, check_hash, find_checkpoint
from zero_ds.training.checkpoint.foreign import identity, in_pieces, write_result
from zero_ds.training.stages import Part

RELEASED = {28: Replaced(16, 26), 32: Replaced(17, 30), 80: Replaced(40, 78)}
"""Depth of the target -> the layers that its released surrogate replaces: Llama-3.2-3B, Llama-3.1-8B, Llama-3.1-70B."""

START, END = "embd_soi", "embd_eoi"
VISION, LAYER = "encoder.vision_model.", re.compile(r"encoder\.vision_model\.encoder\.layers\.(\d+)\..+")
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def import_released(
    file: Path,
    target: str,
    out: Path,
    *,
    surrogate: str | None = None,
    encoder: str | None = None,
    init_from: Sequence[Path] = (),
) -> Path:
    """Writes a file in the released layout as the result folder `out`; returns its commit.

    target, encoder: folders or hub ids of the models that the file was trained with; the encoder is the recipes' own if
    left out. surrogate: folder of the surrogate, which is needed where the target is none of the three released for.
    init_from: earlier results, such as the imported translator of an encoder.

    Raises:
        ConfigError: a file that is none, damaged or of another layout; other widths or another translator than the
            models'; a model that is not there and cannot be fetched; `out` exists.
        CheckpointError: a number that is not finite.
    """
    check_vacant(out)
    tensors = _read(file)
    translated = any(name.startswith("decoder.") for name in tensors)
    vision = [name for name in tensors if name.startswith(VISION) and "post_layernorm" not in name]
    layers = {int(match[1]) for name in vision if (match := LAYER.fullmatch(name))}
    last = len(layers) if all(LAYER.fullmatch(name) for name in vision) else None  # else embeddings, too: all of it
    if not translated and not vision:
        raise ConfigError(f"{file} holds neither a translator nor encoder layers, so it is no released checkpoint.")
    parts: tuple[Part, ...] = ("encoder", "adapter") if vision else ("adapter",)
    if translated:
        parts = (*parts, "translator")
    folder = local_folder(target)
    plan = _plan(file, folder, surrogate, needed=translated)
    settings: dict[str, Any] = {
        "target": target,
        "surrogate": surrogate,
        "out": str(out),
        "encoder.patch_norm": True,
        "encoder.train_last_layers": last or None,
        "adapter.boundary_tokens": True,
        "init_from": [str(path) for path in init_from],
        **({"encoder.path": encoder} if encoder else {}),
    }
    recipe = "stages/pretrain" if translated else "stages/encoder"
    config = load_run(recipe, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    for earlier in config.init_from:
        find_checkpoint(earlier)
    model = blueprint(config, plan if translated else None)
    names = weights_names(model, parts)
    _compare(file, tensors, model, names, config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    wanted = {weights: tree for tree, weights in names.items()}
    both = torch.cat([tensors[START].reshape(1, -1), tensors[END].reshape(1, -1)])

    def pieces(name: str) -> Iterable[torch.Tensor]:
        tree = wanted[name]
        return in_pieces(both if tree == BOUNDARY else tensors[_released_name(tree)])

    declared = [
        (name, (both if tree == BOUNDARY else tensors[_released_name(tree)]).dtype, shapes[tree])
        for name, tree in wanted.items()
    ]
    origin = {"layout": "released", "file": file.name, "boundary_shape": list(tensors[START].shape)}
    return write_result(out, config, {**identity(config, plan), "origin": origin}, 0, declared, pieces)


def _read(file: Path) -> dict[str, torch.Tensor]:
    """The file's dictionary, which holds dense tensors of a type that weights have, and nothing else."""
    content = read_torch_file(file)
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{file} holds no dictionary of tensors; a released checkpoint is one.")
    tensors = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise ConfigError(
                f"{file} holds more than tensors by name (first: {str(name)[:60]}); it is another layout."
            )
        if name.endswith(".position_ids"):  # numbers, which older versions of the library stored
            continue
        if tensor.dtype not in TYPES:
            raise ConfigError(f"{name} in {file} is {tensor.dtype}; weights are float32, bfloat16 or float16.")
        tensors[name] = tensor
    return tensors


def _plan(file: Path, target: Path, surrogate: str | None, needed: bool) -> LayerPlan | None:
    """How the surrogate was cut: as its folder says, or, for the three released ones, as the paper does."""
    depth = depth_of(target)
    if surrogate is not None:
        info = read_surrogate(local_folder(surrogate))
        if info.target_hash != model_hash(target, like=info.target_hash):
            raise ConfigError(f"{surrogate} was cut from another model than {target}; name its own --target.")
        return info.plan
    if depth in RELEASED:
        return LayerPlan(depth, (RELEASED[depth],))
    if needed:
        known = ", ".join(f"{layers} layers ({LayerPlan(layers, (part,))})" for layers, part in RELEASED.items())
        raise ConfigError(
            f"{file} holds a translator, and {target} has {depth} layers, for which no surrogate was released "
            f"({known}); name --surrogate FOLDER."
        )
    return None


def _released_name(tree: str) -> str:
    """A parameter's name in the released layout, by its name in our module tree."""
    if tree.startswith("encoder."):
        return VISION + tree.removeprefix("encoder.").removeprefix("vision_model.")
    return tree


def _compare(
    file: Path,
    tensors: dict[str, torch.Tensor],
    model: VisionLanguageModel,
    names: dict[str, str],
    config: RunConfig,
) -> None:
    """Refuses a file that has not exactly these parameters in the model's shapes."""
    assert config.encoder is not None
    shapes = {_released_name(tree): tuple(p.shape) for tree, p in model.named_parameters() if tree in names}
    width = shapes.pop(BOUNDARY)[1]
    expected = {*shapes, START, END}
    prefix = f"decoder.{model.family.layer_prefix}"
    held = sorted({int(m[1]) for name in tensors if (m := re.match(re.escape(prefix) + r"(\d+)\.", name))})
    if model.plan is not None and held and held != model.plan.translators:
        raise ConfigError(
            f"{file} holds decoder layers {held}, and {model.plan} has its translators at {model.plan.translators}; "
            "name the --target and --surrogate that it was trained with."
        )
    if missing := sorted(expected - set(tensors)):
        raise ConfigError(
            f"{file} lacks {missing[0]} (and {len(missing) - 1} more), so it is not in the released layout."
        )
    if unknown := sorted(set(tensors) - expected):
        raise ConfigError(
            f"{file} holds {unknown[0]} (and {len(unknown) - 1} more), for which {config.target} and "
            f"{config.encoder.path} have no place; name the models that it was trained with."
        )
    for name in sorted(shapes):
        if tuple(tensors[name].shape) != shapes[name]:
            raise ConfigError(
                f"{name} in {file} has shape {tuple(tensors[name].shape)}; with {config.target} and "
                f"{config.encoder.path} it is {shapes[name]}: name the models that it was trained with."
            )
    start, end = tensors[START], tensors[END]
    if start.shape != end.shape or start.dtype != end.dtype or start.shape[-1:] != (width,) or start.numel() != width:
        raise ConfigError(
            f"{START} and {END} in {file} have shapes {tuple(start.shape)} and {tuple(end.shape)}; {config.target} "
            f"needs ({width},) for both, in one type."
        )


# -- and back ----------------------------------------------------------------------------------------------------------


def to_released(weights: Path, out: Path) -> int:
    """Writes a result of ours as the new file `out` in the released layout; returns the number of tensors.

    The file of an imported checkpoint has the original's tensors, to the byte.

    Raises:
        ConfigError: a model without the layout's parts, or with parts that it has no name for; `out` exists.
        CheckpointError: no result, or a damaged one.
    """
    from safetensors import safe_open

    if out.exists():
        raise ConfigError(f"{out} already exists; choose another --out or remove it.")
    commit = find_checkpoint(weights)
    config = validate(RunConfig, commit.manifest.get("config"), what=f"manifest of {commit.folder}")
    if config.encoder is None or not (config.encoder.patch_norm and config.adapter.boundary_tokens):
        raise ConfigError(
            f"{commit.folder} was trained without encoder.patch_norm and adapter.boundary_tokens, which the released "
            "layout cannot say; use zero-ds export."
        )
    path = commit.folder / "weights.safetensors"
    check_hash(path, str(commit.manifest.get("weights_sha256")))
    shape = commit.manifest.get("origin", {}).get("boundary_shape", [-1])
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(path, framework="pt") as held:
        for name in held.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            if name == BOUNDARY:
                start, end = held.get_tensor(name)
                # of their own, or the file would hold both twice
                tensors[START], tensors[END] = start.reshape(shape).clone(), end.reshape(shape).clone()
            else:
                tensors[_name_outside(name, commit)] = held.get_tensor(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name[:100]}.", dir=out.parent) as scratch:
        torch.save(tensors, Path(scratch) / out.name)
        (Path(scratch) / out.name).rename(out)
    return len(tensors)


def _name_outside(name: str, commit: Checkpoint) -> str:
    """A weight's name in the released layout."""
    part, _, rest = name.partition(".")
    plan = commit.manifest.get("plan")
    if part == "translator" and plan:
        number, _, inner = rest.partition(".")
        family = FAMILIES[str(commit.manifest["family"])]
        return f"decoder.{family.layer_prefix}{LayerPlan.from_json(plan).translators[int(number)]}.{inner}"
    if part not in ("encoder", "adapter"):
        raise ConfigError(f"{commit.folder} holds {name}, for which the released layout has no place.")
    return _released_name(name)
