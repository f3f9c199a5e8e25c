"""What is written down of an address: never what gives access."""

import pytest

from pipeline.redaction import redacted, redacted_values


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("https://host/a/t.txt?X-Amz-Signature=secret&n=1", "https://host/a/t.txt?…"),
        ("https://me:secret@host:8080/t.txt", "https://host:8080/t.txt"),
        ("https://secret@host/t.txt#secret", "https://host/t.txt?…"),
        ("HTTP://me:secret@host", "HTTP://host"),
        ("--text=https://host/t.txt?secret", "--text=https://host/t.txt?…"),
        ("https://host/a@b.txt", "https://host/a@b.txt"),
        ("s3://bucket/t.txt", "s3://bucket/t.txt"),
        ("what? a text#1.txt", "what? a text#1.txt"),
        ("org/set:config:split", "org/set:config:split"),
    ],
)
def test_user_names_passwords_and_queries_are_left_out(given: str, expected: str) -> None:
    assert redacted(given) == expected
    assert redacted(expected) == expected


def test_values_of_any_depth() -> None:
    given = {"a": ["https://host/?secret", 1, None], "b": {"c": "https://host/?secret"}}
    assert redacted_values(given) == {"a": ["https://host/?…", 1, None], "b": {"c": "https://host/?…"}}
