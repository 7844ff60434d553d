"""Chapter 3 of 4: PPO on segment rewards.

    python train_ppo.py                                                 # the embedded world, under a minute of CPU
    torchrun --nproc_per_node=8 train_ppo.py @config/llama3.1-8b-segment-ppo.args       # one node of 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_ppo.py @config/...
    python train_ppo.py --reward_model out/rm-bandit/model --out out/ppo-bandit         # classical RLHF, to compare

One iteration, section 2.4 of the paper:
    1. sample      a response to each prompt from the policy, at temperature 1
    2. score       log-probs of policy and SFT model, critic values, scalars of the reward model;
                   the SFT model's entropies cut the response into segments
    3. advantages  segment rewards normalised by location, spread evenly over the segment's tokens, minus the KL
                   penalty per token; GAE; whitened
    4. update      clipped policy and value losses, minibatch by minibatch

Deviations from the authors' code: every random draw is a function of (seed, iteration, row), so that a run can be
killed and resumed, or moved to another number of GPUs, and gives the same numbers; statistics come from reward.json,
never from a table looked up by name; masks come from lengths; the critic's head starts at zero; two defaults are the
embedded world's, not the paper's: --reward_scale total and --missing_eos_reward -3 (the paper: none, 0).
"""
import functools
import math
import os
import time
from dataclasses import dataclass
from typing import Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from segment import (WORLD, Granularity, LanguageModel, compute_dtype, encode_prompts, fail, in_world, is_finished,
                     load_model, load_prompts, load_tokenizer, map_rows, micro_batches, on_rank0, one_line, opt, pad,
                     paint, prepare_world, rank, read_config, read_tokenizer, say, segment_texts, sequence_score, setup,
                     start)
from train_rm import (Normalizer, ScalarModel, StopSignal, already_finished, begin_run, export, fingerprint, finish_run,
                      hardware, learning_rate, load_checkpoint, load_function, log_metrics, normalized_token_rewards,
                      oracle_scalars, read_reward_json, rewards_at_ends, save_checkpoint, spread_rewards)


