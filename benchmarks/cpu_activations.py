"""What rounding the activations costs: KL divergence and top-1 agreement of the CPU runtime to its exact
path.

    python benchmarks/cpu_activations.py MODEL --text FILE [--windows 4] [--ctx 512]

Windows of text are scored position by position, with the exact path (fp32 activations and cache, the head as
it is) and with each precision of activations (16-bit cache, 8-bit head). Nats per token.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantmill.kernels.cpu.layout import Precision
from quantmill.runtime.cpu.runtime import CpuRuntime
from quantmill.runtime.single import SingleSequence

FROM = 2000  # characters of the text that are passed over: headings


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    x = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return result


def main() -> None:
    from tokenizers import Tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json, where MODEL has none")
    asked = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(asked.tokenizer or asked.model / "tokenizer.json"))
    text = asked.text.read_text(encoding="utf-8")[FROM : FROM + 8 * asked.windows * asked.ctx]
    ids = tokenizer.encode(text).ids
    windows = [ids[i * asked.ctx : (i + 1) * asked.ctx] for i in range(asked.windows)]
    exact = SingleSequence(CpuRuntime.from_folder(asked.model, exact=True))
    others = {
        p: SingleSequence(CpuRuntime.from_folder(asked.model, precision=p))
        for p in (Precision.INT16, Precision.INT8)
    }
    losses: dict[Precision, list[NDArray[np.float64]]] = {p: [] for p in others}
    agreed: dict[Precision, list[NDArray[np.bool_]]] = {p: [] for p in others}
    for window in windows:
        exact.reset()
        wanted = log_softmax(exact.score(window))
        for precision, decoder in others.items():
            decoder.reset()
            found = log_softmax(decoder.score(window))
            losses[precision].append((np.exp(wanted) * (wanted - found)).sum(axis=-1))
            agreed[precision].append(wanted.argmax(axis=-1) == found.argmax(axis=-1))
    for precision in others:
        kl, same = np.concatenate(losses[precision]), np.concatenate(agreed[precision])
        spread = f"median {np.median(kl):.2e}  p99 {np.quantile(kl, 0.99):.2e}  max {kl.max():.2e}"
        agreement = f"top-1 agreement {same.mean():.4f}  ({len(kl)} tokens)"
        print(f"{precision.name:6} mean KL {kl.mean():.2e}  {spread}  {agreement}")


if __name__ == "__main__":
    main()
