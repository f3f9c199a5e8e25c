"""`SwscConfig`: the entries of a compressed checkpoint, or a request to compress a dense one, for transformers."""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from transformers.utils.quantization_config import QuantizationConfigMixin

from swsc_core.compressed.config_json import QUANT_METHOD, entries_of, quantization_config
from swsc_core.compressed.entry import Entry

Form = Literal["segments", "paper"]
_STORED_KEYS = ("quant_method", "format_version", "tensors")


class SwscConfig(QuantizationConfigMixin):
    """Configuration of quantization method "swsc".

    transformers constructs it from the `quantization_config` of a compressed checkpoint. Users construct it to compress
    a dense checkpoint while it is loaded, without calibration text:

        AutoModelForCausalLM.from_pretrained("DENSE", quantization_config=SwscConfig(bits=3))

    Args:
        bits: stored bits per weight of each compressed matrix.
        include: regular expression that selects the linear layers to compress; it may match anywhere in a layer's name.
            The default selects Q and K, as in the paper.
        form: "segments" for vector quantization of channel segments; "paper" for K-Means over whole channels, with half
            of the bits for clusters and half for the compensation.
        seed: seed of K-Means.
        dequantize: restore every matrix of a compressed checkpoint while it is loaded, which gives a plain dense model.
        **stored: `quantization_config` of a compressed checkpoint.

    Raises:
        ValueError: this release does not read the format version, an entry is damaged, or an argument is invalid or
            unknown.
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
        is_compressed = bool(stored.keys() & {"tensors", "format_version"})
        self.tensors: Mapping[str, Entry] = entries_of(stored) if is_compressed else {}
        if unknown := sorted(set(stored) - set(_STORED_KEYS)):
            raise ValueError(
                f"SwscConfig: unknown argument {', '.join(unknown)}; use bits, include, form, seed or dequantize"
            )

    def _require_arguments(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int | float) or not 0 < self.bits < math.inf:
            raise ValueError(f"SwscConfig: bits is {self.bits!r}, expected a positive number")
        if self.form not in (forms := get_args(Form)):
            raise ValueError(f"SwscConfig: form is {self.form!r}; choose {' or '.join(forms)}")
        try:
            re.compile(self.include)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"SwscConfig: include {self.include!r} is not a regular expression ({error}); correct it"
            ) from None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of config.json: the entries, without the arguments they were made with."""
        return quantization_config(self.tensors)

    def get(self, key: str, default: Any = None) -> Any:
        """Dictionary access, which transformers uses on the config of an opened model."""
        return self.to_dict().get(key, default)

    def get_loading_attributes(self) -> dict[str, bool]:
        """Attributes that a config passed to `from_pretrained` overrides in the config of a compressed checkpoint."""
        return {"dequantize": self.dequantize}

    def __repr__(self) -> str:
        return f"SwscConfig({len(self.tensors)} compressed tensors)"