@dataclass
class Config:
    # what to train on what
    model: str = opt(f"{WORLD}/sft", "the SFT model: start of policy and critic, reference, source of entropies")
    reward_model: str = opt("out/rm/model", "an output of train_rm.py, with its reward.json")
    data: str = opt(f"{WORLD}/prompts.jsonl", "prompts (paper: argilla/ultrafeedback-binarized-preferences-cleaned)")
    out: str = opt("out/ppo", "output folder")
    gold: Optional[str] = opt(None, "file.py:function of (prompt, response), the true reward: logged, never used "
                              "(default: the embedded world's, if --data is)")
    oracle: str = opt("", "file.py:function giving true segment rewards, in place of the reward model's scalars")
    max_samples: int = opt(0, "read at most this many prompts (0: all)")
    # the reward
    granularity: Optional[Granularity] = opt(None, "how PPO uses the reward (default: as the reward model was trained)")
    cutoff: Optional[float] = opt(None, "nats (default: the reward model's own)")
    normalizer: Literal["location", "global", "last", "none"] = opt("location", "statistics to normalise rewards by")
    interpolation: Literal["even", "repeat", "end"] = opt("even", "how a segment's reward is given to its tokens")
    reward_scale: Literal["total", "none"] = opt("total", "divide by the deviation of a response's total (paper: none)")
    fit: str = opt("", "'w_mean w_std b_mean b_std', published, in place of reward.json; '' takes reward.json")
    kl_coef: float = opt(0.03, "price of a nat away from the SFT model (paper: 0.01 with --reward_scale none)")
    missing_eos_reward: float = opt(-3.0, "added at the last token of an unfinished response (paper: 0)")
    divide_by_length: bool = opt(False, "divide rewards by the response's length (paper: Llama-3-SFT, token)")
    bad_length: int = opt(0, "longer or unfinished responses get --bad_length_reward (Llama-3.1: 800; 0: off)")
    bad_length_reward: float = opt(-0.05, "at every token")
    # sampling
    rollout_batch_size: int = opt(64, "responses an iteration, over all GPUs (paper: 1024)")
    max_prompt_tokens: int = opt(128, "longer prompts lose their oldest tokens (paper: 1024)")
    max_new_tokens: int = opt(128, "paper: 1024")
    generation_batch_size: int = opt(128, "responses decoded at once on one GPU")
    # optimisation
    max_steps: int = opt(30, "iterations (0: --passes over the prompts)")
    passes: int = opt(1, "passes over the prompts (paper: Phi-3 2, Llama 1)")
    batch_size: int = opt(16, "responses an optimizer step, over all GPUs (paper: 128)")
    ppo_epochs: int = opt(1, "passes over each rollout")
    actor_lr: float = opt(3e-4, "peak (paper: 5e-7)")
    critic_lr: float = opt(1e-3, "peak (paper: 9e-6)")
    critic_init: Literal["sft", "reward_model"] = opt("sft", "where the critic starts; from sft, its head at zero")
    critic_warmup: int = opt(0, "first iterations that train the critic alone")
    gamma: float = opt(1.0, "discount")
    lam: float = opt(0.95, "GAE's lambda")
    clip: float = opt(0.2, "policy ratio clip")
    value_clip: float = opt(0.2, "value clip (paper: 0.25 for segment and token)")
    warmup: float = opt(0.03, "share of the optimizer steps")
    clip_norm: float = opt(1.0, "gradient norms are clipped to this")
    seed: int = opt(0, "of prompts, samples and minibatches")
    # hardware
    dtype: Literal["auto", "bf16", "fp32"] = opt("auto", "to compute in: bf16 on CUDA, fp32 on CPU (masters are fp32)")
    micro_tokens: int = opt(16384, "tokens in a GPU's forward pass, padding included; lower it when memory runs out")
    grad_checkpoint: bool = opt(False, "recompute activations in the backward pass: less memory, a third more time")
    deterministic: bool = opt(False, "CUDA: the same bits in every run, also a resumed one; slower (CPUs always do)")
    # bookkeeping
    sample_every: int = opt(5, "iterations between printed samples")
    save_every: int = opt(10, "iterations between checkpoints (paper: exported every 5)")
    resume: bool = opt(False, "continue an unfinished run")
    wandb: str = opt("", "log to this wandb project too")


# ------------------------------------------------------------------------------------------------------------
# Sampling: an explicit decode loop
# ------------------------------------------------------------------------------------------------------------
def race(luck, V):
    """(b,) int64 -> (b, V) exponential draws, each a hash (splitmix64) of luck and token. The token with the smallest
    draw / p wins with probability p. Unlike inverting a CDF, rounding moves just one boundary, not V of them: a
    sample hardly depends on the batch it is drawn in."""
    x = luck[:, None] + torch.arange(V, device=luck.device) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return -(((x >> 41 & (1 << 23) - 1) + 0.5) / 2 ** 23).log()


