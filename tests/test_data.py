"""Local datasets of every kind; errors that name file and line, or example; texts and chats -> tokens."""

import json
import os

import datasets
import pytest
from helpers import DEMO_MODEL
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from common import Refusal, data
from common.data import check_row, encode_completion, encode_prompt, load_rows, map_rows, render_chat

ROWS = [{"text": "a", "n": 1}, {"text": "b, \u00e9\n", "n": 2}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# --- What loads ---


def test_every_local_kind(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    names = [
        tmp_path / name for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows", "splits")
    ]
    written(names[0], "\n" + "\n\n".join(map(json.dumps, ROWS)))  # no newline at the end
    written(names[1], json.dumps(ROWS))
    rows.to_csv(names[2])
    rows.to_parquet(names[3])
    rows.save_to_disk(names[4])
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(names[5])
    cells = [{"text": row["text"], "n": str(row["n"])} for row in ROWS]
    for name in names:
        assert load_rows(str(name)).to_list() == (cells if name.suffix == ".csv" else ROWS)
    assert load_rows(str(tmp_path / "splits"), split="test").to_list() == ROWS[1:]
    with pytest.raises(Refusal, match="has no split 'dev', only train, test"):
        load_rows(str(tmp_path / "splits"), split="dev")


def test_a_cell_of_a_csv_file_is_text(tmp_path):
    """Whatever stands above or below it; in a column of blanks, too."""
    path = written(tmp_path / "rows.csv", 'a,b,none\n7,012,\n,NA,\n1e5,None,""\nTrue,1.50,\n')
    rows = load_rows(path)
    assert rows["a"][:] == ["7", None, "1e5", "True"] and rows["b"][:] == ["012", "NA", "None", "1.50"]
    assert rows["none"][:] == [None] * 4 and all(kind.dtype == "string" for kind in rows.features.values())


NAMES = ["rows [final]", "a?", "a*", "a::b", "{a,b}", "[d]/rows", "x::y/rows", "h#t%20", "hf:rows"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_the_file_that_is_named_is_the_one_that_is_read(suffix, tmp_path):
    """Files beside it that its name would match, if it were a pattern, are not."""
    for name in ("rows f", "rows [final]x", "ab", "a", "b", "d/rows", "rows", *NAMES):
        path = tmp_path / f"{name}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text\n{name}\n" if suffix == "csv" else json.dumps({"text": name}))
    for name in NAMES if suffix == "jsonl" else NAMES[:4:3]:
        assert load_rows(str(tmp_path / f"{name}.{suffix}"))["text"][:] == [name]


@pytest.mark.parametrize("name", ["rows.jsonl", "x::y.jsonl"])  # the second is loaded by a way of its own
def test_a_changed_file_is_read_again(name, tmp_path):
    for content in ("a", "bc"):  # of one time, as files out of an archive are
        path = written(tmp_path / name, json.dumps({"text": content}))
        os.utime(path, (0, 0))
        assert load_rows(path)["text"][:] == [content]


def test_a_cache_that_cannot_be_written_is_named_as_the_cache(tmp_path, monkeypatch):
    path = written(tmp_path / "rows.jsonl", '{"text": "a"}\n')
    rows = load_rows(path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", f"{path}/cache")  # below a file
    message = f"the cache of datasets {path}/cache cannot be written: .* set HF_DATASETS_CACHE"
    for use in (lambda: load_rows(path), lambda: map_rows(rows, lambda row, index: row, "rows", __file__)):
        with pytest.raises(Refusal, match=message):
            use()


# --- What does not ---


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("rows.jsonl", '{"text": "a"}\n\n\n{"text": b}\n', "rows.jsonl, line 4: not valid JSON"),
        ("rows.jsonl", '{"text": "a"}\n["b"]\n', "line 2: a list, but each line must be an object"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not valid JSON: 'utf-8'"),
        ("rows.json", '[{"text": "a"},', "rows.json is empty, or cannot be read: "),
        ("rows.txt", "a", "rows.txt has suffix '.txt'; known are .json, .jsonl, .parquet, .csv"),
        ("rows.jsonl", "", "rows.jsonl is empty"),
        ("rows.json", "[]", "rows.json is empty"),
        ("rows.jsonl", "\n\n", "rows.jsonl is empty"),
        ("rows.csv", "text,n\n", "rows.csv is empty"),
        # more fields than the header has names: pandas would make the first ones an index
        ("rows.csv", "text,n\na,1,2\nb,1,2\n", "rows.csv: a line has more fields than"),
        ("rows.csv", "text,n\na,1\nb,1,2\n", "rows.csv is empty, or cannot be read: .* line 3"),
    ],
)
def test_bad_and_empty_files(name, content, message, tmp_path):
    path = written(tmp_path / name, content)
    with pytest.raises(Refusal, match=message):
        load_rows(path)


def test_what_is_missing_or_empty(tmp_path):
    for name in (f"{tmp_path}/rows.jsonl", f"{tmp_path}/rows", "rows.jsonl", "./rows", "a/b/c"):
        with pytest.raises(Refusal, match=f"{name} does not exist"):
            load_rows(name)
    datasets.Dataset.from_list(ROWS).select([]).save_to_disk(tmp_path / "empty")
    for name in (str(tmp_path), str(tmp_path / "empty"), "no-such/dataset"):
        with pytest.raises(Refusal, match=f"dataset {name} is empty, or cannot be read: "):
            load_rows(name)


# --- Rows -> what a script makes of them ---


def test_mapped_rows_are_cached_in_the_cache_and_nowhere_else(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "mine")
    before = sorted(path.name for path in (tmp_path / "mine").iterdir())
    for script, factor, files in (("one", 2, 1), ("one", 2, 1), ("other", 2, 2), ("other", 3, 3)):
        path = written(tmp_path / script, script)

        def times(example, index):  # what it holds is in the key, and its script's text
            return {"m": factor * example["n"]}  # noqa: B023

        rows = load_rows(str(tmp_path / "mine"))
        mapped = map_rows(rows, times, "rows", path)
        assert mapped["m"][:] == [factor, 2 * factor]
        assert len(list((tmp_path / "cache/tokenised").glob("*.arrow"))) == files
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == before


def test_a_refused_row_is_named():
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}, {"text": None}])
    for num_proc in (None, 2):
        with pytest.raises(Refusal, match="^some.csv, example 2: text is None; wanted: a string.$"):
            map_rows(rows, lambda row, index: check_row(row, ["text"]), "some.csv", __file__, num_proc)


