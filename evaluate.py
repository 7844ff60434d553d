"""Chapter 4 of 4: does the policy answer better than the baseline?

    python evaluate.py                                             # the embedded world: PPO policy against SFT model
    torchrun --nproc_per_node=8 evaluate.py --model out/ppo/model --baseline meta-llama/Llama-3.1-8B-Instruct \\
        --data prompts.jsonl --judge RM --max_prompt_tokens 1024 --max_new_tokens 1024        # torchrun as in chapter 2
    python evaluate.py --model out/ppo/model out/ppo-bandit/model --out out/eval-two          # several policies
    python evaluate.py ... --judge my_reward.py:score              # a Python function: the higher score wins
    python evaluate.py ... --judge out/rm/model                    # a reward model: sigmoid of the score difference
    python evaluate.py ... --judge Qwen/Qwen2.5-7B-Instruct        # a chat model on this machine
    OPENAI_API_KEY=... python evaluate.py ... --judge gpt-4.1 --api_base https://api.openai.com/v1
    python evaluate.py --annotations FILE --difficulty FILE --gamed FILE     # every figure from annotations alone
    python evaluate.py --pairs --data PREFERENCES --judge out/rm/model       # how often does a judge match the labels?

Policy and baseline answer the same prompts, a judge prefers one answer of each pair, and the preferences become a
win rate. Judges like long answers, so a second figure asks what the win rate would be at equal length (Dubois et
al. 2024, arXiv 2404.04475): a logistic regression of the outcome on the difference in length, read where it is 0.
Answers and verdicts are kept, line by line, in OUT: a killed run goes on where it was, and nothing is paid twice.

Deviations from alpaca_eval: the length-controlled fit is unpenalised (within 0.12 points of their leaderboard); its
standard error is the influence function's (theirs is 2-6 times too small); language models judge both orders.
"""
import csv
import hashlib
import html
import http.client
import io
import json
import math
import os
import random
import re
import threading
import urllib.request
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from itertools import combinations, count
from typing import List, Literal

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from segment import (WORLD, LanguageModel, clean, compute_dtype, encode_chats, encode_prompts, fail, is_finished,
                     load_model, load_pairs, load_prompts, load_tokenizer, map_rows, on_rank0, one_line, opt,
                     prepare_world, rank, read_config, read_rows, read_weights, say, segment_ends, segment_texts,
                     sequence_score, setup, start, tokenize, use_cores)
from train_rm import (ScalarModel, already_finished, fingerprint, load_function, lock, log_metrics, read_json,
                      read_reward_json, write_json, write_text)
from train_ppo import never_sampled, prompt_text, sample


def several(default, help):
    return field(default_factory=lambda: list(default), metadata={"help": help})


@dataclass
class Config:
    # who answers, who judges
    model: List[str] = several(["out/ppo/model"], "the policies: models, or files of alpaca_eval outputs")
    baseline: str = opt(f"{WORLD}/sft", "what they are compared with: a model, or a file of alpaca_eval outputs")
    data: str = opt(f"{WORLD}/prompts_test.jsonl", "prompts (columns prompt or instruction); with --pairs preferences")
    judge: str = opt(f"{WORLD}/prepare.py:gold_reward", "file.py:function, a reward model or a chat model")
    api_base: str = opt("", "OpenAI-compatible URL that has the model --judge; key: OPENAI_API_KEY")
    out: str = opt("out/eval", "output folder")
    pairs: bool = opt(False, "evaluate the judge instead: how often it prefers what --data calls chosen")
    # figures from files
    annotations: List[str] = several([], "judge nothing: alpaca_eval annotations, with outputs or len_1, len_2")
    difficulty: str = opt("", "alpaca_eval's instruction difficulties: a JSON list, the i-th belongs to row i")
    gamed: List[str] = several([], "annotations of length-gamed baselines, split by their column variant")
    # sampling
    temperature: float = opt(1.0, "1: the distribution that PPO trained; 0: greedy")
    seed: int = opt(0, "of the samples")
    max_samples: int = opt(0, "use at most this many rows of --data (0: all)")
    max_prompt_tokens: int = opt(128, "longer prompts lose their oldest tokens (paper: 1024)")
    max_new_tokens: int = opt(128, "paper: 1024")
    # hardware, network
    dtype: Literal["auto", "bf16", "fp32"] = opt("auto", "bf16 on CUDA, fp32 on CPU")
    micro_tokens: int = opt(16384, "tokens in one forward pass on one GPU, padding included")
    generation_batch_size: int = opt(128, "responses decoded at once on one GPU")
    workers: int = opt(8, "requests to --api_base at a time")
    timeout: float = opt(60.0, "seconds until a request counts as failed")
    tries: int = opt(10, "of a failing request, with growing pauses, before its pair is left out")
    # report
    show: int = opt(3, "pairs to print")
    html: bool = opt(False, "write OUT/index.html: the figures and 100 pairs a policy")
    reward_model: str = opt("", "shades the page's segments by their reward (default: the judge, if it is one)")
    wandb: str = opt("", "log to this wandb project too")


# ------------------------------------------------------------------------------------------------------------
# Figures. 1. the win rate
# ------------------------------------------------------------------------------------------------------------
def outcomes(preferences):
    """Preferences in [1, 2] (2: the model's answer is better) -> y in [0, 1], float (n,). None becomes NaN; 0 is
    alpaca_eval's old tie. ValueError outside."""
    y = np.array([np.nan if p is None else p for p in preferences], dtype=np.float64)
    y = np.where(y == 0, 0.5, y - 1)
    if ((y < 0) | (y > 1)).any():
        raise ValueError("a preference lies outside [1, 2]")
    return y