class RoomyLayer(DynamicLayer):
    """transformers' KV cache of one layer with room for 128 more tokens: theirs copies all of it for every new token,
    which on a GPU costs as much time as reading the weights."""

    def update(self, keys, values, *args, **kwargs):
        """keys, values: (b, heads, n, head size) of new tokens. Returns those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values, self.room = keys[:, :, :0], values[:, :, :0], None
        old, new = self.keys.shape[2], self.keys.shape[2] + keys.shape[2]
        if self.room is None or self.room[0].shape[2] < new:
            self.room = [torch.cat([x, x.new_empty(*y.shape[:2], y.shape[2] + 128, y.shape[3])], 2)
                         for x, y in ((self.keys, keys), (self.values, values))]
        for room, y in zip(self.room, (keys, values)):
            room[:, :, old:new] = y
        self.keys, self.values = (room[:, :, :new] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self.room = None


@torch.no_grad()
def generate(hf, prompts, stops, max_new_tokens, luck, temperature=1.0, banned=None):
    """Sample a response to each prompt from the full distribution, whatever the model's generation_config says.

    hf: a Hugging Face causal LM; prompts: list of B id arrays; stops: (n,) ids; luck: (B, max_new_tokens) random
    int64, a row per response, so that a sample depends on its row alone and not on its batch; temperature 0: greedy;
    banned: bool (V,), never sampled. Returns tokens (B, R) int64 and their log-probs (B, R)
    under the model, and lengths (B,), the stop token included.
    """
    device, B = hf.device, len(prompts)
    lengths = torch.tensor([len(p) for p in prompts], device=device)                        # (B,)
    P = int(lengths.max())
    ids = torch.zeros(B, P, dtype=torch.long, device=device)                                # left-padded, only here
    for b, p in enumerate(prompts):
        ids[b, P - len(p):] = torch.as_tensor(p, device=device)
    mask = torch.arange(P, device=device) >= P - lengths[:, None]                           # (B, P)
    luck, stops = luck.to(device), stops.to(device)
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)                # (B, R)
    logps = torch.zeros(B, max_new_tokens, device=device)                                   # (B, R)
    ended = torch.full((B,), max_new_tokens, device=device)                                 # (B,) response lengths
    row = torch.arange(B, device=device)                                                    # (b,) rows in the cache
    live = torch.ones(B, dtype=torch.bool, device=device)                                   # (b,)
    cache, positions = DynamicCache(config=hf.config), (mask.cumsum(1) - 1).clamp(min=0)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    for r in range(max_new_tokens):
        logits = hf(input_ids=ids, attention_mask=mask.long(), position_ids=positions, past_key_values=cache,
                    use_cache=True, logits_to_keep=1).logits[:, -1].float()                 # (b, V)
        logp = logits.log_softmax(-1)
        scores = logits if banned is None else logits.masked_fill(banned, -math.inf)
        if temperature > 0:
            scores = scores / temperature - race(luck[row, r], scores.shape[1]).log()       # (b, V)
        token = scores.argmax(-1)                                                           # (b,)
        tokens[row, r] = token * live
        logps[row, r] = logp.gather(1, token[:, None])[:, 0] * live
        ended[row] = torch.where(live & torch.isin(token, stops), r + 1, ended[row])
        live = ended[row] > r + 1
        alive = int(live.sum())                      # the one moment of a step in which the CPU waits for the GPU
        if alive == 0:
            break
        if alive < 0.75 * len(row):                  # finished rows leave the batch: most of the time is saved here
            keep = live.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            row, live, token, mask, positions = row[keep], live[keep], token[keep], mask[keep], positions[keep]
        ids, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(row), 1)], 1)                             # (b, P + r + 1)
    return tokens, logps, ended


def draw_luck(seeds, R):
    """[tuples of ints] -> (B, R) int64: what a response samples with is a function of its seed alone."""
    return torch.from_numpy(np.stack([np.random.default_rng(s).integers(2 ** 62, size=R) for s in seeds]))


def sample(hf, prompts, stops, R, seeds, batch_size, temperature=1.0, banned=None):
    """generate() by all ranks, a part of the prompts each, in batches of similar length; every rank gets all of it.
    seeds: a tuple of ints for each of the B prompts. Returns tokens (B, R), log-probs (B, R), lengths (B,)."""
    B = len(prompts)
    tokens = torch.zeros(B, R, dtype=torch.long, device=hf.device)                          # (B, R)
    logprobs, lengths = torch.zeros(B, R, device=hf.device), tokens.new_zeros(B)            # (B, R), (B,)
    mine = sorted(range(B), key=lambda b: len(prompts[b]))[rank()::dist.get_world_size()]
    for k in range(0, len(mine), batch_size):
        wave = mine[k:k + batch_size]
        tokens[wave], logprobs[wave], lengths[wave] = generate(
            hf, [prompts[b] for b in wave], stops, R, draw_luck([seeds[b] for b in wave], R), temperature, banned)
    for x in (tokens, logprobs, lengths):
        dist.all_reduce(x)
    return tokens, logprobs, lengths


def reads_alike(mine, theirs):
    """Do both tokenizers give every token the same id? Special tokens may be missing from one: many reward models add a
    pad token, which nobody ever reads."""
    a, b = mine.get_vocab(), theirs.get_vocab()
    special = {t.content for x in (mine, theirs) for t in x.added_tokens_decoder.values() if t.special}
    return all(a.get(t) == b.get(t) or t in special and (t not in a or t not in b) for t in a | b)


def never_sampled(tokenizer, stops, vocab_size):
    """bool (V,): special tokens that do not stop a response, and rows of the embedding that are no token."""
    banned = torch.arange(vocab_size) >= len(tokenizer)
    special = [i for i, t in tokenizer.added_tokens_decoder.items() if t.special and i < vocab_size]
    banned[special] = True
    banned[stops] = False
    return banned


# ------------------------------------------------------------------------------------------------------------
# Advantages
# ------------------------------------------------------------------------------------------------------------
def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, equation 16) over response tokens.

    All (B, R); mask: bool, True on response tokens, a prefix of each row. Nothing is bootstrapped after the last
    token. Returns advantages and returns = advantages + values, 0 on padding.
    """
    rewards, values = rewards * mask, values * mask
    advantages, last, following = torch.zeros_like(rewards), 0.0, 0.0
    for r in reversed(range(rewards.shape[1])):
        delta = rewards[:, r] + gamma * following - values[:, r]                            # (B,)
        advantages[:, r] = last = delta + gamma * lam * last
        following = values[:, r]
    return advantages * mask, (advantages + values) * mask


