"""The terminal loop with lines from a list, and what the model is shown in each turn."""

from __future__ import annotations

import pytest

from quantmill.errors import BadRequest
from quantmill.runtime import chat
from quantmill.runtime.chat import Conversation, chat_loop
from quantmill.runtime.generate import Generation
from quantmill.runtime.reference import ReferenceRuntime
from quantmill.runtime.tokenizer import TextTokenizer
from quantmill.types import SamplingParams
from tiny_models import byte_level_tokenizer, tiny_model

PARAMS = SamplingParams(temperature=0, max_new_tokens=6)
# What Mistral-7B-Instruct-v0.1 ships, in short: no system role, questions and answers in turn.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer():
    return TextTokenizer.from_transformers(byte_level_tokenizer())


@pytest.fixture(scope="module")
def runtime():
    return ReferenceRuntime(tiny_model("llama"), kv_tokens=512)


@pytest.fixture
def asked(monkeypatch):
    """Answers are A1, A2, ... ; gives the list of (prompt text, parameters) of each call."""
    calls = []

    def answer(sequence, tokenizer, ids, params, *, on_text, lookup):
        calls.append((tokenizer.decode(ids, skip_special=False), params))
        on_text("A")
        on_text(str(len(calls)))
        return Generation(f"A{len(calls)}", len(ids), 2, 0.1)

    monkeypatch.setattr(chat, "generate_ids", answer)
    return calls


def run(tokenizer, lines, runtime, params=PARAMS):
    written = []
    left = iter(lines)
    talk = chat_loop(runtime, tokenizer, params, lambda: next(left, None), written.append)
    return talk, "".join(written)


def test_every_turn_shows_the_whole_conversation(tokenizer, asked, runtime):
    talk, written = run(tokenizer, ["hello", "", "  and now  "], runtime)
    assert written == "A1\nA2\n"
    assert [text for text, _ in asked] == [
        "[user] hello\n[assistant] ",
        "[user] hello\n[assistant] A1\n[user] and now\n[assistant] ",
    ]
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2


@pytest.mark.parametrize(
    ("lines", "question"),
    [
        (["one \\", "two\\", "three"], "one \ntwo\nthree"),
        (['"""', "def f():", "", "  pass \\", '"""'], "def f():\n\n  pass \\"),
        (['"""', "cut off"], "cut off"),
        (["cut off\\"], "cut off"),
        (['""" not alone'], '""" not alone'),
    ],
)
def test_questions_of_several_lines(tokenizer, asked, runtime, lines, question):
    talk, _ = run(tokenizer, lines, runtime)
    assert talk.messages[0]["content"] == question


def test_quit_ends_at_once(tokenizer, asked, runtime):
    run(tokenizer, ["/quit", "never asked"], runtime)
    assert not asked


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_the_end_of_input_ends_the_loop(tokenizer, end, runtime):
    def read_line():
        raise end

    assert chat_loop(runtime, tokenizer, PARAMS, read_line, print).messages == []


def test_reset_forgets_but_keeps_the_system_text(tokenizer, asked, runtime):
    talk, written = run(tokenizer, ["/system be brief", "a", "/reset", "b"], runtime)
    assert "system: be brief\n" in written
    assert asked[1][0] == "[system] be brief\n[user] b\n[assistant] "
    assert talk.messages[0]["content"] == "b"


def test_regen_answers_again(tokenizer, asked, runtime):
    talk, _ = run(tokenizer, ["a", "/regen"], runtime)
    assert asked[0] == asked[1]
    assert [m["content"] for m in talk.messages] == ["a", "A2"]
    _, written = run(tokenizer, ["/regen"], runtime)
    assert written == "there is no answer yet: ask something first\n"


def test_set_changes_the_next_answer(tokenizer, asked, runtime):
    lines = ["/set temperature 0.7", "/set top_k=5", "/set seed 3", "/set seed none", "a"]
    _, written = run(tokenizer, lines, runtime)
    assert written == "temperature 0.7\ntop_k 5\nseed 3\nseed None\nA1\n"
    params = asked[0][1]
    assert (params.temperature, params.top_k, params.seed) == (0.7, 5, None)
    assert params.max_new_tokens == PARAMS.max_new_tokens
    _, listed = run(tokenizer, ["/set"], runtime)
    assert "repetition_penalty 1.1\n" in listed


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/set heat 3", "no parameter 'heat'; there are temperature, "),
        ("/set temperature hot", "temperature is 'hot'; a number is needed: /set temperature 1"),
        ("/set temperature -1", "temperature is -1.0; use 0 (greedy) or more"),
        ("/set top_k 1.5", "top_k is '1.5'; a number is needed"),
        ("/what", "no command /what; there are /quit, /reset, /system, /set, /regen"),
    ],
)
def test_mistakes_are_said_and_the_loop_goes_on(tokenizer, asked, line, said, runtime):
    _, written = run(tokenizer, [line, "a"], runtime)
    assert written.startswith(said)
    assert written.endswith("A1\n")
    assert asked[0][1] == PARAMS


def test_interrupting_an_answer_keeps_what_was_said(tokenizer, monkeypatch, runtime):
    def answer(sequence, tokenizer, ids, params, *, on_text, lookup):
        on_text("half an")
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "generate_ids", answer)
    talk, written = run(tokenizer, ["a"], runtime)
    assert written == "half an\n"
    assert talk.messages[-1] == {"role": "assistant", "content": "half an"}


def test_a_question_that_cannot_be_answered_is_taken_back(tokenizer, runtime):
    talk, written = run(tokenizer, ["word " * 300, "/quit"], runtime)
    assert "the model's context is 256" in written
    assert talk.messages == []


def test_a_template_without_system_role_gets_it_in_the_first_question(tokenizer):
    tokenizer.templates = {"default": MISTRAL}
    talk = Conversation(system="be brief")
    for say, text in ((talk.ask, "a"), (talk.answer, "b"), (talk.ask, "c")):
        say(text)
    assert (
        tokenizer.decode(talk.ids(tokenizer), skip_special=False)
        == "<s>[INST] be brief\n\na [/INST]b</s>[INST] c [/INST]"
    )
    assert talk.messages[0]["content"] == "a"


def test_other_refusals_of_a_template_are_not_hidden(tokenizer):
    tokenizer.templates = {"default": MISTRAL}
    talk = Conversation(system="be brief")
    talk.answer("out of turn")
    with pytest.raises(BadRequest, match="roles must alternate"):
        talk.ids(tokenizer)


def test_no_template_is_refused_at_once(tokenizer, runtime):
    tokenizer.templates = {}
    with pytest.raises(BadRequest, match="no chat template"):
        run(tokenizer, ["a"], runtime)


def test_with_a_real_model(tokenizer, runtime):
    talk, written = run(tokenizer, ["the cat", "/regen"], runtime)
    answer = talk.messages[1]["content"]
    assert written == f"{answer}\n" * 2
