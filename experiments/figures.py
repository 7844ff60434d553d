"""Tables and pictures of the experiment, from experiments/results.jsonl alone (needs matplotlib).

    python experiments/figures.py [RESULTS.jsonl]        # tables, and beside it four pictures

"Final" is the mean over the last 5 iterations. ± is the standard deviation over draws (SFT model,
pairs, reward model) of the mean over PPO seeds. It holds both: how much draws differ, and what the
mean leaves of the seeds' noise, which a table gives by itself. The best gold at a KL is read at the
coefficient and the iterations that are best on the *other* draws, for who chooses by a run's own
gold flatters it. Any part of the experiment that has not been run is left out.
"""
import json
import os
import sys
from collections import defaultdict

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))

METHODS = ("segment", "token", "bandit")
COLORS = {"segment": "tab:red", "token": "tab:blue", "bandit": "tab:gray"}
ORACLES = {"oracle-segment": ("true values, one by one", "--"),
           "oracle-bandit": ("true values, as one number", ":")}
COEFFICIENTS = (".01", ".03", ".1")                                  # of the KL penalty
FIRST, AT_20, FINAL = ("gold", 0, 1), ("gold", 18, 21), ("gold", -5, None)       # iterations
FINAL_KL = ("kl", -5, None)
SAME_KL = {"segment": ".03", "token": ".1", "bandit": ".01"}         # these end at a similar KL
AMOUNTS = ((1000, "pairs1000-"), (4400, ""), (12000, "pairs12000-"))     # pairs, prefix of a run
LENGTHS = ((4, "clauses4-"), (12, ""), (24, "clauses24-"))               # clauses, prefix of a run
BY_LENGTH = {"segment": (".03", ".1"), "token": (".1", ".3"), "bandit": (".01", ".03")}


# -- results.jsonl: one line a run -----------------------------------------------------------------
def read_results(path):
    """The policies, {name: {draw: [line of each seed]}}, and the reward models, {name: [lines]}."""
    policies, reward_models = defaultdict(lambda: defaultdict(list)), defaultdict(list)
    for text in open(path):
        line = json.loads(text)
        if line["name"].startswith("sentiment-"):        # sentiment_figures.py shows these
            continue
        if "gold" in line:
            policies[line["name"]][line["draw"]].append(line)
        else:
            reward_models[line["name"]].append(line)
    return policies, reward_models


def mean_of(run, key, start, stop):
    return np.mean(run[key][start:stop])


def by_draw(draws, measure, *args):
    """{draw: mean over seeds}"""
    means = {}
    for draw, seeds in draws.items():
        means[draw] = np.mean([measure(run, *args) for run in seeds], 0)
    return means


def smooth(run, key):
    """Means of three iterations in a row"""
    return np.convolve(run[key], np.ones(3) / 3, "valid")


def best_within(candidates, limit):
    """{draw: gold where its KL is at most the limit}, at the coefficient and the iterations that
    promise most by the other draws. candidates: {draw: [line of each seed]} of each coefficient."""
    golds = [by_draw(draws, smooth, "gold") for draws in candidates]
    kls = [by_draw(draws, smooth, "kl") for draws in candidates]
    best = {}
    for draw in sorted(set().union(*candidates)):
        most = -np.inf
        for gold, kl in zip(golds, kls):
            others = [curve for other, curve in gold.items() if other != draw]
            if draw in gold and others:
                promise = np.where(kl[draw] <= limit, np.mean(others, 0), -np.inf)
                i = promise.argmax()
                if promise[i] > most:
                    most, best[draw] = promise[i], gold[draw][i]
    return best


def only_first(draws):
    """Draws 1 to 3 with PPO seed 0: all that amounts and lengths have."""
    few = {}
    for draw, seeds in draws.items():
        first = [run for run in seeds if run["seed"] == 0]
        if draw <= 3 and first:
            few[draw] = first
    return few


