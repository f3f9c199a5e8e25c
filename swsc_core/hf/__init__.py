"""Plug-in that lets transformers open compressed checkpoints: `import swsc_core.hf`, then `from_pretrained` as usual.

The import registers quantization method "swsc". Without it transformers refuses a compressed checkpoint, because the
first part of each matrix is stored under the matrix's own name with another shape.
"""

from transformers.quantizers import auto

from swsc_core.compressed.config_json import QUANT_METHOD
from swsc_core.hf.config import SwscConfig
from swsc_core.hf.quantizer import SwscQuantizer

if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
    auto.register_quantization_config(QUANT_METHOD)(SwscConfig)
    auto.register_quantizer(QUANT_METHOD)(SwscQuantizer)
    # lets `quantization_config=SwscConfig(dequantize=True)` override the stored config; there is no function for this
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (SwscConfig,)  # type: ignore[assignment]

__all__ = ["SwscConfig", "SwscQuantizer"]
