"""Ranks on other machines receive listed variables, secrets by name, and arguments word for word."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from zero_ds.cluster import probe
from zero_ds.cluster.environment import argument, describe_forwarded, forwarded, is_secret
from zero_ds.cluster.hostfile import Node, node_of_rank, read_hostfile
from zero_ds.cluster.machines import Cluster, meeting_point
from zero_ds.cluster.ssh import Answer
from zero_ds.runtime.errors import ConfigError

ODD = [
    "plain",
    "with space",
    "it's",
    'a "quoted" word',
    "$HOME and `id` and $(id)",
    "back\\slash and 100% %n %h",
    "semi;colon&amp|pipe<>*?[a]{b}~#!",
    "  ends with spaces are DeepSpeed's to lose".strip(),
    "[runs/a, runs/b]",
    "ünïcode",
]
"""Values that the shells on the way would change."""


# -- hostfile ----------------------------------------------------------------------------------------------------------

HOSTS = "# a comment\n\nnode1 slots=4 \r\n  # another\n\tnode2   slots=2\t# two\x0cnode9 slots=1\n10.0.0.3\tslots=8"


@pytest.mark.parametrize(
    ("include", "exclude"),
    [("", ""), ("node2", ""), ("node1:0,2@10.0.0.3", ""), ("", "node1"), ("", "node1:3@10.0.0.3:0,1"), ("", "node2:0")],
)
def test_machines_are_those_that_deepspeed_takes(tmp_path: Path, include: str, exclude: str) -> None:
    from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion

    path = tmp_path / "hosts"
    path.write_bytes(HOSTS.encode())
    theirs = parse_inclusion_exclusion(fetch_hostfile(str(path)), include, exclude)
    ours = read_hostfile(path, include, exclude)
    assert {node.host: list(node.slots) for node in ours} == dict(theirs)
    assert [node.host for node in ours] == list(theirs)
    ranks = [host for host, slots in theirs.items() for _ in slots]
    assert [node_of_rank(ours, rank) for rank in range(len(ranks) + 1)] == [*ranks, None]


@pytest.mark.parametrize(
    ("text", "include", "exclude", "words"),
    [
        ("node1\n", "", "", "line 1: 'node1' is not a machine; say how many devices it has: node1 slots=8"),
        ("node1 slots=x\n", "", "", "line 1: 'node1 slots=x' is not a machine; write for example: node1 slots=8"),
        ("me@node1 slots=1\n", "", "", "the name of a user belongs in ssh's configuration (User), not here"),
        ("fe80::1 slots=1\n", "", "", "give an IPv6 address a name, in /etc/hosts or ssh's configuration"),
        ("node[1-4] slots=1\n", "", "", "write each machine on a line of its own"),
        ("node1 slots=99999999\n", "", "", "is not a machine"),
        ("node1 slots=2\n", "node1:", "", "'node1:' names no devices"),
        ("node1 slots=2\n", "node1@", "", "has no machine ''"),
        ("a slots=1\na slots=1\n", "", "", "line 2: a is listed twice"),
        ("Node1 slots=1\nnode1 slots=1\n", "", "", "line 2: node1 and Node1 are the same machine; give it one line"),
        ("localhost slots=1\n127.0.0.1 slots=1\n", "", "", "line 2: 127.0.0.1 and localhost are the same machine"),
        (f"node1 slots={'9' * 5000}\n", "", "", "is not a machine"),
        ("node1 slots=\uff12\n", "", "", "is not a machine"),
        ("a slots=0\n", "", "", "is not a machine"),
        ("-oProxyCommand=id slots=1\n", "", "", "is not a machine"),
        ("-v slots=1\n", "", "", "is not a machine"),
        ("# nothing\n", "", "", "names no machine"),
        ("node1 slots=1\n", "nod1", "", "has no machine 'nod1'; did you mean 'node1'"),
        ("node1 slots=2\n", "node1:2", "", "node1 has devices 0 to 1, and not 2"),
        ("node1 slots=2\n", "node1:x", "", "'node1:x' names no devices"),
        ("node1 slots=2\n", "node1", "node1", "cannot be used together"),
        ("node1 slots=2\n", "", "node1", "leaves no device"),
    ],
)
def test_a_hostfile_is_refused_in_one_sentence(
    tmp_path: Path, text: str, include: str, exclude: str, words: str
) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path, include, exclude)
    assert words in str(caught.value)


def test_a_hostfile_must_be_text_and_begin_with_no_mark(tmp_path: Path) -> None:
    """Editors on Windows write a mark, which DeepSpeed takes for a part of the first machine's name."""
    path = tmp_path / "hosts"
    path.write_text("node1 slots=2\n", encoding="utf-8-sig")
    with pytest.raises(ConfigError, match="begins with a byte order mark, which DeepSpeed takes for a part of"):
        read_hostfile(path)
    path.write_text("node1 slots=2\n", encoding="utf-16")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_hostfile(path)


