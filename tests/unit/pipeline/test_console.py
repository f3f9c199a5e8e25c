"""Lines on standard error."""

import pytest

from pipeline.console import log, log_prefix, prefixed


def test_lines_start_with_the_prefix_of_their_context(capsys: pytest.CaptureFixture[str]) -> None:
    with log_prefix("model a"):
        log("first")
        with log_prefix("model b"):
            log("second")
        log("third")
    log("fourth")
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["model a: first", "model b: second", "model a: third", "fourth"]
    assert captured.out == ""


def test_the_prefix_is_dropped_after_an_error() -> None:
    with pytest.raises(ValueError, match="x"), log_prefix("model"):
        raise ValueError("x")
    assert prefixed("line") == "line"
