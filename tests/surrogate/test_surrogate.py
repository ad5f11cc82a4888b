"""LayerPlan, and the writer of surrogates against a target whose layers are dropped in memory."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from pace import scaled
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.model.decoders import FAMILIES
from zero_ds.model.decoders.folder import DecoderFolder, family_of
from zero_ds.model.layer_plan import LayerPlan, Replaced, SurrogateInfo, read_surrogate
from zero_ds.model.loading import model_hash
from zero_ds.runtime import safetensors as module
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.safetensors import spans
from zero_ds.surrogate.build import build_surrogate
from zero_ds.trajectory.streaming import LayerFiles

# -- LayerPlan ---------------------------------------------------------------------------------------------------------


def plan(depth: int, *ranges: tuple[int, ...]) -> LayerPlan:
    return LayerPlan(depth, tuple(Replaced(*r) for r in ranges))


@pytest.mark.parametrize(
    ("depth", "first", "last", "surrogate_depth", "translator"),
    [(28, 16, 26, 18, 16), (32, 17, 30, 19, 17), (80, 40, 78, 42, 40), (28, 1, 11, 18, 1), (32, 6, 30, 8, 6)],
)
def test_the_papers_surrogates(depth: int, first: int, last: int, surrogate_depth: int, translator: int) -> None:
    """T(16,26) of Llama-3.2-3B, T(17,30) of 8B, T(40,78) of 70B and two controls keep layers 0..k-1 and e+1..L-1."""
    made = plan(depth, (first, last))
    assert made.surrogate_depth == surrogate_depth
    assert made.translators == [translator]
    assert list(made.kept.values()) == [*range(first), *range(last + 1, depth)]
    assert made.layers[translator] == (first, True), "the translator starts as the first replaced layer"
    assert str(made) == f"T({first},{last})"


def exhaustive(depth: int) -> Iterable[LayerPlan]:
    """Yields every plan with up to two ranges of a model of `depth` layers, with every number of translators."""
    spans = [(a, b) for a in range(depth) for b in range(a, depth)]
    for count in (1, 2):
        for chosen in itertools.combinations(spans, count):
            if count == 2 and chosen[1][0] <= chosen[0][1]:
                continue
            for translators in itertools.product(*(range(1, b - a + 2) for a, b in chosen)):
                yield LayerPlan(depth, tuple(Replaced(a, b, t) for (a, b), t in zip(chosen, translators, strict=True)))


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_every_small_plan(depth: int) -> None:
    plans = list(exhaustive(depth))
    assert len(set(plans)) == len(plans)
    for made in plans:
        consistent(made)


@st.composite
def plans(draw: st.DrawFn) -> LayerPlan:
    depth = draw(st.integers(1, 90))
    cuts = sorted(draw(st.lists(st.integers(0, depth - 1), min_size=2, max_size=8, unique=True))) if depth > 1 else [0]
    ranges = []
    for first, last in zip(cuts[::2], cuts[1::2] or cuts[:1], strict=False):
        ranges.append(Replaced(first, last, draw(st.integers(1, last - first + 1))))
    return LayerPlan(depth, tuple(draw(st.permutations(ranges))))


@given(plans())
def test_any_plan(made: LayerPlan) -> None:
    consistent(made)


def consistent(made: LayerPlan) -> None:
    """Checks the properties that every plan has."""
    # every layer of the target is either kept or replaced
    assert sorted([*made.kept.values(), *made.dropped]) == list(range(made.depth))
    # every layer of the surrogate is either kept or a translator
    assert sorted([*made.kept, *made.translators]) == list(range(made.surrogate_depth))
    translators = sum(part.translators for part in made.replaced)
    assert made.surrogate_depth == len(made.layers) == made.depth - len(made.dropped) + translators
    assert len(made.translators) == translators
    # the order of the target is kept, and a translator starts from a layer that it replaces
    sources = [source for source, _ in made.layers]
    assert sources == sorted(set(sources))
    spans = [made.replaced_by(number) for number in range(translators)]
    assert [layer for first, last in spans for layer in range(first, last + 1)] == made.dropped
    for (first, last), number in zip(spans, made.translators, strict=True):
        assert made.layers[number] == (first, True) and first <= last
    for number, source in made.kept.items():
        assert made.layers[number] == (source, False)
    # the named ranges: equal layers before the translators, and the rest of both models
    assert [made.kept[number] for number in made.early] == list(made.early)
    assert made.first_replaced == made.dropped[0] and made.late.start == made.translators[0]
    assert [*made.early, *made.late] == list(range(made.surrogate_depth))
    assert [*made.early, *made.target_late] == list(range(made.depth))
    assert LayerPlan.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize("content", ["x", [], {"a": 1}, {"depth": 6}, {"depth": "6", "replaced": [[1, 2, 1]]}])
def test_a_damaged_plan(content: Any) -> None:
    with pytest.raises(ConfigError, match="a layer plan is damaged"):
        LayerPlan.from_json(content)


def test_order_of_the_ranges_does_not_matter() -> None:
    assert plan(9, (5, 6), (1, 3, 2)) == plan(9, (1, 3, 2), (5, 6))
    assert str(plan(9, (5, 6), (1, 3, 2))) == "T(1,3)x2+T(5,6)"


def test_several_translators_start_from_equal_parts() -> None:
    made = plan(12, (2, 9, 3))
    assert [made.layers[number][0] for number in made.translators] == [2, 4, 7]
    assert [made.replaced_by(n) for n in range(3)] == [(2, 3), (4, 6), (7, 9)]


@pytest.mark.parametrize(
    ("ranges", "complaint"),
    [
        ([(2, 6)], "layers 2:6 are not inside the model's layers 0:5; choose both from them."),
        ([(-1, 2)], "layers -1:2 are not inside"),
        ([(3, 2)], "layers 3:2 are not inside"),
        ([(0, 2), (2, 4)], "the ranges 0:2 and 2:4 overlap; separate them."),
        ([(0, 5), (1, 2)], "overlap"),
        ([(1, 2), (1, 2)], "overlap"),
        ([(1, 2, 3)], "3 translators cannot replace the 2 layers 1:2; use fewer."),
        ([(1, 2, 0)], "0 translators cannot replace"),
        ([], "no layers are replaced; give at least one range"),
    ],
)
def test_plans_that_cannot_be(ranges: list[tuple[int, ...]], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(6, *ranges)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("text", ["40:78", " 40:78 "])
def test_parse(text: str) -> None:
    assert Replaced.parse(text, 2) == Replaced(40, 78, 2)


@pytest.mark.parametrize("text", ["", "40", "40-78", "40:", ":78", "a:b", "40:78:80", "-1:2", "4.0:5"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a layer range; write first:last"):
        Replaced.parse(text)


# -- the writer --------------------------------------------------------------------------------------------------------


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def by_hand(target: Path, ranges: list[Replaced]) -> Any:
    """Loads the target and drops layers without LayerPlan: a range becomes the first layers of its parts."""
    model = load(target)
    family = family_of(target)
    layers = list(family.layers(model))
    chosen: list[int] = []
    for number in range(len(layers)):
        part = next((r for r in ranges if r.first <= number <= r.last), None)
        width = 0 if part is None else part.last - part.first + 1
        starts = (
            () if part is None else tuple(part.first + width * t // part.translators for t in range(part.translators))
        )
        if part is None or number in starts:
            chosen.append(number)
    getattr(model, family.backbone).layers = torch.nn.ModuleList(layers[number] for number in chosen)
    model.config.num_hidden_layers = len(chosen)
    if types := getattr(model.config, "layer_types", None):
        model.config.layer_types = [types[number] for number in chosen]
    for number, layer in enumerate(getattr(model, family.backbone).layers):
        layer.self_attn.layer_idx = number
    return model


@torch.no_grad()
def logits(model: Any, vocabulary: int) -> torch.Tensor:
    ids = torch.arange(48).view(2, 24) * 7 % vocabulary
    return model(input_ids=ids, use_cache=False).logits


def folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


RANGES = {
    "T(2,4)": [Replaced(2, 4)],
    "T(0,0)": [Replaced(0, 0)],
    "T(0,5)": [Replaced(0, 5)],
    "T(1,4)x2": [Replaced(1, 4, 2)],
    "T(0,1)+T(3,5)x2": [Replaced(0, 1), Replaced(3, 5, 2)],
}


@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_surrogate_is_the_target_with_layers_dropped_by_hand(
    made: Callable[..., Path], tmp_path: Path, family: str, tied: bool, ranges: list[Replaced]
) -> None:
    target = made(family, tied=tied)
    info = build_surrogate(target, ranges, tmp_path / "small")
    small, expected = load(tmp_path / "small"), by_hand(target, ranges)
    vocabulary = expected.config.vocab_size
    torch.testing.assert_close(logits(small, vocabulary), logits(expected, vocabulary), atol=1e-6, rtol=1e-6)
    if info.plan.surrogate_depth < info.plan.depth:
        apart = (logits(small, vocabulary) - logits(load(target), vocabulary)).abs().max()
        assert apart > 1e-2, "the layers of a tiny model matter"
    assert info.plan.surrogate_depth == small.config.num_hidden_layers
    assert info.target_parameters == sum(p.numel() for p in load(target).parameters())
    assert info.kept_parameters == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_surrogate_is_an_ordinary_folder(made: Callable[..., Path], tmp_path: Path, family: str) -> None:
    from transformers import AutoTokenizer

    target = made(family, tied=True)
    info = build_surrogate(target, [Replaced(2, 4)], tmp_path / "new" / "small")
    out = tmp_path / "new" / "small"
    sizes = (info.kept_parameters, info.target_parameters)
    assert set(info.hashes) == {"tokenizer", "template", "embeddings"} and all(info.hashes.values())
    assert info == SurrogateInfo(family, str(target), model_hash(target), plan(6, (2, 4)), *sizes, info.hashes)
    assert read_surrogate(out) == info
    assert folders(tmp_path / "new") == ["small"], "no temporary folder stays"
    assert out.stat().st_mode & 0o777 == 0o755
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(target)
    assert ours.get_vocab() == theirs.get_vocab() and ours.chat_template == theirs.chat_template
    whole = json.loads((target / "config.json").read_text())
    cut = json.loads((out / "config.json").read_text())
    types = cut.pop("layer_types", None)
    assert cut == {**{k: v for k, v in whole.items() if k != "layer_types"}, "num_hidden_layers": 4}
    assert types == {
        "llama": None,
        "qwen2": ["full_attention"] * 4,
        "qwen3": ["full_attention"] * 4,
        "gemma2": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "gemma3": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
    }.get(family, types)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_text_tower_of_a_multimodal_class(made: Callable[..., Path], tmp_path: Path, tied: bool) -> None:
    """Loaded from the multimodal folder, it answers like its own class; a graft reads it from there as well."""
    from transformers import Gemma3ForConditionalGeneration

    target = made("gemma3-multimodal", tied=tied)
    whole = Gemma3ForConditionalGeneration.from_pretrained(target, dtype=torch.float32).eval()
    vocabulary = whole.config.text_config.vocab_size
    expected = logits(whole, vocabulary)
    loaded = DecoderFolder(target).load(dtype=torch.float32).eval()
    torch.testing.assert_close(logits(loaded, vocabulary), expected, atol=1e-6, rtol=1e-6)

    info = build_surrogate(target, [Replaced(2, 4)], tmp_path / "small")
    small = load(tmp_path / "small")
    cut = json.loads((tmp_path / "small/config.json").read_text())
    assert cut["tie_word_embeddings"] is tied
    assert type(small).__name__ == "Gemma3ForCausalLM" and family_of(tmp_path / "small").name == "gemma3"
    layers = whole.model.language_model.layers
    whole.model.language_model.layers = torch.nn.ModuleList(layers[i] for i in (0, 1, 2, 5))
    whole.config.text_config.layer_types = [whole.config.text_config.layer_types[i] for i in (0, 1, 2, 5)]
    whole.config.text_config.num_hidden_layers = 4
    torch.testing.assert_close(logits(small, vocabulary), logits(whole, vocabulary), atol=1e-6, rtol=1e-6)
    assert info.target_parameters == sum(p.numel() for p in loaded.parameters())
    assert info.kept_parameters == sum(p.numel() for p in small.parameters())


def test_config_lists_that_do_not_fit_the_layers(made: Callable[..., Path], tmp_path: Path) -> None:
    target = copy(made("gemma2", tied=True), tmp_path / "target")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "layer_types": ["full_attention"] * 5}))
    with pytest.raises(ConfigError, match=r"config\.json"):
        build_surrogate(target, [Replaced(2, 4)], tmp_path / "small")
    assert not (tmp_path / "small").exists()


def copy(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    return out


def sharded(made: Callable[..., Path], out: Path, tied: bool = False) -> Path:
    """Returns the tiny target, written by transformers in several shards."""
    from transformers import AutoModelForCausalLM

    target = made("llama", tied=tied)
    copy(target, out)
    (out / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(target).save_pretrained(out, max_shard_size="40KB")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    return out


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_shards_in_and_out(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    target = sharded(made, tmp_path / "target", tied)
    monkeypatch.setattr(module, "SHARD_BYTES", 30_000)
    ranges = [Replaced(2, 4)]
    info = build_surrogate(target, ranges, tmp_path / "small")
    shards = sorted((tmp_path / "small").glob("model-*-of-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "small" / "model.safetensors").exists()
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    held = 0
    for path in shards:
        with safe_open(path, framework="pt") as file:
            assert {index["weight_map"][key] for key in file.keys()} == {path.name}  # noqa: SIM118
            held += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert index["metadata"]["total_size"] == held == 4 * info.kept_parameters
    whole = made("llama", tied=tied)
    vocabulary = load(whole).config.vocab_size
    torch.testing.assert_close(
        logits(load(tmp_path / "small"), vocabulary), logits(by_hand(whole, ranges), vocabulary), atol=1e-6, rtol=1e-6
    )


def test_half_precision_is_copied_as_it_is(made: Callable[..., Path], tmp_path: Path) -> None:
    target = copy(made("llama", tied=True), tmp_path / "target")
    load(target).to(torch.bfloat16).save_pretrained(target)
    build_surrogate(target, [Replaced(2, 4)], tmp_path / "small")
    small, whole = (load_file(folder / "model.safetensors") for folder in (tmp_path / "small", target))
    for mine, theirs in (("norm", "norm"), ("layers.3.mlp.up_proj", "layers.5.mlp.up_proj")):
        tensor = small[f"model.{mine}.weight"]
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, whole[f"model.{theirs}.weight"])


# -- refusals, which leave nothing on the disk -------------------------------------------------------------------------


def refused(target: Path, out: Path, complaint: str, ranges: tuple[Replaced, ...] = (Replaced(2, 4),)) -> None:
    before = folders(out.parent)
    with pytest.raises(ConfigError, match=complaint) as caught:
        build_surrogate(target, ranges, out)
    assert "\n" not in str(caught.value)
    assert folders(out.parent) == before, "nothing stays on the disk"


def test_range_outside_and_overlap(made: Callable[..., Path], tmp_path: Path) -> None:
    target = made("llama", tied=True)
    refused(target, tmp_path / "small", "layers 4:6 are not inside", (Replaced(4, 6),))
    refused(target, tmp_path / "small", "overlap", (Replaced(1, 2), Replaced(2, 3)))


def test_missing_and_truncated_shards(made: Callable[..., Path], tmp_path: Path) -> None:
    target = sharded(made, tmp_path / "target")
    victim = sorted(target.glob("model-*.safetensors"))[1]
    content = victim.read_bytes()
    victim.write_bytes(content[:-100])
    refused(target, tmp_path / "small", f"shard .*{victim.name} cannot be read .*fetch the model again")
    victim.unlink()
    refused(target, tmp_path / "small", f"shard .*{victim.name} is missing; fetch the model again")


def test_truncated_and_missing_weights(made: Callable[..., Path], tmp_path: Path) -> None:
    target = copy(made("llama", tied=True), tmp_path / "target")
    weights = target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(target, tmp_path / "small", "model.safetensors cannot be read")
    weights.unlink()
    refused(target, tmp_path / "small", "holds no safetensors weights")


def test_index_that_is_damaged_or_leads_outside(made: Callable[..., Path], tmp_path: Path) -> None:
    target = sharded(made, tmp_path / "target")
    index = target / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    shutil.copyfile(target / content["weight_map"][name], tmp_path / "outside.safetensors")
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], name: "../outside.safetensors"}}))
    refused(target, tmp_path / "small", r"target/outside\.safetensors is missing")  # not the one that lies outside
    for text in ("{", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "[]"):
        index.write_text(text)
        refused(target, tmp_path / "small", "index.json is damaged; fetch the model again")
    index.write_text('{"weight_map": {}}')
    refused(target, tmp_path / "small", r"lack model\.embed_tokens\.weight")


def test_layers_that_the_weights_lack(made: Callable[..., Path], tmp_path: Path) -> None:
    target = copy(made("llama", tied=True), tmp_path / "target")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 8}))
    refused(target, tmp_path / "small", r"lack model\.layers\.6\.")
    (target / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    refused(target, tmp_path / "small", r"hold model\.layers\.5\..*, which config\.json does not know")


@pytest.mark.parametrize(
    ("tied", "change", "complaint"),
    [
        (True, {"model.layers.4.mlp.up_proj.weight": None}, r"lack model\.layers\.4\.mlp\.up_proj\.weight; fetch"),
        (True, {"model.norm.weight": None}, r"lack model\.norm\.weight"),
        (True, {"model.embed_tokens.weight": None}, r"lack model\.embed_tokens\.weight"),
        (False, {"lm_head.weight": None}, r"lack lm_head\.weight"),
        (
            True,
            {"model.norm.weight": torch.ones(5)},
            r"model\.norm\.weight .* has shape \(5,\), by config\.json \(32",
        ),
        (True, {"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}, r"is quantized \(F8_E4M3\)"),
    ],
)
def test_weights_that_are_not_the_configs(
    made: Callable[..., Path], tmp_path: Path, tied: bool, change: dict[str, Any], complaint: str
) -> None:
    """Both readers of files refuse the folder before anything is computed or written."""
    target = copy(made("llama", tied=tied), tmp_path / "target")
    tensors = {**load_file(target / "model.safetensors"), **change}
    save_file({name: t for name, t in tensors.items() if t is not None}, target / "model.safetensors")
    refused(target, tmp_path / "small", complaint)
    with pytest.raises(ConfigError, match=complaint):
        LayerFiles.of(target, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"hidden_act": "nope"}, r"config\.json cannot be used"),
        ({"hidden_size": None}, r"config\.json cannot be used"),
        ({"hidden_size": 64}, "has shape"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"text_config": "x"}, r"config\.json is missing or damaged"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantized; give the model in"),
    ],
)
def test_config_that_cannot_be_meant(
    made: Callable[..., Path], tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    target = copy(made("llama", tied=True), tmp_path / "target")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **change}))
    refused(target, tmp_path / "small", complaint)


def test_damaged_tokenizer_config_is_noticed_before_the_copy(made: Callable[..., Path], tmp_path: Path) -> None:
    target = copy(made("llama", tied=True), tmp_path / "target")
    (target / "chat_template.jinja").unlink(missing_ok=True)
    (target / "tokenizer_config.json").write_text("[")
    refused(target, tmp_path / "small", r"tokenizer_config\.json is damaged; fetch the model again")


def test_out_that_is_a_link(made: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "small").symlink_to(tmp_path / "elsewhere")
    refused(made("llama", tied=True), tmp_path / "small", "is a symbolic link; name the folder itself")


@pytest.mark.parametrize("depth", [None, "six", 0])
def test_config_without_a_depth(made: Callable[..., Path], tmp_path: Path, depth: object) -> None:
    target = copy(made("llama", tied=True), tmp_path / "target")
    config = json.loads((target / "config.json").read_text())
    del config["num_hidden_layers"]
    (target / "config.json").write_text(
        json.dumps({**config, **({} if depth is None else {"num_hidden_layers": depth})})
    )
    refused(target, tmp_path / "small", "num_hidden_layers|not inside")


@pytest.mark.parametrize("kind", ["folder with a file", "file"])
def test_existing_out_is_not_touched(made: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    out = tmp_path / "small"
    kept = out
    if kind != "file":
        out.mkdir()
        kept = out / "mine.txt"
    kept.write_text("precious")
    refused(made("llama", tied=True), out, "already exists; choose another --out or remove it")
    assert kept.read_text() == "precious"


def test_empty_out_is_filled(made: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    build_surrogate(made("llama", tied=True), [Replaced(2, 4)], tmp_path / "small")
    assert read_surrogate(tmp_path / "small").plan == plan(6, (2, 4))


def test_a_model_that_is_not_a_decoder(made: Callable[..., Path], tmp_path: Path) -> None:
    target = copy(made("llama", tied=True), tmp_path / "target")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    refused(target, tmp_path / "small", "cannot be used as a decoder: its tokens see later tokens")


def test_a_folder_that_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    refused(tmp_path / "target", tmp_path / "small", "holds no config.json")
    (tmp_path / "target" / "config.json").write_text("{}")
    refused(tmp_path / "target", tmp_path / "small", "names no model_type")


def test_full_disk(made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    refused(made("llama", tied=True), tmp_path / "small", "MB free that small needs")


def test_a_disk_that_fills_while_copying(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> int:
        raise OSError(28, "No space left on device")

    target = made("llama", tied=True)
    monkeypatch.setattr(module.os, "copy_file_range", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        build_surrogate(target, [Replaced(2, 4)], tmp_path / "small")
    assert folders(tmp_path) == []


def test_bytes_of_every_type_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both by the kernel and in memory; every tensor starts at a multiple of its element size, as the format wants."""

    def refuses(*arguments: object, **options: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    tensors = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.randn(5, 3),
        "c": torch.empty(0, 4),
        "d": torch.tensor(2.5, dtype=torch.float64),
        "e": torch.randn(7).bfloat16(),
        "f": torch.tensor([True, False, True]),
    }
    save_file(tensors, tmp_path / "source.safetensors")
    found = list(module.spans(tmp_path / "source.safetensors").items())
    for name in ("kernel", "memory"):
        if name == "memory":
            monkeypatch.setattr(module.os, "copy_file_range", refuses, raising=False)
        (tmp_path / name).mkdir()
        module.write_shards([(f"new.{key}", span) for key, span in sorted(found)], tmp_path / name)
        copied = load_file(tmp_path / name / "model.safetensors")
        assert copied.keys() == {f"new.{key}" for key in tensors}
        assert all(torch.equal(copied[f"new.{key}"], tensor) for key, tensor in tensors.items())
        for key, span in module.spans(tmp_path / name / "model.safetensors").items():
            assert span.start % tensors[key.removeprefix("new.")].element_size() == 0


