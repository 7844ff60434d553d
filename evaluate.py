"""Chapter 4 of 4: does the policy answer better than the baseline?

    python evaluate.py                                      # the embedded world: PPO against SFT
    python evaluate.py --judge out/rm/model --html --out out/eval-rm     # a page with the pairs
    torchrun --nproc_per_node=8 evaluate.py --model out/ppo/model --baseline SFT --data prompts.jsonl \\
        --judge gpt-4.1 --api_base https://api.openai.com/v1
    python evaluate.py --annotations FILES --difficulty FILE --gamed FILE    # figures alone

Both answer the same prompts, a judge prefers one answer of each pair, the preferences become a win
rate. Judges like long answers, so a second figure asks what the win rate would be at equal length
(Dubois et al. 2024, arXiv 2404.04475). Files have alpaca_eval's formats. What differs from it: the
fit has no penalty (within 0.12 points of their leaderboard); its standard error is a bootstrap's
(theirs is 2-6 times too small); a language model sees both orders of a pair.
"""
import csv
import importlib.util
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

from segment import (Dtype, Granularity, LanguageModel, answer_text, check_context, context_of,
                     cut_rows, encode_chats, encode_prompts, fail, load_model, load_prompts,
                     load_tokenizer, map_rows, parse, prompt_text, rank, read_config, read_rows,
                     say, segment_texts, sequence_score, set_precision, setup)
from train_rm import ScalarModel, write_text
from train_ppo import (banned_tokens, gold_reward, load_function, plain_copy, same_tokens, sample,
                       trained_how)


