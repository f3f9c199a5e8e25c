"""Checks before any work: whether the model is usable, and whether the output can be written and has room."""

import os
from collections.abc import Callable, Iterable
from dataclasses import replace

from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.foreign_quantization import require_unquantized
from pipeline.console import log
from pipeline.device import Arithmetic
from pipeline.errors import OutputError
from pipeline.models.agreement import require_agreement
from pipeline.models.stored_model import Model
from pipeline.outputs.existing_output import require_replaceable
from pipeline.outputs.transaction import Output, OutputRequest, abandon, begin, changed_since, names_beside
from pipeline.outputs.writable_names import require_writable_names
from pipeline.planning.plan import Plan
from pipeline.settings.compression import CompressSettings
from pipeline.storage.cache_key import VERSIONS, settings_identity
from pipeline.storage.lease import require_idle
from pipeline.storage.paths import UserPath, require_disjoint_paths, require_outside
from pipeline.storage.store import Store, require_free_space
from swsc_core.compressed.config_json import FORMAT_VERSION

# Files that a note names.
_SHOWN = 4
# Prefix of the cache folder of a compressed model that is not tuned yet.
UNTUNED_PREFIX = "untuned"
# Prefix of the cache folders of results that were computed from a verified source.
VERIFIED_SOURCE_PREFIX = "source-"


def log_left_out(source: Checkpoint) -> None:
    """Log which files beside the model are not read: adapters, and weights that `from_pretrained` ignores as well."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in source.ignored_weights:
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        log(f"note: {source.store.root}: left out: {shown}: {reason}")


def examine(model: Model, trusted: bool = False, measured: bool = False) -> None:
    """Check the model before any work, and log what is unusual about its files.

    Args:
        trusted: code that the model contains may be run.
        measured: the model must be able to predict tokens.

    Raises:
        CheckpointError: the files of the model are not as its config.json describes them.
    """
    checkpoint = model.checkpoint
    root = checkpoint.store.root
    if not model.entries:
        require_unquantized(root, checkpoint.tensors, checkpoint.config)
    log_left_out(checkpoint)
    if checkpoint.dequantized and not checkpoint.files:
        return  # transformers derived the headers from config.json, so they agree
    for first, second in checkpoint.untied:
        log(
            f"note: {root}: {first} and {second} hold different values, so they remain two weights, as in transformers,"
            " although config.json ties them"
        )
    for note in require_agreement(model, trusted, measured):
        log(f"note: {root}: {note}")


def identity_of(source: Checkpoint, settings: CompressSettings, arithmetic: Arithmetic) -> dict[str, object]:
    """What makes two compressions the same, as far as it is known before the calibration."""
    return {
        **settings_identity(settings),
        **arithmetic.identity,
        "source": source.fingerprint,
        "algorithm": VERSIONS["output"],
        "format_version": FORMAT_VERSION,
    }


def require_output(
    request: OutputRequest, source: Checkpoint, plan: Plan, settings: CompressSettings, cache: str
) -> None:
    """Check before the calibration, which may take hours, that the compression can write its output.

    Args:
        request: with an identity that does not contain the calibration yet.

    Raises:
        OutputError: the compression would refuse the output in the end, or the disk has too little room.
        CheckpointError: as `require_unmixed`.
    """
    store = request.store
    require_unmixed(source, store)
    if settings.needs_calibration:
        require_cache(cache, [UserPath("OUTPUT", store), UserPath("MODEL", source.store)])
    require_replaceable(store, request.identity, request.overwrite, request.names)
    require_idle(store)
    untuned_bytes = plan.stored_bytes_as("swsc") - _untuned_bytes(Store.at(cache)) if settings.epochs else 0
    present_bytes = sum(store.size(name) for name in store.names())
    output_bytes = plan.stored_bytes_as(settings.format) - present_bytes
    require_free_space(store, max(0, output_bytes) + max(0, untuned_bytes))


def _untuned_bytes(cache: Store) -> int:
    """Bytes of the models in the cache that are not tuned yet; the one of this run may be among them."""
    caches = [cache, *(cache.below(name) for name in cache.entries() if name.startswith(VERIFIED_SOURCE_PREFIX))]
    models = [part.below(name) for part in caches for name in part.entries() if name.startswith(UNTUNED_PREFIX)]
    return sum(model.size(name) for model in models for name in model.names())


def require_unmixed(source: Checkpoint, store: Store) -> None:
    """Check that an output directory and its source are separate.

    Raises:
        OutputError: the output is the source, or one of them is inside the other.
        CheckpointError: the source has names that cannot be written to the output.
    """
    files = {*source.extras, *(info.file for info in source.tensors.values())}
    linked = {os.path.realpath(f"{source.store.root}/{name}") for name in files if source.store.is_link(name)}
    blobs = [UserPath("files of MODEL", Store(folder)) for folder in sorted(set(map(os.path.dirname, linked)))]
    require_disjoint_paths(UserPath("OUTPUT", store), [UserPath("MODEL", source.store), *blobs])
    require_writable_names(source, store)


def require_cache(cache: str, others: Iterable[UserPath]) -> None:
    """Raise OutputError if the cache is inside one of the other paths."""
    require_outside(UserPath.at("--cache-dir", cache), others)


def names_of(source: Checkpoint, plan: Plan) -> list[str]:
    """Names of the files that a compression writes."""
    return [*(task.file for task in plan.layers), *(task.file for task in plan.copies), *names_beside(source)]


def begin_with_room(
    request: OutputRequest, source: Checkpoint, nbytes: int, on_wait: Callable[[str], None] | None = None
) -> Output:
    """`begin`, for an output that is made from `source` and whose disk must have room for `nbytes`.

    Args:
        nbytes: estimated size of the whole output, in bytes.

    Raises:
        OutputError: as `begin`; the disk has too little room.
    """
    store = request.store
    if store.is_local:  # checked before anything is replaced
        require_free_space(store, nbytes - sum(store.size(name) for name in store.names()))
    # An output in a cache, for which on_wait is given, is compared with the source by its weights only.
    changed = changed_since(store, source) if on_wait is None else []
    rewrite = request.overwrite and bool(changed)
    output = begin(replace(request, source=source.store, rewrite=rewrite), on_wait)
    if output.complete and changed:
        log(
            f"note: {store.root}: {changed[0]} of {source.store.root} ({len(changed)} files in all) has changed"
            " since this"
            " output was written, which holds the earlier version; write the output again with --overwrite to update it"
        )
    try:
        require_free_space(store, 0 if output.complete else nbytes - output.finished_bytes)
    except BaseException as error:
        with output:
            if isinstance(error, OutputError):
                abandon(output)
        raise
    return output