def whiten(x, mask):
    """Mean 0 and (population) deviation 1 over all valid tokens. x, mask: (B, R), the rollout of all ranks."""
    valid = x[mask]
    return torch.where(mask, (x - valid.mean()) / (valid.std(correction=0) + 1e-8), 0.0)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """Clipped policy loss, mean over each response's tokens. (B, R) each; returns loss (B,), ratio (B, R)."""
    ratio = (logprobs - old_logprobs).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return mean_tokens(loss, mask), ratio


def value_loss(values, old_values, returns, mask, clip):
    """Clipped value loss, mean over each response's tokens. (B, R) each; returns (B,)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return mean_tokens(0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def mean_tokens(x, mask):
    return torch.where(mask, x, 0.0).sum(1) / mask.sum(1).clamp(min=1)


# ------------------------------------------------------------------------------------------------------------
# The reward: which model, used how, normalised by what
# ------------------------------------------------------------------------------------------------------------
def read_reward(cfg, tokenizer):
    """-> own granularity, use, cutoff, Normalizer, scale; checks that the reward model fits policy and flags."""
    if not cfg.oracle and not reads_alike(tokenizer, read_tokenizer(cfg.reward_model)):
        fail(f"--reward_model {cfg.reward_model}: its tokenizer differs from that of --model {cfg.model}")
    path = os.path.join(cfg.reward_model, "reward.json")
    how_to = (f"python train_rm.py --calibrate_only --reward_model {cfg.reward_model} --model {cfg.model} --data PAIRS "
              "--granularity AS_TRAINED --cutoff AS_TRAINED --max_tokens AS_TRAINED")
    if not os.path.exists(path):
        if not cfg.fit:
            fail(f"--reward_model {cfg.reward_model}: no reward.json; make one with: {how_to} (a hub model: --out OUT, "
                 "then --reward_model OUT/model)")
        if cfg.granularity is None or cfg.cutoff is None:
            fail("--fit without a reward.json needs --granularity and --cutoff")
        saved = {"granularity": cfg.granularity, "cutoff": cfg.cutoff, "statistics": None}
    else:
        saved = read_reward_json(path)
        if saved["sft_fingerprint"] != fingerprint(cfg.model):
            fail(f"{path} was made for another SFT model ({saved['sft_model']}) than {cfg.model}; anew: {how_to}")
        if cfg.cutoff is not None and cfg.cutoff != saved["cutoff"]:
            fail(f"{path} was made for cutoff {saved['cutoff']}, not {cfg.cutoff}; delete it, then: {how_to}")
    own, use = saved["granularity"], cfg.granularity or saved["granularity"]
    if cfg.fit:
        try:
            w_mean, w_std, b_mean, b_std = map(float, cfg.fit.replace(",", " ").split())
            assert 0 < b_std < math.inf and math.isfinite(w_mean + w_std + b_mean) and cfg.reward_scale == "none"
        except (ValueError, AssertionError):
            fail("--fit takes 'w_mean w_std b_mean b_std' with b_std > 0, and --reward_scale none (S is not known)")
        return own, use, saved["cutoff"], Normalizer(w_mean, b_mean, w_std, b_std), 1.0
    try:
        fit = dict(saved["statistics"][use][cfg.normalizer])
        scale = fit.pop("scale")["end" if use == "bandit" else cfg.interpolation]
        scale, normalizer = scale if cfg.reward_scale == "total" else 1.0, Normalizer.from_dict(fit)
        assert normalizer.b_std > 0 and scale > 0 and sum(fit.values()) < math.inf, "a deviation"
    except (KeyError, TypeError, AttributeError, AssertionError) as e:
        fail(f"{path}: damaged ({one_line(e)} is missing or wrong); anew: {how_to}")
    return own, use, saved["cutoff"], normalizer, scale


@functools.lru_cache(maxsize=2)
def prompt_order(seed, turn, n):
    """The permutation of n prompts in pass number `turn` over them."""
    return np.random.default_rng([seed, 0, turn]).permutation(n)


def prompt_text(messages):
    """What people, judges and gold functions read: the prompt, or all turns with their roles."""
    turns = [f"{m['role']}: {m['content']}" for m in messages]
    return messages[0]["content"] if len(turns) == 1 else "\n\n".join(turns)


# ============================================================================================================
# The run
# ============================================================================================================
def main(cfg):
    device = setup(cfg.deterministic)
    if on_rank0(already_finished, cfg):
        return
    prepare_world(cfg.model, cfg.data)
    ranks, dtype = dist.get_world_size(), compute_dtype(cfg.dtype, device)
    if cfg.rollout_batch_size % cfg.batch_size:
        fail(f"--rollout_batch_size {cfg.rollout_batch_size} is not a multiple of --batch_size {cfg.batch_size}")
    config = read_config(cfg.model)
    if cfg.max_prompt_tokens + cfg.max_new_tokens > config.max_position_embeddings:
        fail(f"--max_prompt_tokens {cfg.max_prompt_tokens} + --max_new_tokens {cfg.max_new_tokens}: the context of "
             f"{cfg.model} is {config.max_position_embeddings}")
    tokenizer, stops = load_tokenizer(cfg.model)
    own, use, cutoff, normalizer, scale = on_rank0(read_reward, cfg, tokenizer)
    gold = cfg.gold if cfg.gold is not None else f"{WORLD}/prepare.py:gold_reward" if in_world(cfg.data) else ""
    gold = load_function(gold, "--gold", float) if gold else None
    oracle = load_function(cfg.oracle, "--oracle") if cfg.oracle else None
    chats = load_prompts(cfg.data, cfg.max_samples)
    if len(chats) < cfg.rollout_batch_size:
        fail(f"{cfg.data}: {len(chats)} prompts do not fill one --rollout_batch_size {cfg.rollout_batch_size}")
    prompts = encode_prompts(tokenizer, chats, cfg.max_prompt_tokens, cfg.data)

    iterations = cfg.max_steps or max(1, cfg.passes * len(prompts) // cfg.rollout_batch_size)
    minibatches = cfg.rollout_batch_size // cfg.batch_size
    updates = cfg.ppo_epochs * minibatches                                                  # in an iteration
    say(f"{iterations} iterations x {cfg.rollout_batch_size} responses on {ranks} x {device.type}, each "
        f"{cfg.ppo_epochs} epochs x {minibatches} minibatches x {cfg.batch_size} responses\n"
        f"{own} reward model used as {use}, cutoff {cutoff}, {cfg.normalizer} normaliser, scale {scale:.3g}")

    # Four models, sharded over the ranks, and a plain copy of the actor to sample from, on every rank: decoding on
    # shards would gather every layer for every token.
    actor = load_model(cfg.model, LanguageModel, device, dtype, train=True, grad_checkpoint=cfg.grad_checkpoint)
    critic = load_model(cfg.model if cfg.critic_init == "sft" else cfg.reward_model, ScalarModel, device, dtype,
                        train=True, grad_checkpoint=cfg.grad_checkpoint, head_std=0.0)
    critic.shift = -1
    reference = load_model(cfg.model, LanguageModel, device, dtype)
    reward_model = None if cfg.oracle else load_model(cfg.reward_model, ScalarModel, device, dtype)
    with device:
        sampler = actor.auto_class.from_config(actor.hf.config, dtype=dtype).eval()
    banned = never_sampled(tokenizer, stops, config.vocab_size).to(device)
    trained = {name: (m, torch.optim.AdamW(m.parameters(), betas=(0.9, 0.95), weight_decay=0.0, foreach=True))
               for name, m in (("actor", actor), ("critic", critic))}
    models = [cfg.model] if cfg.oracle else [cfg.model, cfg.reward_model]
    first_iteration, skipped = on_rank0(begin_run, cfg, prompts, models)      # all was readable: only now OUT is made
    if first_iteration:
        load_checkpoint(cfg, first_iteration, trained)
    parameters = sum(p.numel() for m in (actor, critic) for p in m.parameters())

    stop, began = StopSignal(), time.time()
    for iteration in range(first_iteration, iterations):
        # ----------------------------------------------------------------------------------------------------
        # 1. sample: each rank decodes its rows, every rank gets all of them
        # ----------------------------------------------------------------------------------------------------
        time_start = time.time()
        with torch.no_grad():
            for p, q in zip(sampler.parameters(), actor.hf.parameters(), strict=True):
                p.copy_(q.full_tensor())
            for p, q in zip(sampler.buffers(), actor.hf.buffers(), strict=True):
                p.copy_(q)
        B, R = cfg.rollout_batch_size, cfg.max_new_tokens
        drawn = [int(prompt_order(cfg.seed, k // len(prompts), len(prompts))[k % len(prompts)])
                 for k in range(iteration * B, (iteration + 1) * B)]                        # (B,) rows of --data
        seeds = [(cfg.seed, 1, iteration, b) for b in range(B)]
        tokens, sampled_logprobs, lengths = sample(                                         # (B, R), (B, R), (B,)
            sampler, [prompts[d] for d in drawn], stops, R, seeds, cfg.generation_batch_size, banned=banned)
        rows = [(prompts[d], t[:n]) for d, t, n in zip(drawn, tokens.cpu().numpy().astype(np.int32), lengths.tolist())]
        R = int(lengths.max())
        mask = torch.arange(R, device=device) < lengths[:, None]                            # (B, R)
        finished = is_finished(rows, stops).to(device)                                      # (B,)
        texts = [tokenizer.decode(r, skip_special_tokens=True) for _, r in rows]
        true = [gold(prompt_text(chats[d]), *x) for d, *x in zip(drawn, texts, finished.tolist())] if gold else [0.0]

        # ----------------------------------------------------------------------------------------------------
        # 2. score: four models read the same rows; all results (B, R) on every rank
        # ----------------------------------------------------------------------------------------------------
        time_score = time.time()
        logprobs, policy_entropy, _ = map_rows(actor, rows, cfg.micro_tokens, device)
        ref_logprobs, _, entropy = map_rows(reference, rows, cfg.micro_tokens, device)
        values = map_rows(critic, rows, cfg.micro_tokens, device)[0]
        scalars = oracle_scalars(oracle, tokenizer, rows, stops, device) if oracle else \
            map_rows(reward_model, rows, cfg.micro_tokens, device)[0]
        rewards, ends = rewards_at_ends(scalars, entropy, mask, finished, cutoff, own, use)

        # ----------------------------------------------------------------------------------------------------
        # 3. advantages: how much better was each token than the critic expected?
        # ----------------------------------------------------------------------------------------------------
        how = "end" if use == "bandit" else cfg.interpolation         # a bandit's reward always sits at the last token
        dense = normalized_token_rewards(rewards, ends, mask, normalizer, how, scale)       # (B, R)
        if cfg.divide_by_length:
            dense = dense / lengths[:, None]
        dense[torch.arange(B, device=device), lengths - 1] += cfg.missing_eos_reward * ~finished      # (B,) last tokens
        if cfg.bad_length:
            bad = ~finished | (lengths > cfg.bad_length)                                    # (B,)
            dense = torch.where(bad[:, None] & mask, cfg.bad_length_reward, dense)
        kl = logprobs - ref_logprobs                                                        # (B, R) stay near SFT
        advantages, returns = gae(dense - cfg.kl_coef * kl, values, mask, cfg.gamma, cfg.lam)
        advantages = whiten(advantages, mask)

        # ----------------------------------------------------------------------------------------------------
        # 4. update: each minibatch is one optimizer step of actor and critic
        # ----------------------------------------------------------------------------------------------------
        time_train = time.time()
        row_lengths = [len(p) + len(r) for p, r in rows]
        sums, norms = torch.zeros(3, device=device), torch.zeros(2, device=device)
        first_ratio = torch.ones((), device=device)                                         # worst at update 0
        for update in range(updates):
            epoch, position = divmod(update, minibatches)
            shuffled = np.random.default_rng([cfg.seed, 2, iteration, epoch]).permutation(B)
            mb = shuffled[position * cfg.batch_size:(position + 1) * cfg.batch_size]        # rows of this minibatch
            mb_lengths = [row_lengths[b] for b in mb]
            for micro in micro_batches(mb_lengths, cfg.micro_tokens, ranks)[rank()::ranks]:
                i = mb[micro] if micro else mb[:1]
                # FSDP averages gradients over ranks: a micro-batch weighs (its responses / the minibatch's) x ranks
                weight = ranks / cfg.batch_size if micro else 0.0
                batch, r = pad([rows[b] for b in i], device), int(lengths[i].max())
                m, new_logprobs = mask[i, :r], actor(*batch)[0]                             # (b, r)
                losses, ratio = policy_loss(new_logprobs, logprobs[i, :r], advantages[i, :r], m, cfg.clip)   # (b,)
                (losses.sum() * weight).backward()
                new_values = critic(*batch)[0]                                              # (b, r)
                v_losses = value_loss(new_values, values[i, :r], returns[i, :r], m, cfg.value_clip)          # (b,)
                (v_losses.sum() * weight).backward()
                if micro:
                    clipped = mean_tokens(((ratio - 1).abs() > cfg.clip).float(), m)
                    sums += torch.stack([x.detach().sum() for x in (losses, v_losses, clipped)])
                    if update == 0:
                        first_ratio = torch.maximum(first_ratio, ((ratio.detach() - 1).abs() * m).max() + 1)
            rate = learning_rate(iteration * updates + update, iterations * updates, cfg.warmup)
            norm = torch.stack([nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm).full_tensor()
                                for model in (actor, critic)])
            skipped = 0 if torch.isfinite(norm).all() else skipped + 1      # a step that is not finite changes nothing
            norms += norm
            for name, peak, first in (("actor", cfg.actor_lr, cfg.critic_warmup), ("critic", cfg.critic_lr, 0)):
                optimizer = trained[name][1]
                optimizer.param_groups[0]["lr"] = peak * rate
                if not skipped and iteration >= first:
                    optimizer.step()
                optimizer.zero_grad()
        dist.all_reduce(sums)
        dist.all_reduce(first_ratio, dist.ReduceOp.MAX)

        # ----------------------------------------------------------------------------------------------------
        # what happened
        # ----------------------------------------------------------------------------------------------------
        sums = (sums / (cfg.ppo_epochs * B)).tolist()            # waits for the GPU, so that the clock is right
        done, time_end = iteration + 1, time.time()
        phases = {"generate": time_score - time_start, "score": time_train - time_score, "train": time_end - time_train}
        n_tokens, n_ends = int(mask.sum()), int(ends.sum())
        variance, unexplained = returns[mask].var(correction=0), (returns - values)[mask].var(correction=0)
        row = {
            "reward": float(sequence_score(rewards, ends).mean()), "reward_total": float(dense.sum(1).mean()),
            "kl": float(kl.sum(1).mean()), "kl_per_token": float(kl.sum() / n_tokens),
            "entropy": float(policy_entropy.sum() / n_tokens), "finished": float(finished.float().mean()),
            "response_length": n_tokens / B, "response_tokens": n_tokens, "segment_length": n_tokens / max(1, n_ends),
            "policy_loss": sums[0], "value_loss": sums[1], "clip_fraction": sums[2], "first_ratio": float(first_ratio),
            "sampler_gap": float((logprobs - sampled_logprobs[:, :R]).abs().max()),
            "explained_variance": float(1 - unexplained / variance) if variance > 0 else 0.0,
            "actor_grad_norm": float(norms[0]) / updates, "critic_grad_norm": float(norms[1]) / updates,
            "lr": cfg.actor_lr * rate, "skipped": skipped,
            "tokens_per_second": sum(row_lengths) / (time_end - time_start),
            **hardware(device, 6 * parameters * sum(row_lengths) * cfg.ppo_epochs, phases["train"]),
        }
        for phase, seconds in phases.items():                    # sampling makes response tokens, the others read all
            row[f"time_{phase}"] = seconds
            row[f"tokens_per_second_{phase}"] = (n_tokens if phase == "generate" else sum(row_lengths)) / seconds
        if gold:
            row["gold"] = float(np.mean(true))
        log_metrics(cfg, done, row)
        eta = (time.time() - began) / (done - first_iteration) * (iterations - done)
        say(f"step {done}/{iterations} | reward {row['reward']:+.3f}" + (f" | gold {row['gold']:+.3f}" if gold else "")
            + f" | kl {row['kl']:.2f} | length {row['response_length']:.0f} | finished {row['finished']:.2f} | "
            f"clip {row['clip_fraction']:.3f} | ev {row['explained_variance']:+.2f} | "
            f"{row['tokens_per_second']:,.0f} tokens/s (" + ", ".join(
                f"{phase} {seconds:.1f} s at {row[f'tokens_per_second_{phase}']:,.0f}" for phase, seconds
                in phases.items()) + f") | {eta:.0f} s left")
        if done % cfg.sample_every == 0 or done == iterations:
            pieces = segment_texts(tokenizer, rows[0][1], ends[0].cpu())
            say(f"  user: {chats[drawn[0]][-1]['content']}\n  {paint(pieces, rewards[0, ends[0]].tolist())}")
        stopping = stop.agreed(device)
        if done % cfg.save_every == 0 or done == iterations or stopping or skipped >= 5:
            save_checkpoint(cfg, done, trained, keep=skipped > 0)
            export(actor, tokenizer, cfg.model, f"{cfg.out}/model", dtype)
        if skipped >= 5:
            fail(f"step {done}: losses or gradients were not finite in {skipped} updates in a row (skipped; saved, and "
                 "the earlier checkpoint kept); lower --actor_lr or look at the reward model")
        if stopping:
            say(f"stopped after step {done}; continue with --resume")
            raise SystemExit(128 + stopping)
    stop.release()
    if skipped:
        say(f"warning: the last {skipped} updates were skipped, their losses or gradients were not finite")
    if first_iteration == iterations:                 # killed between the last checkpoint and the end of its export
        export(actor, tokenizer, cfg.model, f"{cfg.out}/model", dtype)
    finish_run(cfg)
    say(f"wrote {cfg.out}/model")


if __name__ == "__main__":
    start(main, Config)
