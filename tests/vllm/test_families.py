"""What other families store otherwise than Llama is served, too: the tokens of transformers on the restored directory."""

from pathlib import Path

import pytest

from tests.vllm.test_vllm import prompts

pytest.importorskip("vllm", reason="vLLM is not installed (docs/serving.md)")
from tests.vllm.checkpoints import by_transformers, by_vllm
from tests.vllm.families import MODELS, made

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return made(tmp_path_factory.mktemp("family"), request.param)


@pytest.mark.parametrize("ranks", [1, 2])
def test_tokens_are_those_of_transformers(model: tuple[Path, Path], ranks: int) -> None:
    compressed, dense = model
    wanted, likely = by_transformers(dense, prompts(), 16)
    said, found = by_vllm(compressed, prompts(), 16, ranks)
    assert said == wanted
    for ours, theirs in zip(found, likely, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3)
