"""Which licence a base is under, and what follows: names, notices, limits. Known by cards and licence files, never by names."""

import pytest

from llmtune.errors import LlmtuneConfigError
from llmtune.provenance import settle_license
from llmtune.provenance.licenses import LICENSES, find_license

HEADS = {
    "llama3": "META LLAMA 3 COMMUNITY LICENSE AGREEMENT\nMeta Llama 3 Version Release Date: April 18, 2024",
    "llama3.1": "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version Release Date: July 23, 2024",
    "llama3.2": "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT",
    "llama3.3": "LLAMA 3.3 COMMUNITY LICENSE AGREEMENT",
    "apache-2.0": "                                 Apache License\n                           Version 2.0, January 2004",
    "mrl": "# Mistral AI Research License\nIf You want to use a Mistral Model ...",
    "mnpl": "# Mistral AI Non-Production License",
}
SETTLED = {"stated": None, "accepted": False, "name": None, "default_name": "support-bot"}


@pytest.mark.parametrize("key", list(HEADS))
def test_a_licence_file_tells_by_its_head(tmp_path, key):
    (tmp_path / "LICENSE.txt").write_text(HEADS[key])
    assert find_license(tmp_path) == (LICENSES[key], "by LICENSE.txt of the base")


@pytest.mark.parametrize(
    ("card", "key"),
    [
        ("---\nlicense: llama3.1\ntags: [a]\n---\n# Title", "llama3.1"),
        ("---\nlicense: other\nlicense_name: mnpl-0.1\n---\n", "mnpl"),
        ("---\nlicense: other\nlicense_name: mistral-ai-research-license\n---\n", "mrl"),
        ("---\nlicense: apache-2.0\n---", "apache-2.0"),
    ],
)
def test_a_card_tells_before_a_licence_file(tmp_path, card, key):
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "LICENSE").write_text(HEADS["llama3"])
    assert find_license(tmp_path) == (LICENSES[key], "by the model card of the base")


@pytest.mark.parametrize(
    "card", ["# Llama 3.1 8B", "---\nlicense: [\n---\n", "---\nlicense: cc-by-4.0\n---\n", "---\n- a\n---"]
)
def test_what_nothing_tells_is_unknown(tmp_path, card):
    (tmp_path / "README.md").write_text(card)
    license, how = find_license(tmp_path)
    assert license.key == "unknown" and "neither" in how
    assert find_license(None)[0].key == "unknown"


def settle(directory, **given):
    return settle_license(directory, "the/base", **{**SETTLED, **given})


@pytest.mark.parametrize(("key", "begins"), [("llama3", "Llama 3"), ("llama3.1", "Llama"), ("llama3.3", "Llama")])
def test_names_of_llamas_begin_with_llama(tmp_path, key, begins):
    (tmp_path / "LICENSE").write_text(HEADS[key])
    assert settle(tmp_path).name == f"{begins} support-bot"
    good = f"{begins.replace(' ', '-')}-support"
    assert settle(tmp_path, name=good).name == settle(tmp_path, default_name=good).name == good
    with pytest.raises(
        LlmtuneConfigError, match=rf"^export.name: the .* begin with '{begins}' .* write '{begins} bot'$"
    ):
        settle(tmp_path, name="bot")


def test_duties_are_not_stated_away(tmp_path):
    (tmp_path / "LICENSE").write_text(HEADS["llama3.1"])
    with pytest.raises(
        LlmtuneConfigError, match=r"apache-2.0 is stated, and .* Llama 3.1 Community License, known by LICENSE"
    ):
        settle(tmp_path, stated="apache-2.0")
    assert settle(tmp_path, stated="llama3.1").license.key == "llama3.1"
    (tmp_path / "LICENSE").write_text(HEADS["apache-2.0"])  # of a copy that says less than it should
    assert settle(tmp_path, stated="llama3").license.key == "llama3"


def test_other_names_are_free(tmp_path):
    (tmp_path / "LICENSE").write_text(HEADS["apache-2.0"])
    assert settle(tmp_path).name == "support-bot" and settle(tmp_path, name="bot").name == "bot"


@pytest.mark.parametrize("key", ["mrl", "mnpl"])
def test_limits_must_be_accepted(tmp_path, key):
    (tmp_path / "LICENSE").write_text(HEADS[key])
    with pytest.raises(
        LlmtuneConfigError, match=r"^model: the/base is under the Mistral .* set export.accept_license: true$"
    ):
        settle(tmp_path)
    assert settle(tmp_path, accepted=True).license.key == key
    with pytest.raises(LlmtuneConfigError, match=r"^export.license: mit is stated, and the/base is under the Mistral"):
        settle(tmp_path, stated="mit")
    (tmp_path / "LICENSE").unlink()
    with pytest.raises(LlmtuneConfigError, match="Mistral"):
        settle(tmp_path, stated=key)
    assert settle(tmp_path, stated="apache-2.0").how == "stated by export.license"