def test_a_signal_to_end_leaves_nothing(made: Callable[..., Path], tmp_path: Path) -> None:
    script = (
        "import os, sys, time\n"
        "from zero_ds.cli import main as cli\n"
        "from zero_ds.runtime import safetensors\n"
        "safetensors.BLOCK = 100\n"
        "def slow(*arguments):\n    print('copying', flush=True)\n    time.sleep(0.5)\n    return 100\n"
        "os.copy_file_range = slow\n"
        "cli.main(sys.argv[1:])\n"
    )
    arguments = ["surrogate", "--target", str(made("llama", tied=True)), "--replace", "2:4", "--out", "small"]
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "copying\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(scaled(60)) == 128 + signal.SIGTERM
    assert folders(tmp_path) == []


def test_a_signal_while_writers_start_does_not_wait_for_them(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal's exception is raised when a writer is copying, and the submission of its work has not returned."""
    submit, copying, stop = ThreadPoolExecutor.submit, Event(), Event()
    copied = []

    def copy(source: int, target: int, count: int, start: int) -> int:
        if not copied:
            copying.set()
            stop.wait(scaled(5))
        copied.append(start)
        return count

    def interrupted(pool: ThreadPoolExecutor, *work: Any) -> Any:
        future = submit(pool, *work)
        if work[0] is module._write_shard:
            assert copying.wait(scaled(60))
            raise SystemExit(143)
        return future

    monkeypatch.setattr(module, "BLOCK", 100)
    monkeypatch.setattr(module, "Event", lambda: stop)
    monkeypatch.setattr(module.os, "copy_file_range", copy, raising=False)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(SystemExit):
        build_surrogate(made("llama", tied=True), [Replaced(2, 4)], tmp_path / "small")
    assert len(copied) == 1, "the writer stops after the block that it was copying"
    assert folders(tmp_path) == []


def surrogate_command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["surrogate", *(str(argument) for argument in arguments)])


