"""Chapter 3 of 4: PPO on segment rewards.

    python train_ppo.py                                               # the embedded world, a minute
    python train_ppo.py --reward_model out/rm-bandit/model --out out/ppo-bandit     # classical RLHF
    torchrun --nproc_per_node=8 train_ppo.py @config/llama3.1-8b-segment-ppo.args   # 8 GPUs

A reward model gives each segment a reward. From there to the reward of a token (arXiv 2501.02790,
section 2.3): a segment's reward depends on where in the response it lies, so it is normalised by a
mean and a deviation that are linear in log p, p = i/n its relative location, and then spread evenly
over the segment's tokens. One iteration of PPO (section 2.4):
    1. sample      a response to each prompt from the policy, at temperature 1
    2. score       log-probs of policy and SFT model, critic values, scalars of the reward model;
                   the SFT model's entropies cut the responses into segments
    3. advantages  token rewards, minus the KL penalty of each token; GAE; whitened
    4. update      clipped policy and value losses, minibatch by minibatch

What differs from the authors' code: the normaliser is fitted when training starts, not looked up by
a name, and can't turn negative; every random draw is a function of (seed, iteration, row), so that
a run that was killed goes on as if nothing had been, on any number of GPUs; masks come from
lengths; the critic's head starts at zero. Two defaults change the method (sizes, rates and their
like differ too): --reward_scale total and --missing_eos_reward -3 (the paper: none and 0).
"""
import inspect
import os
import runpy
import time
from dataclasses import asdict, dataclass
from typing import Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from segment import (Dtype, Granularity, LanguageModel, answer_text, check_context, cut_rows,
                     encode_chats, encode_prompts, fail, load_model, load_pairs, load_prompts,
                     load_tokenizer, map_rows, micro_batches, never_sampled, pad, parse,
                     prompt_text, read_config, response_mask, row_lengths, say, segment_locations,
                     segment_texts, sequence_score, set_precision, setup, warn_of_world_values)
from train_rm import (ScalarModel, begin_run, check_out, finish_run, learning_rate, log_metrics,
                      make_optimizer, optimizer_step, run, save, shuffled)


@dataclass
class Config:
    # what to train on what
    model: str = "data/reviews/sft"            # the SFT model: policy, critic, reference, entropies
    reward_model: str = "out/rm/model"         # or a rule, file.py:function of (prompt, [segments])
    #                                            -> a reward for each
    data: str = "data/reviews/prompts.jsonl"   # prompts (paper: of UltraFeedback)
    out: str = "out/ppo"                       # output folder
    gold: str = ""                             # to log: file.py:function of (prompt, response,
    #                                            finished); the world's data has one by default
    max_samples: int = 0                       # read at most this many prompts (0: all)
    # the reward
    granularity: Optional[Granularity] = None  # PPO's; default: the reward model's
    trained_granularity: Optional[Granularity] = None  # of a released reward model
    cutoff: Optional[float] = None             # PPO's, nats; default: the reward model's own. A
    #                                            released one names none: then this is its own, too
    calibration_data: str = ""                 # preferences, of which the first 2,000 are read;
    #                                            default: what train_rm.py held out
    fit: str = ""                              # 'w_mean w_std b_mean b_std', not calibrated; S = 1
    # location: a mean and deviation at each p; global: one of each, over all segments; last: over
    # last segments; none: 0 and 1
    normalizer: Literal["location", "global", "last", "none"] = "location"
    # how a segment's reward is spread over its tokens; a bandit's is at the end
    interpolation: Literal["even", "repeat", "end"] = "even"
    reward_scale: Literal["total", "none"] = "total"  # divide by S of `calibrate` (paper: none)
    kl_coef: float = 0.03                      # price of a nat away from the SFT model (paper: .01)
    missing_eos_reward: float = -3.0           # at the end of an unfinished response (paper: 0)
    divide_by_length: bool = False             # of the response (paper: for Llama-3-SFT's tokens)
    bad_length: int = 0                        # longer or unfinished: -.05 a token (Llama-3.1: 800)
    # sampling
    rollout_batch_size: int = 64               # responses an iteration, over all GPUs (paper: 1024)
    generation_batch_size: int = 128           # responses decoded at once on one GPU
    max_prompt_tokens: int = 128               # longer ones lose what follows BOS (paper: 1024)
    max_new_tokens: int = 128                  # of a response (paper: 1024)
    # optimisation
    max_steps: int = 30                        # iterations; 0: passes over the prompts (paper: 0)
    passes: int = 1                            # over the prompts (paper: Phi-3 2, Llama 1)
    batch_size: int = 16                       # responses an update, over all GPUs (paper: 128)
    ppo_epochs: int = 1                        # passes over each rollout
    actor_lr: float = 3e-4                     # peak (paper: 5e-7)
    critic_lr: float = 1e-3                    # peak (paper: 9e-6)
    gamma: float = 1.0                         # discount
    lam: float = 0.95                          # GAE's lambda
    clip: float = 0.2                          # of the policy's ratio
    value_clip: float = 0.2                    # of the value's step (paper: .25, bandit .2)
    seed: int = 0                              # of prompts and samples
    # hardware
    micro_batch_size: int = 8                  # rows in one forward pass of one GPU
    dtype: Dtype = "auto"                      # to compute in: bf16 on CUDA, fp32 on CPU
    grad_checkpoint: bool = False              # less memory, a third more time
    # bookkeeping
    sample_every: int = 5                      # iterations between printed samples
    save_every: int = 10                       # iterations between checkpoints (paper: 5)
    wandb: str = ""                            # log to this wandb project too


