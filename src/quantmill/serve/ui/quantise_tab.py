"""The tab *Quantise*: a form over `plan` and `quantize`, with progress, a loss plot, stop and resume."""

from __future__ import annotations

from typing import Any

import gradio as gr
import pandas as pd

from quantmill.architectures import module_names
from quantmill.console import gigabytes, seconds
from quantmill.files import read_json
from quantmill.hub.variants import CARD_GRID, parse_variant
from quantmill.quantize.plan import measure_flops, plan
from quantmill.serve.ui.jobs import Form, Progress, Run
from quantmill.serve.ui.widgets import told
from quantmill.sources import resolve

OFFERED = ("4bit-128g", "4bit-64g", "4bit-32g", "3bit-128g", "3bit-64g", "2bit-64g", "8bit-128g", "8bit-32g")
DATASETS = ("python-docs", "wikitext", "c4", "self")
PRESETS = ("fast", "best")
PLAN_HEAD = ["branch", "size", "bits", "RAM", "VRAM", "time here"]
PLAN_WIDTHS: list[str | int] = ["204px", "76px", "56px", "76px", "76px", "112px"]
EVERY = 1.0  # seconds between looks at a run


def build(run: Run) -> None:
    """Lay the tab out and wire it."""
    tab = _Quantise(run)
    with gr.Row():
        with gr.Column(min_width=320):
            fields = _fields()
            with gr.Row():
                look = gr.Button("Plan", elem_id="plan", min_width=80)
                start = gr.Button("Start", variant="primary", elem_id="start", min_width=80)
                stop = gr.Button("Stop", variant="stop", elem_id="stop-run", min_width=80)
                resume = gr.Button("Resume", elem_id="resume", min_width=80)
        with gr.Column(min_width=320):
            gr.Markdown(
                "**Plan** says what each variant takes, before anything runs; **Start** makes them all."
            )
            table = gr.Dataframe(
                headers=PLAN_HEAD,
                value=[],
                interactive=False,
                column_widths=PLAN_WIDTHS,
                elem_id="plan-table",
            )
            shown = _views()
    look.click(tab.plan, fields, table)
    start.click(tab.start, fields, shown)
    resume.click(tab.resume, fields, shown)
    stop.click(tab.stop, None, shown)
    gr.Timer(EVERY).tick(tab.look, None, shown, show_progress="hidden")


def _fields() -> list[Any]:
    """What the user fills in, in the order of Form's fields."""
    source = gr.Textbox(label="Source", placeholder="folder, .gguf file or owner/name", elem_id="source")
    out = gr.Textbox(label="Output folder", placeholder="one folder in it for each variant", elem_id="out")
    variants = gr.Dropdown(
        OFFERED,
        value=["4bit-128g"],
        multiselect=True,
        allow_custom_value=True,
        label="Variants",
        info=f"the classic card: {', '.join(v.branch for v in CARD_GRID)}",
        elem_id="variants",
    )
    dataset = gr.Dropdown(
        DATASETS,
        value="python-docs",
        allow_custom_value=True,
        label="Calibration text",
        info="or a file, or a data set's id",
        elem_id="dataset",
    )
    with gr.Row():
        samples = gr.Number(128, label="Samples", precision=0, minimum=1, elem_id="samples", min_width=80)
        seqlen = gr.Number(2048, label="Tokens", precision=0, minimum=8, elem_id="seqlen", min_width=80)
        preset = gr.Dropdown(PRESETS, value="fast", label="Preset", elem_id="q-preset", min_width=80)
    return [source, out, variants, dataset, samples, seqlen, preset]


def _views() -> list[Any]:
    """Status, plot and remarks of the run."""
    status = gr.Markdown("Nothing is running.", elem_id="run-status")
    plot = gr.LinePlot(
        pd.DataFrame({"block": [], "loss": [], "branch": []}),
        x="block",
        y="loss",
        color="branch",
        title="Relative loss per block, mean of its linears",
        height=260,
        visible=False,  # an empty one draws an infinite scale
        elem_id="loss-plot",
    )
    remarks = gr.Textbox(
        "", label="What it says", lines=4, max_lines=12, interactive=False, visible=False, elem_id="remarks"
    )
    return [status, plot, remarks]


class _Quantise:
    """The tab's handlers."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def plan(self, *fields: Any) -> list[list[str]]:
        with told():
            form = _form(fields)
            form.check(["source"])
            config = read_json(resolve(form.source.strip(), files="config") / "config.json")
            module_names(config)  # an unknown architecture is refused here, in words
            chosen = [parse_variant(v) for v in form.variants]
            rows = plan(
                config,
                chosen,
                samples=form.samples,
                seqlen=form.seqlen,
                flops_per_second=measure_flops(),
            )
        return [
            [
                r.branch,
                gigabytes(r.size_bytes),
                f"{r.bits_per_weight:.2f}",
                gigabytes(r.peak_ram_bytes),
                gigabytes(r.peak_vram_bytes),
                seconds(r.seconds),
            ]
            for r in rows
        ]

    def start(self, *fields: Any) -> tuple[Any, ...]:
        with told():
            self.run.start(_form(fields))
        return self.look()

    def resume(self, *fields: Any) -> tuple[Any, ...]:
        with told():
            self.run.start(_form(fields), resume=True)
        return self.look()

    def stop(self) -> tuple[Any, ...]:
        self.run.stop()
        return self.look()

    def look(self) -> tuple[Any, ...]:
        """Status, plot and remarks as they are now."""
        now = self.run.progress()
        return _lines(now), _curve(now), gr.update(value=now.remarks, visible=bool(now.remarks))


def _form(fields: tuple[Any, ...]) -> Form:
    source, out, variants, dataset, samples, seqlen, preset = fields
    return Form(
        source or "",
        out or "",
        tuple(variants or ()),
        dataset or "",
        int(samples or 0),
        int(seqlen or 0),
        preset,
    )


HEADS = {
    "idle": "Nothing is running.",
    "running": "Running",
    "stopped": "Stopped. **Resume** goes on from here.",
    "failed": "It ended with an error, see below. **Resume** goes on where it stopped.",
    "finished": "Finished",
}


def _lines(now: Progress) -> str:
    lines = [HEADS[now.state]]
    if now.total:
        share = now.done / now.total
        bar = "█" * round(24 * share) + "░" * (24 - round(24 * share))
        lines.append(f"`{bar}` {now.done} of {now.total} linears")
    lines += [f"- **{branch}**: {gigabytes(size)} in `{folder}`" for branch, folder, size in now.finished]
    return "\n\n".join(lines)


def _curve(now: Progress) -> Any:
    if not now.losses:
        return gr.update(visible=False)
    frame = pd.DataFrame(now.losses, columns=["branch", "block", "linear", "loss"])
    per_block = frame.groupby(["branch", "block"], as_index=False)["loss"].mean()
    return gr.update(value=per_block, visible=True)
