"""What huggingface_hub raises -> one line of ours, with the cure. The only place that knows its errors."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from quantmill.errors import BadRequest, QuantmillError, SourceNotFound


@contextmanager
def in_our_words(asked: str, before: str = "") -> Iterator[None]:
    """Turns errors about `owner/name[:branch]` into ours; `before` begins those that it is not to be had.

    Raises BadRequest (no name; no right; changed meanwhile) and SourceNotFound.
    """
    from huggingface_hub import errors

    name, _, branch = asked.partition(":")
    try:
        yield
    except errors.HFValidationError as error:
        raise BadRequest(f"{name} is no repository name: write owner/name") from error
    except errors.OfflineModeIsEnabled as error:
        raise SourceNotFound(f"HF_HUB_OFFLINE is set, and {asked} has to be asked for: unset it") from error
    except errors.LocalEntryNotFoundError as error:
        raise SourceNotFound(
            f"{before}the hub is out of reach, and the shared cache does not hold all of {asked}"
            f"{branches_of(name)}; when online: quantmill download {asked}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceNotFound(
            f"{name} has no branch {branch!r}{branches_of(name)}: type quantmill branches {name}"
        ) from error
    except errors.GatedRepoError as error:
        raise SourceNotFound(
            f"{name} is gated: accept its terms on its page, then 'hf auth login'"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceNotFound(
            f"{before}there is no repository {name} that you may see: check the name, or 'hf auth login'"
        ) from error
    except errors.HfHubHTTPError as error:
        raise _http_error(asked, error) from error
    except transport_errors() as error:
        raise SourceNotFound(
            f"the hub did not answer about {asked} ({error}): mend the network or HF_ENDPOINT, then type the "
            "same again"
        ) from error


def transport_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub's HTTP client, which has changed its name, raises when a connection fails."""
    from huggingface_hub import get_session

    module = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    return (module.TransportError, ConnectionError, TimeoutError)


def _http_error(name: str, error: Exception) -> QuantmillError:
    """A refusal that a token may cure, or anything else that a hub can answer."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    said = (response.headers.get("X-Error-Message") if response is not None else None) or "no reason given"
    if status in (401, 403):
        return BadRequest(f"the hub refused {name} ({said}): set HF_TOKEN to a token with that right")
    if status == 429:
        return SourceNotFound(
            f"the hub takes no more requests from you for now (429 at {name}){_patience(response)}: wait, then "
            "type the same again; what arrived is not sent or fetched twice"
        )
    if status is not None and status >= 500:
        return SourceNotFound(
            f"the hub is in trouble ({status} at {name}, {said}): type the same again in a few minutes; what "
            "arrived is not sent or fetched twice"
        )
    if status == 412:
        return BadRequest(f"somebody else changed {name} meanwhile: type the same again")
    return SourceNotFound(f"the hub failed at {name} with {status} ({said}): type the same again later")


def _patience(response: Any) -> str:
    """How long a hub asks to wait."""
    said = response.headers.get("Retry-After", "")
    return f", for {said} s" if said.isdecimal() else ""


def branches_of(name: str) -> str:
    """The branches of a repository for an error message: the hub's, or those in the cache."""
    from huggingface_hub import HfApi, constants, errors, scan_cache_dir

    try:
        return f"; it has {listed([ref.name for ref in HfApi().list_repo_refs(name).branches])}"
    except OSError:  # offline or refused; huggingface_hub's errors of both kinds are OSErrors
        pass
    except transport_errors():  # nothing answers there
        pass
    try:
        cached = [
            repo
            for repo in scan_cache_dir(constants.HF_HUB_CACHE).repos
            if repo.repo_id == name and repo.repo_type == "model"
        ]
    except errors.CacheNotFound:
        return ""
    refs = sorted({ref for repo in cached for revision in repo.revisions for ref in revision.refs})
    return f"; the cache holds {listed(refs)}" if refs else ""


def listed(names: list[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
