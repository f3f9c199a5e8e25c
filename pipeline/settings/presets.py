"""What each value of --preset means: one object says all of it.

The paper's form is given in numbers (--clusters, --rank), or by its split of a bit budget between them (swsc_core/allocation/budget.py).
The other presets allocate: every matrix gets one of the candidate specs (swsc_core/allocation/candidate_specs.py), by measured sensitivity.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

# settings that define the form of a spec, which a preset that allocates chooses for each matrix
_FORM = frozenset({
    "clusters", "rank", "cluster_share", "channel_axis", "n_init", "count", "metric", "segment_size", "codebooks", "scaled",
    "feedback", "centroid_bits", "factor_bits",
})  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """The meaning of a preset.

    Attributes:
        allocates: specs are chosen among candidates, within --bits, from second moments that a calibration gathers; otherwise
            the settings say the spec.
        chooses: settings that it chooses itself, so that they cannot be given.
        ignores: settings without a meaning for it.
        bits: bit budget if --bits is not given; None: --bits is required.
        bits_counted: what `bits` counts, stored bytes ("true") or as in the paper's Table II.
        rounds: of refitting and reassigning, unless --rounds is given.
        epochs: passes of tuning over the calibration text, unless --tune is given.
        generates_text: the model writes the calibration text itself.
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
    ignores=frozenset({"bits_over", "allocation"}),
    bits=3.0,
    bits_counted="paper",
    rounds=0,
    epochs=0,
)
BEST = Preset("best")
FAST = replace(BEST, name="fast", rounds=1, epochs=0)
DATA_FREE = replace(BEST, name="data-free", generates_text=True)
PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in (PAPER, BEST, FAST, DATA_FREE)}
