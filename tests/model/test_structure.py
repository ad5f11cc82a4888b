"""Decoders without code of their own: found by their structure, verified, or refused with the check that failed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decoder_census
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.config.schema import RunConfig
from zero_ds.model.decoders import structure
from zero_ds.model.decoders.cut import check_cut, cut_config
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.decoders.listing import STEPS, Proofs, Verdict, default_config, page, verdict
from zero_ds.model.decoders.shrink import active_share, causal_class, is_expert, seeded, shrunk, small_model
from zero_ds.model.layer_plan import Replaced
from zero_ds.runtime.errors import ConfigError
from zero_ds.surrogate.build import build_surrogate


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


UNLIKE = (
    "qwen3_moe",  # experts, a tensor for each in files
    "gpt_oss",  # experts in one tensor, sinks that sdpa cannot compute, sliding window
    "deepseek_v3",  # first layers dense, compressed keys and values
    "qwen3_next",  # linear attention in most layers
    "nemotron_h",  # layers of which each is one of several kinds
    "cohere2",  # sliding window, scaled logits, tied
    "vaultgemma",  # soft-capping
    "gemma4_text",  # layers with heads of different widths
    "stablelm",  # partial rotary positions
    "gptj",  # head with a bias, parallel attention
    "opt",  # table of positions, tied, layers deep inside
    "falcon_h1",  # attention and state space side by side
    "recurrent_gemma",  # recurrent layers, a cap under another name, no cache in its output
)


@pytest.mark.parametrize("model_type", UNLIKE)
def test_unlike_types_go_through_the_method(
    model_type: str, run_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import export_helper

    export_helper.here(monkeypatch)
    done: list[str] = []
    decoder_census.prove(model_type, tmp_path, run_config, done.append)
    assert done == ["model", *decoder_census.STEPS]


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    decoder_census.write_model("qwen3_moe", tmp_path / "moe")
    return tmp_path / "moe"


def changed(folder: Path, **entries: Any) -> DecoderFolder:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return DecoderFolder(folder)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "t5", "num_layers": 2}, "no causal language model|encoder-decoder"),
        ({"model_type": "bart"}, "encoder-decoder"),
        ({"model_type": "clip_vision_model"}, "no causal language model"),
        ({"model_type": "siglip"}, "no causal language model"),
        ({"model_type": "clip"}, "no causal language model for 'clip_text_model'"),
        ({"model_type": "vit"}, "a vision encoder is given as encoder.path"),
        ({"model_type": "dinov2"}, "a vision encoder is given as encoder.path"),
        ({"model_type": "longcat_flash", "num_layers": 2}, "no list of"),
        ({"model_type": "bert"}, "see later tokens"),
        ({"model_type": "deepseek_v4"}, "states of 4 dimensions"),
        ({"model_type": "not-a-type"}, "cannot be used .*not-a-type"),
        ({"model_type": "olmo2", "num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"model_type": "olmo2", "quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized"),
    ],
)
def test_what_is_not_a_decoder_is_refused_in_one_sentence(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=reason) as caught:
        _ = DecoderFolder(tmp_path).family
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_decoder_is_not_an_encoder(moe: Path) -> None:
    from zero_ds.model.encoders import encoder_of

    with pytest.raises(ConfigError, match="qwen3_moe"):
        encoder_of(moe)


def test_damaged_folders(moe: Path) -> None:
    """Weights and config must agree in depth and names, and may not be quantized."""
    with pytest.raises(ConfigError, match=r"hold model\.layers\.5"):
        _ = changed(moe, num_hidden_layers=5).spans
    with pytest.raises(ConfigError, match=r"lack model\.layers\.6"):
        _ = changed(moe, num_hidden_layers=7).spans
    with pytest.raises(ConfigError, match="num_hidden_layers='six'"):
        _ = changed(moe, num_hidden_layers="six").depth
    stored = load_file(moe / "model.safetensors")
    del stored["model.layers.3.mlp.experts.2.up_proj.weight"]
    save_file(stored, moe / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack model\.layers\.3\.mlp\.experts\.2\.up_proj"):
        _ = changed(moe, num_hidden_layers=6).spans
    with pytest.raises(ConfigError, match="is quantized"):
        _ = changed(moe, quantization_config={"quant_method": "fp8"}).family


def test_a_number_of_layers_without_weights_is_refused_before_they_are_built(moe: Path) -> None:
    with pytest.raises(ConfigError, match="counts 1000000 layers, but the names of the weights end with number 5"):
        _ = changed(moe, num_hidden_layers=1000000).family


@pytest.mark.parametrize("model_type", ["olmo2", "llama"])
def test_weights_of_more_layers_than_the_config_says_are_not_loaded(model_type: str, tmp_path: Path) -> None:
    """The library would ignore them, and compute with the first layers alone."""
    decoder_census.write_model(model_type, tmp_path)
    with pytest.raises(ConfigError, match=r"hold model\.layers\.4.*, which config\.json does not know"):
        changed(tmp_path, num_hidden_layers=4).load(dtype=torch.float32)


@pytest.mark.parametrize(
    ("stored_as", "dtype", "reason"),
    [
        ("weight", torch.float8_e4m3fn, r"q_proj\.weight .* is quantized \(F8_E4M3\)"),
        ("weight", torch.int8, r"q_proj\.weight .* is quantized \(I8\)"),
        ("qweight", torch.int32, r"is quantized \(model\.layers\.0\.self_attn\.q_proj\.qweight\)"),
        ("weight_packed", torch.int32, r"is quantized \(model\.layers\.0\.self_attn\.q_proj\.weight_packed\)"),
    ],
)
def test_quantized_weights_that_the_config_does_not_mention(
    moe: Path, stored_as: str, dtype: torch.dtype, reason: str
) -> None:
    stored = load_file(moe / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    stored[f"{name}.{stored_as}"] = stored.pop(f"{name}.weight")[:, ::2].to(dtype).contiguous()
    save_file(stored, moe / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=reason):
        _ = DecoderFolder(moe).spans


def test_files_must_give_the_tensors_of_the_class(moe: Path, tmp_path: Path) -> None:
    folder = DecoderFolder(moe)
    folder.check_class_tensors()
    group = next(group for group in folder.class_tensors if "model.layers.2.mlp.experts.down_proj" in group.targets)
    folder.class_tensors.remove(group)
    with pytest.raises(ConfigError, match=r"give model\.layers\.2\.mlp\.experts\.down_proj the shape None, its class"):
        build_surrogate(folder, [Replaced(2, 4)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_and_an_uncut_copy_are_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files must give the class's tensors, and a surrogate with nothing replaced must equal its target."""
    from zero_ds.model.decoders import conversion, cut

    small = shrunk(default_config("qwen3_moe"))
    reread = conversion.Conversion.reread
    swapped = {"model.layers.0.mlp.experts.down_proj": "model.layers.1.mlp.experts.down_proj"}

    def other(self: Any) -> Any:
        read = reread(self)
        return {name: read[swapped.get(name, name)] for name in read}

    with monkeypatch.context() as patched:
        patched.setattr(conversion.Conversion, "reread", other)
        with pytest.raises(structure.UnverifiedError, match=r"do not become those of its class \(model\.layers\.0"):
            structure._inspect(small, small)

    def sparser(config: Any) -> Any:
        config.num_experts_per_tok = 1
        return config

    monkeypatch.setattr(cut, "read_again", sparser)
    with pytest.raises(structure.UnverifiedError, match="a surrogate with nothing replaced is not equal to it"):
        structure._inspect(small, small)


