"""Chapter 1 of 4: cut a response into segments where the language model is surprised.

    python data/reviews/prepare.py                         # once: writes the embedded world
    python segment.py                                      # its segments, and a table of cutoffs
    python segment.py --model MODEL --data PREFERENCES     # your chat model on your data

The idea (arXiv 2501.02790, section 2.2): a token is too small to deserve a reward of its own and a
whole response is too large. Inside a phrase the next token is nearly certain; where a new thought
starts it is wide open. So the entropy of the SFT model's next token marks where segments end.

Legend of all four chapters: B rows in a batch, P tokens of a row's prompt, R response tokens of the
longest row, T tokens of the longest sequence, V vocabulary, d hidden size, N any number of tokens;
small b, r, n: the same of a part, a micro-batch say. Sequences are [prompt | response | padding],
and (B, R) tensors hold one number for each response token. Response token r = 0 ... R-1 is at
position P + r:
    at P + r      its segment end, its scalar reward and the entropy *after* it are read,
    at P + r - 1  its log-probability and its critic value: there the model decided on it.

What differs from the authors' code: one vectorised segmentation for all rows; the end of a response
is known by its length, never searched for by a pad or EOS id.
"""
import glob
import inspect
import os
import re
import shlex
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig,
                          HfArgumentParser, logging as hf_logging, masking_utils)

Granularity = Literal["segment", "token", "bandit"]
Dtype = Literal["auto", "bf16", "fp32"]


@dataclass
class Config:
    model: str = "data/reviews/sft"            # the SFT chat model: a folder or a hub id
    # preferences, also a part: SOURCE:train[:1000]
    data: str = "data/reviews/pairs.jsonl"     # (paper: hendrydong/preference_700K)
    granularity: Granularity = "segment"       # what to show: segment, token, bandit
    cutoff: float = 1.0                        # nats (paper: Phi-3 1.75, Llama-3 2.0)
    max_samples: int = 200                     # read this many pairs
    max_tokens: int = 256                      # prompt + response (paper: 2048)
    max_prompt_tokens: int = 128               # longer ones lose what follows BOS (paper: 1728)
    micro_batch_size: int = 8                  # rows in one forward pass of one GPU
    dtype: Dtype = "auto"                      # to compute in: bf16 on CUDA, fp32 on CPU


# -- The method. 1. entropy: how open is the next token? -------------------------------------------
def logprobs_and_entropy(hidden, head_weight, targets):
    """log p(target), and the entropy (nats) of p = softmax(hidden @ head_weight.T), equation (1).
    hidden: (N, d); head_weight: (V, d); targets: int (N,). Returns (N,), (N,) in fp32: logits in
    bf16 would bias the entropy."""
    logp = (hidden.float() @ head_weight.float().T).log_softmax(-1)              # (N, V)
    entropy = -(logp.exp() * logp).sum(-1)                                       # (N,)
    return logp.gather(-1, targets[:, None])[:, 0], entropy


def token_logprobs_and_entropy(hidden, head_weight, targets, chunk=None):
    """The same, `chunk` tokens at a time (default: 128 MB of logits), so that (N, V) never exists:
    not in the backward pass either, which computes each chunk again."""
    chunk = chunk or 128 * 2 ** 20 // (4 * len(head_weight))
    weight = head_weight.float()                                                 # once for all
    parts = [checkpoint(logprobs_and_entropy, h, weight, t, use_reentrant=False,
                        preserve_rng_state=False)
             for h, t in zip(hidden.split(chunk), targets.split(chunk))]
    logprobs, entropies = zip(*parts)
    return torch.cat(logprobs), torch.cat(entropies)


