"""The recipe, section by section: every key with its type, range, unit, default and meaning.

This is the only list of keys. `recipe/` reads files into it, `triaxis schema` prints it,
ds_configs/KEYS.md is written from it, and the rest of the package receives these objects already
validated. It imports no torch: a recipe is checked on a login node in a fraction of a second.

Defaults are the simplest case, not a recommended recipe; with model.from_pretrained those of
`fine_tuning.py` take the place of some. A key that nothing reads does not exist.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer.fine_tuning import BY_DEVICE, listed
from trainer.tasks import LEARN_FROM_TEXTS, TASKS, TaskName, with_field
from trainer.update_rules import RuleName, rules_that_read

# the limit of numbers without another one: other readers of JSON round whole numbers beyond it
LARGEST = 2**53
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST, strict=True)]
Count = Annotated[int, Field(ge=0, le=LARGEST, strict=True)]
# more ranks than any machine has; layouts are searched up to it
Degree = Annotated[int, Field(ge=1, le=2**20, strict=True)]
# the largest number of layers of a network
NumStages = Annotated[int, Field(ge=1, le=2**12, strict=True)]
# A socket waits for at most 2³¹ ms, and the wait for a hang sums several of these.
Seconds = Annotated[int, Field(ge=1, le=1_000_000, strict=True)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

Dtype = Literal["fp32", "bf16", "fp16"]
ProductFormat = Literal["fp32", "bf16", "fp16", "tf32"]
LICENSE = r"^[a-z0-9][a-z0-9.-]*$"  # an identifier of a licence on the hub
STDLIB = "stdlib"  # a source on every machine: the files of the standard library


def only(key: str, *values: Any, least: int | None = None, idle: Any = None, instead: str = "") -> dict[str, Any]:
    """Return the condition under which a field is used.

    It is used with another key at one of these values, or at `least` this value; with neither, at
    any value but null. Elsewhere the field is refused, except for null and its `idle` value, which
    ask for nothing. `instead`: text of the message after "remove it".

    In the JSON Schema: {"only": {"data.task": ["mlm"]}, "idle": false, "instead": "…"}.
    """
    said = {"only": {key: {"minimum": least} if least is not None else list(values)}}
    return said | ({} if idle is None else {"idle": idle}) | ({"instead": instead} if instead else {})


class Finding(NamedTuple):
    """A mistake in a recipe: the dotted keys that it concerns, the one to point at first, and the
    line to show."""

    keys: tuple[str, ...]
    message: str


class Section(BaseModel):
    """The base of every section. Unknown keys are refused, wrong types are refused (no "8" for 8),
    values are frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), serialize_by_alias=True)


class Run(Section):
    """The run's name, folder and seed."""

    name: str = Field(
        "run",
        min_length=1,
        max_length=100,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name of the run folder inside run.dir; letters, digits, '.', '_' and '-'.",
    )
    dir: str = Field("runs", min_length=1, description="Folder that holds run folders.")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of every random stream: weights, data order, dropout.")
    deterministic: bool = Field(
        False, description="Refuse nondeterministic kernels (slower on GPUs; CPU kernels are always deterministic)."
    )


class Model(Section):
    """The network: a family with Hugging Face's own config names, or a Hugging Face folder."""

    family: str | None = Field(
        None,
        description="Model family, such as gpt2 or llama; taken from from_pretrained when that is given. 'auto': "
        "any model that transformers has, by data parallelism only.",
    )
    from_pretrained: str | None = Field(
        None, min_length=1, description="Hugging Face folder, or hub name, whose config and weights start the run."
    )
    revision: str | None = Field(None, min_length=1, description="Hub revision of from_pretrained (a commit hash).")
    trust_remote_code: bool = Field(
        False,
        description="Run the Python code that comes with from_pretrained; a hub name then needs a revision of 40 hex digits.",
        json_schema_extra=only("model.family", "auto", idle=False),
    )
    license: str | None = Field(
        None,
        max_length=100,
        pattern=LICENSE,
        description="Licence of the trained model, for the card in its export: an identifier of the hub, such as apache-2.0.",
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="Hugging Face's own config names; vocab_size comes from the tokenizer when absent.",
    )


