"""The model card of an output: its content, its identity for equal runs, and what an evaluation adds."""

import json
import re
import shlex
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from jobs.cli import main
from pipeline.checkpoints.checkpoint import MANIFEST, read_header
from pipeline.errors import OutputError, SwscError
from pipeline.outputs.atomic_edit import edit_file
from pipeline.outputs.card_content import add_evaluation, require_card
from pipeline.storage import lease, store
from pipeline.storage.store import Store
from tests.support.commands import compress
from tests.support.faults import FaultyFiles
from tests.support.tiny import contents, make_text

OF_THE_SOURCE = """---
license: other
license_name: tiny-community
license_link: LICENSE
language:
- no
- en
pipeline_tag: text-generation
tags:
- pretty
model-index:
- name: tiny
  results:
  - task: {type: text-generation}
    dataset: {name: D, type: d}
    metrics: [{type: perplexity, value: 1.5}]
---
# Tiny

Is tiny, and has a perplexity of 1.5.
"""


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a card and a licence of its own."""
    path = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("carded") / "model"))
    (path / "README.md").write_text(OF_THE_SOURCE)
    (path / "LICENSE").write_text("Be kind.")
    return path


def front_matter(output: Path) -> dict[str, Any]:
    return ModelCard.load(output / "README.md").data.to_dict()


def stored_bytes(output: Path) -> int:
    names = [path.name for path in output.glob("*.safetensors")]
    return sum(info.nbytes for name in names for info in read_header(Store.at(str(output)), name)[1])


def changed(model: Path, target: Path, card: str | None = None, **config: str) -> Path:
    """A copy of the model with another card, or none, and more in its config."""
    shutil.copytree(model, target)
    if card is None:
        (target / "README.md").unlink()
    else:
        (target / "README.md").write_text(card)
    file = target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return target


class TestWhatItSays:
    def test_licence_language_and_task_are_carried_over_and_nothing_that_was_measured(self, made: Path) -> None:
        assert front_matter(made) == {
            "license": "other", "license_name": "tiny-community", "license_link": "LICENSE", "language": ["no", "en"],
            "pipeline_tag": "text-generation", "library_name": "transformers", "tags": ["swsc", "compressed"],
        }  # fmt: skip
        assert (made / "LICENSE").read_text() == "Be kind."
        assert "1.5" not in (made / "README.md").read_text()

    def test_the_card_of_the_source_is_kept_whole_and_linked(self, made: Path) -> None:
        assert (made / "BASE_MODEL_CARD.md").read_text() == OF_THE_SOURCE
        assert "(BASE_MODEL_CARD.md)" in (made / "README.md").read_text()

    @pytest.mark.parametrize("form", ["swsc", "dense"])
    def test_its_figures_are_those_of_the_report_and_of_the_files(self, model: Path, tmp_path: Path, form: str) -> None:
        assert compress(model, tmp_path / "out", "--format", form) == 0
        card = (tmp_path / "out" / "README.md").read_text()
        report = json.loads((tmp_path / "out" / "swsc_report.json").read_text())
        bits = report["compressed_bits_per_weight"], report["whole_model_bits_per_weight"]
        assert f"{bits[0]:.3f} over the compressed matrices, {bits[1]:.3f} over the whole model" in card
        assert f"- {report['share_of_weights_compressed']:.1%} of " in card
        assert f"{stored_bytes(model):,} bytes before, {stored_bytes(tmp_path / 'out'):,} here" in card
        kinds = re.findall(r"`model\.layers\.N\.self_attn\.([qk])_proj\.weight` \| (\d+) \| (\d+) × (\d+)", card)
        assert kinds == [("k", "3", "32", "64"), ("q", "3", "64", "64")]
        assert ("import swsc_core" in card) == (form == "swsc")

    def test_the_command_that_it_shows_makes_the_same_output(self, model: Path, tmp_path: Path) -> None:
        flags = [
            "--bits",
            "4.0123456789",
            "--include",
            r"\.(q|o)_proj|layers.0",
            "--channel-axis",
            "auto",
            "--seed",
            "3",
        ]
        assert compress(model, tmp_path / "out", *flags) == 0
        line = re.search(
            r"^swsc compress MODEL OUTPUT (.*)$", (tmp_path / "out" / "README.md").read_text(), re.MULTILINE
        )
        assert line is not None
        assert compress(model, tmp_path / "again", *shlex.split(line[1])) == 0
        assert contents(tmp_path / "again") == contents(tmp_path / "out")

    def test_a_calibration_is_named_without_the_path_to_it(self, model: Path, tmp_path: Path) -> None:
        text = make_text(tmp_path / "prose.txt", 1500, seed=77)
        short = ["--calibration-windows", "6", "--calibration-seqlen", "32", "--preset", "fast", "--bits", "4"]
        assert compress(model, tmp_path / "out", *short, "--calibration", str(text)) == 0
        card = (tmp_path / "out" / "README.md").read_text()
        assert "Calibrated on 6 windows of 32 tokens of prose.txt." in card
        assert str(tmp_path) not in card

    def test_the_card_of_a_restored_model_lists_what_was_compressed_and_keeps_licence_and_text(
        self, made: Path, tmp_path: Path
    ) -> None:
        assert main(["restore", str(made), str(tmp_path / "dense"), "--local"]) == 0
        card, before = (tmp_path / "dense" / "README.md").read_text(), (made / "README.md").read_text()
        assert front_matter(tmp_path / "dense") == front_matter(made) | {"tags": ["swsc"]}
        assert (tmp_path / "dense" / "BASE_MODEL_CARD.md").read_text() == OF_THE_SOURCE
        assert re.findall(r"^\| .*$", card, re.MULTILINE) == re.findall(r"^\| .*$", before, re.MULTILINE)
        assert f"{stored_bytes(made):,} bytes before, {stored_bytes(tmp_path / 'dense'):,} here" in card
        assert main(["verify", str(tmp_path / "dense"), "--local"]) == 0


class TestBaseModel:
    """Named where anything names it; a guess never."""

    def test_none_is_named_where_nothing_names_one(self, made: Path) -> None:
        assert "base_model" not in (made / "README.md").read_text().split("---")[1]

    def test_what_the_config_was_saved_from(self, model: Path, tmp_path: Path) -> None:
        source = changed(model, tmp_path / "model", OF_THE_SOURCE, _name_or_path="org/tiny")
        assert compress(source, tmp_path / "out") == 0
        about = front_matter(tmp_path / "out")
        assert (about["base_model"], about["base_model_relation"]) == ("org/tiny", "quantized")

    def test_a_path_in_the_config_is_no_model(self, model: Path, tmp_path: Path) -> None:
        source = changed(model, tmp_path / "model", None, _name_or_path="/home/somebody/tiny")
        assert compress(source, tmp_path / "out") == 0
        assert "base_model" not in front_matter(tmp_path / "out")
        assert "somebody" not in (tmp_path / "out" / "README.md").read_text()

    def test_what_its_own_card_is_based_on_in_that_cards_relation(self, model: Path, tmp_path: Path) -> None:
        card = "---\nbase_model: org/large\nbase_model_relation: finetune\n---\n"
        assert compress(changed(model, tmp_path / "model", card), tmp_path / "out") == 0
        about = front_matter(tmp_path / "out")
        assert (about["base_model"], about["base_model_relation"]) == ("org/large", "finetune")

    def test_the_directory_of_the_hubs_cache_is_the_model_of_that_id(self, model: Path, tmp_path: Path) -> None:
        snapshot = tmp_path / "models--org--tiny-1.5" / "snapshots" / ("a" * 40)
        shutil.copytree(model, snapshot)
        assert compress(snapshot, tmp_path / "out") == 0
        assert front_matter(tmp_path / "out")["base_model"] == "org/tiny-1.5"


BOMB = "\n".join(
    ["", " - &a0 [x,x,x,x,x,x,x,x,x]", *(f" - &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))]
)  # 600 bytes that stand for 9**10 words


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("# no front matter", "no front matter"),
        ("---\nlicense: [mit\n---\n", "while parsing a flow sequence"),
        ("---\n- mit\n---\n", "not a mapping"),
        ("---\nlicense: mit\n", "no front matter"),
        ("---\n" + "x" * (1 << 20), "bytes, more than"),
        (f"---\nlicense: {'[' * 10_000}\n---\n", "nested more than 50 deep"),
        (f"---\nlicense: {BOMB}\n---\n", "more than 200,000 values"),
        ("---\nlicense: &a [*a]\n---\n", "contains itself"),
        (f"---\nlicense: {'1:' * 100_000}1\n---\n", "a number of more than 100 digits"),
    ],
)
def test_an_unreadable_card_is_reported_and_stops_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], card: str, message: str
) -> None:
    assert compress(changed(model, tmp_path / "model", card), tmp_path / "out") == 0
    note = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: README.md of the model")]
    assert len(note) == 1
    assert message in note[0]
    assert message in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "BASE_MODEL_CARD.md").read_text() == card


def test_values_that_no_card_may_hold_are_not_carried_over(model: Path, tmp_path: Path) -> None:
    card = "---\nlicense: {mit: 1}\nlanguage: [en, 3]\npipeline_tag: text-generation\nbase_model: ../../etc\n---\n"
    assert compress(changed(model, tmp_path / "model", card), tmp_path / "out") == 0
    kept = {"pipeline_tag": "text-generation", "library_name": "transformers", "tags": ["swsc", "compressed"]}
    assert front_matter(tmp_path / "out") == kept


@pytest.mark.parametrize("word", ["''", "'  '", '"\\ud800"', '"a\\0b"', '"a\\n---\\nb"'])
def test_a_licence_that_is_empty_or_no_word_is_none(model: Path, tmp_path: Path, word: str) -> None:
    card = f"---\nlicense: {word}\nlanguage: en\n---\n"
    assert compress(changed(model, tmp_path / "model", card), tmp_path / "out") == 0
    assert front_matter(tmp_path / "out").keys() == {"language", "library_name", "tags"}
    assert "No licence is named" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_depends_on_neither_the_location_nor_the_times_of_a_run(
    model: Path, made: Path, tmp_path: Path
) -> None:
    elsewhere = Path(shutil.copytree(model, tmp_path / "another-name"))
    assert compress(elsewhere, tmp_path / "another-output") == 0
    assert contents(tmp_path / "another-output") == contents(made)


def test_a_changed_card_is_damage_that_verify_names(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "README.md" in json.loads((output / MANIFEST).read_text())["files"]
    (output / "README.md").write_text((output / "README.md").read_text() + "and fast")
    assert main(["verify", str(output), "--local"]) == 1
    assert "README.md" in capsys.readouterr().err


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return make_text(folder / "one.txt", 400, seed=1), make_text(folder / "two.txt", 400, seed=2)


def evaluate(model: Path, text: Path, *flags: str, windows: int = 2) -> int:
    return main(
        ["evaluate", str(model), "--text", str(text), "--local", "--seqlen", "32", "--windows", str(windows), *flags]
    )


def figures(output: Path) -> list[dict[str, Any]]:
    (index,) = front_matter(output)["model-index"]
    return [{**metric, "text": one["dataset"]} for one in index["results"] for metric in one["metrics"]]


def rows_of(output: Path) -> list[str]:
    return re.findall(r"^\| .*\.txt .*$", (output / "README.md").read_text(), re.MULTILINE)


class TestMeasured:
    def test_a_perplexity_stands_in_the_card_with_its_protocol_and_verify_still_passes(
        self, output: Path, texts: tuple[Path, Path], tmp_path: Path
    ) -> None:
        before = contents(output)
        assert evaluate(output, texts[0], "--card", "--json", str(tmp_path / "r.json")) == 0
        result = json.loads((tmp_path / "r.json").read_text())
        (figure,) = figures(output)
        assert figure["value"] == round(result["perplexity"], 4)
        protocol = {key: result[key] for key in ("seqlen", "windows", "bos", "dtype")}
        assert figure["args"] == protocol | {"overlap": 0}
        assert figure["text"] == {"name": "one.txt", "type": "one.txt", "revision": result["text_sha256"]}
        (row,) = rows_of(output)
        assert f"| 2 windows of 32 tokens, no overlap, BOS none, float32 | {result['perplexity']:.3f} |" in row
        assert str(texts[0].parent) not in (output / "README.md").read_text()
        after = contents(output)
        assert {name for name in before | after if before.get(name) != after.get(name)} == {"README.md", MANIFEST}
        assert (
            (output / "README.md").read_text().split("---")[2].startswith(before["README.md"].decode().split("---")[2])
        )
        assert main(["verify", str(output), "--local"]) == 0
        assert not (output / ".swsc").exists()

    def test_the_same_protocol_replaces_its_row_and_another_adds_one(
        self, output: Path, texts: tuple[Path, Path]
    ) -> None:
        assert evaluate(output, texts[0], "--card") == 0
        once = contents(output)
        assert evaluate(output, texts[0], "--card") == 0
        assert contents(output) == once
        assert evaluate(output, texts[0], "--card", windows=3) == 0
        assert evaluate(output, texts[1], "--card") == 0
        assert evaluate(output, texts[0], "--card") == 0
        assert [(one["text"]["name"], one["args"]["windows"]) for one in figures(output)] == [
            ("one.txt", 2), ("one.txt", 3), ("two.txt", 2)
        ]  # fmt: skip
        assert len(rows_of(output)) == 3

    def test_the_uncompressed_figure_stands_beside_it_and_stays(
        self, model: Path, output: Path, texts: tuple[Path, Path], tmp_path: Path
    ) -> None:
        assert evaluate(model, texts[0], "--json", str(tmp_path / "before.json")) == 0
        assert evaluate(output, texts[0], "--card", "--uncompressed", str(tmp_path / "before.json")) == 0
        before = json.loads((tmp_path / "before.json").read_text())["perplexity"]
        assert figures(output)[0]["args"]["uncompressed"] == round(before, 4)
        assert rows_of(output)[0].endswith(f"| {before:.3f} |")
        once = contents(output)
        assert evaluate(output, texts[0], "--card") == 0
        assert contents(output) == once

    def test_an_uncompressed_figure_of_another_protocol_is_refused(
        self, model: Path, output: Path, texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert evaluate(model, texts[0], "--json", str(tmp_path / "before.json"), windows=3) == 0
        kept = contents(output)
        assert evaluate(output, texts[0], "--card", "--uncompressed", str(tmp_path / "before.json")) == 2
        assert "measured by another protocol (windows 3, not 2)" in capsys.readouterr().err
        assert contents(output) == kept

    def test_evaluations_that_end_at_the_same_time_are_all_in_the_card(
        self, output: Path, texts: tuple[Path, Path], tmp_path: Path
    ) -> None:
        assert evaluate(output, texts[0], "--json", str(tmp_path / "r.json")) == 0
        result, together = json.loads((tmp_path / "r.json").read_text()), threading.Barrier(4)

        def add(windows: int) -> None:
            together.wait()
            add_evaluation(str(output), result | {"windows": windows})

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(add, windows) for windows in range(4)]:
                done.result()
        assert sorted(one["args"]["windows"] for one in figures(output)) == [0, 1, 2, 3]
        assert main(["verify", str(output), "--local"]) == 0

    @pytest.mark.parametrize("name", ["a: #b.txt", "one\ntwo|`three.txt", " .txt"])
    def test_a_text_of_any_name_is_one_row(
        self, output: Path, texts: tuple[Path, Path], tmp_path: Path, name: str
    ) -> None:
        text = shutil.copy(texts[0], tmp_path / name)
        assert evaluate(output, Path(text), "--card") == 0
        assert evaluate(output, Path(text), "--card") == 0
        (figure,) = figures(output)
        assert figure["text"]["name"] == name
        assert len(rows_of(output)) == 1

    @pytest.mark.parametrize("content", ["[1]", "{", '{"perplexity": "low"}', '{"perplexity": NaN}'])
    def test_what_is_no_result_is_refused_before_anything_is_measured(
        self, output: Path, texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
    ) -> None:
        (tmp_path / "r.json").write_text(content)
        assert evaluate(output, texts[0], "--card", "--uncompressed", str(tmp_path / "r.json")) == 2
        message = capsys.readouterr()
        assert "not a result of `swsc evaluate --json`" in message.err
        assert "perplexity" not in message.out

    def test_a_model_that_is_no_output_and_one_in_an_object_store_are_refused(
        self, model: Path, texts: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        kept = contents(model)
        assert evaluate(model, texts[0], "--card") == 2
        assert "not a finished output" in capsys.readouterr().err
        assert contents(model) == kept
        with pytest.raises(OutputError, match="s3://bucket/out"):
            require_card("s3://bucket/out")

    def test_a_card_that_somebody_changed_is_not_written_over(
        self, output: Path, texts: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        (output / "README.md").write_text("mine")
        assert evaluate(output, texts[0], "--card") == 1
        assert "README.md" in capsys.readouterr().err
        assert (output / "README.md").read_text() == "mine"

    def test_an_output_with_figures_counts_as_complete(
        self, model: Path, output: Path, texts: tuple[Path, Path]
    ) -> None:
        assert evaluate(output, texts[0], "--card") == 0
        kept = contents(output)
        assert compress(model, output) == 0
        assert contents(output) == kept


@pytest.mark.parametrize("mode", ["fail", "late", "full", "short"])
def test_storage_that_fails_at_any_operation_leaves_a_card_that_the_next_call_completes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(lease, "_RENEWAL_SECONDS", 60.0)  # no operations of another thread among those that are counted

    def change(card: str) -> str:
        return card if "added by the test" in card else card + "added by the test"

    straight = Path(shutil.copytree(made, tmp_path / "straight"))
    edit_file(Store.at(str(straight)), "README.md", change)
    assert contents(straight) != contents(made)
    inner, at, struck = store.files_at(""), 0, True
    while struck:
        at += 1
        output = Path(shutil.copytree(made, tmp_path / f"out-{at}"))
        faulty = FaultyFiles(inner, mode, at)
        monkeypatch.setattr(store, "files_at", lambda scheme, faulty=faulty: faulty)
        with suppress(OSError, SwscError):
            edit_file(Store.at(str(output)), "README.md", change)
        monkeypatch.setattr(store, "files_at", lambda scheme: inner)
        struck = faulty.count >= at
        edit_file(Store.at(str(output)), "README.md", change)
        assert contents(output) == contents(straight)
        assert not (output / ".swsc").exists()
        shutil.rmtree(output)
    assert at > {"fail": 20, "late": 6, "full": 4, "short": 10}[mode]
