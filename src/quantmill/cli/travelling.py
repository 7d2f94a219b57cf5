"""`publish`, `download`, `branches` and `hub`: repositories on their way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantmill.cli.app import app
from quantmill.cli.options import AsJson
from quantmill.console import Console
from quantmill.errors import BadRequest

Repository = Annotated[str, typer.Argument(help="owner/name, or owner/name:branch")]


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="the folder that holds one folder per branch")],
    name: Annotated[str, typer.Argument(help="the repository, as owner/name")],
    endpoint: Annotated[
        str | None, typer.Option(help="a hub's address; default: HF_ENDPOINT, else the public hub")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="only for those with a token")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="examine and list, send nothing")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring every variant to a hub, one branch each, and prove that it arrived. Sends only what differs."""
    from quantmill.commands.publishing import publish_folder

    console = Console(as_json)
    console.document(publish_folder(folder, name, endpoint, console, private=private, dry_run=dry_run))


@app.command()
def download(
    repository: Repository,
    local_dir: Annotated[
        Path | None, typer.Option(help="a folder for the files; default: the shared cache")
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="another shared cache than HF_HOME's")] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a branch, going on where an earlier run stopped; every file is proved by its hash."""
    from quantmill.commands.fetching import download as fetch

    console = Console(as_json)
    console.document(fetch(repository, local_dir, cache_dir, console))


@app.command()
def branches(repository: Repository, as_json: AsJson = False) -> None:
    """List a repository's branches: parameters, size, measured loss, and which one suits this machine."""
    from quantmill.commands.fetching import list_branches

    console = Console(as_json)
    console.document(list_branches(repository, console))


@app.command()
def hub(
    root: Annotated[Path, typer.Option(help="the folder that holds the repositories")],
    host: Annotated[
        str, typer.Option(help="the address to listen on; others than loopback need tokens")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one")] = 7860,
    add_token: Annotated[
        str | None, typer.Option(metavar="NAME", help="make a token for NAME, and stop")
    ] = None,
    rights: Annotated[str, typer.Option(help="with --add-token: read or write")] = "write",
    collect: Annotated[bool, typer.Option("--collect", help="remove what no branch needs, and stop")] = False,
    as_json: AsJson = False,
) -> None:
    """Serve a hub from a folder: the Hugging Face Hub protocol, for a laptop or a network of one's own."""
    from quantmill.commands import hub as work

    console = Console(as_json)
    if add_token is not None and collect:
        raise BadRequest("--add-token and --collect are two jobs: give one of them")
    if add_token is not None:
        console.document(work.add_token(root, add_token, rights, console))
    elif collect:
        console.document(work.collect(root, console))
    else:
        work.serve_hub(root, host, port, console)