class Fields(Section):
    """A source's own names for the fields of a row; absent: the name of the key."""

    messages: str | None = Field(
        None,
        min_length=1,
        description="Turns, each with role and content.",
        json_schema_extra=only("data.task", *with_field("messages")),
    )
    conversations: str | None = Field(
        None,
        min_length=1,
        description="Turns, each with from and value.",
        json_schema_extra=only("data.task", *with_field("conversations")),
    )
    prompt: str | None = Field(
        None, min_length=1, description="The question.", json_schema_extra=only("data.task", *with_field("prompt"))
    )
    completion: str | None = Field(
        None,
        min_length=1,
        description="The answer to the prompt.",
        json_schema_extra=only("data.task", *with_field("completion")),
    )
    instruction: str | None = Field(
        None, min_length=1, description="The question.", json_schema_extra=only("data.task", *with_field("instruction"))
    )
    input: str | None = Field(
        None,
        min_length=1,
        description="The text that the instruction is about.",
        json_schema_extra=only("data.task", *with_field("input")),
    )
    output: str | None = Field(
        None,
        min_length=1,
        description="The answer to the instruction.",
        json_schema_extra=only("data.task", *with_field("output")),
    )
    history: str | None = Field(
        None,
        min_length=1,
        description="Earlier turns of shape alpaca, pairs of question and answer.",
        json_schema_extra=only("data.task", *with_field("history")),
    )
    system: str | None = Field(
        None,
        min_length=1,
        description="The system message, before the first turn.",
        json_schema_extra=only("data.task", *with_field("system")),
    )
    tools: str | None = Field(
        None,
        min_length=1,
        description="Tools that the assistant may call, as JSON Schema.",
        json_schema_extra=only("data.task", *with_field("tools")),
    )
    source: str | None = Field(
        None,
        min_length=1,
        description="A text; a.b is field b of the object in field a.",
        json_schema_extra=only("data.task", *with_field("source")),
    )
    target: str | None = Field(
        None,
        min_length=1,
        description="Its translation.",
        json_schema_extra=only("data.task", *with_field("target")),
    )
    chosen: str | None = Field(
        None, min_length=1, description="The better answer.", json_schema_extra=only("data.task", *with_field("chosen"))
    )
    rejected: str | None = Field(
        None, min_length=1, description="The worse answer.", json_schema_extra=only("data.task", *with_field("rejected"))
    )
    text: str | None = Field(
        None, min_length=1, description="The text.", json_schema_extra=only("data.task", *with_field("text"))
    )
    label: str | None = Field(
        None,
        min_length=1,
        description="The class of the text, a word or a whole number.",
        json_schema_extra=only("data.task", *with_field("label")),
    )


class Source(Section):
    """A source of documents."""

    path: str = Field(
        min_length=1,
        description="A file of text, or of rows (.jsonl, .json, .csv, .tsv, .parquet, .arrow), also .gz or .zst, a "
        "folder of such files, a hub name, or 'stdlib' (the sources of this Python's standard library).",
    )
    weight: float | None = Field(
        None,
        gt=0.0,
        allow_inf_nan=False,
        description="Share of the training sequences, relative to the other sources; a source without it has 1. "
        "Absent from all sources: by size, so that an epoch has each sequence of each source once.",
    )
    field: str | None = Field(
        None,
        min_length=1,
        description="Name of the field with the text; absent: text. In a folder, a .json, .csv or .tsv file whose "
        "rows have no field text is itself one text.",
        json_schema_extra=only("data.task", *LEARN_FROM_TEXTS, instead="what rows call their fields is said in fields"),
    )
    target_path: str | None = Field(
        None,
        min_length=1,
        description="A text file whose lines are the translations of those of path; both may be .gz or .zst.",
        json_schema_extra=only("data.task", "translate"),
    )
    split: str = Field("train", min_length=1, description="Split of a hub data set.")
    shape: Literal["messages", "sharegpt", "prompt", "alpaca"] | None = Field(
        None,
        description="Format of the rows: messages (role, content), sharegpt (from, value), prompt (prompt, "
        "completion) or alpaca (instruction, input, output); absent: found from the fields of each row.",
        json_schema_extra=only("data.task", "sft"),
    )
    fields: Fields | None = Field(
        None,
        description='This source\'s names of the fields, such as {"prompt": "question", "completion": "answer"} or '
        '{"source": "en", "target": "de"}.',
        json_schema_extra=only("data.task", *(name for name, task in TASKS.items() if task.rows)),
    )
    columns: list[str] = Field(
        default_factory=list,
        description="Names of the columns of .csv and .tsv files; empty: the first line of each file has them.",
    )
    exclude: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description='Files of a folder, or of stdlib, that are left out: patterns of their paths inside it, such as "tests/*" '
        'or "*.min.js", where * also stands for /.',
    )

    @property
    def text_field(self) -> str:
        """The name of the field with the text, in rows of texts."""
        return self.field or "text"

    @property
    def names(self) -> dict[str, str]:
        """Return our name of a field → its name in this source, for the names that are given."""
        return self.fields.model_dump(exclude_none=True) if self.fields else {}


