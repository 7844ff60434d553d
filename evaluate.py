"""Chapter 4 of 4: does the policy answer better than the baseline?

    python evaluate.py                                      # the embedded world: PPO against SFT
    python evaluate.py --judge out/rm/model --html --out out/eval-rm     # a page with the pairs
    torchrun --nproc_per_node=8 evaluate.py --model out/ppo/model --baseline SFT \\
        --data prompts.jsonl --judge gpt-4.1 --api_base https://api.openai.com/v1 \\
        --max_prompt_tokens 1024 --max_new_tokens 1024
    python evaluate.py --annotations FILES --difficulty FILE --gamed FILE    # figures alone

Both answer the same prompts, a judge prefers one answer of each pair, the preferences become a win
rate. Judges like long answers, so a second figure asks what the win rate would be at equal length
(Dubois et al. 2024, arXiv 2404.04475). Files have alpaca_eval's formats. What differs from it: the
fit has no penalty (within 0.12 points of 56 published models); its standard error is a bootstrap's
(theirs is 2-6 times too small); a language model sees both orders of a pair.
"""
import csv
import importlib.util
import json
import math
import os
import re
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import List, Optional

import numpy as np
import torch
import torch.distributed as dist

from segment import (Dtype, Granularity, LanguageModel, answer_text, check_context, context_of,
                     cut_rows, encode_chats, encode_prompts, fail, load_model, load_prompts,
                     load_tokenizer, map_rows, parse, prompt_text, rank, read_rows, say,
                     segment_texts, sequence_score, set_precision, setup, warn_of_world_values)
from train_rm import ScalarModel, write_json
from train_ppo import call, check_tokens, load_function, plain_copy, sample, trained_how


@dataclass
class Config:
    # who is compared with whom, on what, by whom
    model: str = "out/ppo/model"               # the policy: a model, or a file of its outputs
    baseline: str = "data/reviews/sft"         # likewise (paper: the SFT model)
    data: str = "data/reviews/prompts_test.jsonl"  # prompts (paper: AlpacaEval 2)
    judge: str = ""                            # a reward model, file.py:function of (prompt,
    #                         response, finished), or with --api_base the name of a model there
    api_base: str = ""                         # an OpenAI-compatible URL; key: OPENAI_API_KEY
    trained_granularity: Optional[Granularity] = None  # of a released reward model
    cutoff: Optional[float] = None             # likewise, nats
    out: str = "out/eval"                      # output folder
    html: bool = False                         # write OUT/index.html: figures and up to 100 pairs
    # figures of alpaca_eval's files alone
    annotations: List[str] = field(default_factory=list)  # of policies, each in one file
    difficulty: str = ""                       # instruction difficulties: a JSON list, by index
    gamed: List[str] = field(default_factory=list)  # annotations of length-gamed baselines
    # sampling
    temperature: float = 1.0                   # 1: what PPO trained; 0: greedy
    max_prompt_tokens: int = 128               # longer ones lose what follows BOS (paper: 1024)
    max_new_tokens: int = 128                  # of a response (paper: 1024)
    max_samples: int = 0                       # read at most this many prompts (0: all)
    seed: int = 0                              # of the samples
    # hardware
    generation_batch_size: int = 128           # responses decoded at once on one GPU
    micro_batch_size: int = 8                  # rows in one forward pass of one GPU
    dtype: Dtype = "auto"                      # bf16 on CUDA, fp32 on CPU


# -- Figures: the win rate, and the win rate at equal length ---------------------------------------
def outcomes(preferences):
    """Preferences from 1 (the baseline's answer is better) to 2 -> y in [0, 1], (n,). None becomes
    NaN; 0 is alpaca_eval's old tie. ValueError outside, or when no preference is left."""
    y = np.array(preferences, dtype=np.float64)
    y = np.where(y == 0, 0.5, y - 1)
    if ((y < 0) | (y > 1)).any() or np.isnan(y).all():
        raise ValueError("a preference lies outside [1, 2], or there is none")
    return y


def standard_error(x):
    """Of the mean of x, (n,), in percent"""
    return 100 * np.std(x, ddof=1) / math.sqrt(len(x))


