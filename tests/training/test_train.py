"""Whole runs on tiny models: stopped and resumed they end where an uninterrupted run ends, with any ZeRO stage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import run_ranks, train_all
from safetensors.torch import load_file, save_file

from zero_ds.config.schema import RunConfig
from zero_ds.runtime import failure
from zero_ds.runtime.errors import ConfigError

# -- what runs in the ranks --------------------------------------------------------------------------------------------


def train_with_signal(config: RunConfig, rank: int, step: int) -> list[str]:
    """Trains, and asks one rank to end during step `step`, as a scheduler would."""
    from zero_ds.runtime import distributed
    from zero_ds.training.engine import Engine

    distributed.initialize()
    step_of_engine = Engine.step

    def signalled(self: Engine, batches: Any, number: int, *counts: Any) -> Any:
        if number + 1 == step and distributed.rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of_engine(self, batches, number, *counts)

    Engine.step = signalled  # type: ignore[method-assign]
    return train_all([config])


def train_on_a_full_disk(config: RunConfig, number: int) -> list[str]:
    """Trains on a disk that is full from the `number`-th checkpoint on, in the middle of its state."""
    import errno

    from zero_ds.training.checkpoint import save

    put, opened = save.SafetensorsStream._put, save.SafetensorsStream.__init__
    streams = 0

    def counting(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal streams
        streams += 1
        opened(self, *arguments, **options)

    def full(self: Any, data: Any) -> None:
        if streams >= 2 * number and getattr(self, "_next", 0) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(self, data)

    save.SafetensorsStream.__init__ = counting  # type: ignore[method-assign]
    save.SafetensorsStream._put = full  # type: ignore[method-assign]
    return train_all([config])


# -- one go, and stopped in between ------------------------------------------------------------------------------------

KINDS = {
    "zero1": {"zero": "zero1"},
    "zero2": {"zero": "zero2"},
    "zero3": {"zero": "zero3"},
    "zero3_offload": {"zero": "zero3_offload"},
    "zero2 bf16": {"zero": "zero2", "precision": "bf16"},
    "zero3 bf16": {"zero": "zero3", "precision": "bf16"},
}


OPTIONS = {"checkpoint": {"every_steps": 3, "keep": 9}, "adapter": {"match_embeddings": True}}


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6], "each step once, in order"
    return [line["loss"] for line in lines]


def weights(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(run / f"step-{step:06d}" / "weights.safetensors")


def state(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(run / f"step-{step:06d}" / "resume" / "state.safetensors")


def cut(run: Path, out: Path, step: int = 3) -> Path:
    """Copies a run folder, without what came after the checkpoint of `step`, as a kill would have left it."""
    shutil.copytree(run, out)
    for later in out.glob("step-*"):
        if int(later.name[5:]) > step:
            shutil.rmtree(later)
    (out / "latest").write_text(f"step-{step:06d}\n")
    return out


@pytest.fixture(scope="module")
def runs(run_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KIND: six steps in one go with two ranks, with a checkpoint after the third; KIND again: resumed after it by two
    ranks; KIND alone: resumed after it by one rank."""
    root = tmp_path_factory.mktemp("runs")

    def configs(suffix: str) -> list[RunConfig]:
        return [run_config("pretrain", root / f"{kind}{suffix}", **OPTIONS, **KINDS[kind]) for kind in KINDS]

    assert run_ranks(train_all, 2, configs("")) == [["step-000006"] * len(KINDS)] * 2
    for kind in KINDS:
        for suffix in (" again", " alone"):
            cut(root / kind, root / f"{kind}{suffix}")
    assert run_ranks(train_all, 2, configs(" again")) == [["step-000006"] * len(KINDS)] * 2
    assert run_ranks(train_all, 1, configs(" alone")) == [["step-000006"] * len(KINDS)]
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_continues_as_if_nothing_had_happened(runs: Path, kind: str) -> None:
    whole, resumed = runs / kind, runs / f"{kind} again"
    assert losses(resumed) == losses(whole)
    for ours, theirs in ((weights(resumed), weights(whole)), (state(resumed), state(whole))):
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), "bit for bit"
    early = weights(whole, 3)
    assert any(not torch.equal(early[name], tensor) for name, tensor in weights(whole).items()), "it did learn"


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_on_another_number_of_ranks(runs: Path, kind: str) -> None:
    whole, alone = runs / kind, runs / f"{kind} alone"
    exact = "bf16" not in kind
    assert losses(alone) == pytest.approx(losses(whole), rel=1e-5 if exact else 2e-2)
    if exact:
        ours, theirs = state(alone), state(whole)
        for name, tensor in theirs.items():
            if name.startswith("master/"):
                torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["zero1", "zero3", "zero3_offload"])