class Data(Section):
    """Documents, tokenizer, packing."""

    task: TaskName = Field(
        "pretrain", description=f"What is learned: {'; '.join(f'{name} = {task.learns}' for name, task in TASKS.items())}."
    )
    classes: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description="Names of the classes, in the order of their numbers; empty: those in the sources, sorted by "
        "value where all are numbers, else alphabetically.",
        json_schema_extra=only("data.task", "classify"),
    )
    mask_fraction: float = Field(
        0.15,
        gt=0.0,
        lt=1.0,
        description="Share of the tokens that are predicted; of ten such tokens eight are masked, one is replaced "
        "by another, one is not changed.",
        json_schema_extra=only("data.task", "mlm"),
    )
    learn: Literal["answers", "last", "all"] = Field(
        "answers",
        description="The tokens that are targets: those of the assistant's turns, of the last of these turns, or all.",
        json_schema_extra=only("data.task", "sft"),
    )
    seq_len: int = Field(
        512,
        ge=1,
        le=2**24,
        description="Length of a training sequence; with task translate, of its sources and again of their targets [tokens].",
    )
    sources: list[Source] = Field(
        default_factory=lambda: [Source(path=STDLIB)], min_length=1, description="The sources of training documents."
    )
    max_rows: PositiveInt | None = Field(
        None,
        description="The first rows of each of the sources, at most so many, are all that is used, in the order of its "
        "files; a file of text is one row. What eval_fraction holds out is of them. Absent: all. Not for eval_sources; a "
        "tokenizer that is trained and the names of classes come from all rows.",
    )
    eval_sources: list[Source] = Field(
        default_factory=list, description="The sources of held-out documents; empty: eval_fraction of the sources is held out."
    )
    eval_fraction: float = Field(
        0.02,
        ge=0.0,
        le=0.5,
        description="Share of the documents held out for evaluation, chosen by a hash of their content; "
        "0 = none. Not used when eval_sources is given.",
    )
    hold_out_tail: bool = Field(
        True,
        description="Where a source is a single document, such as one text file, eval_fraction of its tokens are held "
        "out at its end; false: nothing of it is held out.",
        json_schema_extra=only("data.task", *LEARN_FROM_TEXTS),
    )
    tokenizer: str = Field(
        "bytes",
        min_length=1,
        description="'bytes' (256 symbols + end of document), 'bpe:4096' (byte-level BPE of that size trained on the "
        "sources), or a Hugging Face folder or hub name.",
    )
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="The form of conversations: a name (alpaca, chatml, gemma2, gemma3, llama2, llama3, mistral, phi3, "
        "qwen2.5, vicuna, zephyr), or the path of a .jinja file; absent: the tokenizer's own, or a plain one if it has "
        "none. It takes the place of the tokenizer's own, and is exported.",
        json_schema_extra=only("data.task", *(name for name, task in TASKS.items() if task.answers)),
    )
    bos: bool | None = Field(
        None,
        description="true: each document begins with the tokenizer's bos_token; absent: with the tokens that its "
        "post-processor writes before a text, if any (Llama 3, Gemma, [CLS] of Bert); false: with none.",
        json_schema_extra=only("data.task", *LEARN_FROM_TEXTS),
    )
    special_tokens: Literal["text", "parse"] = Field(
        "text",
        description="Reading of special tokens that a text spells, such as <|im_start|>: as ordinary text, or as "
        "the token itself (parse), for texts in which a template has been rendered.",
        json_schema_extra=only("data.task", *LEARN_FROM_TEXTS),
    )
    tails: Literal["train", "drop"] = Field(
        "train",
        description="The rest of a source after its last whole sequence: trained as a shorter sequence, or left out.",
        json_schema_extra=only("data.task", *LEARN_FROM_TEXTS),
    )
    new_tokens: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description="Special tokens that are added to the tokenizer, or that it has and the model does not know "
        "yet; a text that spells one gets the token. Embedding and head get the rows that they lack, and the rows "
        "of all these tokens are trained, under every tuning.method too.",
    )
    isolate_documents: bool = Field(
        True, description="Documents packed into one sequence do not attend to each other; their positions restart at 0."
    )
    cache_dir: str | None = Field(
        None, min_length=1, description="Folder in which tokenized data is kept and reused; absent: 'data' inside run.dir."
    )
    workers: int = Field(0, ge=0, le=1024, description="Processes that tokenize; 0 = one per core this process may use.")

    @property
    def row_tokens(self) -> int:
        """The tokens of a sequence with all its parts: a source and its target are in one."""
        return TASKS[self.task].row_parts * self.seq_len


class Parallel(Section):
    """Degrees of the axes. Data-parallel ranks: world size / (tensor * pipeline * context)."""

    tensor: Degree = Field(1, description="Ranks that share each layer's weights.")
    pipeline: Degree = Field(1, description="Ranks over which the layers are divided, each with virtual_stages stages.")
    context: Degree = Field(1, description="Ranks that share each sequence.")
    sequence_parallel: bool | None = Field(
        None,
        description="Activations outside attention and MLP are divided over the tensor ranks by tokens; "
        "absent: yes when tensor > 1.",
        json_schema_extra=only("parallel.tensor", least=2, idle=False),
    )
    overlap: bool = Field(
        True,
        description="Sum input gradients over the tensor ranks while weight gradients are computed.",
        json_schema_extra=only("parallel.tensor", least=2, idle=False),
    )
    schedule: str = Field(
        "1f1b",
        min_length=1,
        description="Order of forwards and backwards in the pipeline: gpipe, 1f1b, interleaved_1f1b, looped_bfs, "
        "interleaved_zero_bubble, zbv, dualpipev, or a CSV file with the actions of each rank.",
        json_schema_extra=only("parallel.pipeline", least=2, idle="1f1b"),
    )
    virtual_stages: NumStages = Field(
        1,
        description="Stages on each pipeline rank; zbv and dualpipev have exactly 2.",
        json_schema_extra=only("parallel.pipeline", least=2, idle=1),
    )

    balance: list[NumStages] | None = Field(
        None,
        min_length=1,
        max_length=2**12,
        description="Layers on each stage, in the order of the layers; the embedding is on the first, the head on "
        "the last. Absent: by cost.",
        json_schema_extra=only("parallel.pipeline", least=2),
    )

    @property
    def divides_tokens(self) -> bool:
        """Return whether sequence parallelism is on."""
        return self.tensor > 1 if self.sequence_parallel is None else self.sequence_parallel


