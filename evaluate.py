"""Chapter 4 of 4: does the policy answer better than the baseline?

    python evaluate.py                                     # the embedded world: PPO against SFT
    python evaluate.py --baseline out/ppo-bandit/model --out out/eval-2     # against another policy
    python evaluate.py --judge out/rm/model --html         # a reward model judges; a page of pairs
    torchrun --nproc_per_node=8 evaluate.py --data prompts.jsonl --baseline SFT --judge JUDGE \\
        --max_prompt_tokens 1024 --max_new_tokens 1024     # JUDGE: a chat model or reward model
    OPENAI_API_KEY=... python evaluate.py ... --judge gpt-4.1 --api_base https://api.openai.com/v1
    python evaluate.py --annotations FILES --difficulty FILE --gamed FILE       # figures alone

Policy and baseline answer the same prompts, a judge prefers one answer of each pair, and the
preferences become a win rate. Judges like long answers, so a second figure asks what the win rate
would be at equal length (Dubois et al. 2024, arXiv 2404.04475): a logistic regression of the outcome
on the difference in length, read where that is zero.

Answers (OUT/NAME.json) and verdicts of language models (OUT/verdicts.jsonl) are kept and used again:
a killed run goes on where it was and nothing is paid for twice. Files have alpaca_eval's formats.

What differs from alpaca_eval: the fit has no penalty (within 0.12 points of their leaderboard); its
standard error is the influence function's and agrees with a bootstrap (theirs is 2-6 times too
small); language models see every pair in both orders.
"""
import csv
import hashlib
import io
import json
import math
import os
import re
import secrets
import time
from dataclasses import asdict, dataclass, field
from multiprocessing.pool import ThreadPool
from typing import List, Optional

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig

from segment import (WORLD, Dtype, Granularity, LanguageModel, compute_dtype, encode_chats,
                     encode_prompts, fail, in_world, is_finished, load_model, load_prompts,
                     load_tokenizer, map_rows, one_line, opt, parse, prepare_world, prompt_text, rank,
                     read_config, read_rows, response_mask, say, segment_ends, segment_texts,
                     sequence_score, setup, trained_how)
from train_rm import ScalarModel, write_text
from train_ppo import load_function, never_sampled, plain_copy, same_tokens, sample


def files(help):
    return field(default_factory=list, metadata={"help": help})


@dataclass
class Config:
    # who answers what
    model: str = opt("out/ppo/model", "the policy: a model, or a .json file of alpaca_eval outputs")
    baseline: str = opt(f"{WORLD}/sft", "what it is compared with: likewise")
    data: str = opt(f"{WORLD}/prompts_test.jsonl", "prompts")
    out: str = opt("out/eval", "output folder")
    max_samples: int = opt(0, "read at most this many prompts (0: all)")
    # who judges
    judge: str = opt(f"{WORLD}/prepare.py:gold_reward", "file.py:function of (prompt, response), a "
                     "reward model, a chat model, or with --api_base a model there")
    api_base: str = opt("", "URL of an OpenAI-compatible server; the key is in OPENAI_API_KEY")
    granularity: Optional[Granularity] = opt(None, "of a reward model that does not say its own")
    cutoff: Optional[float] = opt(None, "likewise; its segments are then cut by --baseline")
    # figures from files, nothing is judged
    annotations: List[str] = files("alpaca_eval annotations, with outputs or with len_1 and len_2")
    difficulty: str = opt("", "alpaca_eval's instruction difficulties: a JSON list, in row order")
    gamed: List[str] = files("annotations of length-gamed baselines, told apart by `variant`")
    # sampling
    temperature: float = opt(1.0, "1: what PPO trained; 0: greedy")
    max_prompt_tokens: int = opt(128, "longer prompts lose their oldest tokens (paper: 1024)")
    max_new_tokens: int = opt(128, "paper: 1024")
    seed: int = opt(0, "of the samples")
    # hardware
    dtype: Dtype = opt("auto", "bf16 on CUDA, fp32 on CPU")
    micro_tokens: int = opt(16384, "tokens in one GPU's forward pass: lower it when out of memory")
    generation_batch_size: int = opt(128, "responses decoded at once on one GPU")
    # report
    show: int = opt(3, "pairs to print")
    html: bool = opt(False, "write OUT/index.html: the figures and up to 100 pairs")


