"""Unknown keys of recipes and overrides are errors of one sentence, and the resolved configuration repeats a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from zero_ds.config import resume
from zero_ds.config.loading import load_run, recipe_names
from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError, did_you_mean

BASE = {"stage": "encoder", "target": "llm", "surrogate": "small", "encoder": {"path": "clip"}, "out": "run"}


def write(folder: Path, content: object, name: str = "recipe.yaml") -> str:
    path = folder / name
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    return write(tmp_path, BASE)


@pytest.mark.parametrize(
    ("override", "key", "meant"),
    [
        ("global_bach=8", "global_bach", "global_batch"),
        ("optimizer.learning_rat=1", "optimizer.learning_rat", "learning_rate"),
        ("encoder.train_last_layer=8", "encoder.train_last_layer", "train_last_layers"),
        ("data.max_lenght=64", "data.max_lenght", "max_length"),
        ("data.sources=[{path: a.json, rot: images}]", "data.sources.0.rot", "root"),
        ("checkpoint.every_step=5", "checkpoint.every_step", "every_steps"),
        ("distill.logit=1", "distill.logit", "logits"),
        ("adapter.boundary_token=true", "adapter.boundary_token", "boundary_tokens"),
    ],
)
def test_unknown_key_names_the_nearest(recipe: str, override: str, key: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(recipe, [override])
    assert f"unknown key '{key}'" in str(caught.value)
    assert f"did you mean '{meant}'" in str(caught.value)


def test_unknown_key_in_the_recipe_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'data\.suprvise'; did you mean 'supervise'"):
        load_run(write(tmp_path, {**BASE, "data": {"suprvise": "auto"}}))


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("global_batch=many", "global_batch='many'"),
        ("global_batch=0", "global_batch=0"),
        ("micro_batch=1.5", "micro_batch=1.5"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate='fast'"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate=-1"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("optimizer.betas=[0.9, 3]", "optimizer.betas.1=3"),
        ("optimizer.learning_rates.adapter=-1", "optimizer.learning_rates.adapter=-1"),
        ("optimizer=5", "optimizer=5"),
        ("optimizer.learning_rates.adaptr=1e-3", "adaptr"),
        ("precision=fp8", "precision='fp8'"),
        ("activation_checkpointing=perhaps", "activation_checkpointing='perhaps'"),
        ("data.sources=a.json", "data.sources='a.json'"),
        ("data.sources=[{root: images}]", "data.sources.0.path"),
        ("encoder=clip", "encoder='clip'"),
        ("distill.next_token=2", "distill.next_token=2"),
        ("lora.layers=[]", "lora.layers=[]: that adapts nothing; name at least one, or leave the key out"),
        ("lora.modules=[]", "lora.modules=[]: that adapts nothing"),
        ("checkpoint.writers=0", "checkpoint.writers=0: input should be 'auto', or greater than or equal to 1."),
        ("checkpoint.writers=all", "checkpoint.writers='all': input should be 'auto', or a valid integer"),
        ("checkpoint.asynchronous=perhaps", "checkpoint.asynchronous='perhaps': input should be 'auto', True or False"),
        ("out=null", "out=None"),
        ("no_value", "'no_value' is not an override"),
        ("=5", "'=5' is not an override"),
        ("data.sources=[", "data.sources cannot be read"),
    ],
)
def test_wrong_value_is_one_sentence(recipe: str, override: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(recipe, [override])
    message = str(caught.value)
    assert complaint in message
    assert "\n" not in message and message.endswith((".", "?"))


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=010", 10),
        ("seed=0", 0),
        ("seed=1_000", 1000),
        ("seed=0x10", 16),
        ("out=010", "010"),
        ("out=2026-01-31", "2026-01-31"),
        ("out=12:30:00", "12:30:00"),
        ("out=runs/try #2", "runs/try #2"),
        ("out='runs/try #2'", "runs/try #2"),
        ("optimizer.eps=1.5e-8", 1.5e-8),
        ("data.system_prompt=Answer # briefly", "Answer # briefly"),
        ("data.chat_template=null", None),
        ("data.image_prompt=off", "off"),
        ("data.grouping=off", "off"),
        ("data.system_prompt=yes", "yes"),
        ("data.packing=on", True),
        ("data.packing=No", False),
        ("activation_checkpointing=off", False),
        ("activation_checkpointing=Yes", True),
        ("activation_checkpointing=true", True),
    ],
)
def test_an_override_is_read_as_it_is_meant(recipe: str, override: str, value: object) -> None:
    """YAML 1.1 knows octal numbers, dates, numbers to the base 60 and `off`, and takes ` #` for a comment."""
    found: object = load_run(recipe, [override])
    for name in override.partition("=")[0].split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("zero=2", "zero=2: it is the name of a file in ds_configs/ or the path of one; did you mean zero2?"),
        ("out=5", "out=5 is not a text; if you mean the text 5, write out='\"5\"'."),
        ("out=#2", "out=None"),
        ("data.system_prompt=true", "data.system_prompt=True is not a text; if you mean the text"),
        ("max_steps=true", "max_steps=True: it is a number"),
        ("optimizer.learning_rate=false", "optimizer.learning_rate=False: it is a number"),
        ("out=~nobody_here/run", "out='~nobody_here/run': ~nobody_here is not the home folder of a user here"),
        ("zero=~nobody_here/z.json", "~nobody_here is not the home folder of a user here"),
        (f"data.sources={'[' * 2000}", "the value of data.sources cannot be read"),
        ("init_from=[a, 1.5]", "init_from.1=1.5 is not a text; if you mean the text 1.5, write"),
        ("out='a' # b", "the value of out ends before '# b', which would be lost"),
        ("init_from=[a] # b", "the value of init_from ends before '# b'"),
        ("init_from=[a #1, b]", "the value of init_from cannot be read"),
        ("data.sources=[{path: a, path: b}]", "the key 'path' appears twice"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate=inf"),
        ("seed=1:30", "seed='1:30'"),
    ],
)
def test_a_value_that_could_be_taken_in_two_ways_is_refused(recipe: str, override: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(recipe, [override])
    assert complaint in str(caught.value) and "\n" not in str(caught.value)
    assert not str(caught.value).endswith("..")


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2\n", "optimizer: {eps: 1.0e-8, eps: 1.0e-7}\n"])
def test_a_key_that_appears_twice(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(BASE) + text)
    with pytest.raises(ConfigError, match=r"recipe.yaml cannot be read: the key '(seed|eps)' appears twice\.$"):
        load_run(str(path))


def test_anchors_and_a_byte_order_mark_in_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    shared = "optimizer: &o {eps: 1.0e-7}\npreview: {<<: {samples: 2}, tokens: 3}\n"
    path.write_text("\ufeff" + yaml.safe_dump(BASE) + shared, encoding="utf-8")
    config = load_run(str(path))
    assert (config.optimizer.eps, config.preview.samples, config.preview.tokens) == (1e-7, 2, 3)


def test_a_merged_key_that_is_replaced_does_not_appear_twice(tmp_path: Path) -> None:
    """PyYAML writes merged entries into a mapping that it has yet to build, where the mapping replaces them."""
    path = tmp_path / "recipe.yaml"
    rates = "optimizer: {learning_rates: &b {<<: {adapter: 1.0e-4}, adapter: 2.0e-4}}\nlosses: {<<: *b}\n"
    path.write_text(yaml.safe_dump(BASE) + rates)
    config = load_run(str(path))
    assert config.optimizer.learning_rates == config.losses == {"adapter": 2e-4}


def test_the_home_folder_in_paths(recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shell leaves `~` as it is after `key=`, and a folder of that name would be made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["out=~/run", "zero=~/mine.json", "nvme_path=~/disk", "init_from=[~/a, b]", "continue_from=~/c"]
    config = load_run(recipe, words)
    assert (config.out, config.zero) == (f"{tmp_path}/run", f"{tmp_path}/mine.json")
    assert config.nvme_path == f"{tmp_path}/disk"
    assert config.starts == (f"{tmp_path}/a", "b", f"{tmp_path}/c")
    assert config.init_from == ("~/a", "b"), "a part of the fingerprint, which is the same for everybody"
    words = ["init_from=[~nobody_here/a]", "target=~nobody_here/t", "surrogate=~nobody_here/s"]
    elsewhere = load_run(recipe, words)  # as in a manifest that is read on another machine
    with pytest.raises(ConfigError, match="~nobody_here is not the home folder of a user here; write the whole path"):
        assert elsewhere.starts


@pytest.mark.parametrize("key", ["2.limit", "first.limit", "-1", "limit", "\u00b2.limit", "\u0661.limit"])
def test_an_entry_that_a_list_does_not_have(recipe: str, key: str) -> None:
    two = "data.sources=[{path: a.json}, {path: b.json}]"
    with pytest.raises(ConfigError, match=r"data\.sources has entries 0 to 1, and none called"):
        load_run(recipe, [two, f"data.sources.{key}=5"])


def test_an_entry_of_a_data_set_that_is_named_by_a_word(recipe: str) -> None:
    words = ["data.sources=[a.json, genqa-500k]", "data.sources.0.limit=5", "data.sources.1.limit=6"]
    file, registered = load_run(recipe, words).data.sources
    assert (file.path, file.limit) == ("a.json", 5)
    assert (registered, registered.limit) == (registered.model_copy(update={"limit": 6}), 6)
    assert registered.path == load_run(recipe, words[:1]).data.sources[1].path


def test_missing_key_says_how_to_set_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'target' is missing; set it in the recipe or with target=VALUE"):
        load_run(write(tmp_path, {k: v for k, v in BASE.items() if k != "target"}))


def test_overrides(recipe: str) -> None:
    config = load_run(
        recipe,
        [
            "optimizer.learning_rate=1e-4",
            "optimizer.learning_rates.adapter=2E-3",
            "optimizer.eps=1e-08",
            "checkpoint.every_minutes=null",
            "data.sources=[{path: a.json}, {path: b.json, limit: 5}]",
            "encoder.train_last_layers=8",
            "data.sources.1.limit=7",
            "init_from=[one, two]",
            "target=other",
        ],
    )
    assert config.optimizer.learning_rate == 1e-4
    assert config.optimizer.learning_rates == {"adapter": 2e-3}
    assert config.optimizer.eps == 1e-8
    assert config.checkpoint.every_minutes is None
    assert [(s.path, s.limit) for s in config.data.sources] == [("a.json", None), ("b.json", 7)]
    assert config.encoder is not None and (config.encoder.path, config.encoder.train_last_layers) == ("clip", 8)
    assert config.init_from == ("one", "two")
    assert config.target == "other"


def test_the_last_override_wins(recipe: str) -> None:
    assert load_run(recipe, ["seed=1", "seed=2"]).seed == 2


def test_scientific_notation_in_a_recipe(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as a string."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(BASE) + "optimizer:\n  learning_rate: 5e-5\n  learning_rates: {encoder: 1e-6}\n")
    config = load_run(str(path))
    assert (config.optimizer.learning_rate, config.optimizer.learning_rates) == (5e-5, {"encoder": 1e-6})


def test_extends_merges_sections_and_replaces_lists(tmp_path: Path) -> None:
    base = write(
        tmp_path, {**BASE, "optimizer": {"eps": 1e-6, "weight_decay": 0.1}, "init_from": ["a", "b"]}, "base.yaml"
    )
    top = write(tmp_path, {"extends": base, "optimizer": {"eps": 1e-7}, "init_from": ["c"]}, "top.yaml")
    config = load_run(top)
    assert (config.optimizer.eps, config.optimizer.weight_decay, config.init_from) == (1e-7, 0.1, ("c",))


def test_extends_looks_next_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base is found relative to the recipe, not to the working folder."""
    write(tmp_path, {**BASE, "seed": 7}, "base.yaml")
    top = write(tmp_path, {"extends": "base.yaml"}, "top.yaml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_run(top).seed == 7


def test_extends_a_recipe_of_the_package(tmp_path: Path) -> None:
    name = recipe_names()[0]
    assert load_run(write(tmp_path, {"extends": name, "seed": 99})).seed == 99


@pytest.mark.parametrize("length", [1, 2, 3])
def test_recipe_that_extends_itself(tmp_path: Path, length: int) -> None:
    files = [f"{tmp_path}/{n}.yaml" for n in range(length)]
    for n in range(length):
        write(tmp_path, {"extends": files[(n + 1) % length]}, f"{n}.yaml")
    with pytest.raises(ConfigError, match="extends itself"):
        load_run(files[0])


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("smollm2-135m/encodr", "unknown recipe 'smollm2-135m/encodr'; did you mean 'smollm2-135m/encoder'"),
        ("nowhere.yaml", "recipe file nowhere.yaml does not exist"),
    ],
)
def test_unknown_recipe(name: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_run(name)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "stage: [", "just words", "stage: !!python/object:os.x {}", "\x00"])
def test_damaged_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_recipe_file_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run(str(tmp_path / "recipe.yaml"))


