"""Tasks of a worker that touch no device: bytes are hashed, copied, restored, added up."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.measure.adapter import adapter_tensors
from pipeline.model.artifact import open_model
from pipeline.model.checkpoint import read_header
from pipeline.model.digests import FileDigests, digests_of
from pipeline.model.lease import Ticket
from pipeline.model.parts import Payload, copy_tensors, differences, read_tensor, to_part, to_tensor
from pipeline.model.plan import CopyTask
from pipeline.model.store import FileRecord, Store
from pipeline.model.tensors import TensorInfo
from pipeline.run.heap import peak_rss
from swsc_core.format import part_name


class HostTasks:
    """They hold nothing between two calls, and give the same on any worker."""

    def fold_moments(self, before: Payload, shard: Payload) -> tuple[dict[str, Any], Payload]:
        """The sums over some shards of a layer, with those over one more added to them."""
        total = [
            to_part(old.name, to_tensor(old) + to_tensor(new))
            for old, new in zip(before.parts, shard.parts, strict=True)
        ]
        rows = [
            old | {"tokens": old["tokens"] + new["tokens"]} for old, new in zip(before.rows, shard.rows, strict=True)
        ]
        return {"peak_rss": peak_rss()}, Payload(tuple(total), tuple(rows))

    def moments_of(self, name: str, layer: Payload) -> tuple[dict[str, Any], Payload]:
        """The sums of one matrix out of those of its layer, and whose `plain` is its own."""
        own = {part_name(name, part) for part in ("weighted", "rows", "plain")}
        (row,) = (row for row in layer.rows if row["name"] == name)
        return {"peak_rss": peak_rss()}, Payload(tuple(part for part in layer.parts if part.name in own), (row,))

    def keep(self, payload: Payload) -> tuple[dict[str, float], Payload]:
        """The payload again, for a task that writes it."""
        return {}, payload

    def read_payload(self, store: Store, file: str) -> tuple[dict[str, float], Payload]:
        """What was written of a payload."""
        return {}, Payload(tuple(to_part(info.name, read_tensor(store, info)) for info in read_header(store, file)[1]))

    def restore(self, location: str, names: Sequence[str], bare: Iterable[str] = ()) -> tuple[dict[str, Any], Payload]:
        """Dense weights of compressed tensors of the model at `location`; of `bare` ones without their low-rank part."""
        model = open_model(location)
        parts = tuple(to_part(name, model.read(name, name in bare)) for name in names)
        return {"rows": [], "peak_rss": peak_rss()}, Payload(parts)

    def low_rank(self, location: str, carried: Mapping[str, str]) -> tuple[dict[str, Any], Payload]:
        """The low-rank parts of tensors of the model at `location`, tensor -> linear layer, as a LoRA adapter's."""
        tensors = adapter_tensors(open_model(location), carried)
        return {"rows": [], "peak_rss": peak_rss()}, Payload(tuple(to_part(*one) for one in tensors))

    def check_file(self, store: Store, file: str, about: Mapping[str, Any]) -> list[str]:
        """What is wrong with a file of an output, by its manifest's words."""
        return differences(store, file, about)

    def hash_file(self, store: Store, file: str, infos: Sequence[TensorInfo]) -> FileDigests:
        """sha256 of a file, and of each of its tensors."""
        return digests_of(store, file, infos)

    def copy(self, source: Store, task: CopyTask, ticket: Ticket) -> FileRecord:
        """Stream tensors that stay as they are into their file."""
        return copy_tensors(source, task.infos, ticket, task.file)