def test_a_finished_surrogate_is_only_taken_for_the_same(made: Callable[..., Path], tmp_path: Path) -> None:
    target, out = made("llama", tied=True), tmp_path / "small"
    for _ in range(2):
        assert surrogate_command("--target", target, "--replace", "2:4", "--out", out).exit_code == 0
    for other, ranges in ((made("llama", tied=True, seed=1), "2:4"), (target, "1:4")):
        result = surrogate_command("--target", other, "--replace", ranges, "--out", out)
        assert isinstance(result.exception, ConfigError) and "another surrogate" in str(result.exception)
    (out / "model.safetensors").unlink()
    result = surrogate_command("--target", target, "--replace", "2:4", "--out", out)
    assert isinstance(result.exception, ConfigError) and "no safetensors weights" in str(result.exception)


def test_from_a_trajectory(made: Callable[..., Path], tmp_path: Path) -> None:
    target, out, folder = made("llama", tied=True), tmp_path / "small", tmp_path / "trajectory"
    folder.mkdir()
    content = {"target_hash": model_hash(target), "model": "m", "transition": {"reason": "Too few."}}

    def ask(text: str) -> Any:
        (folder / "trajectory.json").write_text(text)
        return surrogate_command("--target", target, "--from-trajectory", folder, "--out", out)

    for text in ("[]", "null", "{", "{}", json.dumps({**content, "proposed": "2:4"})):
        assert "holds no readable trajectory.json" in str(ask(text).exception)
    assert "proposes no layers: Too few." in str(ask(json.dumps({**content, "proposed": None})).exception)
    proposed = {**content, "proposed": {"replace": "2:4"}}
    other = ask(json.dumps({**proposed, "target_hash": "x"}))
    assert isinstance(other.exception, ConfigError) and "measured on another model (m)" in str(other.exception)
    assert not out.exists()
    assert ask(json.dumps(proposed)).exit_code == 0 and str(read_surrogate(out).plan) == "T(2,4)"


