"""The file system of each URL scheme, for `store.py`, which is the interface that other folders use."""

from functools import lru_cache

from pipeline.storage.files import Files
from pipeline.storage.local_files import LocalFiles

SCHEMES = ("s3", "gs")


@lru_cache
def files_at(scheme: str) -> Files:
    """Return the file system of a scheme, "" for the local disk. A process connects once per scheme."""
    if not scheme:
        return LocalFiles()
    from pipeline.storage.object_stores import ObjectFiles

    return ObjectFiles(scheme)
