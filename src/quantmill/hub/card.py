"""The model card: a folder of branches in, README.md and its pictures out, beside and inside the branches.

States only what reports and files hold. Knows how the page is put together, not how its numbers come about.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmill import plots
from quantmill.errors import BadRequest
from quantmill.files import write_text
from quantmill.hub.card_advice import MEAN_KL, advice, ranking
from quantmill.hub.card_facts import BranchFacts, RepositoryFacts, Source, read_repository
from quantmill.hub.card_format import NOT_RECORDED, code, markdown_table, or_missing, size
from quantmill.hub.card_prompt import PROMPT, PromptTemplate, chat_template, read_prompt
from quantmill.hub.card_sections import (
    fallback_lines,
    layer_losses,
    loader_lines,
    protocols,
    provided_files,
    recipes,
    tails,
)
from quantmill.hub.variants import MAIN
from quantmill.types import Json, SamplingParams

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

CARD = "README.md"
SIZE_PICTURE = "loss_by_size.png"
LAYER_PICTURE = "loss_by_layer.png"
HOST = "https://huggingface.co"
NO_OWNER = "OWNER"  # stands in commands where nobody said who will publish
NOT_MADE = "not made yet"


@dataclass(frozen=True, slots=True)
class Siblings:
    """Repositories made from the same original, as `owner/name`; None where there is none."""

    gptq: str | None = None
    awq: str | None = None
    gguf: str | None = None


@dataclass(frozen=True, slots=True)
class Names:
    """What things are called on the card."""

    model: str  # Mistral-7B-Instruct-v0.1
    repository: str  # Mistral-7B-Instruct-v0.1-GPTQ
    owner: str | None  # who publishes and is named as the quantiser
    creator: str | None  # who made the original

    @property
    def repo_id(self) -> str:
        return f"{self.owner or NO_OWNER}/{self.repository}"


@dataclass(frozen=True, slots=True)
class Pictures:
    """File names of the pictures that there are numbers for."""

    size: str | None = None
    layer: str | None = None


def write_card(
    folder: Path, *, name: str | None = None, owner: str | None = None, siblings: Siblings | None = None
) -> Path:
    """Write README.md and the pictures into `folder` and into each branch folder in it; returns the README.

    `folder` holds branch folders or is one. `name` is the repository's (`name` or `owner/name`); None derives
    it from the original's. Raises BadRequest for names that no hub takes, SourceNotFound and BadCheckpoint
    for a folder without sound branches.
    """
    facts = read_repository(folder)
    names = names_of(facts, name, owner)
    pictures = draw_pictures(facts, folder)
    text = render_card(facts, names, pictures, siblings or Siblings())
    for place in [b.folder for b in facts.branches if b.folder != folder]:
        for picture in (pictures.size, pictures.layer):
            if picture:
                _copy(folder / picture, place / picture)
        write_text(place / CARD, text)
    write_text(folder / CARD, text)
    return folder / CARD


def names_of(facts: RepositoryFacts, name: str | None = None, owner: str | None = None) -> Names:
    """Names from what the user gave, else from the source. Raises BadRequest for those that no hub takes."""
    original = facts.source.name if facts.source else facts.folder.resolve().name
    creator = facts.original.header.get("model_creator") if facts.original else None
    return model_name(original, facts.source, name, owner, method_of(facts), creator)


def model_name(
    original: str,
    source: Source | None,
    name: str | None,
    owner: str | None,
    method: str,
    creator: Any = None,
) -> Names:
    """Names of a repository of `original`'s weights, quantised with `method`. Raises as `names_of`."""
    given_owner, _, given = (name or "").rpartition("/")
    if owner and given_owner and owner != given_owner:
        raise BadRequest(f"the name {name!r} has another owner than {owner!r}: give the owner once")
    owner = owner or given_owner or None
    repository = given or re.sub(r"[^\w.-]+|--+", "-", _without_suffix(original)).strip("-.") + f"-{method}"
    _check_repo_id(f"{owner or NO_OWNER}/{repository}")
    hub_id = source.hub_id if source else None
    creator = hub_id.partition("/")[0] if hub_id else creator
    return Names(
        _without_suffix(repository), repository, owner, creator if isinstance(creator, str) else None
    )