def win_rate(preferences):
    """The mean outcome in percent, its standard error, and counts; a draw is exactly 1.5.
    >>> print(win_rate([2.0, 2.0, 1.5, 1.0, None])["win_rate"])
    62.5
    """
    y = outcomes(preferences)
    y = y[~np.isnan(y)]
    wins = int((y > 0.5).sum())
    losses = int((y < 0.5).sum())
    draws = len(y) - wins - losses
    return {
        "win_rate": 100 * y.mean(),
        "standard_error": standard_error(y),
        "n_wins": wins,
        "n_wins_base": losses,
        "n_draws": draws,
        "n_total": len(y),
        "discrete_win_rate": 100 * (wins + draws / 2) / len(y)}


def design(preferences, len_baseline, len_model, difficulty, constant):
    """What is regressed on what, for the m pairs with a preference: y (m,) on
    x = [tanh(D / std D), difficulty if given, constant] (m, k), D the difference in length.
    constant: 1 for an intercept, 0 for none."""
    y = outcomes(preferences)
    there = ~np.isnan(y)
    D = np.subtract(len_baseline, len_model, dtype=np.float64)                           # (n,)
    t = np.zeros_like(D)                                                                 # (n,)
    if np.ptp(D[there]) > 0:
        t = np.tanh(D / D[there].std(ddof=1))
    columns = [t, np.full(len(D), constant)]
    if difficulty is not None:
        columns.insert(1, difficulty)
    return y[there], np.stack(columns, 1)[there]


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def logistic_fit(x, y, weight):
    """Newton's method for y ~ sigmoid(x @ w). x (m, k); y, weight (m,). Returns w (k,), NaN if x
    separates the outcomes perfectly: then no w is the best, and every step makes it larger."""
    w = np.zeros(x.shape[1])
    for _ in range(30):
        p = sigmoid(x @ w)                                                               # (m,)
        hessian = (x.T * (weight * p * (1 - p))) @ x                                     # (k, k)
        step = np.linalg.lstsq(hessian, x.T @ (weight * (y - p)), rcond=None)[0]
        # a full step can overshoot: at most 3 logits at a time
        w = w + step * min(1, 3 / (1e-9 + np.abs(x @ step).max()))
        if np.abs(step).max() < 1e-10:
            return w
    return w * math.nan


def length_controlled_win_rate(preferences, len_baseline, len_model, difficulty=None, gamed=()):
    """The win rate at equal length by logistic regression, its standard error by bootstrap, in %.
    preferences: in [1, 2], (n,); lengths in characters, (n,); difficulty: (n,); gamed:
    [(preferences, len_baseline, len_model, difficulty)], one for each variant. With difficulty and
    gamed it is AlpacaEval 2's official figure. The raw win rate where the difference in length does
    not vary or all outcomes are the same; NaN where length separates the outcomes perfectly."""
    y, x = design(preferences, len_baseline, len_model, difficulty, constant=1.0)
    m = len(y)
    if not x[:, 0].any() or np.ptp(y) == 0:
        return {"length_controlled_winrate": 100 * y.mean(), "lc_standard_error": standard_error(y)}
    # The baseline told to be brief, or long, against itself pins down what length alone does. Such
    # rows weigh a tenth and have no intercept: the baseline is no better than itself.
    for variant in gamed:
        more_y, more_x = design(*variant, constant=0.0)
        y = np.concatenate([y, more_y])                                                  # (M,)
        x = np.concatenate([x, more_x])                                                  # (M, k)
    weight = np.where(np.arange(len(y)) < m, 1.0, 0.1)                                   # (M,)

    figures = []
    random = np.random.default_rng(0)
    drawn = np.arange(m)                     # round 0: the pairs as they are; then 500 resamples
    for _ in range(501):
        used = np.append(drawn, np.arange(m, len(y)))                                    # (M,)
        w = logistic_fit(x[used], y[used], weight)
        figures.append(100 * sigmoid(x[drawn, 1:] @ w[1:]).mean())                       # at t = 0
        drawn = random.integers(0, m, m)
    error = math.nan
    if not math.isnan(figures[0]):
        error = np.nanstd(figures[1:], ddof=1)           # without resamples that are separated
    return {"length_controlled_winrate": figures[0], "lc_standard_error": error}


