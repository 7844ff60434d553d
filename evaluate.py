"""Chapter 4 of 4: does the policy answer better than the baseline?

    python evaluate.py                                      # the embedded world: PPO against SFT
    python evaluate.py --judge out/rm/model --html          # a reward model judges; a page of pairs
    python evaluate.py --baseline out/ppo-bandit/model --out out/eval-2      # two policies
    torchrun --nproc_per_node=8 evaluate.py --baseline SFT --data prompts.jsonl --judge CHAT_MODEL
    OPENAI_API_KEY=... python evaluate.py ... --judge gpt-4.1 --api_base https://api.openai.com/v1
    python evaluate.py --annotations FILES --difficulty FILE --gamed FILE    # figures alone

Both answer the same prompts, a judge prefers one answer of each pair, the preferences become a win
rate. Judges like long answers, so a second figure asks what the win rate would be at equal length
(Dubois et al. 2024, arXiv 2404.04475). Files have alpaca_eval's formats. What differs from it: the
fit has no penalty (within 0.12 points of their leaderboard); its standard error agrees with a
bootstrap (theirs is 2-6 times too small); language models see both orders of a pair.
"""
import csv
import hashlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import List, Optional

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig

from segment import (WORLD, Dtype, Granularity, LanguageModel, compute_dtype, encode_chats,
                     encode_prompts, fail, in_world, load_model, load_prompts,
                     load_tokenizer, map_rows, opt, parse, prepare_world, prompt_text,
                     rank, read_config, read_rows, response_mask, say, segment_ends, segment_texts,
                     sequence_score, setup, trained_how)
from train_rm import ScalarModel, write_text
from train_ppo import load_function, never_sampled, plain_copy, same_tokens, sample


@dataclass
class Config:
    model: str = opt("out/ppo/model", "the policy: a model, or a .json file of alpaca_eval outputs")
    baseline: str = opt(f"{WORLD}/sft", "what it is compared with: likewise")
    data: str = opt(f"{WORLD}/prompts_test.jsonl", "prompts")
    judge: str = opt(f"{WORLD}/prepare.py:gold_reward", "file.py:function of (prompt, response), a "
                     "reward model, a chat model, or with --api_base a model there")
    api_base: str = opt("", "URL of an OpenAI-compatible server; the key is in OPENAI_API_KEY")
    granularity: Optional[Granularity] = opt(None, "of a reward model that does not say its own")
    cutoff: Optional[float] = opt(None, "likewise; its segments are then cut by --baseline")
    out: str = opt("out/eval", "output folder")
    annotations: List[str] = field(default_factory=list, metadata={
        "help": "alpaca_eval annotations, with outputs or their lengths len_1 and len_2"})
    difficulty: str = opt("", "alpaca_eval's instruction difficulties: a JSON list, in row order")
    gamed: List[str] = field(default_factory=list, metadata={
        "help": "annotations of length-gamed baselines, told apart by their column variant"})
    temperature: float = opt(1.0, "1: what PPO trained; 0: greedy")
    max_prompt_tokens: int = opt(128, "longer prompts lose their oldest tokens (paper: 1024)")
    max_new_tokens: int = opt(128, "paper: 1024")
    max_samples: int = opt(0, "read at most this many prompts (0: all)")
    seed: int = opt(0, "of the samples")
    dtype: Dtype = opt("auto", "bf16 on CUDA, fp32 on CPU")
    micro_tokens: int = opt(16384, "tokens in one GPU's forward pass: lower it when out of memory")
    generation_batch_size: int = opt(128, "responses decoded at once on one GPU")
    show: int = opt(3, "pairs to print")
    html: bool = opt(False, "write OUT/index.html: the figures and up to 100 pairs")


# -- Figures: the win rate, and the win rate at equal length ---------------------------------------
def outcomes(preferences):
    """Preferences from 1 (the baseline's answer is better) to 2 -> y in [0, 1], (n,). None becomes
    NaN; 0 is alpaca_eval's old tie. ValueError outside, or when no preference is left."""
    y = np.array(preferences, dtype=np.float64)
    y = np.where(y == 0, 0.5, y - 1)
    if ((y < 0) | (y > 1)).any():
        raise ValueError("a preference lies outside [1, 2]")
    if np.isnan(y).all():
        raise ValueError("there is no preference to average")
    return y


