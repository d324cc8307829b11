"""Datasets by name -> rows -> token ids, the same way in all three scripts; errors name file and line, or
example.
"""

import errno
import hashlib
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import transformers
from datasets import DatasetDict, Features, Value, load_dataset, load_from_disk
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.exceptions import DatasetNotFoundError
from datasets.fingerprint import Hasher

from common import Refusal
from common.checkpoints import DISK_ERRORS

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
            rows = _load_folder(path, split)
        elif path.is_file():
            rows = _load_file(path)
        elif path.suffix in BUILDERS or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise Refusal(f"dataset {name} does not exist: no such file or folder.")
        else:
            rows = _load_from_hub(name, split)
    except OSError as error:
        raise Refusal(f"dataset {name} cannot be read: {error}") from error
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
        with cache_errors_named():
            return load_dataset(name, split=split)
    except Refusal:
        raise
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
        with cache_errors_named():
            return load_dataset(builder, data_files=_this_file(path), split="train", **options)
    except Refusal:
        raise
    except Exception as error:  # pyarrow, pandas and datasets raise a dozen types for a bad file
        raise Refusal(f"{path} cannot be read as {builder}: {error.__cause__ or error}") from error


def _cells_as_text(path):
    """Options of load_dataset that make each cell of a CSV file a string, and an empty one null.

    Guessing types, pandas would read 012 as 12 and NA as null, and one blank cell would make each 7 of its
    column a 7.0.
    """
    start = pd.read_csv(path, nrows=1, dtype=str)
    if len(start) and not isinstance(start.index, pd.RangeIndex):  # the first fields would be an index
        raise Refusal(f"{path}: a line has more fields than the header has names.")
    features = Features({name: Value("string") for name in start.columns})
    return {"features": features, "keep_default_na": False, "na_values": [""]}


def _this_file(path):
    """What load_dataset takes as one file: it reads a plain name as a pattern, in which [, ] and * have a
    meaning, and :: as "within".
    """
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
    """A cache that cannot be written is named as the cache: what datasets raises names neither it nor the
    data.
    """
    try:
        yield
    except Exception as error:
        for cause in (error, error.__cause__, error.__context__):
            if isinstance(cause, OSError) and cause.errno in (*DISK_ERRORS, errno.ENOTDIR, errno.EEXIST):
                raise Refusal(
                    f"the cache of datasets {datasets.config.HF_DATASETS_CACHE} cannot be written: {cause}; "
                    "set HF_DATASETS_CACHE to another folder."
                ) from error
        raise


def map_rows(rows, function, code, **options):
    """rows.map(function), with its cache in the cache folder of datasets, never beside a user's files.

    Args: code: names the text of what `function` calls (source_hash): datasets hashes the functions of
          imported modules by their names only. options: of datasets.Dataset.map.
    """
    key = Hasher.hash([rows._fingerprint, function, code, options, transformers.__version__])
    with cache_errors_named():
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "tokenised"
        folder.mkdir(parents=True, exist_ok=True)
        return rows.map(function, cache_file_name=str(folder / f"{key}.arrow"), **options)


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


# Columns of TRL's datasets that these scripts do not follow: a row in which one holds something is refused.
NOT_SUPPORTED = ("tools", "images", "image", "videos", "video", "audios", "audio")
# Arguments of apply_chat_template that a row's chat_template_kwargs may not set.
SET_HERE = ("tokenize", "return_dict", "return_assistant_tokens_mask", "tools", "documents")
SET_HERE += ("add_generation_prompt", "continue_final_message")