# -- The method. 1. from segment rewards to token rewards ------------------------------------------
@dataclass
class Normalizer:
    """mean(p) = w_mean log p + b_mean, std(p) = w_std log p + b_std (section 2.3). A line goes
    negative at small p: so p is clamped to what was calibrated (with --fit: to .001 and more), and
    std to at least a tenth of its value at p = 1."""
    w_mean: float = 0.0
    w_std: float = 0.0
    b_mean: float = 0.0
    b_std: float = 1.0
    p_min: float = 1e-3
    p_max: float = 1.0

    def mean(self, p):
        return self.w_mean * self.log_clamped(p) + self.b_mean

    def std(self, p):
        return (self.w_std * self.log_clamped(p) + self.b_std).clamp(min=0.1 * self.b_std)

    def log_clamped(self, p):
        return torch.as_tensor(p).clamp(self.p_min, self.p_max).log()

    def to_dict(self):
        return asdict(self)

    @classmethod
    def from_dict(cls, d):
        return cls(**d)


def huber_line(x, y, epsilon=1.35):
    """(slope, intercept) of Huber's regression of y on x, (n,) each, by repeated least squares: a
    residual beyond epsilon sigma gets the weight epsilon sigma / residual, and sigma is the root
    mean square of the residuals, each cut at epsilon sigma (his proposal 2; the line of
    scikit-learn's HuberRegressor(alpha=0)). Where all x are 0 the slope is 0."""
    columns = np.stack([x, np.ones(len(x))], 1)                                          # (n, 2)
    root_weight = np.ones(len(x))                                                        # (n,)
    sigma = np.inf                                       # the first round is plain least squares
    for _ in range(500):
        line = np.linalg.lstsq(columns * root_weight[:, None], y * root_weight)[0]       # (2,)
        error = np.abs(y - columns @ line) + 1e-12                                       # (n,)
        sigma = np.sqrt(np.mean(np.minimum(error, epsilon * sigma) ** 2))
        root_weight = np.sqrt(np.minimum(1, epsilon * sigma / error))                    # (n,)
    return line.tolist()


def fit_normalizer(locations, rewards):
    """Fit a Normalizer to segment rewards. locations: (N,) in (0, 1]; rewards: (N,). Segments are
    pooled by p rounded to 3 decimals; Huber regressions of the pools' means and population
    deviations on log(mean p of the pool). ValueError if there is no deviation to divide by."""
    p = np.asarray(locations, float)                                                     # (N,)
    y = np.asarray(rewards, float)                                                       # (N,)
    _, pool, count = np.unique(p.round(3), return_inverse=True, return_counts=True)
    mean = np.bincount(pool, y) / count                                                  # (pools,)
    std = np.sqrt(np.bincount(pool, (y - mean[pool]) ** 2) / count)                      # (pools,)
    log_p = np.log(np.bincount(pool, p) / count)                                         # (pools,)
    several = count > 1                                  # one value has no deviation
    # two such pools make a line; all rewards of a bandit are in one pool, at p = 1
    if several.sum() < min(2, len(count)):
        raise ValueError("the rewards hardly share a location: calibrate on more responses")
    w_mean, b_mean = huber_line(log_p, mean)
    w_std, b_std = huber_line(log_p[several], std[several])
    if not b_std > 1e-6 * (1 + abs(b_mean)):             # not "<=": NaN fails, too
        raise ValueError("the rewards do not vary: there is nothing to divide by")
    return Normalizer(w_mean, w_std, b_mean, b_std, float(p.min()), float(p.max()))


