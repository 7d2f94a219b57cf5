import json

import pytest

from branch_folders import MISTRAL_TEMPLATE
from quantmill.hub.card_prompt import chat_template, read_prompt, special_tokens

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write(folder, template=None, **tokenizer):
    if template is not None:
        tokenizer["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def test_mistral(tmp_path):
    prompt = read_prompt(write(tmp_path, MISTRAL_TEMPLATE, bos_token="<s>", eos_token="</s>"))
    assert prompt.text == "<s>[INST] {prompt} [/INST]"
    assert prompt.turns == "<s>[INST] {prompt} [/INST]{answer}</s> [INST] {next prompt} [/INST]"


def test_chatml_in_a_file_of_its_own_wins(tmp_path):
    write(tmp_path, MISTRAL_TEMPLATE, bos_token="<s>")
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert read_prompt(tmp_path).text == "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def test_other_places_for_a_template(tmp_path):
    write(tmp_path, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}])
    assert chat_template(tmp_path) == "y"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "z"}))
    assert chat_template(tmp_path) == "z"


def test_no_template(tmp_path):
    assert read_prompt(tmp_path) is None
    assert read_prompt(write(tmp_path)) is None


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('needs tools') }}",
        "{% for m in messages %",
        "{{ messages[0]['content'] + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "always the same",
    ],
)
def test_templates_that_do_not_render_a_prompt(tmp_path, template):
    assert read_prompt(write(tmp_path, template)) is None


def test_a_template_for_one_turn_only(tmp_path):
    refuse = "{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}"
    one = refuse + "Q: {{ messages[0]['content'] }} A:"
    prompt = read_prompt(write(tmp_path, one))
    assert (prompt.text, prompt.turns) == ("Q: {prompt} A:", None)


def test_special_tokens_in_every_form(tmp_path):
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<old>", "unk_token": "<unk>"})
    )
    write(tmp_path, bos_token={"content": "<s>"}, eos_token="</s>", pad_token=None, add_bos_token=True)
    assert special_tokens(tmp_path) == {"bos_token": "<s>", "unk_token": "<unk>", "eos_token": "</s>"}


@pytest.mark.model
def test_the_same_as_apply_chat_template(smol):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smol)
    chat = [{"role": "user", "content": "{prompt}"}]
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert read_prompt(smol).text == expected