def test_what_is_asked_of_whole_datasets_and_pairs():
    examples = datasets.Dataset.from_list([{"input_ids": [0, 9]}, {"input_ids": [63]}])
    data.check_token_ids(examples, 64, "rows")
    with pytest.raises(Refusal, match="rows: token id 63 is outside the vocabulary of 63"):
        data.check_token_ids(examples, 63, "rows")
    assert [data.repeats_prompt(*case) for case in (("a", "ab", "ac"), ("a", "ab", "c"))] == [True, False]
    assert not any(data.repeats_prompt(prompt, "ab") for prompt in (None, " ", [{"content": "a"}]))
    data.check_repeats("rows", [True, False])
    with pytest.raises(Refusal, match="rows: in 2 of 3 rows the completion begins with the whole prompt"):
        data.check_repeats("rows", [True, False, True])
    prefixes = [([], [1]), ([1, 2], [1, 2, 3]), ([1, 2, 9], [1, 2, 3]), ([4], [5])]
    assert [data.shared_prefix_length(*pair) for pair in prefixes] == [0, 2, 2, 0]
    rows = datasets.Dataset.from_list([{"text": "a", "tools": "", "chat_template_kwargs": "", "source": "x"}])
    assert data.unused_columns(rows, ("text",)) == ["source"]
    assert data.template_kwargs({"chat_template_kwargs": {"a": None, "b": 0}}) == {"b": 0}
    assert data.template_kwargs({}) == data.template_kwargs({"chat_template_kwargs": None}) == {}