def spread_rewards(rewards_at_ends, ends, mask, how):
    """Give every token its share of its segment's reward (section 2.3, "interpolation").
    rewards_at_ends (B, R): read where ends (bool) is True; mask: bool (B, R). even (the method):
    divided by the segment's length; repeat: the whole reward to each token; end: all at the last
    token. Returns (B, R); tokens behind the last end (the end-of-turn token) get 0.
    >>> ends = torch.tensor([[False, True, True, False]])
    >>> spread_rewards(torch.tensor([[0., 4., 3., 0.]]), ends, torch.ones(1, 4, dtype=bool), "even")
    tensor([[2., 2., 3., 0.]])
    """
    rewards = torch.where(ends, rewards_at_ends, 0.0)                                    # (B, R)
    if how == "end":
        return rewards
    segment = ends.cumsum(1) - ends.int()                # (B, R) the segment of each token
    zeros = torch.zeros_like(rewards)
    total = zeros.scatter_add(1, segment, rewards)                               # (B, R) by segment
    if how == "even":
        length = zeros.scatter_add(1, segment, mask.float())                     # (B, R) by segment
        total = total / length.clamp(min=1)
    return total.gather(1, segment)


def token_rewards(rewards, ends, mask, normalizer, how):
    """Normalise by location and spread. rewards (read at ends), ends, mask: (B, R) -> (B, R)"""
    p = segment_locations(ends)                                                          # (B, R)
    normalized = (rewards - normalizer.mean(p)) / normalizer.std(p)                      # (B, R)
    return spread_rewards(normalized, ends, mask, how)


def calibrate(rewards, ends, mask, kind, how):
    """Fit the normaliser, and S: the standard deviation over responses of the total normalised
    reward (ours: a sum over n segments varies up to n times as much as a bandit's one reward, and
    one KL coefficient cannot serve both). rewards, ends, mask: (B, R) of calibration responses.
    Returns Normalizer, S."""
    p = segment_locations(ends)[ends]                                                    # (N,)
    y = rewards[ends]                                                                    # (N,)
    if kind == "last":
        y = y[p == 1]
    if not y.std() > 1e-6 * y.abs().max():               # not "<=": NaN fails, too
        raise ValueError("the rewards do not vary, or are not finite")
    normalizer = Normalizer()
    if kind == "location":
        normalizer = fit_normalizer(p, y)
    elif kind != "none":
        normalizer = Normalizer(b_mean=float(y.mean()), b_std=float(y.std(correction=0)))
    total = token_rewards(rewards, ends, mask, normalizer, how).sum(1)                   # (B,)
    return normalizer, float(total.std(correction=0))


def dense_rewards(cfg, rewards, ends, mask, finished, normalizer, how, scale):
    """The reward of each token before the KL penalty: normalised, spread, scaled, clamped, then the
    rules for length and EOS. rewards, ends, mask: (B, R); finished: (B,). Returns (B, R)."""
    lengths = mask.sum(1)                                                                # (B,)
    dense = token_rewards(rewards, ends, mask, normalizer, how) / scale
    dense = dense.clamp(-10, 10)                         # as the authors do
    if cfg.divide_by_length:
        dense = dense / lengths[:, None]
    # at the last token of an unfinished response
    dense[range(len(dense)), lengths - 1] += cfg.missing_eos_reward * ~finished
    if cfg.bad_length:
        dense[~finished | (lengths > cfg.bad_length)] = -0.05            # in place of all rewards
    return dense * mask


