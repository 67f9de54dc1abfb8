"""Tables of small prediction files, every number worked out by hand."""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medr1_verl.errors import UserError
from medr1_verl.evaluation import formats
from medr1_verl.evaluation.predictions import KEYS
from medr1_verl.evaluation.runs import check_styles, load_runs, read_training_rows, trained_slice
from medr1_verl.evaluation.tables import Settings, build
from medr1_verl.evaluation.tables_cli import main

#            id    modality question type             image  options answer
QUESTIONS = [
    ("c1", "ct", "disease_diagnosis", "img1", 4, "A"),
    ("c2", "ct", "modality_recognition", "img1", 4, "B"),  # same image as c1
    ("c3", "ct", "disease_diagnosis", "img2", 2, "A"),
    ("c4", "ct", "modality_recognition", "img3", 4, "D"),
    ("m1", "mri", "disease_diagnosis", "img4", 4, "C"),
    ("m2", "mri", "modality_recognition", "img5", 4, "A"),
]
TEXTS = {4: ["one", "two", "three", "four"], 2: ["yes", "no"]}
# Right (1) or wrong (0) on c1 c2 c3 c4 m1 m2.
RIGHT = {"base": "000101", "grpo-ct": "111000", "grpo-mri": "000111"}


def write(path, name, right, control="none", style="think", decoding="greedy", questions=QUESTIONS, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        for (question_id, modality, question_type, image, n_options, answer), hit in zip(questions, right, strict=True):
            wrong = "B" if answer == "A" else "A"
            row = {
                "question_id": question_id,
                "data_source": f"omnimedvqa/{modality}",
                "modality": modality,
                "question_type": question_type,
                "style": style,
                "control": control,
                "decoding": decoding,
                "output": "<answer>...</answer>",
                "pred": answer if hit == "1" else "" if hit == "x" else wrong,
                "acc": int(hit == "1"),
                "format": 1,
                "parsed": int(hit != "x"),
                "pred_tolerant": answer if hit in "1x" else wrong,
                "acc_tolerant": int(hit in "1x"),
                "acc_reference": int(hit == "1"),
                "answer": answer,
                "n_options": n_options,
                "options": TEXTS[n_options],
                "image_sha256": image,
                "tokens": 20,
                "truncated": 0,
                "model": name,
            } | more
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def sources(tmp_path):
    for name, right in RIGHT.items():
        write(tmp_path / name / "predictions.jsonl", name, right)
    return [str(tmp_path / name) for name in RIGHT]


def made(sources, base="base", training=None, **settings):
    questions, runs = load_runs(sources)
    return build(questions, runs, Settings(replicates=400, **settings), base, training)


def test_golden_modality_matrix(sources):
    table = made(sources)["modality"]
    assert table["columns"] == ["ct", "mri"]
    assert [row["run"] for row in table["rows"]] == ["base", "grpo-ct", "grpo-mri"]
    accuracies = {row["run"]: [row["cells"][slug]["accuracy"] for slug in ("ct", "mri")] for row in table["rows"]}
    assert accuracies == {
        "base": [25, 50],  # c4 of four; m2 of two
        "grpo-ct": [75, 0],
        "grpo-mri": [25, 100],
    }
    means = {row["run"]: (row["macro"]["accuracy"], row["micro"]["accuracy"]) for row in table["rows"]}
    assert means["base"] == pytest.approx((37.5, 100 * 2 / 6))
    assert means["grpo-ct"] == pytest.approx((37.5, 50))
    assert means["grpo-mri"] == pytest.approx((62.5, 50))
    # Column means, diagonal and overall are over the trained runs; the base stands apart.
    assert table["column_means"]["ct"]["macro"]["accuracy"] == pytest.approx((75 + 25) / 2)
    assert table["column_means"]["mri"]["micro"]["accuracy"] == pytest.approx((0 + 100) / 2)
    assert table["overall"]["cells"] == 4
    assert table["overall"]["macro"]["accuracy"] == pytest.approx((75 + 0 + 25 + 100) / 4)
    assert table["overall"]["micro"]["accuracy"] == pytest.approx(100 * (3 + 0 + 1 + 2) / 12)
    assert table["diagonal"]["macro"]["accuracy"] == pytest.approx((75 + 100) / 2)
    assert table["diagonal"]["micro"]["accuracy"] == pytest.approx(100 * 5 / 6)
    assert table["off_diagonal"]["macro"]["accuracy"] == pytest.approx((0 + 25) / 2)
    assert table["off_diagonal"]["micro"]["accuracy"] == pytest.approx(100 * 1 / 6)


def test_golden_gains_and_mcnemar(sources):
    rows = {row["run"]: row for row in made(sources)["modality"]["rows"]}
    ct = rows["grpo-ct"]["cells"]["ct"]
    assert (ct["gain"]["points"], ct["gain"]["relative"]) == pytest.approx((50, 200))
    # c1 c2 c3 only the run, c4 only the base: exact p = 2 * (1 + 4) / 16.
    assert ct["mcnemar"] == {"run_only": 3, "base_only": 1, "p": pytest.approx(0.625)}
    assert rows["grpo-ct"]["cells"]["mri"]["gain"]["points"] == pytest.approx(-50)
    assert rows["grpo-ct"]["cells"]["mri"]["gain"]["relative"] == pytest.approx(-100)
    assert rows["grpo-ct"]["macro"]["gain"]["points"] == pytest.approx(0)
    assert rows["grpo-ct"]["micro"]["gain"]["points"] == pytest.approx(100 / 6)
    assert rows["grpo-ct"]["micro"]["gain"]["relative"] == pytest.approx(50)
    assert "gain" not in rows["base"]["cells"]["ct"]
    overall = made(sources)["modality"]["overall"]
    assert overall["macro"]["gain"]["points"] == pytest.approx(50 - 37.5)
    assert overall["macro"]["gain"]["relative"] == pytest.approx(100 * 12.5 / 37.5)
    assert overall["micro"]["gain"]["points"] == pytest.approx(50 - 100 * 2 / 6)


def test_a_base_that_is_never_right_has_no_relative_gain(tmp_path):
    write(tmp_path / "base.jsonl", "base", "000000")
    write(tmp_path / "ct.jsonl", "ct", "111111")
    table = made([str(tmp_path / "base.jsonl"), str(tmp_path / "ct.jsonl")])["modality"]
    assert table["rows"][1]["cells"]["ct"]["gain"]["relative"] is None


def test_chance_images_and_unparsed(tmp_path):
    source = str(write(tmp_path / "p.jsonl", "ct", "1xx00x"))
    table = made([source], base=None)
    ct = table["modality"]["rows"][0]["cells"]["ct"]
    assert ct["chance"] == pytest.approx(100 * (1 / 4 + 1 / 4 + 1 / 2 + 1 / 4) / 4)
    assert (ct["n"], ct["images"]) == (4, 3)
    assert ct["unparsed"] == 50
    assert (ct["accuracy"], ct["tolerant"], ct["reference"]) == pytest.approx((25, 75, 25))
    run = table["runs"][0]
    assert run["unparsed"] == pytest.approx(50)
    assert run["unparsed_tolerant"] == 0
    assert (run["strict"], run["tolerant"]) == pytest.approx((100 / 6, 400 / 6))
    assert (run["tokens_mean"], run["truncated"], run["style"]) == (20, 0, "think")
    assert made([source], base=None, reading="tolerant")["modality"]["rows"][0]["cells"]["ct"]["accuracy"] == 75


def test_intervals_hold_their_value_and_are_seeded(sources):
    first, again = made(sources), made(sources)
    assert first == again
    for row in first["modality"]["rows"]:
        for cell in (*row["cells"].values(), row["macro"], row["micro"]):
            assert cell["low"] <= cell["accuracy"] <= cell["high"]


def test_micro_of_both_matrices_is_the_same_number(sources):
    tables = made(sources)
    for matrix in ("modality", "question_type"):
        base = next(row for row in tables[matrix]["rows"] if row["run"] == "base")
        run = next(run for run in tables["runs"] if run["run"] == "base")
        assert [base["micro"][key] for key in ("accuracy", "low", "high", "n")] == [
            run[key] for key in ("accuracy", "low", "high", "n")
        ]


def test_a_matrix_that_no_run_was_trained_for_shows_all(sources):
    table = made(sources)["question_type"]
    assert [row["run"] for row in table["rows"]] == list(RIGHT)
    assert table["overall"] is None
    assert table["diagonal"] is None
    # c1, c3, m1 and c2, c4, m2
    assert [table["rows"][1]["cells"][slug]["accuracy"] for slug in table["columns"]] == pytest.approx(
        [100 / 3, 200 / 3]
    )


def test_missing_slice_leaves_out_its_means(sources, tmp_path):
    write(tmp_path / "part" / "predictions.jsonl", "grpo-oct", "01", questions=QUESTIONS[4:])
    table = made([*sources, str(tmp_path / "part")])["modality"]
    row = table["rows"][-1]
    assert (row["run"], row["missing"]) == ("grpo-oct", ["ct"])
    assert row["cells"]["ct"] is None
    assert row["cells"]["mri"]["accuracy"] == 50
    assert row["macro"] is None
    assert row["micro"] is None
    assert table["column_means"]["ct"] is None
    assert table["column_means"]["mri"]["macro"]["accuracy"] == pytest.approx((0 + 100 + 50) / 3)
    assert table["overall"] is None
    assert "grpo-oct (ct)" in formats.markdown(made([*sources, str(tmp_path / "part")]))


def test_controls_are_paired_differences(tmp_path):
    path = write(tmp_path / "p.jsonl", "ct", "111001")
    write(path, "ct", "100001", control="blank")
    write(path, "ct", "11", control="shuffled", questions=QUESTIONS[:2])  # only two rows were asked
    row = made([str(path)], base=None)["modality"]["rows"][0]
    blank = row["cells"]["ct"]["controls"]["blank"]
    assert (blank["accuracy"], blank["difference"]["points"]) == (25, 50)
    shuffled = row["cells"]["ct"]["controls"]["shuffled"]
    assert (shuffled["n"], shuffled["accuracy"], shuffled["difference"]["points"]) == (2, 100, 0)
    assert row["macro"]["controls"]["blank"]["difference"]["points"] == pytest.approx((50 + 0) / 2)
    assert "shuffled" not in row["macro"]["controls"], "not asked on every slice"
    run = made([str(path)], base=None)["runs"][0]
    assert run["controls"]["blank"]["difference"]["points"] == pytest.approx(100 * 2 / 6)


def training_file(path):
    """ct: 'one' gold 2 of 3 shown, 'two' 1 of 3, 'three' and 'four' 0 of 3; 'yes' 1 of 1, 'no' 0 of 1. img2 is seen."""
    rows = [
        ("ct", 4, "A", "t1"),
        ("ct", 4, "A", "t2"),
        ("ct", 4, "B", "t3"),
        ("ct", 2, "A", "img2"),
        ("mri", 4, "C", "img5"),
    ]
    infos = [
        {
            "modality": modality,
            "question_type": "disease_diagnosis",
            "options": TEXTS[n_options],
            "answer": answer,
            "image_sha256": image,
        }
        for modality, n_options, answer, image in rows
    ]
    pq.write_table(pa.table({"extra_info": infos}), path)
    return path


def test_blind_prior_and_leaked_images(sources, tmp_path):
    training = read_training_rows([training_file(tmp_path / "train.parquet")])
    tables = made(sources, training=training)
    rows = {row["run"]: row for row in tables["modality"]["rows"]}
    ct = rows["grpo-ct"]["cells"]["ct"]
    # The prior of the ct rows answers "one" (A) and "yes" (A): right on c1 and c3.
    assert (ct["prior_normalized"], ct["prior_exact"]) == (50, 50)
    assert rows["grpo-ct"]["cells"]["mri"]["prior_exact"] == 50  # m2 is A
    assert rows["grpo-mri"]["cells"]["mri"]["prior_exact"] == 50  # learned "three": m1 is C
    # All five rows: "one" 2 of 4 beats "two" and "three" 1 of 4: right on c1, c3 of ct.
    assert rows["base"]["cells"]["ct"]["prior_exact"] == 50
    # img2 (c3) was trained on with ct; without it the run is right on c1, c2 of c1, c2, c4.
    assert (ct["unleaked_n"], ct["unleaked_accuracy"]) == (3, pytest.approx(200 / 3))
    assert rows["grpo-mri"]["cells"]["mri"]["unleaked_n"] == 1
    run = next(run for run in tables["runs"] if run["run"] == "grpo-ct")
    assert (run["majority_letter"], run["majority_letter_accuracy"]) == ("A", 50)  # c1, c3, m2 of six
    assert run["unleaked_n"] == 5


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("ct", "ct"),
        ("grpo-oct", "oct"),
        ("sft_ct", "ct"),
        ("grpo-lesion_grading", "lesion_grading"),
        ("Qwen/Qwen2-VL-2B-Instruct", None),
        ("product", None),
    ],
)
def test_slice_is_in_the_name(name, slug):
    assert trained_slice(name) == slug


