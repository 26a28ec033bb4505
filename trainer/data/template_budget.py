"""A budget for one rendering of a chat template: steps and characters are counted, so the limit
does not depend on the machine.

Every operation announces what it will read and write before it does so, and is refused if that is
more than is left. The budget grows with the template's input: a long conversation may take long.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Set
from typing import Any

from jinja2.exceptions import SecurityError

from trainer.data.fault import Fault

# A step is the work of one node of a template's syntax tree, some 0.1 to 1 µs, so these limits
# allow seconds. Published templates take some 100 to 1,000 steps per turn, and those that look at
# all turns from each turn 10 per pair of turns.
STEPS = 5_000_000
STEPS_PER_CHARACTER = 200
# Published templates write a content some five times, with all its parts; one that collects its
# text turn by turn writes all of it once per turn. A character takes at most 4 bytes: a gigabyte
# with the input, twice that for the largest conversations.
CHARACTERS = 1 << 26
CHARACTERS_PER_CHARACTER = 512
MOST_CHARACTERS = 1 << 29
SCAN = 5  # 2^5 characters are read or copied in a step
FEW = 64  # work on so few characters is not counted, only the operation that does it
ELEMENT = 32  # an element of a list takes as much memory as so many characters
LARGEST_REPETITION = 10_000  # the most repetitions, and the widest field
# Bits; Python itself reads and writes no number with more than 4,300 digits.
LARGEST_NUMBER = 1 << 14
DEEPEST_ROW = 100  # nested lists and objects; JSON schemas of tools have some 10 levels
DEEPEST_CALL = 100  # nested calls of macros, loops and blocks; Python's own limit is some 150
DEEPEST_LAZY = 20  # filters such as select, each of which takes from the one before
LARGEST_SIZE = 1 << 62  # above any limit: what contains itself twice doubles with each level
OTHER = 64  # characters written for what is neither text, number nor container

Size = tuple[int, int]  # characters, levels of nested containers


class Budget:
    """The remaining budget of one rendering; `begin` starts another one. Exceeding it raises
    SecurityError."""

    __slots__ = ("_characters", "_levels", "_most_characters", "_most_steps", "_sizes", "_steps")

    def __init__(self) -> None:
        # Sizes by the id of containers, which are kept alive so that no other object gets their id.
        self._sizes: dict[int, tuple[Any, Size]] = {}
        self._levels = 0
        self._steps = self._most_steps = STEPS
        self._characters = self._most_characters = CHARACTERS

    def begin(self, given: list[Any]) -> None:
        """Set the budget for an input. Fault if the input is nested too deeply to be written."""
        self._sizes.clear()
        self._levels = 0
        size = _characters_in(given)
        self._steps = self._most_steps = STEPS + STEPS_PER_CHARACTER * size
        self._characters = self._most_characters = max(
            min(CHARACTERS + CHARACTERS_PER_CHARACTER * size, MOST_CHARACTERS), size * ELEMENT
        )

    def end(self) -> None:
        """Release what was kept."""
        self._sizes.clear()

    @property
    def steps_taken(self) -> int:
        """The number of steps that the rendering has taken so far."""
        return self._most_steps - self._steps

    # ------------------------------------------------------------------------------ what is counted

    def spend(self, steps: int) -> None:
        """Count steps that are about to be taken."""
        self._steps -= steps
        if self._steps < 0 or steps < 0 or self._characters < 0:
            raise SecurityError(f"it takes more than {self._most_steps:,} steps for one conversation")

    def look(self, characters: int) -> None:
        """Count characters that are about to be read."""
        self.spend(1 + (characters >> SCAN))

    def write(self, characters: int) -> None:
        """Count characters that are about to be written, or were, by an operation that cannot write
        more than its input."""
        self._characters -= characters
        self._steps -= characters >> SCAN
        if self._characters < 0 or self._steps < 0 or characters < 0:
            raise SecurityError(f"it writes more than {self._most_characters:,} characters for one conversation")

    def require(self, characters: int) -> None:
        """Refuse an operation that would write more than is left. The characters are counted when
        they exist."""
        if characters > self._characters:
            raise SecurityError(f"it would write more than {self._most_characters:,} characters for one conversation")

    # ------------------------------------------------------------------------- operands and results

    def weighed(self, value: Any) -> Any:
        """Return the value, counted as about to be written as text."""
        size = len(value) if type(value) is str else self.size(value)
        if size < FEW:  # most are
            self._characters -= FEW
        else:
            self.write(size)
        return value

    def scanned(self, value: Any) -> Any:
        """Return the value, counted as about to be compared, hashed or searched."""
        if type(value) is not str or len(value) >= FEW:
            self.look(self.size(value))
        return value

    def searched(self, value: Any) -> Any:
        """Return the value, counted as about to be searched for another one; a dictionary is not
        searched."""
        if type(value) is not dict and (type(value) is not str or len(value) >= FEW):
            self.look(self.size(value))
        return value

    def copied(self, value: Any, times: int = 1) -> Any:
        """Return the value, counted as about to be added to, and so copied in each of `times`
        additions."""
        if isinstance(value, str):
            self.write(len(value) * times)
        else:
            self.held(value, times)
        return value

    def held(self, value: Any, times: int = 1) -> Any:
        """Return the value, counted as the result of an operation."""
        if isinstance(value, str | bytes):
            if len(value) >= FEW or times > 1:
                self.write(len(value) * times)
            else:
                self._characters -= FEW
        elif isinstance(value, int):
            if value.bit_length() > LARGEST_NUMBER:
                raise SecurityError(f"it computes with a number of more than {LARGEST_NUMBER:,} bits")
        elif isinstance(value, list | tuple | dict | Set):
            self.spend(len(value) * times)
            self.write(len(value) * times * ELEMENT)
        return value

    def passed(self, value: Any, steps: int) -> Any:
        """Return the value after counting the steps taken for it."""
        self.spend(steps)
        return value

    def size(self, value: Any) -> int:
        """Return the number of characters that a value takes when written, with all that is in
        it."""
        return self._size(value)[0]

    def depth(self, value: Any) -> int:
        """Return the number of nested levels of containers in a value."""
        return self._size(value)[1]

    def _size(self, value: Any) -> Size:
        known = self._sizes.get(id(value))
        if known is not None:
            return known[1]
        if isinstance(value, str | bytes):
            return len(value), 0
        if isinstance(value, int | float):
            return 24 if isinstance(value, float) else 2 + value.bit_length() // 3, 0
        parts = _parts_of(value)
        if parts is None:
            return OTHER, 0
        characters, depth = 4, 0
        for part in parts:
            inside = (len(part), 0) if type(part) is str else self._size(part)
            characters += 4 + inside[0]
            depth = max(depth, inside[1])
        size = min(characters, LARGEST_SIZE), depth + 1
        self.spend(len(value))
        self._sizes[id(value)] = value, size
        return size

    # -------------------------------------------------------------------------- calls by themselves

    def enter(self) -> None:
        """Count the begin of a macro, loop or block; `leave` ends it."""
        self._levels += 1
        if self._levels > DEEPEST_CALL:
            raise SecurityError(f"its calls of itself are nested more than {DEEPEST_CALL} deep")

    def leave(self) -> None:
        self._levels -= 1


class Lazy:
    """The values of a filter, one by one, each counted when it is taken."""

    def __init__(self, budget: Budget, values: Iterator[Any], steps: int, taken_from: Any) -> None:
        """Wrap the values. `steps`: the cost of each. `taken_from`: the filter's input."""
        self._budget, self._values, self._steps = budget, values, steps
        self.depth: int = taken_from.depth + 1 if isinstance(taken_from, Lazy) else 1
        if self.depth > DEEPEST_LAZY:
            raise SecurityError(f"its filters are nested more than {DEEPEST_LAZY} deep")

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._budget.spend(self._steps)
        value = next(self._values)
        if isinstance(value, list):  # a row of batch or slice
            self._budget.held(value)
        return value

    def __repr__(self) -> str:
        return "<values>"