# -- The method. 2. advantages and losses ----------------------------------------------------------
def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, equation 16) over response tokens.
    All (B, R); mask: bool, a prefix of each row. Nothing is bootstrapped after the last token.
    Returns advantages and returns = advantages + values, 0 on padding."""
    rewards = rewards * mask
    values = values * mask
    advantages = torch.zeros_like(rewards)
    last_advantage = next_value = 0.0
    for r in reversed(range(rewards.shape[1])):
        delta = rewards[:, r] + gamma * next_value - values[:, r]                        # (B,)
        last_advantage = delta + gamma * lam * last_advantage
        advantages[:, r] = last_advantage
        next_value = values[:, r]
    return advantages, advantages + values


def whiten(x, mask):
    """Mean 0, population deviation 1 over all valid tokens. x, mask: (B, R), of all ranks."""
    valid = x[mask]
    return torch.where(mask, (x - valid.mean()) / (valid.std(correction=0) + 1e-8), 0.0)


def mean_tokens(x, mask):
    """Mean over each response's tokens: a long response weighs no more. (B, R) -> (B,)"""
    return (x * mask).sum(1) / mask.sum(1)


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


class Critic(ScalarModel):
    """A value where the model decided on a token, one position before a reward is read."""
    shift = -1


# -- The method. 3. sampling -----------------------------------------------------------------------
@torch.no_grad()
def generate(hf, prompts, stops, max_new_tokens, seeds, temperature=1.0, banned=None):
    """Sample a response to each prompt from the full distribution (no top-k, no top-p).
    hf: a Hugging Face causal LM; prompts: B id arrays; stops: (n,) ids; seeds: for each prompt a
    tuple of ints, which determines its random numbers in whatever batch; temperature 0: greedy;
    banned: bool (V,), never sampled. Returns tokens (B, M) int64, M = max_new_tokens, their
    log-probs (B, M) under the model, and lengths (B,), the stop token included; 0 on padding."""
    device = hf.device
    stops = stops.to(device)
    generators = []
    for seed in seeds:
        number = np.random.SeedSequence(seed).generate_state(1, np.uint64).item()
        generators.append(torch.Generator(device).manual_seed(number))

    # Prompts are padded on the left, only here: then all rows put their next token at one place.
    ids = pad_sequence([torch.from_numpy(p) for p in prompts], batch_first=True,
                       padding_side="left")                                          # (B, width)
    width = ids.shape[1]
    ids = F.pad(ids, (0, max_new_tokens)).long().to(device)                          # (B, width+M)
    prompt_lens = torch.tensor([len(p) for p in prompts])                                # (B,)
    # where in its own row each token stands; negative on padding
    position = torch.arange(-width, max_new_tokens) + prompt_lens[:, None]           # (B, width+M)
    position = position.to(device)
    logprobs = torch.zeros(len(ids), max_new_tokens, device=device)                      # (B, M)
    active = torch.arange(len(ids), device=device)       # (b,) rows that are still sampled
    cache = DynamicCache(config=hf.config)
    plain_mask = hf.config._attn_implementation == "sdpa" and not any(cache.is_sliding)
    for r in range(max_new_tokens):
        if r % 16 == 0:          # the CPU looks, once in a while: who is finished leaves
            stopped = torch.isin(ids[active, width:width + r], stops).any(1)             # (b,)
            keep = (~stopped).nonzero().flatten()
            if not len(keep):
                break
            if len(keep) < len(active):
                cache.batch_select_indices(keep)
                active = active[keep]
            noise = torch.empty(len(active), 16, hf.config.vocab_size,
                                device=device)                                   # (b, 16, V)
            for draws, b in zip(noise, active.tolist()):
                draws.exponential_(generator=generators[b])
        new = slice(cache.get_seq_length(), width + r)   # the prompts, later the token sampled last
        mask = position[active, :width + r] >= 0                                 # (b, width+r)
        if r > 0 and plain_mask:
            # One query a row sees all that is not padding. transformers takes a 4-D mask as it is;
            # into a 2-D one it would look, and the CPU would wait for the GPU.
            mask = mask[:, None, None]                                       # (b, 1, 1, width+r)
        # arguments by position: transformers has renamed the cache
        output = hf(
            ids[active, new],
            mask,
            position[active, new].clamp(min=0),
            cache,
            use_cache=True,
            logits_to_keep=1)
        logits = output.logits[:, -1].float()                                            # (b, V)
        # -log of Exponential(1) noise is Gumbel noise: its argmax with the logits draws a token
        # with the probability that softmax(logits / temperature) gives it.
        scores = logits - temperature * noise[:, r % 16].log()                           # (b, V)
        if banned is not None:
            scores = scores.masked_fill(banned, -torch.inf)
        token = scores.argmax(-1)                                                        # (b,)
        ids[active, width + r] = token
        logprobs[active, r] = -F.cross_entropy(logits, token, reduction="none")

    tokens = ids[:, width:]                                                              # (B, M)
    stop = torch.isin(tokens, stops)                                                     # (B, M)
    until_stop = (stop.cumsum(1) - stop.int()) == 0          # (B, M) no stop token before this one
    return tokens * until_stop, logprobs * until_stop, until_stop.sum(1)


