"""Compressed directories opened by transformers: same outputs as the restored dense model, as small as their files."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

import swsc_core.hf
from jobs.cli import main
from swsc_core import SwscEmbedding, SwscLinear, align
from swsc_core.compressed.config_json import FORMAT_VERSION
from tests.support.tiny import make_tiny_model

EVERYTHING = ["--include", "proj|embed_tokens"]
SEGMENTS = ["--clusters", "16", "--segment-size", "4", "--scaled"]
FORMS = {
    "paper": ["--bits", "6"],
    "input channels": ["--bits", "6", "--channel-axis", "input", *EVERYTHING],
    "segments in few bits": [*SEGMENTS, *EVERYTHING, "--centroid-bits", "8", "--rank", "2", "--factor-bits", "8"],
    "codebooks": [*SEGMENTS, *EVERYTHING, "--codebooks", "4"],
    "round to nearest": ["--method", "rtn", "--bits", "4", "--granularity", "group", "--group-size", "16", *EVERYTHING],
}


@pytest.fixture(scope="module", params=FORMS, ids=list(FORMS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A compressed directory and the dense one restored from it, in float32."""
    return made(tmp_path_factory.mktemp("pair"), *FORMS[request.param])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed directory, segments everywhere; read only."""
    return made(tmp_path_factory.mktemp("whole"), *FORMS["codebooks"])[0]


@pytest.fixture
def place(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def made(path: Path, *flags: str) -> tuple[Path, Path]:
    model = make_tiny_model(path / "model", dtype=torch.float32)
    assert main(["compress", str(model), str(path / "compressed"), "--local", *flags]) == 0
    assert main(["restore", str(path / "compressed"), str(path / "dense"), "--local"]) == 0
    return path / "compressed", path / "dense"


def opened(directory: Path, **more: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory, **more)
    align(model)  # equal bits are promised in aligned memory
    return model


def ids() -> torch.Tensor:
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids().to(model.device)).logits.float()


def test_logits_are_those_of_the_restored_model(pair: tuple[Path, Path]) -> None:
    expected = logits(opened(pair[1]))
    assert (logits(opened(pair[0])) - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_generated_tokens_are_those_of_the_restored_model(pair: tuple[Path, Path]) -> None:
    first, second = (opened(d).generate(ids(), max_new_tokens=20, do_sample=False) for d in pair)
    assert torch.equal(first, second)


def test_a_loaded_model_is_as_large_as_its_files(pair: tuple[Path, Path]) -> None:
    stored = sum(
        t.numel() * t.element_size() for file in pair[0].glob("*.safetensors") for t in load_file(file).values()
    )
    held = {p.data_ptr(): p.numel() * p.element_size() for p in opened(pair[0]).parameters() if p.numel()}
    assert sum(held.values()) == stored


@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_saved_again_it_is_the_same_model(pair: tuple[Path, Path], tmp_path: Path, size: str) -> None:
    model = opened(pair[0])
    model.save_pretrained(tmp_path / "saved", max_shard_size=size)
    assert torch.equal(logits(opened(tmp_path / "saved")), logits(model))
    assert main(["restore", str(tmp_path / "saved"), str(tmp_path / "dense"), "--local"]) == 0
    assert torch.equal(logits(opened(tmp_path / "dense")), logits(opened(pair[1])))


def test_dequantized_it_is_the_restored_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    on_load = opened(pair[0], quantization_config=swsc_core.hf.SwscConfig(dequantize=True))
    afterwards = opened(pair[0])
    afterwards.dequantize()
    for model in (on_load, afterwards):
        assert not any(isinstance(m, SwscLinear | SwscEmbedding) for m in model.modules())
        assert torch.equal(logits(model), logits(opened(pair[1])))
        model.save_pretrained(tmp_path / "saved")
        assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
        assert torch.equal(logits(opened(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_it_opens_in_any_dtype(pair: tuple[Path, Path], dtype: Any) -> None:
    model, expected = opened(pair[0], dtype=dtype), logits(opened(pair[1]))
    assert model.dtype == (torch.float32 if dtype == "auto" else dtype)
    off = (logits(model) - expected).norm() / expected.norm()
    assert off < 2 * (logits(opened(pair[1], dtype=dtype)) - expected).norm() / expected.norm() + 1e-5


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_it_opens_by_a_device_map(whole: Path, device_map: Any) -> None:
    model = opened(whole, device_map=device_map)
    where = next(model.parameters()).device  # "auto": a GPU where there is one
    assert torch.equal(logits(model), logits(opened(whole).to(where)))


def test_layers_may_be_offloaded_to_disk(whole: Path, tmp_path: Path) -> None:
    device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    model = opened(whole, device_map=device_map, offload_folder=tmp_path / "offloaded")
    assert torch.equal(logits(model), logits(opened(whole)))


def test_a_pipeline_opens_it_by_its_directory(whole: Path) -> None:
    write = pipeline("text-generation", model=str(whole), tokenizer=AutoTokenizer.from_pretrained(whole))
    assert write("w1 w2 w3", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("w1 w2 w3")


def test_a_class_with_another_head_brings_that_and_shares_the_rest(whole: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(whole, num_labels=3, pad_token_id=0)
    align(model)
    with torch.no_grad():
        assert model(ids()).logits.shape == (2, 3)
        shared = model.model(ids()).last_hidden_state
        assert torch.equal(shared, opened(whole).model(ids()).last_hidden_state)


def test_a_copy_a_pickle_and_a_config_that_was_loaded_before_give_the_same(whole: Path, tmp_path: Path) -> None:
    model = opened(whole)
    torch.save(model, tmp_path / "model.pt")
    others = [
        copy.deepcopy(model),
        torch.load(tmp_path / "model.pt", weights_only=False),
        opened(whole, config=model.config),
    ]
    assert all(torch.equal(logits(other), logits(model)) for other in others)


def test_a_tied_head_is_held_once(whole: Path) -> None:
    model = opened(whole)
    assert model.lm_head.labels is model.model.embed_tokens.labels
    assert isinstance(model.lm_head, SwscLinear)


def test_gradients_reach_the_embeddings_of_the_input(whole: Path) -> None:
    model, restored = opened(whole), opened(whole, quantization_config=swsc_core.hf.SwscConfig(dequantize=True))
    found = []
    for one in (model, restored):
        inputs = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        one(inputs_embeds=inputs).logits.square().sum().backward()
        assert inputs.grad is not None
        found.append(inputs.grad)
    assert torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-3 * float(found[0].abs().max()))


def test_the_forward_pass_compiles_as_one_graph(whole: Path) -> None:
    model = opened(whole)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(ids(), use_cache=False).logits
    assert torch.allclose(found, logits(model), atol=1e-4)


@pytest.mark.parametrize("form", ["segments", "paper"])
def test_a_dense_model_is_compressed_on_load(tmp_path: Path, form: Any) -> None:
    dense = make_tiny_model(tmp_path / "model", dtype=torch.float32)
    model = opened(dense, quantization_config=swsc_core.hf.SwscConfig(bits=6, form=form))
    kinds = {path for path, layer in model.named_modules() if isinstance(layer, SwscLinear)}
    assert len(kinds) == 6
    model.save_pretrained(tmp_path / "saved")
    again = opened(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    for path in kinds:
        layer, weight = model.get_submodule(path), opened(dense).get_submodule(path).weight
        stored = sum(part.numel() * part.element_size() for part in layer.parts.values())
        assert 4 < 8 * stored / weight.numel() <= 6
        assert (layer.dense_weight() - weight).norm() < 0.9 * weight.norm()


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed directory whose head is compressed, and is not that of the embeddings."""
    path = tmp_path_factory.mktemp("untied")
    model = make_tiny_model(path / "model", dtype=torch.float32, tied=False)
    assert main(["compress", str(model), str(path / "out"), "--local", *SEGMENTS, "--include", "proj|lm_head"]) == 0
    return path / "out"