def test_a_claim_that_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that does something between its norm and its head is not described by them."""
    config = shrunk(default_config("qwen3_moe"))
    kind = causal_class(config)
    forward = kind.forward

    def other(self: Any, **arguments: Any) -> Any:
        output = forward(self, **arguments)
        output.logits = output.logits.roll(1, -1)
        return output

    monkeypatch.setattr(kind, "forward", other)
    with pytest.raises(structure.UnverifiedError, match="differs from its own logits"):
        structure._inspect(config, config)


def test_verdicts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    config = default_config("olmo2")
    first = structure.describe(config)
    monkeypatch.setattr(structure, "_inspect", None)
    assert structure.describe(config) == first
    config.hidden_size *= 2  # a width changes no structure
    assert structure.describe(config) == first


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("qwen3_next", {"packing": True}, "those of qwen3_next mix samples"),
        ("opt", {"max_length": 2000}, "1024 positions"),
        ("mpt", {"max_length": 2000}, "1024 positions"),
    ],
)
def test_rows_that_a_decoder_cannot_read(
    run_config: Callable[..., RunConfig], tmp_path: Path, model_type: str, change: dict[str, Any], message: str
) -> None:
    from zero_ds.training.setup import load_model

    decoder_census.write_model(model_type, tmp_path / "target")
    config = run_config("adapter", target=str(tmp_path / "target"), decoder="target")
    config = config.model_copy(update={"data": config.data.model_copy(update=change)})
    with pytest.raises(ConfigError, match=message):
        load_model(config, {"zero_optimization": {"stage": 0}})


def test_a_decoder_that_states_no_number_of_positions_answers_prompts_of_any_length(tmp_path: Path) -> None:
    from zero_ds.grafting.named_model import ANY_LENGTH, find_model
    from zero_ds.grafting.named_model import load_model as load_named

    decoder_census.write_model("mamba", tmp_path)
    assert load_named(find_model(str(tmp_path))).encoder.max_length == ANY_LENGTH


# -- cuts --------------------------------------------------------------------------------------------------------------


def test_layers_keep_their_kinds() -> None:
    """Lists, layer numbers, first layers and layers with entries of their own follow the layers that stay."""
    config = default_config("deepseek_v3")
    family = structure.describe(config)
    assert cut_config(config, family, [0, 2, 4, 5]).first_k_dense_replace == 2
    hybrid = default_config("gemma4_text")
    hybrid.hidden_size_per_layer_input = 0
    described = structure.describe(hybrid)
    cut = cut_config(hybrid, described, [0, 5])
    assert cut.layer_types == [hybrid.layer_types[0], hybrid.layer_types[5]]
    assert cut.per_layer_config[1].head_dim == hybrid.per_layer_config[5].head_dim != cut.per_layer_config[0].head_dim
    check_cut(hybrid, described, [0, 5])


def test_a_cut_that_the_class_cannot_express_is_refused_by_name() -> None:
    config = default_config("diffllama")
    family = structure.describe(config)
    check_cut(config, family, [0, 1, 2])
    with pytest.raises(ConfigError, match=r"layer 5 as number 1 would have .*lambda_init"):
        check_cut(config, family, [0, 5])


def test_an_entry_that_repeats_the_depth_is_cut_with_it() -> None:
    """A class may read the number of its layers from an entry of another name."""
    config = default_config("olmo2")
    family = structure.describe(config)
    config.num_blocks = config.num_hidden_layers
    cut = cut_config(config, family, [0, 2, 5])
    assert cut.num_blocks == cut.num_hidden_layers == 3


def test_a_type_whose_results_depend_on_training_is_refused() -> None:
    """Switching off what is called noise changes the experts that these routers choose."""
    with pytest.raises(structure.UnverifiedError, match="in training, without dropout and noise"):
        structure.describe(default_config("phimoe"))


def test_a_class_that_changes_weights_after_loading_is_refused() -> None:
    config = default_config("youtu")
    config.pad_token_id = 0
    with pytest.raises(structure.UnverifiedError, match=r"changes model\.embed_tokens\.weight after loading"):
        structure.describe(config)


def test_shared_keys_and_values_are_not_cut_in_two() -> None:
    """The last layers read keys and values of an earlier one, which has to stay."""
    from transformers import CONFIG_MAPPING

    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    kind: Any = CONFIG_MAPPING["gemma4_unified_text"]
    config = kind(num_hidden_layers=6, layer_types=kinds, num_kv_shared_layers=2)
    family = structure.describe(config)
    check_cut(config, family, [0, 2, 3, 4, 5])
    with pytest.raises(ConfigError, match=r"Gemma4UnifiedForCausalLM .*(layers|layer)"):
        check_cut(config, family, [0, 1, 4, 5])


# -- mixtures of experts -----------------------------------------------------------------------------------------------


def test_experts_count_as_far_as_they_compute(moe: Path, tmp_path: Path) -> None:
    from zero_ds.surrogate.report import audit
    from zero_ds.training.planning.flops import step_flops

    config = DecoderFolder(moe).text_config()
    assert active_share(config) == 0.5
    build_surrogate(moe, [Replaced(2, 4)], tmp_path / "cut")
    counts = audit(tmp_path / "cut", moe)["parameters"]
    experts = sum(s.parameters for n, s in DecoderFolder(moe).spans.items() if is_expert(n))
    assert counts["active_target"] == counts["target"] - experts // 2
    everything = step_flops(changed(moe, num_experts_per_tok=4), length=8, supervised=4)
    assert step_flops(changed(moe, num_experts_per_tok=2), length=8, supervised=4) < everything


def test_a_dense_translator(moe: Path, tmp_path: Path) -> None:
    out = tmp_path / "dense"
    command = ["surrogate", "--target", str(moe), "--replace", "2:4", "--out", str(out)]
    done = CliRunner().invoke(app, [*command, "--translator", "dense", "--translator-width", "40"])
    assert done.exit_code == 0, done.output
    surrogate = DecoderFolder(out)
    (number,) = surrogate.surrogate.plan.translators  # type: ignore[union-attr]
    decoder: Any = surrogate.load(dtype=torch.float32)
    layer: Any = surrogate.family.layers(decoder)[number]
    assert tuple(layer.mlp.gate_proj.weight.shape) == (40, 32) and not layer.mlp.down_proj.weight.any()
    assert any(is_expert(name) for name, _ in surrogate.family.layers(decoder)[number + 1].named_parameters())
    source = load_file(moe / "model.safetensors")["model.layers.2.self_attn.q_proj.weight"]
    assert torch.equal(layer.self_attn.q_proj.weight, source)
    with torch.no_grad():
        assert torch.isfinite(decoder(input_ids=torch.arange(5, 15)[None]).logits).all()


def test_the_plan_of_a_dense_translator_has_its_parameters(
    moe: Path, run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Planned from the target, a surrogate has the sizes of its files, whether it is built or not."""
    from zero_ds.training.planning.architecture import architecture

    build_surrogate(moe, [Replaced(2, 4)], tmp_path / "dense", dense_width=40)
    config = run_config("pretrain", target=str(moe), surrogate=str(tmp_path / "dense"))
    spans = DecoderFolder(tmp_path / "dense").spans
    decoder = sum(span.parameters for span in spans.values())
    translator = sum(span.parameters for name, span in spans.items() if name.startswith("model.layers.2."))
    unbuilt = config.model_copy(update={"surrogate": "runs/T2-4"})
    for found in (
        architecture(config),
        architecture(unbuilt, dense_width=40),
        architecture(config, plan=DecoderFolder(tmp_path / "dense").plan),
    ):
        assert sum(found.size.groups["translator"]) == translator
        assert found.size.decoder.parameters == decoder and found.size.decoder.active is not None
    with pytest.raises(ConfigError, match=r"are dense networks of 40 units; to plan others, say with --replace"):
        architecture(config, dense_width=48)


