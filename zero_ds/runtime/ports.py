"""Free TCP ports; a separate module, because programs that only start others need one without loading torch."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Returns a TCP port that is free on this machine now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
