"""Text comes out whole, ends where it should, and twice the same with the same seed."""

from __future__ import annotations

import random

import pytest
import torch
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from quantmill.errors import BadRequest
from quantmill.runtime.generate import (
    Detokenizer,
    TokenStream,
    chat_ids,
    end_tokens,
    generate,
    generate_ids,
)
from quantmill.types import SamplingParams
from tiny_models import byte_level_tokenizer, tiny_model

GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=16)
TEXTS = [
    "plain words, and more of them",
    "naïve café — “quotes”",
    "漢字とかな",
    "👩‍👩‍👧‍👦 family, 🇫🇷 flag",
    " leading and trailing ",
    "line\nbreaks\n\n  indented",
]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words with a leading mark, and byte tokens for the rest, as Llama's and Mistral's tokenizers have."""
    words = ["▁the", "▁cat", "▁", "caf", "s", "a", "t"]
    pieces = ["<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<s>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def stream(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


TOKENIZERS = [byte_level_tokenizer, sentencepiece_like]


class TestDetokenizer:
    @pytest.mark.parametrize("make", TOKENIZERS)
    @pytest.mark.parametrize("text", TEXTS)
    def test_pieces_are_whole_characters_and_join_to_the_text(self, make, text):
        tokenizer = make()
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = stream(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True) == text
        assert "\ufffd" not in "".join(pieces)

    def test_any_tokens_at_all(self):
        """Also bytes that never become a character: they come out at last, nothing is lost or said twice."""
        tokenizer, dice = byte_level_tokenizer(), random.Random(0)
        for _ in range(50):
            ids = [dice.randrange(2, len(tokenizer)) for _ in range(40)]
            whole = tokenizer.decode(ids, skip_special_tokens=True)
            assert "".join(stream(tokenizer, ids)).replace("\ufffd", "") == whole.replace("\ufffd", "")

    def test_any_words_and_letters(self):
        """A byte-fallback decoder spoils a whole run of bytes for one bad one, so only good ones compare."""
        tokenizer, dice = sentencepiece_like(), random.Random(0)
        first_word = tokenizer.convert_tokens_to_ids("▁the")
        good = [*range(2 + ord(" "), 2 + ord("~")), *range(first_word, len(tokenizer)), 1]
        for _ in range(50):
            ids = dice.choices(good, k=40)
            assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)

    def test_a_character_of_four_bytes_waits_for_the_last(self):
        tokenizer = sentencepiece_like()
        ids = [tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>") for b in "👍".encode()]
        assert stream(tokenizer, ids) == ["", "", "", "👍", ""]

    def test_half_a_character_at_the_end_is_shown_as_broken(self):
        tokenizer = sentencepiece_like()
        ids = [tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>") for b in "👍".encode()[:2]]
        assert stream(tokenizer, ids)[:2] == ["", ""]
        assert set(stream(tokenizer, ids)[2]) == {"\ufffd"}

    def test_the_space_after_a_special_token_is_kept(self):
        tokenizer = sentencepiece_like()
        the, cat, end = (tokenizer.convert_tokens_to_ids(t) for t in ("▁the", "▁cat", "</s>"))
        assert stream(tokenizer, [the, end, cat]) == ["the", "", " cat", ""]


class TestGenerate:
    def test_greedy_is_transformers_greedy(self, model, tokenizer):
        pieces = []
        got = generate(model, tokenizer, "the cat sat", GREEDY, on_text=pieces.append, chat=False)
        ids = tokenizer("the cat sat", return_tensors="pt").input_ids
        wanted = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
        assert got.text == tokenizer.decode(wanted, skip_special_tokens=True) == "".join(pieces)
        assert (got.prompt_tokens, got.completion_tokens) == (ids.shape[1], len(wanted))
        assert got.seconds > 0
        assert got.tok_s == got.completion_tokens / got.seconds

    def test_a_seed_repeats_and_leaves_the_callers_numbers_alone(self, model, tokenizer):
        def ask(seed):
            params = SamplingParams(temperature=1.5, top_k=0, top_p=1.0, max_new_tokens=16, seed=seed)
            return generate(model, tokenizer, "the cat", params).text

        torch.manual_seed(5)
        wanted = torch.rand(3)
        torch.manual_seed(5)
        assert ask(1) == ask(1) != ask(2)
        assert torch.equal(torch.rand(3), wanted)
        assert ask(None) != ask(None)

    def test_the_template_is_used_where_there_is_one(self, model, tokenizer):
        wanted = len(tokenizer("[user] the cat\n[assistant] ", add_special_tokens=False).input_ids)
        assert generate(model, tokenizer, "the cat", GREEDY).prompt_tokens == wanted
        bare = byte_level_tokenizer()
        bare.chat_template = None
        assert generate(model, bare, "the cat", GREEDY).prompt_tokens == len(bare("the cat").input_ids)

    def test_ends_at_any_end_token_of_the_generation_config(self, model, tokenizer, monkeypatch):
        ids = tokenizer("the cat sat on", return_tensors="pt").input_ids
        answer = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=1)[
            0, ids.shape[1] :
        ].tolist()
        end = next(i for i in range(1, 16) if answer[i] not in answer[:i])
        monkeypatch.setattr(model.generation_config, "eos_token_id", [319, answer[end]])
        assert end_tokens(model, tokenizer) == tuple(sorted({1, 319, answer[end]}))
        got = generate_ids(model, tokenizer, ids[0].tolist(), GREEDY)
        assert got.completion_tokens == end + 1
        assert got.text == tokenizer.decode(answer[:end], skip_special_tokens=True)
        assert got.stopped

    def test_cut_off_is_said(self, model, tokenizer):
        got = generate(
            model, tokenizer, "the cat", SamplingParams(temperature=0, max_new_tokens=2), chat=False
        )
        assert (got.completion_tokens, got.stopped) == (2, False)

    def test_never_past_the_context(self, model, tokenizer):
        got = generate_ids(model, tokenizer, [5] * 250, GREEDY)
        assert got.completion_tokens <= 6
        with pytest.raises(BadRequest, match="has 256 tokens, the model's context is 256"):
            generate_ids(model, tokenizer, [5] * 256, GREEDY)

    def test_empty_prompt(self, model, tokenizer):
        with pytest.raises(BadRequest, match="prompt is empty"):
            generate(model, tokenizer, "", GREEDY, chat=False)

    def test_a_models_own_settings_neither_warn_nor_win(self, model, tokenizer, monkeypatch, caplog, capfd):
        own = model.generation_config
        for key, value in {"max_length": 20, "temperature": 0.6, "top_p": 0.5, "do_sample": True}.items():
            monkeypatch.setattr(own, key, value)
        first, second = (generate(model, tokenizer, "the cat sat on a mat", GREEDY) for _ in range(2))
        assert first.text == second.text
        assert first.completion_tokens == 16 or first.stopped
        assert model.generation_config is own
        assert not caplog.records
        assert capfd.readouterr() == ("", "")

    def test_an_error_in_the_callback_leaves_the_model_usable(self, model, tokenizer):
        own = model.generation_config

        def fail(text):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            generate(model, tokenizer, "the cat", GREEDY, on_text=fail)
        assert model.generation_config is own


def test_end_tokens_are_not_text(tokenizer):
    """Also where the tokenizer does not know them for special."""
    stream = TokenStream(tokenizer, [7], None)
    for value in ([1, 2, 3], [5], [6], [7]):
        stream.put(torch.tensor(value))
    stream.end()
    assert "".join(stream.pieces) == tokenizer.decode([5, 6])
    assert (stream.tokens, stream.ended) == (3, True)


class TestChatIds:
    def test_special_tokens_are_the_templates_own(self, tokenizer):
        text = "[user] a\n[assistant] b\n[user] c\n[assistant] "
        messages = [("user", "a"), ("assistant", "b"), ("user", "c")]
        ids = chat_ids(tokenizer, [{"role": r, "content": c} for r, c in messages])
        assert ids == tokenizer(text, add_special_tokens=False).input_ids

    def test_a_template_may_refuse(self):
        tokenizer = byte_level_tokenizer()
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(
            BadRequest, match=r"refuses the roles user, user \(roles must alternate"
        ) as caught:
            chat_ids(tokenizer, [{"role": "user", "content": "a"}] * 2)
        assert isinstance(caught.value.__cause__, TemplateError)

    def test_no_template(self):
        tokenizer = byte_level_tokenizer()
        tokenizer.chat_template = None
        with pytest.raises(BadRequest, match="no chat template"):
            chat_ids(tokenizer, [{"role": "user", "content": "a"}])
