import ast
import json
import re

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from branch_folders import CONFIG, eval_report, modules, quantize_report
from quantmill.hub.card import HOST, Siblings, write_card
from quantmill.types import ActOrder, QuantConfig, SamplingParams

SECTIONS = [
    "Mistral-7B-Instruct-v0.1 - GPTQ",
    "Description",
    "Compatibility",
    "Repositories available",
    "Prompt template",
    "Provided files, and GPTQ parameters",
    "Which branch should I take",
    "How to download",
    "In the download box of a web UI",
    "On the command line",
    "With git",
    "How to use it",
    "In a web UI",
    "On the command line",
    "In Python",
    "How it was made",
    "Loss per layer",
    "What is not as it was asked for",
    "How it was measured",
    "Licence",
    "Original model card",
]
COLUMNS = [
    *("Branch", "Bits", "GS", "Act Order", "Damp %", "GPTQ Dataset", "Seq Len", "Size", "ExLlama"),
    *("Bits per weight", "Perplexity", "Mean KL", "Top-1", "Desc"),
]


def page(folder):
    return (folder / "README.md").read_text()


def headings(text):
    tokens = MarkdownIt("commonmark").parse(ModelCard(text).text)
    return [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]


def section(text, title):
    """The text under a heading, up to the next of any level."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"no section {title}"
    return found[1]


def table(text):
    """The first pipe table of a text, as a list of {column: cell}."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert all(len(row) == len(rows[0]) for row in rows)
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def files(text):
    return {
        row["Branch"].strip("`"): row for row in table(section(text, "Provided files, and GPTQ parameters"))
    }


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_every_section_is_there_in_order(repository):
    path = write_card(repository, name="Mistral-7B-Instruct-v0.1-GPTQ", owner="me")
    assert path == repository / "README.md"
    assert headings(path.read_text()) == SECTIONS


def test_every_branch_has_the_card_and_its_pictures(repository):
    path = write_card(repository)
    branches = [p for p in repository.iterdir() if p.is_dir()]
    assert len(branches) == 4
    for branch in branches:
        for name in ("README.md", "loss_by_size.png", "loss_by_layer.png"):
            assert (branch / name).read_bytes() == (repository / name).read_bytes()
    pictures = re.findall(r"!\[.+\]\((.+)\)", path.read_text())
    assert sorted(pictures) == ["loss_by_layer.png", "loss_by_size.png"]
    assert not list(repository.rglob("*.part"))


def test_the_same_folder_gives_the_same_card(repository):
    first = page(write_card(repository).parent)
    picture = (repository / "loss_by_size.png").read_bytes()
    assert page(write_card(repository).parent) == first
    assert (repository / "loss_by_size.png").read_bytes() == picture


def test_the_table_says_what_the_reports_say(repository):
    write_card(repository)
    rows = files(page(repository))
    assert list(next(iter(rows.values()))) == COLUMNS
    assert list(rows) == [
        "main",
        "gptq-4bit-32g-actorder_True",
        "gptq-8bit-128g-actorder_True",
        "gptq-8bit-32g-actorder_True",
    ]
    for name, row in rows.items():
        assert row.pop("Desc").startswith(f"{row['Bits']} bits, groups of {row['GS']}, act order")
        report = json.loads((repository / name / "eval_report.json").read_text())
        made = json.loads((repository / name / "quantize_report.json").read_text())
        quant = json.loads((repository / name / "quantize_config.json").read_text())
        low, high = report["mean_kl_ci"]
        kilobytes = (repository / name / "model.safetensors").stat().st_size / 1000
        assert row == {
            "Branch": f"`{name}`",
            "Bits": str(quant["bits"]),
            "GS": str(quant["group_size"]),
            "Act Order": "Yes",
            "Damp %": "0.1",
            "GPTQ Dataset": made["calibration"]["dataset"],
            "Seq Len": str(made["calibration"]["seqlen"]),
            "Size": f"{kilobytes:.1f} kB",
            "ExLlama": "Yes" if quant["bits"] == 4 else "No",
            "Bits per weight": row["Bits per weight"],  # see test_card_facts
            "Perplexity": f"{report['perplexity']:.3f}",
            "Mean KL": f"{report['mean_kl']:.3g} ({low:.3g} to {high:.3g})",
            "Top-1": "94.1 %",
        }


