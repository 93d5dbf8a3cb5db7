"""Teachers that answer in words: what they say, what is kept, what is asked again, what it costs."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from harness.answers import RULES
from harness.errors import ConfigError, RunError
from harness.method import TrainingLog
from harness.problems import ArithmeticProblems, made
from methods.distillation.text_teachers import (
    Answer,
    EndpointTeacher,
    EngineTeacher,
    KeptAnswers,
    RecordedTeacher,
    Request,
    Sampling,
    WorkedTeacher,
    drawing,
    in_batches,
    key_of,
    weights_digest,
)

QUESTIONS = ["first", "second one", "the third of them", "4th"]


def asked(teacher, base, bench, requests) -> list[list[Answer]]:
    with teacher.opened(base, bench) as ask:
        return [answers for _, answers in ask(requests)]


# ---- what is kept


def test_a_kept_answer_comes_back_as_it_was(tmp_path):
    answer = Answer("4 → ½\n", "length", 7, 3, (("4", {"4": -0.25, " ": -1.5}), (" ", {" ": 0.0})))
    with closing(KeptAnswers(tmp_path / "answers.sqlite")) as kept:
        assert kept.get("key") is None
        kept.put("key", answer)
    with closing(KeptAnswers(tmp_path / "answers.sqlite")) as kept:
        assert kept.get("key") == answer


def test_a_key_is_of_everything_that_decides_an_answer():
    request = Request("What?", sampling=Sampling(samples=4, temperature=0.7), seed=1)
    others = [
        ({"name": "other"}, request, 0),
        ({"name": "a"}, replace(request, prompt="What"), 0),
        ({"name": "a"}, replace(request, sampling=Sampling(samples=4, temperature=0.8)), 0),
        ({"name": "a"}, replace(request, sampling=Sampling(temperature=0.7, new_tokens=64)), 0),
        ({"name": "a"}, replace(request, seed=2), 0),
        ({"name": "a"}, request, 1),
    ]
    keys = {key_of({"name": "a"}, request, 0), *(key_of(*other) for other in others)}
    assert len(keys) == len(others) + 1


def test_the_first_samples_of_more_are_those_of_fewer():
    few, many = (Request("What?", sampling=Sampling(samples=n, temperature=0.7)) for n in (2, 8))
    assert key_of({}, few, 1) == key_of({}, many, 1)
    greedy = Request("What?")
    assert key_of({}, greedy, 0) == key_of({}, replace(greedy, seed=5), 0)  # greedy answers need no seed


# ---- a model of ours


def test_a_model_answers_greedily_as_it_decodes_and_a_second_run_asks_nothing(trained, bench, monkeypatch):
    requests = [Request(text, sampling=Sampling(new_tokens=8)) for text in QUESTIONS]
    first = asked(EngineTeacher(batch=2), trained, bench, requests)
    for request, (answer,) in zip(requests, first, strict=True):
        ids = trained.tokenizer(request.prompt, return_tensors="pt")["input_ids"]
        steps = [int(step) for step in trained.engine.generate(ids, 8)]
        assert answer.text == trained.tokenizer.decode(steps)
        assert (answer.prompt_tokens, answer.tokens, answer.finish) == (ids.shape[1], 8, "length")
    counts = bench.log.counts
    assert counts["asked of the teacher"] == 4
    assert counts["teacher tokens"] == 32
    monkeypatch.setattr(trained.engine, "generate", None)
    again = replace(bench, log=TrainingLog())
    assert asked(EngineTeacher(batch=2), trained, again, requests) == first
    assert again.log.counts["asked of the teacher"] == 0
    assert again.log.counts["teacher tokens"] == 32  # a run costs what it costs, whoever paid


def test_what_is_drawn_does_not_depend_on_the_batch(trained, bench, tmp_path):
    sampling = Sampling(samples=3, temperature=1.0, top_p=0.9, new_tokens=6)
    requests = [Request(text, sampling=sampling, seed=3) for text in QUESTIONS]
    together = asked(EngineTeacher(batch=12), trained, bench, requests)
    apart = replace(bench, cache=tmp_path / "other")
    assert asked(EngineTeacher(batch=1), trained, apart, requests[::-1])[::-1] == together
    assert len({answer.text for answers in together for answer in answers}) > 4
    reseeded = [replace(request, seed=4) for request in requests]
    assert asked(EngineTeacher(), trained, bench, reseeded) != together


def test_drawing_follows_the_distribution_and_its_cut():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(20_000, -1)
    uniforms = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))
    shares = drawing(Sampling(temperature=1.0), uniforms)(logits, 0).bincount(minlength=4) / 20_000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.015)
    cut = drawing(Sampling(temperature=1.0, top_p=0.7), uniforms)(logits, 0).bincount(minlength=4) / 20_000
    assert torch.allclose(cut, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.015)


def test_alternatives_are_texts_with_log_probabilities(trained, bench):
    request = Request("The red cat", sampling=Sampling(new_tokens=3, top_logprobs=4))
    ((answer,),) = asked(EngineTeacher(), trained, bench, [request])
    assert "".join(piece for piece, _ in answer.top) == answer.text
    for piece, likely in answer.top:
        assert max(likely, key=likely.get) == piece  # greedy
        assert sum(torch.tensor(list(likely.values())).exp()) <= 1


def test_another_model_teaches_if_one_is_named(trained, bench):
    from harness.models import RandomModel
    from tests.conftest import SHAPE

    other = EngineTeacher(RandomModel("other", "llama", SHAPE, seed=9))
    request = Request("The red cat", sampling=Sampling(new_tokens=8))
    assert asked(other, trained, bench, [request]) != asked(EngineTeacher(), trained, bench, [request])


def test_a_chat_template_is_filled_and_told_apart(trained, bench):
    request = Request("The red cat", sampling=Sampling(new_tokens=8))
    with pytest.raises(RunError, match="no chat template"):
        asked(EngineTeacher(chat_template=True), trained, bench, [request])
    trained.tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    ((chatted,),) = asked(EngineTeacher(chat_template=True), trained, bench, [request])
    ((plain,),) = asked(EngineTeacher(), trained, bench, [replace(request, prompt="<The red cat>")])
    assert (chatted.text, chatted.prompt_tokens) == (plain.text, 13)


def test_weights_have_a_digest_of_their_own(trained):
    before = weights_digest(trained)
    assert weights_digest(trained) == before
    next(trained.module.parameters()).data.view(-1)[0] += 1
    assert weights_digest(trained) != before


# ---- an endpoint


class Server(ThreadingHTTPServer):
    """Answers like an OpenAI-compatible endpoint: the prompt in capitals. `failures`: statuses to answer first."""

    def __init__(self, failures=(), delay=0.0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.failures, self.delay = list(failures), delay
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers.get("Authorization"))
            self.server.times.append(time.monotonic())
            failure = self.server.failures.pop(0) if self.server.failures else None
        time.sleep(self.server.delay)
        if failure:
            self.send_response(failure)
            self.send_header("Retry-After", "0.2")
            self.end_headers()
            self.wfile.write(b"busy")
            return
        chat = self.path.endswith("/chat/completions")
        text = (body["messages"][0]["content"] if chat else body["prompt"]).upper()
        choice = {"finish_reason": "length" if len(text) > 20 else "stop"}
        choice |= {"message": {"content": text}} if chat else {"text": text}
        if body.get("logprobs"):
            tokens = [{"token": c, "top_logprobs": [{"token": c, "logprob": -0.1}]} for c in text]
            plain = {"tokens": list(text), "top_logprobs": [{c: -0.1} for c in text]}
            choice["logprobs"] = {"content": tokens} if chat else plain
        reply = {"choices": [choice], "usage": {"prompt_tokens": len(text), "completion_tokens": 2}}
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_) -> None:
        """Quiet."""


@pytest.fixture
def serve(monkeypatch):
    servers = []

    def start(**settings) -> Server:
        servers.append(Server(**settings))
        monkeypatch.setenv("OPENAI_BASE_URL", servers[-1].url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def endpoint(**changes) -> EndpointTeacher:
    return EndpointTeacher(**({"model": "big", "first_pause_seconds": 0.01} | changes))


@pytest.mark.parametrize("interface", ["chat", "completions"])
def test_an_endpoint_is_asked_in_its_protocol(interface, serve, bench):
    server = serve()
    sampling = Sampling(new_tokens=9, stop=("\n",), top_logprobs=1)
    answers = asked(endpoint(interface=interface), None, bench, [Request(q, sampling=sampling) for q in QUESTIONS])
    assert [answer.text for (answer,) in answers] == [question.upper() for question in QUESTIONS]
    assert answers[0][0] == Answer("FIRST", "stop", 5, 2, tuple((c, {c: -0.1}) for c in "FIRST"))
    body = server.bodies[0]
    assert (body["model"], body["max_tokens"], body["stop"], body["temperature"]) == ("big", 9, ["\n"], 0.0)
    assert bench.log.counts["teacher tokens"] == 8


def test_the_key_is_sent_and_never_kept(serve, bench):
    server = serve()
    asked(endpoint(), None, bench, [Request("hello")])
    assert server.keys == ["Bearer sk-secret"]
    for file in bench.scratch.rglob("*"):
        assert b"sk-secret" not in file.read_bytes()
    assert "sk-secret" not in repr(endpoint())


def test_a_busy_server_is_asked_again_after_the_pause_that_it_wants(serve, bench):
    server = serve(failures=[429, 503, 500])
    assert asked(endpoint(parallel=1), None, bench, [Request("hello")]) == [[Answer("HELLO", "stop", 5, 2)]]
    assert len(server.bodies) == 4
    assert all(later - earlier >= 0.2 for earlier, later in zip(server.times, server.times[1:], strict=False))


def test_a_wrong_request_is_not_repeated_and_patience_ends(serve, bench):
    server = serve(failures=[400])
    with pytest.raises(RunError, match=r"1 tries \(status 400"):
        asked(endpoint(), None, bench, [Request("hello")])
    assert len(server.bodies) == 1
    server.failures = [500] * 9
    with pytest.raises(RunError, match=r"3 tries \(status 500"):
        asked(endpoint(tries=3), None, bench, [Request("hello")])


def test_answers_are_kept_although_a_later_one_fails(serve, bench):
    server = serve()
    asked(endpoint(parallel=1), None, bench, [Request("one")])
    server.failures = [400]
    with pytest.raises(RunError):
        asked(endpoint(parallel=1), None, bench, [Request("one"), Request("two")])
    server.failures = []
    asked(endpoint(parallel=1), None, bench, [Request("one"), Request("two")])
    prompts = [body["messages"][0]["content"] for body in server.bodies]
    assert prompts == ["one", "two", "two"]


def test_requests_go_no_faster_than_they_may(serve, bench):
    server = serve()
    requests = [Request(question) for question in QUESTIONS]
    asked(endpoint(parallel=4, requests_per_minute=600), None, bench, requests)
    gaps = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    assert min(gaps) > 0.05  # 0.1 s apart, but for the time that threads and sockets take


def _ask_all(bench, requests) -> None:
    asked(endpoint(parallel=1), None, bench, requests)


def test_a_run_that_was_killed_asks_nothing_twice(serve, bench):
    server = serve(delay=0.05)
    requests = [Request(f"question {n}") for n in range(20)]
    process = multiprocessing.get_context("fork").Process(target=_ask_all, args=(bench, requests))
    process.start()
    while len(server.bodies) < 8:
        time.sleep(0.01)
    process.kill()
    process.join()
    in_flight = {body["messages"][0]["content"] for body in server.bodies[-2:]}
    time.sleep(0.1)
    answers = asked(endpoint(parallel=1), None, bench, requests)
    assert [answer.text for (answer,) in answers] == [request.prompt.upper() for request in requests]
    prompts = [body["messages"][0]["content"] for body in server.bodies]
    twice = {prompt for prompt in prompts if prompts.count(prompt) > 1}
    assert twice <= in_flight  # the last answer had not arrived, the one before was perhaps not on disk yet
    assert len(prompts) <= 22


def test_an_endpoint_without_address_or_model_says_so(bench, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(RunError, match="set OPENAI_BASE_URL"), endpoint().opened(None, bench):
        pass
    for changes, message in [
        ({"model": ""}, "model=NAME"),
        ({"interface": "x"}, "interface=x"),
        ({"tries": 0}, "tries=0"),
        ({"key_variable": "sk-the-key-itself"}, "name of an environment variable"),
    ]:
        with pytest.raises(ConfigError, match=message) as refused:
            endpoint(**changes)
        assert "the-key-itself" not in str(refused.value)


# ---- what was said before


def test_a_record_answers_its_questions_in_order_and_no_others(trained, bench, tmp_path):
    path = tmp_path / "said.jsonl"
    rows = [{"q": "What  is\n1?", "why": "One.", "a": 1}, {"q": "What is 2?", "why": "Two.", "a": 2}]
    rows.append({"q": "What is 1?", "why": "Uno.", "a": 1})
    path.write_text("\n".join(map(json.dumps, rows)))
    teacher = RecordedTeacher(str(path), ("{question}", "{q}"), ("{why} The answer is {a}.",))
    sampling = Sampling(samples=4, temperature=1.0)
    problems = [made(question, "1") for question in ("What is 1?", "What is 3?", "What is 2?")]
    found = asked(teacher, trained, bench, [Request("any", problem, sampling) for problem in problems])
    texts = [[answer.text for answer in answers] for answers in found]
    assert texts == [["One. The answer is 1.", "Uno. The answer is 1."], [], ["Two. The answer is 2."]]
    assert bench.log.counts["teacher tokens"] == len("".join(text for some in texts for text in some))  # bytes
    assert asked(teacher, trained, bench, [Request("any", problems[0])])[0][0].text == texts[0][0]


def test_a_row_that_does_not_fill_the_templates_is_refused_or_said(trained, bench, tmp_path, capsys):
    path = tmp_path / "said.jsonl"
    path.write_text('{"question": "a", "answer": "1"}\n{"question": "b"}\n')
    with pytest.raises(RunError, match="line 2"):
        asked(RecordedTeacher(str(path)), trained, bench, [])
    asked(RecordedTeacher(str(path), broken="skip"), trained, bench, [])
    assert "line 2 passed over" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no such file"):
        RecordedTeacher("/nowhere")


# ---- worked solutions


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_errors_are_planted_where_it_says_and_nowhere_else(rate, trained, bench):
    teacher, rule = WorkedTeacher(error_rate=rate), RULES["number"]
    problems = list(ArithmeticProblems(train=200, test=1).read("train"))
    found = asked(teacher, trained, bench, [Request("any", problem) for problem in problems])
    for problem, (answer,) in zip(problems, found, strict=True):
        assert rule.correct(answer.text, problem) != teacher.errs(problem)
    assert abs(sum(map(teacher.errs, problems)) / 200 - rate) < 0.1


def test_the_first_template_that_a_problem_fills_counts(trained, bench):
    teacher = WorkedTeacher(("{program}", "{rationale} So the answer is {gold}."))
    problem = made("What?", "yes", rationale="Because.")
    ((answer,),) = asked(teacher, trained, bench, [Request("any", problem)])
    assert answer.text == "Because. So the answer is yes."
    with pytest.raises(RunError, match="carries no worked solution"):
        asked(teacher, trained, bench, [Request("any", made("What?", "yes"))])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "samples=0"),
        ({"samples": 2}, "the same answer"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0"),
    ],
)
def test_samplings_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**changes)


def test_requests_are_read_no_further_than_a_batch(trained, bench):
    read = []

    def requests():
        for n in range(1000):
            read.append(n)
            yield Request(f"question {n}", sampling=Sampling(new_tokens=1))

    with EngineTeacher(batch=1).opened(trained, bench) as ask:
        next(ask(requests()))
    assert len(read) == 4
    assert list(in_batches(range(5), 2)) == [[0, 1], [2, 3], [4]]
