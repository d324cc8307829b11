"""Local datasets of every kind, and errors that name file and line."""

import json
import os
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

from common.data import (
    check_chat_template,
    check_row,
    check_token_ids,
    encode_completion,
    encode_prompt,
    end_token_ids,
    end_with_eos,
    load_rows,
    map_rows,
    render_chat,
    shared_prefix_length,
    text_ids,
)
from common.flags import Refusal

ROWS = [{"text": "a", "n": 1}, {"text": "b, \u00e9\n", "n": 2}]
DEMO_MODEL = Path(__file__).parents[1] / "demo/model"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# --- What loads ---


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "save_to_disk", "DatasetDict"])
def test_every_local_kind(kind, tmp_path):
    path = tmp_path / ("folder" if kind in ("save_to_disk", "DatasetDict") else f"rows.{kind}")
    rows = datasets.Dataset.from_list(ROWS)
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))  # no newline at the end
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        rows.to_csv(path)
    elif kind == "parquet":
        rows.to_parquet(path)
    elif kind == "save_to_disk":
        rows.save_to_disk(path)
    else:
        datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(path)
        assert load_rows(str(path), split="test").to_list() == ROWS[1:]
    cells = [{"text": row["text"], "n": str(row["n"])} for row in ROWS]
    assert load_rows(str(path)).to_list() == (cells if kind == "csv" else ROWS)


def test_a_cell_of_a_csv_file_is_text(tmp_path):
    """Whatever stands above or below it; in a column of blanks, too."""
    path = written(tmp_path / "rows.csv", 'a,b,none\n7,012,\n,NA,\n1e5,None,""\nTrue,1.50,\n')
    rows = load_rows(path)
    assert rows["a"][:] == ["7", None, "1e5", "True"] and rows["b"][:] == ["012", "NA", "None", "1.50"]
    assert rows["none"][:] == [None] * 4 and all(kind.dtype == "string" for kind in rows.features.values())


def test_blank_lines_and_conversations(tmp_path):
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    path = written(tmp_path / "chats.jsonl", f"\n{json.dumps(row)}\n\n{json.dumps(row)}\n")
    assert load_rows(path).to_list() == [row, row]


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert load_rows(written(path, '{"text": "a"}\n')).to_list() == [{"text": "a"}]
    assert load_rows(written(path, '{"text": "a"}\n{"text": "b"}\n'))["text"][:] == ["a", "b"]


