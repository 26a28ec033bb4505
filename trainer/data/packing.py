"""The choice of examples that share a row: whole ones only, so that no answer is learned without
its question."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def pack(lengths: npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Return documents divided into rows of at most `capacity` tokens, by best fit, longest first.
    No length exceeds `capacity`.

    Best fit decreasing needs at most 11/9 of the fewest possible rows (Johnson 1973), and far fewer
    in practice. Rows come in the order of the document that opened each, so that the first rows are
    no longer or shorter than others. The open rows' remaining tokens are the bits of one whole
    number, so the fullest row with enough room is found in one step.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # tokens left → rows
    rooms = 0  # bit r is set where with_room[r] has a row
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        large_enough = rooms >> length
        if large_enough:
            room = length + (large_enough & -large_enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            row, room = len(rows), capacity
            rows.append([])
        rows[row].append(document)
        if left := room - length:
            with_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    return sorted(rows)