def test_surrogate_decoder_needs_a_surrogate(tmp_path: Path) -> None:
    content = {k: v for k, v in BASE.items() if k != "surrogate"}
    with pytest.raises(ConfigError, match=r"no surrogate is given; set surrogate=FOLDER\.$"):
        load_run(write(tmp_path, {**content, "decoder": "surrogate"}))


# -- the resolved configuration ----------------------------------------------------------------------------------------

words = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12
) | st.sampled_from(
    [
        "1e5",
        "2e-3",
        "yes",
        "null",
        "~",
        "0x10",
        "1_000",
        "12:30:00",
        "2024-01-01",
        "- a",
        "a: b",
        "#a",
        "=",
        "1.",
        "nan",
    ]
)
paths = words.filter(lambda text: not text.startswith("~"))  # the home folder of a user who may not exist
configs = st.builds(
    dict,
    stage=st.just("encoder"),
    target=paths,
    surrogate=paths | st.none(),
    encoder=st.none() | st.fixed_dictionaries({"path": paths, "train_last_layers": st.none() | st.integers(1, 9)}),
    data=st.fixed_dictionaries(
        {
            "sources": st.lists(
                st.fixed_dictionaries({"path": paths, "limit": st.none() | st.integers(1, 9)}), max_size=3
            ),
            "system_prompt": st.none() | words | st.just(""),
        }
    ),
    optimizer=st.fixed_dictionaries(
        {
            "learning_rate": st.floats(1e-12, 1e3),
            "learning_rates": st.dictionaries(st.sampled_from(["encoder", "adapter"]), st.floats(1e-12, 1.0)),
        }
    ),
    init_from=st.lists(paths, max_size=2),
    activation_checkpointing=st.sampled_from(["auto", True, False]),
    seed=st.integers(0, 2**31 - 1),
    out=paths,
)


