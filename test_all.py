"""Every chapter against an independent reference:  pytest test_all.py      (about four minutes on two CPU cores)

1. functions against literal loops and closed forms      6. attacks: odd data, numbers, tokenizers; faults, evil files
2. chat encoding                                         7. the recipes of config/
3. sampling                                              8. the world's ground truth
4. data and flags that must be refused                   9. CUDA, where there is one
5. a tiny world: runs as a user starts them, killed,     10. judging
   resumed, moved                                        11. the main job
"""
import csv
import doctest
import fcntl
import glob
import gzip
import importlib.util
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unicodedata import normalize as nfc

os.environ.setdefault("OMP_NUM_THREADS", "1")               # two runs at a time, one thread each
os.environ["HF_HUB_OFFLINE"] = "1"                          # nothing here may reach the network
HAS_CUDA = bool(shutil.which("nvidia-smi") or glob.glob("/dev/nvidia*")) and not subprocess.run(
    [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]).returncode
VISIBLE, os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES"), ""     # CUDA in section 9 alone

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig,
                          LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast,
                          Qwen2Config, Qwen2ForCausalLM)
from transformers.cache_utils import DynamicLayer

import evaluate as E
import segment
import train_ppo
import train_rm
from segment import LanguageModel, load_model, pad, parse, segment_ends, segment_locations, sequence_score
from train_rm import (Normalizer, ScalarModel, fit_normalizer, huber_line, normalized_token_rewards, rewards_at_ends,
                      spread_rewards)
from train_ppo import gae, generate, never_sampled, policy_loss, value_loss, whiten

HERE = os.path.dirname(os.path.abspath(__file__))
os.chdir(HERE)                                              # config/*.args name each other relative to the repository
WORLD_PY = "data/reviews/prepare.py"
spec = importlib.util.spec_from_file_location("prepare", WORLD_PY)
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)
torch.set_num_threads(1)
CPU = torch.device("cpu")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def random_rows(seed, B=7, R=19, cutoff=2.0):
    """entropy, mask, finished, lengths of B random responses; some entropies equal the cutoff, two rows have 1 token
    (one of them only an EOS)."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, R + 1, (B,), generator=g)
    lengths[:2], lengths[2] = 1, R
    entropy = 4 * torch.rand(B, R, generator=g)
    entropy[torch.rand(B, R, generator=g) < 0.2] = cutoff
    finished = torch.rand(B, generator=g) < 0.5
    finished[:2] = torch.tensor([True, False])
    return entropy, torch.arange(R) < lengths[:, None], finished, lengths.tolist()


# ------------------------------------------------------------------------------------------------------------
# 1. Functions against independent references: segments
# ------------------------------------------------------------------------------------------------------------
def test_doctests_of_all_chapters():
    results = [doctest.testmod(m) for m in (segment, train_rm, train_ppo, E)]
    assert sum(r.failed for r in results) == 0 and sum(r.attempted for r in results) >= 7


@pytest.mark.parametrize("granularity", ["segment", "token", "bandit"])
@pytest.mark.parametrize("seed", range(4))
def test_segment_ends_and_locations_are_those_of_a_loop_over_tokens(granularity, seed):
    entropy, mask, finished, lengths = random_rows(seed)
    ends = segment_ends(entropy, mask, finished, 2.0, granularity)
    p, values = segment_locations(ends), torch.randn(entropy.shape, generator=torch.Generator().manual_seed(2))
    score = sequence_score(values, ends)
    for b, n in enumerate(lengths):
        content = n - 1 if finished[b] and n > 1 else n     # end-of-turn belongs to no segment, unless it is all
        want = []
        for r in range(n):
            if granularity == "bandit" and r == n - 1:
                want.append(r)
            if r < content and (granularity == "token" or granularity == "segment" and
                                (float(entropy[b, r]) > 2.0 or r == content - 1)):
                want.append(r)
        assert ends[b].nonzero()[:, 0].tolist() == want
        assert [round(x, 6) for x in p[b, want].tolist()] == [round((i + 1) / len(want), 6) for i in range(len(want))]
        assert float(p[b].sum()) == pytest.approx(sum(p[b, want].tolist()))      # 0 where nothing ends
        assert float(score[b]) == pytest.approx(float(values[b, want].mean()), abs=1e-6)


def test_segments_of_nothing_and_an_unknown_granularity():
    nothing = torch.zeros(3, 4)
    for granularity in ("segment", "token", "bandit"):
        ends = segment_ends(nothing, nothing > 0, nothing[:, 0] > 0, 1.0, granularity)
        assert not ends.any() and sequence_score(nothing + 5, ends).tolist() == [0, 0, 0]
    assert segment_ends(torch.zeros(0, 0), torch.zeros(0, 0) > 0, torch.zeros(0) > 0, 1.0, "segment").shape == (0, 0)
    with pytest.raises(ValueError, match="granularity"):
        segment_ends(nothing, nothing > 0, nothing[:, 0] > 0, 1.0, "word")


def test_granularities_are_limits_of_each_other():
    entropy, mask, finished, lengths = random_rows(9)
    entropy = entropy + 0.01                                # strictly positive, so that cutoff 0 cuts everywhere
    token = segment_ends(entropy, mask, finished, 1.0, "token")
    for cutoff in (0.0, -math.inf):
        assert torch.equal(segment_ends(entropy, mask, finished, cutoff, "segment"), token)
    whole = segment_ends(entropy, mask, finished, math.inf, "segment")       # bandit, but before the EOS
    bandit = segment_ends(entropy, mask, finished, 1.0, "bandit")
    for b, n in enumerate(lengths):
        assert bandit[b].nonzero().tolist() == [[n - 1]]
        assert whole[b].nonzero().tolist() == [[n - 1 - int(finished[b] and n > 1)]]
    rewards = torch.randn(entropy.shape, generator=torch.Generator().manual_seed(1))
    spread = [spread_rewards(rewards, token, mask, how) for how in ("even", "repeat", "end")]
    assert torch.equal(spread[0], spread[1]) and torch.equal(spread[1], spread[2])


@pytest.mark.parametrize("how", ["even", "repeat", "end"])
@pytest.mark.parametrize("granularity", ["segment", "token", "bandit"])
def test_spread_rewards_is_a_loop_over_segments(how, granularity):
    entropy, mask, finished, lengths = random_rows(3)
    ends = segment_ends(entropy, mask, finished, 2.0, granularity)
    rewards = torch.randn(entropy.shape, generator=torch.Generator().manual_seed(3))
    got = spread_rewards(rewards, ends, mask, how)
    for b, n in enumerate(lengths):
        want, first = [0.0] * mask.shape[1], 0
        for r in range(n):
            if ends[b, r]:
                for k in range(first, r + 1):
                    x = float(rewards[b, r])
                    want[k] = x if how == "repeat" else x / (r + 1 - first) if how == "even" else x * (k == r)
                first = r + 1
        assert got[b].tolist() == pytest.approx(want, abs=1e-6)
        if finished[b] and n > 1 and granularity != "bandit":
            assert got[b, n - 1] == 0                       # the EOS earns nothing
    if how != "repeat":                                     # what is given out is what was earned
        assert got.sum(1).tolist() == pytest.approx(torch.where(ends, rewards, 0.0).sum(1).tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="interpolation"):
        spread_rewards(rewards, ends, mask, "evenly")


def test_crossings_and_normalised_rewards_by_hand():
    """One response of 5 tokens: segments end at 1 and 3, the EOS is token 4."""
    entropy, values = torch.tensor([[0., 3, 0, 0, 0]]), torch.tensor([[9., 2, 9, 4, 7]])
    args = (entropy, torch.ones(1, 5, dtype=torch.bool), torch.tensor([True]), 1.0)
    for own, use, want in (("segment", "segment", [0, 2, 0, 4, 0]), ("segment", "bandit", [0, 0, 0, 0, 3]),
                           ("bandit", "segment", [0, 2, 0, 4, 0]), ("bandit", "bandit", [0, 0, 0, 0, 7]),
                           ("token", "bandit", [0, 0, 0, 0, 6])):
        rewards, ends = rewards_at_ends(values, *args, own, use)
        assert rewards[0].tolist() == want and rewards[0, ends[0]].tolist() == [x for x in want if x]
    rewards, ends = rewards_at_ends(values, *args, "segment", "segment")
    fit = Normalizer(w_mean=1.0, b_mean=1.0, w_std=0.5, b_std=2.0)
    first = (2 - (1 + math.log(.5))) / (2 + 0.5 * math.log(.5)) / 2          # p = 1/2, two tokens
    got = normalized_token_rewards(rewards, ends, args[1], fit, "even", scale=0.5)[0].tolist()
    assert got == pytest.approx([2 * first, 2 * first, 1.5, 1.5, 0], abs=1e-5)
    assert normalized_token_rewards(rewards * 1e4, ends, args[1], fit, "even").max() == 10


# ------------------------------------------------------------------------------------------------------------
# 1. Functions against independent references: normaliser, losses, advantages
# ------------------------------------------------------------------------------------------------------------
def rewards_with_known_fit(n_responses, seed=0):
    """Segment rewards whose mean is .7 log p + .5 and whose deviation is .25 log p + 2.8; n = 2..12 segments."""
    rng = np.random.default_rng(seed)
    p = np.concatenate([np.arange(1, n + 1) / n for n in rng.integers(2, 13, n_responses)])
    return p, 0.7 * np.log(p) + 0.5 + (0.25 * np.log(p) + 2.8) * rng.standard_normal(len(p))


def test_normalizer_recovers_known_coefficients_and_survives_outliers():
    p, y = rewards_with_known_fit(20000)
    fit = fit_normalizer(torch.tensor(p), torch.tensor(y))
    for got, want in ((fit.w_mean, .7), (fit.b_mean, .5), (fit.w_std, .25), (fit.b_std, 2.8)):
        assert got == pytest.approx(want, abs=0.06)
    wild = y.copy()
    wild[np.isclose(p, 1 / 7)] += 1000                      # one pool is absurd: least squares would follow it
    again = fit_normalizer(p, wild)
    assert again.w_mean == pytest.approx(.7, abs=.15) and again.w_std == pytest.approx(.25, abs=.15)
    assert Normalizer.from_dict(json.loads(json.dumps(fit.to_dict()))) == fit


def test_normalizer_outside_of_what_it_was_fitted_on():
    one = fit_normalizer(torch.ones(50), torch.arange(50.))
    assert (one.w_mean, one.w_std) == (0, 0) and one.b_mean == pytest.approx(24.5)
    assert one.b_std == pytest.approx(float(np.arange(50).std()))            # population deviation
    assert one.mean(torch.tensor([.01, 1.])).tolist() == pytest.approx([24.5, 24.5])
    fit = Normalizer(w_mean=1.0, b_mean=0.0, w_std=1.0, b_std=2.0, p_min=0.05, p_max=1.0)
    assert float(fit.std(0.05)) == pytest.approx(0.2)       # 2 + log .05 < 0: the floor, a tenth of b_std
    assert float(fit.mean(1e-9)) == pytest.approx(math.log(.05))             # p is clamped to the calibrated range
    for bad in (torch.full((20,), 3.0), torch.tensor([1.0, math.nan])):
        with pytest.raises(ValueError):
            fit_normalizer(torch.linspace(.1, 1, len(bad)), bad)
    with pytest.raises(ValueError):
        fit_normalizer(torch.zeros(0), torch.zeros(0))


@pytest.mark.parametrize("seed", range(3))
def test_huber_line_minimises_hubers_objective(seed):
    """Against a direct minimisation of sum(sigma + H(r / sigma) sigma) over slope, intercept and sigma."""
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.uniform(-3, 0, 60))
    y = 0.8 * x + 0.3 + torch.tensor(rng.standard_t(2, 60)) * 0.3            # heavy tails: weights matter
    slope, intercept, log_sigma = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(3))
    optimizer = torch.optim.LBFGS([slope, intercept, log_sigma], max_iter=500, tolerance_grad=1e-11,
                                  tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        sigma = log_sigma.exp()
        z = ((y - slope * x - intercept) / sigma).abs()
        loss = (sigma + sigma * torch.where(z < 1.35, z ** 2, 2 * 1.35 * z - 1.35 ** 2)).sum()
        loss.backward()
        return loss
    optimizer.step(objective)
    assert huber_line(x.numpy(), y.numpy()) == pytest.approx((slope.item(), intercept.item()), abs=1e-4)


def test_calibrate_gives_the_deviation_of_a_response_total():
    entropy, mask, finished, _ = random_rows(11, B=64)
    values = torch.randn(entropy.shape, generator=torch.Generator().manual_seed(4)) + 2
    statistics = train_rm.calibrate(lambda: iter([(values, entropy, mask, finished)]), 2.0, "segment")
    rewards, ends = rewards_at_ends(values, entropy, mask, finished, 2.0, "segment", "segment")
    y = values[ends]
    fit = statistics["segment"]["global"]
    assert (fit["b_mean"], fit["b_std"]) == pytest.approx((float(y.mean()), float(y.std(correction=0))), abs=1e-5)
    totals = [sum((float(v) - fit["b_mean"]) / fit["b_std"] for v in values[b, ends[b]]) for b in range(64)]
    assert fit["scale"]["end"] == pytest.approx(np.std(totals), rel=1e-4)
    last = [float(values[b, ends[b]][-1]) for b in range(64)]
    assert statistics["segment"]["last"]["b_mean"] == pytest.approx(np.mean(last), abs=1e-5)
    assert statistics["bandit"]["location"]["w_mean"] == 0                   # one location: the sequence score's mean
    score = float(sequence_score(values, ends).mean())
    assert statistics["bandit"]["location"]["b_mean"] == pytest.approx(score, abs=1e-5)
    half = fit_normalizer([.5] * 3, [1., 2., 3.])                            # one location, wherever it is
    assert (half.w_mean, half.w_std, half.b_mean) == (0, 0, pytest.approx(2))


def test_bradley_terry_by_hand():
    got = train_rm.bradley_terry(torch.tensor([1.0, 0, -2]), torch.tensor([0.0, 0, 1])).tolist()
    assert got == pytest.approx([math.log(1 + math.exp(-1)), math.log(2), math.log(1 + math.exp(3))], abs=1e-6)


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_the_double_sum(gamma, lam):
    _, mask, _, lengths = random_rows(6)
    rewards, values = torch.randn(2, *mask.shape, generator=torch.Generator().manual_seed(5))
    advantages, returns = gae(rewards, values, mask, gamma, lam)             # padding holds garbage on purpose
    for b, n in enumerate(lengths):
        delta = [float(rewards[b, t] - values[b, t]) + (gamma * float(values[b, t + 1]) if t + 1 < n else 0)
                 for t in range(n)]
        want = [sum((gamma * lam) ** (l - t) * delta[l] for l in range(t, n)) for t in range(n)]
        assert advantages[b, :n].tolist() == pytest.approx(want, abs=1e-4)
        assert returns[b, :n].tolist() == pytest.approx([w + float(v) for w, v in zip(want, values[b])], abs=1e-4)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_whiten_uses_valid_tokens_only():
    _, mask, _, _ = random_rows(7)
    x = torch.where(mask, torch.randn(mask.shape, generator=torch.Generator().manual_seed(6)) * 3 + 5, 1e6)
    valid = x[mask].numpy()
    got = whiten(x, mask)
    assert got[mask].tolist() == pytest.approx(((valid - valid.mean()) / valid.std()).tolist(), abs=1e-5)
    assert not got[~mask].any()


def test_policy_and_value_losses_are_loops_over_tokens():
    _, mask, _, lengths = random_rows(8)
    new, old, adv, ret = torch.randn(4, *mask.shape, generator=torch.Generator().manual_seed(7)) * 0.5
    losses, ratio = policy_loss(new, old, adv, mask, 0.2)
    v_losses = value_loss(new, old, ret, mask, 0.25)
    for b, n in enumerate(lengths):
        policy, value = 0.0, 0.0
        for t in range(n):
            n_, o, a, g = (float(x[b, t]) for x in (new, old, adv, ret))
            q = math.exp(n_ - o)
            assert float(ratio[b, t]) == pytest.approx(q, rel=1e-5)
            policy -= min(q * a, max(0.8, min(1.2, q)) * a) / n
            value += 0.5 * max((n_ - g) ** 2, (o + max(-0.25, min(0.25, n_ - o)) - g) ** 2) / n
        assert (float(losses[b]), float(v_losses[b])) == pytest.approx((policy, value), abs=1e-5)


def test_learning_rate():
    rate = [train_rm.learning_rate(s, 100, 0.03) for s in range(100)]
    assert rate[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1]) and rate == sorted(rate[:3]) + sorted(rate[3:], reverse=True)
    assert 0.1 < rate[-1] < 0.102 and train_rm.learning_rate(0, 1, 0.03) == 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_micro_batches_cover_every_row_once_within_the_budget(ranks):
    rng = np.random.default_rng(ranks)
    for n in (1, 2, 5, 40):
        lengths = rng.integers(1, 60, n).tolist()
        batches = segment.micro_batches(lengths, 128, ranks)
        assert sorted(i for b in batches for i in b) == list(range(n)) and len(batches) % ranks == 0
        assert all(max(lengths[i] for i in b) * len(b) <= 128 for b in batches if b)
    assert segment.micro_batches([500, 3], 128) == [[0], [1]]                # a row above the budget goes alone


# ------------------------------------------------------------------------------------------------------------
# 1. Functions against independent references: log-probabilities, entropies, values
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [1, 7, 50, 1000, None])
def test_logprobs_and_entropy_are_those_of_log_softmax(chunk):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 16, generator=g, requires_grad=True)
    weight = torch.randn(300, 16, generator=g, requires_grad=True)
    targets, a, b = torch.randint(300, (50,), generator=g), torch.randn(50, generator=g), torch.randn(50, generator=g)
    logp, entropy = segment.token_logprobs_and_entropy(hidden, weight, targets, chunk)
    got = torch.autograd.grad((a * logp + b * entropy).sum(), (hidden, weight))
    full = (hidden @ weight.T).log_softmax(-1)
    want_logp, want_entropy = full.gather(1, targets[:, None])[:, 0], -(full.exp() * full).sum(1)
    want = torch.autograd.grad((a * want_logp + b * want_entropy).sum(), (hidden, weight))
    for x, y in ((logp, want_logp), (entropy, want_entropy), (got[0], want[0]), (got[1], want[1])):
        torch.testing.assert_close(x, y, atol=3e-4, rtol=1e-4)
    logp, entropy = segment.token_logprobs_and_entropy(hidden.bfloat16(), weight.bfloat16(), targets, chunk)
    assert logp.dtype == entropy.dtype == torch.float32
    empty = segment.token_logprobs_and_entropy(hidden[:0], weight, targets[:0], chunk)
    assert [x.shape for x in empty] == [(0,), (0,)]


def peak_bytes(f):
    """The most memory that f held at once, from the profiler's record of every allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        f()
    events = sorted((e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"),
                    key=lambda e: e.start_ns())
    return int(np.cumsum([e.nbytes() for e in events]).max())


def test_logits_are_never_all_in_memory():
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(256, 8, generator=g, requires_grad=True)
    weight = torch.randn(32768, 8, generator=g, requires_grad=True)
    targets = torch.randint(32768, (256,), generator=g)

    def naive():
        logp = (hidden @ weight.T).log_softmax(-1)
        (logp.gather(1, targets[:, None]).sum() - (logp.exp() * logp).sum()).backward()

    def ours():
        sum(x.sum() for x in segment.token_logprobs_and_entropy(hidden, weight, targets, 4)).backward()
    assert peak_bytes(ours) < 0.1 * peak_bytes(naive)


# Four families in small: grouped heads and BOS (Llama 3), fused projections and a second end token (Phi-3), biases and
# no BOS (Qwen2), tied embeddings (SmolLM2). <system> plays Phi-3's <|end|>: in none of the messages below it occurs.
SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=1024, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=2)
TURNS = "{% for m in messages %}{{ '<' + m.role + '>\n' + m.content + 'END\n' }}{% endfor %}" \
        "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