def test_all_zero_stages_learn_the_same(runs: Path, kind: str) -> None:
    assert losses(runs / kind) == pytest.approx(losses(runs / "zero2"), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_the_trained_weights_and_nothing_else(runs: Path, small: Path, kind: str) -> None:
    held = weights(runs / kind)
    adapter = {f"adapter.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")}
    layer = {
        name.removeprefix("model.layers.1.")
        for name in load_file(small / "model.safetensors")
        if name.startswith("model.layers.1.")
    }
    assert set(held) == adapter | {f"translator.{n}.{name}" for n in (0, 1) for name in layer}
    dtype = torch.bfloat16 if "bf16" in kind else torch.float32
    masters = state(runs / kind)
    for name, tensor in held.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, masters[f"master/{name}"].to(dtype))
    assert len(masters) == 3 * len(held)
    folder = runs / kind / "step-000006"
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "resume", "weights.safetensors"]


def test_run_folder_and_manifest(runs: Path, made: Callable[..., Path], small: Path) -> None:
    from zero_ds.config.loading import load_run
    from zero_ds.model.layer_plan import read_surrogate
    from zero_ds.model.loading import model_hash

    run = runs / "zero2"
    assert (run / "latest").read_text() == "step-000006\n"
    assert sorted(p.name for p in run.iterdir()) == [
        "config.yaml",
        "deepspeed.json",
        "latest",
        "metrics.jsonl",
        "step-000003",
        "step-000006",
        "tensorboard",
    ]
    assert list((run / "tensorboard").rglob("events.out.tfevents.*"))
    resolved = json.loads((run / "deepspeed.json").read_text())
    assert resolved["zero_optimization"]["stage"] == 2 and resolved["train_batch_size"] > 0
    config = load_run(str(run / "config.yaml"))
    manifest = json.loads((run / "step-000006" / "manifest.json").read_text())
    assert RunConfig.model_validate(manifest["config"]) == config
    assert manifest["fingerprint"] == config.fingerprint()
    assert manifest["target_hash"] == model_hash(made("llama", tied=True))
    assert manifest["encoder_hash"] == model_hash(made("clip"))
    assert manifest["precision"] == "float32", "what `auto` was resolved to; another machine may not go on in another"
    assert manifest["plan"] == read_surrogate(small).plan.to_json()
    assert (manifest["stage"], manifest["step"], manifest["family"]) == ("pretrain", 6, "llama")
    assert {"torch", "deepspeed", "transformers", "zero_ds", "python"} <= set(manifest["versions"])


