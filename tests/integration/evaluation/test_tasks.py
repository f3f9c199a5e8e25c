"""Tasks of lm-evaluation-harness: the numbers that lm-eval itself gets from the same weights, to the last bit."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from jobs.cli import main
from tests.support.offline_tasks import TASKS, findings, make_tasks
from tests.support.tiny import make_tiny_model


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("tasks") / "tasks")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a generation config."""
    path = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    GenerationConfig(repetition_penalty=1.7, bos_token_id=0, eos_token_id=[1, 9]).save_pretrained(path)
    return path


def ours(model: Path, tmp_path: Path, tasks: Path, *flags: str, names: list[str] = TASKS) -> dict[str, Any]:
    argv = ["evaluate", str(model), "--tasks", ",".join(names), "--include-path", str(tasks), "--local"]
    assert main([*argv, "--json", str(tmp_path / "r.json"), *flags]) == 0
    return json.loads((tmp_path / "r.json").read_text())


def lm_eval_alone(model: Path, tasks: Path, names: list[str] = TASKS, batch_size: int = 1, **how: Any) -> Any:
    """What lm-eval finds with its own model class on the same directory."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable

    torch.set_num_threads(1)  # as our worker has
    lm = HFLM(str(model), device="cpu", dtype="float32", batch_size=batch_size)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = simple_evaluate(lm, tasks=names, task_manager=manager, batch_size=batch_size, log_samples=False, **how)
    return json.loads(json.dumps(results, default=handle_non_serializable))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_numbers_of_a_dense_model_are_those_of_lm_eval_itself(
    model: Path, tasks: Path, tmp_path: Path, batch_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    result = ours(model, tmp_path, tasks, "--batch-size", str(batch_size))
    expected = findings(lm_eval_alone(model, tasks, batch_size=batch_size))
    assert findings(result["lm_eval"]) == expected
    assert result["model"] == result["lm_eval"]["config"]["model"] == str(model)
    assert "tiny_group" in expected["groups"]
    printed = capsys.readouterr().out
    for heading in ("Tasks", "Version", "Filter", "n-shot", "Metric", "Value", "Stderr", "Groups"):
        assert heading in printed


def test_every_forward_pass_is_one_that_lm_eval_itself_makes(
    model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's last bit may depend on the rows beside it: equal passes are equal numbers on any device."""
    from lm_eval.models.huggingface import HFLM

    passes: list[Any] = []
    for name in ("_model_call", "_model_generate"):
        real = getattr(HFLM, name)

        def noted(lm: Any, *given: Any, real: Any = real, **how: Any) -> Any:
            passes.append((given[0] if given else how["context"]).tolist())
            return real(lm, *given, **how)

        monkeypatch.setattr(HFLM, name, noted)
    ours(model, tmp_path, tasks, "--batch-size", "3")
    made, passes[:] = sorted(passes), []
    lm_eval_alone(model, tasks, batch_size=3)
    assert made == sorted(passes)
    assert {1, 2, 3} >= {len(rows) for rows in made} >= {1, 3}


def test_numbers_of_a_compressed_model_are_those_of_lm_eval_on_the_restored_one(
    model: Path, tasks: Path, tmp_path: Path
) -> None:
    compact, restored = tmp_path / "compact", tmp_path / "restored"
    assert main(["compress", str(model), str(compact), "--local"]) == 0
    assert main(["restore", str(compact), str(restored), "--local"]) == 0
    result = findings(ours(compact, tmp_path, tasks, "--batch-size", "2")["lm_eval"])
    assert result == findings(lm_eval_alone(restored, tasks, batch_size=2))
    dense = findings(ours(model, tmp_path, tasks, "--batch-size", "2")["lm_eval"])
    changed = {name for name in result["results"] if result["results"][name] != dense["results"][name]}
    assert {"tiny_rolling", "tiny_write"} <= changed


