"""One folder of repositories: root/repos/owner/name.git, and beside them the tokens.

Repositories appear and vanish by one rename. One process serves a root at a time, as its lock tells.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantmill.errors import BadRequest
from quantmill.files import fsync
from quantmill.hub.server import disk, names, repository
from quantmill.hub.server.accounts import Account, Accounts, Links
from quantmill.hub.server.lfs import SUFFIXES
from quantmill.hub.server.refusal import Refusal, no_repository
from quantmill.hub.server.repository import Change, Repository
from quantmill.hub.server.xet import GONE, Xorbs

FACTS = "quantmill.json"
ATTRIBUTES = ".gitattributes"
FILTER = "filter=lfs diff=lfs merge=lfs -text"
FORGET = 7 * 24 * 3600  # seconds
UNBORN = ".unborn-"


@dataclass(frozen=True, slots=True)
class Store:
    """The repositories under `root`."""

    root: Path
    accounts: Accounts
    links: Links

    @classmethod
    def open(cls, root: Path) -> Store:
        """The store in `root`, made where there is none."""
        disk.make_folders(root / "repos")
        return cls(root, Accounts(root), Links.load(root))

    @contextmanager
    def served(self) -> Iterator[None]:
        """Hold the root, and clean up after a server that was killed. Raises BadRequest where another serves it."""
        descriptor = os.open(self.root / "server.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise BadRequest(f"another hub serves {self.root}: stop it, or give another --root") from None
        try:
            disk.remove_temporaries(self.root)
            self._forget_old_uploads()
            for left in [*self._repos.rglob(f"{UNBORN}*"), *self._repos.rglob(f"{GONE}*")]:
                shutil.rmtree(left)
            yield
        finally:
            os.close(descriptor)

    def _forget_old_uploads(self) -> None:
        """Uploads that were cut and not gone on with."""
        for name in self.list():
            repo = Repository(self.folder(name))
            for path in repo.objects.all_begun():
                if time.time() - path.stat().st_mtime > FORGET:
                    path.unlink()
            Xorbs.of(repo).forget_old(FORGET)

    @property
    def _repos(self) -> Path:
        return self.root / "repos"

    def folder(self, name: str) -> Path:
        """Where a repository is, or would be. Raises Refusal (404) where a link leads out of the root."""
        folder = self._repos / f"{names.repository_name(*name.split('/', 1))}.git"
        if not disk.is_inside(self._repos, folder):
            raise no_repository(name)
        return folder

    def list(self) -> list[str]:
        """Names of all repositories."""
        folders = (p for p in sorted(self._repos.glob("*/*.git")) if disk.is_inside(self._repos, p))
        return [f"{p.parent.name}/{p.name.removesuffix('.git')}" for p in folders]

    def facts(self, name: str) -> dict[str, object]:
        """`private` and `created` of a repository."""
        facts: dict[str, object] = json.loads((self.folder(name) / FACTS).read_text())
        return facts

    def find(self, name: str, account: Account, *, write: bool = False) -> Repository:
        """A repository that this account may use. Raises Refusal: 401, 403 or 404."""
        folder = self.folder(name)
        visible = folder.is_dir() and (account.rights or not self.facts(name)["private"])
        if not visible:
            raise (no_repository(name) if account.rights else _who_are_you(name))
        if write:
            self.may_write(account)
        return Repository(folder)

    def may_write(self, account: Account) -> None:
        """Raises Refusal where it may not: 401 for nobody, 403 for a reader."""
        if account.rights is None:
            raise Refusal(401, "writing needs a token: set HF_TOKEN, or 'hf auth login'")
        if not account.may_write:
            raise Refusal(403, "this token may read only: ask for one that may write")

    def create(self, name: str, account: Account, *, private: bool) -> None:
        """A new repository with one commit on main. Raises Refusal: 409 where it exists."""
        self.may_write(account)
        if private and self.accounts.open:
            raise Refusal(
                403, "nothing is private in a hub without tokens: quantmill hub --add-token NAME first"
            )
        folder = self.folder(name)
        made = disk.make_folders(folder.parent)
        new = folder.parent / f"{UNBORN}{secrets.token_hex(8)}"
        born = repository.create(new)
        facts = {"private": private, "created": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())}
        disk.put(new / FACTS, json.dumps(facts).encode())
        rules = "".join(f"*{suffix} {FILTER}\n" for suffix in SUFFIXES)
        born.commit("main", [Change(ATTRIBUTES, rules.encode())], "initial commit", account.name)
        with disk.locked(self.root / "repos.lock"):
            if folder.exists():
                shutil.rmtree(new)
                raise Refusal(409, f"the repository {name} exists already")
            new.rename(folder)
        for parent in {folder.parent, *made}:
            fsync(parent)

    def delete(self, name: str, account: Account) -> None:
        """Raises Refusal where there is none, or it is not the caller's to delete."""
        folder = self.find(name, account, write=True).folder
        gone = folder.parent / f"{GONE}{secrets.token_hex(8)}"
        with disk.locked(self.root / "repos.lock"):
            folder.rename(gone)
        fsync(folder.parent)
        shutil.rmtree(gone)

    def set_private(self, name: str, account: Account, private: bool) -> None:
        folder = self.find(name, account, write=True).folder
        if private and self.accounts.open:
            raise Refusal(403, "nothing is private in a hub without tokens")
        disk.put(folder / FACTS, json.dumps({**self.facts(name), "private": private}).encode())

    def collect(self) -> tuple[int, int]:
        """Remove what no branch reaches, in a root that nobody serves. Returns objects and bytes removed."""
        with self.served():
            repositories = [Repository(self.folder(name)) for name in self.list()]
            freed = [r.collect() for r in repositories] + [Xorbs.of(r).forget() for r in repositories]
        return sum(n for n, _ in freed), sum(size for _, size in freed)


def _who_are_you(name: str) -> Refusal:
    """401, the same for what is not there and what is private, so that names of private ones do not leak."""
    return Refusal(401, f"there is no public repository {name}: a token may help", "RepoNotFound")