# --------------------------------------------------------------------------------------------------
# Figures. 1. the win rate
# --------------------------------------------------------------------------------------------------
def outcomes(preferences):
    """Preferences from 1 (the baseline's answer is better) to 2 (the model's) -> y in [0, 1], (n,).

    None becomes NaN; 0 is alpaca_eval's old way to write a tie. ValueError outside.
    """
    y = np.array([np.nan if p is None else p for p in preferences], dtype=np.float64)
    y = np.where(y == 0, 0.5, y - 1)
    if ((y < 0) | (y > 1)).any():
        raise ValueError("a preference lies outside [1, 2]")
    return y


def standard_error(x):
    """Of the mean of x, (n,), in percent; NaN for a single value."""
    if len(x) < 2:
        return math.nan
    return 100 * float(x.std(ddof=1)) / math.sqrt(len(x))


def win_rate(preferences):
    """The mean outcome in percent, its standard error, and counts. A draw is exactly 1.5; None and NaN
    are left out; ValueError when nothing is left.

    >>> win_rate([2.0, 2.0, 1.5, 1.0])["win_rate"]
    62.5
    """
    y = outcomes(preferences)
    y = y[~np.isnan(y)]
    if not len(y):
        raise ValueError("there is no preference to average")
    rounded = np.where(y == 0.5, 0.5, np.round(y))
    return {"win_rate": 100 * float(y.mean()), "standard_error": standard_error(y),
            "n_wins": int((y > 0.5).sum()), "n_wins_base": int((y < 0.5).sum()),
            "n_draws": int((y == 0.5).sum()), "n_total": len(y),
            "discrete_win_rate": 100 * float(rounded.mean())}


# --------------------------------------------------------------------------------------------------
# Figures. 2. the win rate at equal length
# --------------------------------------------------------------------------------------------------
def design(preferences, len_baseline, len_model, difficulty, constant):
    """The regression's rows, of the m pairs with a preference: y (m,) and
    x = [tanh(D / std D), difficulty if given, constant] (m, k), D the difference in length."""
    y = outcomes(preferences)
    there = ~np.isnan(y)
    if not there.any():
        raise ValueError("there is no preference to average")
    D = np.subtract(len_baseline, len_model, dtype=np.float64)[there]                    # (m,)
    std = D.std(ddof=1) if len(D) > 1 else 0.0
    columns = [np.tanh(D / std) if std > 0 else np.zeros(len(D))]
    if difficulty is not None:
        if len(difficulty) < len(y):
            raise ValueError(f"{len(y)} rows, but only {len(difficulty)} difficulties")
        # by position: row i has the i-th, also when rows before it have no preference
        columns.append(np.asarray(difficulty, dtype=np.float64)[:len(y)][there])
    columns.append(np.full(len(D), constant))
    return y[there], np.stack(columns, 1)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def logistic_fit(x, y, weight):
    """Newton's method for y ~ sigmoid(x @ w). x (m, k); y, weight (m,). Returns w (k,) and the Hessian
    (k, k), or None, None if x separates the outcomes perfectly: then no finite fit is the best."""
    w = np.zeros(x.shape[1])
    for _ in range(100):
        p = sigmoid(x @ w)                                                               # (m,)
        hessian = (x.T * (weight * p * (1 - p))) @ x                                     # (k, k)
        step = np.linalg.lstsq(hessian, x.T @ (weight * (y - p)), rcond=None)[0]
        # a full step can overshoot: at most 3 logits at a time
        w = w + step * min(1, 3 / (1e-9 + np.abs(x @ step).max()))
        if np.abs(x @ w).max() > 25:
            return None, None
        if np.abs(step).max() < 1e-10:
            break
    return w, hessian