FAMILIES = {
    "llama3": (LlamaForCausalLM, LlamaConfig, {"rope_theta": 5e5}, "{{ bos_token }}" + TURNS.replace("END", "<eos>")),
    "phi3": (Phi3ForCausalLM, Phi3Config, {"sliding_window": 100}, "{{ bos_token }}" + TURNS.replace("END", "<system>")
             .replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}, "<user>\nplease be honest.<eos>\n" + TURNS.replace("END", "<eos>")),
    "smollm2": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}, TURNS.replace("END", "<eos>")),
}


def byte_level_tokenizer():
    """A BPE of bytes with merges; transformers makes a Qwen2Tokenizer of whatever lies beside a Qwen2 model."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator([text for row in prepare.PHRASES for text in row], trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(prepare.SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", pad_token="<unk>",
                                   bos_token="<bos>", extra_special_tokens=list(prepare.SPECIALS[3:]))


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """{name: folder} of tiny random chat models in the shapes of four families."""
    folders = {}
    for k, (name, (kind, config, extra, template)) in enumerate(FAMILIES.items()):
        tokenizer = byte_level_tokenizer() if name == "qwen2" else prepare.build_tokenizer()
        tokenizer.chat_template = template
        torch.manual_seed(k)
        model = kind(config(vocab_size=len(tokenizer) + 3, **SHAPE, **extra))       # 3 embeddings that are no token
        model.generation_config = GenerationConfig(
            eos_token_id=[2, 5] if name == "phi3" else 2, bos_token_id=1, pad_token_id=2, do_sample=True,
            temperature=0.6, top_p=0.9)
        folders[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    segment.setup()                                         # a process group of one, for all in-process runs
    return folders


def random_chats(V, seed=0, B=5):
    rng = np.random.default_rng(seed)
    return [(rng.integers(6, V, rng.integers(1, 9)).astype(np.int32), rng.integers(6, V, n).astype(np.int32))
            for n in rng.integers(1, 14, B)]


@pytest.mark.parametrize("family", FAMILIES)
def test_models_read_rows_alike_alone_in_a_batch_and_behind_padding(families, family):
    """Log-probs, entropies and values against a plain Hugging Face forward of each row alone."""
    lm = load_model(families[family], LanguageModel, CPU, torch.float32)
    rm = load_model(families[family], ScalarModel, CPU, torch.float32, head_std=0.2, seed=3)
    hf = AutoModelForCausalLM.from_pretrained(families[family], dtype=torch.float32)
    rows = random_chats(hf.config.vocab_size)
    with torch.no_grad():
        ids, p, r = pad(rows, CPU)
        wide = torch.cat([ids, torch.randint(0, 200, (len(ids), 6))], 1)     # garbage behind the end is never read
        outs = [torch.stack(lm(x, p, r)) for x in (ids, wide)]
        for b, (prompt, response) in enumerate(rows):
            P, R = len(prompt), len(response)
            row = torch.tensor(np.concatenate([prompt, response]))[None].long()
            logp = hf(row).logits[0].float().log_softmax(-1)                 # (T, V)
            H = -(logp.exp() * logp).sum(-1)
            want = torch.stack([logp[P - 1:-1].gather(1, row[0, P:, None])[:, 0], H[P - 1:-1], H[P:]])
            alone = torch.stack(lm(*pad([rows[b]], CPU)))[:, 0]
            hidden = hf.base_model(input_ids=row).last_hidden_state[0]       # (T, d)
            for out in (outs[0][:, b, :R], outs[1][:, b, :R], alone):
                torch.testing.assert_close(out, want, atol=2e-4, rtol=1e-4)
            assert not outs[0][:, b, R:].any()
            for shift in (0, -1):                                            # reward after, critic before the token
                rm.shift = shift
                values = [rm(x, p, r)[0][b, :R] for x in (ids, wide)]
                want = (hidden @ rm.hf.score.weight.T)[P + shift:P + R + shift, 0]
                for x in values:
                    torch.testing.assert_close(x, want, atol=1e-4, rtol=1e-4)
        mapped = segment.map_rows(lm, rows, 40, CPU)                         # several micro-batches, rows in order
        torch.testing.assert_close(mapped, outs[0], atol=2e-4, rtol=1e-4)


def test_a_fresh_head_has_the_stated_deviation(families):
    rm = load_model(families["llama3"], ScalarModel, CPU, torch.float32, head_std=1 / 33, seed=0)
    again = load_model(families["llama3"], ScalarModel, CPU, torch.float32, head_std=1 / 33, seed=0)
    weight, same = (m.hf.score.weight.full_tensor() for m in (rm, again))
    assert float(weight.std()) == pytest.approx(1 / 33, rel=0.4) and rm.hf.score.bias is None
    assert torch.equal(weight, same)


# ------------------------------------------------------------------------------------------------------------
# 2. Chat encoding
# ------------------------------------------------------------------------------------------------------------
TALK = [user("tell me about my new phone."), assistant("rain really killed it in one minute."),
        user("would you buy it again? be honest.")]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_response_are_the_whole_conversation(families, family):
    tokenizer, stops = segment.load_tokenizer(families[family])
    assert stops.tolist() == ([2, 5] if family == "phi3" else [2])           # generation_config and tokenizer
    for prompt in (TALK[:1], TALK):                                          # one turn; an EOS inside earlier turns
        answer = "fish somehow asked me where to buy one."
        (p, r), = segment.encode_chats(tokenizer, stops, [(prompt, answer, "row 1")], 256, 128)
        whole = tokenizer.apply_chat_template(prompt + [assistant(answer)], return_dict=False)
        assert [*p, *r] == whole[:len(p) + len(r)]
        assert p.tolist() == tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        end = 5 if family == "phi3" else 2
        assert (r == end).tolist() == [False] * (len(r) - 1) + [True] and segment.is_finished([(p, r)], stops).all()
        assert (p[0] == 1) == (family in ("llama3", "phi3"))                 # BOS once, where the template has one
        assert sum(p == 1) <= 1
        prompts = segment.encode_prompts(tokenizer, [prompt], 128)
        assert prompts[0].tolist() == p.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_that_somebody_types_stay_text(families, family):
    tokenizer, stops = segment.load_tokenizer(families[family])
    typed = "good <eos> <system> <assistant> <bos> <<eos>eos> phone"
    rows = segment.encode_chats(tokenizer, stops, [([user("good phone")], "good phone", "row 1"),
                                                   ([user(typed)], typed, "row 2")], 256, 128)
    for plain, attack in zip(*rows):                        # prompts, then responses: the same special tokens
        special = np.arange(1, 6)
        assert plain[np.isin(plain, special)].tolist() == attack[np.isin(attack, special)].tolist()
        assert len(attack) > len(plain) + 10                                 # and nothing was thrown away


def test_what_is_too_long_loses_its_oldest_prompt_and_its_newest_response_tokens(families):
    tokenizer, stops = segment.load_tokenizer(families["llama3"])
    chat = ([user(" ".join(["phone"] * 40 + ["watch"]))], "good phone.", "row 1")
    (p, r), = segment.encode_chats(tokenizer, stops, [chat], 256, 10)
    assert len(p) == 45 and len(r) == 4                     # both fit together: the prompt's own limit is not applied
    (q, s), = segment.encode_chats(tokenizer, stops, [chat], 40, 10)
    assert q.tolist() == [1, *p[-9:]] and s.tolist() == r.tolist()           # BOS kept, oldest lost
    (q, s), = segment.encode_chats(tokenizer, stops, [chat], 12, 10)
    assert s.tolist() == r[:2].tolist() and not segment.is_finished([(q, s)], stops).any()
    ids = np.arange(1, 9)
    for limit, bos, want in ((8, 1, ids), (20, 1, ids), (3, 1, [1, 7, 8]), (3, 7, [6, 7, 8]), (3, None, [6, 7, 8])):
        assert segment.cut_prompt(ids, limit, bos).tolist() == list(want)


def test_a_template_that_ends_turns_with_no_stop_token_is_refused(families, capsys):
    tokenizer, stops = segment.load_tokenizer(families["phi3"])
    chats = [([user("is it good?")], "good.", f"row {n}") for n in range(3)]
    tokenizer.chat_template = FAMILIES["phi3"][3].replace("{{ eos_token }}", "")
    assert "no stop token" in refused(capsys, lambda: segment.encode_chats(tokenizer, torch.tensor([2]), chats, 99, 50))
    tokenizer.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %}?{% endif %}"
    assert "row 0" in refused(capsys, lambda: segment.encode_chats(tokenizer, stops, chats, 99, 50))


def test_segment_texts_put_together_are_the_response(families):
    tokenizer, _ = segment.load_tokenizer(families["llama3"])
    ids = tokenizer("mother really hears me. water stays outside.")["input_ids"]
    pieces = segment.segment_texts(tokenizer, np.array(ids), np.array([False, False, True, False, True] + [False] * 4))
    assert "".join(pieces) == tokenizer.decode(ids) and pieces[0] == "mother really hears" and len(pieces) == 3


# ------------------------------------------------------------------------------------------------------------
# 3. Sampling
# ------------------------------------------------------------------------------------------------------------
def sampling_case(folder, B=9, R=24):
    """A model, B prompts of different lengths, luck, and a tenth of the vocabulary as stop tokens: responses end at
    very different steps, so that rows leave the batch all the time."""
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [p for p, _ in random_chats(hf.config.vocab_size, seed=1, B=B)]
    luck = torch.randint(2 ** 62, (B, R), generator=torch.Generator().manual_seed(2))
    return hf, prompts, torch.arange(6, hf.config.vocab_size, 10), R, luck


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_logprobs_are_teacher_forced_ones_and_batches_do_not_matter(families, family):
    hf, prompts, stops, R, luck = sampling_case(families[family])
    tokens, logps, lengths = generate(hf, prompts, stops, R, luck)
    assert len(set(lengths.tolist())) > 3
    for b, (p, n) in enumerate(zip(prompts, lengths.tolist())):
        row = torch.cat([torch.tensor(p).long(), tokens[b, :n]])[None]
        full = hf(row).logits[0, len(p) - 1:-1].float().log_softmax(-1)
        torch.testing.assert_close(logps[b, :n], full.gather(1, row[0, len(p):, None])[:, 0], atol=2e-4, rtol=1e-4)
        ends = torch.isin(tokens[b, :n], stops).tolist()
        assert not any(ends[:-1]) and (ends[-1] or n == R) and not tokens[b, n:].any()
    for group in ([8, 7, 6, 5, 4, 3, 2, 1, 0], [4], [1, 6], [0, 2, 3, 8]):   # other order, other company
        again = generate(hf, [prompts[b] for b in group], stops, R, luck[group])
        assert torch.equal(again[0], tokens[group]) and torch.equal(again[2], lengths[group])
    hf.generation_config = GenerationConfig()               # it held temperature .6 and top_p .9: no influence
    assert torch.equal(generate(hf, prompts, stops, R, luck)[0], tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_hugging_face_greedy(families, family):
    hf, prompts, stops, R, luck = sampling_case(families[family])
    tokens, _, lengths = generate(hf, prompts, stops, R, luck, temperature=0)
    for b in (0, 3, 8):
        want = hf.generate(torch.tensor(prompts[b]).long()[None], attention_mask=torch.ones(1, len(prompts[b])),
                           do_sample=False, temperature=None, top_p=None, max_new_tokens=R, eos_token_id=stops.tolist(),
                           pad_token_id=0)[0, len(prompts[b]):]
        assert tokens[b, :lengths[b]].tolist() == want.tolist()


def test_the_roomy_cache_is_transformers_own():
    """Keys and values after a prompt, more tokens than there is room for, and rows that leave."""
    ours, theirs, g = train_ppo.RoomyLayer(), DynamicLayer(), torch.Generator().manual_seed(0)
    rows = 5
    for step in range(300):
        new = torch.randn(2, rows, 2, 7 if step == 0 else 1, 4, generator=g)     # keys and values, (b, heads, n, d)
        for a, b in zip(ours.update(*new), theirs.update(*new)):
            assert torch.equal(a, b)
        if step in (20, 200):
            rows -= 1
            for layer in (ours, theirs):
                layer.batch_select_indices(torch.arange(rows))
    assert ours.get_seq_length() == theirs.get_seq_length() == 306


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_samples_follow_the_softmax_and_never_hold_a_banned_token(families, temperature):
    """Chi-square on the first token of 4,000 responses to one prompt."""
    hf, prompts, stops, _, _ = sampling_case(families["llama3"])
    tokenizer, own_stops = segment.load_tokenizer(families["llama3"])
    banned = never_sampled(tokenizer, own_stops, hf.config.vocab_size)
    V = hf.config.vocab_size
    assert banned.nonzero()[:, 0].tolist() == [0, 1, 3, 4, 5, V - 3, V - 2, V - 1]   # specials but EOS; no token at all
    n = 4000
    luck = torch.randint(2 ** 62, (n, 1), generator=torch.Generator().manual_seed(8))
    tokens, logps, _ = generate(hf, [prompts[0]] * n, stops, 1, luck, temperature, banned)
    logits = hf(torch.tensor(prompts[0]).long()[None]).logits[0, -1].float()
    p = (logits / temperature).masked_fill(banned, -math.inf).softmax(-1).detach()
    count = torch.bincount(tokens[:, 0], minlength=V)
    assert not count[banned].any()
    big = n * p >= 5
    terms = torch.cat([(count[big] - n * p[big]) ** 2 / (n * p[big]),
                       (count[~big].sum() - n * p[~big].sum())[None] ** 2 / (n * p[~big].sum() + 1e-9)])
    k = len(terms) - 1
    assert k >= 5 and float(terms.sum()) < k + 4 * math.sqrt(2 * k)
    torch.testing.assert_close(logps[:, 0], logits.log_softmax(-1)[tokens[:, 0]], atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# 4. Data and flags that must be refused: exit code 2, one line that names file, row or flag
# ------------------------------------------------------------------------------------------------------------
def refused(capsys, f):
    """The line on stderr of an f that must end with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        f()
    lines = [x for x in capsys.readouterr().err.splitlines() if x.strip() and ("it/s]" not in x or "error" in x)]
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (end.value.code, lines)
    return lines[0]


