"""Chapter 2 of 4: a reward model that scores segments, learned from preferences between responses.

    python train_rm.py                                             # the embedded world, 2 minutes
    python train_rm.py --granularity bandit --out out/rm-bandit    # the classical reward model
    torchrun --nproc_per_node=8 train_rm.py @config/llama3.1-8b-rm.args          # 8 GPUs

The idea (arXiv 2501.02790, section 2.2): a scalar head reads the backbone at every token. The
scalar at a segment's last token is the segment's reward, a response scores the mean of its
segments' rewards, and Bradley-Terry pushes the chosen response's score above the rejected one's.
No segment is ever labelled.

Then (section 2.3) from segment rewards to token rewards: a segment's reward depends on where in the
response it lies, so it is normalised by a mean and a standard deviation that are linear in log p,
p = i/n the relative location, and spread evenly over the segment's tokens. Chapter 3 fits and uses
this; the functions stand here, where the rewards come from.

What differs from the authors' code: the SFT model's entropies are computed inside the step; the fit
clamps p and the deviation (theirs turns negative at small p, which flips the reward's sign); both
sides of a pair see the same prompt, with its BOS.
"""
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from typing import Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                     get_state_dict, set_state_dict)
from transformers import AutoModelForSequenceClassification

from segment import (WORLD, Dtype, Granularity, LanguageModel, compute_dtype, encode_chats, fail,
                     in_world, load_model, load_pairs, load_tokenizer, map_rows,
                     micro_batches, opt, pad, parse, prepare_world, rank, read_config, read_rows,
                     response_mask, say, segment_ends, segment_locations, sequence_score, setup)


@dataclass
class Config:
    # what to train on what
    model: str = opt(f"{WORLD}/sft", "the SFT model: the backbone's start, and its entropies")
    data: str = opt(f"{WORLD}/pairs.jsonl", "preferences (paper: hendrydong/preference_700K)")
    eval_data: Optional[str] = opt(None, "held-out preferences (default: the last 2 % of --data, "
                                   "at most 2,000; the embedded world has its own)")
    out: str = opt("out/rm", "output folder")
    granularity: Granularity = opt("segment", "what gets a reward")
    cutoff: float = opt(1.0, "nats; segment.py helps to choose (paper: Phi-3 1.75, Llama-3 2.0)")
    max_samples: int = opt(0, "read at most this many pairs (0: all)")
    max_tokens: int = opt(256, "prompt + response (paper: 2048)")
    max_prompt_tokens: int = opt(128, "for a prompt whose response does not fit (paper: 1728)")
    # optimisation
    batch_size: int = opt(32, "pairs per step, over all GPUs (paper: 128)")
    epochs: int = opt(2, "paper: 1")
    max_steps: int = opt(0, "stop, and end the schedule, after this many steps (0: epochs)")
    lr: float = opt(1e-3, "peak (paper: 1e-6)")
    warmup: float = opt(0.03, "share of the steps")
    clip_norm: float = opt(1.0, "gradient norm is clipped to this")
    seed: int = opt(0, "of the order of the pairs")
    # hardware
    dtype: Dtype = opt("auto", "to compute in: bf16 on CUDA, fp32 on CPU (masters are fp32)")
    micro_tokens: int = opt(16384, "tokens in one GPU's forward pass: lower it when out of memory")
    grad_checkpoint: bool = opt(False, "recompute activations: less memory, a third more time")
    # bookkeeping
    eval_every: int = opt(50, "steps between evaluations")
    save_every: int = opt(100, "steps between checkpoints")
    resume: bool = opt(False, "continue an unfinished run")
    wandb: str = opt("", "log to this wandb project too")


