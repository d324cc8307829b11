"""Fields of a script's Arguments, and the refusal of values that contradict each other."""

from dataclasses import field


def flag(default, text):
    return field(default=default, metadata={"help": text})


def refuse(wrong, message):
    if wrong:
        raise ValueError(message)
