"""The file that the flag --json of a verb writes."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.errors import OutputError
from pipeline.storage.paths import UserPath, require_disjoint_paths, user_paths
from pipeline.storage.store import Store


@dataclass(frozen=True)
class JsonFile:
    """A file that can be written. It is not created before there is a result."""

    store: Store

    @classmethod
    def at(cls, path: str, inputs: Iterable[tuple[str, str | None]] = ()) -> "JsonFile":
        """The file at `path`.

        Args:
            inputs: what the verb reads, as pairs of its name on the command line and its location.

        Raises:
            OutputError: the file cannot be written, or would change one of the inputs.
        """
        target = Store.at(path)
        if target.is_local and os.path.exists(target.root) and not os.path.isfile(target.root):
            raise OutputError(f"{path}: not a regular file; give another")
        if target.is_local and os.path.islink(target.root):
            target = Store(os.path.realpath(target.root))  # as other tools, write the file that the link points to
        require_disjoint_paths(UserPath("--json", target), user_paths(inputs))
        if target.is_local:
            _require_writable(target, path)
        return cls(target)

    def write(self, value: Mapping[str, object]) -> None:
        """Write `value` as JSON, in the place of an earlier file."""
        self.store.parent.write_json(self.store.name, dict(value))


def _require_writable(target: Store, path: str) -> None:
    if not target.parent.is_there:
        raise OutputError(f"{path}: No such file or directory; give a file in an existing directory")
    if target.is_there or not os.access(target.parent.root, os.W_OK):
        raise OutputError(f"{path}: cannot be written; give another file")
