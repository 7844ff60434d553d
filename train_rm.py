"""Chapter 2 of 4: a reward model that scores segments, learned from preferences between whole responses.

    python train_rm.py                                                  # the embedded world, about a minute of CPU
    torchrun --nproc_per_node=8 train_rm.py @config/llama3.1-8b-rm.args         # one node of 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_rm.py @config/...
    python train_rm.py --granularity bandit --out out/rm-bandit         # the classical reward model, for comparison
    python train_rm.py --calibrate_only --reward_model FOLDER           # statistics for a model trained elsewhere

The idea (section 2.2): a scalar head reads the backbone at every token. The scalar at a segment's last token is
the segment's reward, a response scores the mean of its segments' rewards, and Bradley-Terry pushes the chosen
response's score above the rejected one's. No segment is ever labelled.

Then (section 2.3) the normaliser: the reward of a segment depends on where it lies, so PPO subtracts and divides
by a mean and a standard deviation that are linear in log p, p = i/n the relative location, fitted on responses
that were not trained on. They are saved in reward.json beside the weights.

Deviations from the authors' code: the fit clamps p and the standard deviation (theirs turns negative at small p and
flips the reward's sign); statistics for every choice PPO may make, so that nothing is ever looked up in vain;
the total scale S (ours, see README); calibration on held-back pairs by default.
"""
import fcntl
import hashlib
import inspect
import json
import logging
import math
import os
import re
import resource
import runpy
import shutil
import signal
import time
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException         # a BaseException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, GenerationConfig

from segment import (WORLD, Granularity, LanguageModel, compute_dtype, encode_chats, fail, is_finished, load_model,
                     load_pairs, load_tokenizer, map_rows, micro_batches, on_rank0, one_line, opt, pad,
                     prepare_world, rank, read_config, say, segment_ends, segment_locations,
                     sequence_score, setup, start)

GRANULARITIES = ("segment", "token", "bandit")
INTERPOLATIONS = ("even", "repeat", "end")


@dataclass
class Config:
    # what to train on what
    model: str = opt(f"{WORLD}/sft", "the SFT model: the backbone's start and the entropies' source")
    data: str = opt(f"{WORLD}/pairs.jsonl", "preferences (paper: hendrydong/preference_700K)")
    eval_data: str = opt(f"{WORLD}/pairs_test.jsonl", "held-out preferences; '' splits them off --data")
    out: str = opt("out/rm", "output folder")
    granularity: Granularity = opt("segment", "what gets a reward: a segment (the method), token or response (bandit)")
    cutoff: float = opt(1.0, "nats; python segment.py helps to choose (paper: Phi-3 1.75, Llama-3 2.0)")
    max_samples: int = opt(0, "read at most this many pairs (0: all)")
    max_tokens: int = opt(256, "prompt + response (paper: 2048)")
    max_prompt_tokens: int = opt(128, "a prompt is cut to this when prompt + response are too long (paper: 1728)")
    # optimisation
    batch_size: int = opt(32, "pairs per step, over all GPUs (paper: 128)")
    epochs: int = opt(2, "paper: 1")
    max_steps: int = opt(0, "stop after this many steps; the learning rate falls to its end by then (0: epochs)")
    lr: float = opt(1e-3, "peak (paper: 1e-6)")
    warmup: float = opt(0.03, "share of the steps")
    clip_norm: float = opt(1.0, "gradient norm is clipped to this")
    seed: int = opt(0, "of the split, the order and the head")
    # hardware
    dtype: Literal["auto", "bf16", "fp32"] = opt("auto", "to compute in: bf16 on CUDA, fp32 on CPU (masters are fp32)")
    micro_tokens: int = opt(16384, "tokens in a GPU's forward pass, padding included; lower it when memory runs out")
    grad_checkpoint: bool = opt(False, "recompute activations in the backward pass: less memory, a third more time")
    deterministic: bool = opt(False, "CUDA: the same bits in every run, also a resumed one; slower (CPUs always do)")
    # bookkeeping
    eval_every: int = opt(50, "steps between evaluations")
    save_every: int = opt(100, "steps between checkpoints")
    resume: bool = opt(False, "continue an unfinished run")
    cache: str = opt("out/cache", "SFT entropies, shared by all runs")
    calibrate_only: bool = opt(False, "make reward.json for a trained reward model, train nothing")
    reward_model: str = opt("", "with --calibrate_only: the reward model (default: OUT/model)")
    oracle: str = opt("", "with --calibrate_only: file.py:function of (prompt, response) -> true rewards")
    wandb: str = opt("", "log to this wandb project too")


