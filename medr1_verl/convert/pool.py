"""Shards of images over worker processes: bounded memory, restarts after a crash, reuse of finished shards."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import medr1_verl
from medr1_verl.convert.publish import disk_error
from medr1_verl.errors import UserError

SHARD_IMAGES = 64  # at most
IMAGE_SECONDS = 180  # a single image that takes longer is given up


def file_stamp(root: str, relative: str) -> tuple[int, int]:
    """(size, modification time in ns) of a file, (-1, -1) where it cannot be looked at."""
    try:
        status = os.stat(os.path.join(root, relative))
    except (OSError, ValueError):
        return -1, -1
    return status.st_size, status.st_mtime_ns


class _Worker:
    def __init__(self, settings: dict[str, Any]):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                [str(Path(medr1_verl.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            # one thread each: the workers are the parallelism
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "RAYON_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "medr1_verl.convert.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self.last_reply = time.monotonic()
        self.send(settings)

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin
        self.last_reply = time.monotonic()
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def replies(self) -> Iterator[bytes]:
        """Its lines, without the line break, as they come."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.last_reply = time.monotonic()
            yield line[:-1]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()


def shard_sizes(count: int) -> Iterator[int]:
    """Number of images of each shard; only ``count`` decides.

    The last shards get smaller and smaller, so that no worker is left with much to do while the others have nothing.
    """
    while count > 0:
        size = min(SHARD_IMAGES, -(-count // 8))
        count -= size
        yield size


class ImagePool:
    """Converts the images of a run into shards in ``folder`` and hands out their records and bytes.

    ``images`` are relative paths, each once; their order fixes the shards, so the result does not depend on the number
    of workers. A shard found on disk is used again if its key matches: same settings, paths, sizes and times.
    """

    def __init__(self, images: Sequence[str], settings: dict[str, Any], workers: int, resume: bool):
        self.images = images
        self.settings = settings
        self.folder = Path(settings["folder"])
        self.workers = workers
        self.resume = resume
        self.reused = 0
        self._fatal: BaseException | None = None

    def _orders(self) -> list[dict[str, Any]]:
        settings = {key: value for key, value in self.settings.items() if key != "folder"}
        orders = []
        images = iter(self.images)
        for number, size in enumerate(shard_sizes(len(self.images))):
            paths = list(itertools.islice(images, size))
            stamps = [file_stamp(self.settings["root"], path) for path in paths]
            key = hashlib.sha256(json.dumps([settings, paths, stamps]).encode()).hexdigest()
            orders.append({"shard": number, "key": key, "images": paths, "skip": {}})
        return orders

    def _finished(self, order: dict[str, Any]) -> dict[str, Any] | None:
        """The index of a shard that is whole, with the key of ``order``."""
        stem = self.folder / f"{order['shard']:06d}"
        try:
            index = json.loads(stem.with_suffix(".json").read_bytes())
            complete = index["key"] == order["key"] and stem.with_suffix(".bin").stat().st_size == sum(
                record["length"] for record in index["records"]
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return index if complete else None

    def _reusable(self, order: dict[str, Any]) -> bool:
        """Whether an earlier run has left this shard, each picture as it was written: a power cut may spoil any."""
        index = self._finished(order)
        if index is None:
            return False
        with open(self.folder / f"{order['shard']:06d}.bin", "rb") as stream:
            return all(zlib.crc32(stream.read(record["length"])) == record["crc"] for record in index["records"])

    def _serve(self, todo: queue.SimpleQueue, slots: list[_Worker | None], slot: int, bar: tqdm) -> None:
        try:
            while self._fatal is None:
                try:
                    order = todo.get_nowait()
                except queue.Empty:
                    break
                while not self._one_shard(order, slots, slot, bar):
                    pass
            idle, slots[slot] = slots[slot], None
            if idle is not None:
                idle.stop()
        except BaseException as error:
            self._fatal = self._fatal or error

    def _one_shard(self, order: dict[str, Any], slots: list[_Worker | None], slot: int, bar: tqdm) -> bool:
        """True when the shard is complete; False when its worker died, whose image is then on the skip list."""
        current, code = None, None
        try:
            worker = slots[slot]
            if worker is None:
                worker = slots[slot] = _Worker(self.settings)
            worker.send(order)
            for reply in worker.replies():
                if reply.isdigit():
                    bar.update(int(reply) - (current or 0))
                    current = int(reply)
                elif reply == b"done":
                    return True
                else:
                    fault = json.loads(reply)
                    raise disk_error(OSError(fault["errno"], fault["fatal"]), self.folder)
        except BrokenPipeError:
            pass
        if self._fatal is not None:
            return True
        worker = slots[slot]
        slots[slot] = None
        if worker is not None:
            worker.stop()
            code = worker.process.returncode
        if current is None or current == len(order["images"]) or str(current) in order["skip"]:
            raise UserError(f"a worker process ended between images (exit status {code}); run again with --resume")
        bar.update(-current)
        order["skip"][str(current)] = f"the decoder crashed or took longer than {IMAGE_SECONDS} s"
        return False

    def run(self, description: str) -> None:
        """Bring every shard onto the disk; progress goes to standard error."""
        orders = self._orders()
        todo: queue.SimpleQueue = queue.SimpleQueue()
        for order in orders:
            if self.resume and self._reusable(order):
                self.reused += len(order["images"])
            else:
                todo.put(order)
        count = max(1, min(self.workers, todo.qsize()))
        slots: list[_Worker | None] = [None] * count
        with tqdm(total=len(self.images), initial=self.reused, desc=description, unit="img", mininterval=0.5) as bar:
            threads = [
                threading.Thread(target=self._serve, args=(todo, slots, slot, bar), daemon=True)
                for slot in range(count)
            ]
            try:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    while thread.is_alive():
                        thread.join(0.2)
                        for worker in filter(None, list(slots)):
                            if time.monotonic() - worker.last_reply > IMAGE_SECONDS:
                                worker.process.kill()
            except BaseException as error:  # Ctrl-C above all: no worker may outlive the run
                self._fatal = error
                raise
            finally:
                for worker in filter(None, list(slots)):
                    worker.stop()
        if self._fatal is not None:
            raise self._fatal

    def records(self) -> Iterator[dict[str, Any]]:
        """The record of each image, in the order of ``images``, with its shard number as ``shard``."""
        for order in self._orders():
            index = self._finished(order)
            if index is None:
                raise UserError(f"shard {order['shard']} in {self.folder} changed during the run; run again")
            for record in index["records"]:
                record["shard"] = order["shard"]
                yield record
