"""Chapter 3 of 4: PPO on segment rewards.

    python train_ppo.py                                               # the embedded world, a minute
    python train_ppo.py --reward_model out/rm-bandit/model --out out/ppo-bandit     # classical RLHF
    torchrun --nproc_per_node=8 train_ppo.py @config/llama3.1-8b-segment-ppo.args   # 8 GPUs

One iteration (arXiv 2501.02790, section 2.4):
    1. sample      a response to each prompt from the policy, at temperature 1
    2. score       log-probs of policy and SFT model, critic values, scalars of the reward model;
                   the SFT model's entropies cut the responses into segments
    3. advantages  segment rewards normalised by location, spread over the segment's tokens, minus
                   the KL penalty of each token; GAE; whitened
    4. update      clipped policy and value losses, minibatch by minibatch

What differs from the authors' code: the normaliser is fitted when training starts, not looked up by
a name; every random draw is a function of (seed, iteration, row), so that a run can be killed and
resumed, or moved to another number of GPUs, and draws the same noise; masks come from lengths; the
critic's head starts at zero. Two defaults are the embedded world's and not the paper's:
--reward_scale total and --missing_eos_reward -3 (the paper: none and 0).
"""
import functools
import inspect
import json
import math
import os
import resource
import runpy
import time
from dataclasses import dataclass
from typing import Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, StaticLayer

from segment import (WORLD, Dtype, Granularity, LanguageModel, compute_dtype, encode_chats,
                     encode_prompts, fail, in_world, load_model, load_pairs,
                     load_prompts, load_tokenizer, map_rows, micro_batches, opt, pad, paint, parse,
                     prepare_world, prompt_text, rank, read_config, response_mask, say,
                     segment_locations, segment_texts, sequence_score, setup, special_tokens,
                     trained_how)
from train_rm import (Normalizer, ScalarModel, begin_run, finish_run, fit_normalizer, learning_rate,
                      log_metrics, look_at_run, place_rewards, save, shuffled, token_rewards)


@dataclass
class Config:
    # what to train on what
    model: str = opt(f"{WORLD}/sft", "the SFT model: policy, critic, reference, entropies")
    reward_model: str = opt("out/rm/model", "a model; or the truth: file.py:function of (prompt, "
                            "response) -> [(value, index of its last token), ...]")
    data: str = opt(f"{WORLD}/prompts.jsonl", "prompts (the paper's: config/paper-ppo.args)")
    out: str = opt("out/ppo", "output folder")
    gold: Optional[str] = opt(None, "file.py:function of (prompt, response): true reward, to log")
    max_samples: int = opt(0, "read at most this many prompts (0: all)")
    # the reward
    granularity: Optional[Granularity] = opt(None, "default: as the reward model was trained")
    cutoff: Optional[float] = opt(None, "nats; default: the reward model's")
    normalizer: Literal["location", "global", "last", "none"] = opt("location", "statistics to use")
    interpolation: Literal["even", "repeat", "end"] = opt("even", "of a segment's reward")
    reward_scale: Literal["total", "none"] = opt("total", "divide by S (paper: none)")
    fit: str = opt("", "'w_mean w_std b_mean b_std', published, instead of calibrating")
    calibration_data: Optional[str] = opt(None, "preferences that were not trained on")
    calibration_samples: int = opt(2000, "read at most this many pairs of them")
    kl_coef: float = opt(0.03, "price of a nat away from the SFT model (paper: 0.01)")
    missing_eos_reward: float = opt(-3.0, "at the end of an unfinished response (paper: 0)")
    divide_by_length: bool = opt(False, "rewards / response length (paper: Llama-3-SFT, token)")
    bad_length: int = opt(0, "longer or unfinished: --bad_length_reward (Llama-3.1: 800; 0: off)")
    bad_length_reward: float = opt(-0.05, "at every token")
    # sampling
    rollout_batch_size: int = opt(64, "responses an iteration, over all GPUs (paper: 1024)")
    generation_batch_size: int = opt(128, "responses decoded at once on one GPU")
    max_prompt_tokens: int = opt(128, "longer prompts lose their oldest tokens (paper: 1024)")
    max_new_tokens: int = opt(128, "paper: 1024")
    cuda_graphs: bool = opt(True, "record a decode step and replay it (CUDA)")
    # optimisation
    max_steps: int = opt(30, "iterations (0: --passes over the prompts)")
    passes: int = opt(1, "over the prompts, with --max_steps 0 (paper: Phi-3 2, Llama 1)")
    batch_size: int = opt(16, "responses an optimizer step, over all GPUs (paper: 128)")
    ppo_epochs: int = opt(1, "passes over each rollout")
    actor_lr: float = opt(3e-4, "peak (paper: 5e-7)")
    critic_lr: float = opt(1e-3, "peak (paper: 9e-6)")
    gamma: float = opt(1.0, "discount")
    lam: float = opt(0.95, "GAE's lambda")
    clip: float = opt(0.2, "policy ratio clip")
    value_clip: float = opt(0.2, "value clip (paper: 0.25 for segment and token)")
    warmup: float = opt(0.03, "share of the optimizer steps")
    clip_norm: float = opt(1.0, "gradient norms are clipped to this")
    seed: int = opt(0, "of prompts, samples and minibatches")
    # hardware
    dtype: Dtype = opt("auto", "to compute in: bf16 on CUDA, fp32 on CPU (masters are fp32)")
    micro_tokens: int = opt(16384, "tokens in one GPU's forward pass: lower it when out of memory")
    grad_checkpoint: bool = opt(False, "recompute activations: less memory, a third more time")
    # bookkeeping
    sample_every: int = opt(5, "iterations between printed samples")
    save_every: int = opt(10, "iterations between checkpoints (paper: 5)")
    resume: bool = opt(False, "continue an unfinished run")
    wandb: str = opt("", "log to this wandb project too")


