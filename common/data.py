"""Datasets by name -> rows -> token ids, in all three scripts; errors name file and line, or the example."""

import hashlib
import json
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import transformers
from datasets import DatasetDict, Features, Value, load_dataset, load_from_disk
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.fingerprint import Hasher

from common import Refusal, refuse

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_rows(name, split="train"):
    """Load one split.

    Args:    name: a Hub name, a .json, .jsonl, .parquet or .csv file, or a folder written by save_to_disk.
             split: which split of a Hub dataset or of a saved DatasetDict; a local file is one split.
    Returns: a datasets.Dataset with at least one row.
    Raises:  ValueError for a missing or empty dataset, and for a malformed line (with its file and number).
    """
    path = Path(name)
    try:
        if path.is_dir():
            rows = load_from_disk(name)
        elif path.is_file():
            rows = _load_file(path)
        elif path.suffix in BUILDERS or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise Refusal(f"dataset {name} does not exist: no such file or folder.")
        else:
            with cache_errors_named():
                rows = load_dataset(name, split=split)
    except Refusal:
        raise
    except Exception as error:  # pyarrow, pandas and datasets raise a dozen types for what is bad or missing
        raise Refusal(f"dataset {name} is empty, or cannot be read: {error.__cause__ or error!r}") from error
    if isinstance(rows, DatasetDict):
        refuse(split not in rows, f"dataset {name} has no split {split!r}, only {', '.join(rows)}.")
        rows = rows[split]
    refuse(len(rows) == 0, f"dataset {name} is empty.")
    return rows


def _load_file(path):
    known = ", ".join(BUILDERS)
    refuse(path.suffix not in BUILDERS, f"{path} has suffix {path.suffix!r}; known are {known}.")
    refuse(path.stat().st_size == 0, f"dataset {path} is empty.")
    if path.suffix == ".jsonl":
        _check_lines(path)
    options = _cells_as_text(path) if path.suffix == ".csv" else {}
    with cache_errors_named():
        return load_dataset(BUILDERS[path.suffix], data_files=_this_file(path), split="train", **options)