# -- The method. 2. segments: where do they end, where do they lie, what is a response's score? ----
def segment_ends(entropy, mask, finished, cutoff, granularity):
    """Which response tokens end a segment (paper section 2.2).
    entropy: (B, R) nats, of the token *after* each response token; mask: bool (B, R), True on the
    response's tokens, end-of-turn token included; finished: bool (B,), the last token is an
    end-of-turn token; all others are content. Returns bool (B, R), by granularity
    segment: where entropy > cutoff, and at the last content token;
    token: at every content token. In both the end-of-turn token belongs to no segment, unless it is
    all there is;
    bandit: one segment, which ends at the very last token, the end-of-turn token included.
    >>> h = torch.tensor([[0.1, 2.5, 0.1, 0.3, 9.0]])       # the last is the end-of-turn token
    >>> mask = torch.ones(1, 5, dtype=torch.bool)
    >>> segment_ends(h, mask, torch.tensor([True]), cutoff=2.0, granularity="segment").int()
    tensor([[0, 1, 0, 1, 0]], dtype=torch.int32)
    """
    length = mask.sum(1, keepdim=True)                                           # (B, 1)
    content = (length - finished[:, None].long()).clamp(min=1)                   # (B, 1)
    r = torch.arange(mask.shape[1], device=mask.device)                          # (R,)
    is_content = r < content                                                     # (B, R)
    if granularity == "segment":
        return ((entropy > cutoff) & is_content) | (r == content - 1)
    if granularity == "token":
        return is_content
    if granularity == "bandit":
        return r == length - 1
    raise ValueError(granularity)


def segment_locations(ends):
    """Relative location p = i/n of the i-th of n segments, written at its last token (section 2.3).
    ends: bool (B, R). Returns float (B, R), 0 where no segment ends.
    >>> segment_locations(torch.tensor([[False, True, False, True]]))
    tensor([[0.0000, 0.5000, 0.0000, 1.0000]])
    """
    n = ends.sum(1, keepdim=True).clamp(min=1)                                   # (B, 1)
    return torch.where(ends, ends.cumsum(1) / n, 0.0)


def sequence_score(values, ends):
    """A response's score: the mean of its segments' rewards, equation (2). (B, R) each -> (B,)"""
    return torch.where(ends, values, 0.0).sum(1) / ends.sum(1).clamp(min=1)


# -- The language model: of each response token its log-probability, and the entropy after it ------
def parts_of(rows, starts, lens):
    """row[start:start + len] of each row of (B, T, ...): a list of (len, ...)"""
    return [row[start:start + n] for row, start, n in zip(rows, starts, lens)]


class LanguageModel(nn.Module):
    auto_class = AutoModelForCausalLM
    settings = {}                                        # load_model adds them to the config

    def __init__(self, hf):
        super().__init__()
        self.hf = hf

    def forward(self, ids, prompt_lens, response_lens):
        """ids: (B, T) right-padded; lens: (B,) arrays, as `pad` makes them. Returns log-probs and
        entropies, (2, B, R), 0 on padding. No attention mask: no token looks to its right."""
        hidden = self.hf.base_model(input_ids=ids, use_cache=False).last_hidden_state    # (B, T, d)
        # A row of P + R tokens is read from position P - 1 to P + R - 1. All but the last give the
        # log-prob of the token that follows (the last has none), all but the first the entropy
        # after a response token.
        starts = prompt_lens - 1                                                         # (B,)
        lens = response_lens + 1                                                         # (B,)
        states = torch.cat(parts_of(hidden, starts, lens))                               # (N, d)
        targets = torch.cat(parts_of(ids.roll(-1, 1), starts, lens))                     # (N,)
        head_weight = self.hf.get_output_embeddings().weight     # (V, d), whole: FSDP gathered it
        both = token_logprobs_and_entropy(states, head_weight, targets)          # (N,), (N,)
        logprobs, entropies = [x.split(lens.tolist()) for x in both]
        logprobs = pad_sequence([row[:-1] for row in logprobs], batch_first=True)        # (B, R)
        entropies = pad_sequence([row[1:] for row in entropies], batch_first=True)       # (B, R)
        return torch.stack([logprobs, entropies])

    @torch.no_grad()
    def check(self, path):
        """Logits must be hidden @ weight.T, as computed above."""
        ids = torch.arange(4)[None]
        logits = (self.hf.base_model(ids).last_hidden_state
                  @ self.hf.get_output_embeddings().weight.T)
        if not torch.allclose(self.hf(ids).logits, logits, atol=5e-2, rtol=1e-2):
            fail(f"{path}: not supported: logits not finite, or a head that is more than a matrix")


# == Plumbing. Errors and settings =================================================================
def fail(message):
    """The user's mistake: one line, exit code 2. All ranks fail alike and rank 0 speaks."""
    say("error:", textwrap.shorten(message, 600), file=sys.stderr)
    time.sleep(5 if rank() else 0)           # torchrun ends all when one ends: rank 0 speaks first
    raise SystemExit(2)


