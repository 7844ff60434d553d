"""Chapter 5: what each function means, said by comparison.    pytest test_all.py

1. functions         4. data              7. runs: killed, on two ranks   10. evaluation
2. models            5. sampling          8. the world             11. CUDA
3. chat encoding     6. PPO, mistakes     9. recipes, settings            12. the main job
"""
import doctest
import fcntl
import gc
import glob
import gzip
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")        # two runs at a time, a thread each
os.environ["HF_HUB_OFFLINE"] = "1"                   # nothing here may reach the network
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")     # only the tests of CUDA see a GPU
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.chdir(os.path.dirname(os.path.abspath(__file__)))
sys.path.append("data/reviews")                      # prepare.py

import datasets
import numpy as np
import pandas
import prepare
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.nn.utils.rnn import pad_sequence
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          GenerationConfig, PreTrainedTokenizerFast)

import evaluate as E
import segment
import train_ppo
import train_rm
from segment import (LanguageModel, encode_chats, encode_prompts, load_model, load_pairs,
                     load_prompts, load_tokenizer, map_rows, micro_batches, pad, parse,
                     segment_ends, segment_locations, sequence_score)
from train_ppo import Critic, Normalizer, fit_normalizer, generate
from train_rm import ScalarModel

CPU, FP32, WORLD = torch.device("cpu"), torch.float32, "data/reviews"
SFT = f"{WORLD}/sft"
close = torch.testing.assert_close


@pytest.fixture(scope="session", autouse=True)
def world():
    """The embedded world, made once; a process group of one for what runs in this process."""
    prepare.main(prepare.parse([]))
    segment.setup()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(got, want, tolerance=3e-4):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def refused(capsys, f, *args):
    """The line on stderr of an f(*args) that must end with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        f(*args)
    error = capsys.readouterr().err
    assert end.value.code == 2 and re.fullmatch("error: .*\n", error), error
    return error


def read_json(path):
    with open(path) as f:
        return json.load(f)


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# -- 1. Functions against loops and closed forms ---------------------------------------------------
# 38 responses: of each length from 1 to 19 one that is finished and one that is not
LENGTHS, FINISHED = torch.arange(38) // 2 + 1, torch.arange(38) % 2 == 0
MASK = torch.arange(19) < LENGTHS[:, None]


@pytest.mark.parametrize("granularity", ["segment", "token", "bandit"])
def test_segments_locations_and_scores_are_those_of_a_loop_over_tokens(granularity):
    entropy, values = (4 * randn(38, 19, seed=1)).round(), randn(38, 19, seed=2)
    ends = segment_ends(entropy, MASK, FINISHED, 2.0, granularity)
    for b, length in enumerate(LENGTHS):
        # the end-of-turn token belongs to no segment, unless it is all there is
        content = range(length - int(FINISHED[b] and length > 1))
        want = {"segment": [r for r in content if entropy[b, r] > 2 or r == content[-1]],
                "token": list(content), "bandit": [length - 1]}[granularity]
        assert [r for r in range(19) if ends[b, r]] == want
        near(segment_locations(ends)[b, want], np.arange(1, len(want) + 1) / len(want))
        near(sequence_score(values, ends)[b], values[b, want].mean())


def test_rewards_of_tokens_by_hand():
    """Segments of one and three tokens, an EOS; 2,000 in one token, unfinished. Rules come last."""
    ends = torch.tensor([[1, 0, 0, 1, 0], [1, 0, 0, 0, 0]]).bool()
    mask, finished = MASK[[8, 1], :5], FINISHED[[8, 1]]
    rewards = torch.tensor([[8., 9, 9, 6, 9], [2000.] * 5])
    for how, first in (("repeat", [8, 6, 6, 6, 0]), ("end", [8, 0, 0, 6, 0]),
                       ("even", [8, 2, 2, 2, 0])):
        near(train_ppo.spread_rewards(rewards, ends, mask, how), [first, [2000, 0, 0, 0, 0]])
    for rules, first, last in (({"divide_by_length": True}, [.8, .2, .2, .2, 0], 10 - 3),
                               ({"bad_length": 5}, [4, 1, 1, 1, 0], -.05),
                               ({"bad_length": 4}, [-.05] * 5, -.05)):
        cfg = train_ppo.Config(missing_eos_reward=-3, **rules)
        near(train_ppo.dense_rewards(cfg, rewards, ends, mask, finished, Normalizer(), "even", 2.0),
             [first, [last, 0, 0, 0, 0]])


def test_a_normalizer_recovers_the_lines_that_rewards_were_made_from():
    p = np.arange(1, 13).repeat(2) / 12
    y = 0.7 * np.log(p) + 0.5 + (0.25 * np.log(p) + 2.8) * np.tile([-1, 1], 12)
    near(astuple(fit_normalizer(p, torch.tensor(y))), [0.7, 0.25, 0.5, 2.8, 1 / 12, 1])
    y[4:6] += 1000                                       # least squares would follow this pool
    near(fit_normalizer(p, y).w_mean, 0.7, 0.1)
    # .7 and .8 alone have no deviation; one location (a bandit's) has no slope
    near(fit_normalizer([.5, .5, 1, 1, .7, .8], [1., 3, 7, 13, 6, 6]).std([.5, 1]), [1, 3])
    near(astuple(fit_normalizer([1] * 5, [1., 2, 3, 4, 5]))[:4], [0, 0, 3, math.sqrt(2)])
    fit = Normalizer(w_mean=1, w_std=1, b_mean=0, b_std=2, p_min=.05)
    near(fit.mean([1e-9, 2]), [math.log(.05), 0])        # p is clamped
    near(fit.std(.05), .2)                               # 2 + log .05 < 0: a tenth of b_std instead
    for y in ([3, 3], [1, math.nan]):                    # they do not vary, or are no numbers
        with pytest.raises(ValueError):
            fit_normalizer([1, 1], y)


def test_huber_line_is_that_of_scikit_learn():
    """HuberRegressor(alpha=0), where least squares gives .429, 1.75"""
    y = np.array([1, 0, 3, 2, 5, 4, 20, -9])
    near(train_ppo.huber_line(np.arange(8), y), [.74094, .64766])


def test_bradley_terry_and_the_learning_rate_by_hand():
    near(train_rm.bradley_terry(torch.tensor(3.0), torch.tensor(1.0)), math.log1p(math.exp(-2)))
    rates = [train_rm.learning_rate(step, 103) for step in (0, 1, 2, 3, 53, 102)]
    near(rates, [1 / 3, 2 / 3, 1, 1, .55, .1], 1e-3)


def test_micro_batches_hold_every_row_once_longest_first():
    assert list(map(list, micro_batches([3, 9, 2, 8, 5, 9, 1], 3))) == [[1, 5, 3], [4, 0, 2], [6]]


# -- 2. What models say about tokens ---------------------------------------------------------------
def test_logprobs_entropy_and_their_gradients_are_those_of_softmax(monkeypatch):
    inputs = randn(50, 16, seed=0).requires_grad_(), randn(300, 16, seed=1).requires_grad_()
    targets, weights = torch.arange(0, 300, 6), randn(2, 50, seed=2)
    spy = mock.Mock(wraps=segment.logprobs_and_entropy)
    monkeypatch.setattr(segment, "logprobs_and_entropy", spy)
    p = (inputs[0] @ inputs[1].T).softmax(1)
    both = (torch.stack([p[range(50), targets].log(), torch.special.entr(p).sum(1)]),
            torch.stack(segment.token_logprobs_and_entropy(*inputs, targets, chunk=7)))
    near(*torch.stack(both).detach())
    for x, y in zip(*[torch.autograd.grad((weights * each).sum(), inputs) for each in both]):
        near(x, y)
    assert spy.call_count == 2 * 8           # never (N, V): the backward pass computes each again
    assert spy(*[x.bfloat16() for x in inputs], targets)[1].dtype == FP32


def byte_tokenizer(**more):
    """A token a byte"""
    tokens = [*prepare.SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(dict(zip(tokens, range(262))), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing("<bos> $A", "$A $B", [("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>",
                                   extra_special_tokens=list(prepare.SPECIALS), **more)


def tiny_model(folder, family, V=90, auto_class=AutoModelForCausalLM, **more):
    """A random model with V embeddings, in the folder"""
    sizes = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                 pad_token_id=2, num_labels=1, initializer_range=0.3)
    torch.manual_seed(len(family))
    auto_class.from_config(AutoConfig.for_model(family, **sizes | more)).save_pretrained(folder)
    return str(folder)


# Four families in small: grouped heads, BOS (Llama); a sliding window, a second end token (Phi-3);
# biases, no BOS (Qwen2); tied embeddings, mixed windows (Gemma 3)
TURNS = ("{% for m in messages %}{{ '<' + m.role + '>\n' + m.content + '<eos>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}")
PHI3_TURNS = ("<bos>{% for m in messages %}{{ '<' + m.role + '>\n' + m.content + '<system>\n' }}"
              "{% endfor %}{{ '<assistant>\n' if add_generation_prompt else '<eos>' }}")
FAMILIES = {  # name: (chat template, stop tokens, more of the config)
    "llama": ("<bos>" + TURNS, [2], {}),
    "phi3": (PHI3_TURNS, [2, 5], {"sliding_window": 12}),
    "qwen2": ("<user>\nplease be honest.<eos>\n" + TURNS, [2], {}),
    "gemma3_text": (TURNS, [2], {"sliding_window": 10, "head_dim": 8, "tie_word_embeddings": True,
                                 "layer_types": ["sliding_attention", "full_attention"]})}


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """{name: folder} of tiny random chat models; 3 of their embeddings are no token"""
    folders = {}
    for family, (template, stops, more) in FAMILIES.items():
        folder = tiny_model(tmp_path_factory.mktemp(family), family, 265, **more)
        byte_tokenizer(chat_template=template).save_pretrained(folder)
        GenerationConfig(eos_token_id=stops[-1]).save_pretrained(folder)
        folders[family] = folder
    return folders


def random_tokens(B=5):
    """B rows (prompt ids, response ids)"""
    draw = np.random.default_rng(B).integers
    return [(draw(6, 90, P), draw(6, 90, R)) for P, R in draw(1, (9, 40), (B, 2))]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_models_read_each_row_as_if_it_were_alone_and_are_saved_whole(families, tmp_path, family):
    """In a padded batch, against a plain forward of each row. The index rule: r's log-prob and
    value at P + r - 1; its reward, and the entropy after it, at P + r."""
    lm = load_model(families[family], LanguageModel, CPU, FP32)
    rm = load_model(families[family], ScalarModel, CPU, FP32, head_std=0.2)
    critic = load_model(families[family], Critic, CPU, FP32, head_std=0.2)
    hf = AutoModelForCausalLM.from_pretrained(families[family])
    rows = random_tokens()
    batch = pad(rows, CPU)
    got = torch.stack([*lm(*batch), rm(*batch), critic(*batch)])                 # (4, B, R)
    for b, (prompt, response) in enumerate(rows):
        P, R = len(prompt), len(response)
        row = torch.tensor([*prompt, *response])                                 # (T,)
        hidden = hf.model(row[None])[0][0]                                       # (T, d)
        scalars = hidden @ rm.hf.score.weight.full_tensor()[0]                   # (T,)
        logp = hf.lm_head(hidden).log_softmax(-1)                                # (T, V)
        near(got[:, b, :R], torch.stack([
            logp[range(P - 1, P + R - 1), row[P:]], torch.special.entr(logp.exp()).sum(1)[P:],
            scalars[P:], scalars[P - 1:-1]]))
    near(map_rows(lm, rows, 2, CPU), got[:2])            # several micro-batches, rows in order
    train_rm.export(lm, load_tokenizer(families[family])[0], f"{tmp_path}/model", FP32)
    near(load_model(f"{tmp_path}/model", LanguageModel, CPU, FP32)(*batch), got[:2])


def test_no_dropout_and_no_router_jitter_makes_a_model_random(tmp_path):
    noise = {"router_jitter_noise": 0.1, "attention_dropout": 0.1}
    model = load_model(tiny_model(tmp_path, "mixtral", **noise), LanguageModel, CPU, FP32)
    near(*model(*pad(random_tokens(B=1) * 2, CPU)).detach().unbind(1))


# -- 3. Chat encoding ------------------------------------------------------------------------------
ASK = [user("is it good?")]
TALK = [*ASK, assistant("rain killed it."), user("be honest.")]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_response_are_the_whole_conversation(families, family):
    tokenizer, stops = load_tokenizer(families[family])
    assert stops.tolist() == FAMILIES[family][1]         # of generation_config and tokenizer
    ((p, r),) = encode_chats(tokenizer, stops, [(TALK, ["fish fly."], "")], 256, 255)
    whole = tokenizer.apply_chat_template([*TALK, assistant("fish fly.")], return_dict=False)
    assert [*p, *r] == whole[:len(p) + len(r)]
    assert [*p] == [*encode_prompts(tokenizer, [TALK], 256, "")[0]]
    assert [t in stops for t in r].index(True) == len(r) - 1             # up to the first stop


def encode(tokenizer, template, prompt, response):
    """A prompt and its response under another chat template, encoded and decoded"""
    tokenizer.chat_template = template
    chats = [([user(prompt)], [response], "own.jsonl row 1")]
    return tokenizer.batch_decode(encode_chats(tokenizer, torch.tensor([2]), chats, 99, 64)[0])


def test_a_token_that_reaches_over_the_border_of_prompt_and_response_is_parted():
    template = "{% for m in messages %}{{ m.content + (' my', '<eos>')[loop.index0] }}{% endfor %}"
    assert encode(prepare.build_tokenizer(), template, "how", "cat") == ["how my", "cat <eos>"]


def test_a_space_that_a_tokenizer_puts_in_front_stands_before_the_conversation_alone():
    """As in Llama 2: the model has never seen a space between "]" and the answer."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([
        normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    template = ("[{{ messages[0].content }}]"
                "{% if messages[1] %}{{ messages[1].content }}<eos>{% endif %}")
    assert encode(tokenizer, template, "hi", "a hi") == ["▁[hi]", "a▁hi<eos>"]