def _check_lines(path):
    """Name the first line that is not a JSON object; readers of Arrow name none."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line.strip() or "{}")
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
                raise Refusal(f"{path}, line {number}: not valid JSON: {error}") from error
            kind = type(row).__name__
            refuse(kind != "dict", f"{path}, line {number}: a {kind}, but each line must be an object.")


def _cells_as_text(path):
    """Options of load_dataset that make each cell of a CSV file a string, and an empty one null.

    Guessing types, pandas would read 012 as 12 and NA as null, and one blank cell would make each 7 of its
    column a 7.0.
    """
    start = pd.read_csv(path, nrows=1, dtype=str)
    shifted = len(start) and not isinstance(start.index, pd.RangeIndex)  # the first fields are an index
    refuse(shifted, f"{path}: a line has more fields than the header has names.")
    features = Features({name: Value("string") for name in start.columns})
    return {"features": features, "keep_default_na": False, "na_values": [""]}


def _this_file(path):
    """What load_dataset takes as one file: in a plain name, [ ] * ? make a pattern, and :: means "within"."""
    path = path.resolve()
    changed = f"{path.stat().st_mtime_ns} {path.stat().st_size}"  # a part of the cache's key
    if "::" in str(path):
        link = Path(datasets.config.HF_DATASETS_CACHE) / "named" / Hasher.hash(str(path))
        link = link.with_suffix(path.suffix)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(path)
        path = link
    return DataFilesDict({"train": DataFilesList([str(path)], [(str(path), changed)])})


@contextmanager
def cache_errors_named():
    """A cache that cannot be written is named: what datasets raises names neither it nor the data."""
    try:
        yield
    except Exception as error:
        for cause in (error, error.__cause__, error.__context__):
            # those about a dataset come without a number, and lost connections are those of its processes
            if isinstance(cause, OSError) and cause.errno and not isinstance(cause, ConnectionError):
                folder, remedy = datasets.config.HF_DATASETS_CACHE, "set HF_DATASETS_CACHE to another one."
                raise Refusal(
                    f"the cache of datasets {folder} cannot be written: {cause}; {remedy}"
                ) from error
        raise


def map_rows(rows, encode, name, script, num_proc=None, features=None):
    """What encode(example, index), a dict, makes of each row, in the place of the row's own columns.

    The cache lies in the cache folder of datasets, never beside a user's files.

    Args:    name: of the dataset; a Refusal begins with it and the example's index. script: the file that
             calls: its text is a part of the cache's key. num_proc: processes. features: the types of the
             new columns, where the first rows may not show them.
    Returns: a datasets.Dataset.
    """
    # datasets hashes a function by its code and by what it holds, but imported ones by their names only
    files = [Path(script), *sorted(Path(__file__).parent.glob("*.py"))]
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    key = Hasher.hash([rows._fingerprint, encode, name, code, features, transformers.__version__])
    with cache_errors_named():
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "tokenised"
        folder.mkdir(parents=True, exist_ok=True)
        return rows.map(
            partial(_encode_named, encode, name),
            with_indices=True,
            remove_columns=rows.column_names,
            cache_file_name=str(folder / f"{key}.arrow"),
            features=features,
            num_proc=num_proc,
            desc=f"Tokenising {Path(name).name}",
        )


def _encode_named(encode, name, example, index):
    try:
        return encode(example, index)
    except Refusal as error:
        raise Refusal(f"{name}, example {index}: {error}") from error


# --- What a row may hold ---

# Columns of TRL's datasets that these scripts do not follow: a row in which one holds something is refused.
NOT_SUPPORTED = ("tools", "images", "image", "videos", "video", "audios", "audio")
KINDS = {"messages": {list: "a list of messages"}, "text": {str: "a string"}}
ANY_KIND = {str: "a string", list: "a list of messages"}


def check_row(example, columns):
    """Raise Refusal for a row that holds what would be dropped, or read as something else.

    Args: columns: those that this script reads; each must hold a string (but not messages), or each a
          conversation (but not text): a list of messages, dicts with a role and a content, both strings.
    """
    for column in NOT_SUPPORTED:
        if example.get(column) and example[column] not in ("[]", "null"):  # TRL's tools may be JSON
            raise Refusal(f"{column} is {example[column]!r}, which these scripts do not support.")
    for column in columns:
        value, kinds = example[column], KINDS.get(column, ANY_KIND)
        if isinstance(value, str) and re.fullmatch(r'\s*\[\s*\{.*"role".*\}\s*\]\s*', value, re.DOTALL):
            raise Refusal(f"{column} is messages as a JSON string, {value[:60]!r}..: load it (json.loads).")
        if not isinstance(value, tuple(kinds)) or value == []:
            raise Refusal(f"{column} is {value!r}; wanted: {' or '.join(kinds.values())}.")
        for message in value if isinstance(value, list) else ():
            _check_message(message, column)
    mixed = f"{' and '.join(columns)} are partly strings and partly lists of messages: give all in one form."
    refuse(len({type(example[column]) for column in columns}) > 1, mixed)


def _check_message(message, column):
    fields = [message.get(name) if isinstance(message, dict) else None for name in ("role", "content")]
    if not all(isinstance(field, str) for field in fields):
        raise Refusal(f"{column} holds {message!r}; a message has a role and a content, both strings.")
    refuse(message.get("tool_calls"), f"{column} holds tool calls, which are not supported.")
    weight = message.get("weight")
    refuse(
        weight not in (None, 1), f"{column} holds a message of weight {weight}; all weigh 1: leave it out."
    )


def without_nulls(value):
    """Messages, or a dict, without the keys that hold null: Arrow gives each dict all keys that any of them
    has, so that equal messages differ, and templates see arguments that are not there. A text as it is.
    """
    if isinstance(value, list):
        return [without_nulls(message) for message in value]
    if isinstance(value, dict):
        return {name: field for name, field in value.items() if field is not None}
    return value


def template_kwargs(example):
    """A row's own arguments for the chat template."""
    return without_nulls(example.get("chat_template_kwargs") or {})


def unused_columns(rows, used):
    """The columns that nobody reads; those that a script refuses if they hold anything are empty."""
    return [name for name in rows.column_names if name not in (*used, "chat_template_kwargs", *NOT_SUPPORTED)]


