"""Second moments of a real (tiny) model, and compressions that use them, in the plain loop."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.cli import main
from pipeline.calibration import flow, hessian_store
from pipeline.calibration.gather import Calibrator
from pipeline.calibration.hessian_store import Hessians, blend, complete, stored_in
from pipeline.calibration.job import KeepHessians
from pipeline.checkpoints.checkpoint import read_header
from pipeline.checkpoints.matrix_info import whole_matrix
from pipeline.checkpoints.source import open_checkpoint
from pipeline.checkpoints.tensor_io import Payload, commit, read_tensor, to_stored_tensor
from pipeline.engine.ray_backend.worker_pools import LocalPools
from pipeline.engine.task import JobContext
from pipeline.errors import TextError
from pipeline.models.loading import ModelKey
from pipeline.models.stored_model import open_model
from pipeline.outputs import preflight
from pipeline.outputs.existing_output import FinishedFile
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.cluster import ClusterSettings
from pipeline.storage.lease import acquire_lease
from pipeline.storage.store import FileRecord, Store
from pipeline.texts.windows import calibration_windows
from tests.support.tiny import WORDS, contents, make_text, make_tiny_model

ROLES = "q,k,v,o,gate,up,down"
SHORT = ["--calibration-windows", "6", "--calibration-seqlen", "32"]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of the same words as the text that is measured on, in another order."""
    return make_text(tmp_path_factory.mktemp("calibration") / "calibration.txt", 1500, seed=77)


def compress(model: Path, output: Path, text: Path, *flags: str) -> dict[str, Any]:
    argv = ["compress", str(model), str(output), "--local", "--calibration", str(text), *SHORT, *flags]
    assert main(argv) == 0
    return json.loads((output / "swsc_report.json").read_text())


