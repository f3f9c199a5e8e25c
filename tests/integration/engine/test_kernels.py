"""Equal bits, on any processor: where a file's header leaves the weights changes nothing that we measure or write.

Kernels that care where an operand begins are not those of every processor;
`test_claims_about_bits_hold_under_other_kernels` runs these and some of the other claims under the kernels of
tests/support/kernels.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from jobs.cli import main
from pipeline.models.loading import ModelKey, forward, load_model
from pipeline.models.stored_model import open_model
from swsc_core.storage.alignment import align, is_aligned
from tests.support.families import FamilyModel
from tests.support.kernels import VARIABLES
from tests.support.project import ROOT
from tests.support.tiny import contents, make_tiny_model, moved, save_tokenizer

OFFSETS = (0, 8, 40)
CLAIMS = (
    "tests/integration/engine/test_kernels.py",  # all but the last
    "tests/integration/transformers/test_families_opened.py::test_a_saved_and_reopened_model_has_equal_logits[deepseek_v2]",
    "tests/integration/transformers/test_experts_opened.py::test_other_families_open_as_well[glm4_moe]",
    "tests/integration/evaluation/test_evaluate.py::test_compressed_restored_and_dense_forms_measure_the_same",
    "tests/integration/compression/test_compress.py::test_streaming_equals_in_memory",
)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A dense mixture of experts in float32 (an expert may have one token alone), its data at several offsets."""
    torch.set_num_threads(1)  # as a worker has
    folder = tmp_path_factory.mktemp("places")
    dense = FamilyModel("deepseek_v2", folder).dense
    save_tokenizer(dense)
    return [moved(dense, folder / str(offset), offset) for offset in OFFSETS]


def one_by_one(model: Any) -> torch.Tensor:
    """Logits of single tokens: products of matrices with vectors, the ones that depend on where a matrix begins."""
    with torch.no_grad():
        return torch.cat([forward(model, torch.tensor([[token]])).logits for token in range(1, 17)])


def windowed(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return forward(model, torch.arange(1, 65)[None]).logits


def test_an_evaluated_model_is_in_aligned_memory_and_its_logits_do_not_depend_on_file_offsets(
    places: list[Path],
) -> None:
    models = [load_model(open_model(str(place)), ModelKey(str(place), "auto", 1), "cpu") for place in places]
    assert all(is_aligned(tensor) for model in models for tensor in (*model.parameters(), *model.buffers()))
    for logits_of in (one_by_one, windowed):
        assert all(torch.equal(logits_of(model), logits_of(models[0])) for model in models)


def test_a_model_opened_by_transformers_agrees_closely_and_bitwise_once_aligned(
    places: list[Path],
) -> None:
    models = [AutoModelForCausalLM.from_pretrained(place) for place in places]
    assert not all(is_aligned(tensor) for tensor in models[1].parameters())
    for logits_of, most in ((one_by_one, 2e-6), (windowed, 5e-7)):
        expected = logits_of(models[0])
        assert all((logits_of(model) - expected).abs().max() <= most * expected.abs().max() for model in models)
    assert align(models[1]) > 0 == align(models[1])
    for model in models:
        align(model)
    for logits_of in (one_by_one, windowed):
        assert all(torch.equal(logits_of(model), logits_of(models[0])) for model in models)


@pytest.mark.parametrize("compressed", [False, True])
def test_perplexity_is_the_same_to_the_bit(places: list[Path], text: Path, tmp_path: Path, compressed: bool) -> None:
    found = []
    for place in places:
        if compressed:
            flags = ["--local", "--projectors", "q,o,down", "--clusters", "4", "--rank", "2", "--n-init", "1"]
            assert main(["compress", str(place), str(tmp_path / place.name), *flags]) == 0
            moved(tmp_path / place.name, tmp_path / f"{place.name}-moved", int(place.name))
            place = tmp_path / f"{place.name}-moved"
        given = ["evaluate", str(place), "--text", str(text), "--seqlen", "4", "--windows", "8", "--local"]
        assert main([*given, "--json", str(tmp_path / "e.json")]) == 0
        found.append(json.loads((tmp_path / "e.json").read_text())["nll_per_window"])
    assert all(losses == found[0] for losses in found)


def test_a_compressed_output_is_the_same_to_the_byte(text: Path, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", layers=1, dtype=torch.float32)
    flags = ["--local", "--bits", "3", "--preset", "fast", "--calibration", str(text), "--calibration-windows", "4"]
    found = []
    for offset in OFFSETS:
        place = moved(model, tmp_path / f"m{offset}", offset)
        assert main(["compress", str(place), str(tmp_path / f"o{offset}"), *flags, "--calibration-seqlen", "64"]) == 0
        found.append({n: data for n, data in contents(tmp_path / f"o{offset}").items() if n.endswith(".safetensors")})
    assert found[0]
    assert all(files == found[0] for files in found)


@pytest.mark.skipif(os.environ.get("KERNELS", "native") != "native", reason="these are other kernels already")
@pytest.mark.parametrize("name", ["sse4", "cbwr-avx2", "compatible"])
def test_claims_about_bits_hold_under_other_kernels(name: str) -> None:
    own = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    pytest_of_claims = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *CLAIMS]
    done = subprocess.run(pytest_of_claims, cwd=ROOT, env=own | {"KERNELS": name}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