def test_a_class_without_a_head_passes_over_one_that_is_compressed(untied: Path) -> None:
    whole = opened(untied)
    for kind in (AutoModel, AutoModelForSequenceClassification):
        model = kind.from_pretrained(untied)
        align(model)
        with torch.no_grad():
            found = getattr(model, "model", model)(ids()).last_hidden_state
            assert torch.equal(found, whole.model(ids()).last_hidden_state)


def test_parts_require_no_gradient_by_default(whole: Path) -> None:
    model = opened(whole)
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert expected == {name for name, _ in model.named_parameters() if "norm" in name}


_TWO_RANKS = """
import sys, swsc_core.hf
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto")
except ValueError as error:
    print(error)
"""


def test_tensor_parallel_loading_is_refused_by_name(whole: Path, tmp_path: Path) -> None:
    """It would slice centroids as if they were rows, and report damaged labels."""
    (tmp_path / "load.py").write_text(_TWO_RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "load.py"), str(whole)], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.count("tp_plan") == 2, done.stderr


@pytest.mark.parametrize("which", ["whole", "untied"])
def test_compressed_embeddings_and_heads_are_not_resized_half_way(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = opened(request.getfixturevalue(which))
    before = logits(model)
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"call dequantize\(\) first"):
            one.resize_token_embeddings(260)
        assert torch.equal(logits(one), before)
    model.dequantize()
    model.resize_token_embeddings(260, mean_resizing=False)
    assert logits(model).shape[-1] == 260


