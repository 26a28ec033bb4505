"""The form of sequences on a terminal: what is learned is in colour, or else in brackets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rich.text import Text

from trainer.inspection.parts import Part
from trainer.inspection.pieces import Piece, excerpt, runs, visible
from trainer.inspection.sequences import Shown

OPEN, CLOSE = "⟦", "⟧"
LEARNED, SPECIAL, FAINT, HEADING = "bold black on green", "magenta", "dim", "bold cyan"
NEIGHBOUR = 72  # characters shown of a neighbour
LOST = 400  # characters shown of what was cut off


@dataclass(frozen=True)
class Terminal:
    """A way to show sequences. `colour`: the terminal has colours."""

    colour: bool

    def legend(self) -> Text:
        return Text.assemble("targets are shown as ", self._learned("what is learned"), "; everything else is only read")

    def lines(self, shown: Shown) -> Iterator[Text]:
        """Yield a sequence, line by line."""
        yield Text("")
        yield Text(f"── {shown.title}: {visible(shown.where)}", HEADING)
        yield Text(f"{len(shown.ids):,} tokens, {shown.num_targets:,} targets", FAINT)
        for part in shown.parts:
            yield Text("")
            yield from self._part(shown, part)
        if shown.following:
            yield Text("")
            yield Text.assemble(
                "its last token predicts the first of the next sequence: ", self._learned(visible(shown.following))
            )

    def _part(self, shown: Shown, part: Part) -> Iterator[Text]:
        span = f"tokens {part.begin}–{part.end - 1}"
        if part.row is None:
            yield Text(f"{span}: fill up the sequence, not learned", FAINT)
            return
        named = f"{part.role}, {visible(part.place)}"
        if not shown.shows(part):
            yield Text(f"{span}: neighbour: {named}: {excerpt(part.text, NEIGHBOUR)}", FAINT)
            return
        yield Text(f"{span}: {named}" + (f": {visible(part.label)}" if part.label else ""), "bold")
        yield from (Text(remark, "yellow") for remark in part.remarks)
        yield self._text(part.pieces)
        if part.lost:
            yield Text(f"cut off: {excerpt(part.lost, LOST)}", "yellow")
        yield Text.assemble(("ids: ", FAINT), self._ids(shown, part))

    def _text(self, pieces: Iterable[Piece]) -> Text:
        text = Text()
        for learned, group in runs(pieces):
            inner = Text()
            for piece in group:
                inner.append(visible(piece.text), SPECIAL if piece.special and not learned else "")
                if piece.original:
                    inner.append(f"→{visible(piece.original)}", "underline")
            text.append_text(self._learned(inner) if learned else inner)
        return text

    def _ids(self, shown: Shown, part: Part) -> Text:
        said = [
            self._learned(numbers) if learned else Text(numbers, FAINT)
            for learned, group in runs(part.pieces)
            if (numbers := " ".join(map(str, shown.ids[group[0].first : group[-1].end].tolist())))
        ]
        return Text(" ").join(said)

    def _learned(self, said: str | Text) -> Text:
        text = Text(said) if isinstance(said, str) else said
        if self.colour:
            text.stylize(LEARNED)
            return text
        return Text.assemble(OPEN, text, CLOSE)