def repeats_prompt(prompt, *completions):
    """Whether completions, as texts, begin with the whole prompt once more."""
    return isinstance(prompt, str) and prompt.strip() != "" and all(c.startswith(prompt) for c in completions)


def check_repeats(name, repeats):
    """Raise Refusal where most completions repeat their prompt: repeats, a bool for each row."""
    if sum(repeats) > len(repeats) / 2:
        raise Refusal(
            f"{name}: in {sum(repeats)} of {len(repeats)} rows the completion begins with the whole prompt, "
            "which would be trained twice: take it off the completions, or drop the column prompt."
        )


def check_token_ids(examples, vocab_size, name, columns=("input_ids",)):
    """Raise ValueError if a datasets.Dataset holds an id in `columns` that the model has no embedding for."""
    batches = examples.with_format("numpy").iter(1_000)
    ids = (np.concatenate(list(batch[column])) for batch in batches for column in columns)
    largest = max(int(part.max(initial=0)) for part in ids)
    if largest >= vocab_size:
        raise Refusal(
            f"{name}: token id {largest} is outside the vocabulary of {vocab_size}: use the model's own "
            "tokenizer, or resize the model's embedding for added tokens."
        )


def check_chat_template(tokenizer, name, model_name, assistant_only_loss=False):
    """Raise Refusal if there is no chat template for the conversations of the dataset `name`, or none that
    marks the assistant's turns.
    """
    try:
        template = tokenizer.get_chat_template()  # of several named ones, the default
    except ValueError as error:
        raise Refusal(f"{name} is chats, but {model_name} has no chat template for them: {error}") from error
    if assistant_only_loss and not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        raise Refusal(
            f"--assistant_only_loss: the chat template of {model_name} marks no assistant turns with "
            f"{{% generation %}}; it begins {template[:60]!r}."
        )


# --- Text and conversations -> token ids ---


def end_token_ids(tokenizer, eos_token_id):
    """Ids that end a sequence: the tokenizer's EOS, and the model's own, one, several or None."""
    own = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    return sorted({tokenizer.eos_token_id, *own} - {None})


def text_ids(text, tokenizer):
    """Plain text -> ids: one BOS where the tokenizer adds it to a text that begins with it already; no EOS
    but the text's own, for what follows a prompt goes on.
    """
    input_ids = tokenizer(text)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and input_ids[:2] == [bos, bos]:
        input_ids = input_ids[1:]
    if eos is not None and input_ids[-1:] == [eos]:
        if input_ids[-2:-1] == [eos] or not text.endswith(tokenizer.eos_token):  # added by the tokenizer
            input_ids = input_ids[:-1]
    return input_ids


def end_with_eos(input_ids, tokenizer, end_ids=()):
    """End in one end-of-sequence token, as generation does: the last one that is there, without the line
    break with which some templates follow it; else the tokenizer's EOS, if it has one.

    Args: end_ids: further ids that end a sequence, those of the model's generation configuration.
    """
    eos = tokenizer.eos_token_id
    ends = {eos, *end_ids} - {None}
    length = next((n for n in range(len(input_ids), 0, -1) if input_ids[n - 1] in ends), None)
    if length and not tokenizer.decode(input_ids[length:]).strip():
        return input_ids[:length]
    return input_ids if eos is None else [*input_ids, eos]


def render(messages, tokenizer, template_kwargs=None, **options):
    """Messages -> text, or what the options of apply_chat_template ask for.

    Raises: Refusal where the template fails, or where a row's template_kwargs name what is set here.
    """
    fixed = {"tokenize": False, "add_generation_prompt": False, "continue_final_message": False}
    fixed |= {"tools": None, "documents": None, "return_dict": True, "return_assistant_tokens_mask": False}
    fixed |= options
    try:
        # a name that is in both is a TypeError
        return tokenizer.apply_chat_template(messages, **(template_kwargs or {}), **fixed)
    except Exception as error:  # a template is a program, and raises what it likes
        raise Refusal(f"the chat template fails: {error}") from error


