"""What the three scripts share, and the error that all of it raises."""


class Refusal(ValueError):
    """What the user asked for cannot be done; the message names the value, the limit and the remedy.

    A class of its own, so that a script's end can tell it from a mistake in the script: a refusal is shown as
    one line, everything else with its traceback.
    """


def refuse(wrong, message):
    """Raise Refusal(message) if `wrong` is true."""
    if wrong:
        raise Refusal(message)
