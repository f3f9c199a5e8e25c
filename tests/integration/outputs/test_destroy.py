"""Nothing of the user's is ever destroyed: every verb that is to write into its input, by any path to it, refuses.

What is refused leaves the tree that is read as it was, to the byte. Here the place that is read is one that --overwrite
would clear: an output of this tool.
"""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import pipeline.verbs.demo
from jobs.cli import main
from pipeline.checkpoints.checkpoint import MANIFEST
from pipeline.storage import paths as places
from tests.support.tiny import make_text, make_tiny_model
from tests.support.tiny_gguf import make_tiny_gguf

SMALL = ("--projectors", "q,k", "--clusters", "8", "--rank", "2", "--local")
CALIBRATED = (
    "--preset", "best", "--tune", "0", "--projectors", "q", "--bits", "4", "--calibration-windows", "4",
    "--calibration-seqlen", "32", "--local",
)  # fmt: skip


def tree(folder: Path) -> dict[str, str]:
    """Every name below a folder -> what it is; links are not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = os.readlink(path) if path.is_symlink() else "folder"
        found[str(path.relative_to(folder))] = (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and not path.is_symlink() else kind
        )
    return found


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error, which is the last; notes may stand before it."""
    *notes, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert [note for note in notes if not note.startswith("note: ")] == []
    return line