@pytest.mark.parametrize("template,words", [
    ("{{ messages[-1].content }}{{ '?' if add_generation_prompt }}", "does not continue"),
    ("{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}", "<assistant>"),
    ("<user>{{ messages[0].content }}{% for m in messages[1:] %}<bos>{{ m.content }}<eos>"
     "{% endfor %}", "<bos>"),
    ("{% for m in messages %}{{ m.content }} night{% endfor %}", "eos_token_id")])
def test_a_template_whose_answers_the_policy_could_not_write_is_refused(capsys, template, words):
    """It changes its prompt; forgets the generation prompt; adds a special token; ends no turn."""
    assert words in refused(capsys, encode, byte_tokenizer(), template, "is it good?", "fish fly")


def test_what_is_too_long_loses_the_prompts_oldest_and_the_responses_newest(families, capsys):
    """Both sides of a pair see the same prompt, with its BOS, though the short side had room."""
    tokenizer, stops = load_tokenizer(families["llama"])
    chats = [([user("my phone")], ["good", "good phone " * 4], "")]
    rows = encode_chats(tokenizer, stops, chats, 50, 10)
    prompt = "<bos>phone<eos>\n<assistant>\n"
    assert [tokenizer.batch_decode(row) for row in rows] == [
        [prompt, "good<eos>"], [prompt, "good phone good phone good phone good ph"]]
    assert segment.response_mask(rows, stops, CPU)[1].tolist() == [True, False]      # finished?
    assert "prompts were cut to 10" in capsys.readouterr().out


def test_a_template_that_prints_the_date_gives_the_same_tokens_every_day():
    tokenizer = byte_tokenizer(chat_template="{{ date_string or strftime_now('%d %b %Y') }}")
    assert tokenizer.decode(encode_prompts(tokenizer, [TALK], 99, "")[0]) == "26 Jul 2024"