# -- one run after the other in one process ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ends(
    runs: Path,
    run_config: Callable[..., RunConfig],
    made: Callable[..., Path],
    small: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    """Returns the outcome of each of these runs on one rank; their folders are next to `runs`."""
    from zero_ds.model.layer_plan import Replaced
    from zero_ds.surrogate.build import build_surrogate

    other = made("llama", tied=True, seed=1)
    foreign = tmp_path_factory.mktemp("foreign") / "small"
    build_surrogate(other, [Replaced(1, 2), Replaced(3, 4)], foreign)
    deeper = tmp_path_factory.mktemp("deeper") / "small"
    build_surrogate(made("llama", tied=True), [Replaced(1, 2), Replaced(4, 5)], deeper)
    incomplete = tmp_path_factory.mktemp("incomplete") / "small"
    shutil.copytree(small, incomplete)
    tensors = load_file(incomplete / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, incomplete / "model.safetensors", metadata={"format": "pt"})
    # killed between the rename of step 6 and the move of `latest`
    shutil.copytree(runs / "zero2", runs / "killed")
    (runs / "killed" / "latest").write_text("step-000003\n")
    # set back by hand, with later checkpoints and room for one
    shutil.copytree(runs / "zero2", runs / "set back")
    (runs / "set back" / "latest").write_text("step-000003\n")
    shutil.copytree(runs / "set back" / "step-000003", runs / "set back" / "step-000099")
    # another run's folder that was killed in its first checkpoint
    shutil.copytree(runs / "zero3", runs / "leftover")
    (runs / "leftover" / "latest").unlink()
    damaged = cut(runs / "zero2", runs / "damaged")
    changed = cut(runs / "zero2", runs / "changed") / "step-000003" / "manifest.json"
    changed.write_text(json.dumps({**json.loads(changed.read_text()), "encoder_hash": "2-another"}))
    other_data = cut(runs / "zero2", runs / "other data") / "step-000003" / "manifest.json"
    other_data.write_text(json.dumps({**json.loads(other_data.read_text()), "data_hash": "another"}))
    # the newest checkpoint is damaged, and `latest` set back to the one before
    shutil.copytree(runs / "zero2", runs / "one before")
    (runs / "one before" / "latest").write_text("step-000003\n")
    for folder in (damaged / "step-000003", runs / "one before" / "step-000006"):
        file = folder / "resume" / "state.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    configs = {
        "complete": run_config("pretrain", runs / "zero2", **OPTIONS),
        "killed": run_config("pretrain", runs / "killed", **OPTIONS),
        "set back": run_config(
            "pretrain", runs / "set back", **{**OPTIONS, "checkpoint": {"every_steps": 3, "keep": 1}}
        ),
        "leftover": run_config("pretrain", runs / "leftover", seed=5),
        "damaged": run_config("pretrain", runs / "damaged", **OPTIONS),
        "one before": run_config("pretrain", runs / "one before", **OPTIONS),
        "changed": run_config("pretrain", runs / "changed", **OPTIONS),
        "by time": run_config("pretrain", runs / "by time", max_steps=2, checkpoint={"every_minutes": 1e-9, "keep": 9}),
        "other data": run_config("pretrain", runs / "other data", **OPTIONS),
        "other config": run_config("pretrain", runs / "zero3", zero="zero3", seed=3, **OPTIONS),
        "encoder": run_config("encoder", runs / "encoder", init_from=[str(runs / "zero2")], max_steps=2),
        "decoder": run_config("decoder", runs / "decoder", init_from=[str(runs / "zero2")], max_steps=1),
        "other target": run_config(
            "encoder", runs / "other", init_from=[str(runs / "zero2")], target=str(other), surrogate=str(foreign)
        ),
        "other plan": run_config("encoder", runs / "plan", init_from=[str(runs / "zero2")], surrogate=str(deeper)),
        "other encoder": run_config(
            "encoder", runs / "eyes", init_from=[str(runs / "zero2")], encoder={"path": str(made("clip", seed=1))}
        ),
        "incomplete": run_config("pretrain", runs / "incomplete", surrogate=str(incomplete), zero="zero3"),
        "no such start": run_config("encoder", runs / "start", init_from=[str(runs / "nowhere")]),
        "exploding": run_config("pretrain", runs / "exploding", optimizer={"learning_rate": 1e30}),
        "repeated": run_config("pretrain", runs / "repeated", **OPTIONS),
    }
    (result,) = run_ranks(train_all, 1, list(configs.values()))
    return dict(zip(configs, result, strict=True))


def test_a_complete_run_is_left_alone(runs: Path, ends: dict[str, str]) -> None:
    assert ends["complete"] == "step-000006"
    assert len(losses(runs / "zero2")) == 6