def length_controlled_win_rate(preferences, len_baseline, len_model, difficulty=None, gamed=None):
    """The win rate that the regression predicts at equal length, and its standard error, in percent.

    preferences: in [1, 2], (n,); lengths in characters, (n,); difficulty: at least n floats; gamed:
    [(preferences, len_baseline, len_model, difficulty)], one for each variant. With difficulty and
    gamed it is AlpacaEval 2's official figure. Where all lengths differ alike, or one outcome is
    throughout, the raw win rate; NaN where length separates wins from losses perfectly.
    """
    y, x = design(preferences, len_baseline, len_model, difficulty, 1.0)                 # (m,), (m, k)
    if not x[:, 0].any() or y.min() == y.max():
        return {"length_controlled_winrate": 100 * float(y.mean()),
                "lc_standard_error": standard_error(y)}
    # The baseline told to be brief, or long, against itself pins down what length alone does. Such
    # rows weigh a tenth and have no intercept: the baseline is no better than itself.
    all_y, all_x = [y], [x]
    for p, len_1, len_2, d in gamed or []:
        gamed_y, gamed_x = design(p, len_1, len_2, difficulty if d is None else d, 0.0)
        all_y.append(gamed_y)
        all_x.append(gamed_x)
    all_y, all_x = np.concatenate(all_y), np.concatenate(all_x)                          # (M,), (M, k)
    weight = np.where(np.arange(len(all_y)) < len(y), 1.0, 0.1)
    w, hessian = logistic_fit(all_x, all_y, weight)
    if w is None:
        return {"length_controlled_winrate": math.nan, "lc_standard_error": math.nan}

    equal = x.copy()
    equal[:, 0] = 0                                                      # t = 0: equal length
    q, p = sigmoid(equal @ w), sigmoid(x @ w)                                            # (m,) each
    # How far row i moves the mean of q: by its own q, and by what it does to w, which is
    # H^-1 x_i (y_i - p_i), times G, the gradient of mean q by w.
    G = (equal * (q * (1 - q))[:, None]).mean(0)                                         # (k,)
    moved = x @ np.linalg.lstsq(hessian, G, rcond=None)[0]                               # (m,)
    influence = q - q.mean() + len(y) * (y - p) * moved                                  # (m,)
    return {"length_controlled_winrate": 100 * float(q.mean()),
            "lc_standard_error": standard_error(influence)}


# --------------------------------------------------------------------------------------------------
# Judges. Each yields (pair, verdict): a preference in [1, 2], or None where it could not judge. A pair
# has messages, instruction (their text), output_1 (the baseline's), output_2 (the policy's),
# finished_1 and finished_2 (was the answer ended by a stop token?)
# --------------------------------------------------------------------------------------------------
def kind_of_judge(cfg):
    """What --judge is; trouble with it is found here, before minutes of sampling."""
    if cfg.judge == Config.judge and (cfg.api_base or not in_world(cfg.data)):
        fail("--judge: the default one knows the embedded world alone; name another")
    if cfg.api_base:
        if not re.fullmatch(r"https?://[^\s@?#]+", cfg.api_base):
            fail("--api_base takes http(s)://host/v1, and the key is taken from OPENAI_API_KEY")
        return "endpoint"
    if re.search(r"\.py:\w+$", cfg.judge):
        load_function(cfg.judge, "--judge")
        return "function"
    config = read_config(cfg.judge)
    architecture = (config.architectures or [""])[0]
    if architecture.endswith("ForSequenceClassification") or hasattr(config, "segment_granularity"):
        trained_how(cfg.judge, cfg.granularity, cfg.cutoff)
        return "reward model"
    return "chat model"


def judge_by_function(cfg, pairs):
    """The higher score wins."""
    function = load_function(cfg.judge, "--judge")
    for pair in pairs:
        a = float(function(pair["instruction"], pair["output_1"], pair["finished_1"]))
        b = float(function(pair["instruction"], pair["output_2"], pair["finished_2"]))
        if not math.isfinite(a + b):                     # a NaN would pass for a draw
            fail(f"--judge {cfg.judge}: scores {a} and {b} for {pair['instruction'][:60]!r}")
        pair["score_1"], pair["score_2"] = a, b
        yield pair, 1.5 + float(np.sign(b - a)) / 2