# == Plumbing. Sampling on all ranks ===============================================================
def sample(hf, tokenizer, prompts, stops, max_new_tokens, seeds, batch_size, temperature=1.0):
    """`generate`, shared among the ranks; every rank gets all of its results, on the CPU."""
    banned = banned_tokens(tokenizer, stops, hf.config.vocab_size).to(hf.device)         # (V,)
    tokens = torch.zeros(len(prompts), max_new_tokens).long()
    logprobs = torch.zeros(tokens.shape)
    lengths = torch.zeros(len(prompts)).long()                                           # (B,)
    results = (tokens, logprobs, lengths)
    for wave in micro_batches([len(p) for p in prompts], batch_size):
        sampled = generate(hf, [prompts[b] for b in wave], stops, max_new_tokens,
                           [seeds[b] for b in wave], temperature, banned)
        for result, part in zip(results, sampled):
            result[wave] = part.cpu()
    for result in results:
        dist.all_reduce(result)
    R = lengths.max()                                    # of M = max_new_tokens
    return tokens[:, :R], logprobs[:, :R], lengths                       # (B, R), (B, R), (B,)


def plain_copy(model, dtype, device):
    """A whole model on every rank, to decode with: shards would be gathered for every token."""
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


def banned_tokens(tokenizer, stops, vocab_size):
    """bool (V,): special tokens that stop nothing, and rows of the embedding that are no token."""
    ids = np.setdiff1d(list(tokenizer.get_vocab().values()), never_sampled(tokenizer, stops))
    return ~torch.isin(torch.arange(vocab_size), torch.tensor(ids))


# -- Plumbing. Where rewards come from -------------------------------------------------------------
def load_function(spec):
    """file.py:name -> the function"""
    path, _, name = spec.rpartition(":")
    function = os.path.isfile(path) and runpy.run_path(path).get(name)
    return function or fail(f"{spec}: must be file.py:function, and exist")


def call(function, *arguments):
    """Call a gold or judge function with (prompt, response, finished): as many as it takes."""
    return function(*arguments[:len(inspect.signature(function).parameters)])