def parse(Config, argv=None):
    """Command line -> Config; --help prints the script's first lines and its Config."""
    argv = read_flags(argv or sys.argv[1:])
    if "--help" in argv:
        flags = re.sub(r"(?m)^    (\w+): ", r"    --\1 ", inspect.getsource(Config))
        print(inspect.getmodule(Config).__doc__, flags)
        raise SystemExit(0)
    parser = HfArgumentParser(Config, allow_abbrev=False, add_help=False)
    parser.error = fail
    cfg = parser.parse_args(argv, namespace=Config())    # writes the flags into it
    if not (cfg.cutoff or 0) >= 0:                       # not "< 0": NaN fails, too
        fail(f"--cutoff {cfg.cutoff}: entropies are 0 or more")
    return cfg


def read_flags(words, folder=""):
    """@file is replaced by the flags in it; an @other in there is sought in the same folder. Of two
    equal flags the later counts."""
    flags = []
    for word in words:
        path = Path(folder, word[1:])
        if not word.startswith("@"):
            flags.append(word)
        elif path.exists():
            flags += read_flags(shlex.split(path.read_text(), comments=True), path.parent)
        else:
            fail(f"{word}: no such file of flags")
    return flags


def warn_of_world_values(cfg):
    """With another model, name the flags that are still as in the embedded world, though the paper
    has another value. That is read from Config's source, out of comments like "(paper: 1024)"."""
    Config = type(cfg)
    papers = re.findall(r"(\w+): .*\(paper: (.+)\)", inspect.getsource(Config))
    made = [f"--{name} ({value})" for name, value in papers
            if getattr(cfg, name) == getattr(Config, name)]
    if made and cfg.model != Config.model:
        say("note: made for the embedded world (in brackets the paper's):", *made)


# -- Plumbing. One GPU or many: the same code on 1 and N ranks -------------------------------------
def setup():
    """Join the process group (a group of one without torchrun) and pick this rank's device."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", dist.get_node_local_rank(0))
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
        # cuDNN's attention plans each new shape anew, and left-padded rows have come out as NaN
        torch.backends.cuda.enable_cudnn_sdp(False)
    # In every forward pass transformers checks whether a row holds several packed sequences, and
    # for that the CPU waits for the GPU. Our rows never do.
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    elif not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def rank():
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def say(*args, file=None):
    if rank() == 0:
        print(*args, file=file, flush=True)


def set_precision(name, device):
    """--dtype -> the torch dtype to compute in. With bf16 the fp32 logits may use TF32: it keeps 11
    significant bits of a number, bf16 has 8, so nothing is lost."""
    bf16 = name == "bf16" or name == "auto" and device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = bf16
    return torch.bfloat16 if bf16 else torch.float32


def from_hub(auto_class, path, **settings):
    """auto_class.from_pretrained(path): a folder or a hub id. A model's own code never runs."""
    try:
        return auto_class.from_pretrained(path, trust_remote_code=False, **settings)
    except Exception as error:
        fail(f"{path}: no model there (the embedded world's is written by: python "
             f"data/reviews/prepare.py), or {auto_class.__name__} cannot read it: {error}")


def read_config(path, **settings):
    """A checkpoint's config, without dropout and its like: reading a row twice must agree."""
    config = from_hub(AutoConfig, path, **settings)
    for name in config.to_dict():
        if re.search("dropout|pdrop|jitter|layerdrop", name):
            setattr(config, name, 0.0)
    return config


def context_of(path):
    """The tokens that a model takes. Beyond its original context, longrope changes the positions of
    a whole batch by its longest row: a row's numbers would depend on its neighbours."""
    config = read_config(path).get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return config.max_position_embeddings


def check_context(path, max_tokens, max_prompt_tokens):
    if not max_prompt_tokens < max_tokens <= context_of(path):
        fail(f"--max_prompt_tokens must be below {max_tokens} (prompt and response together), and "
             f"that not beyond the context of {path}, {context_of(path)}")


