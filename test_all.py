"""Chapter 5: what each function means, said by comparison.    pytest test_all.py

1. functions against loops and closed forms      7. the world's ground truth
2. chat encoding and data                        8. the recipes of config/
3. sampling                                      9. evaluation
4. PPO's pieces                                 10. CUDA, where there is one
5. mistakes that must be refused                11. the main job: what it must reach
6. runs: killed, resumed, on two ranks

Runs take place in the embedded world, on its full data but for a few steps; the main job of the
README's first command is used where it lies in out/, and run where it doesn't.
"""
import csv
import doctest
import glob
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

os.environ.setdefault("OMP_NUM_THREADS", "1")        # two runs at a time, a thread each
os.environ["HF_HUB_OFFLINE"] = "1"                   # nothing here may reach the network
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")     # only section 10 sees a GPU
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.chdir(os.path.dirname(os.path.abspath(__file__)))  # config/*.args name each other from here

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification,
                          GenerationConfig, PreTrainedTokenizerFast)

import evaluate as E
import segment
import train_ppo
import train_rm
from segment import (WORLD, LanguageModel, load_model, load_pairs, load_prompts, load_tokenizer,
                     pad, parse, segment_ends, segment_locations, sequence_score)
from train_rm import Normalizer, ScalarModel, fit_normalizer, huber_line, spread_rewards

spec = importlib.util.spec_from_file_location("prepare", f"{WORLD}/prepare.py")
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)
CPU, SFT = torch.device("cpu"), f"{WORLD}/sft"
close = torch.testing.assert_close


@pytest.fixture(scope="session", autouse=True)
def world():
    """A process group of one for what runs in this process; the embedded world, made once."""
    segment.setup()
    segment.prepare_world(SFT)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def refused(capsys, f, *args):
    """The line on stderr of an f(*args) that must end with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        f(*args)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


class Tape(TorchDispatchMode):
    """Stands in for a CUDA graph: records each operation with its very tensors and numbers, refuses
    those that wait for the host, and plays them again into the same memory."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        assert not re.search("local_scalar|nonzero|masked_select|lift_fresh", str(f)), f"host: {f}"
        for index in args[1] if str(f).startswith("aten.index.") else []:
            assert index is None or index.dtype != torch.bool, "host: an index by a mask"
        memory = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))
        result = f(*args, **kwargs or {})
        self.operations.append((f, *memory, result))
        return result

    def play(self):
        for f, args, kwargs, result in self.operations:
            for old, new in zip(tree_leaves(result), tree_leaves(f(*args, **kwargs))):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():    # else: a view
                    old.copy_(new)


def read_json(path):
    with open(path) as f:
        return json.load(f)


# -- 1. Functions against loops and closed forms: segments and the normaliser ----------------------
def random_rows(seed, B=7, R=19, cutoff=2.0):
    """entropy, mask, finished, lengths of B random responses. Some entropies equal the cutoff; two
    rows have one token, which in the first is an EOS."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, R + 1, (B,), generator=g)
    lengths[:3] = torch.tensor([1, 1, R])
    entropy = 4 * torch.rand(B, R, generator=g)
    entropy[torch.rand(B, R, generator=g) < 0.2] = cutoff
    finished = torch.rand(B, generator=g) < 0.5
    finished[:2] = torch.tensor([True, False])
    return entropy, torch.arange(R) < lengths[:, None], finished, lengths.tolist()


@pytest.mark.parametrize("granularity", ["segment", "token", "bandit"])
def test_segments_locations_and_scores_are_those_of_a_loop_over_tokens(granularity):
    entropy, mask, finished, lengths = random_rows(0, B=30)
    values = randn(*mask.shape, seed=2)
    ends = segment_ends(entropy, mask, finished, 2.0, granularity)
    locations, scores = segment_locations(ends), sequence_score(values, ends)
    for b, length in enumerate(lengths):
        content = length                    # the end-of-turn token belongs to no segment,
        if finished[b] and length > 1:      # unless it is all there is
            content = length - 1
        want = []
        for r in range(content):
            if granularity == "token" or r == content - 1 or float(entropy[b, r]) > 2.0:
                want.append(r)
        if granularity == "bandit":
            want = [length - 1]
        assert ends[b].nonzero()[:, 0].tolist() == want
        p = [(i + 1) / len(want) for i in range(len(want))]
        assert locations[b, want].tolist() == pytest.approx(p)
        assert float(locations[b].sum()) == pytest.approx(sum(p))        # 0 where nothing ends
        assert float(scores[b]) == pytest.approx(float(values[b, want].mean()), abs=1e-6)


@pytest.mark.parametrize("how", ["even", "repeat", "end"])
@pytest.mark.parametrize("granularity", ["segment", "token", "bandit"])
def test_spread_rewards_is_a_loop_over_segments(how, granularity):
    entropy, mask, finished, lengths = random_rows(3)
    ends = segment_ends(entropy, mask, finished, 2.0, granularity)
    rewards = randn(*mask.shape, seed=3)
    got = spread_rewards(rewards, ends, mask, how)
    for b, length in enumerate(lengths):
        want, first = [0.0] * mask.shape[1], 0           # the EOS behind the last end earns nothing
        for r in ends[b].nonzero()[:, 0].tolist():
            for k in range(first, r + 1):
                if how == "even":
                    want[k] = float(rewards[b, r]) / (r + 1 - first)
                elif how == "repeat" or k == r:
                    want[k] = float(rewards[b, r])
            first = r + 1
        assert got[b].tolist() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("own,use,want", [
    ("segment", "segment", [0, 2, 0, 4, 0]), ("segment", "bandit", [0, 0, 0, 0, 3]),
    ("bandit", "segment", [0, 2, 0, 4, 0]), ("bandit", "bandit", [0, 0, 0, 0, 7]),
    ("token", "bandit", [0, 0, 0, 0, 6])])
def test_what_a_reward_model_gives_when_it_is_used_at_another_granularity(own, use, want):
    """Five tokens: segments end at 1 and 3, the EOS is token 4."""
    entropy, scalars = torch.tensor([[0., 3, 0, 0, 0], [9, 2, 9, 4, 7]])[:, None]
    rewards, ends = train_rm.place_rewards(scalars, entropy, entropy > -1,
                                             torch.tensor([True]), 1.0, own, use)
    assert rewards[0].tolist() == want and rewards[ends].tolist() == [x for x in want if x]


def test_token_rewards_by_hand():
    """Two segments of two tokens, and an EOS. The mean is log p + 1, the deviation .5 log p + 2."""
    ends = torch.tensor([[False, True, False, True, False]])
    rewards, mask = torch.tensor([[0., 2, 0, 4, 0]]), torch.ones(1, 5, dtype=torch.bool)
    fit = Normalizer(w_mean=1.0, b_mean=1.0, w_std=0.5, b_std=2.0)
    first = (2 - (1 + math.log(.5))) / (2 + 0.5 * math.log(.5))
    got = train_rm.token_rewards(rewards, ends, mask, fit, "even")[0].tolist()
    assert got == pytest.approx([first / 2, first / 2, .75, .75, 0])


def test_a_normalizer_recovers_the_lines_that_rewards_were_made_from_and_stays_sane_outside():
    rng = np.random.default_rng(0)
    p = np.concatenate([np.arange(1, n + 1) / n for n in rng.integers(2, 13, 20000)])
    y = 0.7 * np.log(p) + 0.5 + (0.25 * np.log(p) + 2.8) * rng.standard_normal(len(p))
    fit = fit_normalizer(torch.tensor(p), torch.tensor(y))
    got = [fit.w_mean, fit.b_mean, fit.w_std, fit.b_std]
    assert got == pytest.approx([0.7, 0.5, 0.25, 2.8], abs=0.06)
    y[np.isclose(p, 1 / 7)] += 1000                      # least squares would follow this pool
    assert fit_normalizer(p, y).w_mean == pytest.approx(0.7, abs=0.15)
    two = fit_normalizer([.5, .5, 1, 1], [1., 3, 7, 13])         # two pools: exact, ddof = 0
    assert two.mean(torch.tensor([.5, 1])).tolist() == pytest.approx([2, 10], abs=1e-4)
    assert two.std(torch.tensor([.5, 1])).tolist() == pytest.approx([1, 3], abs=1e-4)
    one = fit_normalizer(torch.ones(50), torch.arange(50.))      # a bandit: one location, no slope
    assert (one.w_mean, one.b_mean, one.w_std) == (0, pytest.approx(24.5), 0)
    for p, y in (([1.] * 9, [3.] * 9), ([1., 1], [1, math.nan]), ([], []), ([.1, .2], [1, 2])):
        with pytest.raises(ValueError):                  # constant, NaN, nothing, nothing shared
            fit_normalizer(p, y)
    fit = Normalizer(w_mean=1.0, b_mean=0.0, w_std=1.0, b_std=2.0, p_min=0.05)
    assert float(fit.std(0.05)) == pytest.approx(0.2)    # 2 + log .05 < 0: a tenth of b_std instead
    assert float(fit.mean(1e-9)) == pytest.approx(math.log(.05))         # p is clamped
    assert Normalizer.from_dict(json.loads(json.dumps(fit.to_dict()))) == fit


def test_huber_line_is_the_stationary_point_of_hubers_objective():
    """The convex sum of sigma + H(z) sigma, z = residual / sigma, on data with heavy tails: its
    derivatives by slope, intercept and sigma vanish."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-3, 0, 60)
    y = 0.8 * x + 0.3 + rng.standard_t(2, 60) * 0.3
    slope, intercept = huber_line(x, y)
    residual, sigma = y - slope * x - intercept, 1.0
    for _ in range(500):
        sigma *= math.sqrt(np.minimum((residual / sigma) ** 2, 1.35 ** 2).mean())
    psi = (residual / sigma).clip(-1.35, 1.35)
    assert [psi.sum(), (psi * x).sum()] == pytest.approx([0, 0], abs=1e-3)