class Batch(Section):
    """Sequences per step and per micro-batch."""

    global_sequences: int = Field(8, ge=1, le=2**30, description="Sequences per optimizer step, over all ranks.")
    micro_sequences: int = Field(1, ge=1, le=2**30, description="Sequences per forward and backward on one data-parallel rank.")

    @model_validator(mode="before")
    @classmethod
    def _take_back(cls, given: Any) -> Any:
        """Take null as absent, so that train.auto_micro_batch can stand beside a recipe that is
        extended."""
        if isinstance(given, dict) and given.get("micro_sequences", 1) is None:
            return {**given, "micro_sequences": cls.model_fields["micro_sequences"].default}
        return given


class LossScale(Section):
    """Loss scaling of fp16."""

    static: float | None = Field(
        None, gt=0.0, allow_inf_nan=False, description="Fixed loss scale; absent: dynamic, by the keys below."
    )
    initial_power: int = Field(16, ge=0, le=32, description="Dynamic scaling starts at 2 ** initial_power.")
    window: PositiveInt = Field(1000, description="Steps without overflow before the scale doubles [steps].")
    hysteresis: PositiveInt = Field(2, description="Overflows in a row tolerated before the scale halves.")
    minimum: PositiveInt = Field(1, description="The scale never falls below this.")


class Precision(Section):
    """Number formats."""

    dtype: Dtype | None = Field(
        "fp32",
        description="Format of weights and activations in forward and backward; master weights are always fp32. Absent "
        f"with model.from_pretrained: {BY_DEVICE}, which the first start decides for the whole run.",
    )
    matmul: Literal["exact", "tf32"] = Field(
        "exact",
        description="Format in which GPUs multiply fp32 matrices; tf32 rounds their factors to 10 bits of mantissa, and is "
        "several times faster from Ampere on.",
        json_schema_extra=only("precision.dtype", "fp32", idle="exact"),
    )
    loss_scale: LossScale = Field(
        default_factory=LossScale, description="Loss scaling.", json_schema_extra=only("precision.dtype", "fp16")
    )

    @property
    def settled(self) -> Dtype:
        """The format. ValueError while the devices of the first start have yet to decide it."""
        if self.dtype is None:
            raise ValueError("precision.dtype is open until the first start")
        return self.dtype

    @property
    def products(self) -> ProductFormat:
        """The format in which GPUs multiply matrices. ValueError as for `settled`."""
        return "tf32" if self.matmul == "tf32" else self.settled


MOST_BUFFERS = 2**10  # buffers of a swap pool, which allocates all of them at once


class OffloadOptimizer(Section):
    """DeepSpeed's offload_optimizer."""

    device: Literal["none", "cpu", "nvme"] = Field("none", description="Memory of optimizer state and master weights.")
    nvme_path: str | None = Field(
        None,
        min_length=1,
        description="Folder for optimizer state; required.",
        json_schema_extra=only("zero.offload_optimizer.device", "nvme"),
    )
    buffer_count: int = Field(
        4,
        # Adam's three states and the gradient of a tile: with fewer buffers DeepSpeed stops at its
        # first update
        ge=4,
        le=MOST_BUFFERS,
        description="Buffers in the swap pool, each with the elements of a tile; at least the states per parameter (Adam: 4).",
    )
    pin_memory: bool = Field(False, description="Page-locked host memory: faster copies from and to a GPU.")
    pipeline_read: bool = Field(
        False,
        description="Read the next tile while the current one is updated.",
        json_schema_extra=only("zero.offload_optimizer.device", "nvme", idle=False),
    )
    pipeline_write: bool = Field(
        False,
        description="Write the previous tile while the current one is updated.",
        json_schema_extra=only("zero.offload_optimizer.device", "nvme", idle=False),
    )


class OffloadParam(Section):
    """DeepSpeed's offload_param."""

    device: Literal["none", "cpu", "nvme"] = Field("none", description="Memory of the partitioned weights between uses.")
    nvme_path: str | None = Field(
        None,
        min_length=1,
        description="Folder for weights; required.",
        json_schema_extra=only("zero.offload_param.device", "nvme"),
    )
    buffer_count: int = Field(5, ge=1, le=MOST_BUFFERS, description="Buffers in the swap pool.")
    buffer_size: int | None = Field(
        None,
        ge=1,
        le=2**40,
        description="Elements per buffer; absent: one rank's part of the model's largest weight [elements].",
    )
    max_in_cpu: Count = Field(1_000_000_000, description="Elements kept in host memory when offloading to nvme [elements].")
    pin_memory: bool = Field(False, description="Page-locked host memory: faster copies from and to a GPU.")


