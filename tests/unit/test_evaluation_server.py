"""The client against a small HTTP server of this process; vLLM's own server is asked in tests/e2e."""

import base64
import contextlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from medr1_verl.errors import UserError
from medr1_verl.evaluation.engine import Decoding
from medr1_verl.evaluation.questions import Question
from medr1_verl.evaluation.server import ServerEngine, messages

GREEDY = Decoding()


def question(number=0):
    return Question(
        question_id=f"q{number}",
        data_source="omnimedvqa/ct",
        dataset="set",
        modality="ct",
        question_type="disease_diagnosis",
        style="think",
        messages=({"role": "user", "content": f"<image>Question {number}?"},),
        question=f"Question {number}?",
        options=("yes", "no"),
        answer="A",
        image_sha256="0",
        load_images=lambda: [Image.new("RGB", (30, 20), (9, 8, 7))],
    )


def completion(body, text="<answer>A</answer>", finish="stop"):
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    n = body.get("n", 1)
    return 200, {"choices": [choice] * n, "usage": {"completion_tokens": 12 * n}}


@pytest.fixture
def serve():
    """``serve(answer)`` starts a server that gives ``answer(body, requests before)``; returns its address."""
    servers = []

    def start(answer, models=("m",)):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(200, {"data": [{"id": name} for name in models]} if models is not None else {})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    seen.append(body)
                    before = len(seen) - 1
                self.reply(*answer(body, before))

            def reply(self, code, content, headers=None):
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

            def handle(self):
                with contextlib.suppress(OSError):  # the client of the time-out test is gone
                    super().handle()

        lock = threading.Lock()
        seen = []
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(engine, n=1, decoding=GREEDY):
    return {q.question_id: outputs for q, outputs in engine.ask([question(i) for i in range(n)], decoding, 64)}


def test_what_is_sent_and_what_comes_back(serve):
    address, seen = serve(lambda body, before: completion(body, "<answer>B</answer>", "length"))
    answers = ask(ServerEngine(address + "/", "m"), 3)
    assert sorted(answers) == ["q0", "q1", "q2"]
    assert answers["q0"] == [("<answer>B</answer>", 12, 1)]
    body = min(seen, key=lambda one: one["messages"][0]["content"][1]["text"])
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.0, 64)
    picture, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "Question 0?"}
    data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).getpixel((0, 0)) == (9, 8, 7)


def test_samples_are_seeded_per_question(serve):
    address, seen = serve(lambda body, before: completion(body))
    decoding = Decoding(temperature=1.0, n=3, seed=5)
    assert len(ask(ServerEngine(address, "m"), 2, decoding)["q1"]) == 3
    assert {body["seed"] for body in seen} == {decoding.seed_of("q0"), decoding.seed_of("q1")}
    assert {body["n"] for body in seen} == {3}


def test_busy_server_is_tried_again(serve):
    def answer(body, before):
        if before < 2:
            return 503, {"error": {"message": "warming up"}}, {"Retry-After": "0"}
        return completion(body)

    address, seen = serve(answer)
    assert ask(ServerEngine(address, "m", concurrency=1))["q0"][0].text == "<answer>A</answer>"
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda body, before: (503, {"error": {"message": "warming\nup"}}), "answered 503 .*: warming up .*5 attempts"),
        (
            lambda body, before: (400, {"error": {"message": "prompt too long"}}),
            "answered 400 Bad Request: prompt too long",
        ),
        (lambda body, before: (401, {"message": "no key"}), "answered 401 .*no key; set OPENAI_API_KEY"),
        (lambda body, before: (200, b"<html>"), "something that is not JSON"),
        (lambda body, before: (200, {"choices": []}), "something that is no chat completion"),
        (lambda body, before: (200, {"choices": [{"text": "old"}]}), "something that is no chat completion"),
        (lambda body, before: (200, []), "something that is no chat completion"),
    ],
)
def test_faults_are_one_line(serve, answer, says):
    address, _ = serve(answer)
    with pytest.raises(UserError, match=says) as error:
        ask(ServerEngine(address, "m", first_wait=0.001))
    assert "\n" not in str(error.value)


def test_answers_before_a_fault_are_given_out(serve):
    def answer(body, before):
        return completion(body) if before < 2 else (400, {"error": {"message": "broken"}})

    address, seen = serve(answer)
    answers = ServerEngine(address, "m", concurrency=1).ask([question(i) for i in range(50)], GREEDY, 8)
    got = [next(answers)[0].question_id, next(answers)[0].question_id]
    with pytest.raises(UserError, match="broken"):
        next(answers)
    assert got == ["q0", "q1"]
    assert len(seen) < 50, "the rest was not asked"


def test_wrong_model_address_or_no_server(serve):
    address, _ = serve(lambda body, before: completion(body), models=("other", "third"))
    with pytest.raises(UserError, match="serves other, third, not 'm'; set --model"):
        ServerEngine(address, "m")
    with pytest.raises(UserError, match="is the server running"):
        ServerEngine("http://127.0.0.1:9", "m")
    with pytest.raises(UserError, match="give an http"):
        ServerEngine("localhost:8000", "m")
    address, _ = serve(lambda body, before: completion(body), models=None)
    assert ask(ServerEngine(address, "m")), "a server without a model list is asked all the same"


def test_silent_server_times_out(serve):
    release = threading.Event()

    def answer(body, before):
        release.wait(5)
        return completion(body)

    address, _ = serve(answer)
    try:
        with pytest.raises(UserError, match=r"cannot be reached .*timed out"):
            ask(ServerEngine(address, "m", timeout=0.05, first_wait=0.001))
    finally:
        release.set()


def test_text_only_is_plain_text():
    asked = question()
    plain = messages(asked)[0]["content"]
    assert isinstance(plain, list)
    from medr1_verl.evaluation.controls import apply_control

    assert messages(apply_control([asked], "text-only")[0]) == [{"role": "user", "content": "Question 0?"}]
