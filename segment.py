"""Chapter 1 of 4: cut a response into segments where the language model is surprised.

    python segment.py                                    # the embedded world: segments, cutoffs
    python segment.py --model MODEL --data PREFERENCES   # your chat model on your data
    python segment.py --target_length 20                 # which cutoff gives segments of 20 tokens?
    python segment.py --text "..." --reward_model out/rm/model     # your own text, segments scored

The idea (arXiv 2501.02790, section 2.2): a token is too small to deserve a reward of its own and a
whole response is too large. Inside a phrase the next token is nearly certain; where a new thought
starts it is wide open. So the entropy of the SFT model's next token marks where segments end.

Legend of all four chapters: B batch, P prompt, R response, T = P + R, V vocabulary, d hidden size,
N any number of tokens. Sequences are [prompt | response | padding], and (B, R) tensors hold one
number for each response token. Response token r stands at position P + r:
    at P + r      its segment end, its scalar reward and the entropy *after* it are read,
    at P + r - 1  its log-probability and its critic value: there the model decided on it.

Below the double ruler is the plumbing that every chapter shares: settings, several GPUs, data, chat
templates. What differs from the authors' code: one vectorised segmentation; lengths are integers,
never searched for by a pad or EOS id; special tokens that a person typed stay ordinary text.
"""
import functools
import math
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoTokenizer, GenerationConfig, HfArgumentParser)
from transformers import logging as hf_logging

WORLD = os.path.relpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "data/reviews"))
Granularity = Literal["segment", "token", "bandit"]
Dtype = Literal["auto", "bf16", "fp32"]


def opt(default, help):
    return field(default=default, metadata={"help": help.replace("%", "%%")})


@dataclass
class Config:
    model: str = opt(f"{WORLD}/sft", "the SFT chat model: a folder or a hub id")
    data: str = opt(f"{WORLD}/pairs_test.jsonl", "preferences; also SOURCE:train[98%:]")
    text: str = opt("", "show this response instead of those of --data")
    prompt: str = opt("Write a review of the phone.", "the user's message that --text answers")
    granularity: Optional[Granularity] = opt(None, "default: the reward model's, else segment")
    cutoff: Optional[float] = opt(None, "nats; default: the reward model's, else 1")
    target_length: float = opt(0.0, "find the cutoff that gives segments of this many tokens")
    reward_model: str = opt("", "score each segment with this reward model")
    show: int = opt(3, "responses to print")
    max_samples: int = opt(200, "read this many pairs")
    max_tokens: int = opt(2048, "prompt + response; at most the context of the model")
    micro_tokens: int = opt(16384, "tokens in one forward pass, padding included")
    dtype: Dtype = opt("auto", "bf16 on CUDA, fp32 on CPU")


