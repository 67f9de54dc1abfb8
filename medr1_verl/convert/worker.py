"""One worker process: reads shard orders from standard input, converts images, reports line by line.

Separate processes (``python -m medr1_verl.convert.worker``) rather than forks, because they end by themselves when the
parent dies (their input closes), need no ``__main__`` guard in a user's script, and a decoder that crashes on a
hostile file takes only its own process with it.

An order is one JSON line: ``{"shard": n, "key": ..., "images": [...], "skip": {index: message}}``. A line comes back
as each image is begun: its number, so that the parent knows at which one a process ended; and ``done`` when the shard
is complete on disk: ``NNNNNN.bin`` (the converted files back to back) and ``NNNNNN.json`` (their records, with a CRC
each: what a power cut has spoilt is found out without waiting for the disk after each shard).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import signal
import stat
import sys
import threading
import time
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from medr1_verl.convert import images
from medr1_verl.convert.png import bare_png, encode_png
from medr1_verl.convert.question import RejectedError


@lru_cache(1024)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder, strict=True)


def safe_path(root: str, relative: str) -> str:
    """Real path of ``relative`` below the real path ``root``; raises ``unsafe_path`` or ``missing_image``."""
    folder, name = os.path.split(os.path.join(root, relative))
    try:
        real = os.path.join(_real_folder(folder), name)
        if stat.S_ISLNK(os.lstat(real).st_mode):
            try:
                real = os.path.realpath(real, strict=True)
            except OSError:
                raise RejectedError("missing_image", f"{relative!r} is a link that leads nowhere") from None
    except OSError:
        raise RejectedError("missing_image", f"there is no {relative!r} in the input folder") from None
    except ValueError:
        raise RejectedError("unsafe_path", f"{relative!r} is not a usable path") from None
    if not real.startswith(root.rstrip(os.sep) + os.sep):
        raise RejectedError("unsafe_path", f"{relative!r} leads out of the input folder")
    return real


def read_image_file(root: str, relative: str) -> bytes:
    """Bytes of an image below ``root``; raises :class:`RejectedError`. Only regular files are opened."""
    real = safe_path(root, relative)
    try:
        status = os.stat(real)
        if not stat.S_ISREG(status.st_mode):  # a pipe would wait for ever, a device might not end
            raise RejectedError("unreadable_image", f"{relative!r} is not a regular file")
        if status.st_size > images.MAX_FILE_BYTES:
            raise RejectedError("image_too_large", f"{status.st_size:,} bytes; at most 1 GiB is read")
        with open(real, "rb", buffering=0) as stream:
            return stream.readall()
    except OSError as error:
        raise RejectedError("unreadable_image", f"cannot read {relative!r}: {error.strerror or error}") from None


def _reason(error: BaseException) -> tuple[str, str]:
    if isinstance(error, RejectedError):
        return error.reason, error.message
    if isinstance(error, MemoryError):
        return "image_too_large", "not enough memory to decode it"
    message = " ".join(str(error).split())[:200] or type(error).__name__
    return "unreadable_image", message


def process(root: str, relative: str, settings: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """(record, stored file) of one image. Never raises for a fault of the image: the record then has ``error``."""
    record: dict[str, Any] = {"path": relative}
    try:
        data = read_image_file(root, relative)
        record["sha256"] = hashlib.sha256(data).hexdigest()
        if settings["dry_run"]:
            record["source"] = images.read_header(data, settings["max_pixels"])
            return record, b""
        picture = images.convert_image(data, settings["image_size"], settings["max_pixels"])
        stored = bare_png(data, picture.pixels) or encode_png(picture.pixels)
        if settings["jpeg_quality"]:
            record["png_bytes"] = len(stored)
            stored, record["psnr"] = images.lossy(picture.pixels, settings["jpeg_quality"])
    except Exception as error:  # whatever a decoder throws at a hostile file is that file's fault
        record["error"] = _reason(error)
        return record, b""
    record["source"] = picture.source_size
    record["size"] = picture.pixels.shape[1], picture.pixels.shape[0]
    record["signature"] = base64.b64encode(picture.signature).decode()
    return record, stored


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as stream:
        write(stream)
    os.replace(temporary, path)


def run_shard(order: dict[str, Any], settings: dict[str, Any], reply: Callable[[str], None]) -> None:
    """Convert the images of one order and leave the shard's two files, the index last."""
    folder = Path(settings["folder"])
    stem = f"{order['shard']:06d}"
    records: list[dict[str, Any]] = []

    def write(stream: BinaryIO) -> None:
        offset = 0
        for number, relative in enumerate(order["images"]):
            reply(str(number))
            if message := order["skip"].get(str(number)):
                record, stored = {"path": relative, "error": ("unreadable_image", message)}, b""
            else:
                record, stored = process(settings["root"], relative, settings)
            stream.write(stored)
            record |= {"offset": offset, "length": len(stored), "crc": zlib.crc32(stored)}
            offset += len(stored)
            records.append(record)
        reply(str(len(order["images"])))

    _replace(folder / f"{stem}.bin", write)
    index = json.dumps({"key": order["key"], "records": records}).encode()
    _replace(folder / f"{stem}.json", lambda stream: stream.write(index))
    reply("done")


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = os.getppid()

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    if hasattr(os, "fork"):
        threading.Thread(target=leave_with_parent, daemon=True).start()
    Image.MAX_IMAGE_PIXELS = None  # images.check_size is stricter, and says so in a reason code
    settings = json.loads(sys.stdin.readline())
    out = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a chatty decoder must not write between the replies

    def reply(line: str) -> None:
        os.write(out, f"{line}\n".encode())

    try:
        for line in sys.stdin:
            run_shard(json.loads(line), settings, reply)
    except OSError as error:
        with contextlib.suppress(OSError):
            reply(json.dumps({"fatal": f"{error.strerror or error}", "errno": error.errno}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
