"""The rules of docs/architecture.md about imports and folders, checked on the code."""

import ast
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support.project import ROOT

PACKAGES = ("swsc_core", "pipeline", "jobs")
FOLDERS = (
    "errors",
    "redaction",
    "console",
    "device",
    "settings",
    "storage",
    "architectures",
    "checkpoints",
    "engine",
    "models",
    "planning",
    "blocks",
    "outputs",
    "texts",
    "calibration",
    "allocation",
    "compression",
    "tuning",
    "evaluation",
    "restoring",
    "verification",
    "variants",
    "sweep",
    "report",
    "verbs",
)  # each imports only those before it
FILES = [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
PLUG_IN = ("swsc_core", "hf")  # what transformers calls: the one part of the core that knows it
PLUG_IN_DOORS = {
    f"swsc_core/hf/{name}.py"
    for name in ("__init__", "config", "experts", "weight_names", "layer_replacement", "quantizer", "restore_on_load")
}
# foreign library -> the files through whose door it comes in
DOORS = {
    "ray": {
        f"pipeline/engine/ray_backend/{name}.py"
        for name in (
            "actor",
            "arithmetic",
            "cluster",
            "connection",
            "discovery",
            "failures",
            "import_path",
            "pool",
            "worker_pools",
            "workers",
        )
    },
    # read and written by byte range (pipeline/checkpoints/checkpoint.py explains why), but for models that are mapped
    # into memory whole
    "safetensors": {"pipeline/models/loading.py"},
    "transformers": {
        "pipeline/blocks/layered_model.py",
        "pipeline/blocks/skeleton.py",
        "pipeline/models/loading.py",
        "pipeline/models/meta_loading.py",
        "pipeline/texts/windows.py",
        "pipeline/checkpoints/sources/gguf_reader.py",
        "pipeline/checkpoints/meta_model.py",
        *PLUG_IN_DOORS,
    },
    "gguf": {"pipeline/checkpoints/sources/gguf_reader.py"},
    # what comes and goes over the network, in hub.py alone; front matters
    "huggingface_hub": {
        "pipeline/checkpoints/sources/hub.py",
        "pipeline/outputs/model_card.py",
        "pipeline/outputs/card_metrics.py",
    },
    "lm_eval": {"pipeline/evaluation/lm_eval_answerer.py", "pipeline/evaluation/lm_eval_tasks.py"},
    "peft": {"swsc_core/hf/lora.py"},
    "datasets": {"pipeline/texts/texts.py"},
    "pyarrow": {
        "pipeline/texts/tables.py",
        "pipeline/texts/decompress.py",
        "pipeline/report/result_files.py",
        "pipeline/storage/object_stores.py",
    },
    "pydantic": {
        "pipeline/storage/records.py",
        *(
            f"pipeline/settings/{name}.py"
            for name in (
                "calibration",
                "cluster",
                "compression",
                "evaluation",
                "lm_eval",
                "loading",
                "matrix",
                "push",
                "sweep",
                "validation",
            )
        ),
    },
    "shtab": {"jobs/completion.py"},
    "rich": {"pipeline/engine/progress.py", "pipeline/report/tables.py"},
    "vllm": {"swsc_core/serving/vllm.py", "swsc_core/serving/vllm_experts.py"},
    "sglang": {"swsc_core/serving/sglang.py"},
}


def imports_of(file: Path) -> set[str]:
    """Modules that a file imports, and names that it imports from them, which may be modules as well."""
    nodes = list(ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return (
        plain | {str(node.module) for node in found} | {f"{n.module}.{alias.name}" for n in found for alias in n.names}
    )


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_down_only(file: Path) -> None:
    above = PACKAGES[PACKAGES.index(file.parts[0]) + 1 :]
    assert not {name for name in imports_of(file) if name.split(".")[0] in above}


@pytest.mark.parametrize("file", [file for file in FILES if file.parts[0] == "pipeline"], ids=str)
def test_a_folder_imports_only_those_above_it(file: Path) -> None:
    folder = file.parts[1].removesuffix(".py")
    if folder == "__init__":
        return
    later = FOLDERS[FOLDERS.index(folder) + 1 :]
    assert not {name for name in imports_of(file) if name.startswith("pipeline.") and name.split(".")[1] in later}


@pytest.mark.parametrize("library", DOORS)
def test_a_foreign_library_comes_in_through_its_doors_only(library: str) -> None:
    users = {str(file) for file in FILES if any(name.split(".")[0] == library for name in imports_of(file))}
    assert users <= DOORS[library]


def test_there_are_no_import_cycles() -> None:
    modules = {".".join(file.with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}
    imports = {name: imports_of(file) & modules.keys() - {name} for name, file in modules.items()}
    assert list(TopologicalSorter(imports).static_order())  # raises CycleError, which names the cycle


def test_no_folder_has_more_than_twelve_files() -> None:
    sizes = Counter(file.parent for file in FILES if file.name != "__init__.py")
    assert max(sizes.values()) <= 12, sizes.most_common(3)


def test_the_engine_imports_no_feature() -> None:
    engine = [file for file in FILES if file.parts[:2] == ("pipeline", "engine")]
    allowed = {*FOLDERS[: FOLDERS.index("engine") + 1]}
    assert engine
    for file in engine:
        own = {name.split(".")[1] for name in imports_of(file) if name.startswith("pipeline.")}
        assert own <= allowed, file


def test_the_core_knows_torch_and_the_standard_library_alone() -> None:
    engines = DOORS["vllm"] | DOORS["sglang"]  # which the engines themselves load, and nothing else imports
    core = [f for f in FILES if f.parts[0] == "swsc_core" and f.parts[:2] != PLUG_IN and str(f) not in engines]
    names = {name.split(".")[0] for file in core for name in imports_of(file)}
    assert names - sys.stdlib_module_names == {"torch", "swsc_core"}
    assert not names & {"os", "logging", "random"}


def test_the_core_does_not_know_its_plug_in() -> None:
    core = [file for file in FILES if file.parts[0] == "swsc_core" and file.parts[:2] != PLUG_IN]
    assert not {name for file in core for name in imports_of(file) if name.startswith("swsc_core.hf")}
