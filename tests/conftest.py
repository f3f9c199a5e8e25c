import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.kernels import variables_of

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("RAY_ADDRESS", None)
os.environ.update(variables_of(os.environ.get("KERNELS", "native")))  # before torch is imported, which happens below

from tests.support.families import families, family  # noqa: F401 - fixtures
from tests.support.tiny import make_text, make_tiny_model

# The default draws the same examples in every run, so that a change is not blamed for a fault that was there before it;
# "thorough" draws new ones. A busy machine is no failure: no deadline.
settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile("thorough", deadline=None, derandomize=False, max_examples=10_000)
settings.load_profile("default")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded tiny Llama; read only."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 2000 tokens for the tiny model."""
    return make_text(tmp_path_factory.mktemp("text") / "text.txt")
