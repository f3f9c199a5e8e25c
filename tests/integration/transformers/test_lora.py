"""LoRA adapters of stock PEFT on compressed models: trained, saved, loaded, merged, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PEFT_TYPE_TO_TUNER_MAPPING,
    LoraConfig,
    LoraModel,
    PeftModel,
    PeftType,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from transformers import AutoModelForCausalLM

import swsc_core.hf.lora
from jobs.cli import main
from swsc_core import SwscLinear, align
from tests.support.tiny import make_tiny_model

SEGMENTS = ["--include", "proj", "--clusters", "16", "--segment-size", "4", "--scaled"]
FORMS = {
    "paper": ["--bits", "6"],
    "input channels": ["--bits", "6", "--channel-axis", "input"],
    "segments without a rank": SEGMENTS,
    "few bits": [*SEGMENTS, "--centroid-bits", "8", "--rank", "2", "--factor-bits", "8"],
    "round to nearest": ["--method", "rtn", "--bits", "4"],
}
MERGED = ["paper", "input channels", "segments without a rank"]
DENSE = swsc_core.hf.SwscConfig(dequantize=True)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A compressed directory of each form, in float32; read only."""
    path = tmp_path_factory.mktemp("lora")
    model = make_tiny_model(path / "model", dtype=torch.float32)
    for form, flags in FORMS.items():
        assert main(["compress", str(model), str(path / form), "--local", *flags]) == 0
    return {form: path / form for form in FORMS}


@pytest.fixture(params=FORMS)
def place(request: pytest.FixtureRequest, places: dict[str, Path]) -> Path:
    return places[request.param]


def opened(directory: Path, **more: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory, **more)
    align(model)  # equal bits are promised in aligned memory
    return model


def config(**more: Any) -> LoraConfig:
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj"], "lora_dropout": 0.0}
    return LoraConfig(**settings | more)


def adapted(model: Any, name: str = "default", seed: int = 1, **more: Any) -> Any:
    """`model` with an adapter that changes its logits."""
    if isinstance(model, PeftModel):
        model.add_adapter(name, config(**more))
    else:
        model = get_peft_model(model, config(**more), name)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(seed)
        for path, value in model.named_parameters():
            if "lora_" in path and f".{name}." in path:
                value.copy_(torch.randn(value.shape, generator=draw) / 8)
    return model


def ids() -> torch.Tensor:
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits.float()


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model(input_ids=ids(), labels=ids()).loss.backward()
    return {path: value.grad for path, value in model.named_parameters() if value.grad is not None}


