"""Removes credentials from web addresses before they are logged or written to an output."""

import re
import sys
from typing import Any

_ADDRESS = re.compile(r"(?P<scheme>https?://)([^/\s?#]*@)?(?P<path>[^\s?#]*)(?P<query>[?#]\S*)?", re.IGNORECASE)


def redacted(text: str) -> str:
    """Return `text` without the user names, passwords and queries of its web addresses.

    A signed query grants access.
    """
    return _ADDRESS.sub(lambda match: f"{match['scheme']}{match['path']}{'?…' if match['query'] else ''}", text)


def redacted_values(value: Any) -> Any:
    """Apply `redacted` to every string in nested lists and dictionaries."""
    if isinstance(value, dict):
        return {key: redacted_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redacted_values(item) for item in value]
    return redacted(value) if isinstance(value, str) else value


def redacted_argv() -> list[str]:
    """Return the command line of this process, redacted."""
    return [redacted(argument) for argument in sys.argv]