# -- Judges: from prompts and both sides' answers to preferences, None where one cannot tell -------
# An answer: {"instruction", "output", "generator", "finished"}; a judge that scores adds "score"
def judge_by_function(cfg, prompts, baseline, policy, device, dtype):
    """The higher score wins."""
    function = load_function(cfg.judge)
    for answer in baseline + policy:
        score = float(call(function, answer["instruction"], answer["output"],
                           answer["finished"]))
        if not math.isfinite(score):                     # NaN would pass for a draw
            fail(f"--judge gives {score} for {answer}")
        answer["score"] = score
    return [1.5 + np.sign(b["score"] - a["score"]) / 2 for a, b in zip(baseline, policy)]


def judge_by_reward_model(cfg, prompts, baseline, policy, device, dtype):
    """Bradley-Terry: the policy's answer is better with probability sigmoid(its score - the
    other's), the scores read as the reward model was trained (chapter 2). All ranks share in it."""
    tokenizer, stops = load_tokenizer(cfg.judge)
    chats = [(prompt, [a["output"], b["output"]], f"the answers to {prompt}")
             for prompt, a, b in zip(prompts, baseline, policy)]
    rows = encode_chats(tokenizer, stops, chats, context_of(cfg.judge), cfg.max_prompt_tokens)
    answers = [answer for pair in zip(baseline, policy) for answer in pair]              # 2n
    for i, (p, r) in enumerate(rows):
        # the template ends every answer, but one that was cut off while it was sampled had no end
        if not answers[i]["finished"] and len(r) > 1 and r[-1] in stops:
            rows[i] = p, r[:-1]
    model = load_model(cfg.judge, ScalarModel, device, dtype)
    scalars = map_rows(model, rows, cfg.micro_batch_size, device)                        # (2n, R)
    entropy = torch.zeros_like(scalars)                                                  # (2n, R)
    granularity, cutoff = trained_how(cfg, cfg.judge)
    if granularity == "segment":
        # a released one does not say: then the baseline is taken for its SFT model
        segment_model = getattr(model.hf.config, "segment_model", cfg.baseline)
        check_tokens(tokenizer, segment_model)
        say(f"the entropies of {segment_model} cut the segments")
        sft = load_model(segment_model, LanguageModel, device, dtype)
        _, entropy = map_rows(sft, rows, cfg.micro_batch_size, device)                   # (2n, R)
    ends = cut_rows(rows, entropy, tokenizer, stops, cutoff, granularity)                # (2n, R)
    scores = sequence_score(scalars, ends)                                               # (2n,)
    for i, (_, r) in enumerate(rows):
        answers[i]["score"] = scores[i].item()
        if cfg.html and i < 200:                         # 100 pairs, shaded on the page
            texts = segment_texts(tokenizer, r, ends[i, :len(r)])
            answers[i]["segments"] = list(zip(texts, scalars[i, ends[i]].tolist()))
    return (1 + torch.sigmoid(scores[1::2] - scores[0::2])).tolist()


QUESTION = """Read a conversation and two replies to it.\n
<conversation>\n{0[instruction]}\n</conversation>\n
<reply A>\n{0[output]}\n</reply A>\n\n<reply B>\n{1[output]}\n</reply B>\n
Which reply would a careful, knowledgeable reader rather have received? Count whether it does what
was asked, is correct and is honest; do not count that it is longer or stands first. Write one
letter, A or B, and nothing else."""

# From all that can be said to what every server takes: some refuse log-probs, some any settings
SETTINGS = [{"temperature": 0, "logprobs": True, "top_logprobs": 5}, {"temperature": 0}, {}]

