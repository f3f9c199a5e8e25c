"""A user's mistake: one line on standard error that begins with "error:", exit 2, nothing written."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Protocol

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.cli import main
from pipeline.checkpoints.weight_files import INDEX


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


class Refused(Protocol):
    """The fixture `refused`."""

    def __call__(self, *argv: object, expected: tuple[str, ...]) -> None: ...


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run `swsc`.

    Claim that it refuses in one line that has all of `expected`, and writes nothing below tmp_path/out.
    """

    def run(*argv: object, expected: tuple[str, ...]) -> None:
        before = sorted(path for path in (tmp_path / "out").rglob("*")) if (tmp_path / "out").exists() else None
        try:
            code = main([str(argument) for argument in argv])
        except SystemExit as stopped:  # argparse's way
            code = int(str(stopped.code))
        error = [
            line for line in capsys.readouterr().err.splitlines() if not line.startswith(("compress:", "evaluate:"))
        ]
        assert code == 2
        assert len(error) == 1, error
        assert error[0].startswith("error: ")
        assert all(part in error[0] for part in expected), error[0]
        after = sorted(path for path in (tmp_path / "out").rglob("*")) if (tmp_path / "out").exists() else None
        assert after == before

    return run


def compress(model: Path, tmp_path: Path, *flags: object) -> tuple[object, ...]:
    return ("compress", model, tmp_path / "out", "--local", *flags)


def some_shard(model: Path) -> Path:
    return sorted(model.glob("*.safetensors"))[0]


def test_missing_shard(model: Path, tmp_path: Path, refused: Refused) -> None:
    shard = some_shard(model)
    shard.unlink()
    refused(*compress(model, tmp_path), expected=(shard.name, "missing"))


def test_truncated_shard(model: Path, tmp_path: Path, refused: Refused) -> None:
    shard = some_shard(model)
    shard.write_bytes(shard.read_bytes()[:-8])
    refused(*compress(model, tmp_path), expected=(shard.name, "truncated"))


def test_corrupt_shard(model: Path, tmp_path: Path, refused: Refused) -> None:
    shard = some_shard(model)
    shard.write_bytes(b"\0" * 64)
    refused(*compress(model, tmp_path), expected=(shard.name, "download it again"))


@pytest.mark.parametrize(("file", "expected"), [("absent.safetensors", "missing"), ("../x.safetensors", "outside")])
def test_index_naming_an_absent_file_or_one_outside(
    model: Path, tmp_path: Path, refused: Refused, file: str, expected: str
) -> None:
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (model / INDEX).write_text(json.dumps(index))
    refused(*compress(model, tmp_path), expected=(file, expected))


