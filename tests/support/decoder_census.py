"""Carries a tiny random model of any type through the method: cut, trajectory, gradients, graft, export with its proof.

`tools/census.py` does so for every causal LM of the installed transformers, and a test for some unlike types.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch

from zero_ds.config.schema import RunConfig
from zero_ds.data.conversations import IMAGE_TOKEN
from zero_ds.grafting.load import load_graft
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.decoders import listing, registered
from zero_ds.model.decoders.cut import layers_skipped
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.decoders.listing import ONLY_WITH, default_config
from zero_ds.model.decoders.shrink import causal_class, seeded, shrunk
from zero_ds.model.layer_plan import Replaced
from zero_ds.runtime.errors import ConfigError
from zero_ds.surrogate.build import build_surrogate
from zero_ds.training.stages import freeze_
from zero_ds.trajectory.lens import check_lens
from zero_ds.trajectory.metrics import METRICS
from zero_ds.trajectory.resident import measure_resident
from zero_ds.trajectory.streaming import measure_streamed
from zero_ds.trajectory.texts import TokenSample


def write_model(model_type: str, out: Path, *, tied: bool | None = None) -> None:
    """Writes a tiny random model of a type with the defaults of its class, and a tokenizer."""
    config = default_config(model_type)
    known = registered(config.model_type)
    words = tiny.tokenizer(known.image_tokens[:1]) if known and known.image_tokens else tiny.tokenizer()
    for name, value in ONLY_WITH.get(model_type, {}).items():
        setattr(config, name, value)
    config = shrunk(config, words=len(words))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(words, name))
    config.use_cache = True
    for name in ("max_position_embeddings", "max_seq_len"):
        if hasattr(config, name):
            setattr(config, name, 1024)  # more than any sample has
    if hasattr(config, "initializer_range"):
        config.initializer_range = 0.1  # larger logits would lose digits
    if tied is not None:
        config.tie_word_embeddings = tied
    with seeded(0):
        model = causal_class(config)(config).float().eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
        model.save_pretrained(out)
    words.save_pretrained(out)


def check_surrogate(target: Path, out: Path) -> Path:
    """Cuts three layers to one; the surrogate must equal the target with the other two left out."""
    folder = DecoderFolder(target)
    replaced = Replaced(folder.depth // 3, folder.depth // 3 + 2)
    build_surrogate(folder, [replaced], out)
    surrogate = DecoderFolder(out)
    assert surrogate.spans.keys() == surrogate.expected_shapes.keys()
    ids = torch.arange(5, 45).view(2, 20)
    whole, small = (one.load(dtype=torch.float32).eval() for one in (folder, surrogate))
    with torch.no_grad():
        with layers_skipped(folder.family.layers(whole), {replaced.first + 1, replaced.last}):
            expected = whole(input_ids=ids, use_cache=False).logits
        seen = small(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)
    assert (expected - whole(input_ids=ids, use_cache=False).logits).abs().max() > 1e-4, "the layers do something"
    return out


def check_trajectory(target: Path, scratch: Path) -> None:
    """The curves of the model in memory must be those of one layer after the other."""
    rng = np.random.default_rng(0)
    samples = [TokenSample(f"s{n}", rng.integers(4, 250, size=n).tolist()) for n in (2, 9, 17, 30)]
    folder = DecoderFolder(target)
    decoder = folder.load(dtype=torch.float32).eval()
    check_lens(decoder, folder.family, samples[-1])
    scratch.mkdir(parents=True, exist_ok=True)
    for metric in METRICS.values():
        resident = measure_resident(decoder, folder.family, samples, metric=metric, batch_size=3)
        streamed = measure_streamed(
            folder,
            samples,
            metric=metric,
            batch_size=3,
            dtype=torch.float32,
            device=torch.device("cpu"),
            scratch=scratch,
        )
        np.testing.assert_allclose(streamed, resident, rtol=1e-4, atol=1e-6)


def check_gradients(config: RunConfig) -> None:
    """A loss on text after an image must reach every parameter of the adapter through the surrogate."""
    assert config.encoder is not None and config.surrogate is not None
    model = build_model(ModelSpec(Path(config.surrogate), Path(config.encoder.path), config.encoder, config.adapter))
    freeze_(model, config)
    count = model.tokens_per_image()
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * count, 9, 11, 12, 13]])
    labels = torch.tensor([[-100] * (count + 2) + [11, 12, 13]])
    pixels = torch.rand(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    model(ids, labels, torch.ones_like(ids), pixels).total.backward()
    for name, parameter in model.parameters_of("adapter"):
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def check_graft(run: Path, target: Path) -> None:
    """The graft on the full model must see the image."""
    grafted = load_graft(run, target)
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * grafted.tokens_per_image(), 9, 11]])
    pixels = torch.rand(2, 1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = [grafted.logits(grafted.hidden_states(ids, torch.ones_like(ids), one)) for one in pixels]
    assert torch.isfinite(seen[0]).all() and (seen[0] - seen[1])[:, -1].abs().max() > 1e-6


STEPS = tuple(listing.STEPS)[:-1]
"""Names of the proofs on one rank, in their order."""


def prove(model_type: str, work: Path, run_config: Callable[..., RunConfig], note: Callable[[str], None]) -> None:
    """Carries a type through all of STEPS and calls `note` after each; the first that fails raises.

    run_config: makes the config of a run of the encoder stage from changes, as the fixture of that name does.
    """
    import export_helper

    from zero_ds.export import export_model

    target = work / "target"
    write_model(model_type, target)
    note("model")
    surrogate = check_surrogate(target, work / "surrogate")
    note("surrogate")
    check_trajectory(target, work / "scratch")
    note("trajectory")
    models = {"target": str(target), "surrogate": str(surrogate), "decoder": "surrogate"}
    config = run_config("encoder", work / "run", **models)
    check_gradients(config)
    note("gradients")
    run = export_helper.write_run(config, surrogate)
    check_graft(run, target)
    note("graft")
    proof: dict[str, Any] = export_model(run, None, work / "export")
    assert proof["largest_logit_difference"] <= 1e-5
    note("export")


def step_under_zero3(work: Path, run_config: Callable[..., RunConfig]) -> None:
    """Trains a step of the encoder and of the pretrain stage on the surrogate of `prove`, on two ranks under ZeRO-3."""
    from distributed_helper import run_ranks, train_all

    models = {"target": str(work / "target"), "surrogate": str(work / "surrogate")}
    stages = ("encoder", "pretrain")
    configs = [run_config(stage, work / f"zero3-{stage}", max_steps=1, zero="zero3", **models) for stage in stages]
    ends = run_ranks(train_all, 2, configs)
    wrong = [end for end in ends[0] if not end.startswith("step-")]
    if wrong:
        raise ConfigError(f"under ZeRO-3: {wrong[0].removeprefix('ConfigError: ')}")
    assert ends == [["step-000001"] * 2] * 2, ends


def quick_proofs() -> None:
    """Makes exports prove themselves in this process with two questions, since a new one spends its time on imports."""
    import export_helper
    import pytest

    export_helper.here(pytest.MonkeyPatch())