def test_bradley_terry_and_the_learning_rate_by_hand():
    got = train_rm.bradley_terry(torch.tensor([1.0, -2]), torch.tensor([0.0, 1])).tolist()
    assert got == pytest.approx([math.log(1 + math.exp(-1)), math.log(1 + math.exp(3))])
    rate = [train_rm.learning_rate(step, 100, 0.03) for step in range(100)]
    assert rate[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rate[3:] == sorted(rate[3:], reverse=True) and 0.1 < rate[-1] < 0.102


def test_micro_batches_hold_every_row_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 60, 40).tolist()
    batches = segment.micro_batches([500, *lengths], 128, ranks=8)
    assert sorted(i for batch in batches for i in batch) == list(range(41))
    assert batches[0] == [0] and len(batches) % 8 == 0  # too long: alone; as many on each rank
    for batch in batches[1:]:
        assert max(lengths[i - 1] for i in batch) * len(batch) <= 128


# -- 1. Functions against loops and closed forms: what models say about tokens ---------------------
@pytest.mark.parametrize("chunk", [7, 1000, None])
def test_logprobs_entropy_and_their_gradients_are_those_of_log_softmax(chunk):
    hidden = randn(50, 16, seed=0).requires_grad_()
    weight = randn(300, 16, seed=1).requires_grad_()
    targets, (a, b) = torch.arange(0, 300, 6), randn(2, 50, seed=2)
    with Tape() as tape:
        got = segment.token_logprobs_and_entropy(hidden, weight, targets, chunk)
        grads = torch.autograd.grad((a * got[0] + b * got[1]).sum(), (hidden, weight))
    full = (hidden @ weight.T).log_softmax(-1)
    want = full.gather(1, targets[:, None])[:, 0], -(full.exp() * full).sum(1)
    close(got, want, atol=1e-4, rtol=1e-4)
    want_grads = torch.autograd.grad((a * want[0] + b * want[1]).sum(), (hidden, weight))
    close(grads, want_grads, atol=3e-4, rtol=1e-4)
    if chunk == 7:                       # never (N, V), not in the backward pass either
        assert all(x.numel() <= weight.numel() for *_, x in tape.operations if torch.is_tensor(x))
    in_bf16 = segment.token_logprobs_and_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    assert in_bf16[0].dtype == in_bf16[1].dtype == torch.float32


# Four families in small: grouped heads and BOS (Llama), fused projections, a sliding window and a
# second end token (Phi-3; <system> plays its <|end|>), biases and no BOS (Qwen2; transformers makes
# byte pairs of whatever tokenizer lies beside it), tied embeddings and mixed windows (Gemma 3).
TURNS = ("{% for m in messages %}{{ '<' + m.role + '>\n' + m.content + 'END\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% else %}AFTER{% endif %}")
PLAIN_TURNS = TURNS.replace("END", "<eos>").replace("AFTER", "")
PHI3_TURNS = TURNS.replace("END", "<system>").replace("AFTER", "<eos>")
GEMMA3 = {"sliding_window": 10, "head_dim": 8, "tie_word_embeddings": True,
          "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {  # name: (transformers' name, more of the config, chat template, stop tokens)
    "llama": ("Llama", {}, "{{ bos_token }}" + PLAIN_TURNS, [2]),
    "phi3": ("Phi3", {"sliding_window": 12}, "{{ bos_token }}" + PHI3_TURNS, [2, 5]),
    "qwen2": ("Qwen2", {}, "<user>\nplease be honest.<eos>\n" + PLAIN_TURNS, [2]),
    "gemma3": ("Gemma3", GEMMA3, PLAIN_TURNS, [2])}


def tiny_model(name, more, tokenizer, kind="ForCausalLM"):
    """A random model with 3 embeddings that are no token."""
    config = getattr(transformers, name + ("TextConfig" if name == "Gemma3" else "Config"))(
        vocab_size=len(tokenizer) + 3, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, num_labels=1,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=2, **more)
    torch.manual_seed(len(name))
    return getattr(transformers, name + kind)(config)


def byte_pair_tokenizer():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [text for row in prepare.PHRASES for text in row]
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(prepare.SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", pad_token="<unk>",
        bos_token="<bos>", extra_special_tokens=list(prepare.SPECIALS[3:]))


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """{name: folder} of tiny random chat models"""
    folders = {}
    for family, (name, more, template, stops) in FAMILIES.items():
        folders[family] = str(tmp_path_factory.mktemp(family))
        tokenizer = byte_pair_tokenizer() if family == "qwen2" else prepare.build_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folders[family])
        model = tiny_model(name, more, tokenizer)
        model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=2,
                                                   do_sample=True, temperature=0.6, top_p=0.9)
        model.save_pretrained(folders[family])
    return folders