NAMES = ["rows [final]", "a?", "a*", "a::b", "{a,b}", "[d]/rows", "x::y/rows", "h#t%20", "hf:rows"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("name", NAMES)
def test_the_file_that_is_named_is_the_one_that_is_read(name, suffix, tmp_path):
    """Files beside it that its name would match, if it were a pattern, are not."""
    others = ("rows f", "rows [final]x", "ab", "a", "b", "d/rows", "rows")
    for content in (*others, name):
        path = tmp_path / f"{content}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        rows = datasets.Dataset.from_list([{"text": content}])
        to_file = {"csv": rows.to_csv, "parquet": rows.to_parquet}.get(suffix, rows.to_json)
        with open(path, "wb") as file:
            to_file(file)
    assert load_rows(str(tmp_path / f"{name}.{suffix}"))["text"][:] == [name]


def test_a_changed_file_of_an_odd_name_is_read_again(tmp_path):
    for content in ("a", "bc"):  # of one time, as files out of an archive are
        path = written(tmp_path / "x::y.jsonl", json.dumps({"text": content}))
        os.utime(path, (0, 0))
        assert load_rows(path)["text"][:] == [content]


def test_tokens_are_cached_in_the_cache_and_nowhere_else(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "mine")
    before = sorted(path.name for path in (tmp_path / "mine").iterdir())
    for code, expected in (("one", 1), ("one", 1), ("other", 2)):
        rows = map_rows(load_rows(str(tmp_path / "mine")), lambda row: {"m": 2 * row["n"]}, code)
        assert rows["m"][:] == [2, 4]
        assert len(list((tmp_path / "cache" / "tokenised").glob("*.arrow"))) == expected
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == before


def test_a_cache_that_cannot_be_written_is_named_as_the_cache(tmp_path, monkeypatch):
    path = written(tmp_path / "rows.jsonl", '{"text": "a"}\n')
    rows = load_rows(path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", f"{path}/cache")  # below a file
    message = f"the cache of datasets {path}/cache cannot be written: .* set HF_DATASETS_CACHE"
    with pytest.raises(Refusal, match=message):
        load_rows(path)
    with pytest.raises(Refusal, match=message):
        map_rows(rows, lambda row: row, "code")


# --- What does not ---


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', "line 2: not valid JSON"),
        ('{"text": "a"}\n\n\n{"text": b}\n', "line 4: not valid JSON"),
        ('{"text": "a"}\n["b"]\n', "line 2: a list, but each line must be an object"),
        ('{"text": "a"}\n7\n', "line 2: a int, but each line must be an object"),
        ('"a"\n"b"\n', "line 1: a str, but each line must be an object"),
        ('{"text": "a"}\nnull\n', "line 2: a NoneType"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2"),
    ],
)
def test_a_bad_line_is_named(content, message, tmp_path):
    path = written(tmp_path / "rows.jsonl", content)
    with pytest.raises(ValueError, match=f"rows.jsonl, {message}"):
        load_rows(path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("rows.json", '[{"text": "a"},', "rows.json cannot be read as json"),
        ("rows.parquet", "PAR1", "rows.parquet cannot be read as parquet"),
        ("rows.txt", "a", "rows.txt has suffix '.txt'; known are .json, .jsonl, .parquet, .csv"),
        ("rows", "a", "rows has suffix ''"),
        ("rows.jsonl", "", "rows.jsonl is empty"),
        ("rows.csv", "", "rows.csv is empty"),
        ("rows.json", "[]", "rows.json"),
        ("rows.jsonl", "\n\n", "rows.jsonl"),
        ("rows.csv", "text,n\n", "rows.csv"),
        # more fields than the header has names: pandas would make the first ones an index
        ("rows.csv", "text,n\na,1,2\nb,1,2\n", "rows.csv: a line has more fields than"),
        ("rows.csv", "text,n\na,1\nb,1,2\n", "rows.csv cannot be read as csv: .* line 3"),
    ],
)
def test_bad_and_empty_files(name, content, message, tmp_path):
    path = written(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        load_rows(path)


def test_missing_files_folders_and_splits(tmp_path):
    for name in (f"{tmp_path}/rows.jsonl", f"{tmp_path}/rows", "rows.jsonl", "./rows", "a/b/c"):
        with pytest.raises(ValueError, match=f"{name} does not exist"):
            load_rows(name)
    with pytest.raises(ValueError, match="was not written by save_to_disk"):
        load_rows(str(tmp_path))
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="has no split 'dev', only train, test"):
        load_rows(str(tmp_path / "splits"), split="dev")


def test_an_empty_folder(tmp_path):
    datasets.Dataset.from_list(ROWS).select([]).save_to_disk(tmp_path / "empty")
    with pytest.raises(ValueError, match="is empty"):
        load_rows(str(tmp_path / "empty"))


def test_a_hub_name_that_cannot_be_had():
    with pytest.raises(ValueError, match="no-such/dataset is neither a local path nor to be had"):
        load_rows("no-such/dataset")


# --- Rows -> tokens ---


def test_ids_outside_the_vocabulary():
    examples = datasets.Dataset.from_list([{"input_ids": [0, 9]}, {"input_ids": [63]}])
    check_token_ids(examples, 64, "rows")
    with pytest.raises(ValueError, match="rows: token id 63 is outside the vocabulary of 63"):
        check_token_ids(examples, 63, "rows")


