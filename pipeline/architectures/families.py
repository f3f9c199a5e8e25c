"""The table of model families: tensor names of their projections, fused layouts, stacked experts and transposed layers.

`--projectors q,k` selects matrices by role from this table, which has one line per `model_type` of config.json. A
family that is not in the table has no roles: its matrices are selected by `--include REGEX`, never guessed.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.architectures.fused_layouts import (
    FusedLayout,
    by_group,
    by_head,
    concatenated,
    falcon,
    halves,
    interleaved,
    latent,
)
from pipeline.architectures.model_config import ModelConfig, find_number, text_part
from pipeline.architectures.stacked_experts import StackedExperts, stacks
from pipeline.architectures.tensor_names import layer_number
from pipeline.errors import ConfigError

ROLES = ("q", "k", "v", "o", "gate", "up", "down", "experts")

# Role -> names of modules, where N stands for any number. Fused roles "q+k+v" -> (name, layout of the fused tensor).
# Stacked experts -> their two tensors.
FamilyTable = Mapping[str, str | tuple[str, FusedLayout] | tuple[StackedExperts, StackedExperts]]
_ATTENTION: FamilyTable = {role: f"{role}_proj" for role in ("q", "k", "v", "o")}
_MLP: FamilyTable = {role: f"{role}_proj" for role in ("gate", "up", "down")}
_SHARED: FamilyTable = {role: f"mlp.{role}_proj|mlp.shared_experts?.{role}_proj" for role in ("gate", "up", "down")}
_EXPERTS: FamilyTable = {"experts": r"mlp.experts.N.(gate|up|down)_proj"}
_LLAMA: FamilyTable = {**_ATTENTION, **_MLP}
_MOE: FamilyTable = {**_ATTENTION, **_SHARED, **_EXPERTS}
_MIXTRAL: FamilyTable = {**_ATTENTION, "experts": r"(block_sparse_moe|mlp).experts.N.(w1|w2|w3)"}
_MLA: FamilyTable = {
    **_SHARED,
    **_EXPERTS,
    "q": "q_proj|q_a_proj|q_b_proj",
    "k": "kv_a_proj_with_mqa",
    "k+v": ("kv_b_proj", latent),
    "o": "o_proj",
}
_LLAMA4: FamilyTable = {
    **_ATTENTION,
    **{role: f"feed_forward.{role}_proj|feed_forward.shared_expert.{role}_proj" for role in ("gate", "up", "down")},
    "experts": stacks("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj", transposed=True),
}
_STACKED = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_GRANITE: FamilyTable = {
    **_ATTENTION,
    "experts": stacks("block_sparse_moe.input_linear", "block_sparse_moe.output_linear"),
}
_GPT2: FamilyTable = {
    "q+k+v": ("attn.c_attn", concatenated),
    "o": "attn.c_proj",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
_FC: FamilyTable = {"up": "mlp.fc1", "down": "mlp.fc2"}
_H4H: FamilyTable = {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}
FAMILIES: dict[str, FamilyTable] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "ministral3", "smollm3", "stablelm", "exaone4"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "cohere", "cohere2", "olmo", "olmo2", "olmo3"), _LLAMA),
    **dict.fromkeys(("qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"), _LLAMA),
    **dict.fromkeys(("granite", "seed_oss", "hunyuan_v1_dense", "ernie4_5"), _LLAMA),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe", "dots1", "glm4_moe", "ernie4_5_moe"), _MOE),
    **dict.fromkeys(("mixtral", "phimoe"), _MIXTRAL),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _MLA),
    "llama4_text": _LLAMA4,
    "qwen3_vl_moe_text": {**_LLAMA, "experts": stacks(*_STACKED, transposed=None, width="moe_intermediate_size")},
    "gpt_oss": {**_ATTENTION, "experts": stacks(*_STACKED, transposed=True, layout=interleaved)},
    "granitemoe": _GRANITE,
    "granitemoeshared": {
        **_GRANITE, "gate+up": ("shared_mlp.input_linear", halves), "down": "shared_mlp.output_linear",
    },
    "aria_text": {**_ATTENTION, **_SHARED, "experts": stacks("mlp.experts.fc1", "mlp.experts.fc2", transposed=True)},
    "phi": {**_ATTENTION, "o": "self_attn.dense", **_FC},
    "phi3": {
        "q+k+v": ("qkv_proj", concatenated), "o": "o_proj", "gate+up": ("gate_up_proj", halves), "down": "down_proj",
    },
    "glm4": {**_ATTENTION, "gate+up": ("gate_up_proj", halves), "down": "down_proj"},
    "gpt_neox": {"q+k+v": ("attention.query_key_value", by_head), "o": "attention.dense", **_H4H},
    "bloom": {"q+k+v": ("self_attention.query_key_value", by_head), "o": "self_attention.dense", **_H4H},
    "falcon": {"q+k+v": ("self_attention.query_key_value", falcon), "o": "self_attention.dense", **_H4H},
    "internlm2": {
        "q+k+v": ("attention.wqkv", by_group), "o": "attention.wo",
        "gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2",
    },
    "gpt2": _GPT2,
    "openai-gpt": _GPT2,
    "gptj": {
        "q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj", "o": "attn.out_proj",
        "up": "mlp.fc_in", "down": "mlp.fc_out",
    },
    "opt": {**_ATTENTION, "o": "out_proj", "up": "layers.N.fc1", "down": "layers.N.fc2"},
    "starcoder2": {**_ATTENTION, "up": "mlp.c_fc", "down": "mlp.c_proj"},
}  # fmt: skip
# Families that store linear layers transposed, [inputs, outputs] (Conv1D) -> names of these modules.
_TRANSPOSED = dict.fromkeys(("gpt2", "openai-gpt"), "attn.c_attn|attn.c_proj|mlp.c_fc|mlp.c_proj")
# Multimodal families -> prefix of the names of the language part, and its family if text_config does not name one.
_LANGUAGE = r"(model\.)?language_model\."
_BARE = r"model\.(language_model\.)?layers\."
MULTIMODAL: dict[str, tuple[str, str]] = {
    "llava": (_LANGUAGE, "llama"), "llava_next": (_LANGUAGE, "llama"), "llava_onevision": (_LANGUAGE, "qwen2"),
    "gemma3": (_LANGUAGE, "gemma3_text"), "paligemma": (_LANGUAGE, "gemma"), "mistral3": (_LANGUAGE, "mistral"),
    "internvl": (_LANGUAGE, "qwen2"), "aya_vision": (_LANGUAGE, "cohere2"),
    "llama4": (_LANGUAGE, "llama4_text"), "aria": (_LANGUAGE, "aria_text"),
    "qwen3_vl_moe": (_BARE, "qwen3_vl_moe_text"),
    "qwen2_vl": (_BARE, "qwen2"), "qwen2_5_vl": (_BARE, "qwen2"), "qwen3_vl": (_BARE, "qwen3_vl_text"),
}  # fmt: skip

_POSITION_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|pos_embed\w*|positions?_embeddings?)\.weight$")
# Names of tensors of other modalities.
_NOT_TEXT = re.compile(r"vis(ion|ual)|image|audio|speech")
# Families whose table of positions is computed from the config and not stored.
_POSITION_BUFFERS = {"gptj", "codegen"}


@dataclass(frozen=True)
class Role:
    """The role of a tensor.

    Attributes:
        roles: one role, the roles that the tensor fuses, or none.
        layout: row layout of fused roles.
        stack: description of the stack, if the tensor stacks experts.
    """

    roles: tuple[str, ...]
    layout: FusedLayout | None = None
    stack: StackedExperts | None = None


class Family:
    """A line of the table, chosen by the `model_type` of a config.

    Attributes:
        name: the model type of the language part.
        known: whether the table has the family.
        layers: number of layers; None if the config does not give it.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Look up the model type of the config. A family that is not in the table has no roles."""
        model_type = str(config.get("model_type"))
        text_prefix, name = MULTIMODAL.get(model_type, ("", model_type))
        if model_type in MULTIMODAL:
            name = str(text_part(config).get("model_type", name))
        self.name = name
        self.known = name in FAMILIES
        self._roles = [line for roles, names in FAMILIES.get(name, {}).items() for line in _lines(roles, names)]
        self._transposed = _pattern(_TRANSPOSED[name]) if name in _TRANSPOSED else None
        self._text = re.compile(text_prefix)
        self.layers = find_number(config, "num_hidden_layers")

    @property
    def roles(self) -> list[str]:
        """The roles of its tensors, in the order of ROLES."""
        present = {name for _, role in self._roles for name in role.roles}
        return [name for name in ROLES if name in present]

    def role_of(self, name: str) -> Role:
        """Return the role of a tensor; without roles if it is not a matrix of the language part."""
        is_text = self._text.match(name) is not None
        return next((role for pattern, role in self._roles if is_text and pattern.search(name)), Role(()))

    def is_transposed(self, name: str) -> bool:
        """Whether a tensor is stored as [inputs, outputs]."""
        return self._transposed is not None and self._transposed.search(name) is not None

    def is_beyond(self, name: str) -> bool:
        """Whether a tensor belongs to a layer after the last one: a multi-token prediction head, never loaded."""
        number = layer_number(name)
        return self.layers is not None and number is not None and number >= self.layers


def _pattern(names: str, ending: str = r"\.weight") -> re.Pattern[str]:
    alternatives = names.replace(".", r"\.").replace("N", r"\d+")
    return re.compile(rf"(^|\.)({alternatives}){ending}$")


def _lines(
    roles: str, name: str | tuple[str, FusedLayout] | tuple[StackedExperts, StackedExperts]
) -> list[tuple[re.Pattern[str], Role]]:
    """Return (pattern of tensor names, role) pairs of one entry of the table."""
    if isinstance(name, str):
        return [(_pattern(name), Role((roles,)))]
    if isinstance(name[0], str):
        return [(_pattern(name[0]), Role(tuple(roles.split("+")), name[1]))]
    return [(_pattern(stack.name, r"(\.weight)?"), Role((roles,), stack=stack)) for stack in name]


def require_known_roles(roles: tuple[str, ...]) -> None:
    """Raise ConfigError for a role that no family has."""
    if unknown := [role for role in roles if role not in ROLES]:
        raise ConfigError(
            f"projectors: unknown role {', '.join(unknown)}; choose from {', '.join(ROLES)}, or select by --include"
            " REGEX"
        )


def has_position_table(config: ModelConfig, names: Iterable[str]) -> bool:
    """Whether the model has a table of position embeddings, which limits the length of its input."""
    tables = filter(_POSITION_TABLE.search, names)
    return config.get("model_type") in _POSITION_BUFFERS or not all(map(_NOT_TEXT.search, tables))