# -- The method. 1. sampling: a decode loop in blocks of equal steps -------------------------------
@torch.no_grad()
def generate(hf, prompts, stops, max_new_tokens, seeds, temperature=1.0, banned=None, record=None):
    """Sample a response to each prompt from the full distribution.

    hf: a Hugging Face causal LM; prompts: B id arrays; stops: (n,) ids; seeds: a tuple of ints for
    each prompt, on which alone its sample depends, not on its batch; temperature 0: greedy; banned:
    bool (V,), never sampled; record: see `cuda_graph`. Returns tokens (B, R) int64, their log-probs
    (B, R) under the model, and lengths (B,), the stop token included; 0 on padding.

    Inside a block all shapes are fixed, every tensor is changed in place and the CPU waits for
    nothing, so that a step can be recorded and replayed. Between blocks the CPU looks: finished
    rows leave, the cache gets room, noise is drawn. Looking late costs time and changes nothing.
    """
    device, B = hf.device, len(prompts)
    stops = stops.to(device)
    V = hf.get_output_embeddings().weight.shape[0]
    block = 64 if device.type == "cuda" else 16
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)             # (B, R)
    logprobs = torch.zeros(B, max_new_tokens, device=device)                             # (B, R)
    generators = []
    for seed in seeds:
        number = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
        generators.append(torch.Generator(device).manual_seed(number))

    # The cache takes each prompt but its last token, left-padded (only here). Then every step is
    # the same: put in a token, draw the next.
    P = max(len(p) for p in prompts)
    ids = torch.zeros(B, P, dtype=torch.long, device=device)                             # (B, P)
    mask = torch.zeros(B, P, dtype=torch.long, device=device)                            # (B, P)
    for b, p in enumerate(prompts):
        ids[b, P - len(p):] = torch.as_tensor(p, device=device)
        mask[b, P - len(p):] = 1
    position = (mask.cumsum(1) - 1).clamp(min=0)                                         # (B, P)
    cache = Cache(layers=[StaticLayer(P - 1) for _ in range(hf.config.num_hidden_layers)])
    cached = {"use_cache": True, "past_key_values": cache}
    if "cache" in inspect.signature(hf.forward).parameters:      # its name since transformers 5.24
        cached = {"use_cache": True, "cache": cache}
    if P > 1:
        hf(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=position[:, :-1],
           logits_to_keep=1, **cached)
    token = ids[:, -1:]                                      # (b, 1)
    position = position[:, -1:]                              # (b, 1)
    mask = mask[:, :-1]                                      # (b, cache) 0 on the left padding
    live = torch.ones(B, dtype=torch.bool, device=device)    # (b,) no stop token yet
    row = torch.arange(B, device=device)                     # (b,) the prompt that a row answers

    def step():                   # on tensors that the loop below makes anew for each block
        logits = hf(input_ids=token, attention_mask=mask, position_ids=position,
                    **cached).logits[:, -1].float()                                      # (b, V)
        scores = logits
        if banned is not None:
            scores = scores.masked_fill(banned, -math.inf)
        if temperature > 0:
            # the token with the smallest Exponential(1) noise / p wins with probability p
            scores = scores / temperature - noise.index_select(0, k)[0].log()
        drawn = scores.argmax(-1, keepdim=True)                                          # (b, 1)
        logprob = logits.log_softmax(-1).gather(1, drawn)                                # (b, 1)
        block_tokens.index_copy_(0, k, drawn.T)
        block_logprobs.index_copy_(0, k, logprob.T)
        live.logical_and_((drawn != stops).all(1))
        token.copy_(drawn)
        position.add_(1)
        k.add_(1)

    for first in range(0, max_new_tokens, block):
        keep = live.nonzero()[:, 0]                          # here the CPU waits for the GPU
        if not len(keep):
            break
        row = row[keep]
        live = live[keep]
        token = token[keep]
        position = position[keep]
        mask = F.pad(mask[keep], (0, block), value=1)
        for layer in cache.layers:
            layer.max_cache_len += block
            if layer.is_initialized:
                layer.keys = F.pad(layer.keys[keep], (0, 0, 0, block))
                layer.values = F.pad(layer.values[keep], (0, 0, 0, block))
        k = torch.zeros(1, dtype=torch.long, device=device)              # step within the block
        block_tokens = torch.zeros(block, len(row), dtype=torch.long, device=device)     # (n, b)
        block_logprobs = torch.zeros(block, len(row), device=device)                     # (n, b)
        noise = torch.ones(block, len(row), V, device=device)                            # (n, b, V)
        if temperature > 0:
            for b, i in enumerate(row.tolist()):
                draws = torch.empty(block, V, device=device)
                noise[:, b] = draws.exponential_(generator=generators[i])
        steps = min(block, max_new_tokens - first)
        if record:                                           # does the first step, returns the next
            replay = record(step)
            for _ in range(steps - 1):
                replay()
        else:
            for _ in range(steps):
                step()
        tokens[row, first:first + steps] = block_tokens[:steps].T
        logprobs[row, first:first + steps] = block_logprobs[:steps].T

    stop = (tokens[..., None] == stops).any(-1)                                          # (B, R)
    first_stop = stop.int().argmax(1)                                                    # (B,)
    lengths = torch.where(stop.any(1), first_stop + 1, max_new_tokens)                   # (B,)
    mask = torch.arange(max_new_tokens, device=device) < lengths[:, None]                # (B, R)
    return tokens * mask, logprobs * mask, lengths


