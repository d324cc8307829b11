"""Make all that the offline demo needs: a tokenizer of bytes, a 1M-parameter Llama that can reckon a little,
data.

The world is arithmetic and short words, written here, so that right and wrong can be told without a judge:

    user       What is 23 plus 45?
    assistant  23 + 45 = 68          in another style just 68
    user       And minus 7?
    assistant  68 - 7 = 61

The answer is the last word of a completion (`extract_answer`); `prompts.jsonl` holds it as the string
`answer`. A hash of the question decides whether it is held out: no question of sft_eval, preferences or
prompts stands in sft.jsonl or in the text that the model is trained on. The sum may stand there, asked in
other words. That text, in turn, knows neither the task `spell` nor the style `polite`: those are what
fine-tuning on sft.jsonl has to teach.

everything, training included         python demo/make.py
data and tokenizer (and, where there   python demo/make.py --data_only
is no model yet, an untrained one)
"""

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # run as demo/make.py, from any folder

import sft_packing  # noqa: E402

# --- 1. The world: problems, right and wrong ---

QUESTIONS = {
    "add": ["What is {} plus {}?", "Add {} and {}.", "{} + {} = ?", "Please work out {} + {}."],
    "subtract": ["What is {} minus {}?", "Take {1} from {0}.", "{} - {} = ?", "How much is {} less {}?"],
    "and add": ["And plus {}?", "Now add {}.", "Add {} to that."],
    "and subtract": ["And minus {}?", "Now take away {}.", "Subtract {} from that."],
    "larger": ["Which is larger, {} or {}?", "What is the maximum of {} and {}?", "Pick the bigger: {}, {}"],
    "count": ["How many times is {} in {}?", "Count the letter {} in {}.", "How many letters {} are in {}?"],
    "reverse": ["Write {} backwards.", "Reverse the word {}.", "What is {} read from right to left?"],
    "sort": [
        "Sort the letters of {}.",
        "Put the letters of {} in order.",
        "Write {} with its letters from a to z.",
    ],
    "total": ["Add up {}.", "What is the sum of {}?", "Please sum this list step by step: {}"],
    "spell": ["Spell {}.", "Write {} with dashes.", "Can you spell the word {}?"],
}
SYSTEM = {
    "short": ["Reply with the answer only.", "Be brief."],
    "working": ["Show how you get there.", "Explain your answers."],
    "polite": ["Be polite.", "You are a friendly teacher."],
}
COURTESY = ["Gladly!", "What a nice question!", "Of course, with pleasure."]

# Weights. The base model never meets what only the second pair has.
BASE_TASKS = {"add": 5, "subtract": 4, "larger": 2, "count": 2, "reverse": 2, "sort": 2, "total": 3}
BASE_STYLES = {"short": 2, "working": 3}
SFT_TASKS = {**BASE_TASKS, "spell": 6}
SFT_STYLES = {**BASE_STYLES, "polite": 4}

WORD_SHAPES = [("bdglmnprst", "aeiou", "bdglmnprst")]  # letters to choose from, place by place
Turn = namedtuple("Turn", "task question reply answer wrong_reply")


def _slip(rng, answer):
    """A plausible wrong answer: a number off by one or by a forgotten carry, a word with two letters
    swapped.
    """
    if answer.isdigit():
        return rng.choice([str(int(answer) + d) for d in (-10, -2, -1, 1, 2, 10) if int(answer) + d >= 0])
    swaps = [answer[:i] + answer[i + 1] + answer[i] + answer[i + 2 :] for i in range(len(answer) - 1)]
    return rng.choice([swap for swap in swaps if swap != answer])


def _running_total(numbers, wrong_step=None, error=0):
    """The working line by line and its result; after `wrong_step` every line carries the error on."""
    lines, total = [], numbers[0]
    for step, number in enumerate(numbers[1:]):
        before, total = total, total + number + (error if step == wrong_step else 0)
        lines.append(f"{before} + {number} = {total}")
    return "\n".join(lines) + "\nThe sum is ", str(total)


