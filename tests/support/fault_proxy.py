"""A proxy before an HTTP server: it counts what clients are sent, and spoils answers in one of several ways."""

import contextlib
import random
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

_BLOCK = 8192
_REQUEST = re.compile(rb"(GET|HEAD|PUT|POST|DELETE) \S+ HTTP/1\.1\r\n")
_ANSWERS = {
    "refuse": b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: 60\r\n\r\n"
    b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"[:60],
    "busy": b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
}


@dataclass
class FaultProxy:
    """Passes on what comes to `port`; from request number `after` on it spoils, `times` times at most.

    Modes: "" nothing; "flip", one bit of a large block of an answer; "flip same", at the same place of each; "flip small", of small
    answers, too; "flip up", one bit of a block of
    an upload; "cut", the connection in the middle of an answer; "length", an answer that calls itself a byte shorter than it is;
    "refuse", 403; "busy", 503.
    """

    target: int
    mode: str = ""
    after: int = 0
    times: int = 1 << 30
    sent: int = 0
    requests: int = 0
    spoiled: int = 0
    port: int = field(init=False)

    def __post_init__(self) -> None:
        self._random, self._lock = random.Random(7), threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def strike(self, mode: str, after: int = 0, times: int = 1 << 30) -> None:
        """Spoil from the `after`-th request on that comes from now."""
        self.mode, self.after, self.times, self.spoiled = mode, self.requests + after, times, 0

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.target)) as server, client:
            threading.Thread(target=self._pass_on, args=(server, client, self._down), daemon=True).start()
            self._pass_on(client, server, self._up)

    def _pass_on(self, source: socket.socket, to: socket.socket, seen: Callable[[bytes, socket.socket], bytes]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_BLOCK):
                to.sendall(seen(data, source))
        for end in (source, to):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _up(self, data: bytes, client: socket.socket) -> bytes:
        if _REQUEST.match(data):
            self.requests += 1
            if self.mode in _ANSWERS and self._strikes():
                client.sendall(_ANSWERS[self.mode])
                raise ConnectionAbortedError
        elif self.mode == "flip up" and len(data) > 500 and self._strikes():
            return self._flipped(data, len(data) // 2)
        return data

    def _down(self, data: bytes, server: socket.socket) -> bytes:
        self.sent += len(data)
        least = 500 if self.mode == "flip small" else 3000
        if self.mode in ("flip", "flip same", "flip small") and len(data) > least and self._strikes():
            return self._flipped(data, -7 if self.mode == "flip same" else -self._random.randrange(1, 400))
        if self.mode == "cut" and len(data) > 500 and self._strikes():
            raise ConnectionAbortedError
        length = re.search(rb"Content-Length: (\d{4,})\r\n", data)
        if self.mode == "length" and length and self._strikes():
            return data.replace(length[1], str(int(length[1]) - 1).encode(), 1)
        return data

    def _strikes(self) -> bool:
        with self._lock:
            strikes = self.requests >= self.after and self.spoiled < self.times
            self.spoiled += strikes
        return strikes

    @staticmethod
    def _flipped(data: bytes, place: int) -> bytes:
        spoiled = bytearray(data)
        spoiled[place] ^= 1
        return bytes(spoiled)
