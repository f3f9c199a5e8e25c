"""transformers opens compressed checkpoints: `import swsc_core.hf`, then `from_pretrained` as ever.

The import registers quantization method "swsc". Without it transformers meets tensors whose shapes do not fit and refuses,
because the first part of each matrix stands under the matrix' own name.
"""

from transformers.quantizers import auto

from swsc_core.compressed.config_json import QUANT_METHOD
from swsc_core.hf.config import SwscConfig
from swsc_core.hf.quantizer import SwscQuantizer

if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
    auto.register_quantization_config(QUANT_METHOD)(SwscConfig)
    auto.register_quantizer(QUANT_METHOD)(SwscQuantizer)
    # whose attributes may be given while a checkpoint is loaded; transformers has no function to be asked for it
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (SwscConfig,)  # type: ignore[assignment]

__all__ = ["SwscConfig", "SwscQuantizer"]