def method_of(facts: RepositoryFacts) -> str:
    """AWQ where that is what the branches hold, else GPTQ."""
    quant = facts.branches[0].model.get("quantization_config")
    return "AWQ" if isinstance(quant, dict) and quant.get("quant_method") == "awq" else "GPTQ"


def _without_suffix(name: str) -> str:
    return re.sub(r"[-_.](gptq|awq|gguf)$", "", name, flags=re.IGNORECASE)


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise BadRequest(
            f"{repo_id!r} is no repository name; letters, digits, '-', '_' and '.' are: use --name owner/name"
        ) from None


def draw_pictures(facts: RepositoryFacts, folder: Path) -> Pictures:
    """Draw what there are numbers for into `folder`."""
    drawn = Pictures()
    found = ranking(facts.branches)
    if found:
        metric, ranked = found
        points = [
            plots.SizePoint(
                _label(r.branch),
                r.branch.size_bytes,
                r.loss,
                r.report.mean_kl_ci if metric is MEAN_KL else None,
            )
            for r in ranked
        ]
        y_label = plots.KL_LABEL if metric is MEAN_KL else metric.name
        plots.loss_by_size(points, folder / SIZE_PICTURE, y_label=y_label)
        drawn = Pictures(size=SIZE_PICTURE)
    curves = {b.name: [(m.name, m.loss) for m in b.making.modules] for b in facts.branches if b.making}
    if any(loss > 0 for curve in curves.values() for _, loss in curve):
        plots.loss_by_layer(curves, folder / LAYER_PICTURE)
        drawn = Pictures(drawn.size, LAYER_PICTURE)
    return drawn


def _label(branch: BranchFacts) -> str:
    config = branch.config
    return f"{MAIN}\n({config.bits}-bit, {config.group_size}g)" if branch.name == MAIN else branch.name


def _copy(source: Path, target: Path) -> None:
    """Copy whole or not at all."""
    partial = target.with_name(target.name + ".part")
    shutil.copyfile(source, partial)
    os.replace(partial, target)


def model_card_data(facts: RepositoryFacts, names: Names, prompt: PromptTemplate | None) -> ModelCardData:
    """The YAML header as the hub reads it; keys that nothing is known about are left out."""
    from huggingface_hub import ModelCardData

    first = facts.branches[0]
    header = facts.original.header if facts.original else {}
    bits = [f"{n}-bit" for n in sorted({b.config.bits for b in facts.branches})]
    hub_id = facts.source.hub_id if facts.source else None
    return ModelCardData(
        base_model=hub_id,
        language=header.get("language"),
        library_name="transformers",
        license=header.get("license") or "unknown",
        license_name=header.get("license_name"),
        license_link=header.get("license_link"),
        model_name=names.model,
        pipeline_tag="text-generation",
        tags=[method_of(facts).lower(), "quantmill", *bits, *_texts(header.get("tags"))],
        base_model_relation="quantized" if hub_id else None,
        inference=False,
        model_creator=names.creator,
        model_type=first.model.get("model_type"),
        prompt_template=prompt.text if prompt else PROMPT,
        quantized_by=names.owner or ("quantmill" if first.making else None),
    )


def _texts(value: object) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def render_card(facts: RepositoryFacts, names: Names, pictures: Pictures, siblings: Siblings) -> str:
    """The whole README: YAML header and page."""
    import jinja2

    prompt = read_prompt(facts.branches[0].folder)
    header = model_card_data(facts, names, prompt).to_yaml()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("quantmill.hub"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # markdown, not HTML
    )
    page = environment.get_template("card.md.j2").render(_context(facts, names, pictures, siblings, prompt))
    return f"---\n{header}\n---\n\n{page.strip()}\n"