# ------------------------------------------------------------------------------------------------------------
# The model: a scalar at every token
# ------------------------------------------------------------------------------------------------------------
class ScalarModel(nn.Module):
    """Backbone and linear head d -> 1 without bias. With shift 0 it reads a reward at each response token, with
    shift -1 (the critic) a value where the model decided on that token."""
    auto_class, settings = AutoModelForSequenceClassification, {"num_labels": 1}
    shift = 0

    def __init__(self, hf):
        super().__init__()
        self.hf = hf

    def check(self, path):
        if not hasattr(self.hf, "score") or self.hf.score.bias is not None:
            fail(f"{path}: its sequence classifier has no plain head `score`: not supported")

    def forward(self, ids, prompt_lens, response_lens):
        """ids: (B, T) right-padded; lens: (B,). Returns [values (B, R)] in fp32."""
        hidden = self.hf.base_model(input_ids=ids, use_cache=False).last_hidden_state       # (B, T, d)
        values = (hidden.float() @ self.hf.score.weight.float().T)[..., 0]                  # (B, T) bf16 is too coarse
        r = torch.arange(int(response_lens.max()), device=ids.device)                       # (R,)
        where = (prompt_lens[:, None] + r + self.shift).clamp(max=ids.shape[1] - 1)         # (B, R)
        return [values.gather(1, where)]                                                    # padding: any number


def bradley_terry(scores_chosen, scores_rejected):
    """-log sigmoid(chosen - rejected), (B,) each: paper equation (3)."""
    return -F.logsigmoid(scores_chosen - scores_rejected)


# ------------------------------------------------------------------------------------------------------------
# From scalars to token rewards: location-aware normalisation, then interpolation within the segment
# ------------------------------------------------------------------------------------------------------------
@dataclass
class Normalizer:
    """mean(p) = w_mean log p + b_mean, std(p) = w_std log p + b_std (paper section 2.3). p is clamped to what was
    calibrated and std to a tenth of its value at p = 1: a linear fit goes negative at small p."""
    w_mean: float = 0.0
    b_mean: float = 0.0
    w_std: float = 0.0
    b_std: float = 1.0
    p_min: float = 1e-3
    p_max: float = 1.0

    def _log(self, p):
        return torch.as_tensor(p, dtype=torch.float32).clamp(self.p_min, self.p_max).log()

    def mean(self, p):
        return self.w_mean * self._log(p) + self.b_mean

    def std(self, p):
        return (self.w_std * self._log(p) + self.b_std).clamp(min=0.1 * self.b_std)

    def to_dict(self):
        return asdict(self)

    @classmethod
    def from_dict(cls, d):
        return cls(**d)


def huber_line(x, y, epsilon=1.35):
    """(slope, intercept) of Huber's regression, scale estimated along with the line (his proposal 2)."""
    X = np.stack([x, np.ones_like(x)], 1)                                                   # (n, 2)
    line = np.linalg.lstsq(X, y, rcond=None)[0]
    floor = 1e-9 + 1e-9 * np.abs(y).max()
    sigma = max(floor, (y - X @ line).std())
    for _ in range(500):
        error = np.abs(y - X @ line)                                                        # (n,)
        sigma = max(floor, sigma * np.sqrt(np.minimum((error / sigma) ** 2, epsilon ** 2).mean()))
        w = np.sqrt(np.minimum(1, epsilon * sigma / np.maximum(error, floor)))              # (n,) outliers count less
        line = np.linalg.lstsq(X * w[:, None], y * w, rcond=None)[0]
    return float(line[0]), float(line[1])


def fit_normalizer(locations, rewards):
    """Fit a Normalizer to segment rewards. locations: (N,) in (0, 1]; rewards: (N,). Segments are pooled by p
    rounded to 3 decimals; Huber regressions of the pools' mean and population std on log(mean p of the pool), with
    slope 0 if there is one pool alone. Raises ValueError for rewards that are not finite, do not vary, or hardly share
    a location."""
    p, y = (np.asarray(a, dtype=np.float64).ravel() for a in (locations, rewards))
    if not len(p) or not np.isfinite(y).all() or not p.min() > 0:
        raise ValueError("needs finite rewards at locations above 0")
    _, pool, count = np.unique(np.round(p, 3), return_inverse=True, return_counts=True)
    mean = np.bincount(pool, y) / count                                                     # (pools,) each
    std = np.sqrt(np.bincount(pool, (y - mean[pool]) ** 2) / count)
    log_p, several = np.log(np.bincount(pool, p) / count), count > 1                # one value has no deviation
    log_p = log_p if len(count) > 1 else log_p * 0                                  # and one location no slope
    if several.sum() < min(2, len(count)):
        raise ValueError(f"{len(p)} segments hardly share a location, their deviation cannot be fitted")
    fit = Normalizer(*huber_line(log_p, mean), *huber_line(log_p[several], std[several]),
                     p_min=float(p.min()), p_max=float(p.max()))
    if not fit.b_std > 1e-6 * (1 + abs(fit.b_mean)):
        raise ValueError("the rewards do not vary, there is nothing to divide by")
    return fit


def spread_rewards(rewards_at_ends, ends, mask, how):
    """Give every token its share of its segment's reward (paper section 2.3, "interpolation").

    rewards_at_ends (B, R): read where ends (bool) is True; mask: bool (B, R). even (the method): divided by the
    segment's length; repeat: the whole reward to each token; end: all at the last token. Returns (B, R); tokens
    behind the last end (the end-of-turn token) get 0.

    >>> ends = torch.tensor([[False, True, True, False]])
    >>> spread_rewards(torch.tensor([[0., 4., 3., 0.]]), ends, torch.ones(1, 4, dtype=bool), "even")
    tensor([[2., 2., 3., 0.]])
    """
    if how not in INTERPOLATIONS:
        raise ValueError(f"interpolation {how!r}: one of {', '.join(INTERPOLATIONS)}")
    ends = ends & mask
    rewards = torch.where(ends, rewards_at_ends, 0.0)
    if how == "end":
        return rewards
    segment = ends.cumsum(1) - ends.long()                               # (B, R) number of ends before this token
    zeros = torch.zeros_like(rewards)                                    # a sum for each segment, 0 behind the last end
    total = zeros.scatter_add(1, segment, rewards).gather(1, segment)    # (B, R) reward of the token's segment
    length = zeros.scatter_add(1, segment, torch.ones_like(rewards)).gather(1, segment)
    return total if how == "repeat" else total / length


