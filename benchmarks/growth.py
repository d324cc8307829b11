"""Growth of an SFT step of sft_packing.py: with tokens in a row, and with documents in a row.

Few layers keep this short on a CPU: SmolLM2-135M's, random, over the demo's vocabulary. A row of whole
documents should cost the same for each token however long it is, and less the more documents share it.

python benchmarks/growth.py [--device cuda] [--quick]
"""

from dataclasses import replace

from harness import ROOT, measure, parse, random_batch, random_model, script_run, sft_way, write
from transformers import AutoTokenizer

import sft_packing
from common.sharding import read_pretrained

LAYERS = {"cpu": 4, "cuda": 30}
TOKENS = {"cpu": (512, 2048, 8192), "cuda": (512, 1024, 2048, 4096, 8192, 16384, 32768)}
DOCUMENT = 256  # tokens of each document where the row grows
ROW = {"cpu": 2048, "cuda": 8192}  # tokens of the row where its documents grow in number
DOCUMENTS = (1, 4, 16)


def small_model(options, scratch):
    """SmolLM2-135M's width, few layers and the demo's vocabulary."""
    layers = 2 if options.quick else LAYERS[options.device]
    changes = {"num_hidden_layers": layers, "max_position_embeddings": max(TOKENS["cuda"])}
    changes["vocab_size"] = len(AutoTokenizer.from_pretrained(ROOT / "demo/model"))
    return random_model("SmolLM2-135M", f"{scratch}/small", **changes)


def grow(axis, setup, args, run, tokens, documents, attentions, options):
    """One case: a row of so many tokens and documents, with each attention."""

    def ways():
        pretrained = read_pretrained(args.model_name_or_path)
        model = sft_packing.load_model(args, run, pretrained)
        optimizer, _ = sft_packing.prepare_training(model, args, run)
        batch = random_batch([tokens // documents] * documents, pretrained.vocab_size)
        steps = [[batch]] * (1 + options.warm_up + options.repeats)
        chosen = {name: replace(args, attn_implementation=name) for name in attentions}
        return {name: sft_way(each, run, model, optimizer, steps) for name, each in chosen.items()}

    found = measure(f"{axis}: {setup[axis.split()[0]]:,}", {"axis": axis, **setup}, [ways], options)
    for values in found["ways"].values():
        values["seconds_per_token"] = values["median"]["seconds"] / tokens
        values["bytes_per_token"] = values["peak_bytes"] / tokens
        values["activation_bytes_per_token"] = values["bytes"]["activations"] / tokens
    return found


def main():
    options = parse(__doc__)
    lengths = (256, 512) if options.quick else TOKENS[options.device]
    numbers, length = ((1, 4), 256) if options.quick else (DOCUMENTS, ROW[options.device])
    cases, dtype = [], "bf16" if options.device == "cuda" else "fp32"
    with script_run(sft_packing, options, small_model, bf16=dtype == "bf16") as (_, args, run):
        layers = read_pretrained(args.model_name_or_path).config.num_hidden_layers
        setup, model = {"layers": layers, "width": 576, "dtype": dtype}, f"random Llama of {layers} layers"
        for n in lengths:
            sizes = {"tokens": n, "tokens_per_document": DOCUMENT, **setup}
            cases.append(grow("tokens per row", sizes, args, run, n, n // DOCUMENT, ["varlen"], options))
        for n in numbers:
            sizes, attentions = {"documents": n, "tokens": length, **setup}, ["varlen", "sdpa"]
            cases.append(grow("documents per row", sizes, args, run, length, n, attentions, options))
    write("growth", options, f"{model}, width 576", cases, reads=())


if __name__ == "__main__":
    main()