def win_rate(preferences):
    """The mean outcome in percent, its standard error (NaN for a single pair) and counts. A draw is exactly 1.5; None
    and NaN are left out; ValueError when nothing is left.

    >>> win_rate([2.0, 2.0, 1.5, 1.0])["win_rate"]
    62.5
    """
    y = outcomes(preferences)
    y = y[~np.isnan(y)]
    if not len(y):
        raise ValueError("there is no preference to average")
    return {"win_rate": 100 * float(y.mean()), "standard_error": standard_error(y),
            "n_wins": int((y > 0.5).sum()), "n_wins_base": int((y < 0.5).sum()), "n_draws": int((y == 0.5).sum()),
            "n_total": len(y), "discrete_win_rate": 100 * float(np.where(y == 0.5, 0.5, np.round(y)).mean())}


def standard_error(x):
    """Of the mean of x, in percent, without its NaNs; NaN below two."""
    x = x[~np.isnan(x)]
    return 100 * float(x.std(ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else math.nan


def wilson(right, n, z=1.96):
    """95 % interval of a share, in percent; honest near 0 and 1 and for small n."""
    middle, half = right / n + z * z / (2 * n), z * math.sqrt(right / n * (1 - right / n) / n + z * z / (4 * n * n))
    return 100 * (middle - half) / (1 + z * z / n), 100 * (middle + half) / (1 + z * z / n)


# ------------------------------------------------------------------------------------------------------------
# Figures. 2. the win rate at equal length
# ------------------------------------------------------------------------------------------------------------
def design(preferences, len_baseline, len_model, difficulty, constant):
    """-> y (m,), x = [tanh(D / std D), difficulty if given, constant] (m, k), and there (n,): the rows that have a y"""
    y = outcomes(preferences)
    there = ~np.isnan(y)
    D = (np.asarray(len_baseline, dtype=np.float64) - np.asarray(len_model, dtype=np.float64))[there]
    std = D.std(ddof=1) if len(D) > 1 else 0.0
    x = [np.tanh(D / std) if std > 0 else np.zeros(len(D)), np.full(len(D), constant)]
    if difficulty is not None:
        if len(difficulty) < len(y):
            raise ValueError(f"{len(y)} rows, but only {len(difficulty)} difficulties")
        x.insert(1, np.asarray(difficulty, dtype=np.float64)[:len(y)][there])             # by position: row i has d_i
    return y[there], np.stack(x, 1), there


def length_controlled(preferences, len_baseline, len_model, difficulty=None, gamed=None):
    """-> the length-controlled win rate as a fraction, and each row's influence on it (n,), NaN without preference.

    No length difference to control for, or one outcome throughout: the raw win rate. Outcomes that length (and
    difficulty) separate perfectly have no finite fit: NaN.
    """
    y, x, there = design(preferences, len_baseline, len_model, difficulty, 1.0)           # (m,), (m, k)
    influence = np.full(len(there), np.nan)
    if not len(y):
        raise ValueError("there is no preference to average")
    if not x[:, 0].any() or np.ptp(y) == 0:
        influence[there] = y - y.mean()
        return float(y.mean()), influence
    # Variants of the baseline told to be brief, or long, pin down what length alone does; they weigh a tenth and
    # have no intercept, because the baseline is no better than itself.
    more = [design(p, a, b, difficulty if d is None else d, 0.0) for p, a, b, d in gamed or []]
    X = np.concatenate([x] + [m[1] for m in more])                                        # (M, k)
    Y = np.concatenate([y] + [m[0] for m in more])
    weight = np.where(np.arange(len(Y)) < len(y), 1.0, 0.1)
    sigmoid = lambda z: 1 / (1 + np.exp(-z))

    w = np.zeros(X.shape[1])                                                              # Newton
    for _ in range(100):
        p = sigmoid(X @ w)
        H = (X.T * (weight * p * (1 - p))) @ X                                            # (k, k)
        step = np.linalg.lstsq(H, X.T @ (weight * (Y - p)), rcond=None)[0]
        w = w + step * min(1, 3 / (1e-9 + np.abs(X @ step).max()))                        # at most 3 logits at a time
        if np.abs(X @ w).max() > 25:
            return math.nan, influence                                                    # it runs away: separable
        if np.abs(step).max() < 1e-10:
            break

    # LC = mean q, q = p at equal length. How LC moves with row i: directly, and through the weights (H^-1 score_i).
    x0 = x * (np.arange(x.shape[1]) > 0)                                                  # t = 0
    q, p = sigmoid(x0 @ w), sigmoid(x @ w)                                                # (m,)
    G = (x0 * (q * (1 - q))[:, None]).mean(0)                                             # (k,) d LC / d w
    influence[there] = q - q.mean() + len(y) * (y - p) * (x @ np.linalg.lstsq(H, G, rcond=None)[0])
    return float(q.mean()), influence


def length_controlled_win_rate(preferences, len_baseline, len_model, difficulty=None, gamed=None):
    """preferences in [1, 2], lengths in characters, (n,) each; difficulty: at least n floats, row i has the i-th;
    gamed: [(preferences, len_baseline, len_model, difficulty)], one per variant. With difficulty and gamed it is
    AlpacaEval 2's official figure. In percent; both NaN where no fit exists (see length_controlled)."""
    lc, influence = length_controlled(preferences, len_baseline, len_model, difficulty, gamed)
    return {"length_controlled_winrate": 100 * lc, "lc_standard_error": standard_error(influence)}


# ------------------------------------------------------------------------------------------------------------
# Judges. verdicts(pairs) yields (pair, {"preference": 1 to 2, ...} or {"failed": reason}) for every pair.
# alone: rank 0 asks it, the others aren't needed; scores: it scores each answer, so identical ones are asked too.
# A pair: messages, instruction (their text), output_1 (the baseline's), output_2 (the policy's), finished (of both).
# ------------------------------------------------------------------------------------------------------------
Judge = namedtuple("Judge", "id alone scores verdicts")
FUNCTION, FILE = re.compile(r"\.py:\w+$"), re.compile(r"\.jsonl?(\.gz)?$")
ASK = """Two assistants, A and B, continued the same conversation. Decide which answer is better: the one that a careful
reader would rather have received. Correct, helpful and honest counts; longer or shown first does not.

<conversation>
{}
</conversation>

<answer A>
{}
</answer A>

<answer B>
{}
</answer B>

Which answer is better? Reply with one letter, A or B, and nothing else."""


def open_judge(cfg, device):
    """The form of --judge decides. Its id, part of the cache's keys, changes with what the file or the weights hold."""
    if cfg.api_base:
        return Judge(f"{cfg.judge} {digest(ASK)}", True, False, lambda pairs: ask_endpoint(cfg, pairs))
    f = load_function(cfg.judge, "--judge", float) if FUNCTION.search(cfg.judge) else None
    name = f"{cfg.judge} {on_rank0(content_id, cfg.judge)}"
    if f:
        return Judge(name, True, True, lambda pairs: ask_function(cfg, f, pairs))
    if is_reward_model(cfg.judge):
        return Judge(name, False, True, lambda pairs: ask_reward_model(cfg, pairs, device))
    return Judge(f"{name} {digest(ASK)}", False, False, lambda pairs: ask_chat_model(cfg, pairs, device))


def questions(pair):
    """Both orders, for judges lean towards a place: the policy's answer is B, then A."""
    a, b = pair["output_1"], pair["output_2"]
    return ASK.format(pair["instruction"], a, b), ASK.format(pair["instruction"], b, a)


def ask_function(cfg, f, pairs):
    """The higher score wins."""
    for pair in pairs:
        a, b = (f(pair["instruction"], pair[f"output_{k}"], pair["finished"][k - 1]) for k in (1, 2))
        if not math.isfinite(a + b):
            fail(f"--judge {cfg.judge}: {a} and {b} for the prompt {pair['instruction'][:60]!r} are no scores")
        yield pair, {"preference": 1.5 + ((b > a) - (b < a)) / 2, "score_1": a, "score_2": b}


def ask_reward_model(cfg, pairs, device):
    """Bradley-Terry: the probability that the policy's answer is better is sigmoid(score_2 - score_1)."""
    read = open_reward_model(cfg, cfg.judge, device)
    for block in blocks(pairs, 256):
        scores = read([(p["messages"], p[f"output_{k}"], p["finished"][k - 1]) for p in block for k in (1, 2)])[0]
        for pair, a, b in zip(block, scores[0::2], scores[1::2]):
            yield pair, {"preference": 1 + 1 / (1 + math.exp(min(a - b, 700))), "score_1": a, "score_2": b}


def open_reward_model(cfg, path, device):
    """-> read(answers, texts=False). answers: [(messages, response, finished)]; gives their scores and, with texts,
    the segments of each as [(text, reward)]. Scored as it was trained, by the granularity and cutoff in its
    reward.json; a sequence classifier without one is read at the last token, as transformers does."""
    dtype, sft, saved = compute_dtype(cfg.dtype, device), None, {"granularity": "bandit", "cutoff": 0}
    if os.path.isfile(f"{path}/reward.json"):
        saved = on_rank0(read_reward_json, f"{path}/reward.json")
    tokenizer, stops = load_tokenizer(path)
    context = read_config(path).max_position_embeddings
    model = load_model(path, ScalarModel, device, dtype)
    if saved["granularity"] == "segment":                        # the SFT model's entropies cut its segments
        def find():
            for source in (saved["sft_model"], cfg.baseline):
                try:
                    if fingerprint(source) == saved["sft_fingerprint"]:
                        return source
                except Exception:                                # neither a folder nor a model of the hub
                    pass
            fail(f"{path}: its segments need {saved['sft_model']}, which isn't there or has other weights by now; "
                 "--baseline can name it")
        sft = load_model(on_rank0(find), LanguageModel, device, dtype)

    def read(answers, texts=False):
        limit = min(cfg.max_prompt_tokens, context // 2)
        chats = [(messages, response, "an answer") for messages, response, _ in answers]
        rows = encode_chats(tokenizer, stops, chats, context, limit)
        # where sampling was cut off there was no end-of-turn token
        rows = [(p, r if a[2] or len(r) < 2 or r[-1] not in stops else r[:-1]) for (p, r), a in zip(rows, answers)]
        values = map_rows(model, rows, cfg.micro_tokens, device)[0]                                  # (B, R)
        entropy = map_rows(sft, rows, cfg.micro_tokens, device)[2] if sft else torch.zeros_like(values)
        lengths = torch.tensor([[len(r)] for _, r in rows], device=device)                           # (B, 1)
        mask, finished = torch.arange(values.shape[1], device=device) < lengths, is_finished(rows, stops).to(device)
        ends = segment_ends(entropy, mask, finished, saved["cutoff"], saved["granularity"])
        segments = [list(zip(segment_texts(tokenizer, r[:len(r) - int(r[-1] in stops)], e[:len(r)].cpu()),
                             v[e].tolist())) for (_, r), v, e in zip(rows, values, ends)] if texts else []
        return sequence_score(values, ends).tolist(), segments
    return read


def ask_chat_model(cfg, pairs, device):
    """p(B) / (p(A) + p(B)) for the next token, in both orders."""
    (tokenizer, _), context = load_tokenizer(cfg.judge), read_config(cfg.judge).max_position_embeddings
    model = load_model(cfg.judge, LanguageModel, device, compute_dtype(cfg.dtype, device))
    labels = [x[:1] for x in tokenize(tokenizer, ["A", "B"])]
    if labels[0].tolist() == labels[1].tolist():
        fail(f"--judge {cfg.judge}: its tokenizer doesn't know the labels A and B")
    for block in blocks(pairs, 64):
        chats = [[{"role": "user", "content": q}] for pair in block for q in questions(pair)]
        ids = encode_prompts(tokenizer, chats, 10 ** 9, "pairs")
        rows = [(p if len(p) < context else p[:1], label) for p in ids for label in labels]
        logp = map_rows(model, rows, cfg.micro_tokens, device)[0][:, 0].view(-1, 2, 2)     # (pairs, orders, labels)
        second = logp.softmax(-1)[..., 1].tolist()                                                   # (pairs, orders)
        for pair, (p, q), lengths in zip(block, second, blocks([len(p) for p in ids], 2)):
            yield pair, ({"preference": 1 + (p + 1 - q) / 2} if max(lengths) < context else
                         {"failed": f"longer than the judge's context of {context}"})


# ------------------------------------------------------------------------------------------------------------
# Judges. An OpenAI-compatible endpoint, over a network that breaks
# ------------------------------------------------------------------------------------------------------------
class Failed(Exception):
    """No verdict. kind: "network" (worth many tries), "reply" (the judge evades), "pair" (no use), "all" (no use for
    any pair); wait: seconds that the server asks for."""
    def __init__(self, kind, reason, wait=0.0):
        super().__init__(reason)
        self.kind, self.wait = kind, wait


class AnyStatus(urllib.request.HTTPErrorProcessor):
    """Every status comes back to us, and no redirect is followed: it could carry the key to another host."""
    def http_response(self, request, response):
        return response
    https_response = http_response


def ask_endpoint(cfg, pairs):
    key = os.environ.get("OPENAI_API_KEY", "").strip()           # read here and kept nowhere
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        fail("OPENAI_API_KEY holds characters that no header can carry")
    hide = lambda text: text.replace(key, "***") if key else text         # before anything is cut
    over, lost = threading.Event(), 0                            # lost: pairs in a row that found no working endpoint
    pool = ThreadPoolExecutor(cfg.workers)

    def persist(question):
        for attempt in count(1):
            try:
                return ask(cfg, key, question)
            except Failed as e:
                if attempt >= {"network": cfg.tries, "reply": 3}.get(e.kind, 1) or over.is_set():
                    raise
                over.wait(max(e.wait, min(10, 0.1 * 2 ** attempt) * random.uniform(0.5, 1)))

    asked = {pool.submit(lambda pair: [persist(q) for q in questions(pair)], pair): pair for pair in pairs}
    try:
        for done in as_completed(asked):
            try:
                p, q = done.result()
                lost, verdict = 0, {"preference": 1 + (p + 1 - q) / 2}
            except Failed as e:
                lost += e.kind == "network"
                verdict = {"failed": one_line(hide(str(e)))}
                if e.kind == "all" or lost >= 10:
                    fail(f"--api_base: {verdict['failed']}; verdicts so far are kept, run the same command again")
            yield asked[done], verdict
    finally:
        over.set()
        pool.shutdown(cancel_futures=True)


def ask(cfg, key, question, logprobs=True):
    """One request -> the probability that B is better. Failed where there is none, with the whole text, which may hold
    the key: ask_endpoint hides that before it cuts the text."""
    body = {"model": cfg.judge, "messages": [{"role": "user", "content": question}], "max_tokens": 8, "temperature": 0}
    body |= {"logprobs": True, "top_logprobs": 5} if logprobs else {}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    url = f"{cfg.api_base.rstrip('/')}/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.build_opener(AnyStatus).open(request, timeout=cfg.timeout) as r:
            status, wait, text = r.status, r.headers.get("Retry-After", ""), r.read().decode("utf-8", "replace")
    except (OSError, ValueError, http.client.HTTPException) as e:          # time-outs, refused and broken connections
        raise Failed("network", f"no answer: {str(e) or type(e).__name__}")
    if status in (400, 422) and logprobs:                        # a server that offers none may refuse to be asked
        return ask(cfg, key, question, logprobs=False)
    if status != 200:
        passing = status >= 500 or status in (408, 409, 425, 429)
        kind = "network" if passing else "all" if status in (401, 403, 404) else "pair"
        seconds = float(wait) if re.fullmatch(r"\d+(\.\d+)?", wait) else 0.0
        raise Failed(kind, f"HTTP {status} {text}", min(60.0, seconds))
    try:
        return read_verdict(json.loads(text)["choices"][0])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise Failed("network", f"not a chat completion: {text}")


def read_verdict(choice):
    """The reply must be a bare label; how sure the judge was of it is in the log-probabilities, if there are any."""
    text = choice["message"]["content"] or choice["message"].get("refusal") or ""
    said = re.fullmatch(r"\W*(?:(?i:the )?(?i:better )?(?i:answer|response|output)\W+(?:(?i:is)\W+)?)?([AB])\W*",
                        text.strip().partition("\n")[0])
    if not said:
        raise Failed("reply", f"no verdict in: {text}")
    for token in (choice.get("logprobs") or {}).get("content") or ():
        if token["token"].strip() == said[1]:
            p = Counter()
            for x in token.get("top_logprobs") or ():
                p[x["token"].strip()] += math.exp(min(0.0, x["logprob"])) if x["logprob"] < 1 else 0.0       # NaN: 0
            if p["A"] + p["B"] > 0:
                return p["B"] / (p["A"] + p["B"])
    return float(said[1] == "B")


# ============================================================================================================
# Plumbing. What is done stays done: a cache of answers and verdicts, the run's folder
# ============================================================================================================
def digest(*parts):
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def content_id(source):
    """A hash of what a file, a file.py:function or a model holds."""
    path = source.rpartition(":")[0] if FUNCTION.search(source) else source
    if os.path.isfile(path):
        with open(path, "rb") as f:
            return hashlib.blake2b(f.read(), digest_size=16).hexdigest()
    if FILE.search(path):
        fail(f"{path}: no such file")
    read_config(path)                                            # says it best if there is no model at all
    return fingerprint(path)


def is_reward_model(path):
    return os.path.isfile(f"{path}/reward.json") or \
        any(a.endswith("ForSequenceClassification") for a in read_config(path).architectures or ())


def blocks(items, size):
    return [items[k:k + size] for k in range(0, len(items), size)]


class Cache(dict):
    """key -> row, written through to a file with one JSON object a line. A line torn by a kill is ignored."""

    def __init__(self, path):
        super().__init__(on_rank0(self.read, path))
        self.path = path

    @staticmethod
    def read(path):
        rows, line = {}, "\n"
        for line in open(path, encoding="utf-8", errors="replace") if os.path.exists(path) else ():
            try:
                row = json.loads(line)
                assert isinstance(row["finished"], bool) and isinstance(row["output"], str) if "output" in row else \
                    1 <= row["preference"] <= 2
                rows[row.pop("key")] = row
            except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError):
                pass
        if line[-1] != "\n":
            with open(path, "a", encoding="utf-8") as f:
                f.write("\n")
        return rows

    def add(self, key, row):
        self[key] = row
        if rank() == 0:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps({"key": key} | row) + "\n")


NOT_COMPARED = ("out", "api_base", "workers", "timeout", "tries", "micro_tokens", "generation_batch_size", "show",
                "html", "reward_model", "wandb")                 # no figure depends on these


def begin(cfg, sources):
    """True if OUT holds this very evaluation, finished. An unfinished one goes on from its caches, also with another
    judge. For rank 0."""
    path = f"{cfg.out}/config.json"
    unfinished = os.path.exists(path) and "judge" in (old := read_json(path)) and not old.get("finished")
    if not unfinished and already_finished(cfg, NOT_COMPARED, sources=sources):
        return True
    lock(cfg.out)
    write_json(path, asdict(cfg) | {"sources": sources})
    return False


# ------------------------------------------------------------------------------------------------------------
# Plumbing. Answers: generated, or read from a file
# ------------------------------------------------------------------------------------------------------------
def name_of(source):
    """out/ppo/model -> ppo; results/claude.json -> claude"""
    name = FILE.sub("", os.path.basename(source.rstrip("/").removesuffix("/model"))) or "model"
    return name + "-model" if name in ("config", "annotations", "summary", "pairs") else name


def read_outputs(source, chats):
    """[(text, finished)] from alpaca_eval's outputs, found by their instruction."""
    given = {}
    for n, row in read_rows(source):
        if not isinstance(row.get("instruction"), str) or not isinstance(row.get("output"), str):
            fail(f"{source} row {n}: needs the columns instruction and output")
        output = clean(row["output"])
        if given.setdefault(clean(row["instruction"]), output) != output:
            fail(f"{source} row {n}: a second output for an instruction that came before; one file for each generator")
    for n, chat in enumerate(chats, 1):
        if prompt_text(chat) not in given:
            fail(f"{source}: no output for prompt {n}, {prompt_text(chat)[:60]!r}")
    return [(given[prompt_text(chat)], True) for chat in chats]


def answer(cfg, source, chats, side, cache, device):
    """[(text, finished)] of a model to every prompt. side (0 policies, 1 baseline) keeps their luck apart. A block is
    one batch on every rank, and then in the cache."""
    (tokenizer, stops), config = load_tokenizer(source), read_config(source)
    R, dtype = cfg.max_new_tokens, compute_dtype(cfg.dtype, device)
    if cfg.max_prompt_tokens + R > config.max_position_embeddings:
        fail(f"--max_prompt_tokens {cfg.max_prompt_tokens} + --max_new_tokens {R}: the context of {source} is "
             f"{config.max_position_embeddings}")
    prompts = encode_prompts(tokenizer, chats, cfg.max_prompt_tokens, cfg.data)
    settings = [on_rank0(fingerprint, source), str(dtype), R, cfg.temperature, cfg.temperature and [cfg.seed, side]]
    keys = [digest(settings, n, p.tolist()) for n, p in enumerate(prompts)]
    todo = sorted((n for n in range(len(chats)) if keys[n] not in cache), key=lambda n: len(prompts[n]))
    if todo:                                                     # every rank has a whole copy to decode with
        use_cores(config)
        hf = read_weights(AutoModelForCausalLM, source, config, dtype).to(device)
        banned = never_sampled(tokenizer, stops, config.vocab_size).to(device)
    waves = blocks(todo, cfg.generation_batch_size * dist.get_world_size())
    for block in tqdm(waves, source, leave=False, disable=True if rank() or not todo else None):
        seeds = [(cfg.seed, 3, side, n) for n in block]
        tokens, logprobs, lengths = sample(hf, [prompts[n] for n in block], stops, R, seeds, cfg.generation_batch_size,
                                           cfg.temperature, banned)                        # (b, R), (b, R), (b,)
        if not logprobs.isfinite().all():
            fail(f"{source}: its logits are not finite; the weights are broken, or try --dtype fp32")
        for n, t, length in zip(block, tokens.tolist(), lengths.tolist()):
            cache.add(keys[n], {"output": tokenizer.decode(t[:length], skip_special_tokens=True),
                                "finished": t[length - 1] in stops.tolist()})
    return [(cache[k]["output"], cache[k]["finished"]) for k in keys]


# ------------------------------------------------------------------------------------------------------------
# Plumbing. Annotations -> figures -> table, files, page
# ------------------------------------------------------------------------------------------------------------
LEADERBOARD = ("win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total", "discrete_win_rate", "mode",
               "avg_length", "length_controlled_winrate", "lc_standard_error")               # alpaca_eval's columns


def read_annotations(sources, by="generator_2"):
    """{policy (or variant): its rows}, checked, in the order of the files, each with preference, len_1 and len_2."""
    groups = {}
    for source in sources:
        for n, row in read_rows(source):
            p = row["preference"] if "preference" in row else row.get("preference_surrogate", "nothing")
            if not isinstance(row.get("instruction", ""), (str, type(None))):
                fail(f"{source} row {n}: the instruction is no text")
            if p is not None and not (isinstance(p, (int, float)) and (p == 0 or 1 <= p <= 2 or p != p)):
                fail(f"{source} row {n}: preference must be in [1, 2] or null; here it is {p!r}")
            row = row | {"preference": p}
            for k in "12":
                if isinstance(row.get(f"output_{k}"), str):
                    row[f"len_{k}"] = len(row[f"output_{k}"])
                elif not isinstance(row.get(f"len_{k}"), (int, float)) or not 0 <= row[f"len_{k}"] < 2 ** 63:
                    fail(f"{source} row {n}: needs output_{k} or len_{k}")
            name = next((row[c] for c in (by, "generator_2") if row.get(c) is not None), name_of(source))
            groups.setdefault(clean(str(name)), []).append(row)
    return groups


def figures(policies, difficulty=None, gamed={}):
    """{name: rows} -> {name: leaderboard row}, best first, and [paired differences between two policies]."""
    columns = lambda rows: [[r[c] for r in rows] for c in ("preference", "len_1", "len_2")]
    variants, table, by_prompt = [(*columns(rows), difficulty) for rows in gamed.values()], {}, {}
    for name, rows in policies.items():
        preferences, a, b = columns(rows)
        try:
            table[name] = win_rate(preferences)
            lc, influence = length_controlled(preferences, a, b, difficulty, variants)
        except ValueError as e:
            fail(f"{name}: {e}")
        table[name] |= {"mode": "community", "avg_length": int(np.mean(b)), "length_controlled_winrate": 100 * lc,
                        "lc_standard_error": standard_error(influence), "avg_length_baseline": int(np.mean(a)),
                        "shorter": float(np.mean(np.less(b, a))), "longer": float(np.mean(np.greater(b, a)))}
        for k in ("score_1", "score_2"):
            if scores := [r[k] for r in rows if isinstance(r.get(k), (int, float))]:
                table[name][k] = float(np.mean(scores))
        prompts, seen = [r.get("instruction") or r.get("index", n) for n, r in enumerate(rows)], Counter()
        keys = [(k, seen.update([k]) or seen[k]) for k in prompts]                          # a prompt may come twice
        by_prompt[name] = dict(zip(keys, zip(outcomes(preferences), influence)))
    table = dict(sorted(table.items(), key=lambda kv: -np.nan_to_num(kv[1]["length_controlled_winrate"], nan=-1)))
    differences = []
    for one, other in combinations(table, 2):
        both = [by_prompt[one][k] + by_prompt[other][k] for k in by_prompt[one] if k in by_prompt[other]]
        y, i, z, j = np.array(both, dtype=np.float64).reshape(-1, 4).T                               # (n,) each
        d, lc = (y - z)[~np.isnan(y - z)], "length_controlled_winrate"
        differences.append({
            "policy": one, "other": other, "n": len(d), "win_rate": 100 * float(d.mean()) if len(d) else math.nan,
            "standard_error": standard_error(d), lc: table[one][lc] - table[other][lc],
            "lc_standard_error": standard_error(i - j)})
    return table, differences


def print_figures(table, differences):
    wide, places = max(len("policy"), *map(len, table)), list(table)
    rates = lambda r, sign="": (f"{r['win_rate']:{sign}6.2f} +- {r['standard_error']:.2f}   "
                                f"{r['length_controlled_winrate']:{sign}6.2f} +- {r['lc_standard_error']:.2f}")
    say(f"\n{'policy':{wide}}    win rate      length-controlled  wins/draws/losses  characters    mean score")
    for name, r in table.items():
        counts, score = f"{r['n_wins']}/{r['n_draws']}/{r['n_wins_base']}", "-"
        if "score_2" in r:
            score = f"{r['score_2']:+.3f} vs {r['score_1']:+.3f}"
        say(f"{name:{wide}}  {rates(r)}       {counts:17}  {r['avg_length']} vs {r['avg_length_baseline']}   {score}")
    for d in differences:
        if places.index(d["other"]) == places.index(d["policy"]) + 1:                       # the others: summary.json
            say(f"{d['policy']} - {d['other']}, paired (n = {d['n']}): {rates(d, '+')}")
    for name, r in table.items():
        if math.isnan(r["length_controlled_winrate"]):
            say(f"warning: {name}: length tells wins from losses perfectly, so no length-controlled win rate exists")
        if not 20 <= r["win_rate"] <= 80:
            say(f"warning: {name}: the win rate is outside 20-80 %, the length-controlled one extrapolates")
        if 0 < r["shorter"] + r["longer"] and min(r["shorter"], r["longer"]) < 0.15:
            say(f"warning: {name}: one side is longer in fewer than 15 % of the pairs, the length-controlled win rate "
                "extrapolates")


def report(cfg, policies, segments):
    """Print what follows from the annotations, and write it, unless OUT holds a run that they are not part of."""
    difficulty = read_json(cfg.difficulty, list) if cfg.difficulty else None
    if cfg.difficulty and not all(isinstance(d, (int, float)) and abs(d) < 1e6 for d in difficulty):
        fail(f"--difficulty {cfg.difficulty}: must be a JSON list of numbers")
    texts = [row.get(f"output_{k}") for rows in policies.values() for row in rows for k in (1, 2)]
    if cfg.html and not all(isinstance(text, str) for text in texts):
        fail("--html needs the outputs, these annotations hold only their lengths")
    table, differences = figures(policies, difficulty, read_annotations(cfg.gamed, by="variant"))
    print_figures(table, differences)
    if cfg.annotations:
        path = f"{cfg.out}/config.json"
        if not os.path.exists(path):
            already_finished(cfg)                                # refuses a folder that holds somebody's files
        elif not read_json(path).get("annotations"):
            return say(f"{cfg.out} holds a run, so nothing is written there; --out takes another folder")
        lock(cfg.out)
        write_json(path, asdict(cfg))
    finite, text = json.loads(json.dumps([table, differences]), parse_constant=lambda nan: None), io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [("", *LEADERBOARD), *((name, *(r[c] for c in LEADERBOARD)) for name, r in finite[0].items())])
    write_text(f"{cfg.out}/leaderboard.csv", text.getvalue())
    write_json(f"{cfg.out}/summary.json", {
        "judge": "" if cfg.annotations else cfg.judge, "policies": finite[0], "differences": finite[1],
        "failed": sum(row["preference"] is None for rows in policies.values() for row in rows)})
    write_text(f"{cfg.out}/metrics.jsonl", "")
    for step, row in enumerate(table.values(), 1):               # step: the place in the leaderboard
        log_metrics(cfg, step, {k: v for k, v in row.items() if k != "mode"})
    if cfg.html:
        write_text(f"{cfg.out}/index.html", page(cfg, table, differences, policies, segments))
    say(f"wrote {cfg.out}")


