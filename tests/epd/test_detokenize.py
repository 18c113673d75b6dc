"""Incremental detokenising against decoding everything at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from epd.demo import CHECKPOINT
from epd.detokenize import Detokenizer


def byte_level() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def sentencepiece() -> Tokenizer:
    """Llama's kind: word-joint marks, byte fallback, one leading space stripped."""
    words = ["▁", "▁the", "▁red", "star", "s", "▁é", "€", "ab", "abc", "b", "\n", "▁▁"]
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *raw, *words])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>")])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


def metaspace() -> Tokenizer:
    words = ["▁a", "▁", "b", "▁é", "c▁"]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_piece() -> Tokenizer:
    words = ["[UNK]", "hello", "##ing", ".", "n't", "do", "'", "s", ","]
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(words)}))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


TOKENIZERS = {
    "byte-level": byte_level(), "sentencepiece": sentencepiece(), "metaspace": metaspace(),
    "word-piece": word_piece(),
}  # fmt: skip
TRICKY = {
    # ids around which text changes after the fact: byte pieces, joints and specials
    "byte-level": [*range(0, 8), *range(150, 262)],
    "sentencepiece": [0, 1, 2, 3 + 0xE2, 3 + 0x82, 3 + 0xAC, 3 + 0x41, 3 + 0xFF, *range(259, 272)],
}  # fmt: skip


def cut(text: str, stop: tuple[str, ...]) -> str:
    starts = [text.find(s) for s in stop if s in text]
    return text[: min(starts)] if starts else text


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_whole(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    size = tokenizer.get_vocab_size()
    any_id = st.integers(0, size + 3)  # some beyond the vocabulary, as padded embeddings give
    ids = data.draw(st.lists(st.sampled_from(TRICKY[name]) | any_id if name in TRICKY else any_id))
    skip = data.draw(st.booleans())
    text = tokenizer.decode(ids, skip_special_tokens=skip)
    pieces = st.text(alphabet=list(set(text)) or ["a"], min_size=1, max_size=3)
    spans = st.tuples(st.integers(0, len(text)), st.integers(1, 4)).map(
        lambda span: text[span[0] : span[0] + span[1]] or "zz"
    )
    stop = tuple(data.draw(st.lists(pieces | spans, max_size=3)))
    sizes = data.draw(st.lists(st.integers(0, 3), max_size=len(ids)))
    detokenizer = Detokenizer(tokenizer, stop, skip_special_tokens=skip)
    expected, seen, rest = cut(text, stop), "", list(ids)
    for step in [*sizes, len(ids)]:
        seen += detokenizer.push(rest[:step])
        rest = rest[step:]
        assert expected.startswith(seen)
    seen += detokenizer.finish()
    assert seen == expected
    assert (detokenizer.stopped is not None) == any(s in text for s in stop)
    if detokenizer.stopped is not None:
        assert text[len(expected) :].startswith(detokenizer.stopped)


def ids_of(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    ids = [tokenizer.token_to_id(token) for token in tokens]
    assert None not in ids
    return ids


def test_a_character_split_over_tokens_appears_whole() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("é€", add_special_tokens=False).ids
    assert len(ids) == 5
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in ids] == ["", "é", "", "", "€"]
    assert detokenizer.finish() == ""


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer)
    first = tokenizer.encode("é", add_special_tokens=False).ids[0]
    assert detokenizer.push([first]) == ""
    assert detokenizer.finish() == "\N{REPLACEMENT CHARACTER}"


def test_a_byte_run_is_held_until_it_ends() -> None:
    tokenizer = sentencepiece()
    euro = ids_of(tokenizer, "<0xE2>", "<0x82>", "<0xAC>")
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(euro) == ""
    assert detokenizer.push(ids_of(tokenizer, "star")) == "€star"


def test_leading_and_inner_spaces() -> None:
    tokenizer = sentencepiece()
    detokenizer = Detokenizer(tokenizer)
    ids = ids_of(tokenizer, "▁the", "</s>", "▁red", "star", "s")
    assert [detokenizer.push([i]) for i in ids] == ["the", "", " red", "star", "s"]


def test_special_tokens_are_shown_on_request() -> None:
    tokenizer = sentencepiece()
    ids = ids_of(tokenizer, "▁the", "</s>", "<tool>")
    shown, hidden = Detokenizer(tokenizer, skip_special_tokens=False), Detokenizer(tokenizer)
    assert shown.push(ids) + shown.finish() == "the</s><tool>"
    assert hidden.push(ids) + hidden.finish() == "the<tool>"


def test_a_stop_string_over_several_tokens_never_shows() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("it is END. of", add_special_tokens=False).ids
    detokenizer = Detokenizer(tokenizer, ("END.",))
    seen = [detokenizer.push([i]) for i in ids]
    assert "".join(seen) == "it is "
    assert detokenizer.stopped == "END."
    assert detokenizer.push(ids) == detokenizer.finish() == ""


def test_a_begun_stop_string_is_released_when_it_fails_or_the_answer_ends() -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer, ("abcd",))
    encode = [tokenizer.encode(c, add_special_tokens=False).ids for c in "xabcab"]
    assert [detokenizer.push(ids) for ids in encode] == ["x", "", "", "", "abc", ""]
    assert detokenizer.finish() == "ab"
    assert detokenizer.stopped is None


def test_of_overlapping_stop_strings_the_one_that_begins_first_cuts() -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer, ("b", "abc"))
    seen = [detokenizer.push(tokenizer.encode(c, add_special_tokens=False).ids) for c in "xabc"]
    assert "".join(seen) == "x"
    assert detokenizer.stopped == "abc"
    other = Detokenizer(tokenizer, ("b", "abc"))
    seen = [other.push(tokenizer.encode(c, add_special_tokens=False).ids) for c in "xabd"]
    assert ("".join(seen), other.stopped) == ("xa", "b")
