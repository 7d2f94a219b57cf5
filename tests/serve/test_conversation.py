"""Conversations as prompts: Mistral's rules beside Mistral's own tokenizer, and what templates do not know.

mistral_v1.json holds conversations with the ids that mistral-common 1.13.1 (MistralTokenizer.v1) gives them.
"""

from __future__ import annotations

import json
from asyncio import run
from pathlib import Path

import pytest

from quantmill.errors import BadRequest
from quantmill.runtime.tokenizer import TextTokenizer, open_tokenizer
from quantmill.serve.conversation import conversation_ids, conversation_text, prompt_ids
from quantmill.serve.refusal import Refusal
from quantmill.serve.schemas import ChatMessage, ChatRequest
from quantmill.serve.tools import tool_use
from runtime.test_tokenizer import spm_folder
from toy_llm import toy_tokenizer

# What the repository of 2023 has, and what Mistral made of it in 2024 so that several turns come out right.
FIRST = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% elif m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LATER = (
    "{{ bos_token }}{% set first = messages[0]['role'] == 'system' %}"
    "{% for m in (messages[1:] if first else messages) %}{% if m['role'] == 'user' %}"
    "{{ ' [INST] ' + (messages[0]['content'] + '\n\n' if first and loop.first else '') + m['content'] }}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
TALKS = json.loads((Path(__file__).parent / "mistral_v1.json").read_text(encoding="utf-8"))


def talk(messages: list[list[str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in messages]


def test_mistrals_rules_give_mistrals_ids(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(
        spm_folder(tmp_path, "llama", "LlamaTokenizer", legacy=False, chat_template=LATER)
    )
    for made in TALKS:
        assert run(conversation_ids(talk(made["messages"]), tokenizer)) == made["ids"], made["messages"]
    assert len(TALKS) >= 50
    assert max(len(t["messages"]) for t in TALKS) >= 9


def test_the_first_template_gives_them_for_first_questions(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(
        spm_folder(tmp_path, "mistral", "LlamaTokenizer", legacy=True, chat_template=FIRST)
    )
    single = [t for t in TALKS if sum(role == "user" for role, _ in t["messages"]) == 1]
    for made in single:
        assert run(conversation_ids(talk(made["messages"]), tokenizer)) == made["ids"], made["messages"]
    assert len(single) >= 10
    many = talk([["user", "hi"], ["assistant", "yo"], ["user", "there"]])
    ids = run(conversation_ids(many, tokenizer))
    assert (ids.count(1), ids.count(2), ids[0]) == (1, 1, 1)  # one beginning; an end after every answer


def request(**fields: object) -> ChatRequest:
    return ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    )


def texts(asked: ChatRequest, tokenizer: TextTokenizer | None = None) -> str:
    tokenizer = tokenizer or toy_tokenizer()
    return tokenizer.decode(run(prompt_ids(asked, tokenizer, tool_use(asked, tokenizer))), skip_special=False)


def test_parts_and_roles_become_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "d"},
        {"role": "system", "content": "s"},
        {"role": "user", "content": parts},
    ]
    assert texts(request(messages=messages)) == "[system] d\n\ns\n[user] ab\n[assistant] "


def test_a_template_without_system_text_gets_it_in_the_question() -> None:
    tokenizer = TextTokenizer(
        toy_tokenizer().backend, {"bos_token": "<s>", "eos_token": "</s>"}, {"default": FIRST}
    )
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert texts(request(messages=messages), tokenizer) == "<s>[INST] be brief\n\nhi [/INST]"
    wrong = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(BadRequest, match="roles must alternate"):
        texts(request(messages=wrong), tokenizer)


def test_a_model_without_a_template_has_no_conversations() -> None:
    tokenizer = TextTokenizer(toy_tokenizer().backend, {}, {})
    with pytest.raises(Refusal) as caught:
        texts(request(messages=[{"role": "user", "content": "hi"}]), tokenizer)
    assert (caught.value.status, caught.value.param) == (400, "model")
    assert "/v1/completions" in caught.value.message


def test_a_template_without_tools_gets_them_as_text() -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
    ]
    said = texts(request(messages=messages, tools=[tool]))
    assert said.startswith("[system] You may call these functions:")
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>' in said
    assert "[user] <tool_response>sunny</tool_response>" in said


def test_a_template_with_tools_gets_them_as_they_are() -> None:
    template = "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}{% endfor %}"
    tokenizer = TextTokenizer(toy_tokenizer().backend, {}, {"default": template})
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    said = texts(request(messages=messages, tools=[tool]), tokenizer)
    assert said.startswith('[{"type": "function"')
    assert '"arguments": {"x": 1}' in said


def test_an_answer_that_goes_on() -> None:
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "It is"}]
    assert conversation_text(begun, toy_tokenizer(), continue_last=True) == "[user] hi\n[assistant] It is"
    with pytest.raises(BadRequest, match="only an assistant's message"):
        conversation_text(begun[:1], toy_tokenizer(), continue_last=True)


def test_messages_come_back_as_openai_sends_them() -> None:
    sent = {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": None}
    assert ChatMessage.model_validate(sent).content == "x"