def pair_accuracy(cfg, pairs, preferences):
    """How often the judge prefers the chosen response: overall, where it is the shorter or the longer, by subset."""
    subset = {f"{cfg.data} row {n}": row.get("subset") for n, row in read_rows(cfg.data, cfg.max_samples)}
    groups, table = {}, {}
    for pair, p in zip(pairs, preferences):
        longer, name = np.sign(len(pair["output_2"]) - len(pair["output_1"])), subset[pair["where"]]     # the chosen's
        for group in ("all", ("same length", "chosen is longer", "chosen is shorter")[longer],
                      *([] if name is None else [f"subset {name}"])):
            if p is not None:
                groups.setdefault(group, []).append(p)
    for group, judged in groups.items():
        right, n = win_rate(judged)["discrete_win_rate"], len(judged)
        low, high = wilson(right * n / 100, n)
        table[group] = {"accuracy": right, "low": low, "high": high, "n": n}
        say(f"{group:20} {right:6.2f} % right (95 % interval {low:.2f} to {high:.2f}), n = {n}")
    write_json(f"{cfg.out}/pairs.json", table)


CSS = """
:root { color-scheme: light dark }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif }
.wide { overflow-x: auto } table { border-collapse: collapse } tr { border-bottom: 1px solid #8885 }
td, th { padding: .3rem .8rem; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left; padding-left: 0 }
article { margin: 1.5rem 0; border: 1px solid #8885; border-radius: .5rem; overflow: hidden }
header { padding: .7rem 1rem; background: #8881 } .text { white-space: pre-wrap; overflow-wrap: anywhere }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)) }
section { padding: .7rem 1rem; min-width: 0; box-shadow: 0 0 0 1px #8885 } .best small { font-weight: 600 }
.text span { border-radius: .2rem; padding: .1rem 0 } sub { font-size: .65em; padding: 0 .15rem; opacity: .7 }
"""