# A verdict is a line of these words and one letter, at the end or before "is better". Any other
# word could turn it round, so these are none: "The worse reply is A", "Reply B is better than
# reply A", "A or B?"
VERDICT = re.compile(r"""(?imx)          # a line:
    ^ [ \t*_`"'“(\[{$\\]*                # "**", "("; but no "#": "## Reply A" is a heading
    (?: (?: THE | MY | I | SO | THUS | HENCE | THEREFORE | OVERALL | FINAL | BETTER | BEST
          | PREFERRED | REPLY | RESPONSE | OUTPUT | ANSWER | OPTION | ASSISTANT | LETTER | CHOICE
          | VERDICT | WINNER | PREFERENCE | DECISION | JUDGE?MENT | CONCLUSION | BOXED | TEXT
          | IS | WOULD | RATHER | HAVE | RECEIVED | CHOOSE | PREFER | PICK | SELECT ) \b [^\w\n]* )*
    \b ( (?-i: [AB] | (?<![ ]) [ab] ) ) \b # "B", "(b)", "The better reply is B"; no "I prefer a"
    (?: [ ]IS [ ] (?: THE [ ] )? BETTER )? # "Reply B is better"
    [^\w?:\n]* $                          # "**.", ")"; but no "?", and no ":", that is a heading
    """)


def judge_by_endpoint(cfg, prompts, baseline, policy, device, dtype):
    """An OpenAI-compatible server, in both orders, for judges lean towards a place. Verdicts go to
    OUT/verdicts.jsonl as they come, and what is there is not asked again. Trouble that stays ends
    the run with one line, when the replies that are under way have come: they are paid for."""
    if rank() > 0:
        return []
    import openai
    key = os.environ.get("OPENAI_API_KEY") or "none"     # read here, written nowhere
    client = openai.OpenAI(base_url=cfg.api_base, api_key=key, max_retries=6)
    first = list(map(QUESTION.format, baseline, policy))         # the policy's answer is B ...
    then = list(map(QUESTION.format, policy, baseline))          # ... and then A
    draws = {q: 0.5 for q, p in zip(first, then) if q == p}              # equal answers
    verdicts = dict(draws)
    file = open(f"{cfg.out}/verdicts.jsonl", "a+")
    file.seek(0)
    for line in file:
        try:
            row = json.loads(line)
            if row["judge"] == cfg.judge:
                verdicts[row["question"]] = row["b_is_better"]
        except ValueError:
            pass                                         # torn by a kill
    trouble = []

    def ask(question):
        """The question, and the probability that B is better, or None."""
        messages = [{"role": "user", "content": question}]
        for settings in SETTINGS:
            if trouble:
                break
            try:
                return question, read_verdict(client.chat.completions.create(
                    model=cfg.judge, messages=messages, **settings))
            except ValueError:
                break                                    # no JSON: the next run asks again
            except openai.OpenAIError as error:
                status = getattr(error, "status_code", None)
                # A request refused may pass with plainer settings. A server that has answered other
                # questions may refuse this one for what it says. All else ends the run.
                refused = settings == {} and len(verdicts) == len(draws)
                if status not in (400, 403, 422) or refused:
                    trouble.append(error)
        return question, None

    asked = {*first, *then} - verdicts.keys()
    for question, p in ThreadPool(8).imap_unordered(ask, asked):
        if p is not None:
            verdicts[question] = p
            row = {"judge": cfg.judge, "question": question, "b_is_better": p}
            file.write("\n" + json.dumps(row))           # newline first: a torn line costs itself
            file.flush()
    if trouble:
        # its text may hold the key
        fail(f"--api_base (verdicts so far are kept): {trouble[0]}".replace(key, "***"))
    preferences = []
    for question, swapped in zip(first, then):
        preference = None
        if question in verdicts and swapped in verdicts:
            preference = 1 + (verdicts[question] + 1 - verdicts[swapped]) / 2
        preferences.append(preference)
    return preferences


def read_verdict(reply):
    """The probability that B is better, or None: all verdicts of the reply must agree."""
    import openai
    if not getattr(reply, "choices", None):
        raise openai.OpenAIError(f"no choices in the reply: {reply}")
    choice = reply.choices[0]
    content = choice.message.content or ""
    text = content.rpartition("</think>")[2]
    verdicts = list(VERDICT.finditer(text))
    letters = {match[1].upper() for match in verdicts}
    if len(letters) != 1 or choice.finish_reason == "length":        # cut off: more was to come
        return None
    [letter] = letters
    p = {letter: 1e-30}              # decides where there are no log-probs, else changes nothing
    place = len(content) - len(text) + verdicts[0].start(1)
    for token in choice.logprobs and choice.logprobs.content or []:
        place -= len(token.token)
        if place < 0 and token.token.strip().upper() == letter:      # the verdict's, no later "a"
            for other in token.top_logprobs or []:
                name = other.token.strip().upper()       # "A" and " A" are two tokens
                p[name] = p.get(name, 0) + math.exp(other.logprob)
            break
    return p.get("B", 0) / (p.get("A", 0) + p.get("B", 0))


