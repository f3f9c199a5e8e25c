"""`quantization_config` as transformers holds it: what a checkpoint says of itself, or what is to be done while it is loaded."""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from transformers.utils.quantization_config import QuantizationConfigMixin

from swsc_core.compressed.config_json import QUANT_METHOD, entries_of, quantization_config
from swsc_core.compressed.entry import Entry

Form = Literal["segments", "paper"]
_OWN = ("quant_method", "format_version", "tensors")


class SwscConfig(QuantizationConfigMixin):
    """Of a compressed checkpoint its entries; of a dense one how to compress it on load, without any text.

        AutoModelForCausalLM.from_pretrained(dense, quantization_config=SwscConfig(bits=3))

    Args:
        bits: true bits a weight of each compressed matrix.
        include: a regular expression; modules whose name it finds are compressed. Q and K by default, as in the paper.
        form: "segments", pieces of a channel that share each on its own; or "paper", whole channels, half of the bits for
            clusters and half for the compensation.
        seed: of K-Means.
        dequantize: restore every matrix while loading; the model is a plain dense one then.

    Raises:
        ValueError: a format version that this release does not know, a damaged entry, or a value that is not one of the above.
    """

    def __init__(
        self,
        bits: float = 3.0,
        include: str = r"\.(q|k)_proj$",
        form: Form = "segments",
        seed: int = 0,
        dequantize: bool = False,
        **stored: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.bits, self.include, self.form, self.seed = bits, include, form, seed
        self.dequantize = dequantize
        self._require_arguments()
        said = stored.keys() & {"tensors", "format_version"}  # by a checkpoint, of itself
        self.tensors: Mapping[str, Entry] = entries_of(stored) if said else {}
        if odd := sorted(set(stored) - set(_OWN)):
            raise ValueError(f"SwscConfig: {', '.join(odd)} not known; this release knows bits, include, form, seed")

    def _require_arguments(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int | float) or not 0 < self.bits < math.inf:
            raise ValueError(f"SwscConfig: bits {self.bits!r}, wanted a positive number")
        if self.form not in (known := get_args(Form)):
            raise ValueError(f"SwscConfig: form {self.form!r} is not known; choose {' or '.join(known)}")
        try:
            re.compile(self.include)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"SwscConfig: include {self.include!r} is no regular expression ({error}); repair it"
            ) from None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json: what is said of the stored tensors, and nothing of how they came about."""
        return quantization_config(self.tensors)

    def get(self, key: str, default: Any = None) -> Any:
        """transformers asks a config that was loaded before as it asks a dictionary."""
        return self.to_dict().get(key, default)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What may be asked for while a compressed checkpoint is loaded."""
        return {"dequantize": self.dequantize}

    def __repr__(self) -> str:
        return f"SwscConfig({len(self.tensors)} compressed tensors)"
