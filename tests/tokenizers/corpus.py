"""Texts that trip tokenizers up, and real ones."""

import json

TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "\t\t\n \r\n  x  ",
    "Hello world",
    " leading and trailing  ",
    "héllo wörld, ñandú, e\u0301, ﬁ, ﷽",
    "日本語のテキスト。한국어 텍스트, العربية, עברית, हिन्दी",
    "🙂👩\u200d👩\u200d👧\u200d👦🏴\u200d☠️🇪🇺",
    "\u200b\u00a0\u3000\u2028\u2029\ufeff|",
    "a\x00b\x7f\x1b[0m",
    "\ufffd\U0010ffff",
    "don't we'll I'M THEY'RE",
    "1234567890 3.14159 0x1F 1e-5",
    "def f(x):\n\treturn {\n        'a': x ** 2,\n    }\n",
    "x" * 300 + " " * 300,
    "<0x0A><0xFF>",
    "https://example.org/?q=a%20b&c=d#e",
]
CONTROLS = [
    "<s>",
    "</s>",
    "<s>Hello</s><s> again </s>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "[INST] <<SYS>>be nice<</SYS>> hi [/INST]",
    "<|reserved_special_token_7|> <|end_of_text|>",
    "[TOOL_CALLS][AVAILABLE_TOOLS] a [/TOOL_RESULTS]",
    "<s",
    "<<s>>",
    " </s>\n</s> ",
]


def real_texts(assets):
    """Prose, dialogue, code and arithmetic, a few hundred lines of them."""
    shakespeare = (assets / "data" / "tinyshakespeare.txt").read_text().splitlines()[:200]
    questions = (assets / "data" / "gsm8k_test.jsonl").read_text().splitlines()[:100]
    alpaca = json.loads((assets / "data" / "lf_alpaca_en_demo.json").read_text())[:60]
    return [*shakespeare, *(json.loads(line)["answer"] for line in questions), *(row["output"] for row in alpaca)]
