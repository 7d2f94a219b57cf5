"""The page as a person uses it, in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
expect.set_options(timeout=90_000)
pytestmark = pytest.mark.slow  # each starts a server; CI walks them once

MODEL = "demo/echo"


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def choose(page: Any, where: str, what: str) -> None:
    """Pick from a list."""
    page.locator(f"{where} input").click()
    page.get_by_role("option", name=what, exact=True).last.click()  # a list that has closed is still there
    expect(page.locator(f"{where} input")).to_have_value(what)


def load(page: Any) -> None:
    choose(page, "#pick-model", MODEL)
    expect(page.locator("#model-status")).to_contain_text(f"{MODEL} is loaded")


def say(page: Any, text: str) -> None:
    page.locator("#said textarea").fill(text)
    page.locator("#said textarea").press("Enter")


def test_branches_are_listed_one_is_downloaded_and_can_be_picked(
    serve_page: Callable[..., str], visit: Callable[..., Any]
) -> None:
    page = visit(serve_page())
    page.locator("#repository textarea, #repository input").fill("me/tiny-GPTQ")
    page.locator("#list-branches").click()
    expect(page.locator("#download-status")).to_contain_text("2 branches")
    row = page.get_by_role("gridcell").filter(has_text="gptq-8bit-32g-actorder_True", visible=True).first
    row.click()
    box = page.locator("#repository textarea, #repository input")
    expect(box).to_have_value("me/tiny-GPTQ:gptq-8bit-32g-actorder_True")
    page.locator("#download").click()
    expect(page.locator("#download-status")).to_contain_text("every hash is right")
    page.locator("#refresh-models").click()
    choose(page, "#pick-model", "me/tiny-GPTQ:gptq-8bit-32g-actorder_True")
    expect(page.locator("#model-status")).to_contain_text("was not loaded")  # the echo has one model


def test_a_repository_that_is_not_there_is_told_in_words(
    serve_page: Callable[..., str], visit: Callable[..., Any]
) -> None:
    page = visit(serve_page())
    page.locator("#repository textarea, #repository input").fill("nobody/nothing")
    page.locator("#list-branches").click()
    expect(page.get_by_test_id("toast-text")).to_contain_text("nobody/nothing")


def test_a_model_loads_when_picked_and_its_settings_are_kept(
    serve_page: Callable[..., str], visit: Callable[..., Any], tmp_path: Path
) -> None:
    page = visit(serve_page())
    load(page)
    status = page.locator("#model-status")
    for word in ("group size", "128", "4.16 GB", "echo"):  # from the folder's own files, and from the desk
        expect(status).to_contain_text(word)
    page.locator("#context input, #context textarea").fill("256")
    page.locator("#save-settings").click()
    expect(status).to_contain_text("are saved")
    page.locator("#reload").click()
    expect(status).to_contain_text("256 tokens")
    page.locator("#unload").click()
    expect(status).to_contain_text("is unloaded")
    again = visit(serve_page())  # a new process: what is kept is on disk
    load(again)
    expect(again.locator("#context input, #context textarea")).to_have_value("256")
    expect(again.locator("#model-status")).to_contain_text("256 tokens")


def test_a_wrong_setting_is_refused_with_the_cure(
    serve_page: Callable[..., str], visit: Callable[..., Any]
) -> None:
    page = visit(serve_page())
    load(page)
    page.locator("#context input, #context textarea").fill("many")
    page.locator("#reload").click()
    expect(page.get_by_test_id("toast-text")).to_contain_text("context is 'many'")


def test_what_is_refused_changes_nothing_on_the_page(
    serve_page: Callable[..., str], visit: Callable[..., Any]
) -> None:
    page = visit(serve_page())
    page.locator("#reload").click()
    expect(page.get_by_test_id("toast-text").last).to_contain_text("Pick a model first")
    expect(page.locator("#model-status")).to_contain_text("No model is loaded")
    tab(page, "Text generation")
    say(page, "red green")
    expect(page.get_by_test_id("toast-text").last).to_contain_text("no model is loaded")
    expect(page.locator("#said textarea")).to_have_value("red green")
    tab(page, "Model")
    load(page)
    tab(page, "Text generation")
    page.locator("#send").click()
    expect(page.locator("#chat-status")).to_contain_text("tokens")
    page.locator("#send").click()
    expect(page.get_by_test_id("toast-text").last).to_contain_text("Write a message first")
    expect(page.locator("#talk")).to_contain_text("You said: red green")
    again = visit(page.url)  # what is loaded is chosen when the page opens
    expect(again.locator("#model-status")).to_contain_text(f"{MODEL} is loaded")
    expect(again.locator("#pick-model input")).to_have_value(MODEL)


def test_chat_streams_continues_regenerates_and_is_kept(
    serve_page: Callable[..., str], visit: Callable[..., Any]
) -> None:
    page = visit(serve_page())
    load(page)
    tab(page, "Text generation")
    talk = page.locator("#talk")
    say(page, "red green blue")
    expect(talk).to_contain_text("You said: red green blue")
    expect(page.locator("#chat-status")).to_contain_text("7 + 5 tokens")
    page.locator("#continue").click()
    expect(talk).to_contain_text("You said: red green blue more")
    page.locator("#regenerate").click()
    expect(talk).not_to_contain_text("more")
    page.locator("#prompt-accordion button").click()
    expect(page.locator("#prompt-text")).to_contain_text("<user>red green blue<assistant>You said:")

    again = visit(serve_page())  # a new process
    tab(again, "Text generation")
    choose(again, "#conversations", "red green blue")
    expect(again.locator("#talk")).to_contain_text("You said: red green blue")
    again.locator("#delete-conversation").click()
    expect(again.locator("#talk")).not_to_contain_text("You said")


def test_an_answer_is_stopped_and_what_came_is_kept(
    serve_page: Callable[..., str], visit: Callable[..., Any]
) -> None:
    page = visit(serve_page(0.1))
    load(page)
    tab(page, "Text generation")
    words = " ".join(f"w{i}" for i in range(200))
    say(page, words)
    expect(page.locator("#talk")).to_contain_text("You said: w0")
    page.locator("#stop").click()
    expect(page.locator("#chat-status")).to_contain_text("stopped")
    expect(page.locator("#talk .bot")).not_to_contain_text("w199")


def test_an_edited_question_is_answered_anew(
    serve_page: Callable[..., str], visit: Callable[..., Any]
) -> None:
    page = visit(serve_page())
    load(page)
    tab(page, "Text generation")
    say(page, "one")
    expect(page.locator("#talk")).to_contain_text("You said: one")
    say(page, "two")
    expect(page.locator("#talk")).to_contain_text("You said: two")
    page.locator("#talk .user").first.hover()
    page.get_by_label("Edit").first.click()
    page.locator("#talk textarea").first.fill("three")
    page.get_by_label("Submit").first.click()
    expect(page.locator("#talk")).to_contain_text("You said: three")
    expect(page.locator("#talk")).not_to_contain_text("You said: two")


def test_raw_text_is_continued(serve_page: Callable[..., str], visit: Callable[..., Any]) -> None:
    page = visit(serve_page())
    load(page)
    tab(page, "Text generation")
    page.get_by_label("Raw text").check()
    page.locator("#raw textarea").fill("A list")
    page.locator("#send").click()
    expect(page.locator("#raw textarea")).to_have_value("A list and so on")
    page.locator("#continue").click()
    expect(page.locator("#raw textarea")).to_have_value("A list and so on and so on")


def test_a_preset_moves_the_sliders_and_the_length_reaches_the_model(
    serve_page: Callable[..., str], visit: Callable[..., Any]
) -> None:
    page = visit(serve_page())
    load(page)
    tab(page, "Text generation")
    page.locator("#sampling button").first.click()
    choose(page, "#preset", "greedy")
    number = page.locator("#sampling-temperature input[type=number]")
    expect(number).to_have_value("0")
    longest = page.locator("#sampling-max_new_tokens input[type=number]")
    longest.fill("2")
    longest.press("Tab")
    say(page, "red green blue")
    expect(page.locator("#chat-status")).to_contain_text("cut at the longest answer")
    expect(page.locator("#talk")).to_contain_text("You said:")


def test_two_models_are_compared(serve_page: Callable[..., str], visit: Callable[..., Any]) -> None:
    page = visit(serve_page())
    tab(page, "Compare")
    page.locator("#compare-prompt textarea").fill("north south")
    choose(page, "#compare-left", MODEL)
    choose(page, "#compare-right", MODEL)
    page.locator("#compare-run").click()
    for side in ("left", "right"):
        expect(page.locator(f"#compare-text-{side} textarea")).to_have_value("You said: north south")
        expect(page.locator(f"#compare-facts-{side}")).to_contain_text("tok/s")
        expect(page.locator(f"#compare-facts-{side}")).to_contain_text("not measured")


def test_a_run_is_planned_stopped_resumed_and_shown(
    serve_page: Callable[..., str], visit: Callable[..., Any], tiny_llama: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400)
    page = visit(serve_page())
    tab(page, "Quantise")
    page.locator("#source textarea, #source input").fill(str(tiny_llama))
    page.locator("#out textarea, #out input").fill(str(tmp_path / "made"))
    page.locator("#dataset input").fill(str(text))
    page.locator("#dataset input").press("Enter")
    page.locator("#samples input").fill("4")
    page.locator("#seqlen input").fill("32")
    page.locator("#variants input").fill("4bit-32g")
    page.locator("#variants input").press("Enter")
    page.locator("#variants .token-remove").first.click()
    page.locator("#plan").click()
    expect(page.locator("#plan-table")).to_contain_text("gptq-4bit-32g-actorder_True")
    page.locator("#start").click()
    expect(page.locator("#run-status")).to_contain_text("Running")
    page.locator("#stop-run").click()
    expect(page.locator("#run-status")).to_contain_text("Stopped", timeout=60_000)
    page.locator("#resume").click()
    expect(page.locator("#run-status")).to_contain_text("Finished", timeout=240_000)
    assert (tmp_path / "made" / "gptq-4bit-32g-actorder_True" / "config.json").is_file()
    expect(page.locator("#loss-plot")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(
    serve_page: Callable[..., str], visit: Callable[..., Any], scheme: str
) -> None:
    page = visit(serve_page(), 390, 844, scheme)
    for name in ("Text generation", "Model", "Quantise", "Compare"):
        shown = page.get_by_role("tab", name=name)
        if shown.count():
            shown.click()
        else:  # folded into a menu
            page.get_by_label("More tabs").click()
            page.locator(".overflow-dropdown button", has_text=name).click()
        wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0, f"{name} is {wide} pixels too wide"


def test_a_download_is_cancelled_and_goes_on(
    serve_page: Callable[..., str], visit: Callable[..., Any]
) -> None:
    page = visit(serve_page(0.1))  # slowly
    page.locator("#repository textarea, #repository input").fill("me/tiny-GPTQ")
    page.locator("#download").click()
    expect(page.locator("#download-status")).to_contain_text(" of ")
    page.locator("#cancel-download").click()
    expect(page.locator("#download-status")).to_contain_text("goes on from here")
    page.locator("#download").click()
    expect(page.locator("#download-status")).to_contain_text("every hash is right", timeout=120_000)
