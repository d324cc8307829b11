"""The benchmarks' arithmetic, and the pages against what was measured. Nothing is measured here."""

import json
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import against_trl  # noqa: E402
import cases  # noqa: E402
import figures  # noqa: E402
import harness  # noqa: E402
import ladder  # noqa: E402
import packing  # noqa: E402
import tables  # noqa: E402

import sft_packing  # noqa: E402
from common.sharding import load_model, read_pretrained  # noqa: E402

NEEDED = {"what", "device", "hardware", "threads", "versions", "commit", "command", "date", "model", "cases"}


def options(device="cpu", **more):
    defaults = {"device": device, "quick": False, "repeats": 3, "warm_up": 0, "examples": 0}
    return SimpleNamespace(**defaults | more)


# --- 1. Repetitions ---


def test_ways_take_turns_and_the_warm_up_does_not_count():
    calls = []

    def way(name):
        calls.append(name)
        return {"loss": len(calls)}

    runs = harness.alternate({"a": lambda: way("a"), "b": lambda: way("b")}, repeats=2)
    assert calls == ["a", "b"] * 3
    assert [run["loss"] for run in runs["a"]] == [3, 5] and [run["loss"] for run in runs["b"]] == [4, 6]
    assert all(run["seconds"] >= 0 for run in (*runs["a"], *runs["b"]))


def test_the_counted_step_comes_first_and_is_larger_on_a_cpu_unless_its_size_was_given():
    sizes = {"cpu": 2, "bytes": 4}
    assert against_trl.step_sizes(sizes, options()) == [4, 2, 2, 2]
    assert against_trl.step_sizes(sizes, options(examples=6)) == [6] * 4
    assert against_trl.step_sizes(sizes, options(quick=True)) == [2] * 4
    assert against_trl.step_sizes(sizes, options("cuda", warm_up=1, tokens=64)) == [64] * 5


def test_on_a_gpu_steps_are_filled_with_tokens(tmp_path):
    given = options("cuda", tokens=2000, warm_up=1, quick=False)
    sizes = against_trl.step_sizes({}, given)
    args = SimpleNamespace(max_length=1500)
    bench = against_trl.Bench(given, tmp_path, args, None, None, "lognormal", sizes)

    def examine(example):
        tokens = sum(len(message["content"]) for message in example["messages"])
        return (example, tokens) if tokens <= args.max_length else None

    file, steps, tokens = bench.choose("sft.jsonl", examine)
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    assert len(steps) == 5 and sum(steps, []) == list(range(len(rows)))
    found = [sum(examine(rows[i])[1] for i in step) for step in steps]
    assert found == tokens and max(tokens) <= 2000 and sum(tokens) > 5000
    lengths = [examine(row)[1] for row in harness.random_rows("sft") if examine(row)]
    assert 250 < np.median(lengths) < 600 and max(lengths) > 1400
    assert set(harness.random_rows("preferences", 1)[0]) == {"prompt", "chosen", "rejected"}


def test_a_ratio_is_the_median_of_the_pairs_not_the_ratio_of_the_medians():
    seconds = {"ours": (1, 2, 3), "theirs": (4, 4, 9)}
    runs = {way: [{"seconds": s, "note": "text"} for s in each] for way, each in seconds.items()}
    found = cases.case("demo", {"documents": 3}, runs, {"ours": {"peak_bytes": 7}})
    assert found["case"] == "demo" and found["setup"] == {"documents": 3}
    assert found["ways"]["ours"] == {"median": {"seconds": 2}, "repetitions": runs["ours"], "peak_bytes": 7}
    assert cases.ratio(found, "ours", "theirs") == {"median": 3, "min": 2, "max": 4, "pairs": 3}
    assert tables.times(found, "ours", "theirs") == "3 (2 to 4)"
    assert tables.times(found, "ours", "missing") == "not measured"


