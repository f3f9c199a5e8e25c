"""Names that model families give to their projections in checkpoints, and how those lie that are joined or transposed.

`--projectors q,k` selects by role from this table, one line a family by config.json's `model_type`. A family that is not in
it has no roles: what to compress of it is said by `--include REGEX`, never guessed.
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

# role -> names of modules, N standing for any number; roles that one tensor joins -> (its name, how they lie in it);
# experts that lie stacked -> their tensors (stacks.py)
FamilyTable = Mapping[str, str | tuple[str, FusedLayout] | tuple[StackedExperts, StackedExperts]]
_ATTENTION: FamilyTable = {role: f"{role}_proj" for role in ("q", "k", "v", "o")}
_MLP: FamilyTable = {role: f"{role}_proj" for role in ("gate", "up", "down")}
_SHARED: FamilyTable = {role: f"mlp.{role}_proj|mlp.shared_experts?.{role}_proj" for role in ("gate", "up", "down")}
_EXPERTS: FamilyTable = {"experts": r"mlp.experts.N.(gate|up|down)_proj"}
_LLAMA: FamilyTable = {**_ATTENTION, **_MLP}
_MOE: FamilyTable = {**_ATTENTION, **_SHARED, **_EXPERTS}
_MIXTRAL: FamilyTable = {**_ATTENTION, "experts": r"(block_sparse_moe|mlp).experts.N.(w1|w2|w3)"}
_MLA: FamilyTable = {
    **_SHARED, **_EXPERTS, "q": "q_proj|q_a_proj|q_b_proj", "k": "kv_a_proj_with_mqa", "k+v": ("kv_b_proj", latent), "o": "o_proj",
}  # fmt: skip
_LLAMA4: FamilyTable = {
    **_ATTENTION, **{role: f"feed_forward.{role}_proj|feed_forward.shared_expert.{role}_proj" for role in ("gate", "up", "down")},
    "experts": stacks("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj", transposed=True),
}  # fmt: skip
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
    **dict.fromkeys(("llama", "mistral", "ministral", "ministral3", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "granite", "cohere", "cohere2", "olmo"), _LLAMA),
    **dict.fromkeys(("olmo2", "olmo3", "smollm3", "stablelm", "exaone4", "seed_oss", "hunyuan_v1_dense", "ernie4_5"), _LLAMA),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe", "dots1", "glm4_moe", "ernie4_5_moe"), _MOE),
    **dict.fromkeys(("mixtral", "phimoe"), _MIXTRAL),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _MLA),
    "llama4_text": _LLAMA4,
    "qwen3_vl_moe_text": {**_LLAMA, "experts": stacks(*_STACKED, transposed=None, width="moe_intermediate_size")},
    "gpt_oss": {**_ATTENTION, "experts": stacks(*_STACKED, transposed=True, layout=interleaved)},
    "granitemoe": _GRANITE,
    "granitemoeshared": {**_GRANITE, "gate+up": ("shared_mlp.input_linear", halves), "down": "shared_mlp.output_linear"},
    "aria_text": {**_ATTENTION, **_SHARED, "experts": stacks("mlp.experts.fc1", "mlp.experts.fc2", transposed=True)},
    "phi": {**_ATTENTION, "o": "self_attn.dense", **_FC},
    "phi3": {"q+k+v": ("qkv_proj", concatenated), "o": "o_proj", "gate+up": ("gate_up_proj", halves), "down": "down_proj"},
    "glm4": {**_ATTENTION, "gate+up": ("gate_up_proj", halves), "down": "down_proj"},
    "gpt_neox": {"q+k+v": ("attention.query_key_value", by_head), "o": "attention.dense", **_H4H},
    "bloom": {"q+k+v": ("self_attention.query_key_value", by_head), "o": "self_attention.dense", **_H4H},
    "falcon": {"q+k+v": ("self_attention.query_key_value", falcon), "o": "self_attention.dense", **_H4H},
    "internlm2": {"q+k+v": ("attention.wqkv", by_group), "o": "attention.wo", "gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2"},
    "gpt2": _GPT2,
    "openai-gpt": _GPT2,
    "gptj": {"q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj", "o": "attn.out_proj", "up": "mlp.fc_in", "down": "mlp.fc_out"},
    "opt": {**_ATTENTION, "o": "out_proj", "up": "layers.N.fc1", "down": "layers.N.fc2"},
    "starcoder2": {**_ATTENTION, "up": "mlp.c_fc", "down": "mlp.c_proj"},
}  # fmt: skip
# families whose linear layers lie transposed, [inputs, outputs] (Conv1D) -> names of their modules
_TRANSPOSED = dict.fromkeys(("gpt2", "openai-gpt"), "attn.c_attn|attn.c_proj|mlp.c_fc|mlp.c_proj")
# multimodal families -> where the language part lies, and its family if text_config does not say
_LANGUAGE = r"(model\.)?language_model\."
_BARE = r"model\.(language_model\.)?layers\."
MULTIMODAL: dict[str, tuple[str, str]] = {
    "llava": (_LANGUAGE, "llama"), "llava_next": (_LANGUAGE, "llama"), "llava_onevision": (_LANGUAGE, "qwen2"),
    "gemma3": (_LANGUAGE, "gemma3_text"), "paligemma": (_LANGUAGE, "gemma"), "mistral3": (_LANGUAGE, "mistral"),
    "internvl": (_LANGUAGE, "qwen2"), "aya_vision": (_LANGUAGE, "cohere2"),
    "llama4": (_LANGUAGE, "llama4_text"), "aria": (_LANGUAGE, "aria_text"), "qwen3_vl_moe": (_BARE, "qwen3_vl_moe_text"),
    "qwen2_vl": (_BARE, "qwen2"), "qwen2_5_vl": (_BARE, "qwen2"), "qwen3_vl": (_BARE, "qwen3_vl_text"),
}  # fmt: skip

_POSITION_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|pos_embed\w*|positions?_embeddings?)\.weight$")
_NOT_TEXT = re.compile(r"vis(ion|ual)|image|audio|speech")  # towers beside the language part, in names of their tensors
_POSITION_BUFFERS = {"gptj", "codegen"}  # families that make theirs from the config


@dataclass(frozen=True)
class Role:
    """What a tensor is for: one role, or several that it fuses, whose rows have the `layout`.

    `stack`: the tensor holds a matrix of every expert, if it has three dimensions.
    """

    roles: tuple[str, ...]
    layout: FusedLayout | None = None
    stack: StackedExperts | None = None


class Family:
    """The line of the table that a model's config names."""

    def __init__(self, config: ModelConfig) -> None:
        """A model that the table does not know has no roles."""
        kind = str(config.get("model_type"))
        self._inside, own = MULTIMODAL.get(kind, ("", kind))
        if kind in MULTIMODAL:
            own = str(text_part(config).get("model_type", own))
        self.name = own
        self.known = own in FAMILIES
        self._roles = [line for roles, name in FAMILIES.get(own, {}).items() for line in _lines(roles, name)]
        self._transposed = _pattern(_TRANSPOSED[own]) if own in _TRANSPOSED else None
        self._text = re.compile(self._inside)
        self.layers = find_number(config, "num_hidden_layers")

    @property
    def roles(self) -> list[str]:
        """The roles that its tensors have, in the order of ROLES."""
        found = {role for _, about in self._roles for role in about.roles}
        return [role for role in ROLES if role in found]

    def role_of(self, name: str) -> Role:
        """What a tensor is for; no roles if it is none of the language part's matrices."""
        inside = self._text.match(name) is not None
        found = (about for pattern, about in self._roles if inside and pattern.search(name))
        return next(found, Role(()))

    def is_transposed(self, name: str) -> bool:
        """Whether a tensor lies as [inputs, outputs]."""
        return self._transposed is not None and self._transposed.search(name) is not None

    def is_beyond(self, name: str) -> bool:
        """Whether a tensor belongs to a layer after the model's last: heads that predict several tokens, which nothing loads."""
        number = layer_number(name)
        return self.layers is not None and number is not None and number >= self.layers