def random_tokens(V, seed=0, B=5):
    """B rows (prompt ids, response ids)"""
    rng, rows = np.random.default_rng(seed), []
    for n in rng.integers(1, 24, B):
        prompt = rng.integers(6, V, rng.integers(1, 9))
        rows.append((prompt.astype(np.int32), rng.integers(6, V, n).astype(np.int32)))
    return rows


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_models_read_each_row_as_if_it_were_alone(families, family):
    """In a padded batch, against a plain forward of each row. The index rule: r's log-prob and
    value at P + r - 1; its reward, and the entropy after it, at P + r."""
    lm = load_model(families[family], LanguageModel, CPU, torch.float32)
    rm = load_model(families[family], ScalarModel, CPU, torch.float32, head_std=0.2)
    hf = AutoModelForCausalLM.from_pretrained(families[family], dtype=torch.float32)
    head = rm.hf.score.weight.full_tensor()                                      # (1, d)
    assert float(head.std()) == pytest.approx(0.2, rel=0.4)
    rows = random_tokens(hf.config.vocab_size)
    ids, *lens = pad(rows, CPU)
    ids = torch.cat([ids, torch.full((5, 6), 9)], 1)             # behind the end: never read
    logprobs, entropy = lm(ids, *lens)
    rewards = rm(ids, *lens)
    rm.shift = -1
    values = rm(ids, *lens)
    for b, (prompt, response) in enumerate(rows):
        P, R = len(prompt), len(response)
        row = torch.tensor(np.concatenate([prompt, response]))[None].long()
        logp = hf(row).logits[0].log_softmax(-1)                                 # (T, V)
        H = -(logp.exp() * logp).sum(-1)                                         # (T,)
        scalars = (hf.base_model(row).last_hidden_state[0] @ head.T)[:, 0]       # (T,)
        want = logp[P - 1:-1].gather(1, row[0, P:, None])[:, 0], H[P:], scalars[P:], \
            scalars[P - 1:-1]
        close((logprobs[b, :R], entropy[b, :R], rewards[b, :R], values[b, :R]), want,
              atol=2e-4, rtol=1e-4)
        assert not logprobs[b, R:].any() and not entropy[b, R:].any()
    mapped = segment.map_rows(lm, rows, 40, CPU)         # several micro-batches, rows in order
    close(mapped, torch.stack([logprobs, entropy]), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind,head_std", [(LanguageModel, None), (ScalarModel, 0.1)])
def test_an_export_reloads_with_no_missing_key_and_equal_output(families, tmp_path, kind, head_std):
    """Of the model with tied embeddings, which are stored once."""
    model = load_model(families["gemma3"], kind, CPU, torch.float32, train=True, head_std=head_std)
    path, (tokenizer, _) = f"{tmp_path}/model", load_tokenizer(families["gemma3"])
    train_rm.export(model, tokenizer, path, torch.float32)
    _, info = kind.auto_class.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert "lm_head.weight" not in load_file(f"{path}/model.safetensors")
    batch = pad(random_tokens(90), CPU)
    close(load_model(path, kind, CPU, torch.float32)(*batch), model(*batch), atol=1e-5, rtol=1e-5)


# -- 2. Chat encoding ------------------------------------------------------------------------------
TALK = [user("tell me about my new phone."), assistant("rain really killed it in one minute."),
        user("would you buy it again? be honest.")]


@pytest.mark.parametrize("prompt", [TALK[:1], TALK], ids=["one turn", "three turns"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_response_are_the_whole_conversation(families, family, prompt):
    tokenizer, stops = load_tokenizer(families[family])
    assert stops.tolist() == FAMILIES[family][3]         # of generation_config and tokenizer
    (p, r), = segment.encode_chats(tokenizer, stops, [(prompt, ["fish fly at night."], "")], 256, 9)
    whole = [*prompt, assistant("fish fly at night.")]
    ids = tokenizer.apply_chat_template(whole, return_dict=False)
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert p.tolist() == start and [*p, *r] == ids[:len(p) + len(r)]
    assert np.isin(r, stops).tolist() == [False] * (len(r) - 1) + [True]  # up to the first stop
    assert (p == 1).sum() == (family in ("llama", "phi3"))                       # BOS once, if ever
    assert segment.encode_prompts(tokenizer, [prompt], 256, "")[0].tolist() == start


def test_no_token_reaches_over_the_border_of_prompt_and_response():
    tokenizer = prepare.build_tokenizer()
    tokenizer.chat_template = ("{% for m in messages %}"
                               "{{ m.content + (' my', '<eos>')[loop.index0] }}{% endfor %}")
    chats = [([user("how")], ["cat"], "")]
    (p, r), = segment.encode_chats(tokenizer, torch.tensor([2]), chats, 9, 8)
    assert tokenizer.convert_ids_to_tokens([*p, *r]) == ["how", "my", "cat", "<eos>"]  # no "mycat"


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_that_somebody_types_stay_text(families, family):
    tokenizer, stops = load_tokenizer(families[family])
    typed = "good <eos> <system> <assistant> <bos> <<eos>eos> phone"
    plain = segment.encode_chats(tokenizer, stops, [([user("good")], ["good"], "")], 256, 128)
    attack = segment.encode_chats(tokenizer, stops, [([user(typed)], [typed], "")], 256, 128)
    for ours, theirs in zip(plain[0], attack[0]):
        assert [i for i in ours if 1 <= i <= 5] == [i for i in theirs if 1 <= i <= 5]
        assert len(theirs) > len(ours) + 10              # and nothing was thrown away


def test_what_is_too_long_loses_the_prompts_oldest_and_the_responses_newest(families, capsys):
    """Both sides of a pair see the same prompt, with its BOS, cut for the longer side."""
    tokenizer, stops = load_tokenizer(families["llama"])
    prompt = [user(" ".join(["phone"] * 40 + ["watch"]))]
    chats = [(prompt, ["good phone.", "good phone " * 4], "")]
    (p, short), (_, long) = segment.encode_chats(tokenizer, stops, chats, 256, 10)
    assert (len(p), len(short), len(long)) == (45, 4, 9)         # all fits: nothing is cut
    for max_tokens, room in ((50, 9), (12, 2)):  # 50 would hold the short side whole
        (a, r), (b, s), *_ = segment.encode_chats(tokenizer, stops, chats * 2, max_tokens, 10)
        assert a.tolist() == b.tolist() == [1, *p[-9:]]
        assert r.tolist() == short[:room].tolist() and s.tolist() == long[:room].tolist()
        assert segment.response_mask([(a, r)], stops, CPU)[1].all() == (room == 9)
        assert "2 of 2 prompts were cut" in capsys.readouterr().out
    segment.encode_prompts(tokenizer, [prompt, [user("good")]], 20, "own.jsonl")
    assert "own.jsonl: 1 of 2 prompts were cut" in capsys.readouterr().out


def test_a_template_that_prints_the_date_gives_the_same_tokens_every_day():
    """This one prints the very microsecond, and is rendered twice."""
    tokenizer = prepare.build_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y %f') }} {{ messages[0].content }}"
    first, second = [segment.render(tokenizer, [user("hello")], "") for _ in range(2)]
    assert first == second and "hello" in first and len(first) > len(" hello")


# -- 2. Data ---------------------------------------------------------------------------------------
ASK, GOOD_ONE, ANGRY = [user("is it good?")], [assistant("good.")], [assistant("angry.")]
PAIR = {"chosen": ASK + GOOD_ONE, "rejected": ASK + ANGRY}


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_layout_of_preferences_reads_alike(tmp_path):
    for n, row in enumerate([
            PAIR, {"prompt": "is it good?", "chosen": "good.", "rejected": "angry."},
            {"prompt": ASK, "chosen": GOOD_ONE, "rejected": ANGRY},
            {"prompt": "is it good?", **PAIR}]):
        write_rows(tmp_path / f"{n}.jsonl", row)
    Dataset.from_list([PAIR]).to_parquet(f"{tmp_path}/pairs.parquet")
    Dataset.from_list([PAIR]).save_to_disk(f"{tmp_path}/folder")
    for path in glob.glob(f"{tmp_path}/*"):
        assert load_pairs(path) == [(ASK, "good.", "angry.", f"{path} row 1")]
        assert load_prompts(path) == [ASK]
    system = {"role": "system", "content": "please be honest."}  # stays before chosen's turns
    path = write_rows(tmp_path / "system.jsonl", {"prompt": [system, *ASK], **PAIR})
    assert load_pairs(path)[0][0] == load_prompts(path)[0] == [system, *ASK]


def test_slices_name_parts_and_pairs_that_teach_nothing_are_counted(tmp_path, capsys):
    rows = [{"prompt": str(n), "chosen": "a", "rejected": "b"} for n in range(100)]
    write_rows(tmp_path / "pairs.jsonl", *rows)
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(f"{tmp_path}/splits")
    for name in ("pairs.jsonl", "splits"):
        pairs = load_pairs(f"{tmp_path}/{name}:train[98%:]")
        assert [prompt[0]["content"] for prompt, *_ in pairs] == ["98", "99"]
    path = write_rows(
        tmp_path / "odd.jsonl", PAIR, {**PAIR, "rejected": PAIR["chosen"]},
        {**PAIR, "chosen": [*ASK, assistant(" \n")]},
        {**PAIR, "rejected": [user("another?"), *ANGRY]})
    assert len(load_pairs(path)) == 1 and "dropped" in capsys.readouterr().out


# -- 3. Sampling -----------------------------------------------------------------------------------
def sampling_case(folder):
    """A model, 9 prompts, seeds, and a twentieth of the vocabulary as stop tokens: responses end at
    very different steps, some after several of the decoder's blocks."""
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [prompt for prompt, _ in random_tokens(hf.config.vocab_size, seed=1, B=9)]
    return hf, prompts, torch.arange(6, hf.config.vocab_size, 20), [(3, b) for b in range(9)]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_has_its_teacher_forced_logprobs_and_depends_on_its_seed_alone(families, family):
    hf, prompts, stops, seeds = sampling_case(families[family])
    tokens, logprobs, lengths = train_ppo.generate(hf, prompts, stops, 40, seeds)
    assert len(set(lengths.tolist())) > 2 and lengths.max() > 16
    for b, (prompt, length) in enumerate(zip(prompts, lengths.tolist())):
        row = torch.cat([torch.tensor(prompt).long(), tokens[b, :length]])[None]
        logp = hf(row).logits[0, len(prompt) - 1:-1].log_softmax(-1)
        want = logp.gather(1, row[0, len(prompt):, None])[:, 0]
        close(logprobs[b, :length], want, atol=1e-4, rtol=1e-5)
        stopped = torch.isin(tokens[b, :length], stops).tolist()
        assert not any(stopped[:-1]) and (stopped[-1] or length == 40)
        assert not tokens[b, length:].any() and not logprobs[b, length:].any()
    hf.generation_config = GenerationConfig()            # it held temperature .6 and top_p .9
    for group in ([8, 7, 6, 5, 4, 3, 2, 1, 0], [4], [1, 6]):     # other order, other company
        again = train_ppo.generate(hf, [prompts[b] for b in group], stops, 40,
                                   [seeds[b] for b in group])
        assert torch.equal(again[0], tokens[group]) and torch.equal(again[2], lengths[group])
    waves = train_ppo.sample(hf, prompts, stops, 40, seeds, batch_size=4)
    assert torch.equal(waves[0], tokens) and torch.equal(waves[2], lengths)
    greedy, _, lengths = train_ppo.generate(hf, prompts, stops, 40, seeds, temperature=0)
    for b in (0, 3, 8):                                  # greedy is Hugging Face's
        ids = torch.tensor(prompts[b]).long()[None]
        want = hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                           max_new_tokens=40, eos_token_id=stops.tolist(), pad_token_id=0)
        assert greedy[b, :lengths[b]].tolist() == want[0, len(prompts[b]):].tolist()


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_samples_follow_the_softmax_and_hold_no_banned_token(families, temperature):
    """Chi-square on the first token of 3,000 responses to one prompt."""
    hf, prompts, _, _ = sampling_case(families["llama"])
    tokenizer, stops = load_tokenizer(families["llama"])
    V, n = hf.config.vocab_size, 3000
    banned = train_ppo.never_sampled(tokenizer, stops, V)
    assert banned.nonzero()[:, 0].tolist() == [0, 1, 3, 4, 5, V - 3, V - 2, V - 1]
    seeds = [(b,) for b in range(n)]
    tokens, _, _ = train_ppo.generate(hf, prompts[:1] * n, stops, 1, seeds, temperature, banned)
    logits = hf(torch.tensor(prompts[0]).long()[None]).logits[0, -1] / temperature
    expected = n * logits.masked_fill(banned, -math.inf).softmax(-1)             # (V,)
    count = torch.bincount(tokens[:, 0], minlength=V)
    often = expected >= 5
    chi2 = float(((count - expected) ** 2 / expected)[often].sum())
    assert not count[banned].any()
    assert often.sum() > 5 and chi2 < often.sum() + 4 * math.sqrt(2 * often.sum())
    hf.model.norm.weight.data.zero_()                    # now every token is as likely as any other
    tokens, _, _ = train_ppo.generate(hf, prompts, torch.tensor([V]), 40, seeds[:9], temperature)
    for later in (1, 16):                                # new luck in each step and in each block
        assert float((tokens[:, later:] == tokens[:, :-later]).float().mean()) < 0.1


def taped(step):
    """`record` of train_ppo.generate: the first step warms up, the second is recorded."""
    step()
    tape = Tape()

    def replay():
        if tape.operations:
            return tape.play()
        with tape:
            step()
    return replay


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recorded_decode_step_replays_to_the_same_tokens(families, family):
    hf, prompts, stops, seeds = sampling_case(families[family])
    want = train_ppo.generate(hf, prompts, stops, 40, seeds)
    got = train_ppo.generate(hf, prompts, stops, 40, seeds, record=taped)
    for x, y in zip(got, want):
        close(x, y, atol=1e-5, rtol=1e-5)


# -- 4. PPO's pieces -------------------------------------------------------------------------------
@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0)])
def test_gae_is_the_double_sum_and_whiten_takes_population_statistics(gamma, lam):
    _, mask, _, lengths = random_rows(6)
    rewards, values = randn(2, *mask.shape, seed=5)              # garbage on padding, too
    advantages, returns = train_ppo.gae(rewards, values, mask, gamma, lam)
    for b, n in enumerate(lengths):
        following = [*values[b, 1:n].tolist(), 0.0]              # nothing after the last token
        delta = [float(rewards[b, t] + gamma * following[t] - values[b, t]) for t in range(n)]
        for t in range(n):
            want = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
            assert float(advantages[b, t]) == pytest.approx(want, abs=1e-4)
            assert float(returns[b, t]) == pytest.approx(want + float(values[b, t]), abs=1e-4)
    assert not advantages[~mask].any() and not returns[~mask].any()
    white = train_ppo.whiten(torch.where(mask, rewards, 1e6), mask)      # by the valid tokens alone
    want = (rewards - rewards[mask].mean()) / rewards[mask].std(correction=0)
    close(white, torch.where(mask, want, 0.0), atol=1e-5, rtol=0)


