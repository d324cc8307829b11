"""The benchmarks' arithmetic, and README against what was measured. Nothing is measured here."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
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

from sft_packing import plan_rows  # noqa: E402

NEEDED = {"what", "device", "hardware", "threads", "versions", "commit", "command", "date", "model", "cases"}
MEASURED = {name: make for name, make in tables.TABLES.items() if not name.startswith("flags")}


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


def options(device="cpu", quick=False):
    return SimpleNamespace(device=device, quick=quick, repeats=3)


def test_the_counted_step_is_the_one_made_for_it_or_the_largest():
    assert against_trl.plan_steps(options(), 2, 3) == [[0, 1], [2, 3], [4, 5], [6, 7, 8]]
    assert against_trl.count_in_step([9, 5, 9, 4], slice(0, 3)) == 3
    assert against_trl.plan_steps(options("cuda"), 1) == [[0], [1], [2], [3]]
    assert against_trl.count_in_step([5, 1, 8, 3], slice(1, 4)) == 2


def test_a_step_of_its_own_is_counted_on_a_cpu_unless_its_size_was_given():
    sizes = {"cpu": 2, "cuda": 8, "bytes": 4}
    assert against_trl.step_sizes(sizes, 0, options()) == (2, 4)
    assert against_trl.step_sizes(sizes, 6, options()) == (6, None)
    assert against_trl.step_sizes(sizes, 0, options(quick=True)) == (2, None)
    assert against_trl.step_sizes(sizes, 0, options("cuda")) == (8, None)


def two_ways():
    """A case in which "ours" takes 1, 2 and 3 seconds where "theirs" takes 4, 4 and 9."""
    runs = {
        way: [{"seconds": s, "note": "text"} for s in seconds]
        for way, seconds in (("ours", (1, 2, 3)), ("theirs", (4, 4, 9)))
    }
    return cases.case("demo", {"documents": 3}, runs, {"ours": {"peak_bytes": 7}})


def test_a_case_holds_medians_repetitions_and_what_was_counted_once():
    found = two_ways()
    assert found["case"] == "demo" and found["setup"] == {"documents": 3}
    assert found["ways"]["ours"]["median"] == {"seconds": 2} and found["ways"]["ours"]["peak_bytes"] == 7
    assert [run["seconds"] for run in found["ways"]["theirs"]["repetitions"]] == [4, 4, 9]


def test_a_ratio_is_the_median_of_the_pairs_not_the_ratio_of_the_medians():
    expected = {"median": 3, "min": 2, "max": 4, "pairs": 3}
    assert cases.ratio(two_ways(), "ours", "theirs") == expected
    assert tables.times(two_ways(), "ours", "theirs") == "3 (2 to 4)"
    assert tables.times(two_ways(), "ours", "missing") == "not measured"


# --- 2. The L2 bound ---


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


def fewest_rows(lengths, size):
    """The fewest rows of any packing, by trying every row for every item."""
    best = len(lengths)

    def place(left, rows):
        nonlocal best
        if len(rows) >= best:
            return
        if not left:
            best = len(rows)
            return
        for i in range(len(rows)):
            if rows[i] + left[0] <= size:
                place(left[1:], [*rows[:i], rows[i] + left[0], *rows[i + 1 :]])
        place(left[1:], [*rows, left[0]])

    place(sorted(lengths, reverse=True), [])
    return best


@given(st.integers(1, 20).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), min_size=1))))
def test_the_bound_is_the_definitions(given):
    size, lengths = given
    assert packing.lower_bound(np.array(lengths), size) == bound_by_definition(lengths, size)


small = st.integers(1, 12).flatmap(
    lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), min_size=1, max_size=7))
)


@given(small)
def test_no_packing_has_fewer_rows_than_the_bound(given):
    size, lengths = given
    fewest = fewest_rows(lengths, size)
    assert packing.lower_bound(np.array(lengths), size) <= fewest <= len(plan_rows(lengths, size)[0]) - 1


def test_lost_tokens_are_counted_and_long_rows_refused():
    lengths = np.array([5, 4, 3])
    row_offsets, spans = plan_rows(lengths, packing.MAX_LENGTH)
    assert packing.check_ours(lengths, (row_offsets, spans))["tokens_lost"] == 0
    spans[spans[:, 0] == 1, 2] -= 2  # the second document loses two tokens
    assert packing.check_ours(lengths, (row_offsets, spans))["tokens_lost"] == 2
    spans[0, 2] += packing.MAX_LENGTH
    with pytest.raises(AssertionError, match="a row of"):
        packing.check_ours(lengths, (row_offsets, spans))


# --- 3. The longest length that fits ---


@given(
    end=st.integers(0, 5000),
    start=st.integers(1, 600),
    limit=st.integers(1, 4000),
    flat=st.integers(0, 4000),
    bend=st.floats(0.5, 2),
)
def test_the_longest_length_that_fits_is_found(end, start, limit, flat, bend):
    tried = []

    def peak_bytes(length):
        tried.append(length)
        # weights and optimizer hide the activations of short documents; those need not grow in a line
        return max(flat, length**bend) if length <= end else None

    found = ladder.longest(peak_bytes, start, limit, available=max(flat, end**bend), precision=0.03)
    best = min(end, limit)
    if start > best:
        assert found == 0
    else:
        assert best - max(1, 0.03 * found) <= found <= best and found in tried
    assert max(tried, default=0) <= limit and len(tried) < 40


def test_a_straight_line_is_followed_to_its_end():
    tried = []

    def peak_bytes(length):
        tried.append(length)
        return 1000 + 3 * length if length <= 100_000 else None

    assert 97_000 <= ladder.longest(peak_bytes, 256, 10**6, available=301_000) <= 100_000
    assert len([length for length in tried if length > 10_000]) <= 6  # the costly ones


def test_the_ladder_refuses_a_cpu(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ladder.py"])
    with pytest.raises(SystemExit, match="--device cuda"):
        ladder.main()


# --- 4. README and figures from the JSON ---


def document(what, found, device="cpu"):
    head = {"hardware": f"a {device}", "threads": 2, "versions": {"torch": "2.13.0"}}
    rest = {
        "commit": "abc1234",
        "command": f"python benchmarks/{what}.py",
        "date": "2026-01-01",
        "model": "M",
    }
    return {"what": what, "device": device, **head, **rest, "cases": found}


def runs(seconds, **more):
    return [{"seconds": s, **more} for s in seconds]


def steps(*ways):
    """A comparison of training steps: the first way takes 1 s, the second 2 s, and so on."""
    repetitions = {
        way: runs([i + 1] * 3, real_tokens_per_second=1000 / (i + 1)) for i, way in enumerate(ways)
    }
    once = {way: {"peak_bytes": (i + 1) * 2**30} for i, way in enumerate(ways)}
    return [cases.case("chats", {"documents_per_step": 4}, repetitions, once)]


def measurements():
    """One small document of each kind, with numbers that are easy to find again."""
    once = {"rows": 10, "rows_over_bound": 0.0123, "tokens_lost": 0}
    planned = {"ours": runs([0.5, 0.5]), "TRL": runs([50, 50])}
    lengths = [
        cases.case(
            f"lognormal, {n}", {"lengths": "lognormal", "documents": n}, planned, dict.fromkeys(planned, once)
        )
        for n in (10, 100)
    ]
    heads = {"three products": runs([2, 2]), "nll_sum": runs([3, 3], loss=1.5)}
    growth = [
        cases.case(
            f"{axis} {x}",
            {"axis": axis, key: x},
            {"varlen": runs([x], seconds_per_token=x, tokens_per_second=1 / x)},
            {"varlen": {"bytes_per_token": x, "activation_bytes_per_token": x, "peak_bytes": x}},
        )
        for axis, key in (
            ("tokens per row", "tokens"),
            ("documents per row", "documents"),
            ("ranks", "ranks"),
        )
        for x in (2, 1)
    ]
    told = {"gathered_bytes_per_token": 2**20, "peak_whole_bytes": 2**21, "same_tokens_on_all_ranks": True}
    rolled = {"all": runs([3], seconds_per_token=0.125), "none": runs([4], seconds_per_token=0.25)}
    rolled_8 = {**rolled, "hooks": runs([8], seconds_per_token=0.5)}
    shares = {"all": {**told, "resident_share": 1}, "none": {**told, "resident_share": 0}, "hooks": told}
    generated = [
        cases.case(f"{n} sequences", {"sequences": n}, ways, shares)
        for n, ways in ((8, rolled_8), (1, rolled))
    ]
    rungs = {"plain": runs([4]), "+ bf16": runs([5])}
    reached = {way: {"longest": 512, "peak_bytes": 2**30} for way in rungs}
    told_of = {"predicted_bytes": 2**30, "peak_bytes": 2**31}
    found = {
        "ladder": [cases.case("0.6B", {"memory_gib": 16.0}, rungs, reached)],
        "dry_runs": [cases.case("a.py", {"max_length": 256}, {"packed": runs([5])}, {"packed": told_of})],
        "packing": lengths,
        "loss_head": [cases.case("fp32", {}, heads, {"nll_sum": {"peak_bytes": 2**20}})],
        "growth": growth,
        "generation": generated,
        "sft": steps("packed + checkpointing", "padded", "TRL padded"),
        "dpo": steps("shared", "padded", "TRL padded"),
        "grpo_update": steps("shared", "TRL"),
    }
    return {(what, "cpu"): document(what, held) for what, held in found.items()}


def block(text, name):
    return next(m[0] for m in tables.MARKED.finditer(text) if m[2] == name)


def test_readme_says_what_was_measured_and_what_the_scripts_take():
    text = (ROOT / "README.md").read_text()
    assert tables.differing(text, cases.load()) == []
    assert {m[2] for m in tables.MARKED.finditer(text)} == set(tables.TABLES)


def test_tables_show_the_measurements():
    empty = "\n".join(f"<!-- table: {name} -->\n<!-- end -->" for name in MEASURED)
    text = tables.filled(empty, measurements())
    assert "| packed + checkpointing | 1 | 1,000 | 3 (3 to 3) | not measured | 1 |" in block(text, "sft")
    assert "| TRL | 2 | 500 | 1 | not measured | 2 |" in block(text, "grpo")
    assert "| lognormal, 10 | 0.5 | 50 | not measured | 100 (100 to 100) | 1.23% |" in block(text, "packing")
    assert "| fp32 | nll_sum | 1.5 | 3 | 1 | 1.500000 |" in block(text, "loss_head")
    assert "| none | 0.25 | not measured | 4 | 1 | 2 | yes |" in block(text, "generation")
    assert "| 0.6B | + bf16 | 512 | 5 | 1 |" in block(text, "ladder")
    assert "| `a.py` | packed | 1 | 2 | -50.0% | 5 |" in block(text, "dry_runs")
    assert "| 2 | 1 | 3 | 500 | 1,000 | 333 |" in block(text, "headline")
    assert "| not measured | 1 | 2 | not measured | 1,000 | 500 |" in block(text, "headline")
    for name in MEASURED:
        assert all(part in block(text, name) for part in ("a cpu", "torch 2.13.0", "commit abc1234", "M"))
        assert tables.TABLES[name]({}).count("not measured") >= 1


@pytest.mark.parametrize("name", MEASURED)
def test_a_number_changed_by_hand_is_found(name, tmp_path, monkeypatch):
    found = measurements()
    text = tables.filled(f"<!-- table: {name} -->\n<!-- end -->", found)
    assert tables.differing(text, found) == []
    last = max(i for i, letter in enumerate(text.split("\n*")[0]) if letter.isdigit())
    changed = text[:last] + str((int(text[last]) + 1) % 10) + text[last + 1 :]
    assert tables.differing(changed, found) == [name]
    # and by the command: 1 for the changed file, 0 once it is written again
    for (what, device), held in found.items():
        (tmp_path / f"{what}-{device}.json").write_text(json.dumps(held))
    (tmp_path / "README.md").write_text(changed)
    command = ["tables.py", "--results", str(tmp_path), "--readme", str(tmp_path / "README.md")]
    for arguments, code in ((["--check"], 1), ([], 0), (["--check"], 0)):
        monkeypatch.setattr(sys, "argv", command + arguments)
        assert tables.main() == code
    assert (tmp_path / "README.md").read_text() == text


def test_figures_are_made_of_the_json_alone():
    found = measurements()
    of = {name: figures.panels(name, found[what, "cpu"]) for name, (what, _) in figures.PANELS.items()}
    assert of["packing"][0]["curves"] == {"ours": [(10, 0.5), (100, 0.5)], "TRL": [(10, 50), (100, 50)]}
    assert of["growth_tokens"][0]["curves"] == {"varlen": [(1, 1000), (2, 2000)]}
    assert of["growth_documents"][1]["curves"] == {"varlen": [(1, 2**-30), (2, 2**-29)]}
    assert of["ranks"][0]["bars"] == {"1 rank(s)": 1, "2 rank(s)": 0.5}
    assert of["sft"][0]["bars"] == {"packed + checkpointing": 1, "padded": 2, "TRL padded": 3}
    assert of["grpo"][1]["bars"] == {"shared": 1000, "TRL": 500}
    points = [(0, 0.25), (1, 0.125)]
    assert of["generation"][0]["curves"] == {"8 sequences": points, "1 sequences": points}
    batch = {"all": [(1, 0.125), (8, 0.125)], "none": [(1, 0.25), (8, 0.25)]}
    assert of["generation"][1]["curves"] == batch
    assert all(of.values())


def test_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    shown = figures.panels("sft", measurements()["sft", "cpu"])
    figures.draw(shown, "a caption", tmp_path / "sft.png")
    assert (tmp_path / "sft.png").read_bytes().startswith(b"\x89PNG")


def test_tables_and_figures_need_the_standard_library_only():
    code = "import sys; sys.path.insert(0, 'benchmarks'); import cases, figures, tables"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, check=True)


# --- 5. What a JSON file holds ---


def assert_complete(found):
    assert found.keys() == NEEDED
    assert all(found[name] for name in NEEDED - {"model"})
    assert {"python", "torch", "transformers"} <= set(found["versions"])
    for ways in (one["ways"] for one in found["cases"]):
        for values in ways.values():
            assert values["repetitions"] and values["median"]["seconds"] > 0
            measured = [run["seconds"] for run in values["repetitions"]]
            assert min(measured) <= values["median"]["seconds"] <= max(measured)


def test_the_harness_writes_what_a_reader_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/demo.py", "--quick"])
    for name in ("BENCH_MODEL", "BENCH_DATA"):
        monkeypatch.delenv(name, raising=False)
    options = SimpleNamespace(device="cpu", quick=True, results=tmp_path)
    harness.write("demo", options, "folder/name", [two_ways()])
    found = json.loads((tmp_path / "demo-quick.json").read_text())
    assert_complete(found)
    assert found["command"] == "python benchmarks/demo.py --quick" and found["model"] == "name"
    assert cases.load(tmp_path) == {("demo", "cpu"): found}
    # an interrupted measurement neither replaces a whole one nor is taken for it
    harness.write("demo", options, "folder/name", [], complete=False)
    assert cases.load(tmp_path) == {("demo", "cpu"): found}
    harness.write("demo", options, "folder/name", [two_ways()])
    assert [path.name for path in tmp_path.iterdir()] == ["demo-quick.json"]


def test_every_result_is_complete():
    for found in cases.load().values():
        assert_complete(found)
        assert str(Path.home()) not in json.dumps(found) and "/tmp/" not in json.dumps(found)
    names = {path.stem for path in cases.RESULTS.glob("*.json")}
    assert names == {f"{what}-{device}" for what, device in cases.load()}


def test_figures_in_readme_are_there():
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert shown and all((ROOT / path).exists() for path in shown)
