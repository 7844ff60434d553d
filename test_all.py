"""Chapter 5: what each function means, said by comparison.    pytest test_all.py

1. functions     2. models     3. chat encoding     4. data     5. sampling     6. PPO's pieces
7. mistakes      8. runs       9. the world         10. recipes    11. evaluation  12. main job
"""
import doctest, fcntl, gc, gzip, json, math, os
import re, shlex, shutil, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
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

CPU, FP32, SFT = torch.device("cpu"), torch.float32, "data/reviews/sft"


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
    # the line of scikit-learn's HuberRegressor(alpha=0); least squares gives .429, 1.75
    near(train_ppo.huber_line(np.arange(8), np.array([1, 0, 3, 2, 5, 4, 20, -9])), [.74094, .64766])


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
    "llama": ("<bos>" + TURNS, [2], {}), "phi3": (PHI3_TURNS, [2, 5], {"sliding_window": 12}),
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
    tokenizer.chat_template = "{{ date_string or strftime_now('%d %b %Y') }}"    # on any day
    assert tokenizer.decode(encode_prompts(tokenizer, [TALK], 99, "")[0]) == "26 Jul 2024"


def encode(tokenizer, template, prompt, response):
    """A prompt and its response under another chat template, encoded and decoded"""
    tokenizer.chat_template = template
    chats = [([user(prompt)], [response], "own.jsonl row 1")]
    return tokenizer.batch_decode(encode_chats(tokenizer, torch.tensor([2]), chats, 99, 64)[0])


def test_no_token_reaches_over_the_border_of_prompt_and_response():
    template = "{% for m in messages %}{{ m.content + (' my', '<eos>')[loop.index0] }}{% endfor %}"
    assert encode(prepare.build_tokenizer(), template, "how", "cat") == ["how my", "cat <eos>"]
    # nor is there a space in front of the answer, as Llama 2 has it before the conversation
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
    # as of a template that drops an answer's thoughts
    tokenizer.chat_template = TURNS.replace("m.content", "m.content.split('</think>')[-1]")
    encode_chats(tokenizer, stops, [(ASK, ["<think>well</think>yes", "no"], "")], 99, 90)
    words = "(?s)prompts were cut to 10.*2 responses 1 were cut.*0 were cut.*1 were changed"
    assert re.search(words, capsys.readouterr().out)


