"""A loopback port for a server that must be told one, and that nobody else is given meanwhile.

Owns the socket that keeps it. Never listens: whoever asks there before the server does is refused."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserved_port() -> Iterator[int]:
    """Bound here, so the kernel picks it for nobody; on Linux a listener with SO_REUSEADDR has it all the same."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port: int = holder.getsockname()[1]
        if sys.platform != "linux":
            holder.close()
        yield port
