"""Questions and converted images -> the rows of the parquet files."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medr1_verl.convert import publish
from medr1_verl.convert.manifest import SPLITS
from medr1_verl.convert.options import Options
from medr1_verl.convert.question import Question
from medr1_verl.errors import UserError
from medr1_verl.prompt import load_template, render_prompt
from medr1_verl.schema import make_row
from medr1_verl.taxonomy import MODALITIES, QUESTION_TYPES


def _slices(options: Options, questions: Sequence[Question]) -> dict[str, list[Question]]:
    """Folder below the output -> its questions ("" is the output itself)."""
    if options.by == "none":
        return {"": list(questions)}
    slices: dict[str, list[Question]] = {}
    for slug in MODALITIES if options.by == "modality" else QUESTION_TYPES:
        chosen = [question for question in questions if getattr(question, options.by) == slug]
        if chosen:
            slices[slug] = chosen
    return slices


class _StoredImages:
    """Random access to the converted files in the shards; the stream of the last shard is kept open."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._shard = -1
        self._stream: Any = None

    def read(self, record: dict[str, Any]) -> bytes:
        if record["shard"] != self._shard:
            self.close()
            self._stream = open(self.folder / f"{record['shard']:06d}.bin", "rb", buffering=0)  # noqa: SIM115 - closed in close()
            self._shard = record["shard"]
        self._stream.seek(record["offset"])
        data = self._stream.read(record["length"])
        if zlib.crc32(data) != record["crc"]:
            raise UserError(f"shard {self._shard} in {self.folder} is damaged; run again without --resume")
        return data

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


def write_rows(
    options: Options,
    shards: Path,
    staged: Path,
    output: Path,
    questions: Sequence[Question],
    records: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """The parquet files of ``questions`` below ``staged``, and with ``image_store`` path their image files too.

    ``records`` say where in ``shards`` each converted image is; ``output`` is the name that ``staged`` will have.
    Returns ``bytes`` and ``sha256`` of each parquet file, by its path below ``staged``.
    """
    written = {}
    extension = "jpg" if options.jpeg_quality else "png"
    template = None if options.template is None else load_template(options.template)
    store = _StoredImages(shards)
    with tqdm(total=len(questions), desc="writing parquet", unit="row", mininterval=0.5) as bar:
        for slug, chosen in _slices(options, questions).items():
            folder = staged / slug
            folder.mkdir(parents=True, exist_ok=True)
            # In one pass, so that the files are written side by side and each shard is read once.
            files = {split: publish.ParquetFile(folder / f"{split}.parquet", options.image_store) for split in SPLITS}
            for question in chosen:
                parquet = files[str(question.split)]  # set by now
                found = [(records[path], store.read(records[path])) for path in question.images]
                if options.image_store == "bytes":
                    pictures: list[dict[str, Any]] = [{"bytes": data} for _, data in found]
                    size = sum(len(data) for _, data in found)
                else:
                    places = [_image_file(staged, record["sha256"], extension, data) for record, data in found]
                    pictures, size = [{"image": str(output / place)} for place in places], 0
                text = render_prompt(question.question, question.options, options.style, len(question.images), template)
                extra = _extra_info(question, parquet.rows, options.style, [record["sha256"] for record, _ in found])
                parquet.add(make_row(images=pictures, prompt=text, extra_info=extra), size)
                bar.update(1)
            for parquet in files.values():
                parquet.finish()
            for parquet in files.values():
                written[parquet.path.relative_to(staged).as_posix()] = parquet.close()
    store.close()
    return written


def _image_file(staged: Path, sha256: str, extension: str, data: bytes) -> Path:
    """Path below the output of a stored image, written if it is not there yet; named by its source's SHA-256."""
    place = Path("images") / sha256[:2] / f"{sha256}.{extension}"
    if not (staged / place).exists():
        (staged / place).parent.mkdir(parents=True, exist_ok=True)
        (staged / place).write_bytes(data)
    return place


def _extra_info(question: Question, index: int, style: str, sha256: list[str]) -> dict[str, Any]:
    """``extra_info`` of a row. Of several images, the paths (and the digests) are joined by line breaks."""
    return {
        "index": index,
        "split": question.split,
        "question_id": question.question_id,
        "dataset": question.dataset,
        "modality": question.modality,
        "question_type": question.question_type,
        "question": question.question,
        "options": list(question.options),
        "answer": question.answer,
        "answer_text": question.answer_text,
        "image_path": "\n".join(question.images),
        "image_sha256": "\n".join(sha256),
        "style": style,
    }
