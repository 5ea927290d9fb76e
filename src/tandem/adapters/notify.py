"""What a service tells whoever supervises it, by systemd's protocol (sd_notify): datagrams to the socket that
``NOTIFY_SOCKET`` names. Where nobody supervises, nothing is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable

VARIABLE = "NOTIFY_SOCKET"
_STOPPING = b"STOPPING=1"
_LONGEST = 4096
#: struct ucred: pid, uid, gid of the sender, as the kernel knows them.
_CREDENTIALS = struct.Struct("3i")


def supervised() -> bool:
    """Whether somebody wants to hear."""
    return bool(os.environ.get(VARIABLE))


def stopping() -> None:
    """This process takes nothing new, and has given up its ports."""
    address = os.environ.get(VARIABLE, "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending, contextlib.suppress(OSError):
        sending.setblocking(False)  # whoever has gone, or does not read, does not hear it
        sending.sendto(_STOPPING, "\0" + address[1:] if address.startswith("@") else address)


class Ear:
    """The supervisor's end: ``on_stopping`` gets the pid of each process that says so. ``close`` it."""

    def __init__(self, on_stopping: Callable[[int], None]) -> None:
        self._on_stopping = on_stopping
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        # Anybody on this machine may write to it: who it was, the kernel says.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind("")  # an abstract address that the kernel chooses
        asyncio.get_running_loop().add_reader(self._socket, self._read)

    @property
    def address(self) -> str:
        """For ``NOTIFY_SOCKET``."""
        name: bytes = self._socket.getsockname()
        return "@" + name[1:].decode()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()

    def _read(self) -> None:
        try:
            message, ancillary, _, _ = self._socket.recvmsg(_LONGEST, socket.CMSG_SPACE(_CREDENTIALS.size))
        except BlockingIOError:
            return
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS) and _STOPPING in message.split(b"\n"):
                self._on_stopping(_CREDENTIALS.unpack(data)[0])
