"""Tables and pictures of the experiment, from experiments/results.jsonl alone (needs matplotlib).

    python experiments/figures.py                        # prints the tables, draws learning.png
    python experiments/figures.py response [OUT.png]     # the README's first picture

In the tables "final" is the mean over the last 5 iterations, and ± is the standard deviation over
draws of the mean over PPO seeds. Any part of the experiment that has not been run is left out.
"""
import argparse
import json
import os
import sys
from collections import defaultdict

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

METHODS = ("segment", "token", "bandit")
COLORS = {"segment": "tab:red", "token": "tab:blue", "bandit": "tab:gray"}
COEFFICIENTS = (".01", ".03", ".1")
FIRST, AT_20, FINAL = ("gold", 0, 1), ("gold", 18, 21), ("gold", -5, None)       # iterations
FINAL_KL = ("kl", -5, None)


# --------------------------------------------------------------------------------------------------
# results.jsonl: one line a run
# --------------------------------------------------------------------------------------------------
def read_results(path):
    """The policies, {name: {draw: [line of each seed]}}, and the reward models, {name: [lines]}."""
    policies, reward_models = defaultdict(lambda: defaultdict(list)), defaultdict(list)
    for text in open(path):
        line = json.loads(text)
        if "gold" in line:
            policies[line["name"]][line["draw"]].append(line)
        else:
            reward_models[line["name"]].append(line)
    return policies, reward_models


# --------------------------------------------------------------------------------------------------
# tables
# --------------------------------------------------------------------------------------------------
def mean_of(run, key, start, stop):
    return np.mean(run[key][start:stop])


def scale_of(run):
    return run["scale"]


def gold_within(run, limit):
    """Best 3-iteration mean of the gold reward while the KL is at most the limit."""
    gold = np.convolve(run["gold"], np.ones(3) / 3, "valid")
    kl = np.convolve(run["kl"], np.ones(3) / 3, "valid")
    return max(gold[kl <= limit], default=np.nan)


def by_draw(draws, measure, *args):
    """{draw: mean over seeds}"""
    means = {}
    for draw, seeds in draws.items():
        means[draw] = np.mean([measure(run, *args) for run in seeds])
    return means


def average(values):
    """Over draws; nothing is worst."""
    return np.mean([*values.values()]) if values else -np.inf


def difference(a, b):
    return {draw: a[draw] - b[draw] for draw in a if draw in b}


def cell(values, form="+.2f"):
    """{draw: number} -> mean ± deviation"""
    text = format(average(values), form) if values else "–"
    if len(values) > 1:
        text += " ± " + format(np.std([*values.values()], ddof=1), form.strip("+"))
    return text