# -- The method. 1. a scalar at every token, and the loss ------------------------------------------
class ScalarModel(nn.Module):
    """Backbone and linear head d -> 1 without bias. With shift 0 it reads a reward at each response
    token; with shift -1 (the critic) a value where the model decided on that token."""
    auto_class = AutoModelForSequenceClassification
    settings = {"num_labels": 1}
    shift = 0

    def __init__(self, hf):
        super().__init__()
        self.hf = hf

    def forward(self, ids, prompt_lens, response_lens):
        """ids: (B, T) right-padded; lens: (B,). Returns fp32 (B, R); any number on padding."""
        hidden = self.hf.base_model(input_ids=ids, use_cache=False).last_hidden_state    # (B, T, d)
        scalars = (hidden.float() @ self.hf.score.weight.float().T)[..., 0]              # (B, T)
        r = torch.arange(int(response_lens.max()), device=ids.device)                    # (R,)
        position = prompt_lens[:, None] + r + self.shift                                 # (B, R)
        return scalars.gather(1, position.clamp(max=ids.shape[1] - 1))

    def check(self, path):
        if not hasattr(self.hf, "score") or self.hf.score.bias is not None:
            fail(f"{path}: its sequence classifier has no plain head `score`: not supported")


def bradley_terry(scores_chosen, scores_rejected):
    """-log sigmoid(chosen - rejected), equation (3). (B,) each"""
    return -F.logsigmoid(scores_chosen - scores_rejected)


# -- The method. 2. from segment rewards to token rewards: normalise by location, spread -----------
@dataclass
class Normalizer:
    """mean(p) = w_mean log p + b_mean, std(p) = w_std log p + b_std (section 2.3). p is clamped to
    what was calibrated, std to a tenth of its value at p = 1: a line goes negative at small p."""
    w_mean: float = 0.0
    b_mean: float = 0.0
    w_std: float = 0.0
    b_std: float = 1.0
    p_min: float = 1e-3
    p_max: float = 1.0

    def mean(self, p):
        return self.w_mean * self.log(p) + self.b_mean

    def std(self, p):
        return (self.w_std * self.log(p) + self.b_std).clamp(min=0.1 * self.b_std)

    def log(self, p):
        return torch.as_tensor(p, dtype=torch.float32).clamp(self.p_min, self.p_max).log()

    def to_dict(self):
        return asdict(self)

    @classmethod
    def from_dict(cls, d):
        return cls(**d)


def huber_line(x, y, epsilon=1.35):
    """(slope, intercept) of Huber's regression of y on x, (n,) each, with the scale sigma estimated
    along with the line (his proposal 2): residuals beyond epsilon sigma count linearly."""
    X = np.stack([x, np.ones_like(x)], 1)                                                # (n, 2)
    line = np.linalg.lstsq(X, y, rcond=None)[0]                                          # (2,)
    floor = 1e-9 * (1 + np.abs(y).max())
    sigma = max(floor, (y - X @ line).std())
    for _ in range(500):                     # reweighted least squares; outliers count less
        error = np.abs(y - X @ line)                                                     # (n,)
        inside = np.minimum((error / sigma) ** 2, epsilon ** 2)
        sigma = max(floor, sigma * np.sqrt(inside.mean()))
        root = np.sqrt(np.minimum(1, epsilon * sigma / np.maximum(error, floor)))        # (n,)
        line = np.linalg.lstsq(X * root[:, None], y * root, rcond=None)[0]
    return float(line[0]), float(line[1])


def fit_normalizer(locations, rewards):
    """Fit a Normalizer to segment rewards. locations: (N,) in (0, 1]; rewards: (N,). Segments are
    pooled by p rounded to 3 decimals; Huber regressions of the pools' means and population
    deviations on log(mean p of the pool); one location alone has slope 0. ValueError for rewards
    that are not finite, do not vary, or hardly share a location."""
    p = np.asarray(locations, dtype=np.float64).ravel()
    y = np.asarray(rewards, dtype=np.float64).ravel()
    if not len(p) or not np.isfinite(y).all() or not p.min() > 0:
        raise ValueError("needs finite rewards at locations above 0")
    _, pool, count = np.unique(np.round(p, 3), return_inverse=True, return_counts=True)
    mean = np.bincount(pool, y) / count                                                  # (pools,)
    std = np.sqrt(np.bincount(pool, (y - mean[pool]) ** 2) / count)                      # (pools,)
    log_p = np.log(np.bincount(pool, p) / count)                                         # (pools,)
    if len(count) == 1:
        log_p = np.zeros(1)                              # nothing to regress on: the slope is 0
    several = count > 1                                  # one value has no deviation
    if several.sum() < min(2, len(count)):
        raise ValueError(f"{len(p)} segments hardly share a location; calibrate on more")
    fit = Normalizer(*huber_line(log_p, mean), *huber_line(log_p[several], std[several]),
                     p_min=float(p.min()), p_max=float(p.max()))
    if not fit.b_std > 1e-6 * (1 + abs(fit.b_mean)):
        raise ValueError("the rewards do not vary, there is nothing to divide by")
    return fit