# == Plumbing. Answers: sampled, or read from a file ===============================================
def name_of(source):
    """What tables call it: out/ppo/model -> ppo, results/claude.json -> claude"""
    return os.path.basename(re.sub(r"/model/?$|/$|\.json[^/]*$", "", source))


def answers_of(cfg, source, side, prompts, device, dtype):
    """A file's rows of alpaca_eval outputs, in the prompts' order, or a model's answers."""
    asked = [prompt_text(prompt) for prompt in prompts]
    if re.search(r"\.json[^/]*$", source):
        answers = []
        for row in read_rows(source, len(prompts)):
            finished = row.get("finished") is not False
            answers.append({"generator": name_of(source)} | row
                           | {"finished": finished, "score": None})
        if [answer.get("instruction") for answer in answers] != asked:
            fail(f"{source}: its instructions are not the prompts of --data, in their order")
        return answers
    check_context(source, cfg.max_prompt_tokens + cfg.max_new_tokens, cfg.max_prompt_tokens)
    tokenizer, stops = load_tokenizer(source)
    ids = encode_prompts(tokenizer, prompts, cfg.max_prompt_tokens, cfg.data)
    model = plain_copy(load_model(source, LanguageModel, device, dtype), dtype, device)
    seeds = [(cfg.seed, side, b) for b in range(len(ids))]       # the two sides draw independently
    tokens, _, lengths = sample(model, tokenizer, ids, stops, cfg.max_new_tokens, seeds,
                                cfg.generation_batch_size, cfg.temperature)              # (n, R)
    answers = []
    for instruction, row, length in zip(asked, tokens, lengths):
        output = answer_text(tokenizer, stops, row[:length])
        answers.append({"instruction": instruction, "output": output,
                        "generator": name_of(source), "finished": row[length - 1] in stops})
    finished = np.mean([answer["finished"] for answer in answers])
    say(f"{source}: {len(answers)} answers sampled, {finished:.0%} of them finished")
    return answers


# -- Plumbing. Annotations -> figures -> table, files, page ----------------------------------------
def columns_of(rows, difficulty):
    """What length_controlled_win_rate takes, of alpaca_eval's annotations: preferences, lengths of
    the baseline's and of the policy's answers, difficulties; (n,) each."""
    columns = []
    for row in rows:
        if row.get("len_1") is None:
            row |= {"len_1": len(row["output_1"]), "len_2": len(row["output_2"])}
        preference = row.get("preference", row.get("preference_surrogate"))
        columns.append([preference, row["len_1"], row["len_2"]])
    # without an index difficulties stand in the rows' order, one for each
    if difficulty and rows[0].get("index") is not None:
        difficulty = [difficulty[row["index"]] for row in rows]
    return *np.array(columns, dtype=float).T, difficulty


LINE = """{}
  win rate           {win_rate:.2f} +- {standard_error:.2f}
  at equal length    {length_controlled_winrate:.2f} +- {lc_standard_error:.2f}
  won, drawn, lost   {n_wins}, {n_draws}, {n_wins_base}: {n_total} verdicts on {} pairs
  mean length        {avg_length} vs {:.0f} characters"""


