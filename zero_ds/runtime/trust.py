"""The user's permission to run code that comes with a model, which is not given by default."""

from __future__ import annotations

_permission = {"code": False}


def allow_code(permitted: bool) -> None:
    """Gives this process the permission to run code of model folders, or takes it back."""
    _permission["code"] = permitted


def code_is_allowed() -> bool:
    """Returns whether the user permits such code, by --trust-remote-code or by trust_remote_code in a recipe."""
    return _permission["code"]
