import pytest

from quantmill.hub import card_format as fmt
from quantmill.types import EvalReport


@pytest.mark.parametrize(
    ("count", "text"),
    [(4_160_000_000, "4.16 GB"), (999_900_000, "999.9 MB"), (1_000_000, "1.0 MB"), (12_345, "12.3 kB")],
)
def test_sizes(count, text):
    assert fmt.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.46, "7.5 s"), (200.4, "3 min 20 s"), (59.99, "60.0 s"), (3900, "1 h 05 min")]
)
def test_durations(seconds, text):
    assert fmt.duration(seconds) == text


def test_missing_values():
    assert fmt.or_missing(None) == "not recorded"
    assert fmt.or_missing(0) == "0"
    assert fmt.or_missing(0.1) == "0.1"


def test_divergence_with_and_without_interval():
    report = EvalReport(5.0, 10, 1, 8, "t", "h", "p", mean_kl=0.01234)
    assert fmt.kl_with_interval(report) == "0.0123"
    assert fmt.kl_with_interval(EvalReport(5.0, 10, 1, 8, "t", "h", "p")) == "not measured"


@pytest.mark.parametrize(
    ("command", "public"),
    [
        ("/home/me/.venv/bin/quantmill quantize a/b --out /data/out", "quantmill quantize a/b --out out"),
        ("quantmill quantize ../smol --out=/data/out", "quantmill quantize smol --out=out"),
        ("quantmill quantize '/my models/a b' --seed 1", "quantmill quantize 'a b' --seed 1"),
        ("quantmill 'unfinished /home/me/x", "quantmill ''\"'\"'unfinished' x"),
    ],
)
def test_commands_lose_private_paths(command, public):
    assert fmt.public_command(command) == public


def test_tables_keep_their_shape():
    table = fmt.markdown_table(("a", "b"), [("x|y", "two\nlines"), ("1", "2")])
    assert table.splitlines() == ["| a | b |", "| :-- | :-: |", "| x\\|y | two lines |", "| 1 | 2 |"]
