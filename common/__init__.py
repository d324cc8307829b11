"""What the three scripts share: the error that all of it raises, and text as wide as the terminal."""

import shutil
import textwrap


class Refusal(ValueError):
    """What the user asked for cannot be done; the message names the value, the limit and the remedy.

    A class of its own, so that a script's end can tell it from a mistake in the script: a refusal is shown as
    one line, everything else with its traceback.
    """


def refuse(wrong, message):
    """Raise Refusal(message) if `wrong` is true."""
    if wrong:
        raise Refusal(message)


def terminal_width():
    """Columns; 110 where there is no terminal."""
    return shutil.get_terminal_size((110, 24)).columns


def wrapped(text, indent=""):
    """text in lines of the terminal's width; no path or flag is torn apart."""
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, terminal_width(), subsequent_indent=indent, **options)
