"""What a user names as SOURCE or MODEL -> a Transformers folder on this disk.

    a folder               itself
    file.gguf              converted once, kept in quantmill's cache
    owner/name[:branch]    the shared Hugging Face cache, else the hub (never when HF_HUB_OFFLINE=1)

Opens no weights and knows no format; what lies in the folder is judged by checkpoint.py.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from quantmill.errors import BadRequest, SourceNotFound, UnsupportedModel
from quantmill.files import cache_root, full_disk_said
from quantmill.hub_errors import branches_of, in_our_words, listed

Notify = Callable[[str], None]
Files = Literal["model", "config"]

# What is fetched from a hub. Pickled weights (*.bin, *.pt) are never asked for.
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model")
_WANTED: dict[Files, tuple[str, ...]] = {
    "model": ("*.safetensors", *_SMALL),
    "config": ("config.json", "quantize_config.json", "generation_config.json"),
}

_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/[\w.-]+)(?::(?P<branch>.+))?")
_GGUF_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_CONVERSION = (
    b"quantmill gguf 2\n"  # raise it when a conversion comes out differently: old ones are then redone
)


def split_branch(text: str) -> tuple[str, str | None]:
    """`owner/name:branch` -> (`owner/name`, `branch`). Anything else, as a path with a colon, stays whole."""
    match = _HUB_ID.fullmatch(text)
    return (match["name"], match["branch"]) if match else (text, None)


def resolve(
    source: str,
    *,
    files: Files = "model",
    cache_dir: Path | None = None,
    notify: Notify | None = None,
    run: bool = False,
) -> Path:
    """A Transformers folder for `source`: a folder, a `.gguf` file, or `owner/name[:branch]`.

    A folder of branches takes `folder:branch` too; a folder whose only model is a `.gguf` file stands for it.
    `files="config"` fetches only what `plan` reads.
    `cache_dir` replaces quantmill's own cache folder (converted GGUF files), not Hugging Face's (HF_HOME).
    `notify` gets a line when something takes a while. `run`: the model is to be run, not quantised: a `.gguf`
    file then keeps its own codes where a packed linear can hold them, instead of becoming fp16.

    Raises SourceNotFound, UnsupportedModel (a file type or architecture), BadCheckpoint (a damaged file),
    BadRequest (no place for a conversion).
    """
    if (path := _local(source)) is not None:
        file = _only_gguf(path) or path
        return _file(file, cache_root(cache_dir), notify or _silent, run) if file.is_file() else _folder(path)
    name, branch = split_branch(source)
    if not _HUB_ID.fullmatch(source) or source.lower().endswith(".gguf"):
        raise SourceNotFound(
            f"{source} does not exist{_siblings(source)}; name a folder, a .gguf file or owner/name[:branch]"
        )
    return _from_hub(name, branch, files)


def gguf_file(source: str) -> Path | None:
    """The `.gguf` file on this disk that is meant: itself, or the only model of a folder. None: another kind."""
    if (path := _local(source)) is None:
        return None
    file = _only_gguf(path) or path
    return file if file.is_file() and file.suffix.lower() == ".gguf" else None


def _local(source: str) -> Path | None:
    """The folder or file that is meant; a branch of a folder may be missing there. None: nothing on this disk."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    folder, _, branch = source.rpartition(":")
    return Path(folder).expanduser() / branch if folder and Path(folder).expanduser().is_dir() else None


def _silent(_: str) -> None:
    """The default for `notify`."""


def _folder(path: Path) -> Path:
    """`path` where it holds a model; else an error that says what it does hold."""
    if (path / "config.json").is_file():
        return path
    if not path.is_dir():
        raise SourceNotFound(f"there is no folder {path}{_one_of(path.parent)}")
    raise SourceNotFound(f"{path} holds no config.json{_one_of(path)}")


def _only_gguf(folder: Path) -> Path | None:
    """The `.gguf` file that is the only model of a folder, as in those that `quantize --format gguf:TYPE` makes."""
    if not folder.is_dir() or (folder / "config.json").is_file():
        return None
    models = [p for p in sorted(folder.iterdir()) if _is_model(p)]
    return models[0] if len(models) == 1 and models[0].is_file() else None


def _is_model(path: Path) -> bool:
    hidden = path.name.startswith(".")
    return not hidden and ((path / "config.json").is_file() or path.suffix.lower() == ".gguf")


def _one_of(path: Path) -> str:
    """What could have been meant in `path`: models in sub-folders, GGUF files, else whatever lies there."""
    entries = sorted(p for p in path.iterdir() if not p.name.startswith(".")) if path.is_dir() else []
    models = [str(p) for p in entries if _is_model(p)]
    if models:
        return f"; name one of {listed(models)}"
    if not entries:
        return " (it is empty)"
    return f" but {listed([p.name for p in entries])}; name a folder in the Transformers layout"


def _siblings(source: str) -> str:
    """The models of the folder in which `source` would lie, where it lies in one: a misspelt branch, perhaps."""
    parent = Path(source).expanduser().parent
    if parent == Path() or not parent.is_dir():
        return ""
    models = [p.name for p in sorted(parent.iterdir()) if _is_model(p)]
    return f" ({parent} holds {listed(models)})" if models else ""


def _file(path: Path, cache: Path, notify: Notify, run: bool) -> Path:
    """The cached conversion of a `.gguf` file, made now if need be."""
    if path.suffix.lower() != ".gguf":
        raise UnsupportedModel(f"{path} is a file; name a folder in the Transformers layout, or a .gguf file")
    if _GGUF_PART.search(path.name.lower()):
        raise UnsupportedModel(
            f"{path} is one part of several: join them with 'llama-gguf-split --merge' first"
        )
    packed = run and _runs_packed(path)
    target = cache / ("models" if packed else "sources") / f"{path.stem}-{_content_hash(path)}"
    if not (target / "config.json").is_file():
        _convert_into(target, path, notify, packed)
    return target


def _runs_packed(path: Path) -> bool:
    from quantmill.gguf_model import runs_packed

    return runs_packed(path)


def _content_hash(path: Path) -> str:
    digest = hashlib.sha256(_CONVERSION)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def _convert_into(target: Path, path: Path, notify: Notify, packed: bool) -> None:
    """Convert beside `target`, then rename: nobody ever sees a half-written folder there."""
    from quantmill.gguf_model import convert_packed
    from quantmill.gguf_source import convert

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(
            f"{target.parent} cannot be made ({error.strerror}): set QUANTMILL_HOME to a folder that you may "
            "write to"
        ) from error
    work = tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-")
    with full_disk_said(target.parent), work as temporary:
        made = Path(temporary) / "model"
        made.mkdir()
        (convert_packed if packed else convert)(path, made, notify)
        if not target.exists():  # another process may have been quicker
            made.rename(target)
    notify(f"kept as {target}")


def _from_hub(name: str, branch: str | None, files: Files) -> Path:
    """The snapshot folder of one branch in the shared cache, fetched as far as it is not there."""
    from huggingface_hub import snapshot_download

    asked = f"{name}:{branch}" if branch else name
    with in_our_words(asked, before=f"there is no folder {asked} here{_siblings(asked)}, and "):
        folder = Path(snapshot_download(name, revision=branch, allow_patterns=list(_WANTED[files])))
    if not (folder / "config.json").is_file():
        raise SourceNotFound(
            f"{asked} holds no config.json{branches_of(name)}; name a branch that does, or a .gguf file of it"
        )
    if files == "model" and not any(folder.glob("*.safetensors")):
        raise SourceNotFound(
            f"{asked} holds no .safetensors file, and pickled weights are never opened: name another"
        )
    return folder
