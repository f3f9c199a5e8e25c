"""Identities name what changes bytes: another setting is another result, a new field with its default is not."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.device import Arithmetic
from pipeline.errors import OutputError
from pipeline.outputs import existing_output
from pipeline.outputs.preflight import identity_of
from pipeline.outputs.transaction import OutputRequest, begin
from pipeline.settings.compression import CompressSettings
from pipeline.storage.cache_key import (
    cache_name,
    digest_of,
    full_identity,
    identity_changes,
    run_digest,
    settings_identity,
    spec_identity,
    windows_identity,
)
from pipeline.storage.store import Store
from swsc_core.method.spec import RtnSpec, SwscSpec


class LaterSettings(CompressSettings):
    """The settings of a later release, which has one more."""

    sparsity: float = 0.0


@dataclass(frozen=True)
class LaterSpec(SwscSpec):
    sparsity: float = 0.0


class Source:
    fingerprint = "abc"


def identity(settings: CompressSettings) -> dict[str, Any]:
    return identity_of(Source(), settings, Arithmetic(1))  # type: ignore[arg-type]


def test_a_new_field_with_a_default_leaves_the_identity_as_it_was() -> None:
    now, later = CompressSettings(bits=3, seed=2), LaterSettings(bits=3, seed=2)
    assert identity(later) == identity(now)
    assert digest_of(identity(later)) == digest_of(identity(now))
    assert identity(LaterSettings(bits=3, seed=2, sparsity=0.5)) != identity(now)
    assert spec_identity(LaterSpec(4, 1)) == spec_identity(SwscSpec(4, 1))
    assert spec_identity(LaterSpec(4, 1, sparsity=0.5)) != spec_identity(SwscSpec(4, 1))


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("field", [name for name in CompressSettings.model_fields if name not in ("method", "preset")])
def test_every_setting_that_differs_from_its_default_is_named(field: str) -> None:
    values: dict[str, Any] = {field: "other"}
    changed = CompressSettings.model_construct(None, **values)
    assert settings_identity(changed) == {field: "other"}


@pytest.mark.parametrize("spec", [SwscSpec(4, 1), RtnSpec(3), SwscSpec(16, 0, segment_size=4, rounds=2)])
def test_a_spec_is_known_by_its_method_and_what_it_was_given(spec: Any) -> None:
    assert type(spec)(**spec_identity(spec)) == spec
    assert spec_identity(spec)["method"] == spec.method


def test_the_order_of_keys_does_not_matter_and_any_value_does() -> None:
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1}) != digest_of({"a": 1, "b": 3})
    assert cache_name("moments", {"a": 1}) == f"moments-{digest_of({'a': 1})[:16]}"


def test_windows_are_known_by_tokens_and_shape() -> None:
    ids = np.arange(6).reshape(2, 3)
    known = digest_of(windows_identity(ids))
    assert digest_of(windows_identity(ids.copy())) == known
    assert known not in {digest_of(windows_identity(other)) for other in (ids + 1, ids.reshape(3, 2))}


@pytest.mark.parametrize("compact", [True, False])
def test_an_identity_equals_the_same_with_all_settings_spelled_out(compact: bool) -> None:
    """As an earlier release wrote it."""
    now = identity(CompressSettings(bits=3))
    before = now if compact else full_identity(now)
    assert not identity_changes(before, now)
    assert not identity_changes(now, before)
    assert identity_changes(before, identity(CompressSettings(bits=4))) == {"bits": (3.0, 4.0)}
    assert identity_changes(before, identity(CompressSettings(bits=3, seed=1))) == {"seed": (0, 1)}
    assert identity_changes(identity(CompressSettings(bits=3, seed=1)), before) == {"seed": (1, 0)}


def test_a_calibration_counts_once_it_is_known() -> None:
    before = {"source": "abc", "calibration": "x"}
    assert not identity_changes(before, {"source": "abc"})
    assert identity_changes(before, {"source": "abc", "calibration": None}) == {"calibration": ("x", None)}


def test_an_unfinished_output_of_an_earlier_release_is_resumed_under_its_own_digest(tmp_path: Path) -> None:
    store, now = Store.at(str(tmp_path)), {**identity(CompressSettings(bits=3)), "calibration": None}
    earlier = {key: value for key, value in full_identity(now).items() if key not in ("device", "torch", "format")}
    store.write_json(existing_output.RUN, earlier)
    with begin(OutputRequest(store, now)) as out:
        assert out.ticket.run == run_digest(earlier)
        assert out.identity["device"] == "cpu"
    with pytest.raises(OutputError, match="seed"):
        begin(OutputRequest(store, {**now, "seed": 1}))
