"""The tasks, a row each: their requirements on data, network and other keys of a recipe. No torch.

The functions of a task are in three tables with the same names: `data/tasks.py` (its rows and
examples), `model/objective.py` (its loss) and `model/measures.py` (the figures of an evaluation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TaskName = Literal["pretrain", "sft", "preference", "translate", "mlm", "classify"]

# The fields of a row with a conversation, besides its turns.
OF_CONVERSATIONS = ("system", "tools")


@dataclass(frozen=True)
class Legal:
    """The only value of a key that a task allows, and the reason, which follows the key in the
    message."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Repeats:
    """The passes over the same data beyond which a run is warned, and the reason, which follows
    them in the message."""

    most: int
    reason: str


@dataclass(frozen=True)
class Task:
    """A task.

    | field | meaning |
    |---|---|
    | `learns` | what is learned, for the description of data.task |
    | `repeats` | how many passes over the same data are known to teach something |
    | `rows` | the contents of its rows; "": it learns from texts, joined end to end |
    | `shapes` | the shapes of its rows, each with the names of fields that it may have |
    | `sources` | the least that data.sources must give, for a message |
    | `target` | what is predicted: the next token, masked tokens, the label of a text |
    | `outputs` | names of what its head gives for a text; (): its head is over the vocabulary |
    | `learns_classes` | data.classes, or else the sources, have other names for the outputs |
    | `sight` | what a token of its network sees: those before it, both sides, or either |
    | `translates` | a row has a source and a target, the network an encoder and a decoder |
    | `compares` | the documents of a row are the chosen and the rejected answers of pairs |
    | `answers` | the trained model answers a user |
    | `shortest` | the least data.seq_len [tokens], and what needs it |
    | `problem_type` | transformers' word for what a head over texts was trained for; "": has none |
    | `pipeline_tag` | the hub's word for what its models do |
    | `used_by` | the command that uses its model next, {} for the model's folder |
    | `auto_class` | transformers' Auto class of its models; "": it needs a network built here |
    | `built_here` | the part that family "auto" lacks for it |
    | `legal` | keys of other sections of which it allows only one value |
    """

    learns: str
    repeats: Repeats
    rows: str = ""
    shapes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sources: str = '[{"path": "rows.jsonl"}]'
    target: Literal["next", "masked", "label"] = "next"
    outputs: tuple[str, ...] = ()
    learns_classes: bool = False
    sight: Literal["before", "both", "either"] = "before"
    translates: bool = False
    compares: bool = False
    answers: bool = False
    shortest: tuple[int, str] = (1, "a token")
    problem_type: str = ""
    pipeline_tag: str = "text-generation"
    used_by: str = 'triaxis generate {} --prompt "…"'
    auto_class: str = ""
    built_here: str = ""
    legal: Mapping[str, Legal] = field(default_factory=dict)

    @property
    def row_parts(self) -> int:
        """Return how many sequences of data.seq_len tokens are in a row, one after another."""
        return 2 if self.translates else 1

    @property
    def has_own_network(self) -> bool:
        """Return whether its network is of another kind than that of the next token."""
        return self.translates or self.target != "next"

    def suits(self, *, causal: bool, translates: bool) -> bool:
        """Return whether a family of networks can learn it."""
        if self.translates or translates:
            return self.translates and translates
        return self.sight == "either" or causal == (self.sight == "before")


TASKS: Mapping[TaskName, Task] = {
    "pretrain": Task(
        "the next token of packed documents",
        Repeats(4, "up to 4, a repeated text is worth nearly as much as a new one (Muennighoff et al. 2023, arXiv:2305.16264)"),
        auto_class="AutoModelForCausalLM",
    ),
    "sft": Task(
        "the assistant's turns of packed conversations, written by the tokenizer's chat template",
        # Their held-out loss rose after the first pass, and people still preferred later answers.
        Repeats(16, "answers were seen to get better over up to 16 (Ouyang et al. 2022, arXiv:2203.02155)"),
        rows="conversations",
        shapes={
            "messages": ("messages", *OF_CONVERSATIONS),
            "sharegpt": ("conversations", *OF_CONVERSATIONS),
            "prompt": ("prompt", "completion", *OF_CONVERSATIONS),
            "alpaca": ("instruction", "input", "output", "history", *OF_CONVERSATIONS),
        },
        answers=True,
        used_by="triaxis chat {}",
        auto_class="AutoModelForCausalLM",
    ),
    "preference": Task(
        "to prefer the chosen of two answers",
        Repeats(3, "3 were seen to be best (Tunstall et al. 2023, arXiv:2310.16944)"),
        rows="pairs",
        shapes={"pairs": ("prompt", "chosen", "rejected", *OF_CONVERSATIONS)},
        compares=True,
        answers=True,
        used_by="triaxis chat {}",
        built_here="an output layer that sums over each answer",
        legal={
            "data.isolate_documents": Legal(True, "the answers that are compared lie in one row and must not see each other"),
            "train.label_smoothing": Legal(
                0.0, "labels of tokens are smoothed, and it has none; preference.label_smoothing is that of pairs"
            ),
        },
    ),
    "translate": Task(
        "the targets of packed pairs, by an encoder and a decoder",
        # 300,000 steps of 25,000 target tokens over 4.5 million pairs
        Repeats(50, "the big Transformer saw its 4.5 M pairs about 50 times (Vaswani et al. 2017, arXiv:1706.03762)"),
        rows="translations",
        shapes={"pairs": ("source", "target")},
        sources='[{"path": "train.en", "target_path": "train.de"}]',
        translates=True,
        pipeline_tag="translation",
        shortest=(3, "a source and its end, or a target and its start, beside the filler"),
        built_here="an encoder and a decoder of our own",
        legal={
            "data.isolate_documents": Legal(True, "each target belongs to one source"),
            "train.sample_prompt": Legal(
                None, "one text is continued, and it has two; train.eval_translations shows translations"
            ),
        },
    ),
    "mlm": Task(
        "masked tokens of packed documents, from both sides",
        Repeats(40, "BERT itself was trained with 40 (Devlin et al. 2018, arXiv:1810.04805)"),
        target="masked",
        sight="both",
        pipeline_tag="fill-mask",
        used_by="triaxis eval {} FILE",
        built_here="a head of its own",
        legal={"train.sample_prompt": Legal(None, "only models of the next token continue a text")},
    ),
    "classify": Task(
        "the class of a text",
        Repeats(20, "20 were seen to be enough for small data (Mosbach et al. 2020, arXiv:2006.04884)"),
        rows="labelled texts",
        shapes={"labelled": ("text", "label")},
        target="label",
        outputs=("0", "1"),  # a head is small, however many classes there are
        learns_classes=True,
        problem_type="single_label_classification",
        pipeline_tag="text-classification",
        used_by="triaxis eval {} FILE",
        sight="either",
        built_here="a head of its own",
        legal={
            "data.isolate_documents": Legal(True, "a text must not see the others of its sequence"),
            "train.sample_prompt": Legal(None, "only models of the next token continue a text"),
            "train.label_smoothing": Legal(0.0, "it is divided over a vocabulary, which is not predicted"),
            "tuning.method": Legal(None, "it freezes all but what it puts beside the weights, and the head must be trained"),
        },
    ),
}
LEARN_FROM_TEXTS = tuple(name for name, task in TASKS.items() if not task.rows)


def with_field(name: str) -> tuple[TaskName, ...]:
    """Return the tasks whose rows may have a field of that name."""
    return tuple(task for task, facts in TASKS.items() if any(name in names for names in facts.shapes.values()))
