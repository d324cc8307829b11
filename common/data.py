"""Datasets by name: a Hub name, a local file, or a folder written by save_to_disk; errors name file and
line.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import DatasetDict, Features, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError

from common.flags import Refusal

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_rows(name, split="train"):
    """Load one split.

    Args:    name: a Hub name, a .json, .jsonl, .parquet or .csv file, or a folder written by save_to_disk.
             split: which split of a Hub dataset or of a saved DatasetDict; a local file is one split.
    Returns: a datasets.Dataset with at least one row.
    Raises:  ValueError for a missing or empty dataset, and for a malformed line (with its file and number).
    """
    path = Path(name)
    if path.is_dir():
        rows = _load_folder(path, split)
    elif path.is_file():
        rows = _load_file(path)
    elif path.suffix in BUILDERS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise Refusal(f"dataset {name} does not exist: no such file or folder.")
    else:
        rows = _load_from_hub(name, split)
    if len(rows) == 0:
        raise Refusal(f"dataset {name} is empty.")
    return rows


def _load_folder(path, split):
    try:
        rows = load_from_disk(str(path))
    except (FileNotFoundError, IndexError) as error:  # IndexError: no rows
        raise Refusal(f"folder {path} is empty, or was not written by save_to_disk: {error}") from error
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise Refusal(f"{path} has no split {split!r}, only {', '.join(rows)}.")
        rows = rows[split]
    return rows


def _load_from_hub(name, split):
    try:
        return load_dataset(name, split=split)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError) as error:
        raise Refusal(
            f"dataset {name} is neither a local path nor to be had from the Hub: {error}"
        ) from error


def _load_file(path):
    builder = BUILDERS.get(path.suffix)
    if builder is None:
        raise Refusal(f"{path} has suffix {path.suffix!r}; known are {', '.join(BUILDERS)}.")
    if path.stat().st_size == 0:
        raise Refusal(f"dataset {path} is empty.")
    if path.suffix == ".jsonl":
        _check_lines(path)
    try:
        options = _cells_as_text(path) if builder == "csv" else {}
        return load_dataset(builder, data_files=str(path), split="train", **options)
    except Exception as error:  # pyarrow, pandas and datasets raise a dozen types for a bad file
        raise Refusal(f"{path} cannot be read as {builder}: {error.__cause__ or error}") from error


def _cells_as_text(path):
    """Options of load_dataset that make each cell of a CSV file a string, and an empty one null.

    Guessing types, pandas would read 012 as 12 and NA as null, and one blank cell would make each 7 of its
    column a 7.0.
    """
    start = pd.read_csv(path, nrows=1, dtype=str)
    if len(start) and not isinstance(start.index, pd.RangeIndex):  # the first fields would be an index
        raise Refusal("a line has more fields than the header has names.")
    features = Features({name: Value("string") for name in start.columns})
    return {"features": features, "keep_default_na": False, "na_values": [""]}


def _check_lines(path):
    """Raise ValueError with the number of the first line that is not a JSON object; readers of Arrow name
    none.
    """
    number = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.strip())
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
                raise Refusal(f"{path}, line {number}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise Refusal(
                    f"{path}, line {number}: a {type(row).__name__}, but each line must be an object."
                )


def source_hash(script):
    """Names the text of a script, of this file and of those beside it."""
    files = [Path(script), *sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def check_token_ids(examples, vocab_size, name, columns=("input_ids",)):
    """Raise ValueError if a datasets.Dataset holds an id in `columns` that the model has no embedding for."""
    batches = examples.with_format("numpy").iter(1_000)
    largest = max(
        int(np.concatenate(list(batch[column])).max(initial=0)) for batch in batches for column in columns
    )
    if largest >= vocab_size:
        raise Refusal(
            f"{name}: token id {largest} is outside the vocabulary of {vocab_size}. Tokenizer and model do "
            "not belong together, or the embedding was not resized for added tokens."
        )


def check_text(example, columns):
    """Raise ValueError unless each of these columns holds a string, or each a conversation without tools.

    A conversation is a list of messages, dicts with role and content, both strings.
    """
    conversations = []
    for column in columns:
        value = example[column]
        conversations.append(isinstance(value, list))
        if not value and not isinstance(value, str) or not isinstance(value, (str, list)):
            raise Refusal(f"{column} is {value!r}; wanted: a string, or a list of messages.")
        for message in value if isinstance(value, list) else ():
            fields = [
                message.get(name) if isinstance(message, dict) else None for name in ("role", "content")
            ]
            if not all(isinstance(field, str) for field in fields):
                raise Refusal(
                    f"{column} holds {message!r}; a message has a role and a content, both strings."
                )
            if message.get("tool_calls"):
                raise Refusal(f"{column} holds tool calls, which are not supported.")
    if len(set(conversations)) > 1:
        raise Refusal(f"{' and '.join(columns)} are partly strings and partly lists of messages.")


def render_chat(messages, tokenizer, assistant_only_loss=False, add_generation_prompt=False):
    """Conversation -> (input_ids, scored), lists of one length; scored marks all or the assistant's."""
    try:
        encoded = tokenizer.apply_chat_template(
            messages,
            return_dict=True,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=assistant_only_loss,
        )
    except Exception as error:  # a template is a program, and raises what it likes
        raise Refusal(f"the chat template fails: {error}") from error
    input_ids = encoded["input_ids"]
    if not assistant_only_loss:
        return input_ids, [True] * len(input_ids)
    return input_ids, [bool(mark) for mark in encoded["assistant_masks"]]


def end_with_eos(input_ids, tokenizer):
    """Append the end-of-sequence token, unless there is none or it is there."""
    eos = tokenizer.eos_token_id
    return input_ids if eos is None or input_ids[-1:] == [eos] else [*input_ids, eos]


def shared_prefix_length(first, second):
    """How many leading tokens two lists share: where a prompt ends if joint tokenisation differs at its
    border.
    """
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length