class Zero(Section):
    """DeepSpeed's zero_optimization, by DeepSpeed's own key names (policy only)."""

    stage: int = Field(
        0,
        ge=0,
        le=3,
        description="State that is divided over data-parallel ranks: 0 none, 1 optimizer state, 2 also gradients, 3 "
        "also weights.",
    )
    offload_optimizer: OffloadOptimizer = Field(
        default_factory=OffloadOptimizer, description="Optimizer state in host memory or on NVMe."
    )
    offload_param: OffloadParam = Field(default_factory=OffloadParam, description="Weights in host memory or on NVMe (ZeRO-3).")
    reduce_bucket_size: PositiveInt = Field(500_000_000, description="Elements per gradient reduction [elements].")
    # DeepSpeed begins each part of a gather at 4 bytes, two elements of a half format.
    allgather_bucket_size: int = Field(
        500_000_000, le=LARGEST, ge=2, multiple_of=2, description="Elements per weight all-gather [elements]."
    )
    contiguous_gradients: bool = Field(True, description="Copy gradients into one buffer as they are produced.")
    reduce_scatter: bool = Field(True, description="Reduce-scatter instead of all-reduce for gradients.")
    overlap_comm: bool = Field(False, description="Reduce gradients while backward still computes.")
    round_robin_gradients: bool = Field(False, description="ZeRO-1/2 with CPU offload: spread the gradient copies over ranks.")
    sub_group_size: PositiveInt = Field(1_000_000_000, description="ZeRO-3: elements per optimizer tile [elements].")
    stage3_prefetch_bucket_size: Count = Field(50_000_000, description="ZeRO-3: elements gathered ahead of use [elements].")
    stage3_param_persistence_threshold: Count = Field(
        100_000, description="ZeRO-3: weights smaller than this stay whole on every rank [elements]."
    )
    stage3_max_live_parameters: Count = Field(1_000_000_000, description="ZeRO-3: gathered elements kept at most [elements].")
    stage3_max_reuse_distance: Count = Field(
        1_000_000_000, description="ZeRO-3: keep a gathered weight that is needed again within this many elements [elements]."
    )


class Aio(Section):
    """DeepSpeed's asynchronous I/O, used by NVMe offload."""

    # A drive transfers whole sectors of 512 or 4096 bytes, and each block is a request of its own.
    block_size: int = Field(1_048_576, ge=4096, le=2**30, multiple_of=512, description="Size of one I/O request [bytes].")
    # Linux gives all processes of a machine 65536 requests together (fs.aio-max-nr).
    queue_depth: int = Field(8, ge=1, le=2**12, description="Requests in flight per thread.")
    # Each buffer is a multiple of 1 KiB for each thread.
    intra_op_parallelism: int = Field(1, ge=1, le=2**8, description="Threads per transfer.")
    single_submit: bool = Field(False, description="Submit requests one by one.")
    overlap_events: bool = Field(True, description="Submit and complete requests in overlap.")


class CommsLogger(Section):
    """DeepSpeed's log of collectives."""

    enabled: bool = Field(False, description="Log size, latency and bandwidth of collectives.")
    verbose: bool = Field(False, description="Log every call instead of a summary.")
    prof_all: bool = Field(True, description="All operations; otherwise those in prof_ops.")
    prof_ops: list[str] = Field(default_factory=list, description="Operations to log.")
    debug: bool = Field(False, description="Name the calling function.")


class DeepSpeedPolicy(Section):
    """DeepSpeed's other keys, by its own names; those that another section owns are refused."""

    aio: Aio = Field(default_factory=Aio, description="Asynchronous I/O for NVMe offload.")
    comms_logger: CommsLogger = Field(default_factory=CommsLogger, description="Log of collectives.")
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = Field(
        "fp32", description="Format in which gradients are reduced; null: the format they are in."
    )
    wall_clock_breakdown: bool = Field(False, description="DeepSpeed's own timers in the rank's log.")
    memory_breakdown: bool = Field(False, description="DeepSpeed's own memory report in the rank's log.")
    dump_state: bool = Field(False, description="DeepSpeed prints its state after set-up.")


class Optimizer(Section):
    """The update rule."""

    name: RuleName = Field("adamw", description="Update rule.")
    lr: float = Field(
        1e-3,
        gt=0.0,
        allow_inf_nan=False,
        description="Peak learning rate. Absent with model.from_pretrained, beside adamw and adam: by task, loss and "
        f"method ({listed(lambda rates: f'{rates.lr:g} [{rates.source}]')}); a method with dpo or ipo has 1/40 of its "
        "rate, with orpo 1/4; lion has 1/10 of it all.",
    )
    betas: list[Annotated[float, Field(ge=0.0, lt=1.0)]] = Field(
        default_factory=lambda: [0.9, 0.95],
        min_length=2,
        max_length=2,
        description="Decay of the running means, each in [0, 1).",
        json_schema_extra=only("optimizer.name", *rules_that_read("betas")),
    )
    eps: float = Field(
        1e-8,
        gt=0.0,
        allow_inf_nan=False,
        description="Added to the denominator.",
        json_schema_extra=only("optimizer.name", *rules_that_read("eps")),
    )
    momentum: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Momentum.",
        json_schema_extra=only("optimizer.name", *rules_that_read("momentum")),
    )
    weight_decay: float = Field(
        0.1,
        ge=0.0,
        allow_inf_nan=False,
        description="Decay of weight matrices; never of norms, biases and embeddings. Absent with model.from_pretrained: by "
        f"task, loss and method ({listed(lambda rates: f'{rates.weight_decay:g}')}), from the sources of optimizer.lr.",
    )


