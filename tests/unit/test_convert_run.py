"""Whole conversions on folders that the tests build: every reason code, workers, crashes, resume, splits, options."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medr1_verl.cli import run as run_command
from medr1_verl.convert import Options, convert
from medr1_verl.convert.cli import main
from medr1_verl.convert.pool import shard_sizes
from medr1_verl.convert.publish import ParquetFile
from medr1_verl.convert.question import REASONS
from medr1_verl.convert.verify import verify
from medr1_verl.errors import UserError
from medr1_verl.inspect import load, report
from medr1_verl.prompt import render_prompt
from medr1_verl.schema import arrow_schema, arrow_table, make_row
from medr1_verl.taxonomy import MODALITIES

SCRIPT = Path(__file__).resolve().parents[2] / "data_prep" / "omnimedvqa_to_parquet.py"


def picture(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def row(number: int, image: str, **changes) -> dict:
    modality = list(MODALITIES.values())[number % 8]
    fields = {
        "dataset": "Made Up",
        "question_id": f"Made Up_{number:04d}",
        "question_type": "Disease Diagnosis",
        "question": f"What is shown in picture {number}?",
        "gt_answer": "Drusen",
        "image_path": f"Images/Made Up/{image}",
        "option_A": "Normal",
        "option_B": "Drusen",
        "option_C": "Nevus",
        "option_D": "Fracture",
        "modality_type": modality,
    }
    fields |= changes
    return {key: value for key, value in fields.items() if value is not ...}


def write_tree(root: Path, rows: list, name: str = "Made Up") -> Path:
    folder = root / "QA_information" / "Open-access"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "Images" / "Made Up").mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """80 questions about 60 images; 20 images have two questions."""
    root = tmp_path_factory.mktemp("raw")
    rows = [row(i, f"{i % 60:03d}.png") for i in range(80)]
    for i in range(80):
        rows[i]["modality_type"] = list(MODALITIES.values())[i % 60 % 8]
    write_tree(root, rows)
    for i in range(60):
        picture(i).save(root / "Images" / "Made Up" / f"{i:03d}.png")
    return root


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".parquet", ".jsonl", ".png")
    }


def rows_of(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_row_schema_and_manifest(tree, tmp_path):
    out = tmp_path / "out"
    result = convert(Options(input=tree, output=out, workers=2))
    rows = rows_of(out)
    assert len(rows) == 80
    for row in rows:
        info = row["extra_info"]
        assert set(row) == {"data_source", "prompt", "images", "ability", "reward_model", "extra_info"}
        assert row["data_source"] == f"omnimedvqa/{info['modality']}"
        assert row["ability"] == "medical_vqa"
        assert row["prompt"] == [{"role": "user", "content": render_prompt(info["question"], info["options"], "think")}]
        assert row["prompt"][0]["content"].count("<image>") == len(row["images"]) == 1
        assert (
            row["reward_model"]
            == {"style": "rule", "ground_truth": info["answer"]}
            == {
                "style": "rule",
                "ground_truth": "B",
            }
        )
        assert info["options"]["ABCD".index(info["answer"])] == info["answer_text"] == "Drusen"
        source = (tree / info["image_path"]).read_bytes()
        assert info["image_sha256"] == hashlib.sha256(source).hexdigest()
        stored = Image.open(io.BytesIO(row["images"][0]["bytes"]))
        assert np.array_equal(np.asarray(stored), np.asarray(Image.open(io.BytesIO(source))))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest == json.loads(json.dumps(result.manifest))
    assert manifest["rows_in"] == manifest["rows_out"] + manifest["rows_rejected"] == 80
    for name, facts in manifest["outputs"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == facts["sha256"]
    assert set(manifest["outputs"]) == {"train.parquet", "test.parquet", "rejected.jsonl"}
    for split in ("train", "test"):
        file = pq.ParquetFile(out / f"{split}.parquet")
        assert file.metadata.num_rows == manifest["rows"][split]
        indices = [row["extra_info"]["index"] for row in file.read().to_pylist()]
        assert indices == list(range(len(indices)))
    assert 12 <= manifest["rows"]["test"] <= 20
    assert not list(tmp_path.glob(".out*"))


def test_same_bytes_whatever_the_number_of_workers(tree, tmp_path):
    found = []
    for workers in (1, 2, 4):
        convert(Options(input=tree, output=tmp_path / "out", workers=workers))
        found.append(digests(tmp_path / "out"))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 3


def hostile_rows(root: Path) -> tuple[list, list[str]]:
    """Rows and the reason each must be rejected with ("" where it must pass)."""
    folder = root / "Images" / "Made Up"
    folder.mkdir(parents=True, exist_ok=True)
    picture(1).save(folder / "good.png")
    png = (folder / "good.png").read_bytes()
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(png[: len(png) // 2])
    (folder / "text.png").write_text("not an image")
    (folder / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n")
    huge = bytearray(png)
    huge[16:24] = (50_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(bytes(huge[12:29])).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(huge)
    Image.new("L", (3, 3)).save(folder / "tiny.png")
    Image.new("L", (3000, 9)).save(folder / "thread.png")
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(folder / "deep.png")
    picture(2).save(folder / "wrong.jpg", "WEBP")
    (folder / "folder.png").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.png")
    secret = root.parent / f"{root.name}-secret.png"
    picture(3).save(secret)
    os.symlink(secret, folder / "link.png")
    os.symlink(folder / "nowhere.png", folder / "dangling.png")
    os.symlink(folder / "good.png", folder / "inside.png")
    cases: list[tuple[object, str]] = []

    def case(reason: str, image: str = "good.png", **changes) -> None:
        cases.append((row(len(cases), image, **changes), reason))

    case("")
    case("missing_image", "absent.png")
    case("missing_image", "dangling.png")
    case("missing_image", "x" * 300 + ".png")
    case("unreadable_image", "empty.png")
    case("unreadable_image", "cut.png")
    case("unreadable_image", "text.png")
    case("unreadable_image", "script.eps")
    case("unreadable_image", "folder.png")
    if hasattr(os, "mkfifo"):
        case("unreadable_image", "pipe.png")
    case("unsafe_path", "link.png")
    case("unsafe_path", "../../../etc/hostname")
    case("unsafe_path", image_path="/etc/hostname")
    case("image_too_large", "bomb.png")
    case("image_too_small", "tiny.png")
    case("image_too_small", "thread.png")
    case("", "deep.png")
    case("", "wrong.jpg")
    case("", "inside.png")
    case("gold_not_in_options", gt_answer="Glioma")
    case("ambiguous_gold", option_A="Drusen")
    case("ambiguous_gold", option_B="drusen.", option_C="DRUSEN", gt_answer="Drusen")
    case("", option_C=..., option_D=...)
    case("", option_D=None)
    case("bad_options", option_B=...)
    case("bad_options", option_B=..., option_C=..., option_D=..., gt_answer="Normal")
    case("bad_options", option_AA="x")
    case("bad_row", question=...)
    case("bad_row", image_path=...)
    case("bad_row", question_id=...)
    cases.append(("a string instead of an object", "bad_row"))
    cases.append((None, "bad_row"))
    case("duplicate_question_id", question_id="Made Up_0000")
    case("unknown_modality", modality_type="Endoscopy")
    case("unknown_modality", modality_type=...)
    case("", modality_type=..., modality="CT(Computed Tomography)")
    case("unknown_question_type", question_type="Report Generation")
    case("bad_text", question="look at <image> now")
    case("bad_text", option_C="</answer>")
    case("bad_text", question="bell \x07")
    case("bad_text", question_id="half a pair \ud800")
    case("unsafe_path", "half a pair \udfff.png")
    return [case for case, _ in cases], [reason for _, reason in cases]


def test_hostile_corpus(tmp_path):
    root = tmp_path / "raw"
    rows, reasons = hostile_rows(root)
    write_tree(root, rows)
    result = convert(Options(input=root, output=tmp_path / "out", workers=2))
    lines = (tmp_path / "out" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    rejected = {line["row"]: line for line in map(json.loads, lines)}
    assert {number: line["reason"] for number, line in rejected.items()} == {
        number: reason for number, reason in enumerate(reasons) if reason
    }
    assert {reason for reason in reasons if reason} == set(REASONS)
    assert all(line["message"] and "\n" not in line["message"] for line in rejected.values())
    manifest = result.manifest
    assert manifest["rows_in"] == len(rows) == manifest["rows_out"] + manifest["rows_rejected"]
    assert len(rows_of(tmp_path / "out")) == manifest["rows_out"] == reasons.count("")
    assert Counter(reason for reason in reasons if reason) == manifest["rejected"]
    dry = convert(Options(input=root, output="unused", dry_run=True)).manifest
    unseen = {"unreadable_image": 1}  # the cut file: only its pixels are broken
    assert Counter(manifest["rejected"]) - Counter(dry["rejected"]) == Counter(unseen)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[{", r"line 1, column"),
        (b"", r"not valid JSON"),
        (b'{"a": 1}', r"not a list of questions but a dict"),
        (b"\xff\xfe[", r"byte-order mark"),
        (b"[" * 100_000, r"not usable JSON"),
        (b"[" + b"9" * 6000 + b"]", r"not usable JSON"),
    ],
)
def test_unreadable_json_is_one_clear_line(tmp_path, capsys, content, says):
    write_tree(tmp_path, [])
    (tmp_path / "QA_information" / "Open-access" / "Made Up.json").write_bytes(content)
    code = run_command(main, ["--input", str(tmp_path), "--output", str(tmp_path / "out")], "medr1 convert")
    error = capsys.readouterr().err.strip()
    assert code == 2
    assert "Made Up.json" in error
    assert re.search(says, error)
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_encodings_are_read_and_named(tmp_path, encoding):
    write_tree(tmp_path, [])
    picture(1).save(tmp_path / "Images" / "Made Up" / "a.png")
    text = json.dumps([row(0, "a.png", option_B="Ménière", gt_answer="Ménière")], ensure_ascii=False)
    (tmp_path / "QA_information" / "Open-access" / "Made Up.json").write_bytes(text.encode(encoding))
    manifest = convert(Options(input=tmp_path, output=tmp_path / "out")).manifest
    assert manifest["input"]["files"][0]["encoding"] == encoding
    assert rows_of(tmp_path / "out")[0]["extra_info"]["answer_text"] == "Ménière"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--input", "/nowhere"], "does not exist"),
        (["--input", "{empty}"], "QA_information/Open-access"),
        (["--input", "{tree}", "--access", "restricted"], "QA_information/Restricted-access"),
        (["--input", "{tree}", "--test-fraction", "7"], "0 to 1"),
        (["--input", "{tree}", "--image-size", "20"], "at least 28"),
        (["--input", "{tree}", "--splits", "{empty}"], "train/*.json"),
        (["--input", "{tree}", "--question-type", "lesion_grading"], "none of 80 rows"),
        (["--input", "{tree}", "--output", "{tree}"], "did not write"),
        (["--input", "{tree}", "--output", "/proc/x/y"], "cannot write"),
    ],
)
def test_wrong_usage_is_one_clear_line(tree, tmp_path, capsys, arguments, says):
    (tmp_path / "empty").mkdir()
    arguments = [a.format(tree=tree, empty=tmp_path / "empty") for a in arguments]
    if "--output" not in arguments:
        arguments += ["--output", str(tmp_path / "out")]
    assert run_command(main, arguments, "medr1 convert") == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("medr1 convert:")]
    assert len(error) == 1
    assert says in error[0]
    assert not (tmp_path / "out").exists()


def test_files_that_a_mac_leaves_behind_are_not_read(tmp_path):
    root = write_tree(tmp_path, [row(0, "0.png"), row(7, "0.png", question_id=7), row(8, "0.png", question_id=7)])
    picture(0).save(root / "Images" / "Made Up" / "0.png")
    folder = root / "QA_information" / "Open-access"
    (folder / "._Made Up.json").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    result = convert(Options(input=root, output=tmp_path / "out"))
    assert [(r.question_id, r.reason) for r in result.rejected] == [("7", "duplicate_question_id")]
    assert result.manifest["rows_out"] == 2


def test_strict_and_exit_codes(tree, tmp_path):
    arguments = ["--input", str(tree), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--strict"]) == 0
    root = write_tree(tmp_path / "raw", [row(0, "a.png"), row(1, "b.png")])
    picture(1).save(root / "Images" / "Made Up" / "a.png")
    arguments = ["--input", str(root), "--output", str(tmp_path / "out2")]
    assert main(arguments) == 0
    assert main([*arguments, "--strict"]) == 1
    assert len(rows_of(tmp_path / "out2")) == 1  # strict reports, it does not withhold


def test_dry_run_writes_nothing_and_prints_the_manifest(tree, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main(["--input", str(tree), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    dry = json.loads(capsys.readouterr().out)
    assert sorted(tmp_path.rglob("*")) == before
    real = convert(Options(input=tree, output=tmp_path / "out")).manifest
    for key in ("rows_in", "rows_out", "rejected", "rows", "counts", "letters"):
        assert dry[key] == real[key], key


def test_images_are_never_in_both_splits_and_copies_count_as_one(tmp_path):
    names, rows = [], []
    folder = tmp_path / "Images" / "Made Up"
    folder.mkdir(parents=True)
    for i in range(30):
        original = picture(100 + i, (200, 160))
        for name in (f"{i:03d}.png", f"{i:03d} (2).png", f"{i:03d} - Copy.jpg", f"other_{i}.bmp"):
            image = original.resize((150, 120), Image.Resampling.LANCZOS) if name.endswith("bmp") else original
            image.save(folder / name)
            names.append((i, name))
    for number, (_, name) in enumerate(names):
        rows.append(row(number, name, modality_type="X-Ray"))
    write_tree(tmp_path, rows)
    manifest = convert(Options(input=tmp_path, output=tmp_path / "out", test_fraction=0.3)).manifest
    assert manifest["split"]["image_groups"] == 30
    assert manifest["rows"] == {"train": 84, "test": 36}
    original_of = {name: i for i, name in names}
    sides: dict[int, set[str]] = {}
    for stored in rows_of(tmp_path / "out"):
        info = stored["extra_info"]
        sides.setdefault(original_of[Path(info["image_path"]).name], set()).add(info["split"])
    assert all(len(side) == 1 for side in sides.values())
    by_row = convert(Options(input=tmp_path, output=tmp_path / "rows", split_by="row")).manifest
    assert by_row["split"]["test_rows_whose_image_is_in_train"] > 0
    assert by_row["rows"] == {"train": 96, "test": 24}


def test_the_split_does_not_depend_on_the_image_size(tree, tmp_path):
    sides = []
    for size in (384, 112, 0):
        convert(Options(input=tree, output=tmp_path / "out", image_size=size))
        sides.append({r["extra_info"]["question_id"]: r["extra_info"]["split"] for r in rows_of(tmp_path / "out")})
    assert sides[0] == sides[1] == sides[2]


def test_slices_filters_and_limit(tree, tmp_path):
    out = tmp_path / "out"
    manifest = convert(Options(input=tree, output=out, by="modality", modality=["ct", "oct"])).manifest
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["ct", "oct"]
    assert {r["extra_info"]["modality"] for r in rows_of(out / "ct")} == {"ct"}
    assert manifest["rows_in"] + manifest["input"]["left_out_by_options"] == 80
    limited = convert(Options(input=tree, output=tmp_path / "few", limit=16)).manifest
    assert limited["rows_out"] == 16
    assert len({r["extra_info"]["modality"] for r in rows_of(tmp_path / "few")}) > 3  # spread, not the first 16


def test_paths_instead_of_bytes(tree, tmp_path):
    out = tmp_path / "out"
    convert(Options(input=tree, output=out, image_store="path"))
    for stored in rows_of(out):
        (image,) = stored["images"]
        assert set(image) == {"image"}
        path = Path(image["image"])
        assert path.is_absolute()
        assert out in path.parents
        Image.open(path).load()


def test_normalized_and_shuffled_options_keep_the_gold(tmp_path):
    rows = [row(i, "a.png", option_B="Drusen.", gt_answer="Drusen.") for i in range(40)]
    rows.append(row(40, "a.png", option_A="drusen", option_B="Drusen.", gt_answer="Drusen."))
    root = write_tree(tmp_path / "raw", rows)
    picture(1).save(root / "Images" / "Made Up" / "a.png")
    plain = convert(Options(input=root, output=tmp_path / "plain")).manifest
    assert sum(letters.get("B", 0) for letters in plain["letters"].values()) == plain["rows_out"] == 41
    out = tmp_path / "out"
    manifest = convert(Options(input=root, output=out, normalize_options=True, shuffle_options=True)).manifest
    assert manifest["rejected"] == {"ambiguous_gold": 1}  # "drusen" twice once the typography is gone
    assert (manifest["arguments"]["normalize_options"], manifest["arguments"]["shuffle_options"]) == (True, True)
    assert (plain["input"]["rows_with_options_changed"], manifest["input"]["rows_with_options_changed"]) == (0, 40)
    answers = Counter()
    for stored in rows_of(out):
        info = stored["extra_info"]
        assert info["answer_text"] == info["options"]["ABCD".index(info["answer"])] == "drusen"
        assert sorted(info["options"]) == ["drusen", "fracture", "nevus", "normal"]
        answers[info["answer"]] += 1
    assert set(answers) == set("ABCD")


TABLE = [
    {"image": "a.png", "question": "Which side?", "options": ["Left", "Right"], "answer": "B", "modality": "xray"},
    {"images": ["a.png", "b.png", "c.png"], "question": "Grown?", "options": {"A": "No", "B": "Yes"}, "answer": "yes",
     "modality": "CT", "question_type": "lesion_grading", "question_id": "series-1"},
    {"image": "../a.png", "question": "?", "options": ["x", "y"], "answer": "x", "modality": "ct"},
    {"image": "a.png", "question": "?", "options": ["x", "y"], "answer": "z", "modality": "ct"},
]  # fmt: skip


def test_jsonl_table_with_a_series_of_images(tmp_path):
    for i, name in enumerate("abc"):
        picture(i).save(tmp_path / f"{name}.png")
    table = tmp_path / "hospital.jsonl"
    table.write_text("\n".join(map(json.dumps, TABLE)) + "\n\n")
    manifest = convert(Options(input=table, output=tmp_path / "out")).manifest
    assert manifest["rejected"] == {"gold_not_in_options": 1, "unsafe_path": 1}
    one, series = sorted(rows_of(tmp_path / "out"), key=lambda stored: len(stored["images"]))
    assert one["extra_info"]["question_id"] == "hospital_000000"
    assert one["extra_info"]["answer_text"] == "Right"
    assert series["prompt"][0]["content"].startswith("<image><image><image>Grown?\nA) No\nB) Yes\n")
    assert len(series["images"]) == 3
    assert series["extra_info"]["image_path"].split("\n") == ["a.png", "b.png", "c.png"]
    assert series["extra_info"]["answer"] == "B"


def test_csv_table(tmp_path):
    picture(1).save(tmp_path / "a b.png")
    lines = [
        "image,question,option_A,option_B,option_C,answer,modality,split",
        'a b.png,"Left, or right?","Left, upper",Right,,"Left, upper",MRI,train',
        "a b.png,Which?,x|y,z,w,B,MRI,test",
        "a b.png,Too many cells,x,y,z,x,MRI,test,8,9",
        "a b.png,Wrong split,x,y,z,x,MRI,validation",
    ]
    (tmp_path / "q.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    manifest = convert(Options(input=tmp_path / "q.csv", output=tmp_path / "out")).manifest
    assert manifest["rejected"] == {"bad_row": 2}
    assert manifest["split"]["method"] == "published"
    rows = {stored["extra_info"]["question"]: stored["extra_info"] for stored in rows_of(tmp_path / "out")}
    assert rows["Left, or right?"]["options"] == ["Left, upper", "Right"]
    assert rows["Which?"] | {"answer": "B", "split": "test"} == rows["Which?"]


def command(tree: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--input", str(tree), "--output", str(out), "--workers", "2", *more]


def test_killed_at_ten_random_moments_then_resumed(tmp_path):
    root = write_tree(tmp_path / "raw", [row(i, f"{i}.png") for i in range(400)])
    for i in range(400):
        picture(i, (200, 200)).save(root / "Images" / "Made Up" / f"{i}.png", compress_level=1)
    begin = time.monotonic()
    subprocess.run(command(root, tmp_path / "whole"), check=True, capture_output=True)
    seconds = time.monotonic() - begin
    expected = digests(tmp_path / "whole")
    out = tmp_path / "out"
    moments = random.Random(0)
    kills = 0
    while kills < 10:
        process = subprocess.Popen(command(root, out, "--resume"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.2, 0.9) * min(seconds, 3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        if out.exists():  # it was quicker than the kill: then it must be complete
            assert digests(out) == expected
            manifest = json.loads((out / "manifest.json").read_text())
            assert manifest["rows_out"] == 400
            shutil.rmtree(out)
    subprocess.run(command(root, out, "--resume"), check=True, capture_output=True)
    assert digests(out) == expected
    assert not list(tmp_path.glob(".out*"))


def test_resume_does_not_trust_changed_images(tree, tmp_path):
    """Shards of an unfinished run are used again only for the same files, sizes, times and settings."""
    root = tmp_path / "raw"
    shutil.copytree(tree, root)
    out = tmp_path / "out"
    process = subprocess.Popen(command(root, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".out.partial/shards/*.json")) and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    changed = root / "Images" / "Made Up" / "007.png"
    picture(999).save(changed)
    shutil.rmtree(out, ignore_errors=True)
    convert(Options(input=root, output=out, resume=True))
    (stored,) = [s for s in rows_of(out) if s["extra_info"]["question_id"] == "Made Up_0007"]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored["images"][0]["bytes"]))), np.asarray(picture(999)))


def test_a_decoder_that_kills_its_process_costs_one_row(tmp_path, monkeypatch):
    """The worker's own process dies on one image: that image is rejected, its neighbours are not."""
    root = write_tree(tmp_path / "raw", [row(i, f"{i}.png") for i in range(6)])
    for i in range(6):
        picture(i).save(root / "Images" / "Made Up" / f"{i}.png")
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, sys\n"
        "from PIL import Image\n"
        "real = Image.open\n"
        "def crash(stream, *args, **kwargs):\n"
        "    image = real(stream, *args, **kwargs)\n"
        "    stream.seek(0)\n"
        f"    if stream.read() == open({str(root / 'Images' / 'Made Up' / '3.png')!r}, 'rb').read():\n"
        "        os.kill(os.getpid(), 11)\n"
        "    stream.seek(0)\n"
        "    return image\n"
        "Image.open = crash\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(hook))
    result = convert(Options(input=root, output=tmp_path / "out", workers=2))
    assert [(r.row, r.reason) for r in result.rejected] == [(3, "unreadable_image")]
    assert result.manifest["rows_out"] == 5