def rewards_at_ends(values, entropy, mask, finished, cutoff, own, use):
    """What PPO rewards and where, for a reward model of granularity `own` used at granularity `use`.

    values, entropy, mask: (B, R); finished: (B,). Returns rewards (B, R), ends (B, R). used as bandit: the sequence
    score (by the model's own segments) at the last token; else: the scalars at the ends of `use`.
    """
    ends = segment_ends(entropy, mask, finished, cutoff, use)
    if use == "bandit":
        values = sequence_score(values, segment_ends(entropy, mask, finished, cutoff, own))[:, None].expand_as(values)
    return torch.where(ends, values, 0.0), ends


def normalized_token_rewards(rewards, ends, mask, normalizer, how, scale=1.0):
    """Normalise, interpolate, divide by the scale, clamp to [-10, 10]. All (B, R); returns (B, R)."""
    p = segment_locations(ends)
    normal = (rewards - normalizer.mean(p)) / normalizer.std(p)          # read at the ends alone
    return (spread_rewards(normal, ends, mask, how) / scale).clamp(-10, 10)


def calibrate(batches, cutoff, own):
    """Statistics for every choice PPO may make: {use: {normalizer: {fit..., scale: {interpolation: S}}}}.

    batches() yields (values, entropy, mask, finished). S is the standard deviation over responses of the total
    normalised reward: n segments sum to about n times a bandit's reward, which one KL coefficient cannot serve.
    """
    statistics = {}
    for use in GRANULARITIES:
        read = [(*rewards_at_ends(values, entropy, mask, finished, cutoff, own, use), mask)
                for values, entropy, mask, finished in batches()]                           # [(rewards, ends, mask)]
        p = torch.cat([segment_locations(ends)[ends] for _, ends, _ in read]).cpu()         # (segments,)
        y = torch.cat([rewards[ends] for rewards, ends, _ in read]).cpu()                   # (segments,)
        last = y[p == 1]                                                                    # (responses,)
        try:
            fits = {"location": fit_normalizer(p, y), "global": fit_normalizer(torch.ones_like(p), y),
                    "last": fit_normalizer(torch.ones_like(last), last), "none": Normalizer()}
        except ValueError as e:
            fail(f"calibration on {len(last)} responses: {e}; a trained model is kept, calibrate it with "
                 "--calibrate_only and more pairs in --data")
        statistics[use] = {}
        for name, fit in fits.items():
            totals = {how: torch.cat([normalized_token_rewards(*r, fit, how).sum(1) for r in read])
                      for how in INTERPOLATIONS}
            scale = {how: float(total.std(correction=0)) for how, total in totals.items()}
            statistics[use][name] = fit.to_dict() | {"scale": scale}
    return statistics


def load_function(spec, flag, kind=lambda x: x):
    """file.py:name -> f(prompt text, response text, finished) -> kind(result); finished is passed if the function has a
    parameter of that name. What goes wrong in it is said in one line."""
    path, _, name = spec.rpartition(":")
    if not os.path.isfile(path) or not path.endswith(".py"):
        fail(f"{flag} {spec}: must be file.py:function, and {path or spec} is no Python file")
    if not inspect.isfunction(f := runpy.run_path(path).get(name)):
        fail(f"{flag} {spec}: {path} has no function {name}")
    takes_finished = "finished" in inspect.signature(f).parameters

    def call(prompt, response, finished):
        try:
            return kind(f(prompt, response, **({"finished": finished} if takes_finished else {})))
        except Exception as e:
            fail(f"{flag} {spec}: {type(e).__name__} for the prompt {prompt[:60]!r}: {one_line(e)}")
    return call


def oracle_scalars(f, tokenizer, rows, stops, device):
    """The true rewards in place of a reward model's scalars: f(prompt, response) -> [(value, end token), ...]; each
    of a clause's tokens carries its value, so that reading at any segment end works as it does for a model. (B, R). f
    reads what the model reads: decoded tokens, a long prompt cut, without special tokens."""
    scalars = torch.zeros(len(rows), max(len(r) for _, r in rows))
    for b, ((prompt, response), done) in enumerate(zip(rows, is_finished(rows, stops).tolist())):
        first = 0
        clauses = f(*(tokenizer.decode(x, skip_special_tokens=True) for x in (prompt, response)), done)
        try:
            for value, end in clauses:
                scalars[b, first:end + 1], first = value, end + 1
        except (TypeError, ValueError) as e:
            fail(f"--oracle: must return [(value, index of its last token), ...], not {clauses!r} ({one_line(e)})")
    return scalars.to(device)


