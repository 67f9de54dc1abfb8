"""``medr1 ask``: one question about one image, answered by a model, with its audit record; or a small local web page.

    medr1 ask --model runs/NAME/model image.png "Which modality is this?" --option CT --option MRI
    medr1 ask --model runs/NAME/model --serve

The image is prepared as the converter prepares it (fitted into 384 x 384, only its pixels kept), and asked with the
project's prompt, as in training.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from medr1_verl.audit.trail import Trail
from medr1_verl.convert.images import convert_image
from medr1_verl.convert.question import RejectedError
from medr1_verl.errors import UserError
from medr1_verl.evaluation.engine import Decoding, EngineOptions, OfflineEngine, check_model
from medr1_verl.evaluation.evaluate import model_name, prompt_sha256
from medr1_verl.evaluation.questions import Question
from medr1_verl.evaluation.server import ServerEngine
from medr1_verl.parsing import LETTERS, parse, why_malformed
from medr1_verl.prompt import Template, load_template, render_prompt
from medr1_verl.styles import STYLES

STATEMENT = "This is no medical device: for research and demonstration only. Do not use an answer for a patient."
MAX_BYTES = 200 * 2**20


def prepare_image(data: bytes, size: int = 384) -> Image.Image:
    """What a model is shown of an image file: fitted into ``size``, RGB, nothing but pixels. Raises UserError."""
    try:
        return Image.fromarray(convert_image(data, size).pixels).convert("RGB")
    except RejectedError as error:
        raise UserError(f"the image cannot be used: {error}") from error


def make_question(
    data: bytes, text: str, options: Sequence[str], style: str, size: int = 384, template: Template | None = None
) -> Question:
    """A question like a row of a data set, whose answer nobody knows. Raises :class:`UserError`."""
    text, options = text.strip(), [option.strip() for option in options]
    if not text:
        raise UserError("the question is empty")
    if len(options) == 1 or not all(options) or len(set(options)) < len(options):
        raise UserError("give no option (an open question), or two or more that differ and are not empty")
    if len(options) > len(LETTERS):
        raise UserError(f"{len(options)} options are too many; there are {len(LETTERS)} letters")
    if "<image>" in text or any("<image>" in option for option in options):
        raise UserError("the question and its options may not hold the mark <image>")
    picture = prepare_image(data, size)
    source = hashlib.sha256(data).hexdigest()
    name = hashlib.sha256("\0".join([source, text, *options]).encode()).hexdigest()[:16]
    return Question(
        question_id=f"asked_{name}",
        data_source="",
        dataset="",
        modality="",
        question_type="",
        style=style,
        messages=({"role": "user", "content": render_prompt(text, options, style, 1, template)},),
        question=text,
        options=tuple(options),
        answer="",
        image_sha256=source,
        load_images=lambda: [picture],
    )


class Asker:
    """A model that is ready to be asked, and the audit log of what it answered."""

    def __init__(
        self,
        model: str,
        audit: Path,
        *,
        base_url: str | None = None,
        template: Template | None = None,
        key: Path | None = None,
        decoding: Decoding | None = None,
        max_tokens: int = 256,
        options: EngineOptions | None = None,
    ):
        """Start the engine (a minute or so), or find the server. Raises :class:`UserError`."""
        if base_url is None:
            check_model(model)
        self.decoding, self.max_tokens, self.template = decoding or Decoding(), max_tokens, template
        self.name = model_name(model)
        self._trail = Trail(
            audit, model, self.name, [], source="question", served=base_url is not None, template=template, key=key
        )
        try:
            if base_url is not None:
                self._engine: OfflineEngine | ServerEngine = ServerEngine(base_url, model)
            else:
                print(f"starting vLLM with {model} (a minute or so)", file=sys.stderr)
                log = Path(tempfile.gettempdir()) / f"medr1-ask-{os.getpid()}.log"
                self._engine = OfflineEngine(model, options, 1, log)
            self._trail.start([], asking=True, afresh=False)
        except BaseException:
            self._trail.stop()
            raise

    def ask(self, question: Question) -> dict[str, Any]:
        """One answer: output, reasoning, pred (letter), said (the option, or what stands as answer), why (a fault)."""
        watched = self._trail.watch(question)
        _, outputs = next(iter(self._engine.ask([watched], self.decoding, self.max_tokens)))
        output = outputs[0]
        read = parse(output.text, question.style, question.options)
        row = {
            "question_id": question.question_id,
            "style": question.style,
            "control": "none",
            "decoding": self.decoding.name,
            "output": output.text,
            "pred": read.pred,
            "format": int(read.format),
            "parsed": int(bool(read.pred if question.options else read.answer)),
            "options": list(question.options),
            "image_sha256": question.image_sha256,
            "prompt_sha256": prompt_sha256(question),
            "tokens": output.tokens,
            "truncated": output.truncated,
            "max_tokens": self.max_tokens,
        }
        self._trail.answer(question, row, self.decoding, outputs)
        self._trail.write()
        said = question.options[LETTERS.index(read.pred)] if read.pred else read.answer or ""
        return row | {
            "reasoning": read.think,
            "said": said,
            "why": why_malformed(output.text, question.style),
        }

    def close(self, finished: bool = True) -> None:
        """Close the audit log, or leave it to be gone on with."""
        if finished:
            self._trail.finish()
            self._engine.finish()
        self._trail.stop()


def verdict(answer: dict[str, Any]) -> str:
    """The option with its letter, the answer to an open question, or why there is none."""
    if answer["pred"]:
        return f"{answer['pred']}) {answer['said']}"
    if answer["said"] and not answer["options"]:
        return answer["said"]
    return "none that can be read" + (f" ({answer['why']})" if answer["why"] else "")


def as_text(answer: dict[str, Any]) -> str:
    """For the screen. Characters that would move the cursor or turn the text around are shown by their code."""
    lines = [f"reasoning: {answer['reasoning'] or '-'}", f"answer:    {verdict(answer)}"]
    if not answer["format"]:
        lines.append(f"output:    {answer['output']}")
    if answer["truncated"]:
        lines.append("The output was cut off at the length limit (--max-tokens).")
    text = "\n".join(lines)
    return "".join(ch if ch == "\n" or ch.isprintable() else f"[U+{ord(ch):04X}]" for ch in text)


def _serve(asker: Asker, style: str, size: int, port: int) -> None:
    """A page on localhost, by Gradio: image, question, options, answer. Ends with Ctrl-C.

    Gradio keeps what is uploaded as files; they are in a folder that goes when the page ends.
    """
    with tempfile.TemporaryDirectory(prefix="medr1-ask-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        import gradio

        page = build_page(asker, style, size)
        try:
            page.launch(
                server_name="127.0.0.1",
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=MAX_BYTES,
            )
        except OSError as error:
            raise UserError(f"port {port} cannot be used ({error}); give another --port") from error
        print(f"http://127.0.0.1:{port} on this machine only; Ctrl-C ends it. {STATEMENT}", flush=True)
        try:
            page.block_thread()
        finally:
            gradio.close_all(verbose=False)


def build_page(asker: Asker, style: str, size: int) -> Any:
    """The Gradio page; ``answer`` is its one function."""
    import gradio

    def answer(path: str | None, text: str, options: str) -> tuple[str, str, str]:
        if not path:
            raise gradio.Error("Give an image first.", print_exception=False)
        try:
            lines = [line for line in (options or "").splitlines() if line.strip()]
            data = Path(path).read_bytes()
            found = asker.ask(make_question(data, text or "", lines, style, size, asker.template))
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from error
        return verdict(found), found["reasoning"], found["output"]

    with gradio.Blocks(title="Med-R1", analytics_enabled=False) as page:
        gradio.Markdown(f"# {asker.name}\n\n**{STATEMENT}**")
        with gradio.Row():
            image = gradio.Image(type="filepath", label="Image", sources=["upload"])
            with gradio.Column():
                text = gradio.Textbox(label="Question", lines=2)
                options = gradio.Textbox(label="Options, one a line (none: an open question)", lines=4)
                button = gradio.Button("Ask", variant="primary")
                said = gradio.Textbox(label="Answer", interactive=False)
                why = gradio.Textbox(label="Reasoning", interactive=False, lines=4)
                output = gradio.Textbox(label="Raw output", interactive=False, lines=4)
        button.click(answer, [image, text, options], [said, why, output], api_name="ask", concurrency_limit=1)
    return page


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="medr1 ask", description=f"One question about one image. {STATEMENT}")
    parser.add_argument("image", nargs="?", type=Path, help="image file")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--model", required=True, help="model directory or hub id; with --base-url the served name")
    parser.add_argument("--option", action="append", default=[], metavar="TEXT", help="one for each option, A first")
    parser.add_argument("--style", choices=tuple(STYLES), default="think")
    parser.add_argument("--template", help="prompt template file instead of the project's wording")
    parser.add_argument("--image-size", type=int, default=384, help="fit the image into N x N (default 384, as data)")
    parser.add_argument("--audit", type=Path, metavar="FILE", help="audit log (default: asked-<UTC time>.jsonl here)")
    parser.add_argument("--audit-key", type=Path, metavar="KEY", help="Ed25519 private key that signs the log")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--base-url", help="of an OpenAI-compatible server that serves the model")
    parser.add_argument("--serve", action="store_true", help="a web page on this machine, instead of one question")
    parser.add_argument("--port", type=int, default=7860)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    question = None
    template = load_template(args.template) if args.template else None
    if args.serve and find_spec("gradio") is None:
        raise UserError("the page needs the library gradio: pip install 'medr1-verl[serve]'")
    if not args.serve:
        if args.image is None or args.question is None:
            raise UserError('give an image and a question: medr1 ask --model M image.png "question" (or --serve)')
        question = make_question(
            read_image(args.image), args.question, args.option, args.style, args.image_size, template
        )
    audit = args.audit or Path(time.strftime("asked-%Y%m%d-%H%M%S.jsonl", time.gmtime()))
    asker = Asker(
        args.model,
        audit,
        base_url=args.base_url,
        template=template,
        key=args.audit_key,
        decoding=Decoding(args.temperature, seed=args.seed),
        max_tokens=args.max_tokens,
    )
    finished = False
    try:
        if question is None:
            try:
                _serve(asker, args.style, args.image_size, args.port)
            except KeyboardInterrupt:
                print("ended", file=sys.stderr)
        else:
            print(as_text(asker.ask(question)))
            print(f"record:    {question.question_id} in {audit}\n{STATEMENT}")
        finished = True
    finally:
        asker.close(finished)
    return 0


def read_image(path: Path) -> bytes:
    """The file's bytes; raises :class:`UserError` for one that is missing or too large to be an image."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: is larger than {MAX_BYTES // 2**20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
