"""One bare git repository: what its branches hold, and commits that appear whole or not at all.

dulwich parses and formats git's objects; writing them and moving refs is done here, so that no lock file and no
half object survives a crash. Order of a commit: blobs, trees, commit, and last the branch, by one rename.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dulwich.objects import Blob, Commit, ObjectID, ShaFile, Tree
from dulwich.repo import Repo

from quantmill.files import fsync
from quantmill.hub.server import disk, names
from quantmill.hub.server.lfs import Objects, Pointer, read_pointer
from quantmill.hub.server.refusal import Refusal, bad, no_entry, no_revision

FILE, FOLDER = 0o100644, 0o040000
CONFIG = b"[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = true\n"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a commit."""

    path: str
    blob: str  # git's sha1 of what is in the tree: the file, or the pointer to it
    size: int  # bytes of the file itself
    pointer: Pointer | None

    @property
    def etag(self) -> str:
        return self.pointer.oid if self.pointer else self.blob


@dataclass(frozen=True, slots=True)
class Change:
    """What a commit does to one path: a regular file's bytes, a pointer to a large one, or neither: deleted."""

    path: str
    content: bytes | Pointer | None
    folder: bool = False  # delete everything below


@dataclass(frozen=True, slots=True)
class Repository:
    """The bare repository in `folder`."""

    folder: Path

    @property
    def objects(self) -> Objects:
        return Objects(self.folder / "lfs")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a branch changes or objects are collected."""
        with disk.locked(self.folder / "writer.lock"):
            yield

    def branches(self) -> dict[str, str]:
        """Branch -> commit, in the order of names."""
        heads = self.folder / "refs/heads"
        files = [p for p in sorted(heads.rglob("*")) if p.is_file() and not p.is_symlink()]
        found = {str(p.relative_to(heads)): p for p in files if disk.TEMPORARY not in p.name}
        return {n: p.read_text().strip() for n, p in found.items()}

    def resolve(self, revision: str) -> str:
        """The commit of a branch or of a commit's name. Raises Refusal (404)."""
        if names.is_commit(revision):
            if (self._object_path(revision)).is_file() and isinstance(self.read(revision), Commit):
                return revision
            raise no_revision(revision)
        try:
            return self._ref(names.branch_name(revision)).read_text().strip()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, Refusal):
            raise no_revision(revision) from None

    def read(self, sha: str) -> ShaFile:
        """A git object by its sha1."""
        with self._object_path(sha).open("rb") as stream:
            return ShaFile.from_file(stream)

    def git(self) -> Repo:
        """The repository as dulwich serves it. The caller closes it."""
        return Repo(str(self.folder))

    def commit_of(self, sha: str) -> Commit:
        commit = self.read(sha)
        assert isinstance(commit, Commit)
        return commit

    def blobs(self, commit: str) -> dict[str, str]:
        """Path -> blob of every file in a commit, in git's order."""
        return dict(self._walk(self.commit_of(commit).tree.decode(), ""))

    def _walk(self, sha: str, prefix: str) -> Iterator[tuple[str, str]]:
        tree = self.read(sha)
        assert isinstance(tree, Tree)
        for name, mode, child in tree.iteritems():
            path = prefix + name.decode()
            if mode == FOLDER:
                yield from self._walk(child.decode(), f"{path}/")
            else:
                yield path, child.decode()

    def entries(self, commit: str) -> list[Entry]:
        """Every file of a commit."""
        return [self.entry(path, blob) for path, blob in self.blobs(commit).items()]

    def entry(self, path: str, blob: str) -> Entry:
        size, pointer = _facts(self.folder, blob)
        return Entry(path, blob, pointer.size if pointer else size, pointer)

    def find(self, commit: str, path: str) -> Entry:
        """One file. Raises Refusal (404)."""
        blob = self.blobs(commit).get(names.file_path(path))
        if blob is None:
            raise no_entry(path, commit)
        return self.entry(path, blob)

    def history(self, commit: str, most: int = 1000) -> list[Commit]:
        """A commit and its ancestors, newest first."""
        found = [self.commit_of(commit)]
        while found[-1].parents and len(found) < most:
            found.append(self.commit_of(found[-1].parents[0].decode()))
        return found

    def create_branch(self, branch: str, start: str) -> None:
        """Raises Refusal: 409 where it exists, 404 for an unknown start."""
        ref = self._ref(names.branch_name(branch))
        with self.lock():
            if branch in self.branches():
                raise Refusal(409, f"the branch {branch} exists already")
            self._move(ref, self.resolve(start))

    def delete_branch(self, branch: str) -> None:
        """Raises Refusal: 404 where there is none, 403 for main."""
        if branch == "main":
            raise Refusal(403, "main is the branch that readers get by default: it cannot be deleted")
        with self.lock():
            if branch not in self.branches():
                raise no_revision(branch)
            ref = self._ref(branch)
            ref.unlink()
            fsync(ref.parent)

    def commit(
        self, branch: str, changes: Iterable[Change], message: str, author: str, parent: str | None = None
    ) -> str:
        """Apply changes on top of a branch (a new one where it is main) and move it. Returns the commit.

        `parent`: the commit that the caller has seen; Refusal (412) when the branch has moved since.
        """
        with self.lock():
            old = self.branches().get(names.branch_name(branch))
            if old is None and self.branches():
                raise no_revision(branch)
            if parent and not (old or "").startswith(parent):
                raise Refusal(
                    412, f"{branch} has moved since {parent}: look again, then send the commit again"
                )
            before = self.blobs(old) if old else {}
            after = self._apply(before, changes)
            if old and after == before:
                return old
            new = self._write_commit(self._write_tree(after), old, message, author)
            self._move(self._ref(branch), new)
            return new

    def _apply(self, before: Mapping[str, str], changes: Iterable[Change]) -> dict[str, str]:
        after = dict(before)
        for change in changes:
            path = names.file_path(change.path)
            if change.content is None:
                doomed = [p for p in after if p == path or (change.folder and p.startswith(f"{path}/"))]
                for p in doomed:
                    del after[p]
            else:
                after[path] = self._write_blob(change.content)
        folders = {"/".join(p.split("/")[:i]) for p in after for i in range(1, p.count("/") + 1)}
        if clash := folders & after.keys():
            raise bad(f"{min(clash)} would be both a file and a folder")
        return after

    def _write_blob(self, content: bytes | Pointer) -> str:
        pointer = content if isinstance(content, Pointer) else read_pointer(content)
        if pointer and self.objects.size(pointer.oid) != pointer.size:
            raise bad(f"object {pointer.oid} was not uploaded: upload it, then send the commit again")
        return self._write(Blob.from_string(content.text() if isinstance(content, Pointer) else content))

    def _write_tree(self, blobs: Mapping[str, str]) -> str:
        tree, below = Tree(), dict[str, dict[str, str]]()
        for path, blob in blobs.items():
            head, _, rest = path.partition("/")
            if rest:
                below.setdefault(head, {})[rest] = blob
            else:
                tree.add(head.encode(), FILE, ObjectID(blob.encode()))
        for name, inside in below.items():
            tree.add(name.encode(), FOLDER, ObjectID(self._write_tree(inside).encode()))
        return self._write(tree)

    def _write_commit(self, tree: str, parent: str | None, message: str, author: str) -> str:
        commit = Commit()
        commit.tree = ObjectID(tree.encode())
        commit.parents = [ObjectID(parent.encode())] if parent else []
        commit.author = commit.committer = f"{author} <{author}@localhost>".encode()
        commit.author_time = commit.commit_time = int(time.time())
        commit.author_timezone = commit.commit_timezone = 0
        commit.message = message.encode()
        return self._write(commit)

    def _write(self, item: ShaFile) -> str:
        sha = item.id.decode()
        path = self._object_path(sha)
        if not path.is_file():
            disk.put(path, item.as_legacy_object(compression_level=1))
        return sha

    def _object_path(self, sha: str) -> Path:
        return self.folder / "objects" / sha[:2] / sha[2:]

    def _ref(self, branch: str) -> Path:
        ref = self.folder / "refs/heads" / branch
        if not disk.is_inside(self.folder, ref):
            raise bad("a link leads out of the repository there")
        return ref

    def _move(self, ref: Path, commit: str) -> None:
        """The one step that readers notice."""
        try:
            disk.put(ref, f"{commit}\n".encode())
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise Refusal(
                409, f"a branch's name cannot begin with another's and a slash: {ref.name}"
            ) from None

    def collect(self) -> tuple[int, int]:
        """Remove every object that no branch reaches. Only where no upload is under way.

        Returns the number of objects removed and their bytes.
        """
        with self.lock():
            git, large = self._reachable()
            loose = [p for p in (self.folder / "objects").glob("??/*") if p.parent.name + p.name not in git]
            doomed = [
                *loose,
                *(p for p in self.objects.all() if p.name not in large),
                *self.objects.all_begun(),
            ]
            freed = sum(p.stat().st_size for p in doomed)
            for path in doomed:
                path.unlink()
            _facts.cache_clear()
            return len(doomed), freed

    def _reachable(self) -> tuple[set[str], set[str]]:
        """Names of git objects and of LFS objects that some branch leads to."""
        git, large = set[str](), set[str]()
        waiting = list(self.branches().values())
        while waiting:
            sha = waiting.pop()
            if sha in git:
                continue
            git.add(sha)
            item = self.read(sha)
            if isinstance(item, Commit):
                waiting += [item.tree.decode(), *(p.decode() for p in item.parents)]
            elif isinstance(item, Tree):
                waiting += [child.decode() for _, _, child in item.iteritems()]
            elif isinstance(item, Blob) and (pointer := read_pointer(item.data)):
                large.add(pointer.oid)
        return git, large


@lru_cache(maxsize=65536)
def _facts(folder: Path, blob: str) -> tuple[int, Pointer | None]:
    """Size and pointer of a blob, which never change."""
    item = Repository(folder).read(blob)
    assert isinstance(item, Blob)
    return len(item.data), read_pointer(item.data)


def create(folder: Path) -> Repository:
    """An empty bare repository in a new folder; the caller gives the folder its final name."""
    for name in ("objects/info", "objects/pack", "refs/heads", "refs/tags", "lfs"):
        (folder / name).mkdir(parents=True)
    (folder / "HEAD").write_bytes(b"ref: refs/heads/main\n")
    (folder / "config").write_bytes(CONFIG)
    return Repository(folder)