class Schedule(Section):
    """Learning rate as a pure function of the step."""

    name: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = Field(
        "cosine",
        description="Shape after the warm-up; wsd = warm-up, stable, decay. Absent with model.from_pretrained: by task, loss "
        f"and method ({listed(lambda rates: rates.schedule)}), from the sources of optimizer.lr.",
    )
    warmup_steps: Count = Field(
        0, description="Linear rise: step 0 has peak / warmup_steps, step warmup_steps - 1 the peak [steps]."
    )
    warmup_ratio: Fraction | None = Field(
        None,
        lt=1.0,
        description="The same as a share of train.steps, rounded up, in place of warmup_steps. If both are absent with "
        f"model.from_pretrained: by task, loss and method ({listed(lambda rates: f'{rates.warmup:g}')}), from the sources "
        "of optimizer.lr.",
    )
    decay_steps: Count | None = Field(
        None,
        description="Length of the final decay; absent: a fifth of the run's steps [steps].",
        json_schema_extra=only("schedule.name", "wsd"),
    )
    min_lr_ratio: Fraction = Field(
        0.1,
        description="Learning rate at the end / peak. Absent with model.from_pretrained: 0 for the shape that task and "
        "method have.",
        json_schema_extra=only("schedule.name", "linear", "cosine", "wsd"),
    )


# With batch.global_sequences this gives at most 2⁶² sequences, which are numbered in 64 bits.
MOST_STEPS = 2**32


class Train(Section):
    """The length of the run, and its records, evaluations and sample."""

    steps: int | None = Field(
        100, ge=1, le=MOST_STEPS, description="Optimizer steps of the whole run; with epochs, they give them [steps]."
    )
    epochs: float | None = Field(
        None,
        gt=0.0,
        allow_inf_nan=False,
        description="Passes over the training data in place of steps; 0.5 is half of it. A pass draws as many sequences as "
        "all sources have together, with weights some of them more often than others. Rounded up to whole steps when the "
        "data is tokenized.",
    )
    clip_norm: float = Field(1.0, ge=0.0, allow_inf_nan=False, description="Largest L2 norm of the gradient; 0 = no clipping.")
    log_every: PositiveInt = Field(1, description="Steps between records in metrics.jsonl [steps].")
    eval_every: Count = Field(0, description="Steps between evaluations; 0 = only after the last step [steps].")
    eval_sequences: PositiveInt = Field(256, description="Held-out sequences per evaluation, at most.")
    patience: PositiveInt | None = Field(
        None,
        description="Evaluations in a row without a better checkpoint.best, or without that key a better eval_loss, after "
        "which the run ends; absent: it goes on to its last step.",
        json_schema_extra=only("train.eval_every", least=1),
    )
    label_smoothing: Fraction = Field(
        0.0,
        lt=1.0,
        description="Share of each target's weight that is spread evenly over the vocabulary in training; evaluation has none.",
    )
    eval_translations: Count = Field(
        0,
        description="Pairs of data.eval_sources that are translated after the last step, for BLEU and chrF, and at each "
        "evaluation if checkpoint.best is eval_bleu or eval_chrf; 0 = none.",
        json_schema_extra=only("data.task", "translate"),
    )
    beams: int = Field(
        4,
        ge=1,
        le=64,
        description="Beams of the search for a translation; 1 = the likeliest token each time.",
        json_schema_extra=only("data.task", "translate"),
    )
    # A length of 2²⁴ to a higher power exceeds float64.
    length_penalty: float = Field(
        1.0,
        ge=-30.0,
        le=30.0,
        allow_inf_nan=False,
        description="Beams are compared by log-probability / length ** length_penalty.",
        json_schema_extra=only("data.task", "translate"),
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="Activations computed again in backward instead of kept: none, selective (the attention core) "
        "or full (each layer).",
    )
    auto_micro_batch: bool = Field(
        False,
        description="The first start finds the largest batch.micro_sequences that fits its devices, by the plan and then by "
        "trials, and the run keeps it; the sequences of a step stay the same.",
    )
    worst_case_first: bool | None = Field(
        None,
        description="Take the memory of the fullest step, and of an evaluation, before the first step, so that what does not "
        "fit is seen at once; the training stays the same to the bit. Absent: on GPUs.",
    )
    compile: bool | None = Field(
        None,
        description="Compile what lies between the matrix products of a training step (norms, rotations, gated activations) "
        "with torch.compile; a run keeps what its first start chose. Absent: where the run is long enough, a compiler is "
        "there, and it measures faster before the first step.",
    )
    sample_prompt: str | None = Field(
        None, description="After the last step, print a continuation of this text, or with task sft the answer to it."
    )

    @model_validator(mode="before")
    @classmethod
    def _open_steps(cls, given: Any) -> Any:
        """Leave steps open where epochs are given in their place. null is the same as absent."""
        if not isinstance(given, dict) or given.get("steps") is not None:
            return given
        in_epochs = given.get("epochs") is not None
        return {**given, "steps": None if in_epochs else cls.model_fields["steps"].default}

    @property
    def total_steps(self) -> int:
        """The steps of the whole run, which are known once the data is, where epochs give them."""
        assert self.steps is not None, "the steps of train.epochs are settled when the data is known"
        return self.steps