def standard_error(x):
    """Of the mean of x, (n,), in percent"""
    if len(x) < 2:
        return math.nan
    return 100 * float(x.std(ddof=1)) / math.sqrt(len(x))


def win_rate(preferences):
    """The mean outcome in percent, its standard error, and counts; a draw is exactly 1.5.

    >>> win_rate([2.0, 2.0, 1.5, 1.0, None])["win_rate"]
    62.5
    """
    y = outcomes(preferences)
    y = y[~np.isnan(y)]
    wins = int((y > 0.5).sum())
    losses = int((y < 0.5).sum())
    draws = len(y) - wins - losses
    return {"win_rate": 100 * float(y.mean()), "standard_error": standard_error(y),
            "n_wins": wins, "n_wins_base": losses, "n_draws": draws, "n_total": len(y),
            "discrete_win_rate": 100 * (wins + draws / 2) / len(y)}


def design(preferences, len_baseline, len_model, difficulty, constant):
    """What is regressed on what, for the m pairs with a preference: y (m,) on
    x = [tanh(D / std D), difficulty if given, constant] (m, k), D the difference in length."""
    y = outcomes(preferences)
    there = ~np.isnan(y)
    D = np.subtract(len_baseline, len_model, dtype=np.float64)                           # (n,)
    t = np.zeros(len(D))                                                                 # (n,)
    if np.ptp(D[there]) > 0:
        t = np.tanh(D / D[there].std(ddof=1))
    columns = [t]
    if difficulty is not None:
        columns.append(np.asarray(difficulty, dtype=np.float64)[:len(y)])    # row i has the i-th
    columns.append(np.full(len(D), constant))
    return y[there], np.stack(columns, 1)[there]


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def logistic_fit(x, y, weight):
    """Newton's method for y ~ sigmoid(x @ w). x (m, k); y, weight (m,). Returns w (k,) and the
    Hessian (k, k); w is None if x separates the outcomes perfectly, for then no w is the best."""
    w = np.zeros(x.shape[1])
    for _ in range(100):
        p = sigmoid(x @ w)                                                               # (m,)
        hessian = (x.T * (weight * p * (1 - p))) @ x                                     # (k, k)
        step = np.linalg.lstsq(hessian, x.T @ (weight * (y - p)), rcond=None)[0]
        # a full step can overshoot: at most 3 logits at a time
        largest = np.abs(x @ step).max()
        w = w + step * min(1, 3 / (1e-9 + largest))
        if np.abs(x @ w).max() > 25:
            return None, None
        if np.abs(step).max() < 1e-10:
            break
    return w, hessian


def length_controlled_win_rate(preferences, len_baseline, len_model, difficulty=None, gamed=None):
    """The win rate that a logistic regression predicts at equal length, and its standard error.

    preferences: in [1, 2], (n,); lengths in characters, (n,); difficulty: at least n floats; gamed:
    [(preferences, len_baseline, len_model, difficulty)], one for each variant. With difficulty and
    gamed it is AlpacaEval 2's official figure. In percent; the raw win rate where lengths do not
    vary or one outcome is throughout; NaN where length separates the outcomes perfectly.
    """
    y, x = design(preferences, len_baseline, len_model, difficulty, 1.0)             # (m,), (m, k)
    if not x[:, 0].any() or np.ptp(y) == 0:
        return {"length_controlled_winrate": 100 * float(y.mean()),
                "lc_standard_error": standard_error(y)}
    # The baseline told to be brief, or long, against itself pins down what length alone does. Such
    # rows weigh a tenth and have no intercept: the baseline is no better than itself.
    parts = [(y, x)] + [design(*variant, constant=0.0) for variant in gamed or []]
    all_y, all_x = [np.concatenate(part) for part in zip(*parts)]                    # (M,), (M, k)
    weight = np.where(np.arange(len(all_y)) < len(y), 1.0, 0.1)
    w, hessian = logistic_fit(all_x, all_y, weight)
    if w is None:
        return {"length_controlled_winrate": math.nan, "lc_standard_error": math.nan}
    equal = x * (np.arange(x.shape[1]) > 0)                              # (m, k) with t = 0
    p, q = sigmoid(x @ w), sigmoid(equal @ w)                                        # (m,) each
    # Row i moves the mean of q by its own q, and by moving w: by H^-1 x_i (y_i - p_i), times the
    # gradient of mean q by w.
    gradient = (equal * (q * (1 - q))[:, None]).mean(0)                              # (k,)
    through_w = (y - p) * (x @ np.linalg.lstsq(hessian, gradient, rcond=None)[0])    # (m,)
    influence = q - q.mean() + len(y) * through_w                                    # (m,)
    return {"length_controlled_winrate": 100 * float(q.mean()),
            "lc_standard_error": standard_error(influence)}


