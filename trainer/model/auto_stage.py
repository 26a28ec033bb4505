"""A model of transformers with the interface of our own `Stage`.

transformers' layers do not know packed documents, our random streams or master weights, so all
three are handled around the model. Documents become separate rows, the dropout of a micro-batch
gets its own seed, and where a half-precision run has fp32 weights (ZeRO-0), autocast rounds them on
use, which our own layers do themselves.

Shape letters: B rows of a micro-batch, S sequence, N = B · S tokens, R documents of a micro-batch,
L longest of them, V vocabulary.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from parallel.documents import Documents
from parallel.loss import CHUNK_BYTES, IGNORE
from parallel.mesh import Group
from parallel.params import Init, Role, Sharded, ShardSpec, whole
from parallel.pieces import Piece
from parallel.rng import Streams
from trainer.data.loader import MicroBatch
from trainer.errors import RecipeError
from trainer.model.auto_network import AutoNetwork
from trainer.model.auto_rotations import DocumentRotations
from trainer.model.heads import Output, document_scores, token_sums

# the part of a parameter's name that names its layer, as in "model.layers.7."
LAYER = re.compile(r".*?\.\d+\.")


@dataclass(frozen=True)
class Contents:
    """The tensors of a model of transformers, by the names of `named_parameters` and
    `named_buffers`.

    `aliases`: further names of parameters (ties). `ties`: the names under which a file may have
    them again. `constants`: the buffers that belong to a checkpoint, such as a router's balancing
    bias; they are loaded and saved, never trained.
    """

    parameters: dict[str, ShardSpec]
    aliases: frozenset[str]
    ties: dict[str, Piece]
    constants: dict[str, ShardSpec]


def contents_of(model: Any) -> Contents:
    owners = dict(model.named_modules(remove_duplicate=False))
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    buffers = {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[2] not in owners[name.rpartition(".")[0]]._non_persistent_buffers_set
    }
    stored = _stored_names(model, {name: p for p, all_names in names.items() for name in all_names} | buffers)

    def spec(name: str, tensor: Tensor, role: Role) -> ShardSpec:
        return whole(stored[name], tuple(tensor.shape), role=role, init=Init(), copies=Group.alone())

    parameters = {first: spec(first, p, _role(owners[first.rpartition(".")[0]], first, p)) for p, (first, *_) in names.items()}
    return Contents(
        parameters,
        aliases=frozenset(alias for _, *aliases in names.values() for alias in aliases),
        ties={stored[alias]: parameters[first].pieces[0] for first, *aliases in names.values() for alias in aliases},
        constants={name: spec(name, buffer, Role.BIAS) for name, buffer in buffers.items()},
    )


def _role(owner: nn.Module, name: str, parameter: nn.Parameter) -> Role:
    """Return the role of a parameter, by the kind of its module and the number of its
    dimensions."""
    if isinstance(owner, nn.Embedding):
        return Role.EMBEDDING
    if parameter.dim() > 1:
        return Role.MATRIX
    return Role.BIAS if name.endswith("bias") else Role.NORM


def _stored_names(model: Any, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return the name of each tensor in files.

    transformers 5 renames some tensors while it loads (GPT-NeoX's embed_out is its lm_head) and
    back while it saves, and so do we. Where it also cuts or joins tensors we use its own names,
    which it can load too.
    """
    from transformers.core_model_loading import revert_weight_conversion

    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    name_of = {id(tensor): name for name, tensor in empty.items()}
    stored = {name_of.get(id(tensor)): name for name, tensor in revert_weight_conversion(model, dict(empty)).items()}
    return {name: stored[name] for name in tensors} if stored.keys() == tensors.keys() else {name: name for name in tensors}


