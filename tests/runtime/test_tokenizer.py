"""The light tokenizer gives the ids, texts and prompts that Transformers gives."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer

from quantmill.errors import BadCheckpoint, BadRequest, SourceNotFound
from quantmill.runtime.tokenizer import LONG, Detokenizer, TextTokenizer, open_tokenizer
from tiny_models import byte_level_tokenizer

TEXTS = (
    "the cat sat on a mat",
    " leading and trailing ",
    "",
    " ",
    "\n\n tabs\tand\r\nlines  ",
    "naïve — 你好 ½ 🦙 a\u0301",
    "<s>[INST] What is 2 + 2? [/INST]4</s>[INST] again",
    "def f(x):\n    return x ** 2  # 1234567",
    "\x00\x7f\ufffd\u200b",
    "<|im_start|>user\nhi<|im_end|>",
    "</s> </s>x",
)
USER = {"role": "user", "content": "the cat"}
TALKS = (
    [USER],
    [{"role": "system", "content": "be  brief\n"}, USER],
    [USER, {"role": "assistant", "content": " it sat "}, {"role": "user", "content": "where? 你好"}],
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": "<b> é"}}}]
TOOL_TEMPLATE = (
    "{%- if tools %}{{- tools | tojson }}\n{% for t in tools %}{{ t | tojson(indent=2) }}{% endfor %}{%- endif %}"
    "{%- set ns = namespace(n=0) %}\n"
    "  {%- for m in messages %}\n"
    "    {% if m.role == 'system' %}{% continue %}{% endif %}\n"
    "    {%- set ns.n = ns.n + 1 %}{{ bos_token }}{{ ns.n }}{{ m['role'] | trim }}: "
    "{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}\n"
    "  {%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '[a] ' }}{% endif %}"
)
MISTRAL = Path(sys.prefix) / "data" / "mistral_common" / "data" / "tokenizer.model.v1"


def same(folder: Path, texts=TEXTS) -> None:
    """Ids and texts of the folder's tokenizer are Transformers'."""
    ours, theirs = open_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in texts:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False).input_ids
        for skip in (True, False):
            wanted = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special=skip) == wanted
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    assert theirs.eos_token_id in ours.eos_token_ids


def same_talk(folder: Path, talks=TALKS, tools=None) -> None:
    ours, theirs = open_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for talk in talks:
        for answer in (True, False):
            text = theirs.apply_chat_template(talk, tools=tools, tokenize=False, add_generation_prompt=answer)
            assert ours.chat_text(talk, tools=tools, answer=answer) == text
            ids = theirs.apply_chat_template(
                talk, tools=tools, add_generation_prompt=answer, return_dict=False
            )
            assert ours.chat_ids(talk, tools=tools, answer=answer) == ids


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_level_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 7}))
    return tmp_path


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_as_transformers_reads_it(folder: Path):
    same(folder)
    same_talk(folder)


def test_a_long_text_holds_up_nobody(folder: Path):
    ours, text = open_tokenizer(folder), "the cat — " * (2 * LONG)
    told: list[int] = []

    async def others() -> None:
        while True:
            told.append(len(told))
            await asyncio.sleep(0.001)

    async def both() -> list[int]:
        beside = asyncio.create_task(others())
        await asyncio.sleep(0)
        ids = await ours.aencode(text)
        beside.cancel()
        return ids

    ids = asyncio.run(both())
    assert len(told) > 3
    assert ids == list(ours.backend.encode(text).ids)
    assert ours.encode(text, special=False) == list(ours.backend.encode(text, add_special_tokens=False).ids)


def test_end_tokens_of_every_config(folder: Path):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 3]}))
    assert open_tokenizer(folder).eos_token_ids == (1, 3, 7, 9)


def test_the_frame_is_tokenizer_jsons(folder: Path):
    frame = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = frame
    backend.save(str(folder / "tokenizer.json"))
    change(folder / "tokenizer_config.json", add_bos_token=False)
    ids = open_tokenizer(folder).encode("cat")
    assert (ids[0], ids[-1]) == (0, 1)
    same(folder)


def test_tokens_that_only_the_config_knows(folder: Path):
    added = {"content": "<|im_start|>", "lstrip": True, "special": True, "normalized": False}
    change(folder / "tokenizer_config.json", added_tokens_decoder={"320": added}, pad_token="<pad>")
    same(folder)
    assert len(open_tokenizer(folder).encode("<|im_start|>")) == 1


def test_templates_with_tools(folder: Path):
    (folder / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    same_talk(folder)
    same_talk(folder, tools=TOOLS)


def test_several_templates(folder: Path):
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools[0].type }}"},
    ]
    change(folder / "tokenizer_config.json", chat_template=named)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    same_talk(folder)
    same_talk(folder, tools=TOOLS)
    assert open_tokenizer(folder).chat_text([USER], template="tool_use", tools=TOOLS) == "function"
    assert open_tokenizer(folder).chat_text([USER], template="{{ messages[0].content }}!") == "the cat!"


def test_none_is_an_absent_key(folder: Path):
    (folder / "chat_template.jinja").write_text("{{ 'content' in messages[0] }}")
    same_talk(folder, [[{"role": "assistant", "content": None, "tool_calls": []}]])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", r"roles user, user \(roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses the roles"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for %}", "refuses the roles"),
        ("{{ range(1000000000) | list }}", "refuses the roles"),
    ],
)
def test_refusals(folder: Path, template: str, said: str):
    with pytest.raises(BadRequest, match=said):
        open_tokenizer(folder).chat_ids([USER, USER], template=template)


def test_no_template(folder: Path):
    (folder / "chat_template.jinja").unlink()
    ours = open_tokenizer(folder)
    assert not ours.has_template
    with pytest.raises(BadRequest, match="no chat template"):
        ours.chat_ids([USER])


def test_bad_folders(tmp_path: Path):
    with pytest.raises(SourceNotFound):
        open_tokenizer(tmp_path / "nowhere")
    with pytest.raises(BadCheckpoint, match=r"has none of tokenizer\.json"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match="cannot be read"):
        open_tokenizer(tmp_path)


def test_bytes_of_tokens(folder: Path):
    ours = open_tokenizer(folder)
    for text in TEXTS:
        assert b"".join(ours.token_bytes(i) for i in ours.encode(text)) == text.encode()
    assert {ours.token_bytes(i) for i in range(2, ours.vocab_size)} >= {bytes([b]) for b in range(256)}
    with pytest.raises(BadRequest, match="not in the vocabulary"):
        ours.token_bytes(10**6)


def test_every_piece_is_whole_characters():
    ours = TextTokenizer.from_transformers(byte_level_tokenizer())
    for text in TEXTS[:6]:
        stream = Detokenizer(ours)
        pieces = [stream.push(token) for token in ours.encode(text)]
        assert "".join(pieces) + stream.flush() == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_a_character():
    ours = TextTokenizer.from_transformers(byte_level_tokenizer())
    stream = Detokenizer(ours)
    llama = ours.encode("🦙")
    assert [stream.push(token) for token in llama[:-1]] == [""] * (len(llama) - 1)
    assert stream.flush() == "\ufffd"
    assert stream.push(llama[0]) == ""


def test_a_leading_space_is_kept_in_the_middle():
    bpe = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    bpe.decoder = decoders.Metaspace()  # drops the space before the first word
    stream = Detokenizer(TextTokenizer(Tokenizer.from_str(bpe.to_str().replace('"a"', '"\u2581a"')), {}, {}))
    assert [stream.push(token) for token in (0, 0, 1)] == ["a", " a", "b"]


def spm_folder(folder: Path, kind: str, cls: str, **settings) -> Path:
    """The vocabulary of Mistral v1 as tokenizer.json, as the hub has it: dummy prefix by a normalizer."""
    if not MISTRAL.exists():
        pytest.skip("the data of mistral-common is not there: run 'make install'")
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(MISTRAL))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    ranks = {piece: pieces.get_score(i) for piece, i in vocab.items()}
    merges = [(p[:i], p[i:]) for p in vocab for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab]
    merges.sort(key=lambda m: (-ranks[m[0] + m[1]], vocab[m[0]], vocab[m[1]]))
    made = Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    steps = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": cls}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **settings}))
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "eos_token_id": 2}))
    return folder


@pytest.mark.model
@pytest.mark.parametrize(
    ("kind", "cls", "settings"),
    [
        ("mistral", "LlamaTokenizer", {"legacy": True, "add_bos_token": True}),
        ("llama", "LlamaTokenizer", {"legacy": False, "add_bos_token": True}),
        ("llama", "LlamaTokenizerFast", {"legacy": True}),
        ("mistral", "PreTrainedTokenizerFast", {}),
    ],
)
def test_mistral_v1(tmp_path: Path, kind: str, cls: str, settings):
    folder = spm_folder(tmp_path, kind, cls, **settings)
    same(folder)
    ours = open_tokenizer(folder)
    assert b"".join(ours.token_bytes(i) for i in ours.encode("a 🦙b", special=False)) == " a 🦙b".encode()


@pytest.mark.model
def test_smollm(smol: Path):
    source = Path(__file__).read_text()
    same(smol, [*TEXTS, source])
    same_talk(smol)


def test_neither_torch_nor_transformers_is_loaded(folder: Path):
    code = (
        "import sys; from pathlib import Path; from quantmill.runtime.tokenizer import open_tokenizer;"
        "t = open_tokenizer(Path(sys.argv[1])); t.chat_ids([{'role': 'user', 'content': 'a'}]);"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=240)