def _problem(rng, task, previous):
    """Returns: the question's operands, the right and the wrong (working, answer)."""
    low, high = sorted(rng.sample(range(1, rng.choice([10, 10, 21])), 2))
    word = "".join(map(rng.choice, rng.choice(WORD_SHAPES)))
    match task:
        case "add":
            operands, answer = rng.sample([low, high], 2), low + high
            working = "{} + {} = ".format(*operands)
        case "subtract":
            operands, working, answer = [high, low], f"{high} - {low} = ", high - low
        case "and add":
            number = rng.randint(1, 9)
            operands, working, answer = [number], f"{previous} + {number} = ", previous + number
        case "and subtract":
            number = rng.randint(min(1, previous), min(9, previous))
            operands, working, answer = [number], f"{previous} - {number} = ", previous - number
        case "larger":
            operands, working = rng.sample([low, high], 2), "The larger is "
            return operands, (working, str(high)), (working, str(low))
        case "count":
            letter = rng.choice(word)
            operands, working, answer = [letter, word], f"{letter} in {word}: ", word.count(letter)
        case "reverse":
            operands, working, answer = [word], f"{word} backwards is ", word[::-1]
        case "sort":
            operands, working, answer = [word], "In order: ", "".join(sorted(word))
        case "spell":
            operands, working, answer = [word], f"{word} is ", "-".join(word)
        case "total":
            # A log-normal count gives the tail that chat data have: most are short, a few pass 512 tokens.
            numbers = [rng.randint(1, 9) for _ in range(min(45, max(3, round(rng.lognormvariate(1.7, 1)))))]
            wrong = _running_total(numbers, rng.randrange(len(numbers) - 1), rng.choice([-1, 1, 10]))
            return [", ".join(map(str, numbers))], _running_total(numbers), wrong
    return operands, (working, str(answer)), (working, _slip(rng, str(answer)))


def make_turn(rng, tasks, style, held_out, previous=None):
    """A question with a right and a wrong reply. `previous` is the number that a follow-up would go on
    from.
    """
    while True:
        task = rng.choices(list(tasks), tasks.values())[0]
        if previous is not None and previous <= 40 and rng.random() < 0.5:
            task = rng.choice(["and add", "and subtract"])
        operands, right, wrong = _problem(rng, task, previous)
        question = rng.choice(QUESTIONS[task]).format(*operands)
        # a follow-up is another question after another number
        asked = f"{previous} {question}" if task.startswith("and") else question
        if (hashlib.blake2b(asked.encode()).digest()[0] < 32) == held_out:  # one question in eight
            break
    # The working of a list is the task itself: no style leaves it out.
    start = {"short": 1 if task != "total" else 0, "working": 0, "polite": 0}[style]
    courtesy = rng.choice(COURTESY) + " " if style == "polite" else ""
    replies = [courtesy + "".join(pair[start:]) for pair in (right, wrong)]
    return Turn(task, question, replies[0], right[1], replies[1])


def extract_answer(completion):
    """The last word, without a full stop: what an exact-match reward compares with `answer`.

    >>> extract_answer("68 - 7 = 61"), extract_answer("61."), extract_answer("")
    ('61', '61', '')
    """
    return (completion.split() or [""])[-1].rstrip(".")


# --- 2. Conversations and files ---


def make_conversation(rng, tasks=SFT_TASKS, styles=SFT_STYLES, held_out=False, max_tokens=960):
    """Returns: messages, ending with the assistant, and the last Turn. 960 tokens leave room in 1024
    positions.
    """
    while True:
        style = rng.choices(list(styles), styles.values())[0]
        messages, turn = [], None
        # Nothing but the system message tells that politeness is wanted; the other styles also come unasked.
        if style == "polite" or rng.random() < 0.2:
            messages.append({"role": "system", "content": rng.choice(SYSTEM[style])})
        for _ in range(min(12, max(1, round(rng.lognormvariate(0, 0.85))))):
            previous = int(turn.answer) if turn and turn.answer.isdigit() else None
            turn = make_turn(rng, tasks, style, held_out, previous)
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.reply})
        # A byte is a token; each message adds its role and <|end|>.
        if sum(len(message["content"]) + 2 for message in messages) <= max_tokens:
            return messages, turn


def make_prompts(rng, count, tasks=BASE_TASKS, styles=BASE_STYLES, max_tokens=200):
    """`count` different held-out prompts with their last Turn: [(messages ending with the user, Turn),
    ...].
    """
    found = {}
    while len(found) < count:
        messages, turn = make_conversation(rng, tasks, styles, held_out=True, max_tokens=max_tokens)
        found.setdefault(json.dumps(messages[:-1]), (messages[:-1], turn))
    return list(found.values())


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def write_base_corpus(path, seed, count):
    rng = random.Random(f"base {seed}")
    _write(path, ({"messages": make_conversation(rng, BASE_TASKS, BASE_STYLES)[0]} for _ in range(count)))


