"""Every chapter against an independent reference:  pytest test_all.py      (about three minutes on two CPU cores)

1. functions against literal loops and closed forms      5. a tiny world: runs as a user starts them, killed, resumed
2. chat encoding                                         6. the recipes of config/
3. sampling                                              7. the world's ground truth
4. data and flags that must be refused                   8. CUDA, where there is one
"""
import copy
import doctest
import glob
import gzip
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("OMP_NUM_THREADS", "1")               # two runs at a time, one thread each
os.environ["HF_HUB_OFFLINE"] = "1"                          # nothing here may reach the network

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig,
                          LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast,
                          Qwen2Config, Qwen2ForCausalLM)

import segment
import train_ppo
import train_rm
from segment import LanguageModel, load_model, pad, parse, segment_ends, segment_locations, sequence_score
from train_rm import (Normalizer, ScalarModel, fit_normalizer, huber_line, normalized_token_rewards, rewards_at_ends,
                      spread_rewards)
from train_ppo import gae, generate, never_sampled, policy_loss, value_loss, whiten

HERE = os.path.dirname(os.path.abspath(__file__))
os.chdir(HERE)                                              # config/*.args name each other relative to the repository
REAL_PAIRS = "../shared/data/alpaca_pairs/test.jsonl.gz"
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
    results = [doctest.testmod(m) for m in (segment, train_rm, train_ppo)]
    assert sum(r.failed for r in results) == 0 and sum(r.attempted for r in results) >= 6


@pytest.mark.parametrize("granularity", ["segment", "token", "bandit"])
@pytest.mark.parametrize("seed", range(4))
def test_segment_ends_and_locations_are_those_of_a_loop_over_tokens(granularity, seed):
    entropy, mask, finished, lengths = random_rows(seed)
    ends = segment_ends(entropy, mask, finished, 2.0, granularity)
    p = segment_locations(ends)
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


def test_sequence_score_is_the_mean_over_ends():
    entropy, mask, finished, lengths = random_rows(5)
    values = torch.randn(entropy.shape, generator=torch.Generator().manual_seed(2))
    ends = segment_ends(entropy, mask, finished, 2.0, "segment")
    for b, score in enumerate(sequence_score(values, ends).tolist()):
        assert score == pytest.approx(np.mean([float(values[b, r]) for r in ends[b].nonzero()[:, 0]]), abs=1e-6)


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
    assert statistics["bandit"]["location"]["b_mean"] == pytest.approx(float(sequence_score(values, ends).mean()), abs=1e-5)


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
             max_position_embeddings=256, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=2)
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
        values = [rm(x, p, r)[0] for x in (ids, wide)]
        for b, (prompt, response) in enumerate(rows):
            P, R = len(prompt), len(response)
            row = torch.tensor(np.concatenate([prompt, response]))[None].long()
            logp = hf(row).logits[0].float().log_softmax(-1)                 # (T, V)
            H = -(logp.exp() * logp).sum(-1)
            want = torch.stack([logp[P - 1:-1].gather(1, row[0, P:, None])[:, 0], H[P - 1:-1], H[P:]])
            alone = torch.stack(lm(*pad([rows[b]], CPU)))[:, 0]
            hidden = rm.hf.base_model(input_ids=row).last_hidden_state[0]
            for out in (outs[0][:, b, :R], outs[1][:, b, :R], alone):
                torch.testing.assert_close(out, want, atol=2e-4, rtol=1e-4)
            assert not outs[0][:, b, R:].any()
            for shift in (0, -1):                                            # reward after, critic before the token
                rm.shift = shift
                at = (hidden @ rm.hf.score.weight.T)[P + shift:P + R + shift, 0]
                torch.testing.assert_close(rm(wide, p, r)[0][b, :R], at, atol=1e-4, rtol=1e-4)
            rm.shift = 0
        torch.testing.assert_close(values[0] * (torch.arange(values[0].shape[1]) < r[:, None]),
                                   values[1] * (torch.arange(values[0].shape[1]) < r[:, None]), atol=1e-4, rtol=1e-4)
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
    for plain, attack in zip(*rows):                                         # the same special tokens, prompt and response
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
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
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
    luck = torch.rand(B, R, generator=torch.Generator().manual_seed(2))
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


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_samples_follow_the_softmax_and_never_hold_a_banned_token(families, temperature):
    """Chi-square on the first token of 4,000 responses to one prompt."""
    hf, prompts, stops, _, _ = sampling_case(families["llama3"])
    tokenizer, own_stops = segment.load_tokenizer(families["llama3"])
    banned = never_sampled(tokenizer, own_stops, hf.config.vocab_size)
    V = hf.config.vocab_size
    assert banned.nonzero()[:, 0].tolist() == [0, 1, 3, 4, 5, V - 3, V - 2, V - 1]   # specials but EOS; no token at all
    n = 4000
    luck = torch.rand(n, 1, generator=torch.Generator().manual_seed(8))
    luck[:2, 0] = torch.tensor([0.0, 1 - 2 ** -24])         # the edges of the distribution
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
    lines = [x for x in capsys.readouterr().err.splitlines() if "it/s]" not in x and x.strip()]
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (end.value.code, lines)
    return lines[0]