def test_runs_of_one_model_name_are_named_by_their_directories(tmp_path):
    for name, right in RIGHT.items():
        write(tmp_path / name / "predictions.jsonl", "model", right)
    _, runs = load_runs([str(tmp_path / name) for name in RIGHT])
    assert [(run.name, run.trained_on) for run in runs] == [("base", None), ("grpo-ct", "ct"), ("grpo-mri", "mri")]
    _, runs = load_runs([str(tmp_path)])
    assert len(runs) == 3, "a directory of runs"


def test_slices_of_one_model_in_files_of_their_own_make_one_run(tmp_path):
    write(tmp_path / "one" / "predictions.jsonl", "model", "1111", questions=QUESTIONS[:4])
    write(tmp_path / "two" / "predictions.jsonl", "model", "00", questions=QUESTIONS[4:])
    _, runs = load_runs([str(tmp_path / "one"), str(tmp_path / "two")])
    assert len(runs) == 1
    assert runs[0].measures["none"]["acc"].tolist() == [1, 1, 1, 1, 0, 0]


def test_other_weights_under_the_same_name_are_another_run(tmp_path):
    for name, questions in (("before", QUESTIONS[:4]), ("after", QUESTIONS[4:])):
        file = tmp_path / name / "predictions.jsonl"
        write(file, "model", "1" * len(questions), questions=questions, weights=name)
    _, runs = load_runs([str(tmp_path / "before"), str(tmp_path / "after")])
    assert [run.name for run in runs] == ["before", "after"]


