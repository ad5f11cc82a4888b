"""A graft is the target's own weights with the trained encoder and nothing else; what does not fit is refused."""

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

from zero_ds.cli.main import app
from zero_ds.config.schema import SourceConfig
from zero_ds.data.conversations import IMAGE_TOKEN
from zero_ds.data.sources import Records
from zero_ds.grafting import compatibility as compatibility_module
from zero_ds.grafting.compatibility import compatibility, run_config
from zero_ds.grafting.load import load_graft, load_trained
from zero_ds.model.build import sample_encoder
from zero_ds.model.loading import model_hash
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.checkpoint.checkpoint import CheckpointError, find_checkpoint


def sample(model: VisionLanguageModel, made: Callable[..., Path], data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns input_ids (1, seq) and pixel_values (1, 3, size, size) of a sample with an image."""
    from zero_ds.config.schema import DataConfig

    encode = sample_encoder(model, made("llama", tied=True), made("clip"), DataConfig(system_prompt=""))
    encoded = encode(next(s for s in Records([SourceConfig(path=str(data))]) if s.images))
    return torch.tensor([encoded.input_ids]), encoded.pixels


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
    report = {
        check.name: check.fits for check in compatibility(find_checkpoint(trained / "encoder"), folder, thorough=True)
    }
    assert {name for name, fits in report.items() if not fits} == {"hidden-size", "target"}
    assert "embeddings" not in report and "kept-layers" not in report, "of another width nothing more is compared"
    with pytest.raises(ConfigError, match="'hidden-size' is not a check whose difference can be accepted"):
        load_graft(trained / "encoder", folder, accept=["hidden-size"])


def test_weights_that_cannot_be_grafted(trained: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_graft(tmp_path, made("llama", tied=True))
    checkpoint = tmp_path / "translator"
    shutil.copytree(trained / "pretrain" / "step-000002", checkpoint)
    from safetensors.torch import save_file

    weights = load_file(checkpoint / "weights.safetensors")
    save_file({n: t for n, t in weights.items() if n.startswith("translator.")}, checkpoint / "weights.safetensors")
    with pytest.raises(ConfigError, match="holds no adapter, so there is nothing to graft"):
        load_graft(checkpoint, made("llama", tied=True))


def test_damaged_weights_are_refused_in_a_sentence(trained: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    """The command finds damage in the header and, because it reads the whole file, after it."""
    checkpoint, target = tmp_path / "damaged", made("llama", tied=True)
    shutil.copytree(trained / "encoder" / "step-000002", checkpoint)
    file = checkpoint / "weights.safetensors"
    content = file.read_bytes()

    def refused() -> str:
        done = CliRunner().invoke(app, ["graft", "--weights", str(checkpoint), "--target", str(target)])
        assert isinstance(done.exception, CheckpointError), done.exception
        return str(done.exception)

    for damaged in (content[: len(content) // 2], content[:100], b"", b"no weights"):
        file.write_bytes(damaged)
        assert (
            refused()
            == f"{file} is missing or damaged; use another checkpoint, or write it again with zero-ds consolidate."
        )
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "is damaged: its content has changed since it was saved" in refused()
    file.unlink()
    assert "is missing or damaged" in refused()


def test_early_hashes_are_still_compared(trained: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    """Manifests of the first version contain hashes that were computed in another way."""
    checkpoint, target = tmp_path / "early", made("llama", tied=True)
    shutil.copytree(trained / "encoder" / "step-000002", checkpoint)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    early = {"target_hash": model_hash(target, "0" * 32), "encoder_hash": model_hash(made("clip"), "0" * 32)}
    assert all(manifest[name] != taken for name, taken in early.items())
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, **early}))
    report, _ = graft(checkpoint, target)
    assert report == dict.fromkeys(NAMES, "fits")
    assert graft(checkpoint, made("llama", tied=True, seed=1))[0]["target"] == "DIFFERS"


def test_the_configuration_is_in_the_checkpoint(trained: Path) -> None:
    config = run_config(find_checkpoint(trained / "encoder"))
    assert (config.stage, config.init_from) == ("encoder", (str(trained / "pretrain"),))


def graft(run: Path, target: Path, *more: str) -> tuple[dict[str, str], str]:
    """Returns the command's report as name -> verdict, and its last line or its error."""
    done = CliRunner().invoke(app, ["graft", "--weights", str(run), "--target", str(target), *more])
    rows = [line.split() for line in done.output.splitlines() if not line.startswith(str(run))]
    if done.exception is not None:
        assert isinstance(done.exception, ConfigError), done.exception
    return {row[1]: row[0] for row in rows if len(row) > 1}, str(done.exception or done.output.splitlines()[-1])


NAMES = ["stage", "family", "hidden-size", "target", "tokenizer", "template", "embeddings", "encoder", "adapter"]
NAMES += ["kept-layers"]


def test_the_report_of_a_target_that_fits(trained: Path, made: Callable[..., Path]) -> None:
    report, verdict = graft(trained / "encoder", made("llama", tied=True))
    assert report == dict.fromkeys(NAMES, "fits")
    assert verdict == f"{trained / 'encoder'} can be grafted into {made('llama', tied=True)}."


def _changed(folder: Path, name: str, change: Callable[[torch.Tensor], None]) -> None:
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _other_word(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<reponame>", "<elsename>"))


def _other_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def _first_bit(tensor: torch.Tensor) -> None:
    tensor.view(-1).view(torch.uint8)[0] ^= 1


def _last_bit(tensor: torch.Tensor) -> None:
    tensor.view(-1).view(torch.uint8)[-4] ^= 1


DIFFERENCES: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "tokenizer": (_other_word, {"tokenizer"}),
    "template": (_other_template, {"template"}),
    "a kept layer": (
        lambda folder: _changed(folder, "model.layers.5.mlp.up_proj.weight", _first_bit),
        {"target", "kept-layers"},
    ),
    "a replaced layer": (lambda folder: _changed(folder, "model.layers.2.mlp.up_proj.weight", _first_bit), {"target"}),
    "embeddings": (
        lambda folder: _changed(folder, "model.embed_tokens.weight", _first_bit),
        {"target", "embeddings", "kept-layers"},
    ),
}


@pytest.mark.parametrize("case", list(DIFFERENCES))
def test_what_differs_is_named_refused_and_accepted_by_name(
    case: str, trained: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    """A bit of a tensor, a token or a space in the template is enough."""
    change, expected = DIFFERENCES[case]
    folder = tmp_path / "target"
    shutil.copytree(made("llama", tied=True), folder)
    change(folder)
    report, error = graft(trained / "encoder", folder)
    assert report == {**dict.fromkeys(NAMES, "fits"), **dict.fromkeys(expected, "DIFFERS")}
    assert "cannot be grafted into" in error and "to graft anyway" in error
    accept = [word for name in sorted(expected) for word in ("--accept", name)]
    report, verdict = graft(trained / "encoder", folder, *accept)
    assert report == {**dict.fromkeys(NAMES, "fits"), **dict.fromkeys(expected, "accepted")}
    assert "can be grafted into" in verdict and "which was accepted" in verdict
    if len(expected) > 1:
        _, error = graft(trained / "encoder", folder, *accept[2:])
        assert "cannot be grafted into" in error, "the others do not come along"
    cheap = sorted(expected - {"kept-layers"})
    with pytest.raises(ConfigError, match="cannot be grafted into"):
        load_graft(trained / "encoder", folder)
    assert load_graft(trained / "encoder", folder, accept=cheap).plan is None
    with pytest.raises(
        ConfigError, match=r"'tokeniser' is not a check whose difference can be accepted; did you mean 'tokenizer'"
    ):
        load_graft(trained / "encoder", folder, accept=["tokeniser"])


def test_kept_layers_are_compared_to_their_last_bit(trained: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    """The target's hash samples its tensors; the comparison with the surrogate reads all of them."""
    folder = tmp_path / "target"
    shutil.copytree(made("llama", tied=True), folder)
    _changed(folder, "model.layers.5.mlp.up_proj.weight", _last_bit)
    report, _ = graft(trained / "encoder", folder, "--accept", "target")
    assert report["kept-layers"] == "DIFFERS"


def test_the_encoder_and_the_surrogate_belong_to_the_report(
    trained: Path, made: Callable[..., Path], small: Path, tmp_path: Path
) -> None:
    """The report shows another CLIP, a surrogate that was moved, changed or deleted, and trained kept layers."""
    from safetensors.torch import save_file

    run, target = tmp_path / "run", made("llama", tied=True)
    shutil.copytree(trained / "encoder" / "step-000002", run)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"]["encoder"]["path"] = str(made("clip", seed=1))
    manifest["config"]["surrogate"] = str(tmp_path / "gone")
    (run / "manifest.json").write_text(json.dumps(manifest))
    report, error = graft(run, target)
    assert (report["encoder"], report["kept-layers"]) == ("DIFFERS", "unknown") and "vision encoder is" in error
    _, verdict = graft(run, target, "--accept", "encoder")
    assert "with another encoder, which was accepted; not compared: kept-layers." in verdict
    shutil.copytree(small, tmp_path / "moved")
    report, _ = graft(run, target, "--accept", "encoder", "--surrogate", str(tmp_path / "moved"))
    assert report["kept-layers"] == "fits"
    _changed(tmp_path / "moved", "model.layers.2.mlp.up_proj.weight", _last_bit)  # a translator, which may differ
    report, _ = graft(run, target, "--accept", "encoder", "--surrogate", str(tmp_path / "moved"))
    assert report["kept-layers"] == "fits"
    _changed(tmp_path / "moved", "model.layers.3.mlp.up_proj.weight", _last_bit)
    report, error = graft(run, target, "--accept", "encoder", "--surrogate", str(tmp_path / "moved"))
    assert (
        report["kept-layers"] == "DIFFERS"
        and "first kept tensor that differs is model.layers.3.mlp.up_proj.weight" in error
    )

    del manifest["relies_on"]  # of a run before these were recorded, whose surrogate is gone
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert graft(run, target)[0]["tokenizer"] == "unknown"
    weights = load_file(run / "weights.safetensors")
    save_file({**weights, "early.0.norm": torch.ones(2)}, run / "weights.safetensors")
    with pytest.raises(
        ConfigError, match=r"source of the kept layers is the target, trained with .*, which trained them"
    ):
        load_graft(run, target, accept=["encoder"])


def test_the_function_checks_what_the_command_checks(trained: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    """`compatibility.graft` reads kept layers to their last bit, reports every check, then raises."""
    folder = tmp_path / "target"
    shutil.copytree(made("llama", tied=True), folder)
    _changed(folder, "model.layers.5.mlp.up_proj.weight", _last_bit)
    reported: list[str] = []
    with pytest.raises(ConfigError, match=r"first kept tensor that differs is .*; pass --accept kept-layers"):
        compatibility_module.graft(
            trained / "encoder",
            str(folder),
            accept=["target"],
            report=lambda checks: reported.extend(check.name for check in checks),
        )
    assert reported == NAMES
    checks = compatibility_module.graft(trained / "encoder", str(folder), accept=["target", "kept-layers"])
    assert [check.name for check in checks] == NAMES
    with pytest.raises(ConfigError, match=r"--surrogate .* is not a surrogate"):
        compatibility_module.graft(trained / "encoder", str(folder), surrogate=str(folder))
