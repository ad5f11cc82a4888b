"""Export to transformers' Llava: the folder proves itself in a process without this package, or is not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from zero_ds.checkpoint import find_commit
from zero_ds.config import ConfigError
from zero_ds.data.conversations import IMAGE_TOKEN, Turn
from zero_ds.data.sources import Sample
from zero_ds.export import export_llava, prove
from zero_ds.generate import Answerer
from zero_ds.graft import load_graft, run_config
from zero_ds.model import sample_encoder
from zero_ds.named_model import find_model, load_model

QUESTION = "which shape?"


@pytest.fixture(scope="module")
def exported(trained: Path, made: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "llava"
    proof = export_llava(trained / "encoder", str(made("llama", tied=True)), out)
    assert proof == json.loads((out / "proof.json").read_text())
    return out


def test_export_proves_itself(exported: Path) -> None:
    proof = json.loads((exported / "proof.json").read_text())
    assert [prompt["prompt"] for prompt in proof["prompts"]] == ["a picture", "text alone"]
    for prompt in proof["prompts"]:
        assert prompt["largest_log_prob_difference"] < 1e-4 and prompt["greedy_tokens_equal"]
    assert {"zero_ds", "torch", "transformers"} <= set(proof["versions"])
    assert sorted(path.name for path in exported.parent.iterdir()) == ["llava"]


def test_the_folder_opens_by_its_name(exported: Path, trained: Path, made: Callable[..., Path], data: Path) -> None:
    """As a model of ours again: the same prompts, features and answers as the graft that was exported."""
    named = find_model(str(exported))
    assert named.kind == "export" and named.sees
    ours, theirs = load_model(find_model(str(trained / "encoder"), str(made("llama", tied=True)))), load_model(named)
    picture = str(data.parent / "images" / "0.png")
    asked = [Turn("user", f"<image>\n{QUESTION}")]
    prompts = [m.encoder.encode(m.encoder.turns(Sample("x", tuple(asked), ())), generate=True) for m in (ours, theirs)]
    assert prompts[0] == prompts[1]
    answers = [Answerer(m.model, m.encoder, max_new_tokens=8) for m in (ours, theirs)]
    torch.testing.assert_close(*(a.features([picture])[0] for a in answers), atol=1e-5, rtol=1e-5)
    assert answers[0].reply(asked, [picture]) == answers[1].reply(asked, [picture])


@pytest.mark.parametrize("size", [(32, 32), (90, 40)])
@torch.no_grad()
def test_the_whole_prompt_is_the_one_of_training(
    exported: Path, trained: Path, made: Callable[..., Path], data: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    """Chat template, image prompt, padding and image tokens: ids equal, logits equal at every position."""
    Image.open(data.parent / "images" / "0.png").resize(size).save(tmp_path / "picture.png")
    target = made("llama", tied=True)
    model = load_graft(trained / "encoder", target)
    encode = sample_encoder(model, target, made("clip"), run_config(find_commit(trained / "encoder")).data)
    sample = Sample("x", (Turn("user", f"<image>\n{QUESTION}"),), (str(tmp_path / "picture.png"),))
    encoded = encode.encode(encode.turns(sample), generate=True)
    ids, pixels = torch.tensor([encoded.input_ids]), encode.pixels(sample)
    ours = model.logits(model.hidden_states(ids, torch.ones_like(ids), pixels))

    processor = AutoProcessor.from_pretrained(exported)
    llava = LlavaForConditionalGeneration.from_pretrained(exported).eval()
    contents = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": contents}], add_generation_prompt=True)
    inputs = processor(
        text=prompt, images=[Image.open(tmp_path / "picture.png")], return_tensors="pt", add_special_tokens=False
    )
    placeholder = torch.where(ids == IMAGE_TOKEN, processor.image_token_id, ids)
    assert torch.equal(inputs.input_ids, placeholder)
    torch.testing.assert_close(inputs.pixel_values, pixels, atol=0.02, rtol=0)
    exact = llava(**{**inputs, "pixel_values": pixels}).logits
    torch.testing.assert_close(exact, ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("damage", "dtype"), [("other values", torch.float32), ("not a number", torch.bfloat16)])
def test_a_wrong_tensor_fails_the_proof(
    exported: Path, trained: Path, made: Callable[..., Path], tmp_path: Path, damage: str, dtype: torch.dtype
) -> None:
    target = made("llama", tied=True)
    shutil.copytree(exported, tmp_path / "llava")
    tensors = load_file(tmp_path / "llava" / "model.safetensors")
    name = next(n for n in tensors if "layers.3" in n and n.endswith("up_proj.weight"))
    tensors[name] = -tensors[name] if damage == "other values" else tensors[name] * float("nan")
    save_file(tensors, tmp_path / "llava" / "model.safetensors", metadata={"format": "pt"})
    model = load_graft(trained / "encoder", target, dtype=dtype)
    with pytest.raises(ConfigError, match="differs from its source on a prompt with a picture"):
        prove(tmp_path / "llava", model, run_config(find_commit(trained / "encoder")), target)


def altered(commit: Path, out: Path, section: str, **changes: Any) -> Path:
    """A copy of a commit whose manifest says something else in a section of the configuration."""
    shutil.copytree(commit, out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["config"][section] = {**manifest["config"][section], **changes}
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


@pytest.mark.parametrize(
    ("section", "change"), [("adapter", {"boundary_tokens": True}), ("encoder", {"patch_norm": True})]
)
def test_what_llava_cannot_express_is_refused(
    trained: Path, made: Callable[..., Path], tmp_path: Path, section: str, change: dict[str, Any]
) -> None:
    weights = altered(trained / "encoder" / "step-000002", tmp_path / "commit", section, **change)
    with pytest.raises(ConfigError, match="Llava has no image-boundary embeddings and no norm on patch tokens"):
        export_llava(weights, str(made("llama", tied=True)), tmp_path / "llava")
    assert [path.name for path in tmp_path.iterdir()] == ["commit"]


def test_existing_out_is_not_touched(trained: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "llava").write_text("precious")
    with pytest.raises(ConfigError, match="already exists; choose another --out or remove it"):
        export_llava(trained / "encoder", str(made("llama", tied=True)), tmp_path / "llava")
    assert (tmp_path / "llava").read_text() == "precious"


def test_a_failed_proof_leaves_nothing(
    trained: Path, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zero_ds import export

    monkeypatch.setattr(export, "PROOF_SCRIPT", "raise SystemExit('transformers said no')")
    with pytest.raises(
        ConfigError, match="transformers alone could not load the exported folder: transformers said no"
    ):
        export_llava(trained / "encoder", str(made("llama", tied=True)), tmp_path / "deep" / "llava")
    assert not list((tmp_path / "deep").iterdir())


def test_vocabulary_without_a_spare_token(
    trained: Path, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zero_ds.families import base

    monkeypatch.setattr("zero_ds.export.PLACEHOLDER", "<nowhere>")
    target = made("llama", tied=True)
    model = load_graft(trained / "encoder", target)
    family = base.Family(name="llama", model_types=("llama",), image_tokens=("<|nothing|>",))
    monkeypatch.setattr(model, "family", family)
    from transformers import AutoTokenizer

    from zero_ds.export import placeholder_token

    with pytest.raises(ConfigError, match=r"none of the llama family's spare tokens \(<\|nothing\|>\); name one in"):
        placeholder_token(model, AutoTokenizer.from_pretrained(target))
