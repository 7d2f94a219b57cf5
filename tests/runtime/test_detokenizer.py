"""Tokens one by one become whole characters, whatever the tokenizer."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from quantmill.runtime.tokenizer import Detokenizer, TextTokenizer
from tiny_models import byte_level_tokenizer

TEXTS = [
    "plain words, and more of them",
    "naïve café — “quotes”",
    "漢字とかな",
    "👩‍👩‍👧‍👦 family, 🇫🇷 flag",
    " leading and trailing ",
    "line\nbreaks\n\n  indented",
]


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
    detokenizer = Detokenizer(TextTokenizer.from_transformers(tokenizer))
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
