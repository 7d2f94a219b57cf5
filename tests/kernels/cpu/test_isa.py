"""Which row of instruction sets is chosen, and what is said where one cannot be."""

from __future__ import annotations

import pytest

from quantmill.errors import BadRequest
from quantmill.kernels.cpu import isa


def test_the_fastest_that_the_processor_has_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(isa.VARIABLE, raising=False)
    features = {"avx2": True, "f16c": True, "fma": True}
    monkeypatch.setattr(isa, "host_features", lambda: features)
    assert isa.choose().name == "avx2"
    assert [row.name for row in isa.available()] == ["avx2", "portable"]
    features["avxvnni"] = True
    assert isa.choose().name == "avxvnni"
    features.clear()
    assert isa.choose().name == "portable"


def test_the_environment_is_read_at_each_call_and_an_argument_goes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(isa.VARIABLE, "portable")
    assert isa.choose().name == "portable"
    best = isa.available()[0].name
    assert isa.choose(best).name == best
    monkeypatch.setenv(isa.VARIABLE, "")
    assert isa.choose().name == best


def test_what_cannot_be_is_refused_with_the_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadRequest, match=r"'mmx'.*portable"):
        isa.choose("mmx")
    monkeypatch.setattr(isa, "host_features", lambda: {"avx2": True})
    with pytest.raises(BadRequest, match=r"lacks avx512bw\+avx512f.*use one of portable"):
        isa.choose("avx512vnni")