# ============================================================================================================
# Plumbing. A run's folder: start, resume, finish; metrics; the stop signal
# ============================================================================================================
NOT_COMPARED = ("out", "resume", "wandb", "cache", "calibrate_only", "save_every", "sample_every")  # change no number
OUTPUTS = ("metrics.jsonl", "model", "checkpoint", "leaderboard.csv", "summary.json", "annotations.json")


def already_finished(cfg, not_compared=NOT_COMPARED, **inputs):
    """True when OUT holds this very run, finished. A run with another config (or other inputs), or an unfinished one
    without --resume, is the user's mistake: exit code 2, nothing touched. For rank 0."""
    path, new = f"{cfg.out}/config.json", asdict(cfg) | inputs
    if not os.path.exists(path):
        if foreign := [f for f in OUTPUTS if os.path.exists(f"{cfg.out}/{f}")]:
            fail(f"{cfg.out} holds {foreign[0]} but no config.json, so it is no run of this script; give another --out")
        return False
    old = read_json(path)
    state = "a finished run" if old.get("finished") else "an unfinished run"
    if differs := [f"--{k} was {old.get(k)!r}, now {v!r}" for k, v in new.items()
                   if k not in not_compared and old.get(k) != v]:
        fail(f"{cfg.out} holds {state} with another config ({'; '.join(differs)[:300]}); give another --out")
    if old.get("finished"):
        say(f"{cfg.out}: already finished (delete the folder to run again)")
    elif not cfg.resume:
        fail(f"{cfg.out} holds {state}; continue it with --resume or give another --out")
    return bool(old.get("finished"))


def lock(out):
    """Make the folder and hold it until this process ends, however it ends."""
    try:
        os.makedirs(out, exist_ok=True)
        lock.file = open(f"{out}/.lock", "a")
        fcntl.flock(lock.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run is writing to {out}; give this one its own --out")
    except OSError as e:
        fail(f"--out {out}: cannot be written ({e.strerror})")


def begin_run(cfg, rows, models):
    """Lock OUT, write its config, cut metrics.jsonl back to the newest checkpoint. rows, models: the token ids and
    weights that the run depends on. Returns the step to start from and how many updates had been skipped in a row by
    then. For rank 0."""
    digest = hashlib.blake2b(" ".join(map(fingerprint, models)).encode(), digest_size=16)
    for ids in rows:
        digest.update(ids.tobytes() + b"|")
    lock(cfg.out)
    if cfg.wandb:
        wandb_run(cfg)
    if not os.path.exists(f"{cfg.out}/config.json"):
        write_json(f"{cfg.out}/config.json", asdict(cfg) | {"inputs": digest.hexdigest()})
        return 0, 0
    if read_json(f"{cfg.out}/config.json").get("inputs") != digest.hexdigest():
        fail(f"{cfg.out}: what its data files or models hold has changed since it began; give another --out")
    saved = os.listdir(f"{cfg.out}/checkpoint") if os.path.exists(f"{cfg.out}/checkpoint") else []
    step = max((int(name[5:]) for name in saved if name[5:].isdigit()), default=0)      # step_N.tmp is half a save
    say(f"{cfg.out}: " + (f"resuming after step {step}" if step else "no checkpoint yet, starting afresh"))
    kept = []
    if os.path.exists(path := f"{cfg.out}/metrics.jsonl"):        # what came after the checkpoint will come again
        try:
            with open(path, encoding="utf-8") as f:
                kept = [json.loads(line) for line in islice(f, step)]
            assert [row["step"] for row in kept] == list(range(1, step + 1)), f"it lacks steps before {step}"
        except (ValueError, KeyError, TypeError, AssertionError) as e:
            fail(f"{path}: damaged ({one_line(e)}); mend or move the file, then --resume")
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return step, kept[-1]["skipped"] if kept else 0


def may_calibrate(cfg, source, target):
    """--calibrate_only writes reward.json beside the weights; it must not come beside, or replace, other weights, nor
    change what an earlier reward.json says of its model. For rank 0."""
    if target != source and os.path.exists(f"{target}/config.json"):
        fail(f"{target} holds another model; give another --out")
    if not cfg.oracle and os.path.exists(path := f"{target}/reward.json"):
        old = read_json(path)
        if (old.get("granularity"), old.get("cutoff")) != (cfg.granularity, cfg.cutoff):
            fail(f"{path} says --granularity {old.get('granularity')} --cutoff {old.get('cutoff')}; give these flags, "
                 "or delete the file")


def finish_run(cfg):
    """Mark the run finished; a finished run needs no checkpoint."""
    if rank() == 0:
        write_json(f"{cfg.out}/config.json", read_json(f"{cfg.out}/config.json") | {"finished": True})
        shutil.rmtree(f"{cfg.out}/checkpoint", ignore_errors=True)
    dist.barrier()


def read_reward_json(path):
    """What calibration wrote beside a reward model, checked as far as everybody needs it. For rank 0."""
    saved = read_json(path)
    try:
        assert saved["granularity"] in GRANULARITIES and 0 <= saved["cutoff"] < math.inf, "granularity or cutoff"
        assert isinstance(saved["sft_model"] + saved["sft_fingerprint"], str), "SFT model"
    except (KeyError, TypeError, AttributeError, AssertionError) as e:
        fail(f"{path}: damaged ({one_line(e)} is missing or wrong); make it again with train_rm.py --calibrate_only")
    return saved


def read_json(path, kind=dict):
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f, parse_constant=lambda x: fail(f"{path}: cannot be read ({x} in it)"))
    except (OSError, ValueError, RecursionError) as e:
        fail(f"{path}: cannot be read ({one_line(e)})")
    return value if isinstance(value, kind) else fail(f"{path}: cannot be read (it holds no JSON {kind.__name__})")