def test_interrupted_writing_leaves_nothing(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    target = made("llama", tied=True)
    monkeypatch.setattr(module, "_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_surrogate(target, [Replaced(2, 4)], tmp_path / "small")
    assert folders(tmp_path) == []


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"plan": {"depth": 6}}', '{"family": "llama", "plan": {}}'])
def test_damaged_surrogate_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "surrogate.json").write_text(text)
    with pytest.raises(ConfigError, match=r"damaged .*build the surrogate again"):
        read_surrogate(tmp_path)


def test_no_surrogate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="build one with `zero-ds surrogate`"):
        read_surrogate(tmp_path)


def test_target_hash_tells_models_apart(made: Callable[..., Path], tmp_path: Path) -> None:
    target = made("llama", tied=True)
    assert model_hash(target) == model_hash(copy(target, tmp_path / "same"))
    hashes = {
        model_hash(target),
        model_hash(made("llama", tied=False)),
        model_hash(made("llama", tied=True, seed=1)),
    }
    changed = copy(target, tmp_path / "changed")
    content = bytearray((changed / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (changed / "model.safetensors").write_bytes(content)
    assert len(hashes | {model_hash(changed)}) == 4


def early_hash(folder: Path) -> str:
    """Returns the hash of the first version, which does not cover the end of tensors between 4 and 64 KB."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    content = (folder / "model.safetensors").read_bytes()
    for name, span in sorted(spans(folder / "model.safetensors").items()):
        digest.update(f"{name}{span.dtype}{span.shape}".encode())
        for piece in range(min(16, -(-span.size // 4096))):
            start = span.start + piece * max(0, span.size - 4096) // 15
            digest.update(content[start : start + min(4096, span.size)])
    return digest.hexdigest()[:32]


def test_target_hash_reads_small_tensors_whole(made: Callable[..., Path], tmp_path: Path) -> None:
    """A change of any tensor's last byte is seen, or of any byte up to 64 KB; old hashes are still compared."""
    folder = copy(made("llama", tied=True), tmp_path / "model")
    before, early = model_hash(folder), early_hash(folder)
    assert model_hash(folder, like=early) == early != before == model_hash(folder, like=before)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for span in spans(file).values():
        for place in {0, span.size // 3, span.size // 2, span.size - 4097, span.size - 1}:
            if 0 <= place < span.size:
                changed = bytearray(content)
                changed[span.start + place] ^= 1
                file.write_bytes(changed)
                assert model_hash(folder) != before
    assert any(4096 < span.size < 1 << 16 for span in spans(file).values())
    assert model_hash(folder, like=early) == early_hash(folder)


def test_every_family_has_a_tiny_model() -> None:
    assert set(tiny.FAMILIES) == set(FAMILIES), "tests/support/tiny.py needs a builder for each family"