# -- The method. 1. entropy: how open is the next token? -------------------------------------------
def token_logprobs_and_entropy(hidden, head_weight, targets, chunk=None):
    """log p(target) and entropy (nats) of softmax(hidden @ head_weight.T), never building (N, V).

    hidden: (N, d); head_weight: (V, d); targets: int (N,); chunk: rows of logits alive at once
    (default: about 128 MB of them). Returns logp (N,), entropy (N,) in fp32, because bf16 logits
    bias the entropy. Differentiable: the backward pass computes each chunk again. Equation (1).
    """
    chunk = chunk or max(16, 2 ** 25 // head_weight.shape[0])
    weight = head_weight.float()

    def one_chunk(h, w, t):
        logp = (h.float() @ w.T).log_softmax(-1)                             # (chunk, V)
        entropy = -(logp.exp() * logp).sum(-1)                               # (chunk,)
        return logp.gather(-1, t[:, None])[:, 0], entropy

    logps, entropies = [], []
    for h, t in zip(hidden.split(chunk), targets.split(chunk)):
        logp, entropy = checkpoint(one_chunk, h, weight, t, use_reentrant=False,
                                   preserve_rng_state=False)
        logps.append(logp)
        entropies.append(entropy)
    return torch.cat(logps), torch.cat(entropies)


# -- The method. 2. segments: where do they end, where do they lie, what is a response's score? ----
def segment_ends(entropy, mask, finished, cutoff, granularity):
    """Which response tokens end a segment (paper section 2.2).

    entropy: (B, R) nats, of the token *after* each response token; mask: bool (B, R), True on the
    response's tokens, end-of-turn token included; finished: bool (B,), the last token is an
    end-of-turn token. Returns bool (B, R). segment: where entropy > cutoff, and at the last content
    token; token: at every content token; bandit: at the last token. The end-of-turn token belongs
    to no segment, unless it is all there is.

    >>> h = torch.tensor([[0.1, 2.5, 0.1, 0.3, 9.0]])       # the last is the end-of-turn token
    >>> segment_ends(h, h > 0, torch.tensor([True]), cutoff=2.0, granularity="segment").int()
    tensor([[0, 1, 0, 1, 0]], dtype=torch.int32)
    """
    if granularity not in ("segment", "token", "bandit"):
        raise ValueError(f"granularity {granularity!r}: one of segment, token, bandit")
    length = mask.sum(1)                                                     # (B,)
    content = torch.where(finished & (length > 1), length - 1, length)       # (B,)
    r = torch.arange(mask.shape[1], device=mask.device)                      # (R,)
    if granularity == "bandit":
        return r == length[:, None] - 1
    is_content = r < content[:, None]                                        # (B, R)
    if granularity == "token":
        return is_content
    is_last = r == content[:, None] - 1                                      # (B, R)
    return (entropy > cutoff) & is_content | is_last


def segment_locations(ends):
    """Relative location p = i/n of the i-th of n segments, written at its last token (section 2.3).

    ends: bool (B, R). Returns float (B, R), 0 where no segment ends.

    >>> segment_locations(torch.tensor([[False, True, False, True]]))
    tensor([[0.0000, 0.5000, 0.0000, 1.0000]])
    """
    n = ends.sum(1, keepdim=True).clamp(min=1)                               # (B, 1)
    return torch.where(ends, ends.cumsum(1) / n, 0.0)


def sequence_score(values, ends):
    """A response's score: the mean of its segments' rewards, equation (2). (B, R) each -> (B,)"""
    return torch.where(ends, values, 0.0).sum(1) / ends.sum(1).clamp(min=1)


# -- The language model: of each response token its log-probability, and the entropy after it ------
class LanguageModel(nn.Module):
    auto_class = AutoModelForCausalLM
    settings = {}

    def __init__(self, hf):
        super().__init__()
        self.hf = hf

    def forward(self, ids, prompt_lens, response_lens):
        """ids: (B, T) right-padded; lens: (B,). Returns log-probs and entropies, (2, B, R), 0 on
        padding. No attention mask: causal attention never looks at what stands to the right."""
        hidden = self.hf.base_model(input_ids=ids, use_cache=False).last_hidden_state    # (B, T, d)
        # Column k = 0..R is position P - 1 + k: there token k is decided on, which is its log-prob,
        # and there the entropy is that after token k - 1.
        k = torch.arange(int(response_lens.max()) + 1, device=ids.device)                # (R+1,)
        read = k <= response_lens[:, None]                                               # (B, R+1)
        row, column = read.nonzero(as_tuple=True)                                        # (N,) each
        position = prompt_lens[row] - 1 + column                                         # (N,)
        following = ids.roll(-1, 1)[row, position]                                       # (N,)
        head = self.hf.get_output_embeddings().weight                                    # (V, d)
        both = token_logprobs_and_entropy(hidden[row, position], head, following)        # (N,) each
        grid = torch.zeros(2, *read.shape, device=ids.device)            # log-probs, then entropies
        logprobs, entropy = grid.masked_scatter(read, torch.cat(both))                   # (B, R+1)
        mask = k[:-1] < response_lens[:, None]                                           # (B, R)
        return torch.stack([logprobs[:, :-1] * mask, entropy[:, 1:] * mask])

    @torch.no_grad()
    def check(self, path):
        """Logits must be hidden @ weight.T, as computed above: no bias, scale or soft-capping."""
        ids = torch.arange(4)[None] % self.hf.config.vocab_size
        hidden = self.hf.base_model(input_ids=ids).last_hidden_state
        plain = hidden @ self.hf.get_output_embeddings().weight.T
        if not torch.allclose(self.hf(input_ids=ids).logits, plain, atol=5e-2, rtol=1e-2):
            fail(f"{path}: not supported: its logits are not finite, or its head is more than a "
                 "matrix (bias, scale, soft-capping)")


# ==================================================================================================
# Plumbing. Errors and settings
# ==================================================================================================
def fail(message):
    """The user's mistake: one line, exit code 2. All ranks fail alike and rank 0 speaks."""
    if rank() == 0:
        print("error:", " ".join(message.split())[:600], file=sys.stderr, flush=True)
    else:
        time.sleep(5)                        # torchrun ends all ranks when one has ended
    raise SystemExit(2)


def parse(Config, argv=None):
    """Command line -> Config. `@config/x.args` files hold flags, comments and blank lines; later
    flags override."""
    parser = HfArgumentParser(Config, fromfile_prefix_chars="@", allow_abbrev=False)
    parser.convert_arg_line_to_args = functools.partial(shlex.split, comments=True)
    parser.error = fail
    cfg, unknown = parser.parse_args_into_dataclasses(
        argv, look_for_args_file=False, return_remaining_strings=True)
    if unknown:
        fail(f"unknown flag or argument: {unknown[0]} (--help lists the flags)")
    for name, value in asdict(cfg).items():
        if isinstance(value, (int, float)) and not name.endswith("_reward"):
            least = 1 if re.search("batch_size|_tokens|_every|epochs", name) else 0
            if not least <= value < math.inf:
                fail(f"--{name} {value}: must be a number from {least} on")
    return cfg


def in_world(path):
    """Does a file or folder belong to the embedded world? Some defaults make sense there alone."""
    return os.path.abspath(path).startswith(os.path.abspath(WORLD) + os.sep)


def prepare_world(*paths):
    """Rank 0 makes the embedded world when it is first used."""
    if any(in_world(path) for path in paths):
        if rank() == 0 and not os.path.exists(f"{WORLD}/world.json"):
            subprocess.run([sys.executable, f"{WORLD}/prepare.py"], check=True)
        dist.barrier()


# -- Plumbing. One GPU or many: the same code on 1 and N ranks -------------------------------------
def setup():
    """Join the process group (a group of one without torchrun) and pick this rank's device."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        group = dict(store=dist.HashStore(), rank=0, world_size=1)
        if "RANK" in os.environ:
            group = {}                                           # torchrun's
        dist.init_process_group(backend, timeout=timedelta(hours=1), **group)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def rank():
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def say(*args):
    if rank() == 0:
        print(*args, flush=True)


def compute_dtype(name, device):
    """--dtype -> torch dtype. With bf16 a GPU may use TF32 for the fp32 logits: products of bf16
    numbers are exact in it."""
    bf16 = name == "bf16" or name == "auto" and device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = bf16
    return torch.bfloat16 if bf16 else torch.float32


def read_config(path, **settings):
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **settings)
    except Exception as error:
        fail(f"{path}: no model there ({error})")
    for name, value in config.to_dict().items():
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float):
            setattr(config, name, 0.0)       # a noisy ratio or reward is no ratio or reward
    return config


def load_model(path, wrap, device, dtype, train=False, grad_checkpoint=False, head_std=None):
    """A Hugging Face checkpoint as a model whose weights are sharded over the ranks (FSDP2).

    wrap: LanguageModel or train_rm.ScalarModel. Every rank reads the whole file into host memory,
    safetensors alone, in its own precision; fully_shard keeps 1/N of a layer and moves that to the
    device. train: fp32 master weights, computing in dtype, gradients reduced in fp32; else frozen,
    in dtype. head_std: draw the scalar head anew, with this standard deviation.
    """
    config = read_config(path, **wrap.settings)
    if config.hidden_size < 256 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)             # matrices this small lose by a second thread
    if device.type == "cpu" and dtype == torch.bfloat16 and config.max_position_embeddings <= 512:
        config._attn_implementation = "eager"            # torch's fused one takes twice the time
    try:
        hf, info = wrap.auto_class.from_pretrained(
            path, config=config, dtype="auto", use_safetensors=True, trust_remote_code=False,
            output_loading_info=True)
    except Exception as error:
        fail(f"{path}: the weights cannot be read ({error})")
    missing = set(info["missing_keys"])
    if head_std is not None:
        missing.discard("score.weight")      # drawn from a seed: the same on every rank
        draw = torch.randn(1, config.hidden_size, generator=torch.Generator().manual_seed(0))
        hf.score.weight.data = draw * head_std
    if missing:
        fail(f"{path}: weights are missing from the checkpoint, among them {min(missing)}")
    model = wrap(hf)
    model.check(path)
    if grad_checkpoint:
        hf.gradient_checkpointing_enable({"use_reentrant": False})

    policy = MixedPrecisionPolicy()
    if train:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    layers = [m for m in model.modules()
              if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers][0]
    for block in [*layers, model]:           # the root last: embeddings, final norm and head
        for p in block.parameters():         # not buffers: rotary frequencies stay in fp32
            p.data = p.data.to(torch.float32 if train else dtype)
        # Resharded even at the root: after a forward without a backward its weights would stay
        # whole, and the optimizer and checkpoints would find plain tensors instead of shards.
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    model.to(device)
    return model.train().requires_grad_(train)       # gradient checkpointing runs in train() alone


def trained_how(path, granularity, cutoff):
    """A reward model's own granularity and cutoff: from its config.json, where train_rm.py writes
    them, or, for one released without them and for a function, from the flags."""
    config = None
    if ".py:" not in path:
        config = read_config(path)
    if hasattr(config, "segment_granularity"):
        return config.segment_granularity, config.segment_cutoff
    if granularity is None or granularity == "segment" and cutoff is None:
        fail(f"{path} does not say how it was trained: give its --granularity (and, for segments, "
             "its --cutoff)")
    return granularity, cutoff or 0.0


def micro_batches(lengths, budget, ranks=1):
    """Cut rows into micro-batches of at most `budget` tokens with padding, longest rows first: a
    multiple of `ranks` of them, as the number of rows must be, so that all run as many forwards.

    >>> micro_batches([5, 9, 2, 8], budget=18)
    [[1, 3], [0, 2]]
    """
    batches = []
    for i in np.argsort([-length for length in lengths], kind="stable").tolist():
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    while len(batches) % ranks:
        largest = max(batches, key=len)
        batches.append(largest[len(largest) // 2:])
        del largest[len(largest) // 2:]
    return batches


def pad(rows, device):
    """[(prompt ids, response ids)] -> ids (B, T), prompt lengths (B,), response lengths (B,)"""
    whole = [torch.from_numpy(np.concatenate(row)) for row in rows]
    lengths = torch.tensor([[len(p), len(r)] for p, r in rows], device=device)           # (B, 2)
    return pad_sequence(whole, batch_first=True).long().to(device), *lengths.unbind(1)


def response_mask(rows, stops, device):
    """bool (B, R), True on the tokens of each response, and bool (B,), does a stop token end it?"""
    lengths = torch.tensor([len(r) for _, r in rows])                                    # (B,)
    last = torch.tensor([int(r[-1]) for _, r in rows])                                   # (B,)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]                           # (B, R)
    return mask.to(device), torch.isin(last, stops).to(device)


@torch.no_grad()
def map_rows(model, rows, budget, device, title=""):
    """model(ids, prompt_lens, response_lens), (..., b, r), of all rows: (..., B, R) on each rank.
    Micro-batches are dealt to the ranks; the sum over ranks puts the results together."""
    ranks, R = dist.get_world_size(), max(len(r) for _, r in rows)
    filled = rows + rows[-1:] * (-len(rows) % ranks)                 # to a multiple of the ranks
    batches = micro_batches([len(p) + len(r) for p, r in filled], budget, ranks)[rank()::ranks]
    results, said = None, time.time()
    for done, batch in enumerate(batches):
        result = model(*pad([filled[i] for i in batch], device)).float()             # (..., b, r)
        if results is None:
            results = torch.zeros(*result.shape[:-2], len(filled), R, device=device)
        results[..., batch, :result.shape[-1]] = result
        if title and time.time() - said > 20:
            said = time.time()
            say(f"{title}: {done + 1} of {len(batches)} batches")
    dist.all_reduce(results)
    return results[..., :len(rows), :]


# -- Plumbing. Data: preferences and prompts as message lists, read by the datasets package --------
def read_rows(source, limit=0):
    """A hub id, a .json(l)(.gz) or .parquet file or a folder, each with or without a split
    ("pairs.jsonl:train[98%:]"), as a datasets.Dataset."""
    import datasets                                              # here, because it takes a second
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    name, _, split = source.partition(":")
    split = split or "train"
    part = split.partition("[")[0]
    folder = f"{name}/{part}" if os.path.exists(f"{name}/dataset_dict.json") else name
    if not os.path.exists(name) and re.search(r"^[./~]|\.(jsonl?|parquet)(\.gz)?$", name):
        fail(f"{name}: no such file")
    try:
        if os.path.isfile(name):
            kind = "parquet" if name.endswith(".parquet") else "json"
            data = datasets.load_dataset(kind, data_files=name, split=split)
        elif os.path.exists(f"{folder}/state.json"):             # saved by save_to_disk
            files = {part: f"{folder}/*.arrow"}
            data = datasets.load_dataset("arrow", data_files=files, split=split)
        else:
            data = datasets.load_dataset(name, split=split)
    except Exception as error:
        fail(f"{source}: cannot be read as a data set ({error.__cause__ or error})")
    return data.select(range(min(limit or len(data), len(data))))


def messages_of(value, where, role):
    """Text or a message list -> a checked message list."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    good = isinstance(value, list) and len(value) > 0
    for message in value if good else []:
        good = good and isinstance(message, dict) and isinstance(message.get("content"), str)
    if not good:
        fail(f"{where}: must be text, or a list of messages with a role and a text as content")
    return [{"role": message.get("role"), "content": message["content"]} for message in value]


def conversation(row, side, where):
    """The prompt messages and the response text of one side of a preference."""
    if row.get(side) is None:
        fail(f"{where}: there is no {side} in it; it has {', '.join(row)}")
    chat = messages_of(row[side], f"{where}, {side}", "assistant")
    if row.get("prompt") is not None:
        prompt = messages_of(row["prompt"], f"{where}, prompt", "user")
        if chat[0]["role"] != "assistant":                       # the chat repeats the prompt
            prompt = [message for message in prompt if message not in chat]      # a system message
            if any(message["role"] != "system" for message in prompt):
                fail(f"{where}: prompt and {side} hold different turns")
        chat = prompt + chat
    elif isinstance(row[side], str):
        fail(f"{where}: {side} is one text; give message lists or a prompt column")
    if len(chat) < 2 or chat[-1]["role"] != "assistant":
        fail(f"{where}, {side}: must be a prompt and the assistant's answer")
    return chat[:-1], chat[-1]["content"]


def load_pairs(source, limit=0):
    """[(prompt messages, chosen text, rejected text, "SOURCE row n")]; pairs that teach nothing are
    dropped and counted."""
    rows, pairs = read_rows(source, limit), []
    for n, row in enumerate(rows, 1):
        where = f"{source} row {n}"
        prompt, chosen = conversation(row, "chosen", where)
        other_prompt, rejected = conversation(row, "rejected", where)
        both_there = chosen.strip() and rejected.strip()
        if both_there and chosen != rejected and prompt == other_prompt:
            pairs.append((prompt, chosen, rejected, where))
    if len(pairs) < len(rows):
        say(f"{source}: dropped {len(rows) - len(pairs)} of {len(rows)} pairs: a response is empty "
            "or equals the other, or the prompts differ")
    return pairs or fail(f"{source}: no pair is left")


def load_prompts(source, limit=0):
    """[prompt messages] from a column prompt, instruction, or the chosen side of preferences."""
    prompts = []
    for n, row in enumerate(read_rows(source, limit), 1):
        where = f"{source} row {n}"
        if row.get("prompt") or row.get("instruction"):
            chat = messages_of(row.get("prompt") or row["instruction"], where, "user")
        else:
            chat, _ = conversation(row, "chosen", where)
        if chat[-1]["role"] == "assistant":
            fail(f"{where}: a prompt ends before the assistant's turn")
        prompts.append(chat)
    return prompts


def prompt_text(messages):
    """What people, judges and gold functions read: the user's text, or all turns with roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


# -- Plumbing. Chat encoding: the tokenizer's own template, prompt and response tokenised apart ----
def load_tokenizer(path):
    """The tokenizer and its stop tokens, (n,): EOS by the tokenizer and by generation_config (or,
    without one, by config)."""
    eos = read_config(path).eos_token_id
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:               # for a missing file it talks of other packages
        fail(f"{path}: no tokenizer there ({error})")
    try:
        eos = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        pass                                                     # it has no such file
    stops = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    if not stops:
        fail(f"{path}: no stop token; set eos_token_id in generation_config.json")
    return tokenizer, torch.tensor(sorted(stops))


def special_tokens(tokenizer):
    """{text: id}; tokenizer.all_special_tokens holds only those with a role, such as BOS."""
    return {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}


def render(tokenizer, messages, where, **kwargs):
    """Messages -> text by the chat template. A special token that a person typed must not end a
    turn: an invisible character after its first letter keeps it text."""
    # some templates print the date, and tokens must not change overnight
    day = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
    safe = []
    for message in messages:
        content = message["content"]
        for token in special_tokens(tokenizer):
            content = content.replace(token, token[0] + "\u200b" + token[1:])
        safe.append({**message, "content": content})
    try:
        return tokenizer.apply_chat_template(
            safe, chat_template=day + tokenizer.get_chat_template(), tokenize=False, **kwargs)
    except Exception as error:
        fail(f"{where}: the chat template refuses it ({error})")


def tokenize(tokenizer, texts):
    """[text] -> [int32 ids]; the template has put BOS and EOS where they belong."""
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [np.array(ids, dtype=np.int32) for ids in encoded]


def cut_prompt(ids, limit, bos):
    """The last `limit` tokens of a prompt; BOS stays."""
    if len(ids) > limit and ids[0] == bos:
        return np.concatenate([ids[:1], ids[len(ids) - limit + 1:]])
    return ids[max(0, len(ids) - limit):]


def encode_prompts(tokenizer, prompts, max_tokens, source):
    """[messages] -> [int32 ids], cut to max_tokens."""
    texts = [render(tokenizer, messages, f"{source} row {n}", add_generation_prompt=True)
             for n, messages in enumerate(prompts, 1)]
    encoded = tokenize(tokenizer, texts)
    cut = sum(len(ids) > max_tokens for ids in encoded)
    if cut:
        say(f"{source}: {cut} of {len(texts)} prompts were cut to their last {max_tokens} tokens")
    return [cut_prompt(ids, max_tokens, tokenizer.bos_token_id) for ids in encoded]


def encode_chats(tokenizer, stops, chats, max_tokens, max_prompt_tokens):
    """[(prompt messages, [response texts], where)] -> [(prompt ids, response ids)], int32, a row
    for each response, end-of-turn token included; `where` is what an error calls the row.

    A response is what the full conversation adds to the prompt rendered with its generation prompt,
    up to its first stop token. Too long: the prompt, the same for all its responses, is cut to
    max_prompt_tokens, then a response loses its last tokens, and so is "not finished".
    """
    rows, cut, endless = [], 0, 0
    for prompt, responses, where in chats:
        start = render(tokenizer, prompt, where, add_generation_prompt=True)
        texts = [start]
        for response in responses:
            whole = render(tokenizer, [*prompt, {"role": "assistant", "content": response}], where)
            if not whole.startswith(start):
                fail(f"{where}: the chat template does not continue its own generation prompt")
            texts.append(whole[len(start):])
        p, *encoded = tokenize(tokenizer, texts)
        for i, r in enumerate(encoded):
            end = np.flatnonzero(np.isin(r, stops.numpy()))
            endless += not len(end)
            encoded[i] = r[:end[0] + 1] if len(end) else r
        if len(p) + max(len(r) for r in encoded) > max_tokens and len(p) > max_prompt_tokens:
            p = cut_prompt(p, max_prompt_tokens, tokenizer.bos_token_id)
            cut += 1
        rows += [(p, r[:max_tokens - len(p)]) for r in encoded]
    if endless > len(rows) / 2:
        fail(f"{endless} of {len(rows)} responses hold no stop token: the template's end-of-turn "
             f"token is not among {tokenizer.convert_ids_to_tokens(stops.tolist())}; set "
             "eos_token_id in generation_config.json")
    if cut:
        say(f"{cut} of {len(chats)} prompts were cut to their last {max_prompt_tokens} tokens")
    return rows


def segment_texts(tokenizer, ids, ends):
    """The text of each segment, and of what follows the last one. Prefixes are decoded, because a
    token that is decoded alone loses its space."""
    texts, before = [], ""
    for cut in [*np.flatnonzero(ends) + 1, len(ids)]:
        prefix = tokenizer.decode(ids[:cut], clean_up_tokenization_spaces=False)
        texts.append(prefix[len(before):])
        before = prefix
    return texts if texts[-1] else texts[:-1]


# ==================================================================================================
# The script: look at segments, choose a cutoff
# ==================================================================================================
def paint(texts, rewards=()):
    """Segments as one string, parted by bars, the rewards behind them."""
    notes = [f" [{reward:+.2f}]" for reward in rewards] + [""] * len(texts)
    return " |".join(text + note for text, note in zip(texts, notes))


def main(cfg):
    device = setup()
    prepare_world(cfg.model, "" if cfg.text else cfg.data)
    own, own_cutoff = "segment", 1.0
    if cfg.reward_model:
        own, own_cutoff = trained_how(cfg.reward_model, cfg.granularity, cfg.cutoff)
    granularity = cfg.granularity or own
    cutoff = own_cutoff if cfg.cutoff is None else cfg.cutoff
    tokenizer, stops = load_tokenizer(cfg.model)
    if cfg.text:
        chats = [([{"role": "user", "content": cfg.prompt}], [cfg.text], "--text")]
    else:
        pairs = load_pairs(cfg.data, cfg.max_samples)
        chats = [(prompt, [chosen], where) for prompt, chosen, _, where in pairs]
    max_tokens = min(cfg.max_tokens, read_config(cfg.model).max_position_embeddings)
    rows = encode_chats(tokenizer, stops, chats, max_tokens, max_tokens // 2)

    model = load_model(cfg.model, LanguageModel, device, compute_dtype(cfg.dtype, device))
    _, entropy = map_rows(model, rows, cfg.micro_tokens, device, "entropies")            # (B, R)
    mask, finished = response_mask(rows, stops, device)                        # (B, R), (B,)
    content = segment_ends(entropy, mask, finished, 0.0, "token")                        # (B, R)
    tokens = int(content.sum())
    if cfg.target_length:         # a segment ends at each high entropy, and once at each last token
        last = segment_ends(entropy, mask, finished, math.inf, "segment")                # (B, R)
        inside = entropy[content & ~last].sort(descending=True).values                   # (N,)
        wanted = round(tokens / cfg.target_length) - len(rows)
        cutoff = round(float(inside[min(max(wanted, 0), len(inside) - 1)]), 6)
    ends = segment_ends(entropy, mask, finished, cutoff, granularity)                    # (B, R)

    if cfg.reward_model:          # chapter 2 trains it; here its scalar at each token is looked at
        rm, info = AutoModelForSequenceClassification.from_pretrained(
            cfg.reward_model, num_labels=1, use_safetensors=True, output_loading_info=True)
        rm.to(device)
        if info["missing_keys"]:
            fail(f"{cfg.reward_model} is no reward model: it has no scalar head")
    for b, (prompt, *_) in enumerate(chats[:cfg.show]):
        p, r = rows[b]
        rewards = []
        if cfg.reward_model:
            with torch.no_grad():
                hidden = rm.base_model(pad([(p, r)], device)[0]).last_hidden_state       # (1, T, d)
                rewards = rm.score(hidden)[0, len(p):, 0][ends[b, :len(r)]].tolist()
        texts = segment_texts(tokenizer, r, ends[b, :len(r)].cpu())
        say(f"\nuser: {prompt[-1]['content'].strip()}\n{paint(texts, rewards)}")

    say(f"\n{len(rows)} responses, {tokens / len(rows):.1f} tokens each\n"
        "cutoff  segments per response  tokens per segment")
    for c in sorted({.5, .75, 1., 1.25, 1.5, 1.75, 2., 2.5, 3., cutoff}):
        n = int(segment_ends(entropy, mask, finished, c, "segment").sum())
        say(f"{c:6.2f}  {n / len(rows):21.2f}  {tokens / n:18.2f}")
    if cfg.target_length:
        n = int(segment_ends(entropy, mask, finished, cutoff, "segment").sum())
        say(f"--cutoff {cutoff} gives segments of {tokens / n:.2f} tokens")


if __name__ == "__main__":
    main(parse(Config))
    dist.destroy_process_group()
