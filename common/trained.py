"""What of a model is trained: parameters that require a gradient. A frozen one costs its weight, no more."""

from common import Refusal


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameter_groups(model, weight_decay):
    """What AdamW is given: matrices decay; biases and the scales of norms do not.

    Returns: those two groups, of trained parameters only: a checkpoint wants moments for all that is here.
    """
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        # under ZeRO-3 a rank's part of a matrix is a vector
        shape = getattr(parameter, "ds_shape", parameter.shape)
        decays = len(shape) > 1 and not name.endswith("bias")
        if parameter.requires_grad:
            (decayed if decays else kept).append(parameter)
    groups = {"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}
    return [group for group in groups if group["params"]]


def checkpoint_layers(model):
    """Keep layers' inputs only, and compute the rest again in backward; frozen first layers keep nothing."""
    newer = getattr(model, "activation_checkpointing_enable", None)  # its name in newer releases
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    # For the reentrant way, transformers makes the embedding's output require a gradient: backward would run
    # through every frozen layer, down to an embedding that is frozen as well.
    model.disable_input_require_grads()


def check_frozen(model, progress):
    """Note in `progress` what is frozen: a checkpoint does not hold it.

    Raises: ValueError if it is not what was frozen when a checkpoint with this progress was written.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    before = progress.setdefault("frozen", frozen)
    if frozen != before:
        name = min(set(frozen) ^ set(before))
        was, now = ("frozen", "trained") if name in before else ("trained", "frozen")
        raise Refusal(
            f"--resume_from_checkpoint: {name} was {was} when the checkpoint was written, and is {now} now. "
            "Freeze what was frozen then, or begin a new run from the trained model."
        )