def test_only_the_promised_keys_are_needed(tmp_path):
    path = write(tmp_path / "p.jsonl", "ct", "111000")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({key: row[key] for key in KEYS}) + "\n" for row in rows))
    tables = made([str(path)], base=None)
    assert tables["modality"]["rows"][0]["cells"]["ct"]["accuracy"] == 75
    assert "| ct | 75.00" in formats.markdown(tables)


# --- bad input: one line each


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: [path / "nothing"], "no such file or directory"),
        (lambda path: [path], "no predictions.jsonl in it"),
        (lambda path: [half(path)], "did not finish; run the same medr1 evaluate again"),
        (lambda path: [write(path / "a.jsonl", "a", "111111")] * 2, "answers the same questions as in"),
        (lambda path: [twice(path)], "answers question 'c1' .none. twice"),
        (lambda path: [torn(path)], "line 7: is no prediction"),
        (lambda path: [write(path / "a.jsonl", "a", "111111", control="blank")], "controls need control none"),
        (lambda path: [write(path / "a.jsonl", "a", "111111", decoding=d) for d in ("T=1", "T=2")][:1], "pick one"),
        (
            lambda path: [
                write(path / "a.jsonl", "a", "1" * 6),
                write(path / "b.jsonl", "b", "1" * 6, image_sha256="z"),
            ],
            "another image, answer or modality",
        ),
        (
            lambda path: [
                write(path / "a.jsonl", "a", "1" * 6),
                write(path / "b.jsonl", "b", "11", questions=QUESTIONS[:2]),
            ],
            "'b' answered 2 of the 4 rows of ct",
        ),
        (
            lambda path: [
                write(path / "a.jsonl", "a", "1" * 6),
                write(path / "b.jsonl", "b", "1" * 6, questions=[("x" + q[0], *q[1:]) for q in QUESTIONS]),
            ],
            "'a' answered 4 of the 8 rows of ct that the other runs answered; evaluate all runs on the same rows",
        ),
        (lambda path: [path / "empty.jsonl"] if (path / "empty.jsonl").touch() is None else [], "is empty"),
        (lambda path: [write(path / "a.jsonl", "a", "1" * 6), "x=" + str(path / "no.jsonl")], "no such file"),
    ],
)
def test_bad_files(tmp_path, make, says):
    with pytest.raises(UserError, match=says) as error:
        made([str(source) for source in make(tmp_path)], base=None)
    assert "\n" not in str(error.value)