def test_two_runs_into_one_output_do_not_mix(tree, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "out"
    staging = tmp_path / ".out.partial"
    staging.mkdir()
    with open(staging / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run"):
            convert(Options(input=tree, output=out, resume=True))
        with pytest.raises(UserError, match="another run"):
            convert(Options(input=tree, output=out))
    convert(Options(input=tree, output=out, resume=True))


def test_a_full_disk_is_one_clear_line(tree, tmp_path):
    """A file-size limit stands in for the full disk: the same failed write, without needing a disk to fill."""
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "-", *command(tree, tmp_path / "out")]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "cannot write to" in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("share", "stage"), [(0.5, "converting images"), (1.5, "writing parquet")])
def test_a_disk_that_is_really_full_then_resumed(tree, tmp_path, share, stage):
    """A file system in memory, too small for the pictures or for the parquet; then with room for both."""
    mount = ["unshare", "-rm", "bash", "-c"]
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = f"mount -t tmpfs -o size=1m none {disk}"
    if not shutil.which("unshare") or subprocess.run([*mount, mounted], capture_output=True).returncode:
        pytest.skip("this machine lets no user mount a file system")
    convert(Options(input=tree, output=tmp_path / "whole"))
    size = sum(path.stat().st_size for path in (tmp_path / "whole").iterdir())
    steps = (
        f"mount -t tmpfs -o size={int(share * size)} none {disk} || exit 9; "
        f'"$@"; echo "code $?"; ls {disk}; '
        f'mount -o remount,size={10 * size} {disk}; "$@" --resume && cp -r {disk}/out {tmp_path}'
    )
    done = subprocess.run([*mount, steps, "-", *command(tree, disk / "out")], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("code 2\n")
    assert not re.search(r"^out$", done.stdout, re.MULTILINE)  # nothing under the name of the result
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if "disk" in line]
    assert len(lines) == 1
    assert "the disk is full" in lines[0]
    assert stage in done.stderr.split("the disk is full")[0]
    assert "Traceback" not in done.stderr
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_the_script_runs_from_a_plain_checkout(tree, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command(tree, tmp_path / "out"), cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "rows in 80 = out 80 + rejected 0" in done.stdout


def test_inspect_reads_what_was_written(tree, tmp_path):
    convert(Options(input=tree, output=tmp_path / "out", split_by="row", seed=1))
    test, train = (load(tmp_path / "out" / f"{split}.parquet") for split in ("test", "train"))
    figures = report(test, train)
    raw = report(load(tree))
    assert raw["rows"] == 80
    assert figures["letters"] == {"B": len(test.rows)}
    assert figures["chance"] == 25.0
    assert figures["option_prior_exact"] == figures["option_prior_normalized"] == 100.0
    shared = {sha for r in train.rows for sha in r.sha256}
    assert figures["leaked_rows"] == sum(r.sha256[0] in shared for r in test.rows) > 0


def test_the_real_images(shared_dir, tmp_path):
    result = convert(Options(input=shared_dir / "data" / "omnimedvqa_real", output=tmp_path / "out", workers=2))
    assert (result.manifest["rows_in"], result.manifest["rows_out"]) == (106, 106)
    for stored in rows_of(tmp_path / "out"):
        image = Image.open(io.BytesIO(stored["images"][0]["bytes"]))
        assert max(image.size) <= 384
        assert np.asarray(image).std() > 10  # something to see, 16-bit files included


def test_verify_reads_back_what_was_written(tree, tmp_path, capsys):
    assert main(["--input", str(tree), "--output", str(tmp_path / "out"), "--verify"]) == 0
    assert capsys.readouterr().out.count("every picture decodes") == 2
    rows = pq.read_table(tmp_path / "out" / "test.parquet").to_pylist()
    rows[1]["images"][0]["bytes"] = rows[1]["images"][0]["bytes"][:100]
    schema = arrow_schema()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "broken.parquet")
    with pytest.raises(UserError, match="row 1"):
        verify([tmp_path / "broken.parquet"])


