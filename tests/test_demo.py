"""The demo's files: well-formed, reproducible, right where they say so, and nothing held out leaks."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import make

DEMO = Path(make.__file__).parent
FILES = ["sft.jsonl", "sft_eval.jsonl", "preferences.jsonl", "prompts.jsonl"]


def read(name):
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]


def prompts_of(name):
    """Each row's messages up to its last question."""
    return [row["prompt"] if "prompt" in row else row["messages"][:-1] for row in read(name)]


def solve(messages):
    """The right answer to the last question, worked out from its wording: independent of demo/make.py."""
    question = messages[-1]["content"]
    words = re.sub(r"\bare\b|\bin\b|[?.:,]", " ", question.lower()).split()
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    subtract = re.search(r"minus|take|less|subtract|\d - \d", question.lower())
    if len(numbers) == 1:
        previous = int(make.extract_answer(messages[-2]["content"]))
        return str(previous - numbers[0] if subtract else previous + numbers[0])
    if re.search("larger|maximum|bigger", question):
        return str(max(numbers))
    if numbers and subtract:
        return str(max(numbers) - min(numbers))
    if numbers:
        return str(sum(numbers))
    if re.search("How many|Count", question):
        (letter,) = [word for word in words if len(word) == 1]
        return str(words[-1].count(letter))
    if re.search("backwards|Reverse|right to left", question):
        (word,) = re.findall(r"(?:Write|word|is) ([a-z]+)(?: backwards| read|\.)", question)
        return word[::-1]
    if re.search("Sort|order|a to z", question):
        (word,) = re.findall(r"(?:Write|of) ([a-z]+)(?: with| in|\.)", question)
        return "".join(sorted(word))
    (word,) = re.findall(r"(?:Spell|Write|word) ([a-z]+)(?: with|\.|\?)", question)
    return "-".join(word)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "model")


def test_rows_are_well_formed_and_few():
    assert all((DEMO / name).stat().st_size < 2**19 for name in FILES)
    assert sum(path.stat().st_size for path in (DEMO / "model").iterdir()) <= 4 * 2**20
    for row in read("sft.jsonl") + read("sft_eval.jsonl"):
        assert list(row) == ["messages"]
        roles = [message["role"] for message in row["messages"]]
        turns = roles[roles[0] == "system" :]
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
    for row in read("preferences.jsonl"):
        assert list(row) == ["prompt", "chosen", "rejected"]
        assert [m["role"] for m in row["chosen"] + row["rejected"]] == ["assistant", "assistant"]
    for row in read("prompts.jsonl"):
        assert list(row) == ["prompt", "answer"] and isinstance(row["answer"], str)


@pytest.mark.parametrize("name", FILES)
def test_prompts_end_with_a_user_and_some_have_several_turns_or_a_system_prompt(name):
    roles = [[message["role"] for message in prompt] for prompt in prompts_of(name)]
    assert {r[-1] for r in roles} == {"user"}
    assert 0.1 < sum(r.count("user") > 1 for r in roles) / len(roles) < 0.6
    assert 0.05 < sum(r[0] == "system" for r in roles) / len(roles) < 0.6


def test_regenerated_data_and_tokenizer_are_the_same_bytes(tmp_path):
    make.main(tmp_path, data_only=True)
    tokenizer_files = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    for name in FILES + [f"model/{name}" for name in tokenizer_files]:
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), name
    made, kept = (json.loads((folder / "model/config.json").read_text()) for folder in (tmp_path, DEMO))
    assert {**made, "transformers_version": None} == {**kept, "transformers_version": None}


def test_every_answer_is_right_and_every_rejected_one_wrong():
    for row in read("sft.jsonl") + read("sft_eval.jsonl"):
        for i, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                assert make.extract_answer(message["content"]) == solve(row["messages"][:i]), row
        for a, sign, b, c in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", str(row)):
            assert int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b)), row
    for row in read("preferences.jsonl"):
        answer = solve(row["prompt"])
        assert make.extract_answer(row["chosen"][0]["content"]) == answer, row
        assert make.extract_answer(row["rejected"][0]["content"]) != answer, row
    for row in read("prompts.jsonl"):
        assert row["answer"] == solve(row["prompt"]), row


@pytest.mark.parametrize("name", FILES[2:])
def test_no_prompt_twice(name):
    prompts = [json.dumps(prompt) for prompt in prompts_of(name)]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("name", FILES[1:])
def test_no_held_out_question_is_in_the_training_text(name):
    def problems(messages):
        """Questions; a follow-up such as "And plus 5?" together with the number it goes on from."""
        for i, message in enumerate(messages):
            if message["role"] == "user":
                follow_up = re.match("And|Now|.* that", message["content"])
                before = make.extract_answer(messages[i - 1]["content"]) if follow_up else ""
                yield before, message["content"]

    seen = {problem for row in read("sft.jsonl") for problem in problems(row["messages"])}
    assert not seen & {problem for prompt in prompts_of(name) for problem in problems(prompt)}


def test_base_corpus_leaves_something_to_learn(tmp_path):
    make.write_base_corpus(tmp_path / "base.jsonl", seed=0, count=2000)
    base, sft = (tmp_path / "base.jsonl").read_text(), (DEMO / "sft.jsonl").read_text()
    for only_sft in ["Spell", "with pleasure"]:
        assert only_sft not in base and sft.count(only_sft) > 100


def test_lengths_spread_as_those_of_chats(tokenizer):
    conversations = [row["messages"] for row in read("sft.jsonl")]
    lengths = [len(ids) for ids in tokenizer.apply_chat_template(conversations)["input_ids"]]
    limits = [(0, 80), (80, 512), (512, 1024)]
    shares = [sum(low < n <= high for n in lengths) / len(lengths) for low, high in limits]
    assert shares[0] > 0.4 and 0.01 < shares[2] < 0.1 and sum(shares) == 1


def test_mask_marks_exactly_what_the_assistant_says_and_other_roles_are_refused(tokenizer):
    roles = ("system", "user", "assistant", "user", "assistant")
    texts = ("Be brief.", "2 + 3 = ?", "5", "And plus 7?", "5 + 7 = 12")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    assert tokenizer.decode(ids) == (
        "<|system|>Be brief.<|end|><|user|>2 + 3 = ?<|end|><|assistant|>5<|end|>"
        "<|user|>And plus 7?<|end|><|assistant|>5 + 7 = 12<|end|>"
    )
    said = [i for i, marked in zip(ids, mask, strict=True) if marked]
    assert tokenizer.decode(said) == "5<|end|>5 + 7 = 12<|end|>"
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert ids[: len(prompt)] == prompt and not any(mask[len(prompt) - 14 : len(prompt)])
    with pytest.raises(Exception, match="role tool is none of"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "7"}])


@pytest.mark.parametrize(
    "text", ["", " a  b ", "don't , you ?", "line\n\n\tend \r\n", "naïve 日本語 🦙‍", "a<|end|>b", "\x00\x7f"]
)
def test_text_round_trips(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.replace("<|end|>", ".").encode())


def test_model_fits_the_tokenizer_and_answers_a_part_but_not_all(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model")
    assert model.config.vocab_size == len(tokenizer) and model.config.max_position_embeddings == 1024
    assert 1e6 <= model.num_parameters() <= 1.2e6
    assert str(model.dtype) == "torch.bfloat16"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert 0.4 < make.accuracy(model.float(), tokenizer, read("prompts.jsonl")[:200])["all"] < 0.9
