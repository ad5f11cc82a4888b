"""The parts of DeepSpeed's ZeRO-3 that are not public, in one place. Tested with DeepSpeed 0.19.

A partitioned parameter has attributes `ds_*`. Every use of them, and every patch of or call into DeepSpeed's ZeRO-3
internals, is in this file, so this is the one to check against a new version of DeepSpeed. The internals of optimizers,
which exist in all ZeRO stages, are in training/checkpoint/optimizer_state.py.

Outside a forward or backward pass a partitioned parameter is empty. Each rank holds one of `world_size` equal parts
of its flattened elements, the last of them padded.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn

# -- loading and gathering ---------------------------------------------------------------------------------------------


def zero_init() -> Any:
    """Returns a context that partitions new modules as they are created; without ZeRO-3 it has no effect."""
    from transformers.integrations import deepspeed as integration

    if not integration.is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    import deepspeed

    # the config names the dtype; a dtype argument would be replaced by bf16 on accelerators without fp16
    return deepspeed.zero.Init(config_dict_or_path=integration.deepspeed_config())


def partition_(module: nn.Module) -> None:
    """Partitions those parameters of a module that are still whole on every rank; without ZeRO-3 it has no effect."""
    from transformers.integrations import deepspeed as integration

    if integration.is_deepspeed_zero3_enabled():
        import deepspeed

        deepspeed.zero.Init(module=module, config_dict_or_path=integration.deepspeed_config())


@contextlib.contextmanager
def loads_as_without_zero3() -> Iterator[None]:
    """Makes transformers' loader for ZeRO-3 do what its other loader does; has no effect without ZeRO-3.

    Some classes rename the tensors of published files. The other loader leaves a name alone if the class has it
    already; the one for ZeRO-3 renames it nevertheless, and finds no place for the tensor. Besides, it initializes
    modules that it has filled, whose partitioned weights have no shape that a class could look at.
    """
    from transformers.integrations import deepspeed as integration

    if not integration.is_deepspeed_zero3_enabled():
        yield
        return
    from transformers import PreTrainedModel
    from transformers import core_model_loading as loading

    library: Any = loading
    rename, initialize = library.rename_source_key, PreTrainedModel._initialize_missing_keys

    def rename_once(source_key: str, *arguments: Any, **keywords: Any) -> tuple[str, str | None]:
        renamed, pattern = rename(source_key, *arguments, **keywords)
        names = keywords.get("meta_state_dict")
        if names is None or renamed in names:
            return renamed, pattern
        prefix = keywords.get("base_model_prefix")
        unchanged, _ = rename(source_key, [], [], base_model_prefix=prefix, meta_state_dict=names)
        return (unchanged, None) if unchanged in names else (renamed, pattern)

    def initialize_empty(model: Any, is_quantized: bool) -> None:
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            filled = bool(own) and all(getattr(parameter, "_is_hf_initialized", False) for parameter in own)
            if filled and not any(True for _ in module.buffers(recurse=False)):
                cast(Any, module)._is_hf_initialized = True
        initialize(model, is_quantized)

    library.rename_source_key = rename_once
    cast(Any, PreTrainedModel)._initialize_missing_keys = initialize_empty
    try:
        yield
    finally:
        library.rename_source_key = rename
        cast(Any, PreTrainedModel)._initialize_missing_keys = initialize


def gathered(parameters: Iterable[nn.Parameter], modifier_rank: int | None = None) -> Any:
    """Returns a context in which every rank holds the given parameters whole. A collective under ZeRO-3.

    modifier_rank: if this is 0, all ranks receive the changes that rank 0 makes to the parameters inside the context.
    """
    parameters = [p for p in parameters if is_partitioned(p)]
    if not parameters:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)


# -- partitioned parameters --------------------------------------------------------------------------------------------


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Returns whether ZeRO-3 manages the parameter."""
    return hasattr(parameter, "ds_id")


def is_always_whole(parameter: nn.Parameter) -> bool:
    """Returns whether ZeRO-3 keeps the parameter whole on every rank during a step, because it is small."""
    return bool(getattr(parameter, "ds_persist", False))