@dataclass(frozen=True)
class Place:
    """A directory with `read/dense`, a dense output, and `read/out`, a compressed one with a text in it."""

    root: Path

    @property
    def read(self) -> Path:
        return self.root / "data" / "read"

    def __truediv__(self, name: str) -> Path:
        return self.root / name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("destroy")
    read = root / "data" / "read"
    make_tiny_model(root / "model", layers=1)
    assert main(["compress", str(root / "model"), str(read / "out"), *SMALL]) == 0
    assert main(["restore", str(read / "out"), str(read / "dense"), "--local"]) == 0
    (read / "gguf").mkdir()
    make_tiny_gguf(read / "gguf" / "tiny.gguf")
    (read / "out" / ".mine").mkdir()
    make_text(read / "out" / ".mine" / "t.txt", 3000)
    sweep = {"models": [str(read / "dense")], "variants": [{"name": "q", "projectors": "q", "bits": 4}]}
    sweep["evaluations"] = [{"text": str(root / "data" / "text.txt"), "seqlen": 32, "windows": 2}]
    make_text(root / "data" / "text.txt", 3000)
    (root / "data" / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Place:
    shutil.copytree(made / "data", tmp_path / "data")
    sweep = (made / "data" / "sweep.yaml").read_text().replace(str(made), str(tmp_path))
    (tmp_path / "data" / "sweep.yaml").write_text(sweep)
    (tmp_path / "mnt").symlink_to("data")
    return Place(tmp_path)


# The ways to name `read/NAME` otherwise: from the work place and the name to a path.
WAYS: dict[str, Callable[[Place, str], str]] = {
    "itself": lambda place, name: f"{place.read}/{name}",
    "a trailing slash": lambda place, name: f"{place.read}/{name}/",
    "a link": lambda place, name: _link(place / "link", place.read / name),
    "a link to a link": lambda place, name: _link(place / "far", Path(_link(place / "near", place.read / name))),
    "a linked parent": lambda place, name: f"{place / 'mnt'}/read/{name}",
    "two dots": lambda place, name: f"{place.read}/../read/{name}",
    "two dots behind a link": lambda place, name: f"{_link(place / 'up', place.read / name)}/../{name}",
    "a relative path": lambda place, name: os.path.relpath(place.read / name),
    "an address": lambda place, name: f"file://{place.read}/{name}",
    "inside it": lambda place, name: f"{place.read}/{name}/new",
    "inside it by a link": lambda place, name: f"{_link(place / 'link', place.read / name)}/new/deeper",
    "what holds it": lambda place, name: f"{place.read}",
    "what holds it by a link": lambda place, name: f"{place / 'mnt'}/read/",
}


def _link(path: Path, target: Path) -> str:
    path.symlink_to(target)
    return str(path)


# verb -> (what is read, its arguments when it is to write to a path)
VERBS: dict[str, tuple[str, Callable[[Place, str], list[str]]]] = {
    "compress": ("dense", lambda p, there: ["compress", f"{p.read}/dense", there, *SMALL, "--overwrite"]),
    "compress, by a link": ("dense",
    lambda p, there: ["compress", f"{p / 'mnt'}/read/dense", there, *SMALL, "--overwrite"]),
    "restore": ("out", lambda p, there: ["restore", f"{p.read}/out", there, "--local", "--overwrite"]),
    "restore --adapter": (
        "out", lambda p, there: ["restore", f"{p.read}/out", there, "--local", "--overwrite", "--adapter"]
    ),
    "convert": ("gguf", lambda p, there: ["convert", f"{p.read}/gguf/tiny.gguf", there]),
    "compress a GGUF file": (
        "gguf", lambda p, there: ["compress", f"{p.read}/gguf/tiny.gguf", there, *SMALL, "--overwrite"]
    ),
    "sweep": ("dense", lambda p, there: ["sweep", f"{p / 'data/sweep.yaml'}", "--out", there, "--local"]),
}  # fmt: skip


def _is_wrong(verb: str, way: str) -> bool:
    """Beside a GGUF file there is room for an output; convert takes no addresses."""
    return not ("gguf" in VERBS[verb][0] and way.startswith("inside")) and (verb, way) != ("convert", "an address")


@pytest.mark.parametrize(("verb", "way"), [(verb, way) for verb in VERBS for way in WAYS if _is_wrong(verb, way)])
def test_a_directory_that_is_read_is_not_written_to(
    place: Place, capsys: pytest.CaptureFixture[str], verb: str, way: str
) -> None:
    name, argv = VERBS[verb]
    there = WAYS[way](place, name)
    before = tree(place.root)
    assert main(argv(place, there)) == 2
    error_of(capsys)
    assert tree(place.root) == before


# what a verb writes beside its output, or reads beside its model, and the arguments when it is to write to `there`
BESIDE: dict[str, tuple[str, Callable[[Place, str], list[str]]]] = {
    "cache inside the model": (
        "dense", lambda p, there: ["compress", f"{p.read}/dense", f"{p / 'new'}", *CALIBRATED, "--cache-dir", there,
                                   "--calibration", f"{p / 'data/text.txt'}"],
    ),
    "cache inside the output": (
        "out", lambda p, there: ["compress", f"{p.read}/dense", f"{p.read}/out", *CALIBRATED, "--cache-dir", there,
                                 "--overwrite", "--calibration", f"{p / 'data/text.txt'}"],
    ),
    "result of a measurement": (
        "dense", lambda p, there: ["evaluate", f"{p.read}/dense", "--text", f"{p / 'data/text.txt'}", "--seqlen", "32",
                                   "--local", "--json", f"{there}/config.json"],
    ),
    "plan": ("dense", lambda p, there: ["plan", f"{p.read}/dense", "--local", "--json", f"{there}/config.json"]),
    "text": ("out",
    lambda p, there: ["compress", f"{p / 'data/read/dense'}", f"{p.read}/out", *SMALL, "--overwrite", "--text",
                                      f"{there}/.mine/t.txt", "--seqlen", "32"]),
    "calibration": ("out", lambda p, there: ["compress", f"{p.read}/dense", f"{p.read}/out", *CALIBRATED, "--overwrite",
                                             "--calibration", f"{there}/.mine/t.txt"]),
    "sweep's cache": (
        "dense", lambda p, there: ["sweep", _sweep_with(p, cache_dir=there), "--out", f"{p / 'new'}", "--local"],
    ),
    "sweep's text": ("out", lambda p, there: ["sweep", f"{p / 'data/sweep.yaml'}", "--out", f"{p.read}/out", "--local",
                                              "--text", f"{there}/.mine/t.txt"]),
}  # fmt: skip


def _sweep_with(place: Place, **more: str) -> str:
    file = place / "data/sweep.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | more))
    return str(file)


@pytest.mark.parametrize("way", [way for way in WAYS if not way.startswith(("inside", "what holds"))])
@pytest.mark.parametrize("what", BESIDE)
def test_nor_is_anything_beside_it(place: Place, capsys: pytest.CaptureFixture[str], what: str, way: str) -> None:
    name, argv = BESIDE[what]
    there = WAYS[way](place, name)
    arguments = argv(place, there)
    before = tree(place.root)
    assert main(arguments) == 2
    line = error_of(capsys)
    assert "inside" in line or "same directory" in line
    assert tree(place.root) == before


@pytest.fixture
def bound(place: Place) -> Iterator[Place]:
    """`whole` and `part` are `data/read/dense` and `data/read` by bind mounts."""
    done = []
    try:
        for source, name in [("dense", "whole"), ("", "part")]:
            (place / name).mkdir()
            if subprocess.run(["mount", "--bind", place.read / source, place / name], capture_output=True).returncode:
                pytest.skip("bind mounts need rights that are not given here; see the unit tests")
            done.append(place / name)
        yield place
    finally:
        for point in done:
            subprocess.run(["umount", point], check=True)


@pytest.mark.parametrize("there", ["whole", "part/dense", "part", "whole/new"])
def test_bind_mounts_are_seen_through(bound: Place, there: str) -> None:
    before = tree(bound.read)
    assert main(["compress", f"{bound.read}/dense", str(bound / there), *SMALL, "--overwrite"]) == 2
    assert main(["compress", str(bound / "whole"), f"{bound.read}/dense/../dense", *SMALL, "--overwrite"]) == 2
    assert tree(bound.read) == before


@pytest.mark.parametrize("verb", ["compress", "restore"])
def test_one_place_by_paths_of_which_nobody_knows_shows_before_anything_is_removed(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """A bucket under two names, a network disk that is mounted twice.

    What is written to the one appears in the other.
    """
    monkeypatch.setattr(places, "contains", lambda outer, inner: False)
    name, argv = VERBS[verb]
    before = tree(place.root)
    assert main(argv(place, f"{place.read}/{name}")) == 2
    assert "under another path" in capsys.readouterr().err
    assert tree(place.root) == before


def test_the_demo_writes_to_nothing_that_it_reads(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.verbs.demo, "fetch_model", lambda out: place.read / "dense")
    monkeypatch.setattr(pipeline.verbs.demo, "fetch_text", lambda out: place / "data/text.txt")
    (place / "demo").mkdir()
    (place / "demo" / "smollm2-swsc").symlink_to(place / "mnt/read/dense")
    before = tree(place.root)
    assert main(["demo", "--out", str(place / "demo"), "--local"]) == 2
    assert tree(place.root) == before


class TestLinksInAnOutput:
    """They are never followed: not by what replaces, not by what verifies, not by what pushes."""

    @pytest.mark.parametrize("name", [".swsc", ".swsc/done", "swsc_adapter"])
    def test_a_folder_of_ours_that_is_a_link_is_refused(self, place: Place, name: str) -> None:
        out = place.read / "out"
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).symlink_to(place.read / "dense")
        before = tree(place.root)
        assert main(["compress", f"{place.read}/dense", str(out), *SMALL, "--overwrite", "--bits", "3"]) == 2
        assert tree(place.root) == before

    @pytest.mark.parametrize("target", ["nowhere", "data/text.txt"])
    def test_an_output_that_is_a_link_to_no_directory_is_refused_before_work(self, place: Place, target: str) -> None:
        (place / "link").symlink_to(target)
        before = tree(place.root)
        calibration = ("--calibration", str(place / "data/text.txt"))
        for there in ("link", "link/new"):
            assert main(["compress", f"{place.read}/dense", str(place / there), *CALIBRATED, *calibration]) == 2
            assert main(["restore", f"{place.read}/out", str(place / there), "--local"]) == 2
            assert main(["convert", f"{place.read}/gguf/tiny.gguf", str(place / there)]) == 2
            assert main(["sweep", str(place / "data/sweep.yaml"), "--out", str(place / there), "--local"]) == 2
        assert tree(place.root) == before

    def test_a_link_of_the_user_as_the_output_is_used(self, place: Place, tmp_path: Path) -> None:
        (place / "disk").mkdir()
        (place / "link").symlink_to("disk")
        assert main(["compress", f"{place.read}/dense", str(place / "link"), *SMALL]) == 0
        assert main(["convert", f"{place.read}/gguf/tiny.gguf", f"{_link(place / 'to', place / 'disk2')}"]) == 2
        assert (place / "disk" / MANIFEST).is_file()
        assert (place / "link").is_symlink()

    def test_a_linked_file_is_replaced_and_what_it_leads_to_stays(self, place: Place) -> None:
        out, kept = place.read / "out", place / "kept.json"
        kept.write_bytes((out / "config.json").read_bytes())
        (out / "config.json").unlink()
        (out / "config.json").symlink_to(kept)
        before = kept.read_bytes()
        assert main(["compress", f"{place.read}/dense", str(out), *SMALL, "--overwrite"]) == 0
        assert kept.read_bytes() == before
        assert not (out / "config.json").is_symlink()

    @pytest.mark.parametrize("name", ["secret.txt", "folder/secret.txt", "config.json", "swsc_report.json", MANIFEST])
    def test_verify_reports_one(self, place: Place, capsys: pytest.CaptureFixture[str], name: str) -> None:
        """Even if a manifest lists it with the hash of what it leads to."""
        out, secret = place.read / "out", place / "secret"
        secret.mkdir()
        file = secret / os.path.basename(name)
        file.write_bytes((out / name).read_bytes() if (out / name).exists() else b"secret")
        manifest = json.loads((out / MANIFEST).read_text())
        if name != MANIFEST:
            manifest["files"][name] = {
                "size": file.stat().st_size,
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            }
        (out / MANIFEST).write_text(json.dumps(manifest))
        if "/" in name:
            (out / "folder").symlink_to(secret)
        else:
            (out / name).unlink(missing_ok=True)
            (out / name).symlink_to(file)
        assert main(["verify", str(out), "--local"]) == 1
        assert f"{name} is a link" in capsys.readouterr().err

    def test_verify_reports_one_that_no_manifest_lists(self, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
        (place.read / "out" / "more").symlink_to(place.read / "dense")
        assert main(["verify", f"{place.read}/out", "--local"]) == 1
        assert "more is a link" in capsys.readouterr().err


class TestOverwrite:
    """It removes what a manifest or a run's own records list, and nothing else."""

    def again(self, place: Place, *more: str) -> int:
        arguments = ["--projectors", "q", "--clusters", "4", "--rank", "1", "--local", "--overwrite"]
        return main(["compress", f"{place.read}/dense", f"{place.read}/out", *arguments, *more])

    MINE = ("model-00077-of-00099.safetensors", "thesis.partial", "notes.txt", "swsc_adapter/mine.json", "sub/x.json")

    @pytest.mark.parametrize("ended", [True, False])
    def test_files_of_the_user_stay_even_if_they_are_called_as_ours_are(self, place: Place, ended: bool) -> None:
        out = place.read / "out"
        for name in self.MINE:
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text(name)
        if not ended:  # what is replaced is a run that was cut off
            identity = json.loads((out / MANIFEST).read_text())["identity"]
            (out / ".swsc").mkdir()
            (out / ".swsc" / "run.json").write_text(json.dumps(identity))
            names = [*json.loads((out / MANIFEST).read_text())["files"], "swsc_report.json"]
            (out / ".swsc" / "files.json").write_text(json.dumps(names))
            (out / MANIFEST).unlink()
        assert self.again(place) == 0
        assert [name for name in self.MINE if (out / name).read_text() != name] == []

    def test_a_file_of_the_user_in_the_place_of_an_output_file_is_an_error_before_work(
        self, place: Place, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("notes.txt", "tool/vocab.json"):
            (place.read / "dense" / name).parent.mkdir(exist_ok=True)
            (place.read / "dense" / name).write_text("the model's")
            (place.read / "out" / name).parent.mkdir(exist_ok=True)
            (place.read / "out" / name).write_text("three years of work")
            before = tree(place.root)
            assert self.again(place) == 2
            assert f"{name} exists" in capsys.readouterr().err
            assert tree(place.root) == before
            (place.read / "out" / name).unlink()

    @pytest.mark.parametrize("name", ["model.safetensors", "adapter_config.json"])
    def test_a_file_that_would_be_opened_in_place_of_the_output_is_an_error_before_work(
        self, place: Place, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        """`save_pretrained` into an output leaves one, which outlives --overwrite.

        It is the user's, and was read instead.
        """
        (place.read / "out" / name).write_bytes(b"{}")
        before = tree(place.root)
        assert self.again(place) == 2
        assert f"{name} is not a file of this output" in capsys.readouterr().err
        assert main(["verify", str(place.read / "out"), "--local"]) == 1
        assert "--overwrite" not in capsys.readouterr().err  # which would leave it where it is
        assert tree(place.root) == before
        (place.read / "out" / name).unlink()
        assert self.again(place) == 0

    def test_hard_links_are_not_written_through(self, place: Place) -> None:
        """An output that was copied by `cp -al`: its files are those of the source."""
        twin = place.read / "twin"
        shutil.copytree(place.read / "out", twin, copy_function=os.link)
        before = tree(place.read / "out")
        assert main(["restore", f"{place.read}/out", str(twin), "--local", "--overwrite"]) == 0
        assert tree(place.read / "out") == before

    def test_an_old_output_stays_where_there_is_no_room_for_the_new_one(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.storage.local_files.LocalFiles.free_bytes", lambda self, path: 0)
        before = tree(place.root)
        assert main(["restore", f"{place.read}/dense/../out", str(place.read / "dense"), "--local", "--overwrite"]) in (
            0,
            2,
        )
        (place.read / "other").mkdir()
        assert main(["restore", f"{place.read}/out", str(place.read / "other"), "--local"]) == 2
        (place.read / "other").rmdir()
        assert tree(place.root) == before


class TestNames:
    """What cannot be written at the end is refused at the beginning."""

    @pytest.mark.parametrize(
        "name", [b"\xff\xfe.txt", b"a\nb.txt", b"bell\x07.json", b"back\\slash.txt", b"n" * 250, b"sub/\xff.json"]
    )
    @pytest.mark.parametrize("verb", ["compress", "restore"])
    def test_of_a_file(self, place: Place, capsys: pytest.CaptureFixture[str], verb: str, name: bytes) -> None:
        source = place.read / ("dense" if verb == "compress" else "out")
        file = os.path.join(os.fsencode(source), name)
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(file, "w") as opened:
            opened.write("{}")
        argv = ["compress", str(source), str(place / "new"), *SMALL]
        assert main(argv if verb == "compress" else ["restore", str(source), str(place / "new"), "--local"]) == 2
        line = error_of(capsys)
        assert str(source) in line
        assert "file name" in line
        assert not (place / "new").exists()

    @pytest.mark.parametrize("name", ["model.half\ud800", "model.line\nfeed"])
    def test_of_a_tensor(self, place: Place, capsys: pytest.CaptureFixture[str], name: str) -> None:
        header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
        raw = json.dumps(header).encode()
        model = place.read / "dense"
        (model / "extra.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
        index = json.loads((model / "model.safetensors.index.json").read_text())
        index["weight_map"][name] = "extra.safetensors"
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        assert main(["compress", str(model), str(place / "new"), *SMALL]) == 2
        line = error_of(capsys)
        assert "tensor" in line
        assert not (place / "new").exists()

    def test_of_a_value_in_the_config(self, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
        config = place.read / "dense" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"made_by": "half \ud800"}))
        assert main(["compress", f"{place.read}/dense", str(place / "new"), *SMALL]) == 2
        assert "config.json" in capsys.readouterr().err
        assert not (place / "new").exists()

    def test_of_an_output_whose_path_leaves_no_room(self, place: Place) -> None:
        there = str(place / "/".join(["n" * 200] * 20))
        assert main(["compress", f"{place.read}/dense", there, *SMALL]) == 2
        assert not (place / ("n" * 200)).exists()


class TestJson:
    """The file of --json."""

    def plan(self, place: Place, there: str) -> int:
        return main(["plan", f"{place.read}/dense", "--local", "--json", there])

    def test_a_link_is_written_through_as_any_tool_does_it(self, place: Place) -> None:
        link = _link(place / "latest.json", place / "1.json")
        assert self.plan(place, link) == 0
        assert json.loads((place / "1.json").read_text())["tensors"]
        assert Path(link).is_symlink()

    def test_what_is_no_file_is_not_replaced(self, place: Place) -> None:
        os.mkfifo(place / "pipe")
        for there in ("pipe", "data"):
            assert self.plan(place, str(place / there)) == 2
        assert (place / "pipe").is_fifo()

    def test_an_open_pipe_is_refused_before_any_work(self, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
        """/dev/stdout of a shell's pipe is a link to what is no name of any file."""
        ends = os.pipe()
        try:
            assert self.plan(place, f"/proc/self/fd/{ends[1]}") == 2
        finally:
            list(map(os.close, ends))
        assert "not a regular file" in error_of(capsys)

    def test_the_result_that_is_compared_with_is_not_replaced(self, place: Place) -> None:
        (place / "base.json").write_text('{"perplexity": 3.0}')
        link = _link(place / "again.json", place / "base.json")
        arguments = ["--text", str(place / "data/text.txt"), "--seqlen", "32", "--local", "--card"]
        results = ["--uncompressed", str(place / "base.json"), "--json", link]
        assert main(["evaluate", f"{place.read}/out", *arguments, *results]) == 2
        assert (place / "base.json").read_text() == '{"perplexity": 3.0}'


def test_an_empty_path_is_not_the_current_directory(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """`swsc compress MODEL "$OUT" --overwrite` where OUT is not set."""
    monkeypatch.chdir(place.read / "out")
    before = tree(place.root)
    assert main(["compress", f"{place.read}/dense", "", *SMALL, "--overwrite"]) == 2
    assert main(["restore", f"{place.read}/out", "", "--local", "--overwrite"]) == 2
    assert main(["sweep", str(place / "data/sweep.yaml"), "--out", "", "--local"]) == 2
    assert tree(place.root) == before


def test_convert_leaves_a_directory_alone_that_is_called_as_its_own_unfinished_one(place: Place) -> None:
    (place / "new.partial" / "whole").mkdir(parents=True)
    (place / "new.partial" / "whole" / "thesis.tex").write_text("three years of work")
    before = tree(place.root)
    assert main(["convert", f"{place.read}/gguf/tiny.gguf", str(place / "new")]) == 2
    assert tree(place.root) == before