def test_policy_and_value_losses_are_loops_over_tokens():
    _, mask, _, lengths = random_rows(8)
    new, old, advantages, returns = randn(4, *mask.shape, seed=7) * 0.5
    losses, ratio = train_ppo.policy_loss(new, old, advantages, mask, 0.2)
    value_losses = train_ppo.value_loss(new, old, returns, mask, 0.25)
    for b, length in enumerate(lengths):
        policy = value = 0.0
        for t in range(length):
            a, y = float(advantages[b, t]), float(returns[b, t])
            x, before = float(new[b, t]), float(old[b, t])
            q = math.exp(x - before)
            assert float(ratio[b, t]) == pytest.approx(q, rel=1e-5)
            policy -= min(q * a, min(max(q, 0.8), 1.2) * a) / length
            near = min(max(x, before - 0.25), before + 0.25)
            value += 0.5 * max((x - y) ** 2, (near - y) ** 2) / length
        got = [float(losses[b]), float(value_losses[b])]
        assert got == pytest.approx([policy, value], abs=1e-5)


def test_calibrate_fits_what_was_asked_and_S_is_the_deviation_of_a_responses_total():
    entropy, mask, finished, _ = random_rows(11, B=64)
    values = randn(*mask.shape, seed=4) + 2
    ends = segment_ends(entropy, mask, finished, 2.0, "segment")
    rewards, y = torch.where(ends, values, 0.0), values[ends]
    fit, S = train_ppo.calibrate(rewards, ends, mask, "global", "even")
    assert (fit.b_mean, fit.b_std) == pytest.approx((float(y.mean()), float(y.std(correction=0))))
    totals = [float(((v[e] - fit.b_mean) / fit.b_std).sum()) for v, e in zip(values, ends)]
    assert fit.w_mean == 0 and S == pytest.approx(np.std(totals), rel=1e-4)
    last = np.mean([float(v[e][-1]) for v, e in zip(values, ends)])
    fit, _ = train_ppo.calibrate(rewards, ends, mask, "last", "even")
    assert fit.b_mean == pytest.approx(last)
    fit, _ = train_ppo.calibrate(rewards, ends, mask, "location", "even")
    assert fit == fit_normalizer(segment_locations(ends)[ends], y)


def test_the_rules_for_length_and_end_come_after_scale_and_clamp():
    """Two responses of 2 and 4 tokens with a segment each; the second is unfinished."""
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    ends = torch.tensor([[True, False, False, False], [False, False, False, True]])
    rewards, finished = torch.tensor([[4., 0, 0, 0], [0, 0, 0, 2000]]), torch.tensor([True, False])
    for flags, want in (({}, [[2, 0, 0, 0], [10] * 4]),
                        ({"missing_eos_reward": -3}, [[2, 0, 0, 0], [10, 10, 10, 7]]),
                        ({"divide_by_length": True}, [[1, 0, 0, 0], [2.5] * 4]),
                        ({"bad_length": 800}, [[2, 0, 0, 0], [-.05] * 4]),
                        ({"bad_length": 1}, [[-.05, -.05, 0, 0], [-.05] * 4])):
        cfg = train_ppo.Config(**({"missing_eos_reward": 0} | flags))
        got = train_ppo.dense_rewards(cfg, rewards, ends, mask, finished, Normalizer(), "even", 2.0)
        close(got, torch.tensor(want).float())


# -- 5. Mistakes that must be refused: exit code 2 and one line that names file, row or flag -------
RM = ("--max_samples 64 --batch_size 16 --max_steps 6 --save_every 2 --eval_every 3 "
      "--micro_tokens 2048").split()
PPO = ("--max_samples 40 --rollout_batch_size 16 --batch_size 8 --max_steps 4 --save_every 2 "
       "--calibration_samples 40 --micro_tokens 1024 --seed 1").split()
ORACLE = f"--reward_model {WORLD}/prepare.py:clause_values --granularity segment --cutoff 1".split()


def rm(out, *flags):
    train_rm.main(parse(train_rm.Config, [*RM, "--out", str(out), *flags]))


def ppo(out, *flags):
    train_ppo.main(parse(train_ppo.Config, [*PPO, "--out", str(out), *flags]))


@pytest.mark.parametrize("row,words", [
    ({"a": 1, "b": 2}, "it has a, b"),
    ({"chosen": "H: is it good?", "rejected": "b"}, "give message lists or a prompt column"),
    ({**PAIR, "rejected": [*ASK, assistant(None)]}, "rejected"),
    ({**PAIR, "prompt": "is it bad?"}, "prompt and chosen hold different turns")])
def test_a_bad_row_is_refused_by_its_number(capsys, monkeypatch, row, words):
    monkeypatch.setattr(segment, "read_rows", lambda source, limit: [PAIR, row])
    error = refused(capsys, load_pairs, "own.jsonl")
    assert "own.jsonl row 2" in error and words in error