def judge_by_reward_model(cfg, pairs, device):
    """Bradley-Terry: the policy's answer is better with probability sigmoid(score_2 - score_1), the
    scores read as the reward model was trained (chapter 2)."""
    granularity, cutoff = trained_how(cfg.judge, cfg.granularity, cfg.cutoff)
    dtype = compute_dtype(cfg.dtype, device)
    tokenizer, stops = load_tokenizer(cfg.judge)
    context = read_config(cfg.judge).max_position_embeddings
    chats = [(pair["messages"], [pair["output_1"], pair["output_2"]], f"{cfg.data} row {n}")
             for n, pair in enumerate(pairs, 1)]
    rows = encode_chats(tokenizer, stops, chats, context, min(cfg.max_prompt_tokens, context // 2))
    completed = [pair[key] for pair in pairs for key in ("finished_1", "finished_2")]
    for i, (p, r) in enumerate(rows):
        # The template ends every answer. One that was cut off while it was sampled had no end.
        if not completed[i] and len(r) > 1 and r[-1] in stops:
            rows[i] = p, r[:-1]
    model = load_model(cfg.judge, ScalarModel, device, dtype)
    scalars = map_rows(model, rows, cfg.micro_tokens, device, "scores")                  # (2n, R)
    entropy = torch.zeros_like(scalars)
    if granularity == "segment":
        sft = load_model(find_segment_model(cfg, tokenizer), LanguageModel, device, dtype)
        _, entropy = map_rows(sft, rows, cfg.micro_tokens, device, "entropies")          # (2n, R)
    mask, finished = response_mask(rows, device), is_finished(rows, stops).to(device)
    ends = segment_ends(entropy, mask, finished, cutoff, granularity)                    # (2n, R)
    scores = sequence_score(scalars, ends).tolist()
    for n, pair in enumerate(pairs):
        pair["score_1"], pair["score_2"] = scores[2 * n:2 * n + 2]
        if cfg.html and granularity != "bandit" and n < 100:             # to be shaded on the page
            i, (_, r) = 2 * n + 1, rows[2 * n + 1]
            texts = segment_texts(tokenizer, r, ends[i, :len(r)].cpu())
            pair["segments"] = list(zip(texts, scalars[i][ends[i]].tolist()))
        yield pair, 1 + float(sigmoid(np.clip(pair["score_2"] - pair["score_1"], -500, 500)))


def find_segment_model(cfg, tokenizer):
    """The model whose entropies cut the judge's segments: the one it was trained with, if that can be
    found, else --baseline."""
    name = getattr(read_config(cfg.judge), "segment_model", cfg.baseline)
    try:
        AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception:                                    # neither a folder here nor on the hub
        name = cfg.baseline
    say(f"the segments of {cfg.judge} are cut by {name}")
    if not same_tokens(load_tokenizer(name)[0], tokenizer):
        fail(f"{name} cannot cut the segments of {cfg.judge}: its tokenizer is another")
    return name


QUESTION = """Here are a conversation and two replies that could follow it.

<conversation>
{}
</conversation>

<reply A>
{}
</reply A>

<reply B>
{}
</reply B>

Which reply would a careful, knowledgeable reader rather have received? What counts is that it does \
what was asked, is correct and is honest; that it is longer, or comes first, does not count. Write \
one letter, A or B, and nothing else."""


def questions(pair):
    """Both orders, for judges lean towards a place: the policy's answer is B, then A."""
    one, two = pair["output_1"], pair["output_2"]
    return [QUESTION.format(pair["instruction"], one, two),
            QUESTION.format(pair["instruction"], two, one)]


def both_orders(b_first, b_second):
    """A preference from the probabilities that B is better, in the two orders of `questions`."""
    return 1 + (b_first + 1 - b_second) / 2


def judge_by_chat_model(cfg, pairs, device):
    """p(B) / (p(A) + p(B)) of the reply's first token, in both orders."""
    tokenizer, stops = load_tokenizer(cfg.judge)
    context = read_config(cfg.judge).max_position_embeddings
    model = load_model(cfg.judge, LanguageModel, device, compute_dtype(cfg.dtype, device))
    for first in range(0, len(pairs), 64):
        block, chats = pairs[first:first + 64], []
        for pair in block:
            for question in questions(pair):
                chats.append(([{"role": "user", "content": question}], ["A", "B"], "a pair"))
        rows = encode_chats(tokenizer, stops, chats, 10 ** 9, 10 ** 9)                   # 4 a pair
        (_, a), (_, b) = rows[:2]
        k = int(np.argmax(a[:min(len(a), len(b))] != b[:min(len(a), len(b))]))   # they part here
        # a question that was cut would get an answer too, to another question
        fits = [n for n in range(len(block))
                if max(len(p) for p, _ in rows[4 * n:4 * n + 4]) + k < context]
        asked = [(p, r[:k + 1]) for n in fits for p, r in rows[4 * n:4 * n + 4]]
        second = []
        if asked:
            logprobs, _ = map_rows(model, asked, cfg.micro_tokens, device, "verdicts")   # (4n, k+1)
            second = logprobs[:, k].view(-1, 2, 2).softmax(-1)[:, :, 1].tolist()         # (n, 2)
        for n, (p, q) in zip(fits, second):
            yield block[n], both_orders(p, q)
        for n in set(range(len(block))) - set(fits):
            yield block[n], None


# --------------------------------------------------------------------------------------------------
# Judges. An OpenAI-compatible endpoint
# --------------------------------------------------------------------------------------------------
def judge_by_endpoint(cfg, pairs):
    """The same question over the network. The client repeats what fails on the way; trouble that
    stays (network, key, no such model) ends the run with one line."""
    try:
        import openai
    except ImportError:
        fail("--api_base needs the package: pip install openai")
    key = os.environ.get("OPENAI_API_KEY") or "none"     # read here, written nowhere
    client = openai.OpenAI(base_url=cfg.api_base, api_key=key, timeout=60, max_retries=6)
    likely = {"temperature": 0, "max_tokens": 8}
    certain = {**likely, "logprobs": True, "top_logprobs": 5}
    refusals = (openai.BadRequestError, openai.UnprocessableEntityError)

    def request(question):
        """Some servers refuse log-probs, some models any setting. Still refused: the question."""
        messages = [{"role": "user", "content": question}]
        for settings in (certain, likely):
            try:
                return client.chat.completions.create(model=cfg.judge, messages=messages, **settings)
            except refusals:
                pass
        return client.chat.completions.create(model=cfg.judge, messages=messages)

    def ask(question):
        """The probability that B is better; None after three replies without a verdict."""
        for _ in range(3):
            try:
                return read_verdict(request(question).choices[0])
            except refusals:
                return None
            except (ValueError, TypeError, AttributeError, LookupError):
                pass                                     # evasive, or no chat completion at all
        return None

    def judge(pair):
        probabilities = [ask(question) for question in questions(pair)]
        return pair, None if None in probabilities else both_orders(*probabilities)

    with ThreadPool(8) as pool:
        try:
            yield from pool.imap_unordered(judge, pairs)
        except openai.OpenAIError as error:
            # the server may have put the key into its message
            fail(f"--api_base: {one_line(str(error).replace(key, '***'))}; the verdicts so far are "
                 "kept, the same command goes on")


def read_verdict(choice):
    """The probability that B is better, from the log-probs of A and B where the reply has them ("A" and
    " A" are two tokens), else from the letter. ValueError if the reply is not a letter."""
    text = (choice.message.content or "").strip()
    said = re.fullmatch(r"(?i:.*(?:answer|reply)(?: is)?)?\W*([AB])\W*", text.partition("\n")[0])
    if not said:
        raise ValueError("no verdict")
    for token in (choice.logprobs and choice.logprobs.content) or []:
        if token.token.strip() == said[1]:
            p = {"A": 0.0, "B": 0.0}
            for other in token.top_logprobs or []:
                if other.token.strip() in p:
                    p[other.token.strip()] += math.exp(min(0.0, other.logprob))
            if p["A"] + p["B"] > 0:
                return p["B"] / (p["A"] + p["B"])
    return float(said[1] == "B")


# ==================================================================================================
# Plumbing. Verdicts: those of language models are kept as they come
# ==================================================================================================
def judge_pairs(cfg, kind, pairs, device):
    """Give every pair its preference: 1 to 2, or None where the judge had no verdict."""
    if kind == "function":
        return fill_in(judge_by_function(cfg, pairs), len(pairs))
    if kind == "reward model":
        return fill_in(judge_by_reward_model(cfg, pairs, device), len(pairs))
    judge = cfg.judge                                    # its part in the key of a kept verdict
    if kind == "chat model":
        judge += " " + fingerprint(cfg.judge)
    path = f"{cfg.out}/verdicts.jsonl"
    kept, open_pairs = read_verdicts(path), {}
    for pair in pairs:
        pair["key"] = judge, pair["instruction"], pair["output_1"], pair["output_2"]
        if pair["output_1"] == pair["output_2"]:
            kept[pair["key"]] = 1.5                      # a draw without a call
        elif pair["key"] not in kept:
            open_pairs[pair["key"]] = pair
    todo = list(open_pairs.values())
    if kind == "chat model":
        verdicts = judge_by_chat_model(cfg, todo, device)
    else:
        verdicts = judge_by_endpoint(cfg, todo)
    for pair in fill_in(verdicts, len(todo), path):
        kept[pair["key"]] = pair["preference"]
    for pair in pairs:
        pair["preference"] = kept[pair["key"]]


def fill_in(verdicts, total, path=None):
    """Write each verdict into its pair, and into the file `path`; tell how far it is."""
    done, said = [], time.time()
    for pair, preference in verdicts:
        pair["preference"] = preference
        done.append(pair)
        if path and preference is not None and rank() == 0:
            row = dict(zip(VERDICT, [*pair["key"], preference]))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "a") as f:
                f.write("\n" + json.dumps(row))          # newline first: a torn line costs one verdict
        if time.time() - said > 20:
            said = time.time()
            say(f"{len(done)} of {total} verdicts")
    return done


VERDICT = ("judge", "instruction", "output_1", "output_2", "preference")


def read_verdicts(path):
    """{(judge, instruction, output_1, output_2): preference}; what a kill tore is left out."""
    kept = {}
    for line in open(path) if os.path.exists(path) else []:
        try:
            *key, preference = [json.loads(line)[name] for name in VERDICT]
            kept[tuple(key)] = preference
        except (ValueError, KeyError, TypeError):
            pass
    return kept


# --------------------------------------------------------------------------------------------------
# Plumbing. Answers: sampled, read from a file, or kept from before
# --------------------------------------------------------------------------------------------------
def is_file(source):
    return bool(re.search(r"\.jsonl?(\.gz)?$", source))


def name_of(source):
    """What files and tables call a model: out/ppo/model -> ppo, results/claude.json -> claude"""
    name = os.path.basename(source.rstrip("/").removesuffix("/model"))
    name = re.sub(r"\.jsonl?(\.gz)?$", "", name) or "model"
    return f"{name}-model" if name in ("config", "annotations") else name


def fingerprint(path):
    """What a model is: its commit on the hub, or a hash of all files of a folder, so that nothing old
    is taken for the answer of new weights."""
    if not os.path.isdir(path):
        return str(read_config(path)._commit_hash)
    digest = hashlib.sha256()
    for name in sorted(os.listdir(path)):
        if os.path.isfile(f"{path}/{name}"):
            with open(f"{path}/{name}", "rb") as f:
                digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:16]


