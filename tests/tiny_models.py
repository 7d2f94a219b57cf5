"""Tiny models and a tokenizer for the tests, made in a blink, the same every time."""

from __future__ import annotations

from typing import Any

import torch

TEXT = "the cat sat on a mat and saw 12 dogs run past the old house by the river while rain fell softly"
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}


def tiny_model(model_type: str, **settings: Any) -> Any:
    """A two-block model with random weights that fp16 holds exactly."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**SIZES, **settings})
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 1
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            noisy = parameter.data + torch.randn_like(parameter) * 0.02  # else biases are 0 and norms are 1
            parameter.data = noisy.half().float()
    return model


def byte_level_tokenizer() -> Any:
    """A byte-level BPE of some 300 tokens, with a chat template; it can spell any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
    )
    return tokenizer