def write(path, value):
    """A data file: str and bytes as they are, a list of rows as .jsonl."""
    text = value if isinstance(value, (str, bytes)) else "".join(json.dumps(row) + "\n" for row in value)
    with open(path, "wb") as f:
        f.write(text if isinstance(text, bytes) else text.encode())
    return path


PAIR = {"chosen": [user("is it good?"), assistant("good.")], "rejected": [user("is it good?"), assistant("angry.")]}
BAD_PAIRS = {                                               # file name: (content, what the message must name)
    "empty.jsonl": ("", "empty"), "blank.jsonl": ("\n\n", "empty"), "none.json": ("[]", "empty"),
    "columns.jsonl": ([PAIR, {"a": 1, "b": 2}], "row 2: no columns chosen and rejected; it has a, b"),
    "null.jsonl": ([{"chosen": None, "rejected": "x"}], "row 1"),
    "broken.jsonl": (json.dumps(PAIR) + '\n\n{"chosen": [\n', "line 3"),
    "broken.json": ('[{"chosen": "a"', "not valid JSON"),
    "array.jsonl": ([PAIR, [1, 2]], "row 2: not an object"), "number.jsonl": ("7\n", "row 1"),
    "no_turn.jsonl": ([PAIR, {"chosen": [user("a")], "rejected": [user("a")]}], "row 2, chosen"),
    "content.jsonl": ([{**PAIR, "rejected": [user("is it good?"), assistant(None)]}], "row 1, rejected"),
    "parts.jsonl": ([{**PAIR, "chosen": [user([{"type": "text", "text": "a"}]), assistant("b")]}], "row 1, chosen"),
    "no_role.jsonl": ([{**PAIR, "chosen": [{"content": "a"}, assistant("b")]}], "row 1, chosen"),
    "empty_list.jsonl": ([{"chosen": [], "rejected": []}], "row 1, chosen"),
    "no_prompt.jsonl": ([{"chosen": "a", "rejected": "b"}], "row 1: chosen holds no prompt"),
    "prompt_type.jsonl": ([{"prompt": 7, "chosen": "a", "rejected": "b"}], "row 1, prompt"),
    "not_gz.jsonl.gz": (b"plain text", "not_gz.jsonl.gz"),
    "cut.jsonl.gz": (gzip.compress(json.dumps([PAIR] * 99).encode())[:-30], "cut.jsonl.gz"),
    "corrupt.jsonl.gz": (gzip.compress(b"x" * 5000)[:20] + b"\xff" * 30, "corrupt.jsonl.gz"),
    "latin1.jsonl": ("\xe9".encode("latin-1"), "latin1.jsonl"), "deep.jsonl": ("[" * 99999, "deep.jsonl"),
    "long.jsonl": ('{"chosen": ' + "9" * 9999 + "}", "long.jsonl"),
    "pairs.csv": ("chosen,rejected\na,b\n", "must end in"),
}
BAD_PROMPTS = {
    "empty.jsonl": ("", "empty"), "columns.jsonl": ([{"text": "a"}], "row 1: no column prompt"),
    "type.jsonl": ([{"prompt": "a"}, {"prompt": 3}], "row 2, prompt"),
    "answered.jsonl": ([{"prompt": [user("a"), assistant("b")]}], "row 1, prompt"),
    "alone.jsonl": ([{"chosen": "a response whose prompt is nowhere", "rejected": "b"}], "row 1, chosen"),
}


@pytest.mark.parametrize("load,name,content,words", [
    (load, name, *case) for load, cases in ((segment.load_pairs, BAD_PAIRS), (segment.load_prompts, BAD_PROMPTS))
    for name, case in cases.items()])
def test_bad_data_is_refused_in_one_line(tmp_path, capsys, load, name, content, words):
    path = write(f"{tmp_path}/{name}", content)
    message = refused(capsys, lambda: list(load(path)))
    assert path in message and words in message


def test_every_layout_of_preferences_reads_alike(tmp_path, families, capsys):
    rows = [PAIR, {"prompt": "is it good?", "chosen": "good.", "rejected": "angry."},
            {"prompt": [user("is it good?")], "chosen": [assistant("good.")], "rejected": [assistant("angry.")]}]
    want = [([user("is it good?")], "good.", "angry.")] * 3
    files = [write(f"{tmp_path}/a.jsonl", rows), write(f"{tmp_path}/b.json", json.dumps(rows)),
             write(f"{tmp_path}/c.json", [*rows])]
    with gzip.open(f"{tmp_path}/d.jsonl.gz", "wt") as f:
        f.write("\n".join(map(json.dumps, rows)))
    for path in (*files, f"{tmp_path}/d.jsonl.gz"):
        assert [pair[:3] for pair in segment.load_pairs(path)] == want
        assert segment.load_prompts(path) == [want[0][0]] * 3
    assert len(list(segment.load_pairs(files[0], 2))) == 2
    odd = [PAIR, {**PAIR, "rejected": PAIR["chosen"]}, {**PAIR, "chosen": [user("is it good?"), assistant(" \n")]},
           {**PAIR, "rejected": [user("another"), assistant("angry.")]}, {"prompt": "a", "chosen": "", "rejected": "b"}]
    capsys.readouterr()
    assert len(list(segment.load_pairs(write(f"{tmp_path}/odd.jsonl", odd)))) == 1
    said = capsys.readouterr().out                          # dropped, and counted
    assert "1 pairs with equal" in said and "2 pairs with an empty" in said and "1 pairs with two different" in said
    lonely = write(f"{tmp_path}/surrogate.jsonl", '{"prompt": "\\ud800 hi \\u0000", "chosen": "a", "rejected": "b"}\n')
    (prompt, *_), = segment.load_pairs(lonely)
    prompt[0]["content"].encode()                           # half a surrogate pair would break the tokenizer


