"""Converts the checkpoints that the paper's authors released to a run folder of zero_ds, and back.

A file written by `torch.save` holds one flat dictionary of the tensors that trained. There are two kinds:

    adapter.{0,2}.{weight,bias}           both kinds: Linear, GELU, Linear
    embd_soi, embd_eoi                    both kinds: the embeddings around an image's tokens
    encoder.vision_model.post_layernorm.* both kinds: CLIP's last norm, applied to the patch tokens
    decoder.model.layers.<k>.*            *_adapter_translator: the translator, by its layer number in the surrogate
    encoder.vision_model.*                *_surrogate-trained-encoder: CLIP, all of it or its last layers

Stage 1 makes the first kind, stage 2 the second (Table A.2). Nothing of the authors' code is used here.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zero_ds.config.loading import load_run, validate
from zero_ds.config.schema import AdapterConfig, RunConfig
from zero_ds.model.adapter import BOUNDARY
from zero_ds.model.decoders.folder import DecoderFolder, family_of_manifest
from zero_ds.model.layer_plan import LayerPlan, Replaced
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError, did_you_mean
from zero_ds.runtime.files import check_vacant, home_path
from zero_ds.runtime.hub import local_folder
from zero_ds.runtime.torch_files import read_torch_file
from zero_ds.training.blueprint import blueprint, weights_names
from zero_ds.training.checkpoint.checkpoint import Checkpoint, find_checkpoint
from zero_ds.training.checkpoint.foreign import in_pieces, write_result
from zero_ds.training.checkpoint.manifest import describe_models
from zero_ds.training.stages import Part

RELEASED = {28: Replaced(16, 26), 32: Replaced(17, 30), 80: Replaced(40, 78)}
"""Layers that a released surrogate replaces, by the depth of its target: Llama-3.2-3B, Llama-3.1-8B, or 70B."""

START, END = "embd_soi", "embd_eoi"
"""Released names of the two rows of our `BOUNDARY`, the embeddings around an image's tokens."""

VISION = "encoder.vision_model."
LAYER = re.compile(r"encoder\.vision_model\.encoder\.layers\.(\d+)\..+")
TYPES = (torch.float32, torch.bfloat16, torch.float16)

logger = logging.getLogger(__name__)

REPOSITORY = "tomg-group-umd/zero-model-checkpoints"
"""Repository on the hub with the authors' checkpoints, whose licence is CC BY-NC 4.0."""
SUFFIXES = (".pth", ".pt", ".bin")
"""Endings of files of torch.save."""


@dataclass(frozen=True)
class Named:
    """A released checkpoint that can be fetched by name."""

    name: str
    """Name on our command line."""
    stem: str
    """Name in the repository, without an ending."""
    target: str
    """Hub id of the language model that it was trained for."""

    @property
    def out(self) -> Path:
        """Folder into which it is imported unless another is named."""
        model, _, kind = self.name.partition("/")
        return Path("runs") / model / f"released-{kind}"


NAMED = {
    f"{model}/{kind}": Named(f"{model}/{kind}", f"{theirs}_{content}", f"meta-llama/{target}-Instruct")
    for model, theirs, target in (
        ("llama-3.2-3b", "llama3.2-3b", "Llama-3.2-3B"),
        ("llama-3.1-8b", "llama3.1-8b", "Llama-3.1-8B"),
        ("llama-3.1-70b", "llama3.1-70b", "Llama-3.1-70B"),
    )
    for kind, content in (("translator", "adapter_translator"), ("encoder", "surrogate-trained-encoder"))
}
"""Released checkpoints by their names here."""


# -- by name -----------------------------------------------------------------------------------------------------------


def find_named(text: str) -> Named | None:
    """Returns the released checkpoint that a text names; None if it is the path of a file.

    Raises:
        ConfigError: it is neither.
    """
    if home_path(text).is_file():
        return None
    if text in NAMED:  # also if there is a folder of that name, such as that of a recipe's runs
        return NAMED[text]
    if Path(text).suffix in SUFFIXES:
        return None  # reading it will say that it does not exist
    raise ConfigError(
        f"{text} is neither a file nor the name of a released checkpoint{did_you_mean(text, list(NAMED))}"
    )


def fetch(named: Named) -> Path:
    """Returns the file of a released checkpoint, downloaded into the hub library's cache if it is not there.

    Raises:
        ConfigError: it cannot be had, or the repository does not hold exactly one file of this name.
    """
    import huggingface_hub

    remedy = f"check the network and your access token, or give the path of {named.stem}.pth from another machine"
    try:
        folder = Path(huggingface_hub.snapshot_download(REPOSITORY, allow_patterns=[f"*{named.stem}*"]))
    except Exception as error:  # the hub client raises many types; each means that the file cannot be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{named.name} could not be fetched from {REPOSITORY} on the hub: {reason[:200].rstrip('. ')}; {remedy}."
        ) from None
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES and path.is_file()]
    found = [path for path in files if named.stem in {Path(part).stem for part in path.relative_to(folder).parts}]
    found = found or [path for path in files if named.stem in str(path.relative_to(folder))]
    if len(found) != 1:
        held = ", ".join(str(path.relative_to(folder)) for path in found) or "none"
        raise ConfigError(
            f"{REPOSITORY} holds {held} for {named.name}, where one file of torch.save is expected; {remedy}."
        )
    logger.info("%s is %s of %s; its licence is CC BY-NC 4.0", named.name, found[0].name, REPOSITORY)
    return found[0]


