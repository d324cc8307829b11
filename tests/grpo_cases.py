"""Prompts, groups, loss settings and rewards that the ranks and the naive computation share."""

import os

import torch
from helpers import DEMO_MODEL
from transformers import AutoTokenizer

LIMIT = 32
BUCKET = 10_000  # elements, where the bytes of a model of a hundred thousand are counted
PROMPTS = (
    ["What is 8 plus 8?", "9 - 6 = ?", "Add 2 and 4."],
    ["Take 7 from 8.", "Add up 3, 1, 4, 2, 5.", "How many letters e are in rem?"],
)
LOSS_CASES = {
    **{loss_type: {"loss_type": loss_type} for loss_type in ("dapo", "grpo", "bnpo", "dr_grpo")},
    "kl": {"loss_type": "dapo", "beta": 0.3},
    "clip": {"loss_type": "grpo", "epsilon": 0.05, "epsilon_high": 0.4},
    "temperature": {"loss_type": "dapo", "temperature": 0.7},
    "on_policy": {"loss_type": "dapo", "num_iterations": 1},
    "masked": {"loss_type": "bnpo"},
    "masked_grpo": {"loss_type": "grpo"},
    "masked_dr_grpo": {"loss_type": "dr_grpo"},
}


def prompt_ids(rank):
    """Odd ranks' completions are longer: the ranks stop at different lengths."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    chats = [[{"role": "user", "content": text}] for text in PROMPTS[rank % 2]]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True)["input_ids"]


def groups():
    """Five prompts with three completions each; one token, a whole length, and everything in between."""
    generator = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(0, 250, (length,), generator=generator).tolist()

    lengths = [(5, [1, 9, 4]), (1, [3, 1, 2]), (8, [9, 9, 9]), (3, [2, 7, 1]), (6, [1, 1, 1])]
    return [(ids(prompt), [ids(length) for length in completions]) for prompt, completions in lengths]


GROUPS = groups()


def case_tensors(name, rank, world, base):
    """This rank's groups; of each completion: advantage, old and reference log-probabilities, scored length.

    Three groups are rank 0's and two rank 1's; all are one rank's. In the masked cases some completions, and
    one whole group, have no scored tokens. base: the model's own log-probabilities of each completion.
    """
    part = slice(0, 5) if world == 1 else (slice(0, 3), slice(3, 5))[rank]
    mine = slice(3 * part.start, 3 * part.stop)

    def differing(seed):
        generator = torch.Generator().manual_seed(seed)
        return [torch.tensor(b) + torch.randn(len(b), generator=generator) * 0.3 for b in base][mine]

    lengths = torch.tensor([len(logps) for logps in base])
    if name.startswith("masked"):
        lengths[[0, 4, 6, 7, 8]] = 0
    advantages = torch.randn(15, generator=torch.Generator().manual_seed(7))
    return GROUPS[part], advantages[mine], differing(1), differing(2), lengths[mine]


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


def returns_nothing(prompts, completions, **columns):
    pass