def spread_rewards(rewards_at_ends, ends, mask, how):
    """Give every token its share of its segment's reward (section 2.3, "interpolation").

    rewards_at_ends (B, R): read where ends (bool) is True; mask: bool (B, R). even (the method):
    divided by the segment's length; repeat: the whole reward to each token; end: all at the last
    token. Returns (B, R); tokens behind the last end (the end-of-turn token) get 0.

    >>> ends = torch.tensor([[False, True, True, False]])
    >>> spread_rewards(torch.tensor([[0., 4., 3., 0.]]), ends, torch.ones(1, 4, dtype=bool), "even")
    tensor([[2., 2., 3., 0.]])
    """
    if how not in ("even", "repeat", "end"):
        raise ValueError(f"interpolation {how!r}: one of even, repeat, end")
    ends = ends & mask
    rewards = torch.where(ends, rewards_at_ends, 0.0)                                    # (B, R)
    if how == "end":
        return rewards
    segment = ends.cumsum(1) - ends.long()               # (B, R) number of ends before this token
    zeros = torch.zeros_like(rewards)
    total = zeros.scatter_add(1, segment, rewards)                   # (B, segments)
    length = zeros.scatter_add(1, segment, mask.float())             # (B, segments)
    share = total / length.clamp(min=1) if how == "even" else total
    return share.gather(1, segment) * mask


def place_rewards(scalars, sft_entropy, mask, finished, cutoff, own, use):
    """What PPO rewards, and where, when a reward model trained on `own` segments is used on `use`.
    scalars, sft_entropy, mask: (B, R); finished: (B,). Returns rewards and ends, (B, R). Used as
    bandit: the sequence score at the last token; else the scalars at the ends of `use`."""
    ends = segment_ends(sft_entropy, mask, finished, cutoff, use)
    if use == "bandit":
        own_ends = segment_ends(sft_entropy, mask, finished, cutoff, own)
        scalars = sequence_score(scalars, own_ends)[:, None]                             # (B, 1)
    return torch.where(ends, scalars, 0.0), ends


def token_rewards(rewards, ends, mask, normalizer, how):
    """Normalise by location and spread. rewards (read at ends), ends, mask: (B, R) -> (B, R)"""
    p = segment_locations(ends)
    normalized = (rewards - normalizer.mean(p)) / normalizer.std(p)                      # (B, R)
    return spread_rewards(normalized, ends, mask, how)


