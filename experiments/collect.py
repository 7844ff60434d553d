"""Turn a finished run into one line of results.jsonl: python experiments/collect.py --help

A policy's line has gold reward, KL and learned reward of every iteration; a reward model's line has
its accuracy, and what its world knows about it. run.sh and sentiment.sh call this after each run.
"""
import argparse
import json
import os
import re
import subprocess
import sys
from bisect import bisect_left

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

from data.reviews.prepare import clause_values  # noqa: E402
from segment import (LanguageModel, answer_text, cut_rows, encode_chats, load_model,  # noqa: E402
                     load_pairs, load_tokenizer, map_rows, response_mask, segment_ends,
                     segment_texts, set_precision, setup)
from train_rm import ScalarModel  # noqa: E402

CUTOFFS = (.25, .5, .75, 1., 1.5, 2., 2.5, 3., 3.5)
QUANTILES = torch.tensor([.05, .25, .5, .75, .95])


def read_held_out(run, config):
    """The held-out pairs of a reward model, and what it and the SFT model say to them: tokenizer,
    stops, chats (n), rows (2n), scalars and entropies (2n, R)."""
    device = setup()
    dtype = set_precision(config["dtype"], device)
    tokenizer, stops = load_tokenizer(config["model"])
    chats = [(prompt, [chosen, rejected], where)
             for prompt, chosen, rejected, where in load_pairs(f"{run}/held_out.jsonl")]
    rows = encode_chats(tokenizer, stops, chats, config["max_tokens"], config["max_prompt_tokens"])
    sft = load_model(config["model"], LanguageModel, device, dtype)
    _, entropy = map_rows(sft, rows, 16, device)                                         # (2n, R)
    model = load_model(f"{run}/model", ScalarModel, device, dtype)
    scalars = map_rows(model, rows, 16, device)                                          # (2n, R)
    return tokenizer, stops, chats, rows, scalars, entropy


def against_truth(run, config):
    """What the world knows about a reward model: how well its scalars at clause ends agree with the
    clauses' values, and how well boundaries agree with clause ends, on the held-out pairs."""
    tokenizer, stops, chats, rows, scalars, entropy = read_held_out(run, config)
    full_stop = tokenizer.convert_tokens_to_ids(".")
    clause_end = torch.zeros(scalars.shape, dtype=torch.bool)                            # (B, R)
    worth = []                                           # of each clause, in the same order
    for b, (_, response) in enumerate(rows):
        clause_end[b, :len(response)] = torch.from_numpy(response == full_stop)
        prompt = chats[b // 2][0][-1]["content"]
        values = clause_values(prompt, answer_text(tokenizer, stops, response))
        worth += values[:clause_end[b].sum()]            # not a last one without a full stop
    worth, rewards = torch.tensor(worth), scalars[clause_end]                            # (N,) each

    mask, finished = response_mask(rows, stops, "cpu")                       # (B, R), (B,)
    f1 = {}
    for cutoff in CUTOFFS:
        ends = segment_ends(entropy, mask, finished, cutoff, "segment")                  # (B, R)
        agree = 2 * (ends & clause_end).sum() / (ends.sum() + clause_end.sum())
        f1[cutoff] = round(float(agree), 4)
    by_value = {}
    for value in worth.unique().tolist():
        by_value[value] = rewards[worth == value].quantile(QUANTILES).tolist()
    correlation = np.corrcoef(rewards, worth)[0, 1]
    return {"correlation": round(float(correlation), 4), "f1": f1, "by_value": by_value}


def correlate(of, x, y):
    """The correlation of (N,) x and y, and its standard error: a bootstrap over pairs, for segments
    of a response, and responses to a prompt, have much in common. of: (N,), each one's response"""
    rng = np.random.default_rng(0)
    pair = of // 2
    n = pair.max() + 1
    values = []
    for times in [np.ones(n, int), *rng.multinomial(n, np.ones(n) / n, 1000)]:
        covariance = np.cov(x, y, fweights=times[pair])                                  # (2, 2)
        values.append(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]))
    return values[0], np.std(values[1:])


