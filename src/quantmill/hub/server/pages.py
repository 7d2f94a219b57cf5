"""What a browser sees: the repositories, and for each one its branches and its card. No script, no outside link.

Cards are other people's text: they are shown as text, escaped, never as HTML of theirs.
"""

from __future__ import annotations

from html import escape
from urllib.parse import quote

from quantmill.console import gigabytes
from quantmill.hub.server.answers import Answer, as_html
from quantmill.hub.server.refusal import Refusal
from quantmill.hub.server.repository import Entry, Repository
from quantmill.hub.server.routing import Call, Route, route

CARD = "README.md"
LONGEST_CARD = 1_000_000  # bytes shown
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:left}"
    "td.n{text-align:right}pre{white-space:pre-wrap;background:#f6f6f6;padding:1rem}code{background:#f6f6f6}"
)


def home(call: Call) -> Answer:
    """Every repository that the caller may see."""
    rows = []
    for name in call.store.list():
        try:
            branches = call.store.find(name, call.account).branches()
        except Refusal:
            continue
        private = " (private)" if call.store.facts(name)["private"] else ""
        rows.append(f"<tr><td>{_a(f'/{name}', name)}{private}</td><td class=n>{len(branches)}</td></tr>")
    table = f"<table><tr><th>repository<th>branches</tr>{''.join(rows)}</table>"
    return _page("quantmill hub", table if rows else "<p>No repository yet.</p>")


def model(call: Call) -> Answer:
    """One repository: its branches, what to type for each, and the card of one."""
    repository = call.store.find(call.name, call.account)
    shown = call.parts.get("revision", "main")
    commit = repository.resolve(shown)
    rows = "".join(_branch(call, repository, n, c) for n, c in repository.branches().items())
    head = "<tr><th>branch<th>files<th>size<th>to get it</tr>"
    files = "".join(_file(f"/{call.name}/resolve/{commit}/{e.path}", e) for e in repository.entries(commit))
    table = f"<table>{head}{rows}</table>"
    listed = f"<h2>Files of {escape(shown)}</h2><table>{files}</table>"
    return _page(call.name, f"{table}{_card(repository, commit)}{listed}")


def _file(href: str, entry: Entry) -> str:
    return f"<tr><td>{_a(href, entry.path)}<td class=n>{gigabytes(entry.size)}</tr>"


def _branch(call: Call, repository: Repository, branch: str, commit: str) -> str:
    entries = repository.entries(commit)
    size = gigabytes(sum(e.size for e in entries))
    link = _a(f"/{call.name}/tree/{branch}", branch)
    typed = escape(f"quantmill download {call.name}:{branch}")
    return f"<tr><td>{link}<td class=n>{len(entries)}<td class=n>{size}<td><code>{typed}</code></tr>"


def _card(repository: Repository, commit: str) -> str:
    blob = repository.blobs(commit).get(CARD)
    if blob is None or repository.entry(CARD, blob).pointer:
        return "<p>This branch has no card.</p>"
    text = repository.read(blob).as_raw_string()[:LONGEST_CARD].decode(errors="replace")
    return f"<h2>Card</h2><pre>{escape(text)}</pre>"


def _a(href: str, text: str) -> str:
    return f'<a href="{quote(href)}">{escape(text)}</a>'


def _page(title: str, body: str) -> Answer:
    head = f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
    return as_html(f"{head}<p>{_a('/', 'all repositories')}<h1>{escape(title)}</h1>{body}")


ROUTES: tuple[Route, ...] = (
    route("GET /", home),
    route("GET /{owner}/{name}", model),
    route("GET /{owner}/{name}/tree/{revision}", model),
)
