"""`quantmill chat` in a terminal: a pseudo-terminal types, readline edits, and what was typed is found again."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # starts the command twice
UP, CLEAR = "\x1b[A", "\x15"
CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """The command in a terminal of its own; `type` sends keys, `until` waits for what is shown."""

    def __init__(self, words: list[str], environment: dict[str, str]) -> None:
        ours, theirs = pty.openpty()
        self.file = ours
        self.process = subprocess.Popen(
            words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())

    def until(self, wanted: str, seconds: float = 240) -> str:
        """All that was shown since the last call, up to and with `wanted`."""
        until = time.monotonic() + seconds
        while wanted not in self.shown:
            left = until - time.monotonic()
            assert left > 0, f"{wanted!r} does not come: {self.shown!r}"
            if select.select([self.file], [], [], left)[0]:
                try:
                    some = os.read(self.file, 4096).decode("utf-8", "replace")
                except OSError:  # the other end is closed
                    raise AssertionError(f"it ended before {wanted!r}: {self.shown!r}") from None
                self.shown += CODES.sub("", some).replace("\r", "")
        before, _, self.shown = self.shown.partition(wanted)
        return before + wanted

    def say(self, text: str) -> str:
        """Type a line at the prompt -> what is shown until the next prompt, without the line itself."""
        self.type(text + "\n")
        return self.until("\n> ").removesuffix("\n> ").partition("\n")[2]

    def end(self) -> int:
        code = self.process.wait(120)
        os.close(self.file)
        return code


@pytest.fixture
def chat(tiny_llama: Path, tmp_path: Path) -> Iterator[Callable[[], Terminal]]:
    """chat() starts it; a second one has the history of the first."""
    terminals: list[Terminal] = []
    (tiny_llama / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    )

    def start() -> Terminal:
        words = [sys.executable, "-m", "quantmill.cli", "chat", str(tiny_llama), "--device", "cpu"]
        words += ["--threads", "1", "--max-new-tokens", "6", "--seed", "3"]
        home = {"QUANTMILL_HOME": str(tmp_path / "home"), "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "200"}
        terminals.append(Terminal(words, {**os.environ, **home}))
        terminals[-1].until("> ")
        return terminals[-1]

    yield start
    (tiny_llama / "chat_template.jinja").unlink()
    for terminal in terminals:
        if terminal.process.poll() is None:
            terminal.process.kill()
            terminal.process.wait()


def test_a_conversation_in_a_terminal(chat: Callable[[], Terminal]) -> None:
    first = chat()
    answer = first.say("hello")
    assert answer.strip()
    assert first.say("/regen") == answer  # the same seed
    assert first.say("/set temperature 0") == "temperature 0.0"
    assert first.say("/system be brief") == "system: be brief"
    assert "a number is needed" in first.say("/set top_p much")
    assert "no command /what" in first.say("/what")
    assert first.say("/reset") == "forgotten"
    first.type("one \\\n")
    first.until("\n> ")
    joined = first.say("two")
    assert first.say("/reset") == "forgotten"
    first.type('"""\n')
    first.until("\n> ")
    first.type("one \n")
    first.until("\n> ")
    first.type("two\n")
    first.until("\n> ")
    assert first.say('"""') == joined  # the same text, typed another way, greedy
    first.type("/quit\n")
    assert first.end() == 0

    again = chat()
    again.type(UP + UP)
    again.until('"""')
    again.type(CLEAR + "\x04")  # an empty line, and the end of the input
    assert again.end() == 0