@functools.cache
def side_stream():
    """The same for every recording: a new one would hold memory of its own."""
    return torch.cuda.Stream()


def cuda_graph(step):
    """Run a step, record the next without running it, return its replay: one launch for a thousand
    kernels."""
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    return graph.replay


def can_record(config, device):
    """Rope that changes with the length, and deterministic kernels, need the CPU in every step."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    changes = rope.get("rope_type") in ("dynamic", "longrope")
    deterministic = torch.are_deterministic_algorithms_enabled()
    return device.type == "cuda" and not changes and not deterministic


def sample(hf, prompts, stops, R, seeds, batch_size, temperature=1.0, banned=None, graphs=True):
    """`generate` by all ranks, a part of the prompts each, sorted by length; every rank gets all:
    tokens (B, R), log-probs (B, R), lengths (B,)."""
    B = len(prompts)
    record = cuda_graph if graphs and can_record(hf.config, hf.device) else None
    tokens = torch.zeros(B, R, dtype=torch.long, device=hf.device)                       # (B, R)
    logprobs = torch.zeros(B, R, device=hf.device)                                       # (B, R)
    lengths = torch.zeros(B, dtype=torch.long, device=hf.device)                         # (B,)
    by_length = np.argsort([len(p) for p in prompts], kind="stable")
    mine = by_length[rank()::dist.get_world_size()]
    for k in range(0, len(mine), batch_size):
        wave = mine[k:k + batch_size].tolist()
        tokens[wave], logprobs[wave], lengths[wave] = generate(
            hf, [prompts[b] for b in wave], stops, R, [seeds[b] for b in wave], temperature, banned,
            record)
    for x in (tokens, logprobs, lengths):
        dist.all_reduce(x)
    return tokens, logprobs, lengths


def plain_copy(model, dtype, device):
    """A whole Hugging Face model on every rank, to decode with: on shards, decoding would gather
    every layer for every token."""
    with device:
        hf = model.auto_class.from_config(model.hf.config, dtype=dtype)
    refresh(hf, model)
    return hf.eval().requires_grad_(False)


@torch.no_grad()
def refresh(hf, model):
    """The copy gets the model's weights of today."""
    for p, q in zip(hf.parameters(), model.hf.parameters(), strict=True):
        p.copy_(q.full_tensor())
    for p, q in zip(hf.buffers(), model.hf.buffers(), strict=True):
        p.copy_(q)