def half(path):
    (path / "predictions.jsonl.partial").write_text("{}")
    return path


def twice(path):
    write(path / "a.jsonl", "a", "111111")
    return write(path / "a.jsonl", "a", "111111")


def torn(path):
    file = write(path / "a.jsonl", "a", "111111")
    with open(file, "a") as stream:
        stream.write('{"question_id": "c')
    return file


def test_styles_are_not_mixed_silently(tmp_path):
    paths = [write(tmp_path / f"{style}.jsonl", style, "111111", style=style) for style in ("think", "no-think")]
    _, runs = load_runs(list(map(str, paths)))
    with pytest.raises(UserError, match=r"different styles in one table .* compare styles with --styles"):
        check_styles(runs)
    with pytest.raises(UserError, match="base 'nobody' is none of the runs"):
        made([str(paths[0])], base="nobody")


def test_three_styles_in_one_table(tmp_path, capsys):
    """Think, no-think and think-after on the same rows: accuracy, difference to one of them, form and lengths."""
    lengths = {"think": [60, 70, 80, 90, 100, 110], "no-think": [6] * 6, "think-after": [50, 50, 50, 50, 50, 256]}
    right = {"think": "111000", "no-think": "111100", "think-after": "11x000"}
    for style, tokens in lengths.items():
        for question, hit, count in zip(QUESTIONS, right[style], tokens, strict=True):
            more = {"tokens": count, "truncated": int(count == 256), "format": int(hit != "x")}
            write(tmp_path / style / "predictions.jsonl", style, hit, style=style, questions=[question], **more)
    sources = [str(tmp_path / style) for style in lengths]
    assert main([*sources, "--styles", "--base", "think", "--output", str(tmp_path / "out"), "--formats", "json"]) == 0
    runs = {run["run"]: run for run in json.loads((tmp_path / "out" / "tables.json").read_text())["runs"]}
    assert {name: run["style"] for name, run in runs.items()} == {style: style for style in lengths}
    assert {name: run["accuracy"] for name, run in runs.items()} == pytest.approx(
        {"think": 50, "no-think": 100 * 4 / 6, "think-after": 100 * 2 / 6}
    )
    assert {name: run["tokens_mean"] for name, run in runs.items()} == pytest.approx(
        {"think": 85, "no-think": 6, "think-after": (5 * 50 + 256) / 6}
    )
    assert {name: run["tokens_median"] for name, run in runs.items()} == {"think": 85, "no-think": 6, "think-after": 50}
    assert runs["think-after"]["truncated"] == pytest.approx(100 / 6)
    assert runs["think-after"]["unparsed"] == pytest.approx(100 / 6)
    assert runs["think-after"]["format"] == pytest.approx(100 * 5 / 6)
    assert "gain" not in runs["think"]
    gain = runs["no-think"]["gain"]
    assert (gain["points"], gain["relative"], gain["n"]) == pytest.approx((100 / 6, 100 / 3, 6))
    assert runs["no-think"]["mcnemar"] == {"run_only": 1, "base_only": 0, "p": 1}
    assert runs["think-after"]["gain"]["points"] == pytest.approx(-100 / 6)
    printed = capsys.readouterr().out
    assert "| run | style | accuracy | over think |" in printed
    line = next(line for line in printed.splitlines() if line.startswith("| no-think | no-think | 66.67 ["))
    assert "+16.67 [" in line
    assert "| 6.00 | 6.00 |" in line, "mean and median of the tokens"