class TestTraining:
    """What PEFT does on a dense model it does on a compressed one."""

    def test_gradients_are_those_on_the_dequantized_model(self, place: Path) -> None:
        found, expected = (gradients(adapted(opened(place, **how))) for how in ({}, {"quantization_config": DENSE}))
        assert found.keys() == expected.keys()
        assert all("lora_" in path for path in found)
        assert max(off(found[path], expected[path]) for path in expected) < 1e-4

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing_changes_nothing(self, place: Path, reentrant: bool) -> None:
        model, checkpointed = (adapted(opened(place)) for _ in range(2))
        checkpointed.train()
        checkpointed.enable_input_require_grads()
        checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
        expected, found = gradients(model), gradients(checkpointed)
        assert max(off(found[path], expected[path]) for path in expected) < 1e-5

    def test_half_precision_is_as_close_as_on_the_dequantized_model(self, place: Path) -> None:
        expected = logits(adapted(opened(place, quantization_config=DENSE)))
        ours, dense = (
            logits(adapted(opened(place, dtype=torch.bfloat16, **how))) for how in ({}, {"quantization_config": DENSE})
        )
        assert off(ours, expected) < 2 * off(dense, expected)

    def test_adapters_keep_float32_over_a_base_in_half_precision(self, place: Path) -> None:
        model = adapted(opened(place, dtype=torch.bfloat16))
        assert {g.dtype for g in gradients(model).values()} == {torch.float32}
        assert logits(model).isfinite().all()

    def test_training_lowers_the_loss_and_leaves_the_base_alone(self, place: Path) -> None:
        torch.manual_seed(0)
        model = get_peft_model(opened(place), config(lora_dropout=0.1)).train()
        before = {path: value.clone() for path, value in model.named_parameters() if "lora_" not in path}
        optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.01)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = model(input_ids=ids(), labels=ids()).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.3
        assert all(torch.equal(dict(model.named_parameters())[path], value) for path, value in before.items())

    def test_preparing_for_training_in_few_bits_does_no_harm(self, place: Path) -> None:
        expected = logits(opened(place))
        model = prepare_model_for_kbit_training(opened(place, dtype=torch.bfloat16))
        assert off(logits(model), expected) < 0.02
        assert {g.dtype for g in gradients(adapted(model)).values()} == {torch.float32}

    def test_all_linear_means_compressed_layers_too(self, places: dict[str, Path]) -> None:
        sets = [
            get_peft_model(opened(places[form], **how), config(target_modules="all-linear"))
            for form in ("paper", "segments without a rank")
            for how in ({}, {"quantization_config": DENSE})
        ]
        named = [{path for path, _ in model.named_parameters() if "lora_" in path} for model in sets]
        assert len(named[0]) == 2 * 7 * 3
        assert all(names == named[0] for names in named)
        sets[0].add_adapter("second", config(target_modules="all-linear"))
        assert {path for path, _ in sets[0].named_parameters() if ".second." in path} == {
            path.replace(".default.", ".second.") for path in named[0]
        }


class TestAdapters:
    """Several of them, on and off, saved and loaded."""

    def test_an_adapter_is_switched_off_and_on(self, place: Path) -> None:
        model = adapted(opened(place))
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(opened(place)))
        assert off(logits(model), logits(opened(place))) > 0.01

    def test_one_of_several_is_chosen(self, place: Path) -> None:
        model = adapted(adapted(opened(place)), "other", seed=2, r=5, target_modules=["q_proj", "o_proj"])
        alone = adapted(opened(place), "other", seed=2, r=5, target_modules=["q_proj", "o_proj"])
        first = logits(model)
        model.set_adapter("other")
        assert torch.equal(logits(model), logits(alone))
        model.set_adapter("default")
        assert torch.equal(logits(model), first)

    def test_rows_of_a_batch_have_an_adapter_each(self, place: Path) -> None:
        model = adapted(adapted(opened(place)), "other", seed=2).eval()
        with torch.no_grad():
            mixed = model(input_ids=ids(), adapter_names=["other", "__base__"]).logits
        model.set_adapter("other")
        assert torch.allclose(mixed[0], logits(model)[0], atol=1e-4)
        assert torch.allclose(mixed[1], logits(opened(place))[1], atol=1e-4)

    def test_saved_it_is_a_stock_adapter_and_loads_again(self, place: Path, tmp_path: Path) -> None:
        model = adapted(opened(place))
        model.save_pretrained(tmp_path / "adapter")
        about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert about["peft_type"] == "LORA"
        again = PeftModel.from_pretrained(opened(place), tmp_path / "adapter")
        assert torch.equal(logits(again), logits(model))
        dense = PeftModel.from_pretrained(opened(place, quantization_config=DENSE), tmp_path / "adapter")
        assert off(logits(dense), logits(model)) < 1e-5

    def test_transformers_loads_it_by_itself(self, place: Path, tmp_path: Path) -> None:
        model = adapted(opened(place))
        model.save_pretrained(tmp_path / "adapter")
        plain = opened(place)
        plain.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(logits(plain), logits(model))


