"""Which question goes to train and which to test: by image group (default), by row, or as published."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from medr1_verl.convert.question import Question

# "000155 (2).png", "IM-0001 - Copy.jpeg", "IM-0001 - Copy (3).jpeg", "copy of x.png"
_COPY_MARK = re.compile(r"(?:\s*\(\d{1,3}\)|\s*-\s*copy|\s+copy)+$|^copy of\s+", re.IGNORECASE)
# Mean squared difference of two 16 x 16 thumbnails (grey levels squared) below which two files show one picture.
# Measured on 45 medical images: JPEG at quality 75 gives 0.1 (at most 0.7), half the size 0.15 (9 in 10 below 3.1),
# 3 grey levels brighter 9; different images are above 230.
SAME_PICTURE = 4.0
SAME_PICTURE_COPY = 25.0  # for files whose names already say that one is a copy of the other
SHARE_OF_VARIANCE = 0.05  # and never more than this share of the thumbnail's own variance: dark slices look alike


class Groups:
    """Union-find over image paths. A group's name is its first path in sorted order."""

    def __init__(self, paths: Iterable[str]):
        self._parent = {path: path for path in paths}

    def find(self, path: str) -> str:
        root = path
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[path] != root:
            self._parent[path], path = root, self._parent[path]
        return root

    def join(self, first: str, second: str) -> bool:
        """Put two paths into one group; True if they were in different ones."""
        a, b = self.find(first), self.find(second)
        if a == b:
            return False
        self._parent[max(a, b)] = min(a, b)
        return True


def original_name(path: str) -> str:
    """``path`` without the marks that file managers give to copies; equal for a file and its copies."""
    folder, _, name = path.rpartition("/")
    stem = name.rsplit(".", 1)[0]
    while (shorter := _COPY_MARK.sub("", stem)) != stem and shorter:
        stem = shorter
    return f"{folder}/{stem}".casefold()


def same_picture(first: np.ndarray, second: np.ndarray, limit: float = SAME_PICTURE) -> bool:
    """Whether two flattened 16 x 16 thumbnails show one picture: their mean squared difference is below ``limit``.

    A thumbnail of one even grey shows too little to tell, and matches nothing.
    """
    difference = first.astype(np.float32) - second
    return float(np.mean(difference * difference)) < min(limit, SHARE_OF_VARIANCE * float(first.var()))


def group_images(
    paths: Sequence[str], sha256: dict[str, str], signatures: dict[str, bytes]
) -> tuple[Groups, dict[str, int]]:
    """Groups of files that show one picture, and how many joins each rule made.

    ``same_bytes``: equal SHA-256. ``same_picture``: the thumbnails are nearly equal (another format, size or quality).
    ``named_copy``: the names differ in a copy mark only and the thumbnails are alike.
    ``signatures`` has 256 bytes per path; paths without one (a dry run decodes nothing) are compared by bytes alone.
    """
    groups = Groups(paths)
    joins = {"same_bytes": 0, "same_picture": 0, "named_copy": 0}
    by_bytes: dict[str, str] = {}
    for path in paths:
        if digest := sha256.get(path):
            joins["same_bytes"] += groups.join(by_bytes.setdefault(digest, path), path)
    known = [path for path in paths if path in signatures and by_bytes.get(sha256.get(path, ""), path) == path]
    if not known:
        return groups, joins
    thumbnails = np.frombuffer(b"".join(signatures[path] for path in known), np.uint8).reshape(len(known), -1)
    by_name: dict[str, list[int]] = defaultdict(list)
    for i, path in enumerate(known):
        by_name[original_name(path)].append(i)
    for members in by_name.values():
        for a in range(len(members)):
            for b in range(a):
                if same_picture(thumbnails[members[a]], thumbnails[members[b]], SAME_PICTURE_COPY):
                    joins["named_copy"] += groups.join(known[members[b]], known[members[a]])

    for i, j in close_pairs(thumbnails):
        joins["same_picture"] += groups.join(known[i], known[j])
    return groups, joins


def close_pairs(thumbnails: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of rows of ``thumbnails``, uint8 (n, 256), that show one picture.

    Two such thumbnails differ in their mean grey by at most the root of the limit, so in the order of means each block
    is compared only with what follows within that distance: for 83,000 images seconds instead of hours.
    """
    means = thumbnails.mean(axis=1, dtype=np.float32)
    order = np.argsort(means, kind="stable")
    ends = np.searchsorted(means[order], means[order] + np.float32(SAME_PICTURE**0.5), side="right")
    block = 256
    for start in range(0, len(order), block):
        stop = min(start + block, len(order))
        window = thumbnails[order[start : int(ends[stop - 1])]].astype(np.float32)
        head = window[: stop - start]
        squares = np.einsum("ij,ij->i", window, window)
        distance = squares[: stop - start, None] + squares[None] - 2 * head @ window.T
        for i, j in np.argwhere(distance < SAME_PICTURE * window.shape[1] + 64):  # 64: what float32 may cancel
            if i < j and same_picture(window[i], window[j]):
                yield int(order[start + i]), int(order[start + j])


def any_same_picture(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """For each thumbnail of ``first``, uint8 (n, 256), whether ``second`` has the same picture; bool of shape (n,)."""
    hits = np.zeros(len(first), bool)
    for i, j in close_pairs(np.concatenate([first, second])):
        for inside, other in ((i, j), (j, i)):
            if inside < len(first) <= other:
                hits[inside] = True
    return hits


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{name}".encode()).digest()


def split_by_group(group_of: Sequence[str], strata: Sequence[str], test_fraction: float, seed: int) -> list[str]:
    """ "train" or "test" for each row. Rows of one group stay together.

    Within each stratum (a row's group belongs to the stratum of its first row) the groups are taken in an order that
    only the seed and the group's name decide, until the test rows are as near to ``test_fraction`` as they come.
    """
    sizes = Counter(group_of)
    groups: dict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    for group, stratum in zip(group_of, strata, strict=True):
        if group not in seen:
            seen.add(group)
            groups[stratum].append(group)
    test: set[str] = set()
    for members in groups.values():
        wanted = test_fraction * sum(sizes[group] for group in members)
        taken = 0
        for group in sorted(members, key=lambda name: _rank(seed, name)):
            if abs(taken + sizes[group] - wanted) < abs(taken - wanted):
                test.add(group)
                taken += sizes[group]
    return ["test" if group in test else "train" for group in group_of]


def row_group_names(questions: Sequence[Question], groups: Groups) -> list[str]:
    """The group of each question; several images of one question bind their groups together."""
    for question in questions:
        for other in question.images[1:]:
            groups.join(question.images[0], other)
    return [groups.find(question.images[0]) for question in questions]