@pytest.mark.heavy
def test_verls_own_data_set_reads_every_kind_of_row(tree, tmp_path):
    """Bytes, paths, several images and grey pictures, through ``datasets.load_dataset`` and verl's RLHFDataset."""
    pytest.importorskip("verl")
    datasets = pytest.importorskip("datasets")
    convert(Options(input=tree, output=tmp_path / "bytes"))
    convert(Options(input=tree, output=tmp_path / "path", image_store="path"))
    for i, name in enumerate("abc"):
        picture(i).convert("L").save(tmp_path / f"{name}.png")
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, TABLE)))
    convert(Options(input=tmp_path / "q.jsonl", output=tmp_path / "series"))
    for folder in ("bytes", "path", "series"):
        files = [path for path in sorted((tmp_path / folder).glob("*.parquet")) if pq.read_metadata(path).num_rows]
        assert len(verify(files)) == len(files) + 1
    file = str(tmp_path / "bytes" / "train.parquet")
    rows = datasets.load_dataset("parquet", data_files=file, cache_dir=str(tmp_path / "cache"))["train"]
    assert set(rows[0]["images"][0]) == {"bytes"}


@pytest.mark.heavy
def test_verify_measures_prompts_with_a_real_processor(tree, tmp_path):
    from medr1_verl.cpu import patches
    from medr1_verl.import_hooks import around_import

    around_import("torchvision", patches.torchvision_without_its_operators)
    pytest.importorskip("verl")
    tiny_model = pytest.importorskip("medr1_verl.embedded.tiny_model")
    convert(Options(input=tree, output=tmp_path / "out"))
    prompts = [row["prompt"][0]["content"] for row in rows_of(tmp_path / "out")]
    tiny_model.make_processor(tiny_model.make_tokenizer(prompts)).save_pretrained(tmp_path / "model")
    lines = verify([tmp_path / "out" / "train.parquet"], str(tmp_path / "model"))
    assert re.search(r"longest prompt \d+ tokens", lines[0])


