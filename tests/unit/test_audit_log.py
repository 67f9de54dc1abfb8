"""The audit log: whatever is done to a log's bytes is found, and found where it was done."""

import hashlib
import json
import multiprocessing
import signal
import subprocess
import sys
import time

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medr1_verl.audit.cli import check, main
from medr1_verl.audit.log import SCHEMA_FILE, AuditLog, read_answers, seal, set_aside
from medr1_verl.audit.verify import verify
from medr1_verl.cli import main as medr1
from medr1_verl.errors import UserError

NASTY = '<script>alert(1)</script> "quoted" \u202eright to left\u202c \ud800 \x00 \n,"sha256":"' + "0" * 64 + '"}\n'
CONTEXT = {
    "source": "evaluation",
    "model": {
        "name": "m",
        "weights_sha256": "a" * 64,
        "revision": None,
        "base": None,
        "step": 3,
        "config_sha256": None,
    },
    "data": [{"file": "test.parquet", "sha256": "b" * 64, "manifest_sha256": None}],
    "template_sha256": None,
    "engine": "vllm",
    "versions": {"python": "3.11"},
}


def answer(number, output="<think>so</think><answer>A</answer>"):
    return {
        "context": 1,
        "question_id": f"q{number}",
        "dataset": "set",
        "modality": "ct",
        "question_type": "disease_diagnosis",
        "question": "Which?",
        "options": ["x", "y"],
        "prompt_sha256": "0" * 16,
        "style": "think",
        "control": "none",
        "decoding": "greedy",
        "sampling": {"temperature": 0.0, "top_p": 1.0, "n": 1, "seed": None, "max_tokens": 9},
        "images": [{"source_sha256": "c" * 64, "seen_sha256": "d" * 64, "width": 5, "height": 4}],
        "output": output,
        "reasoning": "so",
        "pred": "A",
        "answer": "A",
        "score": {"acc": 1, "format": 1},
        "tokens": 5,
        "truncated": 0,
        "origin": "live",
    }


def write(path, count=6, close=True):
    log = AuditLog(path)
    log.context(CONTEXT)
    log.add(answer(number, NASTY if number == 2 else "A") for number in range(count))
    if close:
        log.close()
    log.stop()
    return path


LINES = 6 + 3  # header, context, six answers, footer


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("log") / "audit.jsonl")
    return path.read_bytes()


def first_fault(folder, data):
    path = folder / "edited.jsonl"
    path.write_bytes(data)
    report = verify(path)
    assert report.faults, "an edit went unseen"
    fault = report.faults[0]
    assert report.records == min(fault.line, LINES + 1) - 1, "records before the fault are good"
    return fault


# --- a log as it is written


def test_good_log(tmp_path, good, capsys):
    path = tmp_path / "log.jsonl"
    path.write_bytes(good)
    report = verify(path)
    assert (report.good, report.closed, report.answers, report.records) == (True, True, 6, LINES)
    assert main(["verify", str(path)]) == 0
    out = capsys.readouterr().out
    assert "complete and unaltered, 6 answers" in out
    assert report.root in out
    assert good.isascii(), "nothing in it can confuse a viewer"
    assert [record["output"] for record in read_answers(path)][2] == NASTY


def test_every_line_fits_the_schema(tmp_path, good):
    schema = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    lines = [json.loads(line) for line in good.splitlines()]
    for line in lines:
        validator.validate(line)
    assert {line["kind"] for line in lines} == {"header", "context", "answer", "footer"}
    assert not validator.is_valid(lines[2] | {"host": "radiology-7"}), "no field that the schema does not name"


def test_hash_is_what_the_schema_says(good):
    """A reader of another language needs nothing but SHA-256 over the bytes."""
    prev = "0" * 64
    for line in good.splitlines():
        body, _, digest = line.rpartition(b',"sha256":"')
        assert hashlib.sha256(body).hexdigest().encode() == digest[:-2]
        assert json.loads(line)["prev"] == prev
        prev = digest[:-2].decode()


