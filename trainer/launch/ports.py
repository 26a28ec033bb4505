"""Free TCP ports of this machine for ranks that are started in a moment."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_port() -> Iterator[int]:
    """Yield a free port, and keep it free for the ranks that will meet there.

    A port that is only looked up may be gone before the first rank listens: the kernel gives such
    ports to connections too. One that is bound is given to nobody who did not ask for it, and
    SO_REUSEADDR lets a rank, whose store sets it as well, listen on it nevertheless.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])
