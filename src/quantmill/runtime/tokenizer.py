"""Text to token ids and back, and conversations to token ids. Knows no model and loads no torch.

`open_tokenizer` reads tokenizer.json as it lies, with what tokenizer_config.json says beside it, and gives
the ids that Transformers' AutoTokenizer gives. A folder without tokenizer.json goes through AutoTokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmill.errors import BadCheckpoint, BadRequest, SourceNotFound
from quantmill.files import read_json
from quantmill.runtime.template import Message, render
from quantmill.types import Json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Detokenizer", "Message", "TextTokenizer", "open_tokenizer"]

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LONG = 8192  # characters, some milliseconds: a longer text is encoded without holding up other threads
_BROKEN = "\ufffd"  # what a decoder shows for bytes that are no character, or not yet
_LONGEST_PART = 16  # tokens held back for one character; four bytes are the most that UTF-8 needs
_SPACE = "\u2581"  # SentencePiece's mark for a space


def open_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer of a model folder. Raises SourceNotFound, BadCheckpoint."""
    if not folder.is_dir():
        raise SourceNotFound(f"{folder} is no folder: give a folder with config.json and *.safetensors")
    if not (folder / "tokenizer.json").is_file():
        from quantmill.runtime.load import load_tokenizer

        return TextTokenizer.from_transformers(load_tokenizer(folder), end_tokens(folder))
    settings = _optional(folder / "tokenizer_config.json")
    named = {**_optional(folder / "special_tokens_map.json"), **settings}
    special = {name: _content(named[name]) for name in NAMES if named.get(name)}
    backend = _backend(folder, settings, named)
    return TextTokenizer(backend, special, _templates(folder, settings), end_tokens(folder))


class TextTokenizer:
    """A tokenizer of the `tokenizers` library with the special tokens and chat templates of its folder."""

    def __init__(
        self,
        backend: Tokenizer,
        special: Mapping[str, str],
        templates: Mapping[str, str],
        ends: Sequence[int] = (),
    ) -> None:
        """special: text by name ("bos_token"); templates: Jinja by name; ends: tokens that end an answer."""
        self.backend, self.special, self.templates = backend, dict(special), dict(templates)
        own = backend.token_to_id(self.special.get("eos_token", ""))
        self.eos_token_ids = tuple(sorted({*ends} if own is None else {*ends, own}))

    @classmethod
    def from_transformers(cls, tokenizer: Any, ends: Sequence[int] = ()) -> TextTokenizer:
        """The same over a Transformers tokenizer. Raises BadCheckpoint for one written in Python alone."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            name = type(tokenizer).__name__
            raise BadCheckpoint(f"{name} has no tokenizer.json: save it as one with Transformers")
        special = {name: str(text) for name, text in tokenizer.special_tokens_map.items() if name in NAMES}
        templates = tokenizer.chat_template or {}
        return cls(
            backend, special, templates if isinstance(templates, dict) else {"default": templates}, ends
        )

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; `special`: with the tokens that begin and end a text, where this tokenizer has any."""
        if len(text) <= LONG:
            return list(self.backend.encode(text, add_special_tokens=special).ids)
        # Of several texts it lets go of the interpreter's lock, and seconds for a megabyte would hold up all else.
        return list(self.backend.encode_batch([text], add_special_tokens=special)[0].ids)

    async def aencode(self, text: str, special: bool = True) -> list[int]:
        """`encode` in an event loop, which goes on meanwhile."""
        if len(text) <= LONG:
            return self.encode(text, special)
        import asyncio

        return await asyncio.to_thread(self.encode, text, special)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special))

    @property
    def has_template(self) -> bool:
        return bool(self.templates)

    def chat_text(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        answer: bool = True,
    ) -> str:
        """The prompt of a conversation as text.

        tools: JSON schemas of functions the model may call. template: Jinja, or the name of one of the
        folder's templates. answer: end where the assistant's answer begins. Raises BadRequest where there
        is no template or it refuses these messages.
        """
        chosen = self._template(template, tools is not None)
        return render(chosen, messages, tools=tools, answer=answer, special=self.special)

    def chat_ids(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        answer: bool = True,
    ) -> list[int]:
        """The same as token ids."""
        text = self.chat_text(messages, tools=tools, template=template, answer=answer)
        # The template writes its own special tokens: adding them again would double the first.
        return self.encode(text, special=False)

    def _template(self, asked: str | None, with_tools: bool) -> str:
        if asked is not None:
            return self.templates.get(asked, asked)
        for name in ("tool_use", "default") if with_tools else ("default",):
            if name in self.templates:
                return self.templates[name]
        if self.templates:
            raise BadRequest(
                f"none of the chat templates {', '.join(self.templates)} is the default: name one"
            )
        raise BadRequest("this tokenizer has no chat template: use `quantmill generate --prompt TEXT`")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; parts of characters too. Raises BadRequest outside the
        vocabulary."""
        text = self.backend.id_to_token(token)
        if text is None:
            raise BadRequest(f"token {token} is not in the vocabulary of {self.vocab_size}")
        if token in self._added:
            return str(text).encode()
        if self._byte_level:
            return bytes(_BYTE_OF[character] for character in text)
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes([int(text[3:5], 16)])
        return str(text).replace(_SPACE, " ").encode()

    @cached_property
    def vocab_size(self) -> int:
        """The largest token id and one."""
        return max(self.backend.get_vocab().values(), default=-1) + 1

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.backend.get_added_tokens_decoder())

    @cached_property
    def _byte_level(self) -> bool:
        return "ByteLevel" in repr(self.backend.decoder)


class Detokenizer:
    """Token ids one by one -> text that can be shown at once.

    Holds back tokens that end in part of a character. Decodes from a few tokens before the new ones on,
    because a tokenizer may treat the first token of a text differently (a leading space is dropped).
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.start = 0  # where decoding begins
        self.shown = 0  # tokens before this one have been given out

    def push(self, token: int) -> str:
        """The text that this token completes, or ""."""
        self.ids.append(token)
        text = self._new_text()
        if text.endswith(_BROKEN) and len(self.ids) - self.shown < _LONGEST_PART:
            return ""
        if text:  # a token without text (a special one) is no start to decode from
            self.start = self.shown
        self.shown = len(self.ids)
        return text

    def flush(self) -> str:
        """What is still held back: bytes that never became a character."""
        text = self._new_text()
        self.start = self.shown = len(self.ids)
        return text

    def _new_text(self) -> str:
        before = self.tokenizer.decode(self.ids[self.start : self.shown])
        return self.tokenizer.decode(self.ids[self.start :])[len(before) :]


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Every token id that ends an answer by generation_config.json or config.json, ascending."""
    found: list[Any] = []
    for name in ("generation_config.json", "config.json"):
        ends = _optional(folder / name).get("eos_token_id")
        found += ends if isinstance(ends, list) else [ends]
    return tuple(sorted({e for e in found if isinstance(e, int)}))


def _optional(path: Path) -> Json:
    return read_json(path) if path.is_file() else {}


def _content(token: Any) -> str:
    """A special token's text: configs write it plain or as an object."""
    return str(token["content"] if isinstance(token, dict) else token)