def read_answers(path, prompts):
    """The rows of a file of alpaca_eval outputs, which must stand in the prompts' order."""
    rows = list(read_rows(path))[:len(prompts)]
    for n, (row, prompt) in enumerate(zip(rows, prompts), 1):
        if row.get("instruction") != prompt_text(prompt) or not isinstance(row.get("output"), str):
            fail(f"{path} row {n}: needs an output, and as instruction the text of prompt {n}, "
                 f"{prompt_text(prompt)[:60]!r}")
    return rows


def answer(cfg, source, name, prompts, side, device):
    """The answers of a model (or a file) to the prompts, as rows of alpaca_eval outputs, also kept in
    OUT/NAME.json. side (0 baseline, 1 policy) parts the two models' random draws."""
    if is_file(source):
        rows = read_answers(source, prompts)
        if len(rows) < len(prompts):
            fail(f"{source}: {len(rows)} outputs for the {len(prompts)} prompts of {cfg.data}")
        return rows
    path, R, dtype = f"{cfg.out}/{name}.json", cfg.max_new_tokens, compute_dtype(cfg.dtype, device)
    made_by = (f"{fingerprint(source)} in {dtype}, {cfg.max_prompt_tokens} + {R} tokens, temperature "
               f"{cfg.temperature}, seed {cfg.seed} {side}")
    rows = read_answers(path, prompts) if os.path.exists(path) else []
    for row in rows:
        if row.get("made_by") != made_by:
            fail(f"{path} was made by {row.get('made_by')}, now it would be by {made_by}: give "
                 "another --out, or delete the file")
    if len(rows) == len(prompts):
        say(f"{name}: the answers in {path} are used again")
        return rows

    tokenizer, stops = load_tokenizer(source)
    config = read_config(source)
    if cfg.max_prompt_tokens + R > config.max_position_embeddings:
        fail(f"--max_prompt_tokens + --max_new_tokens: the context of {source} is "
             f"{config.max_position_embeddings}")
    ids = encode_prompts(tokenizer, prompts, cfg.max_prompt_tokens, cfg.data)
    model = plain_copy(load_model(source, LanguageModel, device, dtype), dtype, device)
    banned = never_sampled(tokenizer, stops, config.vocab_size).to(device)
    block = cfg.generation_batch_size * dist.get_world_size()
    for first in range(len(rows), len(prompts), block):          # what a kill left is not made again
        numbers = range(first, min(first + block, len(prompts)))
        tokens, _, lengths = sample(
            model, [ids[n] for n in numbers], stops, R, [(cfg.seed, side, n) for n in numbers],
            cfg.generation_batch_size, cfg.temperature, banned)                          # (b, R)
        for n, row, length in zip(numbers, tokens.cpu(), lengths.tolist()):
            rows.append({"instruction": prompt_text(prompts[n]),
                         "output": tokenizer.decode(row[:length], skip_special_tokens=True),
                         "generator": name, "dataset": os.path.basename(cfg.data),
                         "finished": bool(row[length - 1] in stops), "made_by": made_by})
        write(path, json.dumps(rows, indent=1))
        say(f"{name}: {len(rows)} of {len(prompts)} answers")
    return rows


