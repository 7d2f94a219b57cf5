"""Rules about packed modules: shapes, zero points, scales, group order, and what the config promises of them.

Each yields its findings, also the good ones; modules that share one are one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from quantmill.doctor.facts import Facts, ModuleFacts, Order
from quantmill.doctor.lines import count_of, error, grouped, ok, some, warning
from quantmill.errors import BadCheckpoint
from quantmill.files import read_json
from quantmill.formats.dialects import Layout
from quantmill.types import ActOrder, CheckpointFormat, Finding, Level, QuantConfig


def _shapes(facts: Facts, config: QuantConfig) -> Iterator[Finding]:
    """Tensors against the config, and the config's sizes against the architecture."""
    faults = [(m.name, fault) for m in facts.modules for fault in m.faults]
    yield from grouped(Level.ERROR, faults)
    linears = facts.expected.linears if facts.expected else {}
    misfits = []
    for m in facts.modules:
        shape = linears.get(m.name)
        if m.faults or shape is None:
            continue
        found, needed = (m.in_features, m.out_features), (shape.in_features, shape.out_features)
        if found != needed:
            misfits.append((m.name, f"(inputs, outputs) are {found}; config.json asks for {needed}"))
    yield from grouped(Level.ERROR, misfits)
    if facts.modules and not faults and not misfits:
        size = "one group a row" if config.group_size == -1 else f"groups of {config.group_size}"
        yield ok(count_of(facts.modules), f"shapes and dtypes are right for {config.bits} bits, {size}")


def _zeros(facts: Facts, config: QuantConfig) -> Iterator[Finding]:
    """What is stored in qzeros against the label, which only GPTQ files have."""
    if facts.checkpoint.layout is not Layout.GPTQ:
        return
    sound = _sound(facts)
    formats = {m.zero_format for m in sound}
    label = config.zero_format
    mislabelled = [m.name for m in sound if m.zero_format is not label]
    if mislabelled:
        holds = CheckpointFormat.GPTQ_V2 if label is CheckpointFormat.GPTQ else CheckpointFormat.GPTQ
        cure = "quantise again" if len(formats) > 1 else "type quantmill check --fix"
        message = (
            f"zeros are stored as {holds}, the label says {label}: most loaders read them wrongly; {cure}"
        )
        yield error(some(mislabelled), message)
    odd = [m.name for m in sound if m.odd_zeros]
    if odd:
        message = (
            f"sym is true, yet zeros differ from {config.sym_zero}: readers of symmetric files ignore them"
        )
        yield error(some(odd), message + "; set sym to false")
    wrapped = [m.name for m in sound if m.wrapped_zeros and not m.odd_zeros]
    if wrapped:
        message = "asymmetric v1 with zero points of 0, in which readers disagree: quantise again as gptq_v2"
        yield warning(some(wrapped), message)
    if sound and not mislabelled and not odd and not wrapped:
        how = "symmetric" if config.sym else "asymmetric"
        yield ok(count_of(sound), f"{how} zeros agree with the label {label}")


def _scales(facts: Facts, config: QuantConfig) -> Iterator[Finding]:
    sound = _sound(facts)
    broken = [m.name for m in sound if m.broken_scales]
    if broken:
        yield error(some(broken), "NaN or infinite scales: quantise again")
    biases = [m.name for m in sound if m.broken_bias]
    if biases:
        yield error(some(biases), "NaN or infinite biases: quantise again")
    large = [m.name for m in sound if m.overflowing]
    if large:
        yield error(some(large), "scales or biases overflow float16: quantise again")
    wide = [m for m in sound if m.scales_dtype != "F16"]
    rounding = ((m.name, f"scales are {m.scales_dtype}: loaders round them to F16") for m in wide)
    yield from grouped(Level.WARNING, rounding)
    zero = [m for m in sound if m.zero_scales]
    if zero:
        count = sum(m.zero_scales for m in zero)
        yield warning(some([m.name for m in zero]), f"{count} groups have scale 0, so weights of 0")
    if sound and not broken and not large and not biases:
        yield ok(count_of(sound), "scales are finite")


def _order(facts: Facts, config: QuantConfig) -> Iterator[Finding]:
    """g_idx against what desc_act and static_groups promise."""
    by_order: dict[Order, list[str]] = {}
    for m in _sound(facts):
        if m.order is not None:
            by_order.setdefault(m.order, []).append(m.name)
    for order, names in by_order.items():
        level, message = _order_finding(order, config)
        yield Finding(level, count_of(names) if level is Level.OK else some(names), message)


def _order_finding(order: Order, config: QuantConfig) -> tuple[Level, str]:
    """What one kind of g_idx means under this config."""
    if order in (Order.PERMUTED, Order.UNEVEN) and not config.desc_act:
        message = "g_idx is not sequential, yet desc_act is false: loaders that trust it read garbage"
        return Level.ERROR, f"{message}; set desc_act to true"
    if order is Order.PERMUTED and config.act_order is ActOrder.STATIC:
        message = "static_groups is true, yet g_idx is not sequential: set static_groups to false"
        return Level.WARNING, message
    if order is Order.MISSING and config.act_order is ActOrder.GROUPED and config.group_size != -1:
        message = "no g_idx, yet desc_act is true: which column has which scale is lost; get another file"
        return Level.ERROR, message
    return ORDER_FINDINGS[order]


ORDER_FINDINGS = {
    Order.SEQUENTIAL: (Level.OK, "g_idx is sequential: no reader needs it"),
    Order.PERMUTED: (
        Level.OK,
        "g_idx permutes the groups, as desc_act says: every reader must honour it; "
        "quantmill check --fix frees those of it whose inputs no other block shares",
    ),
    Order.UNEVEN: (Level.WARNING, "g_idx has groups of unequal sizes: some loaders cannot reorder them"),
    Order.MISSING: (Level.WARNING, "no g_idx, as in early AutoGPTQ files: consecutive groups are supposed"),
    Order.OUT_OF_RANGE: (Level.ERROR, "g_idx names groups that are not there: download or quantise again"),
}


def _head(facts: Facts, config: QuantConfig) -> Iterator[Finding]:
    if facts.checkpoint.layout is not Layout.GPTQ:  # the key is GPTQ's
        return
    said = bool((facts.checkpoint.quant or {}).get("lm_head"))
    is_packed = "lm_head.qweight" in facts.checkpoint.tensors
    if said is not is_packed:
        found = "packed" if is_packed else "not packed"
        message = (
            f"lm_head is {str(said).lower()} in the config, the output head is {found}: correct the config"
        )
        yield error("lm_head", message)


def _report(facts: Facts, config: QuantConfig) -> Iterator[Finding]:
    """Modules that their maker could not quantise as asked."""
    path = facts.checkpoint.folder / "quantize_report.json"
    if not path.is_file():
        return
    try:
        fallbacks = read_json(path).get("fallbacks")
    except BadCheckpoint as fault:
        yield warning(path.name, str(fault))
        return
    if isinstance(fallbacks, list) and fallbacks:
        yield warning(path.name, f"not quantised as asked: {some([str(f) for f in fallbacks])}")


# An error of the first is damage that no loader survives; of the second, some loaders do not care.
PACKED_RULES: tuple[Callable[[Facts, QuantConfig], Iterator[Finding]], ...] = (_shapes, _scales, _order)
LABEL_RULES: tuple[Callable[[Facts, QuantConfig], Iterator[Finding]], ...] = (_zeros, _head, _report)


def _sound(facts: Facts) -> list[ModuleFacts]:
    """Modules whose contents could be looked at."""
    return [m for m in facts.modules if not m.faults]
