"""A graft is the target's own weights with the trained encoder, and nothing else; what does not belong is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, CLIPVisionModel
from typer.testing import CliRunner

from zero_ds.checkpoint import CheckpointError, find_commit
from zero_ds.cli import app
from zero_ds.config import ConfigError, SourceConfig
from zero_ds.data.conversations import IMAGE_TOKEN
from zero_ds.data.sources import Records
from zero_ds.graft import compatibility, load_graft, load_trained, run_config
from zero_ds.model import VisionLanguageModel, sample_encoder


def sample(model: VisionLanguageModel, made: Callable[..., Path], data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids (1, seq) and pixel_values (1, 3, size, size) of a sample with a picture."""
    from zero_ds.config import DataConfig

    encode = sample_encoder(model, made("llama", tied=True), made("clip"), DataConfig(system_prompt=""))
    encoded = encode(next(s for s in Records([SourceConfig(path=str(data))]) if s.images))
    return torch.tensor([encoded["input_ids"]]), encoded["pixels"]


@torch.no_grad()
def test_a_graft_is_a_straight_assembly(trained: Path, made: Callable[..., Path], data: Path) -> None:
    """Target, encoder and adapter put together by hand, from their files, give the same logits."""
    target = made("llama", tied=True)
    graft = load_graft(trained / "encoder", target)
    ids, pixels = sample(graft, made, data)
    ours = graft.logits(graft.hidden_states(ids, torch.ones_like(ids), pixels))

    weights = load_file(trained / "encoder" / "step-000002" / "weights.safetensors")
    clip = CLIPVisionModel.from_pretrained(made("clip")).eval()
    llm = AutoModelForCausalLM.from_pretrained(target).eval()
    encoder = {n.removeprefix("encoder."): t for n, t in weights.items() if n.startswith("encoder.")}
    assert encoder and not clip.load_state_dict(encoder, strict=False).unexpected_keys
    patches = clip(pixel_values=pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    features = F.linear(patches, weights["adapter.0.weight"], weights["adapter.0.bias"])
    features = F.linear(F.gelu(features), weights["adapter.2.weight"], weights["adapter.2.bias"])
    embeddings = llm.get_input_embeddings()(ids.clamp_min(0))
    embeddings[ids == IMAGE_TOKEN] = features.flatten(0, 1)
    torch.testing.assert_close(ours, llm(inputs_embeds=embeddings).logits, atol=1e-5, rtol=1e-5)

    untouched = load_file(target / "model.safetensors")
    held = graft.decoder.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in untouched.items())
    assert graft.plan is None and not graft.training


def test_trained_weights_on_their_surrogate(trained: Path, small: Path) -> None:
    """The run's translators come from the stage it started from."""
    model = load_trained(trained / "encoder", small)
    for run, part in (("pretrain", "translator."), ("encoder", "encoder."), ("encoder", "adapter.")):
        weights = load_file(trained / run / "step-000002" / "weights.safetensors")
        named = model.named_targets()
        chosen = [name for name in weights if name.startswith(part)]
        assert chosen and all(torch.equal(named[name], weights[name]) for name in chosen)
    elsewhere = load_trained(trained / "encoder", small, earlier=[])
    fresh, learned = elsewhere.named_targets(), model.named_targets()
    assert not torch.equal(fresh["translator.0.mlp.up_proj.weight"], learned["translator.0.mlp.up_proj.weight"])


def test_half_precision(trained: Path, made: Callable[..., Path]) -> None:
    graft = load_graft(trained / "encoder", made("llama", tied=True), dtype=torch.bfloat16)
    assert {p.dtype for p in graft.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"tied": True, "seed": 1}, "target's config and weights is"),
        ({"tied": False}, "target's config and weights is"),
    ],
)
def test_another_target_is_refused(
    trained: Path, made: Callable[..., Path], options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_graft(trained / "encoder", made("llama", **options))
    assert "cannot be grafted into" in str(caught.value) and "trained with" in str(caught.value)


def test_another_width_is_refused(trained: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    shutil.copytree(made("llama", tied=True), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(ConfigError, match="hidden size is 64, trained with 32"):
        load_graft(trained / "encoder", folder)
    assert [check.fits for check in compatibility(find_commit(trained / "encoder"), folder)] == [True, False, False]


def test_weights_that_cannot_be_grafted(trained: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no commit"):
        load_graft(tmp_path, made("llama", tied=True))
    commit = tmp_path / "translator"
    shutil.copytree(trained / "pretrain" / "step-000002", commit)
    from safetensors.torch import save_file

    weights = load_file(commit / "weights.safetensors")
    save_file({n: t for n, t in weights.items() if n.startswith("translator.")}, commit / "weights.safetensors")
    with pytest.raises(ConfigError, match="holds no adapter, so there is nothing to graft"):
        load_graft(commit, made("llama", tied=True))


def test_the_configuration_is_in_the_commit(trained: Path) -> None:
    config = run_config(find_commit(trained / "encoder"))
    assert (config.stage, config.init_from) == ("encoder", (str(trained / "pretrain"),))


def test_command(trained: Path, made: Callable[..., Path]) -> None:
    arguments = ["graft", "--weights", str(trained / "encoder"), "--target"]
    good = CliRunner().invoke(app, [*arguments, str(made("llama", tied=True))])
    assert good.exit_code == 0 and "can be grafted" in good.output, good.output
    bad = CliRunner().invoke(app, [*arguments, str(made("llama", tied=False))])
    assert isinstance(bad.exception, ConfigError) and "DIFFERS" in bad.output