def test_dequantized_to_another_dtype_all_of_it_has_that(tmp_path: Path) -> None:
    """Compressed layers alone would not fit those beside them."""
    compressed, dense = made(tmp_path, *FORMS["paper"])
    model = opened(compressed, dtype=torch.bfloat16)
    model.dequantize(dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = logits(opened(dense))
    assert (logits(model) - expected).norm() < 0.02 * expected.norm()


def test_what_is_left_of_a_deleted_adapter_is_not_saved_under_names_that_nothing_opens(
    whole: Path, tmp_path: Path
) -> None:
    lora = pytest.importorskip("swsc_core.hf.lora")
    model = opened(whole)
    model.add_adapter(lora.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="base_layer"):
        model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.safetensors"))


class TestCompressedOnLoad:
    """What cannot be kept is refused before a weight is changed."""

    @pytest.fixture(scope="class")
    def dense(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return make_tiny_model(tmp_path_factory.mktemp("dense") / "model", dtype=torch.float32)

    def test_a_head_that_is_tied_is_refused(self, dense: Path) -> None:
        """It would be saved twice, as two things, and not be opened again."""
        with pytest.raises(ValueError, match="lm_head is tied to another layer"):
            opened(dense, quantization_config=swsc_core.hf.SwscConfig(bits=6, include="q_proj|lm_head"))

    def test_a_layer_on_disk_is_refused(self, dense: Path, tmp_path: Path) -> None:
        where = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        how = {"device_map": where | {"model.layers": "disk"}, "offload_folder": tmp_path}
        with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj is offloaded"):
            opened(dense, quantization_config=swsc_core.hf.SwscConfig(bits=6), **how)

    def test_there_is_nothing_to_dequantize(self, dense: Path) -> None:
        with pytest.raises(ValueError, match="dequantize: this checkpoint is not compressed"):
            opened(dense, quantization_config=swsc_core.hf.SwscConfig(dequantize=True))

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ({"bits": "4"}, "bits is '4'"),
            ({"bits": 0}, "bits is 0"),
            ({"bits": float("nan")}, "bits is nan"),
            ({"form": "magic"}, "form is 'magic'"),
            ({"include": "("}, r"include '\('"),
            ({"bitz": 4}, "bitz"),
        ],
    )
    def test_settings_that_cannot_be_are_refused_by_name(self, how: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            swsc_core.hf.SwscConfig(**how)


def test_a_checkpoint_of_the_first_version_is_read(tmp_path: Path) -> None:
    compressed, dense = made(tmp_path, *FORMS["paper"])
    config = json.loads((compressed / "config.json").read_text())
    first = ("method", "shape", "dtype", "n_clusters", "rank", "channel_axis")
    entries = config["quantization_config"]["tensors"]
    config["quantization_config"] |= {
        "format_version": 1,
        "tensors": {name: {key: entry[key] for key in first} for name, entry in entries.items()},
    }
    (compressed / "config.json").write_text(json.dumps(config))
    assert (logits(opened(compressed)) - logits(opened(dense))).abs().max() <= 1e-5
    assert main(["restore", str(compressed), str(tmp_path / "again"), "--local"]) == 0
    assert torch.equal(logits(opened(tmp_path / "again")), logits(opened(dense)))


def config_of(place: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((place / "config.json").read_text())
    change(config)
    (place / "config.json").write_text(json.dumps(config))


def file_of(place: Path, tensor: str) -> Path:
    index = json.loads((place / "model.safetensors.index.json").read_text())
    return place / str(index["weight_map"][tensor])


def changed(place: Path, tensor: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = file_of(place, tensor)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


Q, LABELS = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.labels"


def cut(place: Path) -> None:
    file = file_of(place, Q)
    file.write_bytes(file.read_bytes()[:-100])


def header_cut(place: Path) -> None:
    file = file_of(place, Q)
    file.write_bytes(file.read_bytes()[:40])


def same_file_twice(place: Path) -> None:
    index = json.loads((place / "model.safetensors.index.json").read_text())
    shutil.copy(file_of(place, Q), place / "model-extra.safetensors")
    index["weight_map"][LABELS] = "model-extra.safetensors"
    (place / "model.safetensors.index.json").write_text(json.dumps(index))


def swap(first: str, second: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


def entry_of(key: str, value: Any) -> Callable[[Path], None]:
    return lambda place: config_of(place, lambda c: c["quantization_config"]["tensors"][Q].update({key: value}))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard is missing": (lambda p: file_of(p, Q).unlink(), r"model-\d+-of-\d+.safetensors"),
    "a shard is cut short": (cut, "damaged or cut short"),
    "a header is cut short": (header_cut, "damaged or cut short"),
    "a part is missing": (lambda p: changed(p, Q, lambda t: t.pop(LABELS)), "labels is missing"),
    "a dense tensor is missing": (
        lambda p: changed(p, "model.norm.weight", lambda t: t.pop("model.norm.weight")),
        "nothing is stored for model.norm.weight",
    ),
    "parts of another matrix": (
        lambda p: changed(p, Q, swap(LABELS, LABELS.replace("q_proj", "k_proj"))),
        r"labels is U8 \[\d+\]",
    ),
    "labels of another kind": (
        lambda p: changed(p, Q, lambda t: t.update({LABELS: t[LABELS].float()})),
        r"labels is F32 \[\d+\]",
    ),
    "the same tensor twice": (same_file_twice, r"model-extra\.safetensors: "),
    "a wrong config of the model": (
        lambda p: config_of(p, lambda c: c.update(intermediate_size=128)),
        r"\[64, 128\].*\[64, 96\]",
    ),
    "a newer version": (
        lambda p: config_of(p, lambda c: c["quantization_config"].update(format_version=99)),
        f"format version 99, this release reads 1 to {FORMAT_VERSION}; update swsc",
    ),
    "an entry of another rank": (entry_of("rank", 7), "left is F32"),
    "an entry that cannot be": (entry_of("segment_size", 5), "segment_size 5 does not divide"),
    "an entry of an unknown method": (entry_of("method", "magic"), rf"{Q}: .*'magic'"),
    "an entry of an unknown dtype": (entry_of("dtype", "magic"), rf"{Q}: .*dtype is magic"),
    "a transposed entry": (entry_of("transposed", True), rf"{Q} .*transposed"),
    "an entry is gone": (
        lambda p: config_of(p, lambda c: c["quantization_config"]["tensors"].pop(Q)),
        r"q_proj.labels has no entry",
    ),
    "no entry at all": (
        lambda p: config_of(p, lambda c: c.update(quantization_config={"quant_method": "swsc"})),
        "labels has no entry",
    ),
    "a dense tensor of another shape": (
        lambda p: changed(p, "model.norm.weight", lambda t: t.update({"model.norm.weight": torch.ones(32)})),
        r"model.norm.weight is F32 \[32\].* \[64\]",
    ),
    "a config of fewer layers": (
        lambda p: config_of(p, lambda c: c.update(num_hidden_layers=2)),
        r"model.layers.2.\S+ has no parameter",
    ),
    "a header that is nested without end": (
        lambda p: file_of(p, Q).write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000),
        "damaged or cut short",
    ),
    "a file of another directory": (
        lambda p: (p / "model.safetensors.index.json").write_text(
            (p / "model.safetensors.index.json").read_text().replace(file_of(p, Q).name, "../../elsewhere.safetensors")
        ),
        "elsewhere.safetensors",
    ),
}


def test_a_missing_tensor_is_missed_by_the_model_without_its_head_too(place: Path) -> None:
    changed(place, "model.norm.weight", lambda t: t.pop("model.norm.weight"))
    for kind in (AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(ValueError, match=r"nothing is stored for (model\.)?norm.weight"):
            kind.from_pretrained(place)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_refused_by_name(place: Path, damage: str) -> None:
    do, message = DAMAGES[damage]
    do(place)
    with pytest.raises((ValueError, OSError), match=message):
        opened(place)


def test_a_label_out_of_range_is_refused_by_name(tmp_path: Path) -> None:
    compressed, _ = made(tmp_path, "--clusters", "9", "--rank", "1")
    changed(compressed, Q, lambda t: t.update({LABELS: t[LABELS].fill_(255)}))
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj: label 15 is out of range for 9 centroids"):
        opened(compressed)


@pytest.mark.parametrize("swapped", [True, False], ids=["tensors of one shape are swapped", "one byte is another"])
def test_damage_that_only_hashes_reveal_is_found_by_verify(
    place: Path, swapped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[LABELS][5] ^= 1

    other = LABELS.replace("q_proj", "o_proj")
    changed(place, Q, swap(LABELS, other) if swapped else flip)
    assert main(["verify", str(place), "--local"]) == 1
    assert file_of(place, Q).name in capsys.readouterr().err