def render_chat(messages, tokenizer, assistant_only_loss=False, template_kwargs=None, end_ids=()):
    """Conversation -> (input_ids, scored), lists of one length; scored marks all or the assistant's.

    One that ends with the assistant ends with an end-of-sequence token, by end_with_eos.
    """
    options = {"tokenize": True, "return_assistant_tokens_mask": assistant_only_loss}
    encoded = render(messages, tokenizer, template_kwargs, **options)
    input_ids = encoded["input_ids"]
    scored = list(map(bool, encoded["assistant_masks"])) if assistant_only_loss else [True] * len(input_ids)
    if messages[-1]["role"] == "assistant":
        input_ids = end_with_eos(input_ids, tokenizer, end_ids)
    return input_ids, [*scored, True][: len(input_ids)]  # one EOS longer, if any


def encode_prompt(prompt, tokenizer, template_kwargs=None):
    """A prompt, as the model will see it before it answers -> ids.

    A text as it is; a conversation with the template's generation prompt, or, if the assistant has begun to
    speak, without its turn's end, so that the turn is continued.
    """
    if isinstance(prompt, str):
        return text_ids(prompt, tokenizer)
    begun = prompt[-1]["role"] == "assistant"
    options = {"add_generation_prompt": not begun, "continue_final_message": begun}
    text = render(prompt, tokenizer, template_kwargs, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_completion(
    prompt, completion, tokenizer, *, template_kwargs=None, end_ids=(), assistant_only_loss=False
):
    """A prompt and what follows it, both texts or both conversations -> (prompt_ids, input_ids, scored).

    Returns: prompt_ids: of the prompt alone, [] for none. input_ids: of both together, ended by end_with_eos;
             scored: as of render_chat, the prompt not left out. A tokenizer may join the prompt's last
             characters to the completion's first, and a template may write another beginning of the answer
             than its generation prompt: the prompt ends at the last token that both lists share.
    Raises:  Refusal where the template renders the prompt itself differently once the completion follows:
             where it ends, nobody could say.
    """
    prompt, completion = without_nulls(prompt), without_nulls(completion)
    if isinstance(completion, str):
        input_ids = end_with_eos(text_ids(prompt + completion, tokenizer), tokenizer, end_ids)
        return text_ids(prompt, tokenizer) if prompt else [], input_ids, [True] * len(input_ids)
    if prompt and completion[: len(prompt)] == prompt:  # a whole conversation, which repeats the prompt
        completion = completion[len(prompt) :]
    refuse(not completion, "a completion holds the prompt and nothing else.")
    answered = completion[0]["role"] == "assistant"
    if prompt and not answered and completion[0] in (prompt[0], prompt[-1]):
        remedy = "give it without the prompt's messages, or with all of them."
        raise Refusal(f"a completion begins with {completion[0]!r}, a part of the prompt as well: {remedy}")
    messages = [*prompt, *completion]
    begun = bool(prompt) and answered and prompt[-1]["role"] == "assistant"
    if begun:  # one turn, which the completion goes on with
        turn = {**prompt[-1], **completion[0], "content": prompt[-1]["content"] + completion[0]["content"]}
        messages = [*prompt[:-1], turn, *completion[1:]]
    input_ids, scored = render_chat(messages, tokenizer, assistant_only_loss, template_kwargs, end_ids)
    if not prompt:
        return [], input_ids, scored
    whole = render(messages, tokenizer, template_kwargs)
    options = {"add_generation_prompt": answered and not begun, "continue_final_message": begun}
    alone = render(prompt, tokenizer, template_kwargs, **options)
    without_generation_prompt = alone if begun else render(prompt, tokenizer, template_kwargs)
    if not whole.startswith((alone, without_generation_prompt)):
        at = shared_prefix_length(alone, whole)
        one, other = (text[max(0, at - 30) : at + 30] for text in (alone, whole))
        raise Refusal(
            f"the chat template renders the prompt differently once a completion follows, {one!r} alone, "
            f"{other!r} with it: use one that renders it alike, or give prompt and completion as texts."
        )
    return tokenizer(alone, add_special_tokens=False)["input_ids"], input_ids, scored


def shared_prefix_length(first, second):
    """How many items two sequences begin with alike: of ids, where a prompt ends if joint tokenisation
    differs at its border.
    """
    shortest = min(len(first), len(second))
    return next((i for i in range(shortest) if first[i] != second[i]), shortest)