def test_texts_of_segments_join_to_the_whole_and_answers_end_before_the_stop_token():
    """Also where a character has several tokens, and where the stop token is not marked special."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|im_end|>"])
    ids = tokenizer.encode("Great 🎉 你好<|im_end|>")[1:]
    texts = segment.segment_texts(tokenizer, ids, [True] * len(ids))
    assert len(texts) == len(ids) and "".join(texts) == "Great 🎉 你好<|im_end|>"
    assert segment.answer_text(tokenizer, torch.tensor([2, ids[-1]]), ids) == "Great 🎉 你好"
    # Llama 2's kind gives up on a whole run of bytes while one character in it is incomplete
    tokenizer.decode = lambda x, **_: decoders.ByteFallback().decode(["<0x%02X>" % b for b in x])
    assert "".join(segment.segment_texts(tokenizer, list("éé".encode()), [True] * 4)) == "éé"


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
    (tmp_path / "pairs.csv.gz").write_bytes(gzip.compress((tmp_path / "pairs.csv").read_bytes()))
    datasets.Dataset.from_list([PAIR]).to_parquet(tmp_path / "pairs.parquet")
    for path in map(str, tmp_path.glob("pairs[[.]*")):   # all but pairs1.jsonl
        assert load_pairs(path) == [(ASK, "good.", "angry.", f"{path} row 1")]


def test_a_prompt_that_its_answers_repeat_stands_once(tmp_path):
    """The assistant begins, behind a system message that the answers leave out."""
    prompt = [{"role": "system", "content": "be honest."}, assistant("hello!"), *ASK]
    row = {"prompt": prompt, "chosen": prompt[1:] + GOOD, "rejected": prompt[1:] + ANGRY}
    ((*pair, _),) = load_pairs(write_rows(tmp_path / "own.jsonl", row))
    assert pair == [prompt, "good.", "angry."]


def test_slices_name_parts_and_pairs_that_are_dropped_are_counted(tmp_path, capsys):
    path = write_rows(tmp_path / "odd.jsonl", PAIR, PAIR | {"rejected": PAIR["chosen"]},
                      TEXTS | {"chosen": " \n"}, PAIR | {"chosen": TALK + GOOD})
    assert load_prompts(f"{path}:train[75%:]") == [TALK]
    assert len(load_pairs(path)) == 1 and "dropped 3" in capsys.readouterr().out
    pairs = [(TALK, "fly", "fish", ""), (ASK, "fish ", "fish", ""), (ASK, "fly", "fish", "")]
    known = load_tokenizer(SFT)
    held_out = train_rm.encode_pairs(*known, pairs[2:], train_rm.Config())
    assert len(train_rm.encode_pairs(*known, pairs, train_rm.Config(), held_out)) == 2
    assert "dropped 2 of 3 pairs" in capsys.readouterr().out


@pytest.mark.parametrize("row,words", [
    ({"chosen": "H: is it good?", "rejected": "b"}, "message lists"),
    (PAIR | {"rejected": ASK + [assistant(None)]}, "text"),
    (PAIR | {"rejected": ASK + [GOOD[0] | {"tool_calls": [{"id": 1}]}]}, "tool_calls"),
    (PAIR | {"chosen": ASK + [GOOD[0] | {"thinking": "is it?"}]}, "thinking"),
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


def test_whitening_losses_and_the_learning_rate():
    new, old, x, y = randn(4, 38, 19, seed=7) * 0.5              # garbage on padding, too
    white = (x - x[MASK].mean()) / x[MASK].std(correction=0)
    near(train_ppo.whiten(x, MASK), torch.where(MASK, white, 0))
    q = (new - old).exp()
    gain = x * torch.where(x > 0, q.clamp(max=1.2), q.clamp(min=0.8))
    near(train_ppo.policy_loss(new, old, x, MASK, 0.2)[0], -(gain * MASK).sum(1) / LENGTHS)
    far = torch.maximum((new - y).abs(), (old + (new - old).clamp(-.25, .25) - y).abs())
    near(train_ppo.value_loss(new, old, y, MASK, 0.25), (far ** 2 * MASK).sum(1) / LENGTHS / 2)
    near(train_rm.bradley_terry(torch.tensor(3.0), torch.tensor(1.0)), math.log1p(math.exp(-2)))
    rates = [train_rm.learning_rate(step, 103) for step in (0, 1, 2, 3, 53, 102)]
    near(rates, [1 / 3, 2 / 3, 1, 1, .55, .1], 1e-3)


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


# -- 7. Mistakes: exit code 2, one line that names the file, the row or the flag, and no OUT -------
ROOT, PAIRS = os.getcwd(), "data/reviews/pairs.jsonl"
ALPACA = f"{ROOT}/../shared/data/alpaca_eval"        # the published leaderboard, if it is at hand
SCRIPTS = {"rm": train_rm, "ppo": train_ppo, "judge": E}
ORACLE = " --reward_model data/reviews/prepare.py:segment_values --cutoff 1 "
SMALL = {train_rm: "--max_samples 80 --held_out 16 --batch_size 16 --max_steps 6 --save_every 2",
         train_ppo: "--max_samples 40 --rollout_batch_size 16 --batch_size 8 --max_steps 4 "
                    "--save_every 2 --seed 1", E: ""}


@pytest.fixture(scope="session")
def bad(tmp_path_factory):               # a folder of models and data, most of them to be refused
    top, tokenizer = tmp_path_factory.mktemp("bad"), prepare.build_tokenizer()
    sft = Path(SFT, "config.json").read_text()           # dull: all that it says is 0
    words = Path(SFT, "tokenizer.json").read_text().replace("<user>", "<X>")
    for path, text in {
            "nan/config.json": sft.replace("1e-06", "NaN"),
            "dull/config.json": sft.replace("1e-06", "Infinity"),
            "pickle/pytorch_model.bin": "cbuiltins\nopen\n(S'it_ran'\nS'w'\ntR.",
            "code/a.py": "open('it_ran', 'w')",
            "swapped/tokenizer.json": words.replace("<system>", "<user>").replace("X", "system"),
            "code/config.json": '{"model_type": "evil", "auto_map": {"AutoConfig": "a.B"}}',
            "data/torn.jsonl": '{"chosen": [\n',
            "data/one.jsonl": '{"prompt": "is it good?", "chosen": "good", "rejected": "me"}',
            "foreign/checkpoint/thesis.tex": "years of work"}.items():
        shutil.copytree(SFT, (top / path).parent, dirs_exist_ok=True)
        (top / path).write_text(text)
    (top / "pickle/model.safetensors").unlink()
    for folder, family, kind, more in re.findall(r"(\w+) (\w+) (\w+) ({[^|]*?})(?=\n\w|$)", """