ASKED = [{"role": "user", "content": "1+1"}]
ANSWER = {"role": "assistant", "content": "2"}
TALK = [*ASKED, ANSWER]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "tools": [{"type": "function"}]}, "tools is .* do not support"),
        ({"prompt": [*ASKED, {**ANSWER, "weight": 0}]}, "prompt holds a message of weight 0"),
        ({"messages": [*ASKED, {**ANSWER, "tool_calls": [1]}]}, "messages holds tool calls"),
        ({"messages": ["a"]}, "messages holds 'a'; a message has a role and a content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages holds .*; a message has a role"),
        ({"messages": json.dumps(TALK)}, "messages is messages as a JSON string"),
        ({"prompt": json.dumps(TALK, indent=1)}, "prompt is messages as a JSON string"),
        ({"messages": "user: a"}, "messages is .*; wanted: a list of messages"),
        ({"messages": []}, r"messages is \[\]; wanted: a list of messages"),
        ({"text": TALK}, "text is .*; wanted: a string"),
        ({"prompt": None}, "prompt is None; wanted: a string or a list of messages"),
        ({"prompt": ASKED, "chosen": "a"}, "prompt and chosen are partly strings"),
    ],
)
def test_a_row_that_would_be_read_as_something_else_is_refused(row, message):
    with pytest.raises(Refusal, match=message):
        check_row(row, [name for name in row if name in ("messages", "text", "prompt", "chosen")])


def test_what_says_nothing_passes():
    empty = {"tools": None, "images": [], "video": "", "chat_template_kwargs": None}
    for weight in (None, 1):
        check_row({"messages": [*ASKED, {**ANSWER, "weight": weight}], **empty}, ["messages"])
    check_row({"text": "[{not json", "prompt": '[{"a": 1}]', "tools": "[]"}, ["text", "prompt"])


# --- Texts and conversations -> tokens ---


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


BARE = "{% for m in messages %}{% if 'tool_calls' in m %}called{% endif %}{{ m.content }}{% endfor %}"
BRACKETS = (
    "{% for m in messages %}[{{ m.role[0] }}{{ m.content }}{{ tail or '' }}]{% endfor %}"
    "{% if add_generation_prompt %}[a{{ think or '' }}{% endif %}"
)
NULLS = [{**message, "tool_calls": None, "name": None} for message in TALK]
AGAIN = [{"role": "user", "content": "so?"}, ANSWER]
BEGUN = [*ASKED, {"role": "assistant", "content": "The sum"}]
GOES_ON = [{"role": "assistant", "content": " is 2"}, *TALK]