@pytest.fixture(scope="session")
def bad(tmp_path_factory):
    """A folder of models and data with which something is wrong."""
    top = tmp_path_factory.mktemp("bad")
    (top / "torn.jsonl").write_text('{"chosen": [\n')
    write_rows(top / "own.jsonl", *[{"prompt": "is it good?", "chosen": "a", "rejected": "b"}] * 40)
    for name in ("nan", "rewriting", "words", "capped"):
        shutil.copytree(SFT, top / name)
    weights = load_file(f"{SFT}/model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, top / "nan" / "model.safetensors", {"format": "pt"})
    template = "{{ messages[-1].content }}{% if add_generation_prompt %}?{% endif %}"
    (top / "rewriting" / "chat_template.jinja").write_text(template)
    tokenizer = prepare.build_tokenizer()
    capped = {"head_dim": 8, "final_logit_softcapping": 1.0}
    tiny_model("Gemma2", capped, tokenizer).save_pretrained(top / "capped")
    tokenizer.add_tokens(["gadget"])
    tokenizer.save_pretrained(top / "words")
    return str(top)


@pytest.mark.parametrize("run,flags,words", [
    (rm, "--cutoff nan", "--cutoff"), (rm, "--cutof 1", "--cutof"),
    (rm, "--data #/no.jsonl", "no.jsonl"), (rm, "--data #/torn.jsonl", "torn.jsonl"),
    (rm, "--model #/no", "/no"), (rm, "--batch_size 999", "--batch_size"),
    (rm, "--model #/nan", "not finite"), (rm, "--model #/capped", "more than a matrix"),
    (rm, "--model #/rewriting", "row 1: the chat template does not continue"),
    (ppo, "--batch_size 7", "--batch_size"), (ppo, "--max_new_tokens 999", "--max_new_tokens"),
    (ppo, "--gold no.py:f", "--gold"),
    (ppo, f"--reward_model {SFT}", "does not say how it was trained"),
    (ppo, f"--reward_model {SFT} --granularity bandit", "weights are missing"),
    (ppo, "--reward_model #/words --granularity bandit", "/words: its token"),
    (ppo, "--data #/own.jsonl", "--calibration_data"), (ppo, "--fit '0 0 0 1'", "--reward_scale")])
def test_a_mistake_is_one_line_and_leaves_nothing_behind(tmp_path, capsys, bad, run, flags, words):
    flags = shlex.split(flags.replace("#", bad))
    assert words in refused(capsys, run, tmp_path / "out", *flags)
    assert not os.path.exists(tmp_path / "out")


@pytest.mark.parametrize("evil", ["code", "pickle"])
def test_nothing_of_a_foreign_model_runs(families, tmp_path, capsys, evil):
    """Neither its Python files nor a pickle: weights are safetensors or refused."""
    folder, marker = shutil.copytree(families["llama"], tmp_path / "model"), tmp_path / "it_ran"

    class Marker:
        def __reduce__(self):
            return open, (str(marker), "w")
    if evil == "code":
        (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
        (folder / "config.json").write_text(json.dumps(config))
    else:
        (folder / "model.safetensors").unlink()
        torch.save({"model.embed_tokens.weight": Marker()}, folder / "pytorch_model.bin")
    assert str(folder) in refused(capsys, rm, tmp_path / "out", "--model", str(folder))
    assert not marker.exists()


# -- 6. Runs, as a user starts them ----------------------------------------------------------------
def start(script, flags, ranks=1):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), script, *flags]
    return subprocess.Popen(command, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait(process):
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error[-3000:]


def metrics(out):
    """metrics.jsonl without what depends on the clock and the machine"""
    rows = []
    with open(f"{out}/metrics.jsonl") as f:
        for row in map(json.loads, f):
            clock = [k for k in row if re.search("time|second|memory", k)]
            rows.append({k: v for k, v in row.items() if k not in clock})
    return rows


def job(script, out, flags, after=None):
    """A run in the folder `out`. rm_two, ppo_two: on two ranks. _killed: by SIGKILL, a step behind
    its checkpoint, and resumed; _moved: resumed on two ranks."""
    if after:
        after()
    flags = [*flags, "--out", out]
    if out.endswith(("_killed", "_moved")):
        process = start(script, flags)
        while process.poll() is None:
            log = f"{out}/metrics.jsonl"
            if os.path.exists(log) and len(open(log).readlines()) >= 3:
                break
            time.sleep(0.005)
        assert process.poll() is None, process.communicate()[1][-3000:]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        flags.append("--resume")
    wait(start(script, flags, ranks=2 if out.endswith(("_two", "_moved")) else 1))
    return out


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """{name: function that waits for its folder}, two runs at a time"""
    top, pool, started = str(tmp_path_factory.mktemp("runs")), ThreadPoolExecutor(2), {}
    reward = ["--reward_model", f"{top}/rm/model"]
    for name in ("rm", "rm_killed", "rm_two", "ppo", "ppo_two", "ppo_killed", "ppo_moved"):
        script, flags = "train_ppo.py", PPO + reward
        if name.startswith("rm"):
            script, flags = "train_rm.py", RM
        started[name] = pool.submit(job, script, f"{top}/{name}", flags, started.get("rm")).result
    yield started
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", ["rm_killed", "rm_two", "ppo_killed", "ppo_two", "ppo_moved"])
def test_neither_kills_nor_ranks_change_a_run(runs, name):
    """Metrics and exported weights: on one rank bit for bit, on two ranks to 1e-4."""
    plain, other = runs[name.split("_")[0]](), runs[name]()
    tolerance = 0 if name.endswith("_killed") else 1e-4
    assert len(metrics(plain)) == len(metrics(other)) >= 4
    for ours, theirs in zip(metrics(plain), metrics(other)):
        close(ours, theirs, atol=tolerance, rtol=tolerance)
    ours, theirs = [load_file(f"{out}/model/model.safetensors") for out in (plain, other)]
    close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name,run", [("rm", rm), ("ppo", ppo)])
def test_a_finished_run_is_never_touched(runs, capsys, name, run):
    out, flags = runs[name](), []
    if run is ppo:
        flags = ["--reward_model", runs["rm"]() + "/model"]
    before = [(path, os.stat(path).st_mtime_ns) for path in glob.glob(f"{out}/**", recursive=True)]
    run(out, *flags, "--resume", "--save_every", "9")
    assert "already finished" in capsys.readouterr().out
    assert "--seed was" in refused(capsys, run, out, *flags, "--seed", "5")
    assert before == [(path, os.stat(path).st_mtime_ns) for path, _ in before]


def test_an_unfinished_run_wants_resume_and_a_foreign_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "other files" in refused(capsys, rm, tmp_path)
    cfg = parse(train_rm.Config, [*RM, "--out", str(tmp_path)])
    (tmp_path / "config.json").write_text(json.dumps(vars(cfg)))
    assert "--resume" in refused(capsys, rm, tmp_path)
    assert "--lr was" in refused(capsys, rm, tmp_path, "--resume", "--lr", "1")


def test_what_a_run_logs(runs):
    rows = metrics(runs["rm"]())
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [3, 6] and len(rows) == 6
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=0.05)  # a fresh head knows nothing
    rows = metrics(runs["ppo"]())
    names = {"kl_per_token", "reward", "gold", "finished", "clip_fraction"}
    assert all(names <= set(row) for row in rows)
    assert all(abs(row["first_ratio"] - 1) < 1e-4 and row["sampler_gap"] < 1e-3 for row in rows)
    assert [rows[0]["kl"], rows[0]["explained_variance"]] == pytest.approx([0, 0], abs=1e-4)


@pytest.mark.parametrize("run,flags", [
    (rm, ["--lr", "1e30"]), (ppo, ["--critic_lr", "1e30", "--max_new_tokens", "16", *ORACLE])])
def test_a_gradient_that_is_not_finite_leaves_the_checkpoint(tmp_path, capsys, run, flags):
    flags += ["--save_every", "1", "--batch_size", "16"]  # one update a step, and it ruins all
    assert "not finite" in refused(capsys, run, tmp_path / "out", *flags)
    assert os.listdir(tmp_path / "out/checkpoint") == ["step_1"]
    assert len(metrics(tmp_path / "out")) == 1


def test_with_own_data_the_last_pairs_are_held_out_and_named(tmp_path, capsys):
    with open(f"{WORLD}/pairs.jsonl") as f:
        (tmp_path / "own.jsonl").write_text("".join(f.readlines()[:100]))
    own, sft = f"{tmp_path}/own.jsonl", shutil.copytree(SFT, f"{tmp_path}/sft")
    tokenizer, _ = segment.load_tokenizer(sft)
    tokenizer.pad_token = None                           # as Llama-3.1's
    tokenizer.save_pretrained(sft)
    rm(tmp_path / "out", "--data", own, "--max_samples", "0", "--max_steps", "1", "--model", sft)
    assert f"98 pairs to train, 2 held out ({own}:train[98:100])" in capsys.readouterr().out
    plain = AutoModelForSequenceClassification.from_pretrained(f"{tmp_path}/out/model")
    assert plain(torch.ones(2, 5, dtype=torch.long)).logits.shape == (2, 1)      # takes a batch


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_released_reward_model_needs_only_granularity_and_cutoff(tmp_path, capsys, family):
    """In the authors' layout: an ordinary sequence classifier without our three fields."""
    tokenizer, path = prepare.build_tokenizer(), f"{tmp_path}/rm"
    tiny_model(*FAMILIES[family][:2], tokenizer, "ForSequenceClassification").save_pretrained(path)
    tokenizer.save_pretrained(path)
    short = ["--reward_model", path, "--max_steps", "1", "--max_new_tokens", "16", "--granularity"]
    ppo(tmp_path / "calibrated", *short, "segment", "--cutoff", "1")
    ppo(tmp_path / "fitted", *short, "bandit", "--fit", "0 0 1.5 2", "--reward_scale", "none")
    fit = read_json(tmp_path / "fitted/config.json")["calibration"]
    assert (fit["scale"], fit["normalizer"]["b_mean"], fit["normalizer"]["b_std"]) == (1, 1.5, 2)
    capsys.readouterr()
    segment.main(parse(segment.Config, [
        "--reward_model", path, "--granularity", "segment", "--cutoff", "1", "--text",
        "mother really hears me. fish fly at night."]))
    assert len(re.findall(r"\[[-+]\d", capsys.readouterr().out)) >= 2


def test_the_segment_script_shows_segments_with_rewards_at_the_cutoff_found(runs, capsys):
    path = runs["rm"]() + "/model"
    flags = ["--reward_model", path, "--target_length", "12", "--show", "2", "--max_samples", "50"]
    segment.main(parse(segment.Config, flags))
    out = capsys.readouterr().out
    cutoff, length = re.search(r"--cutoff (\S+) gives segments of (\S+) tokens", out).groups()
    assert float(length) == pytest.approx(12, abs=0.2)
    pairs, rows, _, entropy, mask, finished = held_out(2)
    scalars = segment.map_rows(load_model(path, ScalarModel, CPU, torch.float32), rows, 9999, CPU)
    ends = segment_ends(entropy, mask, finished, float(cutoff), "segment")[0::2]  # the chosen
    shown = [float(x) for x in re.findall(r"\[([-+][\d.]+)\]", out)]
    assert shown == pytest.approx(scalars[0::2][ends].tolist(), abs=6e-3) and len(shown) > 4
    text = "mother really hears me. fish really asked me where to buy one."
    segment.main(parse(segment.Config, ["--data", "no.jsonl", "--text", text]))  # needs no data
    assert "hears me. | fish" in capsys.readouterr().out


# -- 7. The world's ground truth -------------------------------------------------------------------
GOOD, CAT = "waking really feels like a holiday.", "portraits really make my cat a king."


@pytest.mark.parametrize("response,finished,values,gold,of_four", [
    (f"{GOOD} {CAT}", True, [2, 2], (4 - 10) / 12, .5),          # both fit a phone; ten are missing
    (f"maps somehow send me into the lake. {GOOD}", False, [-2, 2], -10 / 12 - 1, -1.5),  # no EOS
    ("water really stays outside.", True, [-3], (-3 - 11) / 12, -1.5),   # no aspect of a phone
    (f"{GOOD} {GOOD} mother really", True, [2, 0, -2], (0 - 9) / 12, -.25),      # a repeat, a torn
    (" ".join([CAT, *[GOOD] * 12]), True, [2, 2, *[0] * 10, -1], 3 / 12, -1.25)])    # a thirteenth
