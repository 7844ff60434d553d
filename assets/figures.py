"""Tables and pictures of assets/experiment.sh: python assets/figures.py OUT (needs matplotlib; about a minute).

Writes assets/learning.png, gold-vs-kl.png, truth.png and prints the README's tables in Markdown.
"final" is the mean over the last 5 iterations; +- is the standard deviation over draws of the mean over PPO seeds.
"""
import glob
import json
import os
import sys
from collections import defaultdict

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data.reviews.prepare import clause_values  # noqa: E402
from segment import (LanguageModel, encode_chats, is_finished, load_model, load_pairs,  # noqa: E402
                     load_tokenizer, map_rows, segment_ends, segment_locations, setup)
from train_rm import GRANULARITIES, Normalizer, ScalarModel, read_json  # noqa: E402

METHODS, COLORS = ("segment", "token", "bandit"), dict(segment="tab:red", token="tab:blue", bandit="tab:gray")
GRID = (".01", ".03", ".1")                                   # those that ran are shown


def load(out):
    """{name: {draw: [metrics of a seed, as {key: (steps,) array}]}}, finished runs alone"""
    runs = defaultdict(lambda: defaultdict(list))
    for path in sorted(glob.glob(f"{out}/draw*/*-s[0-9]/metrics.jsonl")):
        draw, run = path.split(os.sep)[-3:-1]
        if read_json(os.path.dirname(path) + "/config.json").get("finished"):
            lines = [json.loads(line) for line in open(path)]
            runs[run[:-3]][draw].append({k: np.array([x[k] for x in lines], float) for k in lines[0]})
    return runs


def over_draws(runs, name, f):
    """f(metrics) -> number; mean over seeds, then (mean, deviation over draws, draws)"""
    x = [np.mean([f(m) for m in seeds]) for seeds in runs[name].values()]
    return np.mean(x), np.std(x, ddof=1) if len(x) > 1 else 0.0, len(x)


def final(key):
    return lambda m: m[key][-5:].mean()


def gold_within(limit):
    """Best 3-iteration mean of the gold reward among iterations whose KL is at most the limit."""
    def f(m):
        gold = np.convolve(m["gold"], np.ones(3) / 3, "valid")
        kl = np.convolve(m["kl"], np.ones(3) / 3, "valid")
        return gold[kl <= limit].max()
    return f


def cell(x):
    return f"{x[0]:+.2f} ± {x[1]:.2f}"


def tables(runs):
    best = {g: max(GRID, key=lambda kl: over_draws(runs, f"{g}-kl{kl}", final("gold"))[0]) for g in METHODS}
    print("| reward | " + " | ".join(f"final gold at KL coefficient {kl}" for kl in GRID) + " |")
    print("| --- |" + " --- |" * len(GRID))
    for g in METHODS:
        print(f"| {g} | " + " | ".join(cell(over_draws(runs, f"{g}-kl{kl}", final("gold"))) for kl in GRID) + " |")
    rows = [(g, f"{g}-kl{best[g]}") for g in METHODS] + [(f"oracle {g}", f"oracle-{g}") for g in ("segment", "bandit")]
    print("\n| reward (best KL coefficient) | draws | gold, first iteration | at iteration 20 | final | final KL | "
          "best gold at KL ≤ 3 | ≤ 4 | ≤ 6 | ≤ 8 |\n| --- |" + " --- |" * 9)
    for label, name in rows:
        cells = [cell(over_draws(runs, name, f)) for f in
                 (lambda m: m["gold"][0], lambda m: m["gold"][18:21].mean(), final("gold"))]
        cells += [f"{over_draws(runs, name, final('kl'))[0]:.1f}"]
        every = [f"{label}-kl{kl}" for kl in GRID] if label in METHODS else [name]             # at any coefficient
        cells += [cell(max(over_draws(runs, n, gold_within(kl)) for n in every)) for kl in (3, 4, 6, 8)]
        kl = f" ({name.split('-kl')[1]})" if "-kl" in name else " (.03)"
        print(f"| {label}{kl} | {over_draws(runs, name, final('gold'))[2]} | " + " | ".join(cells) + " |")
    for when, f in (("at iteration 20", lambda m: m["gold"][18:21].mean()), ("at the end", final("gold"))):
        for a, b in (("segment-kl.03", "bandit-kl.03"), (f"segment-kl{best['segment']}", f"bandit-kl{best['bandit']}"),
                     ("oracle-segment", "oracle-bandit")):
            gaps = [np.mean([f(m) for m in runs[a][d]]) - np.mean([f(m) for m in runs[b][d]]) for d in runs[a]]
            print(f"\n{a} ahead of {b} {when}: {np.mean(gaps):.2f} ({min(gaps):.2f} to {max(gaps):.2f} over draws)")
    print("\n| change (to segment, KL coefficient .03) | draws | final gold, difference | KL |")
    print("| --- | --- | --- | --- |")
    for name in sorted(n for n in runs if "-kl" not in n and "oracle" not in n):
        both = [d for d in runs[name] if d in runs["segment-kl.03"]]                        # with the same PPO seeds
        diff = [np.mean([final("gold")(a) - final("gold")(b) for a, b in zip(runs[name][d], runs["segment-kl.03"][d])])
                for d in both]
        print(f"| {name} | {len(both)} | {np.mean(diff):+.2f} ± {np.std(diff, ddof=1) if len(diff) > 1 else 0:.2f} | "
              f"{over_draws(runs, name, final('kl'))[0]:.1f} |")
    return best