def test_ways_of_one_model_agree_and_are_counted_apart():
    """sft_packing.py's step, as every benchmark takes it: one model, padded with checkpointing, then flat."""
    given = options(repeats=2)
    flags = {"packing": False, "padding_free": False, "attn_implementation": "sdpa"}
    with harness.script_run(sft_packing, given, lambda *_: ROOT / "demo/model", **flags) as (_, args, run):
        model = load_model(args, run, read_pretrained(args.model_name_or_path))
        optimizer, _ = sft_packing.prepare_training(model, args, run)
        before, attention = [p.clone() for p in model.parameters()], []
        flat = sft_packing.Arguments(**vars(args) | {"padding_free": True, "attn_implementation": None})
        flat.gradient_checkpointing = False

        def watched(step, batches):
            result = step(batches)
            attention.append(model.config._attn_implementation)
            assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before)), "weights moved"
            return result

        def sides():
            ways = {}
            for name, each in (("padded", args), ("flat", flat)):
                torch.manual_seed(0)  # the same documents for both
                steps = [[harness.random_batch([20, 9], 64, each.padding_free)] for _ in range(3)]
                ways[name] = harness.sft_way(each, run, model, optimizer, steps)
                ways[name].step = partial(watched, ways[name].step)
            return ways

        found = harness.measure("demo", {}, [sides], given, real_tokens=[29] * 3)
    padded, flat = (found["ways"][name] for name in ("padded", "flat"))
    assert attention == ["sdpa", "varlen"] + ["sdpa", "varlen"] * 2  # counted, then timed in turn
    assert max(found["disagreement"].values()) < 1e-5
    assert (padded["tokens_in_peak_step"], flat["tokens_in_peak_step"]) == (40, 29)
    assert flat["bytes"]["activations"] > padded["bytes"]["activations"]  # of whole layers
    last = flat["repetitions"][-1]
    assert last["real_tokens_per_second"] == pytest.approx(29 / last["seconds"])
    assert sum(p.numel() for p in model.parameters()) == 0, "a case's weights would stay in memory"


# --- 2. The L2 bound, and rows ---


def bound_by_definition(lengths, size):
    """Martello and Toth's L2, as it is defined."""
    bounds = []
    for alpha in range(size // 2 + 1):
        alone = [w for w in lengths if w > size - alpha]
        large = [w for w in lengths if size - alpha >= w and 2 * w > size]
        small = [w for w in lengths if 2 * w <= size and w >= alpha]
        space = len(large) * size - sum(large)
        bounds.append(len(alone) + len(large) + max(0, math.ceil((sum(small) - space) / size)))
    return max(bounds)


@given(st.integers(1, 20).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), min_size=1))))
def test_the_bound_is_the_definitions_and_no_plan_has_fewer_rows(given):
    size, lengths = given
    bound = packing.lower_bound(np.array(lengths), size)
    assert bound == bound_by_definition(lengths, size) <= len(sft_packing.plan_rows(lengths, size)[0]) - 1


def test_lost_tokens_are_counted_and_long_rows_refused():
    lengths = np.array([5, 4, 3])
    row_offsets, spans = sft_packing.plan_rows(lengths, packing.MAX_LENGTH)
    judged = packing.judge(lengths, packing.row_lengths((row_offsets, spans)))
    assert judged == {"rows": 1, "lower_bound": 1, "rows_over_bound": 0, "tokens_lost": 0}
    spans[spans[:, 0] == 1, 2] -= 2  # the second document loses two tokens
    assert packing.judge(lengths, packing.row_lengths((row_offsets, spans)))["tokens_lost"] == 2
    with pytest.raises(AssertionError, match="a row of"):
        packing.judge(lengths, np.array([packing.MAX_LENGTH + 1]))
    whole = packing.in_memory(lengths)
    assert packing.row_lengths(whole).tolist() == [5, 4, 3]


# --- 3. The longest length that fits ---


@given(end=st.integers(0, 5000), start=st.integers(1, 600), limit=st.integers(1, 4000))
def test_the_longest_length_that_fits_is_found(end, start, limit):
    tried = []

    def fits(length):
        tried.append(length)
        return length <= end

    found, best = ladder.longest(fits, start, limit), min(end, limit)
    if start > best:
        assert found == 0
    else:
        assert best - max(1, 0.03 * found) <= found <= best and found in tried
    assert max(tried, default=0) <= limit and len(tried) < 20


# --- 4. Pages and figures from the JSON ---


