"""Text comes out whole, ends where it should, and twice the same with the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantmill.errors import BadRequest
from quantmill.runtime.generate import end_tokens, generate, generate_ids
from quantmill.runtime.reference import ReferenceRuntime
from quantmill.runtime.single import SingleSequence
from quantmill.runtime.tokenizer import TextTokenizer
from quantmill.types import SamplingParams
from tiny_models import byte_level_tokenizer, tiny_model

GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=16)


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.from_transformers(byte_level_tokenizer())


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def runtime(model):
    return ReferenceRuntime(model, kv_tokens=512, ends=(1,))


def test_greedy_is_transformers_greedy(model, runtime, tokenizer):
    pieces = []
    got = generate(runtime, tokenizer, "the cat sat", GREEDY, on_text=pieces.append, chat=False)
    ids = torch.tensor([tokenizer.encode("the cat sat")])
    wanted = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
    assert got.text == tokenizer.decode(wanted.tolist()) == "".join(pieces)
    assert (got.prompt_tokens, got.completion_tokens) == (ids.shape[1], len(wanted))
    assert 0 < got.first_token_s < got.seconds
    assert got.tok_s == got.completion_tokens / got.seconds


def test_a_seed_repeats(runtime, tokenizer):
    def ask(seed):
        params = SamplingParams(temperature=1.5, top_k=0, top_p=1.0, max_new_tokens=16, seed=seed)
        return generate(runtime, tokenizer, "the cat", params).text

    assert ask(1) == ask(1) != ask(2)
    assert ask(None) != ask(None)


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_guessing_from_the_text_changes_nothing(runtime, tokenizer, temperature):
    params = SamplingParams(temperature=temperature, repetition_penalty=1.0, max_new_tokens=60, seed=4)
    prompt = "the cat sat on the mat, the cat sat on the mat, the cat sat on"
    plain = generate(runtime, tokenizer, prompt, params)
    pieces = []
    ahead = generate(runtime, tokenizer, prompt, params, on_text=pieces.append, lookup=True)
    assert ahead.text == plain.text == "".join(pieces)
    assert (ahead.completion_tokens, ahead.stopped) == (plain.completion_tokens, plain.stopped)
    assert plain.guesses is None
    assert ahead.guesses.right <= ahead.guesses.guessed
    assert 0 < ahead.guesses.passes <= plain.completion_tokens


def test_the_template_is_used_where_there_is_one(runtime, tokenizer):
    wanted = len(tokenizer.encode("[user] the cat\n[assistant] ", special=False))
    assert generate(runtime, tokenizer, "the cat", GREEDY).prompt_tokens == wanted
    bare = TextTokenizer(tokenizer.backend, tokenizer.special, {})
    assert generate(runtime, bare, "the cat", GREEDY).prompt_tokens == len(bare.encode("the cat"))


def answer_ids(runtime, tokenizer, ids, count=16):
    sequence = SingleSequence(runtime)
    found = [int(sequence.read(ids).argmax())]
    while len(found) < count:
        found.append(int(sequence.read([found[-1]]).argmax()))
    return found


def fresh(answer):
    """Where a token comes up that was not there before."""
    return next(i for i in range(1, 16) if answer[i] not in answer[:i])


def test_ends_at_any_end_token(model, tokenizer):
    ids = tokenizer.encode("the cat sat on")
    answer = answer_ids(ReferenceRuntime(model, kv_tokens=256), tokenizer, ids)
    end = fresh(answer)
    runtime = ReferenceRuntime(model, kv_tokens=256, ends=(answer[end], 319))
    assert end_tokens(runtime, tokenizer) == tuple(sorted({1, 319, answer[end]}))
    got = generate_ids(SingleSequence(runtime), tokenizer, ids, GREEDY)
    assert got.completion_tokens == end + 1
    assert got.text == tokenizer.decode(answer[:end])
    assert got.stopped
    on = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=16, ignore_eos=True)
    assert generate_ids(SingleSequence(runtime), tokenizer, ids, on).completion_tokens == 16


def test_ends_at_tokens_and_texts_that_the_caller_names(runtime, tokenizer):
    ids = tokenizer.encode("the cat sat on")
    answer = answer_ids(runtime, tokenizer, ids)
    end = fresh(answer)
    params = SamplingParams(
        temperature=0, repetition_penalty=1.0, max_new_tokens=16, stop_token_ids=(answer[end],)
    )
    assert generate_ids(SingleSequence(runtime), tokenizer, ids, params).text == tokenizer.decode(
        answer[:end]
    )
    whole = tokenizer.decode(answer)
    stop = whole[3:5]
    params = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=16, stop=(stop,))
    pieces = []
    got = generate_ids(SingleSequence(runtime), tokenizer, ids, params, on_text=pieces.append)
    assert got.stopped
    assert got.text == whole[: whole.index(stop)] == "".join(pieces)


def test_cut_off_is_said(runtime, tokenizer):
    params = SamplingParams(temperature=0, max_new_tokens=2)
    got = generate(runtime, tokenizer, "the cat", params, chat=False)
    assert (got.completion_tokens, got.stopped) == (2, False)


def test_never_past_the_context(runtime, tokenizer):
    got = generate_ids(SingleSequence(runtime), tokenizer, [5] * 250, GREEDY)
    assert got.completion_tokens <= 6
    with pytest.raises(BadRequest, match="has 256 tokens, the model's context is 256"):
        generate_ids(SingleSequence(runtime), tokenizer, [5] * 256, GREEDY)


def test_empty_prompt(runtime, tokenizer):
    with pytest.raises(BadRequest, match="prompt is empty"):
        generate(runtime, tokenizer, "", GREEDY, chat=False)


def test_an_error_in_the_callback_leaves_the_runtime_usable(runtime, tokenizer):
    def fail(text):
        raise KeyboardInterrupt

    wanted = generate(runtime, tokenizer, "the cat", GREEDY).text
    with pytest.raises(KeyboardInterrupt):
        generate(runtime, tokenizer, "the cat", GREEDY, on_text=fail)
    assert generate(runtime, tokenizer, "the cat", GREEDY).text == wanted


def test_what_was_read_is_not_read_again(runtime, tokenizer):
    """A conversation that goes on reads what is new; one that went another way goes back."""
    sequence = SingleSequence(runtime)
    sizes = []
    forward = runtime.forward
    runtime.forward = lambda pieces: sizes.append(len(pieces[0].tokens)) or forward(pieces)
    first, second = list(range(2, 42)), [*range(2, 42), *range(50, 60)]
    sequence.go_on_to(first)
    found = np.array(sequence.go_on_to(second))
    assert sizes == [40, 10]
    assert sequence.ids == second
    sequence.go_on_to([*range(2, 22), 99])
    sequence.go_on_to(sequence.ids[:])  # nothing new: the last token is read again for its logits
    assert sizes == [40, 10, 1, 1]
    again = SingleSequence(runtime).go_on_to(second)
    assert np.abs(found - again).max() < 1e-4