def test_experts_train_under_zero3(moe: Path, run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Two ranks train through frozen experts, into copied ones that follow the target, and into dense translators."""
    from distributed_helper import run_ranks, train_all

    build_surrogate(moe, [Replaced(2, 4)], tmp_path / "copy")
    build_surrogate(moe, [Replaced(2, 4)], tmp_path / "dense", dense_width=40)
    common: dict[str, Any] = {"target": str(moe), "zero": "zero3", "max_steps": 1}
    follows = {"surrogate": str(tmp_path / "copy"), "distill": {"logits": 1.0, "hidden": 1.0}}
    configs = [
        run_config("encoder", tmp_path / "one", **follows, **common),
        run_config("pretrain", tmp_path / "two", surrogate=str(tmp_path / "dense"), **common),
    ]
    # experts in an attention that is called by name; other names in files; weights initialized by their shapes
    for model_type in ("jetmoe", "axk1", "xlstm"):
        target, cut = tmp_path / model_type, tmp_path / f"{model_type}-cut"
        decoder_census.write_model(model_type, target)
        build_surrogate(target, [Replaced(2, 4)], cut)
        models = {**common, "target": str(target), "surrogate": str(cut)}
        configs.append(run_config("pretrain", tmp_path / f"{model_type}-run", **models))
    assert run_ranks(train_all, 2, configs) == [["step-000001"] * 5] * 2


def test_a_class_without_dense_layers(tmp_path: Path) -> None:
    decoder_census.write_model("mixtral", tmp_path / "mixtral")
    with pytest.raises(ConfigError, match=r"Mixtral has no dense layers at .*; keep --translator copy"):
        build_surrogate(tmp_path / "mixtral", [Replaced(2, 4)], tmp_path / "out", dense_width=40)
    assert not (tmp_path / "out").exists()


# -- the text tower of a multimodal class ------------------------------------------------------------------------------


def test_a_text_tower_that_no_family_names(tmp_path: Path) -> None:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    words = tiny.tokenizer()
    text = {**tiny._shape(words), "model_type": "mistral", "num_hidden_layers": 4, "head_dim": 8}
    vision: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "model_type": "pixtral", "image_size": 32, "patch_size": 16, "head_dim": 8}
    with seeded(0):
        Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)).save_pretrained(
            tmp_path
        )
    folder = DecoderFolder(tmp_path)
    assert folder.family.name == "mistral" and folder.spans.keys() == folder.expected_shapes.keys()
    build_surrogate(folder, [Replaced(1, 2)], tmp_path / "cut")
    assert type(DecoderFolder(tmp_path / "cut").load(dtype=torch.float32)).__name__ == "MistralForCausalLM"


# -- the list ----------------------------------------------------------------------------------------------------------


def test_the_list_of_types() -> None:
    done = CliRunner().invoke(app, ["models", "olmo2", "llama", "bert"])
    assert done.exit_code == 0
    assert "olmo2" in done.output and "registered" in done.output and "2 of 3 types" in done.output
    wrong = CliRunner().invoke(app, ["models", "qwen3_mo"])
    assert isinstance(wrong.exception, ConfigError) and "qwen3_moe" in str(wrong.exception)


def test_the_page_says_what_the_code_finds() -> None:
    """docs/models.md is generated; a sample of its rows is compared with the verdicts of today."""
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = {row.split(" | ")[0]: row for row in text.splitlines() if row.startswith("| ")}
    for model_type in ("llama", "olmo2", "qwen3_moe", "bert", "bart", "gptj"):
        told = verdict(model_type)
        cells = rows[f"| {model_type}"].removesuffix(" |").split(" | ")
        assert [*cells[1:3], cells[-1]] == [told.class_name, told.how, told.note], "run tools/census.py --page again"


def test_the_page_of_a_census() -> None:
    verdicts = [Verdict("one", "OneForCausalLM", "verified", "eager attention"), Verdict("two", "Two", "refused", "no")]
    proofs = {"one": Proofs(frozenset(STEPS)), "two": Proofs(frozenset())}
    text = page(verdicts, proofs)
    assert "1 of them can be decoders" in text and "1 types passed every proof" in text
    assert text.endswith(
        "| type | class | verdict | surrogate | trajectory | gradients | graft | export | ZeRO-3 | note |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| one | OneForCausalLM | verified | yes | yes | yes | yes | yes | yes | eager attention |\n"
        "| two | Two | refused |  |  |  |  |  |  | no |\n"
    )
    failed = {"one": Proofs(frozenset({"surrogate"}), "it failed a|b.")}
    assert "| yes |  |  |  |  |  | eager attention; it failed a/b |" in page(verdicts[:1], failed)


def test_small_copies_draw_no_random_numbers() -> None:
    before = torch.random.get_rng_state()
    small_model(shrunk(default_config("olmo2")))
    assert torch.equal(before, torch.random.get_rng_state())
