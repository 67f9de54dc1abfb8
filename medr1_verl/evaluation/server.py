"""The engine's interface over a running OpenAI-compatible server, so that a 72B baseline needs no GPU here.

The pictures travel as they are in the rows (PNG, in the message); bringing them to the model's patch grid, and
applying the chat template, is the server's part. A key is read from ``OPENAI_API_KEY``.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

from medr1_verl.errors import UserError
from medr1_verl.evaluation.engine import Decoding, Output, split_content
from medr1_verl.evaluation.questions import Question
from medr1_verl.prompt import IMAGE_MARK

RETRIED = {408, 425, 429, 500, 502, 503, 504}
ATTEMPTS = 5


class _TemporaryFault(Exception):
    """What may go away by itself: a busy server, a lost connection. ``wait``: the seconds that the server asked for."""

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


class ServerEngine:
    """Asks a server, ``concurrency`` requests at a time; a busy or lost one is tried again a few times."""

    def __init__(
        self, base_url: str, model: str, concurrency: int = 16, timeout: float = 600.0, first_wait: float = 1.0
    ):
        """Check that the server answers and serves ``model``; raises :class:`UserError` in one line where not."""
        if not base_url.startswith(("http://", "https://")) or concurrency < 1:
            raise UserError(
                f"--base-url {base_url}: give an http(s) address such as http://localhost:8000/v1, "
                "and a --concurrency of at least 1"
            )
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.concurrency = concurrency
        self.timeout = timeout
        self.first_wait = first_wait
        self.chunk = 64 * concurrency
        self._check_model()

    def ask(
        self, questions: Sequence[Question], decoding: Decoding, max_tokens: int
    ) -> Iterator[tuple[Question, list[Output]]]:
        """Each question with its ``decoding.n`` outputs, as they come in. Raises :class:`UserError` for the first that
        the server finally refuses, after those already under way have been given out.
        """
        pool = ThreadPoolExecutor(self.concurrency)
        futures: dict[Future[list[Output]], Question] = {
            pool.submit(self._answer, question, decoding, max_tokens): question for question in questions
        }
        fault: UserError | None = None
        try:
            for future in as_completed(futures):
                try:
                    if not future.cancelled():
                        yield futures[future], future.result()
                except UserError as error:
                    fault = fault or error
                    for other in futures:
                        other.cancel()
        finally:
            pool.shutdown(cancel_futures=True)
        if fault is not None:
            raise fault

    def finish(self) -> None:
        """Nothing to clean up."""

    def _answer(self, question: Question, decoding: Decoding, max_tokens: int) -> list[Output]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages(question),
            "temperature": decoding.temperature,
            "max_tokens": max_tokens,
        }
        if decoding.temperature > 0:
            body |= {"top_p": decoding.top_p, "n": decoding.n, "seed": decoding.seed_of(question.question_id)}
        for attempt in range(1, ATTEMPTS + 1):
            try:
                reply = self._post(body)
                break
            except _TemporaryFault as error:
                if attempt == ATTEMPTS:
                    raise UserError(
                        f"{self.base_url}: {error} (question {question.question_id!r}, {ATTEMPTS} attempts); "
                        "finished answers are kept, run the same command again to go on"
                    ) from error
                time.sleep(self.first_wait * 2 ** (attempt - 1) if error.wait is None else min(error.wait, 60.0))
        try:
            choices = reply["choices"]
            used = (reply.get("usage") or {}).get("completion_tokens")
            tokens = None if used is None else round(used / len(choices))
            outputs = [
                Output(choice["message"]["content"] or "", tokens, int(choice.get("finish_reason") == "length"))
                for choice in choices
            ]
            if len(outputs) != decoding.n:
                raise ValueError(f"{len(outputs)} choices instead of {decoding.n}")
        except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
            raise UserError(
                f"{self.base_url}: question {question.question_id!r} was answered with something that is no chat "
                f"completion ({type(error).__name__}: {error})"
            ) from error
        return outputs

    def _post(self, body: dict[str, Any]) -> Any:
        return self._request("/chat/completions", json.dumps(body).encode())

    def _check_model(self) -> None:
        try:
            reply = self._request("/models", None, timeout=min(self.timeout, 30.0))
            served = [str(entry["id"]) for entry in reply["data"]]
        except _TemporaryFault as error:
            raise UserError(
                f"{self.base_url}: {error}; is the server running, and is this its address (with /v1)?"
            ) from error
        except (UserError, KeyError, TypeError) as error:
            if isinstance(error, UserError) and "404" not in str(error):
                raise
            return  # a server without a model list: the first question will tell
        if self.model not in served:
            raise UserError(
                f"{self.base_url}: serves {', '.join(served) or 'no model'}, not {self.model!r}; set --model"
            )

    def _request(self, path: str, data: bytes | None, timeout: float | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        request = urllib.request.Request(self.base_url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout or self.timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            told = f"answered {error.code} {error.reason}: {_reason(error)}"
            if error.code in RETRIED:
                raise _TemporaryFault(told, _seconds(error.headers.get("Retry-After"))) from error
            if error.code in (401, 403):
                told += "; set OPENAI_API_KEY"
            raise UserError(f"{self.base_url}: {told}") from error
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise _TemporaryFault(f"cannot be reached ({reason})") from error
        except ValueError as error:
            raise UserError(
                f"{self.base_url}{path}: answered something that is not JSON; is this an OpenAI-compatible server?"
            ) from error


def messages(question: Question) -> list[dict[str, Any]]:
    """The question in the server's format: pictures as data addresses at the place of their marks."""
    pictures = iter(question.load_images())
    made = []
    for message in question.messages:
        content: Any = message["content"]
        if IMAGE_MARK in content:
            content = [
                {"type": "image_url", "image_url": {"url": _data_address(next(pictures))}}
                if part["type"] == "image"
                else part
                for part in split_content(content)
            ]
        made.append({"role": message["role"], "content": content})
    return made


def _data_address(picture: Any) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _reason(error: urllib.error.HTTPError) -> str:
    """What the server says is wrong, on one line."""
    try:
        body = error.read(10_000).decode(errors="replace")
    except OSError:
        return "no explanation"
    try:
        told = json.loads(body)
        told = told.get("error", told)
        body = told.get("message", body) if isinstance(told, dict) else str(told)
    except (ValueError, AttributeError):
        pass
    return " ".join(str(body).split())[:300] or "no explanation"


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text is not None else None
    except ValueError:
        return None