def check_row(example, columns):
    """Raise Refusal for a row that holds what would be dropped, or read as something else.

    Args: columns: those that this script reads; each must hold a string (but not messages), or each a
          conversation (but not text): a list of messages, dicts with a role and a content, both strings.
    """
    for column in NOT_SUPPORTED:
        if example.get(column) and example[column] not in ("[]", "null"):  # TRL's tools may be JSON
            raise Refusal(f"{column} is {example[column]!r}, which these scripts do not support.")
    template_kwargs = example.get("chat_template_kwargs") or {}
    if not isinstance(template_kwargs, dict) or set(template_kwargs) & set(SET_HERE):
        raise Refusal(
            f"chat_template_kwargs is {template_kwargs!r}; wanted: a dict for the chat template, without "
            f"{', '.join(SET_HERE)}."
        )
    conversations = []
    for column in columns:
        value = example[column]
        conversations.append(isinstance(value, list))
        if isinstance(value, str) and _is_json_of_messages(value):
            raise Refusal(f"{column} is messages as a JSON string, {value[:60]!r}..: load it (json.loads).")
        kinds = {"messages": (list,), "text": (str,)}.get(column, (str, list))
        if not isinstance(value, kinds) or value == []:
            wanted = " or ".join({str: "a string", list: "a list of messages"}[kind] for kind in kinds)
            raise Refusal(f"{column} is {value!r}; wanted: {wanted}.")
        for message in value if isinstance(value, list) else ():
            _check_message(message, column)
    if len(set(conversations)) > 1:
        raise Refusal(
            f"{' and '.join(columns)} are partly strings and partly lists of messages: give all in one form, "
            "or drop a prompt with which chosen and rejected begin."
        )


def _check_message(message, column):
    fields = [message.get(name) if isinstance(message, dict) else None for name in ("role", "content")]
    if not all(isinstance(field, str) for field in fields):
        raise Refusal(f"{column} holds {message!r}; a message has a role and a content, both strings.")
    if message.get("tool_calls"):
        raise Refusal(f"{column} holds tool calls, which are not supported.")
    if message.get("weight") not in (None, 1):
        raise Refusal(
            f"{column} holds a message of weight {message['weight']}; each scored token weighs the same: "
            "leave the message out, or give the conversation as prompt and completion."
        )


def _is_json_of_messages(text):
    if not text.lstrip().startswith("[{"):
        return False
    try:
        return "role" in json.loads(text)[0]
    except ValueError:
        return False


def template_kwargs(example):
    """A row's own arguments for the chat template; Arrow fills keys that other rows have with nulls."""
    return _without_nulls(example.get("chat_template_kwargs") or {})


def without_nulls(value):
    """A text as it is; messages without the keys that hold null, for Arrow gives each message all keys that
    any of them has, and templates ask which are there.
    """
    return [_without_nulls(message) for message in value] if isinstance(value, list) else value


def _without_nulls(fields):
    return {name: value for name, value in fields.items() if value is not None}


def check_chat_template(tokenizer, name, model_name, assistant_only_loss=False):
    """Raise Refusal if there is no chat template for the conversations of the dataset `name`, or none that
    marks the assistant's turns.
    """
    if tokenizer.chat_template is None:
        raise Refusal(f"{name} holds conversations, but {model_name} has no chat template.")
    try:
        template = tokenizer.get_chat_template()  # of several named ones, the default
    except ValueError as error:
        raise Refusal(
            f"{name} holds conversations; of the chat templates of {model_name}: {error}"
        ) from error
    if assistant_only_loss and not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        raise Refusal(
            f"--assistant_only_loss: the chat template of {model_name} marks no assistant turns with "
            f"{{% generation %}}; it begins {template[:60]!r}."
        )


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
            "which would be trained twice: take the prompt off the completions, or drop the column prompt."
        )


def end_token_ids(tokenizer, eos_token_id):
    """Ids that end a sequence: the tokenizer's EOS, and the model's own, one, several or None."""
    ends = [tokenizer.eos_token_id, eos_token_id]
    return sorted({i for end in ends if end is not None for i in (end if isinstance(end, list) else [end])})


# --- Text and conversations -> token ids ---


def text_ids(text, tokenizer):
    """Plain text -> ids: one BOS where the tokenizer adds it to a text that begins with it already; no EOS
    but the text's own, for what follows a prompt goes on.
    """
    input_ids = tokenizer(text)["input_ids"]
    bos, eos = getattr(tokenizer, "bos_token_id", None), tokenizer.eos_token_id
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
    for end in range(len(input_ids), 0, -1):
        if input_ids[end - 1] in ends:
            if end == len(input_ids) or not tokenizer.decode(input_ids[end:]).strip():
                return input_ids[:end]
            break
    return input_ids if eos is None else [*input_ids, eos]