@pytest.fixture(scope="module")
def best(tiny_model: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("best") / "out"
    compress(tiny_model, output, calibration, "--preset", "best", "--bits", "3", "--projectors", ROLES)
    return output


def hessians_beside(output: Path) -> Hessians:
    (cache,) = (output.parent / ".swsc-cache").iterdir()
    finished = {}
    for path in (cache / ".swsc/done").iterdir():
        record = json.loads(path.read_text())
        finished[path.stem] = FinishedFile(FileRecord.from_json(path.stem, record), record["rows"])
    return Hessians(Store.at(str(cache)), 0.5, complete(stored_in(finished)))


def test_hessians_are_those_of_an_explicit_loop(tiny_model: Path) -> None:
    """Two matrices with the same input, one with another: sums over two windows, by autograd on the outputs."""
    names = [f"model.layers.1.{part}.weight" for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")]
    windows = np.arange(40).reshape(2, 20) % 250
    sums = Calibrator(ModelKey(str(tiny_model), "float32", 1), "cpu").gather(names, windows, 0, seed=3)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = {name: [torch.zeros(()), torch.zeros(()), torch.zeros(())] for name in names}
    for index, window in enumerate(windows):
        seen: dict[str, Any] = {}
        for name in names:
            module = model.get_submodule(name.removesuffix(".weight"))
            module.register_forward_hook(
                lambda m, i, o, name=name, seen=seen: seen.update({name: (i[0].detach()[0], o)})
            )
        logits = model(input_ids=torch.tensor(window)[None], use_cache=False).logits[0]
        draw = torch.Generator().manual_seed((3 << 32) + index)
        targets = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        gradients = torch.autograd.grad(loss, [seen[name][1] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            x, g = seen[name][0], gradient[0]
            parts = (x.T @ x, (x * g.square().sum(1, keepdim=True)).T @ x, g.square().sum(0))
            expected[name] = [total + part for total, part in zip(expected[name], parts, strict=True)]
    for name in names:
        own, (plain, weighted, rows) = sums[name], expected[name]
        torch.testing.assert_close(own.weighted, weighted, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(own.rows, rows, rtol=1e-3, atol=1e-6)
        assert own.plain is None if own.owner != name else own.plain is not None
        shared = sums[own.owner].plain
        assert shared is not None
        torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-5)
        assert own.tokens == 40
    assert [sums[name].owner for name in names] == [names[0], names[0], names[2]]


def test_a_calibration_without_a_cluster_leaves_no_cache(tiny_model: Path, calibration: Path, tmp_path: Path) -> None:
    argv = ["compress", str(tiny_model), str(tmp_path / "out"), "--calibration", str(calibration), *SHORT]
    argv += ["--preset", "fast", "--bits", "3", "--gpus-per-worker", "0"]  # on CPUs no worker is asked for its device
    assert main([*argv, "--address", "127.0.0.1:1"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_blend_has_half_of_each_direction_whatever_their_size() -> None:
    plain, weighted = torch.diag(torch.tensor([8.0, 0.0])), torch.diag(torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(blend(plain.clone(), weighted, 0.5), torch.diag(torch.tensor([0.5, 0.5])))
    torch.testing.assert_close(blend(plain.clone(), weighted, 1.0), torch.diag(torch.tensor([0.0, 1.0])))
    assert torch.equal(blend(plain, weighted * 0, 0.5), plain)


def test_hessians_do_not_depend_on_shards_ranges_or_the_requested_matrices(
    tiny_model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, settings = (
        open_checkpoint(str(tiny_model)),
        CalibrationSettings(calibration=str(calibration), calibration_windows=6, calibration_seqlen=32),
    )
    ids = calibration_windows(str(tiny_model), settings).ids
    names = [name for name in source.tensors if name.endswith("proj.weight")]
    local = LocalPools(ClusterSettings(local=True))
    monkeypatch.setattr(flow, "_SHARD_TOKENS", 64)

    def gather(place: str, names: list[str], gib: float) -> dict[str, list[float]]:
        own = settings.model_copy(update={"moment_gib": gib})
        infos = [whole_matrix(source.tensors[name]) for name in names]
        inputs = flow.CalibrationInputs(source, infos, ids, seed=0)
        hessians = flow.Calibration(inputs, own, str(tmp_path / place)).run(local)
        metrics = {name: hessians.metric(name, "cpu") for name in names}
        assert all(metric.hessian is not None for metric, _ in metrics.values())
        return {name: [unit, *metric.hessian.flatten().tolist()] for name, (metric, unit) in metrics.items()}  # type: ignore[union-attr]

    whole = gather("whole", names, 4.0)
    assert gather("ranges", names, 1e-9) == whole  # a pass for each layer
    with monkeypatch.context() as patch:
        patch.setattr(hessian_store, "_FILE_BYTES", 1)
        assert gather("parts", names, 4.0) == whole  # a file for each matrix
    assert gather("parts", names, 4.0) == whole  # found in these files
    few = [name for name in names if "q_proj" in name]
    assert gather("grown", few, 4.0).items() <= whole.items()
    assert gather("grown", names, 4.0) == whole  # found again, and the others added
    assert len(list((tmp_path / "grown").iterdir())) == 1
    files = {place: len(list((tmp_path / place).glob("*/*.safetensors"))) for place in ("whole", "parts", "grown")}
    layers = source.config["num_hidden_layers"]
    assert files == {"whole": layers, "parts": len(names), "grown": 2 * layers}


def test_a_cache_of_an_earlier_release_is_used(
    tiny_model: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has a file per matrix, with one record each. Report rows name the same digests of Hessians."""
    flags = ["--preset", "fast", "--bits", "3", "--projectors", "q,k,v,down", "--cache-dir"]
    first = compress(tiny_model, tmp_path / "first", calibration, *flags, str(tmp_path / "cache"))
    (cache,) = (tmp_path / "cache").glob("moments-*")
    for path in cache.glob("*.safetensors"):
        split_by_matrix(Store.at(str(cache)), path.name)
    assert len(list(cache.glob("*.safetensors"))) == 12
    capsys.readouterr()
    again = compress(tiny_model, tmp_path / "again", calibration, *flags, str(tmp_path / "cache"))
    assert "calibrate" not in capsys.readouterr().err
    digests = [{row["name"]: row.get("moments_sha256") for row in report["tensors"]} for report in (first, again)]
    assert digests[0] == digests[1]
    assert contents(tmp_path / "first") == contents(tmp_path / "again")


def split_by_matrix(store: Store, file: str) -> None:
    """Replace a file of a calibration by one per matrix, with the records of an earlier release."""
    record = store.read_json(f".swsc/done/{file}.json")
    infos = read_header(store, file)[1]
    with acquire_lease(store) as lease:
        for row in record["rows"]:
            own = [info for info in infos if info.name.startswith(row["name"].removesuffix("weight"))]
            parts = tuple(to_stored_tensor(info.name, read_tensor(store, info)) for info in own)
            old_row = {key: row[key] for key in ("name", "tokens", "owner")}
            ticket = replace(lease.ticket, run=record["run"])
            assert commit(ticket, f"{row['name']}.safetensors", Payload(parts, (old_row,))).sha256 == row["sha256"]
    store.remove(file)
    store.remove(f".swsc/done/{file}.json")


def test_hessians_whose_owner_was_never_written_are_gathered_again(
    tiny_model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of Q, which holds the shared Hessian of Q, K and V, is lost; the next run needs V alone."""
    flags = ["--preset", "fast", "--bits", "3", "--cache-dir", str(tmp_path / "cache"), "--projectors"]
    whole = KeepHessians.run

    def without_queries(self: KeepHessians, context: JobContext) -> Any:
        if "q_proj" in context.inputs[0].rows[0]["name"]:
            raise RuntimeError("the power went")
        return whole(self, context)

    with monkeypatch.context() as patch:
        patch.setattr(KeepHessians, "run", without_queries)
        patch.setattr(hessian_store, "_FILE_BYTES", 1)  # a file per matrix
        argv = [
            "compress",
            str(tiny_model),
            str(tmp_path / "cut"),
            "--local",
            "--calibration",
            str(calibration),
            *SHORT,
        ]
        assert main([*argv, *flags, "q,k,v"]) == 1
    compress(tiny_model, tmp_path / "out", calibration, *flags, "v")
    compress(tiny_model, tmp_path / "fresh", calibration, *flags[:4], "--projectors", "v")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_budget_alone_is_enough_and_is_kept(tiny_model: Path, best: Path) -> None:
    report = json.loads((best / "swsc_report.json").read_text())
    rows = [row for row in report["tensors"] if row["action"] == "compressed"]
    assert len(rows) == 21
    assert 3 * 0.98 <= report["compressed_bits_per_weight"] <= 3
    assert len({row["bits_per_weight"] for row in rows}) > 3  # not all matrices alike
    model = open_model(str(best))
    for row in rows:
        dense = open_model(str(tiny_model)).read(row["name"]).float()
        error = (dense - model.read(row["name"]).float()).square().sum() / dense.square().sum()
        assert float(error) == pytest.approx(row["relative_error"], rel=1e-4)


def test_a_budget_over_the_whole_model_counts_what_is_not_compressed(
    tiny_model: Path, calibration: Path, tmp_path: Path
) -> None:
    flags = ["--preset", "fast", "--bits", "5", "--bits-over", "model", "--projectors", ROLES]
    report = compress(tiny_model, tmp_path / "out", calibration, *flags)
    assert 5 * 0.98 <= report["whole_model_bits_per_weight"] <= 5


def test_measured_allocation_predicts_less_loss_than_a_uniform_one(
    tiny_model: Path, calibration: Path, tmp_path: Path
) -> None:
    losses = {}
    for allocation in ("measured", "uniform"):
        flags = ["--preset", "fast", "--bits", "3", "--projectors", ROLES, "--allocation", allocation]
        output = tmp_path / allocation
        report = compress(tiny_model, output, calibration, *flags)
        hessians = hessians_beside(output)
        losses[allocation] = sum(
            hessians.metric(row["name"], "cpu")[1] * row["stats"]["energy"]
            for row in report["tensors"]
            if row["action"] == "compressed"
        )
        assert report["compressed_bits_per_weight"] <= 3
    assert losses["measured"] < losses["uniform"]


def test_a_matrix_of_zeros_does_not_describe_the_others_of_its_kind(calibration: Path, tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "model", shards=False)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model.model.layers[1].self_attn.q_proj.weight.data.zero_()
    model.save_pretrained(path)
    report = compress(path, tmp_path / "out", calibration, "--preset", "fast", "--bits", "4", "--projectors", "q")
    errors = [row["relative_error"] for row in report["tensors"] if row["action"] == "compressed"]
    assert errors[1] == 0.0
    assert report["compressed_bits_per_weight"] > 3.5, "the others are worth what the budget buys"


def test_activations_beat_the_papers_form_at_equal_numbers_in_perplexity_of_the_metric(
    tiny_model: Path, calibration: Path, tmp_path: Path
) -> None:
    flags = ["--clusters", "12", "--rank", "4"]
    whitened = compress(tiny_model, tmp_path / "a", calibration, *flags, "--metric", "activations")
    assert main(["compress", str(tiny_model), str(tmp_path / "b"), "--local", *flags]) == 0
    hessians, plain = hessians_beside(tmp_path / "a"), open_model(str(tmp_path / "b"))
    for row in (row for row in whitened["tensors"] if row["action"] == "compressed"):
        dense = open_model(str(tiny_model)).read(row["name"]).float()
        paper = hessians.metric(row["name"], "cpu")[0].weighted_error(dense - plain.read(row["name"]).float())
        assert row["stats"]["energy"] < paper


def test_a_second_run_reuses_hessians_and_curves(
    tiny_model: Path, calibration: Path, best: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = str(best.parent / ".swsc-cache")
    flags = ["--preset", "best", "--projectors", ROLES, "--cache-dir", cache]
    compress(tiny_model, tmp_path / "same", calibration, *flags, "--bits", "3")
    compress(tiny_model, tmp_path / "other", calibration, *flags, "--bits", "2.5")
    progress = capsys.readouterr().err
    assert "calibrate" not in progress
    assert "curves" not in progress
    assert contents(tmp_path / "same").keys() == contents(best).keys()
    weights = {name: data for name, data in contents(best).items() if name.endswith(".safetensors")}
    assert weights.items() <= contents(tmp_path / "same").items()


def test_a_cache_outlives_a_new_version_of_the_output_format(
    tiny_model: Path, calibration: Path, best: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(preflight, "FORMAT_VERSION", 99)
    flags = ["--preset", "best", "--projectors", ROLES, "--cache-dir", str(best.parent / ".swsc-cache")]
    compress(tiny_model, tmp_path / "later", calibration, *flags, "--bits", "3")
    assert "calibrate" not in capsys.readouterr().err
    assert json.loads((tmp_path / "later" / "swsc_manifest.json").read_text())["identity"]["format_version"] == 99


def test_a_model_is_not_measured_on_what_it_was_calibrated_on(
    tiny_model: Path, calibration: Path, best: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(best), "--text", str(calibration), "--seqlen", "32", "--local"]) == 2
    assert "shares passages with the calibration text" in capsys.readouterr().err
    flags = ["--preset", "best", "--bits", "3", "--calibration", str(calibration), *SHORT]
    argv = ["compress", str(tiny_model), str(tmp_path / "out"), "--local", *flags, "--text", str(calibration)]
    assert main([*argv, "--seqlen", "32"]) == 2
    assert "shares passages with the calibration text" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_a_model_was_calibrated_on_is_known_of_all_that_is_made_of_it(
    tiny_model: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Restored, compressed again without a text, and on another text."""
    other = make_text(tmp_path / "other.txt", 1500, seed=78)
    fast = ["--preset", "fast", "--bits", "4"]
    compress(tiny_model, tmp_path / "first", calibration, *fast)
    assert main(["restore", str(tmp_path / "first"), str(tmp_path / "dense"), "--local"]) == 0
    dense = str(tmp_path / "dense")
    assert main(["compress", dense, str(tmp_path / "plain"), "--clusters", "4", "--rank", "1", "--local"]) == 0
    compress(tmp_path / "dense", tmp_path / "again", other, *fast)
    for made, text in (("dense", calibration), ("plain", calibration), ("again", calibration), ("again", other)):
        capsys.readouterr()
        assert main(["evaluate", str(tmp_path / made), "--text", str(text), "--seqlen", "32", "--local"]) == 2
        assert "shares passages with the calibration text" in capsys.readouterr().err


def test_an_error_of_a_text_that_is_too_short_counts_its_tokens(tiny_model: Path, calibration: Path) -> None:
    settings = CalibrationSettings(calibration=str(calibration), calibration_windows=100, calibration_seqlen=512)
    with pytest.raises(TextError, match=r"1500 tokens, .*100 windows of 512"):
        calibration_windows(str(tiny_model), settings)


def test_a_parquet_file_is_read_row_by_row(tiny_model: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [" ".join(WORDS[start : start + 50]) for start in range(0, 200, 50)]
    pq.write_table(pa.table({"text": [*rows[:2], None, *rows[2:]]}), tmp_path / "rows.parquet")
    settings = CalibrationSettings(
        calibration=str(tmp_path / "rows.parquet"), calibration_windows=2, calibration_seqlen=50
    )
    ids = calibration_windows(str(tiny_model), settings).ids
    assert ids.tolist() == [list(range(3, 53)), list(range(103, 153))]
    pq.write_table(pa.table({"body": rows, "title": rows}), tmp_path / "rows.parquet")
    with pytest.raises(TextError, match="no column 'text' among body, title"):
        calibration_windows(str(tiny_model), settings)
    pq.write_table(pa.table({"text": [[1, 2], []]}), tmp_path / "rows.parquet")
    with pytest.raises(TextError, match="its column 'text' holds values of type list, not text"):
        calibration_windows(str(tiny_model), settings)


def test_without_a_text_the_model_writes_one_and_keeps_it(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--local", *SHORT, "--preset", "data-free", "--bits", "3", "--cache-dir", str(tmp_path / "cache")]
    for name in ("one", "other"):
        assert main(["compress", str(tiny_model), str(tmp_path / name), *flags]) == 0
    assert capsys.readouterr().err.count("write text") == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    (written,) = (tmp_path / "cache").glob("written-*.json")
    ids = np.array(json.loads(written.read_text()))
    assert ids.shape == (6, 32)
    assert len(np.unique(ids)) > 50
    argv = ["compress", str(tiny_model), str(tmp_path / "x"), *flags, "--calibration", "text.txt"]
    assert main(argv) == 2
    assert "data-free" in capsys.readouterr().err


@pytest.fixture
def opened(tmp_path: Path) -> Path:
    """A tiny model whose tokenizer puts <s> (0) before a text and </s> (1) after it."""
    model = make_tiny_model(tmp_path / "opened")
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(model)
    return model


def test_windows_begin_as_texts_of_the_model_do(opened: Path, tiny_model: Path, calibration: Path) -> None:
    """Each of them, not the first alone; nothing of what comes after a text is in them."""
    settings = CalibrationSettings(calibration=str(calibration), calibration_windows=6, calibration_seqlen=32)
    plain, ids = (calibration_windows(str(model), settings).ids for model in (tiny_model, opened))
    assert ids.shape == plain.shape == (6, 32)
    assert (ids[:, 0] == 0).all()
    assert (ids[:, 1:] == plain[:, :-1]).all()


def test_a_model_begins_its_own_text_as_its_texts_do(opened: Path, tmp_path: Path) -> None:
    flags = ["--local", *SHORT, "--preset", "data-free", "--bits", "3", "--cache-dir", str(tmp_path / "cache")]
    assert main(["compress", str(opened), str(tmp_path / "out"), *flags]) == 0
    (written,) = (tmp_path / "cache").glob("written-*.json")
    ids = np.array(json.loads(written.read_text()))
    assert ids.shape == (6, 32)
    assert (ids[:, 0] == 0).all()
    assert len(np.unique(ids[:, 1:], axis=0)) == 6


def test_written_text_does_not_depend_on_how_it_is_cached(tiny_model: Path) -> None:
    """Each token is drawn from the prediction over all before it, as one forward pass over the whole gives it."""
    calibrator = Calibrator(ModelKey(str(tiny_model), "float32", 1), "cpu")
    ids = torch.from_numpy(calibrator.generate(3, 12, 0, seed=1, prefix=np.array([], dtype=np.int64)))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    chances = model(input_ids=ids).logits.softmax(-1)
    draw = torch.Generator().manual_seed(1 << 32)
    assert torch.equal(torch.randint(256, (3, 1), generator=draw)[:, 0], ids[:, 0])
    for place in range(11):
        assert torch.equal(torch.multinomial(chances[:, place], 1, generator=draw)[:, 0], ids[:, place + 1])
