"""Prompts, groups and loss settings that the two ranks and the naive computation share."""

import os
from pathlib import Path

import torch
from helpers import tiny_model
from transformers import AutoTokenizer

DEMO_MODEL = Path(__file__).parents[1] / "demo/model"
LIMIT = 32
BUCKET = 10_000  # elements, where the bytes of a model of a hundred thousand are counted
PROMPTS = (
    ["What is 8 plus 8?", "9 - 6 = ?", "Add 2 and 4."],
    ["Take 7 from 8.", "Add up 3, 1, 4, 2, 5.", "How many letters e are in rem?"],
)


def prompt_ids(rank):
    """Odd ranks' completions are longer: the ranks stop at different lengths."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    chats = [[{"role": "user", "content": text}] for text in PROMPTS[rank % 2]]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True)["input_ids"]


def _ids(generator, length):
    return torch.randint(0, 250, (length,), generator=generator).tolist()


def groups():
    """Five prompts with three completions each; one token, a whole length, and everything in between."""
    generator = torch.Generator().manual_seed(0)
    lengths = [(5, [1, 9, 4]), (1, [3, 1, 2]), (8, [9, 9, 9]), (3, [2, 7, 1]), (6, [1, 1, 1])]
    return [(_ids(generator, p), [_ids(generator, c) for c in cs]) for p, cs in lengths]


GROUPS = groups()
LOSS_CASES = {
    **{loss_type: {"loss_type": loss_type} for loss_type in ("dapo", "grpo", "bnpo", "dr_grpo")},
    "kl": {"loss_type": "dapo", "beta": 0.3},
    "clip": {"loss_type": "grpo", "epsilon": 0.05, "epsilon_high": 0.4},
    "temperature": {"loss_type": "dapo", "temperature": 0.7},
    "masked": {"loss_type": "bnpo"},
    "masked_grpo": {"loss_type": "grpo"},
    "masked_dr_grpo": {"loss_type": "dr_grpo"},
}


def scored_lengths(name):
    """(15,) scored tokens of each completion; in the masked cases some, and one whole group, have none."""
    lengths = torch.tensor([len(c) for _, cs in GROUPS for c in cs])
    if name.startswith("masked"):
        lengths[[0, 4, 6, 7, 8]] = 0
    return lengths


def noise(seed):
    """For each completion, what its old or reference log-probabilities differ by from present ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(c), generator=generator) * 0.3 for _, cs in GROUPS for c in cs]


def all_advantages():
    return torch.randn(15, generator=torch.Generator().manual_seed(7))


def share(rank, world):
    """Three groups for rank 0 and two for rank 1; all for one rank."""
    return [slice(0, 5)] if world == 1 else [slice(0, 3), slice(3, 5)][rank : rank + 1]


def case_tensors(name, rank, world, base):
    """This rank's groups, advantages (B,), old and reference log-probabilities (M,), scored lengths (B,).

    base: the model's own log-probabilities of each completion.
    """
    [part] = share(rank, world)
    completions = slice(3 * part.start, 3 * part.stop)
    old = torch.cat([torch.tensor(b) + n for b, n in zip(base[completions], noise(1)[completions])])
    ref = torch.cat([torch.tensor(b) + n for b, n in zip(base[completions], noise(2)[completions])])
    return GROUPS[part], all_advantages()[completions], old, ref, scored_lengths(name)[completions]


def write_model(path, dtype=torch.float32, **overrides):
    """A tiny random model with the demo's tokenizer, as a Hugging Face folder."""
    special = {"pad_token_id": 256, "bos_token_id": None, "eos_token_id": 257}
    model = tiny_model("llama", **{"vocab_size": 261, **special, **overrides})
    model.to(dtype).save_pretrained(path)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(path)
    return str(path)


# --- Rewards, as --reward_funcs grpo_cases:.. ---


def upper(prompts, completions, **columns):
    """The share of letters that are capitals: a random model gets some right."""
    return [sum(c.isupper() for c in text) / max(len(text), 1) for text in completions]


def spread(prompts, completions, **columns):
    """Completions have different ones."""
    return [sum(map(ord, text)) % 11 / 2 for text in completions]


def by_column(prompts, completions, wanted, **columns):
    return [float(text.count(letter)) for text, letter in zip(completions, wanted, strict=True)]


def equal(prompts, completions, **columns):
    return [0.1] * len(completions)


def large(prompts, completions, **columns):
    return [2.0**24 + 1] * len(completions)  # no number of fp32


def wants_the_completion(prompts, completions, completion, **columns):
    return [0.0] * len(completions)


def raises(prompts, completions, **columns):
    return [1 / (len(prompt) - 3) for prompt in prompts]


def raises_on_the_second_rank(prompts, completions, **columns):
    """For a rollout; not for the single group that it is tried on before."""
    return [1.0 / (1 - int(os.environ["RANK"]) * (len(completions) > 3))] * len(completions)


def __getattr__(name):
    """A reward that rank 0 does not find."""
    if name == "not_on_the_first_rank" and os.environ.get("RANK") != "0":
        return equal
    raise AttributeError(f"no attribute {name}")


def takes_no_column(prompts, completions):
    return [0.0] * len(completions)


def takes_no_prompts(completions, answer):
    return [0.0] * len(completions)


async def waits(prompts, completions, **columns):
    return [0.0] * len(completions)


def returns_nothing(prompts, completions, **columns):
    pass
