"""Files of a checkpoint: weights are an ordinary safetensors file, reading checks them, `latest` is never half there.

Whole runs that stop and resume are in test_train.py.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT
from safetensors.torch import load_file

from zero_ds.model.loading import HASH_VERSION
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.safetensors import SafetensorsStream
from zero_ds.training.checkpoint.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_manifest,
    find_checkpoint,
)
from zero_ds.training.checkpoint.load import load_weights_


def written(run: Path, step: int = 1, tensors: dict[str, torch.Tensor] | None = None, **manifest: Any) -> Checkpoint:
    """Writes a checkpoint as a run does, without resume state."""
    folder = run / f"step-{step:06d}"
    folder.mkdir(parents=True)
    tensors = tensors or {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}
    stream = SafetensorsStream(folder / "weights.safetensors", [(n, t.dtype, t.shape) for n, t in tensors.items()])
    for name, tensor in tensors.items():
        stream.write(name, tensor)
    content = {"step": step, "weights_sha256": stream.close(), **manifest}
    (folder / "manifest.json").write_text(json.dumps(content))
    (run / "latest").write_text(f"step-{step:06d}\n")
    return find_checkpoint(run)


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.lists(st.integers(0, 4), max_size=3)
        ),
        max_size=5,
    )
)
@settings(max_examples=40)
def test_stream_writes_what_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory, plan: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "stream.safetensors"
    tensors = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in plan.items() if name != "__metadata__"}
    stream = SafetensorsStream(path, [(n, t.dtype, t.shape) for n, t in tensors.items()])
    for name, tensor in tensors.items():
        stream.write(name, tensor)
    assert stream.close() == hashlib.sha256(path.read_bytes()).hexdigest()
    read = load_file(path)
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_stream_writes_views_in_order(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    stream = SafetensorsStream(tmp_path / "x.safetensors", [("t", torch.float32, matrix.t().shape)])
    stream.write("t", matrix.t())
    stream.close()
    assert torch.equal(load_file(tmp_path / "x.safetensors")["t"], matrix.t())


def test_stream_refuses_what_was_not_declared(tmp_path: Path) -> None:
    stream = SafetensorsStream(tmp_path / "x.safetensors", [("a", torch.float32, torch.Size([2]))])
    with pytest.raises(AssertionError, match="where a"):
        stream.write("b", torch.zeros(2))
    with pytest.raises(AssertionError, match=r"a \(12 bytes\) where a \(8\) was declared"):
        stream.write("a", torch.zeros(3))
    with pytest.raises(AssertionError, match="missing"):
        stream.close()


def test_find_checkpoint_takes_run_folders_and_checkpoint_folders(tmp_path: Path) -> None:
    first, second = written(tmp_path / "run", 3), written(tmp_path / "run", 5)
    assert find_checkpoint(tmp_path / "run") == second
    assert find_checkpoint(tmp_path / "run" / "step-000003") == first
    assert (first.step, second.step) == (3, 5)


@pytest.mark.parametrize(
    ("latest", "manifest", "complaint"),
    [
        (None, None, "holds no checkpoint .manifest.json is missing.; did the run finish?"),
        ("", None, "does not name a checkpoint; write the name of a step-. folder into it"),
        ("../elsewhere", None, "does not name a checkpoint"),
        ("step-000009", None, "holds no checkpoint"),
        ("\udcff", None, "does not name a checkpoint"),
        ("step-000001", "{", "cannot be read .*use another checkpoint"),
        ("step-000001", "[]", "cannot be read .*use another checkpoint"),
        ("step-000001", '{"step": "x"}', "cannot be read .*use another checkpoint"),
        ("step-000001", '{"step": 1, "relies_on": "x"}', "cannot be read .*use another checkpoint"),
    ],
)
def test_folders_without_a_checkpoint(tmp_path: Path, latest: str | None, manifest: str | None, complaint: str) -> None:
    (tmp_path / "step-000001").mkdir()
    if latest is not None:
        (tmp_path / "latest").write_text(latest, errors="surrogateescape")
    if manifest is not None:
        (tmp_path / "step-000001" / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        find_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_weights(tmp_path: Path) -> None:
    made = written(tmp_path)
    assert torch.equal(made.weights()["b"], torch.ones(4))
    path = made.folder / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    damaged = "is damaged: its content has changed since it was saved; use another checkpoint"
    with pytest.raises(CheckpointError, match=damaged):
        made.weights()
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file or directory; use another checkpoint"):
        made.weights()


def test_resume_state_that_is_gone(tmp_path: Path) -> None:
    made = written(tmp_path)
    with pytest.raises(CheckpointError, match=r"progress\.json cannot be read"):
        made.progress()
    path = made.folder / "resume" / "progress.json"
    path.parent.mkdir(exist_ok=True)
    for content in ("[1, 2]", '"step"', "3", "null"):
        path.write_text(content)
        with pytest.raises(CheckpointError, match=r"progress\.json") as caught:
            made.progress()
        assert "\n" not in str(caught.value)


# -- a run folder that is to be resumed --------------------------------------------------------------------------------


class Unchanged:
    """A configuration with the fingerprint in a checkpoint's manifest."""

    def __init__(self, run: Path) -> None:
        self._manifest = json.loads((run / "step-000002" / "manifest.json").read_text())

    def fingerprint(self) -> str:
        return str(self._manifest["fingerprint"])

    def model_dump(self, mode: str) -> dict[str, Any]:
        return {**self._manifest["config"], "seed": 99}