def test_texts_of_segments_join_to_the_whole_and_answers_end_before_the_stop_token():
    """Also where a character has several tokens, and where the stop token is not marked special."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|im_end|>"])
    ids = tokenizer.encode("Great 🎉 你好<|im_end|>")[1:]
    texts = segment.segment_texts(tokenizer, ids, [True] * len(ids))
    assert len(texts) == len(ids) and "".join(texts) == "Great 🎉 你好<|im_end|>"
    assert segment.answer_text(tokenizer, torch.tensor([2, ids[-1]]), ids) == "Great 🎉 你好"


def test_more_tokens_than_embeddings_are_refused(tmp_path, capsys):
    byte_tokenizer().save_pretrained(tiny_model(tmp_path, "llama", 261))
    assert "embeddings" in refused(capsys, load_tokenizer, str(tmp_path))


# -- 4. Data ---------------------------------------------------------------------------------------
GOOD, ANGRY = [assistant("good.")], [assistant("angry.")]
PAIR = {"chosen": ASK + GOOD, "rejected": ASK + ANGRY}
TEXTS = {"prompt": "is it good?", "chosen": "good.", "rejected": "angry."}


def test_csv_parquet_and_every_layout_of_jsonl_read_alike(tmp_path):
    """tmp_path holds "csv" as this function's name does, and that is no ending."""
    for n, row in enumerate((PAIR, TEXTS, {"prompt": ASK, "chosen": GOOD, "rejected": ANGRY},
                             {"instruction": "is it good?", "system": None, "input": "", **PAIR})):
        write_rows(tmp_path / f"pairs[{n}].jsonl", row)
    write_rows(tmp_path / "pairs1.jsonl", PAIR, PAIR)    # pairs[1].jsonl is no pattern for it
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(json.dumps(PAIR).encode()))
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\nis it good?,good.,angry.\n")
    datasets.Dataset.from_list([PAIR]).to_parquet(tmp_path / "pairs.parquet")
    for path in map(str, tmp_path.glob("pairs[[.]*")):   # all but pairs1.jsonl
        assert load_pairs(path) == [(ASK, "good.", "angry.", f"{path} row 1")]


def test_a_prompt_that_its_answers_repeat_stands_once(tmp_path):
    """The assistant begins, behind a system message that the answers leave out."""
    prompt = [{"role": "system", "content": "be honest."}, assistant("hello!"), *ASK]
    row = {"prompt": prompt, "chosen": prompt[1:] + GOOD, "rejected": prompt[1:] + ANGRY}
    ((*pair, _),) = load_pairs(write_rows(tmp_path / "own.jsonl", row))
    assert pair == [prompt, "good.", "angry."]


def test_slices_name_parts_and_pairs_that_teach_nothing_are_counted(tmp_path, capsys):
    path = write_rows(tmp_path / "odd.jsonl", PAIR, PAIR | {"rejected": PAIR["chosen"]},
                      TEXTS | {"chosen": " \n"}, PAIR | {"chosen": TALK + GOOD})
    assert load_prompts(f"{path}:train[75%:]") == [TALK]
    assert len(load_pairs(path)) == 1 and "dropped 3" in capsys.readouterr().out


def test_pairs_of_equal_tokens_and_of_held_out_prompts_are_dropped_and_counted(capsys):
    pairs = [(TALK, "fly", "fish", ""), (ASK, "fish ", "fish", ""), (ASK, "fly", "fish", "")]
    known = load_tokenizer(SFT)
    held_out = train_rm.encode_pairs(*known, pairs[2:], train_rm.Config())
    assert len(train_rm.encode_pairs(*known, pairs, train_rm.Config(), held_out)) == 2
    assert "dropped 2 of 3 pairs" in capsys.readouterr().out


@pytest.mark.parametrize("row,words", [
    ({"chosen": "H: is it good?", "rejected": "b"}, "message lists"),
    (PAIR | {"rejected": ASK + [assistant(None)]}, "text"),
    (PAIR | {"rejected": ASK + [GOOD[0] | {"tool_calls": [{"id": 1}]}]}, "tool calls"),
    (PAIR | {"prompt": "is it bad?"}, "other turns"),
    (TEXTS | {"input": "it broke."}, "lost"), (TEXTS | {"system": "be honest."}, "lost")])
def test_a_row_that_would_lose_something_is_refused_by_its_number(tmp_path, capsys, row, words):
    error = refused(capsys, load_pairs, write_rows(tmp_path / "own.jsonl", PAIR, row))
    assert "own.jsonl row 2" in error and words in error


@pytest.mark.parametrize("name", ["no.csv", "no.json.gz", "/no/folder"])
def test_a_missing_file_is_one_line_at_once(capsys, monkeypatch, name):
    monkeypatch.setattr(datasets, "load_dataset", None)          # nobody asks the hub
    assert f"{name}: no such file" in refused(capsys, load_pairs, f"{name}:train[:9]")


# -- 5. Sampling -----------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_has_its_teacher_forced_logprobs_and_depends_on_its_seed_alone(families, family):
    """A twentieth of the vocabulary stops: the CPU looks several times, and finds some to leave."""
    model = load_model(families[family], LanguageModel, CPU, FP32)
    hf, stops = train_ppo.plain_copy(model, FP32, CPU), torch.arange(6, 265, 20)
    prompts, seeds = [p for p, _ in random_tokens(B=9)], [(3, b) for b in range(9)]
    tokenizer, _ = load_tokenizer(families[family])
    banned = train_ppo.banned_tokens(tokenizer, stops, 265)                      # (V,)
    tokens, logprobs, lengths = generate(hf, prompts, stops, 40, seeds, banned=banned)
    stopped = torch.isin(tokens, stops)                                          # (B, R)
    assert lengths.equal(torch.where(stopped.any(1), stopped.int().argmax(1) + 1, 40))
    mask = torch.arange(40) < lengths[:, None]                                   # (B, R)
    want, _ = model(*pad(list(zip(prompts, tokens.numpy())), CPU))               # (B, R)
    near(logprobs, want * mask)
    other = train_ppo.sample(hf, tokenizer, prompts[::-1], stops, 40, seeds[::-1], 4)
    assert other[0].flip(0).equal(tokens * mask)         # in other order and company
    greedy = generate(hf, prompts[:1], stops, 40, seeds, temperature=0)[0][0]
    want = hf.generate(torch.tensor(prompts[0][None]), do_sample=False, max_new_tokens=40,
                       eos_token_id=stops.tolist())[0, len(prompts[0]):]
    assert greedy[:len(want)].equal(want)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_samples_follow_the_softmax_and_hold_no_banned_token(tmp_path, temperature):
    """Chi-square on the first token of 3,000 responses to one prompt"""
    folder = tiny_model(tmp_path, "llama", 265, initializer_range=0.1)
    hf, stops = AutoModelForCausalLM.from_pretrained(folder), torch.tensor([999])
    prompts, seeds = [np.array([9, 8])] * 3000, list(zip(range(3000)))
    banned = train_ppo.banned_tokens(byte_tokenizer(), torch.tensor([2]), 265)
    tokens = generate(hf, prompts, stops, 1, seeds, temperature, banned)[0]
    count = torch.bincount(tokens[:, 0], minlength=265)[~banned]                 # (257,)
    expected = 3000 * (hf(torch.tensor([[9, 8]])).logits[0, -1, ~banned] / temperature).softmax(0)
    chi2 = ((count - expected) ** 2 / expected).sum()
    assert count.sum() == 3000 and len(count) == 257 and chi2 < 256 + 4 * math.sqrt(2 * 256)
    hf.model.norm.weight.zero_()                 # now every token is as likely as any other,
    tokens = generate(hf, prompts[:9], stops, 40, seeds)[0]
    for later in (1, 16):                        # and each step has new luck
        assert (tokens[:, later:] == tokens[:, :-later]).float().mean() < 0.1


# -- 6. PPO's pieces -------------------------------------------------------------------------------
def test_gae_is_the_double_sum():
    """The sum over k >= t of (gamma lam)^(k - t) delta_k; nothing is behind the last token."""
    rewards, values = randn(2, 38, 19, seed=5)                   # garbage on padding, too
    advantages, returns = train_ppo.gae(rewards, values, MASK, 0.9, 0.8)
    values, t = values * MASK, torch.arange(19)
    delta = (rewards - values) * MASK
    delta[:, :-1] += 0.9 * values[:, 1:]
    want = delta @ (0.72 ** (t - t[:, None])).triu().T * MASK
    near(advantages, want)
    near(returns, want + values)


def test_whitening_and_losses_of_valid_tokens():
    new, old, x, y = randn(4, 38, 19, seed=7) * 0.5              # garbage on padding, too
    white = (x - x[MASK].mean()) / x[MASK].std(correction=0)
    near(train_ppo.whiten(x, MASK), torch.where(MASK, white, 0))
    q = (new - old).exp()
    gain = x * torch.where(x > 0, q.clamp(max=1.2), q.clamp(min=0.8))
    near(train_ppo.policy_loss(new, old, x, MASK, 0.2)[0], -(gain * MASK).sum(1) / LENGTHS)
    far = torch.maximum((new - y).abs(), (old + (new - old).clamp(-.25, .25) - y).abs())
    near(train_ppo.value_loss(new, old, y, MASK, 0.25), (far ** 2 * MASK).sum(1) / LENGTHS / 2)


