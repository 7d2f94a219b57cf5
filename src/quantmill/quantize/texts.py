"""Finds a data set by what the user typed and reads its documents, one at a time: plain texts and chats.

Knows no tokens and no models: a name, a file or a hub id goes in, documents come out. Local files are read
here, hub data sets through the `datasets` library, which is loaded only for them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from quantmill.errors import BadRequest, BadText, SourceNotFound
from quantmill.quantize.documents import Document, Row, from_rows

OFFLINE_CURE = "use --dataset python-docs, or a .txt, .jsonl or .parquet file"


@dataclass(frozen=True, slots=True)
class Source:
    """The documents of one data set, read while they are asked for.

    None stands for a row that holds nothing usable: empty, not text, not valid Unicode. `running` says that
    the documents are parts of one text (a book, an encyclopaedia) rather than texts of their own.
    """

    name: str
    documents: Iterator[Document | None]
    running: bool


def read(dataset: str) -> Source:
    """Open a data set: a name of NAMED, a FILE with a suffix of FILES, or a hub id `owner/name[:config]`.

    Raises BadRequest for a name that is none of these, SourceNotFound for a missing file. While the documents
    are read there may follow BadText (a broken line, unknown columns, bytes that are not UTF-8),
    SourceNotFound (the hub) and BadRequest (a missing library).
    """
    if dataset in NAMED:
        return NAMED[dataset]()
    path = Path(dataset)
    if path.suffix.lower() in FILES:
        return _file(path)
    if path.exists():
        raise BadRequest(f"{dataset} is no text file that quantmill reads: use {', '.join(FILES)}")
    if HUB_ID.fullmatch(dataset):
        repo, _, config = dataset.partition(":")
        return _hub(HubSet(repo, config or None, streaming=True), dataset)
    choices = ", ".join([*NAMED, "self", *(f"a {suffix} file" for suffix in FILES)])
    raise BadRequest(f"no data set is called {dataset!r}: use {choices} or owner/name")


# ---- named sets and the hub

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class HubSet:
    """Where a data set lies on the hub. A streamed set is read only as far as needed, but never cached."""

    repo: str
    config: str | None = None
    files: str | None = None
    running: bool = False
    streaming: bool = False


def _python_docs() -> Source:
    from pydoc_data.topics import topics

    return Source("python-docs", iter(topics.values()), running=True)


def _python_library() -> Source:
    return Source("python-library", _docstrings(), running=True)


def _docstrings() -> Iterator[str | None]:
    """Every docstring of the standard library's own modules, in alphabetical order: prose nobody calibrates on."""
    root = Path(json.__file__).parents[1]
    for file in sorted(root.glob("*.py")):
        tree = ast.parse(file.read_bytes())
        nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        texts = [d for n in nodes if (d := ast.get_docstring(n))]
        yield "\n\n".join(texts) or None


def _hub(hub: HubSet, name: str) -> Source:
    return Source(name, from_rows(_hub_rows(hub, name), name, keep_empty=hub.running), hub.running)


NAMED: dict[str, Callable[[], Source]] = {
    "python-docs": _python_docs,
    "python-library": _python_library,
    "wikitext": lambda: _hub(HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", running=True), "wikitext"),
    "c4": lambda: _hub(HubSet("allenai/c4", files="en/c4-train.00000-of-01024.json.gz"), "c4"),
}


def _hub_rows(hub: HubSet, name: str) -> Iterator[Row]:
    """Rows of the train split. Whatever the hub or the library complains of becomes one line with a cure."""
    try:
        import datasets
    except ImportError as error:
        cure = f"pip install 'quantmill[data]', or {OFFLINE_CURE}"
        raise BadRequest(f"{name} needs the datasets library: {cure}") from error
    offline = bool(datasets.config.HF_HUB_OFFLINE) or not _hub_answers()
    if offline and not _is_cached(hub, Path(datasets.config.HF_DATASETS_CACHE)):
        raise SourceNotFound(f"{name} is not in the cache and no hub answers: {OFFLINE_CURE}")
    try:
        yield from datasets.load_dataset(
            hub.repo,
            hub.config,
            data_files=hub.files,
            split="train",
            streaming=hub.streaming and not offline,
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SourceNotFound(f"{name} cannot be read from the hub ({reason}): {OFFLINE_CURE}") from error


def _is_cached(hub: HubSet, cache: Path) -> bool:
    return (cache / hub.repo.replace("/", "___")).is_dir()


def _hub_answers() -> bool:
    """Whether the hub's host takes a connection: asked first, as the library would retry for 25 seconds."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    if getproxies():
        return True  # only the proxy can tell
    endpoint = urlsplit(constants.ENDPOINT)
    port = endpoint.port or {"http": 80}.get(endpoint.scheme, 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True


# ---- files


def _file(path: Path) -> Source:
    if not path.is_file():
        raise SourceNotFound(f"no file {path}: check the path, or use --dataset python-docs")
    if path.stat().st_size == 0:
        raise BadText(f"{path.name} is empty: give a file with text, or use --dataset python-docs")
    return FILES[path.suffix.lower()](path)


def _txt(path: Path) -> Source:
    text = _utf8(path.read_bytes(), path.name).replace("\r\n", "\n")
    if "\0" in text:
        raise BadText(f"{path.name} holds binary data (zero bytes): give plain UTF-8 text")
    return Source(path.name, iter([text if text.strip() else None]), running=True)


def _jsonl(path: Path) -> Source:
    return Source(path.name, from_rows(_jsonl_rows(path), path.name), running=False)


def _parquet(path: Path) -> Source:
    return Source(path.name, from_rows(_parquet_rows(path), path.name), running=False)


FILES: dict[str, Callable[[Path], Source]] = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}


def _utf8(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadText(f"{where} is not UTF-8 (byte {error.start}): convert it with iconv -t UTF-8") from error


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, data in enumerate(lines, 1):
            where = f"{path.name} line {number}"
            line = _utf8(data, where).strip()
            if not line:
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                cure = "mend or delete the line"
                raise BadText(f"{where} is not JSON ({error.msg}, column {error.colno}): {cure}") from error
            if not isinstance(row, dict):
                raise BadText(f'{where} is no JSON object: write {{"text": ...}} on each line')
            yield row


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise BadRequest(f"{path.name} needs pyarrow: pip install pyarrow, or use .jsonl") from error
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except arrow.ArrowException as error:
        reason = " ".join(str(error).split())[:120]
        raise BadText(f"{path.name} is no readable Parquet file ({reason}): use .jsonl") from error
