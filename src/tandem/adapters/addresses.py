"""Which address of this machine a host name stands for.

In a cluster of containers nobody knows a process's address beforehand, and a name may stand for all replicas of a
service. ``own_address`` takes the one address among a name's that this machine has, so that a server can be bound to
just the network that the name belongs to, and others can be told where it is.
"""

from __future__ import annotations

import ipaddress
import socket
import time

from tandem.adapters.clock import monotonic
from tandem.errors import ConfigError

_POLL_S = 0.1


def own_address(host: str, *, wait_s: float = 5.0) -> str:
    """``host`` itself where it is an address, empty or localhost. ConfigError if the name has no address of ours.

    Blocks, up to ``wait_s``: a name server may learn of this machine a moment after its processes start.
    """
    if not host or host == "localhost" or _is_address(host):
        return host
    deadline = monotonic() + wait_s
    while True:
        found = _addresses(host)
        for address in found:
            if _is_ours(address):
                return address
        if monotonic() > deadline:
            what = f"stands for {', '.join(found)}, none of them this machine's" if found else "is not known"
            raise ConfigError(f"cannot listen on {host!r}: the name {what}", param="host")
        time.sleep(_POLL_S)


def is_wildcard(host: str) -> bool:
    return _is_address(host) and ipaddress.ip_address(host).is_unspecified


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _addresses(name: str) -> list[str]:
    try:
        return list(
            dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))
        )
    except OSError:
        return []


def _is_ours(address: str) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