@dataclass
class Config:
    # who is compared with whom, on what, by whom
    model: str = "out/ppo/model"               # the policy: a model, or a file of its outputs
    baseline: str = "data/reviews/sft"         # what it is compared with: likewise
    data: str = "data/reviews/prompts_test.jsonl"  # prompts
    judge: str = ""                            # file.py:function of (prompt, response), a reward
    #                                            model, or with --api_base the name of a model there
    api_base: str = ""                         # an OpenAI-compatible URL; key: OPENAI_API_KEY
    trained_granularity: Optional[Granularity] = None  # of a released reward model
    cutoff: Optional[float] = None             # likewise, nats
    out: str = "out/eval"                      # output folder
    html: bool = False                         # write OUT/index.html: figures and up to 100 pairs
    # figures of alpaca_eval's files alone
    annotations: List[str] = field(default_factory=list)  # one policy a file
    difficulty: str = ""                       # instruction difficulties: a JSON list, by index
    gamed: List[str] = field(default_factory=list)  # annotations of length-gamed baselines
    # sampling
    temperature: float = 1.0                   # 1: what PPO trained; 0: greedy
    max_prompt_tokens: int = 128               # longer prompts lose their oldest (paper: 1024)
    max_new_tokens: int = 128                  # of a response (paper: 1024)
    max_samples: int = 0                       # read at most this many prompts (0: all)
    seed: int = 0                              # of the samples
    # hardware
    generation_batch_size: int = 128           # responses decoded at once on one GPU
    micro_batch_size: int = 16                 # rows in one forward pass of one GPU
    dtype: Dtype = "auto"                      # bf16 on CUDA, fp32 on CPU


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
    return 100 * float(np.std(x, ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else math.nan


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
    return {
        "win_rate": 100 * float(y.mean()),
        "standard_error": standard_error(y),
        "n_wins": wins,
        "n_wins_base": losses,
        "n_draws": draws,
        "n_total": len(y),
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
    columns = [t, np.full(len(D), constant)]
    if difficulty is not None:
        columns.insert(1, np.asarray(difficulty, dtype=np.float64))
    return y[there], np.stack(columns, 1)[there]


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def logistic_fit(x, y, weight):
    """Newton's method for y ~ sigmoid(x @ w). x (m, k); y, weight (m,). Returns w (k,), NaN if x
    separates the outcomes perfectly, for then no w is the best."""
    w = np.zeros(x.shape[1])
    for _ in range(100):
        p = sigmoid(x @ w)                                                               # (m,)
        hessian = (x.T * (weight * p * (1 - p))) @ x                                     # (k, k)
        step = np.linalg.lstsq(hessian, x.T @ (weight * (y - p)), rcond=None)[0]
        # a full step can overshoot: at most 3 logits at a time
        w = w + step * min(1, 3 / (1e-9 + np.abs(x @ step).max()))
        if np.abs(x @ w).max() > 25:
            return np.full(len(w), math.nan)
        if np.abs(step).max() < 1e-10:
            break
    return w


def length_controlled_win_rate(preferences, len_baseline, len_model, difficulty=None, gamed=()):
    """The win rate that a logistic regression predicts at equal length, and its standard error by
    bootstrap over the pairs, in percent.

    preferences: in [1, 2], (n,); lengths in characters, (n,); difficulty: (n,); gamed:
    [(preferences, len_baseline, len_model, difficulty)], one for each variant. With difficulty and
    gamed it is AlpacaEval 2's official figure. The raw win rate where lengths do not vary or one
    outcome is throughout; NaN where length separates the outcomes perfectly.
    """
    y, x = design(preferences, len_baseline, len_model, difficulty, 1.0)             # (m,), (m, k)
    # The baseline told to be brief, or long, against itself pins down what length alone does. Such
    # rows weigh a tenth and have no intercept: the baseline is no better than itself.
    parts = [design(*variant, constant=0.0) for variant in gamed or ()]
    weight = np.ones(len(y) + sum(len(y_gamed) for y_gamed, _ in parts))                 # (M,)
    weight[len(y):] = 0.1

    def rate(rows):
        """The figure if the pairs were these"""
        all_x = np.concatenate([x[rows], *[x_gamed for _, x_gamed in parts]])            # (M, k)
        all_y = np.concatenate([y[rows], *[y_gamed for y_gamed, _ in parts]])            # (M,)
        w = logistic_fit(all_x, all_y, weight)
        return 100 * float(sigmoid(x[rows, 1:] @ w[1:]).mean())                          # t = 0

    if not x[:, 0].any() or np.ptp(y) == 0:
        return {"length_controlled_winrate": 100 * float(y.mean()),
                "lc_standard_error": standard_error(y)}
    lc = rate(np.arange(len(y)))
    random = np.random.default_rng(0)
    draws = [rate(random.integers(0, len(y), len(y))) for _ in range(0 if math.isnan(lc) else 500)]
    # resamples that are separated are left out
    return {"length_controlled_winrate": lc,
            "lc_standard_error": float(np.nanstd(draws, ddof=1)) if draws else math.nan}


# -- Judges: from prompts and both sides' answers to preferences, None where one cannot tell --------
# An answer: {"instruction", "output", "generator", "finished"}; judges that score note it there
def judge_by_function(cfg, one, two):
    """The higher score wins."""
    function = load_function(cfg.judge, "--judge")
    for answer in [*one, *two]:
        answer["score"] = float(gold_reward(function, answer["instruction"], answer["output"],
                                            answer["finished"]))
        if not math.isfinite(answer["score"]):           # NaN would pass for a draw
            fail(f"--judge {cfg.judge}: gives {answer['score']} for {answer['output'][:60]!r}")
    return [1.5 + np.sign(b["score"] - a["score"]) / 2 for a, b in zip(one, two)]


def judge_by_reward_model(cfg, prompts, one, two, device, dtype):
    """Bradley-Terry: the policy's answer is better with probability sigmoid(its score - the
    other's), the scores read as the reward model was trained (chapter 2)."""
    granularity, cutoff = trained_how(cfg.judge, cfg.trained_granularity, cfg.cutoff)
    tokenizer, stops = load_tokenizer(cfg.judge)
    answers = [answer for pair in zip(one, two) for answer in pair]                      # 2n
    chats = [(prompts[i // 2], [answer["output"]], f"answer {i // 2 + 1}")
             for i, answer in enumerate(answers)]
    rows = encode_chats(tokenizer, stops, chats, context_of(cfg.judge), cfg.max_prompt_tokens)
    for i, (p, r) in enumerate(rows):
        # the template ends every answer, but one that was cut off while it was sampled had no end
        if not answers[i]["finished"] and len(r) > 1 and r[-1] in stops:
            rows[i] = p, r[:-1]
    model = load_model(cfg.judge, ScalarModel, device, dtype)
    scalars = map_rows(model, rows, cfg.micro_batch_size, device)                        # (2n, R)
    entropy = torch.zeros_like(scalars)                                                  # (2n, R)
    if granularity == "segment":
        segment_model = getattr(model.hf.config, "segment_model", cfg.baseline)
        if not same_tokens(load_tokenizer(segment_model)[0], tokenizer):
            fail(f"{segment_model} can't cut the segments of {cfg.judge}: its tokens are others")
        sft = load_model(segment_model, LanguageModel, device, dtype)
        _, entropy = map_rows(sft, rows, cfg.micro_batch_size, device)                   # (2n, R)
    ends = cut_rows(rows, entropy, stops, cutoff, granularity)                           # (2n, R)
    scores = sequence_score(scalars, ends)                                               # (2n,)
    for i, answer in enumerate(answers):
        answer["score"] = float(scores[i])
        if cfg.html:                                                     # shaded on the page
            texts = segment_texts(tokenizer, rows[i][1], ends[i, :len(rows[i][1])])
            answer["segments"] = list(zip(texts, scalars[i, ends[i]].tolist()))
    return (1 + torch.sigmoid(scores[1::2] - scores[0::2])).tolist()


QUESTION = """Read a conversation and two replies to it.\n\n<conversation>\n{}\n</conversation>\n
<reply A>\n{}\n</reply A>\n\n<reply B>\n{}\n</reply B>\n
Which reply would a careful, knowledgeable reader rather have received? Count whether it does what
was asked, is correct and is honest; do not count that it is longer or stands first. Write one
letter, A or B, and nothing else."""


def judge_by_endpoint(cfg, one, two):
    """An OpenAI-compatible server, in both orders, for judges lean towards a place. Verdicts go to
    OUT/verdicts.jsonl as they come, and what is there is not asked again. Trouble that stays ends
    the run with one line."""
    import openai
    key = os.environ.get("OPENAI_API_KEY") or "none"     # read here, written nowhere
    client = openai.OpenAI(base_url=cfg.api_base, api_key=key, timeout=60, max_retries=6)
    path, verdicts = Path(cfg.out, "verdicts.jsonl"), {}
    path.touch()
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
            verdicts[row["judge"], row["question"]] = row["b_is_better"]
        except (ValueError, LookupError):
            pass                                         # torn by a kill
    # the policy's answer is B, then A
    first = [QUESTION.format(a["instruction"], a["output"], b["output"]) for a, b in zip(one, two)]
    then = [QUESTION.format(a["instruction"], b["output"], a["output"]) for a, b in zip(one, two)]
    asked = [q for q, p in zip(first + then, then + first) if q != p]    # equal answers are a draw
    asked = [q for q in dict.fromkeys(asked) if (cfg.judge, q) not in verdicts]

    def ask(question):
        """The question, and the probability that B is better, or None."""
        # some servers refuse log-probs, some models any settings
        plainer = [{"temperature": 0, "logprobs": True, "top_logprobs": 5}, {"temperature": 0}, {}]
        for settings in plainer:
            try:
                return question, read_verdict(client.chat.completions.create(
                    model=cfg.judge, messages=[{"role": "user", "content": question}], **settings))
            except (openai.BadRequestError, openai.UnprocessableEntityError):
                if settings == plainer[-1]:
                    raise
            except ValueError:
                return question, None                    # no JSON

    with ThreadPool(8) as pool, open(path, "a") as f:
        try:
            for question, p in pool.imap_unordered(ask, asked):
                verdicts[cfg.judge, question] = p
                if p is not None:                        # newline first: a torn line costs itself
                    row = {"judge": cfg.judge, "question": question, "b_is_better": p}
                    f.write("\n" + json.dumps(row))
                    f.flush()
        except openai.OpenAIError as error:              # its text may hold the key
            fail("--api_base (verdicts so far are kept): " + str(error).replace(key, "***"))
    preferences = []
    for q, p in zip(first, then):
        b, a = verdicts.get((cfg.judge, q)), verdicts.get((cfg.judge, p))
        known = q == p or None not in (a, b)
        preferences.append((1.5 if q == p else 1 + (b + 1 - a) / 2) if known else None)
    return preferences


def read_verdict(reply):
    """The probability that B is better, or None if the reply does not say. A verdict is the letter
    that ends a line which names no other, behind any thinking; all such lines must agree."""
    import openai
    if not reply.choices:
        raise openai.OpenAIError(f"no choices in the reply: {reply.model_dump_json()}")
    choice, said = reply.choices[0], set()
    text = (choice.message.content or "").rpartition("</think>")[2]
    for line in text.upper().splitlines():
        last = re.search(r"\b([AB])( IS BETTER)?\W*$", line)
        doubt = re.search(r"\b(NOT|NEITHER|NOR|WORSE|THAN)\b|N'T", line)
        if last and not doubt and len(set(re.findall(r"\b[AB]\b", line))) == 1:
            said.add(last[1])
    if len(said) != 1:
        return None
    p = {"A": 0.0, "B": 0.0} | dict.fromkeys(said, 1e-30)        # all that is known without ...
    tokens = choice.logprobs and choice.logprobs.content or []   # ... log-probs at the letter
    at_letter = [token for token in tokens if token.token.strip().upper() in said]
    for token in at_letter[-1:]:
        for other in token.top_logprobs or []:
            if other.token.strip() in p:                 # "A" and " A" are two tokens
                p[other.token.strip()] += math.exp(other.logprob)
    return p["B"] / (p["A"] + p["B"])


# ==================================================================================================
# Plumbing. Answers: sampled, or read from a file
# ==================================================================================================
def name_of(source):
    """What tables call it: out/ppo/model -> ppo, results/claude.json -> claude"""
    folder = source.rstrip("/").removesuffix("/model")
    return re.sub(r"\.json.*", "", os.path.basename(folder))


def answers_of(cfg, source, side, prompts, device, dtype):
    """A file's rows of alpaca_eval outputs, in the prompts' order, or a model's answers, which are
    also written to OUT/policy.json or OUT/baseline.json."""
    asked = [prompt_text(prompt) for prompt in prompts]
    if re.search(r"\.json[^/]*$", source):
        answers = list(read_rows(source, len(prompts)))
        if [answer.get("instruction") for answer in answers] != asked:
            fail(f"{source}: its instructions are not the {len(asked)} prompts of --data, in order")
        return [{"generator": name_of(source), "finished": True} | answer for answer in answers]
    check_context(source, cfg.max_prompt_tokens + cfg.max_new_tokens, cfg.max_prompt_tokens)
    tokenizer, stops = load_tokenizer(source)
    ids = encode_prompts(tokenizer, prompts, cfg.max_prompt_tokens, cfg.data)
    model = plain_copy(load_model(source, LanguageModel, device, dtype), dtype, device)
    banned = banned_tokens(tokenizer, stops, model.config.vocab_size).to(device)
    seeds = [(cfg.seed, int(side == "policy"), b) for b in range(len(ids))]      # their own luck
    tokens, _, lengths = sample(model, ids, stops, cfg.max_new_tokens, seeds,
                                cfg.generation_batch_size, cfg.temperature, banned)      # (n, R)
    answers = []
    for instruction, row, length in zip(asked, tokens, lengths):
        answers.append({"instruction": instruction,
                        "output": answer_text(tokenizer, stops, row[:length]),
                        "generator": name_of(source),
                        "finished": bool(row[length - 1] in stops)})
    if rank() == 0:
        os.makedirs(cfg.out, exist_ok=True)
        write_text(f"{cfg.out}/{side}.json", json.dumps(answers, indent=1))
    say(f"{side}: {len(answers)} answers of {source}")
    return answers


# -- Plumbing. Annotations -> figures -> table, files, page ----------------------------------------
def columns_of(rows, difficulty):
    """What length_controlled_win_rate takes, of alpaca_eval's annotations: preferences, lengths of
    the baseline's and of the policy's answers, difficulties; (n,) each."""
    columns = [[], [], []]
    for row in rows:
        columns[0].append(row.get("preference", row.get("preference_surrogate")))
        for k in (1, 2):
            length = row.get(f"len_{k}")
            columns[k].append(len(row[f"output_{k}"]) if length is None else length)
    if difficulty and rows[0].get("index") is not None:
        difficulty = [difficulty[row["index"]] for row in rows]
    elif difficulty and len(difficulty) != len(rows):
        raise ValueError(f"{len(difficulty)} difficulties for {len(rows)} rows without an index")
    return *np.array(columns, dtype=float), difficulty


def report(cfg, policies):
    """The figures of {policy: its annotations}: printed, in OUT/leaderboard.csv, on a page."""
    difficulty = json.loads(Path(cfg.difficulty).read_text()) if cfg.difficulty else None
    variants, table = {}, {}
    for row in [row for source in cfg.gamed for row in read_rows(source)]:
        variants.setdefault(row.get("variant"), []).append(row)
    gamed = [columns_of(rows, difficulty) for rows in variants.values()]
    say("\npolicy, win rate, length-controlled, wins/draws/losses, characters, mean score")
    for name, rows in policies.items():
        try:
            columns = columns_of(rows, difficulty)
            row = win_rate(columns[0]) | {"mode": "community", "avg_length": int(columns[2].mean())}
            row |= length_controlled_win_rate(*columns, gamed)
        except (ValueError, LookupError, TypeError) as error:
            fail(f"{name}: {error!r}: annotations need a preference in [1, 2] or null, and "
                 "output_1 and output_2, or len_1 and len_2")
        line = (f"{name}  {row['win_rate']:.2f} +- {row['standard_error']:.2f}  "
                f"{row['length_controlled_winrate']:.2f} +- {row['lc_standard_error']:.2f}  "
                f"{row['n_wins']}/{row['n_draws']}/{row['n_wins_base']}  "
                f"{columns[2].mean():.0f} vs {columns[1].mean():.0f}")
        if rows[0].get("score_2") is not None:
            means = [np.mean([pair[f"score_{k}"] for pair in rows]) for k in "21"]
            line += "  {:+.3f} vs {:+.3f}".format(*means)
        say(line.replace("nan", "-"))
        if row["n_total"] < len(rows):
            say(f"{len(rows) - row['n_total']} pairs have no verdict; the same command asks again")
        # NaN: an empty cell, and null on the page
        table[name] = {key: None if value != value else value for key, value in row.items()}
    os.makedirs(cfg.out, exist_ok=True)
    write_text(f"{cfg.out}/config.json", json.dumps(asdict(cfg), indent=1))
    with open(f"{cfg.out}/leaderboard.csv", "w") as f:
        leaderboard = csv.writer(f, lineterminator="\n")
        leaderboard.writerow(["", *row])
        leaderboard.writerows([name, *row.values()] for name, row in table.items())
    if cfg.html:
        pairs = {name: rows[:100] for name, rows in policies.items() if "output_2" in rows[0]}
        page = {"table": table, "pairs": pairs, "judge": cfg.judge, "data": cfg.data}
        # without a "<" nothing in the data can end the element that holds it
        data = json.dumps(page).replace("<", "\\u003c")
        text = Path(__file__).with_name("assets").joinpath("page.html").read_text()
        text = text.replace("{{nonce}}", os.urandom(16).hex()).replace("{{data}}", data)
        write_text(f"{cfg.out}/index.html", text)
    say(f"wrote {cfg.out}")


# ==================================================================================================
# The run
# ==================================================================================================
def main(cfg):
    device = setup()
    dtype = set_precision(cfg.dtype, device)
    if cfg.annotations:
        policies = {}
        for source in cfg.annotations:
            rows = list(read_rows(source))
            name = rows[0].get("generator_2") or name_of(source)
            policies[source if name in policies else name] = rows
        return report(cfg, policies) if rank() == 0 else None

    # 1. who judges? Said before anything is sampled
    if cfg.data == Config.data and not cfg.judge:        # the world's truth knows the world alone
        cfg.judge = "data/reviews/prepare.py:gold_reward"
    if not cfg.judge:
        fail("--judge: name a reward model, a file.py:function, or a model at --api_base")
    if cfg.api_base and not importlib.util.find_spec("openai"):
        fail("--api_base needs the package: pip install openai")
    is_function = re.search(r"\.py:\w+$", cfg.judge)
    if is_function:
        load_function(cfg.judge, "--judge")
    elif not cfg.api_base:
        trained_how(cfg.judge, cfg.trained_granularity, cfg.cutoff)
    kept = Path(cfg.out, "annotations.json")
    if kept.exists() and json.loads(kept.read_text())[0]["annotator"] != cfg.judge:
        fail(f"{cfg.out} holds the preferences of another judge; give another --out")

    # 2. both answer the same prompts
    prompts = load_prompts(cfg.data, cfg.max_samples)
    two = answers_of(cfg, cfg.model, "policy", prompts, device, dtype)
    one = answers_of(cfg, cfg.baseline, "baseline", prompts, device, dtype)

    # 3. the judge prefers one; all ranks share a reward model's work
    if not is_function and not cfg.api_base:
        preferences = judge_by_reward_model(cfg, prompts, one, two, device, dtype)
    if rank() > 0:
        return
    os.makedirs(cfg.out, exist_ok=True)
    if is_function:
        preferences = judge_by_function(cfg, one, two)
    elif cfg.api_base:
        preferences = judge_by_endpoint(cfg, one, two)
    pairs = []
    for a, b, preference in zip(one, two, preferences):
        pair = {"instruction": a["instruction"], "annotator": cfg.judge, "preference": preference}
        for name in ("output", "generator", "score", "segments"):
            pair |= {f"{name}_1": a.get(name), f"{name}_2": b.get(name)}
        pairs.append(pair | {"len_1": len(a["output"]), "len_2": len(b["output"])})
    write_text(f"{cfg.out}/annotations.json", json.dumps(pairs, indent=1))
    report(cfg, {two[0]["generator"]: pairs})


if __name__ == "__main__":
    main(parse(Config))
    dist.destroy_process_group()