def never_sampled(tokenizer, stops, vocab_size):
    """bool (V,): special tokens that stop nothing, and rows of the embedding that are no token."""
    banned = torch.arange(vocab_size) >= len(tokenizer)
    banned[[i for i in special_tokens(tokenizer).values() if i < vocab_size]] = True
    banned[stops] = False
    return banned


# -- The method. 2. the reward: calibrated once, then dense ----------------------------------------
def calibrate(rewards, ends, mask, kind, how):
    """Fit the normaliser, and S: the standard deviation over responses of the total normalised
    reward (ours: n segments sum to about n times a bandit's reward, and one KL coefficient cannot
    serve both). rewards, ends, mask: (B, R) of calibration responses. Returns Normalizer, S."""
    p = segment_locations(ends)[ends].cpu()                                              # (N,)
    y = rewards[ends].cpu()                                                              # (N,)
    try:
        if kind == "location":
            normalizer = fit_normalizer(p, y)
        elif kind == "global":
            normalizer = fit_normalizer(torch.ones_like(p), y)       # as if all lay at p = 1
        elif kind == "last":
            normalizer = fit_normalizer(p[p == 1], y[p == 1])
        else:
            normalizer = Normalizer()
    except ValueError as error:
        fail(f"calibration on {len(rewards)} responses: {error}")
    total = token_rewards(rewards, ends, mask, normalizer, how).sum(1)                   # (B,)
    S = float(total.std(correction=0))
    if not S > 0:
        fail(f"calibration on {len(rewards)} responses: all have the same total reward")
    return normalizer, S


def dense_rewards(cfg, rewards, ends, mask, finished, normalizer, how, scale):
    """The reward of each token before the KL penalty: normalised, spread, scaled, clamped, then the
    rules for length and EOS. rewards, ends, mask: (B, R); finished: (B,). Returns (B, R)."""
    lengths = mask.sum(1)                                                                # (B,)
    dense = token_rewards(rewards, ends, mask, normalizer, how) / scale
    dense = dense.clamp(-10, 10)
    if cfg.divide_by_length:
        dense = dense / lengths[:, None]
    row = torch.arange(len(dense), device=dense.device)                                  # (B,)
    dense[row, lengths - 1] += cfg.missing_eos_reward * ~finished
    if cfg.bad_length:
        bad = ~finished | (lengths > cfg.bad_length)                                     # (B,)
        dense = torch.where(bad[:, None] & mask, cfg.bad_length_reward, dense)
    return dense


# -- The method. 3. advantages and losses ----------------------------------------------------------
def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, equation 16) over response tokens.

    All (B, R); mask: bool, a prefix of each row. Nothing is bootstrapped after the last token.
    Returns advantages and returns = advantages + values, 0 on padding.
    """
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(rewards)
    last_advantage = next_value = 0.0
    for r in reversed(range(rewards.shape[1])):
        delta = rewards[:, r] + gamma * next_value - values[:, r]                        # (B,)
        last_advantage = delta + gamma * lam * last_advantage
        advantages[:, r] = last_advantage
        next_value = values[:, r]
    return advantages * mask, (advantages + values) * mask


def whiten(x, mask):
    """Mean 0, population deviation 1 over all valid tokens. x, mask: (B, R), of all ranks."""
    mean = x[mask].mean()
    deviation = x[mask].std(correction=0)
    return torch.where(mask, (x - mean) / (deviation + 1e-8), 0.0)


def mean_tokens(x, mask):
    """Mean over each response's tokens: a long response weighs no more. (B, R) -> (B,)"""
    total = torch.where(mask, x, 0.0).sum(1)                                             # (B,)
    return total / mask.sum(1).clamp(min=1)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """PPO's clipped policy loss. (B, R) each; returns loss (B,) and the ratio (B, R)."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    return mean_tokens(loss, mask), ratio


def value_loss(values, old_values, returns, mask, clip):
    """PPO's clipped value loss. (B, R) each; returns (B,)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    worse = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return mean_tokens(0.5 * worse, mask)


