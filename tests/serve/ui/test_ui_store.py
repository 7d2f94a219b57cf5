"""What the page remembers."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantmill.serve.ui.store import Conversation, ModelSettings, Store, new_key, title_of
from quantmill.types import SamplingParams


def test_settings_come_back_as_they_were_saved(tmp_path: Path) -> None:
    settings = ModelSettings(
        "cpu", 2, 512, True, SamplingParams(temperature=0.3, seed=7, min_p=0.1), "Be brief."
    )
    Store(tmp_path).save_settings("owner/name:branch", settings)
    assert Store(tmp_path).settings("owner/name:branch") == settings
    assert Store(tmp_path).settings("owner/name") == ModelSettings()  # another branch is another model


@pytest.mark.parametrize(
    "content", ["", "[]", '{"device": 3, "sampling": {"temperature": -1}}', '{"sampling": 5}']
)
def test_a_damaged_settings_file_gives_the_defaults(tmp_path: Path, content: str) -> None:
    store = Store(tmp_path)
    store.save_settings("m", ModelSettings(threads=2))
    next((store.root / "models").iterdir()).write_text(content)
    assert store.settings("m") == ModelSettings()


def test_keys_of_another_version_are_passed_over(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save_settings("m", ModelSettings(threads=2))
    file = next((store.root / "models").iterdir())
    file.write_text('{"threads": 3, "colour": "red", "sampling": {"top_k": 5, "mood": 1}}')
    assert store.settings("m") == ModelSettings(threads=3, sampling=SamplingParams(top_k=5))


def test_conversations_are_kept_the_latest_first_and_deleted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    turns = ({"role": "user", "content": "é\n"}, {"role": "assistant", "content": "ok"})
    for number, key in enumerate(("20260101-1", "20260101-2")):
        store.save_conversation(Conversation(key, f"talk {number}", turns))
        file = store.root / "conversations" / f"{key}.json"
        import os

        os.utime(file, (number, number))
    assert [c.title for c in store.conversations()] == ["talk 1", "talk 0"]
    assert store.conversation("20260101-1") == Conversation("20260101-1", "talk 0", turns)
    store.delete_conversation("20260101-1")
    assert store.conversation("20260101-1") is None
    assert len(store.conversations()) == 1


@pytest.mark.parametrize("key", ["../../../etc/passwd", "..", "/", "a/../../b", "", "x" * 500])
def test_a_key_from_a_browser_never_leaves_the_folder(tmp_path: Path, key: str) -> None:
    store = Store(tmp_path / "home")
    store.save_conversation(Conversation(key, "t", ({"role": "user", "content": "x"},)))
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert [p.parent for p in written] == [store.root / "conversations"]
    store.delete_conversation(key)
    assert not written[0].exists()


def test_a_title_is_the_beginning_in_one_line() -> None:
    assert title_of("What is\nthe   capital?") == "What is the capital?"
    assert len(title_of("word " * 30)) == 41
    assert title_of("") == "new conversation"


def test_keys_sort_by_time_and_differ() -> None:
    keys = [new_key() for _ in range(3)]
    assert keys[0][:15] <= keys[-1][:15]