@given(configs)
def test_dump_repeats_the_run(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, object]) -> None:
    config = RunConfig.model_validate(tree)
    path = tmp_path_factory.getbasetemp() / "dump.yaml"
    path.write_text(config.dump(), encoding="utf-8")
    again = load_run(str(path))
    assert again == config
    assert again.fingerprint() == config.fingerprint()


def test_fingerprint_ignores_what_changes_no_number(recipe: str) -> None:
    config = load_run(recipe)
    free = ["out=elsewhere", "log_every=3", "checkpoint.keep=9", "checkpoint.every_steps=1", "preview.every_steps=2"]
    free += ["zero=zero1", "micro_batch=2", *(f"activation_checkpointing={how}" for how in ("true", "false", "auto"))]
    free += ["data.workers=3", "nvme_path=/disk"]
    free += ["kernels=liger", "compile=true", "deterministic=true", "data.shuffle=false"]
    for override in free:
        assert load_run(recipe, [override]).fingerprint() == config.fingerprint(), override
    changed = [
        "seed=1",
        "global_batch=32",
        "optimizer.learning_rate=3e-4",
        "optimizer.learning_rates.adapter=1e-9",
        "data.max_length=64",
        "data.shuffle=true",
        "encoder.feature_layer=-2",
        "attention=flash_attention_2",
        "stage=decoder",
        "init_from=[a]",
        "distill.logits=1",
        "precision=fp32",
    ]
    prints = {load_run(recipe, [override]).fingerprint() for override in changed}
    assert len(prints) == len(changed) and config.fingerprint() not in prints