def test_parquet_and_saved_folders(tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([PAIR, PAIR])
    data.to_parquet(f"{tmp_path}/a.parquet")
    data.save_to_disk(f"{tmp_path}/folder")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(f"{tmp_path}/splits")
    for path in (f"{tmp_path}/a.parquet", f"{tmp_path}/folder", f"{tmp_path}/splits"):
        assert [pair[:3] for pair in segment.load_pairs(path)] == [([user("is it good?")], "good.", "angry.")] * 2
    os.makedirs(f"{tmp_path}/nothing")
    for path in (write(f"{tmp_path}/bad.parquet", "no parquet"), f"{tmp_path}/nothing"):
        assert path in refused(capsys, lambda: list(segment.load_pairs(path)))


BAD_FLAGS = [                                               # script's Config, flags, what the message must name
    (train_rm, ["--cutoff", "-1"], "--cutoff"), (train_rm, ["--cutoff", "nan"], "--cutoff"),
    (train_rm, ["--cutof", "1"], "--cutof"), (train_rm, ["--granularity", "word"], "granularity"),
    (train_rm, ["--batch_size", "many"], "batch_size"), (train_rm, ["--lr", "inf"], "--lr"),
    (train_rm, ["--batch_size", "0"], "--batch_size"), (train_rm, ["--micro_tokens", "-5"], "--micro_tokens"),
    (train_rm, ["@no/such.args"], "no/such.args"), (train_rm, ["stray"], "stray"),
    (train_rm, ["--resume", "7"], "resume"), (train_rm, ["--seed", str(10 ** 20)], "--seed"),
    (train_rm, ["@test_all.py"], "test_all.py"), (train_rm, ["--max_prompt_tokens", "0"], "--max_prompt_tokens"),
    (train_rm, ["--save_every", "0"], "--save_every"), (train_rm, ["--eval_every", "0"], "--eval_every"),
    (train_ppo, ["--save_every", "0"], "--save_every"), (train_ppo, ["--sample_every", "0"], "--sample_every"),
    (train_ppo, ["--generation_batch_size", "0"], "--generation_batch_size"),
    (train_ppo, ["--normalizer", "z"], "normalizer"), (train_ppo, ["--interpolation", "linear"], "interpolation"),
    (train_ppo, ["--cutoff", "-0.5"], "--cutoff"), (train_ppo, ["--rollout_batch_size", "0"], "--rollout_batch_size"),
    (segment, ["--max_tokens", "0"], "--max_tokens"), (segment, ["--unknown"], "--unknown"),
    (E, ["--temperature", "-1"], "--temperature"), (E, ["--workers", "0"], "--workers"),
]


@pytest.mark.parametrize("module,flags,words", BAD_FLAGS, ids=lambda x: "".join(x) if isinstance(x, list) else "")
def test_bad_flags_are_refused_in_one_line(capsys, module, flags, words):
    assert words in refused(capsys, lambda: parse(module.Config, flags))


@pytest.mark.parametrize("module", [segment, train_rm, train_ppo, E])
def test_help_lists_every_flag_and_later_flags_override_files(tmp_path, capsys, module):
    with pytest.raises(SystemExit) as end:
        parse(module.Config, ["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and all(f"--{name}" in text for name in module.Config.__dataclass_fields__)
    path = write(f"{tmp_path}/a.args", "# a comment\n\n--seed 3 --max_samples 7   # more\n--data 'a b.jsonl'\n")
    cfg = parse(module.Config, [f"@{path}", "--seed", "4"])
    assert (cfg.seed, cfg.max_samples, cfg.data) == (4, 7, "a b.jsonl")


# ------------------------------------------------------------------------------------------------------------
# 5. A tiny world, and runs of each script as a user starts them
# ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def world(tmp_path_factory, families):
    folder = str(tmp_path_factory.mktemp("world"))
    prepare.main(prepare.parse(f"--out {folder} --texts 800 --epochs 1 --batch_size 4 --pairs 240 --pairs_test 24 "
                               "--prompts 64 --prompts_test 8".split()))
    return folder


def rm_flags(world, out, *more):
    return ["--model", f"{world}/sft", "--data", f"{world}/pairs.jsonl", "--eval_data", f"{world}/pairs_test.jsonl",
            "--out", out, "--cache", f"{out}-cache", "--batch_size", "16", "--max_steps", "6", "--save_every", "2",
            "--eval_every", "3", "--micro_tokens", "2048", *more]


def ppo_flags(world, rm, out, *more):
    return ["--model", f"{world}/sft", "--data", f"{world}/prompts.jsonl", "--reward_model", rm, "--out", out,
            "--rollout_batch_size", "12", "--batch_size", "6", "--max_steps", "3", "--save_every", "1",
            "--max_new_tokens", "100", "--micro_tokens", "512", "--seed", "1",
            "--gold", f"{WORLD_PY}:gold_reward", *more]


def rm_here(world, out, *flags):
    train_rm.main(parse(train_rm.Config, rm_flags(world, out, *flags)))


def ppo_here(world, rm, out, *flags):
    train_ppo.main(parse(train_ppo.Config, ppo_flags(world, rm, out, *flags)))


def start(script, flags, ranks=1):
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return subprocess.Popen([sys.executable, *many, script, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def run(script, flags, ranks=1):
    """Run to the end; returns (exit code, stdout, stderr)."""
    process = start(script, flags, ranks)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def run_well(script, flags, ranks=1):
    code, out, err = run(script, flags, ranks)
    assert code == 0, err[-3000:]
    return out


def kill(script, flags, when, sig):
    """Start, send `sig` as soon as when() is true, return the exit code."""
    process = start(script, flags)
    while not when() and process.poll() is None:
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()[1][-3000:]
    process.send_signal(sig)
    process.communicate(timeout=120)
    return process.returncode


def steps_logged(out):
    return open(f"{out}/metrics.jsonl").read().count("\n") if os.path.exists(f"{out}/metrics.jsonl") else 0


def metrics(out):
    """metrics.jsonl without what depends on the clock and the machine."""
    clock = ("time", "second", "eta", "mfu", "memory", "tokens_per")
    return [{k: v for k, v in json.loads(line).items() if not any(c in k for c in clock)}
            for line in open(f"{out}/metrics.jsonl")]


def weights(out):
    return {k: v for f in glob.glob(f"{out}/model/*.safetensors") for k, v in load_file(f).items()}


def same_run(a, b, tolerance=0.0):
    ours, theirs = metrics(a), metrics(b)
    assert [row.keys() for row in ours] == [row.keys() for row in theirs] and len(ours) > 1
    for x, y in zip(ours, theirs):
        differs = {k: (x[k], y[k]) for k in x if not abs(x[k] - y[k]) <= tolerance * (1 + abs(x[k]))}
        assert not differs, (x["step"], differs)
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for k in ours:
        torch.testing.assert_close(ours[k], theirs[k], atol=tolerance, rtol=tolerance, msg=k)


def tree(folder):
    """{path: content} of a folder, to see that it was left alone."""
    return {p: open(p, "rb").read() for p in sorted(glob.glob(f"{folder}/**", recursive=True)) if os.path.isfile(p)}


@pytest.fixture(scope="session")
def runs(world, tmp_path_factory):
    """{name: future of the folder} of runs in subprocesses, two at a time."""
    top = str(tmp_path_factory.mktemp("runs"))
    pool, started = ThreadPoolExecutor(2), {}

    def rm():
        run_well("train_rm.py", rm_flags(world, f"{top}/rm"))
        return f"{top}/rm"

    def rm_killed():
        """SIGKILL in the entropy pass, SIGTERM in a step, SIGKILL in a save, and a half-written checkpoint."""
        out = f"{top}/rm_killed"
        flags = rm_flags(world, out)
        assert kill("train_rm.py", flags, lambda: os.path.exists(f"{out}-cache"), signal.SIGKILL) == -9
        assert not os.path.exists(f"{out}/model") and not steps_logged(out)
        assert kill("train_rm.py", flags + ["--resume"], lambda: steps_logged(out) >= 1, signal.SIGTERM) == 143
        assert len(glob.glob(f"{out}/checkpoint/step_*")) == 1 and os.path.exists(f"{out}/model/config.json")
        before = steps_logged(out)
        assert run("train_rm.py", flags)[0] == 2            # an unfinished run wants --resume
        flags.append("--resume")
        assert kill("train_rm.py", flags, lambda: glob.glob(f"{out}/checkpoint/*.tmp"), signal.SIGKILL) == -9
        assert before < steps_logged(out) <= 6
        os.makedirs(f"{out}/checkpoint/step_99.tmp")
        write(f"{out}/checkpoint/step_99.tmp/shard-00001-model-00001-of-00001.safetensors", b"torn")
        with open(f"{out}/metrics.jsonl", "a") as f:
            f.write('{"step": 99, "lo')                     # and a torn line
        run_well("train_rm.py", flags)
        return out

    def rm_orphan():
        """One of two ranks is killed: the other ends within a minute, and both go on later."""
        out = f"{top}/rm_orphan"
        flags = rm_flags(world, out, "--resume")
        process = start("train_rm.py", flags, ranks=2)
        while steps_logged(out) < 3:
            time.sleep(0.002)
        stats = [open(path).read().rsplit(")", 1) for path in glob.glob("/proc/[0-9]*/stat")]
        ranks = sorted(int(name.split()[0]) for name, rest in stats if int(rest.split()[1]) == process.pid)
        os.kill(ranks[-1], signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode != 0 and steps_logged(out) < 6
        run_well("train_rm.py", flags, ranks=2)
        return out

    def ppo(name, ranks=1):
        run_well("train_ppo.py", ppo_flags(world, started["rm"].result() + "/model", f"{top}/{name}"), ranks)
        return f"{top}/{name}"

    def ppo_killed():
        """SIGKILL after a step (in the next rollout) and in a save."""
        out = f"{top}/ppo_killed"
        flags = ppo_flags(world, started["rm"].result() + "/model", out, "--resume")
        assert kill("train_ppo.py", flags, lambda: glob.glob(f"{out}/checkpoint/*.tmp"), signal.SIGKILL) == -9
        assert kill("train_ppo.py", flags, lambda: os.path.exists(f"{out}/model"), signal.SIGKILL) == -9
        run_well("train_ppo.py", flags)
        return out

    def ppo_moved():
        """Stopped on one rank by Ctrl-C, resumed on two."""
        out = f"{top}/ppo_moved"
        flags = ppo_flags(world, started["rm"].result() + "/model", out, "--resume")
        assert kill("train_ppo.py", flags, lambda: steps_logged(out) >= 1, signal.SIGINT) == 130
        assert steps_logged(out) < 3
        run_well("train_ppo.py", flags, ranks=2)
        return out

    def judged():
        """A policy judged on two ranks."""
        flags = [x for k, v in evaluate_flags(world, started, f"{top}/judged").items() for x in (f"--{k}", str(v))]
        run_well("evaluate.py", flags, ranks=2)
        return f"{top}/judged"

    for name, job, *args in (("rm", rm), ("rm_killed", rm_killed), ("ppo", ppo, "ppo"), ("rm_orphan", rm_orphan),
                             ("ppo_two", ppo, "ppo_two", 2), ("ppo_killed", ppo_killed), ("ppo_moved", ppo_moved),
                             ("judged", judged)):
        started[name] = pool.submit(job, *args)
    yield started
    pool.shutdown(cancel_futures=True)


def test_mistakes_on_the_command_line_are_one_line_and_code_2(world, tmp_path):
    out = f"{tmp_path}/out"
    started = [(words, start(script, ["--model", f"{world}/sft", *flags])) for script, flags, words in (
        ("train_rm.py", ["--data", "no/such.jsonl", "--out", out], "no/such.jsonl"),
        ("train_ppo.py", ["--temperature", "2", "--out", out], "--temperature"))]
    for words, process in started:
        err = process.communicate(timeout=300)[1]
        assert process.returncode == 2 and err.count("\n") == 1 and err.startswith("error: ") and words in err, err
    assert not os.path.exists(out)


BAD_RUNS = [  # changed flags of a good run (# is the test's folder), words of the message
    ("rm", "--data #no.jsonl", "no.jsonl"), ("rm", "--data #few.jsonl", "few.jsonl"),
    ("rm", "--data #same.jsonl", "same.jsonl"), ("rm", "--eval_data #same.jsonl", "same.jsonl"),
    ("rm", "--eval_data #no.jsonl", "no.jsonl"), ("rm", "--model #no_model", "no_model"),
    ("rm", "--model #no_template", "chat template"), ("rm", "--model #torn", "torn"),
    ("rm", "--model #nan", "not finite"),
    ("rm", "--max_tokens 4096", "--max_tokens"), ("rm", "--max_prompt_tokens 256", "--max_prompt_tokens"),
    ("rm", f"--oracle {WORLD_PY}:clause_values", "--oracle"),
    ("rm", "--calibrate_only true --reward_model #no_rm", "no_rm"),
    ("rm", f"--calibrate_only true --oracle {WORLD_PY}:clause_values --data #same.jsonl", "same.jsonl"),
    ("rm", f"--calibrate_only true --oracle {WORLD_PY}:nothing", "nothing"),
    ("ppo", "--data #no.jsonl", "no.jsonl"), ("ppo", "--data #few.jsonl", "--rollout_batch_size"),
    ("ppo", "--batch_size 7", "--batch_size"), ("ppo", "--max_new_tokens 999", "--max_new_tokens"),
    ("ppo", "--model #no_model", "no_model"), ("ppo", "--model #no_template", "chat template"),
    ("ppo", "--reward_model #no_rm", "no_rm"), ("ppo", "--reward_model #foreign", "tokenizer"),
    ("ppo", "--reward_model #lone", "lone"), ("ppo", "--reward_model #bare", "--calibrate_only"),
    ("ppo", "--reward_model #other", "another SFT model"), ("ppo", "--reward_model #damaged", "reward.json"),
    ("ppo", "--cutoff 1.5", "cutoff"), ("ppo", "--gold no.py:f", "--gold"),
    ("ppo", "--fit 1,2,3 --reward_scale none", "--fit"), ("ppo", "--fit 0,0,0,1", "--fit"),
    ("ppo", "--reward_model #bare --fit 0,0,0,1", "--granularity")]


@pytest.fixture(scope="session")
def bad_inputs(world, runs, tmp_path_factory):
    """A folder with the broken models and data sets that BAD_RUNS names."""
    top, rm = str(tmp_path_factory.mktemp("bad")), runs["rm"].result() + "/model"
    for name in ("foreign", "bare", "other", "damaged", "lone"):
        shutil.copytree(rm, f"{top}/{name}")
    for name in ("no_template", "torn", "nan"):
        shutil.copytree(f"{world}/sft", f"{top}/{name}")
    tokenizer = AutoTokenizer.from_pretrained(rm)
    tokenizer.add_tokens(["gadget"])
    tokenizer.save_pretrained(f"{top}/foreign")
    for path in (f"{top}/no_template/chat_template.jinja", f"{top}/bare/reward.json", *glob.glob(f"{top}/lone/*token*"),
                 f"{top}/lone/chat_template.jinja"):
        os.remove(path)
    reward = json.load(open(f"{rm}/reward.json"))
    write(f"{top}/other/reward.json", json.dumps(reward | {"sft_fingerprint": "0" * 32}))
    write(f"{top}/damaged/reward.json", "{}")
    state = load_file(f"{world}/sft/model.safetensors")
    state["model.norm.weight"][0] = math.nan
    save_file(state, f"{top}/nan/model.safetensors", {"format": "pt"})
    write(f"{top}/torn/model.safetensors", open(f"{top}/torn/model.safetensors", "rb").read()[:5000])
    write(f"{top}/few.jsonl", [PAIR] * 5)
    write(f"{top}/same.jsonl", [{**PAIR, "rejected": PAIR["chosen"]}])
    return top


@pytest.mark.parametrize("script,flags,words", BAD_RUNS)
def test_bad_runs_are_refused_in_one_line(world, runs, bad_inputs, tmp_path, capsys, script, flags, words):
    flags, out = [f.replace("#", f"{bad_inputs}/").replace(",", " ") for f in flags.split()], f"{tmp_path}/out"
    job = rm_here if script == "rm" else lambda *args: ppo_here(world, runs["rm"].result() + "/model", *args[1:])
    assert words in refused(capsys, lambda: job(world, out, *flags))
    assert not os.path.exists(out)                          # and nothing is written


def test_metrics_and_files_of_a_run(runs):
    rm, ppo = runs["rm"].result(), runs["ppo"].result()
    lines = [json.loads(line) for line in open(f"{rm}/metrics.jsonl")]
    assert [x["step"] for x in lines] == [1, 2, 3, 4, 5, 6]
    assert [x["step"] for x in lines if "eval_accuracy" in x] == [3, 6]
    assert all({"loss", "accuracy", "grad_norm", "lr", "tokens_per_second"} <= x.keys() for x in lines)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=0.05)          # a fresh head knows nothing
    lines = [json.loads(line) for line in open(f"{ppo}/metrics.jsonl")]
    assert [x["step"] for x in lines] == [1, 2, 3]
    names = "kl kl_per_token reward gold response_length response_tokens segment_length finished clip_fraction " \
            "entropy explained_variance time_generate time_score time_train tokens_per_second " \
            "tokens_per_second_generate tokens_per_second_score tokens_per_second_train"
    assert all(set(names.split()) <= x.keys() for x in lines)
    assert all(abs(x["first_ratio"] - 1) < 1e-5 and x["sampler_gap"] < 1e-3 for x in lines)
    for x in lines:
        read, seconds = x["tokens_per_second_train"] * x["time_train"], sum(x[k] for k in x if k.startswith("time_"))
        assert x["tokens_per_second_generate"] * x["time_generate"] == pytest.approx(x["response_tokens"])
        assert x["tokens_per_second_score"] * x["time_score"] == pytest.approx(read) and read > x["response_tokens"]
        assert x["tokens_per_second"] * seconds == pytest.approx(read) and x["memory_gb"] > .1
    assert abs(lines[0]["kl"]) < 1e-4                       # the policy is still the SFT model
    assert all(math.isfinite(v) for x in lines for v in x.values()) and 0 < lines[0]["finished"] < 1
    for out in (rm, ppo):
        assert {"config.json", "metrics.jsonl", "model"} <= set(os.listdir(out))
        assert not glob.glob(f"{out}/**/*.tmp", recursive=True) and json.load(open(f"{out}/config.json"))["max_steps"]
    reward = json.load(open(f"{rm}/model/reward.json"))
    assert (reward["granularity"], reward["cutoff"]) == ("segment", 1.0) and len(reward["sft_fingerprint"]) >= 16
    assert reward["calibration_responses"] >= 2 * 240 // 20
    for use in ("segment", "token", "bandit"):
        assert set(reward["statistics"][use]) == {"location", "global", "last", "none"}
        for fit in reward["statistics"][use].values():
            assert set(fit.pop("scale")) == {"even", "repeat", "end"} and Normalizer.from_dict(fit).b_std > 0


def test_bf16_on_a_cpu_is_fp32_but_for_rounding(world, runs, tmp_path):
    rm, rows = runs["rm"].result() + "/model", random_chats(150)
    lengths = torch.tensor([len(r) for _, r in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]                # (B, R)
    for kind, path in ((LanguageModel, f"{world}/sft"), (ScalarModel, rm)):
        coarse, fine = (load_model(path, kind, CPU, dtype) for dtype in (torch.bfloat16, torch.float32))
        with torch.no_grad():
            for a, b in zip(coarse(*pad(rows, CPU)), fine(*pad(rows, CPU))):
                assert a.dtype == torch.float32 and 0 < float(((a - b) * mask).abs().max()) < .15
    ppo_here(world, rm, f"{tmp_path}/ppo", "--dtype", "bf16", "--max_steps", "1", "--max_new_tokens", "24")
    row, = metrics(f"{tmp_path}/ppo")
    assert abs(row["first_ratio"] - 1) < .1 and 1e-6 < row["sampler_gap"] < .5
    assert {x.dtype for x in weights(f"{tmp_path}/ppo").values()} == {torch.bfloat16}


def test_the_segment_script_shows_segments_their_rewards_and_a_cutoff(world, runs, capsys):
    def show(*flags):
        segment.main(parse(segment.Config, ["--model", f"{world}/sft", "--data", f"{world}/pairs_test.jsonl", *flags]))
        return capsys.readouterr().out

    path = runs["rm"].result() + "/model"
    out = show("--reward_model", path, "--target_length", "12", "--show", "2")
    tokenizer, stops = segment.load_tokenizer(path)
    chats = [(prompt, chosen, where) for prompt, chosen, _, where in segment.load_pairs(f"{world}/pairs_test.jsonl", 2)]
    rows = segment.encode_chats(tokenizer, stops, chats, 512, 256)
    with torch.no_grad():
        entropy = load_model(f"{world}/sft", LanguageModel, CPU, torch.float32)(*pad(rows, CPU))[2]
        values = load_model(path, ScalarModel, CPU, torch.float32)(*pad(rows, CPU))[0]
    mask = torch.arange(entropy.shape[1]) < torch.tensor([[len(r)] for _, r in rows])
    ends = segment_ends(entropy, mask, segment.is_finished(rows, stops), 1.0, "segment")
    shown = [float(x) for x in re.findall(r"\[([-+][\d.]+)\]", out)]
    assert shown == pytest.approx(values[ends].tolist(), abs=6e-3) and len(shown) > 10
    cutoff, length = re.search(r"--cutoff (\S+) gives segments of (\S+) tokens", out).groups()
    assert abs(float(length) - 12) < .5
    table = re.findall(r"^ +\d.* (\S+)$", show("--cutoff", cutoff, "--show", "0"), re.M)
    assert len(table) == 10 and length in table                              # as promised
    assert "hears me. | rain" in show("--text", "mother really hears me. rain really killed it in one minute.")


def test_a_finished_run_is_never_touched(runs, world, capsys):
    rm, ppo = runs["rm"].result(), runs["ppo"].result()
    for out, job in ((rm, lambda *more: rm_here(world, rm, *more)),
                     (ppo, lambda *more: ppo_here(world, f"{rm}/model", ppo, *more))):
        before = tree(out)
        capsys.readouterr()
        job(), job("--resume")
        assert capsys.readouterr().out.count("already finished") == 2
        assert "--seed was" in refused(capsys, lambda: job("--seed", "5"))   # says which field differs
        assert tree(out) == before


@pytest.mark.parametrize("a,b,tolerance", [
    ("ppo", "ppo_two", 1e-4), ("rm", "rm_killed", 0), ("rm", "rm_orphan", 1e-4),
    ("ppo", "ppo_killed", 0), ("ppo", "ppo_moved", 1e-4)])
def test_ranks_and_kills_do_not_change_a_run(runs, a, b, tolerance):
    """Metrics and exported weights: two ranks to 1e-4; killed and resumed on one rank bit for bit."""
    same_run(runs[a].result(), runs[b].result(), tolerance)


def test_the_policy_talks_as_its_model_card_would_show(runs):
    path = runs["ppo"].result() + "/model"
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    ids = tokenizer.apply_chat_template([user("tell me about my new phone.")], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=40, do_sample=True)
    assert len(tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True).split()) > 3


def test_the_reward_model_loads_as_a_sequence_classifier(runs):
    path = runs["rm"].result() + "/model"
    hf, info = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and "score.weight" in weights(runs["rm"].result())
    tokenizer, stops = segment.load_tokenizer(path)
    rows = segment.encode_chats(tokenizer, stops, [([user("is it good?")], "mother really hears me.", "row 1")], 99, 50)
    ours = load_model(path, ScalarModel, CPU, torch.float32)(*pad(rows, CPU))[0].detach()
    ids = torch.tensor(np.concatenate(rows[0]))[None].long()
    theirs = hf(input_ids=ids[:, :-1]).logits               # that class scores the last token that is no pad
    assert float(ours[0, -2]) == pytest.approx(theirs[0, 0].item(), abs=1e-5)


def test_a_reward_model_in_the_authors_layout(runs, world, tmp_path):
    """No reward.json and a class nobody knows: calibrate it, or give published coefficients, and train on it."""
    rm = runs["rm"].result() + "/model"
    theirs = shutil.copytree(rm, f"{tmp_path}/theirs")
    want = json.load(open(f"{theirs}/reward.json"))
    os.remove(f"{theirs}/reward.json")
    config = json.load(open(f"{theirs}/config.json"))
    json.dump(config | {"architectures": ["RewardModel"], "model_type": "llama"}, open(f"{theirs}/config.json", "w"))
    before = tree(theirs)
    rm_here(world, f"{tmp_path}/rm", "--calibrate_only", "--reward_model", theirs)
    got = json.load(open(f"{theirs}/reward.json"))
    assert got == want                                      # the same model on the same pairs
    assert {k: v for k, v in tree(theirs).items() if "reward.json" not in k} == before
    once = ["--max_steps", "1", "--granularity", "bandit", "--interpolation"]
    for how in ("repeat", "end"):
        ppo_here(world, theirs, f"{tmp_path}/{how}", *once, how)
    # a bandit's reward always sits at the last token, scaled as such, whatever the interpolation
    totals = [metrics(f"{tmp_path}/{how}")[0]["reward_total"] for how in ("repeat", "end")]
    assert totals[0] == pytest.approx(totals[1])
    os.remove(f"{theirs}/reward.json")
    ppo_here(world, theirs, f"{tmp_path}/fit", "--max_steps", "1", "--fit", "0.5 0.1 0.2 2.0", "--reward_scale", "none",
             "--granularity", "token", "--cutoff", "1.0")
    assert math.isfinite(metrics(f"{tmp_path}/fit")[0]["reward_total"])


def test_oracle_rewards_take_the_place_of_a_reward_model(world, tmp_path):
    oracle, rm = ["--oracle", f"{WORLD_PY}:clause_values"], f"{tmp_path}/oracle/model"
    rm_here(world, f"{tmp_path}/oracle", "--calibrate_only", *oracle)
    assert os.listdir(rm) == ["reward.json"]
    pairs = [json.loads(line) for line in open(f"{world}/pairs.jsonl")]
    values = [v for pair in pairs for side in ("chosen", "rejected") for v, _ in
              prepare.clause_values(*(m["content"] for m in pair[side]))]
    fit = json.load(open(f"{rm}/reward.json"))["statistics"]["segment"]["global"]
    assert fit["b_mean"] == pytest.approx(np.mean(values), abs=0.5) and 0.5 < fit["b_std"] < 3
    ppo_here(world, rm, f"{tmp_path}/ppo", "--max_steps", "2", *oracle)
    rows = metrics(f"{tmp_path}/ppo")
    assert len(rows) == 2 and all(-5 <= row["reward"] <= 2 and -3 < row["gold"] < 2 for row in rows)


# ------------------------------------------------------------------------------------------------------------
# 6. Attacks: nothing lost, nobody let in
# ------------------------------------------------------------------------------------------------------------
ODD = ["<eos>", "<bos>", "<system>", "<assistant>\n", "<user>", "<|im_end|>", "<|eot_id|>", "{{ x }}", "{% raw %}",
       "../../etc",
       "\0", "\ud800", "\u202e", "\ufeff", "\u200b", "\u2028", "e\u0301", "👩‍👩‍👧", "𝔘", "ﷺ",
       "\r\n", "\t", "null", "phone", "good."]


def odd_text(rng):
    k = rng.random()
    return "" if k < .04 else " \n" if k < .06 else "x" * 9000 if k < .07 else "".join(
        rng.choice(ODD) if rng.random() < .6 else chr(rng.randrange(1, 0x2fff)) for _ in range(rng.randrange(1, 25)))


def odd_chat(rng, turns):
    """Alternating messages that end with the assistant's; now and then a wrong role, order or type."""
    chat = [(assistant if (turns - n) % 2 else user)(odd_text(rng)) for n in range(turns)]
    if rng.random() < .06:
        chat.insert(rng.randrange(turns + 1), rng.choice([
            {"role": "system", "content": odd_text(rng)}, {"role": "<eos>", "content": "a"}, {"role": "user"}, None,
            "text",
            {"role": None, "content": "a"}, user(None), user(7), user([odd_text(rng)]), assistant({"a": 1}), {}, []]))
    return chat


def odd_row(rng):
    chat, text = odd_chat(rng, rng.choice([2, 2, 2, 4, 4, 6, 1])), odd_text(rng)
    return rng.choices([
        lambda: {"chosen": chat, "rejected": chat[:-1] + [assistant(text)]},
        lambda: {"prompt": text, "chosen": odd_text(rng), "rejected": odd_text(rng), "extra": [None]},
        lambda: {"prompt": chat[:-1], "chosen": text, "rejected": [assistant(odd_text(rng))]},
        lambda: rng.choice([{}, [1], "text", None, 5, {"chosen": 5, "rejected": {}}, {"chosen": text, "rejected": text},
                            {"chosen": chat}, {"prompt": chat}, {"prompt": None, "chosen": None, "rejected": chat}]),
    ], [60, 20, 15, 5])[0]()


def odd_file(rng, folder):
    rows = [odd_row(rng) for _ in range(rng.randrange(1, 4))]
    rows += rows[:1] * (rng.random() < .1)                                       # twice the same
    dump = lambda row: json.dumps(row, ensure_ascii=rng.random() < .5)
    kind = rng.choice(["jsonl", "json", "jsonl.gz", "array.jsonl", "parquet"])
    path = f"{folder}/odd.{kind}"
    if kind == "parquet":
        try:
            import datasets
            datasets.disable_progress_bars()
            datasets.Dataset.from_list(rows).to_parquet(path)
            return path
        except Exception:                                                        # no such package, or mixed columns
            path = f"{folder}/odd.jsonl"
    text = "[" + ",\n".join(map(dump, rows)) + "]" if "json" == kind[-4:] or "array" in kind else \
        rng.choice(["\n", "\r\n", "\n\n"]).join(map(dump, rows))
    data = (rng.choice(["", "\ufeff"]) + text).encode("utf-8", "surrogatepass")
    if rng.random() < .04:
        data = data[:rng.randrange(len(data))]
    return write(path, gzip.compress(data) if kind.endswith("gz") else data)


def test_odd_files_are_encoded_faithfully_or_refused_in_one_line(tmp_path, families, capsys):
    """Files of every layout with everything a text can hold. FUZZ=10000 pytest test_all.py -k odd_files: many."""
    rng, encoded, turned_away = random.Random(0), 0, 0
    tokenizers = [segment.load_tokenizer(folder) for folder in families.values()]
    for _ in range(int(os.environ.get("FUZZ", 150))):
        path = odd_file(rng, tmp_path)
        try:
            pairs = list(segment.load_pairs(path))
            prompts = segment.load_prompts(path)
            for tokenizer, stops in tokenizers:
                special = [i for i, t in tokenizer.added_tokens_decoder.items() if t.special
                           and i != tokenizer.unk_token_id]
                chats = [(prompt, text, where) for prompt, *both, where in pairs for text in both]
                rows = segment.encode_chats(tokenizer, stops, chats, 240, 120)
                meek = [([m | {"content": "good"} for m in prompt], "good", where) for prompt, _, where in chats]
                meek = segment.encode_chats(tokenizer, stops, meek, 999, 999)
                for (p, r), (q, s), (prompt, text, _) in zip(rows, meek, chats):
                    assert 0 < len(r) and len(p) + len(r) <= 240 and not np.isin(r[:-1], stops).any()
                    skeleton = q[np.isin(q, special)].tolist()                   # nothing typed is a special token
                    found = p[np.isin(p, special)].tolist()
                    whole, = segment.encode_prompts(tokenizer, [prompt], 10 ** 6)
                    assert whole[np.isin(whole, special)].tolist() == skeleton
                    assert found == skeleton[len(skeleton) - len(found):]        # a long prompt lost its oldest tokens
                    if tokenizer is tokenizers[2][0] and np.isin(r[-1], stops):  # the one that knows every byte
                        assert tokenizer.decode(r[:-1]).replace("\u200b", "") == nfc("NFC", text).replace("\u200b", "")
                    encoded += 1
                segment.encode_prompts(tokenizer, prompts, 120)
        except SystemExit as end:
            err = capsys.readouterr().err.splitlines()
            assert end.code == 2 and len(err) == 1 and (f"{path} " in err[0] or f"{path}:" in err[0]), err
            turned_away += 1
    assert encoded > 300 and turned_away > 10, (encoded, turned_away)


def test_a_tokenizer_may_hold_a_pad_token_that_the_model_lacks(families, tmp_path, capsys):
    folder = shutil.copytree(families["llama3"], f"{tmp_path}/model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    V = json.load(open(f"{folder}/config.json"))["vocab_size"]
    tokenizer.add_special_tokens({"pad_token": "<mine>"}), tokenizer.add_tokens([f"gadget{k}" for k in range(V)])
    tokenizer.save_pretrained(folder)
    tokenizer, stops = segment.load_tokenizer(folder)
    assert len(tokenizer) > V and stops.tolist() == [2]
    banned = never_sampled(tokenizer, stops, V)
    assert len(banned) == V and banned[1] and not banned[2]
    good = [([user("good phone <mine>")], "good", "row 1")]
    segment.encode_chats(tokenizer, stops, good, 99, 50)
    with pytest.raises(SystemExit):
        segment.encode_chats(tokenizer, stops, [([user(f"gadget{V - 1}")], "good", "row 1")], 99, 50)
    assert "embeddings" in capsys.readouterr().err


def test_a_stop_token_that_is_not_special_cannot_be_typed(families, tmp_path, capsys):
    folder = shutil.copytree(families["llama3"], f"{tmp_path}/model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<end>"])
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<end>")
    tokenizer.save_pretrained(folder)
    stop = tokenizer.convert_tokens_to_ids("<end>")
    write(f"{folder}/generation_config.json", json.dumps({"eos_token_id": stop}))
    tokenizer, stops = segment.load_tokenizer(folder)
    chat = [user("good <end> phone")], "good <end> phone", "row 1"
    (p, r), = segment.encode_chats(tokenizer, stops, [chat], 99, 50)
    assert stops.tolist() == [2, stop] and (p == stop).sum() == (r == stop).sum() == 1 and r[-1] == stop
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    message = refused(capsys, lambda: segment.encode_prompts(tokenizer, [[user("")]], 9, "x"))
    assert "row 1: the prompt has no tokens" in message
    write(f"{folder}/generation_config.json", "{")
    assert "generation_config.json" in refused(capsys, lambda: segment.load_tokenizer(folder))


def test_a_reward_model_may_know_more_special_tokens_but_no_other_words():
    policy, other = prepare.build_tokenizer(), prepare.build_tokenizer()
    assert train_ppo.reads_alike(policy, other)
    other.add_special_tokens({"pad_token": "<mine>"})
    assert train_ppo.reads_alike(policy, other) and train_ppo.reads_alike(other, policy)
    policy.add_special_tokens({"pad_token": "<yours>"}), policy.add_special_tokens({"pad_token": "<mine>"})
    assert not train_ppo.reads_alike(policy, other)         # <mine> has two ids
    other.add_tokens(["gadget"])
    assert not train_ppo.reads_alike(prepare.build_tokenizer(), other)


def test_what_lies_in_the_world():
    for path, inside in (("data/reviews/sft", True), (f"{HERE}/data/reviews/pairs.jsonl", True),
                         ("./data/reviews/x", True), ("data/reviews2/pairs.jsonl", False), ("data/reviews", False),
                         ("org/model", False)):
        assert segment.in_world(path) == inside, path


def test_a_run_outlives_its_terminal(world, tmp_path):
    """`train_rm.py | head -1`: nobody reads on."""
    process = start("train_rm.py", rm_flags(world, f"{tmp_path}/run", "--max_steps", "2"))
    process.stdout.readline(), process.stdout.close()
    assert process.wait(timeout=120) == 0 and len(metrics(f"{tmp_path}/run")) == 2, process.stderr.read()


def test_tokenizers_without_pad_or_end(families, tmp_path, capsys):
    folder = shutil.copytree(families["smollm2"], f"{tmp_path}/model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.bos_token = None        # nobody needs them: padding is never looked at
    tokenizer.save_pretrained(folder)
    tokenizer, stops = segment.load_tokenizer(folder)
    assert tokenizer.pad_token is None and tokenizer.bos_token is None and stops.tolist() == [2]
    rm = load_model(folder, ScalarModel, CPU, torch.float32, head_std=.1)
    train_rm.export(rm, tokenizer, folder, f"{tmp_path}/rm", torch.float32)
    assert json.load(open(f"{tmp_path}/rm/config.json"))["pad_token_id"] == 2
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    config = json.load(open(f"{folder}/config.json"))
    write(f"{folder}/config.json", json.dumps(config | {"eos_token_id": None}))
    os.remove(f"{folder}/generation_config.json")
    assert "no stop token" in refused(capsys, lambda: segment.load_tokenizer(folder))


class Marker:
    """Unpickled, it makes a file."""
    path = ""

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("evil", ["code", "tokenizer code", "pickle", "template", "cache"])
def test_nothing_that_is_loaded_runs(families, world, tmp_path, capsys, evil):
    folder, Marker.path = shutil.copytree(families["llama3"], f"{tmp_path}/model"), f"{tmp_path}/marker"
    data, cache = f"{world}/pairs.jsonl", f"{tmp_path}/cache"
    flags = ["--data", data, "--eval_data", data, "--cache", cache, "--max_samples", "40", "--max_steps", "1", "--out",
             f"{tmp_path}/out", "--model", folder, "--batch_size", "8"]
    write(f"{folder}/evil.py", f"open({Marker.path!r}, 'w')\nclass Evil: pass\n")
    everything = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None],
                  "AutoModelForSequenceClassification": "evil.Evil"}
    change = {"code": ("config.json", {"model_type": "evil", "auto_map": everything}),
              "tokenizer code": ("tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": everything})}
    if evil in change:
        name, more = change[evil]
        write(f"{folder}/{name}", json.dumps(json.load(open(f"{folder}/{name}")) | more))
    elif evil == "pickle":
        os.remove(f"{folder}/model.safetensors")
        torch.save({"model.embed_tokens.weight": Marker()}, f"{folder}/pytorch_model.bin")
    elif evil == "template":
        write(f"{folder}/chat_template.jinja",
              "{{ cycler.__init__.__globals__.os.system('touch " + Marker.path + "') }}")
    else:
        train_rm.main(parse(train_rm.Config, flags))
        for path in glob.glob(f"{cache}/*.npy"):
            np.save(path, np.array([Marker()], dtype=object), allow_pickle=True)
        flags[flags.index("--out") + 1] += "2"
    try:                                                    # a tokenizer's own code may be left aside, too
        train_rm.main(parse(train_rm.Config, flags))
        assert evil == "tokenizer code"
    except SystemExit as end:
        assert end.code == 2 and capsys.readouterr().err.count("error: ") == 1
    assert not os.path.exists(Marker.path)


def test_the_sources_hold_no_pickle_and_no_remote_code():
    for path in glob.glob("*.py") + glob.glob("data/reviews/*.py"):
        text = open(path).read()
        if path != "test_all.py":
            assert not re.search(r"torch\.(load|save)\(|pickle\b(?!=False)|trust_remote_code=True|[^.]\b(eval|exec)\(",
                                 text)


@pytest.fixture(scope="session")
def halted(world, tmp_path_factory):
    """An unfinished run of a reward model with its cache: one checkpoint, of step 3 of 6, saved after an evaluation."""
    out = str(tmp_path_factory.mktemp("halted")) + "/run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        calls = iter(range(99))
        patch.setattr(train_rm.StopSignal, "agreed", lambda self, device: signal.SIGTERM if next(calls) == 2 else 0)
        rm_here(world, out)
    assert end.value.code == 143 and os.listdir(f"{out}/checkpoint") == ["step_3"]
    return out


def copy_of(halted, folder):
    out = shutil.copytree(halted, f"{folder}/run")
    shutil.copytree(f"{halted}-cache", f"{out}-cache")
    return out


SHARD, CACHED = "run/checkpoint/step_3/*.safetensors", "run-cache/*.npy"
DAMAGE = [("run/config.json", lambda x: x[:50]), ("run/config.json", lambda x: b"[]"),
          ("run/config.json", lambda x: b"\xff"),
          ("run/metrics.jsonl", lambda x: b"\n" + x),
          ("run/metrics.jsonl", lambda x: x.replace(b'"step": 2', b'"step": 9')),
          ("run/metrics.jsonl", lambda x: b"\xff\xfe" + x), ("run/metrics.jsonl", lambda x: b"[1]\n" + x),
          (SHARD, lambda x: x[:len(x) // 2]), (SHARD, lambda x: b""), (SHARD, lambda x: b"\xff" * 64 + x[64:]),
          (CACHED, lambda x: x[:len(x) // 2]), (CACHED, lambda x: b""), (CACHED, lambda x: x[:70]),
          (CACHED, lambda x: b"\0" * 128 + x[128:])]


@pytest.mark.parametrize("name,change", DAMAGE, ids=[f"{name}-{k}" for k, (name, _) in enumerate(DAMAGE)])
def test_damaged_files_are_named_and_nothing_is_touched(world, halted, tmp_path, capsys, name, change):
    out = copy_of(halted, tmp_path)
    for path in glob.glob(f"{tmp_path}/{name}"):
        write(path, change(open(path, "rb").read()))
    before = tree(tmp_path)
    message = refused(capsys, lambda: rm_here(world, out, "--resume"))
    assert f"{tmp_path}/{name.partition('/*')[0]}" in message
    assert tree(tmp_path) == before


def test_a_run_knows_its_data_and_models(world, halted, runs, tmp_path, capsys):
    """What a file of the same name holds may change between a kill and --resume."""
    out, pairs = copy_of(halted, tmp_path), open(f"{world}/pairs.jsonl").readlines()
    other = write(f"{tmp_path}/pairs.jsonl", "".join(pairs[::-1]))
    calibrated = shutil.copytree(runs["rm"].result() + "/model", f"{tmp_path}/calibrated")
    config = json.load(open(f"{out}/config.json"))
    write(f"{out}/config.json", json.dumps(config | {"data": other}))
    assert "has changed since" in refused(capsys, lambda: rm_here(world, out, "--resume", "--data", other))
    write(f"{out}/config.json", json.dumps(config))
    job = lambda: ppo_here(world, calibrated, f"{tmp_path}/ppo", "--max_steps", "1", "--max_new_tokens", "4", "--resume")
    for change in ({}, {"calibration_responses": 99}):          # the same: goes on; calibrated anew: another run
        write(f"{calibrated}/reward.json", json.dumps(json.load(open(f"{calibrated}/reward.json")) | change))
        job() if not change else refused(capsys, job).index("has changed since")
        config = json.load(open(f"{tmp_path}/ppo/config.json"))
        write(f"{tmp_path}/ppo/config.json", json.dumps({k: v for k, v in config.items() if k != "finished"}))
    name, = os.listdir(f"{halted}-cache")
    cached = f"{out}-cache/{name}"
    H = np.load(cached)
    for bad in (H * math.nan, -1 - H, H.astype(int), H[None], np.array("text")):
        np.save(cached, bad)
        assert "damaged cache" in refused(capsys, lambda: rm_here(world, out, "--resume"))


def test_calibration_replaces_no_other_model(world, runs, tmp_path, capsys):
    rm, finished = runs["rm"].result(), f"{tmp_path}/finished"
    shutil.copytree(rm, finished)
    before = tree(finished)
    for flags, words in ((["--oracle", f"{WORLD_PY}:clause_values"], "another model"),
                         (["--cutoff", "2"], "--cutoff 1.0"),
                         (["--reward_model", "org/model-of-the-hub"], "another model"),
                         (["--granularity", "bandit"], "--granularity segment")):
        assert words in refused(capsys, lambda: rm_here(world, finished, "--calibrate_only", *flags))
    assert tree(finished) == before


@pytest.mark.parametrize("change,words", [
    ({"cutoff": math.nan}, "NaN"), ({"cutoff": "1.0"}, "damaged"), ({"granularity": "word"}, "damaged"),
    ({"sft_model": None}, "damaged"),
    ({"statistics": []}, "damaged"), ({"b_std": 0.0}, "damaged"), ({"b_std": "2"}, "damaged"),
    ({"scale": {"even": 0.0}}, "damaged"),
    ({"scale": None}, "damaged")])
def test_a_reward_json_that_makes_no_sense(world, runs, tmp_path, capsys, change, words):
    rm = shutil.copytree(runs["rm"].result() + "/model", f"{tmp_path}/rm")
    saved = json.load(open(f"{rm}/reward.json"))
    place = saved["statistics"]["segment"]["location"] if set(change) & {"b_std", "scale"} else saved
    place.update(change)
    write(f"{rm}/reward.json", json.dumps(saved))
    assert words in refused(capsys, lambda: ppo_here(world, rm, f"{tmp_path}/out"))


def test_gold_functions_that_fail(world, runs, tmp_path, capsys):
    path = write(f"{tmp_path}/mine.py", """
def a(prompt, response): raise KeyError('no such thing')
def b(prompt, response): return None
def c(prompt, response): return 'good'
def g(prompt, response, scale=10.): return scale""")
    job = lambda f: ppo_here(world, runs["rm"].result() + "/model", f"{tmp_path}/{f}", "--max_steps", "1",
                             "--max_new_tokens", "4", "--gold", f"{path}:{f}")
    for f, words in (("a", "KeyError"), ("b", "TypeError"), ("c", "ValueError")):
        assert words in refused(capsys, lambda: job(f))
    job("g")
    assert metrics(f"{tmp_path}/g")[0]["gold"] == 10        # only a parameter called finished is given whether it is


@pytest.mark.parametrize("limit,resume", [(2_000, False), (150_000, True)], ids=["entropies", "checkpoint"])
def test_a_full_disk_costs_nothing(world, halted, runs, tmp_path, capsys, monkeypatch, limit, resume):
    """No file may grow beyond the limit; later there is room again."""
    out = copy_of(halted, tmp_path) if resume else f"{tmp_path}/run"
    flags = rm_flags(world, out, "--resume")
    monkeypatch.setattr(sys, "argv", ["train_rm.py", *flags])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        message = refused(capsys, lambda: segment.start(train_rm.main, train_rm.Config))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        segment.setup()
    assert "--resume" in message
    assert not resume or os.path.exists(f"{out}/checkpoint/step_3") and len(metrics(out)) == 4
    assert not glob.glob(f"{out}-cache/entropy-????????????????????????????????.npy") or resume
    rm_here(world, out, "--resume")
    same_run(runs["rm"].result(), out)


@pytest.mark.parametrize("place", ["/proc/no/run", "{}/file/run", "{}/file"])
def test_a_folder_that_cannot_be_written_is_one_line(world, tmp_path, capsys, monkeypatch, place):
    write(f"{tmp_path}/file", "x")
    flags = ["--out", place.format(tmp_path), "--cache", f"{tmp_path}/cache"]
    monkeypatch.setattr(sys, "argv", ["train_rm.py", *rm_flags(world, f"{tmp_path}/out"), *flags])
    try:
        assert place.format(tmp_path) in refused(capsys, lambda: segment.start(train_rm.main, train_rm.Config))
    finally:
        segment.setup()


def test_two_runs_on_one_folder(world, halted, tmp_path, capsys):
    out = copy_of(halted, tmp_path)
    before = tree(out)
    with open(f"{out}/.lock", "a") as other:                # as another process would
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another run" in refused(capsys, lambda: rm_here(world, out, "--resume"))
    assert tree(out) == before


def bad_steps(patch, steps):
    """The reward model's loss is not finite in these steps, counted from 0."""
    losses, rate, step = train_rm.bradley_terry, train_rm.learning_rate, [0]

    def count(*args):
        step[0] += 1
        return rate(*args)
    patch.setattr(train_rm, "learning_rate", count)
    patch.setattr(train_rm, "bradley_terry", lambda a, b: losses(a, b) * (math.nan if step[0] in steps else 1))


def test_losses_that_are_not_finite_are_skipped_and_five_stop_the_run(world, halted, tmp_path, capsys, monkeypatch):
    out = copy_of(halted, tmp_path)
    with monkeypatch.context() as patch:
        bad_steps(patch, [0])
        rm_here(world, out, "--resume")
    rows = metrics(out)
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1, 0, 0] and rows[3]["loss"] is None is rows[3]["grad_norm"]
    assert all(x.isfinite().all() for x in weights(out).values())
    out, flags = f"{tmp_path}/five", ["--max_steps", "12", "--save_every", "4"]
    with monkeypatch.context() as patch:
        bad_steps(patch, range(4, 99))
        assert "5 steps in a row" in refused(capsys, lambda: rm_here(world, out, *flags))
    assert [row["skipped"] for row in metrics(out)] == [0, 0, 0, 0, 1, 2, 3, 4, 5]
    assert {"step_4", "step_9"} <= set(os.listdir(f"{out}/checkpoint")) and os.path.exists(f"{out}/model/config.json")
    with monkeypatch.context() as patch:                    # still broken: what went before a --resume counts
        bad_steps(patch, range(99))
        assert "6 steps in a row" in refused(capsys, lambda: rm_here(world, out, *flags, "--resume"))
    rm_here(world, out, *flags, "--resume")                 # the weights are those of step 4, so it simply goes on
    assert [row["skipped"] for row in metrics(out)[9:]] == [6, 0, 0] and os.listdir(out).count("checkpoint") == 0


@pytest.fixture(scope="session")
def odd_rewards(runs, tmp_path_factory):
    """Reward models that say always 0, NaN, or infinity."""
    top, rm = str(tmp_path_factory.mktemp("odd_rewards")), runs["rm"].result() + "/model"
    for name, value in (("constant", 0.0), ("nan", math.nan), ("inf", math.inf)):
        shutil.copytree(rm, f"{top}/{name}")
        state = load_file(f"{rm}/model.safetensors")
        save_file(state | {"score.weight": torch.full_like(state["score.weight"], value)},
                  f"{top}/{name}/model.safetensors", {"format": "pt"})
    return top


@pytest.mark.parametrize("name", ["nan", "inf"])
def test_rewards_that_are_not_finite_stop_ppo_with_a_checkpoint(world, odd_rewards, tmp_path, capsys, name):
    out = f"{tmp_path}/out"
    message = refused(capsys, lambda: ppo_here(world, f"{odd_rewards}/{name}", out, "--max_steps", "9",
                                               "--max_new_tokens", "12"))
    assert "not finite" in message and [row["skipped"] for row in metrics(out)] == [2, 4, 6]
    assert metrics(out)[0]["reward"] is None and "step_3" in os.listdir(f"{out}/checkpoint")
    sft = load_file(f"{world}/sft/model.safetensors")       # and the policy is what it was
    assert all(torch.equal(x, sft[k]) for k, x in weights(out).items())


def test_constant_rewards_and_one_pair_to_calibrate_on(world, odd_rewards, runs, tmp_path, capsys):
    here = lambda *flags: rm_here(world, f"{tmp_path}/rm", "--calibrate_only", "--reward_model", *flags)
    assert "do not vary" in refused(capsys, lambda: here(f"{odd_rewards}/constant"))
    one = write(f"{tmp_path}/one.jsonl", [json.loads(open(f"{world}/pairs.jsonl").readline())])
    assert "calibration on 2 responses" in refused(capsys, lambda: here(runs["rm"].result() + "/model", "--data", one))
    ppo_here(world, f"{odd_rewards}/constant", f"{tmp_path}/ppo", "--max_steps", "2", "--fit", "0 0 0 1",
             "--reward_scale", "none", "--missing_eos_reward", "0")
    rows = metrics(f"{tmp_path}/ppo")
    assert all(row["reward"] == row["reward_total"] == 0 and all(map(math.isfinite, row.values())) for row in rows)


@pytest.mark.parametrize("granularity", ["segment", "token", "bandit"])
@pytest.mark.parametrize("case", ["all unfinished", "all empty"])
def test_rollouts_in_which_all_end_alike(world, runs, tmp_path, monkeypatch, granularity, case):
    """No response ends in time; or each is only an end-of-turn token."""
    if case == "all empty":
        monkeypatch.setattr(train_ppo, "never_sampled", lambda tokenizer, stops, V: ~torch.isin(torch.arange(V), stops))
    ppo_here(world, runs["rm"].result() + "/model", f"{tmp_path}/out", "--max_steps", "2", "--max_new_tokens", "7",
             "--granularity", granularity)
    for row in metrics(f"{tmp_path}/out"):
        assert all(map(math.isfinite, row.values())) and row["skipped"] == 0
        assert (row["finished"], row["response_length"]) == ((0, 7) if case == "all unfinished" else (1, 1))


def test_the_special_rules_and_the_critics_start(world, runs, tmp_path):
    """--bad_length, --divide_by_length, --critic_warmup, --critic_init, --ppo_epochs: what each must do to a run."""
    def run(name, *flags):
        ppo_here(world, runs["rm"].result() + "/model", f"{tmp_path}/{name}", "--max_steps", "1",
                 "--missing_eos_reward",
                 "0", *flags)
        return metrics(f"{tmp_path}/{name}")[0], weights(f"{tmp_path}/{name}")
    short = ["--max_new_tokens", "9"]
    plain, plain_weights = run("plain", *short)
    divided = run("divided", *short, "--divide_by_length", "true")[0]
    assert divided["reward_total"] == pytest.approx(plain["reward_total"] / 9)
    bad = run("bad", *short, "--bad_length", "800")[0]      # all are unfinished
    assert bad["reward_total"] == pytest.approx(-.05 * 9) and bad["reward"] == pytest.approx(plain["reward"])
    sft = load_file(f"{world}/sft/model.safetensors")
    warm, warm_weights = run("warm", *short, "--critic_warmup", "1")
    assert all(torch.equal(x, sft[k]) for k, x in warm_weights.items()) and warm["value_loss"] == plain["value_loss"]
    assert not all(torch.equal(x, sft[k]) for k, x in plain_weights.items())
    twice, twice_weights = run("twice", *short, "--ppo_epochs", "2")
    assert twice["reward"] == plain["reward"] and abs(twice["first_ratio"] - 1) < 1e-5
    assert any(not torch.equal(x, plain_weights[k]) for k, x in twice_weights.items())
    assert plain["explained_variance"] == 0                 # a critic that starts at zero explains nothing
    assert run("critic", *short, "--critic_init", "reward_model")[0]["explained_variance"] != 0


# ------------------------------------------------------------------------------------------------------------
# 7. The recipes of config/: the authors' numbers, written out once more
# ------------------------------------------------------------------------------------------------------------
MODELS = {  # file prefix: (model, passes, cutoff)
    "phi3-mini": ("microsoft/Phi-3-mini-4k-instruct", 2, 1.75), "llama3-sft-8b": ("RLHFlow/LLaMA3-SFT-v2", 1, 2.0),
    "llama3.1-8b": ("meta-llama/Llama-3.1-8B-Instruct", 1, 2.0)}
RECIPES = {  # (prefix, granularity): (reward model, [w_mean, w_std, b_mean, b_std], special rules)
    ("phi3-mini", "segment"): ("yyqoni/Phi-3-mini-4k-instruct-segment-rm-700k", [.7668, .2569, .4705, 2.8339], {}),
    ("phi3-mini", "token"): ("yyqoni/Phi-3-mini-4k-instruct-token-rm-700k", [.9628, .3796, 1.2917, 3.5006], {}),
    ("phi3-mini", "bandit"): ("yyqoni/Phi-3-mini-4k-instruct-bandit-rm-700k", [0, 0, -.5195, 2.1563], {}),
    ("llama3-sft-8b", "segment"): ("yyqoni/rlhflow-llama-3-sft-8b-v2-segment-rm-700k", [.8967, .5680, .8572, 4.1667],
                                   {}),
    ("llama3-sft-8b", "token"): ("yyqoni/rlhflow-llama-3-sft-8b-v2-token-rm-700k", [1.7340, .9906, 1.3212, 5.4513],
                                 {"divide_by_length": True}),
    ("llama3-sft-8b", "bandit"): ("yyqoni/rlhflow-llama-3-sft-8b-v2-bandit-rm-700k", [0, 0, -.8164, 2.9531], {}),
    ("llama3.1-8b", "segment"): ("yyqoni/meta-llama-3.1-instruct-8b-segment-rm-700k", [.8345, .4780, .8798, 3.7358],
                                 {"bad_length": 800}),
    ("llama3.1-8b", "token"): ("yyqoni/meta-llama-3-1-instruct-8b-token-rm-700k", [1.6268, .6254, .6419, 4.9217], {}),
    ("llama3.1-8b", "bandit"): ("yyqoni/meta-llama-3-1-instruct-8b-bandit-rm-700k", [0, 0, -.8281, 2.9375], {}),
}


@pytest.mark.parametrize("prefix,granularity", RECIPES)
def test_recipes_of_the_paper(prefix, granularity):
    reward_model, fit, rules = RECIPES[prefix, granularity]
    model, passes, cutoff = MODELS[prefix]
    ppo = parse(train_ppo.Config, [f"@config/{prefix}-{granularity}-ppo.args"])
    for name, want in dict(
            model=model, reward_model=reward_model, granularity=granularity, cutoff=cutoff, passes=passes, max_steps=0,
            data="argilla/ultrafeedback-binarized-preferences-cleaned", rollout_batch_size=1024, batch_size=128,
            ppo_epochs=1, max_prompt_tokens=1024, max_new_tokens=1024, actor_lr=5e-7, critic_lr=9e-6, kl_coef=0.01,
            value_clip=0.2 if granularity == "bandit" else 0.25, reward_scale="none", missing_eos_reward=0,
            save_every=5, clip=0.2, gamma=1, lam=.95, warmup=.03, clip_norm=1, normalizer="location",
            interpolation="even", bad_length_reward=-.05,
            **{"divide_by_length": False, "bad_length": 0} | rules).items():
        assert getattr(ppo, name) == want, name
    assert [float(x) for x in ppo.fit.split()] == fit
    rm = parse(train_rm.Config, [f"@config/{prefix}-rm.args"])
    assert (rm.model, rm.cutoff, rm.data, rm.epochs, rm.batch_size, rm.lr, rm.max_tokens, rm.max_prompt_tokens) == \
        (model, cutoff, "hendrydong/preference_700K", 1, 128, 1e-6, 2048, 1728) and rm.max_steps == 0


# ------------------------------------------------------------------------------------------------------------
# 8. The world's ground truth
# ------------------------------------------------------------------------------------------------------------
GOOD, CAT = "waking really feels like a holiday.", "portraits really make my cat a king."
LAKE = "maps somehow send me into the lake."


@pytest.mark.parametrize("response,finished,values,gold", [
    (f"{GOOD} {CAT}", True, [2, 2], (4 - 10) / 12),                          # both fit a phone; ten clauses are missing
    (f"{LAKE} {GOOD}", False, [-2, 2], -10 / 12 - 1),                        # no EOS
    ("water really stays outside.", True, [-3], (-3 - 11) / 12),             # 0, but a phone has no water aspect
    (f"{GOOD} {GOOD} {GOOD.replace('really', 'somehow')}", True, [2, 0, 2], (4 - 9) / 12),   # an exact repeat: 0
    ("waking feels like soup. mother really hears", True, [-2, -2], (-4 - 10) / 12),         # malformed
    (" ".join([CAT, *[GOOD] * 12]), True, [2, 2, *[0] * 10, -1], 3 / 12),    # a thirteenth clause
    ("", True, [], -1.0)])
def test_gold_rewards_by_hand(response, finished, values, gold):
    prompt = "tell me about my new phone."
    got = prepare.clause_values(prompt, response)
    assert [v for v, _ in got] == values and prepare.gold_reward(prompt, response, finished) == pytest.approx(gold)
    ids = prepare.build_tokenizer()(response)["input_ids"]
    stops = [i for i, word in enumerate(prepare.build_tokenizer().convert_ids_to_tokens(ids)) if word == "."]
    assert [end for _, end in got][:len(stops)] == stops and (not got or got[-1][1] == len(ids) - 1)


def test_a_world_is_a_function_of_its_seed(world, tmp_path):
    def make(name, seed):
        prepare.main(prepare.parse(f"--out {tmp_path}/{name} --seed {seed} --texts 440 --epochs 1 --batch_size 2 "
                                   "--pairs 3 --pairs_test 2 --prompts 5 --prompts_test 2".split()))
        return {os.path.relpath(k, f"{tmp_path}/{name}"): v for k, v in tree(f"{tmp_path}/{name}").items()}
    first, again = make("a", 1), make("b", 1)
    assert first == again and len(first) >= 8
    assert first["prompts.jsonl"] != b"".join(open(f"{world}/prompts.jsonl", "rb").readlines()[:5])          # seed 0
    with pytest.raises(ValueError, match="none of"):
        prepare.gold_reward("tell me about my car.", GOOD)


# ------------------------------------------------------------------------------------------------------------
# 9. CUDA
# ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def cuda(monkeypatch):
    if not HAS_CUDA:
        pytest.skip("no CUDA device")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if VISIBLE is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE)


def test_a_few_steps_on_cuda(cuda, world, tmp_path):
    run_well("train_rm.py", rm_flags(world, f"{tmp_path}/rm", "--max_steps", "2"))
    run_well("train_ppo.py", ppo_flags(world, f"{tmp_path}/rm/model", f"{tmp_path}/ppo", "--max_steps", "2"))
    for out in ("rm", "ppo"):
        rows = [json.loads(line) for line in open(f"{tmp_path}/{out}/metrics.jsonl")]
        assert len(rows) == 2 and all(v is not None and math.isfinite(v) for row in rows for v in row.values())
        assert next(iter(weights(f"{tmp_path}/{out}").values())).dtype == torch.bfloat16
    assert all(abs(row["first_ratio"] - 1) < 0.1 for row in rows)


def test_a_killed_run_on_cuda_is_the_uninterrupted_one(cuda, world, tmp_path):
    flags = lambda out: rm_flags(world, f"{tmp_path}/{out}", "--deterministic", "true", "--save_every", "1")
    run_well("train_rm.py", flags("whole"))
    assert kill("train_rm.py", flags("killed"), lambda: steps_logged(f"{tmp_path}/killed") >= 2, signal.SIGKILL) == -9
    run_well("train_rm.py", flags("killed") + ["--resume"])
    same_run(f"{tmp_path}/whole", f"{tmp_path}/killed")


# ------------------------------------------------------------------------------------------------------------
# 10. Judging (chapter 4)
# ------------------------------------------------------------------------------------------------------------
ALPACA = os.path.join(HERE, "..", "shared", "data", "alpaca_eval")
needs_alpaca = pytest.mark.skipif(not os.path.isdir(ALPACA), reason="the published AlpacaEval data is not here")


# ---- figures ------------------------------------------------------------------------------------------------
def published(name):
    with gzip.open(f"{ALPACA}/annotations/{name}.jsonl.gz", "rt") as f:
        rows = [json.loads(line) for line in f]
    gamed = {}
    with gzip.open(f"{ALPACA}/gamed_baseline_surrogate.jsonl.gz", "rt") as f:
        for row in map(json.loads, f):
            gamed.setdefault(row["variant"], []).append(row)
    with open(f"{ALPACA}/published.json") as f, open(f"{ALPACA}/instruction_difficulty.json") as g:
        truth, difficulty = json.load(f)[name], json.load(g)
    columns = lambda rows, p: [[r[c] for r in rows] for c in (p, "len_1", "len_2")]
    return columns(rows, "preference"), difficulty, [(*columns(r, "preference_surrogate"), difficulty) for r
                                                     in gamed.values()], truth


@needs_alpaca
@pytest.mark.parametrize("name", ["FuseChat-Llama-3.2-3B-Instruct", "claude-2.1", "vicuna-7b-v1.5",
                                  "gpt4_0613_concise"])
def test_published_figures(name):
    (y, a, b), difficulty, gamed, truth = published(name)
    for key, value in E.win_rate(y).items():
        assert value == pytest.approx(truth[key], abs=1e-6), key
    lc = E.length_controlled_win_rate(y, a, b, difficulty, gamed)
    assert abs(lc["length_controlled_winrate"] - truth["length_controlled_winrate"]) < 0.15
    plain = E.length_controlled_win_rate(y, a, b)
    y, a, b, d, rng, draws = *map(np.array, (y, a, b, difficulty)), np.random.default_rng(0), []
    for _ in range(150):
        i = rng.integers(0, len(y), len(y))
        draws.append([E.length_controlled(y[i], a[i], b[i], d[i], gamed)[0], E.length_controlled(y[i], a[i], b[i])[0]])
    ratio = np.array([lc["lc_standard_error"], plain["lc_standard_error"]]) / (100 * np.std(draws, axis=0))
    assert (ratio > 0.8).all() and (ratio < 1.25).all(), ratio


@needs_alpaca
def test_annotations_alone(tmp_path):
    names = ["claude-2.1", "vicuna-7b-v1.5"]
    files = [f"{ALPACA}/annotations/{n}.jsonl.gz" for n in names]
    cmd = [sys.executable, f"{HERE}/evaluate.py", "--annotations", *files, "--difficulty",
           f"{ALPACA}/instruction_difficulty.json",
           "--gamed", f"{ALPACA}/gamed_baseline_surrogate.jsonl.gz", "--out", str(tmp_path)]
    out = subprocess.run(cmd, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    table = [line.split(",") for line in (tmp_path / "leaderboard.csv").read_text().splitlines()]
    assert [row[0] for row in table] == ["", *names]
    assert table[0][1] == "win_rate" and table[0][10] == "length_controlled_winrate"
    for name, row in zip(names, table[1:]):
        truth = published(name)[3]
        assert float(row[1]) == pytest.approx(truth["win_rate"], abs=1e-6) and int(row[9]) == truth["avg_length"]
        assert abs(float(row[10]) - truth["length_controlled_winrate"]) < 0.15
    assert out.stdout.count("outside 20-80 %") == 2 and "fewer than 15 %" in out.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    y, z = (np.array(published(n)[0][0]) for n in names)
    assert summary["differences"][0]["standard_error"] == pytest.approx(100 * np.std(y - z, ddof=1) / math.sqrt(805))


def test_win_rate_by_hand():
    got = E.win_rate([2, 1, 1.5, 0, 1.8, None, math.nan])        # 0 is a legacy tie, the last two are dropped
    assert got.pop("win_rate") == pytest.approx(100 * (1 + 0 + .5 + .5 + .8) / 5)
    assert got.pop("standard_error") == pytest.approx(100 * np.std([1, 0, .5, .5, .8], ddof=1) / math.sqrt(5))
    assert got == {"n_wins": 2, "n_wins_base": 1, "n_draws": 2, "n_total": 5, "discrete_win_rate": pytest.approx(60)}
    one = E.win_rate([1.7])
    assert one["win_rate"] == pytest.approx(70) and math.isnan(one["standard_error"])
    for bad in ([], [None], [2.5], [0.5]):
        with pytest.raises(ValueError):
            E.win_rate(bad)


def test_length_controlled_by_hand():
    # t takes two values +-u, so the saturated fit is exact: logit p(+-u) = w0 +- wt u, and w0 is their mean
    y, D = np.array([.9] * 4 + [.2] * 4), np.array([10.] * 4 + [-10.] * 4)
    logit = lambda p: math.log(p / (1 - p))
    w0 = (logit(.9) + logit(.2)) / 2
    got = E.length_controlled_win_rate(list(y + 1), list(100 + D), [100] * 8)
    assert got["length_controlled_winrate"] == pytest.approx(100 / (1 + math.exp(-w0)), abs=1e-6)
    # a missing preference takes its own difficulty with it, not its neighbour's
    rng = np.random.default_rng(1)
    y, a, b, d = rng.random(40) + 1, rng.integers(50, 500, 40), rng.integers(50, 500, 40), rng.normal(size=40)
    keep = np.arange(40) % 7 != 3
    holes = [p if k else None for p, k in zip(y, keep)]
    whole, part = (E.length_controlled_win_rate(*x) for x in ((holes, a, b, d), (y[keep], a[keep], b[keep], d[keep])))
    assert whole == pytest.approx(part) and whole != pytest.approx(E.length_controlled_win_rate(y, a, b, d))
    with pytest.raises(ValueError):
        E.length_controlled_win_rate(y, a, b, d[:39])


def test_length_controlled_degenerate():
    raw = E.win_rate([2, 1, 1.2])
    # std(D) = 0: nothing to control
    same = E.length_controlled_win_rate([2, 1, 1.2], [5, 7, 9], [6, 8, 10])
    assert same["length_controlled_winrate"] == raw["win_rate"]
    assert same["lc_standard_error"] == pytest.approx(raw["standard_error"])
    one = E.length_controlled_win_rate([2, 2, 2], [1, 5, 2], [3, 1, 9])                      # one outcome throughout
    assert one == {"length_controlled_winrate": 100, "lc_standard_error": 0}
    one = E.length_controlled_win_rate([1.3], [5], [9])
    assert one["length_controlled_winrate"] == pytest.approx(30) and math.isnan(one["lc_standard_error"])
    # the longer answer always wins
    separable = E.length_controlled_win_rate([2, 2, 1, 1], [1, 2, 9, 8], [5, 5, 5, 5])
    assert all(map(math.isnan, separable.values()))


def test_wilson():
    low, high = E.wilson(8, 10)
    assert low == pytest.approx(49.02, abs=0.01) and high == pytest.approx(94.33, abs=0.01)
    assert E.wilson(10, 10)[1] == pytest.approx(100) and E.wilson(10, 10)[0] > 60


# ---- judges -------------------------------------------------------------------------------------------------
class Server(ThreadingHTTPServer):
    """Prefers the answer with more x. `trouble(number of the request, text)` -> None or what goes wrong."""
    daemon_threads = True

    def __init__(self, trouble=lambda n, text: None, logprobs=True):
        self.trouble, self.logprobs, self.lock = trouble, logprobs, threading.Lock()
        self.requests, self.served, self.keys = 0, [], set()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, s = body["messages"][0]["content"], self.server
        with s.lock:
            s.requests += 1
            s.keys.add(self.headers.get("Authorization"))
            trouble = s.trouble(s.requests, text) or (400 if "logprobs" in body and not s.logprobs else None)
        a, b = (re.search(f"<answer {k}>\n(.*)\n</answer {k}>", text, re.S)[1].count("x") for k in "AB")
        reply = "I cannot compare these." if trouble == "refuse" else "A" if a > b else "B"
        choice = {"message": {"role": "assistant", "content": reply}}
        if "logprobs" in body:
            top = [{"token": "A", "logprob": math.log(.8 if a > b else .3)},
                   {"token": " B", "logprob": math.log(.2 if a > b else .6)}]
            choice["logprobs"] = {"content": [{"token": reply, "logprob": -1, "top_logprobs": top}]}
        payload, status = json.dumps({"choices": [choice]}).encode(), trouble if isinstance(trouble, int) else 200
        if trouble == "slow":
            time.sleep(2)
        if isinstance(trouble, int):
            payload = f"no access with {self.headers.get('Authorization')}".encode()
        if trouble == "cut":
            return self.connection.close()
        if trouble == "malformed":
            payload = payload[:40]
        if trouble is None:
            with s.lock:
                s.served.append(text)
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload) + (100 if trouble == "short" else 0)))
        self.end_headers()
        try:
            self.wfile.write(payload)
        except OSError:
            pass


def config(tmp_path, **kw):
    """Two files of outputs: no model is needed to test judges."""
    n = kw.pop("n", 20)
    rows = [[{"instruction": f"prompt {i}", "output": "x" * (i % 4 + 1) + text, "generator": text, "dataset": "d"}
             for i in range(n)]
            for text in ("base", "xpolicy")]
    for name, r in zip(("base", "policy"), rows):
        (tmp_path / f"{name}.json").write_text(json.dumps(r))
    return E.Config(**{"model": [f"{tmp_path}/policy.json"], "baseline": f"{tmp_path}/base.json",
                       "data": f"{tmp_path}/base.json",
                       "judge": "some-judge", "out": f"{tmp_path}/out", "show": 0, **kw})


def lines(path):
    return [json.loads(line) for line in open(path)]


def test_endpoint_both_orders_identical_outputs_and_a_kill(tmp_path):
    server, cfg = Server(), config(tmp_path, n=10)
    cfg = replace(cfg, api_base=server.url, model=[*cfg.model, cfg.baseline])
    E.main(cfg)
    first = json.load(open(tmp_path / "out/annotations.json"))
    # the policy has one x more: as B it gets .6/.9, as A .8; the baseline's own answers are draws without a call
    assert [r["preference"] for r in first] == pytest.approx([1 + (2 / 3 + .8) / 2] * 10 + [1.5] * 10)
    assert server.requests == len(set(server.served)) == 20
    assert set(first[0]) == {"instruction", "output_1", "generator_1", "output_2", "generator_2", "preference",
                             "annotator"}
    assert (first[0]["generator_1"], first[0]["generator_2"]) == ("base-baseline", "policy")
    path, text = tmp_path / "out/config.json", open(tmp_path / "out/judgements.jsonl").read().splitlines(keepends=True)
    path.write_text(json.dumps({k: v for k, v in json.load(open(path)).items() if k != "finished"}))
    (tmp_path / "out/judgements.jsonl").write_text("".join(text[:6]) + text[6][:30])              # a torn line
    E.main(cfg)
    assert server.requests == 20 + 2 * 4 and json.load(open(tmp_path / "out/annotations.json")) == first
    assert len(E.Cache.read(tmp_path / "out/judgements.jsonl")) == 10


def test_endpoint_without_logprobs_refused_parameters_and_refusals(tmp_path):
    server = Server(logprobs=False, trouble=lambda n, text: "refuse" if "prompt 2\n" in text else None)
    E.main(config(tmp_path, api_base=server.url, n=4))
    assert [r["preference"] for r in json.load(open(tmp_path / "out/annotations.json"))] == [2, 2, None, 2]
    assert len(lines(tmp_path / "out/judgements.jsonl")) == 3
    assert json.load(open(tmp_path / "out/summary.json"))["failed"] == 1
    # log-probabilities are refused and the question asked again without; a refusal to judge is tried three times
    assert server.requests == 2 * 6 + 3
    server.trouble = lambda n, text: None
    E.main(config(tmp_path, api_base=server.url, n=4))           # not finished, so the same command goes on: one pair
    assert server.requests == 2 * 6 + 3 + 2 * 2 and json.load(open(tmp_path / "out/summary.json"))["failed"] == 0
    E.main(config(tmp_path, api_base=server.url, n=4))           # finished: nothing is asked
    assert server.requests == 2 * 6 + 3 + 2 * 2


def test_endpoint_that_fails_a_third_of_the_time(tmp_path):
    rng = random.Random(0)
    kinds = ["slow", 429, 500, 503, "cut", "short", "malformed"]
    server = Server(trouble=lambda n, text: rng.choice(kinds) if rng.random() < 0.3 else None)
    E.main(config(tmp_path, api_base=server.url, n=60, timeout=1.2))
    keys = [row["key"] for row in lines(tmp_path / "out/judgements.jsonl")]
    assert len(keys) == len(set(keys)) == 60                     # each pair once
    assert len(set(server.served)) == 120 and server.requests > 140
    assert all(r["preference"] > 1.5 for r in json.load(open(tmp_path / "out/annotations.json")))


def test_endpoint_that_never_works(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    server = Server(trouble=lambda n, text: 401)
    with pytest.raises(SystemExit) as e:                         # a wrong key: no use in going on
        E.main(config(tmp_path, api_base=server.url))
    assert e.value.code == 2 and server.requests <= 16 and server.keys == {"Bearer sk-secret-123"}
    server.shutdown(), server.server_close()
    with pytest.raises(SystemExit):                              # nobody there
        E.main(config(tmp_path, api_base=server.url, tries=2))
    said = capsys.readouterr()
    assert "HTTP 401" in said.err and "no answer" in said.err
    everything = said.out + said.err + "".join(open(f).read() for f in (tmp_path / "out").glob("*") if f.is_file())
    assert "sk-secret" not in everything


def test_a_key_is_hidden_before_the_text_is_cut(tmp_path, capsys, monkeypatch):
    """The server gives the key back, across the place where long messages are cut."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-" + "0123456789" * 4)
    key = os.environ["OPENAI_API_KEY"]
    for n, status in ((165, 401), (30, 401), (40, 200), (0, 200)):
        said = "x" * n + key + "y" * 99
        payload = said if status == 401 else json.dumps({"choices": [{"message": {"content": said}}]})
        monkeypatch.setattr(Handler, "do_POST", lambda self: (
            self.rfile.read(int(self.headers["Content-Length"])), self.send_response(status),
            self.send_header("Content-Length", str(len(payload))), self.end_headers(),
            self.wfile.write(payload.encode())))
        with pytest.raises(SystemExit):
            E.main(config(tmp_path, api_base=Server().url, tries=1, n=1, out=f"{tmp_path}/{n}"))
        out = capsys.readouterr()
        everything = out.out + out.err + "".join(map(repr, tree(f"{tmp_path}/{n}").values()))
        assert "sk-sec" not in everything and "***" in out.err, out.err
    monkeypatch.setattr(Handler, "do_POST", lambda self: self.wfile.write(f"HTTP/1.1 {key} no status\r\n".encode()))
    message = refused(capsys, lambda: E.main(config(tmp_path, api_base=Server().url, tries=1, n=1)))
    assert "***" in message and key not in message


@pytest.mark.parametrize("text,label", [("A", "A"), (" B.", "B"), ("**A**", "A"), ("Answer: B", "B"),
                                        ("The better answer is A.", "A"),
                                        ("B\nbecause", "B"), ("A good question", None), ("I can't say", None),
                                        ("", None), ("AB", None)])
def test_reading_a_verdict(text, label):
    choice = {"message": {"content": text}, "logprobs": None}
    if label:
        assert E.read_verdict(choice) == float(label == "B")
    else:
        with pytest.raises(E.Failed):
            E.read_verdict(choice)


def test_several_policies_function_judge_and_protected_folder(tmp_path, capsys):
    (tmp_path / "judge.py").write_text("def score(prompt, response):\n    return min(response.count('x'), 3)\n")
    cfg = config(tmp_path, n=8, judge=f"{tmp_path}/judge.py:score")
    cfg.model = [cfg.model[0], cfg.baseline]
    E.main(cfg)
    rows = {}
    for r in json.load(open(tmp_path / "out/annotations.json")):
        rows.setdefault(r["generator_2"], []).append(r["preference"])
    assert rows == {"policy": [2, 2, 1.5, 1.5] * 2, "base": [1.5] * 8}
    difference = json.load(open(tmp_path / "out/summary.json"))["differences"][0]
    assert difference["policy"] == "policy" and difference["win_rate"] == 25 and difference["n"] == 8
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()}
    E.main(cfg)
    with pytest.raises(SystemExit) as e:
        E.main(replace(cfg, seed=1))
    assert e.value.code == 2 and before == {f: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()}
    assert "already finished" in capsys.readouterr().out


def test_bad_input(tmp_path, capsys):
    cfg = config(tmp_path, judge=f"{tmp_path}/judge.py:score")
    (tmp_path / "judge.py").write_text("def score(prompt, response):\n    return float('nan')\n"
                                       "def none(prompt, response):\n    return None\n")
    row = {"preference": 2, "len_1": 1, "len_2": 2}
    for name, rows in (("good", [row]), ("bad", [row | {"preference": 3}]), ("nan", [row | {"len_2": math.nan}])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    outputs = json.load(open(tmp_path / "base.json"))
    (tmp_path / "base-baseline.json").write_text(json.dumps(outputs))
    (tmp_path / "two.json").write_text(json.dumps(outputs + [outputs[0] | {"output": "another"}]))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/metrics.jsonl").write_text("")
    for change, word in ((dict(judge="nowhere.py:f"), "nowhere.py"), (dict(), "no scores"),
                         (dict(model=[f"{tmp_path}/nowhere"]), "nowhere"),
                         (dict(model=["nowhere.json"]), "nowhere.json"),
                         (dict(annotations=[f"{tmp_path}/bad.json"]), "row 1"),
                         (dict(api_base="http://key@host/v1"), "--api_base"),
                         (dict(api_base="http://host/v1?key=secret"), "--api_base"),
                         (dict(api_base="http://["), "--api_base"),
                         (dict(model=[cfg.model[0]] * 2), "called"),
                         (dict(model=[cfg.baseline, f"{tmp_path}/base-baseline.json"]),
                         "base-baseline"), (dict(model=[f"{tmp_path}/two.json"]), "second output"),
                         (dict(out=f"{tmp_path}/foreign"), "no run of this script"),
                         (dict(out=f"{tmp_path}/bad.json/x"), "--out"),
                         (dict(judge=f"{tmp_path}/judge.py:none"), "TypeError"),
                         (dict(difficulty=f"{tmp_path}/bad.json", annotations=[f"{tmp_path}/good.json"]),
                          "--difficulty"),
                         (dict(annotations=[f"{tmp_path}/nan.json"]), "len_2")):
        assert word in refused(capsys, lambda: E.main(replace(cfg, **change)))


# ---- models -------------------------------------------------------------------------------------------------
def evaluate_flags(world, runs, out):
    return {"model": runs["ppo"].result() + "/model", "baseline": f"{world}/sft", "data": f"{world}/prompts.jsonl",
            "judge": runs["rm"].result() + "/model", "show": 0, "max_samples": 12, "max_new_tokens": 24, "out": out}


def evaluate_run(world, runs, out, **kw):
    flags = evaluate_flags(world, runs, str(out)) | kw
    E.main(E.Config(**flags | {"model": [flags["model"]]}))
    return json.load(open(f"{out}/annotations.json"))


def test_end_to_end_with_a_reward_model(world, runs, tmp_path, capsys):
    rows = evaluate_run(world, runs, tmp_path / "one", html=True)
    for r in rows:
        assert r["preference"] == pytest.approx(1 + 1 / (1 + math.exp(r["score_1"] - r["score_2"])))
    assert len({r["score_2"] for r in rows}) > 6 and {r["generator_2"] for r in rows} == {"ppo"}
    page = open(tmp_path / "one/index.html").read()
    assert page.count("<article>") == 12 and page.count("<span style=") >= 12
    # killed while generating and judging: the same numbers, and what was there is not made again
    for name in ("generations", "judgements"):
        text = open(tmp_path / f"one/{name}.jsonl").read()
        os.makedirs(tmp_path / "two", exist_ok=True)
        (tmp_path / f"two/{name}.jsonl").write_text(text[:len(text) // 2])
    assert evaluate_run(world, runs, tmp_path / "two", generation_batch_size=5) == rows
    assert len(open(tmp_path / "two/generations.jsonl").readlines()) in (24, 25)
    assert evaluate_run(world, runs, tmp_path / "three", seed=1) != rows
    moved = shutil.copytree(runs["rm"].result() + "/model", tmp_path / "moved")
    reward = json.load(open(moved / "reward.json"))
    write(moved / "reward.json", json.dumps(reward | {"sft_model": "/nowhere/sft"}))            # found by --baseline
    assert [r["preference"] for r in evaluate_run(world, runs, tmp_path / "four", judge=str(moved))] == \
        [r["preference"] for r in rows]
    write(moved / "reward.json", json.dumps(reward | {"sft_fingerprint": "0" * 32}))
    assert "other weights" in refused(capsys, lambda: evaluate_run(world, runs, tmp_path / "five", judge=str(moved)))
    for ours, theirs in zip(rows, json.load(open(runs["judged"].result() + "/annotations.json")), strict=True):
        assert ours["output_1"] == theirs["output_1"] and ours["output_2"] == theirs["output_2"]          # on two ranks
        assert ours["preference"] == pytest.approx(theirs["preference"], abs=1e-5)


def test_greedy_is_the_same_for_any_batch_and_differs_from_sampling(world, runs, tmp_path):
    greedy = [evaluate_run(world, runs, tmp_path / str(n), temperature=0.0, generation_batch_size=n, seed=n)
              for n in (1, 5, 12)]
    assert greedy[0] == greedy[1] == greedy[2]
    same = write(f"{tmp_path}/same.jsonl", [{"prompt": "tell me about my new phone."}] * 8)
    assert len({r["output_2"] for r in evaluate_run(world, runs, tmp_path / "same", data=same)}) > 4


def test_chat_model_as_judge(families, tmp_path):
    E.main(config(tmp_path, n=2, judge=families["qwen2"]))
    row, p = json.load(open(tmp_path / "out/annotations.json"))[0], []
    tokenizer, _ = segment.load_tokenizer(families["qwen2"])
    labels = [tokenizer(x)["input_ids"][0] for x in "AB"]
    model = AutoModelForCausalLM.from_pretrained(families["qwen2"])
    for text in E.questions(row):
        ids = tokenizer.apply_chat_template([user(text)], add_generation_prompt=True, return_tensors="pt",
                                            return_dict=True)
        p.append(model(**ids).logits[0, -1, labels].softmax(-1)[1].item())
    assert row["preference"] == pytest.approx(1 + (p[0] + 1 - p[1]) / 2, abs=1e-5)


def test_pair_accuracy(tmp_path, capsys):
    (tmp_path / "judge.py").write_text("def score(prompt, response):\n    return len(response)\n")
    rows = [{"prompt": "p", "chosen": c, "rejected": r, "subset": s} for c, r, s in
            (("long one", "short", "s1"), ("tiny", "much longer", "s2"), ("also longer", "no", "s2"),
             ("same!", "equal", "s1"))]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    E.main(E.Config(pairs=True, data=f"{tmp_path}/pairs.jsonl", judge=f"{tmp_path}/judge.py:score",
                    out=f"{tmp_path}/out"))
    got = {k: (v["accuracy"], v["n"]) for k, v in json.load(open(tmp_path / "out/pairs.json")).items()}
    assert got == {"all": (62.5, 4), "chosen is longer": (100, 2), "chosen is shorter": (0, 1), "same length": (50, 1),
                   "subset s1": (75, 2), "subset s2": (50, 2)}


def test_paired_differences_belong_to_the_prompt_and_files_of_others_stay(tmp_path, capsys):
    rng = np.random.default_rng(0)
    a = [{"index": n, "preference": 1 + x, "len_1": 5 + n % 3, "len_2": 5} for n, x in enumerate(rng.random(40))]
    b = [row | {"preference": min(2, row["preference"] + .01)} for row in a]
    for rows, n in ((b, 40), (b[::-1], 40), (b[1:], 39)):
        E.main(E.Config(annotations=[write(f"{tmp_path}/a.jsonl", a), write(f"{tmp_path}/b.jsonl", rows)],
                        out=f"{tmp_path}/out{n}"))
        difference, = json.load(open(f"{tmp_path}/out{n}/summary.json"))["differences"]
        assert difference["n"] == n and difference["standard_error"] < .1
    mine = write(f"{tmp_path}/leaderboard.csv", "mine")
    assert "give another --out" in refused(capsys, lambda: E.main(E.Config(annotations=[f"{tmp_path}/a.jsonl"],
                                                                           out=f"{tmp_path}")))
    assert open(mine).read() == "mine"
    assert "only their lengths" in refused(capsys, lambda: E.main(E.Config(
        annotations=[f"{tmp_path}/a.jsonl"], html=True, out=f"{tmp_path}/page")))


def test_page_escapes(tmp_path):
    evil = "<script>alert('1')</script>&\ud800\"><img src=x onerror=a>"
    rows = [{"instruction": evil, "output_1": evil, "output_2": evil, "generator_1": evil, "generator_2": evil,
             "preference": 1.5,
             "len_1": 3, "len_2": 4}]
    table, differences = E.figures({evil: rows})
    page = E.page(E.Config(judge=evil), table, differences, {evil: rows}, {(evil, 0): [(evil, 0.5)]})
    assert "<script" not in page and "<img" not in page and page.count("&lt;script&gt;") >= 7
    assert "http" not in page.replace("http-equiv", "") and "src=x onerror" in page
    page.encode("utf-8")


# ------------------------------------------------------------------------------------------------------------
# 11. The main job: what the README's first command must reach (`pytest test_all.py -k acceptance -s` prints it)
# ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def main_job():
    """The three stages with default arguments, in ./out; each says that it is done when it has been run before."""
    for script in ("train_rm.py", "train_ppo.py", "evaluate.py"):
        subprocess.run([sys.executable, script], cwd=HERE, check=True)


def test_acceptance(main_job, capsys, monkeypatch):
    monkeypatch.chdir(HERE)
    world = json.load(open("data/reviews/world.json"))
    ppo = [json.loads(line) for line in open("out/ppo/metrics.jsonl")]
    (row,) = csv.DictReader(open("out/eval/leaderboard.csv"))
    device = segment.setup()
    tokenizer, stops = segment.load_tokenizer("data/reviews/sft")
    pairs = list(segment.load_pairs("data/reviews/pairs_test.jsonl"))
    rows = segment.encode_chats(tokenizer, stops, [(p, r, w) for p, *both, w in pairs for r in both], 256, 128)
    sft = segment.load_model("data/reviews/sft", segment.LanguageModel, device, torch.float32)
    rm = segment.load_model("out/rm/model", train_rm.ScalarModel, device, torch.float32)
    entropy, values = (segment.map_rows(m, rows, 16384, device)[k] for m, k in ((sft, 2), (rm, 0)))       # (B, R)
    mask = torch.arange(entropy.shape[1]) < torch.tensor([[len(r)] for _, r in rows])
    gold = torch.full(entropy.shape, torch.nan)                           # value of the clause that ends here
    for b, (prompt, response) in enumerate((p, r) for p, *both, _ in pairs for r in both):
        for value, end in prepare.clause_values(prompt[-1]["content"], response):
            gold[b, end] = value
    done, true = segment.is_finished(rows, stops), ~gold.isnan()

    def f1(cutoff):
        ends = segment.segment_ends(entropy, mask, done, cutoff, "segment")
        return float(2 * (ends & true).sum() / (ends.sum() + true.sum()))
    ends = segment.segment_ends(entropy, mask, done, 1.0, "segment")
    score = segment.sequence_score(values, ends)
    better = torch.tensor([prepare.gold_reward(p[-1]["content"], a) - prepare.gold_reward(p[-1]["content"], b)
                           for p, a, b, _ in pairs])
    order = ((score[0::2] - score[1::2]) * better > 0)[better != 0].float().mean()
    correlation = torch.corrcoef(torch.stack([values[ends & true], gold[ends & true]]))[0, 1]
    late = np.mean([m["gold"] for m in ppo[-3:]])
    scale = {use: json.load(open("out/rm/model/reward.json"))["statistics"][use]["location"]["scale"]["even"]
             for use in train_rm.GRANULARITIES}
    reached = {                                                           # name: (value, at least, at most)
        "SFT gold": (world["gold"], -.87, -.57), "SFT off-topic clauses": (world["off_topic"], 0, .30),
        "SFT finished": (world["finished"], .98, 1), "SFT malformed clauses": (world["malformed"], 0, .04),
        **{f"boundary F1 at cutoff {c}": (f1(c), .98, 1) for c in (.75, 1., 1.5, 2., 2.5)},
        "reward model against the gold order": (float(order), .70, 1),
        "learned segment rewards, correlation with gold": (float(correlation), .22, 1),
        "scale S as bandit": (scale["bandit"], .85, 1.1), "scale S as segment": (scale["segment"], 4, 12),
        "scale S as token": (scale["token"], 20, 60),
        "PPO gold, last 3 iterations": (late, -.10, 2), "PPO KL per response": (ppo[-1]["kl"], 0, 18),
        "PPO finished": (ppo[-1]["finished"], .97, 1),
        "win rate against the SFT model": (float(row["win_rate"]) / 100, .85, 1)}
    with capsys.disabled():
        print("\n" + "\n".join(f"{name:50} {x:7.3f}   {low} to {high}" for name, (x, low, high) in reached.items()))
    assert all(low <= x <= high for x, low, high in reached.values())


def test_true_rewards_per_segment_teach_faster_than_per_response(main_job, tmp_path):
    """Credit assignment alone: the world's true clause values, given where they are due or summed up at the end."""
    oracle = ["--oracle", f"{WORLD_PY}:clause_values"]
    run_well("train_rm.py", ["--calibrate_only", *oracle, "--out", f"{tmp_path}/oracle"])
    names = ("segment", "bandit")
    started = [start("train_ppo.py", ["--reward_model", f"{tmp_path}/oracle/model", *oracle, "--granularity", name,
                                      "--max_steps", "15", "--out", f"{tmp_path}/{name}"]) for name in names]
    for process in started:
        assert process.communicate(timeout=300) and process.returncode == 0
    gold = {name: np.mean([row["gold"] for row in metrics(f"{tmp_path}/{name}")[-3:]]) for name in names}
    assert gold["segment"] >= gold["bandit"] + .2 and gold["segment"] > -.2, gold