def _parts_of(value: Any) -> Iterable[Any] | None:
    """Return the values with which a container is written; None for what is not a container."""
    if isinstance(value, dict):
        return (part for pair in value.items() for part in pair)
    return value if isinstance(value, list | tuple | Set | range) or type(value).__name__ in VIEWS else None


CONTAINERS = (dict, list, tuple)
VIEWS = frozenset({"dict_keys", "dict_values", "dict_items"})


def _characters_in(given: list[Any]) -> int:
    """Return the size of a template's input. Fault if it is nested deeper than DEEPEST_ROW."""
    characters = 0
    waiting: list[tuple[Any, int]] = [(given, 0)]  # containers, and their depth
    while waiting:
        container, depth = waiting.pop()
        if depth > DEEPEST_ROW:
            raise Fault(f"it is nested more than {DEEPEST_ROW} deep, which no chat template writes; fix or remove it")
        values = container
        if type(container) is dict:
            values = container.values()
            characters += 16 * len(container)
        for value in values:
            if type(value) is str:
                characters += len(value)
            elif isinstance(value, CONTAINERS):
                waiting.append((value, depth + 1))
            else:
                characters += 4
    return characters


def require_width(number: Any) -> None:
    """Raise SecurityError for a number too large to repeat something, or to widen a field."""
    if isinstance(number, int) and abs(number) > LARGEST_REPETITION:
        raise SecurityError(f"it repeats something {number} times" if number.bit_length() < 64 else "it repeats something")


def formatted_size(budget: Budget, text: str, arguments: object) -> int:
    """Return an upper bound on the characters of a text with % fields, formatted with those
    arguments."""
    fields = text.count("%")
    _require_widths(text)
    if "*" in text:
        for number in arguments if isinstance(arguments, tuple) else (arguments,):
            require_width(number)
        fields += fields * LARGEST_REPETITION
    # 1e308 has 309 digits and six more.
    return len(text) + _widths_in(text) + fields * (budget.size(arguments) + 320)


def format_size(budget: Budget, text: str, arguments: object) -> int:
    """Return an upper bound on the characters of a text with fields in braces."""
    fields = text.count("{")
    _require_widths(text)
    if any("{" in (spec or "") for _, _, spec, _ in string.Formatter().parse(text)):
        raise SecurityError("it formats with computed widths")
    return len(text) + _widths_in(text) + fields * (budget.size(arguments) + 320)


def _require_widths(text: str) -> None:
    for number in _numbers_in(text):
        require_width(number)


def _widths_in(text: str) -> int:
    return sum(_numbers_in(text))


def _numbers_in(text: str) -> Iterator[int]:
    """Yield the numbers that a text spells. A number of many digits is cut to a prefix, which is
    too large all the same."""
    digits = ""
    for letter in f"{text} ":
        if "0" <= letter <= "9":
            digits += letter
        elif digits:
            yield int(digits[:18])
            digits = ""
