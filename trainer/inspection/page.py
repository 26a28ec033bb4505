"""The form of sequences on a page: self-contained HTML, to read offline or mail."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import RecipeError
from trainer.files.durable import replacing_file
from trainer.files.reading import told
from trainer.inspection.parts import Part
from trainer.inspection.pieces import Piece, excerpt, runs, visible
from trainer.inspection.sequences import Shown
from trainer.redaction import redact_text
from trainer.schema import Recipe

NEIGHBOUR = 160  # characters shown of a neighbour


@dataclass(frozen=True)
class Span:
    """A piece of text on the page. `kind`: its CSS classes. `tip`: what is said of its tokens."""

    text: str
    kind: str
    tip: str
    original: str


def write_page(path: Path, recipe: Recipe, lines: Sequence[str], found: Sequence[Shown]) -> None:
    """Write the page, whole or not at all. RecipeError if it cannot be written there."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(spans=_spans, ids=_ids, visible=visible, neighbour=_neighbour)
    page = environment.get_template("page.html.j2").render(
        name=recipe.run.name,
        task=recipe.data.task,
        lines=[visible(redact_text(line)) for line in lines],
        found=found,
    )
    try:
        with replacing_file(path) as file:
            file.write(page.encode())
    except OSError as error:
        raise RecipeError(f"--out: {path}: {told(error)}; name a file that can be written") from None


def _spans(shown: Shown, part: Part) -> Iterator[Span]:
    for piece in part.pieces:
        numbers = ", ".join(map(str, shown.ids[piece.first : piece.end].tolist()))
        place = f"token {piece.first}" if piece.end == piece.first + 1 else f"tokens {piece.first}–{piece.end - 1}"
        yield Span(visible(piece.text), _kind(piece), f"{place}: {numbers}", visible(piece.original))


def _kind(piece: Piece) -> str:
    return " ".join(name for name, is_so in (("learned", piece.learned), ("special", piece.special)) if is_so)


def _ids(shown: Shown, part: Part) -> Iterator[tuple[bool, str]]:
    """Yield the ids of a part in runs, with whether they are learned."""
    for learned, group in runs(part.pieces):
        yield learned, " ".join(map(str, shown.ids[group[0].first : group[-1].end].tolist()))


def _neighbour(part: Part) -> str:
    return excerpt(part.text, NEIGHBOUR)