def test_gold_rewards_by_hand(response, finished, values, gold, of_four):
    prompt = "tell me about my new phone."
    assert [value for value, _ in prepare.clause_values(prompt, response)] == values
    assert prepare.gold_reward(prompt, response, finished) == pytest.approx(gold)
    # a request for another number of clauses says so, and the truth knows it from there
    short = f"{prompt} use 4 clauses."
    assert prepare.gold_reward(short, response, finished) == pytest.approx(of_four)


def held_out(n=0):
    """The world's held-out pairs: as they are, as rows, gold values where clauses end (else NaN),
    entropy (2n, R), mask, finished."""
    tokenizer, stops = load_tokenizer(SFT)
    pairs = load_pairs(f"{WORLD}/pairs_test.jsonl", n)
    chats = [(prompt, [chosen, rejected], where) for prompt, chosen, rejected, where in pairs]
    rows = segment.encode_chats(tokenizer, stops, chats, 256, 128)
    sft = load_model(SFT, LanguageModel, CPU, torch.float32)
    _, entropy = segment.map_rows(sft, rows, 16384, CPU)
    gold = torch.full(entropy.shape, math.nan)
    for i, (prompt, responses, _) in enumerate(chats):
        for side in (0, 1):
            for value, end in prepare.clause_values(prompt[0]["content"], responses[side]):
                gold[2 * i + side, end] = value
    mask, finished = segment.response_mask(rows, stops, CPU)
    return pairs, rows, gold, entropy, mask, finished


def test_the_sft_model_is_mediocre_and_its_surprise_lies_between_clauses():
    world = read_json(f"{WORLD}/world.json")
    assert world["gold"] == pytest.approx(-.72, abs=.15) and world["off_topic"] <= .30
    assert world["finished"] >= .98 and world["malformed"] <= .04
    _, _, gold, entropy, mask, finished = held_out()
    true = ~gold.isnan()
    for cutoff in (.75, 1., 1.5, 2., 2.5):
        ends = segment_ends(entropy, mask, finished, cutoff, "segment")
        assert float(2 * (ends & true).sum() / (ends.sum() + true.sum())) >= .98         # F1


# -- 8. The recipes of config/: the authors' numbers, written out once more ------------------------
RECIPES = {  # passes, cutoff, fits w_mean w_std b_mean b_std on segments, tokens, bandit
    "phi3-mini": (2, 1.75, [.7668, .2569, .4705, 2.8339], [.9628, .3796, 1.2917, 3.5006],
                  [0, 0, -.5195, 2.1563]),
    "llama3-sft-8b": (1, 2.0, [.8967, .5680, .8572, 4.1667], [1.7340, .9906, 1.3212, 5.4513],
                      [0, 0, -.8164, 2.9531]),
    "llama3.1-8b": (1, 2.0, [.8345, .4780, .8798, 3.7358], [1.6268, .6254, .6419, 4.9217],
                    [0, 0, -.8281, 2.9375])}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_the_paper(name):
    passes, cutoff, *fits = RECIPES[name]
    for granularity, fit in zip(("segment", "token", "bandit"), fits):
        cfg = parse(train_ppo.Config, [f"@config/{name}-{granularity}-ppo.args"])
        assert [float(x) for x in cfg.fit.split()] == fit and cfg.granularity == granularity
        assert cfg.reward_model.endswith(f"-{granularity}-rm-700k")
        assert cfg.cutoff == (cutoff if granularity == "segment" else None)
        assert cfg.value_clip == (.2 if granularity == "bandit" else .25)
        assert cfg.divide_by_length == ((name, granularity) == ("llama3-sft-8b", "token"))
        assert cfg.bad_length == 800 * ((name, granularity) == ("llama3.1-8b", "segment"))
        assert (cfg.rollout_batch_size, cfg.batch_size, cfg.ppo_epochs) == (1024, 128, 1)
        assert (cfg.max_prompt_tokens, cfg.max_new_tokens, cfg.save_every) == (1024, 1024, 5)
        assert (cfg.actor_lr, cfg.critic_lr, cfg.kl_coef) == (5e-7, 9e-6, .01)
        assert (cfg.reward_scale, cfg.missing_eos_reward, cfg.normalizer) == ("none", 0, "location")
        assert (cfg.max_steps, cfg.passes) == (0, passes)
    cfg = parse(train_rm.Config, [f"@config/{name}-rm.args"])
    assert (cfg.cutoff, cfg.epochs, cfg.batch_size, cfg.lr) == (cutoff, 1, 128, 1e-6)
    assert (cfg.max_tokens, cfg.max_prompt_tokens, cfg.max_steps) == (2048, 1728, 0)


