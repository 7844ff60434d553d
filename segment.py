"""Chapter 1 of 4: cut a response into segments where the language model is surprised.

    python segment.py                                  # the embedded world: coloured segments, cutoff table
    python segment.py --model MODEL --data PREFERENCES # your chat model on your data
    python segment.py --target_length 20               # which cutoff gives segments of 20 tokens?
    python segment.py --text "..." --reward_model out/rm/model       # your own text, each segment scored
    torchrun --nproc_per_node=8 segment.py --model meta-llama/Llama-3.1-8B-Instruct ...

The idea (arXiv 2501.02790, section 2.2): a token is too small to deserve a reward of its own and a whole
response is too large. Inside a phrase the next token is nearly certain; where a new thought starts it is wide
open. So the entropy of the SFT model's next-token distribution marks where segments end.

Legend of all four chapters: B batch, P prompt, R response, T = P + R, V vocabulary, d hidden size, N any number
of tokens. Every (B, R) tensor is indexed by the response token it belongs to, padding on the right.
For response token r at position P + r of the sequence [prompt | response | pad]:
    its segment end, its scalar reward and the entropy *after* it are read at P + r,
    its log-probability and its critic value at P + r - 1 (where the model decided on it).

Below the double ruler is the plumbing that every chapter shares: errors, several GPUs, data, chat encoding.
Deviations from the authors' code: one vectorised segmentation instead of three loops over `.item()`; lengths are
integers and never searched for by a pad or EOS id; special tokens typed in a message stay ordinary text.
"""
import gzip
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import islice
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          GenerationConfig, HfArgumentParser, logging as hf_logging)

WORLD = os.path.relpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "reviews"))
Granularity = Literal["segment", "token", "bandit"]
THREADS = torch.get_num_threads()                               # torch's own choice: the machine's cores


def opt(default, help):
    return field(default=default, metadata={"help": help.replace("%", "%%")})


@dataclass
class Config:
    model: str = opt(f"{WORLD}/sft", "the SFT chat model: a folder or a hub id")
    data: str = opt(f"{WORLD}/pairs_test.jsonl", "preferences: hub id (or name:split), .json(l)(.gz), .parquet, folder")
    cutoff: float = opt(1.0, "nats; a segment ends where the entropy after a token is above it (paper: 1.75-2.0)")
    granularity: Granularity = opt("segment", "what to show")
    target_length: float = opt(0.0, "also print the cutoff that gives segments of this many tokens")
    text: str = opt("", "show this response instead of those of --data")
    prompt: str = opt("Write a review of the phone.", "the user's message that --text answers")
    reward_model: str = opt("", "score each segment with this reward model (a train_rm.py output)")
    show: int = opt(3, "responses to print")
    max_samples: int = opt(200, "chosen responses to take the cutoff table from")
    max_tokens: int = opt(2048, "prompt + response at most; the context of the model if that is shorter")
    micro_tokens: int = opt(16384, "tokens in one forward pass, padding included")
    dtype: Literal["auto", "bf16", "fp32"] = opt("auto", "bf16 on CUDA, fp32 on CPU")
    seed: int = opt(0, "unused here; every script has it")