def pictures(runs, best, here):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for g in METHODS:
        for ax, key in zip(axes, ("gold", "reward")):
            y = np.stack([m[key] for seeds in runs[f"{g}-kl{best[g]}"].values() for m in seeds])        # (runs, steps)
            if key == "reward":                                 # proxies have different units: in deviations of step 1
                y = y - y[:, :1]
                y = y / np.abs(y).max(1, keepdims=True)
            mean, std, x = y.mean(0), y.std(0), np.arange(1, y.shape[1] + 1)
            ax.plot(x, mean, color=COLORS[g], label=f"{g} (KL coefficient {best[g]})")
            ax.fill_between(x, mean - std, mean + std, color=COLORS[g], alpha=.15, lw=0)
    for g, style in (("segment", "--"), ("bandit", ":")):
        y = np.stack([m["gold"] for seeds in runs[f"oracle-{g}"].values() for m in seeds]).mean(0)
        axes[0].plot(np.arange(1, len(y) + 1), y, "k" + style, lw=1,
                     label=f"true rewards per {'clause' if g == 'segment' else 'response'}")
    axes[0].set(title="gold reward (mean and deviation over draws and seeds)", xlabel="PPO iteration")
    axes[1].set(title="learned reward, gain as a share of its largest", xlabel="PPO iteration")
    axes[0].legend(fontsize=7)
    fig.tight_layout(), fig.savefig(f"{here}/learning.png", dpi=110)

    fig, ax = plt.subplots(figsize=(5, 3.6))
    for g in METHODS:
        for kl, alpha in zip(GRID, (.33, .67, 1)):
            seeds = [m for s in runs[f"{g}-kl{kl}"].values() for m in s]
            ax.plot(np.mean([m["kl"] for m in seeds], 0), np.mean([m["gold"] for m in seeds], 0), color=COLORS[g],
                    alpha=alpha, label=f"{g}, coefficient {kl}")
    ax.set(title="gold reward against KL", xlabel="KL to the SFT model, nats per response"), ax.legend(fontsize=6)
    fig.tight_layout(), fig.savefig(f"{here}/gold-vs-kl.png", dpi=110)