def test_a_missing_hostfile_and_a_lone_machine(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hostfile .*hosts cannot be read \(FileNotFoundError\)"):
        read_hostfile(tmp_path / "hosts")
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    assert Cluster.of(["--hostfile", str(tmp_path / "hosts")]) is None, "this machine needs no ssh"
    (tmp_path / "hosts").write_text("elsewhere slots=2\n")
    assert Cluster.of(["--hostfile", str(tmp_path / "hosts"), "--ssh_port", "5"]).ssh.port == 5  # type: ignore[union-attr]


def test_ranks_meet_where_all_machines_look() -> None:
    def answer(host: str, address: str | None) -> Answer:
        return Answer(host, {"address": address, "addresses": ["10.0.0.1", "172.17.0.1"]})

    assert meeting_point("node1", [answer("node1", "10.0.0.1"), answer("node2", "10.0.0.1")]) == "node1"
    alias = [answer("node1", "10.0.0.1"), answer("node2", None)]
    assert meeting_point("node1", alias) == "10.0.0.1", "ssh knows that name, and the machines do not"
    own = [answer("node1", "127.0.1.1"), answer("node2", "10.0.0.1")]
    assert meeting_point("node1", own) == "node1", "as in Debian's /etc/hosts"
    copied = [answer("node1", "127.0.1.1"), answer("node2", "127.0.1.1")]
    assert meeting_point("node1", copied) == "10.0.0.1", "that file, copied to another machine"
    here = [answer("localhost", "127.0.0.1"), answer("node2", "127.0.0.1")]
    assert meeting_point("localhost", here) == "10.0.0.1"
    two = [answer("127.0.0.2", "127.0.0.2"), answer("127.0.0.3", "127.0.0.2")]
    assert meeting_point("127.0.0.2", two) == "127.0.0.2"


# -- environment -------------------------------------------------------------------------------------------------------


def test_the_list_is_explicit_and_secrets_go_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    environment = {
        "NCCL_DEBUG": "INFO",
        "HF_HOME": "/shared/hf",
        "OMP_NUM_THREADS": "4",
        "TOKENIZERS_PARALLELISM": "false",
        "ZERO_DS_SILENCE": "60",
        "https_proxy": "http://me:pass@proxy:3128",
        "HF_TOKEN": "hf_1",
        "WANDB_API_KEY": "w_1",
        "AWS_SECRET_ACCESS_KEY": "s_1",
        "MY_OWN": "x",
        "USER": "me",
        "SSH_AUTH_SOCK": "/tmp/agent",
        "CUDA_VISIBLE_DEVICES": "0",
        "ZERO_DS_FORWARD": "MY_OWN, HF_TOKEN",
    }
    sent = forwarded(environment)
    assert set(sent.plain) == {
        *("NCCL_DEBUG", "HF_HOME", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "ZERO_DS_SILENCE", "MY_OWN")
    }
    assert sent.secret == {"HF_TOKEN": "hf_1", "https_proxy": "http://me:pass@proxy:3128"}
    assert sent.withheld == ("WANDB_API_KEY",)
    assert set(forwarded(environment, ["AWS_SECRET_ACCESS_KEY"]).secret) == {*sent.secret, "AWS_SECRET_ACCESS_KEY"}
    assert "HF_TOKEN" in describe_forwarded(sent) and "HF_TOKEN" in sent.file("job1")
    for text in (describe_forwarded(sent), repr(sent), sent.file("job1")):
        assert not any(value in text for value in ("hf_1", "w_1", "s_1", "pass"))
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "db_password", "DB_PASS", "AWS_SECRET_ACCESS_KEY", "GOOGLE_CREDENTIALS"):
        assert is_secret(name), name
    for name in ("TOKENIZERS_PARALLELISM", "KEYBOARD", "NCCL_IB_HCA", "SSH_AUTH_SOCK", "COMPASS"):
        assert not is_secret(name), name