def test_did_you_mean() -> None:
    assert did_you_mean("adpter", ["adapter", "encoder"]) == "; did you mean 'adapter'?"
    assert did_you_mean("x", ["b", "a"]) == "; known: a, b."
    assert did_you_mean("x", [str(n) for n in range(50)]) == "."


def test_keys_inside_sections_may_be_newer_than_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = RunConfig(stage="encoder", target="t", out="o")
    content = plain.model_dump(mode="json")
    del content["optimizer"]["eps"]
    monkeypatch.setattr(resume, "OLD_BEHAVIOUR", {"frozen_weights": "native", "losses": {}, "optimizer.eps": 1e-8})
    monkeypatch.setattr(resume, "OLD_BEHAVIOUR", {**resume.OLD_BEHAVIOUR, "lora.alpha": 32.0})  # lora is empty
    assert plain.fingerprint() == resume.fingerprint(content)
    changed = plain.model_copy(update={"optimizer": plain.optimizer.model_copy(update={"eps": 1e-6})})
    assert changed.fingerprint() != plain.fingerprint()


def test_old_checkpoints_are_recognised() -> None:
    """This fingerprint was made before `compile`, `kernels`, `frozen_weights` `losses` and `data.shuffle` existed."""
    plain = RunConfig(stage="encoder", target="t", out="o")
    assert plain.fingerprint() == "e114ee41a9cad954"
    assert RunConfig(stage="encoder", target="t", out="o", frozen_weights="int8").fingerprint() != plain.fingerprint()
    assert RunConfig(stage="encoder", target="t", out="o", losses={"z": 0.1}).fingerprint() != plain.fingerprint()