# --- what is written


def test_command_writes_every_format(sources, tmp_path, capsys):
    training_file(tmp_path / "train.parquet")
    arguments = [
        *sources,
        "--base",
        "base",
        "--train",
        str(tmp_path / "train.parquet"),
        "--output",
        str(tmp_path / "out"),
    ]
    arguments += ["--replicates", "200", "--formats", "md", "csv", "json", "tex"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "tables.md").read_text() in printed
    assert "| grpo-ct | 75.00 [" in printed
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "tables.csv").read_text())))
    cell = next(row for row in rows if (row["table"], row["run"], row["tested_on"]) == ("modality", "grpo-ct", "ct"))
    assert (float(cell["accuracy"]), float(cell["gain_points"]), float(cell["prior_normalized"])) == (75, 50, 50)
    tables = json.loads((tmp_path / "out" / "tables.json").read_text())
    assert tables["modality"]["rows"][1]["cells"]["ct"]["accuracy"] == 75
    latex = (tmp_path / "out" / "tables.tex").read_text()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2
    assert "grpo-ct & 75.00 & 0.00 & 37.50 & 50.00" in latex


def test_heatmaps(sources, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    from medr1_verl.evaluation.figures import write_heatmaps

    written = write_heatmaps(made(sources), tmp_path)
    assert [path.name for path in written] == [
        "heatmap-modality-accuracy.png",
        "heatmap-modality-gain.png",
        "heatmap-question_type-accuracy.png",
        "heatmap-question_type-gain.png",
    ]
    for path in written:
        assert Image.open(path).size[0] > 300


def test_names_with_special_characters_in_latex(tmp_path):
    write(tmp_path / "p.jsonl", "run_1 & 50%", "111111")
    assert r"run\_1 \& 50\%" in formats.latex(made([str(tmp_path / "p.jsonl")], base=None))
