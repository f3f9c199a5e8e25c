"""`--verify-source` holds for every reading of the source: what calibration, tuning and evaluation load included."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import transformers as t

from jobs.cli import main
from pipeline.checkpoints.checkpoint import MANIFEST
from pipeline.checkpoints.integrity.digests import file_digests
from pipeline.checkpoints.integrity.source_digests import SourceDigests, digests_of_source, with_verified_digests
from pipeline.checkpoints.source import open_checkpoint
from pipeline.errors import StoreError
from pipeline.models import loading
from pipeline.models.loading import ModelKey, load_model
from pipeline.models.stored_model import open_model
from pipeline.storage import object_stores as object_files
from pipeline.storage.local_files import LocalFiles
from pipeline.variants import compress as flow
from tests.support.families import MODELS
from tests.support.fault_proxy import FaultProxy
from tests.support.object_store import BUCKET, as_client, object_store, upload
from tests.support.offline_tasks import make_tasks
from tests.support.tiny import contents, make_text, make_tiny_model, save_tokenizer

SHORT = ["--local", "--calibration-windows", "8", "--calibration-seqlen", "32"]
FAST = [*SHORT, "--preset", "fast", "--bits", "4"]  # Hessians, and curves by which bits are allocated


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its hashes and a text."""
    folder = tmp_path_factory.mktemp("local")
    make_tiny_model(folder / "tiny", layers=2)
    lines = [
        f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in (folder / "tiny").glob("*.safetensors")
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))
    make_text(folder / "text", 600, seed=5)
    return folder


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultProxy]:
    """Of a store from which each byte is read once."""
    with object_store(tmp_path_factory.mktemp("s3")) as server, mock.patch.dict("os.environ", SWSC_READ_ONCE="1"):
        proxy = FaultProxy(server.ports["s3"])
        environment = {**server.environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
        there = dataclasses.replace(server, environment=environment)
        with mock.patch.object(object_files, "_ATTEMPTS", 2), as_client(there, alone=True):
            yield proxy
        proxy.close()


@pytest.fixture(scope="module")
def remote(local: Path, proxy: FaultProxy) -> str:
    return upload(local / "tiny", f"{BUCKET}/tiny")


def calibrated(source: str, local: Path, output: Path, *flags: str) -> list[str]:
    return [
        "compress",
        source,
        str(output),
        "--calibration",
        str(local / "text"),
        *(flags or FAST),
    ]


def known(local: Path) -> list[str]:
    return ["--verify-source", str(local / "SHA256SUMS")]


@contextmanager
def flipping(proxy: FaultProxy, location: str, which: int, times: int) -> Iterator[None]:
    """One bit of a block flips `times` times, from the `which`-th loading of a model (counted from 0) on."""
    real, count = loading._load, iter(range(1 << 30))

    def load(source: Any, key: ModelKey, *how: Any) -> Any:
        spoils = key.location == location and next(count) >= which and proxy.spoiled < times
        proxy.mode, proxy.times, proxy.after = "flip" if spoils else "", times, 0
        try:
            return real(source, key, *how)
        finally:
            proxy.mode = ""

    proxy.strike("")
    with mock.patch.object(loading, "_load", load):
        yield


# loadings of the source: by the calibration, then by the tuning as the teacher
@pytest.mark.parametrize(("which", "flags"), [(0, FAST), (1, [*FAST, "--tune", "1"])])
def test_a_bit_that_flips_in_what_is_loaded_only_is_read_again_and_one_that_stays_ends_the_run(
    which: int, flags: list[str], remote: str, local: Path, proxy: FaultProxy, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def run(name: str) -> int:
        return main([*calibrated(remote, local, tmp_path / name / "out", *flags), *known(local)])

    assert run("right") == 0
    with flipping(proxy, remote, which, 1):
        assert run("once") == 0
    assert proxy.spoiled == 1
    assert contents(tmp_path / "once/out") == contents(tmp_path / "right/out")
    with flipping(proxy, remote, which, 1 << 30):
        assert run("stays") == 1
    assert proxy.spoiled
    assert "do not match the known sha256" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "stays/out" / MANIFEST).exists()


def test_evaluation_of_a_verified_model_reads_nothing_else(
    remote: str, local: Path, proxy: FaultProxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, *flags: str) -> int:
        argv = ["evaluate", remote, "--text", str(local / "text"), "--seqlen", "64", "--windows", "2", "--local"]
        return main([*argv, "--json", str(tmp_path / name), *flags])

    def losses(name: str) -> list[float]:
        return json.loads((tmp_path / name).read_text())["nll_per_window"]

    assert run("right", *known(local)) == 0
    with flipping(proxy, remote, 0, 1):
        assert run("unverified") == 0
    with flipping(proxy, remote, 0, 1):
        assert run("once", *known(local)) == 0
    assert proxy.spoiled == 1
    assert losses("once") == losses("right") != losses("unverified")
    with flipping(proxy, remote, 0, 1 << 30):
        assert run("stays", *known(local)) == 1
    assert "do not match the known sha256" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "stays").exists()