def write(path, text):
    """From rank 0. OUT is made by the first thing that is written into it."""
    if rank() == 0:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_text(path, text)


# --------------------------------------------------------------------------------------------------
# Plumbing. Annotations -> figures -> table, files, page
# --------------------------------------------------------------------------------------------------
LEADERBOARD = ("win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total",
               "discrete_win_rate", "mode", "avg_length", "length_controlled_winrate",
               "lc_standard_error")                              # alpaca_eval's columns


def read_annotations(sources, column):
    """{policy or variant: its rows}, by `column`, in the files' order."""
    groups = {}
    for source in sources:
        for n, row in enumerate(read_rows(source), 1):
            if "preference" not in row:
                row["preference"] = row.get("preference_surrogate", -1)
            try:
                outcomes([row["preference"]])
            except (ValueError, TypeError):
                fail(f"{source} row {n}: needs a preference in [1, 2], or null")
            for k in "12":
                if isinstance(row.get(f"output_{k}"), str):
                    row[f"len_{k}"] = len(row[f"output_{k}"])
                if row.get(f"len_{k}") is None:
                    fail(f"{source} row {n}: needs output_{k} or len_{k}")
            groups.setdefault(row.get(column) or name_of(source), []).append(row)
    return groups


def read_difficulty(path):
    try:
        with open(path) as f:
            return [float(d) for d in json.load(f)]
    except (OSError, ValueError, TypeError) as error:
        fail(f"--difficulty {path}: must be a JSON list of numbers ({one_line(error)})")