def _pattern(names: str, ending: str = r"\.weight") -> re.Pattern[str]:
    alternatives = names.replace(".", r"\.").replace("N", r"\d+")
    return re.compile(rf"(^|\.)({alternatives}){ending}$")


def _lines(
    roles: str, name: str | tuple[str, FusedLayout] | tuple[StackedExperts, StackedExperts]
) -> list[tuple[re.Pattern[str], Role]]:
    """Pattern of a tensor's name -> what the tensor is for."""
    if isinstance(name, str):
        return [(_pattern(name), Role((roles,)))]
    if isinstance(name[0], str):
        return [(_pattern(name[0]), Role(tuple(roles.split("+")), name[1]))]
    return [(_pattern(stack.name, r"(\.weight)?"), Role((roles,), stack=stack)) for stack in name]


def require_known_roles(roles: tuple[str, ...]) -> None:
    """Raise ConfigError for a role that no family has."""
    if unknown := [role for role in roles if role not in ROLES]:
        raise ConfigError(
            f"projectors: {', '.join(unknown)} not known; known are {', '.join(ROLES)}; select others by --include REGEX"
        )


def has_position_table(config: ModelConfig, names: Iterable[str]) -> bool:
    """Whether a model of these tensors looks positions up in a table, beyond the end of which there are none."""
    tables = filter(_POSITION_TABLE.search, names)
    return config.get("model_type") in _POSITION_BUFFERS or not all(map(_NOT_TEXT.search, tables))