# ==================================================================================================
# Plumbing. Where rewards come from
# ==================================================================================================
def load_function(spec, flag):
    """file.py:name -> f(prompt text, response text, finished), which passes `finished` on to a
    function that takes it."""
    path, _, name = spec.rpartition(":")
    function = os.path.isfile(path) and runpy.run_path(path).get(name)
    if not function:
        fail(f"{flag} {spec}: must be file.py:function; there is no such file, or function in it")
    if "finished" in inspect.signature(function).parameters:
        return lambda prompt, response, finished: function(prompt, response, finished=finished)
    return lambda prompt, response, finished: function(prompt, response)


def same_tokens(mine, theirs):
    """Do two tokenizers give every token the same id? Special tokens may be missing from one: many
    reward models add a pad token, which nobody reads."""
    special = special_tokens(mine) | special_tokens(theirs)
    a = {token: i for token, i in mine.get_vocab().items() if token not in special}
    b = {token: i for token, i in theirs.get_vocab().items() if token not in special}
    return a == b


class Reward:
    """A reward model, or the truth, and how it is used: what it was trained on (`own`), what PPO
    makes of it (`use`), the cutoff, and `how` a segment's reward is spread."""

    def __init__(self, cfg, tokenizer, stops, dtype, device):
        self.cfg, self.tokenizer, self.stops, self.device = cfg, tokenizer, stops, device
        self.function = None
        self.own, cutoff = trained_how(cfg.reward_model, cfg.granularity, cfg.cutoff)
        if ".py:" in cfg.reward_model:
            self.function = load_function(cfg.reward_model, "--reward_model")
        else:
            trained_with = getattr(read_config(cfg.reward_model), "segment_model", cfg.model)
            if trained_with != cfg.model:
                say(f"note: {cfg.reward_model} was trained on the segments of {trained_with}")
            if not same_tokens(tokenizer, load_tokenizer(cfg.reward_model)[0]):
                fail(f"--reward_model {cfg.reward_model}: its tokens are not those of {cfg.model}")
            self.model = load_model(cfg.reward_model, ScalarModel, device, dtype)
        self.use = cfg.granularity or self.own
        self.cutoff = cutoff if cfg.cutoff is None else cfg.cutoff
        # a bandit's reward sits at the last token
        self.how = "end" if self.use == "bandit" else cfg.interpolation

    def at_ends(self, rows, texts, sft_entropy):
        """Rewards and segment ends, (B, R), of B (prompt ids, response ids); texts: B prompts."""
        mask, finished = response_mask(rows, self.stops, self.device)            # (B, R), (B,)
        if not self.function:
            scalars = map_rows(self.model, rows, self.cfg.micro_tokens, self.device, "rewards")
        else:
            # what a model that knows the truth would say: each token holds its segment's value
            scalars = torch.zeros(mask.shape, device=self.device)                        # (B, R)
            for b, (_, response) in enumerate(rows):
                first = 0
                answer = self.tokenizer.decode(response, skip_special_tokens=True)
                segments = self.function(texts[b], answer, bool(finished[b]))
                for value, end in segments:
                    scalars[b, first:end + 1] = value
                    first = end + 1
                if first > len(response):
                    fail(f"--reward_model: a segment ends at {end} of {len(response)} tokens")
                if self.use == "bandit":
                    scalars[b] = sum(value for value, _ in segments) / max(1, len(segments))
        return place_rewards(scalars, sft_entropy, mask, finished, self.cutoff, self.own, self.use)

    def calibrate(self, reference):
        """The normaliser and the scale: published (--fit), kept by the run to resume, or fitted
        now to responses that the reward model was not trained on."""
        cfg = self.cfg
        if os.path.exists(f"{cfg.out}/config.json"):
            with open(f"{cfg.out}/config.json") as f:
                kept = json.load(f)["calibration"]
            return Normalizer.from_dict(kept["normalizer"]), kept["scale"]
        if cfg.fit:
            w_mean, w_std, b_mean, b_std = [float(x) for x in cfg.fit.split()]
            return Normalizer(w_mean=w_mean, w_std=w_std, b_mean=b_mean, b_std=b_std), 1.0
        source = cfg.calibration_data or f"{WORLD}/pairs_test.jsonl"
        chats, texts = [], []
        for prompt, chosen, rejected, where in load_pairs(source, cfg.calibration_samples):
            chats.append((prompt, [chosen, rejected], where))
            texts += [prompt_text(prompt)] * 2
        rows = encode_chats(self.tokenizer, self.stops, chats,
                            cfg.max_prompt_tokens + cfg.max_new_tokens, cfg.max_prompt_tokens)
        _, sft_entropy = map_rows(reference, rows, cfg.micro_tokens, self.device, "calibration")
        rewards, ends = self.at_ends(rows, texts, sft_entropy)                           # (2n, R)
        mask, _ = response_mask(rows, self.stops, self.device)                           # (2n, R)
        normalizer, S = calibrate(rewards, ends, mask, cfg.normalizer, self.how)
        fit = {name: round(value, 3) for name, value in normalizer.to_dict().items()}
        say(f"calibrated on {source}, {len(rows)} responses: {fit}, S {S:.3g}")
        return normalizer, S if cfg.reward_scale == "total" else 1.0