def truth(out, here):
    """Boundaries and segment rewards against the world's truth on the first draws' held-out pairs."""
    import matplotlib.pyplot as plt
    device, cutoffs = setup(), (.25, .5, .75, 1., 1.5, 2., 2.5, 3., 3.5)
    f1, correlation, scale, fig = [], defaultdict(list), defaultdict(list), plt.figure(figsize=(13, 3.4))
    left, middle, right = fig.subplots(1, 3)
    for d, w in enumerate(sorted(glob.glob(f"{out}/draw[0-9]"))):
        tokenizer, stops = load_tokenizer(f"{w}/sft")
        chats = [(p, c, where) for p, *both, where in load_pairs(f"{w}/pairs_test.jsonl") for c in both]
        rows = encode_chats(tokenizer, stops, chats, 256, 128)
        sft = load_model(f"{w}/sft", LanguageModel, device, torch.float32)
        entropy = map_rows(sft, rows, 16384, device)[2].cpu()                                         # (B, R)
        mask = torch.arange(entropy.shape[1]) < torch.tensor([[len(r)] for _, r in rows])
        gold = torch.full(entropy.shape, torch.nan)                                               # at true clause ends
        for b, (prompt, response, _) in enumerate(chats):
            for value, end in clause_values(prompt[-1]["content"], response):
                gold[b, end] = value
        true, done = ~gold.isnan(), is_finished(rows, stops)
        f1.append([])
        for c in cutoffs:
            ends = segment_ends(entropy, mask, done, c, "segment")
            f1[-1].append(float(2 * (ends & true).sum() / (ends.sum() + true.sum())))
        ends = segment_ends(entropy, mask, done, 1.0, "segment")
        for g in GRANULARITIES:
            rm = load_model(f"{w}/rm-{g}/model", ScalarModel, device, torch.float32)
            values, both = map_rows(rm, rows, 16384, device)[0].cpu(), true & ends                    # (B, R) each
            correlation[g].append(float(torch.corrcoef(torch.stack([values[both], gold[both]]))[0, 1]))
            saved = read_json(f"{w}/rm-{g}/model/reward.json")["statistics"][g]["location"]
            scale[g].append(saved["scale"]["end" if g == "bandit" else "even"])
            if g == "segment" and d == 0:
                fit = Normalizer.from_dict({k: v for k, v in saved.items() if k != "scale"})
                where, z = segment_locations(ends)[ends], values[ends]
                left.scatter(where, z, s=2, alpha=.1, color="tab:gray", lw=0)
                grid = torch.linspace(float(where.min()), 1, 200)
                for k, style in ((0, "-"), (1, "--"), (-1, "--")):
                    left.plot(grid, fit.mean(grid) + k * fit.std(grid), "r" + style, lw=1.2)
                left.set(title="segment rewards by location, fitted mean ± std", xlabel="p = i/n")
                worth = sorted(set(gold[both].tolist()))
                middle.boxplot([values[both][gold[both] == v] for v in worth], positions=worth, showfliers=False)
                middle.set(title="segment rewards by the clause's gold value", xlabel="gold value of the clause")
                middle.set_xticks(range(-5, 3), range(-5, 3))
    right.plot(cutoffs, np.mean(f1, 0), "o-", color="tab:red")
    right.set(title="segment boundaries against true clause ends: F1", xlabel="cutoff (nats)", ylim=(0, 1.02))
    fig.tight_layout(), fig.savefig(f"{here}/truth.png", dpi=110)
    print("\nboundary F1: " + ", ".join(f"{c}: {f:.3f}" for c, f in zip(cutoffs, np.mean(f1, 0))))
    print("\n| reward model | correlation of its scalars at clause ends with the clauses' gold values | S |")
    print("| --- | --- | --- |")
    for g, x in correlation.items():
        print(f"| {g} | {np.mean(x):.2f} ({min(x):.2f} to {max(x):.2f}) | {min(scale[g]):.1f} to {max(scale[g]):.1f} |")


if __name__ == "__main__":
    out, here = sys.argv[1], os.path.dirname(os.path.abspath(__file__))
    runs = load(out)
    GRID = [kl for kl in GRID if all(f"{g}-kl{kl}" in runs for g in METHODS)]
    pictures(runs, tables(runs), here)
    truth(out, here)