# ------------------------------------------------------------------------------------------------------------
# The method. 1. entropy: how open is the next token?
# ------------------------------------------------------------------------------------------------------------
def token_logprobs_and_entropy(hidden, head_weight, targets, chunk=None):
    """log p(target) and the entropy (nats) of softmax(hidden @ head_weight.T), without ever building (N, V).

    hidden: (N, d); head_weight: (V, d); targets: int (N,); chunk: rows of logits alive at once (default: about
    128 MB of them). Returns logp (N,), entropy (N,) in fp32: bf16 logits would bias the entropy. Differentiable;
    the backward pass computes each chunk again instead of keeping it. Equation (1) of the paper.
    """
    chunk = chunk or max(16, 2 ** 25 // head_weight.shape[0])
    weight = head_weight.float()

    def one_chunk(h, w, t):
        logp = (h.float() @ w.T).log_softmax(-1)                          # (chunk, V)
        return logp.gather(-1, t[:, None])[:, 0], -(logp.exp() * logp).sum(-1)          # log p(t), H = -sum p log p

    parts = [checkpoint(one_chunk, h, weight, t, use_reentrant=False, preserve_rng_state=False)
             for h, t in zip(hidden.split(chunk), targets.split(chunk))]
    return tuple(torch.cat(x) for x in zip(*parts))


# ------------------------------------------------------------------------------------------------------------
# The method. 2. segments: where do they end, where do they lie, what is a response's score?
# ------------------------------------------------------------------------------------------------------------
def segment_ends(entropy, mask, finished, cutoff, granularity):
    """Which response tokens end a segment (paper section 2.2).

    entropy: (B, R) nats, of the token *after* each response token; mask: bool (B, R), True on the response's
    tokens, end-of-turn token included; finished: bool (B,), the last token is an end-of-turn token. Returns bool
    (B, R). segment: ends where entropy > cutoff and at the last content token; token: every content token is one;
    bandit: one, at the last token. The end-of-turn token belongs to no segment, unless it is all there is.

    >>> h = torch.tensor([[0.1, 2.5, 0.1, 0.3, 9.0]])       # five tokens, the last is the end-of-turn token
    >>> segment_ends(h, h > 0, torch.tensor([True]), cutoff=2.0, granularity="segment").int()
    tensor([[0, 1, 0, 1, 0]], dtype=torch.int32)
    """
    length = mask.sum(1)                                                  # (B,)
    content = torch.where(finished & (length > 1), length - 1, length)    # (B,) tokens without end-of-turn
    r = torch.arange(mask.shape[1], device=mask.device)                   # (R,)
    if granularity == "token":
        return r < content[:, None]
    if granularity == "bandit":
        return r == length[:, None] - 1
    if granularity == "segment":
        return (entropy > cutoff) & (r < content[:, None]) | (r == content[:, None] - 1)
    raise ValueError(f"granularity {granularity!r}: one of segment, token, bandit")


def segment_locations(ends):
    """Relative location p = i/n of the i-th of n segments, written at its last token (paper section 2.3).

    ends: bool (B, R). Returns float (B, R), 0 where no segment ends.

    >>> segment_locations(torch.tensor([[False, True, False, True]]))
    tensor([[0.0000, 0.5000, 0.0000, 1.0000]])
    """
    count = ends.sum(1, keepdim=True).clamp(min=1)                        # (B, 1)
    return torch.where(ends, ends.cumsum(1) / count, 0.0)


def sequence_score(values, ends):
    """A response's score: the mean of its segments' rewards (paper equation 2). values, ends: (B, R) -> (B,)"""
    return torch.where(ends, values, 0.0).sum(1) / ends.sum(1).clamp(min=1)


# ------------------------------------------------------------------------------------------------------------
# The language model: per response token its log-probability and the entropies around it
# ------------------------------------------------------------------------------------------------------------
class LanguageModel(nn.Module):
    """A causal LM that answers what PPO asks: log pi(token), entropy before and after each response token."""
    auto_class, settings = AutoModelForCausalLM, {}

    def __init__(self, hf):
        super().__init__()
        self.hf = hf

    @torch.no_grad()
    def check(self, path):
        """Logits must be hidden @ weight.T and nothing more (no bias, scale or soft-capping), as computed below."""
        ids = torch.arange(4)[None] % self.hf.config.vocab_size
        plain = self.hf.base_model(input_ids=ids).last_hidden_state @ self.hf.get_output_embeddings().weight.T
        if not plain.isfinite().all():
            fail(f"{path}: its logits are not finite; the weights are broken")
        if not torch.allclose(self.hf(input_ids=ids).logits, plain, atol=5e-2, rtol=1e-2):
            fail(f"{path}: the language-model head is more than a matrix (bias, scale or soft-capping): not supported")

    def forward(self, ids, prompt_lens, response_lens):
        """ids: (B, T) right-padded; lens: (B,). Returns logp, entropy_before, entropy_after: (B, R), 0 on padding.
        No attention mask: causal attention never looks at what stands to the right."""
        hidden = self.hf.base_model(input_ids=ids, use_cache=False).last_hidden_state          # (B, T, d)
        t, first = torch.arange(ids.shape[1], device=ids.device), prompt_lens[:, None] - 1     # (T,), (B, 1)
        read = (t >= first) & (t <= first + response_lens[:, None])                            # (B, T), R + 1 in a row:
        logp, entropy = token_logprobs_and_entropy(                        # from P - 1, where token 0 was decided on
            hidden[read], self.hf.get_output_embeddings().weight, ids.roll(-1, 1)[read])       # (N,), (N,)
        r = torch.arange(int(response_lens.max()) + 1, device=ids.device)                      # (R+1,)
        grid = torch.zeros(2, len(ids), len(r), device=ids.device)
        logp, entropy = grid.masked_scatter(r <= response_lens[:, None], torch.cat([logp, entropy]))     # (B, R+1) each
        mask = r[:-1] < response_lens[:, None]                                                 # (B, R)
        return logp[:, :-1] * mask, entropy[:, :-1] * mask, entropy[:, 1:] * mask


# ============================================================================================================
# Plumbing. Errors and configuration
# ============================================================================================================
def fail(message, alone=False):
    """The user's mistake: one line, exit code 2, no traceback. Rank 0 speaks for all, unless this one is alone with its
    trouble."""
    if alone or rank() == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


AT_LEAST_1 = ("micro_tokens batch_size rollout_batch_size generation_batch_size max_tokens epochs max_prompt_tokens "
              "max_new_tokens ppo_epochs save_every eval_every sample_every workers tries timeout").split()


def parse(Config, argv=None):
    """Command line -> Config. `@config/x.args` files hold flags, comments and blank lines; later flags override."""
    parser = HfArgumentParser(Config, fromfile_prefix_chars="@", allow_abbrev=False)
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    parser.error = lambda message: fail(f"{message} (--help lists the flags)")
    argv = sys.argv[1:] if argv is None else argv
    try:
        cfg, unknown = parser.parse_args_into_dataclasses(argv, look_for_args_file=False, return_remaining_strings=True)
    except (ValueError, RecursionError) as e:                   # an open quote, no text, a file that includes itself
        fail(f"{' '.join(a for a in argv if a[:1] == '@')}: cannot be read as flags ({one_line(e)})")
    if unknown:
        fail(f"unknown flag or argument: {unknown[0]} (--help lists the flags)")
    for name, value in asdict(cfg).items():
        low = 1 if name in AT_LEAST_1 else -2 ** 63 if name.endswith("_reward") else 0
        if isinstance(value, (int, float)) and not low <= value < 2 ** 63:
            fail(f"--{name} {value}: must be a finite number, at least {low} and below 2^63")
    return cfg


def start(main, Config):
    """Run a chapter's main on the command line; what the machine refuses is said in one line too."""
    try:
        main(parse(Config))
    except KeyboardInterrupt:
        raise SystemExit(130)
    except torch.OutOfMemoryError:
        fail(f"rank {rank()}: out of GPU memory; lower --micro_tokens, then --generation_batch_size, or set "
             "--grad_checkpoint true", alone=True)
    except OSError as e:                                        # a full disk, no permission, a folder that vanished
        fail(f"{e.filename or 'writing'}: {e.strerror or one_line(e)}; what was saved before is untouched: mend this, "
             "then run the same command again (training with --resume)", alone=True)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def in_world(path):
    """Does a file or folder belong to the embedded world?"""
    return os.path.abspath(path).startswith(os.path.abspath(WORLD) + os.sep)


def prepare_world(*paths):
    """The embedded world is made on first use: a run without arguments downloads nothing."""
    if any(map(in_world, paths)) and not on_rank0(os.path.exists, f"{WORLD}/world.json"):
        on_rank0(subprocess.run, [sys.executable, f"{WORLD}/prepare.py"], check=True)


# ------------------------------------------------------------------------------------------------------------
# Plumbing. One GPU or many: the same code on 1 and N ranks, under `python` and under `torchrun`
# ------------------------------------------------------------------------------------------------------------
def setup(deterministic=False):
    """Join the process group (a group of one without torchrun) and pick this rank's device. deterministic: CUDA kernels
    that give the same bits every time, as those of the CPU do; torch warns of one that cannot."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")                # a terminal without unicode must not end a run
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group(backend, timeout=timedelta(hours=1), **alone)      # rank 0 may read or hash for long
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    if cuda:
        torch.cuda.set_device(device)
    if cuda and deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cuda.enable_mem_efficient_sdp(False)     # flash attention and the plain one have such kernels
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def use_cores(config):
    """A model worth it computes on all cores of the CPU; a small one loses more than it gains by a second thread."""
    if "OMP_NUM_THREADS" not in os.environ and config.hidden_size >= 256:
        torch.set_num_threads(THREADS)


def rank():
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def on_rank0(f, *args, **kwargs):
    """Run f on rank 0 alone and give its result to every rank; if it fails with a message, every rank ends."""
    box = [None]
    if rank() == 0:
        try:
            box = [f(*args, **kwargs)]
        except SystemExit as e:
            box = [e]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box)
    if isinstance(box[0], SystemExit):
        raise box[0]
    return box[0]


def say(*args):
    if rank() == 0:
        try:
            print(*args, flush=True)
        except BrokenPipeError:                                 # nobody listens any more (`| head`): the run goes on
            sys.stdout = open(os.devnull, "w")


def compute_dtype(name, device):
    """--dtype -> torch dtype; with bf16, fp32 products on the GPU may use TF32 too."""
    dtype = torch.bfloat16 if name == "bf16" or name == "auto" and device.type == "cuda" else torch.float32
    torch.backends.cuda.matmul.allow_tf32 = dtype is torch.bfloat16     # exact products of bf16 values, for fp32 logits
    return dtype


def load_model(path, wrap, device, dtype, train=False, grad_checkpoint=False, head_std=None, seed=0):
    """A Hugging Face checkpoint as a sharded model: every rank holds 1/N of it (FSDP2), no rank the whole.

    wrap: LanguageModel or train_rm.ScalarModel. Rank 0 reads the file on the CPU and broadcasts tensor by tensor.
    train: fp32 master weights, computed in dtype with fp32 gradient reduction; else weights in dtype without
    gradients. head_std: where the checkpoint has no scalar head, draw one with this standard deviation.
    """
    config, kind = read_config(path, **wrap.settings), wrap.auto_class
    if device.type == "cpu" and dtype is torch.bfloat16 and config.max_position_embeddings <= 512:
        config._attn_implementation = "eager"                   # at 128 tokens the fused one takes twice the time
    use_cores(config)
    stored = torch.float32 if train else dtype
    full = None
    if rank() == 0:
        full = wrap(read_weights(kind, path, config, stored, head_std, seed))
        full.check(path)
    with torch.device("meta"):
        model = wrap(kind.from_config(config, dtype=stored))
    if grad_checkpoint:
        model.hf.gradient_checkpointing_enable({"use_reentrant": False})
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if train else MixedPrecisionPolicy()
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in [*layers, model]:                              # the root last: embeddings, final norm and head
        fully_shard(block, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, full.state_dict() if full else {}, options=options)
    for name, buffer in model.named_buffers():                  # rotary frequencies: in no file, garbage until now
        if full:
            buffer.copy_(full.get_buffer(name))
        dist.broadcast(buffer, 0)
    return model.train().requires_grad_(train)                  # train(): gradient checkpointing only runs there


def read_weights(kind, path, config, dtype, head_std=None, seed=0):
    """A whole Hugging Face model on the CPU, from safetensors alone; head_std as in load_model."""
    try:
        hf, info = kind.from_pretrained(path, config=config, dtype=dtype, use_safetensors=True,
                                        trust_remote_code=False, output_loading_info=True)
    except Exception as e:                                      # truncated or foreign weights, not our bug
        fail(f"{path}: the weights cannot be read ({one_line(e)})")
    missing = set(info["missing_keys"])
    if head_std is not None and "score.weight" in missing:
        nn.init.normal_(hf.score.weight, std=head_std, generator=torch.Generator().manual_seed(seed))
        missing.remove("score.weight")
    if missing:
        fail(f"{path}: weights are missing from the checkpoint, among them {sorted(missing)[0]}")
    return hf


def read_config(path, **settings):
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **settings)
    except Exception as e:
        fail(f"{path}: no model there ({one_line(e)}); give a folder with config.json or a hub id")
    for name, value in config.to_dict().items():
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float):
            setattr(config, name, 0.0)                          # a noisy ratio or reward is no ratio or reward
    return config


def read_tokenizer(path):
    read_config(path)                                           # says it best if there is no model at all
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as e:
        fail(f"{path}: no tokenizer there ({one_line(e)})")


def one_line(e):
    return " ".join(str(e).split())[:200] or type(e).__name__


def micro_batches(lengths, budget, ranks=1):
    """Cut rows into micro-batches of at most `budget` tokens with padding, longest first, in a multiple of `ranks`.

    Sorted rows waste little padding; every rank must run the same number of forwards, or FSDP would wait for ever.

    >>> micro_batches([5, 9, 2, 8], budget=18)
    [[1, 3], [0, 2]]
    """
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    while len(batches) % ranks:                                 # split the largest; if no row is left to give,
        big = max(batches, key=lambda b: len(b) > 1 and lengths[b[0]] * len(b))    # an empty one (a dummy forward)
        batches.append([big.pop() for _ in range(len(big) // 2)][::-1])
    return batches


def pad(rows, device):
    """[(prompt ids, response ids)] -> ids (B, T), prompt lengths (B,), response lengths (B,)"""
    ids = pad_sequence([torch.from_numpy(np.concatenate(row)) for row in rows], batch_first=True)       # (B, T)
    p, r = torch.tensor([[len(p), len(r)] for p, r in rows]).T
    return ids.long().to(device), p.to(device), r.to(device)


@torch.no_grad()
def map_rows(model, rows, budget, device, title=None):
    """model(ids, prompt_lens, response_lens) -> k tensors (b, r), over all rows: (k, B, R) on every rank.

    The micro-batches are dealt to the ranks; each row is computed once and the sum over ranks puts them together.
    """
    lengths = [len(p) + len(r) for p, r in rows]
    shortest = min(range(len(rows)), key=lengths.__getitem__)
    out = None
    mine = micro_batches(lengths, budget, dist.get_world_size())[rank()::dist.get_world_size()]
    for batch in tqdm(mine, title, disable=True if title is None or rank() else None, leave=False):
        result = torch.stack(model(*pad([rows[i] for i in batch or [shortest]], device))).float()   # (k, b, r)
        if out is None:
            out = torch.zeros(len(result), len(rows), max(len(r) for _, r in rows), device=device)
        if batch:
            out[:, torch.tensor(batch, device=device), :result.shape[2]] = result
    model.reshard()        # no backward pass follows: without this the root's weights stay whole, strangers to AdamW
    dist.all_reduce(out)
    return out


# ------------------------------------------------------------------------------------------------------------
# Plumbing. Data: preference sets and prompts as message lists, errors that name the row
# ------------------------------------------------------------------------------------------------------------
def read_rows(source, limit=0):
    """Yield (row number from 1, dict) of a hub id (name or name:split), .json(l)(.gz), .parquet or saved folder."""
    n = 0
    for n, row in enumerate(islice(_rows(source), limit or None), 1):
        if not isinstance(row, dict):
            fail(f"{source} row {n}: not an object with named columns")
        yield n, row
    if not n:
        fail(f"{source}: the data set is empty")


def _rows(source):
    known = re.search(r"\.(jsonl?(\.gz)?|parquet)$", source)
    if not os.path.exists(source) and (known or source[:1] in "./~"):
        fail(f"{source}: no such file")
    if os.path.isfile(source) and not known:
        fail(f"{source}: its name must end in .json, .jsonl, .json.gz, .jsonl.gz or .parquet")
    if not re.search(r"\.jsonl?(\.gz)?$", source):
        try:
            import datasets                                      # only here: .json(l) must work without the package
            datasets.disable_progress_bars()
            datasets.logging.set_verbosity(50)
            if source.endswith(".parquet"):
                yield from datasets.Dataset.from_parquet(source)
            elif os.path.isdir(source):
                data = datasets.load_from_disk(source)
                yield from data["train"] if isinstance(data, dict) else data
            else:
                name, _, split = source.partition(":")
                yield from datasets.load_dataset(name, split=split or "train")
        except Exception as e:
            fail(f"{source}: cannot be read as a data set ({one_line(e)})")
        return
    line = 1
    try:
        with (gzip.open if source.endswith(".gz") else open)(source, "rt", encoding="utf-8-sig") as f:    # BOM or not
            array = f.read(1) == "["                             # one JSON array, the layout of alpaca_eval's files
            f.seek(0)
            if array:
                yield from json.load(f)                          # and no line is left
            for line, text in enumerate(f, 1):
                if text.strip():
                    yield json.loads(text)
    except json.JSONDecodeError as e:
        fail(f"{source} line {max(line, e.lineno)}: not valid JSON ({e.msg})")
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as e:   # or absurd numbers, nesting
        fail(f"{source} line {line}: cannot be read ({one_line(e)})")


def messages_of(value, where, role):
    """A string or a message list as a checked message list."""
    value = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)) or not value:
        fail(f"{where}: must be a string or a list of messages")
    for m in value:
        if not isinstance(m, dict) or not isinstance(m.get("content"), str) or not isinstance(m.get("role"), str):
            fail(f"{where}: every message needs a role and a content that are strings")
        if m["role"] not in ("system", "user", "assistant", "tool"):
            fail(f"{where}: the role {m['role']!r} is none of system, user, assistant, tool")
    return [{"role": m["role"], "content": clean(m["content"])} for m in value]


def clean(text):
    """JSON can hold half of a surrogate pair, which no tokenizer or file takes: it becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def load_pairs(source, limit=0):
    """Yield (prompt messages, chosen text, rejected text, "file row n"); pairs whose responses are equal or empty are
    dropped and counted."""
    dropped = Counter()
    for n, row in read_rows(source, limit):
        where = f"{source} row {n}"
        if row.get("chosen") is None or row.get("rejected") is None:
            fail(f"{where}: no columns chosen and rejected; it has {', '.join(map(str, row)) or 'none'}")
        sides = []
        for side in ("chosen", "rejected"):
            chat = messages_of(row[side], f"{where}, {side}", "assistant")
            if chat[0]["role"] == "assistant":                   # the response alone: its prompt is a column
                if row.get("prompt") is None:
                    fail(f"{where}: {side} holds no prompt and there is no prompt column")
                chat = messages_of(row["prompt"], f"{where}, prompt", "user") + chat
            if chat[-1]["role"] != "assistant" or len(chat) < 2:
                fail(f"{where}, {side}: must end with an assistant message that answers a prompt")
            sides.append((chat[:-1], chat[-1]["content"]))
        (prompt, chosen), (other_prompt, rejected) = sides
        if reason := ("equal responses" if chosen == rejected else "an empty response" if not chosen.strip() or
                      not rejected.strip() else "two different prompts" if prompt != other_prompt else None):
            dropped[reason] += 1
        else:
            yield prompt, chosen, rejected, where
    for reason, count in dropped.items():
        say(f"{source}: dropped {count} pairs with {reason}")


def load_prompts(source, limit=0):
    """[prompt messages] from a column prompt (string or messages), instruction, or the chosen side of preferences."""
    prompts = []
    for n, row in read_rows(source, limit):
        where = f"{source} row {n}"
        column = next((c for c in ("prompt", "instruction", "chosen") if row.get(c) is not None), None)
        if column is None:
            fail(f"{where}: no column prompt, instruction or chosen; it has {', '.join(map(str, row)) or 'none'}")
        chat = messages_of(row[column], f"{where}, {column}", "assistant" if column == "chosen" else "user")
        if column == "chosen" and chat[-1]["role"] == "assistant":
            chat = chat[:-1]
        if not chat or chat[-1]["role"] == "assistant":
            fail(f"{where}, {column}: a prompt ends before the assistant's turn")
        prompts.append(chat)
    return prompts


# ------------------------------------------------------------------------------------------------------------
# Plumbing. Chat encoding: the tokenizer's own template, prompt and response tokenised apart
# ------------------------------------------------------------------------------------------------------------
def load_tokenizer(path):
    """The tokenizer and its stop tokens: what generation_config and tokenizer call end of sequence."""
    config, tokenizer = read_config(path), read_tokenizer(path)
    if not tokenizer.chat_template:
        fail(f"{path}: no chat template; use a chat model, or set tokenizer.chat_template and save the tokenizer")
    try:
        eos = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError as e:
        if os.path.exists(f"{path}/generation_config.json"):
            fail(f"{path}/generation_config.json: cannot be read ({one_line(e)})")
        eos = config.eos_token_id
    stops = set(eos if isinstance(eos, (list, tuple)) else [eos]) | {tokenizer.eos_token_id}
    stops = sorted(i for i in stops if isinstance(i, int) and i < config.vocab_size)
    if not stops:
        fail(f"{path}: no stop token; set eos_token_id in generation_config.json to the end-of-turn token's id")
    tokenizer.embeddings = config.vocab_size                    # some tokenizers hold a pad token that the model lacks
    special = [t.content for i, t in tokenizer.added_tokens_decoder.items()
               if (t.special or i in stops) and len(t.content) > 1]
    tokenizer.typed = re.compile("|".join(map(re.escape, special)) or r"(?!)")     # what `render` defuses
    return tokenizer, torch.tensor(stops)


def render(tokenizer, messages, where, **kwargs):
    """Messages -> text by the chat template. A special token typed by a person gets an invisible character after
    its first letter, so that it stays text: it must neither end a turn nor start one."""
    def defuse(text):
        return tokenizer.typed.sub(lambda s: s[0][0] + "\u200b" + s[0][1:], text)

    messages = [{**m, "content": defuse(m["content"])} for m in messages]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except Exception as e:
        fail(f"{where}: the chat template refuses it ({one_line(e)})")


def tokenize(tokenizer, texts):
    """[texts] -> [int32 ids]; the template has put BOS and EOS where they belong"""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    rows = [np.array(x, dtype=np.int32) for x in ids]
    if (top := max((int(x.max()) for x in rows if len(x)), default=0)) >= tokenizer.embeddings:
        fail(f"token {top} ({tokenizer.convert_ids_to_tokens(top)}) is in the data, but the model has only "
             f"{tokenizer.embeddings} embeddings; resize_token_embeddings and save the model")
    return rows


def encode_prompts(tokenizer, prompts, max_tokens, source="prompts"):
    """[messages] -> [int32 ids]; a prompt over its limit loses its oldest tokens, BOS kept."""
    texts = [render(tokenizer, m, f"{source} row {n}", add_generation_prompt=True) for n, m in enumerate(prompts, 1)]
    rows = [cut_prompt(ids, max_tokens, tokenizer.bos_token_id) for ids in tokenize(tokenizer, texts)]
    if empty := [n for n, ids in enumerate(rows, 1) if not len(ids)]:
        fail(f"{source} row {empty[0]}: the prompt has no tokens, there is nothing to answer")
    return rows


def cut_prompt(ids, limit, bos):
    if len(ids) <= limit:
        return ids
    return np.concatenate([ids[:1], ids[len(ids) - limit + 1:]]) if ids[0] == bos else ids[len(ids) - limit:]


def encode_chats(tokenizer, stops, chats, max_tokens, max_prompt_tokens):
    """[(prompt messages, response text, where)] -> [(prompt ids, response ids)], int32, end-of-turn token included;
    `where` is what an error message calls the row.

    The response is what the full conversation adds to the prompt rendered with its generation prompt, up to its
    first stop token. Too long: the prompt is cut to max_prompt_tokens, then the response loses its last tokens
    and with them its end-of-turn token (it is then "not finished").
    """
    prompts, answers = [], []
    for prompt, response, where in chats:
        start = render(tokenizer, prompt, where, add_generation_prompt=True)
        whole = render(tokenizer, prompt + [{"role": "assistant", "content": response}], where)
        if not whole.startswith(start):
            fail(f"{where}: the chat template does not continue its own generation prompt")
        prompts.append(start)
        answers.append(whole[len(start):])
    rows, endless = [], 0
    for p, r, (*_, where) in zip(tokenize(tokenizer, prompts), tokenize(tokenizer, answers), chats):
        if not len(p) or not len(r):
            fail(f"{where}: the {'response' if len(p) else 'prompt'} has no tokens")
        end = np.flatnonzero(np.isin(r, stops.numpy()))
        endless += not len(end)
        r = r[:end[0] + 1] if len(end) else r
        if len(p) + len(r) > max_tokens:
            p = cut_prompt(p, max_prompt_tokens, tokenizer.bos_token_id)
        rows.append((p, r[:max_tokens - len(p)]))
    if endless > len(rows) / 2:
        fail(f"{endless} of {len(rows)} responses hold no stop token: the chat template's end-of-turn token is not "
             f"among {tokenizer.convert_ids_to_tokens(stops.tolist())}; set eos_token_id in generation_config.json")
    return rows


def is_finished(rows, stops):
    """bool (B,): does the response end with a stop token?"""
    return torch.isin(torch.tensor([int(r[-1]) for _, r in rows]), stops)


def segment_texts(tokenizer, ids, ends):
    """The text of each segment, and of what follows the last one: decoded as prefixes, so that spaces survive."""
    cuts = [0] + [int(e) + 1 for e in np.flatnonzero(ends)] + [len(ids)]
    prefix = [tokenizer.decode(ids[:c], clean_up_tokenization_spaces=False) for c in cuts]
    *pieces, rest = [b[len(a):] for a, b in zip(prefix, prefix[1:])]
    return pieces + [rest] if rest else pieces


# ------------------------------------------------------------------------------------------------------------
# The script: look at segments, choose a cutoff
# ------------------------------------------------------------------------------------------------------------
def paint(pieces, rewards=()):
    """Segments as one string: a background colour each on a terminal, bars elsewhere; rewards behind each."""
    notes = [f" [{r:+.2f}]" for r in rewards] + [""] * len(pieces)
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        return "".join(f"\033[48;5;{(24, 58, 53, 94, 60, 22)[i % 6]}m{p}\033[0m{n}"
                       for i, (p, n) in enumerate(zip(pieces, notes)))
    return " |".join(p + n for p, n in zip(pieces, notes))


def main(cfg):
    device = setup()
    prepare_world(cfg.model, cfg.data)
    tokenizer, stops = load_tokenizer(cfg.model)
    if cfg.text:
        chats = [(messages_of(cfg.prompt, "--prompt", "user"),
                  messages_of(cfg.text, "--text", "assistant")[0]["content"], "--text")]
    else:
        chats = [(prompt, chosen, where) for prompt, chosen, _, where in load_pairs(cfg.data, cfg.max_samples)]
    if not chats:
        fail(f"{cfg.data}: no pair is left")
    max_tokens = max(2, min(cfg.max_tokens, read_config(cfg.model).max_position_embeddings))
    rows = encode_chats(tokenizer, stops, chats, max_tokens, max_tokens // 2)
    model = load_model(cfg.model, LanguageModel, device, compute_dtype(cfg.dtype, device))
    entropy = map_rows(model, rows, cfg.micro_tokens, device, "entropies")[2]                    # (B, R)
    mask = torch.arange(entropy.shape[1], device=device) < torch.tensor([[len(r)] for _, r in rows], device=device)
    finished = is_finished(rows, stops).to(device)                                               # (B,)
    ends = segment_ends(entropy, mask, finished, cfg.cutoff, cfg.granularity)                    # (B, R)

    rm = None
    if cfg.reward_model:                     # Chapter 2 trains it; here its last-token scalars are only looked at
        config = read_config(cfg.reward_model, num_labels=1)
        if config.vocab_size < model.hf.config.vocab_size:
            fail(f"--reward_model {cfg.reward_model}: no reward model of the vocabulary of {cfg.model}")
        rm = read_weights(AutoModelForSequenceClassification, cfg.reward_model, config, torch.float32).to(device)
    for b, (prompt, *_) in enumerate(chats[:cfg.show]):
        (p, r), rewards = rows[b], []
        if rm:
            with torch.no_grad():
                hidden = rm.base_model(input_ids=pad(rows[b:b + 1], device)[0]).last_hidden_state    # (1, T, d)
                rewards = rm.score(hidden)[0, len(p):, 0][ends[b, :len(r)]].tolist()
        say(f"\nuser: {prompt[-1]['content'].strip()}")
        say(paint(segment_texts(tokenizer, r, ends[b].cpu()), rewards))

    # A segment ends at every high entropy plus once per response, so a target length fixes how many entropies
    # must lie above the cutoff: it is simply an order statistic.
    content = segment_ends(entropy, mask, finished, 0, "token")                                  # (B, R)
    last = segment_ends(entropy, mask, finished, math.inf, "segment")
    inner, tokens = entropy[content & ~last].sort(descending=True).values, int(content.sum())    # (N,)
    say(f"\n{len(rows)} responses, {tokens / len(rows):.1f} tokens each")
    say("cutoff  segments per response  tokens per segment")
    for cutoff in sorted({.5, .75, 1., 1.25, 1.5, 1.75, 2., 2.5, 3., cfg.cutoff}):
        n = int(segment_ends(entropy, mask, finished, cutoff, "segment").sum())
        say(f"{cutoff:6.2f}  {n / len(rows):21.2f}  {tokens / n:18.2f}")
    if cfg.target_length:
        k = round(tokens / cfg.target_length) - len(rows)                                        # ends wanted inside
        if not 0 <= k < len(inner):
            fail(f"--target_length {cfg.target_length}: with these responses 1 to {tokens / len(rows):.0f} is possible")
        cutoff = round(float(inner[k]), 6)
        n = int(segment_ends(entropy, mask, finished, cutoff, "segment").sum())
        say(f"--cutoff {cutoff} gives segments of {tokens / n:.2f} tokens")


if __name__ == "__main__":
    start(main, Config)