# -- Judges ----------------------------------------------------------------------------------------
# Each yields (pair, preference), None where it cannot tell. A pair: messages, instruction (their
# text), output_1 and finished_1 (the baseline's; did a stop token end it?), the policy's likewise
def judge_by_function(cfg, pairs, device):
    """The higher score wins."""
    function = load_function(cfg.judge, "--judge")
    for pair in pairs:
        a = float(function(pair["instruction"], pair["output_1"], pair["finished_1"]))
        b = float(function(pair["instruction"], pair["output_2"], pair["finished_2"]))
        if not math.isfinite(b - a):                     # a NaN would pass for a draw
            fail(f"--judge {cfg.judge}: scores {a} and {b} for {pair['instruction'][:60]!r}")
        pair["score_1"], pair["score_2"] = a, b
        yield pair, 1.5 + float(np.sign(b - a)) / 2


def judge_by_reward_model(cfg, pairs, device):
    """Bradley-Terry: the policy's answer is better with probability sigmoid(score_2 - score_1), the
    scores read as the reward model was trained (chapter 2)."""
    granularity, cutoff = trained_how(cfg.judge, cfg.granularity, cfg.cutoff)
    tokenizer, stops = load_tokenizer(cfg.judge)
    context = read_config(cfg.judge).max_position_embeddings
    chats, completed = [], []
    for n, pair in enumerate(pairs, 1):
        answers = [pair["output_1"], pair["output_2"]]
        chats.append((pair["messages"], answers, f"{cfg.data} row {n}"))
        completed += [pair["finished_1"], pair["finished_2"]]
    rows = encode_chats(tokenizer, stops, chats, context, min(cfg.max_prompt_tokens, context // 2))
    for i, (p, r) in enumerate(rows):
        # the template ends every answer, but one that was cut off while it was sampled had no end
        if not completed[i] and len(r) > 1 and r[-1] in stops:
            rows[i] = p, r[:-1]
    dtype = compute_dtype(cfg.dtype, device)
    model = load_model(cfg.judge, ScalarModel, device, dtype)
    scalars = map_rows(model, rows, cfg.micro_tokens, device, "scores")                  # (2n, R)
    entropy = torch.zeros_like(scalars)
    if granularity == "segment":
        sft = load_model(find_segment_model(cfg, tokenizer), LanguageModel, device, dtype)
        _, entropy = map_rows(sft, rows, cfg.micro_tokens, device, "entropies")          # (2n, R)
    mask, finished = response_mask(rows, stops, device)                      # (2n, R), (2n,)
    ends = segment_ends(entropy, mask, finished, cutoff, granularity)                    # (2n, R)
    scores = sequence_score(scalars, ends).tolist()                                      # (2n,)
    for n, pair in enumerate(pairs):
        pair["score_1"], pair["score_2"] = scores[2 * n:2 * n + 2]
        if cfg.html and n < 100 and granularity != "bandit":             # to be shaded on the page
            i = 2 * n + 1
            response = rows[i][1]
            texts = segment_texts(tokenizer, response, ends[i, :len(response)].cpu())
            pair["segments"] = list(zip(texts, scalars[i, ends[i]].tolist()))
        yield pair, 1 + float(sigmoid(pair["score_2"] - pair["score_1"]))


def find_segment_model(cfg, tokenizer):
    """Whose entropies cut the judge's segments: the model it was trained with, else --baseline."""
    name = getattr(read_config(cfg.judge), "segment_model", cfg.baseline)
    try:
        AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception:                                    # neither a folder here nor on the hub
        name = cfg.baseline
    say(f"the segments of {cfg.judge} are cut by {name}")
    if not same_tokens(load_tokenizer(name)[0], tokenizer):
        fail(f"{name} cannot cut the segments of {cfg.judge}: its tokenizer is another")
    return name


QUESTION = """Read a conversation and two replies to it.\n\n<conversation>\n{}\n</conversation>\n
<reply A>\n{}\n</reply A>\n\n<reply B>\n{}\n</reply B>\n
Which reply would a careful, knowledgeable reader rather have received? Count whether it does what
was asked, is correct and is honest; do not count that it is longer or stands first. Write one
letter, A or B, and nothing else."""


def questions(pair):
    """Both orders, for judges lean towards a place: the policy's answer is B, then A."""
    prompt, one, two = pair["instruction"], pair["output_1"], pair["output_2"]
    return QUESTION.format(prompt, one, two), QUESTION.format(prompt, two, one)


def both_orders(b_first, b_second):
    """The preference, from the probabilities that B is better in the two orders."""
    return 1 + (b_first + 1 - b_second) / 2


def judge_by_chat_model(cfg, pairs, device):
    """p(B) / (p(A) + p(B)) of the token in which the two letters differ, in both orders."""
    tokenizer, stops = load_tokenizer(cfg.judge)
    context = read_config(cfg.judge).max_position_embeddings
    model = load_model(cfg.judge, LanguageModel, device, compute_dtype(cfg.dtype, device))
    for n in range(0, len(pairs), 64):
        block, rows = [], []
        for pair in pairs[n:n + 64]:
            asked = [[{"role": "user", "content": question}] for question in questions(pair)]
            chats = [(messages, ["A", "B"], "a pair") for messages in asked]
            four = encode_chats(tokenizer, stops, chats, 10 ** 9, 10 ** 9)   # 2 orders x 2 letters
            if max(len(p) + len(r) for p, r in four) > context:
                yield pair, None                         # cut, it would be another question
                continue
            block.append(pair)
            rows += four
        if block:
            differ = np.flatnonzero(rows[0][1] != rows[1][1])
            logprobs, _ = map_rows(model, rows, cfg.micro_tokens, device)                # (4b, R)
            letters = logprobs[:, differ[0]].view(-1, 2, 2)                # (b, 2 orders, A and B)
            p = letters.softmax(-1)[..., 1]                                              # (b, 2)
            yield from zip(block, both_orders(p[:, 0], p[:, 1]).tolist())


def judge_by_endpoint(cfg, pairs, device):
    """An OpenAI-compatible server. The client repeats what fails on the way; trouble that stays
    ends the run with one line."""
    try:
        import openai
    except ImportError:
        fail("--api_base needs the package: pip install openai")
    key = os.environ.get("OPENAI_API_KEY") or "none"     # read here, written nowhere
    client = openai.OpenAI(base_url=cfg.api_base, api_key=key, timeout=60, max_retries=6)

    def ask(question):
        """The probability that B is better, or None after five tries."""
        messages = [{"role": "user", "content": question}]
        settings = {"temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 5}
        for _ in range(5):
            try:
                return read_verdict(client.chat.completions.create(
                    model=cfg.judge, messages=messages, **settings))
            except (openai.BadRequestError, openai.UnprocessableEntityError):
                # some servers refuse log-probs, some models any settings
                settings = {"temperature": 0} if "logprobs" in settings else {}
            except (ValueError, TypeError, AttributeError, LookupError):
                pass                                     # no letter, or no chat completion at all

    def judge(pair):
        answers = [ask(question) for question in questions(pair)]
        return pair, None if None in answers else both_orders(*answers)

    with ThreadPool(8) as pool:
        try:
            yield from pool.imap_unordered(judge, pairs)
        except openai.OpenAIError as error:              # its text may hold the key
            fail("--api_base (verdicts so far are kept): " + str(error).replace(key, "***"))


def read_verdict(reply):
    """The probability that B is better: from the log-probs of A and B ("A" and " A" are two tokens)
    where the reply has them, else 0 or 1. ValueError if the reply is not a letter."""
    choice, p = reply.choices[0], {"A": 0.0, "B": 0.0}
    said = re.match(r"(?i:.*(?:answer|reply)(?: is)?)?\W*([AB])\W*(\n|$)", choice.message.content)
    if not said:
        raise ValueError("no verdict")
    p[said[1]] = 1e-30                                   # all that is known without log-probs
    for token in choice.logprobs.content if choice.logprobs else []:
        if token.token.strip() in p:
            for other in token.top_logprobs:
                if other.token.strip() in p:
                    p[other.token.strip()] += math.exp(other.logprob)
    return p["B"] / (p["A"] + p["B"])


# ==================================================================================================
# Plumbing. Verdicts and answers are kept: a killed run goes on, nothing is paid for twice
# ==================================================================================================
def find_judge(cfg):
    """Which of the four --judge is; trouble with it shows before minutes of sampling."""
    if cfg.judge == Config.judge and (cfg.api_base or not in_world(cfg.data)):
        fail("--judge: the default one knows the embedded world alone; name another")
    if cfg.api_base:
        return judge_by_endpoint
    if re.search(r"\.py:\w+$", cfg.judge):
        load_function(cfg.judge, "--judge")
        return judge_by_function
    config = read_config(cfg.judge)
    kind = (config.architectures or [""])[0]
    if kind.endswith("ForSequenceClassification") or hasattr(config, "segment_granularity"):
        trained_how(cfg.judge, cfg.granularity, cfg.cutoff)
        return judge_by_reward_model
    return judge_by_chat_model


KEY = ("judge", "instruction", "output_1", "output_2")


def judge_pairs(cfg, judge, pairs, device):
    """Give every pair its preference. A language model's are written to OUT/verdicts.jsonl as they
    come, keyed by plain text, and not asked for again."""
    path, name, kept, todo = f"{cfg.out}/verdicts.jsonl", cfg.judge, {}, pairs
    costly = judge in (judge_by_chat_model, judge_by_endpoint)
    if judge == judge_by_chat_model:
        name += " " + fingerprint(cfg.judge)
    if costly:
        for line in open(path) if os.path.exists(path) else []:
            try:
                row = json.loads(line)
                kept[tuple(row[column] for column in KEY)] = row["preference"]
            except (ValueError, LookupError, TypeError):
                pass                                     # torn by a kill
        for pair in pairs:
            key = (name, pair["instruction"], pair["output_1"], pair["output_2"])
            draw = 1.5 if pair["output_1"] == pair["output_2"] else None     # without a call
            pair["preference"] = kept.get(key, draw)
        todo = [pair for pair in pairs if pair["preference"] is None]
    for n, (pair, preference) in enumerate(judge(cfg, todo, device), 1):
        pair["preference"] = preference
        if costly and preference is not None and rank() == 0:
            row = {"judge": name, "preference": preference}
            for column in KEY[1:]:
                row[column] = pair[column]
            os.makedirs(cfg.out, exist_ok=True)
            with open(path, "a") as f:           # newline first: a torn line costs one verdict
                f.write("\n" + json.dumps(row))
        if n % 100 == 0:
            say(f"{n} of {len(todo)} verdicts")


def fingerprint(path):
    """What a model is: its commit on the hub, or a hash of a folder's files."""
    if not os.path.isdir(path):
        return str(read_config(path)._commit_hash)
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("*.*")):
        with open(file, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:16]


FILE = r"\.jsonl?(\.gz)?$"


def name_of(source):
    """What files and tables call it: out/ppo/model -> ppo, results/claude.json -> claude"""
    folder = source.rstrip("/").removesuffix("/model")
    return re.sub(FILE, "", os.path.basename(folder))


def read_answers(path, prompts):
    """Rows of alpaca_eval outputs, which must stand in the prompts' order."""
    rows = list(read_rows(path, len(prompts)))
    for n, (row, prompt) in enumerate(zip(rows, prompts), 1):
        if row.get("instruction") != prompt_text(prompt) or not isinstance(row.get("output"), str):
            fail(f"{path} row {n}: needs an output, and as its instruction prompt {n} of --data")
    return rows


def answer(cfg, source, name, prompts, side, device):
    """A model's answers, or a file's, as rows of alpaca_eval outputs. A model's are kept in
    OUT/NAME.json with what they were made by. side (0 baseline, 1 policy): whose random draws."""
    if re.search(FILE, source):
        return read_answers(source, prompts)
    path = f"{cfg.out}/{name}.json"
    R = cfg.max_new_tokens
    dtype = compute_dtype(cfg.dtype, device)
    made_by = (f"{fingerprint(source)}, {dtype}, {cfg.max_prompt_tokens} + {R} tokens, temperature "
               f"{cfg.temperature}, seed {cfg.seed}, side {side}")
    rows = read_answers(path, prompts) if os.path.exists(path) else []
    if rows and rows[0].get("made_by") != made_by:
        fail(f"{path} was made by {rows[0].get('made_by')}; now it would be by {made_by}: give "
             "another --out, or delete the file")
    say(f"{name}: {len(rows)} of {len(prompts)} answers are in {path}")
    if len(rows) == len(prompts):
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
    for first in range(len(rows), len(prompts), block):
        part = ids[first:first + block]
        seeds = [(cfg.seed, side, first + b) for b in range(len(part))]
        tokens, _, lengths = sample(model, part, stops, R, seeds, cfg.generation_batch_size,
                                    cfg.temperature, banned)                             # (b, R)
        for prompt, response, length in zip(prompts[first:], tokens.cpu(), lengths.tolist()):
            rows.append({"instruction": prompt_text(prompt),
                         "output": tokenizer.decode(response[:length], skip_special_tokens=True),
                         "generator": name, "dataset": os.path.basename(cfg.data),
                         "finished": bool(response[length - 1] in stops), "made_by": made_by})
        if rank() == 0:
            os.makedirs(cfg.out, exist_ok=True)
            write_text(path, json.dumps(rows, indent=1))
        say(f"{name}: {len(rows)} of {len(prompts)} answers")
    return rows


# -- Plumbing. Annotations -> figures -> table, files, page ----------------------------------------
def read_annotations(sources, column):
    """{policy or variant: its rows}, in the files' order"""
    groups = {}
    for source in sources:
        for n, row in enumerate(read_rows(source), 1):
            try:
                if "preference" not in row:
                    row["preference"] = row["preference_surrogate"]
                for k in "12":
                    if row.get(f"len_{k}") is None:
                        row[f"len_{k}"] = len(row[f"output_{k}"])
                outcomes([row["preference"], 0])
            except (ValueError, TypeError, LookupError):
                fail(f"{source} row {n}: needs a preference in [1, 2] or null, and output_1 and "
                     "output_2, or len_1 and len_2")
            groups.setdefault(row.get(column) or name_of(source), []).append(row)
    return groups


def columns_of(rows):
    """preferences (NaN: none), lengths of the baseline's and of the policy's answers, (n,) each"""
    return np.array([(row["preference"], row["len_1"], row["len_2"]) for row in rows], float).T


def figures(policies, difficulty, gamed):
    """{policy: its annotations} -> {policy: its row of alpaca_eval's leaderboard}, printed"""
    table, warnings = {}, []
    wide = max(len("policy"), *map(len, policies))
    variants = [(*columns_of(rows), difficulty) for rows in gamed.values()]
    say(f"\n{'policy':{wide}}    win rate      length-controlled  wins/draws/losses  characters"
        "    mean score")
    for name, rows in policies.items():
        preferences, len_1, len_2 = columns_of(rows)
        row = {**win_rate(preferences), "mode": "community", "avg_length": int(len_2.mean())}
        lc = length_controlled_win_rate(preferences, len_1, len_2, difficulty, variants)
        rate, rate_error = lc.values()
        counts = f"{row['n_wins']}/{row['n_draws']}/{row['n_wins_base']}"
        score = "-"
        if rows[0].get("score_2") is not None:
            scores = np.mean([(pair["score_2"], pair["score_1"]) for pair in rows], 0)
            score = "{:+.3f} vs {:+.3f}".format(*scores)
        lengths = f"{len_2.mean():.0f} vs {len_1.mean():.0f}"
        say(f"{name:{wide}}  {row['win_rate']:6.2f} +- {row['standard_error']:.2f}   {rate:6.2f} "
            f"+- {rate_error:.2f}       {counts:17}  {lengths}   {score}")
        if math.isnan(rate):
            warnings.append(f"{name}: length separates wins from losses perfectly: there is no fit")
        if not 20 <= row["win_rate"] <= 80:
            warnings.append(f"{name}: outside 20-80 % the length-controlled win rate extrapolates")
        if min((len_1 < len_2).mean(), (len_1 > len_2).mean()) < 0.15:
            warnings.append(f"{name}: one side is longer in fewer than 15 % of the pairs: likewise")
        if row["n_total"] < len(rows):
            warnings.append(f"{name}: {len(rows) - row['n_total']} pairs have no verdict")
        table[name] = row | lc
    for warning in warnings:
        say(f"warning: {warning}")
    return table


def report(cfg, policies):
    """The figures of {policy: its annotations}: printed, in OUT/leaderboard.csv, on a page."""
    difficulty = json.loads(Path(cfg.difficulty).read_text()) if cfg.difficulty else None
    table = figures(policies, difficulty, read_annotations(cfg.gamed, "variant"))
    os.makedirs(cfg.out, exist_ok=True)
    write_text(f"{cfg.out}/config.json", json.dumps(asdict(cfg), indent=1))
    with open(f"{cfg.out}/leaderboard.csv", "w") as f:
        leaderboard = csv.writer(f, lineterminator="\n")
        leaderboard.writerow(["", *next(iter(table.values()))])
        for name, row in table.items():                  # NaN: an empty cell, and null on the page
            table[name] = {key: None if value != value else value for key, value in row.items()}
            leaderboard.writerow([name, *table[name].values()])
    if cfg.html:
        pairs = {name: rows[:100] for name, rows in policies.items() if "output_2" in rows[0]}
        # without a "<" nothing in the data can end the element that holds it
        data = json.dumps({"table": table, "pairs": pairs}).replace("<", "\\u003c")
        page = Path(__file__).with_name("assets").joinpath("page.html").read_text()
        page = page.replace("{{nonce}}", os.urandom(16).hex()).replace("{{data}}", data)
        write_text(f"{cfg.out}/index.html", page)
    say(f"wrote {cfg.out}")


# ==================================================================================================
# The run
# ==================================================================================================
def main(cfg):
    device = setup()
    if os.path.exists(f"{cfg.out}/model"):
        fail(f"{cfg.out} holds a training run; give another --out")
    if cfg.annotations:
        if rank() == 0:
            report(cfg, read_annotations(cfg.annotations, "generator_2"))
        return

    # 1. both answer the same prompts
    prepare_world(cfg.model, cfg.baseline, cfg.data, cfg.judge)
    judge = find_judge(cfg)
    prompts = load_prompts(cfg.data, cfg.max_samples)
    policy, base = name_of(cfg.model), name_of(cfg.baseline)
    if base == policy:
        base += "-baseline"
    answers_2 = answer(cfg, cfg.model, policy, prompts, 1, device)
    answers_1 = answer(cfg, cfg.baseline, base, prompts, 0, device)
    if min(len(answers_1), len(answers_2)) < len(prompts):
        fail(f"a file of outputs is shorter than the {len(prompts)} prompts; see --max_samples")
    pairs = []
    for messages, one, two in zip(prompts, answers_1, answers_2):
        pairs.append({
            "instruction": prompt_text(messages), "output_1": one["output"], "generator_1": base,
            "output_2": two["output"], "generator_2": policy, "annotator": cfg.judge,
            "finished_1": one.get("finished", True), "finished_2": two.get("finished", True),
            "len_1": len(one["output"]), "len_2": len(two["output"]), "messages": messages})

    # 2. the judge prefers one; rank 0 alone asks functions and endpoints, the others are done
    if judge in (judge_by_function, judge_by_endpoint) and rank() > 0:
        return
    judge_pairs(cfg, judge, pairs, device)
    if rank() > 0:
        return

    # 3. figures
    for n, pair in enumerate(pairs):
        del pair["messages"]
        if n < cfg.show:
            say(f"\nuser: {pair['instruction']}\n{base}: {pair['output_1']}\n{policy}: "
                f"{pair['output_2']}\npreference: {pair['preference']}")
    os.makedirs(cfg.out, exist_ok=True)
    write_text(f"{cfg.out}/annotations.json", json.dumps(pairs, indent=1))
    report(cfg, {policy: pairs})


if __name__ == "__main__":
    main(parse(Config))
    dist.destroy_process_group()
