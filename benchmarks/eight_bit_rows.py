"""Does an 8-bit variant need all calibration rows? Mean KL with all, a quarter, an eighth, a sixteenth of them.

    python benchmarks/eight_bit_rows.py [--valid FILE --test FILE]

The answer decides ROWS_SHARE in quantmill/quantize/job.py. Same model, tokens and scoring as
benchmarks/main_job.py.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from main_job import DATA, score, show

from quantmill.demo import small_model
from quantmill.quantize import job
from quantmill.quantize.calibration import build
from quantmill.quantize.pipeline import quantize as run
from quantmill.runtime.load import load_tokenizer
from quantmill.sources import resolve
from quantmill.types import QuantConfig, Variant


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--valid", type=Path, default=DATA / "wikitext-2-v1.valid.txt")
    parser.add_argument("--test", type=Path, default=DATA / "wikitext-2-v1.test.txt")
    asked = parser.parse_args()
    source = resolve(str(small_model()))
    data = build(str(asked.valid), load_tokenizer(source), seqlen=512, samples=64)
    variant = Variant("eight", QuantConfig(bits=8))
    for share in (1.0, 0.25, 0.125, 0.0625):
        job.ROWS_SHARE[8] = share
        with tempfile.TemporaryDirectory() as scratch:
            task = job.Job(source, "smollm2", Path(scratch), (variant,), data)
            done = run(task, lambda _: None)[0]
            show(
                f"8-bit g128, {share:.3f} of the rows",
                f"{done.seconds:.1f}",
                score(done.folder, source, asked.test),
            )


if __name__ == "__main__":
    main()