# -- Plumbing. What is refused, what is shown ------------------------------------------------------
def check(cfg, prompts, ranks):
    if len(prompts) < cfg.rollout_batch_size:
        fail(f"{cfg.data}: {len(prompts)} prompts do not fill one --rollout_batch_size "
             f"{cfg.rollout_batch_size}")
    if cfg.rollout_batch_size % cfg.batch_size or cfg.batch_size % ranks:
        fail(f"--rollout_batch_size {cfg.rollout_batch_size} must be a multiple of --batch_size "
             f"{cfg.batch_size}, and that of the {ranks} ranks")
    context = read_config(cfg.model).max_position_embeddings
    if cfg.max_prompt_tokens + cfg.max_new_tokens > context:
        fail(f"--max_prompt_tokens {cfg.max_prompt_tokens} + --max_new_tokens {cfg.max_new_tokens} "
             f"is more than the context of {cfg.model}, {context}")
    if cfg.fit and (cfg.reward_scale != "none" or len(cfg.fit.split()) != 4):
        fail("--fit takes 'w_mean w_std b_mean b_std' and --reward_scale none: S is not known")
    if in_world(cfg.data):
        return
    if not cfg.fit and not cfg.calibration_data:
        fail("--calibration_data: give preference pairs that the reward model was not trained on; "
             "train_rm.py prints the name of those that it held out")
    if cfg.missing_eos_reward == -3 or cfg.reward_scale == "total":
        say("note: --missing_eos_reward -3 and --reward_scale total are defaults of the embedded "
            "world; the paper has 0 and none")


def show(row, steps, seconds_left):
    """The log line of an iteration."""
    line = f"step {row['step']}/{steps}"
    for name in ("reward", "gold", "kl", "response_length", "finished", "clip_fraction",
                 "explained_variance", "tokens_per_second"):
        if name in row:
            line += f" | {name.replace('_', ' ')} {row[name]:,.2f}"
    say(f"{line} | {seconds_left:.0f} s left")


def peak_memory():
    """In GB, of the GPU or else of the process."""
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (torch.cuda.max_memory_allocated() or process) / 2 ** 30