def learning_rate(step, steps, warmup):
    """Factor on the peak: linear warm-up, then a cosine to 10 %. step counts from 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1, steps - rise)
    return 0.1 + 0.45 * (1 + np.cos(np.pi * progress))


def shuffled(n, times, *seed):
    """n numbers in random order, `times` over, as one array."""
    passes = [np.random.default_rng([*seed, turn]).permutation(n) for turn in range(times)]
    return np.concatenate(passes)


# ==================================================================================================
# Plumbing. A run's folder: start, resume, finish
# ==================================================================================================
MAY_DIFFER = ("out", "resume", "wandb", "save_every", "sample_every")


def look_at_run(cfg):
    """Before anything is loaded: is OUT free? True if it holds this very run, finished. Every rank
    looks; nothing is written until `begin_run`."""
    path = f"{cfg.out}/config.json"
    if not os.path.exists(path):
        if os.path.exists(cfg.out) and os.listdir(cfg.out):
            fail(f"{cfg.out} holds other files; give another --out")
        return False
    with open(path) as f:
        old = json.load(f)
    differs = [name for name, value in asdict(cfg).items()
               if name not in MAY_DIFFER and old.get(name) != value]
    state = "a finished run" if old.get("finished") else "an unfinished run"
    if differs:
        name = differs[0]
        fail(f"{cfg.out} holds {state} with another config (--{name} was {old.get(name)!r}, now "
             f"{getattr(cfg, name)!r}); give another --out")
    if old.get("finished"):
        say(f"{cfg.out}: already finished (delete the folder to run again)")
    elif not cfg.resume:
        fail(f"{cfg.out} holds {state}: continue it with --resume, or give another --out")
    return bool(old.get("finished"))


def begin_run(cfg, trained, **notes):
    """Every input could be read: write OUT/config.json, or resume from the newest checkpoint.

    trained: {name: (model, optimizer)}; notes: kept in config.json. Returns the step to start from.
    metrics.jsonl is cut back to the checkpoint: what came after it will come again.
    """
    folder = f"{cfg.out}/checkpoint"
    names = os.listdir(folder) if os.path.exists(folder) else []
    step = max([int(name[5:]) for name in names if name[5:].isdigit()], default=0)
    dist.barrier()                                       # all have looked before rank 0 writes
    if step:
        state = training_state(trained)
        dcp.load(state, checkpoint_id=f"{folder}/step_{step}")
        for name, (model, optimizer) in trained.items():
            set_state_dict(model, optimizer, model_state_dict=state[name]["model"],
                           optim_state_dict=state[name]["optimizer"])
        say(f"{cfg.out}: resuming after step {step}")
    if rank() == 0:
        os.makedirs(cfg.out, exist_ok=True)
        kept = []
        if os.path.exists(f"{cfg.out}/metrics.jsonl"):
            kept = open(f"{cfg.out}/metrics.jsonl").readlines()[:step]
        write_text(f"{cfg.out}/config.json", json.dumps(asdict(cfg) | notes, indent=1))
        write_text(f"{cfg.out}/metrics.jsonl", "".join(kept))
    return step


def finish_run(cfg):
    """A finished run needs no checkpoint."""
    if rank() == 0:
        with open(f"{cfg.out}/config.json") as f:
            config = json.load(f)
        write_text(f"{cfg.out}/config.json", json.dumps(config | {"finished": True}, indent=1))
        shutil.rmtree(f"{cfg.out}/checkpoint", ignore_errors=True)
    say(f"wrote {cfg.out}/model")


def write_text(path, text):
    with open(path + ".tmp", "w") as f:
        f.write(text)
    os.replace(path + ".tmp", path)                      # whole or not at all


def log_metrics(cfg, row):
    """One JSON object a line, from rank 0."""
    if rank() == 0:
        with open(f"{cfg.out}/metrics.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        if cfg.wandb:
            try:
                import wandb
            except ImportError:
                fail("--wandb needs the package: pip install wandb")
            if not wandb.run:
                wandb.init(project=cfg.wandb, config=asdict(cfg), name=cfg.out)
            wandb.log(row, step=row["step"])


# -- Plumbing. Checkpoints (to resume) and exports (to use) ----------------------------------------
def training_state(trained):
    """Weights and optimizer moments, sharded. Learning rates, data order and random draws are
    functions of the step, so there is nothing else to remember."""
    state = {}
    for name, (model, optimizer) in trained.items():
        weights, moments = get_state_dict(model, optimizer)
        state[name] = {"model": weights, "optimizer": moments}
    return state


def save(cfg, step, trained, exported, tokenizer, dtype):
    """OUT/model, and when that is complete OUT/checkpoint/step_N: whole, or not there."""
    export(exported, tokenizer, f"{cfg.out}/model", dtype)
    folder = f"{cfg.out}/checkpoint/step_{step}"
    if rank() == 0:
        shutil.rmtree(folder + ".tmp", ignore_errors=True)
    dist.barrier()
    dcp.save(training_state(trained), checkpoint_id=folder + ".tmp")
    if rank() == 0:
        os.replace(folder + ".tmp", folder)
        for name in os.listdir(f"{cfg.out}/checkpoint"):
            if name != f"step_{step}":
                shutil.rmtree(f"{cfg.out}/checkpoint/{name}")
    dist.barrier()


def export(model, tokenizer, folder, dtype):
    """A Hugging Face checkpoint in dtype, with its tokenizer. All ranks gather, rank 0 writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if rank() == 0:
        weights = {name.removeprefix("hf."): w.to(dtype) for name, w in weights.items()}
        for name in model.hf.all_tied_weights_keys:      # stored once, under the other name
            weights.pop(name, None)
        shutil.rmtree(folder + ".tmp", ignore_errors=True)
        model.hf.save_pretrained(folder + ".tmp", state_dict=weights)
        model.hf.config.dtype = dtype                    # save_pretrained noted the masters' fp32
        model.hf.config.save_pretrained(folder + ".tmp")
        tokenizer.save_pretrained(folder + ".tmp")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(folder + ".tmp", folder)
    dist.barrier()


