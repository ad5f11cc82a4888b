"""Ranks that cannot meet or do not agree end early, and name the missing rank or the difference."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed_helper import run_ranks, train_all
from pace import scaled

from zero_ds.config.schema import RunConfig
from zero_ds.runtime import failure, lock, meeting
from zero_ds.runtime.meeting import MeetingError, meet
from zero_ds.runtime.ports import free_port


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "PATIENCE", 0.5)
    monkeypatch.setattr(meeting, "LINGER", 0.1)


def test_rank_zero_names_the_ranks_that_do_not_come() -> None:
    port = free_port()
    with pytest.raises(MeetingError, match=f"cannot meet at 127.0.0.1:{port}: ranks 1, 2 of 3 did not come within"):
        meet(0, 3, "127.0.0.1", port)
    with pytest.raises(MeetingError, match="ranks 1, 2, 3, 4, 5, 6, 7, 8 and 91 more of 100 did not come"):
        meet(0, 100, "127.0.0.1", free_port())


def test_a_rank_that_does_not_exist() -> None:
    with pytest.raises(MeetingError, match="this one is rank 2 of 2; set RANK to 0 up to 1"):
        meet(2, 2, "127.0.0.1", 1)


def test_another_rank_names_rank_zero() -> None:
    port = free_port()
    with pytest.raises(MeetingError, match=f"rank 1 of 2 on .* rank 0 is missing at 127.0.0.1:{port} .*did rank 0 sta"):
        meet(1, 2, "127.0.0.1", port)
    with pytest.raises(MeetingError, match=r"rank 0 is missing at nowhere\.invalid:29500"):
        meet(1, 2, "nowhere.invalid", 29500)


def test_rank_zero_at_an_address_that_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", refused)
    with pytest.raises(MeetingError, match="is --master_addr an address of that machine"):
        meet(0, 2, "192.0.2.1", free_port())


def together(*ranks: tuple[Any, ...]) -> list[str]:
    """Lets ranks meet in threads; returns their ends.

    ranks: number of each, the number of ranks that it believes in, and its device.
    """
    port, ends = free_port(), [""] * len(ranks)

    def one(index: int, rank: int, world: int, device: str = "cpu") -> None:
        try:
            held.append(meet(rank, world, "127.0.0.1", port, device))
        except MeetingError as error:
            ends[index] = str(error)

    held: list[object] = []
    threads = [threading.Thread(target=one, args=(index, *rank)) for index, rank in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(scaled(60))
    return ends


def test_those_that_come_meet_and_all_hear_of_the_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "PATIENCE", scaled(5))
    assert together((0, 3), (1, 3), (2, 3)) == ["", "", ""]
    monkeypatch.setattr(meeting, "PATIENCE", 2.0)
    missed = together((0, 3), (1, 3))
    assert missed[0] == missed[1] and "rank 2 of 3 did not come" in missed[0]
    other = together((0, 2), (1, 4))
    assert "rank 1 on" in other[0] and "was started as one of 4 ranks, and rank 0 as one of 2" in other[0]


def test_ranks_on_different_devices_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "PATIENCE", scaled(5))
    first, second = together((0, 2, "cuda"), (1, 2, "cpu"))
    assert first == second and "rank 1 on" in first and "computes on cpu, and rank 0 on cuda; see what" in first


# -- the command -------------------------------------------------------------------------------------------------------


def alone(recipe: str, out: Path, rank: int, number: int) -> tuple[int, str, list[str]]:
    """Runs one rank of two without the other; returns its exit status, its output, and the files in the run folder.

    number: signal that the rank gets while it waits; 0 for none.
    """
    from zero_ds.cli.main import main
    from zero_ds.runtime import meeting

    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a process of its own
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_PORT=str(free_port()))
    meeting.PATIENCE, meeting.LINGER = (600.0, 600.0) if number else (1.0, 0.1)
    count = meeting._count if rank == 0 else meeting._reach

    def waiting(*arguments: Any) -> Any:
        if number:
            threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
        return count(*arguments)

    if rank == 0:
        meeting._count = waiting
    else:
        meeting._reach = waiting
    heard = io.StringIO()
    with contextlib.redirect_stderr(heard):
        try:
            main(["train", recipe, f"out={out}"])
        except SystemExit as end:
            return int(end.code or 0), heard.getvalue(), sorted(path.name for path in out.iterdir())
        except KeyboardInterrupt:
            return 130, heard.getvalue(), sorted(path.name for path in out.iterdir())
    raise AssertionError("it must not succeed")


@pytest.mark.parametrize(
    ("rank", "number", "status"),
    [(0, 0, 2), (1, 0, 2), (0, signal.SIGINT, 130), (0, signal.SIGTERM, 143), (1, signal.SIGTERM, 143)],
)
def test_a_lone_rank_of_two_ends(
    run_config: Callable[..., RunConfig], tmp_path: Path, rank: int, number: int, status: int
) -> None:
    (tmp_path / "run.yaml").write_text(run_config("pretrain", tmp_path / "run").dump())
    ((ended, said, files),) = run_ranks(alone, 1, str(tmp_path / "run.yaml"), tmp_path / "run", rank, int(number))
    assert ended == status, said
    assert lock.FILE not in files and failure.RESERVE not in files
    if number:
        assert files == []
    elif rank == 0:
        assert "rank 1 of 2 did not come" in said.splitlines()[-1] and files == [failure.FILE]
        reason = failure.read(tmp_path / "run")
        assert reason is not None and "rank 1 of 2 did not come" in reason
        assert failure.is_lost(reason) and not failure.is_final(tmp_path / "run"), "a machine may come back"
    else:
        assert "rank 0 is missing at 127.0.0.1" in said.splitlines()[-1]


# -- agreement ---------------------------------------------------------------------------------------------------------


def train_each_with_its_own(scenarios: list[list[RunConfig]], folder: Path) -> list[str]:
    """Trains each scenario with the configuration, and in the folder, of this rank; returns the ends."""
    from zero_ds.runtime import distributed
    from zero_ds.training import setup

    distributed.initialize()
    rank = distributed.rank()
    os.chdir(folder / str(rank))
    ends = [train_all([configs[rank]])[0] for configs in scenarios]
    versions, setup.versions = setup.versions, lambda: {**versions(), "torch": f"2.{rank}"}
    ends += train_all([scenarios[-1][rank]])
    setup.versions, setup.code_hash = versions, lambda: f"hash {rank}"
    return ends + train_all([scenarios[-1][rank]])


def test_ranks_that_would_train_different_things_name_the_first_difference(
    run_config: Callable[..., RunConfig], data: Path, tmp_path: Path
) -> None:
    import json

    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        records = json.loads(data.read_text())
        for record in records:
            record.pop("image", None)
            for turn in record["conversations"]:
                turn["value"] = turn["value"].replace("<image>", "").strip() or "Hm."
        (tmp_path / rank / "same.json").write_text(json.dumps(records))
        records[0]["conversations"][1]["value"] += rank
        (tmp_path / rank / "other.json").write_text(json.dumps(records))
        for name, end in (("same", ""), ("other", "{# " + rank + " #}")):
            template = (Path(run_config("translator").target) / "chat_template.jinja").read_text()
            (tmp_path / rank / f"{name}.jinja").write_text(template + end)
        zero = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000 + int(rank)}}
        (tmp_path / rank / "zero.json").write_text(json.dumps(zero))

    def both(name: str, source: str = "same", template: str = "same", **changes: Any) -> list[RunConfig]:
        common: dict[str, Any] = {
            "encoder": None,
            "max_steps": 1,
            "data": {
                "sources": [{"path": f"{source}.json"}],
                "max_length": 512,
                "system_prompt": "",
                "chat_template": f"{template}.jinja",
            },
        }
        pair = [
            {key: value[rank] if isinstance(value, list) else value for key, value in changes.items()}
            for rank in (0, 1)
        ]
        changed = [{"out": str(tmp_path / name), **common, **mine} for mine in pair]
        return [
            run_config("translator").model_validate({**run_config("translator").model_dump(), **c}) for c in changed
        ]

    scenarios: dict[str, list[RunConfig]] = {
        "optimizer.learning_rate is 0.01 on rank 0 and 0.02 on rank 1; start every rank with the same recipe": both(
            "rate", optimizer=[{"learning_rate": 0.01}, {"learning_rate": 0.02}]
        ),
        "DeepSpeed's zero_optimization.reduce_bucket_size is 1000 on rank 0 and 1001 on rank 1": both(
            "json", zero="zero.json"
        ),
        "out is ": both("out", out=[str(tmp_path / "one"), str(tmp_path / "two")]),
        "the content of the data files (its hash) is ": both("data", source="other"),
        "the chat template (its hash) is ": both("template", template="other"),
        "step-000001": both("same"),
        'the version of torch is "2.0" on rank 0 and "2.1" on rank 1': [],
        'the code of zero_ds (its hash) is "hash 0" on rank 0 and "hash 1" on rank 1': [],
    }
    ends = run_ranks(train_each_with_its_own, 2, [pair for pair in scenarios.values() if pair], tmp_path)
    assert ends[0] == ends[1], "every rank says the same"
    for said, complaint in zip(ends[0], scenarios, strict=True):
        assert complaint in said, said
        assert complaint == "step-000001" or said.startswith("ConfigError: the ranks do not agree: ")
    assert not any(
        list((tmp_path / name).glob("step-*")) for name in ("rate", "json", "one", "two", "data", "template")
    )