def against_sentences(run, config):
    """The same in the world of sentiment.py: does the scalar at a segment's end know the compound
    of the sentence that the segment ends in? Every model is read at the same places, the ends at
    the cutoff. "within": less each response's mean, that is without what the whole text tells."""
    from sentiment import judge_sentences                        # needs vaderSentiment
    tokenizer, stops, chats, rows, scalars, entropy = read_held_out(run, config)
    ends = cut_rows(rows, entropy, tokenizer, stops, config["cutoff"], "segment")        # (2n, R)
    found = []                                           # a (response, scalar, compound) a segment
    for b, (_, response) in enumerate(rows):
        content = response[:-1] if response[-1] in stops else response
        segments = segment_texts(tokenizer, content, ends[b, :len(content)])
        judged = judge_sentences("".join(segments))
        sentence_ends = [end for _, end in judged]
        text = ""
        for segment, scalar in zip(segments, scalars[b, ends[b]].tolist()):
            text += segment
            i = bisect_left(sentence_ends, len(text.rstrip()))
            if i < len(judged):                          # else it is a rest without a letter
                found.append((b, scalar, judged[i][0]))
    of, *both = np.transpose(found)                                                      # (N,) each
    of = of.astype(int)
    within = []
    for x in both:
        means = np.bincount(of, x) / np.bincount(of).clip(1)                             # (2n,)
        within.append(x - means[of])                                                     # (N,)
    line = {"held_out": len(chats)}
    for name, pair in (("correlation", both), ("within", within)):
        value, error = correlate(of, *pair)
        line |= {name: round(value, 4), f"{name}_error": round(error, 4)}
    return line


def describe(texts):
    """Gold, and two signs of over-optimisation: the share of words that the lexicon praises, and of
    word pairs that are the first of their kind in all texts (low: they repeat)."""
    from sentiment import gold_reward, lexicon
    words, pairs = [], []
    for text in texts:
        mine = re.findall(r"[a-z']+", text.lower())
        words += mine
        pairs += zip(mine, mine[1:])
    positive = np.mean([lexicon().lexicon.get(word, 0) > 0 for word in words])
    figures = {"gold": np.mean([gold_reward("", text) for text in texts]),
               "positive": positive, "distinct": len(set(pairs)) / len(pairs)}
    return {name: round(float(figure), 4) for name, figure in figures.items()}


def before_and_after(folder):
    """Of the answers to test prompts that evaluate.py left in a folder, of the SFT model and of the
    policy: what they are like; the first five, with their segments' rewards."""
    with open(f"{folder}/annotations.json") as f:
        pairs = json.load(f)
    line = {"before": describe([pair["output_1"] for pair in pairs]),
            "after": describe([pair["output_2"] for pair in pairs]),
            "samples": []}
    for pair in pairs[:5]:
        sample = {"prompt": pair["instruction"]}
        for when, side in (("before", 1), ("after", 2)):
            segments = pair[f"segments_{side}"]
            if segments is None:                         # a rule has judged the whole
                segments = [(pair[f"output_{side}"], pair[f"score_{side}"])]
            sample[when] = " | ".join(f"{text} [{reward:+.2f}]" for text, reward in segments)
        line["samples"].append(sample)
    return line


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the run's output folder")
    parser.add_argument("name")
    parser.add_argument("draw", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("flags", help="what this run changes, as one string")
    parser.add_argument("results", nargs="?", default=f"{HERE}/results.jsonl")
    args = parser.parse_args()
    if not os.path.exists(f"{args.run}/model") or os.path.exists(f"{args.run}/checkpoint"):
        sys.exit(f"{args.run} is not finished")
    with open(f"{args.run}/config.json") as f:
        config = json.load(f)
    metrics = [json.loads(line) for line in open(f"{args.run}/metrics.jsonl")]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True,
                            capture_output=True).stdout.strip()
    line = {"name": args.name, "draw": args.draw, "seed": args.seed, "flags": args.flags,
            "commit": commit}
    if "reward_model" in config:
        line |= config["calibration"]
        for key in ("gold", "kl", "reward"):
            line[key] = [round(row[key], 4) for row in metrics]
        if args.name.startswith("sentiment-"):
            line |= before_and_after(f"{args.run}-answers")
    else:
        accuracy = metrics[-1]["eval_accuracy"]
        line["accuracy"] = round(accuracy, 4)
        if args.name.startswith("sentiment-"):
            line |= against_sentences(args.run, config)
            error = (accuracy * (1 - accuracy) / line["held_out"]) ** 0.5
            line["accuracy_error"] = round(error, 4)
        else:
            line |= against_truth(args.run, config)
    with open(args.results, "a") as f:
        f.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
