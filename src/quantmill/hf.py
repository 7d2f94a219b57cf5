"""Transformers adapter: after `quantmill.hf.register()` ordinary Transformers code reads GPTQ folders.

`AutoModelForCausalLM.from_pretrained(folder, device_map="auto")`, `model.generate`,
`pipeline("text-generation", ...)`, `save_pretrained` and loading again work with no other package.
Nothing happens at import. Knows no command line.
"""

from __future__ import annotations


def register() -> None:
    """Let Transformers read GPTQ checkpoints through quantmill, in this process; idempotent.

    Replaces the row "gptq" of Transformers' quantizer tables, which asks for optimum and gptqmodel.
    """
    from quantmill.runtime import adapter

    adapter.register()


def unregister() -> None:
    """Give the row "gptq" back to Transformers. Models already loaded go on working."""
    from quantmill.runtime import adapter

    adapter.unregister()