def test_few_shot_limit_and_seeds_mean_what_they_mean_to_lm_eval(model: Path, tasks: Path, tmp_path: Path) -> None:
    names = ["tiny_choice", "tiny_drawn"]
    flags = ["--num-fewshot", "3", "--limit", "0.5", "--seed", "4,5,6,7"]
    result = ours(model, tmp_path, tasks, *flags, names=names)
    seeds = {"random_seed": 4, "numpy_random_seed": 5, "torch_random_seed": 6, "fewshot_random_seed": 7}
    expected = lm_eval_alone(model, tasks, names, num_fewshot=3, limit=0.5, **seeds)
    assert findings(result["lm_eval"]) == findings(expected)
    assert result["lm_eval"]["n-samples"]["tiny_choice"] == {"original": 14, "effective": 7}


def test_a_text_and_tasks_are_measured_in_one_run(model: Path, tasks: Path, text: Path, tmp_path: Path) -> None:
    flags = ["--text", str(text), "--seqlen", "64", "--windows", "2"]
    both = ours(model, tmp_path, tasks, *flags, names=[str(tasks / "rolling.yaml")])
    assert both["windows"] == len(both["nll_per_window"]) == 2
    assert both["lm_eval"]["results"].keys() == {"tiny_rolling"}


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    assert main(["evaluate", *map(str, argv), "--local"]) == 2
    message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(message) == 1
    return message[0]


def test_what_is_asked_for_must_fit_together(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        ([], "--text TEXT"),
        (["--tasks", "x", "--windows", 3], "windows: only apply with --text"),
        (["--text", "x", "--limit", 3, "--seed", 4], "limit, seed: only apply with --tasks"),
        (["--tasks", "x", "--limit", 0, "--num-fewshot", -1], "num_fewshot: "),
        (["--tasks", "x", "--seed", "1,2"], "seed"),
        (["--tasks", "x,y,x"], "tasks are named twice: x"),
        (["--tasks", "x", "--batch-size", "auto"], "batch_size"),
        (["--tasks", "x", "--include-path", tmp_path / "none"], "none: no such directory"),
    ):
        assert message in refused(capsys, model, *flags)


def test_the_error_of_an_unknown_task_lists_the_nearest_names(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "arc_easy" in refused(capsys, model, "--tasks", "arc_eazy")


def test_a_task_file_that_cannot_be_read_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.yaml").write_text("task: broken\nmetric_list: [")
    message = refused(capsys, model, "--tasks", "broken", "--include-path", tmp_path)
    assert f"{tmp_path}/broken.yaml cannot be read: " in message


def test_data_that_need_the_network_are_an_error_offline(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "tasks arc_easy: lm-eval cannot run them: " in (message := refused(capsys, model, "--tasks", "arc_easy"))
    assert "allenai/ai2_arc" in message


def test_a_task_that_asks_for_what_its_data_lack_is_refused(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "odd.yaml").write_text((tasks / "choice.yaml").read_text().replace("{{choices}}", "{{chioces}}"))
    message = refused(capsys, model, "--tasks", tmp_path / "odd.yaml")
    assert "tasks " in message
    assert "lm-eval cannot run them: " in message


def test_documents_that_the_model_was_calibrated_on_are_refused(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.texts.contamination import passage_hashes

    texts = [json.loads(line)["text"] for line in (tasks / "texts.jsonl").read_text().splitlines()]
    seen = shutil.copytree(model, tmp_path / "seen")
    (seen / "swsc_calibration.json").write_text(json.dumps({"traces": sorted(passage_hashes(" ".join(texts)))}))
    message = refused(capsys, seen, "--tasks", tasks / "rolling.yaml")
    assert "rolling.yaml: shares passages with the calibration text" in message
    assert ours(seen, tmp_path, tasks, names=[str(tasks / "choice.yaml")])["lm_eval"]["results"]


def test_a_model_whose_answers_are_not_numbers_fails_the_run(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    model = make_tiny_model(tmp_path / "model", shards=False)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.model.norm.weight.data[3] = float("nan")
    loaded.save_pretrained(model)
    assert main(["evaluate", str(model), "--tasks", str(tasks / "choice.yaml"), "--local"]) == 1
    assert "a log-likelihood is NaN" in capsys.readouterr().err


def test_without_lm_eval_the_extra_is_named(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "pipeline.evaluation.lm_eval_tasks", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'swsc[lm-eval]'" in refused(capsys, model, "--tasks", "tiny_choice")
