"""Identities: what a result depends on, as JSON, and the one digest that names caches and compares outputs.

An identity names what changes the bytes of a result, and nothing else. Settings are part of it only where they differ from
their defaults, so that a setting that is added later, with a default that changes nothing, leaves every identity as it was.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from pipeline.settings.compression import CompressSettings
from pipeline.settings.validation import Settings
from swsc_core.method.spec import Spec

# Part of the identity of each kind of result. Raise it with every change that changes the bytes of that kind, be it of a
# default: files of two versions are never mixed.
VERSIONS: Mapping[str, int] = {"output": 10, "moments": 5, "curves": 5, "tuned": 4, "written": 1}
# What an identity says of the arithmetic, which a finished output may have had from anywhere.
ARITHMETIC = ("device", "torch")
# The fingerprint of a calibration, which is not known before it has been done.
CALIBRATION_KEY = "calibration"
_NAME_LETTERS = 16
_DEFAULTS = CompressSettings().model_dump(mode="json")


def digest_of(identity: Mapping[str, Any]) -> str:
    """sha256, in hexadecimal, of an identity; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def cache_name(kind: str, identity: Mapping[str, Any]) -> str:
    """Name of a file or folder of a cache, without an ending: `kind` and the beginning of the digest."""
    return f"{kind}-{digest_of(identity)[:_NAME_LETTERS]}"


def run_digest(identity: Mapping[str, Any]) -> str:
    """Digest of the run that writes an output. Runs that differ in arithmetic alone are told apart before it is needed."""
    return digest_of({key: value for key, value in identity.items() if key not in ARITHMETIC})


def versioned(kind: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity with the version of its kind."""
    return {**identity, "version": VERSIONS[kind]}


def settings_identity(settings: Settings) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    return settings.model_dump(mode="json", exclude_defaults=True)


def spec_identity(spec: Spec) -> dict[str, Any]:
    """The fields of a spec that differ from their defaults, or have none, and its method."""
    own = fields(spec)  # type: ignore[arg-type]  # every spec is a dataclass
    values = {field.name: getattr(spec, field.name) for field in own}
    defaults = {field.name: field.default for field in own}
    return {name: value for name, value in values.items() if name == "method" or value != defaults[name]}


def windows_identity(ids: np.ndarray) -> dict[str, Any]:
    """Of token ids, int64 [windows, length]: their shape, and sha256 of their bytes."""
    return {"ids": hashlib.sha256(ids.tobytes()).hexdigest(), "windows": list(ids.shape)}


def full_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of an output as its manifest records it: of a compression with all settings."""
    return dict(identity) if "restored_from" in identity else {**_DEFAULTS, **identity}


def identity_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> values before and now, where two identities differ. A setting that is missing has its default.

    The arithmetic does not count, nor does a calibration that `now` does not know yet.
    """
    ignored = {*ARITHMETIC, *(() if CALIBRATION_KEY in now else (CALIBRATION_KEY,))}
    old, new = {**_DEFAULTS, **before}, {**_DEFAULTS, **now}
    pairs = {key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if key not in ignored}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