Target = Literal["attention", "mlp", "q", "k", "v", "o", "gate", "up", "down"]


class RankBudget(Section):
    """AdaLoRA's division of ranks by importance, from tuning.rank to target_rank on average."""

    target_rank: PositiveInt = Field(4, description="Ranks that a module keeps on average; below tuning.rank.")
    warmup_steps: Count = Field(0, description="Steps in which every module keeps tuning.rank [steps].")
    final_steps: PositiveInt = Field(1, description="Steps at the end in which the ranks no longer change [steps].")
    every: PositiveInt = Field(1, description="Steps between two allocations [steps].")
    betas: list[Annotated[float, Field(gt=0.0, lt=1.0)]] = Field(
        default_factory=lambda: [0.85, 0.85],
        min_length=2,
        max_length=2,
        description="Decay of the running means of the sensitivity and of its uncertainty, each in (0, 1).",
    )
    orthogonality: float = Field(
        0.5,
        ge=0.0,
        allow_inf_nan=False,
        description="Weight, beside the loss, of the distance of the factors from orthonormal directions.",
    )


class Tuning(Section):
    """Parameter-efficient tuning: a few parameters trained beside the model's frozen weights."""

    method: Literal["lora", "dora", "adalora", "ia3", "adapter", "bitfit"] | None = Field(
        None,
        description="Way of tuning: low-rank factors beside weights (lora), such factors and the lengths of rows "
        "(dora), factors whose ranks are divided by importance (adalora), vectors that rescale features (ia3), "
        "small networks after attention and MLP (adapter), or all biases (bitfit); absent: all weights are trained.",
    )
    targets: list[Target] | None = Field(
        None,
        min_length=1,
        description="Linear layers that are adapted: attention (= q, k, v, o), mlp (= gate, up, down), or single "
        "ones; absent: all of them, for ia3 k, v and down. For adapter: attention, mlp or both, after which an "
        "adapter is added.",
        json_schema_extra=only("tuning.method", "lora", "dora", "adalora", "ia3", "adapter"),
    )
    rank: int = Field(
        8,
        ge=1,
        le=2**16,
        description="Inner size of the low-rank factors, for adalora at the start.",
        json_schema_extra=only("tuning.method", "lora", "dora", "adalora"),
    )
    alpha: float = Field(
        16.0,
        gt=0.0,
        allow_inf_nan=False,
        description="The product of the factors is multiplied with alpha / rank.",
        json_schema_extra=only("tuning.method", "lora", "dora", "adalora"),
    )
    rank_stabilized: bool = Field(
        False,
        description="Multiply with alpha / sqrt(rank) instead, as rsLoRA does.",
        json_schema_extra=only("tuning.method", "lora", "dora"),
    )
    dropout: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Rate of dropout on the input of the first factor.",
        json_schema_extra=only("tuning.method", "lora", "adalora"),
    )
    budget: RankBudget = Field(
        default_factory=RankBudget,
        description="The division of ranks.",
        json_schema_extra=only("tuning.method", "adalora"),
    )
    bottleneck: int = Field(
        64,
        ge=1,
        le=2**16,
        description="Features between an adapter's two projections.",
        json_schema_extra=only("tuning.method", "adapter"),
    )
    quantize: Literal["nf4", "int8"] | None = Field(
        None,
        description="Format of the frozen weights of attention and MLP: 4-bit NormalFloat as in QLoRA (nf4), or "
        "8-bit integers (int8), both in blocks of 64; absent: the compute format.",
        json_schema_extra=only("tuning.method", "lora", "dora", "adalora", "ia3", "adapter"),
    )
    merge: bool = Field(
        False,
        description="Export the whole model, with the adapter merged into its weights, instead of an adapter in "
        "peft's format. Always so without model.from_pretrained, because no folder has the weights that the adapter "
        "belongs to.",
        json_schema_extra=only("tuning.method", "lora", "dora", "adalora", "ia3", idle=False),
    )


class Preference(Section):
    """Learning from a chosen and a rejected answer."""

    loss: Literal["dpo", "ipo", "orpo"] = Field(
        "dpo",
        description="dpo: how much more the log-probability of the chosen answer rose in training than that of the "
        "rejected one, through a sigmoid; ipo: the same, per token, towards 1 / (2 beta); orpo: the log-probability of the "
        "chosen answer, and its odds against the rejected one, without a reference.",
    )
    beta: float = Field(
        0.1,
        gt=0.0,
        allow_inf_nan=False,
        description="Strength with which the model is kept near its start (dpo, ipo), or weight of the odds ratio (orpo).",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0.0,
        lt=0.5,
        description="Share of pairs whose two answers are assumed to be swapped.",
        json_schema_extra=only("preference.loss", "dpo"),
    )

    @property
    def needs_reference(self) -> bool:
        """Return whether the loss compares with the model before training."""
        return self.loss != "orpo"