# -- from the released layout ------------------------------------------------------------------------------------------


def import_released(
    file: Path,
    target: str,
    out: Path,
    *,
    surrogate: str | None = None,
    encoder: str | None = None,
    init_from: Sequence[Path] = (),
) -> Path:
    """Writes a file in the released layout as the run folder `out`; returns the folder of its checkpoint.

    target, encoder: folders or hub ids of the models that the file was trained with; without `encoder`, the one in the
    recipes. surrogate: folder of the surrogate, needed unless the target has one of the depths in `RELEASED`.
    init_from: earlier results, such as the imported translator that an encoder was trained with.

    Raises:
        ConfigError: the file is damaged or has another layout; its shapes or its translator do not fit the models; a
            model does not exist and cannot be fetched; `out` exists.
        CheckpointError: a number that is not finite.
    """
    check_vacant(out)
    tensors = _read(file)
    has_translator = any(name.startswith("decoder.") for name in tensors)
    vision = [name for name in tensors if name.startswith(VISION) and "post_layernorm" not in name]
    if not has_translator and not vision:
        raise ConfigError(
            f"{file} holds neither a translator nor layers of a vision encoder, so it is not a released checkpoint."
        )
    parts: tuple[Part, ...] = ("encoder", "adapter") if vision else ("adapter",)
    if has_translator:
        parts = (*parts, "translator")
    plan = _plan(file, DecoderFolder(local_folder(target)), surrogate, needed=has_translator)
    settings: dict[str, Any] = {
        "target": target,
        "surrogate": surrogate,
        "out": str(out),
        "encoder.patch_norm": True,
        "encoder.train_last_layers": _trained_last(vision),
        "adapter.boundary_tokens": True,
        "init_from": [str(path) for path in init_from],
    }
    if encoder:
        settings["encoder.path"] = encoder
    recipe = "stages/pretrain" if has_translator else "stages/encoder"
    config = load_run(recipe, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    for earlier in config.init_from:
        find_checkpoint(earlier)
    model = blueprint(config, plan if has_translator else None)
    names = weights_names(model, parts)
    _compare(file, tensors, model, names, config)
    boundary_shape = list(tensors[START].shape)
    tensors[BOUNDARY] = torch.cat([tensors.pop(START).reshape(1, -1), tensors.pop(END).reshape(1, -1)])
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    wanted = {weights: tree for tree, weights in names.items()}
    declared = [(name, tensors[_released_name(tree)].dtype, shapes[tree]) for name, tree in wanted.items()]
    origin = {"layout": "released", "file": file.name, "boundary_shape": boundary_shape}

    def pieces(name: str) -> Iterable[torch.Tensor]:
        return in_pieces(tensors[_released_name(wanted[name])])

    return write_result(out, config, {**describe_models(config, plan), "origin": origin}, 0, declared, pieces)


def _trained_last(vision: list[str]) -> int | None:
    """Returns how many of the encoder's last layers trained; None if all of it did, the embeddings included.

    vision: names of the encoder's tensors in the file.
    """
    matches = [LAYER.fullmatch(name) for name in vision]
    layers = {int(match[1]) for match in matches if match}
    return (len(layers) or None) if all(matches) else None


def _read(file: Path) -> dict[str, torch.Tensor]:
    """Reads the file's dictionary of tensors.

    Raises:
        ConfigError: it holds something else, or tensors that are not dense or not of a type that weights have.
    """
    content = read_torch_file(file)
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{file} does not hold a dictionary of tensors, as released checkpoints do.")
    tensors = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise ConfigError(
                f"{file} holds entries that are not tensors with a name (the first: {str(name)[:60]}), so it has "
                "another layout."
            )
        if name.endswith(".position_ids"):  # numbers, which older versions of the library stored
            continue
        if tensor.dtype not in TYPES:
            raise ConfigError(f"{name} in {file} is {tensor.dtype}; weights are float32, bfloat16 or float16.")
        tensors[name] = tensor
    return tensors


def _plan(file: Path, target: DecoderFolder, surrogate: str | None, needed: bool) -> LayerPlan | None:
    """Returns how the surrogate was cut: as its folder says, or as in the paper.

    Raises:
        ConfigError: a plan is `needed` and not known, or the surrogate was cut from another model.
    """
    if surrogate is not None:
        folder = DecoderFolder(local_folder(surrogate))
        if folder.surrogate is None:
            raise ConfigError(f"{surrogate} is not a surrogate; make one with zero-ds surrogate.")
        if folder.surrogate.target_hash != target.hash(like=folder.surrogate.target_hash):
            raise ConfigError(f"{surrogate} was cut from another model than {target}; name its own --target.")
        return folder.surrogate.plan
    depth = target.depth
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
    """Returns a parameter's name in the released layout, from its name in our module tree."""
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
    """Checks that the file has exactly the parameters `names` of the model, in its shapes.

    Raises:
        ConfigError: it does not.
    """
    assert config.encoder is not None
    shapes = {_released_name(tree): tuple(p.shape) for tree, p in model.named_parameters() if tree in names}
    width = shapes.pop(BOUNDARY)[1]
    expected = {*shapes, START, END}
    prefix = re.compile(re.escape(f"decoder.{model.family.layer_prefix}") + r"(\d+)\.")
    held = sorted({int(match[1]) for name in tensors if (match := prefix.match(name))})
    if model.plan is not None and held and held != model.plan.translators:
        raise ConfigError(
            f"{file} holds decoder layers {held}, and {model.plan} has its translators at {model.plan.translators}; "
            "name the --target and --surrogate that it was trained with."
        )
    if missing := sorted(expected - set(tensors)):
        raise ConfigError(
            f"{file} lacks {missing[0]} (and {len(missing) - 1} more), so it is not in the released layout."
        )
    models = f"{config.target} and {config.encoder.path}"
    if unknown := sorted(set(tensors) - expected):
        raise ConfigError(
            f"{file} holds {unknown[0]} (and {len(unknown) - 1} more), for which {models} have no place; name the "
            "models that it was trained with."
        )
    for name in sorted(shapes):
        if tuple(tensors[name].shape) != shapes[name]:
            raise ConfigError(
                f"{name} in {file} has shape {tuple(tensors[name].shape)}; with {models} it is {shapes[name]}: name "
                "the models that it was trained with."
            )
    start, end = tensors[START], tensors[END]
    if start.shape != end.shape or start.dtype != end.dtype or start.shape[-1:] != (width,) or start.numel() != width:
        raise ConfigError(
            f"{START} and {END} in {file} have shapes {tuple(start.shape)} and {tuple(end.shape)}; {config.target} "
            f"needs ({width},) for both, in one type."
        )


# -- and back ----------------------------------------------------------------------------------------------------------


def to_released(weights: Path, out: Path) -> int:
    """Writes a run's weights as the new file `out` in the released layout; returns the number of tensors.

    An imported checkpoint becomes a file with the original's tensors, byte for byte.

    Raises:
        ConfigError: the model lacks parts of the layout, or has parts that it has no name for; `out` exists.
        CheckpointError: the checkpoint does not exist or is damaged.
    """
    if out.exists():
        raise ConfigError(f"{out} already exists; choose another --out or remove it.")
    checkpoint = find_checkpoint(weights)
    config = validate(RunConfig, checkpoint.manifest.get("config"), what=f"manifest of {checkpoint.folder}")
    if config.encoder is None or not (config.encoder.patch_norm and config.adapter.boundary_tokens):
        raise ConfigError(
            f"{checkpoint.folder} was trained without encoder.patch_norm and adapter.boundary_tokens, which the "
            "released layout cannot express; use zero-ds export."
        )
    if config.adapter.kind != AdapterConfig().kind:
        raise ConfigError(
            f"{checkpoint.folder} was trained with adapter.kind={config.adapter.kind}, for which the released layout "
            "has no place; use zero-ds export."
        )
    checkpoint.check_weights()
    shape = checkpoint.manifest.get("origin", {}).get("boundary_shape", [-1])
    tensors: dict[str, torch.Tensor] = {}
    with checkpoint.open_weights() as held:
        for name in held.keys():  # noqa: SIM118 - it is not a mapping
            if name == BOUNDARY:
                start, end = held.get_tensor(name)
                # as copies; two views of one storage would each be saved with all of it
                tensors[START], tensors[END] = start.reshape(shape).clone(), end.reshape(shape).clone()
            else:
                tensors[_name_outside(name, checkpoint)] = held.get_tensor(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name[:100]}.", dir=out.parent) as scratch:
        torch.save(tensors, Path(scratch) / out.name)
        (Path(scratch) / out.name).rename(out)
    return len(tensors)


def _name_outside(name: str, checkpoint: Checkpoint) -> str:
    """Returns a weight's name in the released layout.

    Raises:
        ConfigError: the layout has no name for it.
    """
    part, _, rest = name.partition(".")
    plan = checkpoint.manifest.get("plan")
    if part == "translator" and plan:
        number, _, inner = rest.partition(".")
        family = family_of_manifest(checkpoint.manifest)
        return f"decoder.{family.layer_prefix}{LayerPlan.from_json(plan).translators[int(number)]}.{inner}"
    if part not in ("encoder", "adapter"):
        raise ConfigError(f"{checkpoint.folder} holds {name}, for which the released layout has no place.")
    return _released_name(name)
