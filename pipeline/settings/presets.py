"""Presets: one object per value of --preset defines all of its meaning.

Preset `paper` takes its form from numbers (--clusters, --rank) or splits a bit budget between them
(swsc_core/allocation/budget.py). The other presets allocate: each matrix gets one of the candidate specs
(swsc_core/allocation/candidate_specs.py), chosen by measured sensitivity.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

# Settings that define the form of a spec. A preset that allocates chooses them for each matrix.
_FORM = frozenset(
    {
        "clusters",
        "rank",
        "cluster_share",
        "channel_axis",
        "n_init",
        "count",
        "metric",
        "segment_size",
        "codebooks",
        "scaled",
        "feedback",
        "centroid_bits",
        "factor_bits",
    }
)
# Settings of an allocation, which preset `paper` does not use.
_ALLOCATION = frozenset({"bits_over", "allocation"})
# All settings that apply only to a method that has presets.
PRESET_SETTINGS = _FORM | _ALLOCATION | {"rounds", "tune"}


@dataclass(frozen=True)
class Preset:
    """The definition of a preset.

    Attributes:
        allocates: specs are chosen among candidates, within --bits, by Hessians that a calibration gathers. Otherwise
            the settings define the spec.
        chooses: settings that the preset chooses itself and that therefore cannot be given.
        ignores: settings that do not apply to the preset.
        bits: bit budget if --bits is not given; None if --bits is required.
        bits_counted: what `bits` counts: stored bytes ("true") or bits as in the paper's Table II ("paper").
        rounds: maximum number of refinement rounds if --rounds is not given.
        epochs: tuning passes over the calibration text if --tune is not given.
        generates_text: the model generates the calibration text itself.
    """

    name: str
    allocates: bool = True
    chooses: frozenset[str] = _FORM
    ignores: frozenset[str] = frozenset()
    bits: float | None = None
    bits_counted: Literal["true", "paper"] = "true"
    rounds: int = 4
    epochs: int = 1
    generates_text: bool = False


PAPER = Preset(
    "paper",
    allocates=False,
    chooses=frozenset(),
    ignores=_ALLOCATION,
    bits=3.0,
    bits_counted="paper",
    rounds=0,
    epochs=0,
)
BEST = Preset("best")
FAST = replace(BEST, name="fast", rounds=1, epochs=0)
DATA_FREE = replace(BEST, name="data-free", generates_text=True)
PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in (PAPER, BEST, FAST, DATA_FREE)}


def by_preset(attribute: str) -> str:
    """The value of an attribute for each preset, in the words of a default in help."""
    return ", ".join(f"{name} {getattr(preset, attribute)}" for name, preset in PRESETS.items())
