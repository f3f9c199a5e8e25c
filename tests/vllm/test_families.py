"""What other families store otherwise than Llama is served, too.

The tokens of transformers on the restored directory.
"""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm", reason="vLLM is not installed (docs/vllm.md)")
from tests.vllm.checkpoints import by_vllm, prompts, require_equal_tokens
from tests.vllm.families import MODELS, made

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", params=[name for name in MODELS if name != "bloom"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return made(tmp_path_factory.mktemp("family"), request.param)


@pytest.mark.parametrize("ranks", [1, 2])
def test_tokens_are_those_of_transformers(model: tuple[Path, Path], ranks: int) -> None:
    require_equal_tokens(*model, ranks)


def test_experts_that_are_dense_in_memory_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    by_vllm(made(tmp_path, "mixtral")[0], prompts(), 1, 1)
    message = "".join(capfd.readouterr())
    assert message.count("swsc: model.layers.*.block_sparse_moe.experts are restored while they load") == 1


def test_an_expert_that_is_not_whole_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    compressed, _ = made(tmp_path, "qwen3_moe")
    tensors = load_file(compressed / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.1.up_proj.labels"]
    save_file(tensors, compressed / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError):
        by_vllm(compressed, prompts(), 1, 1)
    message = "".join(capfd.readouterr())
    assert (
        "ValueError: not in the checkpoint: model.layers.0.mlp.experts.1.up_proj.labels; `swsc verify DIR`" in message
    )


def test_what_vllm_reorders_before_it_is_handed_over_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError):
        by_vllm(made(tmp_path, "bloom")[0], prompts(), 1, 1)
    message = "".join(capfd.readouterr())
    assert "transformer.h.0.self_attention.query_key_value: vLLM's BLOOM reorders the rows" in message
