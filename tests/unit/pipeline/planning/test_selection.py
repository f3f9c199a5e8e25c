"""Claims about selection: roles mean the same in every family, and what is not known is not guessed."""

import re
from typing import Any

import pytest

from pipeline.architectures.families import FAMILIES, MULTIMODAL, ROLES, Family
from pipeline.errors import CheckpointError, ConfigError
from pipeline.planning.plan import Plan, make_plan
from pipeline.settings.compression import CompressSettings
from tests.unit.pipeline.planning.test_plan import Shapes, checkpoint_of

PHI: dict[str, tuple[int, ...]] = {
    "model.layers.0.self_attn.qkv_proj.weight": (64, 32),
    "model.layers.0.self_attn.o_proj.weight": (32, 32),
    "model.layers.0.mlp.gate_up_proj.weight": (96, 32),
    "model.layers.0.mlp.down_proj.weight": (32, 48),
}
PHI_CONFIG = {"model_type": "phi3", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


def plan_of(shapes: Shapes, config: dict[str, Any], **settings: Any) -> Plan:
    values = {"clusters": 4, "rank": 1, **settings}
    return make_plan(checkpoint_of(shapes, **config), CompressSettings.model_validate(values))


def chosen(plan: Plan) -> set[str]:
    return {re.sub(r".*layers\.", "", decision.info.name) for decision in plan.compressed}


def test_every_family_has_the_roles_of_attention_and_only_known_ones() -> None:
    for kind in (*FAMILIES, *MULTIMODAL):
        family = Family({"model_type": kind})
        assert family.known
        assert {"q", "k", "v", "o"} <= set(family.roles) <= set(ROLES), kind


@pytest.mark.parametrize("config", [{"model_type": "mamba"}, {"model_type": None}])
def test_an_unknown_family_lists_its_matrices_and_asks_for_an_expression(config: dict[str, Any]) -> None:
    shapes = {"backbone.layers.3.mixer.in_proj.weight": (64, 32), "backbone.layers.3.norm.weight": (32,)}
    for roles in ({}, {"projectors": "q"}):
        with pytest.raises(
            ConfigError, match=r"model_type '\w+' are not known.*--include among backbone\.layers\.N\.mixer"
        ):
            plan_of(shapes, config, **roles)
    assert chosen(plan_of(shapes, config, include="in_proj")) == {"3.mixer.in_proj.weight"}


def test_a_role_that_the_family_lacks_is_refused_with_those_that_it_has() -> None:
    shapes = {f"model.decoder.layers.0.self_attn.{role}_proj.weight": (32, 32) for role in "qkv"}
    with pytest.raises(ConfigError, match=r"projector gate selects no tensor.*roles of its family are q,k,v,o,up,down"):
        plan_of(shapes, {"model_type": "opt"}, projectors="q,gate")


def test_a_role_of_a_fused_tensor_is_its_own_rows_and_the_others_stay() -> None:
    plan = plan_of(PHI, PHI_CONFIG, projectors="q,gate,up")
    assert chosen(plan) == {
        "0.self_attn.qkv_proj.q.weight", "0.mlp.gate_up_proj.gate.weight", "0.mlp.gate_up_proj.up.weight",
    }  # fmt: skip
    actions = {d.info.name: (d.action, d.info.shape) for d in plan.decisions}
    assert actions["model.layers.0.self_attn.qkv_proj.k.weight"] == ("copied", (16, 32))
    assert actions["model.layers.0.self_attn.o_proj.weight"] == ("copied", (32, 32))
    assert plan.weights == checkpoint_of(PHI).weights
    assert {one.tensor.name: len(one.matrices) for one in plan.layers[0].fused} == {
        "model.layers.0.self_attn.qkv_proj.weight": 1,
        "model.layers.0.mlp.gate_up_proj.weight": 2,
    }
    assert {info.name for task in plan.copies for info in task.infos} == {
        name for name in PHI if "o_" in name or "down" in name
    }


def test_expressions_see_the_tensor_and_its_pieces() -> None:
    assert len(chosen(plan_of(PHI, PHI_CONFIG, include="qkv_proj"))) == 3
    assert chosen(plan_of(PHI, PHI_CONFIG, include=r"qkv_proj\.k")) == {"0.self_attn.qkv_proj.k.weight"}
    assert len(chosen(plan_of(PHI, PHI_CONFIG, include="qkv_proj", exclude=r"\.v\.weight"))) == 2
    assert chosen(plan_of(PHI, PHI_CONFIG, projectors="q,o", exclude="qkv")) == {"0.self_attn.o_proj.weight"}


def test_a_fused_tensor_that_does_not_fit_the_config_can_be_excluded() -> None:
    config = PHI_CONFIG | {"num_attention_heads": 16, "head_dim": 8}
    with pytest.raises(CheckpointError, match="or --exclude it"):
        plan_of(PHI, config, projectors="o")
    assert plan_of(PHI, config, projectors="o", exclude="qkv")


def test_gate_up_and_down_are_what_every_token_meets_and_experts_what_some_do() -> None:
    stem = "model.layers.0.mlp"
    shapes: dict[str, tuple[int, ...]] = {
        f"{stem}.{where}{role}_proj.weight": (32, 32)
        for where in ("experts.0.", "experts.11.", "shared_experts.")
        for role in ("gate", "up", "down")
    }
    shapes |= {f"{stem}.gate.weight": (12, 32), "model.layers.1.mlp.gate_proj.weight": (32, 32)}
    config = {"model_type": "deepseek_v3"}
    assert chosen(plan_of(shapes, config, projectors="gate")) == {
        "0.mlp.shared_experts.gate_proj.weight", "1.mlp.gate_proj.weight",
    }  # fmt: skip
    assert len(chosen(plan_of(shapes, config, projectors="experts"))) == 6


def test_layers_after_the_last_are_kept_as_they_are() -> None:
    shapes = {f"model.layers.{layer}.self_attn.o_proj.weight": (32, 32) for layer in range(3)}
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 2}
    plan = plan_of(shapes, config, projectors="o")
    assert chosen(plan) == {"0.self_attn.o_proj.weight", "1.self_attn.o_proj.weight"}
    extra = next(d for d in plan.decisions if d.action == "copied")
    assert "after the model's last" in extra.reason
    assert len(chosen(plan_of(shapes, config, include="o_proj"))) == 3


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_of_a_multimodal_model_roles_are_the_language_parts(prefix: str) -> None:
    shapes = {f"{where}layers.0.self_attn.q_proj.weight": (32, 32) for where in (prefix, "vision_tower.encoder.")}
    plan = plan_of(shapes, {"model_type": "llava", "text_config": {"model_type": "mistral"}}, projectors="q")
    assert [d.info.name for d in plan.compressed] == [f"{prefix}layers.0.self_attn.q_proj.weight"]
    with pytest.raises(ConfigError, match="model_type 'mpt' are not known"):
        plan_of(shapes, {"model_type": "llava", "text_config": {"model_type": "mpt"}}, projectors="q")