class TestMerging:
    """An adapter is merged into compensation of a higher rank exactly, or it is refused and nothing has changed."""

    @pytest.mark.parametrize("form", MERGED)
    def test_a_merged_model_has_equal_logits_and_is_saved_compressed(
        self, places: dict[str, Path], tmp_path: Path, form: str
    ) -> None:
        model = adapted(opened(places[form]), target_modules="all-linear")
        expected = logits(model)
        ranks = {
            path: m.entry.low_rank for path, m in opened(places[form]).named_modules() if isinstance(m, SwscLinear)
        }
        merged = model.merge_and_unload()
        assert off(logits(merged), expected) < 1e-5
        assert {path: merged.get_submodule(path).entry.low_rank - 3 for path in ranks} == ranks
        merged.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(opened(tmp_path / "saved")), logits(merged))
        assert main(["restore", str(tmp_path / "saved"), str(tmp_path / "dense"), "--local"]) == 0
        assert off(logits(opened(tmp_path / "dense")), expected) < 1e-5

    @pytest.mark.parametrize("form", MERGED)
    def test_unmerged_it_is_what_it_was_to_the_bit(self, places: dict[str, Path], form: str) -> None:
        model = adapted(adapted(opened(places[form])), "other", seed=2)
        before = {path: value.clone() for path, value in model.state_dict().items()}
        model.merge_adapter(["default", "other"])
        model.unmerge_adapter()
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[path], value) for path, value in before.items())
        model.merge_adapter(["other"])
        alone = adapted(opened(places[form]), "other", seed=2)
        assert off(logits(model), logits(alone)) < 1e-5

    REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("few bits", {}, "its low-rank part is stored in 8 bits a value"),
        ("round to nearest", {}, "rtn has no low-rank part"),
        ("paper", {"r": 40}, r"rank 4\d, .* 32"),
        ("paper", {"lora_bias": True}, "no bias"),
    )

    @pytest.mark.parametrize(("form", "how", "message"), REFUSED)
    def test_what_cannot_be_merged_is_refused_before_anything_is(
        self, places: dict[str, Path], form: str, how: dict[str, Any], message: str
    ) -> None:
        model = adapted(opened(places[form]), target_modules="all-linear", **how)
        expected = logits(model)
        for merge in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(ValueError, match=rf"_proj: the adapter cannot be merged: .*{message}"):
                merge()
            assert torch.equal(logits(model), expected)

    def test_a_head_that_is_tied_to_the_embedding_is_not_changed_behind_its_back(
        self, tiny_model: Path, tmp_path: Path
    ) -> None:
        flags = ["--include", "embed_tokens", "--clusters", "9", "--rank", "2"]
        assert main(["compress", str(tiny_model), str(tmp_path / "out"), "--local", *flags]) == 0
        with pytest.warns(UserWarning, match="tie_word_embeddings"):
            model = adapted(opened(tmp_path / "out"), target_modules=["lm_head"])
        with (
            pytest.raises(ValueError, match="lm_head: the adapter cannot be merged: it is tied"),
            pytest.warns(UserWarning, match="tie_word_embeddings"),
        ):
            model.merge_and_unload()

    def test_nan_is_found_by_a_safe_merge(self, places: dict[str, Path]) -> None:
        model = adapted(opened(places["paper"]))
        with torch.no_grad():
            next(value for path, value in model.named_parameters() if "lora_A" in path)[0, 0] = torch.nan
        with pytest.raises(ValueError, match="adapter default holds NaN or Inf"):
            model.merge_adapter(safe_merge=True)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"use_dora": True}, "plain LoRA"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"init_lora_weights": "olora"}, "'olora'"),
    ],
)
def test_kinds_of_lora_that_need_the_dense_weight_are_refused(
    places: dict[str, Path], how: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(opened(places["paper"]), config(**how))


def test_without_the_plug_in_peft_refuses_compressed_layers_by_name(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.LORA, LoraModel)
    with pytest.raises(ValueError, match=r"SwscLinear\(.* is not supported"):
        get_peft_model(opened(places["paper"]), config())