def gain_within(policies, world, method, limit):
    """{draw: gold gained over the first iteration at KL ≤ limit}"""
    candidates = []
    for coefficient in BY_LENGTH[method]:
        candidates.append(only_first(policies[f"{world}{method}-kl{coefficient}"]))
    return difference(best_within(candidates, limit), by_draw(candidates[0], mean_of, *FIRST))


# -- Numbers and tables ----------------------------------------------------------------------------
def average(values):
    """Over draws; nothing is worst."""
    return np.mean([*values.values()]) if values else -np.inf


def deviation(values):
    return np.std([*values.values()], ddof=1) if len(values) > 1 else 0.0


def difference(a, b):
    return {draw: a[draw] - b[draw] for draw in a if draw in b}


def cell(values, form="+.2f"):
    """{draw: number} -> mean ± deviation"""
    text = format(average(values), form) if values else "–"
    if len(values) > 1:
        text += " ± " + format(deviation(values), form.strip("+"))
    return text


def gap(a, b):
    """The same of a difference, draw by draw, with its range"""
    values = difference(a, b)
    text = cell(values)
    if len(values) > 1:
        text += f" ({min(values.values()):+.2f} to {max(values.values()):+.2f})"
    return text


def counts(draws):
    """3 draws with 2 seeds each -> 3, 6"""
    return f"{len(draws)}, {sum(len(seeds) for seeds in draws.values())}"