def resumed(run: Path, config: Any) -> int:
    """Reads everything that a resume reads except a model; returns the step after which it would go on."""
    from zero_ds.training.checkpoint.load import _resume_state
    from zero_ds.training.resume import checkpoint_to_resume

    found = checkpoint_to_resume(run, config)
    if found is None:
        return 0
    found.check_weights()
    _resume_state(found)
    return found.step


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "tests" / "support" / "older_run" / "pretrain", tmp_path / "run"))


DAMAGED = [
    *("latest", "step-000002/manifest.json", "step-000002/weights.safetensors"),
    *("step-000002/resume/state.safetensors", "step-000002/resume/progress.json"),
]


@pytest.mark.parametrize("file", DAMAGED)
def test_a_damaged_checkpoint_is_a_sentence_however_it_is_damaged(old: Path, file: str) -> None:
    """The launcher does not restart such a run: it restarts only after errors without a sentence."""
    config, path = Unchanged(old), old / file
    assert resumed(old, config) == 2
    content = path.read_bytes()
    damages: dict[str, bytes | None] = {
        "empty": b"",
        "cut off": content[: len(content) // 2],
        "other bytes": bytes(255 - byte for byte in content),
        "zeros": bytes(len(content)),
    }
    if path.name != "latest":
        damages["gone"] = None
    if path.suffix == ".json":
        whole = json.loads(content)
        damages |= {kind: kind.encode() for kind in ("null", "[]", "{}", '"text"', "7")}
        needed = ("fingerprint", "config", "step", "weights_sha256", "optimizer_steps", "loss_scale", "state_sha256")
        for key in [key for key in needed if key in whole and (path.name, key) != ("progress.json", "step")]:
            damages[f"without {key}"] = json.dumps({k: v for k, v in whole.items() if k != key}).encode()
            damages[f"wrong {key}"] = json.dumps({**whole, key: [1, "x"]}).encode()
    for damage, bad in damages.items():
        path.unlink()
        if bad is not None:
            path.write_bytes(bad)
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            resumed(old, config)
            pytest.fail(f"{damage} is not noticed")
        assert "\n" not in str(caught.value) and str(old) in str(caught.value), (damage, str(caught.value))
        path.write_bytes(content)


def test_a_lost_latest_is_said_aloud(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = Unchanged(old)
    (old / "latest").write_text("step-000009\n")
    with pytest.raises(CheckpointError, match=r"latest names another than step-000002, the newest there: write that"):
        resumed(old, config)
    (old / "latest").unlink()
    with pytest.raises(CheckpointError, match=r"latest is lost: write step-000002 into it, the newest there"):
        find_checkpoint(old)
    assert resumed(old, config) == 2
    assert f"{old} has no file `latest`; going on from step-000002" in caplog.text
    caplog.clear()
    config._manifest["fingerprint"] = "another"
    assert resumed(old, config) == 0
    assert "step-000002 is of another run (seed: 0 -> 99); beginning at step 1" in caplog.text


def test_what_a_killed_run_left_half_written_is_removed_by_the_next(tmp_path: Path) -> None:
    from zero_ds.runtime import failure
    from zero_ds.training.run_folder import use_folder

    run = tmp_path / "run"
    (run / ".step-000004.tmp" / "resume").mkdir(parents=True)
    (run / ".step-000006.1234.tmp").mkdir()
    (run / ".step-000006.1234.tmp" / "weights.safetensors").write_text("half")
    (run / ".latest.12.tmp").write_text("step")
    (run / "step-000002").mkdir()
    (run / "notes.tmp").write_text("mine")
    failure.record(run, "killed")
    with use_folder(run):
        here = {path.name for path in run.iterdir()}
        assert here == {"step-000002", "notes.tmp", failure.EARLIER, "lock.json", failure.RESERVE}
    assert {path.name for path in run.iterdir()} == {"step-000002", "notes.tmp", failure.EARLIER}


def targets() -> dict[str, torch.nn.Parameter]:
    return {"a": torch.nn.Parameter(torch.zeros(2, 3)), "b": torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))}