def test_all_tables_are_tables_to_a_markdown_reader(repository):
    write_card(repository)
    text = ModelCard(page(repository)).text
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    heads = re.findall(r"^\| :--", text, re.MULTILINE)
    assert len([t for t in tokens if t.type == "table_open"]) == len(heads) == 5


def test_the_header_is_valid_for_the_hub(repository):
    card = "---\nlicense: apache-2.0\nlanguage: [en]\ntags: [finetuned, gptq]\n---\n# Original\n\nHello.\n"
    (repository / "main" / "ORIGINAL_CARD.md").write_text(card)
    write_card(repository, owner="me")
    data = ModelCard(page(repository)).data.to_dict()
    assert data == {
        "base_model": "mistralai/Mistral-7B-Instruct-v0.1",
        "base_model_relation": "quantized",
        "inference": False,
        "language": ["en"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "model_creator": "mistralai",
        "model_name": "Mistral-7B-Instruct-v0.1",
        "model_type": "mistral",
        "pipeline_tag": "text-generation",
        "prompt_template": "<s>[INST] {prompt} [/INST]",
        "quantized_by": "me",
        "tags": ["gptq", "quantmill", "4-bit", "8-bit", "finetuned"],
    }
    assert section(page(repository), "Licence").startswith("\napache-2.0, as the original's card states it")


def test_the_original_card_is_appended_without_its_header(repository):
    (repository / "main" / "ORIGINAL_CARD.md").write_text(
        "---\nlicense: mit\n---\n# Mistral\n\nIts own words.\n"
    )
    write_card(repository)
    text = page(repository)
    assert text.endswith("---\n\n# Mistral\n\nIts own words.\n")
    assert "license: mit" in text
    assert headings(text)[-1] == "Mistral"


def test_the_prompt_template_of_mistral(repository):
    write_card(repository)
    single, turns = blocks(section(page(repository), "Prompt template"), "")
    assert single == "<s>[INST] {prompt} [/INST]\n"
    assert turns == "<s>[INST] {prompt} [/INST]{answer}</s> [INST] {next prompt} [/INST]\n"


def test_commands_for_every_branch(repository):
    write_card(repository, name="me/Mistral-GPTQ")
    text = page(repository)
    boxes = [row["Type this"] for row in table(section(text, "In the download box of a web UI"))]
    assert boxes[:2] == ["`me/Mistral-GPTQ`", "`me/Mistral-GPTQ:gptq-4bit-32g-actorder_True`"]
    shell = "".join(blocks(text, "shell")).splitlines()
    branch = "gptq-8bit-32g-actorder_True"
    for command in (
        "hf download me/Mistral-GPTQ --local-dir Mistral-GPTQ",
        f"hf download me/Mistral-GPTQ --revision {branch} --local-dir Mistral-GPTQ-{branch}",
        f"quantmill download me/Mistral-GPTQ:{branch} --local-dir Mistral-GPTQ-{branch}",
        f"git clone --single-branch --branch {branch} {HOST}/me/Mistral-GPTQ Mistral-GPTQ-{branch}",
        'quantmill generate me/Mistral-GPTQ --prompt "Tell me about AI"',
        "quantmill chat me/Mistral-GPTQ",
    ):
        assert command in shell


def test_the_python_example_is_python_with_the_documented_sampling(repository):
    write_card(repository, name="me/Mistral-GPTQ")
    (example,) = blocks(page(repository), "python")
    tree = ast.parse(example)
    values = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "sampling"
    )
    defaults = SamplingParams()
    assert values == {
        "do_sample": True,
        "temperature": defaults.temperature,
        "top_p": defaults.top_p,
        "top_k": defaults.top_k,
        "max_new_tokens": defaults.max_new_tokens,
        "repetition_penalty": defaults.repetition_penalty,
    }
    assert 'repo, branch = "me/Mistral-GPTQ", "main"' in example
    assert "quantmill.hf.register()" in example