def _context(
    facts: RepositoryFacts,
    names: Names,
    pictures: Pictures,
    siblings: Siblings,
    prompt: PromptTemplate | None,
) -> dict[str, Any]:
    """Everything that the template shows."""
    branches = facts.branches
    return {
        "names": names,
        "method": method_of(facts),
        "siblings": siblings,
        "pictures": pictures,
        "prompt": prompt,
        "branches": branches,
        "host": HOST,
        "placeholder": NO_OWNER,
        "sampling": SamplingParams(),
        "has_template": chat_template(branches[0].folder) is not None,
        "creator": names.creator or NOT_RECORDED,
        "original": _original(facts),
        "original_card": facts.original.text if facts.original else None,
        "licence": licence_line(facts.original.header if facts.original else {}),
        "architecture": _architecture(branches[0]),
        "sizes": _sizes(branches),
        "shared": _shared(branches),
        "made_here": any(b.making for b in branches),
        "checked": all(b.loaders for b in branches),
        "any_measured": any(b.measured for b in branches),
        "unmeasured": [b.name for b in branches if not b.measured],
        "unrecorded": [b.name for b in branches if not b.making],
        "loaders": loader_lines(branches),
        "provided_files": provided_files(branches, method_of(facts)),
        "advice": advice(branches),
        "recipes": recipes(branches),
        "layer_losses": layer_losses(branches),
        "fallbacks": fallback_lines(branches),
        "protocols": protocols(branches),
        "tails": tails(branches),
        "at": lambda b: names.repo_id if b.name == MAIN else f"{names.repo_id}:{b.name}",
        "local": lambda b: names.repository if b.name == MAIN else f"{names.repository}-{b.name}",
        "link": link_to,
        "code": code,
        "table": markdown_table,
    }


def _original(facts: RepositoryFacts) -> str:
    if facts.source is None:
        return NOT_RECORDED
    hub_id = facts.source.hub_id
    return f"[{hub_id}]({HOST}/{hub_id})" if hub_id else f"{facts.source.name} (a local copy)"


def link_to(repo: str | None) -> str:
    """A repository on the hub, as far as it is known where it will be."""
    if repo is None:
        return NOT_MADE
    return f"`{repo}`" if repo.startswith(f"{NO_OWNER}/") else f"[{repo}]({HOST}/{repo})"


def licence_line(header: Json) -> str:
    """What the original card's header says of its licence."""
    name = header.get("license_name") or header.get("license")
    if isinstance(name, list):
        name = ", ".join(map(str, name))
    if not name:
        return "The original's licence holds for these files too. It is not recorded here: look it up first."
    link = header.get("license_link")
    shown = f"[{name}]({link})" if isinstance(link, str) and link.startswith("https://") else name
    return f"{shown}, as the original's card states it; it holds for these files too."


def _architecture(branch: BranchFacts) -> str:
    """One sentence of numbers from config.json, those that it has."""
    parts = [
        f"{branch.model[key]} {what}"
        for key, what in (
            ("num_hidden_layers", "layers"),
            ("hidden_size", "wide"),
            ("num_attention_heads", "attention heads"),
            ("num_key_value_heads", "key/value heads"),
            ("vocab_size", "tokens in the vocabulary"),
            ("sliding_window", "tokens of attention window"),
        )
        if isinstance(branch.model.get(key), int)
    ]
    return f"Type `{branch.model.get('model_type', 'unknown')}`: {', '.join(parts) or 'no sizes recorded'}."


def _sizes(branches: Sequence[BranchFacts]) -> str:
    found = sorted(b.size_bytes for b in branches)
    if len(found) == 1:
        return f"one branch of {size(found[0])}"
    return f"{len(found)} branches of {size(found[0])} to {size(found[-1])}"


def _shared(branches: Sequence[BranchFacts]) -> dict[str, str]:
    """What a parameter without a column is here: one value, or one per branch."""

    def each(show: Callable[[BranchFacts], str]) -> str:
        values = {b.name: show(b) for b in branches}
        if len(set(values.values())) == 1:
            return values[branches[0].name]
        return ", ".join(f"{value} (`{name}`)" for name, value in values.items())

    def yes_no(value: bool | None) -> str:
        return NOT_RECORDED if value is None else "yes" if value else "no"

    return {
        "samples": each(lambda b: or_missing(b.calibration.samples)),
        "sym": each(lambda b: yes_no(b.config.sym)),
        "true_sequential": each(lambda b: yes_no(b.true_sequential)),
    }
