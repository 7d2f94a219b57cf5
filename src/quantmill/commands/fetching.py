"""`quantmill download` and `quantmill branches`: what a hub holds, and getting it."""

from __future__ import annotations

from pathlib import Path

from quantmill.console import Console, gigabytes, progress
from quantmill.errors import BadRequest, SourceNotFound
from quantmill.hub import branches as remote_branches
from quantmill.hub import download as remote_download
from quantmill.hub.machine import this_machine
from quantmill.sources import split_branch
from quantmill.types import Json


def download(asked: str, local: Path | None, cache: Path | None, console: Console) -> Json:
    """Fetch `owner/name[:branch]`. Returns the JSON document."""
    from huggingface_hub import HfApi, constants

    name, branch = _repository(asked)
    if local is not None and cache is not None:
        raise BadRequest(
            "files go to the shared cache or to a folder: give --cache-dir or --local-dir, not both"
        )
    if constants.HF_HUB_OFFLINE:
        return _from_cache(name, branch, cache, console)
    api = HfApi()
    plan = remote_download.plan(name, branch, api, cache, local)
    console.say(
        f"{asked}: {len(plan.files)} files, {gigabytes(plan.size)}; "
        f"{gigabytes(plan.left)} to fetch, {gigabytes(plan.free)} free"
    )
    with progress("bytes", max(1, plan.left)) as advance:
        folder = remote_download.fetch(plan, api, lambda n: advance(n, ""))
    console.say(f"{folder}\nevery hash is right; next: quantmill generate {folder} --prompt 'Hello'")
    facts = {"commit": plan.commit, "size_bytes": plan.size, "fetched_bytes": plan.left}
    return {"repository": name, "branch": plan.branch, "folder": str(folder), **facts}


def _repository(asked: str) -> tuple[str, str | None]:
    name, branch = split_branch(asked)
    if name.count("/") != 1 or ":" in name:
        raise BadRequest(f"{asked} is no repository: write owner/name or owner/name:branch")
    return name, branch


_OFFLINE = "HF_HUB_OFFLINE is set and the cache does not hold all of {}: unset it and type the same again"


def _from_cache(name: str, branch: str | None, cache: Path | None, console: Console) -> Json:
    """Offline, the shared cache has it whole or not at all."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(name, revision=branch, cache_dir=cache, local_files_only=True)
    except errors.LocalEntryNotFoundError as error:
        raise SourceNotFound(_OFFLINE.format(name)) from error
    if lacking := remote_download.lacking_weights(Path(folder)):
        raise SourceNotFound(f"{_OFFLINE.format(name)} ({lacking} is not there)")
    console.say(f"{folder}\nwas there; nothing was asked of the hub (HF_HUB_OFFLINE)")
    return {"repository": name, "branch": branch or "main", "folder": folder, "fetched_bytes": 0}


def list_branches(asked: str, console: Console) -> Json:
    """The table of a repository's branches. Returns the JSON document."""
    from huggingface_hub import HfApi

    name, branch = _repository(asked)
    if branch:
        raise BadRequest(f"all branches of {name} are listed: leave :{branch} out")
    machine = this_machine()
    found = remote_branches.read_branches(name, HfApi(), machine)
    head = (
        "branch",
        "method",
        "bits",
        "group",
        "act order",
        "sym",
        "size",
        "mean KL",
        "perplexity",
        "loaders",
        "fits",
        "",
    )
    console.table(head, [_cells(b) for b in found])
    vram = f", {gigabytes(machine.vram)} of GPU memory" if machine.vram else ", no GPU"
    console.say(
        f"\nfits: this machine has {gigabytes(machine.ram)} of memory{vram}; * marks the best that fits"
    )
    row = {"ram_bytes": machine.ram, "vram_bytes": machine.vram}
    return {"repository": name, "machine": row, "branches": [b.to_json() for b in found]}


def _cells(b: remote_branches.RemoteBranch) -> tuple[str, ...]:
    c = b.config
    act_order = _yes(c.desc_act) if c and b.method != "awq" else "-"  # AWQ knows none
    fixed = (b.method, c.bits, c.group_size, act_order, _yes(c.sym)) if c else (b.method, *("-",) * 4)
    kl = "-" if b.mean_kl is None else f"{b.mean_kl:.4f}"
    perplexity = "-" if b.perplexity is None else f"{b.perplexity:.3f}"
    loaders = "?" if b.loaders is None else str(len(b.loaders))
    return (
        b.name,
        *map(str, fixed),
        gigabytes(b.size),
        kl,
        perplexity,
        loaders,
        b.fits,
        "*" if b.best else "",
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"
