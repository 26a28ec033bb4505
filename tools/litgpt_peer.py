"""litgpt's Llama as a contender, run by the interpreter of its own environment.

It reads one JSON object: the files of the weights and the batch (safetensors), the shape and the
update. Then it takes a step for each line that it reads, and answers with one line. As in litgpt's
own `pretrain`, the model is compiled as a whole, and the loss is its chunked cross entropy.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from typing import Any, TextIO

import torch
import torch._inductor.compile_fx  # what compiling imports is no memory of a step
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import chunked_cross_entropy
from peak_memory import PeakMemory
from plain_loop import PlainLoop, Update
from safetensors.torch import load_file


def make_loop(about: dict[str, Any], device: torch.device) -> PlainLoop:
    shape = about["shape"]
    config = Config(
        block_size=shape["seq_len"],
        n_layer=shape["layers"],
        n_head=shape["heads"],
        n_embd=shape["hidden"],
        intermediate_size=shape["ffn"],
        vocab_size=shape["vocab"],
        padded_vocab_size=shape["vocab"],
        norm_class_name="RMSNorm",
        norm_eps=about["norm_eps"],
        mlp_class_name="LLaMAMLP",
        rope_base=about["rope_base"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
    )
    theirs: dict[str, torch.Tensor] = {}
    matrices: dict[str, torch.Tensor] = {}
    weights = load_file(about["weights"])
    copy_weights_hf_llama(config, {}, theirs, weights)
    copy_weights_hf_llama(config, {}, matrices, {name: weights[name] for name in about["matrices"]})
    model = GPT(config)
    model.load_state_dict(theirs)
    model.to(device).train()
    compiled = torch.compile(model)
    batch = {name: tensor.to(device) for name, tensor in load_file(about["batch"]).items()}

    def loss() -> torch.Tensor:
        return chunked_cross_entropy(compiled(batch["tokens"]), batch["targets"])

    update = Update(**{**about["update"], "betas": tuple(about["update"]["betas"])})
    return PlainLoop(model, loss, update, matrices, getattr(torch, about["dtype"]))


def main(questions: TextIO, answers: TextIO) -> None:
    warnings.simplefilter("ignore")
    about = json.loads(questions.readline())
    torch.set_num_threads(about["threads"])
    device = torch.device(about["device"])
    memory = PeakMemory(device)
    loop = make_loop(about, device)
    answers.write("{}\n")
    answers.flush()
    while questions.readline():
        memory.begin()
        start = time.perf_counter()
        loss, norm = loop.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        answer = {"loss": loss, "norm": norm, "step_s": time.perf_counter() - start, "peak_bytes": memory.bytes()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    # Libraries print as they like; only answers go to the pipe.
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    main(sys.stdin, pipe)