def table(header, rows):
    print("\n| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def method_tables(policies):
    """Prints three tables; returns the KL coefficient at which each method ends highest."""
    best, rows = {}, []
    for method in METHODS:
        golds = {}
        for kl in COEFFICIENTS:
            golds[kl] = by_draw(policies[f"{method}-kl{kl}"], mean_of, *FINAL)
        best[method] = max(golds, key=lambda kl: average(golds[kl]))
        rows.append([method] + [cell(gold) for gold in golds.values()])
    table(["final gold at KL coefficient", *COEFFICIENTS], rows)

    rows = []
    for method in (*METHODS, "oracle-segment", "oracle-bandit"):
        coefficient = best.get(method, ".03")
        draws = policies[f"{method}-kl{coefficient}"]
        row = [f"{method} ({coefficient})", counts(draws)]
        for where in (FIRST, AT_20, FINAL):
            row.append(cell(by_draw(draws, mean_of, *where)))
        row.append(cell(by_draw(draws, mean_of, *FINAL_KL), ".1f"))
        candidates = [policies[f"{method}-kl{kl}"] for kl in COEFFICIENTS]
        for limit in (3, 4, 6, 8):
            row.append(cell(best_within(candidates, limit)))
        rows.append(row)
    table(["reward (KL coefficient that ends highest)", "draws, runs", "gold, first iteration",
           "at iteration 20", "final", "final KL", "best gold at KL ≤ 3", "≤ 4", "≤ 6", "≤ 8"],
          rows)

    rows = []
    for ahead, behind in (("segment", "bandit"), ("segment", "token"),
                          ("oracle-segment", "oracle-bandit")):
        row = [f"{ahead} ahead of {behind}"]
        for where in (AT_20, FINAL):
            row.append(gap(by_draw(policies[f"{ahead}-kl.03"], mean_of, *where),
                           by_draw(policies[f"{behind}-kl.03"], mean_of, *where)))
        rows.append(row)
    table(["gold, difference (KL coefficient .03)", "at iteration 20", "final"], rows)
    return best


def amount_tables(policies, reward_models):
    rows, gaps = [], []
    for pairs, world in AMOUNTS:
        golds = {}
        for method, coefficient in SAME_KL.items():
            draws = only_first(policies[f"{world}{method}-kl{coefficient}"])
            row = [f"{pairs:,}", f"{method} ({coefficient})", counts(draws)]
            lines = [line for line in reward_models[f"{world}rm-{method}"] if line["draw"] in draws]
            for key in ("accuracy", "correlation"):
                row.append(cell({line["draw"]: line[key] for line in lines}, ".2f"))
            golds[method] = by_draw(draws, mean_of, *FINAL)
            row.append(cell(golds[method]))
            row.append(cell(by_draw(draws, mean_of, *FINAL_KL), ".1f"))
            rows.append(row)
        gaps.append([f"{pairs:,}", gap(golds["segment"], golds["bandit"]),
                     gap(golds["segment"], golds["token"])])
    table(["pairs", "reward (KL coefficient)", "draws, runs", "held-out accuracy",
           "correlation with clause values", "final gold", "final KL"], rows)
    table(["pairs", "final gold, segment ahead of bandit", "of token"], gaps)


def length_tables(policies, reward_models):
    rows, gaps = [], []
    for clauses, world in LENGTHS:
        gains = {}
        for method, coefficient in SAME_KL.items():
            draws = only_first(policies[f"{world}{method}-kl{coefficient}"])
            row = [str(clauses), method, counts(draws)]
            lines = [line for line in reward_models[f"{world}rm-{method}"] if line["draw"] in draws]
            row.append(cell({line["draw"]: line["accuracy"] for line in lines}, ".2f"))
            for limit in (2, 4, 6):
                row.append(cell(gain_within(policies, world, method, limit)))
            gained = difference(by_draw(draws, mean_of, *FINAL), by_draw(draws, mean_of, *FIRST))
            row.append(cell(gained))
            row.append(cell(by_draw(draws, mean_of, *FINAL_KL), ".1f"))
            rows.append(row)
            gains[method] = gain_within(policies, world, method, 4)
        gaps.append([str(clauses), gap(gains["segment"], gains["bandit"]),
                     gap(gains["segment"], gains["token"])])
    table(["clauses", "reward", "draws, runs", "held-out accuracy", "gold gained at KL ≤ 2", "≤ 4",
           "≤ 6", "gained at the end", "KL at the end"], rows)
    table(["clauses", "gold gained at KL ≤ 4, segment ahead of bandit", "of token"], gaps)


def ablation_table(policies):
    """Against the mean over seeds of the unchanged run of the same draw"""
    plain = by_draw(policies["segment-kl.03"], mean_of, *FINAL)
    rows = []
    for name in sorted(policies):
        if "-kl" not in name:
            golds = by_draw(policies[name], mean_of, *FINAL)
            kl = by_draw(policies[name], mean_of, *FINAL_KL)
            rows.append([name, counts(policies[name]), gap(golds, plain), cell(kl, ".1f")])
    table(["change (to segment-kl.03)", "draws, runs", "final gold, difference", "final KL"], rows)


def seed_table(policies):
    """How much does a final gold depend on the PPO seed alone? (The difference of two means over two
    seeds, as in the table of changes, depends on it as one run does.)"""
    variances = defaultdict(list)
    for name, draws in policies.items():
        kind = name.split("-kl")[0]                      # all its coefficients together
        if "-as-" in name:
            kind = "changes: crossings with the bandit"
        elif name == "paper-scale":
            kind = "changes: the paper's scale"
        elif "-kl" not in name:
            kind = "changes: all others"
        for seeds in draws.values():
            if len(seeds) > 1:
                variances[kind].append(np.var([mean_of(run, *FINAL) for run in seeds], ddof=1))
    rows = []
    for kind, values in variances.items():
        noise = np.sqrt(np.mean(values))
        rows.append([kind, str(len(values)), f"{noise:.3f}", f"{noise * 2 ** .5:.3f}"])
    table(["final gold, deviation over PPO seeds", "draws x coefficients", "of a run",
           "of the difference of two runs"], rows)


def reward_model_table(policies, reward_models):
    rows = []
    for name, lines in sorted(reward_models.items()):
        if not lines:
            continue
        row = [name, str(len(lines))]
        for key in ("accuracy", "correlation"):
            row.append(cell({line["draw"]: line[key] for line in lines}, ".2f"))
        draws = policies[name.removeprefix("rm-") + "-kl.03"]
        row.append(cell({draw: seeds[0]["scale"] for draw, seeds in draws.items()}, ".1f"))
        rows.append(row)
    table(["reward model", "draws", "held-out accuracy", "correlation with clause values", "S"],
          rows)


# -- Pictures --------------------------------------------------------------------------------------
def draw_learning(axes, policies, best):
    """Gold by iteration: mean over draws, and as a band their deviation, as in the table."""
    for reward in ("oracle-segment", *METHODS, "oracle-bandit"):
        coefficient = best.get(reward, ".03")
        draws = policies[f"{reward}-kl{coefficient}"]
        means = [np.mean([run["gold"] for run in seeds], 0) for seeds in draws.values()]
        if not means:
            continue
        x = np.arange(1, len(means[0]) + 1)
        gold, over = np.mean(means, 0), np.std(means, 0, ddof=min(1, len(means) - 1))
        label, style = ORACLES.get(reward, (f"{reward} rewards", "-"))
        axes.plot(x, gold, style, color=COLORS.get(reward, "black"), lw=2 if style == "-" else 1.2,
                  label=f"{label} (KL coefficient {coefficient})")
        if style == "-":
            axes.fill_between(x, gold - over, gold + over, color=COLORS[reward], alpha=.15, lw=0)
    axes.set(xlabel="PPO iteration", ylabel="true reward", xlim=(1, None))


def draw_gold_by_kl(axes, policies):
    """A point is a KL coefficient: final gold and KL, with deviations over draws."""
    for method in METHODS:
        points = []
        for coefficient in COEFFICIENTS:
            draws = policies.get(f"{method}-kl{coefficient}")
            if draws:
                gold, kl = by_draw(draws, mean_of, *FINAL), by_draw(draws, mean_of, *FINAL_KL)
                points.append((average(kl), average(gold), deviation(kl), deviation(gold)))
                axes.annotate(coefficient, points[-1][:2], (5, -14 if method == "token" else 5),
                              textcoords="offset points", color=COLORS[method])
        if points:
            x, y, x_error, y_error = np.transpose(points)
            axes.errorbar(x, y, y_error, x_error, color=COLORS[method], marker="o", capsize=3,
                          label=f"{method} rewards")
    axes.set(xlabel="KL to the SFT model at the end, nats a response", ylabel="true reward")


def draw_gain_by_length(axes, policies, limit=4):
    for shift, method in zip((-.25, 0, .25), METHODS):
        points = []
        for clauses, world in LENGTHS:
            gain = gain_within(policies, world, method, limit)
            if gain:
                points.append((clauses + shift, average(gain), deviation(gain)))
        if points:
            x, y, error = np.transpose(points)
            axes.errorbar(x, y, error, color=COLORS[method], marker="o", capsize=3, label=method)
    axes.set(xlabel="clauses in a response", xticks=(4, 12, 24),
             ylabel=f"true reward gained at KL ≤ {limit}")


def draw_truth(axes, reward_models):
    boxes, keys = [], ("whislo", "q1", "med", "q3", "whishi")
    for line in reward_models["rm-segment"][:1]:
        for value, quantiles in line["by_value"].items():
            boxes.append({"label": value} | dict(zip(keys, quantiles)))
    axes.bxp(boxes, showfliers=False)
    axes.set(xlabel="true value of a clause", ylabel="learned reward (5, 25, 50, 75, 95 %)")


def main():
    results = sys.argv[1] if len(sys.argv) > 1 else f"{HERE}/results.jsonl"
    folder = os.path.dirname(os.path.abspath(results))
    policies, reward_models = read_results(results)
    best = method_tables(policies)
    amount_tables(policies, reward_models)
    length_tables(policies, reward_models)
    ablation_table(policies)
    seed_table(policies)
    reward_model_table(policies, reward_models)

    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    for name, draw, *what in (("learning", draw_learning, policies, best),
                              ("gold-vs-kl", draw_gold_by_kl, policies),
                              ("length", draw_gain_by_length, policies),
                              ("truth", draw_truth, reward_models)):
        figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
        draw(axes, *what)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=10)
        figure.savefig(f"{folder}/{name}.png", dpi=110)


if __name__ == "__main__":
    main()