def test_files_of_other_machines_may_be_seen_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zero_ds.training.checkpoint import save

    path, looks = tmp_path / "weights.safetensors", iter(range(10**6))
    size = save._size_of

    def seen(path: Path) -> int | None:
        look = next(looks)
        if look == 1:
            path.write_bytes(b"1")  # the rest of it is not there yet
        if look == 2:
            path.write_bytes(b"12")
        return size(path)

    monkeypatch.setattr(save, "_size_of", seen)
    save._await_files({path: 2}, tmp_path)
    monkeypatch.setattr(save, "ARRIVES", 0.0)
    with pytest.raises(CheckpointError, match=r"weights.safetensors has not arrived; do all machines share .*\?"):
        save._await_files({path: 3}, tmp_path)


def test_a_kill_while_old_checkpoints_are_deleted_leaves_no_half_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zero_ds.training.checkpoint import save
    from zero_ds.training.run_folder import use_folder

    run = tmp_path / "run"
    for step in (1, 2, 3):
        (run / f"step-{step:06d}").mkdir(parents=True)
        (run / f"step-{step:06d}" / "manifest.json").write_text("{}")
        (run / f"step-{step:06d}" / "weights.safetensors").write_bytes(b"x")

    def killed(path: Path, **options: Any) -> None:
        (Path(path) / "weights.safetensors").unlink()
        raise SystemExit("killed")

    monkeypatch.setattr(save.shutil, "rmtree", killed)
    with pytest.raises(SystemExit, match="killed"):
        save._delete_old(run, 3, keep=1)
    monkeypatch.undo()
    for folder in run.glob("step-*"):
        assert {path.name for path in folder.iterdir()} == {"manifest.json", "weights.safetensors"}
    with use_folder(run):  # the next run
        assert {path.name for path in run.glob(".*.tmp")} == set()
    save._delete_old(run, 3, keep=1)
    assert [path.name for path in run.iterdir()] == ["step-000003"]


def test_load_weights(tmp_path: Path) -> None:
    into = targets()
    assert set(load_weights_(into, written(tmp_path), skip=lambda name: False)) == {"a", "b"}
    assert torch.equal(into["a"], torch.arange(6.0).view(2, 3))
    assert into["b"].dtype == torch.bfloat16 and bool((into["b"] == 1).all())