def test_a_kill_between_rename_and_latest_loses_nothing(runs: Path, ends: dict[str, str]) -> None:
    assert ends["killed"] == "step-000006"
    assert (runs / "killed" / "latest").read_text() == "step-000006\n"
    losses(runs / "killed")


def test_going_back_by_hand_keeps_the_new_checkpoint(runs: Path, ends: dict[str, str]) -> None:
    assert ends["set back"] == "step-000006"
    run = runs / "set back"
    assert (run / "latest").read_text() == "step-000006\n" and (run / "step-000006" / "manifest.json").is_file()
    assert not (run / "step-000003").exists(), "older checkpoints are deleted"


def test_a_leftover_checkpoint_of_another_run_is_not_taken_for_this_one(runs: Path, ends: dict[str, str]) -> None:
    assert ends["leftover"] == "step-000006"
    manifest = json.loads((runs / "leftover" / "step-000006" / "manifest.json").read_text())
    assert manifest["config"]["seed"] == 5


def test_a_flipped_byte_is_noticed(ends: dict[str, str]) -> None:
    assert ends["damaged"].startswith("CheckpointError: ") and "state.safetensors is damaged" in ends["damaged"]


def test_the_checkpoint_before_a_damaged_one_still_loads(runs: Path, ends: dict[str, str]) -> None:
    assert ends["one before"] == "step-000006"
    ours, theirs = weights(runs / "one before"), weights(runs / "zero2")
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-5) for name in theirs)


def test_another_configuration_does_not_resume(ends: dict[str, str]) -> None:
    assert "ConfigError: " in ends["other config"] and "holds another run (seed: 0 -> 3)" in ends["other config"]


def test_checkpoints_are_saved_by_time(runs: Path, ends: dict[str, str]) -> None:
    assert ends["by time"] == "step-000002"
    assert sorted(path.name for path in (runs / "by time").glob("step-*")) == ["step-000001", "step-000002"]


def test_other_data_does_not_resume(ends: dict[str, str]) -> None:
    assert "does not fit: its data_hash is 'another'" in ends["other data"]


def test_data_that_has_moved_is_the_same_data(
    trained: Path, run_config: Callable[..., RunConfig], data: Path, tmp_path: Path
) -> None:
    """Data is compared by its content (`data_hash`), not by its place."""
    from zero_ds.training.resume import checkpoint_to_resume

    moved = {"max_length": 512, "system_prompt": "", "sources": [{"path": "elsewhere.json", "root": str(tmp_path)}]}
    out = trained / "pretrain"
    found = checkpoint_to_resume(out, run_config("pretrain", out, max_steps=2, data=moved))
    assert found is not None and found.step == 2
    for change in ({"limit": 3}, {"images_only": True}):
        other = {**moved, "sources": [{**moved["sources"][0], **change}]}
        with pytest.raises(ConfigError, match=r"holds another run \(data\.sources"):
            checkpoint_to_resume(out, run_config("pretrain", out, max_steps=2, data=other))
    with pytest.raises(ConfigError, match="holds another run"):
        checkpoint_to_resume(out, run_config("pretrain", out, max_steps=2, data=moved, seed=1))


def test_a_resumed_run_has_every_step_once_in_tensorboard(runs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = runs / "zero2 again"
    (folder,) = {path.parent for path in (run / "tensorboard").rglob("events.out.tfevents.*")}
    assert len(list(folder.glob("events.out.tfevents.*"))) > 1, "written by two processes"
    events = EventAccumulator(str(folder))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [step for step, _ in found] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in found] == pytest.approx(losses(run), rel=1e-6)


