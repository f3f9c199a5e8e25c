"""Results of a sweep."""

from pipeline.settings.compression import CompressSettings
from pipeline.settings.sweep import Variant
from pipeline.sweep.rows import SweepResult
from pipeline.sweep.runs import settings_of


def test_a_variant_is_a_compression_with_the_same_settings() -> None:
    variant = Variant(name="a", bits=4, projectors=("q",), reference={"Llama-2-7B": 5.0})
    assert settings_of(variant) == CompressSettings(bits=4, projectors=("q",))
    assert settings_of(variant).model_fields_set == {"bits", "projectors"}


def test_rows_with_an_error_are_not_measured() -> None:
    result = SweepResult([{"error": None}, {"error": "lost"}], [], 1.0)
    assert (result.measured, result.failed) == (1, [{"error": "lost"}])
