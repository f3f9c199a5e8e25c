"""Identities of results, and the digest of an identity that names caches and compares outputs.

An identity is a JSON object with everything that changes the bytes of a result, and nothing else. Settings are part of
it only where they differ from their defaults, so that a new setting whose default changes nothing leaves every identity
as it was.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import TypeAlias

import numpy as np

from pipeline.settings.compression import CompressSettings
from pipeline.settings.validation import Settings
from swsc_core.method.spec import Spec

Identity: TypeAlias = Mapping[str, object]
"""A JSON object with everything that changes the bytes of a result."""

# Version of each kind of result, which is part of its identity. Raise it with every change of the result's bytes,
# changes of a default included: files of two versions are never mixed.
VERSIONS: Mapping[str, int] = {"output": 10, "moments": 5, "curves": 5, "tuned": 4, "written": 1}
# Keys that describe the arithmetic. A finished output is accepted from any device.
ARITHMETIC = ("device", "torch")
# Key of the fingerprint of a calibration, which is unknown before the calibration has run.
CALIBRATION_KEY = "calibration"
# Hexadecimal digits of a digest in a file name.
_NAME_DIGITS = 16
_DEFAULTS: Identity = CompressSettings().model_dump(mode="json")


def digest_of(identity: Identity) -> str:
    """Return the sha256 of an identity, in hexadecimal. The order of its keys does not matter."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def cache_name(kind: str, identity: Identity) -> str:
    """Return the name of a cache file or folder, without extension: `kind` and the beginning of the digest."""
    return f"{kind}-{digest_of(identity)[:_NAME_DIGITS]}"


def run_digest(identity: Identity) -> str:
    """Return the digest of a run that writes an output, without the arithmetic, which is compared before."""
    return digest_of({key: value for key, value in identity.items() if key not in ARITHMETIC})


def versioned(kind: str, identity: Identity) -> dict[str, object]:
    """Return the identity with the version of its kind of result."""
    return {**identity, "version": VERSIONS[kind]}


def settings_identity(settings: Settings) -> Identity:
    """Return the settings that differ from their defaults."""
    changed: Identity = settings.model_dump(mode="json", exclude_defaults=True)
    return changed


def spec_identity(spec: Spec) -> Identity:
    """Return the method of a spec, its fields without a default, and those that differ from their default."""
    spec_fields = fields(spec)  # type: ignore[arg-type]  # every spec is a dataclass
    values = {field.name: getattr(spec, field.name) for field in spec_fields}
    defaults = {field.name: field.default for field in spec_fields}
    return {name: value for name, value in values.items() if name == "method" or value != defaults[name]}


def windows_identity(ids: np.ndarray) -> dict[str, object]:
    """Return the shape of token ids, int64 [windows, length], and the sha256 of their bytes."""
    return {"ids": hashlib.sha256(ids.tobytes()).hexdigest(), "windows": list(ids.shape)}


def full_identity(identity: Identity) -> Identity:
    """Return the identity of an output for its manifest: for a compression with the value of every setting."""
    return dict(identity) if "restored_from" in identity else {**_DEFAULTS, **identity}


def identity_changes(before: Identity, now: Identity) -> dict[str, tuple[object, object]]:
    """Return key -> (value before, value now) where two identities differ. A missing setting has its default.

    Differences in arithmetic are ignored, and so is the calibration if `now` does not have one yet.
    """
    ignored = {*ARITHMETIC, *(() if CALIBRATION_KEY in now else (CALIBRATION_KEY,))}
    old, new = {**_DEFAULTS, **before}, {**_DEFAULTS, **now}
    pairs = {key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if key not in ignored}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
