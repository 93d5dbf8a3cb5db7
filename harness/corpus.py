"""Text to calibrate on and to evaluate on: documents in, token windows out.

The two never overlap: a source with one body of text gives every fourth document to evaluation and the rest to
calibration; a source with official splits uses those.
"""

from __future__ import annotations

import bz2
import hashlib
import html
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from harness import wheels
from harness.errors import ConfigError, RunError
from harness.json_lines import ENDINGS, json_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Split = Literal["calibration", "evaluation"]
EVALUATION_EVERY = 4  # one document in four is evaluated on
PIECE, OVERLAP, AGREEING = 1_000_000, 2_000, 16  # characters that are tokenized at a time, and shared; equal tokens
HELD_OUT_PART = 20  # of the calibration text, what is not trained on but looked at meanwhile


class Text(Protocol):
    """Where documents come from."""

    name: str
    joiner: str  # what stands between two documents when they are read as one text

    def documents(self, split: Split) -> list[str]:
        """The documents of one split, in order."""

    def origin(self) -> dict[str, Any]:
        """What identifies the text: file hash, or hub revision."""


@dataclass(frozen=True)
class Corpus:
    """What a run calibrates on and evaluates on, with the size of the calibration set.

    samples × window tokens are drawn for calibration, at seeded random positions.
    """

    name: str
    calibration: Text
    evaluation: Text
    samples: int
    window: int

    def __post_init__(self) -> None:
        for name in ("samples", "window"):
            if not isinstance(getattr(self, name), int):
                raise ConfigError(f"calibration.{name}={getattr(self, name)}: must be a whole number")
        if self.samples < 1:
            raise ConfigError(f"calibration.samples={self.samples}: must be at least 1")
        if self.window < 8:
            raise ConfigError(f"calibration.window={self.window}: must be at least 8 tokens")

    @property
    def evaluation_name(self) -> str:
        """Short name of the evaluation text for the `on` of a measurement."""
        return f"{self.evaluation.name} evaluation"

    @property
    def in_domain(self) -> bool:
        """True when calibration and evaluation text come from one source, which favours methods that calibrate."""
        return self.calibration.name == self.evaluation.name

    def calibration_windows(self, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator) -> torch.Tensor:
        """Token ids [samples, window], cut at random positions of the joined calibration text.

        Raises RunError when the text is shorter than one window.
        """
        tokens = self._tokens(tokenizer, self.calibration, "calibration")
        return _windows_at_random(tokens, self.samples, self.window, generator, self.calibration.name)

    def training_windows(
        self, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator, samples: int, window: int
    ) -> torch.Tensor:
        """Token ids [samples, window] of the calibration text, for methods that train on more than they calibrate on.

        Its last twentieth is left to `held_out_windows`. Raises RunError when the text is too short.
        """
        tokens = self._tokens(tokenizer, self.calibration, "calibration")
        kept = len(tokens) - len(tokens) // HELD_OUT_PART
        return _windows_at_random(tokens[:kept], samples, window, generator, self.calibration.name)

    def held_out_windows(self, tokenizer: PreTrainedTokenizerBase, samples: int, window: int) -> torch.Tensor:
        """Up to `samples` windows of ids [S, window] from the last twentieth of the calibration text, side by side.

        Raises RunError when there is none of that length.
        """
        tokens = self._tokens(tokenizer, self.calibration, "calibration")
        tokens = tokens[len(tokens) - len(tokens) // HELD_OUT_PART :]
        count = min(samples, len(tokens) // window)
        if count == 0:
            raise RunError(
                f"{self.calibration.name}: the last twentieth of the calibration text has {len(tokens)} tokens, less "
                f"than one window of {window} to look at while training; use a longer text or smaller windows"
            )
        return tokens[: count * window].view(count, window)

    def evaluation_tokens(self, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        """Token ids [N] of the evaluation text, joined and tokenized once."""
        return self._tokens(tokenizer, self.evaluation, "evaluation")

    def provenance(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """What identifies text and tokenizer, for the record."""
        return {
            "calibration": {**self.calibration.origin(), "samples": self.samples, "window": self.window},
            "evaluation": self.evaluation.origin(),
            "tokenizer_sha256": tokenizer_digest(tokenizer),
            "calibrated_in_domain": self.in_domain,
        }

    def _tokens(self, tokenizer: PreTrainedTokenizerBase, text: Text, split: Split) -> torch.Tensor:
        import torch

        known, ids = self._read.get(split, (None, None))
        if known is not tokenizer:
            joined = text.joiner.join(text.documents(split))
            ids = torch.tensor(token_ids(tokenizer, joined), dtype=torch.long)
            self._read[split] = tokenizer, ids
        return ids

    @cached_property
    def _read(self) -> dict[str, tuple[PreTrainedTokenizerBase | None, torch.Tensor]]:
        """The tokens of each split, with the tokenizer that made them."""
        return {}


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, piece: int = PIECE) -> list[int]:
    """The ids of a text, the same as `tokenizer(text)` gives; long ones in pieces, which all cores read at once.

    Neighbouring pieces of `piece` characters share OVERLAP more, and are joined where both end a token after at least
    AGREEING equal ones: where such a place cannot be found, and where a tokenizer puts marks around a text, it is read
    whole.
    """

    def whole() -> list[int]:
        return tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]

    if len(text) <= piece + OVERLAP or not tokenizer.is_fast or tokenizer("")["input_ids"]:
        return whole()
    starts = range(0, len(text) - OVERLAP, piece)
    parts = [text[start : start + piece + OVERLAP] for start in starts]
    read = tokenizer(parts, return_attention_mask=False, return_offsets_mapping=True, verbose=False)
    pieces = [
        (ids, _ends(places, start))
        for start, ids, places in zip(starts, read["input_ids"], read["offset_mapping"], strict=True)
    ]
    found, first = [], 0
    for piece_before, piece_after in pairwise(pieces):
        joint = _joint(*piece_before, *piece_after)
        if joint is None:
            return whole()
        found += piece_before[0][first : joint[0]]
        first = joint[1]
    return found + pieces[-1][0][first:]


def _ends(places: list[tuple[int, int]], start: int) -> list[int | None]:
    """Where in the text each token ends; None for one that shares its characters with the next."""
    following = [*(begin for begin, _ in places[1:]), None]
    pairs = zip(places, following, strict=True)
    return [start + end if begin is None or begin >= end else None for (_, end), begin in pairs]


def _joint(
    here: list[int], ends: list[int | None], there: list[int], next_ends: list[int | None]
) -> tuple[int, int] | None:
    """How many tokens of one piece go before, and from which on those of the next follow; None if they never agree."""
    places = {end: index for index, end in enumerate(ends) if end is not None}
    for index in range(AGREEING, len(there)):
        last = places.get(next_ends[index])
        if next_ends[index] is not None and last is not None:
            run = slice(last - AGREEING + 1, last + 1)
            if here[run] == there[index - AGREEING + 1 : index + 1]:
                return last + 1, index + 1
    return None


def _windows_at_random(
    tokens: torch.Tensor, samples: int, window: int, generator: torch.Generator, name: str
) -> torch.Tensor:
    """Ids [samples, window] cut out of ids [N]. Raises RunError when those are not more than a window."""
    import torch

    if len(tokens) <= window:
        raise RunError(
            f"{name}: the calibration text has {len(tokens)} tokens, less than one window of "
            f"{window}; use a longer text or a smaller calibration.window"
        )
    starts = torch.randint(len(tokens) - window, (samples,), generator=generator)
    return tokens[starts[:, None] + torch.arange(window)]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what the tokenizer does to a text: vocabulary, merges and rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(rules.encode()).hexdigest()


def _every_fourth(documents: list[str], split: Split) -> list[str]:
    chosen = split == "evaluation"
    return [text for index, text in enumerate(documents) if (index % EVALUATION_EVERY == 3) == chosen]


@dataclass(frozen=True)
class WikipediaSample:
    """About a hundred English Wikipedia articles of 2016, prose only, embedded in a pinned wheel.

    Text: CC BY-SA, Wikipedia contributors. Nothing of it is kept in this project.
    """

    cache: Path | None = None
    name: str = "wikipedia-sample"
    joiner: str = "\n\n"

    @cached_property
    def articles(self) -> list[str]:
        """Every article as paragraphs of prose separated by a blank line."""
        archive = wheels.fetch(wheels.WIKIPEDIA, self._folder)
        return list(_wikipedia_articles(bz2.decompress(archive.read_bytes()).decode("utf-8")))

    def documents(self, split: Split) -> list[str]:
        """Every fourth article evaluates, the others calibrate."""
        return _every_fourth(self.articles, split)

    def origin(self) -> dict[str, Any]:
        """The pinned wheel and the file's hash."""
        return {"name": self.name, "from": wheels.WIKIPEDIA.requirement, "sha256": wheels.WIKIPEDIA.sha256}

    @property
    def _folder(self) -> Path:
        return Path(self.cache) if self.cache else wheels.default_cache()


@dataclass(frozen=True)
class TextFile:
    """Any UTF-8 text file, or .jsonl (.jsonl.xz) with one document a line in the field `text`.

    A plain text is split into documents at blank lines; `split` "all" gives the whole file to whichever side asks
    (for official test files), "every_fourth" shares it out.
    """

    path: str
    split: Literal["every_fourth", "all"] = "every_fourth"
    joiner: str = "\n\n"

    def __post_init__(self) -> None:
        if self.split not in ("every_fourth", "all"):
            raise ConfigError(f"corpus text split={self.split}: choose every_fourth or all")
        if not self.path:
            raise ConfigError("corpus=text needs a file: corpus.path=FILE")
        if not Path(self.path).is_file():
            raise ConfigError(f"corpus.path={self.path}: there is no such file")

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return Path(self.path).stem

    def documents(self, split: Split) -> list[str]:
        """Documents of this split, as the file has them."""
        documents = self._read()
        return documents if self.split == "all" else _every_fourth(documents, split)

    def origin(self) -> dict[str, Any]:
        """File name and hash."""
        return {"name": Path(self.path).name, "sha256": wheels.file_sha256(Path(self.path)), "split": self.split}

    def _read(self) -> list[str]:
        path = Path(self.path)
        if path.name.endswith(ENDINGS):
            return list(_texts(path))
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RunError(f"{path} is not UTF-8 text: {error}") from error
        if self.split == "all":
            return [text]  # an official file is read as it is, rows and blank lines included
        return [part for part in text.split("\n\n") if part.strip()]


def _texts(path: Path) -> Iterator[str]:
    for number, row in enumerate(json_rows(path), 1):
        if not isinstance(row.get("text"), str):
            raise RunError(f'{path}, document {number}: expected a JSON object with a field "text"')
        yield row["text"]


@dataclass(frozen=True)
class HubText:
    """A text data set of the hub, at a pinned revision.

    calibration and evaluation: split names, or file paths for data sets read file by file (`data_files`).
    keep_empty: WikiText rows are joined with their blank rows, as the GPTQ code does.
    """

    name: str
    repository: str
    revision: str
    configuration: str | None
    calibration: str
    evaluation: str
    joiner: str = "\n\n"
    rows: int | None = None  # read only so many rows: C4's first shard is large

    def documents(self, split: Split) -> list[str]:
        """Rows of this split. Raises RunError when the hub cannot be reached and nothing is cached."""
        import datasets

        wanted = self.calibration if split == "calibration" else self.evaluation
        arguments: dict[str, Any] = {"revision": self.revision}
        if wanted.endswith((".json.gz", ".jsonl", ".parquet")):
            arguments |= {"data_files": {"rows": wanted}, "split": "rows"}
        else:
            arguments |= {"name": self.configuration, "split": wanted}
        if self.rows is not None:
            arguments["split"] += f"[:{self.rows}]"
        try:
            return list(datasets.load_dataset(self.repository, **arguments)["text"])
        except (OSError, ValueError, ConnectionError) as error:
            raise RunError(
                f"could not read {self.repository} from the hub ({type(error).__name__}: {error}); point the corpus at "
                "a local file instead: corpus=text corpus.path=FILE"
            ) from error

    def origin(self) -> dict[str, Any]:
        """Repository, revision and splits."""
        return {
            "name": self.name,
            "repository": self.repository,
            "revision": self.revision,
            "calibration": self.calibration,
            "evaluation": self.evaluation,
        }


@dataclass(frozen=True)
class GeneratedText:
    """Sentences from a small grammar with agreement and repetition, so that there is something to learn.

    Made from a fixed seed: the same on every machine, without network. One paragraph is one document.
    """

    sentences: int = 4000
    name: str = "generated"
    joiner: str = "\n\n"

    def documents(self, split: Split) -> list[str]:
        """Every fourth paragraph evaluates."""
        draw = random.Random(0)
        lines = [_sentence(draw) for _ in range(self.sentences)]
        paragraphs = [" ".join(lines[start : start + 5]) for start in range(0, len(lines), 5)]
        return _every_fourth(paragraphs, split)

    def origin(self) -> dict[str, Any]:
        """Its size is all there is to know."""
        return {"name": self.name, "sentences": self.sentences}


def _sentence(draw: random.Random) -> str:
    colour = draw.choice(["red", "green", "blue", "white"])
    animal = draw.choice(["cat", "dog", "bird", "horse", "fox"])
    place = draw.choice(["house", "river", "field", "road", "hill"])
    verb = draw.choice(["sees", "likes", "finds", "follows"])
    other = draw.choice(["cat", "dog", "bird", "horse", "fox"])
    return f"The {colour} {animal} near the {place} {verb} the {other}, and the {other} {verb} the {colour} {animal}."


# Wikipedia markup to prose. Written here rather than taken from a library because the text, and with it every
# perplexity, must not change with the version of a parser.

_SECTION_END = re.compile(r"^==+\s*(References|Notes|See also|External links|Further reading|Bibliography)\b", re.I)
_DROPPED = [
    re.compile(r"<!--.*?-->", re.S),
    re.compile(r"<ref[^>/]*/>", re.S | re.I),
    re.compile(r"<(ref|math|gallery|timeline|code|pre|source|imagemap|score)\b[^>]*>.*?</\1\s*>", re.S | re.I),
]
_UNBALANCED = re.compile(r"\[\[|\]\]|\{\{|\}\}|https?:")  # markup that its author left open: not prose
_SMALLEST_PARAGRAPH = 120  # characters; shorter pieces are captions and leftovers of lists


def _wikipedia_articles(xml: str) -> Iterator[str]:
    for page in re.findall(r"<page>.*?</page>", xml, flags=re.S):
        if "<redirect" in page or "<ns>0</ns>" not in page:
            continue
        title = html.unescape(re.search(r"<title>(.*?)</title>", page, flags=re.S)[1])
        body = re.search(r"<text[^>]*>(.*?)</text>", page, flags=re.S)
        # escaped twice: once as XML, and once more by authors who wrote entities
        paragraphs = list(_prose(html.unescape(html.unescape(body[1])))) if body else []
        if len(paragraphs) >= 3:
            yield "\n\n".join([title, *paragraphs])


def _prose(markup: str) -> Iterator[str]:
    for pattern in _DROPPED:
        markup = pattern.sub("", markup)
    markup = _without_nested(markup, r"\{\||\|\}", "{|")
    markup = _without_nested(markup, r"\{\{|\}\}", "{{")
    markup = _replace_links(markup)
    for line in markup.split("\n"):
        if _SECTION_END.match(line):
            return
        if line.startswith(("=", "*", "#", ":", ";", "|", "!", "{", "}", " ")):
            continue
        text = _tidy(line)
        if len(text) >= _SMALLEST_PARAGRAPH and not _UNBALANCED.search(text):
            yield text


def _without_nested(text: str, marks: str, opening: str) -> str:
    """Remove everything between matching marks, nested ones included; an unmatched closing mark stays harmless."""
    kept, depth, position = [], 0, 0
    for mark in re.finditer(marks, text):
        if depth == 0:
            kept.append(text[position : mark.start()])
        depth = depth + 1 if mark[0] == opening else max(depth - 1, 0)
        position = mark.end()
    kept.append(text[position:] if depth == 0 else "")
    return "".join(kept)


def _replace_links(text: str) -> str:
    inner = re.compile(r"\[\[([^\[\]]*)\]\]")

    def words(link: re.Match[str]) -> str:
        target, _, label = link[1].rpartition("|")
        if re.match(r"\s*(File|Image|Category|[a-z]{2,3}(-[a-z]+)?):", target or label, re.I):
            return ""
        return label

    replaced = 1
    while replaced:  # captions of images hold links of their own: innermost first
        text, replaced = inner.subn(words, text)
    return re.sub(r"\[(?:https?:)?//\S+\s*([^\]]*)\]", r"\1", text)


_TIDYING: list[tuple[re.Pattern[str], str | Callable]] = [
    (re.compile(r"<[^>]*>"), ""),
    (re.compile(r"'{2,}"), ""),
    (re.compile("[\u00a0\u2009\u202f\t]"), " "),
    (re.compile(r"\(\s*[;,:\s]*"), "("),  # what templates leave behind: "( ; born 1879)"
    (re.compile(r"\s*[;,]?\s*\)"), ")"),
    (re.compile(r"\s*\(\)"), ""),
    (re.compile(r" +([.,;:!?])"), r"\1"),
    (re.compile(r"  +"), " "),
]


def _tidy(line: str) -> str:
    for pattern, replacement in _TIDYING:
        line = pattern.sub(replacement, line)
    return line.strip()