def page(cfg, table, differences, policies, segments):
    """One self-contained page with 100 pairs a policy. policies: {name: rows}; segments: {(name, row): [(text,
    reward)]} of the policy's answer. Whatever comes from outside is escaped."""
    e = lambda x: html.escape(str(x))
    cells = lambda tag, *values: "<tr>" + "".join(f"<{tag}>{e(v)}</{tag}>" for v in values) + "</tr>"
    rates = lambda r: ["-" if math.isnan(r[a]) else f"{r[a]:.2f} ± {r[b]:.2f}" for a, b in (
        ("win_rate", "standard_error"), ("length_controlled_winrate", "lc_standard_error"))]
    rewards = np.array([r for pieces in segments.values() for _, r in pieces] or [0.0])
    middle, far = rewards.mean(), 2 * rewards.std() + 1e-9

    def shade(text, reward):
        z = np.clip((reward - middle) / far, -1, 1)                                         # red -1 .. green 1
        color = "46,160,67" if z > 0 else "218,54,51"
        return f'<span style="background:rgba({color},{0.5 * abs(z):.2f})">{e(text)}</span><sub>{reward:+.2f}</sub>'

    note = "" if cfg.annotations else f"judge: {e(cfg.judge)}; "
    note += "± one standard error" + (f"; behind each segment its reward, red {middle - far:.2f} to green "
                                      f"{middle + far:.2f}" if segments else "")
    body = ['<div class="wide"><table>', cells("th", "policy", "win rate %", "at equal length %", "wins", "draws",
                                               "losses", "characters", "baseline's")]
    shown = ("n_wins", "n_draws", "n_wins_base", "avg_length", "avg_length_baseline")
    body += [cells("td", name, *rates(r), *(r[column] for column in shown)) for name, r in table.items()]
    body += [cells("td", f"{d['policy']} - {d['other']}", *rates(d), *[""] * 5) for d in differences]
    body.append(f"</table></div><p><small>{note}</small></p>")
    for name in table:
        rows = policies[name]
        body.append(f"<h2>{e(name)}</h2><p><small>{min(100, len(rows))} of {len(rows)} pairs</small></p>")
        for n, row in enumerate(rows[:100]):
            y, sides = outcomes([row["preference"]])[0], ""
            winner = 0 if y == 0.5 or math.isnan(y) else 1 + int(y > 0.5)
            verdict = "not judged" if math.isnan(y) else "a draw" if not winner else \
                f"{row.get(f'generator_{winner}')} is better, {max(y, 1 - y):.0%}"
            for k in (1, 2):
                score = f", score {row[f'score_{k}']:+.3f}" if isinstance(row.get(f"score_{k}"), (int, float)) else ""
                text = "".join(shade(*s) for s in segments.get((name, n), ()) if k == 2)
                text = text or e(row[f"output_{k}"])
                sides += (f'<section{" class=best" if k == winner else ""}><small>{e(row.get(f"generator_{k}"))}, '
                          f'{row[f"len_{k}"]} characters{score}</small><div class="text">{text}</div></section>')
            body.append(f'<article><header><div class="text">{e(row.get("instruction"))}</div><small>{n + 1}. '
                        f'{e(verdict)}</small></header><div class="sides">{sides}</div></article>')
    return clean(f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>evaluation</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{CSS}</style></head><body><h1>{e(", ".join(table))}</h1>\n""" + "\n".join(body) + "\n</body></html>\n")


# ============================================================================================================
# The run
# ============================================================================================================
def main(cfg):
    device = setup()
    if cfg.annotations:
        return on_rank0(lambda: report(cfg, read_annotations(cfg.annotations), {}))
    sources = [] if cfg.pairs else [*cfg.model, cfg.baseline]
    prepare_world(*sources, cfg.data)
    if cfg.api_base and (cfg.judge == Config.judge or not re.fullmatch(r"https?://[^\s@?#\[\]]+", cfg.api_base)):
        fail("--api_base takes http(s)://host/v1, --judge the name of a model there; the key comes from OPENAI_API_KEY")
    judge = open_judge(cfg, device)
    used = sources + [cfg.data] * os.path.isfile(cfg.data)
    finished = on_rank0(lambda: begin(cfg, {"judge": judge.id} | {s: content_id(s) for s in used}))
    if finished and (cfg.pairs or not cfg.html):
        return

    # --------------------------------------------------------------------------------------------------------
    # pairs: both sides' answers to every prompt
    # --------------------------------------------------------------------------------------------------------
    def pair(messages, output_1, output_2, finished=(True, True)):
        return {"messages": messages, "instruction": prompt_text(messages), "output_1": output_1, "output_2": output_2,
                "finished": finished}

    if cfg.pairs:
        pairs = {"": [pair(messages, rejected, chosen) | {"where": where}
                      for messages, chosen, rejected, where in load_pairs(cfg.data, cfg.max_samples)]}
    else:
        names, base = [name_of(s) for s in cfg.model], name_of(cfg.baseline)
        if len(set(names)) < len(names):                         # out/a/sft and out/b/sft
            names = [s.strip("./").replace("/", "-") for s in cfg.model]
        base += "-baseline" if base in names else ""
        if len({*names, base}) < len(names) + 1:
            fail(f"two of --model and --baseline are called {Counter([*names, base]).most_common(1)[0][0]}; rename one")
        chats, cache, answers = load_prompts(cfg.data, cfg.max_samples), Cache(f"{cfg.out}/generations.jsonl"), {}
        for name, source in zip([*names, base], sources):
            answers[name] = read_outputs(source, chats) if FILE.search(source) else \
                answer(cfg, source, chats, int(name == base), cache, device)
            outputs = [{"instruction": prompt_text(chat), "output": text, "generator": name,
                        "dataset": os.path.basename(cfg.data)} for chat, (text, _) in zip(chats, answers[name])]
            on_rank0(write_json, f"{cfg.out}/{name}.json", outputs)
        pairs = {name: [pair(m, b[0], a[0], (b[1], a[1])) for m, a, b in zip(chats, answers[name], answers[base])]
                 for name in names}

    segments, shader = {}, cfg.reward_model or ("" if cfg.api_base else cfg.judge)
    if cfg.html and not cfg.pairs and (cfg.reward_model or os.path.isfile(f"{shader}/reward.json")):
        read = open_reward_model(cfg, shader, device)
        for name, rows in pairs.items():
            shown = read([(p["messages"], p["output_2"], p["finished"][1]) for p in rows[:100]], texts=True)[1]
            segments |= {(name, n): pieces for n, pieces in enumerate(shown)}

    # --------------------------------------------------------------------------------------------------------
    # verdicts: each different pair once; a function or an endpoint is asked by rank 0, the others are done
    # --------------------------------------------------------------------------------------------------------
    cache, todo, failed = Cache(f"{cfg.out}/judgements.jsonl"), {}, {}
    everything = [row for rows in pairs.values() for row in rows]
    for row in everything:
        row["key"] = digest(judge.id, row["instruction"], row["output_1"], row["output_2"], row["finished"])
        if row["output_1"] == row["output_2"] and not judge.scores:
            cache[row["key"]] = {"preference": 1.5}              # a draw without a call
        elif row["key"] not in cache:
            todo[row["key"]] = row
    verdicts = judge.verdicts(list(todo.values())) if todo and not (judge.alone and rank()) else ()
    with tqdm(total=len(todo), desc="verdicts", leave=False, disable=True if rank() or not todo else None) as bar:
        for row, verdict in verdicts:
            if "failed" in verdict:
                failed[row["key"]] = verdict["failed"]
            else:
                cache.add(row["key"], verdict)
            bar.set_postfix(failed=len(failed), refresh=False)
            bar.update()
    if rank() > 0:
        return

    # --------------------------------------------------------------------------------------------------------
    # report
    # --------------------------------------------------------------------------------------------------------
    if not any(row["key"] in cache for row in everything):
        fail(f"--judge {cfg.judge}: no pair could be judged ({next(iter(failed.values()), 'there are none')})")
    if cfg.pairs:
        pair_accuracy(cfg, pairs[""], [cache.get(row["key"], {}).get("preference") for row in pairs[""]])
    else:
        write_json(f"{cfg.out}/annotations.json", [
            {"instruction": row["instruction"], "output_1": row["output_1"], "generator_1": base,
             "output_2": row["output_2"], "generator_2": name, "annotator": cfg.judge, "preference": None}
            | cache.get(row["key"], {})
            for name in names for row in pairs[name]])
        policies = read_annotations([f"{cfg.out}/annotations.json"])
        for row in policies[names[0]][:cfg.show]:
            say(f"\nuser: {row['instruction']}\n{base}: {row['output_1']}\n{names[0]}: {row['output_2']}\n"
                f"preference: {row['preference']}")
        report(cfg, policies, segments)
    for reason, n in Counter(failed.values()).most_common(5):
        say(f"warning: {n} pairs could not be judged ({reason}); the same command tries them again")
    if not failed:
        write_json(f"{cfg.out}/config.json", read_json(f"{cfg.out}/config.json") | {"finished": True})


if __name__ == "__main__":
    start(main, Config)
