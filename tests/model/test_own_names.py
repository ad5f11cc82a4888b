"""A decoder family whose parts have other names than Llama's is described by one module, and everything follows.

GPT-NeoX is not shipped; it stands for such a family: another backbone, norm and tensor names, and a head that published
files call `embed_out` and transformers' class `lm_head`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import export_helper
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from zero_ds.config.schema import RunConfig
from zero_ds.data.conversations import IMAGE_TOKEN
from zero_ds.export import export_model
from zero_ds.grafting.engines.offload import spread_
from zero_ds.grafting.load import load_graft
from zero_ds.model.decoders import FAMILIES, Family
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.layer_plan import Replaced
from zero_ds.runtime.errors import ConfigError
from zero_ds.surrogate.build import build_surrogate
from zero_ds.trajectory.lens import check_lens
from zero_ds.trajectory.metrics import METRICS
from zero_ds.trajectory.resident import measure_resident
from zero_ds.trajectory.streaming import measure_streamed
from zero_ds.trajectory.texts import TokenSample

NEOX = Family(
    name="gpt-neox",
    model_types=("gpt_neox",),
    backbone="gpt_neox",
    last_norm="final_layer_norm",
    layer_prefix="gpt_neox.layers.",
    embeddings="gpt_neox.embed_in.weight",
    final_norm="gpt_neox.final_layer_norm.",
    renamed=(("embed_out.", "lm_head."),),
    image_tokens=("<reponame>",),
)


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a tiny model of the family, whose head has its published name."""
    monkeypatch.setitem(FAMILIES, NEOX.name, NEOX)
    folder = tmp_path / "target"
    tiny._decoder(folder, "gpt_neox", tiny.tokenizer(), 0, num_hidden_layers=5, tie_word_embeddings=False)
    stored = load_file(folder / "model.safetensors")
    if "lm_head.weight" in stored:
        stored["embed_out.weight"] = stored.pop("lm_head.weight")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_files_and_modules_are_found(target: Path) -> None:
    folder = DecoderFolder(target)
    assert "lm_head.weight" in folder.spans and folder.spans.keys() == folder.expected_shapes.keys()
    decoder = folder.load(dtype=torch.float32)
    parameters = dict(decoder.named_parameters())
    stored = load_file(target / "model.safetensors")
    assert torch.equal(parameters["lm_head.weight"], stored["embed_out.weight"])
    assert len(NEOX.layers(decoder)) == folder.depth == 5
    assert NEOX.norm(decoder) is NEOX.norm(NEOX.inner(decoder))


def test_a_streamed_trajectory_equals_the_model_in_memory(target: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples = [TokenSample(f"s{n}", rng.integers(0, 250, size=n).tolist()) for n in (2, 9, 17, 30)]
    decoder = DecoderFolder(target).load(dtype=torch.float32).eval()
    check_lens(decoder, NEOX, samples[-1])
    for metric in METRICS.values():
        resident = measure_resident(decoder, NEOX, samples, metric=metric, batch_size=3)
        streamed = measure_streamed(
            target,
            samples,
            metric=metric,
            batch_size=3,
            dtype=torch.float32,
            device=torch.device("cpu"),
            scratch=tmp_path,
        )
        np.testing.assert_allclose(streamed, resident, rtol=1e-4, atol=3e-7)
        assert (resident[1:, 0] > 3e-3).all(), "the comparison is about something"


def test_surrogate_graft_and_export(
    target: Path,
    run_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    surrogate = tmp_path / "surrogate"
    build_surrogate(target, [Replaced(2, 3)], surrogate)
    plan = DecoderFolder(surrogate).plan
    assert plan is not None and len(plan.translators) == 1
    models = {"target": str(target), "surrogate": str(surrogate), "data": {"max_length": 512}}
    config = run_config("encoder", tmp_path / "run", decoder="surrogate", **models)
    run = export_helper.write_run(config, surrogate)

    grafted = load_graft(run, target)
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * grafted.tokens_per_image(), 9, 11]])
    pixels = torch.rand(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = grafted.logits(grafted.hidden_states(ids, torch.ones_like(ids), pixels))
        spread_(grafted, "disk", torch.device("cpu"), tmp_path / "offload")
        offloaded = grafted.logits(grafted.hidden_states(ids, torch.ones_like(ids), pixels))
    torch.testing.assert_close(offloaded, expected)

    export_helper.here(monkeypatch)
    proof = export_model(run, None, tmp_path / "out")
    assert proof["format"] == "remote-code" and proof["largest_logit_difference"] <= 1e-5
    with pytest.raises(ConfigError, match="no names for the tensors of gpt-neox; use --format remote-code"):
        export_model(run, None, tmp_path / "llava", form="llava")
