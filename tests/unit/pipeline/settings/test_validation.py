"""Settings: every shipped configuration loads, every flag is a field, errors survive the way between processes."""

import pickle
from pathlib import Path

import pytest
import yaml

from pipeline import errors
from pipeline.errors import ConfigError, SwscError
from pipeline.settings.compression import CompressSettings
from pipeline.settings.sweep import SweepSettings
from pipeline.settings.validation import read_config, validated
from tests.support.project import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    values = read_config(path)
    validated(SweepSettings if "variants" in values else CompressSettings, values, str(path))


def test_table_1_has_the_papers_rows_and_figures() -> None:
    path = next(path for path in CONFIGS if path.name == "table1.yaml")
    variants = yaml.safe_load(path.read_text())["variants"]
    swsc = {(v["projectors"], v["bits"]): v["reference"]["Llama-2-7B"] for v in variants if v["method"] == "swsc"}
    rtn = {
        (v["projectors"], v["bits"]): v["reference"]["Llama-2-7B"]
        for v in variants
        if v["method"] == "rtn" and v["granularity"] == "channel"
    }
    assert swsc == {
        ("q", 3): 6.547,
        ("q", 2): 7.297,
        ("k", 3): 6.502,
        ("k", 2): 7.148,
        ("q,k", 3): 8.102,
        ("q,k", 2): 10.886,
    }
    assert rtn == {
        ("q", 3): 20.55,
        ("q", 2): 4958.396,
        ("k", 3): 6.073,
        ("k", 2): None,
        ("q,k", 3): 40.206,
        ("q,k", 2): 10490,
    }


def test_the_demo_asks_for_what_can_be_carried_out() -> None:
    from pipeline.verbs.demo import DemoRequest, DemoResult

    variants = DemoResult(DemoRequest("out"), Path("model"), Path("text")).sweep_settings.variants
    assert [(v.method, v.bits) for v in variants] == [("rtn", 3), ("rtn", 3), ("swsc", 3)]


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values() if isinstance(kind, type)])
def test_every_error_survives_pickling(kind: type[SwscError]) -> None:
    again = pickle.loads(pickle.dumps(kind("layer 3: NaN")))
    assert type(again) is kind
    assert str(again) == "layer 3: NaN"
    assert again.exit_code in (1, 2)


def test_unknown_keys_name_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"settings: bitz: unknown key; known keys: method, preset, bits"):
        validated(CompressSettings, {"bitz": 3})