def report(cfg, policies):
    """The figures of [(policy, its annotations)]: printed, in OUT/leaderboard.csv, on a page."""
    if rank() > 0:
        return
    difficulty = None
    if cfg.difficulty:
        difficulty = json.loads(Path(cfg.difficulty).read_text())
    variants = defaultdict(list)
    for source in cfg.gamed:
        for row in read_rows(source):
            variants[row.get("variant", source)].append(row)
    table = []
    for name, rows in policies:
        try:
            gamed = [columns_of(variant, difficulty) for variant in variants.values()]
            columns = columns_of(rows, difficulty)
            row = win_rate(columns[0]) | {"mode": "community", "avg_length": int(columns[2].mean())}
            row |= length_controlled_win_rate(*columns, gamed)
        except (ValueError, LookupError, TypeError) as error:
            fail(f"{name}: {error!r}: annotations need a preference in [1, 2] or null; output_1 "
                 "and output_2, or len_1 and len_2; an index, or as many rows as --difficulty has")
        say(LINE.format(name, len(rows), columns[1].mean(), **row).replace(" nan", " -"))
        if rows[0].get("score_2") is not None:
            scores = [[pair["score_2"], pair["score_1"]] for pair in rows]               # (n, 2)
            say("  mean score         {:+.3f} vs {:+.3f}".format(*np.mean(scores, 0)))
        # NaN: an empty cell, and null on the page
        table.append({"": name} | {k: None if v != v else v for k, v in row.items()})
    write_json(f"{cfg.out}/config.json", asdict(cfg))
    with open(f"{cfg.out}/leaderboard.csv", "w") as f:
        leaderboard = csv.DictWriter(f, table[0], lineterminator="\n")
        leaderboard.writeheader()
        leaderboard.writerows(table)
    if cfg.html:
        page = {"table": table, "pairs": [[name, rows[:100]] for name, rows in policies],
                "judge": cfg.judge, "data": cfg.data}
        # without a "<" nothing in the data can end the element that holds it
        data = json.dumps(page, default=str).replace("<", "\\u003c")
        text = Path(__file__).parent.joinpath("assets/page.html").read_text()
        text = text.replace("{{nonce}}", os.urandom(16).hex()).replace("{{data}}", data)
        Path(cfg.out, "index.html").write_text(text)
    say(f"wrote {cfg.out}")


# == The run =======================================================================================
def main(cfg):
    device = setup()
    dtype = set_precision(cfg.dtype, device)
    if cfg.annotations:
        policies = []
        for source in cfg.annotations:
            by_generator = defaultdict(list)
            for row in read_rows(source):
                by_generator[row.get("generator_2", source)].append(row)
            policies += by_generator.items()
        return report(cfg, policies)

    # 1. who judges? Said before anything is sampled
    if cfg.data == Config.data:                  # the world's truth can judge no other data
        cfg.judge = cfg.judge or "data/reviews/prepare.py:gold_reward"
    if not cfg.judge or cfg.api_base and not importlib.util.find_spec("openai"):
        fail("--judge: a model, file.py:function, or a name at --api_base (pip install openai)")
    if ".py:" in cfg.judge:
        judge = judge_by_function
        load_function(cfg.judge)
    elif cfg.api_base:
        judge = judge_by_endpoint
    else:
        judge = judge_by_reward_model
        _, cutoff = trained_how(cfg, cfg.judge)
        assert cfg.cutoff in (None, cutoff), f"--cutoff: {cfg.judge} was trained at {cutoff}"
        check_context(cfg.judge, context_of(cfg.judge), cfg.max_prompt_tokens)
    warn_of_world_values(cfg)
    kept = Path(cfg.out, "annotations.json")
    if kept.exists() and json.loads(kept.read_text())[0]["annotator"] != cfg.judge:
        fail("--out holds the preferences of another judge; give another folder")

    # 2. both answer the same prompts
    prompts = load_prompts(cfg.data, cfg.max_samples)
    policy = answers_of(cfg, cfg.model, 1, prompts, device, dtype)
    write_json(f"{cfg.out}/policy.json", policy)
    baseline = answers_of(cfg, cfg.baseline, 0, prompts, device, dtype)
    write_json(f"{cfg.out}/baseline.json", baseline)

    # 3. the judge prefers one
    preferences = judge(cfg, prompts, baseline, policy, device, dtype)
    pairs = []
    for a, b, preference in zip(baseline, policy, preferences):
        pair = {"instruction": a["instruction"], "annotator": cfg.judge, "preference": preference}
        for name in ("output", "generator", "score", "segments"):
            pair |= {f"{name}_1": a.get(name), f"{name}_2": b.get(name)}
        pairs.append(pair)
    write_json(f"{cfg.out}/annotations.json", pairs)
    report(cfg, [(policy[0]["generator"], pairs)])


if __name__ == "__main__":
    main(parse(Config))
    dist.destroy_process_group()
