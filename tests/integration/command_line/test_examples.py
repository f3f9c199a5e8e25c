"""The scripts of examples/ do what their docstrings promise, on tiny models and offline."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import compare_two_models, load_and_chat, lora_recovery
from jobs.cli import main
from pipeline.errors import TextError
from swsc_core import align
from tests.support.tiny import make_text, make_tiny_model


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", dtype=torch.float32)


@pytest.fixture(scope="module")
def compressed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crude enough that there is something to recover."""
    output = tmp_path_factory.mktemp("compressed") / "out"
    flags = ["--clusters", "4", "--rank", "1", "--include", "_proj"]
    assert main(["compress", str(dense), str(output), "--local", *flags]) == 0
    return output


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """To train on, and to measure on."""
    place = tmp_path_factory.mktemp("texts")
    return str(make_text(place / "train.txt", words=6000, seed=1)), str(make_text(place / "test.txt", seed=2))


def evaluated(model: Path, text: str, tmp_path: Path) -> Any:
    found = tmp_path / "evaluated.json"
    flags = ["--text", text, "--seqlen", "64", "--windows", "4", "--json", str(found), "--local"]
    assert main(["evaluate", str(model), *flags]) == 0
    return json.loads(found.read_text())["perplexity"]


class TestLoadAndChat:
    def test_greedy_answers_are_those_of_generate(self, compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
        answers = load_and_chat.main([str(compressed), "--prompt", "w1 w2", "--prompt", "w7", "--tokens", "8"])
        tokenizer = AutoTokenizer.from_pretrained(compressed)
        model: Any = AutoModelForCausalLM.from_pretrained(compressed)
        for prompt, answer in zip(("w1 w2", "w7"), answers, strict=True):
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            written = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
            assert answer == str(tokenizer.decode(written, skip_special_tokens=True)).strip()
        printed = capsys.readouterr().out
        assert "21 compressed layers" in printed
        assert "no chat template" in printed

    def test_a_chat_template_is_spoken_to_and_the_conversation_is_remembered(
        self, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        place = tmp_path / "chat"
        place.mkdir()
        for file in compressed.iterdir():
            (place / file.name).symlink_to(file)
        (place / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
        )
        asked: list[str] = []
        real = AutoTokenizer.from_pretrained(place)
        monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2\nw3\n"))
        monkeypatch.setattr(
            type(real), "apply_chat_template", _noting(asked, type(real).apply_chat_template), raising=True
        )
        answers = load_and_chat.main([str(place), "--tokens", "4"])
        assert asked == ["user w1 w2 ", f"user w1 w2 assistant {answers[0]} user w3 "]
        assert "has a chat template" in capsys.readouterr().out

    def test_drawn_answers_hang_on_the_seed_alone(self, compressed: Path) -> None:
        printed = [
            load_and_chat.main([str(compressed), "--prompt", "w1", "--sample", "--temperature", "9", "--seed", seed])
            for seed in ("0", "0", "1")
        ]
        assert printed[0] == printed[1] != printed[2]


def _noting(asked: list[str], real: Any) -> Any:
    def apply(self: Any, turns: Any, **how: Any) -> Any:
        asked.append(real(self, turns, tokenize=False))
        return real(self, turns, **how)

    return apply


def test_a_missing_directory_is_one_error_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: .*nowhere: no such directory"):
        load_and_chat.main([str(tmp_path / "nowhere"), "--prompt", "w1"])


class TestCompareTwoModels:
    FLAGS = ("--seqlen", "64", "--windows", "4", "--prompt", "w1 w2", "--tokens", "6")

    def test_a_model_agrees_with_itself_everywhere(self, compressed: Path, texts: tuple[str, str]) -> None:
        found = compare_two_models.main([str(compressed), str(compressed), "--text", texts[1], *self.FLAGS])
        assert found.agreement == 1
        assert found.common_prefixes == [6]
        assert found.perplexities[0] == found.perplexities[1]

    def test_perplexities_are_those_of_evaluate_and_other_models_part(
        self, dense: Path, compressed: Path, texts: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = compare_two_models.main([str(dense), str(compressed), "--text", texts[1], *self.FLAGS])
        assert found.perplexities == [evaluated(place, texts[1], tmp_path) for place in (dense, compressed)]
        assert found.agreement < 0.9
        assert f"the same for {found.common_prefixes[0]} tokens" in capsys.readouterr().out

    def test_how_long_two_beginnings_are_equal(self) -> None:
        assert compare_two_models.common_prefix([1, 2, 3], [1, 2, 4]) == 2
        assert compare_two_models.common_prefix([1, 2], [1, 2, 3]) == 2
        assert compare_two_models.common_prefix([4], [5]) == 0


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 253, (8, 64), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return model(input_ids=ids).logits


def divergence(expected: Any, model: Any) -> float:
    """KL divergence of `model` to `expected` in nats per token, on tokens that neither has seen."""
    first, second = (logits(one).log_softmax(-1).flatten(0, 1) for one in (expected, model))
    return float(torch.nn.functional.kl_div(second, first, log_target=True, reduction="batchmean"))


class TestLoraRecovery:
    FLAGS = (
        "--seqlen",
        "64",
        "--windows",
        "4",
        "--train-seqlen",
        "64",
        "--batch",
        "2",
        "--rank",
        "4",
        "--rate",
        "1e-2",
    )

    def test_the_model_comes_nearer_to_the_dense_one(
        self, dense: Path, compressed: Path, texts: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        merged = tmp_path / "merged"
        given = [str(compressed), str(tmp_path / "adapter"), "--train", texts[0], "--text", texts[1]]
        found = lora_recovery.main(
            [*given, *self.FLAGS, "--steps", "40", "--teacher", str(dense), "--merged", str(merged)]
        )
        assert f"perplexity {found['before']:.3f} -> {found['after']:.3f}" in capsys.readouterr().out
        assert found["before"] == pytest.approx(evaluated(compressed, texts[1], tmp_path), rel=1e-4)
        expected, plain, base = (
            AutoModelForCausalLM.from_pretrained(place) for place in (dense, compressed, compressed)
        )
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert divergence(expected, adapted) < 0.8 * divergence(expected, plain)

        # what was saved is what was measured
        measured, saved = adapted.merge_and_unload(), AutoModelForCausalLM.from_pretrained(merged)
        for model in (measured, saved):
            align(model)
        assert torch.equal(logits(measured), logits(saved))
        assert evaluated(merged, texts[1], tmp_path) == pytest.approx(found["after"], rel=1e-4)

    def test_without_a_teacher_it_learns_the_text(
        self, compressed: Path, texts: tuple[str, str], tmp_path: Path
    ) -> None:
        given = [str(compressed), str(tmp_path / "adapter"), "--train", texts[0], "--text", texts[1]]
        found = lora_recovery.main([*given, *self.FLAGS, "--steps", "20", "--autocast"])
        assert found["after"] < 0.9 * found["before"]

    def test_training_on_what_is_measured_is_refused(
        self, compressed: Path, texts: tuple[str, str], tmp_path: Path
    ) -> None:
        given = [str(compressed), str(tmp_path / "adapter"), "--train", texts[1], "--text", texts[1]]
        with pytest.raises(TextError, match="shares passages"):
            lora_recovery.main([*given, *self.FLAGS, "--steps", "2"])
        assert not (tmp_path / "adapter").exists()