def test_the_assistant_is_marked():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}] * 2
    input_ids, scored = render_chat(messages, tokenizer)
    assert scored == [True] * len(input_ids)
    marked_ids, scored = render_chat(messages, tokenizer, assistant_only_loss=True)
    assert marked_ids == input_ids and len(scored) == len(input_ids)
    answers = tokenizer.decode([token for token, keep in zip(input_ids, scored) if keep])
    assert answers == "2<|end|>2<|end|>"
    prompt_ids = encode_prompt(messages[:3], tokenizer)
    assert prompt_ids == input_ids[: len(prompt_ids)]


def test_eos_is_there_once():
    class Tokenizer:
        eos_token_id = 0

    assert end_with_eos([5, 6], Tokenizer) == [5, 6, 0]
    assert end_with_eos([5, 0], Tokenizer) == [5, 0]
    assert end_with_eos([], Tokenizer) == [0]
    Tokenizer.eos_token_id = None
    assert end_with_eos([5], Tokenizer) == [5]


def test_shared_prefixes():
    cases = [([], [1]), ([1, 2], [1, 2]), ([1, 2], [1, 2, 3]), ([1, 2, 9], [1, 2, 3]), ([4], [5])]
    assert [shared_prefix_length(*case) for case in cases] == [0, 2, 2, 2, 0]


# --- Rows that would be read as something else ---

ASKED = [{"role": "user", "content": "1+1"}]
ANSWER = {"role": "assistant", "content": "2"}
HELD = json.dumps([*ASKED, ANSWER])


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "tools": [{"type": "function"}]}, "tools is .* do not support"),
        ({"prompt": "a", "images": ["a.png"]}, "images is .* do not support"),
        ({"prompt": "a", "video": "a.mp4"}, "video is .* do not support"),
        ({"prompt": [*ASKED, {**ANSWER, "weight": 0}]}, "prompt holds a message of weight 0"),
        ({"messages": [*ASKED, {**ANSWER, "weight": 0.5}]}, "messages holds a message of weight 0.5"),
        ({"messages": HELD}, "messages is messages as a JSON string"),
        ({"messages": "user: a"}, "messages is .*; wanted: a list of messages"),
        ({"text": [*ASKED, ANSWER]}, "text is .*; wanted: a string"),
        ({"prompt": HELD}, "prompt is messages as a JSON string"),
        ({"prompt": ASKED, "chat_template_kwargs": "x"}, "chat_template_kwargs is 'x'; wanted: a dict"),
        ({"prompt": ASKED, "chat_template_kwargs": {"tokenize": True}}, "without tokenize"),
        ({"prompt": None}, "prompt is None; wanted: a string or a list of messages"),
    ],
)
def test_a_row_that_would_be_read_as_something_else_is_refused(row, message):
    with pytest.raises(Refusal, match=message):
        check_row(row, [next(iter(row))])


def test_what_says_nothing_passes():
    check_row({"text": "a", "tools": "[]"}, ["text"])
    empty = {"tools": None, "images": [], "video": "", "chat_template_kwargs": None}
    check_row({"messages": [*ASKED, {**ANSWER, "weight": 1}], **empty}, ["messages"])
    check_row({"messages": [*ASKED, {**ANSWER, "weight": None}], **empty}, ["messages"])
    check_row({"text": "[{not json", "prompt": ""}, ["text", "prompt"])


# --- Conversations and texts -> tokens ---


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def scored_text(tokenizer, prompt, completion, **options):
    """What SFT and DPO learn of a completion, as text."""
    prompt_ids, input_ids, _ = encode_completion(prompt, completion, tokenizer, **options)
    return tokenizer.decode(input_ids[shared_prefix_length(prompt_ids, input_ids) :])


