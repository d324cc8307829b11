"""Local datasets of every kind, and errors that name file and line."""

import json
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

from common.data import check_token_ids, end_with_eos, load_rows, render_chat, shared_prefix_length

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
        ("rows.csv", "text,n\na,1,2\nb,1,2\n", "rows.csv cannot be read as csv: a line has more fields than"),
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
    prompt_ids, _ = render_chat(messages[:3], tokenizer, add_generation_prompt=True)
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
