"""Drawing beside its slow twin, in Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton.language", reason="triton is not installed")

from quantmill.runtime.gpu import drawing, tensors, twins


@pytest.mark.parametrize(("vocab", "held"), [(300, 32768), (5000, 4096), (9000, 4096)])
def test_draw(device, vocab, held, monkeypatch):
    """Greedy, warm, top_k with a tie, top_p, both; the ends of the uniform numbers; a filler row."""
    monkeypatch.setattr(drawing, "HELD", held)
    kinds = [
        (0, vocab, 1),
        (1, vocab, 1),
        (1.5, 7, 1),
        (0.7, vocab, 0.8),
        (1, 20, 0.5),
        (2, 1, 1),
        (1, vocab, 1),
    ]
    uniforms = (0.0, 0.3, 0.77, 0.999999)
    rows_of = [(*kind, u) for kind in kinds for u in uniforms]
    logits = torch.randn(len(rows_of), vocab, device=device) * 2
    logits[8:12, 100:104] = logits[8:12].topk(7).values[:, -1:]  # whole ties stay in
    found = []
    for module in (drawing, twins):
        draws, count = drawing.make_draws(len(rows_of) + 2, device), len(rows_of)
        positions = torch.arange(count, dtype=torch.int32, device=device)
        positions[-1] = -1
        zeros = torch.zeros(count, dtype=torch.int32, device=device)
        rows = tensors.Rows(zeros, positions, zeros, zeros.view(1, -1))
        for i, (sharp, k, p, u) in enumerate(rows_of):
            draws.sharpness[i], draws.top_ks[i], draws.top_ps[i] = sharp, k, p
            draws.uniforms[i % drawing.RING, i], draws.steps[i] = u, i
        module.draw(logits, draws, rows)
        found.append((rows.tokens, rows.positions, draws.steps, draws.drawn))
    for mine, wanted in zip(*found, strict=True):
        assert torch.equal(mine, wanted)
    assert len(set(found[0][0].tolist())) > 8