def test_init_from_starts_the_next_stage(runs: Path, ends: dict[str, str], small: Path) -> None:
    from zero_ds.grafting.load import load_trained

    assert ends["encoder"] == "step-000002"
    start, begun = (
        json.loads((runs / name / "manifest.json").read_text()) for name in ("zero2/step-000006", "encoder/step-000002")
    )
    assert begun["starts"] == [start["weights_sha256"]], "a resumed run notices if its start was trained again"
    before, after = weights(runs / "zero2"), weights(runs / "encoder", 2)
    assert set(after) & set(before) == {name for name in before if name.startswith("adapter.")}
    assert not any(name.startswith("translator.") for name in after)
    model = load_trained(runs / "encoder", small)
    named = model.named_targets()
    assert all(torch.equal(named[name], tensor) for name, tensor in after.items())
    assert all(torch.equal(named[n], t) for n, t in before.items() if n.startswith("translator."))
    # the full model has no place for translators, and takes the rest
    assert ends["decoder"] == "step-000001"
    assert any(name.startswith("decoder.") for name in weights(runs / "decoder", 1))


def test_weights_of_another_model_are_refused(ends: dict[str, str]) -> None:
    assert "ConfigError: " in ends["other target"] and "does not fit: its target_hash is" in ends["other target"]
    assert "does not fit: its plan is {'depth': 6, 'replaced': [[1, 2, 1], [3, 4, 1]]}" in ends["other plan"]
    assert "does not fit: its encoder_hash is" in ends["other encoder"]
    assert "does not fit: its encoder_hash is '2-another'" in ends["changed"], "a model that changed under a run"
    assert "init_from names" in ends["no such start"] and "does not exist" in ends["no such start"]


def test_weights_that_lack_a_tensor_are_refused_under_partitioning(ends: dict[str, str]) -> None:
    assert "do not fill the model: model.layers.2.mlp.up_proj.weight" in ends["incomplete"]


def test_a_loss_that_is_not_finite_names_the_samples(runs: Path, ends: dict[str, str]) -> None:
    assert ends["exploding"].startswith("FloatingPointError: the loss of step 2 is ")
    assert "samples: text-1. Nothing was updated." in ends["exploding"]
    assert not list((runs / "exploding").glob("step-*"))


def test_a_run_can_be_repeated(runs: Path, ends: dict[str, str]) -> None:
    """The same seed gives the same numbers; one rank and two differ only in the order of sums."""
    assert losses(runs / "repeated") == pytest.approx(losses(runs / "zero2"), rel=1e-5)
    assert losses(runs / "killed")[3:] == pytest.approx(losses(runs / "zero2 alone")[3:], abs=0)


# -- asked to stop, and no room to save --------------------------------------------------------------------------------


def test_a_signal_to_one_rank_saves_a_checkpoint_and_a_rerun_resumes(
    runs: Path, run_config: Callable[..., RunConfig]
) -> None:
    config = run_config("pretrain", runs / "signalled", **OPTIONS)
    first, second = run_ranks(train_with_signal, 2, config, 1, 2)
    assert first == ["SystemExit: stopped by a signal to another rank after step 2; run again to resume."]
    assert second == ["SystemExit: stopped by SIGTERM after step 2; run again to resume."]
    assert (runs / "signalled" / "latest").read_text() == "step-000002\n"
    assert run_ranks(train_all, 2, [config]) == [["step-000006"], ["step-000006"]]
    assert losses(runs / "signalled") == losses(runs / "zero2")
    ours, theirs = weights(runs / "signalled"), weights(runs / "zero2")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_full_disk_keeps_the_earlier_checkpoint(runs: Path, run_config: Callable[..., RunConfig]) -> None:
    run = runs / "full"
    config = run_config("pretrain", run, **{**OPTIONS, "checkpoint": {"every_steps": 2}})
    (one,), (two,) = run_ranks(train_on_a_full_disk, 2, config, 2)
    assert "step 4 could not be saved" in one and "No space left on device; earlier checkpoints are intact" in one
    assert two == "CheckpointError: step 4 could not be saved by rank 0."
    assert "No space left on device" in (run / "failure.txt").read_text(), "the reason, whoever ended first"
    assert failure.is_final(run), "no restart makes room"
    assert (run / "latest").read_text() == "step-000002\n"
    assert sorted(p.name for p in run.iterdir() if "step" in p.name) == ["step-000002"], "nothing half-written stays"
    assert run_ranks(train_all, 1, [config]) == [["step-000006"]]
    assert losses(run) == pytest.approx(losses(runs / "zero2"), rel=1e-5)


