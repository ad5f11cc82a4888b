"""Kinds of adapters: what they compute, and how many image tokens they make, from the recipe to a graft that chats."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from math import ceil, isqrt
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from distributed_helper import run_ranks, train_all
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from zero_ds.config.loading import validate
from zero_ds.config.resume import fingerprint
from zero_ds.config.schema import MERGING, AdapterConfig, RunConfig
from zero_ds.export.remote.modeling_grafted import Adapter as ExportedAdapter
from zero_ds.grafting.chat import Conversation
from zero_ds.grafting.compatibility import compatibility
from zero_ds.grafting.load import load_graft
from zero_ds.grafting.named_model import find_model, load_model
from zero_ds.model.adapter import KINDS, Adapter, adapter_shapes
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.checkpoint.checkpoint import find_checkpoint
from zero_ds.training.resume import difference

SIZE = 48
"""Pixels of an image whose 3 x 3 patches squares of 2 x 2 do not fill."""
SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "match_embeddings": True},
    "pixel_shuffle": {"kind": "pixel_shuffle", "boundary_tokens": True},
    "pooling": {"kind": "pooling", "factor": 3},
}
TOKENS = {"linear": 9, "pixel_shuffle": 4 + 2, "pooling": 1}


# -- what they compute -------------------------------------------------------------------------------------------------


def merged(patches: torch.Tensor, size: int, kind: str) -> torch.Tensor:
    """Merges squares of patches one after the other, in reading order: (images, patches, width) -> (images, n, any)."""
    side, images = isqrt(patches.shape[1]), []
    for image in patches:
        tokens = []
        for top in range(0, side, size):
            for left in range(0, side, size):
                square = []
                for row in range(top, top + size):
                    for column in range(left, left + size):
                        if row < side and column < side:
                            square.append(image[row * side + column])
                        elif kind == "pixel_shuffle":
                            square.append(torch.zeros_like(image[0]))
                tokens.append(torch.cat(square) if kind == "pixel_shuffle" else torch.stack(square).mean(0))
        images.append(torch.stack(tokens))
    return torch.stack(images)


@given(
    side=st.integers(1, 9),
    factor=st.integers(1, 9),
    kind=st.sampled_from(MERGING),
    images=st.integers(1, 2),
    exported=st.booleans(),
)
def test_squares_are_merged_in_reading_order(side: int, factor: int, kind: str, images: int, exported: bool) -> None:
    """Every grid and factor: as a plain loop merges them, in training and in the code of exports."""
    config = AdapterConfig(kind=kind, factor=min(side, factor))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(side * 10 + factor)
    patches = torch.randn(images, side**2, 3, generator=generator)
    ours = ExportedAdapter(3, 5, kind, config.square) if exported else Adapter(3, 5, config)
    expected = merged(patches, config.square, kind)
    plain = nn.Sequential(*ours)
    torch.testing.assert_close(ours(patches), plain(expected))
    assert ours(patches).shape == (images, config.image_tokens(side**2), 5)
    assert config.image_tokens(side**2) == ceil(side / config.square) ** 2


def test_half_precision_is_rounded_once() -> None:
    """An export computes the bits of training, also at the edges of a grid that the squares do not fill."""
    patches = torch.randn(2, 25, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    for kind, factor in (("pixel_shuffle", 2), ("pooling", 2), ("pooling", 3), ("mlp", 1), ("linear", 1)):
        ours = Adapter(16, 8, AdapterConfig(kind=kind, factor=factor)).bfloat16()  # type: ignore[arg-type]
        exported = ExportedAdapter(16, 8, kind, factor).bfloat16()
        exported.load_state_dict(ours.state_dict())
        assert torch.equal(ours(patches), exported(patches))
        if kind == "pooling":
            means = merged(patches.float(), factor, kind)
            torch.testing.assert_close(KINDS[kind].merge(patches, factor).float(), means, atol=0, rtol=2**-7)  # type: ignore[misc]


def test_the_papers_adapter_is_unchanged() -> None:
    """The default: the same names, random numbers and results as Linear, GELU, Linear; nothing new in a fingerprint."""
    torch.manual_seed(3)
    ours = Adapter(6, 4)
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 4))
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    patches = torch.randn(2, 5, 6)
    assert torch.equal(ours(patches), plain(patches)) and ours.state_dict().keys() == plain.state_dict().keys()
    old = {"stage": "encoder", "adapter": {"boundary_tokens": False, "match_embeddings": False, "width": None}}
    now = {"stage": "encoder", "adapter": AdapterConfig().model_dump()}
    assert fingerprint(old) == fingerprint(now) and difference(old, now) == "no difference"
    other = {"stage": "encoder", "adapter": AdapterConfig(kind="pooling").model_dump()}
    assert fingerprint(old) != fingerprint(other) and difference(old, other) == "adapter.kind: 'mlp' -> 'pooling'"


def test_image_tokens_of_common_encoders() -> None:
    """CLIP ViT-L/14-336 has 24 x 24 patches; SigLIP so400m-384 has 27 x 27, which a factor of 2 does not divide."""
    counts = [AdapterConfig(kind="pooling", factor=factor).image_tokens(576) for factor in (1, 2, 3, 24)]
    assert counts == [576, 144, 64, 1]
    assert [AdapterConfig(kind="pixel_shuffle", factor=factor).image_tokens(729) for factor in (2, 3)] == [196, 81]
    assert AdapterConfig(kind="pixel_shuffle", boundary_tokens=True).image_tokens(576) == 146
    assert [AdapterConfig(kind=kind).image_tokens(10) for kind in ("mlp", "linear")] == [10, 10], "on any grid"
    assert AdapterConfig(kind="pooling") == AdapterConfig(kind="pooling", factor=2), "a run states its factor"
    assert set(KINDS) == set(get_args(AdapterConfig.model_fields["kind"].annotation))
    assert {name for name, kind in KINDS.items() if kind.merge} == set(MERGING)


@pytest.mark.parametrize("kind", KINDS)
def test_every_patch_and_weight_has_a_gradient(kind: str) -> None:
    config = AdapterConfig(kind=kind)  # type: ignore[arg-type]
    adapter = Adapter(6, 4, config)
    patches = torch.randn(2, 9, 6, requires_grad=True)
    adapter(patches).square().sum().backward()
    assert patches.grad is not None and bool((patches.grad.abs().sum(-1) > 0).all())
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in adapter.parameters())
    named = {f"adapter.{name}": tuple(p.shape) for name, p in adapter.named_parameters()}
    assert named == adapter_shapes(config, 6, 4)
    widths = {"mlp": 6, "linear": 6, "pixel_shuffle": 24, "pooling": 6}
    assert named["adapter.0.weight"] == (4, widths[kind]) and ("adapter.2.weight" in named) == (kind != "linear")


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"kind": "pixelshuffle"}, r"kind='pixelshuffle': .*; did you mean 'pixel_shuffle'\?$"),
        ({"kind": "poling"}, r"did you mean 'pooling'"),
        ({"kind": "resampler"}, r"input should be 'mlp', 'linear', 'pixel_shuffle' or 'pooling'\.$"),
        ({"kind": "pooling", "factor": 0}, r"factor=0: input should be greater than or equal to 1\.$"),
        ({"kind": "pooling", "factor": True}, r"factor=True: it is a number, and neither true nor false\.$"),
        ({"factor": 2}, r"adapter\.kind=mlp makes an image token of every patch, so adapter\.factor=2 has no effect"),
    ],
)
def test_wrong_settings_are_refused_in_a_sentence(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        validate(AdapterConfig, settings, what="adapter")
    assert "\n" not in str(caught.value)


def test_squares_must_fit_the_grid(made: Callable[..., Path], run_config: Callable[..., RunConfig]) -> None:
    """They are refused before weights are read, and in modules that were built elsewhere."""
    config = run_config("encoder", adapter={"kind": "pooling", "factor": 3})
    assert config.encoder is not None
    with pytest.raises(ConfigError, match=r"adapter.factor=3 is larger than .* of 2 x 2 patches; choose at most 2\."):
        build_model(ModelSpec(made("llama", tied=True), Path(config.encoder.path), config.encoder, config.adapter))
    with pytest.raises(ConfigError, match=r"vision encoder makes 10 patches of an image; choose adapter\.kind=mlp"):
        config.adapter.image_tokens(10)


# -- a run -------------------------------------------------------------------------------------------------------------


def train_and_resume(first: list[RunConfig], again: list[RunConfig]) -> list[str]:
    """Trains runs; goes on with copies of them, as a kill after the first step would have left them."""
    ends = train_all(first)
    if distributed.is_rank_zero():
        for one in again:
            source = Path(one.out.removesuffix("-again"))
            if source == Path(one.out) or not source.is_dir():
                continue
            shutil.copytree(source, one.out, ignore=shutil.ignore_patterns("step-000002"))
            (Path(one.out) / "latest").write_text("step-000001\n")
    distributed.barrier()
    return ends + train_all(again)


@pytest.fixture(scope="module")
def runs(
    run_config: Callable[..., RunConfig], made: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """Returns a folder of runs under ZeRO-3 on two ranks, and the ends of the runs that were refused."""
    root = tmp_path_factory.mktemp("kinds")
    base: dict[str, Any] = {
        "encoder": {"path": str(made("clip", size=SIZE))},
        "zero": "zero3",
        "max_steps": 2,
        "global_batch": 2,
        "checkpoint": {"every_steps": 1, "keep": 9},
    }

    def config(stage: str, name: str, kind: str, **more: Any) -> RunConfig:
        return run_config(stage, root / name, **{**base, "adapter": SETTINGS[kind], **more})

    first = [config("pretrain", kind, kind) for kind in SETTINGS]
    again = [
        config("pretrain", "pixel_shuffle-again", "pixel_shuffle"),
        config("encoder", "encoder", "pooling", init_from=[str(root / "pooling")]),
        config("encoder", "mixed", "linear", init_from=[str(root / "pooling")]),
        config("encoder", "forgotten", "pooling", init_from=[str(root / "pooling")], adapter={}),
        config("pretrain", "pooling", "pooling", adapter={**SETTINGS["pooling"], "factor": 2}),
    ]
    ends, other = run_ranks(train_and_resume, 2, first, again)
    assert ends == other and ends[:5] == ["step-000002"] * 5, ends
    return root, ends[5:]


def test_training_and_resuming(runs: tuple[Path, list[str]]) -> None:
    """Steps under ZeRO-3 on two ranks; a resumed run ends with the same bits."""
    root, _ = runs
    for kind in SETTINGS:
        before = load_file(root / kind / "step-000001" / "weights.safetensors")
        whole = load_file(root / kind / "step-000002" / "weights.safetensors")
        if kind == "pixel_shuffle":
            resumed = load_file(root / f"{kind}-again" / "step-000002" / "weights.safetensors")
            assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
        moved = [name for name in whole if name.startswith("adapter.") and not torch.equal(whole[name], before[name])]
        assert len(moved) == (2 if kind == "linear" else 4), "every tensor of the adapter learns"


def test_adapters_of_another_kind_are_refused(runs: tuple[Path, list[str]]) -> None:
    """Those of pooling and of the default have the same names and shapes, so nothing else would notice."""
    root, (mixed, forgotten, resumed) = runs
    held = "holds an adapter of the kind pooling of 3 x 3 patches, and this run has"
    assert f"{held} linear; set adapter.kind and adapter.factor as that run had them" in mixed
    assert f"{held} mlp; set adapter.kind" in forgotten
    assert "pooling holds another run (adapter.factor: 3 -> 2); choose another out=FOLDER" in resumed
    assert not (root / "mixed" / "latest").exists() and not (root / "forgotten" / "latest").exists()


def test_a_graft_chats(runs: tuple[Path, list[str]], made: Callable[..., Path], data: Path) -> None:
    """The full model takes as many tokens of an image as the surrogate did, and answers."""
    root, _ = runs
    target = made("llama", tied=True)
    for kind in SETTINGS:
        loaded = load_model(find_model(str(root / kind), str(target)))
        assert loaded.encoder.tokens_per_image == loaded.model.tokens_per_image() == TOKENS[kind]
        talk = Conversation(loaded, max_new_tokens=3)
        talk.show(str(data.parent / "images" / "0.png"))
        assert list(talk.ask("what color is it?")) is not None
        assert loaded.model.image_features(torch.rand(1, 3, SIZE, SIZE)).shape[1] == TOKENS[kind]
    checks = {check.name: check for check in compatibility(find_checkpoint(root / "encoder"), target)}
    assert (checks["adapter"].trained_with, checks["adapter"].fits) == ("pooling of 3 x 3 patches", True)


def test_a_graft_of_parts_that_do_not_belong_together(
    runs: tuple[Path, list[str]], made: Callable[..., Path], tmp_path: Path
) -> None:
    """A result that the run started from has been replaced by one with an adapter of another kind."""
    root, _ = runs
    (tmp_path / "encoder").mkdir()
    shutil.copytree(root / "encoder" / "step-000002", tmp_path / "encoder" / "step-000002")
    manifest = tmp_path / "encoder" / "step-000002" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(root / "pooling"), str(root / "pixel_shuffle")))
    match = r"adapter is pixel_shuffle of 2 x 2 patches in .*, trained with pooling of 3 x 3 patches\.$"
    with pytest.raises(ConfigError, match=match):
        load_graft(tmp_path / "encoder" / "step-000002", made("llama", tied=True))
