"""Tables, samples and a picture of the experiment with a real model, from results.jsonl alone.

    python experiments/sentiment_figures.py [RESULTS.jsonl]      # and beside it sentiment.png

"Final" is the mean over the last 5 iterations, on the prompts that PPO trains on; "gold at KL 4" is
read where a run's curve, means of 3 iterations, first comes to that KL. Test prompts are about
other subjects. ± is the standard deviation over PPO seeds, which share one reward model; of a reward
model's figures it is the standard error over held-out pairs.
"""
import json
import os
import sys
from collections import defaultdict

import numpy as np

from figures import (COLORS, FINAL, FINAL_KL, FIRST, HERE, METHODS, ORACLES, cell, difference,
                     mean_of, smooth, table)

# of answers to the test prompts; the last two show over-optimisation
SIGNS = {"gold": "+.2f", "positive": ".3f", "distinct": ".3f"}
KLS = (4, 8)                                             # every run gets there


def read_results(path):
    """The policies, {name: {seed: line}}, and the reward models, {name: line}."""
    policies, reward_models = defaultdict(dict), {}
    for text in open(path):
        line = json.loads(text)
        experiment, _, name = line["name"].partition("-")
        if experiment == "sentiment" and "gold" in line:
            policies[name][line["seed"]] = line
        elif experiment == "sentiment":
            reward_models[name] = line
    order = [*METHODS, *ORACLES]
    names = sorted(policies, key=lambda name: (order.index(method_of(name)), name))
    return {name: policies[name] for name in names}, reward_models


def method_of(name):
    return name.partition("-kl")[0]


def measured(lines, key, *where):
    return {seed: mean_of(line, key, *where) for seed, line in lines.items()}


def gold_at(lines, level):
    """{seed: gold where KL first comes to this level}, of the seeds that get there"""
    golds = {}
    for seed, line in lines.items():
        kl, gold = smooth(line, "kl"), smooth(line, "gold")
        i = np.argmax(kl >= level)
        if i > 0:
            golds[seed] = np.interp(level, kl[i - 1:i + 1], gold[i - 1:i + 1])
    return golds


def policy_table(policies):
    """"ahead": of the bandit reward of its kind, learned or true, seed by seed; where that was
    tried at several coefficients, of the one with most seeds."""
    rows = []
    for name, lines in policies.items():
        if not rows:                                     # all have the same baseline
            line = next(iter(lines.values()))
            first = {}
            for every in policies.values():
                first |= measured(every, *FIRST)
            rows.append(["SFT model", "", cell(first), "", "0", *len(KLS) * [""]])
            rows[0] += [str(line["before"][key]) for key in SIGNS]
        final = measured(lines, *FINAL)
        oracle = name.startswith("oracle-") * "oracle-"
        rivals = [other for other in policies if method_of(other) == f"{oracle}bandit"]
        rival = max(rivals, key=lambda other: len(policies[other]))
        ahead = difference(final, measured(policies[rival], *FINAL))
        row = [name, str(len(lines)), cell(final), cell(ahead) if rival != name else "",
               cell(measured(lines, *FINAL_KL), ".1f")]
        row += [cell(gold_at(lines, level)) for level in KLS]
        for key, form in SIGNS.items():
            row.append(cell({seed: line["after"][key] for seed, line in lines.items()}, form))
        rows.append(row)
    table(["reward, KL coefficient", "seeds", "final gold", "ahead of bandit", "final KL",
           *[f"gold at KL {level}" for level in KLS],
           "gold, test prompts", "praising words", "word pairs that are new"], rows)


def reward_model_table(reward_models):
    rows = []
    for name, line in reward_models.items():
        figures = []
        for key in ("accuracy", "correlation", "within"):
            figures.append(f"{line[key]:.3f} ± {line[key + '_error']:.3f}")
        rows.append([name, *figures])
    table(["reward model", "held-out accuracy", "correlation of segment ends with their sentence",
           "within a response"], rows)


def print_samples(policies):
    """The first five test prompts with the first seed's answers; in brackets a segment's reward."""
    firsts = {name: lines[min(lines)] for name, lines in policies.items()}
    for i in range(5):
        for n, (name, line) in enumerate(firsts.items()):
            sample = line["samples"][i]
            if n == 0:
                print(f"\n**{sample['prompt']}**\n")
            if not name.startswith("oracle"):            # a reward model looks at the SFT answer
                print(f"- SFT, rewards of {name}: {sample['before']!r}")
            print(f"- {name}: {sample['after']!r}")


def draw_gold_by_kl(axes, policies):
    """A line is a seed: from left to right its iterations, each the mean of three."""
    for name, lines in policies.items():
        method = method_of(name)
        label, style = ORACLES.get(method, (f"{method} rewards", "-"))
        color = COLORS.get(method, "black")
        for seed, line in sorted(lines.items()):
            kl, gold = smooth(line, "kl"), smooth(line, "gold")
            axes.plot(kl, gold, style, color=color, lw=1.2, alpha=.7)
            axes.plot(kl[-1], gold[-1], "o", color=color, ms=4)
        axes.plot([], [], style, color=color, label=f"{label} ({name.partition('-kl')[2]})")
    axes.set(xlabel="KL to the SFT model, nats a response",
             ylabel="true reward: mean sentiment of sentences")


def main():
    results = sys.argv[1] if len(sys.argv) > 1 else f"{HERE}/results.jsonl"
    policies, reward_models = read_results(results)
    reward_model_table(reward_models)
    policy_table(policies)
    print_samples(policies)

    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    draw_gold_by_kl(axes, policies)
    axes.legend(frameon=False, fontsize=10)
    folder = os.path.dirname(os.path.abspath(results))
    figure.savefig(f"{folder}/sentiment.png", dpi=110)


if __name__ == "__main__":
    main()