def load_model(path, wrap, device, dtype, train=False, grad_checkpoint=False, head_std=None):
    """A Hugging Face checkpoint as a model whose weights are sharded over the ranks (FSDP2).
    wrap: LanguageModel or train_rm.ScalarModel. Every rank reads the whole file into host memory,
    safetensors alone, in its own precision; fully_shard keeps the rank's share of a layer and moves
    it to the device. train: fp32 master weights, computing in dtype, gradients reduced in fp32;
    else frozen, in dtype. head_std: draw the scalar head anew, with this standard deviation."""
    hf, info = from_hub(wrap.auto_class, path, config=read_config(path, **wrap.settings),
                        dtype="auto", use_safetensors=True, output_loading_info=True)
    missing = info["missing_keys"]
    if head_std is not None:                             # (1, d), the same on every rank
        nn.init.normal_(hf.score.weight, std=head_std, generator=torch.Generator().manual_seed(0))
        missing = missing - {"score.weight"}
    if missing or not hasattr(hf.base_model, "layers"):
        fail(f"{path}: not supported: no plain stack of layers, or weights are missing: {missing}")
    model = wrap(hf)
    model.check(path)
    if hf.config.hidden_size < 256 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)             # matrices this small lose by a second thread
    if grad_checkpoint:
        hf.gradient_checkpointing_enable({"use_reentrant": False})

    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in [*hf.base_model.layers, model]:     # the root last: embeddings, final norm, head
        # Not buffers: rotary frequencies stay in fp32. (The root's include the layers', which are
        # in this dtype already: nothing happens.)
        for p in block.parameters():
            p.data = p.data.to(torch.float32 if train else dtype)
        # Resharded even at the root: after a forward without a backward its weights would stay
        # whole, and the optimizer and checkpoints would find plain tensors instead of shards.
        fully_shard(block, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    # train(), for gradient checkpointing needs it; nothing else differs, as dropout is 0
    return model.train().requires_grad_(train)


def pad(rows, device):
    """[(prompt ids, response ids)] -> ids (B, T), prompt lengths (B,), response lengths (B,). The
    lengths are arrays on the CPU: to look at them never waits for a GPU."""
    whole = [torch.from_numpy(np.concatenate(row)).long() for row in rows]
    ids = pad_sequence(whole, batch_first=True)                                          # (B, T)
    prompt_lens, response_lens = np.array([(len(p), len(r)) for p, r in rows]).T
    return ids.to(device, non_blocking=True), prompt_lens, response_lens


def row_lengths(rows):
    """Tokens of prompt and response together, (B,)"""
    return np.array([len(p) + len(r) for p, r in rows])


def response_mask(rows, stops, device):
    """bool (B, R), True on the tokens of each response, and bool (B,), does a stop token end it?"""
    ones = [torch.ones(len(r)) for _, r in rows]
    finished = torch.tensor([r[-1] in stops for _, r in rows])                           # (B,)
    mask = pad_sequence(ones, batch_first=True).bool()                                   # (B, R)
    return mask.to(device, non_blocking=True), finished.to(device, non_blocking=True)


def cut_rows(rows, entropy, tokenizer, stops, cutoff, granularity):
    """The segment ends of rows, bool (B, R): the one place where trainers, judges and this script
    cut. To cut in another way, by the tokens' texts say, add a branch here (so it is given the
    tokenizer) and a word to Granularity. If it needs entropies and a cutoff, see where
    `granularity == "segment"` asks for them: for the other words entropies are 0 in chapters 2, 4.
    """
    mask, finished = response_mask(rows, stops, entropy.device)                # (B, R), (B,)
    return segment_ends(entropy, mask, finished, cutoff, granularity)


def micro_batches(lengths, size):
    """This rank's share of the rows, longest first, at most `size` at a time: index arrays. Rows
    are dealt to the ranks in turn: all run equally many forwards, if the ranks divide the rows.
    >>> _ = setup()
    >>> micro_batches([5, 9, 2, 8], size=3)
    [array([1, 3, 0]), array([2])]
    """
    longest_first = np.argsort(np.negative(lengths), kind="stable")
    mine = longest_first[rank()::dist.get_world_size()]
    return [mine[k:k + size] for k in range(0, len(mine), size)]


@torch.no_grad()
def map_rows(model, rows, size, device, batches=None):
    """What a model gives for all rows, on the CPU of every rank: (B, R) of a ScalarModel, (2, B, R)
    of a LanguageModel. batches: this rank's; by default micro_batches of `size` rows."""
    filled = rows + rows[-1:] * (-len(rows) % dist.get_world_size())     # a multiple of the ranks
    batches = batches or micro_batches(row_lengths(filled), size)
    R = max(len(r) for _, r in rows)
    parts = []
    for batch in batches:
        part = model(*pad([filled[i] for i in batch], device))                   # (..., b, r)
        parts.append(F.pad(part, (0, R - part.shape[-1])))                       # (..., b, R)
    mine = torch.cat(parts, -2).cpu()            # only here the CPU waits for the GPU
    results = mine.new_zeros(*mine.shape[:-2], len(filled), R)                   # (..., B, R)
    results[..., np.concatenate(batches), :] = mine
    dist.all_reduce(results)
    return results[..., :len(rows), :]


# -- Plumbing. Data: preferences and prompts as message lists, read by the datasets package --------
def read_rows(source, limit=0):
    """A hub id or a .json(l)(.gz), .csv or .parquet file, or a part: "pairs.jsonl:train[98%:]"."""
    import datasets                                              # here, because it takes a second
    datasets.disable_progress_bars()
    name, _, part = source.partition(":")
    kind = name
    files = None
    if os.path.isfile(name):
        ending = Path(name.removesuffix(".gz")).suffix
        kind = {".csv": "csv", ".parquet": "parquet"}.get(ending, "json")
        files = glob.escape(name)            # datasets takes pairs[1].jsonl for a pattern
    # What looks like a file is not sought on the hub, where names are owner/name: ./x, x.json,
    # "my x", a/b/c
    elif not os.path.isdir(name) and re.search(r"^[./~]|\.[A-Za-z]\w*$|\s|/.*/", name):
        fail(f"{name}: no such file")
    try:
        data = datasets.load_dataset(kind, data_files=files, split=part or "train")
    except Exception as error:
        fail(f"{source}: cannot be read as a data set ({error.__cause__ or error})")
    return data.select(range(len(data))[:limit or None])


# What an answer may depend on, or contain, besides the messages' texts: refused, not dropped
CONTEXT_COLUMNS = ("system", "system_prompt", "input", "context", "history", "tools", "documents",
                   "images")
CONTEXT_KEYS = ("tool_calls", "reasoning_content", "reasoning", "thinking")


def messages_of(value, role):
    """Text or a message list -> a message list."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    for message in value:
        assert isinstance(message["content"], str), "a message's content must be text"
        lost = [name for name in CONTEXT_KEYS if message.get(name)]
        assert not lost, f"a message's {lost} would be lost"
    return [{"role": message["role"], "content": message["content"]} for message in value]


def conversation(row, side, where):
    """The prompt messages and the response text of a row's side: chosen, rejected, or none."""
    try:
        lost = [name for name in CONTEXT_COLUMNS if row.get(name)]
        assert not lost, f"the columns {lost} would be lost: make them part of the prompt"
        prompt = messages_of(row.get("prompt") or row.get("instruction") or [], "user")
        chat = messages_of(row[side] if side else "", "assistant")       # none: an empty answer
        # the side may repeat the prompt, or its end
        while len(chat) > 1 and chat[0] in prompt:
            del chat[0]
        assert chat[0]["role"] == "assistant" or not prompt, "it holds other turns than its prompt"
        *prompt, answer = prompt + chat
        assert prompt, "no prompt: give message lists, or a column prompt"
        roles = prompt[-1]["role"], answer["role"]
        assert roles[0] != "assistant" and roles[1] == "assistant", "a prompt, then one answer"
    except Exception as error:
        fail(f"{where} cannot be used: {error!r}; its columns: {', '.join(row)}")
    return prompt, answer["content"]


def load_pairs(source, limit=0):
    """[(prompt messages, chosen text, rejected text, "SOURCE row n")] of pairs that can teach."""
    rows = read_rows(source, limit)
    pairs = []
    for n, row in enumerate(rows, 1):
        where = f"{source} row {n}"
        prompt, chosen = conversation(row, "chosen", where)
        other_prompt, rejected = conversation(row, "rejected", where)
        useful = chosen.strip() and rejected.strip() and chosen != rejected
        if useful and prompt == other_prompt:
            pairs.append((prompt, chosen, rejected, where))
    if len(pairs) < len(rows):
        say(f"{source}: dropped {len(rows) - len(pairs)} pairs: a response is empty or equals the "
            "other, or the prompts differ")
    return pairs or fail(f"{source}: no pair is left")


def load_prompts(source, limit=0):
    """[prompt messages] from a column prompt, instruction, or the chosen side of preferences."""
    prompts = []
    for n, row in enumerate(read_rows(source, limit), 1):
        side = "chosen" if "chosen" in row else ""
        prompts.append(conversation(row, side, f"{source} row {n}")[0])
    return prompts


def prompt_text(messages):
    """What people, judges and gold functions read: the user's text, or all turns with roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


# -- Plumbing. Chat encoding: the tokenizer's own template -----------------------------------------
def load_tokenizer(path):
    """The tokenizer and its stop tokens, (n,): its own EOS, and generation_config's or config's."""
    config = read_config(path)
    tokenizer = from_hub(AutoTokenizer, path)
    eos = config.eos_token_id
    try:
        eos = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        pass                                                     # it has no such file
    stops = torch.tensor(sorted({tokenizer.eos_token_id, *np.ravel(eos).tolist()} - {None}))
    # A special token may have no embedding: Gemma 3's tokenizer has one for pictures
    used = np.setdiff1d(list(tokenizer.get_vocab().values()), never_sampled(tokenizer, stops))
    if not len(stops) or max(used) >= config.get_text_config().vocab_size:
        fail(f"{path}: more tokens than embeddings, or no eos_token_id in generation_config.json")
    return tokenizer, stops


def never_sampled(tokenizer, stops):
    """Ids (n,) of the special tokens that stop nothing: templates write them, policies never do."""
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    return np.setdiff1d(special, stops)


def render(tokenizer, messages, **kwargs):
    """Messages -> text by the chat template, on one date: tokens must not change overnight."""
    return tokenizer.apply_chat_template(messages, tokenize=False, date_string="26 Jul 2024",
                                         **kwargs)


def tokenize(tokenizer, texts):
    """[text] -> [int32 ids], many at a time: the tokenizer shares them among the CPU's cores."""
    encoded = []
    size = 50_000
    for first in range(0, len(texts), size):
        if first:
            say(f"{first} of {len(texts)} texts are tokenised")
        batch = tokenizer(texts[first:first + size], add_special_tokens=False)
        encoded += [np.array(ids, dtype=np.int32) for ids in batch["input_ids"]]
    return encoded


def cut_prompts(prompts, limit, source):
    """[ids] -> each prompt's first token (BOS) and its last limit - 1. Prints how many were cut."""
    long = sum(len(ids) > limit for ids in prompts)
    if long:
        say(f"{source}: {long} of {len(prompts)} prompts were cut to {limit} tokens")
    return [np.delete(ids, range(1, 1 + len(ids) - limit)) for ids in prompts]


def encode_prompts(tokenizer, prompts, max_tokens, source):
    """[messages] -> [int32 ids], cut to max_tokens."""
    texts = [render(tokenizer, prompt, add_generation_prompt=True) for prompt in prompts]
    return cut_prompts(tokenize(tokenizer, texts), max_tokens, source)


def encode_chats(tokenizer, stops, chats, max_tokens, max_prompt_tokens):
    """[(prompt messages, [response texts], where)] -> [(prompt ids, response ids)], int32, a row
    for each response; `where` names the chat in error messages.
    A response is what the full conversation adds to the prompt rendered with its generation prompt,
    up to its first stop token, which belongs to it. A prompt is cut to max_prompt_tokens, a
    response to what is left of max_tokens: then it is not finished."""
    prompt_texts = [render(tokenizer, prompt, add_generation_prompt=True) for prompt, *_ in chats]
    prompt_ids = tokenize(tokenizer, prompt_texts)
    cut_ids = cut_prompts(prompt_ids, max_prompt_tokens, "chats")
    texts = []                               # (number of the chat, response, whole conversation)
    for i, (prompt, responses, _) in enumerate(chats):
        for response in responses:
            answer = {"role": "assistant", "content": response}
            texts.append((i, response, render(tokenizer, [*prompt, answer])))
    whole_ids = tokenize(tokenizer, [text for *_, text in texts])
    never = never_sampled(tokenizer, stops)
    rows = []
    endless = cut = changed = 0
    for (i, response, text), ids in zip(texts, whole_ids):
        p = prompt_ids[i]
        r = ids[len(p):]
        if not np.array_equal(ids[:len(p)], p):                  # a merge crosses the border
            [r] = tokenize(tokenizer, [text[len(prompt_texts[i]):]])
        stop = np.flatnonzero(np.isin(r, stops))
        if len(stop):
            r = r[:stop[0] + 1]
        else:
            endless += 1
        # The first token that the policy never samples ("": there is none). A person may have typed
        # it; what the template puts into an answer is refused.
        unsampled = tokenizer.decode(r[np.isin(r, never)][:1])
        by_template = unsampled not in response                  # "" is in every text
        *_, where = chats[i]
        if by_template or not text.startswith(prompt_texts[i]):
            fail(f"{where}: the chat template does not continue its own generation prompt, or puts "
                 f"into the answer what the policy never samples: {unsampled} (if it ends a turn: "
                 "make it an eos_token_id in generation_config.json)")
        room = max_tokens - len(cut_ids[i])
        cut += len(r) > room
        changed += response.strip() not in text                  # some drop what stands in <think>
        rows.append((cut_ids[i], r[:room]))
    if cut or changed:
        say(f"chats: of {len(rows)} responses {cut} were cut, for prompt and response together are "
            f"at most {max_tokens} tokens, and {changed} were changed by the chat template")
    if endless > len(rows) / 2:
        fail(f"{endless} of {len(rows)} responses hold no stop token: the template's end-of-turn "
             "token must be an eos_token_id of generation_config.json")
    return rows


def answer_text(tokenizer, stops, ids):
    """A response's text, without its stop token."""
    content = ids[:-1] if ids[-1] in stops else ids
    return tokenizer.decode(content, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def segment_texts(tokenizer, ids, ends):
    """The text of each segment, and of what follows the last one; they join to the whole. Prefixes
    are decoded: a token that is decoded alone loses its space, or is half of a character."""
    texts = []
    for cut in np.union1d(np.flatnonzero(ends) + 1, len(ids)):
        prefix = tokenizer.decode(ids[:cut], clean_up_tokenization_spaces=False)
        if cut < len(ids):
            prefix = prefix.rstrip("\ufffd")             # half a character: it comes with its end
        before = "".join(texts)
        texts.append(prefix[len(before):])
    return texts


# == The script: look at segments, choose a cutoff =================================================
def main(cfg):
    device = setup()
    dtype = set_precision(cfg.dtype, device)
    tokenizer, stops = load_tokenizer(cfg.model)
    check_context(cfg.model, cfg.max_tokens, cfg.max_prompt_tokens)
    warn_of_world_values(cfg)
    chats = [(prompt, [chosen], where)
             for prompt, chosen, _, where in load_pairs(cfg.data, cfg.max_samples)]
    rows = encode_chats(tokenizer, stops, chats, cfg.max_tokens, cfg.max_prompt_tokens)
    model = load_model(cfg.model, LanguageModel, device, dtype)
    _, entropy = map_rows(model, rows, cfg.micro_batch_size, device)                     # (B, R)

    ends = cut_rows(rows, entropy, tokenizer, stops, cfg.cutoff, cfg.granularity)        # (B, R)
    for (prompt, *_), (_, response), row_ends in zip(chats, rows[:3], ends):
        texts = segment_texts(tokenizer, response, row_ends)
        say(f"\nuser: {prompt_text(prompt)}\n{' | '.join(texts)}")

    tokens = cut_rows(rows, entropy, tokenizer, stops, 0.0, "token").sum()
    say("\ncutoff  segments per response  tokens per segment")
    for cutoff in np.arange(0.25, 8.25, 0.25):
        n = cut_rows(rows, entropy, tokenizer, stops, cutoff, "segment").sum()
        say(f"{cutoff:6.2f}  {n / len(rows):21.2f}  {tokens / n:18.2f}")


if __name__ == "__main__":
    main(parse(Config))
    dist.destroy_process_group()