def _templates(folder: Path, settings: Json) -> dict[str, str]:
    """Chat templates by name: files win over tokenizer_config.json, as in Transformers."""
    own = settings.get("chat_template") or {}
    if isinstance(own, list):
        own = {entry["name"]: entry["template"] for entry in own}
    found = {"default": own} if isinstance(own, str) else dict(own)
    single = folder / "chat_template.jinja"
    if single.is_file():
        found = {"default": single.read_text(encoding="utf-8")}
    for path in sorted(folder.glob("additional_chat_templates/*.jinja")):
        found[path.stem] = path.read_text(encoding="utf-8")
    return found


def _backend(folder: Path, settings: Json, named: Json) -> Tokenizer:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself for a bad file
        raise BadCheckpoint(f"{path} cannot be read ({error}): download the model again") from error
    backend.no_truncation()
    backend.no_padding()
    if _rebuilt_as_llama(folder, settings, backend):
        _rebuild_as_llama(backend, settings)
    _add_tokens(backend, settings, named)
    return backend


def _add_tokens(backend: Tokenizer, settings: Json, named: Json) -> None:
    """Tokens that only the configs know, and the named ones as special."""
    listed = settings.get("added_tokens_decoder") or {}
    known = backend.get_added_tokens_decoder()
    for number, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        if int(number) not in known:
            backend.add_tokens([_added_token(entry)])
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    entries = [named[name] for name in NAMES if named.get(name)]
    entries += list(more.values()) if isinstance(more, dict) else list(more)
    backend.add_special_tokens([_added_token(entry) for entry in entries])


def _added_token(entry: Any) -> Any:
    from tokenizers import AddedToken

    if not isinstance(entry, dict):
        return AddedToken(str(entry), special=True, normalized=False)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(entry["content"], **{flag: entry[flag] for flag in flags if flag in entry})


def _rebuilt_as_llama(folder: Path, settings: Json, backend: Tokenizer) -> bool:
    """Whether Transformers 5 takes only vocabulary and merges from tokenizer.json: its LlamaTokenizer."""
    kind = str(settings.get("tokenizer_class", "")).removesuffix("Fast")
    model = _optional(folder / "config.json").get("model_type")
    return kind == "LlamaTokenizer" and model == "llama" and "ByteLevel" not in repr(backend.pre_tokenizer)


def _rebuild_as_llama(backend: Tokenizer, settings: Json) -> None:
    from tokenizers import decoders, normalizers, pre_tokenizers

    prefix = settings.get("add_prefix_space")
    prefixed = True if prefix is None else bool(prefix)
    scheme = "always" if settings.get("legacy", False) else "first"
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=_SPACE, prepend_scheme=scheme if prefixed else "never", split=False
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefixed else [])])


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes with (GPT-2's table): printable ones stand for themselves,
    the others for 256 and up."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()
