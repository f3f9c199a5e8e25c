"""A proxy in front of an HTTP server that counts the bytes sent to clients and injects faults of one kind."""

import contextlib
import random
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

_BLOCK = 8192
_REQUEST = re.compile(rb"(GET|HEAD|PUT|POST|DELETE) \S+ HTTP/1\.1\r\n")
_RESPONSES = {
    "refuse": b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    b"Content-Length: 60\r\n\r\n"
    b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"[:60],
    "busy": b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
}


@dataclass
class FaultProxy:
    """Forwards connections to `port` to the server at `target`, and injects a fault into some requests.

    Modes:
        "": no fault.
        "flip": one bit of a large block of a response is flipped, at a random position.
        "flip same": the same, always at the same position.
        "flip small": the same as "flip", in small responses too.
        "flip up": one bit of a block of an upload is flipped.
        "cut": the connection is closed in the middle of a response.
        "length": the Content-Length of a response is one byte too small.
        "refuse": the response is 403.
        "busy": the response is 503.

    Attributes:
        target: port of the server.
        mode: kind of fault.
        after: number of the first request that may be faulty.
        times: maximum number of faults.
        sent: bytes sent to clients.
        requests: requests received.
        spoiled: faults injected since the last `strike`.
        port: port of the proxy.
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
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def strike(self, mode: str, after: int = 0, times: int = 1 << 30) -> None:
        """Inject faults from the `after`-th request from now on."""
        self.mode, self.after, self.times, self.spoiled = mode, self.requests + after, times, 0

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.target)) as server, client:
            threading.Thread(target=self._forward, args=(server, client, self._change_response), daemon=True).start()
            self._forward(client, server, self._change_upload)

    def _forward(
        self, source: socket.socket, target: socket.socket, change: Callable[[bytes, socket.socket], bytes]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_BLOCK):
                target.sendall(change(data, source))
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _change_upload(self, data: bytes, client: socket.socket) -> bytes:
        if _REQUEST.match(data):
            self.requests += 1
            if self.mode in _RESPONSES and self._strikes():
                client.sendall(_RESPONSES[self.mode])
                raise ConnectionAbortedError
        elif self.mode == "flip up" and len(data) > 500 and self._strikes():
            return self._flipped(data, len(data) // 2)
        return data

    def _change_response(self, data: bytes, server: socket.socket) -> bytes:
        self.sent += len(data)
        min_length = 500 if self.mode == "flip small" else 3000
        if self.mode in ("flip", "flip same", "flip small") and len(data) > min_length and self._strikes():
            return self._flipped(data, -7 if self.mode == "flip same" else -self._random.randrange(1, 400))
        if self.mode == "cut" and len(data) > 500 and self._strikes():
            raise ConnectionAbortedError
        length = re.search(rb"Content-Length: (\d{4,})\r\n", data)
        if self.mode == "length" and length and self._strikes():
            return data.replace(length[1], str(int(length[1]) - 1).encode(), 1)
        return data

    def _strikes(self) -> bool:
        """Whether to inject a fault now; counts it."""
        with self._lock:
            strikes = self.requests >= self.after and self.spoiled < self.times
            self.spoiled += strikes
        return strikes

    @staticmethod
    def _flipped(data: bytes, position: int) -> bytes:
        spoiled = bytearray(data)
        spoiled[position] ^= 1
        return bytes(spoiled)
