"""What others say of a failure, as part of a line of ours."""

from __future__ import annotations

import pytest

from quantmill.errors import said_by


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[/pytorch/gloo/tcp/pair.cc:547] Connection closed by peer [::1]:9. Maybe",
            "Connection closed by peer [::1]:9",
        ),
        ("a/b/pair.cc:553] Read error\nand a trace", "Read error"),
        ("Timed out", "Timed out"),
        ("", "RuntimeError"),
        ("x" * 300, "x" * 100),
    ],
)
def test_one_sentence_without_the_place_in_its_source(text: str, said: str) -> None:
    assert said_by(RuntimeError(text)) == said
