"""Tasks of lm-eval that need no network: YAML files and their data, in the vocabulary of the tiny tokenizer."""

import json
import random
import re
from pathlib import Path
from typing import Any

from tests.support.tiny import WORDS

TASKS = ["tiny_group", "tiny_rolling", "tiny_write", "tiny_drawn"]

_CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}
output_type: multiple_choice
training_split: train
test_split: test
fewshot_split: train
num_fewshot: 2
doc_to_text: "{{{{question}}}} w0"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
_ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/texts.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
metadata: {{version: 2.0}}
"""
_WRITE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/test.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["w7 "], max_gen_toks: 12, {how}}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
  - {{metric: !function counts.characters, aggregation: mean, higher_is_better: true}}
"""
_GROUP = """
group: tiny_group
task: [tiny_choice, tiny_more]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
metadata: {version: 3.0}
"""


def make_tasks(folder: Path) -> Path:
    """Write tiny_choice, tiny_more (one-token choices), tiny_group (both), tiny_rolling, tiny_write and tiny_drawn."""
    draw = random.Random(7)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))

    def rows(count: int) -> list[dict[str, object]]:
        return [
            {
                "question": words(3, 30),
                "choices": [words(1, 3) for _ in range(3)],
                "label": draw.randrange(3),
                "answer": words(1, 3),
            }
            for _ in range(count)
        ]

    folder.mkdir(parents=True, exist_ok=True)
    single = [row | {"choices": [words(1, 1) for _ in range(4)]} for row in rows(9)]
    files = {"train": rows(6), "test": rows(14), "more": single}
    files["texts"] = [{"text": words(*length)} for length in ((5, 30), (300, 700), (5, 90), (600, 600))]
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    choice = _CHOICE.format(folder=folder)
    more = choice.replace("tiny_choice", "tiny_more").replace("/test.jsonl", "/more.jsonl")
    (folder / "counts.py").write_text(_CHARACTERS)
    written = {
        "choice": choice,
        "more": more.replace("num_fewshot: 2", "num_fewshot: 0"),
        "rolling": _ROLLING.format(folder=folder),
        "write": _WRITE.format(folder=folder, name="tiny_write", how="do_sample: false"),
        "drawn": _WRITE.format(folder=folder, name="tiny_drawn", how="do_sample: true, temperature: 2.0"),
        "group": _GROUP,
    }
    for name, text in written.items():
        (folder / f"{name}.yaml").write_text(text.lstrip())
    return folder


# The output of a random model matches no answer. This metric, a number computed from the letters, differs between
# outputs.
_CHARACTERS = """
def characters(references, predictions):
    return sum((place + 1) * ord(letter) for place, letter in enumerate(predictions[0])) % 9973
"""


def findings(results: dict[str, Any]) -> dict[str, Any]:
    """The results of a run that do not depend on the machine, the time, or the memory addresses of functions."""
    parts = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
    stable = {key: results[key] for key in parts if key in results}
    config_keys = (
        "model_num_parameters",
        "model_dtype",
        "batch_size",
        "limit",
        "bootstrap_iters",
        "random_seed",
        "fewshot_seed",
    )
    stable["config"] = {key: results["config"][key] for key in config_keys} | {"max_length": results["max_length"]}
    return json.loads(re.sub(r" at 0x[0-9a-f]+", "", json.dumps(stable)))
