"""Claim: a model compresses to the same bytes from and to an object store, which gives out ≤ 1.05 × the bytes of its tensors.

    python -m benchmarks.object_store MODEL

Starts a server (SeaweedFS) with a proxy before it that counts what clients are sent, and compresses Q and K of MODEL: local to
local, local to S3, S3 to local, S3 to S3.
"""

import argparse
import asyncio
import contextlib
import io
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import contents, print_markdown, timed
from jobs.cli import main as swsc
from pipeline.model.checkpoint import open_checkpoint
from pipeline.model.store import Store
from tests.object_store import BUCKET, ObjectStore, as_client, object_store

LIMIT = 1.05
FLAGS = ["--projectors", "q,k", "--bits", "3", "--local"]


class CountingProxy:
    """Passes on what comes to `port`, and counts the bytes that the server sends back."""

    def __init__(self, target: int) -> None:
        self.target, self.sent, self.port = target, 0, 0
        self._loop, self._up = asyncio.new_event_loop(), threading.Event()
        threading.Thread(target=self._run, daemon=True).start()
        self._up.wait()

    def _run(self) -> None:
        self._loop.run_until_complete(self._listen())
        self._loop.run_forever()

    async def _listen(self) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._up.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self.target)
        await asyncio.gather(self._pass_on(reader, to_server, False), self._pass_on(from_server, writer, True))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 20):
                self.sent += len(data) if counted else 0
                writer.write(data)
                await writer.drain()
        writer.close()


@contextlib.contextmanager
def counted_store(folder: Path) -> Iterator[CountingProxy]:
    """A server whose clients, of whom this process is one, are counted."""
    with object_store(folder) as server:
        proxy = CountingProxy(server.ports["s3"])
        there = {**server.environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
        with as_client(ObjectStore(server.folder, server.ports, there, server.process)):
            yield proxy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="local directory of a dense safetensors checkpoint")
    model = Path(parser.parse_args().model)
    tensors = sum(info.nbytes for info in open_checkpoint(str(model)).tensors.values())
    rows, outputs = [], []
    with tempfile.TemporaryDirectory(prefix="object-store") as folder, counted_store(Path(folder, "store")) as proxy:
        remote = Store.at(f"{BUCKET}/model")
        for path in sorted(path for path in model.iterdir() if path.is_file()):
            remote.write(path.name, Store.at(str(model)).stream(path.name, 0, path.stat().st_size))
        for source in (str(model), remote.root):
            for output in (f"{folder}/{len(rows)}", f"{BUCKET}/{len(rows)}"):
                proxy.sent = 0
                with contextlib.redirect_stdout(io.StringIO()):
                    code, seconds = timed(lambda: swsc(["compress", source, output, *FLAGS]))  # noqa: B023
                if code:
                    raise SystemExit(f"{source} to {output}: exit {code}")
                rows.append([_kind(source), _kind(output), proxy.sent, proxy.sent / tensors, seconds])
                outputs.append(contents(Store.at(output)))
    print_markdown(["from", "to", "bytes sent by the store", "to those of the tensors", "seconds"], rows)
    same = all(output == outputs[0] for output in outputs)
    print(f"{len(outputs)} outputs of {len(outputs[0])} files each, identical: {same}")
    raise SystemExit(not same or any(ratio > LIMIT for _, _, _, ratio, _ in rows))


def _kind(location: str) -> str:
    return "S3" if location.startswith(BUCKET) else "local"


if __name__ == "__main__":
    main()