def test_tensor_in_two_shards(model: Path, tmp_path: Path, refused: Refused) -> None:
    save_file({"model.norm.weight": torch.ones(64)}, model / "twice.safetensors")
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["other"] = "twice.safetensors"
    (model / INDEX).write_text(json.dumps(index))
    refused(*compress(model, tmp_path), expected=("model.norm.weight", "twice.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_inf_in_a_weight_names_the_tensor_and_takes_back_what_was_begun(
    model: Path, tmp_path: Path, refused: Refused, value: float
) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    shard = next(file for file in model.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(shard)
    tensors[name][3, 4:6] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    refused(*compress(model, tmp_path), expected=(name, "2 of 2048 values are NaN or Inf"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--clusters", "32"], ["k_proj", "clusters 32", "0 to 31"]),
        (["--clusters", "9999"], ["k_proj", "clusters 9999", "0 to 31"]),
        (["--rank", "33"], ["rank 33", "0 to 32"]),
        (["--bits", "-1"], ["bits", "greater than 0", "-1"]),
        (["--bits", "0.0001"], ["0.0001 bits", "raise --bits"]),
        (["--bits", "nan"], ["bits", "finite"]),
        (["--clusters", "-5"], ["clusters", "greater than or equal to 0"]),
        (["--clusters", "0", "--rank", "0"], ["clusters, rank", "zero"]),
        (["--bits", "3", "--rank", "4"], ["bits: ", "clusters or rank"]),
        (["--method", "rtn", "--bits", "9"], ["bits: 9 ", "rtn", "2 to 8"]),
        (["--method", "rtn", "--bits", "2.5"], ["bits: 2.5 ", "rtn"]),
        (["--method", "rtn", "--rank", "4"], ["rank: ", "method rtn"]),
        (["--symmetric", "--group-size", "64"], ["group_size, symmetric: ", "method swsc"]),
        (["--method", "rtn", "--group-size", "64"], ["group_size: ", "granularity group"]),
        (["--method", "magic"], ["method", "'swsc' or 'rtn'", "magic"]),
        (["--preset", "better"], ["preset", "'paper'", "better"]),
        (["--preset", "best"], ["bits: ", "preset best"]),
        (["--preset", "best", "--bits", "3"], ["calibration: no text given", "--calibration"]),
        (["--preset", "best", "--bits", "3", "--rank", "2"], ["rank: ", "preset best", "preset paper"]),
        (
            ["--preset", "best", "--bits", "0.1", "--calibration", "x"],
            ["bits 0.1 over the selected", "0.100 bits", "k_proj", "--bits", "--exclude"],
        ),
        (
            ["--preset", "best", "--bits", "3", "--bits-over", "model", "--calibration", "x"],
            ["bits 3 over the model", "13.294 bits", "--bits"],
        ),
        (
            ["--preset", "best", "--bits", "3", "--calibration", "/no/such.parquet"],
            ["text /no/such.parquet: No such file"],
        ),
        (["--calibration", "some.txt"], ["calibration: ", "preset best"]),
        (["--bits-over", "model"], ["bits_over: ", "preset paper"]),
        (["--feedback"], ["feedback: ", "metric activations"]),
        (
            ["--feedback", "--metric", "activations", "--clusters", "8"],
            ["feedback: ", "segment_size"],
        ),
        (["--segment-size", "4"], ["segment_size: ", "clusters and rank"]),
        (["--rank", "4", "--scaled", "--n-init", "2"], ["n_init, scaled: ", "without clusters"]),
        (["--clusters", "8", "--factor-bits", "4"], ["factor_bits: ", "without rank"]),
        (
            ["--channel-axis", "auto", "--clusters", "8", "--rank", "2", "--factor-bits", "4"],
            ["channel_axis: auto", "factor_bits"],
        ),
        (
            ["--n-init", "4", "--clusters", "8", "--segment-size", "4"],
            ["n_init: ", "segment_size or codebooks"],
        ),
        (["--segment-size", "7", "--clusters", "8"], ["segment_size 7 does not divide its output channels of 64"]),
        (["--codebooks", "5", "--segment-size", "4", "--clusters", "8"], ["codebooks 5 do not divide its 32 rows"]),
        (["--projectors", "q,zebra"], ["zebra", "choose from q, k, v", "--include"]),
        (["--include", "no_such_matrix"], ["--include selects no tensor", "choose by --include among", "q_proj"]),
        (["--exclude", "proj"], ["no tensor is selected"]),
        (["--include", "(("], ["include", "not a regular expression"]),
        (["--seed", "x"], ["seed", "'x'"]),
        (["--nonsense"], ["--nonsense"]),
    ],
)
def test_flags_that_cannot_be_carried_out(
    tiny_model: Path, tmp_path: Path, refused: Refused, flags: list[str], expected: list[str]
) -> None:
    refused(*compress(tiny_model, tmp_path, *flags), expected=tuple(expected))


def test_all_config_errors_are_shown_at_once(tiny_model: Path, tmp_path: Path, refused: Refused) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("bits: -1\nclusterz: 4\nseed: abc\nformat: zip\n")
    expected = ("clusterz", "bits", "seed", "format")
    refused(*compress(tiny_model, tmp_path, "--config", config), expected=expected)


def test_output_or_result_in_a_place_that_cannot_be_written(
    tiny_model: Path, text: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "file").write_text("")
    refused("compress", tiny_model, tmp_path / "file", "--local", expected=("file",))
    refused("plan", tiny_model, "--json", tmp_path / "no" / "plan.json", expected=("plan.json", "No such file"))
    flags = ("--seqlen", "64", "--local", "--json", tmp_path / "no" / "e.json")
    refused("evaluate", tiny_model, "--text", text, *flags, expected=("e.json", "No such file"))


def test_a_text_that_is_too_short_is_an_error_before_anything_is_compressed(
    tiny_model: Path, text: Path, tmp_path: Path, refused: Refused
) -> None:
    refused(*compress(tiny_model, tmp_path, "--text", text, "--seqlen", "4096"), expected=("0 windows of 4096",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n", "mapping"),
        ("a: [", "not YAML"),
        (None, "No such file"),
        ("bits: 3\nprojectors: q\nbits: 4\n", "bits is given twice, in lines 1 and 3"),
    ],
)
def test_config_file_that_is_none(
    tiny_model: Path, tmp_path: Path, refused: Refused, text: str | None, expected: str
) -> None:
    config = tmp_path / "c.yaml"
    if text is not None:
        config.write_text(text)
    refused(*compress(tiny_model, tmp_path, "--config", config), expected=("c.yaml", expected))


def test_output_directory_that_is_not_ours(tiny_model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    refused(
        *compress(tiny_model, tmp_path),
        expected=(
            "not empty",
            "not an output",
        ),
    )


def test_output_that_is_the_model_itself(model: Path, refused: Refused) -> None:
    refused("compress", model, model, "--local", expected=("the same directory",))


def test_a_disk_that_is_too_small_is_an_error_before_work(
    tiny_model: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 5000, 5000))
    refused(*compress(tiny_model, tmp_path), expected=("bytes are needed", "5,000 are free"))


def test_plan_reports_that_the_disk_is_too_small(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 5000, 5000))
    assert main(["plan", str(tiny_model), "--output", str(tmp_path / "out")]) == 2
    assert "not enough room" in capsys.readouterr().err


def test_pickle_checkpoint(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "p").mkdir()
    torch.save({"w": torch.ones(2)}, tmp_path / "p" / "pytorch_model.bin")
    (tmp_path / "p" / "config.json").write_text("{}")
    refused(*compress(tmp_path / "p", tmp_path), expected=("pickle", "save_pretrained"))


def test_model_that_is_quantized_already(model: Path, tmp_path: Path, refused: Refused) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    refused(*compress(model, tmp_path), expected=("already quantized by 'gptq'", "unquantized"))


def test_text_shorter_than_one_window(tiny_model: Path, text: Path, refused: Refused) -> None:
    refused(
        "evaluate", tiny_model, "--text", text, "--seqlen", "4096", "--local",
        expected=("2000 tokens make 0 windows of 4096", "longer text"),
    )  # fmt: skip


def test_fewer_windows_than_asked_for(tiny_model: Path, text: Path, refused: Refused) -> None:
    flags = ("--seqlen", "100", "--windows", "21", "--local")
    refused("evaluate", tiny_model, "--text", text, *flags, expected=("20 windows of 100", "21"))


@pytest.mark.parametrize(("content", "expected"), [(None, "No such file"), (b"\xff\xfe\x00", "not UTF-8")])
def test_text_that_is_none(
    tiny_model: Path, tmp_path: Path, refused: Refused, content: bytes | None, expected: str
) -> None:
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    refused("evaluate", tiny_model, "--text", tmp_path / "t.txt", "--local", expected=("t.txt", expected))


def test_wikitext_without_the_hub_names_the_remedy(tiny_model: Path, refused: Refused) -> None:
    refused("evaluate", tiny_model, "--text", "wikitext2", "--local", expected=("wikitext2", "name a text file"))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("variants: []\n", "variants"),
        ("variants: [{name: a}, {name: a}]\n", "share a name"),
        ("variants: [{name: a, bitz: 3}]\n", "variants.0.bitz"),
        ("variants: [{name: a, projectors: zebra}, {name: b, clusters: 999}]\n", "variant b"),
        ("variants: [{name: a}]\nmodelz: [x]\n", "modelz"),
    ],
)
def test_sweep_that_cannot_be_carried_out(
    tiny_model: Path, tmp_path: Path, refused: Refused, config: str, expected: str
) -> None:
    (tmp_path / "s.yaml").write_text(config)
    flags = ("--model", tiny_model, "--local")
    refused("sweep", tmp_path / "s.yaml", "--out", tmp_path / "out", *flags, expected=(expected,))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quantization_config": "awq"}, "quantization_config is not an object"),
        ({"text_config": [1]}, "text_config is no"),
    ],
)
def test_config_json_of_another_shape(
    model: Path, tmp_path: Path, refused: Refused, config: dict[str, object], expected: str
) -> None:
    written = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**written, **config}))
    refused(*compress(model, tmp_path), expected=(expected,))


