"""Free TCP ports of the loopback address for servers that take their port as an argument."""

import contextlib
import random
import socket

# Linux gives clients ports from 32768 on, and Ray gives its workers those from 10002 to 19999: a server that got one of
# them could lose it between the probe and its own start.
_FIRST, _LAST = 20000, 32000


def free_port() -> int:
    """One port that is free now."""
    return free_ports(1)[0]


def free_ports(count: int, first: int = _FIRST, last: int = _LAST, twin: int = 0) -> list[int]:
    """Distinct ports from `first` to `last` that are free now, and with `twin` those that many higher, too."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randint(first, last)
        if port not in ports and all(_is_free(number) for number in {port, port + twin}):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
        return True
    return False
