"""What a browser sees: branches with what is known of them, and the card as safe HTML whose links resolve."""

import re
import shutil
import urllib.parse
import urllib.request

import pytest

from branch_folders import eval_report, quantize_report
from branch_folders import modules as module_reports
from hub_folders import CONFIGS, OTHER
from quantmill.commands.describing import describe
from quantmill.doctor import fix
from quantmill.files import write_json
from quantmill.hub.publish import publish, read_branches
from quantmill.hub.server.cards import card_html, header_html

FILES = "/me/x/resolve/abc"


def fetch(hub, path):
    """(content type, text) of a page."""
    with urllib.request.urlopen(urllib.parse.urljoin(hub.url, path), timeout=120) as answer:
        return answer.headers["Content-Type"], answer.read()


@pytest.fixture(scope="module")
def made(two_branches, tmp_path_factory):
    """A repository with measurements and a card that quantmill wrote."""
    folder = shutil.copytree(two_branches, tmp_path_factory.mktemp("pages") / "two")
    for loss, (branch, config) in zip((0.0312, 0.0005), CONFIGS.items(), strict=True):
        write_json(folder / branch / "eval_report.json", eval_report(loss, 5.301))
        report = quantize_report(branch, config, module_reports(config))
        write_json(folder / branch / "quantize_report.json", report)
        fix(folder / branch)  # the report's command holds paths
    describe(folder, "me/pages")
    return folder


def test_the_page_of_a_made_repository(made, hub, online):
    publish(read_branches(made), "me/pages", online, private=False, notify=lambda _: None)
    kind, body = fetch(hub, "/me/pages")
    page = body.decode()
    assert kind == "text/html; charset=utf-8"
    row = re.search(rf"<tr><td><a [^>]*>{OTHER}</a>(.*)", page.replace("<tr", "\n<tr"))[1]
    for cell in (">gptq<", ">8<", ">32<", ">yes<", ">0.0005<", ">5.301<"):
        assert cell in f"{row}<", (cell, row)
    assert page.count("<table>") >= 4  # branches, files, and those of the card
    assert "<h2 id=" in page
    assert "&lt;h2" not in page
    anchors = set(re.findall(r'href="#([^"]+)"', page))
    assert anchors <= set(re.findall(r' id="([^"]+)"', page))
    pictures = re.findall(r'<img src="([^"]+)"', page)
    assert len(pictures) == 2
    for source in pictures:
        kind, data = fetch(hub, source)
        assert kind == "image/png"
        assert data.startswith(b"\x89PNG")
    for link in {x for x in re.findall(r'href="(/[^"]*)"', page) if not x.endswith(".safetensors")}:
        fetch(hub, link)
    assert b"me/pages" in fetch(hub, "/")[1]


def test_nothing_of_a_card_runs_or_calls_home():
    html = card_html(
        "<script>alert(1)</script>\n\n<img src=x onerror=alert(1)>\n\n[a](javascript:alert(1)) [b](vbscript:x)\n\n"
        '![t](https://tracker.example/p.png) ![u](//tracker.example/p.png "x")\n\n[c](https://example.org)',
        FILES,
    )
    for bad in ("<script", "<img", 'href="javascript', 'href="vbscript', 'src="'):
        assert bad not in html, bad
    assert "picture: https://tracker.example/p.png" in html
    assert 'href="https://example.org" rel="noopener' in html


def test_relative_links_lead_to_the_cards_files():
    html = card_html("![t](loss.png) [l](./LICENSE) [up](#top) [abs](/me/y)\n\n# Top\n\n# Top", FILES)
    assert f'src="{FILES}/loss.png"' in html
    assert f'href="{FILES}/LICENSE"' in html
    assert 'href="#top"' in html
    assert '<h1 id="top">' in html
    assert '<h1 id="top-1">' in html


def test_tables_and_the_header():
    html = card_html("---\nlicense: mit\n---\n| a | b |\n|:--|:-:|\n| 1 | `2` |\n", FILES)
    assert "<table>" in html
    assert "<code>2</code>" in html
    assert "license" not in html
    facts = header_html("---\nlicense: mit\ntags: [gptq, <b>]\nother: x\n---\ntext")
    assert facts == "<dl><dt>license<dd>mit<dt>tags<dd>gptq, &lt;b&gt;</dl>"
    assert header_html("no header") == ""