def spoiled_hessians(location: str) -> AbstractContextManager[Any]:
    """Calibrations of a model of which one value is another one."""
    real = loading._load

    def load(source: Any, key: ModelKey, *how: Any) -> Any:
        model, info = real(source, key, *how)
        if key.location == location:
            model.get_input_embeddings().weight.data[5] += 1.0
        return model, info

    return mock.patch.object(loading, "_load", load)


def test_hessians_of_other_bytes_and_results_based_on_them_are_not_used_once_the_bytes_are_known(
    local: Path, tmp_path: Path
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    source, out = str(local / "tiny"), tmp_path / "run/out"
    assert main(calibrated(source, local, tmp_path / "right/out")) == 0
    with spoiled_hessians(source), mock.patch.object(flow, "finish", interrupted):
        assert main(calibrated(source, local, out)) == 130  # all files are there, but for the manifest
    shutil.copytree(tmp_path / "run", tmp_path / "control")
    assert main(calibrated(source, local, tmp_path / "control/out")) == 0
    assert contents(tmp_path / "control/out") != contents(tmp_path / "right/out")
    assert main([*calibrated(source, local, out), *known(local)]) == 0
    assert contents(out) == contents(tmp_path / "right/out")


def test_an_output_that_is_complete_must_have_been_made_of_the_known_bytes(
    local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(local / "tiny")
    plain = ["compress", source, str(tmp_path / "plain"), "--bits", "4", "--local"]
    assert main(plain) == 0
    assert main([*plain, *known(local)]) == 0
    report = json.loads((tmp_path / "plain/swsc_report.json").read_text())
    row = next(row for row in report["tensors"] if row["action"] == "compressed")
    row["source_sha256"] = dict.fromkeys(row["source_sha256"], "0" * 64)
    (tmp_path / "plain/swsc_report.json").write_text(json.dumps(report))
    assert main([*plain, *known(local)]) == 2
    assert str(tmp_path / "plain") in capsys.readouterr().err.splitlines()[-1]
    argv = calibrated(source, local, tmp_path / "out")
    assert main(argv) == 0
    assert main([*argv, *known(local)]) == 2
    assert main([*calibrated(source, local, tmp_path / "other"), *known(local)]) == 0
    assert main([*calibrated(source, local, tmp_path / "other"), *known(local)]) == 0
    assert contents(tmp_path / "other") == contents(tmp_path / "out")


def test_a_dense_output_that_is_damaged_is_not_loaded(
    local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, name = tmp_path / "dense", "model.layers.0.mlp.up_proj.weight"
    assert main(["compress", str(local / "tiny"), str(out), "--bits", "4", "--format", "dense", "--local"]) == 0
    spoil(out, name)
    assert main(["evaluate", str(out), "--text", str(local / "text"), "--seqlen", "64", "--local"]) == 1
    assert name in capsys.readouterr().err.splitlines()[-1]


def spoil(model: Path, name: str) -> None:
    """Change one bit of a tensor."""
    info = open_checkpoint(str(model)).tensors[name]
    data = bytearray((model / info.file).read_bytes())
    data[info.start + 9] ^= 8
    (model / info.file).write_bytes(data)


def digests(model: Path) -> SourceDigests:
    """Digests of the files of a model."""
    source = open_checkpoint(str(model))
    infos = {info.name: info for own in source.tensors.values() for info in own.stored}
    found: dict[str, tuple[str, ...]] = {}
    for file in source.files:
        found.update(file_digests(source.store, file, [i for i in infos.values() if i.file == file]).tensors)
    known = digests_of_source(with_verified_digests(source, found))
    assert known
    return known


@pytest.mark.parametrize("family", ["llama 3", "gpt2", "mixtral", "qwen2_moe"])
def test_no_tensor_of_any_layout_is_loaded_as_other_bytes(family: str, tmp_path: Path) -> None:
    t.set_seed(0)
    MODELS[family]().save_pretrained(tmp_path)
    key = ModelKey(str(tmp_path), "float32", 1, known=digests(tmp_path))
    assert load_model(open_model(key.location, key.known), key, "cpu")
    names = list(open_checkpoint(key.location).tensors)
    for name in (names[0], names[len(names) // 2], names[-1]):
        spoil(tmp_path, name)
        with pytest.raises(StoreError):
            load_model(open_model(key.location, key.known), key, "cpu")
        spoil(tmp_path, name)


def test_a_config_or_a_tokenizer_that_is_read_as_others_is_refused(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "tiny", layers=1)
    known = digests(tmp_path / "tiny")
    config = json.loads((tmp_path / "tiny/config.json").read_text())
    (tmp_path / "tiny/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(StoreError):
        open_model(str(tmp_path / "tiny"), known)
    make_tiny_model(tmp_path / "tiny", layers=1)
    assert open_model(str(tmp_path / "tiny"), known)
    save_tokenizer(tmp_path / "tiny")
    (tmp_path / "tiny/tokenizer.json").write_text((tmp_path / "tiny/tokenizer.json").read_text().replace("w7", "w8", 1))
    with pytest.raises(StoreError):
        open_model(str(tmp_path / "tiny"), known)


@contextmanager
def misread(model: Path, name: str) -> Iterator[None]:
    """Whoever loads the whole model reads one bit of a tensor wrong."""
    info, real_load, real_read, under_way = (
        open_checkpoint(str(model)).tensors[name],
        loading._load,
        LocalFiles.read,
        [],
    )

    def load(*how: Any) -> Any:
        under_way.append(True)
        try:
            return real_load(*how)
        finally:
            under_way.pop()

    def read(self: LocalFiles, path: str, start: int, length: int) -> bytearray:
        data = real_read(self, path, start, length)
        if under_way and Path(path) == model / info.file and start == info.start:
            data[6] ^= 4
        return data

    with mock.patch.object(loading, "_load", load), mock.patch.object(LocalFiles, "read", read):
        yield


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight"])
def test_a_calibration_that_has_read_other_bytes_than_the_compression_ends_the_run_without_known_hashes_too(
    name: str, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = calibrated(str(local / "tiny"), local, tmp_path / "run/out")
    with misread(local / "tiny", name):
        assert main(argv) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    (hessians,) = (tmp_path / "run/.swsc-cache").glob("moments-*")
    assert open_checkpoint(str(local / "tiny")).tensors[name].file in error
    assert str(hessians) in error
    assert not (tmp_path / "run/out" / MANIFEST).exists()
    assert main(argv) == 1  # the Hessians are still there
    shutil.rmtree(hessians)
    assert main(argv) == 0
    assert main(calibrated(str(local / "tiny"), local, tmp_path / "right/out")) == 0
    assert contents(tmp_path / "run/out") == contents(tmp_path / "right/out")


def test_workers_that_load_other_bytes_than_those_before_them_gather_nothing(
    local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(local / "tiny")
    more = calibrated(source, local, tmp_path / "more", *FAST, "--projectors", "q,k,v")
    assert main(calibrated(source, local, tmp_path / "some", *FAST, "--projectors", "q,k")) == 0
    with misread(local / "tiny", "model.embed_tokens.weight"):
        assert main(more) == 1
    assert "moments" in capsys.readouterr().err.splitlines()[-1]
    assert main(more) == 0


@pytest.mark.parametrize("content", ["{}", '{"ranges": {"a": "beef"}}', "{"])
def test_a_damaged_record_of_the_source_of_hessians_is_one_error_line(
    content: str, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = calibrated(str(local / "tiny"), local, tmp_path / "out")
    assert main([*argv, "--cache-dir", str(tmp_path / "cache")]) == 0
    (hessians,) = (tmp_path / "cache").glob("moments-*")
    (hessians / "source.json").write_text(content)
    again = calibrated(str(local / "tiny"), local, tmp_path / "again")
    assert main([*again, "--cache-dir", str(tmp_path / "cache")]) == 2
    assert str(hessians / "source.json") in capsys.readouterr().err.splitlines()[-1]


def test_tasks_of_a_verified_model_are_answered_by_no_other(
    local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    make_tasks(tmp_path / "tasks")
    argv = ["evaluate", str(local / "tiny"), "--tasks", "tiny_choice", "--include-path", str(tmp_path / "tasks")]
    argv += ["--limit", "2", "--local", *known(local)]
    assert main(argv) == 0
    with misread(local / "tiny", "model.embed_tokens.weight"):
        assert main(argv) == 1
    assert "model.embed_tokens.weight" in capsys.readouterr().err.splitlines()[-1]