@pytest.mark.parametrize(
    "template, prompt, completion, arguments, expected",  # E: the end of sequence
    [
        (BRACKETS, ASKED, [ANSWER], {}, ["[u1+1][a", "2]E"]),
        # a question follows: neither the [ of a generation prompt is shared, nor is a turn continued
        (BRACKETS, TALK, AGAIN, {}, ["[u1+1][a2]", "[uso?][a2]E"]),
        (BRACKETS, BEGUN, GOES_ON, {}, ["[u1+1][aThe sum", " is 2][u1+1][a2]E"]),
        # a row's own arguments; the generation prompt may differ from how answers begin
        (BRACKETS, ASKED, [ANSWER], {"tail": "!"}, ["[u1+1!][a", "2!]E"]),
        (BRACKETS, ASKED, [ANSWER], {"think": "<think>"}, ["[u1+1][a<think>", "2]E"]),
        # E only where the assistant has the last word
        (BARE, [], TALK, {}, ["", "1+12E"]),
        (BARE, [], [ANSWER, *ASKED], {}, ["", "21+1"]),
        # keys that hold null are not there, nor where a completion repeats the prompt's messages
        (BARE, NULLS[:1], NULLS[1:], {}, ["1+1", "2E"]),
        (BARE, ASKED, NULLS, {}, ["1+1", "2E"]),
    ],
)
def test_where_a_prompt_ends_and_what_follows_it(
    template, prompt, completion, arguments, expected, tokenizer
):
    tokenizer.chat_template = template
    prompt_ids, input_ids, scored = encode_completion(
        prompt, completion, tokenizer, template_kwargs=arguments
    )
    assert scored == [True] * len(input_ids)
    parts = prompt_ids, input_ids[data.shared_prefix_length(prompt_ids, input_ids) :]
    assert [tokenizer.decode(ids).replace("<|end|>", "E") for ids in parts] == expected
    if completion[0]["role"] == "assistant" and prompt:
        assert encode_prompt(data.without_nulls(prompt), tokenizer, arguments) == prompt_ids
    elif not prompt:
        assert render_chat(completion, tokenizer, template_kwargs=arguments)[0] == input_ids


def test_the_assistants_turns_are_marked(tokenizer):
    """A turn that the prompt has begun as well, and an end that the template does not write."""

    def marked(prompt, completion):
        _, ids, scored = encode_completion(prompt, completion, tokenizer, assistant_only_loss=True)
        assert len(ids) == len(scored)
        return tokenizer.decode([token for token, keep in zip(ids, scored) if keep])

    assert marked(BEGUN, GOES_ON) == "The sum is 2<|end|>2<|end|>"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert marked([], TALK) == "2<|end|>"


def test_a_conversation_gets_no_bos(tokenizer):
    end = ("<|end|>", tokenizer.eos_token_id)
    processor = TemplateProcessing(single="<|end|> $A", special_tokens=[end])
    tokenizer.backend_tokenizer.post_processor = processor
    assert tokenizer("b").input_ids[0] == end[1]
    for prompt_ids in (encode_prompt(ASKED, tokenizer), encode_completion(ASKED, [ANSWER], tokenizer)[0]):
        assert tokenizer.decode(prompt_ids) == "<|user|>1+1<|end|><|assistant|>"


TAKEN = ("tokenize", "return_dict", "return_assistant_tokens_mask", "tools", "documents")


@pytest.mark.parametrize("encode", [encode_prompt, render_chat])
def test_a_rows_arguments_may_not_say_what_is_decided_here(encode, tokenizer):
    for name in (*TAKEN, "add_generation_prompt", "continue_final_message"):
        with pytest.raises(Refusal, match=f"the chat template fails: .* multiple values .*'{name}'"):
            encode(ASKED, tokenizer, template_kwargs={name: True})
    with pytest.raises(Refusal, match="the chat template fails: .* must be a mapping, not str"):
        encode(ASKED, tokenizer, template_kwargs="x")


MOVES = (  # the system's message goes into the user's, but only into a last one
    "{% for m in messages if m.role != 'system' %}"
    "{% if loop.last and m.role == 'user' and messages[0].role == 'system' %}"
    "{{ messages[0].content }}{% endif %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LAST_THOUGHTS = (  # thoughts stay in the last turn only
    "{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|end|>{% endfor %}"
)
SYSTEM = {"role": "system", "content": "Be terse."}
THOUGHT = [*ASKED, {"role": "assistant", "content": "hm</think>2"}]


