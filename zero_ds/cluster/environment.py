"""The environment of the ranks on other machines: an explicit list, and secrets only by name.

DeepSpeed's launcher exports to the nodes what its environment file says (`DS_ENV_FILE`), beside a few prefixes. Its
lines end up in the command lines of pdsh, ssh and the remote shells, which every user of those machines can read. A
secret's line is therefore no value but a reference to a file on the node, which the check before the launch has put
there over ssh's standard input (probe.keep_secrets).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zero_ds.cluster.probe import JOB
from zero_ds.runtime.errors import ConfigError

NAMES = (
    *("PATH", "LD_LIBRARY_PATH", "LIBRARY_PATH", "CPATH", "CUDA_HOME", "CC", "CXX", "LANG", "LC_ALL"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "no_proxy", "all_proxy"),
    *(
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "REQUESTS_CA_BUNDLE",
        "CURL_CA_BUNDLE",
        "XDG_CACHE_HOME",
        "HUGGINGFACE_HUB_CACHE",
        "HUGGING_FACE_HUB_TOKEN",
    ),
    *("TOKENIZERS_PARALLELISM", "MKL_NUM_THREADS", "PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING"),
)
"""Variables that are forwarded where they are set."""
PREFIXES = (
    *(
        "NCCL_",
        "FI_",
        "UCX_",
        "GLOO_",
        "OMPI_",
        "HF_",
        "TRANSFORMERS_",
        "TORCH_",
        "TORCHDYNAMO_",
        "TORCHINDUCTOR_",
        "PYTORCH_",
    ),
    *("TRITON_", "WANDB_", "OMP_", "KMP_", "DS_", "ZERO_DS_", "CUDA_DEVICE_"),
)
"""Beginnings of names that are."""
OURS = ("DS_ENV_FILE", "ZERO_DS_FORWARD", JOB)
"""Names with such a beginning that mean nothing on another machine."""
FORWARD = "ZERO_DS_FORWARD"
"""Variable with further names, separated by commas or spaces; the only way for a secret."""
DEEPSPEED_FILE = ".deepspeed_env"

_SECRET = re.compile(r"((TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?|(?<![A-Z])PASS(PHRASE)?)(_|$)", re.IGNORECASE)
_PASSWORD_IN_URL = re.compile(r"://[^/@\s]+:[^/@\s]+@")
_NAME = re.compile(r"[A-Za-z_]\w*")


def is_secret(name: str) -> bool:
    """Whether a variable of this name looks like one that nobody else should read."""
    return bool(_SECRET.search(name))


@dataclass(frozen=True)
class Forwarded:
    """What goes to the nodes."""

    plain: dict[str, str] = field(default_factory=dict)
    secret: dict[str, str] = field(default_factory=dict, repr=False)
    withheld: tuple[str, ...] = ()
    """Set here, on the list, and not forwarded: they look like secrets and were not named."""
    verbatim: dict[str, str] = field(default_factory=dict)
    """From the user's own files, in the form that DeepSpeed's launcher pastes into a shell."""

    def names(self) -> list[str]:
        return sorted({*self.plain, *self.secret, *self.verbatim})

    def file(self, job: str) -> str:
        """Content of DeepSpeed's environment file: `NAME=VALUE` lines, safe between double quotes in a shell.

        DeepSpeed (0.19) puts the quotes, escapes nothing, and hands the whole to pdsh, for which % is special.
        """
        lines = {name: _escaped(value) for name, value in self.plain.items()}
        lines |= self.verbatim
        lines |= {name: f"$(cat ~/.cache/zero_ds/jobs/{job}/{name})" for name in self.secret}
        lines[JOB] = job
        return "".join(f"{name}={value}\n" for name, value in lines.items())


def forwarded(environment: Mapping[str, str], named: Sequence[str] = ()) -> Forwarded:
    """What of an environment reaches the nodes: the list above, and what is `named`, in ZERO_DS_FORWARD, or stands in
    the user's own DeepSpeed files (~/.deepspeed_env, ./.deepspeed_env, or DS_ENV_FILE).

    Raises:
        ConfigError: a name that is none or is not set, or an unreadable line in one of those files.
    """
    wanted = [*named, *environment.get(FORWARD, "").replace(",", " ").split()]
    for name in wanted:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"'{name}' is no name of a variable; give names alone, without values.")
        if name not in environment:
            raise ConfigError(f"{name} should be forwarded and is not set here; set it, or leave it out.")
    plain, secret, withheld = {}, {}, []
    for name, value in sorted(environment.items()):
        listed = name in NAMES or name.startswith(PREFIXES)
        if name in OURS or not (listed or name in wanted) or not _NAME.fullmatch(name):
            continue
        if any("\ud800" <= letter <= "\udfff" for letter in value):  # Python's stand-ins for such bytes
            raise ConfigError(f"{name} holds bytes that are no text, and cannot be forwarded; unset it here.")
        if is_secret(name) and name not in wanted:
            withheld.append(name)
        elif is_secret(name) or _PASSWORD_IN_URL.search(value) or "\n" in value:
            secret[name] = value
        else:
            plain[name] = value
    verbatim = _users_own(environment)
    private = [name for name, value in verbatim.items() if is_secret(name) or _PASSWORD_IN_URL.search(value)]
    secret |= {name: verbatim.pop(name).strip("'\"") for name in private}
    return Forwarded(plain, secret, tuple(name for name in withheld if name not in secret), verbatim)


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of DeepSpeed's launcher, which exports some prefixes (MLFLOW, PYTHON, UCX, ...) by itself, in
    command lines."""
    return {n: v for n, v in environment.items() if not is_secret(n) and not _PASSWORD_IN_URL.search(v)}


def _users_own(environment: Mapping[str, str]) -> dict[str, str]:
    """Lines of the files that DeepSpeed itself would read, were it not given ours."""
    lines: dict[str, str] = {}
    name = environment.get("DS_ENV_FILE", DEEPSPEED_FILE)
    for path in dict.fromkeys((Path.home() / name, Path(name))):
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            key, separator, value = line.partition("=")
            if line.strip() and not (separator and _NAME.fullmatch(key.strip())):
                raise ConfigError(f"{path}, line {number} is not NAME=VALUE, which DeepSpeed needs; mend it.")
            if line.strip():
                lines[key.strip()] = value.strip()
    return lines


def _escaped(value: str) -> str:
    """For a place between double quotes in a shell, handed on by pdsh."""
    return re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")


def argument(word: str) -> str:
    """An argument of a rank, as DeepSpeed's pdsh launcher must be given it, so that it arrives as it is.

    DeepSpeed (0.19) pastes arguments into a remote shell's command line: between double quotes if there is a space in
    them, with nothing but `"` escaped, and bare otherwise.
    """
    if " " in word:
        return re.sub(r"([\\$`])", r"\\\1", word).replace("%", "%%")
    bare = re.fullmatch(r"[\w@+=:,./-]*", word) and word
    return (word if bare else "'" + word.replace("'", "'\"'\"'") + "'").replace("%", "%%")


def told(what: Forwarded) -> str:
    """One line for people: names, never values."""
    line = f"forwarded to every node: {' '.join(what.names()) or 'nothing'}"
    if what.withheld:
        line += f"; withheld, for they look like secrets (name them with --forward): {' '.join(what.withheld)}"
    return line


if __name__ == "__main__":
    try:
        sys.stdout.write(told(forwarded(os.environ, sys.argv[1:])) + "\n")
    except ConfigError as error:
        sys.exit(f"zero-ds: {error}")
