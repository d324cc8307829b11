"""Inputs that have to be refused: in one line, with code 2, without a traceback and before a file is touched.

ALL is a list of functions of an empty folder, in which they put what they need. Each returns: script, what is
wrong, the command's words, and words of the message that it has to end with.
"""

import json
import struct
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "demo/model"
SFT, DPO, GRPO = "sft_packing", "dpo_padding_free", "grpo_zero3"
CHECKPOINT = ["--max_steps=2", "--save_steps=1", "--max_length=64"]


def flags(script, words, expected):
    return lambda folder: (script, words, words.split(), expected)


def rows(script, name, lines, expected, words="", ending="jsonl"):
    """A dataset of these lines: dicts, or text as it is."""

    def write(folder):
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (folder / f"rows.{ending}").write_text(text + "\n")
        return script, name, [f"--dataset_name={folder}/rows.{ending}", *words.split()], expected

    return write


def copied_model(folder):
    """The demo's model in folder/model."""
    copy = folder / "model"
    copy.mkdir()
    for file in MODEL.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    return copy


def model(name, change, expected, script=SFT):
    """The demo's model in a folder, with something wrong."""

    def write(folder):
        copy = copied_model(folder)
        change(copy)
        return script, name, [f"--model_name_or_path={copy}"], expected

    return write


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def change_weights(folder, change):
    """Let `change` work on the header, a dict, and on the bytes behind it."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    [size] = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    change(header, data)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def says_more_than_there_is(header, data):
    header["model.norm.weight"]["data_offsets"][1] += 2**40


def lacks_a_weight(header, data):
    header["another.weight"] = header.pop("model.norm.weight")


def is_not_finite(header, data):
    start = header["model.norm.weight"]["data_offsets"][0]
    data[start : start + 2] = b"\xc0\x7f"  # NaN in bfloat16


def code_of_its_own(folder, **fields):
    """A model whose folder wants to run Python: that it did would show in a file."""
    change_config(folder, **fields)
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w').close()\n")


def pickled(folder):
    """Weights that would run code as they are unpickled."""
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(folder.parent / "ran"), "w"))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def template(text):
    def change(folder):
        (folder / "chat_template.jinja").write_text(text)

    return change


def resumed(name, change, expected):
    """A checkpoint of a run of two steps, in which something was changed."""

    def write(folder):
        from soak import start

        words = [*CHECKPOINT, f"--output_dir={folder}/run"]
        assert start(SFT, words, folder / "first.log").wait() == [0]
        change(folder / "run/checkpoint-1")
        (folder / "first.log").unlink()
        latest = f"--resume_from_checkpoint={folder}/run/checkpoint-1"
        return SFT, name, [*words, latest, f"--output_dir={folder}/out"], expected

    return write


def changed_byte(folder):
    file = next(folder.glob("shard-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[20] ^= 0xFF  # in the header
    file.write_bytes(bytes(content))


def another_runs_progress(folder):
    (folder / "progress.json").write_text(json.dumps({"step": 1, "loss": 2.0}))


def changed_progress(folder, **fields):
    progress = json.loads((folder / "progress.json").read_text())
    (folder / "progress.json").write_text(json.dumps(progress | fields))


def no_json(folder):
    (folder / "progress.json").write_text("{")


def taken(folder):
    (folder / "out").mkdir()
    (folder / "out/metrics.jsonl").write_text("mine\n")
    return SFT, "an output folder with a user's files", [f"--output_dir={folder}/out"], "a user's"


def the_models_own(folder):
    copy = copied_model(folder)
    words = [f"--model_name_or_path={copy}", f"--output_dir={copy}"]
    return SFT, "the base model's folder as output", words, "would replace the model"


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}

ALL = [
    # flags
    flags(SFT, "--max_lenght=64", "unknown arguments: --max_lenght=64"),
    flags(SFT, "--max_length=1", "--max_length is 1"),
    flags(SFT, "--max_length=4096", "over the model's"),
    flags(SFT, "--packing_strategy=bdf", "invalid choice"),
    flags(SFT, "--learning_rate=nan", "--learning_rate is nan"),
    flags(SFT, "--learning_rate=-1e-4", "--learning_rate is -0.0001"),
    flags(SFT, "--num_train_epochs=0", "--num_train_epochs is 0.0"),
    flags(SFT, "--max_steps=0", "--max_steps 0"),
    flags(SFT, "--eval_steps=2", "--eval_steps needs --eval_dataset_name"),
    flags(SFT, "--warmup_steps=3 --lr_scheduler_type=constant", "needs --lr_scheduler_type"),
    flags(SFT, "--overflow=split --packing_strategy=wrapped --no_packing", "needs packing"),
    flags(SFT, "--overflow=drop --packing_strategy=wrapped", "drop one"),
    flags(SFT, "--no_padding_free", "add --no_packing"),
    flags(SFT, "--attn_implementation=varlen --no_packing --no_padding_free", "is for flat rows"),
    flags(SFT, "--attn_implementation=flash_attention_2", "rejects fp32"),
    flags(SFT, "--use_liger_kernel", "torch sees none"),
    flags(SFT, "--torch_compile --use_liger_kernel", "drop one of the two"),
    flags(SFT, "--gpu_memory_gib=80", "add --dry_run"),
    flags(SFT, "--resume_from_checkpoint=latest", "no checkpoint in"),
    flags(SFT, "--resume_from_checkpoint=/nowhere/checkpoint-3", "not a folder checkpoint-<step>"),
    flags(SFT, "--output_dir=/proc/nowhere/run", "cannot be written"),
    flags(SFT, "--report_to=clearml", "choose none, or of"),
    flags(SFT, "--dataset_name=demo/prompts.jsonl", "wanted: messages"),
    flags(DPO, "--loss_type=kto", "choose one of sigmoid"),
    flags(DPO, "--beta=0", "beta is 0.0"),
    flags(DPO, "--label_smoothing=0.5", "label_smoothing is 0.5"),
    flags(DPO, "--loss_type=ipo --label_smoothing=0.1", "not defined for loss_type ipo"),
    flags(DPO, "--max_prompt_length=512 --max_length=512", "leaves no room"),
    flags(DPO, "--max_tokens_per_batch=10", "takes"),
    flags(DPO, "--max_tokens_per_batch=999 --per_device_train_batch_size=2", "both size a batch"),
    flags(GRPO, "--per_device_train_batch_size=9", "not a multiple of --num_generations"),
    flags(GRPO, "--temperature=0", "--temperature is 0.0"),
    flags(GRPO, "--top_p=1.5", "--top_p is 1.5"),
    flags(GRPO, "--reward_funcs=best", "choose last_word"),
    flags(GRPO, "--reward_funcs=nowhere:score", "nowhere"),
    flags(GRPO, "--offload_param", "add --offload_optimizer"),
    flags(GRPO, "--gather_budget_gib=1 --no_ds3_gather_for_generation", "drop one"),
    flags(GRPO, "--num_iterations=2 --max_steps=3", "multiple of --num_iterations 2"),
    flags(GRPO, "--activation_offloading --no_gradient_checkpointing", "drop --no_gradient_checkpointing"),
    # data
    flags(SFT, "--dataset_name=/nowhere/rows.jsonl", "does not exist"),
    rows(SFT, "an empty file", [], "is empty"),
    rows(SFT, "half a line of JSON", [{"text": "a"}, '{"text": "b'], "line 2"),
    rows(SFT, "a line that is no object", [{"text": "a"}, "3"], "line 2"),
    rows(SFT, "other columns", [{"question": "a"}], "wanted: messages"),
    rows(SFT, "a number for a text", [{"text": "a"}, {"text": 3}], "text"),
    rows(SFT, "an empty text", [{"text": "a"}, {"text": None}], "example 1"),
    rows(SFT, "a chat without content", [{"messages": [{"role": "user"}]}], "example 0"),
    rows(SFT, "images in a chat", [{"messages": CHAT, "images": ["a.png"]}], "images"),
    rows(SFT, "a message of another weight", [{"messages": [CHAT[0], CHAT[1] | {"weight": 0}]}], "weight"),
    rows(SFT, "an empty text alone", [{"text": ""}], "no example with a scored token"),
    rows(SFT, "a line of 50 MB that is no JSON", ["x" * 50_000_000], "line 1"),
    rows(DPO, "no rejected", [{"prompt": "a", "chosen": "b"}], "wanted: chosen and rejected"),
    rows(DPO, "equal answers alone", [PAIR | {"rejected": "b"}] * 2, "no pair whose completions differ"),
    rows(DPO, "a chat that ends with a question", [{"chosen": CHAT[:1], "rejected": CHAT}], "no answer"),
    rows(GRPO, "no prompt", [{"text": "a"}], "wanted: prompt"),
    rows(GRPO, "an empty prompt", [{"prompt": "", "answer": "1"}], "prompt is empty"),
    rows(GRPO, "no answer", [{"prompt": "a"}], "answer", "--reward_funcs=last_word"),
    # models
    flags(SFT, "--model_name_or_path=/nowhere", "no such folder"),
    model("no configuration", lambda folder: (folder / "config.json").unlink(), "cannot be loaded"),
    model(
        "a quantised model", partial(change_config, quantization_config={"quant_method": "awq"}), "quantised"
    ),
    model("a header that lies", partial(change_weights, change=says_more_than_there_is), "cannot be loaded"),
    model(
        "a file without a weight",
        partial(change_weights, change=lacks_a_weight),
        "lack 1 of the model's weights",
    ),
    model("a weight that is not finite", partial(change_weights, change=is_not_finite), "finite"),
    model(
        "a configuration with code of its own",
        partial(code_of_its_own, model_type="mine", auto_map={"AutoConfig": "evil.C"}),
        "run code of its own",
    ),
    model(
        "a model with code of its own",
        partial(code_of_its_own, model_type="t5", auto_map={"AutoModelForCausalLM": "evil.M"}),
        "run code of its own",
    ),
    model(
        "attention from the Hub",
        partial(change_config, _attn_implementation="kernels-community/none"),
        "would be downloaded and run",
    ),
    model("pickled weights", pickled, "no model.safetensors"),
    model("a template that opens a file", template("{% include '/etc/passwd' %}"), "template"),
    model("a template that reaches for Python", template("{{ ''.__class__.__mro__ }}"), "template"),
    # checkpoints and folders
    taken,
    the_models_own,
    resumed("a checkpoint with a changed byte", changed_byte, "checkpoint-1"),
    resumed("a progress.json from elsewhere", another_runs_progress, "earlier version"),
    resumed("a progress.json of another run", partial(changed_progress, data="x"), "this run's differ"),
    resumed("a progress.json that is none", no_json, "checkpoint-1"),
    resumed("a step beyond the end", partial(changed_progress, step=9), "past --max_steps"),
]
