"""The tab *Text generation*: conversations and plain text, streamed, stopped, continued, tried again, edited."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from quantmill.errors import BadRequest, QuantmillError, UserError
from quantmill.serve.ui.desk import Answer, Message, Room, Spoken
from quantmill.serve.ui.store import Conversation, new_key, title_of
from quantmill.serve.ui.widgets import (
    loaded_names,
    plain,
    sampling_params,
    sampling_widgets,
    speed_line,
    told,
)

CHAT, RAW = "Chat", "Raw text"


@dataclass(frozen=True, slots=True)
class ChatTab:
    """Widgets that other tabs write to."""

    model: Any
    sampling: list[Any]
    system: Any
    rooms: Any  # the list of conversations


def build(room: Room) -> ChatTab:
    """Lay the tab out and wire it."""
    tab = _Talk(room)
    key = gr.State("")
    with gr.Row():
        with gr.Column(scale=1, min_width=260, elem_id="talk-side"):
            model = gr.Dropdown(label="Model", choices=[], interactive=True, elem_id="chat-model")
            mode = gr.Radio([CHAT, RAW], value=CHAT, label="Mode", elem_id="chat-mode")
            rooms = gr.Dropdown(
                tab.titles(), value=None, label="Conversations", interactive=True, elem_id="conversations"
            )
            with gr.Row():
                fresh = gr.Button("New", size="sm", min_width=80, elem_id="new-conversation")
                delete = gr.Button("Delete", size="sm", min_width=80, elem_id="delete-conversation")
            with gr.Accordion("Sampling", open=False, elem_id="sampling"):
                sampling = sampling_widgets()
            with gr.Accordion("System text", open=False):
                system = gr.Textbox("", lines=3, show_label=False, elem_id="system-text")
        with gr.Column(scale=3, min_width=320):
            talk = gr.Chatbot(
                height="60vh",
                buttons=["copy", "copy_all"],
                editable="all",
                show_label=False,
                placeholder="**Nothing said yet.** Write below; models are loaded on the tab Model.",
                elem_id="talk",
            )
            raw = gr.Textbox(
                "", lines=18, visible=False, label="Text", info="the model goes on", elem_id="raw"
            )
            said = gr.Textbox(placeholder="Write a message, Enter sends it", show_label=False, elem_id="said")
            with gr.Row():
                send = gr.Button("Send", variant="primary", elem_id="send", min_width=80)
                stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=80)
                go_on = gr.Button("Continue", elem_id="continue", min_width=100)
                again = gr.Button("Regenerate", elem_id="regenerate", min_width=120)
            status = gr.Markdown("", elem_id="chat-status")
            with gr.Accordion("The prompt as the model sees it", open=False, elem_id="prompt-accordion"):
                prompt = gr.Code("", language=None, show_label=False, wrap_lines=True, elem_id="prompt-text")

    settings = [model, mode, system, key, *sampling]
    shown = [talk, raw, status, key, rooms, prompt]
    # The text itself shows that something goes on; an error is a notice, and no label over every widget.
    gr.on(
        [send.click, said.submit],
        tab.send,
        [said, talk, raw, *settings],
        [said, *shown],
        show_progress="hidden",
    )
    go_on.click(tab.go_on, [talk, raw, *settings], shown, show_progress="hidden")
    gr.on([again.click, talk.retry], tab.again, [talk, raw, *settings], shown, show_progress="hidden")
    talk.edit(tab.edit, [talk, raw, *settings], shown, show_progress="hidden")
    stop.click(tab.stop, None, None, queue=False)  # not behind the answers that wait in the queue
    mode.change(_show_mode, mode, [talk, raw, said])
    rooms.input(tab.open, rooms, [talk, raw, key, mode, status])
    gr.on([fresh.click, talk.clear], tab.fresh, None, [talk, raw, key, rooms, status, prompt])
    delete.click(tab.delete, key, [talk, raw, key, rooms, status, prompt])
    return ChatTab(model, sampling, system, rooms)


def _show_mode(mode: str) -> list[Any]:
    return [gr.update(visible=mode == CHAT), gr.update(visible=mode == RAW), gr.update(visible=mode == CHAT)]


@dataclass(frozen=True, slots=True)
class _Asked:
    """Everything on the page that an answer depends on."""

    session: str
    messages: list[Message]
    raw: str
    model: str
    mode: str
    system: str
    key: str
    sampling: tuple[Any, ...]

    @classmethod
    def of(cls, request: gr.Request, talk: Any, raw: str, settings: Sequence[Any]) -> _Asked:
        model, mode, system, key, *sampling = settings
        session = request.session_hash or ""
        return cls(session, plain(talk), raw or "", model or "", mode, system or "", key, tuple(sampling))

    @property
    def with_system(self) -> list[Message]:
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system.strip() else []
        return system + self.messages

    def ending_with(self, message: Message) -> _Asked:
        return replace(self, messages=[*self.messages, message])

    def longer(self, piece: str) -> _Asked:
        if self.mode == RAW:
            return replace(self, raw=self.raw + piece)
        last = self.messages[-1]
        return replace(self, messages=[*self.messages[:-1], {**last, "content": last["content"] + piece}])


def _as_it_is() -> tuple[Any, ...]:
    """Nothing of what handlers yield changes. A generator that yields nothing would empty all of it."""
    return (gr.skip(),) * 6


class _Talk:
    """The tab's handlers. Generators yield the chat, the raw text, the status, the key, the list, the prompt."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.running: dict[str, Answer] = {}  # by browser session

    def titles(self) -> list[tuple[str, str]]:
        return [(c.title, c.key) for c in self.room.store.conversations()]

    def stop(self, request: gr.Request) -> None:
        """End this session's answer; its generator sees the end and shows what has come."""
        answer = self.running.pop(request.session_hash or "", None)
        if answer is not None:
            answer.stop()

    def send(
        self, request: gr.Request, said: str, talk: Any, raw: str, *settings: Any
    ) -> Iterator[tuple[Any, ...]]:
        """The user's message and the answer to it; in raw mode the text goes on."""
        asked = _Asked.of(request, talk, raw, settings)
        if asked.mode == CHAT:
            if not said.strip():
                gr.Info("Write a message first.")
                yield (gr.skip(), *_as_it_is())
                return
            asked = asked.ending_with({"role": "user", "content": said})
        for row in self._run(asked, go_on=False):
            yield ("" if isinstance(row[0], list) else gr.skip(), *row)  # what is refused can be sent again

    def go_on(self, request: gr.Request, talk: Any, raw: str, *settings: Any) -> Iterator[tuple[Any, ...]]:
        """More of the last answer."""
        asked = _Asked.of(request, talk, raw, settings)
        if asked.mode == CHAT and (not asked.messages or asked.messages[-1]["role"] != "assistant"):
            gr.Info("There is no answer to continue yet.")
            yield _as_it_is()
            return
        yield from self._run(asked, go_on=True)

    def again(self, request: gr.Request, talk: Any, raw: str, *settings: Any) -> Iterator[tuple[Any, ...]]:
        """The last answer anew."""
        asked = _Asked.of(request, talk, raw, settings)
        while asked.messages and asked.messages[-1]["role"] == "assistant":
            asked = replace(asked, messages=asked.messages[:-1])
        if asked.mode == CHAT and not asked.messages:
            gr.Info("There is nothing to answer yet.")
            yield _as_it_is()
            return
        yield from self._run(asked, go_on=False)

    def edit(
        self, request: gr.Request, event: gr.EditData, talk: Any, raw: str, *settings: Any
    ) -> Iterator[tuple[Any, ...]]:
        """A changed question is answered anew and what came after it is dropped; a changed answer is kept."""
        asked = _Asked.of(request, talk, raw, settings)
        place = event.index if isinstance(event.index, int) else event.index[0]
        changed = {**asked.messages[place], "content": str(event.value)}
        before, after = asked.messages[:place], asked.messages[place + 1 :]
        if changed["role"] == "user":
            yield from self._run(replace(asked, messages=[*before, changed]), go_on=False)
            return
        asked = replace(asked, messages=[*before, changed, *after])
        key = self._save(asked).key
        yield asked.messages, raw, "edited", key, self._list(key), self._prompt(asked)

    def _run(self, asked: _Asked, go_on: bool) -> Iterator[tuple[Any, ...]]:
        with told():
            try:
                answer = self._begin(asked, go_on)
            except UserError as error:  # a notice: what was written stays, and no widget turns red
                gr.Warning(str(error))
                yield _as_it_is()
                return
            self.running[asked.session] = answer
            if asked.mode == CHAT and not go_on:
                asked = asked.ending_with({"role": "assistant", "content": ""})
            asked = replace(asked, key=self._save(asked).key)
            yield asked.messages, asked.raw, "…", asked.key, self._list(asked.key), gr.skip()
            status = ""
            try:
                for piece in answer:
                    if isinstance(piece, Spoken):
                        status = speed_line(piece)
                        continue
                    asked = asked.longer(piece)
                    yield asked.messages, asked.raw, gr.skip(), gr.skip(), gr.skip(), gr.skip()
            finally:  # also where the browser has gone
                answer.stop()
                self._save(asked)
            yield asked.messages, asked.raw, status, asked.key, self._list(asked.key), self._prompt(asked)

    def _begin(self, asked: _Asked, go_on: bool) -> Answer:
        loaded = loaded_names(self.room.desk.loaded())
        if not loaded:
            raise BadRequest("no model is loaded: pick one on the tab Model")
        model = asked.model if asked.model in loaded else loaded[-1]
        params = sampling_params(asked.sampling)
        if asked.mode == RAW:
            return self.room.desk.go_on(model, asked.raw, params)
        return self.room.desk.answer(model, asked.with_system, params, go_on=go_on)

    def open(self, key: str | None) -> tuple[Any, ...]:
        """A conversation of before."""
        talk = self.room.store.conversation(key or "")
        if talk is None:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip(), "that conversation is gone"
        return list(talk.messages), talk.text, talk.key, CHAT if talk.messages else RAW, ""

    def fresh(self) -> tuple[Any, ...]:
        return [], "", "", self._list(None), "", ""

    def delete(self, key: str) -> tuple[Any, ...]:
        if key:
            self.room.store.delete_conversation(key)
        return self.fresh()

    def _save(self, asked: _Asked) -> Conversation:
        before = self.room.store.conversation(asked.key) if asked.key else None
        talk = before or Conversation(new_key(), title_of(""))
        first = asked.messages[0]["content"] if asked.messages else asked.raw
        title = title_of(first) if talk.title == title_of("") else talk.title
        talk = replace(talk, title=title, messages=tuple(asked.messages), text=asked.raw)
        if asked.messages or asked.raw:
            self.room.store.save_conversation(talk)
        return talk

    def _list(self, key: str | None) -> Any:
        return gr.update(choices=self.titles(), value=key or None)

    def _prompt(self, asked: _Asked) -> str:
        if asked.mode == RAW:
            return asked.raw
        try:
            return self.room.desk.prompt_text(asked.model, asked.with_system)
        except QuantmillError as error:
            return str(error)


def refresh(room: Room) -> Any:
    """The chooser of models, as they are loaded now."""
    names = loaded_names(room.desk.loaded())
    if not names:  # on a page that has just been opened a model may be on its way
        return gr.update(choices=[])
    return gr.update(choices=names, value=names[-1])


def conversations(room: Room) -> Any:
    """The list of conversations, as they are on disk now."""
    return gr.update(choices=_Talk(room).titles())
