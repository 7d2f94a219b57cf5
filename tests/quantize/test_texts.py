"""Where text is found: named sets, files of every kind, a stand-in for the hub; one line per failure."""

from __future__ import annotations

import inspect
import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantmill.errors import BadRequest, BadText, SourceNotFound, UserError
from quantmill.quantize import texts
from quantmill.quantize.documents import Turn


def documents(dataset: str | Path) -> list[Any]:
    return list(texts.read(str(dataset)).documents)


def written(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# ---- files


def test_text_file_is_one_running_document(tmp_path: Path) -> None:
    source = texts.read(str(written(tmp_path / "a.TXT", "\ufeffone\r\n\r\ntwo ü\n")))
    assert source.name == "a.TXT"
    assert source.running
    assert list(source.documents) == ["one\n\ntwo ü\n"]


def test_jsonl_rows_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.jsonl", '\ufeff{"text": "a"}\n\n{"text": ""}\r\n{"prompt": "p", "response": "r"}'
    )
    assert documents(path) == ["a", None, (Turn("user", "p"), Turn("assistant", "r"))]
    assert not texts.read(str(path)).running


def test_parquet_reads_as_jsonl_does(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"messages": [{"role": "user", "content": "hi"}], "n": 1},
        {"messages": [], "n": 2},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    lines = "\n".join(json.dumps(row) for row in rows)
    assert documents(tmp_path / "a.parquet") == documents(written(tmp_path / "a.jsonl", lines))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b"ok \xff\xfe\x00", r"a.txt is not UTF-8 \(byte 3\): convert it with iconv"),
        ("a.txt", b"PK\0\0 binary", "binary data"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a.jsonl line 2 is not JSON \(.*column"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl line 2 is not UTF-8"),
        ("a.jsonl", b'["a"]', "line 1 is no JSON object"),
        ("a.jsonl", b'{"body": "a"}', "has the columns body"),
        ("a.parquet", b"PAR1 not really", "a.parquet is no readable Parquet file"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(BadText, match=message) as caught:
        documents(written(tmp_path / name, data))
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "dir.txt").mkdir()
    for name in ("none.txt", "dir.txt"):
        with pytest.raises(SourceNotFound, match="check the path"):
            texts.read(str(tmp_path / name))


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadRequest, match="pip install pyarrow"):
        documents(written(tmp_path / "a.parquet", "x"))


# ---- names


def test_python_docs_are_inside_every_python() -> None:
    source = texts.read("python-docs")
    found = [document for document in source.documents if isinstance(document, str)]
    assert source.running
    assert sum(map(len, found)) > 300_000
    assert any("assert_stmt" in document for document in found)


def test_unknown_names_list_the_choices(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"python-docs, python-library, wikitext, c4, self, a \.txt"):
        texts.read("wikitex")
    with pytest.raises(BadRequest, match=r"no text file.*use \.txt, \.jsonl, \.parquet"):
        texts.read(str(written(tmp_path / "a.docx", "x")))


# ---- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A stand-in for the datasets library, with `calls`; and a hub that answers."""
    calls: list[dict[str, Any]] = []

    def load_dataset(*names: str | None, **options: Any) -> list[dict[str, str]]:
        calls.append({"names": names, **options})
        return [{"text": " = Title = "}, {"text": ""}, {"text": "Words ."}]

    library = SimpleNamespace(
        load_dataset=load_dataset,
        config=SimpleNamespace(HF_HUB_OFFLINE=False, HF_DATASETS_CACHE=str(tmp_path)),
        exceptions=SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {})),
        calls=calls,
    )
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setattr(texts, "_hub_answers", lambda: True)
    return library


def test_the_stand_in_is_like_the_library() -> None:
    datasets = pytest.importorskip("datasets")
    options = inspect.signature(datasets.load_dataset).parameters
    assert list(options)[:2] == ["path", "name"]
    assert {"data_files", "split", "streaming"} <= set(options)
    assert issubclass(datasets.exceptions.DatasetNotFoundError, datasets.exceptions.DatasetsError)
    assert isinstance(datasets.config.HF_HUB_OFFLINE, bool)
    assert datasets.config.HF_DATASETS_CACHE


@pytest.mark.parametrize(
    ("dataset", "names", "files", "streaming", "found"),
    [
        ("wikitext", ("Salesforce/wikitext", "wikitext-2-raw-v1"), None, False, ""),
        ("c4", ("allenai/c4", None), "en/c4-train.00000-of-01024.json.gz", False, None),
        ("me/mine", ("me/mine", None), None, True, None),
        ("me/mine:de", ("me/mine", "de"), None, True, None),
    ],
)
def test_hub_sets(
    hub: Any, dataset: str, names: object, files: object, streaming: bool, found: str | None
) -> None:
    assert documents(dataset) == [" = Title = ", found, "Words ."]
    assert hub.calls == [{"names": names, "data_files": files, "split": "train", "streaming": streaming}]


def test_cached_set_is_read_without_a_hub(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_hub_answers", lambda: False)
    with pytest.raises(
        SourceNotFound, match=r"me/mine is not in the cache and no hub answers: use .*python-docs"
    ):
        documents("me/mine")
    (tmp_path / "me___mine").mkdir()
    assert len(documents("me/mine")) == 3
    assert hub.calls[0]["streaming"] is False


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no\nroute"),
        ValueError('Unknown split "train"'),
        None,
    ],
)
def test_whatever_the_hub_says_becomes_one_line(
    hub: Any, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    def fail(*names: object, **options: object) -> None:
        raise error or hub.exceptions.DatasetsError("doesn't exist")

    monkeypatch.setattr(hub, "load_dataset", fail)
    with pytest.raises(SourceNotFound, match="cannot be read from the hub") as caught:
        documents("wikitext")
    assert "\n" not in str(caught.value)
    assert "--dataset python-docs" in str(caught.value)


def test_without_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'quantmill\[data\]'"):
        documents("c4")


def test_hub_answers_only_if_a_connection_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr("urllib.request.getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        assert texts._hub_answers()
    assert not texts._hub_answers()
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy"})
    assert texts._hub_answers()


def test_python_library_is_prose_and_not_python_docs() -> None:
    library = " ".join(d for d in texts.read("python-library").documents if isinstance(d, str))
    assert len(library) > 200_000
    assert "A simple event scheduler" in library or "generally useful event scheduler" in library
    assert library[:2000] not in " ".join(
        d for d in texts.read("python-docs").documents if isinstance(d, str)
    )