def test_an_empty_text_config_is_none(model: Path, text: Path) -> None:
    written = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**written, "text_config": None}))
    assert main(["evaluate", str(model), "--text", str(text), "--seqlen", "64", "--local"]) == 0


def test_a_compressed_model_without_a_list_of_compressed_tensors(model: Path, refused: Refused) -> None:
    written = json.loads((model / "config.json").read_text())
    quantization = {"quant_method": "swsc", "format_version": 2}
    (model / "config.json").write_text(json.dumps({**written, "quantization_config": quantization}))
    refused("restore", model, model.parent / "out", "--local", expected=("quantization_config", "tensors"))


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_damaged_manifest(tiny_model: Path, tmp_path: Path, refused: Refused, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "swsc_manifest.json").write_text(content)
    refused(
        *compress(tiny_model, tmp_path),
        expected=("swsc_manifest.json is damaged", "--overwrite"),
    )


def test_damaged_tokenizer(model: Path, text: Path, refused: Refused) -> None:
    (model / "tokenizer.json").write_text("{}")
    refused("evaluate", model, "--text", text, "--seqlen", "64", "--local", expected=("no tokenizer",))


def test_a_refused_evaluation_leaves_no_result(tiny_model: Path, text: Path, tmp_path: Path, refused: Refused) -> None:
    flags = ("--seqlen", "4096", "--local", "--json", tmp_path / "e.json")
    refused("evaluate", tiny_model, "--text", text, *flags, expected=("0 windows",))
    assert not (tmp_path / "e.json").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--seqlen", "64"), "--text"),
        (("--clusters", "4", "--count", "paper", "--cluster-share", "0.1"), "cluster_share, count: "),
    ],
)
def test_flags_that_would_be_ignored(
    tiny_model: Path, tmp_path: Path, refused: Refused, flags: tuple[str, ...], expected: str
) -> None:
    refused(*compress(tiny_model, tmp_path, *flags), expected=(expected,))