@pytest.mark.parametrize(
    "template, prompt, completion, message",
    [
        (MOVES, [SYSTEM, *ASKED], [ANSWER], "differently .*'Be terse.<.user.>1.* alone, '<.user.>1"),
        (LAST_THOUGHTS, THOUGHT, AGAIN, "<.assistant.>hm</think>2<.* alone, .*<.assistant.>2<"),
        # the turn goes on, but the template cuts what it began with
        (LAST_THOUGHTS.replace("m.content if loop.last else ", ""), THOUGHT, [ANSWER], "differently|fails"),
        (None, [SYSTEM, *ASKED], [*ASKED, ANSWER], "begins with .*, a part of the prompt as well"),
        (None, TALK, TALK[:1] + AGAIN, "begins with .*, a part of the prompt as well"),
        (None, ASKED, ASKED, "holds the prompt and nothing else"),
    ],
)
def test_where_the_prompt_would_end_anywhere_is_refused(template, prompt, completion, message, tokenizer):
    tokenizer.chat_template = template or tokenizer.chat_template
    with pytest.raises(Refusal, match=message):
        encode_completion(prompt, completion, tokenizer)


class Marking:
    """Characters as ids, <s> = 1, </s> = 2; BOS and EOS added as asked."""

    bos_token_id, eos_token_id, eos_token = 1, 2, "</s>"

    def __init__(self, bos=False, eos=False):
        self.bos, self.eos = bos, eos

    def __call__(self, text):
        ids = [ord(part) for part in text.replace("<s>", "\1").replace("</s>", "\2")]
        return {"input_ids": [1] * self.bos + ids + [2] * self.eos}

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.mark.parametrize("bos, eos", [(False, False), (True, False), (True, True)])
def test_bos_and_eos_stand_once(bos, eos):
    tokenizer, first = Marking(bos, eos), [1] * bos
    assert data.text_ids("ab", tokenizer) == [*first, 97, 98]  # nothing at a prompt's end
    assert data.text_ids("<s>ab", tokenizer) == [1, 97, 98]
    assert data.text_ids("ab</s>", tokenizer) == [*first, 97, 98, 2]  # its own
    for completion in ("b", "b</s>", "b</s>\n"):
        prompt_ids, input_ids, scored = encode_completion("a", completion, tokenizer)
        assert (prompt_ids, input_ids) == ([*first, 97], [*first, 97, 98, 2])
        assert scored == [True] * len(input_ids)


def test_every_end_of_the_model_is_an_end():
    tokenizer = Marking()
    for own, ends in (([7, 2], [2, 7]), (7, [2, 7]), (0, [0, 2]), (None, [2])):
        assert data.end_token_ids(tokenizer, own) == ends
    assert data.end_with_eos([], tokenizer) == [2]
    assert data.end_with_eos([97, 7], tokenizer, [2, 7]) == [97, 7]
    assert data.end_with_eos([97, 7, 10], tokenizer, [2, 7]) == [97, 7]  # a line break behind it
    assert data.end_with_eos([97, 7, 98], tokenizer, [2, 7]) == [97, 7, 98, 2]
    assert data.end_with_eos([97, 7], tokenizer) == [97, 7, 2]
    tokenizer.eos_token_id = None
    assert data.end_with_eos([97, 7], tokenizer) == [97, 7] and data.end_token_ids(tokenizer, None) == []


def test_of_several_templates_the_default_one_is_used(tokenizer):
    default, none = tokenizer.chat_template, "rows is chats, but model has no chat template for them: "
    unmarked = "marks no assistant turns with {% generation %}; it begins 'x'"
    bad = [(None, none), ({"a": default, "b": default}, f"{none}.*no default"), ({"default": "x"}, unmarked)]
    for templates, message in bad:
        tokenizer.chat_template = templates
        with pytest.raises(Refusal, match=message):
            data.check_chat_template(tokenizer, "rows", "model", assistant_only_loss=True)
    data.check_chat_template(tokenizer, "rows", "model")
    tokenizer.chat_template = {"default": default, "tool_use": "x"}
    data.check_chat_template(tokenizer, "rows", "model", assistant_only_loss=True)
    assert tokenizer.decode(encode_prompt(ASKED, tokenizer)) == "<|user|>1+1<|end|><|assistant|>"