def test_weights_for_another_model(tmp_path: Path) -> None:
    made = written(tmp_path, tensors={"a": torch.zeros(2, 3), "c": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="holds c, which this model does not have"):
        load_weights_(targets(), made, skip=lambda name: False)
    assert set(load_weights_(targets(), made, skip=lambda name: name == "c")) == {"a"}
    wrong = written(tmp_path / "wrong", tensors={"a": torch.zeros(3, 2)})
    with pytest.raises(CheckpointError, match=r"a in .* has shape \(3, 2\), but in the model it has \(2, 3\)"):
        load_weights_(targets(), wrong, skip=lambda name: False)


def test_check_manifest_names_the_field(tmp_path: Path) -> None:
    made = written(tmp_path, family="llama", target_hash="abc")
    check_manifest(made, {"family": "llama", "target_hash": "abc"})
    with pytest.raises(ConfigError, match="does not fit: its target_hash is 'abc', and here it is 'xyz'"):
        check_manifest(made, {"family": "llama", "target_hash": "xyz"})
    with pytest.raises(ConfigError, match="its absent is None, and here it is 1"):
        check_manifest(made, {"absent": 1})
    check_manifest(made, {"target_hash": "xyz"}, allow=["target_hash"])
    with pytest.raises(
        ConfigError, match=r"cannot be compared: of its target_hash abc and .* one was .*; make both with the same ver"
    ):
        check_manifest(made, {"target_hash": f"{HASH_VERSION}abc"})


# -- host memory while saving ------------------------------------------------------------------------------------------


PIECE = 1536
"""Elements gathered at a time, as small compared with the tiny models as the usual size is compared with real ones."""


def extra_while_saving(config: Any) -> tuple[int, int, int]:
    """Writes a checkpoint; returns the bytes of the largest new tensor, those not freed before the end, and those of
    the largest parameter in fp32. (Tensors that gloo's own threads free count as not freed.)"""
    from torch.profiler import ProfilerActivity, profile

    from zero_ds.runtime import distributed
    from zero_ds.runtime.zero3 import parameter_shape
    from zero_ds.training import stages
    from zero_ds.training.checkpoint import comparison, exchange, optimizer_state
    from zero_ds.training.checkpoint.save import save_checkpoint
    from zero_ds.training.deepspeed import ds_config
    from zero_ds.training.engine import Engine
    from zero_ds.training.setup import load_model, seed_everything

    distributed.initialize()
    seed_everything(0)
    optimizer_state.PIECE = exchange.PIECE = PIECE
    comparison.STRIDE = PIECE // 2  # of integers with twice the bytes of fp32
    ds = ds_config(config, distributed.world_size())
    model = load_model(config, ds)
    engine = Engine(config, model, stages.freeze_(model, config), 1, ds)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        save_checkpoint(Path(config.out), engine, {"config": {}, "fingerprint": ""}, {"step": 1}, keep=1)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    sizes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert len(sizes) > 2 * len(engine.named), "allocations were seen"
    largest = 4 * max(parameter_shape(p).numel() for p in engine.named.values())
    return max(sizes), sum(sizes), largest


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_saving_holds_a_piece_at_a_time(run_config: Any, tmp_path: Path, zero: str) -> None:
    """The decoder stage trains the word embeddings. Saving takes only a piece, and gloo's copy of it, in addition."""
    config = run_config("decoder", tmp_path, zero=zero)
    for most, left, largest in run_ranks(extra_while_saving, 2, config):
        assert largest > 10 * 4 * PIECE
        assert most <= 4 * PIECE, f"{most / largest:.2f} times the largest parameter"
        assert left < 4 * largest, "of about ten times as much that was gathered"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sizes_of_a_checkpoint(run_config: Any, made: Any, tmp_path: Path, precision: str) -> None:
    """Weights take at most 1.02 times the trained parameters' bytes, resume state at most 12.3 bytes per parameter."""
    import shutil

    from distributed_helper import train_all
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shutil.copytree(made("clip"), tmp_path / "clip")
    config = CLIPVisionConfig.from_pretrained(tmp_path / "clip")
    config.update({"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4})
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    run = run_config(
        "encoder", tmp_path / "run", encoder={"path": str(tmp_path / "clip")}, max_steps=1, precision=precision
    )
    assert run_ranks(train_all, 2, [run]) == [["step-000001"]] * 2
    found = find_checkpoint(tmp_path / "run")
    weights = found.weights()
    assert {name.split(".")[0] for name in weights} == {"encoder", "adapter"}, "nothing that is frozen"
    trained = sum(tensor.numel() for tensor in weights.values())
    width = {"fp32": 4, "bf16": 2}[precision]
    assert trained > 1_000_000 and all(tensor.dtype.itemsize == width for tensor in weights.values())
    assert (found.folder / "weights.safetensors").stat().st_size <= 1.02 * width * trained
    resume = sum(file.stat().st_size for file in (found.folder / "resume").iterdir())
    assert resume <= 12.3 * trained