def test_values_that_are_not_text_are_refused() -> None:
    with pytest.raises(ConfigError, match="NCCL_X holds bytes that are not text"):
        forwarded({"NCCL_X": os.fsdecode(b"\xff")})


@pytest.mark.parametrize(("name", "words"), [("NOT_SET", "is not set here"), ("A=B", "'A=B' is not the name")])
def test_a_wrong_name_is_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        forwarded({}, [name])


def test_the_users_own_deepspeed_file_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed would read it if it were not given ours. It may name secrets as well."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text(
        'CACHE=$HOME/cache\n\nHF_TOKEN="hf_1"\nNCCL_DEBUG=WARN\nhttps_proxy=http://me:pw@p\n'
    )
    sent = forwarded({"NCCL_DEBUG": "INFO"})
    text = sent.file("job1")
    assert "CACHE=$HOME/cache\n" in text and "NCCL_DEBUG=WARN\n" in text and "hf_1" not in text
    assert sent.secret == {"HF_TOKEN": "hf_1", "https_proxy": "http://me:pw@p"} and "pw@" not in text
    (tmp_path / ".deepspeed_env").write_text("export A\n")
    with pytest.raises(ConfigError, match=r"\.deepspeed_env, line 1 is not NAME=VALUE"):
        forwarded({})


def test_values_and_arguments_arrive_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses DeepSpeed's own pdsh launcher, whose command line a shell reads, with pdsh's %% for %."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    values = {f"ZERO_DS_{number}": value for number, value in enumerate(ODD)}
    sent = forwarded({**values, "HF_TOKEN": "odd ' \" $HOME %n"}, ["HF_TOKEN"])
    code = "import os,sys,json; json.dump([dict(os.environ), sys.argv[1:]], open('out.json', 'w'))"
    (tmp_path / "show.py").write_text(code)
    arguments = SimpleNamespace(
        **{"user_script": "show.py", "user_args": [argument(word) for word in ODD], "ssh_port": None},
        **{"launcher_args": "", "master_addr": "a", "master_port": 1, "venv_script": None, "no_python": False},
        **{"module": False, "no_local_rank": True, "save_pid": False, "enable_each_rank_log": "None"},
    )
    runner = PDSHRunner(arguments, "world")
    for line in sent.file("job1").splitlines():
        runner.add_export(*line.split("=", 1))
    command, _, _ = runner.get_cmd({}, {"node1": [0]})
    remote = " ".join(command[command.index("node1") + 1 :])
    launcher = remote[remote.index(sys.executable) : remote.index("show.py")]
    remote = remote.replace(launcher, f"{sys.executable} ").replace("%%", "\0").replace("%n", "0").replace("\0", "%")
    probe.keep_secrets("job1", sent.secret)
    kept = tmp_path / ".cache/zero_ds/jobs/job1/HF_TOKEN"
    assert kept.stat().st_mode & 0o777 == 0o600 and kept.parent.stat().st_mode & 0o777 == 0o700
    for shell in ("bash", "sh"):
        subprocess.run([shell, "-c", remote], check=True, env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]})
        import json

        environment, words = json.loads((tmp_path / "out.json").read_text())
        assert words == ODD
        assert {name: environment[name] for name in values} == values
        assert environment["HF_TOKEN"] == "odd ' \" $HOME %n" and environment["ZERO_DS_JOB"] == "job1"
    assert "odd '" not in remote
    probe.end({"job": "job1", "patience": 0})
    assert not kept.exists()


def test_nodes_of_ranks() -> None:
    nodes = [Node("a", (0, 1)), Node("b", (2,))]
    assert [node_of_rank(nodes, rank) for rank in range(4)] == ["a", "a", "b", None]