def test_calibrate_fits_what_was_asked_and_S_is_the_deviation_of_a_responses_total():
    """By hand: the totals are -2, 2, -1, 1 by location; -3, 3, -2, 2 globally, over sqrt(3)."""
    ends = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 0]]).bool()
    rewards = torch.tensor([[2., 1], [4, 5], [1, 9], [5, 9]])
    for kind, variance, S2 in (("location", 4, 2.5), ("global", 3, 6.5 / 3), ("last", 4, 6.5 / 4)):
        fit, S = train_ppo.calibrate(rewards, ends, ends, kind, "even")
        near([fit.b_mean, fit.b_std ** 2, S ** 2], [3, variance, S2])


def test_in_the_same_batches_bf16_gives_the_same_numbers(tmp_path, monkeypatch):
    """The ratio of the first minibatch is 1 exactly: what map_rows scored in given batches is what
    a training step computes. On any CPU, the numbers shall depend on the batch as on a GPU."""
    plain = LanguageModel.forward
    monkeypatch.setattr(LanguageModel, "forward", lambda model, ids, *lens: (
        plain(model, ids, *lens) + 1e-3 * ids.numel()))
    folder = tiny_model(tmp_path, "llama", hidden_size=256)
    actor = load_model(folder, LanguageModel, CPU, torch.bfloat16, train=True)
    rows, batches = random_tokens(B=24), micro_batches(range(24), 4)
    scored, _ = map_rows(actor, rows, 4, CPU, batches)                           # (B, R)
    for batch in batches:
        logprobs, _ = actor(*pad([rows[b] for b in batch], CPU))                 # (b, r)
        assert logprobs.equal(scored[batch, :logprobs.shape[1]])
    assert not scored.equal(map_rows(actor, rows, 7, CPU)[0])                    # others round


# -- 5. Mistakes: exit code 2, one line that names the file, the row or the flag, and no OUT -------
ROOT, PAIRS = os.getcwd(), "data/reviews/pairs.jsonl"
ORACLE = " --reward_model data/reviews/prepare.py:segment_values --cutoff 1 "
SMALL = {
    train_rm: "--max_samples 80 --held_out 16 --batch_size 16 --max_steps 6 --save_every 2",
    train_ppo: "--max_samples 40 --rollout_batch_size 16 --batch_size 8 --max_steps 4 "
               "--save_every 2 --seed 1",
    E: ""}
MODELS = """
capped   Gemma2 ForCausalLM {"head_dim": 8, "final_logit_softcapping": 1.0}
longrope Phi3   ForCausalLM {"original_max_position_embeddings": 16, "rope_scaling":
    {"type": "longrope", "short_factor": [1.0, 1, 1, 1], "long_factor": [2.0, 2, 2, 2]}}
yarn     Llama  ForCausalLM {"rope_parameters": {"original_max_position_embeddings": 16,
    "rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}}
llama3   Llama  ForCausalLM {"rope_parameters": {"original_max_position_embeddings": 16,
    "rope_type": "llama3", "factor": 4.0, "rope_theta": 10000.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0}}
phi3     Phi3   ForSequenceClassification {"sliding_window": 12}
llama    Llama  ForSequenceClassification {}
"""


def random_model(name, more, V, kind):
    """By the name of its class, with 3 embeddings that are no token"""
    config = getattr(transformers, name + "Config")(
        vocab_size=V + 3, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, num_labels=1,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=2, **more)
    torch.manual_seed(len(name))
    return getattr(transformers, name + kind)(config)


PICTURES = """{"model_type": "gemma3", "eos_token_id": 2, "text_config": {"hidden_size": 32,
"num_hidden_layers": 1}, "vision_config": {"hidden_size": 32, "num_hidden_layers": 1,
"num_attention_heads": 2, "image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4}"""


@pytest.fixture(scope="session")
def bad(tmp_path_factory):
    """A folder of models and data, most of which must be refused."""
    top, tokenizer = tmp_path_factory.mktemp("bad"), prepare.build_tokenizer()
    (top / "torn.jsonl").write_text('{"chosen": [\n')
    write_rows(top / "own.jsonl", {"prompt": "is it good?", "chosen": "good", "rejected": "me"})
    sft = Path(SFT, "config.json").read_text()
    for folder, file, text in (
            ("nan", "config.json", sft.replace("1e-06", "NaN")),
            ("dull", "config.json", sft.replace("1e-06", "Infinity")),   # all that it says is 0
            ("pictures", "config.json", PICTURES),
            ("code", "config.json", '{"model_type": "evil", "auto_map": {"AutoConfig": "a.B"}}'),
            ("pickle", "pytorch_model.bin", "cbuiltins\nopen\n(S'it_ran'\nS'w'\ntR."),
            ("foreign/checkpoint", "thesis.tex", "years of work"),
            ("rewriting", "chat_template.jinja", "{{ messages[-1].content }}"
             "{% if add_generation_prompt %}?{% endif %}")):
        shutil.copytree(SFT, top / folder)
        (top / folder / file).write_text(text)
    (top / "code/a.py").write_text("open('it_ran', 'w')")
    (top / "pickle/model.safetensors").unlink()
    for line in MODELS.strip().replace("\n  ", "").splitlines():
        folder, name, kind, more = line.split(maxsplit=3)
        random_model(name, json.loads(more), len(tokenizer), kind).save_pretrained(top / folder)
        tokenizer.save_pretrained(top / folder)
    shutil.copytree(top / "llama", top / "words")
    tokenizer.add_tokens(["gadget"])
    tokenizer.save_pretrained(top / "words")
    return top


@pytest.fixture
def here(tmp_path, monkeypatch, bad):
    """An empty folder to work in, but for the world and the folder `bad`."""
    (tmp_path / "data").symlink_to(f"{ROOT}/data")
    (tmp_path / "bad").symlink_to(bad)
    monkeypatch.chdir(tmp_path)


def go(script, flags, out="out"):
    """A small run in this process"""
    flags = f"--out {out} {SMALL[script]} {flags}"
    script.main(parse(script.Config, shlex.split(flags)))


MISTAKES = """
train_rm --cutoff nan | --cutoff
train_rm --cutof 1 | --cutof
train_rm --data bad/no.jsonl | bad/no.jsonl: no such file
train_rm --data bad/torn.jsonl | bad/torn.jsonl
train_rm --data bad/own.jsonl | bad/own.jsonl: 0 pairs
train_rm --batch_size 999 | --batch_size 999
train_rm --max_prompt_tokens 256 | --max_prompt_tokens
train_rm --max_tokens 999 | the context of data/reviews/sft
train_rm --model bad/no | bad/no: no model there
train_rm --model bad/code | bad/code: no model there
train_rm --model bad/pickle | bad/pickle
train_rm --model bad/nan | not finite
train_rm --model bad/capped | more than a matrix
train_rm --model bad/pictures | bad/pictures: not supported
train_rm --model bad/longrope | bad/longrope
train_rm --model bad/rewriting | row 65: the chat template
train_rm --out bad/foreign | another --out
train_rm --out bad/own.jsonl/out | --out bad/own.jsonl/out
train_rm --wandb project | --wandb
train_ppo --batch_size 7 | --batch_size 7
train_ppo --data bad/own.jsonl | --rollout_batch_size 16
train_ppo --reward_model bad/no.py:f | bad/no.py:f
train_ppo --reward_model bad/llama | --trained_granularity
train_ppo --reward_model bad/llama --trained_granularity segment | --cutoff
train_ppo --reward_model bad/llama --trained_granularity token --granularity segment | --cutoff
train_ppo --reward_model bad/llama --trained_granularity token | --calibration_data
train_ppo --reward_model bad/words --trained_granularity token | its tokens are not
train_ppo --reward_model data/reviews/sft --trained_granularity token | data/reviews/sft
evaluate --data bad/own.jsonl | --judge
evaluate --judge bad/no.py:f | bad/no.py:f
evaluate --model bad/no --baseline bad/no | bad/no: no model there
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines())
def test_a_mistake_is_one_line_and_leaves_nothing_behind(here, capsys, monkeypatch, mistake):
    """No OUT, and nothing that a model's own code or a pickle writes."""
    monkeypatch.setitem(sys.modules, "wandb", None)      # as if it were not installed
    command, words = mistake.split(" | ")
    script, flags = command.split(maxsplit=1)
    assert words in refused(capsys, go, sys.modules[script], flags)
    assert sorted(os.listdir()) == ["bad", "data"]