def write_text(path, text):
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(path + ".tmp", path)                               # whole or not at all


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1) + "\n")


def log_metrics(cfg, step, values):
    """One JSON object a line: `step` and numbers. Rank 0 writes. null stands for a number that is not finite."""
    if rank() == 0:
        row = {"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        with open(f"{cfg.out}/metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        if cfg.wandb:
            wandb_run(cfg).log(row, step=step)


def wandb_run(cfg):
    try:
        import wandb
    except ImportError:
        fail("--wandb needs the package: pip install wandb")
    return wandb.run or wandb.init(project=cfg.wandb, config=asdict(cfg), name=cfg.out)


def hardware(device, flops, seconds):
    """Peak memory of this process so far; on a GPU its own, and model FLOP utilisation against its bf16 matmul rate."""
    if device.type == "cpu":
        return {"memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20}
    if not hasattr(hardware, "rate"):
        from torch.utils.benchmark import Timer                  # its import warns where there is no GPU
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        hardware.rate = 2 * 8192 ** 3 / Timer("a @ a", globals={"a": a}).blocked_autorange().median
    return {"mfu": flops / seconds / hardware.rate / dist.get_world_size(),
            "memory_gb": torch.cuda.max_memory_allocated() / 2 ** 30}


class StopSignal:
    """SIGTERM and Ctrl-C let the step finish; the loop then saves and exits. All ranks agree on the step."""

    def __init__(self):
        self.signal = 0
        self.before = {s: signal.signal(s, self.receive) for s in (signal.SIGTERM, signal.SIGINT)}

    def release(self):
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def receive(self, number, frame):
        self.signal = number
        say("\nstopping after this step (saving a checkpoint)")

    def agreed(self, device):
        flag = torch.tensor(self.signal, device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)


# ------------------------------------------------------------------------------------------------------------
# Plumbing. Checkpoints (to resume) and exports (to use)
# ------------------------------------------------------------------------------------------------------------
def training_state(pairs):
    """{name: (model, optimizer)} -> the flat dict of tensors that is the state of training. Learning rates, data
    order and random draws are functions of the step, so there is nothing else to remember."""
    state = {}
    for name, (model, optimizer) in pairs.items():
        for key, p in model.named_parameters():
            if not optimizer.state[p]:                            # AdamW makes them at its first step; we load earlier
                optimizer.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p),
                                      "exp_avg_sq": torch.zeros_like(p)}
            state[f"{name}.{key}"] = p.detach()
            state |= {f"{name}.{key}.{slot}": t for slot, t in optimizer.state[p].items()}
    return state


def save_checkpoint(cfg, step, pairs, keep=False):
    """OUT/checkpoint/step_N in safetensors, each rank its shards; complete or invisible. Older ones go, unless kept."""
    folder = f"{cfg.out}/checkpoint/step_{step}"
    on_rank0(shutil.rmtree, folder + ".tmp", ignore_errors=True)
    state, files = training_state(pairs), {}                      # a file per layer: each is put together in memory
    index = {key: files.setdefault(re.search(r".*layers\.\d+\.|^\w+", key)[0], len(files) + 1) for key in state}
    try:
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(folder + ".tmp", index, save_distributed=True))
    except (Exception, CheckpointException) as e:                 # most often a full disk
        fail(f"{folder}: could not be saved ({cause(e)}); an earlier one is untouched, continue with --resume")
    if rank() == 0:
        os.replace(folder + ".tmp", folder)
        for name in os.listdir(f"{cfg.out}/checkpoint"):
            if name != f"step_{step}" and not keep:
                shutil.rmtree(f"{cfg.out}/checkpoint/{name}")
    dist.barrier()


def load_checkpoint(cfg, step, pairs):
    """Read step_N into the models and optimizers in place, on any number of ranks."""
    logging.disable(logging.WARNING)                              # what is wrong is said below, in one line
    try:
        dcp.load(training_state(pairs), storage_reader=HuggingFaceStorageReader(f"{cfg.out}/checkpoint/step_{step}"))
    except (Exception, CheckpointException) as e:
        fail(f"{cfg.out}/checkpoint/step_{step}: cannot be loaded ({cause(e)}); delete that folder, then --resume")
    finally:
        logging.disable(logging.NOTSET)


def cause(e):
    return one_line(next(iter(e.failures.values()))[0] if isinstance(e, CheckpointException) else e)