def figures(rows, difficulty, gamed):
    """A policy's annotations -> its row of the leaderboard, and what the table and warnings need.
    gamed: {variant: rows}"""
    columns = {name: [row.get(name) for row in rows]
               for name in ("preference", "len_1", "len_2", "score_1", "score_2")}
    variants = []
    for gamed_rows in gamed.values():
        variants.append((*zip(*[(r["preference"], r["len_1"], r["len_2"]) for r in gamed_rows]),
                         difficulty))
    preferences, len_1, len_2 = columns["preference"], columns["len_1"], columns["len_2"]
    result = win_rate(preferences)
    result |= length_controlled_win_rate(preferences, len_1, len_2, difficulty, variants)
    result |= {"mode": "community", "avg_length": int(np.mean(len_2)),
               "avg_length_baseline": int(np.mean(len_1)),
               "shorter": float(np.mean(np.less(len_2, len_1))),
               "longer": float(np.mean(np.greater(len_2, len_1)))}
    for name in ("score_1", "score_2"):
        scores = [score for score in columns[name] if score is not None]
        result[name] = float(np.mean(scores)) if scores else None
    return result


def report(cfg, policies):
    """Print and write what follows from the annotations {policy: rows}."""
    difficulty = read_difficulty(cfg.difficulty) if cfg.difficulty else None
    gamed, table = read_annotations(cfg.gamed, "variant"), {}
    for name, rows in policies.items():
        try:
            table[name] = figures(rows, difficulty, gamed)
        except ValueError as error:
            fail(f"{name}: {error}")
    by_rate = sorted(table, key=lambda name: -np.nan_to_num(table[name]["length_controlled_winrate"]))
    print_table({name: table[name] for name in by_rate})
    text = io.StringIO()
    leaderboard = csv.writer(text, lineterminator="\n")
    leaderboard.writerow(["", *LEADERBOARD])
    for name in by_rate:
        for column, value in table[name].items():
            if isinstance(value, float) and math.isnan(value):
                table[name][column] = None               # an empty cell; JSON has no NaN
        leaderboard.writerow([name, *[table[name][column] for column in LEADERBOARD]])
    write(f"{cfg.out}/leaderboard.csv", text.getvalue())
    write(f"{cfg.out}/config.json", json.dumps(asdict(cfg), indent=1))
    if cfg.html:
        write_page(cfg, {name: table[name] for name in by_rate}, policies)
    say(f"wrote {cfg.out}")