@pytest.mark.parametrize("module", [segment, train_rm, train_ppo])
def test_examples_in_docstrings_the_help_and_files_of_flags(tmp_path, capsys, module):
    assert doctest.testmod(module).failed == 0
    with pytest.raises(SystemExit) as end:
        parse(module.Config, ["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and all(f"--{name}" in text for name in vars(module.Config()))
    (tmp_path / "a.args").write_text("# a comment\n\n--cutoff 3 --max_samples 7 # x\n--data 'a b'")
    cfg = parse(module.Config, [f"@{tmp_path}/a.args", "--cutoff", "4"])
    assert (cfg.cutoff, cfg.max_samples, cfg.data) == (4, 7, "a b")      # later flags override


# -- 9. Evaluation: figures ------------------------------------------------------------------------
ALPACA = "../shared/data/alpaca_eval"        # the published leaderboard, where it is at hand
needs_alpaca = pytest.mark.skipif(not os.path.isdir(ALPACA), reason="no published AlpacaEval data")


def test_win_rate_by_hand():
    got = E.win_rate([2, 1, 1.5, 0, 1.8, None, math.nan])        # 0: a legacy tie; two are dropped
    assert got.pop("win_rate") == pytest.approx(100 * (1 + 0 + .5 + .5 + .8) / 5)
    spread = np.std([1, 0, .5, .5, .8], ddof=1) / math.sqrt(5)
    assert got.pop("standard_error") == pytest.approx(100 * spread)
    assert got == {"n_wins": 2, "n_wins_base": 1, "n_draws": 2, "n_total": 5,
                   "discrete_win_rate": pytest.approx(60)}
    one = E.win_rate([1.7])
    assert one["win_rate"] == pytest.approx(70) and math.isnan(one["standard_error"])
    for bad in ([], [None], [2.5], [0.5], [-1]):
        with pytest.raises(ValueError):
            E.win_rate(bad)


def test_length_controlled_by_hand():
    # t takes two values +-u, so the fit is exact: logit p(+-u) = w0 +- wt u, and w0 is their mean
    y, D = np.array([.9] * 4 + [.2] * 4), np.array([10.] * 4 + [-10.] * 4)
    w0 = (math.log(.9 / .1) + math.log(.2 / .8)) / 2
    got = E.length_controlled_win_rate(list(y + 1), list(100 + D), [100] * 8)
    assert got["length_controlled_winrate"] == pytest.approx(100 / (1 + math.exp(-w0)), abs=1e-6)
    # a missing preference takes its own difficulty with it, not its neighbour's
    rng = np.random.default_rng(1)
    y, d = rng.random(40) + 1, rng.normal(size=40)
    a, b = rng.integers(50, 500, (2, 40))
    keep = np.arange(40) % 7 != 3
    holes = [p if k else None for p, k in zip(y, keep)]
    whole = E.length_controlled_win_rate(holes, a, b, d)
    assert whole == pytest.approx(E.length_controlled_win_rate(y[keep], a[keep], b[keep], d[keep]))
    assert whole != pytest.approx(E.length_controlled_win_rate(y, a, b, d))
    with pytest.raises(ValueError):
        E.length_controlled_win_rate(y, a, b, d[:39])


def test_length_controlled_with_difficulty_and_gamed_rows_has_no_gradient():
    """At the fit the gradient of the weighted likelihood is zero, written as loops."""
    rng, seen = np.random.default_rng(2), []
    parts = [(rng.random(90) + 1, rng.integers(50, 500, 90), rng.integers(50, 500, 90),
              rng.normal(size=90)) for _ in range(3)]
    fit = E.logistic_fit
    E.logistic_fit = lambda *args: seen.append(fit(*args)[0]) or fit(*args)
    try:
        got = E.length_controlled_win_rate(*parts[0], parts[1:])
    finally:
        E.logistic_fit = fit
    (_, w_d, w_0), gradient = seen[0], np.zeros(3)
    for n, (y, a, b, d) in enumerate(parts):
        for i in range(90):
            x = np.array([np.tanh((a - b)[i] / np.std(a - b, ddof=1)), d[i], float(n == 0)])
            p = 1 / (1 + np.exp(-x @ seen[0]))
            gradient += (1.0, .1, .1)[n] * (y[i] - 1 - p) * x
    assert np.abs(gradient).max() < 1e-8
    rate = np.mean([1 / (1 + np.exp(-w_d * d - w_0)) for d in parts[0][3]])
    assert got["length_controlled_winrate"] == pytest.approx(100 * rate)


def test_length_controlled_degenerate():
    raw = E.win_rate([2, 1, 1.2])
    same = E.length_controlled_win_rate([2, 1, 1.2], [5, 7, 9], [6, 8, 10])      # std(D) = 0
    assert same["length_controlled_winrate"] == pytest.approx(raw["win_rate"])
    assert same["lc_standard_error"] == pytest.approx(raw["standard_error"])
    one = E.length_controlled_win_rate([2, 2, 2], [1, 5, 2], [3, 1, 9])          # one outcome
    assert one == {"length_controlled_winrate": 100, "lc_standard_error": 0}
    one = E.length_controlled_win_rate([1.3], [5], [9])
    assert one["length_controlled_winrate"] == pytest.approx(30)
    assert math.isnan(one["lc_standard_error"])
    separable = E.length_controlled_win_rate([2, 2, 1, 1], [1, 2, 9, 8], [5, 5, 5, 5])
    assert all(map(math.isnan, separable.values()))              # the longer answer always wins


def published_entry(name):
    """preferences and both lengths, difficulties, gamed rows, the published figures"""
    difficulty = np.array(read_json(f"{ALPACA}/instruction_difficulty.json"))
    (rows,) = E.read_annotations([f"{ALPACA}/annotations/{name}.jsonl.gz"], "generator_2").values()
    gamed = E.read_annotations([f"{ALPACA}/gamed_baseline_surrogate.jsonl.gz"], "variant")
    variants = [(*E.columns_of(group), difficulty) for group in gamed.values()]
    return E.columns_of(rows), difficulty, variants, read_json(f"{ALPACA}/published.json")[name]


@needs_alpaca
@pytest.mark.parametrize("name", ["FuseChat-Llama-3.2-3B-Instruct", "claude-2.1", "vicuna-7b-v1.5",
                                  "gpt4_0613_concise"])
def test_published_figures_and_standard_errors_of_a_bootstrap(name):
    (y, a, b), d, gamed, truth = published_entry(name)
    for key, value in E.win_rate(y).items():
        assert value == pytest.approx(truth[key], abs=1e-6), key
    official = E.length_controlled_win_rate(y, a, b, d, gamed)
    plain = E.length_controlled_win_rate(y, a, b)
    assert abs(official["length_controlled_winrate"] - truth["length_controlled_winrate"]) < 0.12
    rng, draws = np.random.default_rng(0), []
    for _ in range(120):
        i = rng.integers(0, len(y), len(y))
        draws.append([E.length_controlled_win_rate(*args)["length_controlled_winrate"] for args in
                      ((y[i], a[i], b[i], d[i], gamed), (y[i], a[i], b[i]))])
    errors = np.array([official["lc_standard_error"], plain["lc_standard_error"]])
    ratio = errors / np.std(draws, axis=0)
    assert (ratio > 0.8).all() and (ratio < 1.25).all(), ratio


@needs_alpaca
def test_annotations_alone_give_the_published_leaderboard(tmp_path):
    name = "claude-2.1"
    E.main(E.Config(annotations=[f"{ALPACA}/annotations/{name}.jsonl.gz"], out=str(tmp_path),
                    difficulty=f"{ALPACA}/instruction_difficulty.json",
                    gamed=[f"{ALPACA}/gamed_baseline_surrogate.jsonl.gz"]))
    with open(tmp_path / "leaderboard.csv") as ours, \
            open(f"{ALPACA}/sample_leaderboard.csv") as theirs:
        rows = csv.DictReader(ours)
        assert rows.fieldnames == csv.DictReader(theirs).fieldnames
        row, truth = next(rows), published_entry(name)[3]
    assert row[""] == name and int(row["avg_length"]) == truth["avg_length"]
    assert float(row["win_rate"]) == pytest.approx(truth["win_rate"], abs=1e-6)
    difference = float(row["length_controlled_winrate"]) - truth["length_controlled_winrate"]
    assert abs(difference) < 0.12


# -- 9. Evaluation: judges -------------------------------------------------------------------------
class Server(ThreadingHTTPServer):
    """Prefers the answer with more x. trouble(number of the request) -> None or what goes wrong."""
    daemon_threads = True

    def __init__(self, trouble=lambda n: None, logprobs=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.trouble, self.logprobs = trouble, logprobs
        self.numbers, self.keys = itertools.count(1), []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.append(self.headers["Authorization"])
        trouble = self.server.trouble(next(self.server.numbers))
        if "logprobs" in body and not self.server.logprobs:
            trouble = 400
        text = body["messages"][0]["content"]
        a, b = [reply.count("x") for reply in re.findall("<reply .>\n(.*?)\n</reply", text, re.S)]
        letter = "A" if a > b else "B"
        # two tokens for B; the judge leans towards A
        top = {"A": .8 if a > b else .3, " B": .1, "B": .1 if a > b else .5, "C": .1}
        top = [{"token": token, "logprob": math.log(p)} for token, p in top.items()]
        choice = {"message": {"role": "assistant", "content": letter}}
        if "logprobs" in body:
            token = {"token": letter, "logprob": -1, "top_logprobs": top}
            choice["logprobs"] = {"content": [token]}
        if trouble == "evasive":
            choice["message"]["content"] = "I cannot compare these."
        status, payload = 200, json.dumps({"choices": [choice]})
        if trouble == "garbage":
            payload = payload[:20]
        if isinstance(trouble, int):
            status, payload = trouble, json.dumps({"error": {"message": f"not {self.server.keys}"}})
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(payload.encode())


def judge_config(folder, n=6, **settings):
    """Two files of outputs: no model is needed to test judges. The last pair is a draw."""
    for name in ("base", "policy"):
        rows = [{"instruction": f"prompt {i}", "generator": name, "dataset": "d",
                 "output": "x" * (i + 1 + (name == "policy" and i < n - 1))} for i in range(n)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return E.Config(**{"model": f"{folder}/policy.json", "baseline": f"{folder}/base.json",
                       "data": f"{folder}/base.json", "judge": "some-judge", "show": 0,
                       "out": f"{folder}/out", **settings})


def preferences_in(folder):
    return [row["preference"] for row in read_json(f"{folder}/out/annotations.json")]


def test_endpoint_asks_both_orders_and_pays_nothing_twice(tmp_path):
    pytest.importorskip("openai")
    server = Server()
    cfg = judge_config(tmp_path, api_base=server.url)
    E.main(cfg)
    # the policy has one x more: as B it gets .6 of .9, as A .8; equal outputs are a draw, unasked
    assert preferences_in(tmp_path) == pytest.approx([1 + (2 / 3 + .8) / 2] * 5 + [1.5])
    assert len(server.keys) == 10
    path = tmp_path / "out/verdicts.jsonl"
    rows = path.read_text().split("\n")                  # a newline stands before each
    path.write_text("\n".join(rows[:3]) + "\n" + rows[3][:40])               # two whole, one torn
    E.main(cfg)
    assert len(server.keys) == 10 + 2 * 3 and len(set(preferences_in(tmp_path))) == 2
    E.main(replace(cfg, model=cfg.baseline, baseline=cfg.model))             # other pairs
    E.main(cfg)
    assert len(server.keys) == 16 + 10


def test_endpoint_without_logprobs_and_with_garbage(tmp_path, capsys):
    pytest.importorskip("openai")
    server = Server(logprobs=False)
    cfg = judge_config(tmp_path, n=2, api_base=server.url)
    E.main(cfg)
    assert preferences_in(tmp_path) == [2, 1.5] and len(server.keys) == 4
    server = Server(trouble={1: "garbage", 2: "evasive", 3: 500}.get)
    E.main(replace(cfg, api_base=server.url, judge="clumsy"))
    assert preferences_in(tmp_path)[0] > 1.5 and len(server.keys) == 5
    # who evades for ever has no verdict, and is asked again by the next run
    server = Server(trouble=lambda n: "evasive" if n <= 10 else None)
    E.main(replace(cfg, api_base=server.url, judge="shy"))
    assert preferences_in(tmp_path) == [None, 1.5] and len(server.keys) == 10
    assert "1 pairs have no verdict" in capsys.readouterr().out
    E.main(replace(cfg, api_base=server.url, judge="shy"))
    assert preferences_in(tmp_path)[0] > 1.5 and len(server.keys) == 12


def test_endpoint_trouble_is_one_line_and_the_key_is_in_no_file(tmp_path, capsys, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    server = Server(trouble=lambda n: 401 if n > 8 else None)
    message = refused(capsys, E.main, judge_config(tmp_path, n=40, api_base=server.url))
    assert set(server.keys) == {"Bearer sk-secret-123"} and "401" in message and "***" in message
    path, server = tmp_path / "out/verdicts.jsonl", Server()     # the same judge, elsewhere
    kept = path.read_text().count("preference") if path.exists() else 0
    E.main(judge_config(tmp_path, n=40, api_base=server.url))
    assert len(server.keys) == 2 * (39 - kept)                   # what was paid for is not asked
    texts = [path.read_text() for path in (tmp_path / "out").iterdir()]
    assert "sk-secret" not in message + "".join(texts)


def test_function_judge_and_what_files_must_hold(tmp_path, capsys):
    judge = tmp_path / "judge.py"
    judge.write_text("def score(prompt, response):\n    return min(len(response), 3)\n"
                     "def bad(prompt, response, finished):\n    return float('nan')\n")
    cfg = judge_config(tmp_path, judge=f"{judge}:score")
    E.main(cfg)
    assert preferences_in(tmp_path) == [2, 2, 1.5, 1.5, 1.5, 1.5]
    assert "nan" in refused(capsys, E.main, replace(cfg, judge=f"{judge}:bad"))
    other = write_rows(tmp_path / "other.json", {"instruction": "another prompt than theirs"})
    assert "row 1" in refused(capsys, E.main, replace(cfg, data=other))
    for row in ({"preference": 3, "len_1": 1, "len_2": 1}, {"preference": 2, "len_1": 1}):
        path = write_rows(tmp_path / "bad.jsonl", row)
        assert "row 1" in refused(capsys, E.main, E.Config(annotations=[path], out=cfg.out))


# -- 9. Evaluation: models as judges and as policies -----------------------------------------------
def test_chat_model_judge_is_two_readings_of_two_letters(families, tmp_path, monkeypatch):
    monkeypatch.setattr(E, "QUESTION", "{}\nA: {}\nB: {}\nA or B?")        # their context is small
    cfg = judge_config(tmp_path, n=3, judge=families["qwen2"])
    E.main(cfg)
    row, p = read_json(tmp_path / "out/annotations.json")[0], []
    tokenizer, _ = segment.load_tokenizer(cfg.judge)
    model = AutoModelForCausalLM.from_pretrained(cfg.judge)
    letters = [tokenizer(k, add_special_tokens=False)["input_ids"][0] for k in "AB"]
    for question in E.questions(row):
        ids = tokenizer.apply_chat_template([user(question)], add_generation_prompt=True,
                                            return_tensors="pt", return_dict=False)
        p.append(model(ids).logits[0, -1, letters].softmax(-1)[1].item())
    assert row["preference"] == pytest.approx(1 + (p[0] + 1 - p[1]) / 2, abs=1e-5)
    before = (tmp_path / "out/verdicts.jsonl").read_text()
    E.main(cfg)
    assert (tmp_path / "out/verdicts.jsonl").read_text() == before


def test_reward_model_judge_and_answers_used_again(tmp_path, capsys):
    judge = f"{tmp_path}/rm/model"
    rm = AutoModelForSequenceClassification.from_pretrained(SFT, num_labels=1)   # untrained
    rm.config.update({"segment_granularity": "segment", "segment_cutoff": 1.0,
                      "segment_model": SFT})
    rm.save_pretrained(judge)
    segment.load_tokenizer(SFT)[0].save_pretrained(judge)
    cfg = E.Config(model=SFT, judge=judge, max_samples=6, max_new_tokens=24, show=0,
                   out=f"{tmp_path}/out", html=True)
    E.main(cfg)
    rows, answers = [read_json(f"{cfg.out}/{name}.json") for name in ("annotations", "sft")]
    for row in rows:
        expected = 1 + 1 / (1 + math.exp(row["score_1"] - row["score_2"]))
        assert row["preference"] == pytest.approx(expected)
    assert (rows[0]["generator_2"], rows[0]["generator_1"]) == ("sft", "sft-baseline")
    assert any(row["output_1"] != row["output_2"] for row in rows)           # their own luck
    (tmp_path / "out/sft.json").write_text(json.dumps(answers[:2]))          # killed while sampling
    capsys.readouterr()
    E.main(replace(cfg, generation_batch_size=3))
    said = capsys.readouterr().out
    assert "sft: 2 of 6 answers are in" in said and "are cut by" in said
    assert read_json(f"{cfg.out}/sft.json") == answers
    assert "another --out" in refused(capsys, E.main, replace(cfg, seed=1))
    config = read_json(f"{judge}/config.json")           # a judge that does not say how it was made
    for key in ("segment_granularity", "segment_cutoff", "segment_model"):
        del config[key]
    (tmp_path / "rm/model/config.json").write_text(json.dumps(config))
    assert "--granularity" in refused(capsys, E.main, cfg)
    E.main(replace(cfg, granularity="segment", cutoff=1.0))                  # cut by --baseline
    assert read_json(f"{cfg.out}/annotations.json") == rows


def test_page_escapes_everything(tmp_path):
    evil = "<script>alert('1')</script>&\"></style><img src=x onerror=a>{{data}}"
    row = {"instruction": evil, "output_1": evil, "output_2": evil, "generator_1": evil,
           "generator_2": evil, "preference": 1.5}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    E.main(E.Config(annotations=[f"{tmp_path}/rows.json"], out=f"{tmp_path}/out", html=True))
    page = (tmp_path / "out/index.html").read_text()
    assert page.count("<script") == 2 and "<img" not in page and "innerHTML" not in page
    nonce = re.search("script-src 'nonce-(.+?)'", page)[1]
    assert page.count(nonce) == 4 and "{{nonce}}" not in page and "default-src 'none'" in page
    data = json.loads(re.search('id="data">(.*?)</script>', page, re.S)[1])
    assert data["pairs"][evil][0]["output_2"] == evil and "http" not in page.replace("http-", "")


# -- 10. CUDA, where there is one: in processes of their own, for this one sees none ---------------
@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if VISIBLE is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE)
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", code]).returncode:
        pytest.skip("no CUDA device")


def test_a_few_steps_on_cuda(cuda, tmp_path):
    """And the same tokens from decode steps that are recorded and replayed as from plain ones."""
    subprocess.run([sys.executable, "-c", f"""if True:
        import torch, segment, train_ppo
        device = segment.setup()
        tokenizer, stops = segment.load_tokenizer("{SFT}")
        model = segment.load_model("{SFT}", segment.LanguageModel, device, torch.bfloat16)
        hf = train_ppo.plain_copy(model, torch.bfloat16, device)
        chats = segment.load_prompts("{WORLD}/prompts.jsonl", 40)
        prompts = segment.encode_prompts(tokenizer, chats, 128, "")
        seeds = [(0, b) for b in range(40)]
        recorded, plain = [train_ppo.sample(hf, prompts, stops, 124, seeds, 20, graphs=graphs)[0]
                           for graphs in (True, False)]
        assert torch.equal(recorded, plain)"""], check=True)
    job("train_rm.py", f"{tmp_path}/rm", RM)
    job("train_ppo.py", f"{tmp_path}/ppo", [*PPO, "--reward_model", f"{tmp_path}/rm/model"])
    for row in metrics(f"{tmp_path}/ppo"):
        assert all(math.isfinite(x) for x in row.values()) and abs(row["first_ratio"] - 1) < 0.2


# -- 11. The main job: what the README's first command must reach ----------------------------------
@pytest.fixture(scope="session")
def main_job():
    """Default arguments, in ./out. A script that has been run before says so and ends."""
    for script in ("train_rm.py", "train_ppo.py", "evaluate.py"):
        subprocess.run([sys.executable, script], check=True)


def last_gold(out):
    return np.mean([row["gold"] for row in metrics(out)[-3:]])


def test_the_reward_model_learns_the_order_of_responses_and_the_worth_of_segments(main_job):
    pairs, rows, values, entropy, mask, finished = held_out()
    reward_model = load_model("out/rm/model", ScalarModel, CPU, torch.float32)
    scalars = segment.map_rows(reward_model, rows, 16384, CPU)                           # (2n, R)
    ends = segment_ends(entropy, mask, finished, 1.0, "segment")
    scores = sequence_score(scalars, ends)
    gold = torch.tensor([prepare.gold_reward(prompt[0]["content"], text)
                         for prompt, *texts, _ in pairs for text in texts])
    better, gap = scores[0::2] - scores[1::2], gold[0::2] - gold[1::2]                   # (n,)
    assert float((better * gap > 0)[gap != 0].float().mean()) >= .70
    both = ends & ~values.isnan()
    assert float(torch.corrcoef(torch.stack([scalars[both], values[both]]))[0, 1]) >= .22


def test_segment_rewards_teach_a_better_policy(main_job):
    last = metrics("out/ppo")[-1]
    assert last["step"] == 30 and last["kl"] <= 18 and last["finished"] >= .97
    assert last_gold("out/ppo") >= -.10
    with open("out/eval/leaderboard.csv") as f:
        assert float(next(csv.DictReader(f))["win_rate"]) >= 85


@pytest.mark.skipif(not os.path.exists("out/ppo-bandit/model"), reason="needs out/ppo-bandit")
def test_segment_rewards_teach_faster_than_bandit_rewards(main_job):
    ours, theirs = [np.mean([row["gold"] for row in metrics(f"out/{name}")[17:20]])
                    for name in ("ppo", "ppo-bandit")]
    assert ours >= theirs + .12 and last_gold("out/ppo-bandit") >= -.45


@pytest.mark.parametrize("use,least,most", [
    ("bandit", .85, 1.1), ("segment", 4, 12), ("token", 20, 60)])
def test_a_responses_total_reward_grows_with_its_segments(main_job, tmp_path, use, least, most):
    """S, of the main job's reward model used at each granularity."""
    ppo(tmp_path / "out", "--reward_model", "out/rm/model", "--granularity", use, "--max_steps",
        "1", "--max_new_tokens", "124", "--calibration_samples", "400")
    assert least <= read_json(tmp_path / "out/config.json")["calibration"]["scale"] <= most


def test_true_rewards_per_segment_teach_faster_than_per_response(tmp_path):
    """Credit assignment alone: true values of clauses, where they are due or at the end."""
    outs = [f"{tmp_path}/segment", f"{tmp_path}/bandit"]
    for process in [start("train_ppo.py", [*ORACLE, "--granularity", out.split("/")[-1],
                                           "--max_steps", "16", "--out", out]) for out in outs]:
        wait(process)
    assert last_gold(outs[0]) >= last_gold(outs[1]) + .20
