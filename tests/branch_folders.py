"""Branch folders small enough to write in a test: real headers and JSON, weights of zeros.

A plain module beside the tests, so that fixtures and tests share it.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
from safetensors.numpy import save_file

from quantmill.formats.config import config_to_json
from quantmill.formats.layout import tensor_shapes
from quantmill.types import EvalReport, ModuleReport

KINDS = ("self_attn.q_proj", "mlp.down_proj")
K, N = 64, 32

MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)
CONFIG = {
    "model_type": "mistral",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "sliding_window": 4096,
}


def write_json(path, value):
    path.write_text(json.dumps(value))


def module_names():
    return [f"model.layers.{layer}.{kind}" for layer in range(2) for kind in KINDS]


def modules(config, loss=0.002, **fallbacks):
    """Reports of every module; `fallbacks` gives (damp, reason) by index, as m0, m1, ..."""
    found = []
    for i, name in enumerate(module_names()):
        damp, reason = fallbacks.get(f"m{i}", (config.damp_percent, None))
        found.append(ModuleReport(name, loss * (i + 1), damp, 4096, 0.5, reason))
    return found


def quantize_report(branch, config, reports, **changes):
    report = {
        "quantmill": "0.1.0",
        "source": "mistralai/Mistral-7B-Instruct-v0.1",
        "branch": branch,
        "config": {"bits": config.bits},
        "preset": "fast",
        "calibration": {
            "dataset": "wikitext",
            "samples": 64,
            "seqlen": 512,
            "tokens": 32768,
            "seed": 7,
            "fingerprint": "ab12" * 16,
            "documents": 600,
            "dropped": 31,
        },
        "fallbacks": [f"{m.name}: {m.fallback}" for m in reports if m.fallback],
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "command": "quantmill quantize mistralai/Mistral-7B-Instruct-v0.1 --grid card --out /home/me/out",
        "seconds": 200.4,
        "peak_ram_bytes": 2_100_000_000,
        "modules": [dataclasses.asdict(m) for m in reports],
    }
    return report | changes


def eval_report(kl=0.03, perplexity=5.301, **changes):
    report = EvalReport(
        perplexity=perplexity,
        tokens=6138,
        windows=6,
        ctx=1024,
        text="wikitext-2-v1.test.txt",
        text_sha256="cd34" * 16,
        protocol="non-overlapping windows, 95 % bootstrap interval",
        original_perplexity=5.25,
        mean_kl=kl,
        mean_kl_ci=(kl * 0.9, kl * 1.1),
        median_kl=kl / 3,
        p99_kl=kl * 9,
        p999_kl=kl * 30,
        max_kl=kl * 70,
        top1_agreement=0.9412,
        rms_delta_p=0.0217,
    )
    return dataclasses.asdict(dataclasses.replace(report, **changes))


def tensors(config):
    """Zeros in the shapes of a GPTQ file, plus an embedding."""
    dtypes = {"qweight": np.int32, "qzeros": np.int32, "scales": np.float16, "g_idx": np.int32}
    shapes = tensor_shapes(config.bits, config.group_size, K, N)
    made = {
        f"{module}.{suffix}": np.zeros(shapes[suffix], dtype)
        for module in module_names()
        for suffix, dtype in dtypes.items()
    }
    return made | {"model.embed_tokens.weight": np.zeros((128, 64), np.float16)}


def write_branch(
    folder, config, *, report=None, evaluation=None, check=None, quant=None, template=MISTRAL_TEMPLATE
):
    """Write a branch folder; JSON that is None is left out, `quant` None is what quantmill writes."""
    folder.mkdir(parents=True)
    save_file(tensors(config), folder / "model.safetensors")
    quant = config_to_json(config) if quant is None else quant
    write_json(folder / "config.json", CONFIG | {"quantization_config": quant})
    write_json(folder / "quantize_config.json", quant)
    tokenizer = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template}
    write_json(folder / "tokenizer_config.json", tokenizer)
    files = {"quantize_report.json": report, "eval_report.json": evaluation, "check_report.json": check}
    for name, value in files.items():
        if value is not None:
            write_json(folder / name, value)
    return folder
