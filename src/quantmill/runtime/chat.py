"""A conversation of several turns, and the terminal loop around it. Knows no terminal but two functions.

Commands begin with a slash and are rows of one table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from quantmill.errors import BadRequest, UserError
from quantmill.runtime.generate import generate_ids
from quantmill.runtime.interface import Runtime
from quantmill.runtime.single import SingleSequence
from quantmill.runtime.tokenizer import TextTokenizer
from quantmill.types import SamplingParams

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
ReadLine = Callable[[], str | None]  # None or EOFError: no more lines
Write = Callable[[str], None]


QUOTES = '"""'


@dataclass
class Conversation:
    """Messages in the order they were said; system text apart, so that it can change in the middle."""

    system: str = ""
    messages: list[Message] = field(default_factory=list)

    def ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})

    def reset(self) -> None:
        """Forget what was said; the system text stays."""
        self.messages.clear()

    def undo_answer(self) -> bool:
        """Drop the last answer so that it can be given again. False where there is none."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return False
        self.messages.pop()
        return True

    def ids(self, tokenizer: TextTokenizer) -> list[int]:
        """Token ids up to where the next answer begins.

        A template that knows no system role (Mistral's first) gets the system text at the head of the
        first question, as Mistral's own guide does. Raises BadRequest where there is no template or it
        refuses the messages.
        """
        if not self.system:
            return tokenizer.chat_ids(self.messages)
        try:
            return tokenizer.chat_ids([{"role": "system", "content": self.system}, *self.messages])
        except BadRequest:
            if not tokenizer.has_template or not self.messages:
                raise
        first, *rest = self.messages
        return tokenizer.chat_ids([{**first, "content": f"{self.system}\n\n{first['content']}"}, *rest])


@dataclass
class _Session:
    """What the commands of the loop may change."""

    sequence: SingleSequence  # remembers what it has read, so each turn reads what is new
    tokenizer: TextTokenizer
    params: SamplingParams
    write: Write
    lookup: bool
    talk: Conversation = field(default_factory=Conversation)
    going: bool = True


def chat_loop(
    runtime: Runtime,
    tokenizer: TextTokenizer,
    params: SamplingParams,
    read_line: ReadLine,
    write: Write,
    *,
    lookup: bool = False,
) -> Conversation:
    """Read questions, write answers as they come, until /quit or the end of the input.

    `read_line` gives a line without its end, None (or EOFError) at the end of the input, and may raise
    KeyboardInterrupt, which stops an answer and ends the loop between answers. A user's mistake is
    written, not raised; only a tokenizer without a chat template raises BadRequest, at once. Returns the
    conversation. `lookup`: see generate.
    """
    if not tokenizer.has_template:
        raise BadRequest("this tokenizer has no chat template: use `quantmill generate --prompt TEXT`")
    session = _Session(SingleSequence(runtime), tokenizer, params, write, lookup)
    while session.going:
        said = _next_question(read_line)
        if said is None:
            break
        try:
            _handle(session, said.strip())
        except UserError as error:
            write(f"{error}\n")
    return session.talk


def _next_question(read_line: ReadLine) -> str | None:
    """One line, or several: a line that ends in a backslash goes on in the next, and three quotes alone
    begin a text that ends with three quotes."""
    line = _next_line(read_line)
    if line is None:
        return None
    lines: list[str] = []
    if line.strip() == QUOTES:
        while (more := _next_line(read_line)) is not None and more.strip() != QUOTES:
            lines.append(more)
        return "\n".join(lines)
    while line is not None and line.endswith("\\"):
        lines.append(line[:-1])
        line = _next_line(read_line)
    return "\n".join([*lines, line or ""])


def _next_line(read_line: ReadLine) -> str | None:
    try:
        return read_line()
    except (EOFError, KeyboardInterrupt):
        return None


def _handle(session: _Session, line: str) -> None:
    if not line:
        return
    if line.startswith("/"):
        name, _, rest = line.partition(" ")
        if name not in COMMANDS:
            raise BadRequest(f"no command {name}; there are {', '.join(COMMANDS)}")
        COMMANDS[name](session, rest.strip())
        return
    session.talk.ask(line)
    _answer(session)


def _answer(session: _Session) -> None:
    """Give the answer that is due. Ctrl-C keeps what was said; a refused question is taken back."""
    said: list[str] = []

    def show(text: str) -> None:
        said.append(text)
        session.write(text)

    try:
        ids = session.talk.ids(session.tokenizer)
        sequence, tokenizer = session.sequence, session.tokenizer
        generate_ids(sequence, tokenizer, ids, session.params, on_text=show, lookup=session.lookup)
    except KeyboardInterrupt:
        pass
    except UserError:
        session.talk.messages.pop()
        raise
    session.write("\n")
    session.talk.answer("".join(said))


def _quit(session: _Session, rest: str) -> None:
    session.going = False


def _reset(session: _Session, rest: str) -> None:
    session.talk.reset()
    session.write("forgotten\n")


def _system(session: _Session, rest: str) -> None:
    session.talk.system = rest
    session.write(f"system: {rest or '(none)'}\n")


def _regen(session: _Session, rest: str) -> None:
    if not session.talk.undo_answer():
        raise BadRequest("there is no answer yet: ask something first")
    _answer(session)


def _set(session: _Session, rest: str) -> None:
    """/set NAME VALUE for the numbers of SamplingParams; alone it lists them."""
    name, _, text = rest.replace("=", " ").partition(" ")
    if name:
        if name not in _NUMBERS:
            raise BadRequest(f"no parameter {name!r}; there are {', '.join(_NUMBERS)}: /set temperature 0.7")
        session.params = dataclasses.replace(session.params, **{name: _number(name, text.strip())})
    shown = [name] if name else list(_NUMBERS)
    session.write("".join(f"{key} {getattr(session.params, key)}\n" for key in shown))


def _number(name: str, text: str) -> Any:
    if name == "seed" and text in ("", "none"):
        return None
    try:
        return _NUMBERS[name](text)
    except ValueError:
        raise BadRequest(f"{name} is {text!r}; a number is needed: /set {name} 1") from None


_NUMBERS: dict[str, Callable[[str], float]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "typical_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "max_new_tokens": int,
    "seed": int,
}


COMMANDS: dict[str, Callable[[_Session, str], None]] = {
    "/quit": _quit,
    "/reset": _reset,
    "/system": _system,
    "/set": _set,
    "/regen": _regen,
}
