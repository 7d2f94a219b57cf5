"""A model card as HTML: other people's text, so no HTML of theirs, no script, no picture from elsewhere.

markdown-it escapes raw HTML and drops links that run something. Knows where the card's files lie on this hub.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any
from urllib.parse import quote, urlsplit

from quantmill.hub.card_facts import parse_card

LONGEST = 1_000_000  # characters
SHOWN = ("license", "base_model", "model_creator", "quantized_by", "pipeline_tag", "language", "tags")


def card_html(text: str, files: str) -> str:
    """A card without its header. `files`: where relative links lead, as /owner/name/resolve/commit."""
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    tokens: list[Token] = parser.parse(parse_card(text[:LONGEST]).text)
    _name_headings(tokens)
    for token in tokens:
        for child in (token, *(token.children or ())):
            _settle(child, files)
    return str(parser.renderer.render(tokens, parser.options, {}))


def _name_headings(tokens: Sequence[Any]) -> None:
    """Links within a card lead to its headings by their words, as on other hubs."""
    seen: dict[str, int] = {}
    for token, words in pairwise(tokens):
        if token.type == "heading_open":
            slug = re.sub(r"[^\w\- ]", "", words.content.lower()).strip().replace(" ", "-")
            again = seen.get(slug, 0)
            seen[slug] = again + 1
            token.attrs["id"] = f"{slug}-{again}" if again else slug


def _settle(token: Any, files: str) -> None:
    """Relative links lead to the card's own files; pictures from elsewhere are named, not fetched."""
    if token.type == "link_open":
        token.attrs["href"] = _href(str(token.attrs.get("href", "")), files)
        token.attrs["rel"] = "noopener noreferrer nofollow"
    elif token.type == "image":
        source = str(token.attrs.get("src", ""))
        if urlsplit(source).scheme or source.startswith("//"):
            token.type, token.tag, token.content = "text", "", f"[picture: {source}]"
            token.children = None
        else:
            token.attrs["src"] = _href(source, files)


def _href(link: str, files: str) -> str:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc or link.startswith(("#", "/")):
        return link
    return f"{files}/{link.removeprefix('./')}"


def header_html(text: str) -> str:
    """What a card's header says, as a list of facts; empty where there is none."""
    header = parse_card(text[:LONGEST]).header
    rows = "".join(
        f"<dt>{escape(key.replace('_', ' '))}<dd>{escape(_words(header[key]))}"
        for key in SHOWN
        if header.get(key)
    )
    return f"<dl>{rows}</dl>" if rows else ""


def _words(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return str(value)


def quoted(*parts: str) -> str:
    """A path of this hub."""
    return "/" + "/".join(quote(part, safe="") for part in parts)