# ==================================================================================================
# The run
# ==================================================================================================
def split_off(cfg):
    """--data as its first 98 % and the rest (at most 2,000 rows): two sources that can be named."""
    name, _, split = cfg.data.partition(":")
    if "[" in split:
        fail(f"--data {cfg.data} is a slice already: name the held-out pairs with --eval_data")
    n = len(read_rows(cfg.data, cfg.max_samples))
    first = n - max(1, min(n // 50, 2000))
    split = split or "train"
    return f"{name}:{split}[:{first}]", f"{name}:{split}[{first}:{n}]"


def main(cfg):
    device = setup()
    if look_at_run(cfg):
        return
    prepare_world(cfg.model, cfg.data)
    ranks, dtype = dist.get_world_size(), compute_dtype(cfg.dtype, device)
    if cfg.batch_size % ranks:
        fail(f"--batch_size {cfg.batch_size} must be a multiple of the {ranks} ranks")
    config = read_config(cfg.model)
    if not cfg.max_prompt_tokens < cfg.max_tokens <= config.max_position_embeddings:
        fail(f"--max_prompt_tokens {cfg.max_prompt_tokens} must be less than --max_tokens "
             f"{cfg.max_tokens}, and that fit {cfg.model}: {config.max_position_embeddings}")

    # ----------------------------------------------------------------------------------------------
    # data: pair i is the rows 2i (chosen) and 2i + 1 (rejected)
    # ----------------------------------------------------------------------------------------------
    data, eval_data = cfg.data, cfg.eval_data
    if not eval_data and in_world(data):
        eval_data = f"{WORLD}/pairs_test.jsonl"
    elif not eval_data:
        data, eval_data = split_off(cfg)
    tokenizer, stops = load_tokenizer(cfg.model)
    rows, eval_rows = [], []
    for source, into in ((data, rows), (eval_data, eval_rows)):
        chats = [(prompt, [chosen, rejected], where)
                 for prompt, chosen, rejected, where in load_pairs(source, cfg.max_samples)]
        into += encode_chats(tokenizer, stops, chats, cfg.max_tokens, cfg.max_prompt_tokens)
    pairs = len(rows) // 2
    order = shuffled(pairs, cfg.epochs, cfg.seed)
    steps = len(order) // cfg.batch_size
    if cfg.max_steps:
        steps = min(steps, cfg.max_steps)
    if not steps:
        fail(f"{data}: {pairs} pairs do not fill one --batch_size {cfg.batch_size}")
    say(f"{pairs} pairs to train, {len(eval_rows) // 2} held out ({eval_data})\n"
        f"{steps} steps x {cfg.batch_size} pairs on {ranks} x {device.type}")

    # ----------------------------------------------------------------------------------------------
    # the reward model, and the frozen SFT model whose entropies cut the segments
    # ----------------------------------------------------------------------------------------------
    model = load_model(cfg.model, ScalarModel, device, dtype, train=True,
                       grad_checkpoint=cfg.grad_checkpoint, head_std=1 / (config.hidden_size + 1))
    sft = load_model(cfg.model, LanguageModel, device, dtype)
    model.hf.config.segment_granularity = cfg.granularity            # exported with the weights
    model.hf.config.segment_cutoff = cfg.cutoff
    model.hf.config.segment_model = cfg.model
    model.hf.config.pad_token_id = tokenizer.pad_token_id            # that class looks for it
    if tokenizer.pad_token_id is None:
        model.hf.config.pad_token_id = tokenizer.eos_token_id
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    trained = {"reward_model": (model, optimizer)}
    first_step = begin_run(cfg, trained)

    def ends_of(rows, entropy):
        mask, finished = response_mask(rows, stops, device)                      # (B, R), (B,)
        return segment_ends(entropy, mask, finished, cfg.cutoff, cfg.granularity)        # (B, R)

    def accuracy_held_out():
        """Share of the pairs whose chosen response scores higher; a tie counts half."""
        scalars = map_rows(model, eval_rows, cfg.micro_tokens, device, "held out")       # (2n, R)
        scores = sequence_score(scalars, eval_ends)                                      # (2n,)
        return float((scores[0::2] - scores[1::2]).sign().mean() + 1) / 2

    _, eval_entropy = map_rows(sft, eval_rows, cfg.micro_tokens, device, "held-out entropies")
    eval_ends = ends_of(eval_rows, eval_entropy)                                         # (2n, R)

    # ----------------------------------------------------------------------------------------------
    # training: Bradley-Terry on the mean of the segment rewards
    # ----------------------------------------------------------------------------------------------
    lengths = np.array([len(p) + len(r) for p, r in rows]).reshape(pairs, 2)     # tokens of a row
    began = time.time()
    for step in range(first_step, steps):
        started = time.time()
        minibatch = order[step * cfg.batch_size:(step + 1) * cfg.batch_size]
        sums = torch.zeros(2, device=device)             # of losses, of pairs ranked right
        padded = 2 * lengths[minibatch].max(1)               # (batch_size,) tokens of a pair
        for micro in micro_batches(padded, cfg.micro_tokens, ranks)[rank()::ranks]:
            mb = [rows[2 * i + side] for i in minibatch[micro] for side in (0, 1)]       # 2b rows
            batch = pad(mb, device)
            scalars = model(*batch)                                                      # (2b, R)
            sft_entropy = torch.zeros_like(scalars)                                      # (2b, R)
            if cfg.granularity == "segment":
                with torch.no_grad():
                    _, sft_entropy = sft(*batch)
            scores = sequence_score(scalars, ends_of(mb, sft_entropy))                   # (2b,)
            chosen, rejected = scores[0::2], scores[1::2]                                # (b,)
            losses = bradley_terry(chosen, rejected)                                     # (b,)
            # FSDP averages gradients over the ranks, so each pair weighs ranks / batch_size
            (losses.sum() * ranks / cfg.batch_size).backward()
            sums += torch.stack([losses, chosen > rejected]).detach().sum(1)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm).full_tensor()
        if not grad_norm.isfinite():
            fail(f"step {step + 1}: the gradient is not finite; start again with a lower --lr")
        optimizer.param_groups[0]["lr"] = lr = cfg.lr * learning_rate(step, steps, cfg.warmup)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        dist.all_reduce(sums)
        loss, accuracy = (sums / cfg.batch_size).tolist()
        tokens = int(lengths[minibatch].sum())
        seconds = time.time() - started
        row = {"step": done, "loss": loss, "accuracy": accuracy, "grad_norm": float(grad_norm),
               "lr": lr, "time_step": seconds, "tokens_per_second": tokens / seconds}
        line = f"step {done}/{steps} | loss {loss:.4f} | accuracy {accuracy:.2f} | grad norm " \
               f"{grad_norm:.2f} | {row['tokens_per_second']:,.0f} tokens/s"
        if done % cfg.eval_every == 0 or done == steps:
            row["eval_accuracy"] = accuracy_held_out()
            line += f" | held-out accuracy {row['eval_accuracy']:.3f}"
        log_metrics(cfg, row)
        left = (time.time() - began) / (done - first_step) * (steps - done)
        if done % 10 == 0 or done == steps or seconds > 5:
            say(f"{line} | {left:.0f} s left")
        if done % cfg.save_every == 0 or done == steps:
            save(cfg, done, trained, model, tokenizer, dtype)
    finish_run(cfg)


if __name__ == "__main__":
    main(parse(Config))
    dist.destroy_process_group()