def export(model, tokenizer, source, folder, dtype):
    """An ordinary Hugging Face checkpoint in `folder`, with tokenizer and, for a language model, the generation
    settings of `source`. Every rank gathers, rank 0 writes; the old folder stays until then."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank() == 0:
        with torch.device("meta"):
            hf = model.auto_class.from_config(model.hf.config, dtype=dtype)
        if model.auto_class is AutoModelForSequenceClassification:
            pad_id = tokenizer.pad_token_id
            hf.config.pad_token_id = tokenizer.eos_token_id if pad_id is None else pad_id
        else:
            try:
                hf.generation_config = GenerationConfig.from_pretrained(source)
            except OSError:
                pass                                              # the model never had one
        shutil.rmtree(folder + ".tmp", ignore_errors=True)
        state = {k[3:]: v.to(dtype).contiguous() for k, v in state.items() if k[3:] not in hf.all_tied_weights_keys}
        try:
            hf.save_pretrained(folder + ".tmp", state_dict=state)
            tokenizer.save_pretrained(folder + ".tmp")
        except Exception as e:
            fail(f"{folder}: could not be written ({one_line(e)}); the checkpoint is whole, continue with --resume")
        if os.path.exists(folder):
            shutil.rmtree(folder + ".old", ignore_errors=True)
            os.replace(folder, folder + ".old")
        os.replace(folder + ".tmp", folder)
        shutil.rmtree(folder + ".old", ignore_errors=True)
    dist.barrier()


# ------------------------------------------------------------------------------------------------------------
# Plumbing. SFT entropies: computed once by all ranks, kept on disk; fingerprints
# ------------------------------------------------------------------------------------------------------------
def fingerprint(path):
    """A hash of a model's weights and, for a reward model, of its reward.json: 32 hex digits."""
    folder = path if os.path.isdir(path) else snapshot_download(path, allow_patterns=["*.safetensors", "reward.json"])
    digest = hashlib.blake2b(digest_size=16)
    weights = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    if not weights:
        fail(f"{path}: no .safetensors weights there")
    for name in weights + ["reward.json"] * os.path.exists(f"{folder}/reward.json"):
        with open(f"{folder}/{name}", "rb") as f:
            while block := f.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def sft_entropies(cfg, rows, device, key):
    """[float32 (R,)] per row: the SFT model's entropy after each response token. Shards of 2,048 rows are named by
    (key, dtype, their tokens) and appear whole or not at all, so a killed pass goes on where it was."""
    try:
        os.makedirs(cfg.cache, exist_ok=True)
    except OSError as e:
        fail(f"--cache {cfg.cache}: cannot be written ({e.strerror})")
    model, entropies, dtype = None, [], compute_dtype(cfg.dtype, device)
    for k in range(0, len(rows), 2048):
        shard = rows[k:k + 2048]
        digest = hashlib.blake2b(f"{key} {dtype}".encode(), digest_size=16)
        for p, r in shard:
            digest.update(p.tobytes() + b"|" + r.tobytes() + b"\n")
        path, lengths = f"{cfg.cache}/entropy-{digest.hexdigest()}.npy", [len(r) for _, r in shard]
        if not on_rank0(os.path.exists, path):
            model = model or load_model(cfg.model, LanguageModel, device, dtype)
            H = map_rows(model, shard, cfg.micro_tokens, device,
                         f"SFT entropies {k // 2048 + 1}/{-(-len(rows) // 2048)}")[2].cpu().numpy()    # (b, R)
            if not np.isfinite(H).all():
                fail(f"--model {cfg.model}: its entropies are not finite; the weights are broken, or try --dtype fp32")
            if rank() == 0:
                np.save(path + ".tmp.npy", np.concatenate([h[:n] for h, n in zip(H, lengths)]))
                os.replace(path + ".tmp.npy", path)
            dist.barrier()
        try:
            flat = np.load(path, mmap_mode="r", allow_pickle=False)
            assert flat.dtype == np.float32 and flat.shape == (sum(lengths),)
            assert -1e-3 < flat.min() <= flat.max() < math.inf
        except (ValueError, AssertionError, EOFError, OSError):
            fail(f"{path}: damaged cache file; delete it, it will be computed again")
        entropies += np.split(flat, np.cumsum(lengths)[:-1])
    return entropies


