"""A compressed model's directory: how it is begun, committed and read again.

While a run is under way the directory holds finished tensor files and, under `.swsc`, what was asked for and a record
for each finished file. Index, config, report and, last of all, the manifest make it a model; then `.swsc` goes. So a
directory without a manifest is never taken for a finished one, and a run that was cut short can go on.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import CheckpointError, OutputError
from pipeline.model.checkpoint import INDEX, MANIFEST, RUN, Checkpoint, open_checkpoint, read_header
from pipeline.model.parts import DONE, read_tensor
from pipeline.model.store import FileRecord, Store

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 2
REPORT = "swsc_report.json"
CALIBRATION = "swsc_calibration.json"  # traces of the text that was calibrated on (measure/overlap.py)
_OURS = re.compile(r"(model-\d+-of-\d+\.safetensors|.*\.partial)$")  # names of tensor files and of unfinished files


@dataclass(frozen=True)
class Output:
    """An output directory that this run may write.

    Attributes:
        identity: what makes two runs the same: settings and fingerprint of the source.
        finished: records of files that an earlier run of the same identity completed, by file name, with their rows.
        complete: the whole directory is finished already.
        made_directory: the directory was not there before.
    """

    store: Store
    identity: dict[str, Any]
    finished: dict[str, tuple[FileRecord, list[dict[str, Any]]]]
    complete: bool
    made_directory: bool = False

    @property
    def finished_bytes(self) -> int:
        return sum(record.size for record, _ in self.finished.values())


def begin(store: Store, identity: dict[str, Any]) -> Output:
    """Open an output directory for a run, or find out how far an earlier run of it came.

    Raises:
        OutputError: the directory holds something else, or was begun with other settings or another source.
    """
    if store.exists(MANIFEST):
        manifest = _read_own(store, MANIFEST, "identity", "files")
        _same(store, manifest["identity"], identity)
        _require_whole(store, manifest["files"])
        store.remove(".swsc")  # a run that was cut off right after its manifest leaves it
        return Output(store, identity, {}, complete=True)
    if store.exists(RUN):
        _same(store, _read_own(store, RUN), identity)
        return Output(store, identity, _finished(store), complete=False)
    present = store.entries()
    if present.keys() - {".swsc"}:
        raise OutputError(f"{store.root}: not empty and not an output of this tool; choose an empty or new directory")
    made = not store.is_there
    store.write_json(RUN, identity)
    return Output(store, identity, {}, complete=False, made_directory=made)


def _read_own(store: Store, name: str, *keys: str) -> dict[str, Any]:
    """A file of ours; OutputError if it is damaged."""
    try:
        value = store.read_json(name)
        return {**value, **{key: dict(value[key]) for key in keys}}
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{store.root}: {name} is damaged ({error}); remove the output and run again") from None


def _same(store: Store, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise OutputError(
            f"{store.root}: holds an output of other settings ({'; '.join(changed)}); choose another directory or remove it"
        )


def _require_whole(store: Store, files: Mapping[str, Any]) -> None:
    for name, about in files.items():
        if not store.exists(name) or store.size(name) != about["size"]:
            raise OutputError(
                f"{store.root}: {name} is missing or has another size than it was written with; remove the output"
            )


def _finished(store: Store) -> dict[str, tuple[FileRecord, list[dict[str, Any]]]]:
    """Files of an interrupted run that are as their records say; anything else is removed."""
    finished = {}
    for entry in store.below(DONE).names():
        file = entry.removesuffix(".json")
        try:
            done = store.read_json(f"{DONE}/{entry}")
            record = FileRecord(file, done["size"], done["sha256"])
            sound = store.exists(file) and store.size(file) == record.size and store.sha256(file) == record.sha256
        except (ValueError, KeyError):
            sound = False
        if sound:
            finished[file] = (record, done["rows"])
    for name in store.names():
        if name not in finished and _OURS.match(name):
            store.remove(name)
    return finished


def abandon(output: Output) -> None:
    """Take back what this run wrote, after a user's mistake that only showed while it ran (NaN in a weight)."""
    if output.finished:
        return
    for name in [name for name in output.store.names() if _OURS.match(name)] + [".swsc"]:
        output.store.remove(name)
    if output.made_directory:
        output.store.remove_empty()


