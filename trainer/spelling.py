"""The guess which word was meant."""

from __future__ import annotations

from collections.abc import Iterable


def edit_distance(a: str, b: str) -> int:
    """Return the fewest insertions, deletions, replacements and swaps of neighbours that make `a`
    into `b`.

    A swap counts once, because swapped letters are a third of typing mistakes (Damerau 1964);
    difflib's ratio ranks "rl" as far from "lr" as from any other pair.
    """
    before_last: list[int] = []
    last = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        row = [i]
        for j, right in enumerate(b, 1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (left != right))
            if i > 1 and j > 1 and left == b[j - 2] and a[i - 2] == right:
                cost = min(cost, before_last[j - 2] + 1)
            row.append(cost)
        before_last, last = last, row
    return last[-1]


def nearest(word: str, names: Iterable[str], *, within: int | None = None) -> str | None:
    """Return the name that `word` was most likely meant to be, or None if all are further than
    `within` edits (a third of it)."""
    limit = max(1, len(word) // 3) if within is None else within
    candidates = [name for name in names if abs(len(name) - len(word)) <= limit]
    near = [(edit_distance(word.lower(), name.lower()), name[:1] != word[:1], name) for name in candidates]
    best = min(near, default=(limit + 1, True, ""))
    return best[2] if best[0] <= limit else None