def test_keys_that_hold_null_are_not_there(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'tool_calls' in m %}called{% endif %}{{ m.content }}{% endfor %}"
    )
    messages = [{**message, "tool_calls": None, "name": None} for message in (*ASKED, ANSWER)]
    assert tokenizer.decode(render_chat(messages, tokenizer)[0]) == "1+12<|end|>"
    assert tokenizer.decode(encode_prompt(messages[:1], tokenizer)) == "1+1"
    assert scored_text(tokenizer, messages[:1], messages[1:]) == "2<|end|>"


THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if think is defined and not think %}--{% endif %}{% endif %}"
)


def test_a_rows_arguments_reach_the_template(tokenizer):
    tokenizer.chat_template = THINKING
    off = {"think": False}
    assert tokenizer.decode(encode_prompt(ASKED, tokenizer, off)) == "<|user|>1+1<|end|><|assistant|>--"
    assert tokenizer.decode(encode_prompt(ASKED, tokenizer)) == "<|user|>1+1<|end|><|assistant|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + (tail or '') }}{% endfor %}"
    answered = render_chat([*ASKED, ANSWER], tokenizer, template_kwargs={"tail": "!"})[0]
    assert tokenizer.decode(answered) == "1+1!2!<|end|>"
    assert scored_text(tokenizer, ASKED, [ANSWER], template_kwargs={"tail": "!"}) == "2!<|end|>"


def test_the_generation_prompt_may_differ_from_how_answers_begin(tokenizer):
    tokenizer.chat_template = THINKING.replace("--", "<think>").replace("think is defined and not think", "1")
    assert tokenizer.decode(encode_prompt(ASKED, tokenizer)).endswith("<|assistant|><think>")
    assert scored_text(tokenizer, ASKED, [ANSWER]) == "2<|end|>"


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
THOUGHT = [*ASKED, {"role": "assistant", "content": "hm</think>2"}]


