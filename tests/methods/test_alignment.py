"""Tokens of two tokenizers on one text: against a brute force, and in the limit of one tokenizer."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from harness.corpus import GeneratedText
from harness.models import byte_tokenizer
from methods.distillation.alignment import (
    by_offsets,
    by_warping,
    edit_distance,
    one_token,
    soft_targets,
    spans_of_texts,
    student_tokens,
)
from methods.distillation.text_teachers import pieces_of, text_of

TEXTS = [
    "The red cat near the river sees 3 + 4 = 7 birds.\n",
    "Unheard-of words, naïve café — 12,345!",
    " leading",
    "a",
]


def trained_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of so many tokens, trained on generated sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(GeneratedText(sentences=300).documents("calibration"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


TOKENIZERS = {"bytes": byte_tokenizer(), "small": trained_tokenizer(290), "large": trained_tokenizer(420)}


def cut(tokenizer, text: str) -> list[str]:
    _, spans = student_tokens(tokenizer, text)
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_cover_every_character_once_and_in_order(name, text):
    ids, spans = student_tokens(TOKENIZERS[name], text)
    assert len(ids) == len(spans)
    assert "".join(text[start:end] for start, end in spans) == text
    assert all(one[1] == other[0] for one, other in itertools.pairwise(spans))
    assert TOKENIZERS[name].decode(ids) == text


def brute_force(teacher: list[str], student: list[str]) -> list[int | None]:
    """For every pair of tokens: whether they are the same characters of the text, counted one by one."""

    def covered(tokens: list[str]) -> list[list[int]]:
        places = iter(range(10**6))
        return [[next(places) for _ in token] for token in tokens]

    theirs = covered(teacher)
    return [next((i for i, own in enumerate(theirs) if own and own == mine), None) for mine in covered(student)]


@pytest.mark.parametrize(("one", "other"), itertools.product(TOKENIZERS, TOKENIZERS))
@pytest.mark.parametrize("text", TEXTS)
def test_partners_are_those_of_a_brute_force(one, other, text):
    teacher, student = cut(TOKENIZERS[one], text), cut(TOKENIZERS[other], text)
    found = by_offsets(spans_of_texts(teacher), spans_of_texts(student))
    assert found == brute_force(teacher, student)
    partners = [place for place in found if place is not None]
    assert partners == sorted(set(partners))  # one to one, and monotone


def test_any_two_ways_to_cut_a_text_are_aligned_as_by_brute_force():
    draw = random.Random(0)

    def anyhow(text: str) -> list[str]:
        marks = sorted(draw.sample(range(1, len(text)), draw.randint(0, len(text) - 1)))
        return [text[start:end] for start, end in itertools.pairwise([0, *marks, len(text)])]

    for _ in range(300):
        text = "".join(draw.choice("ab ") for _ in range(draw.randint(2, 12)))
        teacher, student = anyhow(text), anyhow(text)
        assert by_offsets(spans_of_texts(teacher), spans_of_texts(student)) == brute_force(teacher, student)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_one_tokenizer_is_aligned_with_itself_by_the_identity(name):
    pieces = cut(TOKENIZERS[name], TEXTS[0])
    assert by_offsets(spans_of_texts(pieces), spans_of_texts(pieces)) == list(range(len(pieces)))
    assert by_warping(pieces, pieces) == list(range(len(pieces)))


def test_warping_finds_no_partner_that_the_characters_do_not():
    teacher = ["The", " answer", " is", " forty", "two", "."]
    student = ["The", " answer", " is", " fortytwo", "."]
    assert by_offsets(spans_of_texts(teacher), spans_of_texts(student)) == [0, 1, 2, None, 5]
    assert by_warping(teacher, student) == [0, 1, 2, None, None]  # the cheapest path spends "two" on the full stop
    assert by_warping(["▁a", "▁b"], ["Ġa", "Ġb"]) == [0, 1]  # marks of a space are the same space
    assert by_warping([], ["a"]) == [None]


def test_edit_distances():
    def slow(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    draw = random.Random(0)
    for _ in range(60):
        a, b = ("".join(draw.choice("abc") for _ in range(draw.randint(0, 5))) for _ in range(2))
        assert edit_distance(a, b) == slow(a, b)


# ---- soft targets


def reported(tokenizer, text: str, alternatives=("e", "zq")) -> list[tuple[str, dict[str, float]]]:
    """A teacher's tokens of a text, each with the same alternatives at 0.2 beside itself at 0.6."""
    return [
        (piece, {piece: math.log(0.6)} | {other: math.log(0.2) for other in alternatives if other != piece})
        for piece in cut(tokenizer, text)
    ]


