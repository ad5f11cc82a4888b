"""The environment of ranks on other machines: an explicit list of variables, and secrets only by name.

DeepSpeed's launcher exports to the machines what its environment file says (`DS_ENV_FILE`), as well as all variables
with a few prefixes. The lines of that file end up in the command lines of pdsh, ssh and the remote shells, which every
user of those machines can read. The line of a secret is therefore not a value but a reference to a file on the machine,
which the check before the launch has put there through ssh's standard input (probe.keep_secrets).
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

PROGRAMS = ("PATH", "LD_LIBRARY_PATH", "LIBRARY_PATH", "CPATH", "CUDA_HOME", "CC", "CXX", "LANG", "LC_ALL")
PROXIES = (
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"),
    *("http_proxy", "https_proxy", "no_proxy", "all_proxy"),
)
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
CACHES = ("XDG_CACHE_HOME", "HUGGINGFACE_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN")
COMPUTING = (
    "TOKENIZERS_PARALLELISM",
    "MKL_NUM_THREADS",
    "PYTHONHASHSEED",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_LAUNCH_BLOCKING",
)
NAMES = (*PROGRAMS, *PROXIES, *CERTIFICATES, *CACHES, *COMPUTING)
"""Names of variables that are forwarded if they are set."""

NETWORK_PREFIXES = ("NCCL_", "FI_", "UCX_", "GLOO_", "OMPI_")
LIBRARY_PREFIXES = (
    *("HF_", "TRANSFORMERS_", "TORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "WANDB_"),
    *("OMP_", "KMP_", "DS_", "ZERO_DS_", "CUDA_DEVICE_"),
)
PREFIXES = (*NETWORK_PREFIXES, *LIBRARY_PREFIXES)
"""Prefixes of names that are forwarded if they are set."""

FORWARD = "ZERO_DS_FORWARD"
"""Variable with more names to forward, separated by commas or spaces. Naming a secret is the only way to forward it."""
LOCAL_NAMES = ("DS_ENV_FILE", FORWARD, JOB)
"""Names with one of these prefixes that have no meaning on another machine."""
DEEPSPEED_FILE = ".deepspeed_env"

_SECRET = re.compile(r"((TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?|(?<![A-Z])PASS(PHRASE)?)(_|$)", re.IGNORECASE)
_PASSWORD_IN_URL = re.compile(r"://[^/@\s]+:[^/@\s]+@")
_NAME = re.compile(r"[A-Za-z_]\w*")


def is_secret(name: str) -> bool:
    """Returns whether a variable of this name looks like one that nobody else should read."""
    return bool(_SECRET.search(name))


@dataclass(frozen=True)
class Forwarded:
    """Variables that go to the machines."""

    plain: dict[str, str] = field(default_factory=dict)
    """Values by name that may be in a command line."""
    secret: dict[str, str] = field(default_factory=dict, repr=False)
    """Values by name that travel through ssh's standard input alone."""
    withheld: tuple[str, ...] = ()
    """Names that are set and on the list, but look like secrets and were not named."""
    verbatim: dict[str, str] = field(default_factory=dict)
    """Values from the user's own DeepSpeed files, in the form that DeepSpeed's launcher pastes into a shell."""

    def names(self) -> list[str]:
        """Returns the names of all variables that go to the machines."""
        return sorted({*self.plain, *self.secret, *self.verbatim})

    def file(self, job: str) -> str:
        """Returns DeepSpeed's environment file: `NAME=VALUE` lines, safe between double quotes in a shell.

        DeepSpeed (0.19) adds the quotes, escapes nothing, and hands the line to pdsh, which treats % specially.
        """
        lines = {name: _escaped(value) for name, value in self.plain.items()}
        lines |= self.verbatim
        lines |= {name: f"$(cat ~/.cache/zero_ds/jobs/{job}/{name})" for name in self.secret}
        lines[JOB] = job
        return "".join(f"{name}={value}\n" for name, value in lines.items())


def forwarded(environment: Mapping[str, str], named: Sequence[str] = ()) -> Forwarded:
    """Returns the variables of an environment that go to the machines.

    They are those on the list above, those `named` here or in ZERO_DS_FORWARD, and those in the user's own DeepSpeed
    files (~/.deepspeed_env, ./.deepspeed_env, or DS_ENV_FILE).

    Raises:
        ConfigError: a name is not valid or not set, a value is not text, or a line of those files cannot be read.
    """
    wanted = [*named, *environment.get(FORWARD, "").replace(",", " ").split()]
    for name in wanted:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"'{name}' is not the name of a variable; give names alone, without values.")
        if name not in environment:
            raise ConfigError(f"{name} should be forwarded and is not set here; set it, or leave it out.")
    plain, secret, withheld = {}, {}, []
    for name, value in sorted(environment.items()):
        listed = name in NAMES or name.startswith(PREFIXES)
        if name in LOCAL_NAMES or not (listed or name in wanted) or not _NAME.fullmatch(name):
            continue
        if any("\ud800" <= letter <= "\udfff" for letter in value):  # Python's surrogates for bytes that are not UTF-8
            raise ConfigError(f"{name} holds bytes that are not text, and cannot be forwarded; unset it here.")
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
    """Returns the environment for DeepSpeed's launcher itself.

    The launcher puts every variable with certain prefixes (MLFLOW, PYTHON, UCX, ...) into command lines by itself.
    """
    return {
        name: value for name, value in environment.items() if not is_secret(name) and not _PASSWORD_IN_URL.search(value)
    }


def _users_own(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables of the files that DeepSpeed would read by itself if it were not given ours."""
    lines: dict[str, str] = {}
    name = environment.get("DS_ENV_FILE", DEEPSPEED_FILE)
    for path in dict.fromkeys((Path.home() / name, Path(name))):
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            key, separator, value = line.partition("=")
            if not (separator and _NAME.fullmatch(key.strip())):
                raise ConfigError(f"{path}, line {number} is not NAME=VALUE, which DeepSpeed needs; correct it.")
            lines[key.strip()] = value.strip()
    return lines


def _escaped(value: str) -> str:
    """Returns a value for a place between double quotes in a shell, handed on by pdsh."""
    return re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")


def argument(word: str) -> str:
    """Returns an argument of a rank in the form in which DeepSpeed's pdsh launcher delivers it unchanged.

    DeepSpeed (0.19) pastes arguments into a remote shell's command line: an argument with a space between double
    quotes, with nothing but `"` escaped, and any other one bare.
    """
    if " " in word:
        return re.sub(r"([\\$`])", r"\\\1", word).replace("%", "%%")
    if word and re.fullmatch(r"[\w@+=:,./-]*", word):
        return word
    return ("'" + word.replace("'", "'\"'\"'") + "'").replace("%", "%%")


def describe_forwarded(what: Forwarded) -> str:
    """Returns one line for people: names, never values."""
    line = f"forwarded to every node: {' '.join(what.names()) or 'nothing'}"
    if what.withheld:
        names = " ".join(what.withheld)
        line += f"; withheld, because they look like secrets (name them with --forward): {names}"
    return line


if __name__ == "__main__":
    try:
        sys.stdout.write(describe_forwarded(forwarded(os.environ, sys.argv[1:])) + "\n")
    except ConfigError as error:
        sys.exit(f"zero-ds: {error}")