def stored_row(number: int, images: tuple[bytes, ...] = (b"x" * 10,)) -> dict:
    texts = {f.name: f"{f.name} {number}" for f in arrow_schema().field("extra_info").type}
    extra = texts | {"index": number, "modality": "ct", "options": ["Größe", "", "µ"][: number % 4], "answer": "A"}
    return make_row(images=[{"bytes": data} for data in images], prompt="<image>?", extra_info=extra)


def test_tables_are_those_that_pyarrow_makes(tmp_path):
    """Laid out by hand, because pyarrow's own way imports pandas; it must say the same, nested lists and all."""
    rows = [stored_row(number, (b"", b"a\0b", bytes(range(256)))[: number % 3 + 1]) for number in range(7)]
    for store, chosen in (
        ("bytes", rows),
        ("path", [row | {"images": [{"image": f"/a/{i}.png"}]} for i, row in enumerate(rows)]),
        ("bytes", []),
    ):
        table = arrow_table(chosen, arrow_schema(store))
        table.validate(full=True)
        assert table.equals(pa.Table.from_pylist(chosen, schema=arrow_schema(store)))


def test_the_returned_digest_is_that_of_the_file(tmp_path):
    for count in (0, 1, 100, 250):
        file = ParquetFile(tmp_path / f"{count}.parquet", "bytes")
        for number in range(count):
            file.add(stored_row(number, (bytes(50_000),)), 50_000)
        file.finish()
        facts = file.close()
        data = (tmp_path / f"{count}.parquet").read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        assert pq.read_metadata(tmp_path / f"{count}.parquet").num_rows == count


