"""`--format` and `--grid family`: from parameter sets to variants in the containers asked for. Loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from quantmill.errors import BadRequest
from quantmill.types import CheckpointFormat, QuantConfig, Variant

FAMILY = "family"
FAMILY_MIXES = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
GROUP = 32  # what GGUF's blocks share a scale over, at most
HELP = "gptq (v1; default where symmetric), gptq_v2, awq, or gguf:TYPE, as gguf:Q4_K_M or gguf:Q2_K,Q4_0"


def in_container(
    choice: Sequence[Variant], format: str | None, *, sym: bool | None = None
) -> tuple[Variant, ...]:
    """The variants that `--format` makes of the parameter sets chosen. Raises BadRequest."""
    kind, _, types = (format or "gptq").partition(":")
    if kind == "gguf":
        return tuple(gguf_variant(name, choice[0].config) for name in types.split(","))
    if format == "awq":
        return tuple(awq_variant(v.config, sym=sym) for v in choice)
    known = [str(f) for f in CheckpointFormat]
    if format is not None and format not in known:
        raise BadRequest(
            f"--format {format} is not written: use one of {', '.join(known)}, awq, gguf:TYPE (gguf:Q4_K_M)"
        )
    version = None if format is None else CheckpointFormat(format)
    return tuple(
        dataclasses.replace(v, config=dataclasses.replace(v.config, checkpoint_format=version))
        for v in choice
    )


def gguf_variant(name: str, config: QuantConfig) -> Variant:
    """A GGUF mix as a variant; of the parameters only damping and order count. Raises UnsupportedModel."""
    from quantmill.quantize.gguf_mix import mix_name

    mix = mix_name(name)
    plain = dataclasses.replace(config, bits=4, group_size=GROUP, sym=True, checkpoint_format=None)
    return Variant(mix, plain, f"gguf:{mix}")


def awq_variant(config: QuantConfig, *, sym: bool | None = None) -> Variant:
    """An AWQ variant; asymmetric unless told otherwise, as AWQ repositories are. Raises BadRequest."""
    if config.bits != 4:
        raise BadRequest(f"AWQ files have 4 bits, not {config.bits}: use --bits 4, or leave --format out")
    version = CheckpointFormat.GPTQ_V2  # AWQ stores true zero points
    parameters = dataclasses.replace(config, sym=bool(sym), checkpoint_format=version)
    return Variant(f"awq-4bit-{config.group_size}g", parameters, "awq")


def family() -> tuple[Variant, ...]:
    """What a maker publishes of one model: a GPTQ, an AWQ and a GGUF repository, from one calibration.

    Each folder of the output is one repository; the AWQ group is the largest that the model's shapes allow
    (commands/family.py).
    """
    config = QuantConfig()
    chosen = (
        ("gptq", Variant("main", config)),
        ("awq", dataclasses.replace(awq_variant(config), branch="main")),
        *(("gguf", gguf_variant(name, config)) for name in FAMILY_MIXES),
    )
    return tuple(dataclasses.replace(v, branch=f"{repository}/{v.branch}") for repository, v in chosen)
