"""What the hub answers when it will not: a status, a line for people, a code for huggingface_hub."""

from __future__ import annotations


class Refusal(Exception):
    """An HTTP error on its way out.

    `code` is what clients tell errors apart by (X-Error-Code), `commit` where they looked (X-Repo-Commit), `url`
    what exists already.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        commit: str | None = None,
        url: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.commit, self.url = status, message, code, commit, url


def bad(message: str) -> Refusal:
    """400: the request contradicts the protocol or the rules for names."""
    return Refusal(400, message)


def no_repository(name: str) -> Refusal:
    """404, also for private ones that the caller may not see."""
    return Refusal(404, f"there is no repository {name} that you may see", "RepoNotFound")


def no_revision(revision: str) -> Refusal:
    """404 for a branch or commit that is not there."""
    return Refusal(404, f"there is no branch or commit {revision}", "RevisionNotFound")


def no_entry(path: str, commit: str | None = None) -> Refusal:
    """404 for a file that is not in a commit."""
    return Refusal(404, f"there is no file {path}", "EntryNotFound", commit=commit)