def render(messages, tokenizer, template_kwargs=None, **options):
    """Messages -> what apply_chat_template makes of them: text, ids or a dict, as the options say."""
    try:
        return tokenizer.apply_chat_template(without_nulls(messages), **(template_kwargs or {}), **options)
    except Exception as error:  # a template is a program, and raises what it likes
        raise Refusal(f"the chat template fails: {error}") from error


def render_chat(messages, tokenizer, assistant_only_loss=False, template_kwargs=None, end_ids=()):
    """Conversation -> (input_ids, scored), lists of one length; scored marks all or the assistant's.

    One that ends with the assistant ends with an end-of-sequence token, by end_with_eos.
    """
    encoded = render(
        messages,
        tokenizer,
        template_kwargs,
        return_dict=True,
        return_assistant_tokens_mask=assistant_only_loss,
    )
    input_ids = encoded["input_ids"]
    scored = [bool(mark) for mark in encoded["assistant_masks"]] if assistant_only_loss else []
    if messages[-1]["role"] == "assistant":
        input_ids = end_with_eos(input_ids, tokenizer, end_ids)
    missing = len(input_ids) - len(scored)
    return input_ids, scored[: len(input_ids)] + [True] * missing


def encode_prompt(prompt, tokenizer, template_kwargs=None):
    """A prompt, as the model will see it before it answers -> ids.

    A text as it is; a conversation with the template's generation prompt, or, if the assistant has begun to
    speak, without its turn's end, so that the turn is continued.
    """
    if isinstance(prompt, str):
        return text_ids(prompt, tokenizer)
    return tokenizer(_render_prompt(prompt, tokenizer, template_kwargs), add_special_tokens=False)[
        "input_ids"
    ]


def _render_prompt(prompt, tokenizer, template_kwargs, answered=True):
    begun = answered and prompt[-1]["role"] == "assistant"
    options = {"add_generation_prompt": answered and not begun, "continue_final_message": begun}
    return render(prompt, tokenizer, template_kwargs, tokenize=False, **options)


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
    if not completion:
        raise Refusal("a completion holds the prompt and nothing else.")
    if prompt and completion[0]["role"] != "assistant" and completion[0] in (prompt[0], prompt[-1]):
        raise Refusal(
            f"a completion begins with {completion[0]!r}, which is a part of the prompt as well: give it "
            "without the prompt's messages, or with all of them."
        )
    messages, answered = [*prompt, *completion], completion[0]["role"] == "assistant"
    if prompt and answered and prompt[-1]["role"] == "assistant":  # the turn that the prompt has begun
        turn = {**prompt[-1], **completion[0], "content": prompt[-1]["content"] + completion[0]["content"]}
        messages = [*prompt[:-1], turn, *completion[1:]]
    input_ids, scored = render_chat(messages, tokenizer, assistant_only_loss, template_kwargs, end_ids)
    if not prompt:
        return [], input_ids, scored
    whole = render(messages, tokenizer, template_kwargs, tokenize=False)
    alone = _render_prompt(prompt, tokenizer, template_kwargs, answered)
    if not whole.startswith(alone):
        without = render(prompt, tokenizer, template_kwargs, tokenize=False)  # a generation prompt
        begun = answered and prompt[-1]["role"] == "assistant"
        if begun or not whole.startswith(without):
            at = len(os.path.commonprefix([alone, whole]))
            texts = [repr(text[max(0, at - 30) : at + 30]) for text in (alone, whole)]
            raise Refusal(
                "the chat template renders the prompt differently once the completion follows: around "
                f"character {at}, {texts[0]} alone, {texts[1]} with it. So nobody can say where it ends: use "
                "a template that renders it alike, or give prompt and completion as texts."
            )
    prompt_ids = tokenizer(alone, add_special_tokens=False)["input_ids"]
    return prompt_ids, input_ids, scored


def shared_prefix_length(first, second):
    """How many leading tokens two lists share: where a prompt ends if joint tokenisation differs at its
    border.
    """
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length