@pytest.mark.parametrize("count", [0, 1, 7, 8, 64, 511, 512, 513, 1000, 88_996])
def test_shards(count):
    """Only the number of images decides: 64 each, and at the end ever fewer, down to one."""
    sizes = list(shard_sizes(count))
    assert sum(sizes) == count
    assert sizes == sorted(sizes, reverse=True)
    assert not sizes or (sizes[0] <= 64 and sizes[-1] == 1)
    assert len(sizes) <= count / 64 + 60


def test_a_spoilt_shard_is_made_again(tree, tmp_path):
    """After a power cut a file may have its length but not its content."""
    convert(Options(input=tree, output=tmp_path / "whole", workers=1))
    out = tmp_path / "out"
    staging = tmp_path / ".out.partial"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medr1_verl.convert.run._publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(Options(input=tree, output=out, workers=1))
    first, second = sorted((staging / "shards").glob("*.bin"))[:2]
    first.write_bytes(bytes(first.stat().st_size))
    second.with_suffix(".json").write_bytes(b"\0" * 100)
    convert(Options(input=tree, output=out, workers=1, resume=True))
    assert digests(out) == digests(tmp_path / "whole")


def test_row_groups_stay_small(tmp_path):
    """Readers that meet more than 2 GiB of nested binary in one row group fail, so groups end by rows and by bytes."""
    rows = [stored_row(number) for number in range(250)]
    for name, size, groups in (("rows", 10, [100, 100, 50]), ("bytes", 16 << 20, [2] * 125)):
        file = ParquetFile(tmp_path / f"{name}.parquet", "bytes")
        for row in rows:
            file.add(row, size)
        file.finish()
        file.close()
        metadata = pq.read_metadata(tmp_path / f"{name}.parquet")
        assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == groups
        assert metadata.row_group(0).column(3).path_in_schema == "images.list.element.bytes"
        assert metadata.row_group(0).column(3).compression == "UNCOMPRESSED"