def table(header, rows):
    print("\n| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def tables(policies, reward_models):
    def of(name, *where):
        return by_draw(policies[name], mean_of, *where)

    best, rows = {}, []                                  # best: the coefficient of each method
    for method in METHODS:
        golds = {kl: of(f"{method}-kl{kl}", *FINAL) for kl in COEFFICIENTS}
        best[method] = max(COEFFICIENTS, key=lambda kl: average(golds[kl]))
        rows.append([method] + [cell(gold) for gold in golds.values()])
    table(["final gold at KL coefficient", *COEFFICIENTS], rows)

    rows = []
    for method in (*METHODS, "oracle-segment", "oracle-bandit"):
        coefficient = best.get(method, ".03")
        name = f"{method}-kl{coefficient}"
        row = [f"{method} ({coefficient})", str(len(policies[name]))]
        for where in (FIRST, AT_20, FINAL):
            row.append(cell(of(name, *where)))
        row.append(cell(of(name, *FINAL_KL), ".1f"))
        for limit in (3, 4, 6):                          # at whichever coefficient is best there
            reached = []
            for kl in COEFFICIENTS:
                reached.append(by_draw(policies[f"{method}-kl{kl}"], gold_within, limit))
            row.append(cell(max(reached, key=average)))
        rows.append(row)
    table(["reward (best KL coefficient)", "draws", "gold, first iteration", "at iteration 20",
           "final", "final KL", "best gold at KL ≤ 3", "≤ 4", "≤ 6"], rows)

    rows = []
    for ahead, behind in (("segment", "bandit"), ("segment", "token"),
                          ("oracle-segment", "oracle-bandit")):
        row = [f"{ahead} ahead of {behind}"]
        for where in (AT_20, FINAL):
            a = of(f"{ahead}-kl.03", *where)
            b = of(f"{behind}-kl.03", *where)
            row.append(cell(difference(a, b)))
        rows.append(row)
    table(["gold, difference (KL coefficient .03)", "at iteration 20", "final"], rows)

    for draw, seeds in policies["segment-kl.03"].items():            # ablations have one seed, 0
        policies["plain"][draw] = [run for run in seeds if run["seed"] == 0]
    plain = by_draw(policies.pop("plain", {}), mean_of, *FINAL)
    rows = []
    for name in sorted(policies):
        if "-kl" not in name:
            gap = difference(of(name, *FINAL), plain)
            kl = of(name, *FINAL_KL)
            rows.append([name, str(len(gap)), cell(gap), cell(kl, ".1f")])
    table(["change (to segment-kl.03)", "draws", "final gold, difference", "final KL"], rows)

    rows = []
    for name, lines in sorted(reward_models.items()):
        row = [name, str(len(lines))]
        for key in ("accuracy", "correlation"):
            values = {line["draw"]: line[key] for line in lines}
            row.append(cell(values, ".2f"))
        method = name.removeprefix("rm-")
        scales = by_draw(policies[f"{method}-kl.03"], scale_of)
        row.append(cell(scales, ".1f"))
        rows.append(row)
    table(["reward model", "draws", "held-out accuracy", "correlation with clause values", "S"],
          rows)
    lines = reward_models["rm-segment"]
    rows = []
    for cutoff in lines[0]["f1"] if lines else ():
        values = {line["draw"]: line["f1"][cutoff] for line in lines}
        rows.append([cutoff, cell(values, ".3f")])
    table(["cutoff", "boundary F1 against clause ends"], rows)
    return best


# --------------------------------------------------------------------------------------------------
# pictures
# --------------------------------------------------------------------------------------------------
def curves(policies, name, key):
    """(iterations,) mean and deviation over draws and seeds"""
    runs = np.array([run[key] for seeds in policies[name].values() for run in seeds])
    return runs.mean(0), runs.std(0)


def picture(path, policies, reward_models, best):
    """learning.png: gold by iteration, gold by KL, learned against true rewards of clauses."""
    import matplotlib.pyplot as plt
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4))
    for name in policies:
        if "-kl" not in name or not policies[name]:
            continue
        reward, coefficient = name.split("-kl")
        gold, deviation = curves(policies, name, "gold")
        x = np.arange(1, len(gold) + 1)
        if "oracle" in reward:
            style = "k--" if "segment" in reward else "k:"
            left.plot(x, gold, style, lw=1, label=f"{reward} ({coefficient})")
            continue
        color, strength = COLORS[reward], (COEFFICIENTS.index(coefficient) + 1) / 3
        if coefficient == best[reward]:
            left.plot(x, gold, color=color, label=f"{reward} ({coefficient})")
            left.fill_between(x, gold - deviation, gold + deviation, color=color, alpha=.15, lw=0)
        middle.plot(curves(policies, name, "kl")[0], gold, color=color, alpha=strength,
                    label=f"{reward} ({coefficient})")
    left.set(title="gold reward: mean, deviation over runs", xlabel="PPO iteration")
    middle.set(title="gold reward against KL", xlabel="KL to the SFT model, nats a response")
    for axes in (left, middle):
        if axes.lines:
            axes.legend(fontsize=7, title="reward (KL coefficient)", title_fontsize=7)
    boxes, keys = [], ("whislo", "q1", "med", "q3", "whishi")
    for line in reward_models["rm-segment"][:1]:
        for value, quantiles in line["by_value"].items():
            boxes.append({"label": value} | dict(zip(keys, quantiles)))
    right.bxp(boxes, showfliers=False)
    right.set(title="learned reward of a clause (5, 25, 50, 75, 95 %)", xlabel="its gold value")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=f"{HERE}/results.jsonl")
    commands = parser.add_subparsers(dest="command")
    one = commands.add_parser("response", help="draw one response")
    one.add_argument("picture", nargs="?", default=f"{ROOT}/assets/segments.png")
    one.add_argument("--model", default=f"{ROOT}/data/reviews/sft")
    one.add_argument("--reward_model", default=f"{ROOT}/out/rm/model")
    one.add_argument("--data", default=f"{ROOT}/data/reviews/pairs_test.jsonl")
    one.add_argument("--row", type=int, default=4, help="the chosen response of this row")
    args = parser.parse_args()
    if args.command == "response":
        from response import draw_response
        return draw_response(args)
    policies, reward_models = read_results(args.results)
    if not policies:
        sys.exit(f"{args.results}: no results yet; run experiments/run.sh")
    folder = os.path.dirname(os.path.abspath(args.results))
    best = tables(policies, reward_models)
    picture(f"{folder}/learning.png", policies, reward_models, best)


if __name__ == "__main__":
    main()
