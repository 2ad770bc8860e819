import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.backends import lvm_tags
from csi.backends.lvm_report import parse, parse_rows
from csi.errors import CommandFailed, Invalid

# What LVM takes in a tag, and the length that was tried.
CHARSET = re.compile(r"[A-Za-z0-9_.+\-/=!:&#]{1,1024}")
# CSI: any Unicode but control characters, up to 128 bytes; surrogates are not text.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=32)


@given(name=TEXT, parameters=st.dictionaries(TEXT, TEXT, max_size=5))
def test_any_text_comes_back_as_it_was(name: str, parameters: dict[str, str]) -> None:
    try:
        tags = lvm_tags.encode(pool="fast", name=name, parameters=parameters, nonce="0" * 16)
    except Invalid as error:
        assert "at most 1024" in str(error)
        return
    assert all(CHARSET.fullmatch(tag) for tag in tags)
    label = lvm_tags.decode(sorted(tags))
    assert label == lvm_tags.Label(format=1, pool="fast", name=name, parameters=parameters, blank=True)


@given(st.lists(st.from_regex(CHARSET, fullmatch=True), max_size=8))
def test_foreign_tags_never_raise(tags: list[str]) -> None:
    lvm_tags.decode(tags)
    lvm_tags.decode(["snode.format=1", "snode.pool=x", *(f"snode.name={tag}" for tag in tags[:1]), *tags])


@pytest.mark.parametrize("value", ["snode.parameters=W10=", "snode.parameters=eA==", "snode.name=/w==", "snode.name=é"])
def test_damage_is_told(value: str) -> None:
    label = lvm_tags.decode(["snode.format=1", "snode.pool=fast", value])
    assert label is not None and "damaged" in label.damage and not label.parameters


def test_without_parameters_there_is_no_tag_for_them() -> None:
    tags = lvm_tags.encode(pool="fast", name="x", parameters={}, nonce="0" * 16)
    assert len(tags) == 5 and not any(tag.startswith("snode.parameters") for tag in tags)


@pytest.mark.parametrize("text", ["", "no", "{}", '{"report": []}', '{"report": [{"vg": [{}]}]}', "[]", "null"])
def test_reports_in_another_form_are_an_error_with_words(text: str) -> None:
    with pytest.raises(CommandFailed, match="not understood"):
        parse(text)
    if text not in ('{"report": []}', '{"report": [{"vg": [{}]}]}'):
        with pytest.raises(CommandFailed, match="not understood"):
            parse_rows(text, "pv")
