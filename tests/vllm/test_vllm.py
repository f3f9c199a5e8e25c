"""vLLM agrees with transformers on the restored dense model, token by token, on one process and on two."""

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swsc_core import RtnSpec, SwscSpec
from swsc_core.method.spec import Spec
from tests.support.project import ROOT
from tests.support.tiny import make_tiny_model
from tests.vllm.checkpoints import by_vllm, compress, prompts, require_equal_tokens

pytest.importorskip("vllm", reason="vLLM is not installed (docs/vllm.md)")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

PROJECTORS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
OUTPUT, INPUT, RTN = SwscSpec(20, 4), SwscSpec(20, 4, "input"), RtnSpec(4, "group", 16)
SEGMENTS = SwscSpec(32, 4, segment_size=8, codebooks=2, scaled=True)  # the presets' kind
CODED = SwscSpec(32, 4, segment_size=4, scaled=True, centroid_bits=8, factor_bits=8)


def allotted(clusters: int, size: int) -> SwscSpec:
    """What `--preset best` gives a matrix: by measure, another length and number of segments for each, calibrated."""
    return SwscSpec(clusters, 0, segment_size=size, scaled=True, centroid_bits=8, metric="activations")


WHOLE: dict[str, Spec | None] = {"model.embed_tokens.weight": SEGMENTS, "lm_head.weight": INPUT}


def layer(number: int, **specs: Spec | None) -> dict[str, Spec | None]:
    """Specs of some projectors of a layer; "rest" is that of the others."""
    rest = specs.pop("rest", None)
    return {f"model.layers.{number}.{PROJECTORS[p]}.weight": specs.get(p, rest) for p in PROJECTORS}


MODELS: dict[str, tuple[dict[str, Spec | None], bool]] = {
    "every kind in layers of its own, embedding and head": (
        layer(0, rest=OUTPUT) | layer(1, rest=INPUT) | layer(2, rest=SEGMENTS) | layer(3, rest=RTN)
        | layer(4, rest=CODED) | WHOLE,
        False,
    ),
    "mixed with dense, tied to a compressed embedding": (
        layer(0, q=OUTPUT, k=OUTPUT) | layer(1, q=RTN, v=SEGMENTS, up=INPUT) | layer(2, o=SEGMENTS, down=OUTPUT)
        | {"model.embed_tokens.weight": OUTPUT},
        True,
    ),
    "allotted by measure, as --preset best does": (
        layer(0, q=allotted(16, 2), k=allotted(64, 4), v=allotted(128, 8), rest=allotted(32, 4))
        | layer(1, q=allotted(128, 4), k=allotted(16, 2), gate=allotted(64, 4), up=allotted(32, 8), o=allotted(64, 2))
        | layer(2, q=allotted(64, 4), k=allotted(64, 4)),
        True,
    ),
}  # fmt: skip


def made(path: Path, name: str) -> tuple[Path, Path]:
    specs, tied = MODELS[name]
    make_tiny_model(path / "model", layers=5, head_dim=32, tied=tied, shards=False, bias=True, dtype=torch.float32)
    return compress(path / "model", path, {tensor: spec for tensor, spec in specs.items() if spec})


@pytest.fixture(scope="module", params=MODELS, ids=str)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return made(tmp_path_factory.mktemp("vllm"), request.param)


@pytest.mark.parametrize("ranks", [1, 2])
def test_tokens_are_those_of_transformers(model: tuple[Path, Path], ranks: int) -> None:
    require_equal_tokens(*model, ranks)


class TestWhatCannotBeServed:
    """Is refused by name, before or while weights are loaded."""

    @pytest.fixture
    def compressed(self, tmp_path: Path) -> Path:
        return made(tmp_path, "mixed with dense, tied to a compressed embedding")[0]

    def test_a_newer_format(self, compressed: Path) -> None:
        config = json.loads((compressed / "config.json").read_text())
        config["quantization_config"]["format_version"] = 99
        (compressed / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="format version 99, this release reads 1 to 4"):
            by_vllm(compressed, prompts(), 1, 1)

    def test_a_checkpoint_without_one_of_its_parts(self, compressed: Path, capfd: pytest.CaptureFixture[str]) -> None:
        tensors = load_file(compressed / "model.safetensors")
        del tensors["model.layers.0.self_attn.k_proj.labels"]
        save_file(tensors, compressed / "model.safetensors", {"format": "pt"})
        with pytest.raises(RuntimeError):
            by_vllm(compressed, prompts(), 1, 1)
        message = "".join(capfd.readouterr())
        assert "ValueError: not in the checkpoint: model.layers.0.self_attn.k_proj.labels; `swsc verify DIR`" in message


def test_the_example_finds_the_same_tokens_compiled(model: tuple[Path, Path]) -> None:
    example = ROOT / "examples" / "serve_with_vllm.py"
    flags = ["--compile", "--tokens", "8", "--prompt", "w1 w22 w3", "--prompt", "w4 w55 w6 w7 w8"]
    done = subprocess.run(
        [sys.executable, str(example), str(model[0]), "--against", str(model[1]), *flags],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 of 2 prompts: the same 8 tokens as transformers" in done.stdout.splitlines()  # vLLM logs there, too


def test_the_plug_in_is_installed_by_name() -> None:
    (found,) = entry_points(group="vllm.general_plugins", name="swsc")
    assert found.value == "swsc_core.serving.vllm:register"


def test_the_plug_in_needs_no_ray_and_nothing_of_the_pipeline() -> None:
    code = (
        "import swsc_core.serving.vllm, sys; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'ray', 'pipeline'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
