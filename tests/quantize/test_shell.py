"""The shell: block after block, lent one at a time, must be Transformers' own forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptq_models import FAMILIES
from quantmill.architectures import ARCHITECTURES
from quantmill.checkpoint import open_checkpoint
from quantmill.errors import BadCheckpoint
from quantmill.quantize.shell import Shell
from tiny_models import tiny_model


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_blocks_one_by_one_are_the_model(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type, **FAMILIES[model_type])
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 300, (3, 24))  # longer than Mistral's window of 8
    shell = Shell(open_checkpoint(tmp_path), torch.device("cpu"))
    with torch.inference_mode():
        hidden = shell.embed(ids)
        for index in range(len(shell)):
            out = shell.load_block(index)(hidden, **shell.frames(hidden, index))
            hidden = out[0] if isinstance(out, tuple) else out
            shell.drop_block(index)
        assert torch.allclose(model.model.norm(hidden), model.model(ids).last_hidden_state, atol=1e-4)
    assert all(p.is_meta for p in shell.blocks.parameters())


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp.up_proj" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    shell = Shell(open_checkpoint(tmp_path), torch.device("cpu"))
    with pytest.raises(BadCheckpoint, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        shell.load_block(1)