def test_how_it_was_made_can_be_repeated_and_shows_no_private_path(repository):
    write_card(repository)
    made = section(page(repository), "How it was made")
    values = {row["What"]: row["Value"] for row in table(made)}
    assert values["SHA-256 of the token ids"] == f"`{'ab12' * 16}`"
    assert values["Seed"] == "7"
    assert values["Samples × sequence length"] == "64 × 512 tokens"
    assert values["Made with"] == "quantmill 0.1.0; torch 2.13.0, transformers 5.23.0"
    assert made.startswith("\nEvery branch:")
    command = "quantmill quantize mistralai/Mistral-7B-Instruct-v0.1 --grid card --out out\n"
    assert blocks(made, "shell") == [command]
    assert "/home" not in page(repository)


def test_how_it_was_measured(repository):
    write_card(repository)
    text = section(page(repository), "How it was measured")
    assert "wikitext-2-v1.test.txt" in text
    assert "6 windows of 1024 tokens, 6138 tokens scored. Non-overlapping windows" in text
    assert "perplexity on the same tokens is 5.250" in text
    assert [row["Median KL"] for row in table(text)][:2] == ["0.0104", "0.00737"]


def test_parameters_that_differ_are_said_per_branch(make_branch):
    for name, config, samples in (("main", QuantConfig(), 64), ("b", QuantConfig(sym=False), 128)):
        report = quantize_report(name, config, modules(config))
        report["calibration"]["samples"] = samples
        folder = make_branch(name, config, report=report)
    (folder / "ORIGINAL_CARD.md").write_text("---\nlicense: [mit, other]\n---\n")
    write_card(folder.parent)
    text = page(folder.parent)
    assert "Here symmetric: yes (`main`), no (`b`)." in text
    assert "64 (`main`), 128 (`b`)." in text
    assert "mit, other, as the original's card states it" in text


def test_fallbacks_are_named(make_branch):
    config = QuantConfig(damp_percent=0.1)
    reports = modules(config, m1=(0.3, None), m3=(0.1, "rounded to nearest: no tokens reached it"))
    folder = make_branch("main", config, report=quantize_report("main", config, reports))
    write_card(folder.parent)
    named = section(page(folder.parent), "What is not as it was asked for")
    assert "- `main`, damp 0.3 instead of 0.1: `model.layers.0.mlp.down_proj`\n" in named
    assert "- `main`, rounded to nearest: no tokens reached it: `model.layers.1.mlp.down_proj`\n" in named
    assert "Nothing" not in named


def test_no_report_no_number(make_branch):
    """A folder by another maker: a row from its config, everything else is called unknown."""
    quant = {"bits": 3, "group_size": -1, "desc_act": False, "sym": True, "quant_method": "gptq"}
    folder = make_branch("gptq-3bit--1g-actorder_False", QuantConfig(3, -1, ActOrder.NONE), quant=quant)
    write_card(folder.parent)
    text = page(folder.parent)
    row = files(text)["gptq-3bit--1g-actorder_False"]
    assert (row["Bits"], row["GS"], row["Act Order"], row["ExLlama"]) == ("3", "None", "No", "No")
    assert row["Damp %"] == row["GPTQ Dataset"] == row["Seq Len"] == "not recorded"
    assert row["Perplexity"] == row["Mean KL"] == row["Top-1"] == "not measured"
    assert section(text, "How it was measured").strip() == "Not measured."
    assert "Nothing has been measured yet" in section(text, "Which branch should I take")
    assert "Not recorded for `gptq-3bit--1g-actorder_False`" in section(text, "How it was made")
    assert "![" not in text
    assert not list(folder.parent.rglob("*.png"))
    data = ModelCard(text).data.to_dict()
    assert data["license"] == "unknown"
    assert "base_model" not in data
    assert "model_creator" not in data
    assert "quantized_by" not in data