# --- edits: what is done, and the line at which the log must be said to differ


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_changed_byte(tmp_path_factory, good, data):
    position = data.draw(st.integers(0, len(good) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != good[position]))
    edited = good[:position] + bytes([byte]) + good[position + 1 :]
    folder = tmp_path_factory.mktemp("e")
    assert first_fault(folder, edited).line == good[:position].count(b"\n") + 1


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_deletion_insertion_or_truncation_of_bytes(tmp_path_factory, good, data):
    start = data.draw(st.integers(0, len(good) - 1))
    end = data.draw(st.integers(start, len(good)))
    new = data.draw(st.binary(max_size=40) | st.sampled_from([good[:100], good[-100:], b"\n", b"\r\n"]))
    edited = good[:start] + new + good[end:]
    if edited == good:
        return
    same = next((i for i, (a, b) in enumerate(zip(good, edited)) if a != b), min(len(good), len(edited)))  # noqa: B905
    line = first_fault(tmp_path_factory.mktemp("e"), edited).line
    assert line == edited[:same].count(b"\n") + 1


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_rearrangement_of_lines(tmp_path_factory, good, data):
    lines = good.splitlines(keepends=True)
    chosen = data.draw(st.lists(st.integers(0, LINES - 1), max_size=LINES + 3))
    edited = [lines[index] for index in chosen]
    if edited == lines:
        return
    same = next((i for i, (a, b) in enumerate(zip(lines, edited)) if a != b), min(LINES, len(edited)))  # noqa: B905
    assert first_fault(tmp_path_factory.mktemp("e"), b"".join(edited)).line == same + 1


@pytest.mark.parametrize(
    ("edit", "line", "code", "words"),
    [
        (lambda ls: ls[:3] + ls[4:], 4, "missing", "record 3 must come first"),
        (lambda ls: ls[:3] + ls[6:], 4, "missing", "records 3 to 5 must come first"),
        (lambda ls: [*ls[:4], ls[2], *ls[4:]], 5, "repeated", "is record 2 again, following line 2"),
        (lambda ls: [*ls[:3], ls[5], ls[4], ls[3], *ls[6:]], 4, "missing", "records 3 to 4 must come first"),
        (lambda ls: ls[1:], 1, "missing", "the header must come first"),
        (lambda ls: ls[:-1], 9, "incomplete", "no footer"),
        (lambda ls: [*ls, ls[-1]], 10, "after_footer", "after the footer"),
        (lambda ls: [*ls[:-1], ls[-1][:-1]], 9, "torn", "killed writer"),
        (lambda ls: [], 1, "incomplete", "empty"),
        (lambda ls: [line.replace(b"\n", b"\r\n") for line in ls], 1, "altered", "no whole record"),
        (lambda ls: [*ls[:3], reseal(ls[3], output="B"), *ls[4:]], 5, "replaced", "one was replaced"),
        (lambda ls: [*ls[:3], reseal(ls[3], output="B", seq="3"), *ls[4:]], 4, "bad_record", "number"),
        (lambda ls: [*ls[:8], reseal(ls[8], answers=5)], 9, "footer", "over 5 answers; there are 6"),
        (lambda ls: [*ls[:3], reseal(ls[3], kind="note"), *ls[4:]], 4, "bad_record", "'note'"),
    ],
)
def test_what_was_done_is_said(tmp_path, good, edit, line, code, words):
    fault = first_fault(tmp_path, b"".join(edit(good.splitlines(keepends=True))))
    assert (fault.line, fault.code) == (line, code)
    assert words in str(fault)


def reseal(line, **changes):
    """A forger who knows the format: the line's own hash is right again."""
    record = json.loads(line)
    del record["sha256"]
    return seal(record | changes)[0]


def test_a_log_written_anew_shows_by_its_root_only(tmp_path, capsys):
    path = write(tmp_path / "log.jsonl")
    root = verify(path).root
    path.unlink()
    write(path, count=5)
    assert main(["verify", str(path)]) == 0
    assert main(["verify", str(path), "--root", root]) == 1
    assert "another log, or rewritten" in capsys.readouterr().err


