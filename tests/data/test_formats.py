"""Rows become examples: which tokens, which of them are targets, and what is said of rows that cannot be used."""

import json

import numpy as np
import pytest

from llmtune.data.example import IGNORED
from llmtune.data.formats import detect_format, make_formatter, read_examples
from llmtune.data.rows import Row, read_rows
from llmtune.errors import LlmtuneDataError
from llmtune.tokenizers import load_tokenizer

VOCAB = 600
CONTROL = 'Say "</s>", then <s> and <|eot_id|>.'


@pytest.fixture(scope="module", params=["starter", "stories"])
def tokenizer(request):
    return load_tokenizer(request.getfixturevalue(request.param))


def examples(rows, name, tokenizer=None, columns=None, **options):
    """[(ids, labels)] of rows that stand in lines 1, 2, ... of rows.jsonl."""
    rows = [Row(row, f"rows.jsonl:{line}") for line, row in enumerate(rows, 1)]
    found = list(read_examples(rows, make_formatter(name, tokenizer, columns or {}, VOCAB, **options)))
    assert all(part.dtype == np.int32 for example in found for part in (example.input_ids, example.labels))
    return [(example.input_ids.tolist(), example.labels.tolist()) for example in found]


def refusal(rows, *arguments):
    with pytest.raises(LlmtuneDataError) as caught:
        examples(rows, *arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_text_is_bos_text_eos_and_all_of_it_is_a_target(tokenizer):
    ((ids, labels),) = examples([{"text": "Once upon a time"}], "text", tokenizer)
    assert ids == [tokenizer.bos_id, *tokenizer.encode("Once upon a time", bos=False), tokenizer.eos_ids[0]]
    assert labels == [IGNORED, *ids[1:]]


def test_of_prompt_and_completion_the_completion_and_eos_are_targets(tokenizer):
    row = {"prompt": "Name an animal:", "completion": " a hedgehog"}
    ((ids, labels),) = examples([row], "prompt_completion", tokenizer)
    prompt, completion = (tokenizer.encode(row[column], bos=False) for column in ("prompt", "completion"))
    assert ids == [tokenizer.bos_id, *prompt, *completion, tokenizer.eos_ids[0]]
    assert labels == [IGNORED] * (1 + len(prompt)) + ids[1 + len(prompt) :]


def test_for_pretraining_prompts_are_targets_too(tokenizer):
    row = {"prompt": "Name an animal:", "completion": " a hedgehog"}
    ((ids, labels),) = examples([row], "prompt_completion", tokenizer, pretrain=True)
    assert ids == examples([row], "prompt_completion", tokenizer)[0][0]
    assert labels == [IGNORED, *ids[1:]]


def test_bos_and_eos_stand_there_exactly_once_whatever_the_text_spells(tokenizer):
    rows = [{"text": CONTROL, "prompt": CONTROL, "completion": CONTROL}]
    for name in ("text", "prompt_completion"):
        ((ids, _),) = examples(rows, name, tokenizer)
        assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
        assert ids[-1] == tokenizer.eos_ids[0] and ids.count(tokenizer.eos_ids[0]) == 1


def test_an_empty_prompt_leaves_the_completion(tokenizer):
    ((ids, labels),) = examples([{"prompt": "", "completion": "x"}], "prompt_completion", tokenizer)
    assert ids == [tokenizer.bos_id, *tokenizer.encode("x", bos=False), tokenizer.eos_ids[0]]
    assert labels[1:] == ids[1:]


def test_tokens_are_taken_as_they_are():
    row = {"input_ids": [5, 0, VOCAB - 1], "labels": [IGNORED, 0, 7]}
    assert examples([row], "tokens") == [(row["input_ids"], row["labels"])]
    assert examples([{"input_ids": [5, 6]}], "tokens") == [([5, 6], [5, 6])]


def test_columns_may_have_other_names(tokenizer):
    row = {"question": "Why?", "answer": "So.", "prompt": 5}
    columns = {"prompt": "question", "completion": "answer"}
    plain = examples([{"prompt": "Why?", "completion": "So."}], "prompt_completion", tokenizer)
    assert examples([row], "prompt_completion", tokenizer, columns) == plain
    plain = examples([{"text": "Why?"}], "text", tokenizer)
    assert examples([row], "text", tokenizer, {"text": "question"}) == plain


@pytest.mark.parametrize(
    "row, columns, expected",
    [
        ({"input_ids": [1], "labels": [1]}, {}, "tokens"),
        ({"input_ids": [1], "text": "x"}, {}, "tokens"),
        ({"text": "x", "source": "web"}, {}, "text"),
        ({"prompt": "x", "completion": "y", "id": 3}, {}, "prompt_completion"),
        ({"question": "x", "answer": "y"}, {"prompt": "question", "completion": "answer"}, "prompt_completion"),
        ({"content": "x"}, {"text": "content"}, "text"),
    ],
)
def test_the_format_is_known_by_the_columns_of_the_first_row(row, columns, expected):
    assert detect_format(Row(row, "rows.jsonl:1"), columns) == expected


def test_a_row_of_no_known_format_is_told_the_formats_and_how_to_map_columns():
    with pytest.raises(LlmtuneDataError) as caught:
        detect_format(Row({"question": "x", "answer": "y"}, "rows.jsonl:1"), {})
    said = str(caught.value)
    assert said.startswith("rows.jsonl:1: no format has the columns ['answer', 'question']")
    assert "prompt_completion (prompt, completion)" in said and "{prompt: question, completion: answer}" in said


@pytest.mark.parametrize(
    "row, said",
    [
        ({"input_ids": [1, VOCAB]}, f"input_ids holds {VOCAB}; token ids of this model lie in 0..{VOCAB - 1}"),
        ({"input_ids": [1, 2**40]}, f"input_ids holds {2**40}"),
        ({"input_ids": [1, -100]}, "input_ids holds -100"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, "labels holds -1"),
        ({"input_ids": [1, 2], "labels": [1]}, "2 input_ids but 1 labels"),
        ({"input_ids": [1, 2], "labels": None}, "labels must be a list of integers"),
        ({"input_ids": [1, 2.0]}, "input_ids must be a list of integers"),
        ({"input_ids": [1, True]}, "input_ids must be a list of integers"),
        ({"input_ids": "1 2"}, "input_ids must be a list of integers"),
        ({"ids": [1, 2]}, "input_ids must be a list of integers"),
        ({"input_ids": [1, 2], "labels": [2, IGNORED]}, "the row has no target token"),
        ({"input_ids": [1]}, "the row has no target token"),
        ({"input_ids": []}, "the row has no target token"),
    ],
)
def test_a_bad_row_of_tokens_is_named_by_file_and_line(row, said):
    assert refusal([{"input_ids": [1, 2]}, row], "tokens").startswith(f"rows.jsonl:2: {said}")


@pytest.mark.parametrize(
    "row, said",
    [
        ({"prompt": "x"}, "the column 'completion' is missing (there are 'prompt'); data.columns maps other names"),
        ({"completion": "x"}, "the column 'prompt' is missing"),
        ({}, "the column 'prompt' is missing (there are none)"),
        ({"prompt": None, "completion": "y"}, "the column 'prompt' is NoneType, a text is expected"),
        ({"prompt": "x", "completion": ["y"]}, "the column 'completion' is list, a text is expected"),
        ({"prompt": "x", "completion": ""}, "the row has no target token; remove it, or fill in its completion"),
        ({"prompt": "x", "completion": "\ud83d"}, "the text holds a lone surrogate (U+D83D at character 0)"),
        ({"prompt": "x\udc00", "completion": "y"}, "the text holds a lone surrogate (U+DC00 at character 1)"),
    ],
)
def test_a_bad_row_of_texts_is_named_by_file_and_line(tokenizer, row, said):
    rows = [{"prompt": "x", "completion": "y"}, row]
    assert refusal(rows, "prompt_completion", tokenizer).startswith(f"rows.jsonl:2: {said}")


def test_texts_need_a_tokenizer_and_tokens_do_not():
    assert refusal([{"text": "x"}], "text").startswith("data.format: text needs a tokenizer")
    assert examples([{"input_ids": [1, 2]}], "tokens")


def test_questions_and_answers_become_the_tokens_and_labels_that_others_made(assets, stories):
    """Rows derived elsewhere: BOS, the last tokens of `question newline`, then the first of the answer, 64 in all."""
    tokenizer = load_tokenizer(stories)
    expected = json.loads((assets / "derived" / "gsm8k_examples.json").read_text())
    rows = [row.value for row in read_rows([assets / "data" / "gsm8k_train.jsonl"])][: len(expected)]
    rows = [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in rows]
    for (ids, labels), theirs in zip(examples(rows, "prompt_completion", tokenizer), expected, strict=True):
        begin, kept = labels.count(IGNORED), theirs["labels"].count(IGNORED)
        window = [0, *range(begin - kept + 1, begin - kept + 64)]
        assert [ids[at] for at in window] == theirs["input_ids"]
        assert [labels[at] for at in window] == theirs["labels"]