class AutoStage(Sharded):
    """The whole model; `forward` is that of `Stage`.

    `fill` gives values to each block's parameters where `network.build` left them without storage.
    `partition` may divide them over ranks at once (ZeRO-3). A block is a layer, or the parameters
    of one module outside the layers.
    """

    def __init__(
        self,
        network: AutoNetwork,
        *,
        dtype: torch.dtype,
        recompute: Literal["none", "selective", "full"],
        device: torch.device,
        fill: Callable[[nn.Module], None],
        partition: Callable[[nn.Module], None] = lambda block: None,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.architecture = network.architecture
        self.model = network.build()
        contents = contents_of(self.model)
        self.specs = {f"model.{name}": spec for name, spec in contents.parameters.items()}
        self.borrowed = {f"model.{name}" for name in contents.aliases}
        for block in self._blocks():
            for parameter in block.parameters():
                _place(parameter, device)
            fill(block)
            partition(block)
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(device)
        self.rounds_on_use = next(self.model.parameters()).dtype != dtype
        if not self.rounds_on_use:
            self._round_constants(contents)
        self.constants = [(spec, self.model.get_buffer(name)) for name, spec in contents.constants.items()]
        if recompute == "full":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        accepted = inspect.signature(self.model.forward).parameters
        self._takes_mask = "attention_mask" in accepted
        self._rotations = DocumentRotations(self.model)
        # whether documents of each length have a call of their own: see `settle_lengths`
        self.calls_apart = False
        self._options = {"use_cache": False} if "use_cache" in accepted else {}

    def forward(self, tokens_BS: Tensor, *, batch: MicroBatch, output: Output = "loss") -> Tensor:
        """Return `output` of a micro-batch: see `Outputs`.

        Dropout is drawn by the number of the micro-batch's first sequence in the step. Layers of
        transformers draw for all rows at once, so unlike in our own families a mask depends on
        `batch.micro_sequences`.
        """
        trains = batch.streams is not None
        if self.model.training != trains:
            self.model.train(trains)
        rows = _Rows(batch.documents, tokens_BS.device)
        with _dropout_stream(batch.streams, tokens_BS.device), self._autocast(tokens_BS.device):
            logits_RLV = self._logits(rows, tokens_BS)
        match output:
            case "logits":
                return rows.join(logits_RLV)
            case "loss":
                return cross_entropy_sum(logits_RLV, rows.split(batch.targets_BS, IGNORE))
            case "sums":
                return token_sums(*self._of_tokens(rows, logits_RLV, batch), batch.documents)
            case "scores":
                return document_scores(*self._of_tokens(rows, logits_RLV, batch), batch.documents)

    def _of_tokens(self, rows: _Rows, logits_RLV: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return each token's loss, whether its label is the likeliest, and whether it is a target,
        [N] each."""
        labels_RL = rows.split(batch.targets_BS, IGNORE)
        is_hit_RL, losses_RL = logits_RLV.argmax(-1) == labels_RL, token_losses(logits_RLV, labels_RL)
        is_target_N = (batch.targets_BS != IGNORE).flatten()
        return rows.join(losses_RL).flatten(), rows.join(is_hit_RL).flatten(), is_target_N

    def _logits(self, rows: _Rows, tokens_BS: Tensor) -> Tensor:
        if rows.padded and self.calls_apart:
            return self._logits_by_length(rows.documents_of(tokens_BS))
        inputs = {"input_ids": rows.split(tokens_BS, 0), **self._options}
        if rows.padded and self._takes_mask:
            inputs["attention_mask"] = rows.is_token_RL.long()
        with self._rotations.of(rows.lengths):
            logits_RLV: Tensor = self.model(**inputs).logits
        return logits_RLV

    def _logits_by_length(self, documents: Sequence[Tensor]) -> Tensor:
        """Return the logits from one call for the documents of each length, so that none is in a
        call with a longer one."""
        rows_of: dict[int, list[int]] = {}
        for row, document in enumerate(documents):
            rows_of.setdefault(len(document), []).append(row)
        logits: dict[int, Tensor] = {}
        for rows in rows_of.values():
            found = self.model(input_ids=torch.stack([documents[row] for row in rows]), **self._options).logits
            logits |= dict(zip(rows, found, strict=True))
        return pad_sequence([logits[row] for row in range(len(documents))], batch_first=True)

    def settle_lengths(self, device: torch.device, seq_len: int, *, may_call_apart: bool) -> list[str]:
        """Set a call for each length where a document's logits depend on the longest one of its
        call; return remarks.

        `may_call_apart`: ranks may make different numbers of calls. RecipeError where they may not
        but must.
        """
        if not self._mixes_lengths(device, seq_len):
            return []
        depends = f"{self.architecture}: a document's logits depend on the longest document of its call"
        if not may_call_apart:
            raise RecipeError(
                f"{depends}, so those of each length need a call of their own, and with ZeRO-3 all ranks must make as many; "
                "legal: zero.stage of at most 2, or data.isolate_documents false"
            )
        self.calls_apart = True
        return [f"{depends}: those of each length have a call of their own"]

    @torch.no_grad()
    def _mixes_lengths(self, device: torch.device, seq_len: int) -> bool:
        """Return whether a short document has other logits beside the longest possible one than
        alone.

        Without such a dependence they agree up to rounding. Half of the tokens must differ, because
        a router may choose another expert after rounding.
        """
        short = min(8, seq_len // 2)
        if not short:
            return False
        tokens_BS = torch.arange(2 * seq_len, device=device).view(2, seq_len) % self.model.get_input_embeddings().num_embeddings
        packed = Documents(((seq_len,), (short, seq_len - short)))
        beside_SV = self._logits_of(tokens_BS, packed)[1, :short]
        alone_SV = self._logits_of(tokens_BS[1:, :short], Documents.whole_rows(1, short))[0]
        differences_S = (beside_SV - alone_SV).abs().amax(-1)
        return bool(differences_S.median() > max(1e-3, 25 * torch.finfo(self.dtype).eps) * alone_SV.std())

    def require_causal(self, device: torch.device) -> None:
        """Raise RecipeError where predicting the next token would teach nothing. Under ZeRO-3 every
        rank must call it together."""
        if self.looks_ahead(device):
            raise RecipeError(
                f"{self.architecture}: its logits at a token depend on the next one, so predicting it would teach nothing; "
                "legal: a model with causal attention"
            )

    @torch.no_grad()
    def looks_ahead(self, device: torch.device) -> bool:
        """Return whether a token's logits depend on the token after it.

        If they do not, two rows that differ in their last token agree before it up to rounding. If
        they do, the rows differ by a fraction of the logits themselves. Under ZeRO-3 every rank
        must call it together.
        """
        tokens_BS = torch.tensor([[1, 1], [1, 0]], device=device)
        logits_BSV = self._logits_of(tokens_BS, Documents.whole_rows(2, 2))
        return bool((logits_BSV[0] - logits_BSV[1])[:-1].abs().max() > 0.01 * logits_BSV.std())

    def _logits_of(self, tokens_BS: Tensor, documents: Documents) -> Tensor:
        logits_BSV: Tensor = self(tokens_BS, batch=MicroBatch(tokens_BS, documents), output="logits").float()
        return logits_BSV

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=self.dtype, enabled=self.rounds_on_use)

    def _blocks(self) -> Iterator[_Block]:
        parameters = dict(self.named_parameters())

        def block_of(name: str) -> str:
            layer = LAYER.match(name)
            return layer.group() if layer else name.rpartition(".")[0]

        for _, names in groupby(self.specs, key=block_of):
            yield _Block([(parameters[name], self.specs[name]) for name in names])

    def _round_constants(self, contents: Contents) -> None:
        """Convert the constants as transformers does when it loads them: to the format of the
        weights, except those that the model needs in fp32."""
        kept = {*(self.model._keep_in_fp32_modules or ()), *(self.model._keep_in_fp32_modules_strict or ())}
        for name in contents.constants:
            if kept.isdisjoint(name.split(".")):
                buffer = self.model.get_buffer(name)
                buffer.data = buffer.data.to(self.dtype)


class _Block(Sharded):
    """Parameters of the model that are filled and divided together."""

    def __init__(self, parameters: list[tuple[nn.Parameter, ShardSpec]]) -> None:
        super().__init__()
        for index, (parameter, spec) in enumerate(parameters):
            setattr(self, str(index), parameter)
            self.specs[str(index)] = spec


def _place(parameter: nn.Parameter, device: torch.device) -> None:
    """Give the parameter storage on the device, in place: other modules may have the same parameter
    (ties)."""
    if parameter.is_meta:
        real = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
        torch.utils.swap_tensors(parameter, real)
    else:
        parameter.data = parameter.data.to(device)


class _Rows:
    """The documents of packed rows [B, S] as separate padded rows [R, L], and back.

    Every model of transformers accepts padding on the right with a mask, whatever its positions and
    its attention (or recurrence), so it is exact for all of them. It costs R · L tokens instead of
    N; rows of one document are not changed.
    """

    def __init__(self, documents: Documents, device: torch.device) -> None:
        self._shape = documents.shape
        self.lengths = [length for row in documents.lengths for length in row]
        self.padded = len(self.lengths) > documents.shape[0]
        lengths_R1 = torch.tensor(self.lengths, device=device)[:, None]
        self.is_token_RL = torch.arange(max(self.lengths), device=device) < lengths_R1

    def documents_of(self, x_BS: Tensor) -> Sequence[Tensor]:
        documents: Sequence[Tensor] = x_BS.flatten().split(self.lengths)
        return documents

    def split(self, x_BS: Tensor, padding: int) -> Tensor:
        if not self.padded:
            return x_BS
        return pad_sequence(list(self.documents_of(x_BS)), batch_first=True, padding_value=padding)

    def join(self, x_RLV: Tensor) -> Tensor:
        return x_RLV[self.is_token_RL].unflatten(0, self._shape) if self.padded else x_RLV


@contextmanager
def _dropout_stream(streams: Streams | None, device: torch.device) -> Iterator[None]:
    """Set torch's global generators, from which transformers draws dropout, to a seed of the
    micro-batch.

    Afterwards they continue from their earlier state. Recomputed layers restore the state with
    which they began.
    """
    if streams is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(streams.seeds[0])
        yield


def cross_entropy_sum(logits_RLV: Tensor, labels_RL: Tensor) -> Tensor:
    """Return Σ over targets of −log softmax(logits)[label], fp32.

    Only a chunk of the logits is in fp32 at a time; backward computes it again, which costs no
    matrix product.
    """
    logits_NV, labels_N = logits_RLV.flatten(0, 1), labels_RL.flatten()
    step = max(1, CHUNK_BYTES // (4 * logits_NV.shape[1]))
    chunks = zip(logits_NV.split(step), labels_N.split(step), strict=True)
    return torch.stack(
        [checkpoint(_chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    ).sum()


def token_losses(logits_RLV: Tensor, labels_RL: Tensor) -> Tensor:
    """Return −log softmax(logits)[label] of each token, fp32 [R, L], 0 where it is no target."""
    logits_NV, labels_N = logits_RLV.flatten(0, 1), labels_RL.flatten()
    step = max(1, CHUNK_BYTES // (4 * logits_NV.shape[1]))
    chunks = zip(logits_NV.split(step), labels_N.split(step), strict=True)
    losses = [
        functional.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none") for logits, labels in chunks
    ]
    return torch.cat(losses).view(labels_RL.shape)


def _chunk_loss(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    return functional.cross_entropy(logits_NV.float(), labels_N, ignore_index=IGNORE, reduction="sum")