def train_until_taken_over(config: RunConfig, step: int) -> list[str]:
    """Trains; after `step` steps another job takes the folder over, as after a long suspension of this one."""
    from zero_ds.runtime import distributed, lock
    from zero_ds.training.engine import Engine

    lock.BEAT = 0.02
    make, out = Engine.step, Path(config.out)

    def taken(self: Engine, batches: Any, number: int, *rest: Any) -> Any:
        if number == step and distributed.is_rank_zero():
            (out / lock.FILE).write_text(json.dumps({"id": "other", "host": "elsewhere", "pid": 7}))
            while lock.seen_lost(out) is None:
                time.sleep(0.01)
        return make(self, batches, number, *rest)

    Engine.step = taken  # type: ignore[method-assign]
    return train_all([config])


def test_a_job_that_has_lost_its_folder_ends_before_it_writes_there(
    run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = run_config("pretrain", tmp_path / "run", max_steps=40)
    [first], [second] = run_ranks(train_until_taken_over, 2, config, 2)
    assert first.startswith("TakenError: ") and "is in use by process 7 on elsewhere" in first
    assert second == f"TakenError: another job has taken over {tmp_path / 'run'}; this one ends."
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(records) == 2, "the records of the other job are not mixed with those of this one"
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "lock.json" in names and not names & {"failure.txt", "latest"}


# -- errors that a user can fix ----------------------------------------------------------------------------------------


def commands(lines: list[list[str]]) -> list[tuple[int | None, str]]:
    """Runs `zero-ds` commands one after the other in this rank; returns their exit status and standard error."""
    import contextlib
    import io

    from zero_ds.cli.main import main

    results: list[tuple[int | None, str]] = []
    for line in lines:
        heard = io.StringIO()
        with contextlib.redirect_stderr(heard):
            try:
                main(line)
                results.append((None, heard.getvalue()))
            except SystemExit as end:
                results.append((int(end.code or 0), heard.getvalue()))
    return results


def test_errors_of_a_user_are_one_sentence_on_every_rank(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The ranks agree on them, and none waits for another."""
    (tmp_path / "bad.json").write_text('[{"id": "sad", "conversations": []}]')
    wrongs: dict[str, dict[str, object]] = {
        "data file /nowhere.json does not exist": {"data": {"sources": [{"path": "/nowhere.json"}]}},
        "sample sad has no 'conversations'": {"data": {"sources": [{"path": str(tmp_path / "bad.json")}]}},
        "set data.sources in the recipe": {"data": {}},
        "model folder /nowhere does not exist": {"surrogate": "/nowhere"},
        "global_batch=3 is not a multiple of micro_batch=1 x 2 ranks": {"global_batch": 3},
        "unknown DeepSpeed config 'zero9'": {"zero": "zero9"},
        "data.chat_template=/nowhere.jinja cannot be read": {
            "data": {"sources": [{"path": str(tmp_path / "bad.json")}], "chat_template": "/nowhere.jinja"}
        },
    }
    lines = [["train", "no/such-recipe"]]
    for number, changes in enumerate(wrongs.values()):
        recipe = tmp_path / f"{number}.yaml"
        recipe.write_text(run_config("pretrain", tmp_path / "run", **changes).dump())
        lines.append(["train", str(recipe)])
    for rank in run_ranks(commands_keeping_the_group, 2, lines):
        for (status, heard), complaint in zip(rank, ["unknown recipe 'no/such-recipe'", *wrongs], strict=True):
            assert status == 2
            assert heard.splitlines()[-1].startswith("zero-ds: ") and "Traceback" not in heard, heard
            assert complaint in heard.splitlines()[-1]


def commands_keeping_the_group(lines: list[list[str]]) -> list[tuple[int | None, str]]:
    """Runs commands that keep the process group and watch no ranks, because the next command needs the group."""
    from zero_ds.runtime import distributed, failure

    distributed.shutdown = lambda: None
    failure.Watch.start = lambda self, *arguments: None  # type: ignore[method-assign]
    return commands(lines)