def test_the_pages_say_what_was_measured(tmp_path, monkeypatch):
    (readme, text), documents = (page.read_text() for page in tables.PAGES), cases.load()
    marks = list(tables.MARKED.finditer(text))
    assert {mark[2] for mark in marks} == tables.TABLES.keys() - {"headline"}
    assert "headline" in {mark[2] for mark in tables.MARKED.finditer(readme)}
    assert "headline" not in tables.differing(readme, documents)
    assert tables.differing(text, documents) == []
    # a letter changed by hand is found in each table, and by the command: 1, and 0 once it is written again
    for mark in marks:
        place = mark.start(3) - 4
        changed = text[:place] + "#" + text[place + 1 :]
        assert tables.differing(changed, documents) == [mark[2]]
    page = tmp_path / "page.md"
    page.write_text(changed)
    for arguments, code in ((["--check"], 1), ([], 0), (["--check"], 0)):
        monkeypatch.setattr(sys, "argv", ["tables.py", "--pages", str(page), *arguments])
        assert tables.main() == code
    assert page.read_text() == text
    shown = re.findall(r"\]\(([^)#]+)\)", text)
    assert shown and all((ROOT / "benchmarks" / path).exists() for path in shown)


def test_tables_and_figures_show_the_json_alone(tmp_path):
    once = {"peak_bytes": 2**30, "longest": 512}
    runs = {way: [{"seconds": s, "real_tokens_per_second": 1000 / s}] * 3 for way, s in (("a", 1), ("b", 2))}
    found = [cases.case("chats", {"memory_gib": 16.0}, runs, {"a": once, "b": once})]
    document = {"cases": found}
    assert "| b | 2 | 500 | 0.5 (0.5 to 0.5) | not measured | 1 |" in tables.steps(["a", "c"], document)
    assert "| chats | b | 512 | 2 | 1 |" in tables.ladder(document)
    assert figures.panels("sft", document)[1]["bars"] == {"a": 1000, "b": 500}
    assert figures.panels("ladder", document)[0]["bars"] == {"a": 512, "b": 512}
    for (what, device), held in cases.load().items():
        assert all(part in tables.TABLES[what]({(what, device): held}) for part in ("commit", held["date"]))
        for name, (measured, panels) in figures.PANELS.items():
            if measured == what:
                assert figures.panels(name, held) == panels(held), "a panel without anything in it"
                assert (figures.FIGURES / f"{name}-{device}.png").exists()
    assert tables.TABLES["sft"]({}) == "*sft: not measured*"
    code = "import sys; sys.path.insert(0, 'benchmarks'); import cases, figures, tables"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, check=True)  # the standard library alone
    pytest.importorskip("matplotlib")
    for name in ("sft", "packing"):  # bars, curves
        figures.draw(figures.panels(name, cases.load()[name, "cpu"]), "a caption", tmp_path / "drawn.png")
        assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


# --- 5. What a JSON file holds ---


def test_a_file_holds_what_a_reader_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/demo.py", "--quick"])
    given = options(quick=True, results=tmp_path, commit="abc1234")
    once = {"longest": 5, "peak_bytes": 7}
    made = cases.case("demo", {}, {"a": [{"seconds": 1}]}, {"a": once})
    harness.write("ladder", given, "folder/name", [made])
    found = json.loads((tmp_path / "ladder-quick.json").read_text())
    assert found["command"] == "python benchmarks/demo.py --quick" and found["model"] == "name"
    assert cases.load(tmp_path) == {("ladder", "cpu"): found}
    measured = cases.load()
    for document in (found, *measured.values()):
        assert document.keys() == NEEDED and all(document[name] for name in NEEDED - {"model"})
        assert {"python", "torch", "transformers"} <= set(document["versions"])
        for way in (way for one in document["cases"] for way in one.get("ways", {}).values()):
            seconds = [run["seconds"] for run in way["repetitions"]]
            assert 0 < min(seconds) <= way["median"]["seconds"] <= max(seconds)
        assert str(Path.home()) not in json.dumps(document) and "/tmp/" not in json.dumps(document)
    names = {path.stem for path in cases.RESULTS.glob("*.json")}
    assert names == {f"{what}-{device}" for what, device in measured}
