"""``medr1 audit``: is a log complete and unaltered, what does it say of an answer, and how do others read it?"""

from __future__ import annotations

import argparse
import base64
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from medr1_verl.audit.log import read_answers
from medr1_verl.audit.signing import load_private_key, load_public_key, signature_problem
from medr1_verl.audit.verify import Fault, Report, verify
from medr1_verl.errors import UserError


def _verify(args: argparse.Namespace) -> int:
    report = check(args.file, load_public_key(args.public_key) if args.public_key else None, args.root)
    for fault in report.faults:
        print(f"{args.file}: {fault}", file=sys.stderr)
    if report.faults:
        print(f"{args.file}: NOT VALID; the first {report.records} records are as they were written", file=sys.stderr)
        return 1
    footer = report.footer or {}
    if "signature" not in footer:
        signed = "not signed: note the root elsewhere to be able to prove that the file was not written anew"
    elif args.public_key:
        signed = f"signed by the key given ({footer['public_key']})"
    else:
        signed = f"signed by {footer['public_key']}: give --public-key to check whose that is"
    print(f"{args.file}: complete and unaltered, {report.answers} answers\nroot {report.root}\n{signed}")
    return 0


def check(path: Path, public_key: str | None = None, root: str | None = None) -> Report:
    """:func:`verify`, and the signature and root; ``public_key`` in hex."""
    report = verify(path)
    footer = report.footer
    line = report.records
    if footer is not None and report.good:
        if public_key is not None or "signature" in footer:
            problem = signature_problem(footer, public_key)
            if problem:
                report.faults.append(Fault("signature", line, 0, f"{problem}"))
        if root is not None and root.strip().lower() != report.root:
            report.faults.append(
                Fault("root", line, 0, f"has root {report.root}, not {root}: another log, or rewritten")
            )
    return report


def _show(args: argparse.Namespace) -> int:
    from medr1_verl.audit.export import as_json

    found = 0
    for record in read_answers(args.file):
        if args.id in (record["question_id"], str(record["seq"])):
            print(as_json(record))
            found += 1
    if not found:
        raise UserError(f"{args.file}: has no answer {args.id!r}; give a question id or the number (seq) of a record")
    report = verify(args.file)
    if report.faults:
        print(f"warning: {args.file}: {report.faults[0]}", file=sys.stderr)
    return 0


def _export(args: argparse.Namespace) -> int:
    from medr1_verl.audit import export

    report = verify(args.file)
    if report.faults:
        print(f"warning: {args.file}: {report.faults[0]}; what can be read is exported", file=sys.stderr)
    if args.format == "csv":
        count = export.to_csv(args.file, args.output)
        print(f"{args.output}: {count} answers")
        return 0
    images = _data_uris(args.data) if args.data else None
    for path in export.to_inspect(args.file, args.output, images):
        print(path)
    print(f"open with: inspect view --log-dir {args.output}")
    return 0


def _data_uris(data: Sequence[Path]) -> dict[str, list[str]]:
    from medr1_verl.evaluation.questions import read_questions

    uris: dict[str, list[str]] = {}
    for question in read_questions([str(path) for path in data]):
        for picture in question.load_images():
            file = io.BytesIO()
            picture.save(file, "PNG")
            uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            uris.setdefault(question.question_id, []).append(uri)
    return uris


def _record(args: argparse.Namespace) -> int:
    from medr1_verl.audit.sources import record

    key = load_private_key(args.key) if args.key else None
    count = record(args.source, args.output, args.data, args.model, key, args.again)
    print(f"{args.output}: {count} answers (medr1 audit verify {args.output})")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="medr1 audit", description=(__doc__ or "").partition(": ")[2])
    commands = parser.add_subparsers(dest="command", required=True)

    one = commands.add_parser("verify", help="exit 0 only if the log is complete and unaltered")
    one.add_argument("file", type=Path)
    one.add_argument("--public-key", type=Path, metavar="KEY", help="demand a signature by this Ed25519 key")
    one.add_argument("--root", metavar="HEX", help="demand this root, as noted when the log was written")
    one.set_defaults(call=_verify)

    one = commands.add_parser("show", help="all that the log says of one answer, as JSON")
    one.add_argument("file", type=Path)
    one.add_argument("id", help="question id, or number (seq) of the record")
    one.set_defaults(call=_show)

    one = commands.add_parser("export", help="to a table, or to logs of Inspect")
    one.add_argument("file", type=Path)
    one.add_argument("--format", choices=("csv", "inspect"), default="csv")
    one.add_argument("--output", type=Path, required=True, help="new .csv file; for inspect a folder")
    one.add_argument(
        "--data", nargs="+", type=Path, metavar="PARQUET", help="inspect: the rows asked, for their images"
    )
    one.set_defaults(call=_export)

    one = commands.add_parser("record", help="a log made afterwards, of predictions or of validation dumps")
    one.add_argument("source", type=Path, help="predictions.jsonl, a run folder, or a folder of verl's STEP.jsonl")
    one.add_argument("--output", type=Path, required=True)
    one.add_argument("--data", nargs="+", type=Path, default=[], metavar="PARQUET", help="the rows that were asked")
    one.add_argument("--model", metavar="DIR", help="the model's folder, for the digest of its weights")
    one.add_argument("--key", type=Path, help="Ed25519 private key (PEM or OpenSSH) that signs the log")
    one.add_argument(
        "--again", action="store_true", help="a log that is there with other answers is renamed and a new one written"
    )
    one.set_defaults(call=_record)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return args.call(args)