def test_all_mistakes_of_an_evaluation_are_reported_at_once(tiny_model: Path, text: Path, refused: Refused) -> None:
    flags = ("--seqlen", "1", "--workers", "0")
    refused("evaluate", tiny_model, "--text", text, *flags, expected=("seqlen", "workers"))


def test_one_wrong_variant_is_one_finding(
    tiny_model: Path, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.yaml").write_text(f"models: [{tiny_model}, {tiny_model}]\nvariants: [{{name: a, bits: -1}}]\n")
    assert main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--local"]) == 2
    assert "at least 1 item" not in capsys.readouterr().err
    (tmp_path / "s.yaml").write_text(f"models: [{tiny_model}, {tiny_model}]\nvariants: [{{name: a}}]\n")
    refused("sweep", tmp_path / "s.yaml", "--out", tmp_path / "out", "--local", expected=("models are named twice",))


@pytest.mark.parametrize("place", [1, 2])
def test_a_name_that_json_cannot_hold_is_an_error_before_any_work(
    tiny_model: Path, tmp_path: Path, refused: Refused, place: int
) -> None:
    argv = ["compress", str(tiny_model), str(tmp_path / "out"), "--local"]
    argv[place] += "\udcff"  # what Python makes of a byte that is not UTF-8
    refused(*argv, expected=("not UTF-8; rename it",))
