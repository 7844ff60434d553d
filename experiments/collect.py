"""Turn a finished run into one line of results.jsonl: python experiments/collect.py --help

A policy's line has gold reward, KL and learned reward of every iteration; a reward model's line has
its accuracy, and what the embedded world knows about it. run.sh calls this after each run.
"""
import argparse
import json
import os
import subprocess
import sys

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

from data.reviews.prepare import clause_values  # noqa: E402
from segment import (LanguageModel, answer_text, encode_chats, load_model, load_pairs,  # noqa: E402
                     load_tokenizer, map_rows, response_mask, segment_ends, setup)
from train_rm import ScalarModel  # noqa: E402

CUTOFFS = (.25, .5, .75, 1., 1.5, 2., 2.5, 3., 3.5)
QUANTILES = torch.tensor([.05, .25, .5, .75, .95])


def against_truth(run, config):
    """What the world knows about a reward model: how well its scalars at clause ends agree with the
    clauses' values, and how well boundaries agree with clause ends, on the held-out pairs."""
    device = setup()
    tokenizer, stops = load_tokenizer(config["model"])
    chats = [(prompt, [chosen, rejected], where)
             for prompt, chosen, rejected, where in load_pairs(f"{run}/held_out.jsonl")]
    rows = encode_chats(tokenizer, stops, chats, config["max_tokens"], config["max_prompt_tokens"])
    sft = load_model(config["model"], LanguageModel, device, torch.float32)
    _, entropy = map_rows(sft, rows, 16, device)                                         # (B, R)
    model = load_model(f"{run}/model", ScalarModel, device, torch.float32)
    scalars = map_rows(model, rows, 16, device)                                          # (B, R)
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
    else:
        line["accuracy"] = round(metrics[-1]["eval_accuracy"], 4)
        line |= against_truth(args.run, config)
    with open(args.results, "a") as f:
        f.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