# -- 6. Runs: killed, resumed, on two ranks --------------------------------------------------------
def job(script, out, flags=""):
    """A run as a user starts it. *_two: on two ranks. *_killed: by SIGKILL a step behind the first
    checkpoint, then once more."""
    command = [sys.executable, f"{script}.py", "--out", out, *shlex.split(flags)]
    if "_killed" in out:
        process, log = subprocess.Popen(command, cwd=ROOT), Path(out, "metrics.jsonl")
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
            time.sleep(.005)
        process.kill()
        assert process.wait() < 0                        # it was still running
    if "_two" in out:
        command[1:1] = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    ended = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return out


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """{name: function that waits for its folder}, two runs at a time"""
    top, pool = tmp_path_factory.mktemp("runs"), ThreadPoolExecutor(2)
    rm = job("train_rm", f"{top}/rm", SMALL[train_rm])
    flags = {"rm": SMALL[train_rm], "ppo": f"{SMALL[train_ppo]} --reward_model {rm}/model",
             "segment": ORACLE + "--max_steps 16",
             "bandit": ORACLE + "--max_steps 16 --granularity bandit"}
    started = {}
    for name in "rm rm_killed rm_two ppo ppo_two ppo_killed segment bandit".split():
        kind = name.split("_")[0]
        script = "train_rm" if kind == "rm" else "train_ppo"
        started[name] = pool.submit(job, script, f"{top}/{name}", flags[kind]).result
    yield started
    pool.shutdown(cancel_futures=True)


def metrics(out):
    """metrics.jsonl without what depends on the clock and the machine; it must be JSON."""
    rows = []
    for line in open(f"{out}/metrics.jsonl"):
        row = json.loads(line, parse_constant=pytest.fail)
        rows.append({k: v for k, v in row.items() if not re.search("time|second|memory", k)})
    return rows


def result(out):
    return metrics(out), load_file(f"{out}/model/model.safetensors")


@pytest.mark.parametrize("name", ["rm_killed", "rm_two", "ppo_killed", "ppo_two"])
def test_neither_kills_nor_ranks_change_a_run(runs, name):
    """Metrics and exported weights: on one rank bit for bit, on two ranks to 1e-4."""
    tolerance = 1e-4 if "_two" in name else 0
    plain, other = runs[name.split("_")[0]](), runs[name]()
    close(result(other), result(plain), atol=tolerance, rtol=tolerance)
    assert len(metrics(plain)) >= 4


def test_a_run_goes_on_from_what_lies_there_at_any_moment(here, monkeypatch):
    """Before each renaming, and in the middle of each removal of a folder."""
    flags = "--max_steps 2 --save_every 1 --batch_size 4 --max_samples 24 --granularity bandit"
    moments = itertools.count()

    def watched(function, path, *args, **kwargs):
        copy = f"moment_{next(moments)}"
        if str(path).startswith("out"):
            shutil.copytree("out", copy)
        if function is rmtree:
            for file in glob.glob(f"{copy}{str(path)[3:]}/**/*.*", recursive=True)[:1]:
                os.remove(file)
        return function(path, *args, **kwargs)
    rmtree = shutil.rmtree
    with monkeypatch.context() as patch:
        for module, name in (os, "replace"), (os, "rename"), (shutil, "rmtree"):
            patch.setattr(module, name, partial(watched, getattr(module, name)))
        go(train_rm, flags)
    for folder in sorted(glob.glob("moment_*")):
        go(train_rm, flags, folder)
        close(result(folder), result("out"), atol=0, rtol=0)


def test_a_finished_run_is_never_touched(runs, capsys):
    out, flags = runs["ppo"](), f"--reward_model {runs['rm']()}/model"
    before = {path: os.stat(path).st_mtime_ns for path in glob.glob(f"{out}/**", recursive=True)}
    go(train_ppo, flags + " --save_every 9 --micro_batch_size 4", out)   # these may differ
    assert "already finished" in capsys.readouterr().out
    assert "--lam was" in refused(capsys, go, train_ppo, flags + " --lam 1", out)
    assert before == {path: os.stat(path).st_mtime_ns for path in before}


@pytest.mark.parametrize("script,flags", [
    (train_rm, "--lr 1e30"), (train_ppo, ORACLE + "--fit '0 0 0 1' --critic_lr 1e30")])
def test_a_gradient_that_is_not_finite_leaves_the_checkpoint(here, capsys, script, flags):
    flags += " --save_every 1 --batch_size 16"           # one update a step, and it ruins all
    assert "not finite" in refused(capsys, go, script, flags)
    gc.collect()
    with open("out/metrics.jsonl", "a") as log:          # as a process that is still at work
        fcntl.flock(log, fcntl.LOCK_EX)
        assert "in use" in refused(capsys, go, script, flags)
    assert os.listdir("out/checkpoint") == ["step_1"] and len(metrics("out")) == 1


def test_what_runs_log(runs, here):
    rows = metrics(runs["rm"]())
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [2, 4, 6]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=.05)        # the head knows nothing
    for row in metrics(runs["ppo"]()):
        assert row["first_ratio"] == 1 and row["sampler_gap"] < 1e-3 and row["finished"] > .5
    go(train_ppo, ORACLE + "--fit '0 0 0 1' --max_new_tokens 1 --max_steps 1")
    assert metrics("out")[0]["response_length"] == 1     # JSON, where no entropy is left


def test_held_out_prompts_are_not_trained_on_and_a_tie_counts_half(here, capsys):
    """Of 30 pairs, 9 are held out; of the others 3 share their prompt, 2 have equal tokens."""
    rows = [{"prompt": prompt, "chosen": "it is good.", "rejected": "it is old."}
            for prompt in sorted({*prepare.all_prompts(12, held_out=False)})[:30]]
    for row in rows[7:10]:
        row["prompt"] = rows[-1]["prompt"]
    for row in rows[3:5]:
        row["chosen"] = "it is old ."
    write_rows(Path("own.jsonl"), *rows)
    go(train_rm, "--data own.jsonl --held_out 9 --model bad/dull --lr 0 --max_steps 1")
    assert "16 pairs to train, 9 held out" in capsys.readouterr().out
    assert metrics("out")[0]["eval_accuracy"] == .5
    source = read_json("out/model/config.json")["segment_held_out"]      # PPO calibrates on them
    assert os.path.isabs(source) and load_prompts(source) == load_prompts("own.jsonl")[-9:]


# -- 6. Runs: reward models at the three granularities ---------------------------------------------
def read(source, path):
    """Pairs as rows; what cuts them: entropies, mask, finished; the scalars of a reward model."""
    tokenizer, stops = load_tokenizer(SFT)
    chats = [(prompt, [chosen, rejected], "") for prompt, chosen, rejected, _ in load_pairs(source)]
    rows = segment.encode_chats(tokenizer, stops, chats, 256, 128)
    sft = load_model(SFT, LanguageModel, CPU, torch.float32)
    _, entropy = segment.map_rows(sft, rows, 16, CPU)
    scalars = segment.map_rows(load_model(path, ScalarModel, CPU, torch.float32), rows, 16, CPU)
    return rows, (entropy, *segment.response_mask(rows, stops, CPU)), scalars


def calibration(out="out"):
    fit = read_json(f"{out}/config.json")["calibration"]
    return [*fit["normalizer"].values()][:4], fit["scale"]       # w_mean, w_std, b_mean, b_std