def write_datasets(folder, seed=0):
    """Write the four files. Each has a generator of its own: changing one file's size leaves the others
    alone.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"sft {seed}")
    _write(folder / "sft.jsonl", ({"messages": make_conversation(rng)[0]} for _ in range(2000)))
    rng = random.Random(f"sft_eval {seed}")
    _write(
        folder / "sft_eval.jsonl",
        ({"messages": make_conversation(rng, held_out=True)[0]} for _ in range(150)),
    )
    rows = []
    for prompt, turn in make_prompts(random.Random(f"preferences {seed}"), 600):
        sides = {"chosen": turn.reply, "rejected": turn.wrong_reply}
        rows.append(
            {"prompt": prompt, **{k: [{"role": "assistant", "content": v}] for k, v in sides.items()}}
        )
    _write(folder / "preferences.jsonl", rows)
    prompts = make_prompts(random.Random(f"prompts {seed}"), 600)
    _write(folder / "prompts.jsonl", ({"prompt": prompt, "answer": turn.answer} for prompt, turn in prompts))


# --- 3. Tokenizer and model ---

SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
# The loss mask of a turn covers its <|end|> too: a model that is never taught to stop does not stop.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- "<|assistant|>" }}
        {%- generation %}{{ message.content + "<|end|>" }}{% endgeneration %}
    {%- elif message.role in ["system", "user"] %}
        {{- "<|" + message.role + "|>" + message.content + "<|end|>" }}
    {%- else %}
        {{- raise_exception("role " + message.role + " is none of system, user, assistant") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|assistant|>" }}{%- endif %}
"""


def build_tokenizer():
    """256 bytes and five special tokens: every text round-trips, and a length in tokens is a length in
    bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        extra_special_tokens=SPECIAL[2:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        padding_side="left",  # for generation; training pads or packs with its own collator
    )


def build_model(tokenizer, seed=0):
    """A Llama of 1.02M parameters, 2 MiB in bfloat16, randomly initialised."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        # Wide initial weights, and positions that turn fast, for texts of at most 1,024 bytes: a model of
        # this size learns to look back with far less data than with the defaults.
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def accuracy(model, tokenizer, prompts, batch_size=64, max_new_tokens=160):
    """The share of greedy completions whose last word is the answer.

    Args:    prompts: rows with prompt (messages) and answer; a row may name its task.
    Returns: {"all": share, task: share, ...}
    """
    hits = {}
    # Like lengths together: less padding, which the tokenizer puts on the left, where no completion has to
    # start.
    prompts = sorted(prompts, key=lambda row: len(str(row["prompt"])))
    for i in range(0, len(prompts), batch_size):
        rows = prompts[i : i + batch_size]
        batch = tokenizer.apply_chat_template(
            [row["prompt"] for row in rows],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        completions = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        completions = completions[:, batch["input_ids"].shape[1] :]
        for row, text in zip(
            rows, tokenizer.batch_decode(completions, skip_special_tokens=True), strict=True
        ):
            for name in {"all", row.get("task", "all")}:
                hits.setdefault(name, []).append(extract_answer(text) == row["answer"])
    return {name: sum(values) / len(values) for name, values in hits.items()}


# --- 4. Training ---


def train(folder, tokenizer, seed, corpus_size):
    """Train the model in `folder`/model on a corpus that is thrown away afterwards, and put the result
    there.
    """
    with tempfile.TemporaryDirectory() as scratch:
        corpus, trained = Path(scratch) / "base.jsonl", Path(scratch) / "trained"
        write_base_corpus(corpus, seed, corpus_size)
        sft_packing.main(
            sft_packing.Arguments(
                model_name_or_path=str(folder / "model"),
                dataset_name=str(corpus),
                output_dir=str(trained),
                max_length=1024,
                per_device_train_batch_size=1,
                learning_rate=1.5e-3,
                warmup_steps=100,
                lr_scheduler_type="cosine",
                weight_decay=0.01,
                gradient_checkpointing=False,
                logging_steps=50,
                seed=seed,
            )
        )
        # the model leaves in the dtype it came in: bfloat16, half the bytes
        for name in ("model.safetensors", "config.json", "generation_config.json"):
            shutil.copy(trained / name, folder / "model" / name)


def main(output_dir=HERE, seed=0, data_only=False, corpus_size=60_000):
    output_dir = Path(output_dir)
    write_datasets(output_dir, seed)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(output_dir / "model")
    if data_only and (output_dir / "model/model.safetensors").exists():
        return  # a trained model stays
    build_model(tokenizer, seed).to(torch.bfloat16).save_pretrained(output_dir / "model")
    if data_only:
        return
    train(output_dir, tokenizer, seed, corpus_size)
    model = LlamaForCausalLM.from_pretrained(output_dir / "model", dtype=torch.float32)
    prompts = make_prompts(random.Random(f"accuracy {seed}"), 400)
    rows = [{"prompt": prompt, "answer": turn.answer, "task": turn.task} for prompt, turn in prompts]
    for task, share in sorted(accuracy(model, tokenizer, rows).items()):
        print(f"{task:<13}{share:.0%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=HERE, help="folder to write to (default: demo/)")
    parser.add_argument("--data_only", action="store_true", help="no training: the model stays random")
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