def test_a_report_missing_in_one_branch_only(repository):
    (repository / "main" / "eval_report.json").unlink()
    write_card(repository)
    text = page(repository)
    assert files(text)["main"]["Mean KL"] == "not measured"
    assert files(text)["gptq-4bit-32g-actorder_True"]["Mean KL"].startswith("0.0221 ")
    assert "Not measured, and so not compared: `main`." in text
    assert "Not measured: `main`." in section(text, "How it was measured")


def test_a_single_branch_folder(make_branch):
    config = QuantConfig(8, 32)
    report = quantize_report("gptq-8bit-32g-actorder_True", config, modules(config))
    folder = make_branch("anything", config, report=report, evaluation=eval_report())
    assert write_card(folder) == folder / "README.md"
    text = page(folder)
    assert list(files(text)) == ["gptq-8bit-32g-actorder_True"]
    assert (folder / "loss_by_size.png").is_file()
    assert not (folder.parent / "README.md").exists()


def test_names_come_from_the_source_and_a_missing_owner_shows(make_branch):
    config = QuantConfig()
    report = quantize_report("main", config, modules(config), source="/home/me/models/Smol LM.gguf")
    folder = make_branch("main", config, report=report)
    write_card(folder.parent)
    text = page(folder.parent)
    assert headings(text)[0] == "Smol-LM - GPTQ"
    assert "OWNER/Smol-LM-GPTQ" in text
    assert "put the account that holds it in the place of" in text
    assert "- Original model: Smol LM (a local copy)" in text
    assert "/home/me" not in text
    assert "base_model:" not in text


def test_the_readme_of_a_local_source_is_the_original_card(make_branch, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").write_text("---\nlicense: mit\nmodel_creator: somebody\n---\nLocal words.\n")
    config = QuantConfig()
    folder = make_branch(
        "main", config, report=quantize_report("main", config, modules(config), source=str(source))
    )
    write_card(folder.parent)
    assert page(folder.parent).endswith("Local words.\n")
    assert ModelCard(page(folder.parent)).data.to_dict()["model_creator"] == "somebody"


def test_siblings_are_linked_or_said_to_be_missing(repository):
    write_card(repository, siblings=Siblings(awq="me/Mistral-AWQ"))
    text = section(page(repository), "Repositories available")
    assert "AWQ, for inference on GPUs: [me/Mistral-AWQ](https://huggingface.co/me/Mistral-AWQ)" in text
    assert "GGUF in 2, 3, 4, 5, 6 and 8 bits, for inference on CPUs and GPUs: not made yet" in text


def test_verdicts_of_check_are_used_where_there_are(make_branch):
    check = {
        "ok": True,
        "findings": [],
        "loaders": {"vllm": "groups of 16 are not taken", "exllamav2": "yes"},
    }
    folder = make_branch("gptq-8bit-16g-actorder_True", QuantConfig(8, 16), check=check)
    write_card(folder.parent)
    text = page(folder.parent)
    assert "What `quantmill check` found" in section(text, "Compatibility")
    assert "**vLLM**: no branch; not `gptq-8bit-16g-actorder_True`: groups of 16 are not taken." in text
    assert files(text)["gptq-8bit-16g-actorder_True"]["ExLlama"] == "Yes"


def test_a_base_model_without_chat_template(make_branch):
    folder = make_branch("main", template=None)
    write_card(folder.parent)
    text = page(folder.parent)
    assert "has no chat template" in section(text, "Prompt template")
    assert ModelCard(text).data.to_dict()["prompt_template"] == "{prompt}"
    (example,) = blocks(text, "python")
    ast.parse(example)
    assert "apply_chat_template" not in example


def test_no_placeholder_and_no_template_code_is_left(repository):
    write_card(repository)
    text = page(repository)
    assert "{%" not in text
    assert "{{" not in text
    assert not re.search(r"\bNone\b(?!\")", text)
    assert "nan" not in text.split()
    assert "\n\n\n" not in text


def test_hidden_work_folders_are_no_branches(repository):
    (repository / ".quantmill-work").mkdir()
    (repository / ".quantmill-work" / "config.json").write_text(json.dumps(CONFIG))
    write_card(repository)
    assert len(files(page(repository))) == 4
