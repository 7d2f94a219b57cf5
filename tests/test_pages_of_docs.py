"""README and docs: links lead somewhere, files that are named exist, commands have the options that are shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from quantmill.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
# What is written in them and is neither a command line's end nor a word of it.
COMMAND = re.compile(r"(?:^|`)(?:\S+=\S+ )*quantmill ([a-z]+)((?: [^`#\n;|&]*)?)", re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_and_paths_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    links = [t for t in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text) if not t.startswith("http")]
    named = re.findall(r"`((?:benchmarks|docs|src|tests|tools)/[\w./-]+)`", text)
    wanted = {document.parent / link for link in links} | {ROOT / path for path in named}
    assert [str(p.relative_to(ROOT)) for p in sorted(wanted) if not p.exists()] == []


def test_commands_have_the_options_that_are_shown() -> None:
    known = {
        name: {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
    }
    shown = [(d.name, *m) for d in DOCUMENTS for m in COMMAND.findall(d.read_text())]
    assert len(shown) > 30
    for document, name, words in shown:
        assert name in known, (document, name)
        typed = set(re.findall(r"(?<!\S)--[a-z][a-z-]+", words)) - {"--help"}
        assert typed <= known[name], (document, name, words)
