"""Transformers adapter: after `quantmill.hf.register()` ordinary Transformers code reads GPTQ, AWQ
(GEMM) and compressed-tensors (pack-quantized) folders.

`AutoModelForCausalLM.from_pretrained(folder, device_map="auto")`, `model.generate`,
`pipeline("text-generation", ...)`, `save_pretrained` and loading again work with no other package.
Nothing happens at import. Knows no command line.
"""

from __future__ import annotations


def register(backend: str | None = None) -> None:
    """Let Transformers read quantised checkpoints through quantmill, in this process; idempotent.

    backend: the only kernels to use ("cpu-exact", "reference", ...; QUANTMILL_BACKEND does the same), None:
    the fastest that serve. Raises BadRequest for a name that is none.

    Replaces the rows "gptq", "awq" and "compressed-tensors" of Transformers' quantizer tables, which ask for
    optimum, gptqmodel and compressed-tensors.
    """
    from quantmill.kernels import front_door
    from quantmill.runtime import adapter

    front_door.force(backend)
    adapter.register()


def unregister() -> None:
    """Give the rows back to Transformers. Models already loaded go on working."""
    from quantmill.runtime import adapter

    adapter.unregister()