def test_the_same_tokenizer_keeps_all_that_is_reported():
    tokenizer = TOKENIZERS["large"]
    found = soft_targets(reported(tokenizer, TEXTS[0], ("e", " near")), TEXTS[0], tokenizer)
    ids, _ = student_tokens(tokenizer, TEXTS[0])
    assert found[-1] == ([tokenizer.eos_token_id], [1.0])
    for own, (some, chances) in zip(ids, found[:-1], strict=True):
        assert some[0] == own
        assert set(some) >= {one_token(tokenizer, "e"), one_token(tokenizer, " near")}
        assert sum(chances) == pytest.approx(1.0 if len(some) == 3 else 0.8)


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """A vocabulary that marks the space before a word, and puts one before every text (Llama 2, Mistral)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "</s>"])
    tokenizer.train_from_iterator(["ing inging. She is singing and ringing in the ring. ing!"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def test_a_word_and_its_like_inside_a_word_are_two_tokens():
    tokenizer, text = spaced_tokenizer(), "She is ring."
    inside, alone = tokenizer.convert_tokens_to_ids(["ing", "▁ing"])
    assert inside != alone
    assert text_of(tokenizer, inside) == "ing"
    assert text_of(tokenizer, alone) == " ing"
    assert one_token(tokenizer, "ing") == inside
    assert one_token(tokenizer, " ing") == alone
    assert one_token(tokenizer, "zq") is None
    ids, spans = student_tokens(tokenizer, text)
    for first in ("She", " She"):  # as a teacher of other tokens reports it, and as one of the same
        pieces = [text[start:end] for start, end in spans]
        top = [(piece, {piece: math.log(0.6), "ing": math.log(0.1), " ing": math.log(0.2)}) for piece in pieces]
        top[0] = (pieces[0], {first: math.log(0.6)})
        found = soft_targets(top, text, tokenizer)
        assert found[0][0] == [ids[0]]
        for own, (some, _) in zip(ids[1:], found[1:-1], strict=True):
            assert some == list(dict.fromkeys([own, inside, alone]))


def test_alternatives_that_the_student_has_no_token_for_are_dropped_and_not_made_up_for():
    tokenizer = TOKENIZERS["large"]
    assert one_token(tokenizer, "zq") is None
    found = soft_targets(reported(tokenizer, TEXTS[0]), TEXTS[0], tokenizer)
    assert all(sum(chances) == pytest.approx(0.8) for some, chances in found[:-1] if len(some) == 2)
    assert any(len(some) == 2 for some, _ in found)


@pytest.mark.parametrize("aligner", ["offsets", "dtw"])
def test_tokens_without_one_partner_are_learned_as_they_are(aligner):
    teacher, student = TOKENIZERS["large"], TOKENIZERS["bytes"]
    text = "The cat"
    top = reported(teacher, text)
    partners = by_offsets(spans_of_texts([piece for piece, _ in top]), student_tokens(student, text)[1])
    found = soft_targets(top, text, student, aligner)
    ids, _ = student_tokens(student, text)
    assert len(found) == len(ids) + 1
    assert None in partners
    for own, partner, (some, chances) in zip(ids, partners, found[:-1], strict=True):
        if partner is None:
            assert (some, chances) == ([own], [1.0])


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_teacher_reports_pieces_that_make_up_its_text_whatever_it_is_cut_into(name, text):
    ids, spans = student_tokens(TOKENIZERS[name], text)
    assert pieces_of(TOKENIZERS[name], ids) == [text[start:end] for start, end in spans]


def test_a_stream_that_does_not_make_up_the_text_is_discarded():
    tokenizer = TOKENIZERS["small"]
    assert soft_targets(reported(tokenizer, "The dog"), "The cat", tokenizer) is None
    assert (
        soft_targets(reported(tokenizer, "The cat sees"), "The cat", tokenizer) is not None
    )  # it was cut off after it


def test_first_of_two_that_read_the_same_wins():
    tokenizer = TOKENIZERS["bytes"]
    top = [("a", {"a": math.log(0.5), "b": math.log(0.3)})]
    found = soft_targets(top, "a", tokenizer, known=lambda piece: 7)
    assert found[0] == ([7], [pytest.approx(0.5)])


def test_probabilities_are_numbers_of_the_report():
    tokenizer = TOKENIZERS["bytes"]
    scores = torch.randn(5).log_softmax(-1).tolist()
    top = [("a", dict(zip("abcde", scores, strict=True)))]
    some, chances = soft_targets(top, "a", tokenizer)[0]
    assert some == [tokenizer.convert_tokens_to_ids(letter) for letter in "abcde"]
    assert chances == pytest.approx([math.exp(score) for score in scores])
