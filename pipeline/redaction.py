"""Addresses as they may be written down and published: without what gives access."""

import re
import sys
from typing import Any

_ADDRESS = re.compile(r"(?P<scheme>https?://)([^/\s?#]*@)?(?P<path>[^\s?#]*)(?P<more>[?#]\S*)?", re.IGNORECASE)


def redacted(text: str) -> str:
    """`text` without user names, passwords and queries of the web addresses in it: a signed address is a key to what it names."""
    return _ADDRESS.sub(lambda found: f"{found['scheme']}{found['path']}{'?…' if found['more'] else ''}", text)


def redacted_values(value: Any) -> Any:
    """The same of every string in lists and mappings."""
    if isinstance(value, dict):
        return {key: redacted_values(one) for key, one in value.items()}
    if isinstance(value, list):
        return [redacted_values(one) for one in value]
    return redacted(value) if isinstance(value, str) else value


def redacted_argv() -> list[str]:
    """The command that this process was started by, as it may be written down."""
    found: list[str] = redacted_values(sys.argv)
    return found