def check_tokens(mine, path):
    """Two models that read the same ids must give every token the same id. Special tokens may be
    missing from one: many reward models add a pad token, which nobody reads."""
    theirs, _ = load_tokenizer(path)
    ids, their_ids = mine.get_vocab(), theirs.get_vocab()
    may_miss = set()
    for tokenizer in (mine, theirs):
        may_miss |= {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    may_miss -= ids.keys() & their_ids.keys()
    differ = {token for token, _ in ids.items() ^ their_ids.items()} - may_miss
    if differ:
        fail(f"{path}: its tokens differ from those that it is to read: {min(differ)} for one")


def trained_how(cfg, path):
    """A reward model's granularity and cutoff: its config.json says them, else the flags do."""
    config = read_config(path)
    granularity = getattr(config, "segment_granularity", cfg.trained_granularity)
    cutoff = getattr(config, "segment_cutoff", cfg.cutoff)
    known = granularity is not None and (granularity != "segment" or cutoff is not None)
    if not known or cfg.trained_granularity not in (None, granularity):
        fail(f"{path} says that it was trained at {granularity}, cutoff {cutoff}: what is None "
             "must be given, by --trained_granularity and --cutoff; the rest can't be changed")
    return granularity, cutoff


# == The run =======================================================================================
def main(cfg):
    device = setup()
    if check_out(cfg):
        return
    dtype = set_precision(cfg.dtype, device)
    ranks = dist.get_world_size()
    B = cfg.rollout_batch_size
    size = cfg.micro_batch_size
    max_tokens = cfg.max_prompt_tokens + cfg.max_new_tokens
    tokenizer, stops = load_tokenizer(cfg.model)
    check_context(cfg.model, max_tokens, cfg.max_prompt_tokens)
    warn_of_world_values(cfg)
    messages = load_prompts(cfg.data, cfg.max_samples)                       # n message lists
    if len(messages) < B or B % cfg.batch_size or cfg.batch_size % ranks:
        fail(f"--rollout_batch_size {B} must be a multiple of --batch_size {cfg.batch_size}, that "
             f"of the ranks, and --data have as many prompts ({len(messages)})")
    prompts = encode_prompts(tokenizer, messages, cfg.max_prompt_tokens, cfg.data)   # n id arrays
    prompt_texts = list(map(prompt_text, messages))                                  # n
    gold = cfg.gold and load_function(cfg.gold)
    if not gold and cfg.data == Config.data:     # the world's truth can judge no other data
        gold = load_function("data/reviews/prepare.py:gold_reward")

    # -- the reward: a model's, or a rule's --------------------------------------------------------
    held_out = ""                                        # what it was not trained on
    rule = None
    if ".py:" in cfg.reward_model:
        rule = load_function(cfg.reward_model)
        trained_at, trained_cutoff = "segment", cfg.cutoff
        if cfg.data == Config.data:
            held_out = "data/reviews/pairs.jsonl:train[-400:]"
    else:
        trained_at, trained_cutoff = trained_how(cfg, cfg.reward_model)
        check_context(cfg.reward_model, max_tokens, cfg.max_prompt_tokens)
        check_tokens(tokenizer, cfg.reward_model)
        reward_model = load_model(cfg.reward_model, ScalarModel, device, dtype)
        cut_by = getattr(reward_model.hf.config, "segment_model", cfg.model)
        if os.path.abspath(cut_by) != os.path.abspath(cfg.model):        # folders or hub ids
            say(f"note: its segments were cut by {cut_by} in training, here by {cfg.model}")
        held_out = getattr(reward_model.hf.config, "segment_held_out", "")
    # PPO may take it at another granularity than it was trained at
    granularity = cfg.granularity or trained_at
    cutoff = trained_cutoff if cfg.cutoff is None else cfg.cutoff
    if granularity == "segment" and cutoff is None:
        fail("--cutoff: nats, above which a segment ends; segment.py helps to choose")
    interpolation = "end" if granularity == "bandit" else cfg.interpolation

    def score_rows(rows, texts, sft_entropy, batches=None):
        """rows: B (prompt ids, response ids); texts: their prompts, for rules. Returns rewards and
        segment ends, (B, R) each."""
        ends = cut_rows(rows, sft_entropy, tokenizer, stops, cutoff, granularity)        # (B, R)
        if not rule:
            rewards = map_rows(reward_model, rows, size, device, batches)                # (B, R)
            if granularity == "bandit":                  # the response's score, as it was trained
                trained_ends = cut_rows(rows, sft_entropy, tokenizer, stops,
                                        trained_cutoff, trained_at)                      # (B, R)
                rewards = sequence_score(rewards, trained_ends)[:, None]                 # (B, 1)
            return rewards * ends, ends
        rewards = torch.zeros(ends.shape)                                                # (B, R)
        for b, (text, (_, response)) in enumerate(zip(texts, rows)):
            # A rule gets as many texts as there are ends. A finished bandit's one end, at the stop
            # token, is cut off here; then its text is what follows the last end: everything.
            content = response[:-1] if response[-1] in stops else response
            segments = segment_texts(tokenizer, content, ends[b, :len(content)])
            scores = torch.tensor(rule(text, segments)).float()
            rewards[b, ends[b]] = scores.view(len(segments))     # neither more nor fewer
        return rewards, ends

    reference = load_model(cfg.model, LanguageModel, device, dtype)
    if cfg.fit:
        if cfg.normalizer != "location" or granularity != trained_at:
            fail("--fit is a line for the reward model's own use; for any other give --fit ''")
        w_mean, w_std, b_mean, b_std = map(float, cfg.fit.split())
        normalizer = Normalizer(w_mean, w_std, b_mean, b_std)
        scale = 1.0                                      # no responses to measure S on
    else:
        held_out = cfg.calibration_data or held_out or fail(
            "--calibration_data: preferences that the reward model was not trained on")
        chats = [(prompt, answers, where)                                                # m
                 for prompt, *answers, where in load_pairs(held_out, 2000)]
        rows = encode_chats(tokenizer, stops, chats, max_tokens, cfg.max_prompt_tokens)  # 2m
        texts = [prompt_text(prompt) for prompt, answers, _ in chats for _ in answers]   # 2m
        mask, _ = response_mask(rows, stops, "cpu")                                      # (2m, R)
        _, sft_entropy = map_rows(reference, rows, size, device)                         # (2m, R)
        rewards, ends = score_rows(rows, texts, sft_entropy)                             # (2m, R)
        try:
            normalizer, scale = calibrate(rewards, ends, mask, cfg.normalizer, interpolation)
        except ValueError as error:
            fail(f"calibration on {held_out}: {error}")
    if cfg.reward_scale == "none":
        scale = 1.0
    calibration = {"normalizer": normalizer.to_dict(), "scale": scale}
    say(f"{trained_at} reward used as {granularity}, cutoff {cutoff}: {calibration}")

    # -- the models that learn, and a plain copy of the actor to sample from -----------------------
    actor = load_model(cfg.model, LanguageModel, device, dtype,
                       train=True,
                       grad_checkpoint=cfg.grad_checkpoint)
    critic = load_model(cfg.model, Critic, device, dtype,
                        train=True,
                        grad_checkpoint=cfg.grad_checkpoint,
                        head_std=0.0)
    sampler = plain_copy(actor, dtype, device)
    trained = nn.ModuleList([actor, critic])
    optimizer = make_optimizer(trained, device)
    first_step, log = begin_run(cfg, trained, optimizer, calibration=calibration)

    steps = cfg.max_steps or cfg.passes * len(prompts) // B
    updates = cfg.ppo_epochs * B // cfg.batch_size       # in an iteration
    # (steps, B) the prompts of each iteration. (seed, 0, ...) draws orders, (seed, 1, ...) samples
    order = shuffled(len(prompts), steps, B, cfg.seed, 0)
    say(f"{steps} iterations x {B} responses on {ranks} x {device.type}, in each {updates} updates")
    for step in range(first_step, steps):
        # 1. sample: each rank decodes its rows, every rank gets all of them -----------------------
        time_start = time.time()
        refresh(sampler, actor)
        asked = [prompts[i] for i in order[step]]                                        # B
        texts = [prompt_texts[i] for i in order[step]]                                   # B
        seeds = [(cfg.seed, 1, step, b) for b in range(B)]
        tokens, sampled_logprobs, lengths = sample(                          # (B, R), (B, R), (B,)
            sampler, tokenizer, asked, stops, cfg.max_new_tokens, seeds, cfg.generation_batch_size)
        rows = [(p, row[:n].numpy()) for p, row, n in zip(asked, tokens, lengths)]       # B
        mask, finished = response_mask(rows, stops, "cpu")                       # (B, R), (B,)

        # 2. score: every rank gets all results, (B, R) each, on the CPU ---------------------------
        time_score = time.time()
        whole_lengths = row_lengths(rows)                                                # (B,)
        # The rollout is cut once into minibatches, and these into micro-batches. The models score
        # it as they will be trained on it: in other batches bf16 rounds otherwise, and the ratios
        # of the first update would scatter around 1.
        minibatches = []
        for first in range(0, B, cfg.batch_size):
            micros = micro_batches(whole_lengths[first:first + cfg.batch_size], size)
            minibatches.append([first + micro for micro in micros])
        batches = sum(minibatches, [])
        logprobs, policy_entropy = map_rows(actor, rows, size, device, batches)
        ref_logprobs, sft_entropy = map_rows(reference, rows, size, device, batches)
        values = map_rows(critic, rows, size, device, batches)
        rewards, ends = score_rows(rows, texts, sft_entropy, batches)

        # 3. advantages: how much better was each token than the critic expected? ------------------
        dense = dense_rewards(cfg, rewards, ends, mask, finished, normalizer, interpolation, scale)
        kl = logprobs - ref_logprobs         # (B, R) estimates, which may be negative; 0 on padding
        advantages, returns = gae(dense - cfg.kl_coef * kl, values, mask, cfg.gamma, cfg.lam)
        advantages = whiten(advantages, mask)                                            # (B, R)
        # the mask becomes 0.0 and 1.0
        rollout = torch.stack([mask, logprobs, values, advantages, returns])             # (5, B, R)

        # 4. update: each minibatch is one optimizer step of actor and critic ----------------------
        time_train = time.time()
        sums = norms = 0         # (3,) of both losses and clipped shares; (2,) of gradients' norms
        first_ratio = torch.ones((), device=device)          # 1 + the largest distance from 1
        weight = ranks / cfg.batch_size      # of a response: FSDP averages gradients over the ranks
        for update, minibatch in enumerate(minibatches * cfg.ppo_epochs):
            for micro in minibatch:
                batch = pad([rows[b] for b in micro], device)
                mb = rollout[:, micro, :lengths[micro].max()]                            # (5, b, r)
                mb = mb.to(device, non_blocking=True)
                mb_mask, mb_logprobs, mb_values, mb_advantages, mb_returns = mb
                new_logprobs, _ = actor(*batch)                                          # (b, r)
                policy_losses, ratio = policy_loss(new_logprobs, mb_logprobs, mb_advantages,
                                                   mb_mask, cfg.clip)                    # (b,)
                (policy_losses.sum() * weight).backward()
                value_losses = value_loss(critic(*batch), mb_values, mb_returns, mb_mask,
                                          cfg.value_clip)                                # (b,)
                (value_losses.sum() * weight).backward()
                away = (ratio.detach() - 1).abs() * mb_mask                              # (b, r)
                clipped = mean_tokens(away > cfg.clip, mb_mask)                          # (b,)
                sums += torch.stack([policy_losses, value_losses, clipped]).detach().sum(1)
                if update == 0:
                    first_ratio = torch.maximum(first_ratio, 1 + away.max())
            factor = learning_rate(step * updates + update, steps * updates)
            norms += optimizer_step(optimizer, [cfg.actor_lr * factor, cfg.critic_lr * factor])
        dist.all_reduce(sums)
        dist.all_reduce(first_ratio, dist.ReduceOp.MAX)

        # what happened ----------------------------------------------------------------------------
        time_end = time.time()
        gap = (logprobs - sampled_logprobs).abs().max()
        if not gap.isfinite():
            fail("the policy's log-probs are not finite")
        policy_mean, value_mean, clip_fraction = sums / (cfg.ppo_epochs * B)
        actor_norm, critic_norm = norms / updates
        unexplained = (returns - values)[mask].var() / returns[mask].var().clamp(min=1e-12)
        done = step + 1
        n_tokens = mask.sum()
        row = {
            "step": done,
            "reward": sequence_score(rewards, ends).mean(),
            "kl": kl.sum(1).mean(),
            "kl_per_token": kl.sum() / n_tokens,
            "response_length": n_tokens / B,
            "response_tokens": n_tokens,
            "finished": finished.float().mean(),
            # after token r, where token r + 1 is decided on; after the last nothing is
            "entropy": policy_entropy[:, :-1][mask[:, 1:]].mean(),
            "policy_loss": policy_mean,
            "value_loss": value_mean,
            "clip_fraction": clip_fraction,
            "first_ratio": first_ratio,
            "sampler_gap": gap,
            "explained_variance": 1 - unexplained,
            "actor_grad_norm": actor_norm,
            "critic_grad_norm": critic_norm,
            "lr": cfg.actor_lr * factor,
            "time_generate": time_score - time_start,
            "time_score": time_train - time_score,
            "time_train": time_end - time_train,
            "time_step": time_end - time_start,
            "tokens_per_second": whole_lengths.sum() / (time_end - time_start)}
        if gold:
            row["gold"] = np.mean([
                call(gold, text, answer_text(tokenizer, stops, response), complete)
                for text, (_, response), complete in zip(texts, rows, finished.tolist())])
        log_metrics(cfg, log, row, steps, ("reward", "gold", "kl", "response_length", "finished",
                                           "clip_fraction", "explained_variance"))
        if done % cfg.sample_every == 0:                 # a sample: its segments, their rewards
            parts = segment_texts(tokenizer, rows[0][1], ends[0])
            scored = [f"{part} [{reward:+.2f}]" for part, reward in zip(parts, rewards[0, ends[0]])]
            say(texts[0], " |".join(scored))
        if done % cfg.save_every == 0 or done == steps:
            save(cfg, done, trained, optimizer, actor, tokenizer, dtype)
    finish_run(cfg)


if __name__ == "__main__":
    run(main, parse(Config))
