"""Rate–distortion curves of matrices: what they lose under each candidate spec, as an object and as a cached file.

The loss of a matrix is estimated as a product. Its sensitivity, a closed form of its weights and Hessian, is the loss
if each weight kept nothing but the scale of its row. The relative distortion of a spec is the share of the sensitivity
that remains as loss. It is measured once for all matrices of equal role and shape.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from pipeline.architectures.tensor_names import tensor_kind
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.planning.spec_resolution import value_bits
from pipeline.settings.matrix import MatrixSettings
from pipeline.storage.records import CurvesRecord, read_cached, read_record
from pipeline.storage.store import Store
from swsc_core.allocation.allocate import Choice
from swsc_core.allocation.candidate_specs import candidates
from swsc_core.method.spec import SwscSpec

# Characters of a rejected spec that an error message quotes.
_QUOTED = 200


@dataclass(frozen=True)
class SpecDistortion:
    """Share of a matrix's sensitivity that remains as loss under a spec."""

    spec: SwscSpec
    relative_distortion: float


@dataclass(frozen=True)
class DistortionCurves:
    """Sensitivities and relative distortions of the matrices of a plan.

    Attributes:
        sensitivities: matrix -> loss, in nats per token, if each weight kept nothing but the scale of its row.
        distortions: `curve_key` -> relative distortion of each candidate spec.
    """

    sensitivities: Mapping[str, float]
    distortions: Mapping[str, Sequence[SpecDistortion]]

    def choices(self, info: MatrixInfo, settings: MatrixSettings) -> list[Choice]:
        """Candidate specs of a matrix, with their stored bytes and estimated losses."""
        width, sensitivity = value_bits(info.dtype, settings), self.sensitivities[info.name]
        return [
            Choice(
                replace(each.spec, rounds=settings.max_rounds),
                each.spec.stored_bytes(info.shape, width),
                sensitivity * each.relative_distortion,
            )
            for each in self.distortions[curve_key(info)]
        ]

    def write(self, store: Store, file: str, identity: Mapping[str, object]) -> None:
        """Write the curves as JSON, with the identity of what they were measured on."""
        shares = {
            key: [(asdict(each.spec), each.relative_distortion) for each in curve]
            for key, curve in self.distortions.items()
        }
        store.write_json(file, {"identity": identity, "reach": self.sensitivities, "shares": shares})

    @classmethod
    def read(cls, store: Store, file: str, infos: Sequence[MatrixInfo], settings: MatrixSettings) -> "DistortionCurves":
        """Inverse of `write`, for the matrices `infos`.

        Raises:
            OutputError: the file is damaged, lacks a matrix, or names specs that are not candidates.
        """
        return read_cached(store, file, lambda: cls._parse(read_record(store, file, CurvesRecord), infos, settings))

    @classmethod
    def _parse(
        cls, record: Mapping[str, Mapping[str, object]], infos: Sequence[MatrixInfo], settings: MatrixSettings
    ) -> "DistortionCurves":
        specs = {_text(asdict(spec)): spec for info in infos for spec in candidate_specs(info, settings)}
        sensitivities = {info.name: _finite(record["reach"][info.name]) for info in infos}
        distortions = {key: _curve(record["shares"][key], specs) for key in map(curve_key, infos)}
        return cls(sensitivities, distortions)


def curve_key(info: MatrixInfo) -> str:
    """Key of the curve of a matrix: its name with masked numbers, and its shape, which all layers have in common."""
    return f"{tensor_kind(info.name)} {list(info.shape)}"


def candidate_specs(info: MatrixInfo, settings: MatrixSettings) -> Iterable[SwscSpec]:
    """Specs that a matrix may get; they depend on its shape and on the bits of a stored value."""
    return candidates(info.shape, value_bits(info.dtype, settings))


def _curve(pairs: object, specs: Mapping[str, SwscSpec]) -> list[SpecDistortion]:
    """A curve from its JSON; raises ValueError or TypeError if it is not one of `specs` (by JSON text)."""
    curve = []
    for values, share in pairs:  # type: ignore[attr-defined]  # `CurvesRecord` has checked it
        distortion = _finite(share)
        if (spec := specs.get(_text(values))) is None:
            raise ValueError(f"shares: not a candidate spec: {str(values)[:_QUOTED]}")
        curve.append(SpecDistortion(spec, distortion))
    if not curve:
        raise ValueError("shares: a curve without a spec")
    return curve


def _text(values: object) -> str:
    return json.dumps(values, sort_keys=True)


def _finite(value: object) -> float:
    """A JSON number; raises ValueError or OverflowError if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected a finite number as a loss, got {value}")
    return float(value)
