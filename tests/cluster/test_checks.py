"""The checks of machines judge answers like those of real machines; secrets are sent only after they have passed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from typer.testing import CliRunner

from zero_ds.cli import main as cli
from zero_ds.cluster import checks, probe
from zero_ds.cluster.checks import FAIL, OK, WARN, Check, Wanted
from zero_ds.cluster.doctor import precision_of
from zero_ds.cluster.environment import Forwarded
from zero_ds.cluster.hostfile import Node
from zero_ds.cluster.machines import Cluster, UnreachableError, files_of
from zero_ds.cluster.ssh import Answer, Ssh
from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError

TWO = [Node("a", (0,)), Node("b", (0,))]
LOST = Answer("a", None, "No route to host", reached=False)


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """Returns this machine's description of itself."""
    shared = {"shared": True, "wrote": True}
    asked = {"folder": str(ROOT), "name": "a", "paths": [], "disks": [], "env": [], "port": 0}
    return {**probe.describe(asked), **shared, "time": 0.0}


def of(found: list[Check], what: str) -> Check:
    (check,) = (check for check in found if check.what == what)
    return check


def launch(mine: dict[str, Any], *answers: Answer, ssh: Ssh | None = None) -> list[Check]:
    return checks.before_launch(Answer("this machine", mine), list(answers), ssh or Ssh(folder=str(ROOT)))


def test_sound_machines_pass_and_a_recipe_must_be_the_same_on_all(content: dict[str, Any]) -> None:
    mine = {**content, "files": {"run.yaml": "1"}}
    found = launch(mine, Answer("a", mine), Answer("b", mine))
    assert all(check.status == OK for check in found), found
    for there, words in (("2", "b: run.yaml differs"), (None, "b: run.yaml is not there")):
        other = Answer("b", {**mine, "files": {"run.yaml": there}})
        check = of(launch(mine, Answer("a", mine), other), "recipe")
        assert (check.status, check.found) == (FAIL, words)


def test_files_that_say_what_a_run_is(run_config: Callable[..., RunConfig]) -> None:
    config = run_config("pretrain")
    assert files_of("smollm2-135m/encoder", config) == (), "those of the package are compared with it"
    assert files_of("my/run.yaml", config.model_copy(update={"zero": "own.json"})) == ("my/run.yaml", "own.json")


def test_a_folder_without_the_project_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    """No machine has the files of the project, so there are no differences to find."""
    empty = probe.describe({"folder": str(tmp_path), "name": "a"})
    check = of(launch(empty, Answer("a", empty), ssh=Ssh(folder=str(tmp_path))), "project")
    assert check.status == FAIL and "is not the folder of the project" in check.found


@pytest.mark.parametrize("path", ["/home/me/my project", "/home/me/a&b", "/home/me/50%"])
def test_a_path_that_deepspeed_cannot_start_is_refused(content: dict[str, Any], path: str) -> None:
    check = of(launch(content, Answer("a", content), ssh=Ssh(folder=path)), "path")
    assert (check.status, check.found) == (FAIL, path)
    assert not [c for c in launch(content, Answer("a", content), ssh=Ssh(folder=path, local=True)) if c.status == FAIL]


