"""A free TCP port; a file of its own because programs that only start others ask for one before they load torch."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A TCP port on this machine that is free now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
