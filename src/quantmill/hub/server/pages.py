"""What a browser sees: the repositories, and for each one its branches, its card and its files. No script."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from html import escape
from urllib.parse import quote

from quantmill.console import gigabytes
from quantmill.hub.branches import GGUF, OURS, WEIGHTS, config_of, method_of
from quantmill.hub.card_facts import EVAL_REPORT
from quantmill.hub.server.answers import Answer, as_html
from quantmill.hub.server.cards import card_html, header_html, quoted
from quantmill.hub.server.refusal import Refusal
from quantmill.hub.server.repository import Entry, Repository
from quantmill.hub.server.routing import Call, Route, route
from quantmill.hub.variants import MAIN
from quantmill.types import Json, QuantConfig

CARD = "README.md"
LONGEST_JSON = 4_000_000  # bytes
STYLE = """
:root{color-scheme:light dark;--ink:#1c1f23;--dim:#667;--line:#dde;--paper:#fff;--soft:#f5f6f8;--link:#0a58ca}
@media(prefers-color-scheme:dark){:root{--ink:#e4e6ea;--dim:#99a;--line:#334;--paper:#15171a;--soft:#1f2227;
--link:#7ab0ff}}
*{box-sizing:border-box}body{font:16px/1.6 system-ui,sans-serif;color:var(--ink);background:var(--paper);
max-width:62rem;margin:0 auto;padding:1rem 1.2rem 4rem}a{color:var(--link);text-decoration:none}
a:hover{text-decoration:underline}nav{color:var(--dim);padding:.4rem 0}h1{font-size:1.7rem;margin:.4rem 0 1rem}
h1,h2,h3{line-height:1.25}h2{font-size:1.25rem;margin:2.2rem 0 .7rem;padding-bottom:.3rem;
border-bottom:1px solid var(--line)}.wide{overflow-x:auto}table{border-collapse:collapse;margin:.6rem 0;
font-size:.93rem;display:block;overflow-x:auto}th{text-align:left;font-weight:600;color:var(--dim)}
td,th{padding:.35rem .9rem .35rem 0;border-bottom:1px solid var(--line);white-space:nowrap}
td.n,th.n{text-align:right}tr.here td{background:var(--soft)}td:first-child,th:first-child{padding-left:.4rem}
pre,code{font:.87rem/1.5 ui-monospace,monospace;background:var(--soft);border-radius:4px}code{padding:.1em .3em}
pre{padding:.8rem 1rem;overflow-x:auto}pre code{padding:0}img{max-width:100%;background:#fff}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1.2rem;margin:.5rem 0}dt{color:var(--dim)}
dd{margin:0;overflow-wrap:anywhere}blockquote{margin:0;padding-left:1rem;border-left:3px solid var(--line);
color:var(--dim)}.tag{font-size:.8rem;border:1px solid var(--line);border-radius:1rem;padding:.1rem .6rem;
color:var(--dim);font-weight:400;vertical-align:middle}article td,article th{white-space:normal}
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A branch in the table."""

    name: str
    method: str
    config: QuantConfig | None
    files: int
    size: int  # bytes
    report: Json  # the measurement, empty where there is none


def home(call: Call) -> Answer:
    """Every repository that the caller may see."""
    rows = []
    for name in call.store.list():
        try:
            repository = call.store.find(name, call.account)
        except Refusal:
            continue
        rows.append(_repository_row(call, name, repository))
    head = "<tr><th>repository<th class=n>branches<th class=n>all branches<th class=n>changed"
    table = f"<table>{head}{''.join(rows)}</table>" if rows else "<p>No repository yet.</p>"
    return _page("quantmill hub", f"<h1>quantmill hub</h1>{table}")


def _repository_row(call: Call, name: str, repository: Repository) -> str:
    branches = repository.branches()
    unique = {e.etag: e.size for c in branches.values() for e in repository.entries(c)}
    changed = max(repository.commit_of(c).commit_time for c in branches.values())
    day = time.strftime("%Y-%m-%d", time.gmtime(changed))
    return (
        f"<tr><td>{_a(quoted(*name.split('/')), name)} {_tag(call, name)}<td class=n>{len(branches)}"
        f"<td class=n>{gigabytes(sum(unique.values()))}<td class=n>{day}"
    )


def _tag(call: Call, name: str) -> str:
    return "<span class=tag>private</span>" if call.store.facts(name)["private"] else ""


def model(call: Call) -> Answer:
    """One repository: its branches, what to type for the one shown, its card and its files."""
    repository = call.store.find(call.name, call.account)
    shown = call.parts.get("revision", MAIN)
    commit = repository.resolve(shown)
    entries = repository.entries(commit)
    files = quoted(*call.name.split("/"), "resolve", commit)
    body = (
        f"<nav>{_a('/', 'all repositories')}</nav><h1>{escape(call.name)} {_tag(call, call.name)}</h1>"
        f"{_branches(call, repository, shown)}<h2>Get <code>{escape(shown)}</code></h2>{_typed(call, shown)}"
        f"<h2>Card</h2><article>{_card(repository, commit, files)}</article>"
        f"<h2>Files of <code>{escape(shown)}</code></h2><table>{''.join(_file(files, e) for e in entries)}</table>"
    )
    return _page(call.name, body)


def _branches(call: Call, repository: Repository, shown: str) -> str:
    order = sorted(repository.branches().items(), key=lambda item: (item[0] != MAIN, item[0]))
    rows = [_read_row(repository, name, commit) for name, commit in order]
    head = "<th>branch<th>method<th class=n>bits<th class=n>group<th>act order<th>sym"
    head += "<th class=n>size<th class=n>files"
    measured = any(row.report for row in rows)
    head += "<th class=n>mean KL<th class=n>perplexity" if measured else ""
    cells = "".join(_cells(call, row, shown, measured) for row in rows)
    note = "<p>KL divergence from the original, nats per token; perplexity as its report says.</p>"
    return f"<table><tr>{head}{cells}</table>{note if measured else ''}"


def _read_row(repository: Repository, name: str, commit: str) -> Row:
    entries = {e.path: e for e in repository.entries(commit)}

    def read(path: str) -> Json | None:
        return _json(repository, entries.get(path))

    weights = any(path.endswith((WEIGHTS, GGUF)) for path in entries)
    method = method_of(read, name, entries) if weights else "-"
    config = config_of(read, name) if method in OURS else None
    size = sum(e.size for e in entries.values())
    return Row(name, method, config, len(entries), size, read(EVAL_REPORT) or {})


def _json(repository: Repository, entry: Entry | None) -> Json | None:
    """A JSON object of a commit, None where there is none that can be read."""
    if entry is None or entry.pointer or entry.size > LONGEST_JSON:
        return None
    try:
        value = json.loads(repository.read(entry.blob).as_raw_string())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _cells(call: Call, row: Row, shown: str, measured: bool) -> str:
    link = _a(quoted(*call.name.split("/"), "tree", row.name), row.name)
    c = row.config
    act_order = _yes(c.desc_act) if c and row.method != "awq" else "-"
    said = (str(c.bits), str(c.group_size), act_order, _yes(c.sym)) if c else ("-",) * 4
    kinds = ("", " class=n", " class=n", "", "")
    parameters = "".join(
        f"<td{kind}>{value}" for kind, value in zip(kinds, (escape(row.method), *said), strict=True)
    )
    losses = f"<td class=n>{_number(row, 'mean_kl', 4)}<td class=n>{_number(row, 'perplexity', 3)}"
    mark = " class=here" if row.name == shown else ""
    sizes = f"<td class=n>{gigabytes(row.size)}<td class=n>{row.files}"
    return f"<tr{mark}><td>{link}{parameters}{sizes}{losses if measured else ''}"


def _number(row: Row, key: str, digits: int) -> str:
    value = row.report.get(key)
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _typed(call: Call, branch: str) -> str:
    """What a reader types, a line per client."""
    at = call.name if branch == MAIN else f"{call.name}:{branch}"
    lines = (
        f"export HF_ENDPOINT={call.base}",
        f"quantmill download {at}",
        f"hf download {call.name} --revision {branch} --local-dir {call.name.partition('/')[2]}",
        f"git clone --single-branch --branch {branch} {call.base}/{call.name}",
    )
    return f"<pre><code>{escape(chr(10).join(lines))}</code></pre>"


def _card(repository: Repository, commit: str, files: str) -> str:
    blob = repository.blobs(commit).get(CARD)
    if blob is None or repository.entry(CARD, blob).pointer:
        return "<p>This branch has no card.</p>"
    text = repository.read(blob).as_raw_string().decode(errors="replace")
    return header_html(text) + card_html(text, files)


def _file(files: str, entry: Entry) -> str:
    return f"<tr><td>{_a(f'{files}/{quote(entry.path)}', entry.path)}<td class=n>{gigabytes(entry.size)}"


def _a(href: str, text: str) -> str:
    return f'<a href="{escape(href)}">{escape(text)}</a>'


def _page(title: str, body: str) -> Answer:
    meta = '<meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">'
    head = f"<!doctype html><html lang=en>{meta}<title>{escape(title)}</title><style>{STYLE}</style>"
    return as_html(f"{head}{body}")


ROUTES: tuple[Route, ...] = (
    route("GET /", home),
    route("GET /{owner}/{name}", model),
    route("GET /{owner}/{name}/tree/{revision}", model),
)