def test_faults_go_to_stderr_with_exit_1(tmp_path, good, capsys):
    path = tmp_path / "log.jsonl"
    path.write_bytes(good.replace(b'"pred":"A"', b'"pred":"B"', 1))
    assert main(["verify", str(path)]) == 1
    assert "line 3 (byte" in capsys.readouterr().err


def test_newer_schema_is_one_line(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    line, _ = seal({"kind": "header", "seq": 0, "prev": "0" * 64, "schema": "medr1-audit/2", "medr1_verl": "9.0"})
    path.write_bytes(line)
    for command in (["verify", str(path)], ["show", str(path), "q0"]):
        assert medr1(["audit", *command]) == 2
        error = capsys.readouterr().err
        assert "medr1-audit/2" in error
        assert error.count("\n") == 1


def test_missing_file_and_foreign_file(tmp_path, capsys):
    assert medr1(["audit", "verify", str(tmp_path / "none.jsonl")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    other = tmp_path / "predictions.jsonl"
    other.write_text('{"question_id": "q"}\n')
    assert medr1(["audit", "verify", str(other)]) == 1
    assert medr1(["audit", "show", str(other), "q"]) == 2
    assert "no audit record" in capsys.readouterr().err


# --- writers: going on, being killed, two at a time


def test_going_on_after_a_stop(tmp_path):
    path = write(tmp_path / "log.jsonl", close=False)
    assert [fault.code for fault in verify(path).faults] == ["incomplete"]
    log = AuditLog(path)
    log.context(CONTEXT)
    log.add([answer(7)])
    log.close()
    report = verify(path)
    assert (report.good, report.answers) == (True, 7)
    assert [json.loads(line)["kind"] for line in path.read_bytes().splitlines()].count("resumed") == 1


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_torn_line_is_cut_off_and_told(tmp_path, cut):
    path = write(tmp_path / "log.jsonl", close=False)
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    torn = data[:-cut].rpartition(b"\n")[2]
    log = AuditLog(path)
    log.close()
    report = verify(path)
    assert report.good
    assert report.answers == 5
    resumed = json.loads(path.read_bytes().splitlines()[-2])
    assert (resumed["torn_bytes"], resumed["torn_sha256"]) == (len(torn), hashlib.sha256(torn).hexdigest())


def test_torn_in_its_first_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"kind":"hea')
    AuditLog(path).close()
    assert verify(path).good


def test_closed_or_damaged_logs_are_not_added_to(tmp_path, good):
    path = tmp_path / "log.jsonl"
    path.write_bytes(good)
    with pytest.raises(UserError, match="is closed"):
        AuditLog(path)
    path.write_bytes(good.replace(b'"pred":"A"', b'"pred":"B"', 1))
    with pytest.raises(UserError, match=r"line 3 .* was altered"):
        AuditLog(path)
    assert path.read_bytes().count(b"\n") == LINES


def test_second_writer_is_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    log = AuditLog(path)
    with pytest.raises(UserError, match="another process is writing"):
        AuditLog(path)
    with pytest.raises(UserError, match="another process is writing"):
        set_aside(path)
    log.close()


def _add_one_by_one(path, number, barrier):
    import fcntl

    fcntl.flock = lambda *_: None  # as on a file system that has no locks
    log = AuditLog(path)
    barrier.wait()
    for index in range(20):
        log.add([answer(f"{number}-{index}")])
        time.sleep(0.001)
    log.stop()


def test_two_writers_without_locks_are_told(tmp_path):
    path = write(tmp_path / "log.jsonl", count=1, close=False)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    writers = [context.Process(target=_add_one_by_one, args=(path, number, barrier)) for number in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    fault = verify(path).faults[0]
    assert fault.code in ("repeated", "replaced")
    assert "two processes wrote this log" in str(fault) or fault.code == "replaced"


def test_killed_writer(tmp_path):
    """A process killed at any moment leaves a log that says so and that can be gone on with."""
    path = tmp_path / "log.jsonl"
    code = (
        "import json, sys; from pathlib import Path; from medr1_verl.audit.log import AuditLog\n"
        "log = AuditLog(Path(sys.argv[1])); log.context(json.loads(sys.argv[2]))\n"
        "while True: log.add([json.loads(sys.argv[3])])"
    )
    arguments = [str(path), json.dumps(CONTEXT), json.dumps(answer(1, "x" * 5000))]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments])
    deadline = time.monotonic() + 20
    while (not path.exists() or path.stat().st_size < 200_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    report = verify(path)
    assert report.answers > 10
    assert {fault.code for fault in report.faults} <= {"torn", "incomplete"}
    log = AuditLog(path)
    log.close()
    assert verify(path).answers == report.answers
    assert verify(path).good


# --- signatures


@pytest.fixture
def keys(tmp_path):
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.generate()
    none = serialization.NoEncryption()
    for name, encoding, form in (("pem", "PEM", "PKCS8"), ("ssh", "PEM", "OpenSSH")):
        data = private.private_bytes(
            getattr(serialization.Encoding, encoding), getattr(serialization.PrivateFormat, form), none
        )
        (tmp_path / f"{name}.key").write_bytes(data)
    public = private.public_key()
    for name, encoding, form in (("pem", "PEM", "SubjectPublicKeyInfo"), ("ssh", "OpenSSH", "OpenSSH")):
        data = public.public_bytes(getattr(serialization.Encoding, encoding), getattr(serialization.PublicFormat, form))
        (tmp_path / f"{name}.pub").write_bytes(data)
    other = Ed25519PrivateKey.generate().public_key()
    (tmp_path / "other.pub").write_bytes(
        other.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return tmp_path


@pytest.mark.parametrize("form", ["pem", "ssh"])
def test_signature(keys, form, capsys):
    from medr1_verl.audit.signing import load_private_key

    path = keys / "log.jsonl"
    log = AuditLog(path)
    log.close(load_private_key(keys / f"{form}.key"))
    jsonschema.validate(json.loads(path.read_bytes().splitlines()[-1]), json.loads(SCHEMA_FILE.read_text()))
    assert medr1(["audit", "verify", str(path)]) == 0
    assert "give --public-key" in capsys.readouterr().out
    assert medr1(["audit", "verify", str(path), "--public-key", str(keys / f"{form}.pub")]) == 0
    assert "signed by the key given" in capsys.readouterr().out
    assert medr1(["audit", "verify", str(path), "--public-key", str(keys / "other.pub")]) == 1
    assert "signed by another key" in capsys.readouterr().err
    # A forger writes the chain anew and keeps the signature.
    lines = path.read_bytes().splitlines(keepends=True)
    signature = json.loads(lines[-1])
    record = json.loads(lines[0])
    del record["sha256"]
    header, digest = seal(record | {"medr1_verl": "forged"})
    del signature["sha256"]
    path.write_bytes(header + seal(signature | {"prev": digest, "root": digest})[0])
    assert [fault.code for fault in check(path).faults] == ["signature"]


def test_unsigned_log_where_a_signature_is_demanded(keys, capsys):
    path = write(keys / "log.jsonl")
    assert medr1(["audit", "verify", str(path), "--public-key", str(keys / "pem.pub")]) == 1
    assert "is not signed" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no key", b"-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n"])
def test_bad_keys_are_one_line(keys, content, capsys):
    bad = keys / "bad.pem"
    bad.write_bytes(content)
    path = write(keys / "log.jsonl")
    assert medr1(["audit", "verify", str(path), "--public-key", str(bad)]) == 2
    source = keys / "predictions.jsonl"
    source.write_text("")
    assert medr1(["audit", "record", str(source), "--output", str(keys / "o.jsonl"), "--key", str(bad)]) == 2
    assert capsys.readouterr().err.count("\n") == 2