# ==================================================================================================
# The run
# ==================================================================================================
def main(cfg):
    device = setup()
    if look_at_run(cfg):
        return
    prepare_world(cfg.model, cfg.data)
    ranks, dtype = dist.get_world_size(), compute_dtype(cfg.dtype, device)
    tokenizer, stops = load_tokenizer(cfg.model)
    chats = load_prompts(cfg.data, cfg.max_samples)
    check(cfg, chats, ranks)
    prompts = encode_prompts(tokenizer, chats, cfg.max_prompt_tokens, cfg.data)
    gold = cfg.gold
    if gold is None and in_world(cfg.data):
        gold = f"{WORLD}/prepare.py:gold_reward"
    gold_function = load_function(gold, "--gold") if gold else None

    # the models: two that learn, two that are frozen, and a plain copy of the actor to sample from
    reward = Reward(cfg, tokenizer, stops, dtype, device)
    reference = load_model(cfg.model, LanguageModel, device, dtype)
    normalizer, scale = reward.calibrate(reference)
    actor = load_model(cfg.model, LanguageModel, device, dtype, train=True,
                       grad_checkpoint=cfg.grad_checkpoint)
    critic = load_model(cfg.model, ScalarModel, device, dtype, train=True,
                        grad_checkpoint=cfg.grad_checkpoint, head_std=0.0)
    critic.shift = -1
    sampler = plain_copy(actor, dtype, device)
    banned = never_sampled(tokenizer, stops, actor.hf.config.vocab_size).to(device)
    actor_optimizer, critic_optimizer = [
        torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
        for model in (actor, critic)]
    trained = {"actor": (actor, actor_optimizer), "critic": (critic, critic_optimizer)}
    calibration = {"normalizer": normalizer.to_dict(), "scale": scale}
    first_step = begin_run(cfg, trained, calibration=calibration)

    B = cfg.rollout_batch_size
    steps = cfg.max_steps or max(1, cfg.passes * len(prompts) // B)
    updates = cfg.ppo_epochs * B // cfg.batch_size           # in an iteration
    passes = math.ceil(steps * B / len(prompts))
    prompt_order = shuffled(len(prompts), passes, cfg.seed, 0)
    say(f"{steps} iterations x {B} responses on {ranks} x {device.type}, in each {updates} updates "
        f"x {cfg.batch_size} responses")
    say(f"{reward.own} reward used as {reward.use}, cutoff {reward.cutoff}, scale {scale:.3g}")

    began = time.time()
    for step in range(first_step, steps):
        # 1. sample: each rank decodes its rows, every rank gets all of them -----------------------
        time_start = time.time()
        refresh(sampler, actor)
        drawn = prompt_order[step * B:(step + 1) * B]        # (B,) rows of --data
        tokens, sampled_logprobs, lengths = sample(                          # (B, R), (B, R), (B,)
            sampler, [prompts[i] for i in drawn], stops, cfg.max_new_tokens,
            [(cfg.seed, 1, step, b) for b in range(B)], cfg.generation_batch_size, banned=banned,
            graphs=cfg.cuda_graphs)
        tokens = tokens.int().cpu().numpy()
        responses = [t[:n] for t, n in zip(tokens, lengths.tolist())]
        rows = [(prompts[i], response) for i, response in zip(drawn, responses)]
        texts = [prompt_text(chats[i]) for i in drawn]
        mask, finished = response_mask(rows, stops, device)                      # (B, R), (B,)

        # 2. score: the models read the rows; every rank gets all results, (B, R) each -------------
        time_score = time.time()
        logprobs, policy_entropy = map_rows(actor, rows, cfg.micro_tokens, device)
        ref_logprobs, sft_entropy = map_rows(reference, rows, cfg.micro_tokens, device)
        values = map_rows(critic, rows, cfg.micro_tokens, device)
        rewards, ends = reward.at_ends(rows, texts, sft_entropy)

        # 3. advantages: how much better was each token than the critic expected? ------------------
        dense = dense_rewards(cfg, rewards, ends, mask, finished, normalizer, reward.how, scale)
        kl = logprobs - ref_logprobs                         # (B, R) one sample's log-ratio, +-
        advantages, returns = gae(dense - cfg.kl_coef * kl, values, mask, cfg.gamma, cfg.lam)
        advantages = whiten(advantages, mask)                                            # (B, R)

        # 4. update: each minibatch is one optimizer step of actor and critic ----------------------
        time_train = time.time()
        row_lengths = [len(p) + len(r) for p, r in rows]
        sums = torch.zeros(3, device=device)                 # of losses and clipped shares
        norms = torch.zeros(2, device=device)                # of the gradients
        first_ratio = torch.ones((), device=device)          # 1 + its largest distance from 1
        order = shuffled(B, cfg.ppo_epochs, cfg.seed, 2, step)
        for update, minibatch in enumerate(order.reshape(updates, cfg.batch_size)):
            mb_lengths = [row_lengths[b] for b in minibatch]
            for micro in micro_batches(mb_lengths, cfg.micro_tokens, ranks)[rank()::ranks]:
                mb = minibatch[micro]
                batch = pad([rows[b] for b in mb], device)
                R = int(lengths[mb].max())
                mb_mask, mb_logprobs, mb_values, mb_advantages, mb_returns = [
                    x[mb, :R] for x in (mask, logprobs, values, advantages, returns)]    # (b, R)
                # FSDP averages gradients over the ranks: a response weighs ranks / batch_size
                weight = ranks / cfg.batch_size
                new_logprobs, _ = actor(*batch)                                          # (b, R)
                policy_losses, ratio = policy_loss(new_logprobs, mb_logprobs, mb_advantages,
                                                   mb_mask, cfg.clip)                    # (b,)
                (policy_losses.sum() * weight).backward()
                new_values = critic(*batch)                                              # (b, R)
                value_losses = value_loss(new_values, mb_values, mb_returns, mb_mask,
                                          cfg.value_clip)                                # (b,)
                (value_losses.sum() * weight).backward()
                away = (ratio.detach() - 1).abs() * mb_mask                              # (b, R)
                clipped = mean_tokens((away > cfg.clip).float(), mb_mask)                # (b,)
                sums += torch.stack([policy_losses, value_losses, clipped]).detach().sum(1)
                if update == 0:
                    first_ratio = torch.maximum(first_ratio, 1 + away.max())
            norm = torch.stack([nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm)
                                .full_tensor() for model in (actor, critic)])
            if not norm.isfinite().all():
                fail(f"iteration {step + 1}: a gradient is not finite; start again with a lower "
                     "--actor_lr, or look at the rewards")
            norms += norm
            rate = learning_rate(step * updates + update, steps * updates, cfg.warmup)
            for optimizer, peak in ((actor_optimizer, cfg.actor_lr),
                                    (critic_optimizer, cfg.critic_lr)):
                optimizer.param_groups[0]["lr"] = peak * rate
                optimizer.step()
                optimizer.zero_grad()
        dist.all_reduce(sums)
        dist.all_reduce(first_ratio, dist.ReduceOp.MAX)

        # what happened ----------------------------------------------------------------------------
        done = step + 1
        n = int(mask.sum())
        policy_mean, value_mean, clip_fraction = (sums / (cfg.ppo_epochs * B)).tolist()
        actor_norm, critic_norm = (norms / updates).tolist()
        error = (returns - values)[mask]                                                 # (N,)
        unexplained = error.var() / returns[mask].var().clamp(min=1e-12)
        gap = (logprobs - sampled_logprobs[:, :mask.shape[1]]).abs().max()
        time_end = time.time()
        row = {
            "step": done, "reward": float(sequence_score(rewards, ends).mean()),
            "reward_total": float(dense.sum(1).mean()),
            "kl": float(kl.sum(1).mean()), "kl_per_token": float(kl.sum() / n),
            "response_length": n / B, "response_tokens": n,
            "segment_length": n / max(1, int(ends.sum())),
            "finished": float(finished.float().mean()),
            # after each token but the last, that is where the next one was decided on
            "entropy": float(policy_entropy[:, :-1][mask[:, 1:]].mean()),
            "policy_loss": policy_mean, "value_loss": value_mean, "clip_fraction": clip_fraction,
            "first_ratio": float(first_ratio), "sampler_gap": float(gap),
            "explained_variance": float(1 - unexplained), "actor_grad_norm": actor_norm,
            "critic_grad_norm": critic_norm, "lr": cfg.actor_lr * rate,
            "time_generate": time_score - time_start, "time_score": time_train - time_score,
            "time_train": time_end - time_train, "memory_gb": peak_memory(),
            "tokens_per_second": sum(row_lengths) / (time_end - time_start)}
        if gold_function:
            answers = tokenizer.batch_decode(responses, skip_special_tokens=True)
            golds = list(map(gold_function, texts, answers, finished.tolist()))
            row["gold"] = float(np.mean(golds))
        log_metrics(cfg, row)
        seconds = (time.time() - began) / (done - first_step)
        show(row, steps, seconds * (steps - done))
        if done % cfg.sample_every == 0 or done == steps:
            cuts = ends[0, :lengths[0]].cpu()
            painted = paint(segment_texts(tokenizer, responses[0], cuts),
                            rewards[0, ends[0]].tolist())
            say(f"  {texts[0].strip()}\n  {painted}")
        if done % cfg.save_every == 0 or done == steps:
            save(cfg, done, trained, actor, tokenizer, dtype)
    finish_run(cfg)


if __name__ == "__main__":
    main(parse(Config))
    dist.destroy_process_group()
