"""Text and windows: splits never overlap, sampling is seeded, markup becomes prose, too little text is said."""

from __future__ import annotations

import json

import pytest
import torch

from harness.corpus import OVERLAP, Corpus, GeneratedText, TextFile, _prose, token_ids
from harness.errors import ConfigError, RunError
from harness.models import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def write(path, paragraphs):
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return str(path)


def test_calibration_and_evaluation_share_no_document_and_lose_none(tmp_path):
    paragraphs = [f"paragraph {number}" for number in range(41)]
    text = TextFile(write(tmp_path / "a.txt", paragraphs))
    calibration, evaluation = text.documents("calibration"), text.documents("evaluation")
    assert not set(calibration) & set(evaluation)
    assert sorted(calibration + evaluation) == sorted(paragraphs)


def test_windows_are_cut_from_the_calibration_text_and_repeat_with_the_seed(tmp_path, tokenizer):
    text = TextFile(write(tmp_path / "a.txt", [f"word{n} " * 30 for n in range(40)]))
    corpus = Corpus("a", text, text, samples=5, window=32)
    first, again = (corpus.calibration_windows(tokenizer, torch.Generator().manual_seed(3)) for _ in range(2))
    other = corpus.calibration_windows(tokenizer, torch.Generator().manual_seed(4))
    assert first.shape == (5, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    whole = text.joiner.join(text.documents("calibration"))
    assert all(tokenizer.decode(window) in whole for window in first)


def test_evaluation_tokens_are_the_joined_text(tmp_path, tokenizer):
    text = TextFile(write(tmp_path / "a.txt", [f"p{n}" for n in range(8)]))
    corpus = Corpus("a", text, text, samples=1, window=8)
    assert tokenizer.decode(corpus.evaluation_tokens(tokenizer)) == "p3\n\np7"


def test_too_short_a_text_names_tokens_window_and_way_out(tmp_path, tokenizer):
    text = TextFile(write(tmp_path / "a.txt", ["short"] * 4))
    corpus = Corpus("a", text, text, samples=1, window=512)
    with pytest.raises(RunError, match=r"19 tokens.*512.*calibration\.window"):
        corpus.calibration_windows(tokenizer, torch.Generator())


def test_an_official_file_is_read_byte_for_byte(tmp_path):
    content = "\n = Title = \n\n\n row \n"
    path = tmp_path / "wiki.test.raw"
    path.write_text(content, encoding="utf-8")
    assert TextFile(str(path), split="all").documents("evaluation") == [content]


def test_json_lines_name_the_broken_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one"}) + "\n{broken\n", encoding="utf-8")
    with pytest.raises(RunError, match="line 2"):
        TextFile(str(path)).documents("calibration")


@pytest.mark.parametrize(("path", "message"), [("", "corpus.path=FILE"), ("/nowhere/x.txt", "no such file")])
def test_a_missing_file_is_refused_before_anything_loads(path, message):
    with pytest.raises(ConfigError, match=message):
        TextFile(path)


def test_binary_content_is_not_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(RunError, match="UTF-8"):
        TextFile(str(path)).documents("calibration")


def test_generated_text_is_the_same_everywhere():
    assert GeneratedText(50).documents("evaluation") == GeneratedText(50).documents("evaluation")


def test_calibrating_on_the_domain_of_the_evaluation_is_flagged(tmp_path):
    one = TextFile(write(tmp_path / "a.txt", ["x"]))
    other = TextFile(write(tmp_path / "b.txt", ["x"]))
    assert Corpus("same", one, one, 1, 8).in_domain
    assert not Corpus("different", one, other, 1, 8).in_domain


LONG = "and so the sentence goes on, because captions and list items are much too short to be taken for prose by any"


@pytest.mark.parametrize(
    ("markup", "prose"),
    [
        (f"'''Bold''' [[link]] and [[target|label]] {LONG}.", f"Bold link and label {LONG}."),
        (f"Before{{{{a|{{{{nested}}}}|b}}}} after {LONG}.", f"Before after {LONG}."),
        (f"Cited<ref name=x>{{{{cite|[[y]]}}}}</ref> fact<ref name=x/> {LONG}.", f"Cited fact {LONG}."),
        (f"[[File:a.jpg|thumb|of [[b]] and [[c]]]]{LONG} ends here now.", f"{LONG} ends here now."),
        (f"He ({{{{lang|x}}}}; born 1879) {LONG}.", f"He (born 1879) {LONG}."),
        (f"An [http://example.org external label] {LONG}.", f"An external label {LONG}."),
    ],
)
def test_markup_becomes_prose(markup, prose):
    assert list(_prose(markup)) == [prose]


def test_lists_tables_headings_and_references_are_not_prose():
    markup = f"== Heading ==\n* {LONG}\n# {LONG}\n{{|\n| {LONG}\n|}}\n== References ==\n{LONG} {LONG}"
    assert list(_prose(markup)) == []


@pytest.mark.parametrize("piece", [701, 5_000])
def test_a_text_in_pieces_gives_the_tokens_of_the_whole(piece):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = GeneratedText(400).documents("calibration")
    joined = "\n\n".join(text) + "naïve — ‘café’ 漢字 🙂 and so on " * 60 + "\n\n" + " ".join(text[:20])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    class InPieces:
        """The tokenizer, which refuses to read a long text at once."""

        is_fast = True

        def __call__(self, read, **options):
            assert all(len(one) <= piece + OVERLAP for one in ([read] if isinstance(read, str) else read))
            return fast(read, **options)

    assert token_ids(InPieces(), joined, piece) == fast(joined)["input_ids"]
    assert len(joined) > 3 * piece
