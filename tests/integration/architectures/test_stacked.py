"""Experts that are stacked in one tensor [experts, …] of the file: each is a matrix of its own."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig

import swsc_core.hf  # noqa: F401  (teaches transformers the format)
from jobs.cli import main
from pipeline.calibration.gather import Calibrator
from pipeline.errors import CheckpointError
from pipeline.models.loading import ModelKey
from pipeline.models.stored_model import open_model
from pipeline.storage.store import Store
from tests.support.families import FamilyModel, tensors_of
from tests.support.tiny import make_text

GATE_UP = {
    "llama4": "model.layers.1.feed_forward.experts.gate_up_proj",
    "gpt_oss": "model.layers.1.mlp.experts.gate_up_proj",
    "granitemoeshared": "model.layers.1.block_sparse_moe.input_linear.weight",
    "qwen3_vl_moe": "model.language_model.layers.1.mlp.experts.gate_up_proj",
}


@pytest.fixture(scope="module", params=GATE_UP)
def model(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> FamilyModel:
    """A family that stacks its experts, with a tokenizer."""
    return with_tokenizer(FamilyModel(request.param, tmp_path_factory.mktemp("stacked")), tiny_model)


def with_tokenizer(model: FamilyModel, tiny_model: Path) -> FamilyModel:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model.dense / file).write_bytes((tiny_model / file).read_bytes())
    return model


def piece_of(model: FamilyModel, expert: int, role: str) -> str:
    return f"{GATE_UP[model.name].removesuffix('.weight')}.{expert}.{role}.weight"


def outputs_by_inputs(model: FamilyModel, expert: int, role: str) -> torch.Tensor:
    """Gate or up of one expert, [outputs, inputs], taken from its tensor by hand."""
    matrix = tensors_of(model.dense)[GATE_UP[model.name]][expert]
    matrix = matrix.T if model.name in ("llama4", "gpt_oss") else matrix
    if model.name == "gpt_oss":
        return matrix[("gate", "up").index(role) :: 2]
    return matrix.chunk(2)[("gate", "up").index(role)]


def rows_of(directory: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((directory / "swsc_report.json").read_text())["tensors"]}


def test_every_expert_and_gate_and_up_of_it_is_a_matrix_with_a_name(model: FamilyModel) -> None:
    source = open_model(str(model.dense))
    for expert in (0, 3):
        for role in ("gate", "up"):
            found = source.read_matrix(piece_of(model, expert, role))
            assert torch.equal(found, outputs_by_inputs(model, expert, role))


def test_one_expert_alone_is_changed_and_all_else_is_the_same_to_the_byte(model: FamilyModel) -> None:
    compressed = model.compress("one", "--include", rf"{GATE_UP[model.name].removesuffix('.weight')}\.2\.up")
    before, after = tensors_of(model.dense), tensors_of(model.restored(compressed))
    assert [name for name in before if not torch.equal(before[name], after[name])] == [GATE_UP[model.name]]
    source, restored = open_model(str(model.dense)), open_model(str(model.restored(compressed)))
    for expert in range(4):
        for role in ("gate", "up"):
            same = torch.equal(*(own.read_matrix(piece_of(model, expert, role)) for own in (source, restored)))
            assert same != ((expert, role) == (2, "up"))
    rows = rows_of(compressed)
    assert rows[GATE_UP[model.name]]["action"] == "split"
    assert {name: row["action"] for name, row in rows.items() if ".2." in name} == {
        piece_of(model, 2, "gate"): "copied", piece_of(model, 2, "up"): "compressed",
    }  # fmt: skip


def test_the_dense_form_is_what_restoring_gives(model: FamilyModel) -> None:
    flags = ["--projectors", "experts", "--exclude", r"\.[12]\.gate|\.3\.weight"]
    written = tensors_of(model.compress("dense-form", *flags, "--format", "dense"))
    restored = tensors_of(model.restored(model.compress("some", *flags)))
    assert written.keys() == restored.keys() == tensors_of(model.dense).keys()
    for name, tensor in restored.items():
        assert torch.equal(written[name], tensor), name


def test_beside_an_adapter_stacks_are_restored_whole(model: FamilyModel) -> None:
    flags = ["--projectors", "q,experts"]
    compressed, dense = model.compress("ranked", *flags), model.folder / "with-adapter"
    assert main(["restore", str(compressed), str(dense), "--adapter", "--local"]) == 0
    name = GATE_UP[model.name]
    assert torch.equal(tensors_of(dense)[name], tensors_of(model.restored(compressed))[name])
    assert "whole, as it is no linear layer of its own" in rows_of(dense)[name]["reason"]
    targets = json.loads((dense / "swsc_adapter" / "adapter_config.json").read_text())["target_modules"]
    assert targets
    assert all(target.endswith("q_proj") for target in targets)


def test_what_is_left_of_a_stack_fits_no_loader_that_does_not_know_the_format(model: FamilyModel) -> None:
    directory = model.compress("bare", "--projectors", "experts")
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"mismatch|conversion"):
        model.load(directory)


def test_a_worker_reads_one_expert_at_a_time(
    model: FamilyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = open_model(str(model.dense)).checkpoint.tensors.values()
    stacks = [info for info in found if len(info.shape) == 3]
    reads: dict[str, set[int]] = {info.name: set() for info in stacks}
    real = Store.read

    def noted(self: Store, name: str, start: int = 0, length: int | None = None) -> Any:
        for info in stacks:
            if info.file == name and info.start <= start < info.start + info.nbytes:
                reads[info.name].add(length or 0)
        return real(self, name, start, length)

    monkeypatch.setattr(Store, "read", noted)
    flags = ["--projectors", "experts", "--exclude", r"\.1\.gate", "--clusters", "4", "--rank", "2", "--local"]
    assert main(["compress", str(model.dense), str(tmp_path / "out"), *flags]) == 0
    assert {name: max(own) for name, own in reads.items()} == {info.name: info.nbytes // 4 for info in stacks}


def test_hessians_of_an_expert_are_those_of_the_tokens_routed_to_it(model: FamilyModel) -> None:
    if model.name == "granitemoeshared":
        pytest.skip("is Qwen's in everything that is asked here")
    names, window = [piece_of(model, 2, role) for role in ("gate", "up")], np.arange(40)[None] % 250
    calibrator = Calibrator(ModelKey(str(model.dense), "float32", 1), "cpu")
    experts = calibrator._model.get_submodule(GATE_UP[model.name].rpartition(".")[0])
    seen: dict[int, Any] = {}
    experts.register_forward_pre_hook(lambda _, arguments: seen.update(enumerate(arguments)))
    sums = calibrator.gather(names, window, 0, 0)
    if model.name == "llama4":  # all tokens, once for each expert, and zeros where the router chose another
        inputs = seen[0].reshape(4, 40, -1)[2]
        inputs = inputs[inputs.abs().sum(dim=1) > 0]
    else:
        inputs = seen[0][(seen[1] == 2).any(dim=-1)]
    for name in names:
        assert 0 < sums[name].tokens == len(inputs) < 40
        assert sums[name].owner == names[0]
    torch.testing.assert_close(sums[names[0]].plain, inputs.detach().T @ inputs.detach(), rtol=1e-4, atol=1e-4)


def test_gradients_of_an_expert_are_those_by_its_own_rows(model: FamilyModel) -> None:
    """Of one token the gradient by W is g xᵀ, whose squares add up to g ∘ g times ‖x‖² in each row."""
    names = [piece_of(model, expert, role) for expert in range(4) for role in ("gate", "up")]
    calibrator = Calibrator(ModelKey(str(model.dense), "float32", 1), "cpu")
    named = calibrator._model.named_parameters()
    parameter = next(p for name, p in named if re.search(r"\.1\..*experts\.gate_up_proj$", name))
    parameter.requires_grad_()
    sums = calibrator.gather(names, np.array([[7]]), 0, 0)
    assert parameter.grad is not None
    reached = [name for name in names if sums[name].tokens]
    assert reached
    assert len(reached) < len(names)
    for name in reached:
        expert, role = name.removesuffix(".weight").split(".")[-2:]
        own = parameter.grad[int(expert)]
        own = own.T if model.name in ("llama4", "gpt_oss") else own
        start = ("gate", "up").index(role)
        own = own[start::2] if model.name == "gpt_oss" else own.chunk(2)[start]
        owner = sums[sums[name].owner]
        assert owner.plain is not None
        torch.testing.assert_close(sums[name].rows * owner.plain.trace(), own.square().sum(dim=1), rtol=1e-3, atol=0)


def test_a_sweep_swaps_stacked_experts_in_and_out(model: FamilyModel, text: Path, tmp_path: Path) -> None:
    config, output = tmp_path / "sweep.yaml", tmp_path / "out"
    config.write_text(
        "variants:\n- {name: coarse, include: gate_up_proj|input_linear, clusters: 4, rank: 1}\n"
        "- {name: other, projectors: experts, clusters: 2, rank: 1}\n"
        f"evaluations:\n- {{text: {text}, seqlen: 32, windows: 4}}\n"
    )
    assert main(["sweep", str(config), "--model", str(model.dense), "--out", str(tmp_path / "sweep"), "--local"]) == 0
    rows = {row["variant"]: row for row in json.loads((tmp_path / "sweep" / "results.json").read_text())["rows"]}
    flags = ["--projectors", "experts", "--clusters", "2", "--rank", "1", "--local"]
    assert main(["compress", str(model.dense), str(output), *flags]) == 0
    argv = ["evaluate", str(output), "--text", str(text), "--seqlen", "32", "--windows", "4", "--local"]
    assert main([*argv, "--json", str(tmp_path / "measured.json")]) == 0
    measured = json.loads((tmp_path / "measured.json").read_text())["perplexity"]
    assert rows["other"]["perplexity"] == pytest.approx(measured, rel=1e-6)
    assert len({row["perplexity"] for row in rows.values()}) == 3


class TestQwen3VlMoeAsItIsOnTheHub:
    """The hub's checkpoint stores matrices of experts transposed; transformers transposes them when it loads."""

    @pytest.fixture(scope="class")
    def hub(self, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> FamilyModel:
        model = with_tokenizer(FamilyModel("qwen3_vl_moe", tmp_path_factory.mktemp("hub")), tiny_model)
        for file in model.dense.glob("*.safetensors"):
            tensors = load_file(file)
            turned = {n: t.transpose(1, 2).contiguous() if "experts" in n else t for n, t in tensors.items()}
            save_file(turned, file, {"format": "pt"})
        return model

    def test_it_is_viewed_transposed_opened_and_restored_in_its_stored_layout(self, hub: FamilyModel) -> None:
        name = GATE_UP["qwen3_vl_moe"]
        entries = json.loads((hub.compressed / "config.json").read_text())["quantization_config"]["tensors"]
        assert entries[f"{name}.1.up.weight"]["transposed"]
        assert entries[f"{name}.1.up.weight"]["shape"] == [48, 64]
        restored = hub.restored(hub.compressed)
        assert tensors_of(restored)[name].shape == (4, 64, 96)
        opened, dense = hub.load(hub.compressed), hub.load(restored)
        assert torch.allclose(hub.logits(opened), hub.logits(dense), rtol=0, atol=1e-5 * float(hub.logits(dense).max()))
        opened.save_pretrained(hub.folder / "saved")
        assert torch.equal(hub.logits(hub.load(hub.folder / "saved")), hub.logits(opened))

    def test_it_is_calibrated(self, hub: FamilyModel, tmp_path: Path) -> None:
        calibration = make_text(tmp_path / "calibration.txt", 1500, seed=77)
        flags = ["--preset", "fast", "--bits", "4", "--projectors", "experts", "--calibration-windows", "4"]
        flags += ["--calibration", str(calibration), "--calibration-seqlen", "32", "--local"]
        assert main(["compress", str(hub.dense), str(tmp_path / "out"), *flags]) == 0
        assert sum(row.get("calibration_tokens", 0) > 0 for row in rows_of(tmp_path / "out").values()) > 8


class TestStacksOfAFamilyThatIsNotKnown:
    @pytest.fixture(scope="class")
    def gemma(self, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("unknown") / "model"
        torch.manual_seed(0)
        Config: Any = Gemma4TextConfig  # it takes more arguments than its annotations name
        config = Config(
            vocab_size=256, vocab_size_per_layer_input=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, global_head_dim=16,
            hidden_size_per_layer_input=8,
            max_position_embeddings=128, enable_moe_block=True, num_experts=4, top_k_experts=2,
            moe_intermediate_size=48,
            initializer_range=0.2, layer_types=["full_attention"] * 2, pad_token_id=0, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        Gemma4ForCausalLM(config).save_pretrained(path)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (path / file).write_bytes((tiny_model / file).read_bytes())
        return path

    def test_the_plan_lists_them_and_shows_how_to_select_them(
        self, gemma: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["plan", str(gemma), "--projectors", "experts"]) == 2
        assert "model.layers.N.experts.down_proj" in capsys.readouterr().err
        flags = ["--include", "q_proj", "--clusters", "4", "--rank", "1", "--local"]
        assert main(["compress", str(gemma), str(tmp_path / "out"), *flags]) == 0
        row = rows_of(tmp_path / "out")["model.layers.0.experts.down_proj"]
        assert row["action"] == "copied"
        assert row["reason"] == "not selected: a stack of 4 matrices, which --include REGEX with its name selects"

    def test_they_are_split_in_their_stored_layout(self, gemma: Path, tmp_path: Path) -> None:
        calibration = make_text(tmp_path / "calibration.txt", 1500, seed=77)
        flags = ["--include", r"experts\.", "--preset", "fast", "--bits", "4", "--calibration-windows", "4", "--local"]
        flags += ["--calibration", str(calibration), "--calibration-seqlen", "32"]
        assert main(["compress", str(gemma), str(tmp_path / "out"), *flags]) == 0
        rows = {name: row for name, row in rows_of(tmp_path / "out").items() if row["action"] == "compressed"}
        assert {name: row["shape"] for name, row in rows.items() if "layers.0" in name} == {
            f"model.layers.0.experts.{stack}.{expert}.weight": shape
            for stack, shape in {"gate_up_proj": [96, 64], "down_proj": [64, 48]}.items()
            for expert in range(4)
        }
        assert main(["restore", str(tmp_path / "out"), str(tmp_path / "dense"), "--local"]) == 0
        opened, dense = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("out", "dense"))
        ids = torch.arange(1, 25)[None]
        with torch.no_grad():
            torch.testing.assert_close(opened(ids).logits, dense(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_local_experts": 8}, r"gate_up_proj.*\[4, 64, 192\].*\[8, 64, 192\]"),
        ({"intermediate_size": 32}, r"gate_up_proj.*\[4, 64, 192\].*\[4, 64, 64\]"),
        ({"num_local_experts": None}, r"gate_up_proj.*num_local_experts"),
    ],
)  # fmt: skip
def test_a_stack_that_does_not_fit_the_config_is_refused_in_one_line(
    change: dict[str, Any], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = FamilyModel("gpt_oss", tmp_path)
    config = json.loads((model.dense / "config.json").read_text())
    (model.dense / "config.json").write_text(json.dumps(config | change))
    capsys.readouterr()
    assert main(["plan", str(model.dense), "--projectors", "experts"]) == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    assert re.search(expected, printed)
    assert main(["plan", str(model.dense), "--projectors", "q", "--exclude", "experts"]) == 2  # whatever is selected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"stacked": 3}, "differ in columns, dtype, transposed or stacked"),
        ({"stacked": 0}, "stacked is 0"),
        ({"tensor": None}, "tensor is None"),
        ({"rows": [10, 2, 2, 48]}, "pieces overlap"),
    ],
)
def test_a_wrong_description_of_a_stack_in_config_json_is_refused(
    change: dict[str, Any], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = FamilyModel("gpt_oss", tmp_path)
    directory = model.compress("experts", "--projectors", "experts")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["tensors"][piece_of(model, 1, "up")] |= change
    (directory / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["restore", str(directory), str(tmp_path / "dense"), "--local"]) == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    assert expected in printed


def test_pieces_of_a_number_of_matrices_that_their_rows_are_not(tmp_path: Path) -> None:
    model = FamilyModel("gpt_oss", tmp_path)
    directory = model.compress("experts", "--projectors", "experts")
    config = json.loads((directory / "config.json").read_text())
    for entry in config["quantization_config"]["tensors"].values():
        entry["stacked"] = 7
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"down_proj.* 7 "):
        open_model(str(directory))
