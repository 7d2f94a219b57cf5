"""Drawing tokens on the GPU, as functions of tensors. twins.draw is the same in plain torch.

The host reads a token after the next step has begun, so what is drawn goes round in a ring of RING lines.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.runtime.gpu.launching import launch, power_of_two, starts_early
from quantmill.runtime.gpu.tensors import Draws, Rows

RING = 256  # tokens that are drawn before their places are used again
HELD = 32768  # logits that a program which draws can hold
CHUNK = 4096  # logits of one program that looks for the highest


def make_draws(rows: int, device: torch.device) -> Draws:
    """Greedy, nothing drawn yet."""
    return Draws(
        torch.zeros(rows, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
        torch.ones(rows, device=device),
        torch.zeros(RING, rows, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
        torch.zeros(RING, rows, dtype=torch.int32, device=device),
    )


def draw(logits: Tensor, draws: Draws, rows: Rows) -> None:
    """Draw every row's next token: into `rows.tokens`, `rows.positions` moved on by one, noted in `draws`."""
    from quantmill.runtime.gpu.kernels.sampling import draw_kernel, peaks_kernel

    number, vocab = logits.shape
    chunks, whole = -(-vocab // CHUNK), vocab <= HELD
    tops = logits.new_empty(number, chunks)
    places = torch.empty(number, chunks, dtype=torch.int32, device=logits.device)
    early = starts_early(logits.device)
    peaks_kernel[(number, chunks)](
        logits, tops, places, vocab, BLOCK=CHUNK, PDL=early, num_warps=8, **launch(early)
    )
    draw_kernel[(number,)](
        logits,
        tops,
        places,
        draws.sharpness,
        draws.top_ks,
        draws.top_ps,
        draws.uniforms,
        draws.steps,
        rows.tokens,
        rows.positions,
        draws.drawn,
        vocab,
        chunks,
        draws.drawn.shape[1],
        RING=RING,
        CHUNKS=power_of_two(chunks),
        BLOCK=power_of_two(vocab) if whole else 8192,
        WHOLE=whole,
        PDL=early,
        num_warps=32 if whole else 16,
        **launch(early),
    )
