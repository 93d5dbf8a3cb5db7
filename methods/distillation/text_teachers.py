"""Teachers that are asked in words and answer in words: a model, an endpoint, a recorded file, or worked solutions.

Every answer is kept on disk under a digest of the teacher, the prompt, the sampling and its number, as soon as it is
there: a run that was killed asks nothing twice, and a second run asks nothing at all. What answers cost is counted in
tokens, whether they were asked for now or kept from before.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

import torch

from harness.decoding import complete_ids, encode
from harness.errors import ConfigError, RunError
from harness.json_lines import Broken, numbered_rows, pass_over
from harness.problems import Problem
from methods.distillation.alignment import SPACE
from methods.distillation.sampling import distribution, draw

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from harness.method import Bench, LanguageModel
    from harness.models import ModelSource

T = TypeVar("T")

SECONDS_FOR_A_LOCK = 60
LONGEST_PAUSE_SECONDS = 60


@dataclass(frozen=True)
class Sampling:
    """How a teacher is to answer.

    samples: answers to each prompt. temperature: 0 is greedy. new_tokens: the most in an answer.
    stop: where an answer ends. top_logprobs: of each token, so many likeliest alternatives.
    """

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    new_tokens: int = 128
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))  # configurations have lists
        for name, least in (("samples", 1), ("new_tokens", 1), ("temperature", 0), ("top_logprobs", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"sampling.{name}={getattr(self, name)}: must be at least {least}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling.top_p={self.top_p}: must be above 0 and at most 1")
        if self.samples > 1 and self.temperature == 0:
            raise ConfigError(
                f"sampling.samples={self.samples} at temperature 0 are all the same answer; set sampling.temperature"
            )


@dataclass(frozen=True)
class Request:
    """One prompt. problem: what it is about, for teachers that look answers up. seed: of what is drawn."""

    prompt: str
    problem: Problem | None = None
    sampling: Sampling = Sampling()
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """One answer.

    text: without its stop sequence. finish: "stop" where it ended by itself, "length" where it was cut off.
    prompt_tokens, tokens: what it cost. top: of every token (its text, {text of an alternative: log-probability}).
    """

    text: str
    finish: Literal["stop", "length"] = "stop"
    prompt_tokens: int = 0
    tokens: int = 0
    top: tuple[tuple[str, dict[str, float]], ...] = ()


Ask = Callable[[Iterable[Request]], Iterator[tuple[Request, list[Answer]]]]
Sample = tuple[Request, int]  # a request and which of its samples


class TextTeacher(Protocol):
    """Answers prompts.

    recorded: it says what it once said to a question, reasoning and answer at once, whatever the prompt.
    """

    recorded: ClassVar[bool]

    def opened(self, base: LanguageModel, bench: Bench) -> AbstractContextManager[Ask]:
        """Ready to be asked, and freed afterwards.

        What it gives takes requests and yields each with its answers, in order and lazily: no more than one batch of
        requests is in memory. A request that it has no answer to comes back with an empty list.
        """


# ---- answers that are kept


class KeptAnswers:
    """Answers on disk, by digest; several processes may use one file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = sqlite3.connect(path, timeout=SECONDS_FOR_A_LOCK)
        self._file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")

    def get(self, key: str) -> Answer | None:
        """The answer kept under a digest, or None."""
        found = self._file.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        if found is None:
            return None
        fields = json.loads(found[0])
        return Answer(**fields | {"top": tuple((text, likely) for text, likely in fields["top"])})

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer; it is on disk when this returns."""
        text = json.dumps(asdict(answer), ensure_ascii=False)
        with self._file:
            self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, text))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def key_of(teacher: dict[str, Any], request: Request, sample: int) -> str:
    """Digest of all that decides an answer: teacher, prompt, sampling, seed and number of the sample."""
    sampling = asdict(request.sampling)
    del sampling["samples"]  # the first of eight is the first of sixteen
    drawn = [request.seed, sample] if request.sampling.temperature else []
    text = json.dumps([teacher, request.prompt, sampling, drawn], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def asking(
    teacher: dict[str, Any],
    answer: Callable[[list[Sample]], Iterator[tuple[int, Answer]]],
    kept: KeptAnswers,
    bench: Bench,
    batch: int,
) -> Ask:
    """Ask through what is kept.

    teacher: all that identifies it. answer: takes samples and yields (place, answer) as they come, in any order.
    """

    def ask(requests: Iterable[Request]) -> Iterator[tuple[Request, list[Answer]]]:
        counts = bench.log.counts
        for some in in_batches(requests, batch):
            wanted = [(request, sample) for request in some for sample in range(request.sampling.samples)]
            keys = [key_of(teacher, *each) for each in wanted]
            found = {key: given for key in keys if (given := kept.get(key)) is not None}
            missing = [place for place, key in enumerate(keys) if key not in found]
            for place, given in answer([wanted[place] for place in missing]) if missing else ():
                key = keys[missing[place]]
                found[key] = given
                kept.put(key, given)
            counts["asked of the teacher"] += len(missing)
            answers = iter(keys)
            for request in some:
                own = [found[next(answers)] for _ in range(request.sampling.samples)]
                counts["teacher prompts"] += 1
                counts["teacher prompt tokens"] += sum(each.prompt_tokens for each in own)
                counts["teacher tokens"] += sum(each.tokens for each in own)
                yield request, own

    return ask


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """So many at a time, the last ones fewer."""
    items = iter(items)
    while some := list(islice(items, size)):
        yield some


def answers_file(bench: Bench) -> Path:
    """Where the answers of live teachers are kept: between runs, where there is such a place."""
    return (bench.cache or bench.scratch) / "answers.sqlite"


# ---- a model of ours


@dataclass(frozen=True)
class EngineTeacher:
    """A model run by this harness.

    model: where it comes from; None is the model that is taught, before it is.
    chat_template: put the prompt as a user's message into the model's template.
    """

    model: ModelSource | None = None
    batch: int = 16
    chat_template: bool = False

    recorded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError(f"text_teacher.batch={self.batch}: must be at least 1")

    @contextmanager
    def opened(self, base: LanguageModel, bench: Bench) -> Iterator[Ask]:
        """See TextTeacher."""
        lm = base
        if self.model is not None:
            parameter = next(base.module.parameters())
            cache = bench.cache or bench.scratch
            lm, _ = self.model.load(cache, str(parameter.device), parameter.dtype)
        if self.chat_template and not lm.tokenizer.chat_template:
            raise RunError("text_teacher.chat_template=true, but this model's tokenizer has no chat template")
        identity = {"weights": weights_digest(lm), "chat_template": self.chat_template}
        with closing(KeptAnswers(answers_file(bench))) as kept:
            yield asking(identity, lambda samples: self._answer(lm, samples), kept, bench, 4 * self.batch)

    def _answer(self, lm: LanguageModel, samples: list[Sample]) -> Iterator[tuple[int, Answer]]:
        encoded = [
            encode(lm, request.prompt, request.sampling.new_tokens, self.chat_template) for request, _ in samples
        ]
        alike: dict[Sampling, list[int]] = {}
        for place in sorted(range(len(samples)), key=lambda place: -len(encoded[place])):
            alike.setdefault(replace(samples[place][0].sampling, samples=1), []).append(place)
        for sampling, places in alike.items():
            for some in in_batches(places, self.batch):
                chosen = [samples[place] for place in some]
                written = complete_ids(
                    lm,
                    [encoded[place] for place in some],
                    [(sampling.stop, sampling.new_tokens)] * len(some),
                    sampling.new_tokens,
                    drawing(sampling, _uniforms(chosen)) if sampling.temperature else None,
                    sampling.top_logprobs,
                )
                for place, completion in zip(some, written, strict=True):
                    pieces = pieces_of(lm.tokenizer, completion.ids) if completion.top else []
                    top = tuple(
                        (piece, _by_text(lm, *likely)) for piece, likely in zip(pieces, completion.top, strict=True)
                    )
                    finish = "stop" if completion.ended else "length"
                    yield place, Answer(completion.text, finish, len(encoded[place]), len(completion.ids), top)


def drawing(sampling: Sampling, uniforms: torch.Tensor) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Chooses tokens by numbers in [0, 1): (logits [B, V], step) -> ids [B]; numbers [B, T]."""

    def choose(logits: torch.Tensor, step: int) -> torch.Tensor:
        return draw(distribution(logits.float(), sampling), uniforms[:, step].to(logits.device))

    return choose


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text: of a character in several tokens, the last one has all."""
    pieces, so_far = [], ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        whole = not text.endswith("\ufffd")  # the mark of a character that is not whole yet
        pieces.append(text[len(so_far) :] if whole else "")
        so_far = text if whole else so_far
    return pieces


def _by_text(lm: LanguageModel, ids: Sequence[int], scores: Sequence[float]) -> dict[str, float]:
    """Alternatives by their text; of two that read the same, the likelier."""
    found: dict[str, float] = {}
    for token, score in zip(ids, scores, strict=True):
        found.setdefault(text_of(lm.tokenizer, token), score)
    return found


def text_of(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """What a token reads, with the space that it begins with: some tokenizers leave it out at the start of a text."""
    text = tokenizer.decode([token])
    led = (tokenizer.convert_ids_to_tokens(token) or "").startswith(SPACE)
    return f" {text}" if led and not text.startswith(" ") else text


def _uniforms(samples: Sequence[Sample]) -> torch.Tensor:
    """Numbers in [0, 1) for each sample, [B, T], of its own prompt, seed and number: the same in any batch."""
    rows = []
    for request, sample in samples:
        digest = hashlib.sha256(json.dumps([request.prompt, request.seed, sample]).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        rows.append(torch.rand(request.sampling.new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def weights_digest(lm: LanguageModel) -> str:
    """SHA-256 over a model's tensors and its tokenizer: what it is, wherever it came from."""
    from harness.corpus import tokenizer_digest

    content = hashlib.sha256(tokenizer_digest(lm.tokenizer).encode())
    for name, tensor in sorted(lm.module.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return content.hexdigest()


# ---- an endpoint


@dataclass(frozen=True)
class EndpointTeacher:
    """A model behind an endpoint that speaks OpenAI's protocol: a provider's, or a server of one's own.

    model: its name there. interface: "chat" or "completions" (the latter for base models).
    url_variable, key_variable: environment variables that hold the base URL ("https://…/v1") and the key. The key is
        sent and never written anywhere; without one no key is sent.
    parallel: requests in flight. requests_per_minute: never more than these; None is no limit of ours.
    tries: of one request. first_pause_seconds: doubled after every failed try; what the server asks for counts more.
    """

    model: str
    interface: Literal["chat", "completions"] = "chat"
    url_variable: str = "OPENAI_BASE_URL"
    key_variable: str = "OPENAI_API_KEY"
    parallel: int = 4
    requests_per_minute: float | None = None
    tries: int = 6
    first_pause_seconds: float = 1.0
    seconds_limit: float = 120.0

    recorded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("text_teacher=endpoint needs the name of a model: text_teacher.model=NAME")
        if self.interface not in ("chat", "completions"):
            raise ConfigError(f"text_teacher.interface={self.interface}: choose chat or completions")
        for name in ("url_variable", "key_variable"):
            if not getattr(self, name).isidentifier():  # the value is not repeated: it may be the secret itself
                raise ConfigError(
                    f"text_teacher.{name} is the name of an environment variable; put the address or key in there"
                )
        for name in ("parallel", "tries"):
            if getattr(self, name) < 1:
                raise ConfigError(f"text_teacher.{name}={getattr(self, name)}: must be at least 1")
        if self.requests_per_minute is not None and not self.requests_per_minute > 0:
            raise ConfigError(f"text_teacher.requests_per_minute={self.requests_per_minute}: must be above 0, or null")

    @contextmanager
    def opened(self, base: LanguageModel, bench: Bench) -> Iterator[Ask]:
        """See TextTeacher. Raises RunError without a base URL."""
        url = os.environ.get(self.url_variable, "").rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise RunError(
                f"text_teacher=endpoint: set {self.url_variable} to the base URL of the endpoint, for instance "
                "http://localhost:8000/v1"
            )
        identity = {"url": url, "model": self.model, "interface": self.interface}
        pace = _Pace(self.requests_per_minute)
        with closing(KeptAnswers(answers_file(bench))) as kept, ThreadPoolExecutor(self.parallel) as workers:

            def answer(samples: list[Sample]) -> Iterator[tuple[int, Answer]]:
                from concurrent.futures import as_completed

                waiting = {workers.submit(self._one, url, each, pace): place for place, each in enumerate(samples)}
                try:
                    for done in as_completed(waiting):
                        yield waiting[done], done.result()
                finally:
                    for each in waiting:
                        each.cancel()  # one failed for good: the others need not be paid for

            yield asking(identity, answer, kept, bench, 8 * self.parallel)

    def _one(self, url: str, sample: Sample, pace: _Pace) -> Answer:
        request, number = sample
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": sampling.new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request.seed + number,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if self.interface == "chat":
            body["messages"] = [{"role": "user", "content": request.prompt}]
            if sampling.top_logprobs:
                body |= {"logprobs": True, "top_logprobs": sampling.top_logprobs}
            reply = self._posted(f"{url}/chat/completions", body, pace)
        else:
            body["prompt"] = request.prompt
            if sampling.top_logprobs:
                body["logprobs"] = sampling.top_logprobs
            reply = self._posted(f"{url}/completions", body, pace)
        try:
            choice, used = reply["choices"][0], reply.get("usage") or {}
            text = choice["message"]["content"] if self.interface == "chat" else choice["text"]
            finish = "length" if choice.get("finish_reason") == "length" else "stop"
            top = _reported(choice.get("logprobs"), self.interface) if sampling.top_logprobs else ()
            return Answer(text or "", finish, used.get("prompt_tokens", 0), used.get("completion_tokens", 0), top)
        except (KeyError, IndexError, TypeError) as error:
            raise RunError(
                f"{url}: the reply is not what this protocol says ({type(error).__name__}: {error})"
            ) from error

    def _posted(self, address: str, body: dict[str, Any], pace: _Pace) -> dict[str, Any]:
        """The reply to a request; tried again when the server is busy, fails, or does not answer."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        asked = urllib.request.Request(address, json.dumps(body).encode(), headers, method="POST")
        pause, why = self.first_pause_seconds, ""
        for number in range(self.tries):
            if number:
                time.sleep(min(pause, LONGEST_PAUSE_SECONDS))
                pause *= 2
            pace.wait()
            try:
                with urllib.request.urlopen(asked, timeout=self.seconds_limit) as reply:
                    return json.load(reply)
            except urllib.error.HTTPError as error:
                why = f"status {error.code}: {error.read(300).decode(errors='replace')}"
                if error.code not in (408, 409, 429) and error.code < 500:
                    break  # the request itself is wrong: asking again changes nothing
                pause = max(pause, _seconds(error.headers.get("Retry-After")))
            except (urllib.error.URLError, TimeoutError, ConnectionError, json.JSONDecodeError) as error:
                why = f"{type(error).__name__}: {error}"
        raise RunError(f"{address} gave no answer after {number + 1} tries ({why}); answers so far are kept")


class _Pace:
    """Lets requests go no faster than so many a minute, from any number of threads."""

    def __init__(self, per_minute: float | None) -> None:
        import threading

        self._gap = 60 / per_minute if per_minute else 0.0
        self._lock, self._next = threading.Lock(), 0.0

    def wait(self) -> None:
        """Until it is this request's turn."""
        if not self._gap:
            return
        with self._lock:
            turn = max(time.monotonic(), self._next)
            self._next = turn + self._gap
        time.sleep(max(0.0, turn - time.monotonic()))


def _seconds(text: str | None) -> float:
    """What "Retry-After" says, where it is a number."""
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0


def _reported(logprobs: dict[str, Any] | None, interface: str) -> tuple[tuple[str, dict[str, float]], ...]:
    """Alternatives of every token as the two interfaces write them."""
    if not logprobs:
        raise RunError("the endpoint gives no log-probabilities; sampling.top_logprobs=0 does without")
    if interface == "completions":
        return tuple(zip(logprobs["tokens"], (dict(likely) for likely in logprobs["top_logprobs"]), strict=True))
    return tuple(
        (token["token"], {likely["token"]: likely["logprob"] for likely in token["top_logprobs"]})
        for token in logprobs["content"]
    )


# ---- what was said before


@dataclass(frozen=True)
class RecordedTeacher:
    """Answers from a file: whatever the prompt, what was once answered to the problem's question.

    path: JSON Lines or a JSON array; a row holds a question and answers to it; several rows of one question are
        several samples.
    questions: templates over the row's fields of the question as the problem words it, after its context if it has
        one; the first that a row fills counts. answers: templates of answers.
    """

    path: str
    questions: tuple[str, ...] = ("{question}",)
    answers: tuple[str, ...] = ("{answer}",)
    broken: Broken = "refuse"

    recorded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("text_teacher=recorded needs a file: text_teacher.path=FILE")
        if not Path(self.path).is_file():
            raise ConfigError(f"text_teacher.path={self.path}: there is no such file")
        if not self.answers:
            raise ConfigError("text_teacher.answers: name at least one, for instance ['{rationale} --> {answer}']")

    @contextmanager
    def opened(self, base: LanguageModel, bench: Bench) -> Iterator[Ask]:
        """See TextTeacher. The file is read once, into a table on disk: memory does not grow with it."""
        place = bench.scratch / "recorded.sqlite"
        place.unlink(missing_ok=True)  # of a run that was killed, perhaps while it was written
        with closing(sqlite3.connect(place)) as table:
            table.execute("CREATE TABLE said (question TEXT, answer TEXT)")
            table.executemany("INSERT INTO said VALUES (?, ?)", self._rows())
            table.execute("CREATE INDEX by_question ON said (question)")
            table.commit()

            def ask(requests: Iterable[Request]) -> Iterator[tuple[Request, list[Answer]]]:
                for request in requests:
                    problem = request.problem
                    asked = _squeezed(f"{problem.context} {problem.question}" if problem else request.prompt)
                    found = table.execute(
                        "SELECT answer FROM said WHERE question = ? ORDER BY rowid LIMIT ?",
                        (asked, request.sampling.samples),
                    ).fetchall()
                    yield request, _counted([Answer(text) for (text,) in found], request, base, bench)

            yield ask
        place.unlink(missing_ok=True)

    def _rows(self) -> Iterator[tuple[str, str]]:
        for number, row in numbered_rows(Path(self.path), self.broken):
            question = next(filter(None, (_filled(template, row) for template in self.questions)), None)
            said = [_filled(answer, row) for answer in self.answers]
            if question is None or None in said:
                pass_over(self.path, number, f"its fields ({', '.join(row)}) do not fill the templates", self.broken)
                continue
            yield from ((_squeezed(question), answer) for answer in said)


def _filled(template: str, row: dict[str, Any]) -> str | None:
    try:
        return template.format(**row)
    except (KeyError, TypeError, IndexError, AttributeError):
        return None


@dataclass(frozen=True)
class WorkedTeacher:
    """Worked solutions that the problems carry, with a known share of planted errors: a teacher without a model.

    answers: templates over the problem's fields, the first that has all it names.
    error_rate: share of problems, chosen by their text, whose answer is given wrong (numbers one too high; other
        answers another choice, or "yes" for "no").
    """

    answers: tuple[str, ...] = ("{rationale} The answer is {gold}.",)
    error_rate: float = 0.0

    recorded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.error_rate <= 1:
            raise ConfigError(f"text_teacher.error_rate={self.error_rate}: must lie between 0 and 1")
        if not self.answers:
            raise ConfigError("text_teacher.answers: name at least one template")

    @contextmanager
    def opened(self, base: LanguageModel, bench: Bench) -> Iterator[Ask]:
        """See TextTeacher."""

        def ask(requests: Iterable[Request]) -> Iterator[tuple[Request, list[Answer]]]:
            for request in requests:
                said = [] if request.problem is None else [Answer(self.said(request.problem))]
                yield request, _counted(said, request, base, bench)

        yield ask

    def errs(self, problem: Problem) -> bool:
        """Whether this problem is one of those that it gets wrong."""
        return int(problem.id, 16) % 10_000 < self.error_rate * 10_000

    def said(self, problem: Problem) -> str:
        """Its answer."""
        fields = problem.fields()
        if self.errs(problem):
            fields |= {"gold": _wrong(problem), "equation": _wrong(problem), "program": f"answer = {_wrong(problem)!r}"}
        for template in self.answers:
            named = [name for name in fields if "{" + name + "}" in template]
            if all(fields[name] for name in named):
                return template.format(**fields)
        raise RunError(
            f"text_teacher=worked: the problem {problem.question[:60]!r} carries no worked solution "
            f"({', '.join(self.answers)}); use text_teacher=recorded, itself, model or endpoint"
        )


def _wrong(problem: Problem) -> str:
    if problem.choices:
        return next(choice for choice in problem.choices if choice != problem.gold)
    if problem.gold in ("yes", "no"):
        return "no" if problem.gold == "yes" else "yes"
    try:
        return f"{float(problem.gold) + 1:g}"
    except ValueError:
        return problem.gold[::-1] + "?"


def _counted(answers: list[Answer], request: Request, base: LanguageModel, bench: Bench) -> list[Answer]:
    """Answers with what they would cost in tokens of the student's tokenizer, counted into the log."""
    prompt = len(base.tokenizer(request.prompt, verbose=False)["input_ids"])
    costed = [
        replace(answer, prompt_tokens=prompt, tokens=len(base.tokenizer(answer.text, verbose=False)["input_ids"]))
        for answer in answers
    ]
    counts = bench.log.counts
    counts["teacher prompts"] += 1
    counts["teacher prompt tokens"] += sum(answer.prompt_tokens for answer in costed)
    counts["teacher tokens"] += sum(answer.tokens for answer in costed)
    return costed


def _squeezed(text: str) -> str:
    """Without differences of white space: the same question is recorded with and without line breaks."""
    return " ".join(text.split())