def print_table(table):
    wide = max(len("policy"), *map(len, table))
    say(f"\n{'policy':{wide}}    win rate      length-controlled  wins/draws/losses  characters    "
        "mean score")
    for name, r in table.items():
        counts, score = f"{r['n_wins']}/{r['n_draws']}/{r['n_wins_base']}", "-"
        if r["score_2"] is not None:
            score = f"{r['score_2']:+.3f} vs {r['score_1']:+.3f}"
        say(f"{name:{wide}}  {r['win_rate']:6.2f} +- {r['standard_error']:.2f}   "
            f"{r['length_controlled_winrate']:6.2f} +- {r['lc_standard_error']:.2f}       {counts:17}  "
            f"{r['avg_length']} vs {r['avg_length_baseline']}   {score}")
    for name, r in table.items():
        if math.isnan(r["length_controlled_winrate"]):
            say(f"warning: {name}: length tells wins from losses perfectly, so there is no "
                "length-controlled win rate")
        if not 20 <= r["win_rate"] <= 80:
            say(f"warning: {name}: the win rate is outside 20-80 %, the length-controlled one "
                "extrapolates")
        if 0 < r["shorter"] + r["longer"] and min(r["shorter"], r["longer"]) < 0.15:
            say(f"warning: {name}: one side is longer in fewer than 15 % of the pairs, the "
                "length-controlled win rate extrapolates")


def write_page(cfg, table, policies):
    """assets/page.html with the figures and 100 pairs a policy as JSON; without a "<" nothing in it can
    end the element that holds it."""
    pairs = {name: [row for row in rows[:100] if isinstance(row.get("output_2"), str)]
             for name, rows in policies.items()}
    data = {"judge": "" if cfg.annotations else cfg.judge, "table": table, "pairs": pairs}
    text = json.dumps(data).replace("<", "\\u003c")
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets/page.html")) as f:
        template = f.read().replace("{{nonce}}", secrets.token_hex(16))
    write(f"{cfg.out}/index.html", template.replace("{{data}}", text))


# ==================================================================================================
# The run
# ==================================================================================================
ANNOTATION = ("instruction", "output_1", "generator_1", "output_2", "generator_2", "annotator",
              "preference", "score_1", "score_2")


def main(cfg):
    device = setup()
    if os.path.exists(f"{cfg.out}/config.json"):
        with open(f"{cfg.out}/config.json") as f:
            if "judge" not in json.load(f):
                fail(f"{cfg.out} holds a training run; give another --out")
    if cfg.annotations:
        if rank() == 0:
            report(cfg, read_annotations(cfg.annotations, "generator_2"))
        return
    prepare_world(cfg.model, cfg.baseline, cfg.data, cfg.judge)
    kind = kind_of_judge(cfg)

    # ----------------------------------------------------------------------------------------------
    # 1. both answer the same prompts
    # ----------------------------------------------------------------------------------------------
    prompts = load_prompts(cfg.data, cfg.max_samples)
    policy, base = name_of(cfg.model), name_of(cfg.baseline)
    if base == policy:
        base += "-baseline"
    answers_2 = answer(cfg, cfg.model, policy, prompts, 1, device)
    answers_1 = answer(cfg, cfg.baseline, base, prompts, 0, device)
    pairs = []
    for messages, one, two in zip(prompts, answers_1, answers_2):
        pairs.append({
            "messages": messages, "instruction": prompt_text(messages), "annotator": cfg.judge,
            "output_1": one["output"], "generator_1": base, "finished_1": one.get("finished", True),
            "output_2": two["output"], "generator_2": policy, "finished_2": two.get("finished", True)})

    # ----------------------------------------------------------------------------------------------
    # 2. a judge prefers one. A function or an endpoint is rank 0's; the others have no more to do
    # ----------------------------------------------------------------------------------------------
    if kind in ("function", "endpoint") and rank() > 0:
        return
    judge_pairs(cfg, kind, pairs, device)
    if rank() > 0:
        return

    # ----------------------------------------------------------------------------------------------
    # 3. the preferences become figures
    # ----------------------------------------------------------------------------------------------
    failed = sum(pair["preference"] is None for pair in pairs)
    if failed == len(pairs):
        fail(f"--judge {cfg.judge}: there is no verdict on any pair")
    annotations = [{name: pair[name] for name in ANNOTATION if name in pair} for pair in pairs]
    write(f"{cfg.out}/annotations.json", json.dumps(annotations, indent=1))
    for pair in pairs:
        pair["len_1"], pair["len_2"] = len(pair["output_1"]), len(pair["output_2"])
    for pair in pairs[:cfg.show]:
        say(f"\nuser: {pair['instruction']}\n{base}: {pair['output_1']}\n{policy}: "
            f"{pair['output_2']}\npreference: {pair['preference']}")
    report(cfg, {policy: pairs})
    if failed:
        say(f"warning: {failed} pairs have no verdict; the same command asks for them again")


if __name__ == "__main__":
    main(parse(Config))
    dist.destroy_process_group()