def parameter_shape(parameter: nn.Parameter) -> torch.Size:
    """Returns the shape of the whole parameter, even when ZeRO-3 holds only a part of it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def held_part(parameter: nn.Parameter) -> torch.Tensor:
    """Returns the elements that this rank holds: its padded part or, without ZeRO-3, the parameter itself."""
    return cast(torch.Tensor, getattr(parameter, "ds_tensor", parameter))


def live_elements(parameter: nn.Parameter, start: int, count: int) -> torch.Tensor:
    """Returns elements of the flattened parameter that this rank computes with: (count,).

    start, count: within the rank's own part of a partitioned parameter. A collective where the parameter is swapped out
    to a disk, which gathers it.
    """
    if not is_partitioned(parameter):
        return parameter.detach().flatten()[start : start + count]
    if held_part(parameter).numel() == part_size(parameter):
        return held_part(parameter).detach().flatten()[:count]
    with gathered([parameter]):
        return parameter.detach().flatten()[start : start + count].clone()


def part_size(parameter: nn.Parameter) -> int:
    """Returns the number of elements in each rank's part of a partitioned parameter, padding included.

    While a part is swapped out to disk, its own numel() is 1.
    """
    return int(cast(Any, parameter).ds_tensor.ds_numel)


# -- changes to what DeepSpeed does ------------------------------------------------------------------------------------


def allow_two_models_under_hpz() -> None:
    """Lets ZeRO-3 create its hpZ process groups more than once.

    DeepSpeed creates the groups each time a model is loaded and fails the second time. This package loads two models:
    the decoder, then the vision encoder.
    """
    from deepspeed.utils import groups

    create = groups._create_zero_param_parallel_group
    created: set[int] = set()

    def create_once(group_size: int) -> None:
        if group_size not in created:
            create(group_size)
            created.add(group_size)

    groups._create_zero_param_parallel_group = create_once


def begin_swapping() -> None:
    """Prepares DeepSpeed (0.19) for a run that may swap to a disk, before its first model is loaded.

    DeepSpeed makes a swapper of parameters for each model, and each begins with deleting the folder in which those
    before it have put theirs. This package loads several models, the decoder, the vision encoder, a teacher: they get
    one swapper, a new one for each run.
    """
    from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper
    from deepspeed.runtime.zero import partition_parameters

    made: dict[torch.dtype, Any] = {}

    def the_one(ds: Any, dtype: torch.dtype) -> Any:
        if dtype not in made:
            made[dtype] = AsyncPartitionedParameterSwapper(ds, dtype)
        return made[dtype]

    partition_parameters.AsyncPartitionedParameterSwapper = the_one
    OptimizerSwapper._adjust_for_misaligned_lengths = _aligned_pieces


def _aligned_pieces(
    swapper: Any, tensors: Sequence[torch.Tensor], offsets: Sequence[int]
) -> tuple[list[torch.Tensor], list[int]]:
    """Returns gradients, and their offsets in a sub-group's buffer, in pieces that can be read back from a disk.

    A disk is read into addresses that are multiples of its blocks. DeepSpeed looks at the lengths of gradients alone;
    where one begins at another address, reading it back fails without an error, and the update uses what was in the
    buffer before. Pieces that are too short to be swapped stay in memory.
    """
    pieces: list[tuple[torch.Tensor, int]] = []
    for tensor, offset in zip(tensors, offsets, strict=True):
        begin = min(-offset % swapper.numel_alignment, tensor.numel())
        end = tensor.numel() - (tensor.numel() - begin) % swapper.numel_alignment
        ends = (0, begin, end, tensor.numel())
        pieces += [(tensor[a:b], offset + a) for a, b in itertools.pairwise(ends) if a < b]
    return [piece for piece, _ in pieces], [offset for _, offset in pieces]


def without_prefetch_from_disk_(optimizer: Any) -> None:
    """Makes ZeRO-3 read parameters from a disk when they are needed, and none ahead of time.

    DeepSpeed (0.19) does not release the buffers of parameters that it has read and not used by the time that the
    optimizer changes them: the next step fails, because they have a buffer already.
    """
    if hasattr(optimizer, "parameter_offload"):
        coordinator = optimizer.parameter_offload.get_param_coordinator()
        coordinator._PartitionedParameterCoordinator__prefetch_nvme = False


def without_leaf_classes(ds: dict[str, Any]) -> dict[str, Any]:
    """Returns a DeepSpeed configuration without the classes that DeepSpeed treats as one unit of its own accord.

    They are blocks of experts of three model types. A unit that trains may run only once in a forward pass: after each
    run DeepSpeed reduces the gradients of all its parameters, and the second time it finds them in its bucket already.
    """
    leaves: dict[str, list[str]] = {"classes": [], "names": [], "name_suffixes": []}
    return {**ds, "zero_optimization": {**ds["zero_optimization"], "leaf_module": leaves}}


def layers_as_leaves_(
    model: nn.Module, layers: Sequence[nn.Module], *, trained: bool, run_twice: bool = False
) -> list[nn.Module]:
    """Makes ZeRO-3 treat each decoder layer as one unit, with hooks around the layer and not around each of its parts.

    Applies to every module in `model` of the layers' types, so it includes the layers of a teacher in distillation.
    Layers that train become units only if `trained` is set: when the input of a leaf module has no gradient, DeepSpeed
    releases the module before the gradients of its weights exist. Inside a layer that trains, experts and their router
    become a unit, as DeepSpeed asks for: ranks choose different experts, and would wait for each other. Experts in one
    tensor need no unit, and get none in layers that run twice in a forward pass (`run_twice`). Returns those of
    `layers` that are now units.
    """
    from deepspeed.utils import set_z3_leaf_modules_by_name

    kinds = tuple({type(layer) for layer in layers})
    units = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    if not trained:
        units = {n: layer for n, layer in units.items() if not any(p.requires_grad for p in layer.parameters())}
    whole = tuple(f"{name}." for name in units)
    experts = [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "experts", None), nn.ModuleList if run_twice else nn.Module)
        and not f"{name}.".startswith(whole)
    ]
    if units or experts:  # a model of word embeddings has neither
        set_z3_leaf_modules_by_name(model, [*units, *experts])
    for name in experts:
        model.get_submodule(name).register_forward_pre_hook(_first_by_position, with_kwargs=True)
    return [layer for layer in layers if layer in units.values()]


def _first_by_position(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Passes the first argument of a unit by position, where a class passes it by its name.

    Hooks on the gradient of a module's inputs see positional ones alone. Without any, DeepSpeed releases the unit
    before the gradients of its weights exist.
    """
    first = next(iter(inspect.signature(module.forward).parameters), "")
    if inputs or first not in keywords:
        return None
    return (keywords[first],), {name: value for name, value in keywords.items() if name != first}


def keep_frozen_whole_(optimizer: Any, model: nn.Module) -> None:
    """Makes DeepSpeed's optimizer keep frozen persistent parameters whole between steps; other stages are unaffected.

    ZeRO-3 releases every parameter before the update and gathers the persistent ones again after it. For frozen
    parameters, which the update does not change, this is wasted work. If every parameter is persistent, ZeRO-3 gathers
    the whole model again in every step.
    """
    persistent = getattr(optimizer, "persistent_parameters", None)
    if not persistent or not hasattr(optimizer, "_partition_all_parameters"):
        return
    kept = [p for p in persistent if not p.requires_grad]
    kept_ids = {id(p) for p in kept}
    released: Any = nn.ParameterList([p for p in model.parameters() if id(p) not in kept_ids])
    released.ds_external_parameters = dict[str, nn.Parameter]().items  # DeepSpeed asks every module for these
    coordinator = optimizer.parameter_offload.get_param_coordinator()

    def release() -> None:
        for parameter in kept:
            parameter.ds_active_sub_modules.clear()
        coordinator.release_and_reset_all(released)

    optimizer.persistent_parameters = [p for p in persistent if p.requires_grad]
    optimizer._partition_all_parameters = release