def learning_rate(step, steps, warmup):
    """Factor on the peak: linear warm-up, then a cosine to 10 %. step counts from 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# ============================================================================================================
# The run
# ============================================================================================================
def main(cfg):
    device = setup(cfg.deterministic)
    if not cfg.calibrate_only and on_rank0(already_finished, cfg):
        return
    prepare_world(cfg.model, cfg.data)
    ranks, dtype = dist.get_world_size(), compute_dtype(cfg.dtype, device)
    if cfg.max_prompt_tokens >= cfg.max_tokens:
        fail(f"--max_prompt_tokens {cfg.max_prompt_tokens} leaves no room in --max_tokens {cfg.max_tokens}")
    if cfg.max_tokens > (context := read_config(cfg.model).max_position_embeddings):
        fail(f"--max_tokens {cfg.max_tokens}: the context of {cfg.model} is {context}")
    if cfg.oracle and not cfg.calibrate_only:
        fail("--oracle goes with --calibrate_only: there is nothing to train")
    tokenizer, stops = load_tokenizer(cfg.model)
    ready = cfg.calibrate_only and not cfg.oracle                # a trained model is there; an oracle needs none
    source = (cfg.reward_model or f"{cfg.out}/model") if ready else cfg.model
    target = source if ready and os.path.isdir(source) else f"{cfg.out}/model"
    if cfg.calibrate_only:
        on_rank0(may_calibrate, cfg, source, target)

    # --------------------------------------------------------------------------------------------------------
    # data: pair i is the rows 2i (chosen) and 2i + 1 (rejected); a seeded split keeps calibration pairs unseen
    # --------------------------------------------------------------------------------------------------------
    def encode(source):
        rows, pairs = [], load_pairs(source, cfg.max_samples)
        pairs = iter(tqdm(pairs, f"encoding {source}", disable=True if rank() else None, leave=False, delay=2))
        while block := list(islice(pairs, 2048)):                # in blocks: text is bulky, token ids are not
            chats = [(prompt, text, where) for prompt, *both, where in block for text in both]
            rows += encode_chats(tokenizer, stops, chats, cfg.max_tokens, cfg.max_prompt_tokens)
        return rows

    rows = encode(cfg.data)
    n = len(rows) // 2
    if not n:
        fail(f"{cfg.data}: no pair is left")
    order = np.random.default_rng(cfg.seed).permutation(n)
    n_eval = 0 if cfg.eval_data or cfg.calibrate_only else max(1, min(n // 50, 2000))
    n_calibration = min(max(n // 20, min(n // 4, 16), 1), 60000)                # 5 %, but 16 pairs if there are few
    eval_pairs, calibration, train = np.split(order, [n_eval, n_eval + n_calibration])
    steps = per_epoch = 0                                        # --calibrate_only trains nothing
    if not cfg.calibrate_only:
        if cfg.eval_data:
            rows += encode(cfg.eval_data)
            eval_pairs = np.arange(n, len(rows) // 2)
        if not len(eval_pairs):
            fail(f"{cfg.eval_data or cfg.data}: no pair is left to evaluate on")
        per_epoch = len(train) // cfg.batch_size
        if not per_epoch:
            fail(f"{cfg.data}: {len(train)} training pairs (of {n}) do not fill one --batch_size {cfg.batch_size}")
        steps = min(cfg.max_steps or math.inf, cfg.epochs * per_epoch)
    finished, size = is_finished(rows, stops), [len(p) + len(r) for p, r in rows]           # (rows,) each
    rows_of = lambda pairs: [2 * int(i) + side for i in pairs for side in (0, 1)]

    say(f"{n} pairs: {len(train)} to train, {len(eval_pairs)} held out, {len(calibration)} to calibrate; "
        f"{float(finished.float().mean()):.1%} of the responses are finished")
    if steps:
        say(f"{steps} steps x {cfg.batch_size} pairs on {ranks} x {device.type}; an epoch has {per_epoch}")

    # SFT entropies: segments of the training pairs are needed only to train on segments
    key = on_rank0(fingerprint, cfg.model)
    wanted = range(len(rows)) if cfg.granularity == "segment" and not cfg.calibrate_only else \
        sorted(rows_of(calibration))
    entropies = dict(zip(wanted, sft_entropies(cfg, [rows[i] for i in wanted], device, key)))
    nothing = np.zeros(cfg.max_tokens, dtype=np.float32)

    def batch_of(index):
        """rows -> entropy (B, R), mask (B, R), finished (B,)"""
        lengths = torch.tensor([len(rows[i][1]) for i in index])                                     # (B,)
        entropy = pad_sequence([torch.tensor(entropies.get(i, nothing)[:n]) for i, n in zip(index, lengths)], True)
        mask = torch.arange(entropy.shape[1]) < lengths[:, None]
        return entropy.to(device), mask.to(device), finished[index].to(device)

    def scores_of(values, index):
        entropy, mask, done = batch_of(index)
        return sequence_score(values, segment_ends(entropy, mask, done, cfg.cutoff, cfg.granularity))    # (B,)

    # --------------------------------------------------------------------------------------------------------
    # the reward model and its optimizer
    # --------------------------------------------------------------------------------------------------------
    hidden = read_config(source).hidden_size
    model = load_model(source, ScalarModel, device, dtype, train=not cfg.calibrate_only, seed=cfg.seed,
                       grad_checkpoint=cfg.grad_checkpoint, head_std=None if ready else 1 / (hidden + 1))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
    trained, parameters = {"rm": (model, optimizer)}, sum(p.numel() for p in model.parameters())

    def evaluate(pairs):
        """Accuracy on held-out pairs: the share whose chosen response scores higher; a tie counts half."""
        index = rows_of(pairs)
        values = map_rows(model, [rows[i] for i in index], cfg.micro_tokens, device)[0]              # (2n, R)
        scores = scores_of(values, index)
        return float((scores[0::2] - scores[1::2]).sign().mean() + 1) / 2

    # --------------------------------------------------------------------------------------------------------
    # training: Bradley-Terry on mean segment rewards
    # --------------------------------------------------------------------------------------------------------
    # everything was readable: only now OUT is made
    first_step = skipped = 0
    if not cfg.calibrate_only:
        first_step, skipped = on_rank0(begin_run, cfg, (ids for row in rows for ids in row), [cfg.model])
    if first_step:
        load_checkpoint(cfg, first_step, trained)
    stop, began = StopSignal(), time.time()
    for step in range(first_step, steps):
        tick = time.time()
        epoch, position = divmod(step, per_epoch)
        shuffled = np.random.default_rng([cfg.seed, epoch]).permutation(train)
        mb_pairs = shuffled[position * cfg.batch_size:(position + 1) * cfg.batch_size]               # global batch
        lengths = [2 * max(size[2 * i], size[2 * i + 1]) for i in mb_pairs]
        tokens = sum(size[i] for i in rows_of(mb_pairs))
        sums = torch.zeros(2, device=device)                                                         # loss, right
        for micro in micro_batches(lengths, cfg.micro_tokens, ranks)[rank()::ranks]:
            index = rows_of(mb_pairs[micro] if micro else mb_pairs[:1])                          # a pair is never split
            scores = scores_of(model(*pad([rows[i] for i in index], device))[0], index)              # (2b,)
            losses = bradley_terry(scores[0::2], scores[1::2])                                       # (b,)
            # FSDP averages gradients over ranks, so a micro-batch weighs (its pairs / global pairs) x ranks
            (losses.sum() * (ranks / cfg.batch_size if micro else 0.0)).backward()
            if micro:
                right = (losses.detach() < math.log(2)).sum()                                       # margin above 0
                sums += torch.stack([losses.detach().sum(), right])
        dist.all_reduce(sums)
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm).full_tensor()
        lr = cfg.lr * learning_rate(step, steps, cfg.warmup)
        optimizer.param_groups[0]["lr"] = lr
        skipped = 0 if torch.isfinite(norm) else skipped + 1
        if not skipped:                                          # a step that is not finite changes nothing
            optimizer.step()
        optimizer.zero_grad()

        done, seconds = step + 1, time.time() - tick
        row = {"loss": float(sums[0]) / cfg.batch_size, "accuracy": float(sums[1]) / cfg.batch_size,
               "grad_norm": float(norm), "lr": lr, "skipped": skipped,
               "time_step": seconds, "tokens_per_second": tokens / seconds,
               **hardware(device, 6 * parameters * tokens, seconds)}
        if done % cfg.eval_every == 0 or done == steps:
            tick = time.time()
            row |= {"eval_accuracy": evaluate(eval_pairs), "time_eval": time.time() - tick}
        log_metrics(cfg, done, row)
        eta = (time.time() - began) / (done - first_step) * (steps - done)
        if done % 10 == 0 or done == steps or seconds > 5 or "eval_accuracy" in row:
            say(f"step {done}/{steps} | loss {row['loss']:.4f} | accuracy {row['accuracy']:.2f} | "
                f"grad norm {norm:.2f} | {row['tokens_per_second']:,.0f} tokens/s | {eta:.0f} s left"
                + (f" | held-out accuracy {row['eval_accuracy']:.3f}" if "eval_accuracy" in row else ""))
        stopping = stop.agreed(device)
        if done % cfg.save_every == 0 or done == steps or stopping or skipped >= 5:
            save_checkpoint(cfg, done, trained, keep=skipped > 0)
            if done < steps:
                export(model, tokenizer, cfg.model, f"{cfg.out}/model", dtype)
        if skipped >= 5:
            fail(f"step {done}: loss or gradients were not finite in {skipped} steps in a row (skipped; saved, and the "
                 "earlier checkpoint kept); lower --lr")
        if stopping:
            say(f"stopped after step {done}; continue with --resume")
            raise SystemExit(128 + stopping)
    stop.release()
    if skipped:
        say(f"warning: the last {skipped} steps were skipped, their loss or gradients were not finite")
    if target != source and not cfg.oracle:
        export(model, tokenizer, cfg.model, target, dtype)

    # --------------------------------------------------------------------------------------------------------
    # calibration: the statistics by which PPO normalises, on pairs that were not trained on
    # --------------------------------------------------------------------------------------------------------
    index = rows_of(calibration)
    blocks = [index[k:k + 1024] for k in range(0, len(index), 1024)]
    true = load_function(cfg.oracle, "--oracle") if cfg.oracle else None
    values = [oracle_scalars(true, tokenizer, [rows[i] for i in block], stops, device) if true else
              map_rows(model, [rows[i] for i in block], cfg.micro_tokens, device, "calibration")[0] for block in blocks]
    statistics = calibrate(lambda: ((v, *batch_of(block)) for v, block in zip(values, blocks)),
                           cfg.cutoff, cfg.granularity)
    reward_json = {"granularity": cfg.granularity, "cutoff": cfg.cutoff, "sft_model": cfg.model, "sft_fingerprint": key,
                   "calibration_responses": len(index), "statistics": statistics}
    if rank() == 0:
        os.makedirs(target, exist_ok=True)
        write_json(f"{target}/reward.json", reward_json)
    fit = statistics["segment"]["location"]
    say(f"calibrated on {len(index)} responses; segment rewards: mean {fit['w_mean']:.3f} log p + {fit['b_mean']:.3f}, "
        f"std {fit['w_std']:.3f} log p + {fit['b_std']:.3f}\nwrote {target}")
    if not cfg.calibrate_only:
        finish_run(cfg)


if __name__ == "__main__":
    start(main, Config)