def finish(
    output: Output, source: Checkpoint, records: list[FileRecord], config: dict[str, Any], report: dict[str, Any]
) -> None:
    """Write everything that makes finished tensor files a model; the manifest last.

    The manifest lists every file but itself and the report, which holds times and therefore differs between runs.
    """
    store, weight_map, total = output.store, {}, 0
    for record in [record for record in records if record.name.endswith(".safetensors")]:
        for info in read_header(store, record.name)[1]:
            weight_map[info.name] = record.name
            total += info.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    records = records + [
        store.write(name, source.store.stream(name, 0, source.store.size(name))) for name in source.extras
    ]
    records += [store.write_json(INDEX, index), store.write_json("config.json", config)]
    store.write_json(REPORT, report)
    files = {record.name: {"size": record.size, "sha256": record.sha256} for record in records}
    store.write_json(MANIFEST, {"format_version": FORMAT_VERSION, "identity": output.identity, "files": files})
    store.remove(".swsc")


def quantization_config(entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What config.json says of the compressed tensors: tensor name -> what `swsc_core.decode` must know."""
    return {"quant_method": "swsc", "format_version": FORMAT_VERSION, "tensors": entries}


def part_name(tensor: str, part: str) -> str:
    """Stored name of a part: `X.weight` and part `left` give `X.left`."""
    stem = tensor.removesuffix(".weight")
    return tensor if part == "weight" else f"{stem}.{part}"


@dataclass(frozen=True)
class Model:
    """A model as its user sees it: dense weights by name, whether they are stored dense or compressed."""

    checkpoint: Checkpoint
    entries: dict[str, dict[str, Any]]

    @property
    def names(self) -> list[str]:
        """Names of the dense tensors, compressed ones by the name of the tensor that they stand for."""
        parts = {name for tensor in self.entries for name in self.parts(tensor).values() if name != tensor}
        return [name for name in self.checkpoint.tensors if name not in parts]

    @property
    def weights(self) -> int:
        """Number of weights, those of compressed tensors as what they stand for."""
        return sum(self.count(name) for name in self.names)

    def count(self, name: str) -> int:
        """Number of weights of the dense tensor `name`."""
        return math.prod(self.entries[name]["shape"]) if name in self.entries else self.checkpoint.tensors[name].count

    @property
    def config(self) -> dict[str, Any]:
        """The model's own config, without what says that it is compressed."""
        return {key: value for key, value in self.checkpoint.config.items() if key != "quantization_config"}

    def parts(self, tensor: str) -> dict[str, str]:
        """part -> stored name, of a compressed tensor."""
        from swsc_core.codec import parts_of

        return {part: part_name(tensor, part) for part in parts_of(self.entries[tensor])}

    def read(self, name: str) -> "Tensor":
        """The dense tensor `name`, on the CPU."""
        from swsc_core import decode

        if name not in self.entries:
            return read_tensor(self.checkpoint.store, self.checkpoint.tensors[name])
        return decode(self.read_parts(name), self.entries[name])

    def read_parts(self, name: str) -> dict[str, "Tensor"]:
        """part -> tensor, of a compressed tensor, on the CPU."""
        tensors, store = self.checkpoint.tensors, self.checkpoint.store
        return {part: read_tensor(store, tensors[where]) for part, where in self.parts(name).items()}


def open_model(location: str) -> Model:
    """Open a dense or compressed model from its headers.

    Raises:
        CheckpointError: as `open_checkpoint`; an unfinished or incomplete output; a format or method not known here.
    """
    checkpoint = open_checkpoint(location)
    quantization = checkpoint.config.get("quantization_config") or {}
    if not quantization:
        return Model(checkpoint, {})
    if quantization.get("quant_method") != "swsc":
        raise CheckpointError(
            f"{location}: quantized by {quantization.get('quant_method')!r}; give the unquantized model"
        )
    if quantization.get("format_version") != FORMAT_VERSION:
        found = quantization.get("format_version")
        raise CheckpointError(f"{location}: format version {found}, this release reads {FORMAT_VERSION}; update swsc")
    if not isinstance(quantization.get("tensors"), dict):
        raise CheckpointError(f"{location}: quantization_config does not say what is compressed; compress again")
    model = Model(checkpoint, quantization["tensors"])
    missing = [
        where for name in model.entries for where in model.parts(name).values() if where not in checkpoint.tensors
    ]
    if missing:
        raise CheckpointError(f"{location}: {missing[0]} is missing ({len(missing)} in all); compress again")
    return model
