"""The tab *Model*: find a repository, see its branches, fetch one, load it, keep its settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from quantmill.console import gigabytes
from quantmill.errors import BadRequest, QuantmillError
from quantmill.serve.ui import chat_tab
from quantmill.serve.ui.desk import Loaded, Room
from quantmill.serve.ui.shelf import Download, Stopped, branch_rows, choices, read_parameters
from quantmill.serve.ui.store import ModelSettings
from quantmill.serve.ui.widgets import sampling_params, sampling_values, told
from quantmill.sources import split_branch

HEAD = ["branch", "bits", "group", "act order", "size", "KL", "fits"]
WIDTHS: list[str | int] = ["196px", "42px", "56px", "82px", "78px", "64px", "68px"]
NONE_LOADED = "No model is loaded. Pick one above: it loads by itself, with the parameters in its folder."
DEVICES = ["auto", "cpu", "cuda"]


def build(room: Room, talk: chat_tab.ChatTab) -> tuple[Any, Any]:
    """Lay the tab out and wire it. Returns what `now` refreshes: the chooser of models, and the status."""
    tab = _Models(room)
    with gr.Row():
        with gr.Column(min_width=320):
            gr.Markdown("### Get a model")
            asked = gr.Textbox(
                label="Repository",
                placeholder="owner/name or owner/name:branch",
                elem_id="repository",
            )
            with gr.Row():
                look = gr.Button("List branches", elem_id="list-branches", min_width=130)
                fetch = gr.Button("Download", variant="primary", elem_id="download", min_width=100)
                cancel = gr.Button("Cancel", variant="stop", elem_id="cancel-download", min_width=100)
            fetched = gr.Markdown("", elem_id="download-status")
            table = gr.Dataframe(
                headers=HEAD, value=[], interactive=False, column_widths=WIDTHS, elem_id="branches"
            )
        with gr.Column(min_width=320):
            gr.Markdown("### Use a model")
            with gr.Row():
                pick = gr.Dropdown(
                    choices(room.desk.known()), value=None, label="Model", scale=4, elem_id="pick-model"
                )
                refresh = gr.Button("↻", scale=0, min_width=48, elem_id="refresh-models")
            with gr.Row():
                device = gr.Dropdown(DEVICES, value="auto", label="Device", min_width=130, elem_id="device")
                threads = gr.Textbox(
                    "", label="Threads", placeholder="every core", min_width=130, elem_id="threads"
                )
                context = gr.Textbox(
                    "", label="Context", placeholder="the model's", min_width=130, elem_id="context"
                )
            exact = gr.Checkbox(False, label="Exact (float32 activations on a CPU)", elem_id="exact")
            with gr.Row():
                save = gr.Button("Save settings", elem_id="save-settings", min_width=130)
                reload = gr.Button("Reload", elem_id="reload", min_width=100)
                unload = gr.Button("Unload", elem_id="unload", min_width=100)
            status = gr.Markdown(NONE_LOADED, elem_id="model-status")

    options = [device, threads, context, exact]
    shown = [status, talk.model]
    look.click(tab.branches, asked, [table, fetched])
    table.select(tab.choose, asked, asked)
    fetch.click(tab.download, asked, [fetched, pick])
    cancel.click(tab.cancel, None, None, queue=False)
    refresh.click(tab.refresh, None, pick)
    picked = pick.input(tab.settings, pick, [*options, *talk.sampling, talk.system], show_progress="hidden")
    picked.then(tab.load, [pick, *options], shown)
    reload.click(tab.load, [pick, *options], shown)
    unload.click(tab.unload, pick, shown)
    save.click(tab.save, [pick, talk.system, *options, *talk.sampling], status)
    return pick, status


def now(room: Room, names: Sequence[str]) -> tuple[Any, Any]:
    """The chooser and the status as a page that is opened finds them."""
    loaded = room.desk.loaded()
    if not loaded:
        return gr.update(choices=names), gr.skip()  # somebody may have picked one meanwhile
    return gr.update(choices=names, value=loaded[-1].name), describe(loaded[-1])


class _Models:
    """The tab's handlers."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.downloads: dict[str, Download] = {}  # by browser session

    def branches(self, asked: str) -> tuple[Any, str]:
        with told():
            name, rows, best = branch_rows(asked)
        hint = f" Click a row to choose it; ★ {best} is the best for this machine." if best else ""
        return rows, f"**{name}** has {len(rows)} branches.{hint}"

    def choose(self, asked: str, event: gr.SelectData) -> str:
        """A click on a branch writes it into the box."""
        return f"{split_branch(asked.strip())[0]}:{event.row_value[0]}"

    def download(self, asked: str, request: gr.Request) -> Iterator[tuple[Any, Any]]:
        with told():
            job = Download(asked)
            self.downloads[request.session_hash or ""] = job
            try:
                for state in job.run():
                    share = f" ({state.done / state.total:.0%})" if state.total else ""
                    yield f"{gigabytes(state.done)} of {gigabytes(state.total)}{share}", gr.skip()
            except Stopped:
                yield "Cancelled. Downloading again goes on from here.", gr.skip()
                return
            except OSError as error:
                raise BadRequest(f"{asked} could not be fetched ({error}): try again, it goes on") from None
            name = asked.strip().removesuffix(":main")
            yield f"**{name}** is here, every hash is right.", gr.update(choices=self._choices(), value=name)

    def cancel(self, request: gr.Request) -> None:
        job = self.downloads.pop(request.session_hash or "", None)
        if job is not None:
            job.cancel()

    def refresh(self) -> Any:
        return gr.update(choices=self._choices())

    def _choices(self) -> list[str]:
        return choices(self.room.desk.known())

    def settings(self, name: str) -> list[Any]:
        """What was saved for the model."""
        s = self.room.store.settings(name or "")
        numbers = ["" if n is None else str(n) for n in (s.threads, s.context)]
        return [s.device, *numbers, s.exact, *sampling_values(s.sampling), s.system]

    def load(self, name: str, *options: Any) -> Iterator[tuple[Any, Any]]:
        if not name:
            gr.Info("Pick a model first.")
            yield gr.skip(), gr.skip()  # a generator that yields nothing would empty both
            return
        yield f"Loading **{name}** …", gr.skip()
        with told():
            try:
                loaded = self.room.desk.load(name, _settings(options))
            except QuantmillError as error:
                yield f"**{name}** was not loaded: {error}", chat_tab.refresh(self.room)
                raise
        names = [m.name for m in self.room.desk.loaded()]
        yield describe(loaded), gr.update(choices=names, value=loaded.name)

    def unload(self, name: str) -> tuple[Any, Any]:
        with told():
            if not name:
                raise BadRequest("no model is picked: pick the one that is to go")
            self.room.desk.unload(name)
        left = [m.name for m in self.room.desk.loaded()]
        return f"**{name}** is unloaded.", gr.update(choices=left, value=left[-1] if left else None)

    def save(self, name: str, system: str, *values: Any) -> str:
        with told():
            if not name:
                raise BadRequest("no model is picked: pick the one that these settings are for")
            options, sampling = values[:4], values[4:]
            saved = _settings(options, sampling, system)
            self.room.store.save_settings(name, saved)
        return f"Settings of **{name}** are saved."


def _settings(options: Sequence[Any], sampling: Sequence[Any] = (), system: str = "") -> ModelSettings:
    device, threads, context, exact = options
    whole = [_whole(name, text) for name, text in (("threads", threads), ("context", context))]
    if not sampling:
        return ModelSettings(device, whole[0], whole[1], bool(exact))
    return ModelSettings(device, whole[0], whole[1], bool(exact), sampling_params(sampling), system)


def _whole(name: str, text: str) -> int | None:
    text = (text or "").strip()
    if text and not (text.isdigit() and int(text)):
        raise BadRequest(f"{name} is {text!r}; use a whole number of at least 1, or leave it empty")
    return int(text) if text else None


def describe(loaded: Loaded) -> str:
    """A loaded model for people: what its files say and what it takes."""
    rows = read_parameters(loaded.folder).rows()
    rows += [("runs on", loaded.backend), ("context", f"{loaded.context} tokens")]
    rows += [("memory", f"{gigabytes(loaded.weight_bytes)} + {gigabytes(loaded.cache_bytes)} for the cache")]
    rows += [("chat template", "its own" if loaded.has_template else "none: use raw text")]
    head, *cells = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join([f"**{loaded.name}** is loaded.", "", head, "|---|---|", *cells])