@pytest.mark.parametrize(
    "template, prompt, completion, around",
    [
        (
            MOVES,
            [{"role": "system", "content": "Be terse."}, *ASKED],
            [ANSWER],
            "'Be terse.<.user.>1.*, '<.user.>1",
        ),
        (
            LAST_THOUGHTS,
            THOUGHT,
            [{"role": "user", "content": "so?"}, ANSWER],
            "<.assistant.>hm</think>2<.*<.assistant.>2<",
        ),
        # the turn goes on, but the template cuts what it began with
        (
            LAST_THOUGHTS.replace("m.content if loop.last else ", ""),
            THOUGHT,
            [ANSWER],
            "prompt differently|fails",
        ),
    ],
)
def test_a_prompt_that_is_rendered_differently_is_refused(template, prompt, completion, around, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(Refusal, match=around):
        encode_completion(prompt, completion, tokenizer)


def test_a_turn_that_the_prompt_begins_is_continued(tokenizer):
    begun = [*ASKED, {"role": "assistant", "content": "The sum"}]
    more = [{"role": "assistant", "content": " is 2"}, *ASKED, ANSWER]
    prompt = tokenizer.decode(encode_prompt(begun, tokenizer))
    assert prompt == "<|user|>1+1<|end|><|assistant|>The sum"
    prompt_ids, input_ids, _ = encode_completion(begun, more, tokenizer)
    assert prompt_ids == encode_prompt(begun, tokenizer)
    whole = f"{prompt} is 2<|end|><|user|>1+1<|end|><|assistant|>2<|end|>"
    assert tokenizer.decode(input_ids) == whole
    _, _, scored = encode_completion(begun, more, tokenizer, assistant_only_loss=True)
    answers = [token for token, keep in zip(input_ids, scored) if keep]
    assert tokenizer.decode(answers) == "The sum is 2<|end|>2<|end|>"
    # a question follows: nothing to continue
    again = [{"role": "user", "content": "Sure?"}, ANSWER]
    assert scored_text(tokenizer, [*ASKED, ANSWER], again) == "<|user|>Sure?<|end|><|assistant|>2<|end|>"


def test_a_completion_that_repeats_the_prompts_messages_is_read_without_them(tokenizer):
    nulls = [{**message, "name": None} for message in (*ASKED, ANSWER)]
    assert scored_text(tokenizer, ASKED, nulls) == scored_text(tokenizer, ASKED, [ANSWER]) == "2<|end|>"
    for prompt in ([{"role": "system", "content": "s"}, *ASKED], [*ASKED, ANSWER]):
        with pytest.raises(Refusal, match="which is a part of the prompt as well"):
            encode_completion(prompt, [*ASKED, {**ANSWER, "content": "22"}], tokenizer)
    with pytest.raises(Refusal, match="holds the prompt and nothing else"):
        encode_completion(ASKED, ASKED, tokenizer)


class Marking:
    """Characters as ids, <s> = 1, </s> = 2; BOS and EOS added as asked."""

    bos_token_id, eos_token_id, eos_token = 1, 2, "</s>"

    def __init__(self, bos, eos):
        self.bos, self.eos = bos, eos

    def __call__(self, text):
        ids = []
        for part in text.replace("<s>", "\1").replace("</s>", "\2"):
            ids.append(ord(part))
        return {"input_ids": [1] * self.bos + ids + [2] * self.eos}

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_bos_and_eos_stand_once(bos, eos):
    tokenizer, first = Marking(bos, eos), [1] * bos
    assert text_ids("ab", tokenizer) == [*first, 97, 98]  # nothing at a prompt's end
    assert text_ids("<s>ab", tokenizer) == [1, 97, 98]
    assert text_ids("ab</s>", tokenizer) == [*first, 97, 98, 2]  # its own
    for completion in ("b", "b</s>", "b</s>\n"):
        prompt_ids, input_ids, scored = encode_completion("a", completion, tokenizer)
        assert (prompt_ids, input_ids) == ([*first, 97], [*first, 97, 98, 2])
        assert len(scored) == len(input_ids)


def test_every_end_of_the_model_is_an_end():
    tokenizer = Marking(False, False)
    for own, ends in (([7, 2], [2, 7]), (7, [2, 7]), (None, [2])):
        assert end_token_ids(tokenizer, own) == ends
    assert end_with_eos([97, 7], tokenizer, [2, 7]) == [97, 7]
    assert end_with_eos([97, 7, 10], tokenizer, [2, 7]) == [97, 7]  # a line break behind it
    assert end_with_eos([97, 7, 98], tokenizer, [2, 7]) == [97, 7, 98, 2]
    assert end_with_eos([97, 7], tokenizer) == [97, 7, 2]


def test_a_conversation_ends_with_eos_if_the_assistant_has_the_last_word(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert tokenizer.decode(render_chat([*ASKED, ANSWER], tokenizer)[0]) == "1+12<|end|>"
    assert tokenizer.decode(render_chat([ANSWER, *ASKED], tokenizer)[0]) == "21+1"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    ids, scored = render_chat([*ASKED, ANSWER], tokenizer, assistant_only_loss=True)
    assert tokenizer.decode([i for i, keep in zip(ids, scored) if keep]) == "2<|end|>"


def test_of_several_templates_the_default_one_is_used(tokenizer):
    default = tokenizer.chat_template
    tokenizer.chat_template = {"default": default, "tool_use": "x"}
    check_chat_template(tokenizer, "rows", "model", assistant_only_loss=True)
    assert tokenizer.decode(encode_prompt(ASKED, tokenizer)) == "<|user|>1+1<|end|><|assistant|>"
    tokenizer.chat_template = {"tool_use": default, "rag": default}
    with pytest.raises(Refusal, match="of the chat templates of model: .*no default"):
        check_chat_template(tokenizer, "rows", "model")
    tokenizer.chat_template = {"default": "x", "tool_use": default}
    with pytest.raises(Refusal, match="marks no assistant turns"):
        check_chat_template(tokenizer, "rows", "model", assistant_only_loss=True)