class Checkpoint(Section):
    """The checkpoints from which a run can be resumed."""

    every: Count = Field(
        500, description="Steps between checkpoints; the last step is saved too; 0 = none, the run cannot be resumed [steps]."
    )
    keep: PositiveInt = Field(
        2,
        description="Newest checkpoints that are kept; older ones are removed when a newer one has been read back "
        "from the disk.",
    )
    best: str | None = Field(
        None,
        min_length=1,
        description="Figure in evaluations.jsonl, such as eval_loss: the checkpoint with the best value is kept beside the "
        "newest, saved at its evaluation, and exported at the end; absent: the last step is exported.",
        json_schema_extra=only("train.eval_every", least=1),
    )
    asynchronous: bool = Field(
        False,
        alias="async",
        description="Write while training continues; a step waits only for the copy to host memory, which must fit there.",
    )


class Guard(Section):
    """The limits at which a run that cannot continue is ended."""

    timeout_s: Seconds = Field(
        600,
        description="Longest time within a step without progress of any rank; then the run ends with exit code 124 "
        "and a page that names the rank at fault [s].",
    )
    long_timeout_s: Seconds = Field(
        3600,
        description="The same outside of steps and in the first one: start, evaluation, saving, export [s].",
    )
    max_skipped: Count = Field(
        25,
        description="Skipped steps in a row that end the run with exit code 93; 0 = never. With a dynamic loss "
        "scale only those at its minimum count [steps].",
    )
    on_spike: Literal["off", "warn", "skip", "rewind"] = Field(
        "off",
        description="Action when loss or gradient norm is far above its last values: off, warn (a line), skip (a "
        "gradient with such a norm is not applied; ZeRO-0 only), or rewind (restore the newest checkpoint, and "
        "continue with the data after the spike).",
    )
    spike_window: int = Field(
        100,
        ge=8,
        le=100_000,
        description="Number of last values that a new one is compared with; before that many, no step is a spike [steps].",
        json_schema_extra=only("guard.on_spike", "warn", "skip", "rewind"),
    )
    spike_threshold: float = Field(
        10.0,
        gt=0.0,
        allow_inf_nan=False,
        description="Distance of a spike above their median [robust standard deviations: 1.4826 × median absolute deviation].",
        json_schema_extra=only("guard.on_spike", "warn", "skip", "rewind"),
    )
    check_every: Count = Field(
        100,
        description="Steps between comparisons of weights of which several ranks have copies; a difference ends the "
        "run with exit code 65; 0 = never [steps].",
    )


class Wandb(Section):
    """Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = Field("disabled", description="Destination of the records.")
    project: str = Field("triaxis", min_length=1, description="W&B project.")
    entity: str | None = Field(None, min_length=1, description="W&B team or user.")
    tags: list[str] = Field(default_factory=list, description="Tags of the run.")
    id: str | None = Field(
        None,
        min_length=1,
        pattern=r"^[A-Za-z0-9_-]+$",
        description="Run id to create or resume; absent: drawn once for each run folder.",
    )


class Tracking(Section):
    """Mirrors of metrics.jsonl, which is always written."""

    wandb: Wandb = Field(default_factory=Wandb, description="Weights & Biases.")
    tensorboard: bool = Field(False, description="TensorBoard event files in the run folder.")


class Recipe(Section):
    """A training run."""

    description: str = Field("", description="What this recipe is for, on what hardware, and how to start it.")
    run: Run = Field(default_factory=Run, description=Run.__doc__)
    model: Model = Field(default_factory=Model, description=Model.__doc__)
    data: Data = Field(default_factory=Data, description=Data.__doc__)
    parallel: Parallel = Field(default_factory=Parallel, description=Parallel.__doc__)
    batch: Batch = Field(default_factory=Batch, description=Batch.__doc__)
    precision: Precision = Field(default_factory=Precision, description=Precision.__doc__)
    zero: Zero = Field(default_factory=Zero, description=Zero.__doc__)
    deepspeed: DeepSpeedPolicy = Field(default_factory=DeepSpeedPolicy, description=DeepSpeedPolicy.__doc__)
    optimizer: Optimizer = Field(default_factory=Optimizer, description=Optimizer.__doc__)
    schedule: Schedule = Field(default_factory=Schedule, description=Schedule.__doc__)
    train: Train = Field(default_factory=Train, description=Train.__doc__)
    tuning: Tuning = Field(default_factory=Tuning, description=Tuning.__doc__, json_schema_extra=only("tuning.method"))
    preference: Preference = Field(
        default_factory=Preference,
        description=Preference.__doc__,
        json_schema_extra=only("data.task", *(name for name, task in TASKS.items() if task.compares)),
    )
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description=Checkpoint.__doc__)
    tracking: Tracking = Field(default_factory=Tracking, description=Tracking.__doc__)
    guard: Guard = Field(default_factory=Guard, description=Guard.__doc__)

    def with_format(self, dtype: Dtype) -> Recipe:
        """Return the recipe in that compute format."""
        return self.model_copy(update={"precision": self.precision.model_copy(update={"dtype": dtype})})

    @property
    def needs_reference(self) -> bool:
        """Return whether the run compares with the model before training."""
        return TASKS[self.data.task].compares and self.preference.needs_reference