def test_an_exported_bandit_model_scores_alike_in_its_own_class(here):
    """In a padded batch; EOS ends every turn and is the SFT model's pad token, as in ChatML."""
    go(train_rm, "--granularity bandit --max_steps 1")
    source = PAIRS + ":train[:8]"
    _, (_, mask, _), scalars = read(source, "out/model")
    want = scalars[range(16), mask.sum(1) - 1]
    whole = [[*prompt, assistant(chosen)] for prompt, chosen, *_ in load_pairs(source)]
    batch = load_tokenizer("out/model")[0].apply_chat_template(
        whole, padding=True, return_tensors="pt", return_dict=True)
    plain = AutoModelForSequenceClassification.from_pretrained("out/model")
    logits = plain(batch["input_ids"], batch["attention_mask"]).logits[:, 0]
    close(logits, want[0::2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_released_reward_model_is_read_as_its_flags_say(here, family):
    """In the authors' layout, without our fields: trained on segments and used as bandit it gives
    the mean over its segments, for which it is calibrated, not the scalar at the EOS."""
    source = PAIRS + ":train[-60:]"
    flags = f"--reward_model bad/{family} --trained_granularity segment --cutoff 1 --max_steps 1 " \
            f"--max_new_tokens 16 --calibration_data {source} --granularity"
    go(train_ppo, f"{flags} bandit")
    _, cuts, scalars = read(source, f"bad/{family}")
    scores = sequence_score(scalars, segment_ends(*cuts, 1.0, "segment"))
    line, scale = calibration()
    deviation, mean = [x.item() for x in torch.std_mean(scores, correction=0)]
    assert [*line, scale] == pytest.approx([0, 0, mean, deviation, 1], abs=1e-4)
    go(train_ppo, f"{flags} segment --fit '.1 0 1.5 2'", "fitted")
    assert calibration("fitted") == ([.1, 0, 1.5, 2], 1)         # published numbers: then S = 1


RULE = """import json
def length(prompt, segments):
    print(json.dumps([prompt, segments]), file=open("calls", "a"))
    return [len(text) for text in segments]
"""


@pytest.mark.parametrize("granularity,parts", [
    ("segment", r"[^.]+\.?"), ("token", r"\w+|\."), ("bandit", ".+")])
def test_a_rule_sees_the_prompt_and_the_texts_of_segments(here, granularity, parts):
    source = PAIRS + ":train[-60:]"
    Path("rule.py").write_text(RULE)
    go(train_ppo, f"--reward_model rule.py:length --granularity {granularity} --cutoff 1 "
       f"--max_steps 1 --max_new_tokens 16 --calibration_data {source}")
    calls, got, want = [*map(json.loads, open("calls"))], 0, 0
    for (prompt, texts), (messages, chosen, *_) in zip(calls[:120:2], load_pairs(source)):
        assert prompt == messages[0]["content"] and "".join(texts) == chosen
        got += len(texts)
        want += len(re.findall(parts, chosen))
    assert got == pytest.approx(want, rel=.03 * (granularity == "segment"))
    mean = np.mean([len("".join(texts)) / len(texts) for _, texts in calls[120:]])
    assert metrics("out")[0]["reward"] == pytest.approx(mean, rel=1e-4)


def test_ropes_without_a_cliff_are_used_beyond_their_original_context_and_world_values_named(
        here, capsys):
    for model in (SFT, "bad/yarn", "bad/llama3"):
        go(train_ppo, f"{ORACLE} --fit '0 0 0 1' --actor_lr 5e-7 --max_steps 1 --max_new_tokens 8 "
           f"--model {model}", model.replace("/", "-"))
    notes = [line for line in capsys.readouterr().out.splitlines() if "--critic_lr" in line]
    for words in ("9e-6", "--kl_coef", "--max_prompt_tokens", "--missing_eos_reward"):
        assert words in notes[0]
    assert len(notes) == 2 and "--actor_lr" not in notes[0] and "--max_new" not in notes[0]


# -- 7. The world's ground truth -------------------------------------------------------------------
REVIEWS = """
2 2 | -.5 .5 | waking really feels like a holiday. portraits really make my cat a king.
-3 | -1.1667 -1.5 | water really stays outside.
2 0 -2 | -.75 -.25 | lost really is a word i forgot. lost really is a word i forgot. mother hears
2 2 0 -2 -5 | -.8333 .25 | lost really is a word i forgot. lost somehow is a word i forgot. camera \
really takes pictures when you ask. fly. rain really killed it in one minute.
"""


@pytest.mark.parametrize("review", REVIEWS.strip().splitlines())
def test_the_truth_by_hand(review):
    """Values of the clauses of a phone's review; its gold if 12 clauses were asked for, or 4."""
    prompt, (values, golds, text) = "tell me about my phone.", review.split(" | ")
    values, golds = [[float(x) for x in part.split()] for part in (values, golds)]
    assert prepare.segment_values(prompt, re.findall(r"[^.]+\.?", text)) == values
    assert prepare.segment_values(prompt, [text[:9], text[9:]]) == [0, sum(values)]
    assert golds == pytest.approx([prepare.gold_reward(prompt, text), 1 + prepare.gold_reward(
        prompt + " use 4 clauses.", text, finished=False)], abs=1e-4)


def test_the_sft_model_is_mediocre_and_a_tenth_of_the_prompts_is_kept_for_tests():
    world = read_json("data/reviews/world.json")
    assert world["gold"] == pytest.approx(-.72, abs=.15) and world["finished"] >= .98
    pairs, train, tests = [[*map(str, load_prompts(f"data/reviews/{name}.jsonl"))]
                           for name in ("pairs", "prompts", "prompts_test")]
    assert not {*pairs[-400:], *tests} & {*pairs[:-400], *train}


# -- 8. The recipes of config/: the authors' numbers, written out once more ------------------------
PAPER = {"ppo": "--rollout_batch_size 1024 --batch_size 128 --max_steps 0 --max_prompt_tokens 1024 "
                "--max_new_tokens 1024 --actor_lr 5e-7 --critic_lr 9e-6 --kl_coef .01 "
                "--save_every 5 --reward_scale none --missing_eos_reward 0 --micro_batch_size 8 ",
         "rm": "--batch_size 128 --epochs 1 --lr 1e-6 --max_tokens 2048 --max_prompt_tokens 1728 "
               "--held_out 2000 --save_every 500 --micro_batch_size 8 "}
RECIPES = """
phi3-mini-segment-ppo --passes 2 --value_clip .25 --cutoff 1.75 --fit '.7668 .2569 .4705 2.8339'
phi3-mini-token-ppo --passes 2 --value_clip .25 --fit '.9628 .3796 1.2917 3.5006'
phi3-mini-bandit-ppo --passes 2 --fit '0 0 -.5195 2.1563'
phi3-mini-rm --cutoff 1.75
llama3-sft-8b-segment-ppo --value_clip .25 --cutoff 2 --fit '.8967 .5680 .8572 4.1667'
llama3-sft-8b-token-ppo --value_clip .25 --divide_by_length true --fit '1.7340 .9906 1.3212 5.4513'
llama3-sft-8b-bandit-ppo --fit '0 0 -.8164 2.9531'
llama3-sft-8b-rm --cutoff 2
llama3.1-8b-segment-ppo --value_clip .25 --cutoff 2 --bad_length 800 \
--fit '.8345 .4780 .8798 3.7358'
llama3.1-8b-token-ppo --value_clip .25 --fit '1.6268 .6254 .6419 4.9217'
llama3.1-8b-bandit-ppo --fit '0 0 -.8281 2.9375'
llama3.1-8b-rm --cutoff 2
"""


@pytest.mark.parametrize("recipe", RECIPES.strip().splitlines())
def test_recipes_of_the_paper(here, recipe):
    """Read from another folder: files that files name lie beside them."""
    name, flags = recipe.split(maxsplit=1)
    *_, granularity, kind = name.split("-")
    flags, Config = PAPER[kind] + flags, train_rm.Config
    if kind == "ppo":
        flags, Config = f"{flags} --trained_granularity {granularity}", train_ppo.Config
    got = vars(parse(Config, [f"@{ROOT}/config/{name}.args"]))
    want = vars(parse(Config, shlex.split(flags)))
    assert granularity in got.get("reward_model", name)
    for free in "model data out reward_model generation_batch_size grad_checkpoint".split():
        got[free] = want[free] = None
    assert got == want


@pytest.mark.parametrize("script", [segment, train_rm, train_ppo, E])
def test_examples_in_docstrings_the_help_and_files_of_flags(here, capsys, script):
    assert doctest.testmod(script).failed == 0
    with pytest.raises(SystemExit) as end:
        parse(script.Config, ["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and all(f"--{name}" in text for name in vars(script.Config()))
    Path("b.args").write_text("--max_samples 7 # x\n--data 'a b'")
    Path("a.args").write_text("# a comment\n\n--cutoff 3 @b.args")
    cfg = parse(script.Config, ["@a.args", "--cutoff", "4"])
    assert (cfg.cutoff, cfg.max_samples, cfg.data) == (4, 7, "a b")      # later flags override


# -- 9. Evaluation: figures ------------------------------------------------------------------------
ALPACA = f"{ROOT}/../shared/data/alpaca_eval"        # the published leaderboard, if at hand
BY_HAND = """[
[[1.9, 1.9, null, 1.2, 1.2], [110, 110, 7, 90, 90], [100, 100, 9, 100, 100], 60],
[[2, 1, 1.2], [5, 7, 9], [6, 8, 10], 40],
[[2, 2, 2], [1, 5, 2], [3, 1, 9], 100],
[[2, 2, 1, 1], [1, 2, 9, 8], [5, 5, 5, 5], NaN]]"""


def test_win_rates_by_hand():
    """Length-controlled: lengths that differ by +-10, where logit .9 and logit .2 lie as far from
    logit .6; by nothing; one outcome; the longer answer always wins."""
    got = E.win_rate([2, 1, 1.5, 0, 1.8, None, math.nan])        # 0: a legacy tie; two are dropped
    error = 100 * np.std([1, 0, .5, .5, .8], ddof=1) / math.sqrt(5)
    assert got == pytest.approx({"win_rate": 56, "standard_error": error, "n_wins": 2, "n_total": 5,
                                 "n_wins_base": 1, "n_draws": 2, "discrete_win_rate": 60})
    for bad in ([], [None], [2.5], [0.5], [-1]):
        with pytest.raises(ValueError):
            E.win_rate(bad)
    for *columns, want in json.loads(BY_HAND):
        got = E.length_controlled_win_rate(*columns)["length_controlled_winrate"]
        assert got == pytest.approx(want, abs=1e-6, nan_ok=True)


def test_length_controlled_is_the_fit_of_its_definition_with_the_error_of_influence_functions():
    """Policy and two gamed baselines: 300 rows each, the latter of weight .1, without intercept."""
    rng, w, weight = np.random.default_rng(2), np.zeros(3), np.array([[1], [.1], [.1]])
    y, (d, D) = rng.random((3, 300)), rng.normal(size=(2, 3, 300))
    t = np.tanh(D / D.std(1, ddof=1, keepdims=True))
    X = np.stack([t, d, 0 * d + (weight == 1)], 2)                                       # (3, n, 3)
    for _ in range(20):                                  # Newton: at the end the gradient is zero
        p = 1 / (1 + np.exp(-X @ w))
        gradients = X * (weight * (y - p))[..., None]
        H = np.einsum("gni,gnj,gn->ij", X, X, weight * p * (1 - p))
        w = w + np.linalg.solve(H, gradients.sum((0, 1)))
    X = X[0] * [0, 1, 1]                                 # the policy's, at equal length
    s = 1 / (1 + np.exp(-X @ w))
    pull = (s - s.mean() + gradients[0] @ np.linalg.solve(H, s * (1 - s) @ X)) / 300
    parts = [*zip(y + 1, D, 0 * D, d)]
    got = E.length_controlled_win_rate(*parts[0], parts[1:])
    assert got["length_controlled_winrate"] == pytest.approx(100 * s.mean(), abs=1e-6)
    assert got["lc_standard_error"] == pytest.approx(100 * np.sqrt(pull @ pull), rel=.1)


@pytest.mark.skipif(not os.path.exists(ALPACA), reason="no published figures here")
@pytest.mark.parametrize("name", ["FuseChat-Llama-3.2-3B-Instruct", "claude-2.1", "vicuna-7b-v1.5",
                                  "gpt4_0613_concise"])
def test_files_of_annotations_give_the_published_figures(here, capsys, name):
    """One policy a file. A row's difficulty is that of its index: a missing row shifts nothing."""
    rows = pandas.read_json(f"{ALPACA}/annotations/{name}.jsonl.gz", lines=True)
    hole = rows.drop(100)
    for file, part in ("whole", rows), ("hole", hole), ("nameless", hole.drop(columns="index")):
        part.to_json(f"{file}.jsonl", orient="records", lines=True)
    flags = f"--gamed {ALPACA}/gamed_baseline_surrogate.jsonl.gz --difficulty " \
            f"{ALPACA}/instruction_difficulty.json --annotations"
    go(E, f"{flags} whole.jsonl hole.jsonl")
    got = pandas.read_csv("out/leaderboard.csv", index_col=0)
    assert [*got] == [*pandas.read_csv(f"{ALPACA}/sample_leaderboard.csv", index_col=0)]
    truth, lc = read_json(f"{ALPACA}/published.json")[name], "length_controlled_winrate"
    exact = ["win_rate", "standard_error", "n_wins", "n_draws", "discrete_win_rate", "avg_length"]
    assert [*got[exact].iloc[0]] == pytest.approx([truth[key] for key in exact], abs=1e-6)
    whole, hole = got[lc]
    assert abs(whole - truth[lc]) < .12 and abs(hole - whole) < .15
    assert "--difficulty" in refused(capsys, go, E, f"{flags} nameless.jsonl")


# -- 9. Evaluation: judges -------------------------------------------------------------------------
READS_B = r"B | b | **B** | (b) | B. | B is better | Output (b) | The better reply is B. | B\n\nY" \
          r" | Reply A is shorter, but wrong.\nMy verdict: B | <think>Is it A? No, A</think>\n\nB"
READS_NOTHING = r" | A or B | A\nB | B is not better | A is worse | It isn't A | Both are bad." \
                r" | Neither A nor B is better | Reply B is better than reply A."


def test_a_reply_is_read_as_B_or_not_at_all():
    pytest.importorskip("openai")
    bare = SimpleNamespace(content=[SimpleNamespace(token="B", top_logprobs=None)])
    for replies, want in (READS_B, 1), (READS_NOTHING, None):
        for text in replies.replace("\\n", "\n").split(" | "):
            message = SimpleNamespace(content=text or None)
            for logprobs in (None, SimpleNamespace(content=None), bare):
                choices = [SimpleNamespace(message=message, logprobs=logprobs)]
                assert E.read_verdict(SimpleNamespace(choices=choices)) == want, text


BOTH = """{"choices": [{"message": {"role": "assistant", "content": "B"}, "logprobs": {"content": [
    {"token": "B", "top_logprobs": [{"token": "A", "logprob": -1.38629436},
    {"token": "B", "logprob": -0.69314718}, {"token": " B", "logprob": -0.69314718}]}]}}]}"""
PLAIN = '{"choices": [{"message": {"role": "assistant", "content": "B"}}]}'


class Endpoint(BaseHTTPRequestHandler):
    """Prefers the answer with more x; without log-probs where they are not asked for. Its server's
    trouble(number of the request, body): None, or status and body."""
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.keys.append(self.headers["Authorization"])
        reply = BOTH if "logprobs" in body else PLAIN
        a, b = re.findall(r"<reply .>\\n(x*)\\n</reply", body)
        if a > b:
            reply = reply.replace("B", "C").replace("A", "B").replace("C", "A")
        status, reply = self.server.trouble(len(self.server.keys), body) or (200, reply)
        self.wfile.write(f"HTTP/1.0 {status} -\r\nContent-Type: application/json\r\n\r\n".encode()
                         + reply.replace("KEY", self.server.keys[0]).encode())


@pytest.fixture
def server(monkeypatch):
    """An endpoint that answers one after the other"""
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.keys, server.trouble = [], lambda n, body: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def judge(flags):
    """Two files of 30 outputs, judged: no model is needed. The last pair is a draw."""
    for name in ("base", "policy"):
        lengths = [*range(name == "policy", 29 + (name == "policy")), 30]
        write_rows(Path(f"{name}.jsonl"), *[
            {"instruction": f"{i}", "generator": name.upper(), "output": length * "x"}
            for i, length in enumerate(lengths)])
    go(E, f"--model policy.jsonl --baseline base.jsonl --data base.jsonl --judge it {flags}")
    return [row["preference"] for row in read_json("out/annotations.json")]


def test_endpoint_asks_both_orders_and_pays_nothing_twice(here, capsys, server):
    flags, path = f"--api_base {server.url}", Path("out/verdicts.jsonl")
    # the better one gets .8 as B and as A, in two tokens; equal outputs are not asked about
    want = [pytest.approx(1.8)] * 29 + [1.5]
    assert judge(flags) == want and len(server.keys) == 58
    path.write_text("\n".join(path.read_text().split("\n")[:4])[:-9])    # two are whole, one torn
    for _ in range(2):
        assert judge(flags) == want and len(server.keys) == 58 + 56
    assert "another judge" in refused(capsys, judge, flags + " --judge she")
    assert len(server.keys) == 58 + 56


def test_endpoint_that_refuses_settings_and_evades(here, server):
    """No verdict: the next run asks again."""
    for evasion, want in ((200, PLAIN.replace("B", "Hm.")), None), (None, 2):
        server.trouble = lambda n, body: (400, "{}") if "temperature" in body else evasion
        assert judge(f"--api_base {server.url}") == [want] * 29 + [1.5]


@pytest.mark.parametrize("status,body,words", [
    (401, '{"error": {"message": "not KEY"}}', "***"),
    (400, '{"error": {"message": "x is not a valid model ID"}}', "x is not a valid model ID"),
    (200, '{"error": {"message": "the quota is used up"}}', "the quota is used up"),
    (200, '{"choices": []}', "no choices")])
def test_endpoint_trouble_is_one_line_and_the_key_is_in_no_file(here, capsys, server, status, body,
                                                                words):
    server.trouble = lambda n, _: (status, body) if n > 8 else None
    flags, path = f"--api_base {server.url}", Path("out/verdicts.jsonl")
    message = refused(capsys, judge, flags)
    assert words in message and {*server.keys} == {"Bearer sk-secret"}
    server.trouble = lambda n, _: None                   # what was paid for is not asked again
    judge(flags)
    assert path.read_text().count("question") == 58
    assert "sk-secret" not in message + "".join(path.read_text() for path in Path("out").iterdir())


def test_function_judge_and_what_files_must_hold(here, capsys):
    Path("judge.py").write_text("def score(prompt, response):\n    return min(len(response), 3)\n"
                                "def bad(prompt, response):\n    return float('nan')\n")
    assert "nan" in refused(capsys, judge, "--judge judge.py:bad")
    assert judge("--judge judge.py:score") == [2] * 3 + [1.5] * 27
    row = read_json("out/annotations.json")[0]
    assert [row[k] for k in ("generator_2", "score_1", "score_2")] == ["POLICY", 0, 1]
    mistake = "--judge judge.py:score --data data/reviews/prompts_test.jsonl"
    assert "policy.jsonl" in refused(capsys, judge, mistake)
    for row in ({"preference": 3, "len_1": 1, "len_2": 1}, {"preference": 2, "len_1": 1}):
        write_rows(Path("wrong.jsonl"), row)
        assert "wrong" in refused(capsys, go, E, "--annotations wrong.jsonl")


def test_reward_model_judge_and_answers_used_again(here):
    """Scores are the mean of segments; a judge that names no model to cut them takes --baseline."""
    flags = "--judge rm --max_samples 6 --html --cutoff 1 --trained_granularity segment --model "
    rm = AutoModelForSequenceClassification.from_pretrained(SFT, num_labels=1)   # untrained
    rm.save_pretrained("rm")
    load_tokenizer(SFT)[0].save_pretrained("rm")
    go(E, flags + SFT)
    rows = read_json("out/annotations.json")
    write_rows(Path("pairs.jsonl"), *[{"prompt": row["instruction"], "chosen": row["output_2"],
                                       "rejected": row["output_1"]} for row in rows])
    _, cuts, scalars = read("pairs.jsonl", "rm")
    two, one = sequence_score(scalars, segment_ends(*cuts, 1.0, "segment")).view(-1, 2).T
    want = [1 + p for p in (two - one).sigmoid().tolist()]       # an unfinished one has no EOS
    assert [row["preference"] for row in rows] == pytest.approx(want, abs=.02)
    rm.config.update({"segment_granularity": "segment", "segment_cutoff": 1., "segment_model": SFT})
    rm.save_pretrained("rm")
    go(E, flags + "out/policy.json --baseline out/baseline.json", "again")
    assert read_json("again/annotations.json") == rows
    assert "segments_1" in Path("again/index.html").read_text()


def test_page_escapes_everything(here):
    evil = "<script>alert('1')</script>&\"></style><img src=x onerror=a>{{data}}"
    row = dict.fromkeys(("instruction", "output_1", "output_2", "generator_1", "generator_2"), evil)
    write_rows(Path("rows.jsonl"), {**row, "preference": 1.5})
    go(E, "--annotations rows.jsonl --html")
    page = Path("out/index.html").read_text()
    nonce, data = re.search("'nonce-(.+?)'.*?id=\"data\">(.*?)</script>", page, re.S).groups()
    assert json.dumps(json.loads(data)).count(json.dumps(evil)) >= 5
    assert "default-src 'none'" in page
    assert (page.count(nonce), page.count("<script"), page.count("<img")) == (4, 2, 0)


# -- 10. CUDA, where there is one: in processes of their own, for this one sees none ---------------
@pytest.mark.skipif(not glob.glob("/dev/nvidia0"), reason="no CUDA device")
def test_a_few_steps_on_cuda(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE or "0")
    rm = job("train_rm", f"{tmp_path}/rm", SMALL[train_rm])
    ppo = job("train_ppo", f"{tmp_path}/ppo", f"{SMALL[train_ppo]} --reward_model {rm}/model")
    for row in metrics(rm) + metrics(ppo):
        assert None not in row.values() and row.get("first_ratio", 1) == 1


# -- 11. The main job: what the README's first command must reach ----------------------------------
@pytest.fixture(scope="session")
def main_job():
    """Default arguments, in ./out. A script that has been run before says so and ends."""
    for script, out in {"train_rm": "rm", "train_ppo": "ppo", "evaluate": "eval"}.items():
        job(script, f"out/{out}")


def gold_at(out, step):
    """The mean over three iterations"""
    return np.mean([row["gold"] for row in metrics(out)[step - 3:step]])


def test_segments_are_clauses_and_the_reward_model_learns_their_worth(main_job):
    source, (tokenizer, _), values, gold = PAIRS + ":train[-400:]", load_tokenizer(SFT), [], []
    pairs, (rows, cuts, scalars) = load_pairs(source), read(source, "out/rm/model")
    ends = segment_ends(*cuts, 1.0, "segment")
    for i, (_, r) in enumerate(rows):
        prompt = pairs[i // 2][0][0]["content"]
        texts = segment.segment_texts(tokenizer, r[:-1], ends[i, :len(r) - 1])
        values += prepare.segment_values(prompt, texts)
        gold.append(prepare.gold_reward(prompt, "".join(texts)))
    better = sequence_score(scalars, ends).view(-1, 2).diff()                            # (n, 1)
    truth = torch.tensor(gold).view(-1, 2).diff()                                        # (n, 1)
    assert (better * truth > 0)[truth != 0].float().mean() >= .70
    assert np.corrcoef(scalars[ends], values)[0, 1] >= .22
    tokens = pad_sequence([torch.tensor(r) for _, r in rows], batch_first=True)
    is_end = tokens == tokenizer.convert_tokens_to_ids(".")
    for cutoff in (.75, 1., 1.5, 2., 2.5):
        ends = segment_ends(*cuts, cutoff, "segment")
        assert 2 * (ends & is_end).sum() / (ends.sum() + is_end.sum()) >= .98            # F1


def test_segment_rewards_teach_a_better_policy(main_job):
    last = metrics("out/ppo")[-1]
    assert last["step"] == 30 and last["kl"] <= 18 and last["finished"] >= .97
    assert gold_at("out/ppo", 30) >= -.10
    assert pandas.read_csv("out/eval/leaderboard.csv").win_rate[0] >= 85
    if os.path.exists("out/ppo-bandit/model"):
        assert gold_at("out/ppo", 20) >= gold_at("out/ppo-bandit", 20) + .12


def test_a_responses_total_reward_grows_with_its_segments(main_job, here):
    """S, of the main job's reward model used at each granularity."""
    for use, least, most in ("bandit", .85, 1.1), ("segment", 4, 12), ("token", 20, 60):
        go(train_ppo, f"--granularity {use} --max_steps 1 --reward_model {ROOT}/out/rm/model", use)
        assert least <= calibration(use)[1] <= most


def test_true_rewards_per_segment_teach_faster_than_per_response(runs):
    """Credit assignment alone: true values of clauses, where they are due or at the end."""
    assert gold_at(runs["segment"](), 16) >= gold_at(runs["bandit"](), 16) + .20
