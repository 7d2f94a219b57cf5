"""Every row layout that is read, every misfit that is passed over."""

from __future__ import annotations

import pytest

from quantmill.errors import BadText
from quantmill.quantize.documents import Turn, from_rows

HI, HO = Turn("user", "hi"), Turn("assistant", "ho")


@pytest.mark.parametrize(
    ("row", "document"),
    [
        ({"text": "a b"}, "a b"),
        ({"content": "a b", "id": 3}, "a b"),
        ({"text": None, "content": "second choice"}, "second choice"),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
            (HI, HO),
        ),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, (HI, HO)),
        ({"messages": [{"role": "tool", "content": "42"}]}, (Turn("tool", "42"),)),
        ({"prompt": "hi", "response": "ho"}, (HI, HO)),
        ({"prompt": "hi", "completion": "ho"}, (HI, HO)),
        ({"text": ""}, None),
        ({"text": " \n"}, None),
        ({"text": 7}, None),
        ({"text": "half a pair \ud800"}, None),
        ({"messages": []}, None),
        ({"messages": "hi"}, None),
        ({"messages": ["hi"]}, None),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]}, None),
        ({"messages": [{"content": "nobody says this"}]}, None),
        ({"prompt": "hi", "response": ""}, None),
    ],
)
def test_row_to_document(row: dict[str, object], document: object) -> None:
    assert list(from_rows(iter([row]), "x")) == [document]


def test_first_row_must_have_a_known_column() -> None:
    with pytest.raises(BadText, match=r"x\.jsonl has the columns body, prompt: rename one to text, content"):
        list(from_rows(iter([{"body": "a", "prompt": "half of a pair"}]), "x.jsonl"))


def test_a_later_misfit_is_only_passed_over() -> None:
    assert list(from_rows(iter([{"text": "a"}, {"body": "b"}, {"text": "c"}]), "x")) == ["a", None, "c"]


def test_running_text_keeps_its_empty_rows() -> None:
    rows = [{"text": "a"}, {"text": ""}]
    assert list(from_rows(iter(rows), "x", keep_empty=True)) == ["a", ""]
