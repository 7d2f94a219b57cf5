"""`quantmill hub`: serve a folder of repositories, or look after it."""

from __future__ import annotations

from pathlib import Path

from quantmill.console import Console, gigabytes
from quantmill.hub.server.serve import serve
from quantmill.hub.server.store import Store
from quantmill.types import Json


def serve_hub(root: Path, host: str, port: int, console: Console) -> None:
    """Serve until a signal comes."""

    def ready(address: str) -> None:
        console.say(f"serving {root} at {address}")
        console.say(f"  publish: quantmill publish DIR owner/name --endpoint {address}")
        console.say(f"  read:    HF_ENDPOINT={address} quantmill download owner/name:branch")
        console.say(f"  any client of the Hugging Face Hub: HF_ENDPOINT={address}")
        if Store.open(root).accounts.open:
            console.say("there are no tokens: whoever reaches this address may read and write (--add-token)")
        console.document({"root": str(root), "endpoint": address})

    serve(root, host, port, ready)


def add_token(root: Path, name: str, rights: str, console: Console) -> Json:
    """Make a token and show it, once."""
    token = Store.open(root).accounts.add(name, rights)
    console.note(f"{name} may {rights}; this is shown once: export HF_TOKEN=...")
    console.say(token)
    return {"name": name, "rights": rights, "token": token}


def collect(root: Path, console: Console) -> Json:
    """Remove what no branch needs."""
    objects, freed = Store.open(root).collect()
    console.say(f"{objects} objects removed, {gigabytes(freed)}")
    return {"objects": objects, "freed_bytes": freed}
