"""What is looked at before anything is done: may the output be written, and is there room for it?"""

import os
from collections.abc import Callable, Iterable
from typing import Any

from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.foreign_quantization import require_unquantized
from pipeline.console import log
from pipeline.device import Arithmetic
from pipeline.errors import OutputError
from pipeline.models.agreement import require_agreement
from pipeline.models.stored_model import Model
from pipeline.outputs.existing_output import require_replaceable
from pipeline.outputs.transaction import Output, abandon, begin, changed_since, names_beside
from pipeline.outputs.writable_names import require_writable_names
from pipeline.planning.plan import Plan
from pipeline.settings.compression import CompressSettings
from pipeline.storage.cache_key import VERSIONS, settings_identity
from pipeline.storage.lease import require_idle
from pipeline.storage.paths import UserPath, require_disjoint_paths, require_outside
from pipeline.storage.store import Store, require_free_space
from swsc_core.compressed.config_json import FORMAT_VERSION

_SHOWN = 4  # names of files in a note
STAGED = "untuned"  # how the name of a model in the cache begins that is yet to be tuned
OF_SOURCE = "source-"  # how folders of a cache begin that hold what was made of a verified source


def note_left_out(source: Checkpoint) -> None:
    """Say which files beside the model's are not read: adapters, and weights that `from_pretrained` passes over, too."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in source.ignored_weights:
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        log(f"note: {source.store.root}: left out: {shown}: {reason}")


def examine(model: Model, trusted: bool = False, measured: bool = False) -> None:
    """Before any work: say what lies beside the model, and raise CheckpointError if its files are not what config.json describes.

    Args:
        trusted: code that the model brings may be run.
        measured: the model must predict tokens.
    """
    if not model.entries:
        require_unquantized(model.checkpoint.store.root, model.checkpoint.tensors, model.checkpoint.config)
    note_left_out(model.checkpoint)
    if model.checkpoint.dequantized and not model.checkpoint.files:
        return  # transformers made the headers of the config
    for one, other in model.checkpoint.untied:
        log(
            f"note: {model.checkpoint.store.root}: {one} and {other} hold other values, so they stay two weights, as in transformers,"
            " although config.json ties them"
        )
    for note in require_agreement(model, trusted, measured):
        log(f"note: {model.checkpoint.store.root}: {note}")


def identity_of(source: Checkpoint, settings: CompressSettings, arithmetic: Arithmetic) -> dict[str, Any]:
    """What makes two compressions the same, as far as it is known before the calibration."""
    about = {"source": source.fingerprint, "algorithm": VERSIONS["output"], "format_version": FORMAT_VERSION}
    return {**settings_identity(settings), **arithmetic.identity, **about}


def require_output(
    source: Checkpoint, plan: Plan, output: str, settings: CompressSettings, arithmetic: Arithmetic, cache: str,
    overwrite: bool,
) -> None:  # fmt: skip
    """Raise OutputError for an output that `compress_model` would refuse in the end: hours of calibration may lie between."""
    store = Store.at(output)
    require_unmixed(source, store)
    if settings.needs_calibration:
        require_cache(cache, [UserPath("OUTPUT", store), UserPath("MODEL", source.store)])
    require_replaceable(store, identity_of(source, settings, arithmetic), overwrite, names_of(source, plan))
    require_idle(store)
    staged = plan.stored_bytes_as("swsc") - _staged_bytes(Store.at(cache)) if settings.epochs else 0
    there = sum(store.size(name) for name in store.names())
    require_free_space(store, max(0, plan.stored_bytes_as(settings.format) - there) + max(0, staged))


def _staged_bytes(cache: Store) -> int:
    """Bytes of models that earlier runs have made to be tuned: ours may be among them."""
    caches = [cache, *(cache.below(name) for name in cache.entries() if name.startswith(OF_SOURCE))]
    places = [own.below(name) for own in caches for name in own.entries() if name.startswith(STAGED)]
    return sum(place.size(name) for place in places for name in place.names())


def require_unmixed(source: Checkpoint, store: Store) -> None:
    """Raise OutputError if an output directory is its own source, or one of them lies in the other.

    CheckpointError: the source has names that could not be written there.
    """
    files = {*source.extras, *(info.file for info in source.tensors.values())}
    linked = {os.path.realpath(f"{source.store.root}/{name}") for name in files if source.store.is_link(name)}
    blobs = [UserPath("files of MODEL", Store(folder)) for folder in sorted(set(map(os.path.dirname, linked)))]
    require_disjoint_paths(UserPath("OUTPUT", store), [UserPath("MODEL", source.store), *blobs])
    require_writable_names(source, store)


def require_cache(cache: str, others: Iterable[UserPath]) -> None:
    """Raise OutputError if the cache lies inside the output, or in what is read."""
    require_outside(UserPath.at("--cache-dir", cache), others)


def names_of(source: Checkpoint, plan: Plan) -> list[str]:
    """Names of the files that a compression writes."""
    return [*(task.file for task in plan.layers), *(task.file for task in plan.copies), *names_beside(source)]


def begin_with_room(
    store: Store, source: Checkpoint, identity: dict[str, Any], names: Iterable[str], nbytes: int, overwrite: bool = False,
    on_wait: Callable[[str], None] | None = None,
) -> Output:  # fmt: skip
    """`begin`, and make sure that the disk holds what is foretold beside what is finished."""
    if store.is_local:  # before anything is replaced
        require_free_space(store, nbytes - sum(store.size(name) for name in store.names()))
    changed = changed_since(store, source) if on_wait is None else []  # in a cache only the weights are looked at
    out = begin(store, identity, overwrite, on_wait, names, source.store, overwrite and bool(changed))
    if out.complete and changed:
        log(
            f"note: {store.root}: {changed[0]} of {source.store.root} ({len(changed)} files in all) was changed after this output was"
            " made, which holds the earlier one; copy it in by making the output again: --overwrite"
        )
    try:
        require_free_space(store, 0 if out.complete else nbytes - out.finished_bytes)
    except BaseException as error:
        with out:
            if isinstance(error, OutputError):
                abandon(out)
        raise
    return out
