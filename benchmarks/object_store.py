"""Claim: a model compresses to the same bytes from and to an object store, which sends ≤ 1.05 × its bytes.

    python -m benchmarks.object_store MODEL

Starts a server (SeaweedFS) behind a proxy that counts the bytes sent to clients, and compresses Q and K of MODEL from
local to local, local to S3, S3 to local and S3 to S3. Over plain http every byte is read twice, because nothing else
detects a flipped bit (pipeline/storage/repeated_reads.py); SWSC_READ_ONCE reads once, as over https. Both are measured.

Good result, exit code 0: all outputs are identical, and the store sends at most 1.05 × (reading once) or 2.1 × (reading
twice) the bytes of the tensors.
"""

import argparse
import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from unittest import mock

from benchmarks.common import contents, print_markdown, timed
from jobs.cli import main as swsc
from pipeline.checkpoints.source import open_checkpoint
from pipeline.storage.filesystems import files_at
from pipeline.storage.object_stores import READ_ONCE
from pipeline.storage.store import Store
from tests.support.fault_proxy import FaultProxy
from tests.support.object_store import BUCKET, ObjectStore, as_client, object_store

LIMITS = {"twice": 2.1, "once": 1.05}
FLAGS = ["--projectors", "q,k", "--bits", "3", "--local"]


@contextlib.contextmanager
def counted_store(folder: Path) -> Iterator[FaultProxy]:
    """A server whose bytes sent are counted. This process is one of its clients."""
    with object_store(folder) as server:
        proxy = FaultProxy(server.ports["s3"])
        there = {**server.environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
        with as_client(ObjectStore(server.folder, server.ports, there, server.process)):
            yield proxy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="local directory of a dense safetensors checkpoint")
    model = Path(parser.parse_args().model)
    tensors = sum(info.nbytes for info in open_checkpoint(str(model)).tensors.values())
    rows: list[tuple[str, str, str, int, float, float]] = []
    outputs: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory(prefix="object-store") as folder, counted_store(Path(folder, "store")) as proxy:
        remote = Store.at(f"{BUCKET}/model")
        for path in sorted(path for path in model.iterdir() if path.is_file()):
            remote.write(path.name, Store.at(str(model)).stream(path.name, 0, path.stat().st_size))
        for times, source in product(LIMITS, (str(model), remote.root)):
            for output in (f"{folder}/{len(rows)}", f"{BUCKET}/{len(rows)}"):
                proxy.sent = 0
                with contextlib.redirect_stdout(io.StringIO()), reading(times):
                    code, seconds = timed(lambda: swsc(["compress", source, output, *FLAGS]))  # noqa: B023
                if code:
                    raise SystemExit(f"{source} to {output}: exit {code}")
                rows.append((_kind(source), _kind(output), times, proxy.sent, proxy.sent / tensors, seconds))
                outputs.append(contents(Store.at(output)))
    print_markdown(["from", "to", "read", "bytes sent by the store", "ratio to the tensors", "seconds"], rows)
    same = all(output == outputs[0] for output in outputs)
    print(f"{len(outputs)} outputs of {len(outputs[0])} files each, identical: {same}")
    raise SystemExit(not same or any(ratio > LIMITS[times] for _, _, times, _, ratio, _ in rows))


@contextlib.contextmanager
def reading(times: str) -> Iterator[None]:
    """Clients read bytes over plain http "twice" or "once"."""
    with mock.patch.dict(os.environ, {READ_ONCE: "1"} if times == "once" else {}):
        files_at.cache_clear()
        yield
    files_at.cache_clear()


def _kind(location: str) -> str:
    return "S3" if location.startswith(BUCKET) else "local"


if __name__ == "__main__":
    main()
