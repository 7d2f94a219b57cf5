"""What the web UI remembers across restarts: settings of each model, presets, conversations.

One small JSON file each, written whole or not at all. Knows no model and no widget.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from quantmill.errors import BadCheckpoint, UserError
from quantmill.files import cache_root, read_json, write_json
from quantmill.types import Json, SamplingParams

SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_new_tokens",
    "seed",
)

PRESETS: Mapping[str, SamplingParams] = {
    "balanced": SamplingParams(),
    "precise": SamplingParams(temperature=0.2, top_p=0.9, top_k=20, repetition_penalty=1.05),
    "creative": SamplingParams(temperature=1.0, top_p=1.0, top_k=0, min_p=0.05, repetition_penalty=1.05),
    "greedy": SamplingParams(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0),
}


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """How a model is loaded and sampled, as the user saved it."""

    device: str = "auto"
    threads: int | None = None
    context: int | None = None
    exact: bool = False
    sampling: SamplingParams = field(default_factory=SamplingParams)
    system: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order; `raw` conversations are one text that is continued."""

    key: str
    title: str
    messages: tuple[dict[str, str], ...] = ()
    text: str = ""


class Store:
    """The folder `ui` of quantmill's own."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or cache_root()) / "ui"

    def settings(self, model: str) -> ModelSettings:
        """As saved for this model; the defaults where nothing is saved or the file is damaged."""
        try:
            data = read_json(self._settings_file(model))
            sampling = _known(SamplingParams, data.pop("sampling", {}), SAMPLING_FIELDS)
            return ModelSettings(**{**_known_values(ModelSettings, data), "sampling": sampling})
        except (UserError, TypeError, ValueError, AttributeError):  # whatever the file holds
            return ModelSettings()

    def save_settings(self, model: str, settings: ModelSettings) -> None:
        data = {k: getattr(settings, k) for k in ("device", "threads", "context", "exact", "system")}
        chosen = {k: getattr(settings.sampling, k) for k in SAMPLING_FIELDS}
        self._write(self._settings_file(model), {**data, "model": model, "sampling": chosen})

    def conversations(self) -> list[Conversation]:
        """All of them, the one that was changed last first. A damaged file is passed over."""
        files = sorted((self.root / "conversations").glob("*.json"), key=_changed, reverse=True)
        return [c for c in map(_conversation, files) if c is not None]

    def conversation(self, key: str) -> Conversation | None:
        return _conversation(self._conversation_file(key))

    def save_conversation(self, talk: Conversation) -> None:
        self._write(self._conversation_file(talk.key), asdict(talk))

    def delete_conversation(self, key: str) -> None:
        self._conversation_file(key).unlink(missing_ok=True)

    def _settings_file(self, model: str) -> Path:
        readable = re.sub(r"[^\w.-]+", "-", model)[-60:]
        return self.root / "models" / f"{readable}-{hashlib.sha256(model.encode()).hexdigest()[:8]}.json"

    def _conversation_file(self, key: str) -> Path:
        # The key comes back from a browser: nothing of it may name another folder.
        return self.root / "conversations" / f"{re.sub('[^0-9a-z-]', '', key)[:40] or 'none'}.json"

    def _write(self, path: Path, data: Json) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, data)


def new_key() -> str:
    """A name for a new conversation that sorts by time."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 1000:03d}"


def title_of(text: str) -> str:
    """The first words of a conversation."""
    words = " ".join(text.split())
    return words[:40] + ("…" if len(words) > 40 else "") or "new conversation"


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # deleted in another tab in this moment
        return 0.0


def _conversation(path: Path) -> Conversation | None:
    try:
        data = _known_values(Conversation, read_json(path))
        turns = tuple(
            {"role": str(m["role"]), "content": str(m["content"])} for m in data.pop("messages", ())
        )
        return Conversation(messages=turns, **data)
    except (BadCheckpoint, TypeError, KeyError):
        return None


def _known(cls: type[SamplingParams], data: Json, names: tuple[str, ...]) -> SamplingParams:
    return cls(**{k: v for k, v in data.items() if k in names})


def _known_values(cls: type, data: Json) -> Json:
    """What of a file written by an older or newer version still has a place."""
    names = {f.name for f in fields(cls)}
    return {k: v for k, v in data.items() if k in names}