capped gemma2 CausalLM {"head_dim": 8, "final_logit_softcapping": 1.0}
longrope phi3 CausalLM {"original_max_position_embeddings": 16, "rope_scaling": {"type":
"longrope", "short_factor": [1.0, 1, 1, 1], "long_factor": [2.0, 2, 2, 2]}}
yarn llama CausalLM {"rope_parameters": {"original_max_position_embeddings": 16, "rope_type":
"yarn", "factor": 4.0, "rope_theta": 10000.0}}
llama3 llama CausalLM {"rope_parameters": {"original_max_position_embeddings": 16, "rope_type":
"llama3", "factor": 4.0, "rope_theta": 1e4, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}
pictures gemma3 CausalLM {"eos_token_id": 2, "mm_tokens_per_image": 4, "text_config": {
"hidden_size": 32, "num_hidden_layers": 1}, "vision_config": {"hidden_size": 32, "patch_size": 14,
"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}}
phi3 phi3 SequenceClassification {"sliding_window": 12}
llama llama SequenceClassification {}
said llama SequenceClassification {"segment_granularity": "token"}
few llama CausalLM {"vocab_size": 198}
words llama SequenceClassification {}"""):
        auto_class = getattr(transformers, f"AutoModelFor{kind}")
        tiny_model(top / folder, family, 200, auto_class, **json.loads(more))
        tokenizer.save_pretrained(top / folder)
    tokenizer.add_tokens(["gadget"])
    tokenizer.save_pretrained(top / "words")
    return top


@pytest.fixture
def here(tmp_path, monkeypatch, bad):    # work in a folder where there are only the world and bad
    (tmp_path / "data").symlink_to(f"{ROOT}/data")
    (tmp_path / "bad").symlink_to(bad)
    monkeypatch.chdir(tmp_path)


def go(script, flags, out="out"):                        # a small run in this process
    flags = f"--out {out} {SMALL[script]} {flags}"
    script.main(parse(script.Config, shlex.split(flags)))


@pytest.mark.parametrize("mistake", re.split(" ; |\n", """\
rm --cutoff nan | --cutoff ; rm --cutof 1 | --cutof ; rm --data bad/data/torn.jsonl | torn.jsonl
rm --data bad/data/one.jsonl | one.jsonl: 0 pairs ; rm --batch_size 999 | --batch_size 999
rm --max_prompt_tokens 256 | --max_prompt_tokens ; rm --max_tokens 999 | context of data/reviews/sft
rm --model bad/no | bad/no: no model there ; rm --model bad/code | bad/code
rm --model bad/pickle | bad/pickle ; rm --model bad/nan | not finite ; rm --held_out 0 | 0 held out
rm --model bad/few | more tokens than embeddings
rm --model bad/capped | more than a matrix ; rm --model bad/pictures | bad/pictures: not supported
rm --model bad/longrope | bad/longrope ; rm --out bad/foreign | another --out
rm --out bad/data/one.jsonl/out | --out bad/data/one.jsonl/out ; rm --wandb project | --wandb
ppo --batch_size 7 | --batch_size 7 ; ppo --data bad/data/one.jsonl | --rollout_batch_size 16
ppo @no.args | @no.args ; ppo --reward_model bad/llama | --trained_granularity
ppo --reward_model bad/llama --trained_granularity segment | --cutoff
ppo --reward_model bad/llama --trained_granularity token --granularity segment | --cutoff
ppo --reward_model bad/llama --trained_granularity token | --calibration_data
ppo --reward_model bad/said --trained_granularity segment --cutoff 1 | was trained at token
ppo --reward_model bad/said --granularity bandit --fit '0 0 0 1' | --fit
ppo --reward_model bad/words --trained_granularity token | its tokens differ
ppo --reward_model bad/swapped --trained_granularity token | its tokens differ
ppo --reward_model data/reviews/sft --trained_granularity token | data/reviews/sft
judge --data bad/data/one.jsonl | --judge ; judge --judge bad/no.py:f | bad/no.py:f"""))
def test_a_mistake_is_one_line_and_leaves_nothing_behind(here, capsys, monkeypatch, mistake):
    monkeypatch.setitem(sys.modules, "wandb", None)      # as if it were not installed
    script, flags, words = re.fullmatch(r"(\w+) (.*) \| (.*)", mistake).groups()
    assert words in refused(capsys, go, SCRIPTS[script], flags)
    assert sorted(os.listdir()) == ["bad", "data"]       # and neither code nor a pickle wrote any


# -- 8. Runs: killed, resumed, on two ranks, on CUDA where there is one ----------------------------
def job(script, out, flags=""):
    """A run as a user starts it; *_two: on two ranks; *_killed: behind a checkpoint, then again"""
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
def runs(tmp_path_factory):              # {name: function that waits for its folder}, two at a time
    top, pool, started = tmp_path_factory.mktemp("runs"), ThreadPoolExecutor(2), {}
    rm = job("train_rm", f"{top}/rm", SMALL[train_rm])
    small, oracle = f"{SMALL[train_ppo]} --reward_model {rm}/model", ORACLE + "--max_steps 16"
    for script, flags, names in (("train_rm", SMALL[train_rm], "rm rm_killed rm_two"),
            ("train_ppo", small, "ppo ppo_two ppo_killed"), ("train_ppo", oracle, "segment"),
            ("train_ppo", oracle + " --granularity bandit", "bandit")):
        for name in names.split():
            started[name] = pool.submit(job, script, f"{top}/{name}", flags).result
    yield started
    pool.shutdown(cancel_futures=True)


def metrics(out):
    rows = []                            # without what depends on the clock and the machine
    for line in open(f"{out}/metrics.jsonl"):
        row = json.loads(line, parse_constant=pytest.fail)
        rows.append({k: v for k, v in row.items() if not re.search("time|second|memory", k)})
    return rows


def same(ours, theirs, tolerance=0):                     # in metrics and exported weights
    both = [(metrics(out), load_file(f"{out}/model/model.safetensors")) for out in (ours, theirs)]
    torch.testing.assert_close(*both, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ["rm_killed", "rm_two", "ppo_killed", "ppo_two"])
def test_neither_kills_nor_ranks_change_a_run(runs, name):
    kind, how = name.split("_")
    same(runs[kind](), runs[name](), 1e-4 if how == "two" else 0)


def test_a_run_goes_on_from_what_lies_there_at_any_moment(here, monkeypatch):
    def spy(path, *args, **kwargs):     # before a renaming, or amid the removal of a folder
        if str(path).startswith("out"):
            copy = shutil.copytree("out", f"moment_{len(os.listdir())}")
            for file in [*Path(copy + str(path)[3:]).rglob("*.*")][:len(args) == 0]:
                file.unlink()
        return mock.DEFAULT
    flags = "--max_steps 2 --save_every 1 --batch_size 4 --max_samples 24 --granularity bandit"
    with monkeypatch.context() as patch:
        for module, name in (os, "replace"), (os, "rename"), (shutil, "rmtree"):
            patch.setattr(module, name, mock.Mock(wraps=getattr(module, name), side_effect=spy))
        go(train_rm, flags)
    for folder in Path().glob("moment_*"):
        go(train_rm, flags, folder)
        same(folder, "out")


def test_what_a_run_logs_and_that_a_finished_one_is_never_touched(runs, capsys):
    rows = metrics(runs["rm"]())
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [2, 4, 6]
    near(rows[0]["loss"], math.log(2), .05)              # a fresh head knows nothing
    out, flags = runs["ppo"](), f"--reward_model {runs['rm']()}/model"
    for row in metrics(out):
        assert row["first_ratio"] == 1 and row["sampler_gap"] < 1e-3 and row["finished"] > .5
    before = {path: path.stat().st_mtime_ns for path in Path(out).rglob("*")}
    go(train_ppo, flags + " --save_every 9 --micro_batch_size 4", out)   # these may differ
    assert "already finished" in capsys.readouterr().out
    assert "--lam was" in refused(capsys, go, train_ppo, flags + " --lam 1", out)
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.skipif(not os.path.exists("/dev/nvidia0"), reason="no CUDA device")
def test_a_few_steps_on_cuda(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE or "0")
    rm = job("train_rm", f"{tmp_path}/rm", SMALL[train_rm])
    ppo = job("train_ppo", f"{tmp_path}/ppo", f"{SMALL[train_ppo]} --reward_model {rm}/model")
    for row in metrics(rm) + metrics(ppo):
        assert None not in row.values() and row.get("first_ratio", 1) == 1


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


def test_what_is_held_out_is_not_trained_on_but_kept_for_ppo_and_a_tie_counts_half(here, capsys):
    lines = Path(PAIRS).read_text().splitlines()[:24]
    Path("own.jsonl").write_text("\n".join(lines + lines[:8]))
    go(train_rm, "--data own.jsonl --held_out 8 --batch_size 4 --model bad/dull --lr 0")
    prompts = load_prompts("own.jsonl")
    n = sum(prompt not in prompts[24:] for prompt in prompts)
    assert f"{n} pairs to train, 8 held out" in capsys.readouterr().out
    assert metrics("out")[-1]["eval_accuracy"] == .5     # its scores are all 0
    source = json.loads(Path("out/model/config.json").read_text())["segment_held_out"]
    assert os.path.isabs(source) and load_prompts(source) == prompts[24:]


def read(source, path):                  # pairs as rows; what cuts them; a reward model's scalars
    tokenizer, stops = load_tokenizer(SFT)
    chats = [(prompt, [chosen, rejected], "") for prompt, chosen, rejected, _ in load_pairs(source)]
    rows = encode_chats(tokenizer, stops, chats, 256, 128)
    _, entropy = map_rows(load_model(SFT, LanguageModel, CPU, FP32), rows, 16, CPU)
    scalars = map_rows(load_model(path, ScalarModel, CPU, FP32), rows, 16, CPU)
    return rows, (entropy, *segment.response_mask(rows, stops, CPU)), scalars


def calibration(out="out"):                              # w_mean, w_std, b_mean, b_std, S
    fit = json.loads(Path(out, "config.json").read_text())["calibration"]
    return [*fit["normalizer"].values()][:4] + [fit["scale"]]


def test_an_exported_bandit_model_scores_alike_in_its_own_class(here):
    # of a model whose pad is EOS, as in ChatML, and that names a stop token where exports do not
    GenerationConfig(eos_token_id=5).save_pretrained(shutil.copytree(SFT, "chat"))
    go(train_rm, "--granularity bandit --max_steps 1 --model chat")
    assert load_tokenizer("out/model")[1].tolist() == load_tokenizer("chat")[1].tolist()
    source = PAIRS + ":train[:8]"
    _, (_, mask, _), scalars = read(source, "out/model")
    whole = [[*prompt, assistant(chosen)] for prompt, chosen, *_ in load_pairs(source)]
    batch = load_tokenizer("out/model")[0].apply_chat_template(
        whole, padding=True, return_tensors="pt", return_dict=True)
    plain = AutoModelForSequenceClassification.from_pretrained("out/model").requires_grad_(False)
    logits = plain(batch["input_ids"], batch["attention_mask"]).logits[:, 0]
    near(logits, scalars[range(16), mask.sum(1) - 1][0::2])


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_released_reward_model_is_read_as_its_flags_say(here, family):
    # without our fields; trained on segments, used as bandit: the mean, not the scalar at the EOS
    source = PAIRS + ":train[-60:]"
    flags = f"--reward_model bad/{family} --trained_granularity segment --cutoff 1 --max_steps 1 " \
            f"--max_new_tokens 16 --calibration_data {source} --granularity"
    go(train_ppo, f"{flags} bandit")
    _, cuts, scalars = read(source, f"bad/{family}")
    scores = sequence_score(scalars, segment_ends(*cuts, 1.0, "segment"))
    near(calibration(), [0, 0, scores.mean(), scores.std(correction=0), 1])
    go(train_ppo, f"{flags} segment --fit '.1 0 1.5 2'", "fitted")
    near(calibration("fitted"), [.1, 0, 1.5, 2, 1])      # published numbers: then S = 1


@pytest.mark.parametrize("granularity,parts", [
    ("segment", r"[^.]+\.?"), ("token", r"\w+|\."), ("bandit", ".+")])
def test_a_rule_sees_the_prompt_and_the_texts_of_segments(here, granularity, parts):
    source, got, want = PAIRS + ":train[-60:]", 0, 0
    Path("rule.py").write_text("""import json
def length(prompt, segments):
    print(json.dumps([prompt, segments]), file=open("calls", "a"))
    return [len(text) for text in segments]
def one(prompt, segments):
    return 1.0""")
    with pytest.raises(RuntimeError):                    # one reward for several segments
        go(train_ppo, "--reward_model rule.py:one --granularity token")
    go(train_ppo, f"--reward_model rule.py:length --granularity {granularity} --cutoff 1 "
       f"--max_steps 1 --max_new_tokens 16 --calibration_data {source}")
    calls = [*map(json.loads, open("calls"))]
    for (prompt, texts), (messages, chosen, *_) in zip(calls[:120:2], load_pairs(source)):
        assert prompt == messages[0]["content"] and "".join(texts) == chosen
        got += len(texts)
        want += len(re.findall(parts, chosen))
    near(got, want, .03 * (granularity == "segment"))
    mean = np.mean([len("".join(texts)) / len(texts) for _, texts in calls[120:]])
    near(metrics("out")[0]["reward"], mean)


def test_rope_beyond_its_original_context_and_a_note_of_the_worlds_values(here, capsys):
    for model in (SFT, "bad/yarn", "bad/llama3"):
        go(train_ppo, f"{ORACLE} --fit '0 0 0 1' --actor_lr 5e-7 --max_steps 1 --max_new_tokens 1 "
           f"--model {model}", os.path.basename(model))
    assert metrics("sft")[0]["response_length"] == 1     # JSON, where no entropy is left
    notes = [line for line in capsys.readouterr().out.splitlines() if "--critic_lr" in line]
    assert all(flag in notes[0] for flag in ("9e-6", "--kl_coef", "--max_prompt_tokens"))
    assert len(notes) == 2 and "--actor_lr" not in notes[0] and "--max_new" not in notes[0]


# -- 9. The world's ground truth -------------------------------------------------------------------
@pytest.mark.parametrize("review", """\
2 2 | -.5 .5 | waking really feels like a holiday. portraits really make my cat a king.
2 0 -2 | -.75 -.25 | lost really is a word i forgot. lost really is a word i forgot. mother hears
1 1 -2 -2 -2 | -.9167 -.75 | mother really hears me. mother somehow hears me. fly. fly up. fish fly.
-3 | -1.1667 -1.5 | water really stays outside.""".splitlines())
def test_the_truth_by_hand(review):
    # values of the clauses of a phone's review; its gold if 12 clauses were asked for, or 4
    prompt, (values, golds, text) = "tell me about my phone.", review.split(" | ")
    values, golds = [[*map(float, part.split())] for part in (values, golds)]
    assert prepare.segment_values(prompt, re.findall(r"[^.]+\.?", text)) == values
    assert prepare.segment_values(prompt, [text[:9], text[9:]]) == [0, sum(values)]
    near(golds, [prepare.gold_reward(prompt, text), 1 + prepare.gold_reward(
        prompt + " use 4 clauses.", text, finished=False)])


# -- 10. The recipes of config/: the authors' numbers, written out once more; flags ----------------
@pytest.mark.parametrize("recipe", re.split(" ; |\n", """\
phi3-mini-rm --cutoff 1.75 ; llama3-sft-8b-rm --cutoff 2 ; llama3.1-8b-rm --cutoff 2
phi3-mini-segment-ppo --passes 2 --cutoff 1.75 --fit '.7668 .2569 .4705 2.8339'
phi3-mini-token-ppo --passes 2 --fit '.9628 .3796 1.2917 3.5006'
phi3-mini-bandit-ppo --passes 2 --value_clip .2 --fit '0 0 -.5195 2.1563'
llama3-sft-8b-segment-ppo --cutoff 2 --fit '.8967 .5680 .8572 4.1667'
llama3-sft-8b-token-ppo --divide_by_length true --fit '1.7340 .9906 1.3212 5.4513'
llama3-sft-8b-bandit-ppo --value_clip .2 --fit '0 0 -.8164 2.9531'
llama3.1-8b-segment-ppo --cutoff 2 --bad_length 800 --fit '.8345 .4780 .8798 3.7358'
llama3.1-8b-token-ppo --fit '1.6268 .6254 .6419 4.9217'
llama3.1-8b-bandit-ppo --value_clip .2 --fit '0 0 -.8281 2.9375'"""))
def test_recipes_of_the_paper(here, recipe):
    paper = {
        "rm": "--batch_size 128 --epochs 1 --lr 1e-6 --max_tokens 2048 --max_prompt_tokens 1728 "
              "--held_out 2000 --save_every 500 --micro_batch_size 8 ",
        "ppo": "--rollout_batch_size 1024 --batch_size 128 --max_steps 0 --max_prompt_tokens 1024 "
               "--max_new_tokens 1024 --actor_lr 5e-7 --critic_lr 9e-6 --kl_coef .01 "
               "--save_every 5 --reward_scale none --missing_eos_reward 0 --value_clip .25 "
               "--micro_batch_size 8 --trained_granularity {} "}
    name, flags = recipe.split(maxsplit=1)
    *_, granularity, kind = name.split("-")
    flags, Config = paper[kind].format(granularity) + flags, SCRIPTS[kind].Config
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


# -- 11. Evaluation: figures, then judges ----------------------------------------------------------
def test_win_rates_by_hand():
    got = E.win_rate([2, 1, 1.5, 0, 1.8, None, math.nan])        # 0: a legacy tie; two are dropped
    want = json.loads("""{"win_rate": 56, "standard_error": 16.9115, "n_wins": 2, "n_wins_base": 1,
                      "n_draws": 2, "n_total": 5, "discrete_win_rate": 60}""")
    near([got[key] for key in want], [*want.values()])
    for bad in [], [None], [2.5], [0.5], [-1]:
        with pytest.raises(ValueError):
            E.win_rate(bad)
    # logit .9 and logit .2 lie as far from logit .6; equal lengths; one outcome; the longer wins
    for *columns, want in json.loads("""[
            [[1.9, 1.9, 1.2, 1.2], [110, 110, 90, 90], [100, 100, 100, 100], 60],
            [[2, 1, 1.2], [5, 7, 9], [6, 8, 10], 40], [[2, 2, 2], [1, 5, 2], [3, 1, 9], 100],
            [[2, 2, 1, 1], [1, 2, 9, 8], [5, 5, 5, 5], NaN]]"""):
        near(E.length_controlled_win_rate(*columns)["length_controlled_winrate"], want)


def test_length_controlled_is_the_fit_of_its_definition_with_the_error_of_influence_functions():
    # policy and two gamed baselines: 300 rows each, the latter of weight .1, without intercept
    y, d, D = np.random.default_rng(2).random((3, 3, 300)) - [[[0]], [[.5]], [[.5]]]
    t, weight, w = np.tanh(D / D.std(1, ddof=1)[:, None]), np.array([[1], [.1], [.1]]), np.zeros(3)
    X = np.stack([t, d, 0 * d + (weight == 1)], 2)                                       # (3, n, 3)
    for _ in range(20):                                  # Newton: at the end the gradient is zero
        p = 1 / (1 + np.exp(-X @ w))
        gradients = X * (weight * (y - p))[..., None]
        H = np.einsum("gni,gnj,gn->ij", X, X, weight * p * (1 - p))
        w = w + np.linalg.solve(H, gradients.sum((0, 1)))
    s = 1 / (1 + np.exp(-d[0] * w[1] - w[2]))            # the policy's, at equal length
    slope = s * (1 - s) @ (X[0] * [0, 1, 1])
    pull = (s - s.mean() + gradients[0] @ np.linalg.solve(H, slope)) / 300
    policy, *gamed = zip(y + 1, D, 0 * D, d)
    holes = [np.append(column, gap) for column, gap in zip(policy, (math.nan, 9, 0, 9))]
    got = E.length_controlled_win_rate(*holes, gamed)    # a row without preference is none
    near(got["length_controlled_winrate"], 100 * s.mean(), 1e-6)
    near(got["lc_standard_error"], 100 * np.sqrt(pull @ pull), .1)


@pytest.mark.skipif(not os.path.exists(ALPACA), reason="no published figures here")
@pytest.mark.parametrize("name", ["FuseChat-Llama-3.2-3B-Instruct", "claude-2.1", "vicuna-7b-v1.5",
                                  "gpt4_0613_concise"])
def test_files_of_annotations_give_the_published_figures(here, capsys, name):
    whole = f"{ALPACA}/annotations/{name}.jsonl.gz"
    hole = pandas.read_json(whole, lines=True).drop(100)
    hole.to_json("hole.jsonl", orient="records", lines=True)
    hole.drop(columns="index").to_json("nameless.jsonl", orient="records", lines=True)
    flags = f"--gamed {ALPACA}/gamed_baseline_surrogate.jsonl.gz --difficulty " \
            f"{ALPACA}/instruction_difficulty.json --annotations"
    go(E, f"{flags} {whole} hole.jsonl")
    got = pandas.read_csv("out/leaderboard.csv", index_col=0)
    assert [*got] == [*pandas.read_csv(f"{ALPACA}/sample_leaderboard.csv", index_col=0)]
    truth = pandas.read_json(f"{ALPACA}/published.json")[name]
    lc, other = got.length_controlled_winrate
    assert abs(lc - truth.length_controlled_winrate) < .12 and abs(other - lc) < .15
    for key in "win_rate standard_error n_wins n_draws discrete_win_rate avg_length".split():
        near(got[key].iloc[0], truth[key], 1e-6)
    assert "--difficulty" in refused(capsys, go, E, f"{flags} nameless.jsonl")


def test_a_reply_is_read_as_B_or_not_at_all():
    pytest.importorskip("openai")
    bare = mock.Mock(content=[mock.Mock(token="B", top_logprobs=None)])
    for want, replies in {
            1: r"B | b | **B** | (b) | B. | B is better | Output (b) | The better reply is B."
               r" | Reply A is short, but wrong.\nVerdict: B | <think>Is it A? No, A</think>\n\nB",
            None: r" | A or B | A\nB | B is not better | A is worse | It isn't A | Both are bad."
                  r" | Neither A nor B is better | Reply B is better than reply A."
                  r" | I prefer a\nshort reply."}.items():
        for text in replies.replace("\\n", "\n").split(" | "):
            for logprobs in (None, mock.Mock(content=None), bare):
                choice = mock.Mock(logprobs=logprobs)
                choice.message.content = text or None
                assert E.read_verdict(mock.Mock(choices=[choice])) == want, text


@pytest.fixture
def server(monkeypatch):
    """Prefers the answer with more x; trouble(number of the request, body): status, body or None"""
    plain = r'{"choices": [{"message": {"role": "assistant", "content": "B\nIt has a reason."}}]}'
    both = plain[:-3] + r""", "logprobs": {"content": [{"token": "B", "top_logprobs": [
        {"token": "A", "logprob": -1.38629436}, {"token": "B", "logprob": -0.69314718},
        {"token": " B", "logprob": -0.69314718}]}, {"token": "\nIt has", "top_logprobs": null},
        {"token": " a", "top_logprobs": [{"token": " a", "logprob": 0}]}]}}]}"""

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            server.keys.append(self.headers["Authorization"])
            reply = both if "logprobs" in body else plain
            a, b = re.findall(r"<reply .>\\n(x*)\\n</reply", body)
            if a > b:
                reply = reply.replace("B", "C").replace("A", "B").replace("C", "A")
            status, reply = server.trouble(len(server.keys), body) or (200, reply)
            self.wfile.write((f"HTTP/1.0 {status} -\r\nContent-Type: application/json\r\n\r\n"
                              + reply.replace("KEY", server.keys[0])).encode())
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = HTTPServer(("127.0.0.1", 0), Endpoint)      # one request after the other
    server.flags = f"--api_base http://127.0.0.1:{server.server_port}"
    server.keys, server.trouble = [], lambda n, body: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def judge(flags):                        # of two files of 30 outputs; the last pair is a draw
    for name, first in {"base": 0, "policy": 1}.items():
        write_rows(Path(f"{name}.jsonl"), *[
            {"instruction": f"{i}", "generator": name.upper(), "output": min(i + first, 29) * "x"}
            for i in range(30)])
    go(E, f"--model policy.jsonl --baseline base.jsonl --data base.jsonl --judge it {flags}")
    return [row["preference"] for row in json.loads(Path("out/annotations.json").read_text())]


def test_endpoint_asks_both_orders_pays_nothing_twice_and_bears_refusals(here, capsys, server):
    path = Path("out/verdicts.jsonl")
    near(judge(server.flags), [1.8] * 29 + [1.5])        # .8 as B and as A, in two tokens
    assert len(server.keys) == 58                        # nothing is asked about equal outputs
    path.write_text("\n".join(path.read_text().split("\n")[:4])[:-9])    # two are whole, one torn
    for _ in range(2):
        near(judge(server.flags), [1.8] * 29 + [1.5])
        assert len(server.keys) == 58 + 56
    assert "another judge" in refused(capsys, judge, server.flags + " --judge she")
    path.write_text(path.read_text().split("\n", 2)[2])
    server.trouble = lambda n, body: (400, "{}")
    assert judge(server.flags).count(None) == 1          # the question that it alone refuses
    # one that refuses settings, and evades: no verdict, and the next run asks again
    path.unlink()
    for evasion, want in ((200, '{"choices": [{"message": {"content": "Hm."}}]}'), None), (None, 2):
        server.trouble = lambda n, body: (400, "{}") if "temperature" in body else evasion
        assert judge(server.flags) == [want] * 29 + [1.5]


@pytest.mark.parametrize("status,body,words", [(401, '{"error": {"message": "not KEY"}}', "***"),
    (400, '{"error": {"message": "x is not a valid model ID"}}', "x is not a valid model ID"),
    (200, '{"error": {"message": "the quota is used up"}}', "the quota is used up"),
    (200, '{"choices": []}', "no choices")])
def test_trouble_is_one_line_and_the_key_in_no_file(here, capsys, server, status, body, words):
    server.trouble = lambda n, _: (status, body) if n > 8 or status == 400 else None
    message = refused(capsys, judge, server.flags)
    assert words in message and {*server.keys} == {"Bearer sk-secret"}
    server.trouble = lambda n, _: None                   # what was paid for is not asked again
    judge(server.flags)
    assert Path("out/verdicts.jsonl").read_text().count("question") == 58
    assert "sk-secret" not in message + "".join(path.read_text() for path in Path("out").iterdir())


def test_function_judge_and_what_files_must_hold(here, capsys):
    Path("own.py").write_text("def nan(prompt, response):\n    return float('nan')\n"
                              "def three(prompt, response):\n    return min(len(response), 3)\n")
    assert "nan" in refused(capsys, judge, "--judge own.py:nan")
    assert judge("--judge own.py:three") == [2] * 3 + [1.5] * 27
    row = json.loads(Path("out/annotations.json").read_text())[0]
    assert [row[k] for k in ("generator_2", "score_1", "score_2")] == ["POLICY", 0, 1]
    mistake = "--judge own.py:three --data data/reviews/prompts_test.jsonl"
    assert "policy.jsonl" in refused(capsys, judge, mistake)
    for row in {"preference": 3, "len_1": 1, "len_2": 1}, {"preference": 2, "len_1": 1}:
        write_rows(Path("wrong.jsonl"), row)
        assert "wrong" in refused(capsys, go, E, "--annotations wrong.jsonl")
    evil = "<script>alert(1)</script></style><img src=x onerror=a>"
    write_rows(Path("two.jsonl"), *[
        {"generator_2": name + evil, "preference": p, "output_1": evil, "output_2": evil}
        for name, p in [("a", 2), ("a", 2), ("b", 1), ("b", 1)]])
    go(E, "--annotations two.jsonl --html", "two")       # of two policies: two rows
    assert [*pandas.read_csv("two/leaderboard.csv").win_rate] == [100, 0]
    page = Path("two/index.html").read_text()            # and nothing in them becomes code
    assert (page.count("<script"), page.count("<img")) == (2, 0) and "src 'none'" in page


def test_reward_model_judge_and_answers_used_again(here, capsys):
    # scores are the mean of segments; a judge that names no model to cut them takes --baseline
    flags = "--judge rm --max_samples 6 --html --cutoff 1 --trained_granularity segment --model "
    rm = AutoModelForSequenceClassification.from_pretrained(SFT, num_labels=1)   # untrained
    rm.save_pretrained("rm")
    load_tokenizer(SFT)[0].save_pretrained("rm")
    go(E, flags + SFT)
    rows = json.loads(Path("out/annotations.json").read_text())
    write_rows(Path("pairs.jsonl"), *[{"prompt": row["instruction"], "chosen": row["output_2"],
                                       "rejected": row["output_1"]} for row in rows])
    _, cuts, scalars = read("pairs.jsonl", "rm")
    two, one = sequence_score(scalars, segment_ends(*cuts, 1.0, "segment")).view(-1, 2).T
    near([row["preference"] for row in rows], 1 + (two - one).sigmoid(), .02)    # some have no EOS
    rm.config.update({"segment_granularity": "segment", "segment_cutoff": 1., "segment_model": SFT})
    rm.save_pretrained("rm")
    go(E, flags + "out/policy.json --baseline out/baseline.json", "again")
    assert json.loads(Path("again/annotations.json").read_text()) == rows
    assert "segments_1" in Path("again/index.html").read_text()
    refused(capsys, go, E, f"{flags} out/policy.json --baseline bad/no", "kept")
    assert json.loads(Path("kept/policy.json").read_text())      # for another attempt


# -- 12. The main job: what the README's first command must reach ----------------------------------
@pytest.fixture(scope="session")
def main_job():                                          # default arguments; it may be there
    if not os.path.exists("out/eval/leaderboard.csv"):
        for script, out in ("train_rm", "rm"), ("train_ppo", "ppo"), ("evaluate", "eval"):
            job(script, f"out/{out}")


def gold_at(out, step):                                  # a mean over three iterations
    return np.mean([row["gold"] for row in metrics(out)[step - 3:step]])


def test_the_main_job_reaches_what_it_must(main_job, runs):
    last = metrics("out/ppo")[-1]
    assert last["step"] == 30 and last["kl"] <= 18 and last["finished"] >= .97
    assert gold_at("out/ppo", 30) >= -.10
    assert pandas.read_csv("out/eval/leaderboard.csv").win_rate[0] >= 85
    if os.path.exists("out/ppo-bandit/model"):
        assert gold_at("out/ppo", 20) >= gold_at("out/ppo-bandit", 20) + .12
    # credit assignment alone: true values of clauses, where they are due or at the end
    assert gold_at(runs["segment"](), 16) >= gold_at(runs["bandit"](), 16) + .20


def test_the_world_is_as_described_and_the_reward_model_learns_what_is_worth_what(main_job, here):
    world = json.loads(Path("data/reviews/world.json").read_text())
    assert abs(world["gold"] + .72) < .15 and world["finished"] >= .98           # the SFT model's
    every, train, tests = [[*map(str, load_prompts(f"data/reviews/{name}.jsonl"))]
                           for name in ("pairs", "prompts", "prompts_test")]
    assert not {*every[-400:], *tests} & {*every[:-400], *train}
    source, (tokenizer, _), values, gold = PAIRS + ":train[-400:]", load_tokenizer(SFT), [], []
    pairs, (rows, cuts, scalars) = load_pairs(source), read(source, f"{ROOT}/out/rm/model")
    ids = pad_sequence([torch.tensor(r) for _, r in rows], batch_first=True)             # (2n, R)
    true = ids == tokenizer.convert_tokens_to_ids(".")
    for cutoff in (.75, 1.5, 2., 2.5, 1.):
        ends = segment_ends(*cuts, cutoff, "segment")
        assert 2 * (ends & true).sum() / (ends.sum() + true.sum()) >= .98                # F1
    for i, (_, r) in enumerate(rows):
        prompt = pairs[i // 2][0][0]["content"]
        texts = segment.segment_texts(tokenizer, r[:-1], ends[i, :len(r) - 1])
        values += prepare.segment_values(prompt, texts)
        gold.append(prepare.gold_reward(prompt, "".join(texts)))
    assert np.corrcoef(scalars[ends], values)[0, 1] >= .22
    scores, gold = sequence_score(scalars, ends).view(-1, 2), torch.tensor(gold).view(-1, 2)
    right = scores.diff() * gold.diff()
    assert (right > 0)[right != 0].float().mean() >= .70
    # S, where the reward model is used at each granularity
    for use, least, most in ("bandit", .85, 1.1), ("segment", 4, 12), ("token", 20, 60):
        go(train_ppo, f"--granularity {use} --max_steps 1 --reward_model {ROOT}/out/rm/model", use)
        assert least <= calibration(use)[-1] <= most
