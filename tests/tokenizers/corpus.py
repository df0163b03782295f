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


def tricky():
    """At least 300 texts: scripts, blanks, digits, code, emoji, what spells control tokens, and fragments at edges."""
    blanks = [
        b * n for b in (" ", "\t", "\n", "\r\n", "\u00a0", "\u3000", " \n", "\n ") for n in (1, 2, 3, 4, 5, 16, 17)
    ]
    around = [f"{b}x{b}y{b}" for b in (" ", "  ", "\n", "\n\n", " \n", "\t ", "\r", "\x1c", "\x85", "\u2009", "\u180e")]
    digits = [prefix + "1234567890"[:n] for n in range(1, 11) for prefix in ("", " ", "-", "a", "٣")]
    words = [
        "don't",
        "Donaudampfschifffahrtsgesellschaft",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "snake_case_and_CamelCase",
        "ABCabcABC",
        "ﬀﬁﬂ",
        "I'LL",
        "it's",
        "we've'd",
        "l'été",
        "\u017f's",
        "K'S",
        "naïve",
        "ǅungla",
        "ÅNGSTRÖM",
        "İstanbul",
        "STRAẞE",
    ]
    scripts = [
        "தமிழ்",
        "ไทยไม่มีเว้นวรรค",
        "ქართული",
        "አማርኛ",
        "🏳️‍🌈🏴󠁧󠁢󠁥󠁮󠁧󠁿",
        "\U0001d573\U0001d58a\U0001d591\U0001d591\U0001d594",
        "\uff21\uff42\uff43",
        "Ⅻ①½",
        "a\u0301\u0323o\u0328",
        "\u202eabc\u202c",
    ]
    scripts += [
        "ᚠᛇᚻ᛫ᛒᛦᚦ",
        "漢字かな交じり文",
        "가\u1100\u1161\u11a8",
        "\U0001f468\u200d\U0001f4bb",
        "\ufe0f",
        "\u200d\u200d",
        "\u0000\u0001",
    ]
    code = [
        "if(a&&b||!c){",
        "  //--- ***///",
        "a->b::c<d>>=1;",
        "#!/bin/sh\n\n\techo $((1+2))\n",
        "\\n\\t\\\\",
        '{"a":[1,2.5e-3,null]}',
        "<br/>\n<p>",
    ]
    code += [
        "____init____",
        "$$\\frac{a}{b}$$",
        "x=y==z!==w",
        "....!!!!????",
        "/*/*/",
        "a\\\r\n b",
        "%s%d%%",
        "^[a-z]+$",
        "`` ` ```",
        "~!@#$%^&*()",
    ]
    spellings = [c for text in CONTROLS for c in text.replace(">", ">\0").replace("]", "]\0").split("\0") if c]
    edges = [
        f"{left}{c}{right}" for c in spellings[:16] for left, right in (("", " "), (" ", ""), ("a", "b"), ("\n", "\n"))
    ]
    cut = [
        c[:n]
        for c in ("<|eot_id|>", "<|start_header_id|>", "[INST]", "</s>", "[/INST]", "<unk>")
        for n in range(1, len(c))
    ]
    return [
        *dict.fromkeys(
            [*TEXTS, *CONTROLS, *blanks, *around, *digits, *words, *scripts, *code, *spellings, *edges, *cut]
        )
    ]
