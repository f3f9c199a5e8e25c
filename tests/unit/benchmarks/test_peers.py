"""Claims about the benchmark of rival tools: what it counts, what it runs, what it knows again, what it prints."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.peers import environments
from benchmarks.peers.__main__ import main as benchmark
from benchmarks.peers.arguments import LINEAR_OF_LAYERS, groups, parse
from benchmarks.peers.bench import Bench, RowFailure
from benchmarks.peers.bench import run as run_process
from benchmarks.peers.calibration import calibration_tokens
from benchmarks.peers.quantize_rtn import quantize
from benchmarks.peers.rows import DEFAULT, HEADER, PEERS, Row, cells, key, rows_of
from benchmarks.peers.script import CHANNEL, WHOLE_TENSOR, Outcome, Refusal, arguments, description, run, selected
from pipeline.settings.calibration import CalibrationSettings
from pipeline.texts.windows import calibration_windows
from swsc_core.storage.json_fields import JsonObject
from tests.support.tiny import make_text, make_tiny_model

COMMON: JsonObject = {
    "model": "m", "text": "t", "seqlen": 8, "windows": 1, "dtype": "float32", "include": "q_proj", "calibration": "c",
}  # fmt: skip
PEER = {
    "tool": "RTN", "version": "ours", "settings": {"bits": 2, "group": 64, "calibration": [4, 128]},
    "bits_per_weight": 2.28125, "cpu_seconds": 1.4, "peak_rss": 350_000_000,
}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two layers of one projection each, a norm, an embedding; a tokenizer file stands for all others."""
    folder, generator = tmp_path / "source", torch.Generator().manual_seed(0)
    folder.mkdir()
    names = ["model.embed.weight", *(f"model.layers.{n}.{role}_proj.weight" for n in (0, 1) for role in "qv")]
    held = {name: torch.randn(6, 20, generator=generator).bfloat16() for name in names}
    save_file({**held, "model.layers.0.norm.weight": torch.ones(20).bfloat16()}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_script_changes_the_selected_matrices_alone(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["script", str(checkpoint), str(tmp_path / "row"), "--bits", "2", "--group-size=8", "--include", "q_proj"]
    monkeypatch.setattr("sys.argv", argv)
    assert run(arguments(None), quantize) == 0
    before = load_file(checkpoint / "model.safetensors")
    after = load_file(tmp_path / "row" / "model" / "model.safetensors")
    report = json.loads((tmp_path / "row" / "peer.json").read_text())
    assert set(report["stored_bytes"]) == {name for name in before if "q_proj" in name}
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype
        assert torch.equal(after[name], weight) == ("q_proj" not in name)
    assert all(len(row[:8].unique()) <= 4 for name in report["stored_bytes"] for row in after[name])
    assert (tmp_path / "row" / "model" / "tokenizer.json").is_file()
    assert report["cpu_seconds"] >= 0 < report["peak_rss"]


@pytest.mark.parametrize(
    ("group", "stored"),
    # 6 × 20 codes of 2 bits are 30 bytes; 16 bits a scale, 2 bits a zero point, packed
    [(WHOLE_TENSOR, 30 + 2 + 1), (CHANNEL, 30 + 6 * 2 + 2), (8, 30 + 18 * 2 + 5)],
)
def test_bits_are_those_of_the_stored_bytes(checkpoint: Path, tmp_path: Path, group: int, stored: int) -> None:
    flags = [str(checkpoint), str(tmp_path), "--bits", "2", f"--group-size={group}", "--include", "q_proj"]
    request = arguments(None).parse_args(flags)
    shapes = selected(request.model, request.include)
    report = description(quantize(request, shapes), shapes)
    assert set(report["stored_bytes"].values()) == {stored}
    assert report["bits_per_weight"] == 8 * stored / 120
    assert report["weights"] == 240


def test_by_default_every_matrix_of_a_layer_is_selected_and_nothing_else(checkpoint: Path) -> None:
    names = {f"model.layers.{n}.{role}_proj.weight" for n in (0, 1) for role in "qv"}
    assert set(selected(str(checkpoint), LINEAR_OF_LAYERS)) == names


def test_an_expression_without_a_match_is_an_error(checkpoint: Path) -> None:
    with pytest.raises(Refusal, match="lm_head"):
        selected(str(checkpoint), "lm_head")


def test_a_refusal_is_exit_code_2_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> Outcome:
        raise Refusal("20 columns are no multiple of 8")

    argv = ["script", str(checkpoint), str(tmp_path / "row"), "--bits", "2", "--group-size=8", "--include", "q_proj"]
    monkeypatch.setattr("sys.argv", argv)
    assert run(arguments(None), refuse) == 2
    assert capsys.readouterr().err == "20 columns are no multiple of 8\n"
    assert not (tmp_path / "row").exists()


def test_rows_are_tools_times_bits_times_groups_and_rtn_has_two_more() -> None:
    rows = rows_of(["rtn", "awq"], [3, 2], [64, 128], autoround_iters=200)
    assert [row.label for row in rows[:4]] == ["rtn-3bit-tensor", "rtn-3bit-channel", "rtn-3bit-g64", "rtn-3bit-g128"]
    assert [row.label for row in rows[8:]] == ["awq-3bit-g64", "awq-3bit-g128", "awq-2bit-g64", "awq-2bit-g128"]
    assert rows[-1].flags == ("--method", "awq")
    assert rows_of(["autoround"], [2], [64], 1000)[0].flags == ("--iters", "1000")
    assert rows_of(["autoround-ext"], [3], [64], 200)[0].flags == ("--extension", "--iters", "200")
    assert len(rows_of(["rtn"], [2], [CHANNEL], 200)) == 2


def test_every_tool_has_a_script_and_pinned_requirements() -> None:
    folder = Path(environments.__file__).parent
    for peer in PEERS.values():
        assert (folder / f"{peer.script}.py").is_file()
        if peer.environment:
            lines = [line for line in environments.requirements(peer.environment).splitlines() if line[0] != "#"]
            assert lines[0].startswith("torch==")
            assert all("==" in line for line in lines)
    assert set(DEFAULT) <= set(PEERS)


ROW = Row("rtn", 2, 64, ())


@pytest.mark.parametrize("other", [Row("rtn", 3, 64, ()), Row("rtn", 2, 128, ()), Row("rtn", 2, 64, ("--x",))])
def test_the_key_differs_between_settings(other: Row) -> None:
    assert key(ROW, COMMON, "") == key(Row("rtn", 2, 64, ()), dict(reversed(list(COMMON.items()))), "")
    assert key(ROW, COMMON, "") != key(other, COMMON, "")


@pytest.mark.parametrize("name", COMMON)
def test_the_key_hangs_on_all_that_rows_share(name: str) -> None:
    changed = {**COMMON, name: "other"}
    assert key(ROW, COMMON, "") != key(ROW, changed, "")
    quantized_only = name in ("include", "calibration")
    assert (key(None, COMMON, "") == key(None, changed, "")) == quantized_only
    assert key(ROW, COMMON, "torch==1") != key(ROW, COMMON, "torch==2")


def bench(tmp_path: Path) -> Bench:
    return Bench(
        "source", "q_proj", tmp_path / "tokens.npy", COMMON, (), tmp_path, tmp_path / "environments", keep=False
    )


def finished(folder: Path, **files: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_a_finished_row_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = key(ROW, COMMON, "")
    finished(tmp_path / "rows" / f"{ROW.label}-{name}", peer=PEER, evaluation={"perplexity": 20.5})
    monkeypatch.setattr("benchmarks.peers.bench.run", lambda *_, **__: pytest.fail("it ran"))
    result = bench(tmp_path).result(ROW)
    assert (result["key"], result["peer"], result["evaluation"]) == (name, PEER, {"perplexity": 20.5})


def test_a_quantized_row_is_only_evaluated_and_its_checkpoint_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "rows" / f"{ROW.label}-{key(ROW, COMMON, '')}"
    finished(folder, peer=PEER)
    (folder / "model").mkdir()

    def run_evaluation(command: list[str], log: Path) -> None:
        assert command[1:4] == ["-m", "jobs", "evaluate"]
        Path(command[command.index("--json") + 1]).write_text('{"perplexity": 20.5}')

    monkeypatch.setattr("benchmarks.peers.bench.run", run_evaluation)
    assert bench(tmp_path).result(ROW)["evaluation"]["perplexity"] == 20.5
    assert sorted(path.name for path in folder.iterdir()) == ["evaluation.json", "peer.json"]


@pytest.mark.parametrize(
    ("code", "refused", "message"), [(1, False, "exit code 1: no room; see "), (2, True, "no room")]
)
def test_the_error_of_a_failed_process_is_its_last_line(tmp_path: Path, code: int, refused: bool, message: str) -> None:
    log = tmp_path / "log.txt"
    with pytest.raises(RowFailure) as failure:
        run_process([sys.executable, "-c", f"print('first'); print('no room'); raise SystemExit({code})"], log, True)
    assert failure.value.refused == refused
    assert str(failure.value) == message + (str(log) if code == 1 else "")


def test_cells_show_settings_true_bits_and_cost() -> None:
    line = cells({"tensors": "Q & K", "label": "x", "peer": PEER, "evaluation": {"perplexity": 20.5}})
    assert dict(zip(HEADER, line, strict=True)) == {
        "tensors": "Q & K", "tool": "RTN ours", "settings": "group 64, calibration 4×128", "nominal bits": "2",
        "true bits": "2.281", "perplexity": "20.500", "CPU seconds": "1", "peak memory, GB": "0.35",
    }  # fmt: skip


def test_a_row_without_figures_shows_the_reason() -> None:
    line = cells({"tensors": "Q", "label": "awq-2bit-g128", "reason": "576 is no multiple of 128"})
    assert line == ("Q", "awq-2bit-g128", "576 is no multiple of 128", "", "", "", "", "")


def test_tools_are_calibrated_on_the_tokens_that_ours_is(tmp_path: Path) -> None:
    model, text, other = (
        make_tiny_model(tmp_path / "m"),
        make_text(tmp_path / "c.txt"),
        make_text(tmp_path / "t.txt", seed=1),
    )
    file, digest = calibration_tokens(str(model), str(text), 3, 40, str(other), tmp_path / "out")
    settings = CalibrationSettings(calibration=str(text), calibration_windows=3, calibration_seqlen=40)
    ids = np.load(file)
    assert ids.tolist() == calibration_windows(str(model), settings).ids.tolist()
    assert digest == hashlib.sha256(ids.tobytes()).hexdigest()


def test_a_benchmark_on_its_own_calibration_text_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = make_tiny_model(tmp_path / "m"), str(make_text(tmp_path / "c.txt"))
    argv = ["peers", str(model), "--text", text, "--calibration", text, "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*argv, "--calibration-windows", "3", "--calibration-seqlen", "40"])
    capsys.readouterr()
    assert benchmark() == 2
    assert "c.txt: shares passages with the calibration text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_transposed_matrices_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "gpt2", tmp_path / "out"
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=256)).save_pretrained(model)
    monkeypatch.setattr("sys.argv", ["peers", str(model), "--text", "t", "--calibration", "c", "--out", str(out)])
    capsys.readouterr()
    assert benchmark() == 2
    assert "attn.c_attn.weight is stored as [inputs, outputs]" in capsys.readouterr().err
    assert not out.exists()


def test_mistakes_of_the_command_line_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert groups("64,channel") == [64, CHANNEL]
    needed = ["peers", "DIR", "--text", "t", "--calibration", "c", "--out", "o"]
    for wrong in (["--peers", "rtn,nf4"], ["--include", "("], ["--bits", "two"], ["--group-sizes", "0"]):
        monkeypatch.setattr("sys.argv", [*needed, *wrong])
        with pytest.raises(SystemExit) as stop:
            parse(None)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