def test_without_pdsh_nothing_is_launched(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert of(launch(content, Answer("a", content)), "pdsh").status == FAIL
    assert not [c for c in launch(content, Answer("a", content), ssh=Ssh(local=True)) if c.what == "pdsh"]


def test_nothing_is_said_of_machines_that_do_not_answer(content: dict[str, Any]) -> None:
    wanted = Wanted("/shared", "token", port=29500)
    assert checks.of_machines(TWO, [LOST, replace(LOST, host="b")], wanted, Forwarded()) == []
    busy = {**content, "port": "Address already in use"}
    check = of(checks.of_machines(TWO, [LOST, Answer("b", busy)], wanted, Forwarded()), "master port")
    assert check.status == OK, "the ranks meet on the first machine, and that port of the second does not count"


def test_no_gpu_anywhere_is_said(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [Answer("a", {**content, "devices": []}), Answer("b", {**content, "devices": []})]
    wanted = Wanted("/shared", "token")
    assert of(checks.of_machines(TWO, answers, wanted, Forwarded()), "devices").status == OK, "asked for"
    monkeypatch.delenv("DS_ACCELERATOR")
    check = of(checks.of_machines(TWO, answers, wanted, Forwarded()), "devices")
    assert check.status == WARN and check.found == "no GPU is seen, CPU ranks: a 1, b 1"
    one = [Answer("a", {**content, "devices": [{"name": "A100", "total": 81920, "free": 81000}]}), answers[1]]
    check = of(checks.of_machines(TWO, one, wanted, Forwarded()), "devices")
    assert (check.status, check.found) == (FAIL, "b: 0 GPUs, device 0 is needed")


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["doctor", "pipeline"])
def test_a_machine_without_gpus_does_not_make_others_compute_on_cpus(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Variables that these commands set in their own environment would be forwarded to every rank."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DS_ACCELERATOR", "x")  # so that it is put back
    monkeypatch.delenv("DS_ACCELERATOR")
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=8\nnode2 slots=8\n")
    words = {"doctor": ["--no-launch", "--shared", str(tmp_path)], "pipeline": ["llama-3.1-8b", "-n"]}[name]
    seen = []

    def ask(self: Ssh, hosts: list[str], request: dict[str, Any], timeout: float | None = None) -> list[Answer]:
        seen.append(dict(os.environ))
        return [Answer(host, None, "no", reached=False) for host in hosts]

    monkeypatch.setattr(Ssh, "ask", ask)
    done = CliRunner().invoke(cli.app, [name, *words, "--hostfile", str(hosts)])
    assert done.exit_code == (name == "doctor"), done.output
    assert all("DS_ACCELERATOR" not in environment for environment in [*seen, os.environ])


def doctor(tmp_path: Path, *words: str) -> str:
    done = CliRunner().invoke(
        cli.app, ["doctor", "--no-launch", "--shared", str(tmp_path), "--min-disk", "0.001", *words]
    )
    return f"{done.exit_code} {done.exception or ''}\n{done.output}"


def test_options_that_mean_nothing_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert "--include and --exclude choose machines of a hostfile" in doctor(tmp_path, "--include", "node1")
    assert doctor(tmp_path, "--master_port", "99999").startswith("2 "), "no port"
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=3\n")
    assert "set slots=2 in" in doctor(tmp_path, "--hostfile", str(hosts), "--ranks", "2")
    assert "localhost: 2 ranks" in doctor(tmp_path, "--hostfile", str(hosts), "--include", "localhost:0,2")


def test_numbers_are_compared_in_the_precision_that_a_json_insists_on(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    for text, precision in (
        ('{"bf16": {"enabled": true}}', "bf16"),
        ('{"bf16": {"enabled": "auto"}}', "fp32"),
        ("[]", "fp32"),
    ):
        own.write_text(text)
        assert precision_of(str(own)) == precision
    assert precision_of("zero3") == precision_of(str(tmp_path / "none.json")) == "fp32"


# -- secrets -----------------------------------------------------------------------------------------------------------


def test_secrets_reach_machines_on_which_the_run_will_start_and_are_taken_back(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_1")
    monkeypatch.setattr("zero_ds.cluster.machines.tempfile.mkdtemp", lambda prefix: str(tmp_path))
    asked: list[tuple[str, Any]] = []
    silent = ["b"]

    def ask(self: Ssh, hosts: list[str], request: dict[str, Any], timeout: float | None = None) -> list[Answer]:
        asked.append((request["what"], request.get("secrets")))
        sound = {**content, "files": {}, "found": 0}
        return [replace(LOST, host=host) if host in silent else Answer(host, sound) for host in hosts]

    monkeypatch.setattr(Ssh, "ask", ask)
    cluster = Cluster(TWO, Ssh(folder=str(ROOT)), named=("HF_TOKEN",))
    with pytest.raises(UnreachableError, match="b does not answer"):
        cluster.prepare()
    assert not [secrets for _, secrets in asked if secrets], "a has seen nothing of it"
    silent.clear()
    monkeypatch.setattr("zero_ds.cluster.machines.shutil.rmtree", lambda path: None)
    cluster.prepare()
    assert asked[-1] == ("keep", {"HF_TOKEN": "hf_1"})
    cluster.forget()  # as after a Ctrl-C before the ranks
    assert asked[-1][0] == "end"
    asked.clear()
    cluster.forget()
    assert not asked, "once"


def test_a_secret_that_cannot_be_kept_ends_the_launch(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_1")

    def ask(self: Ssh, hosts: list[str], request: dict[str, Any], timeout: float | None = None) -> list[Answer]:
        kept = None if request["what"] == "keep" else {**content, "files": {}, "found": 0}
        return [Answer(host, kept, "No space left on device") for host in hosts]

    monkeypatch.setattr(Ssh, "ask", ask)
    cluster = Cluster(TWO, Ssh(folder=str(ROOT)), named=("HF_TOKEN",))
    with pytest.raises(ConfigError, match="secrets could not be brought to a: No space left on device"):
        cluster.prepare()
    cluster.forget()
