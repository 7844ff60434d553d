"""Tables and pictures of the experiment, from experiments/results.jsonl alone (needs matplotlib).

    python experiments/figures.py                        # prints the tables, draws results.png
    python experiments/figures.py response assets/segments.png      # the README's first picture

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


# --------------------------------------------------------------------------------------------------
# results.jsonl: one line a run
# --------------------------------------------------------------------------------------------------
def read_results(path):
    """The policies, {name: {draw: [line of each seed]}}, and the reward models, {name: [lines]}."""
    policies, reward_models = defaultdict(lambda: defaultdict(list)), defaultdict(list)
    if os.path.exists(path):
        for line in open(path):
            line = json.loads(line)
            if "gold" in line:
                policies[line["name"]][line["draw"]].append(line)
            else:
                reward_models[line["name"]].append(line)
    return policies, reward_models


# --------------------------------------------------------------------------------------------------
# tables
# --------------------------------------------------------------------------------------------------
def first(run):
    return run["gold"][0]


def at_20(run):
    return np.mean(run["gold"][18:21])


def final(run):
    return np.mean(run["gold"][-5:])


def final_kl(run):
    return np.mean(run["kl"][-5:])


def gold_within(run, limit):
    """Best 3-iteration mean of the gold reward while the KL is at most the limit."""
    gold = np.convolve(run["gold"], np.ones(3) / 3, "valid")
    kl = np.convolve(run["kl"], np.ones(3) / 3, "valid")
    return max(gold[kl <= limit], default=np.nan)


def by_draw(draws, measure, *args):
    """{draw: mean over seeds}"""
    return {d: np.mean([measure(run, *args) for run in seeds]) for d, seeds in draws.items()}


def cell(values, form="+.2f"):
    values = list(values)
    if not values:
        return "–"
    text = format(np.mean(values), form)
    return f"{text} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else text


def table(header, rows):
    print("\n| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def best_coefficients(policies):
    """{method: the coefficient of the highest final gold}"""
    best = {}
    for method in METHODS:
        scores = {}
        for kl in COEFFICIENTS:
            scores[kl] = np.mean([*by_draw(policies[f"{method}-kl{kl}"], final).values()] or [-9])
        best[method] = max(scores, key=scores.get)
    return best


def ahead(policies, a, b, when, measure):
    """One line: how far is a ahead of b, draw by draw?"""
    ours, theirs = by_draw(policies[a], measure), by_draw(policies[b], measure)
    gaps = [ours[d] - theirs[d] for d in ours if d in theirs]
    if gaps:
        print(f"- {a} ahead of {b} {when}: {np.mean(gaps):+.2f} ({min(gaps):+.2f} to "
              f"{max(gaps):+.2f} over {len(gaps)} draws)")


def tables(policies, reward_models):
    best = best_coefficients(policies)
    rows = []
    for method in METHODS:
        names = [f"{method}-kl{kl}" for kl in COEFFICIENTS]
        rows.append([method] + [cell(by_draw(policies[n], final).values()) for n in names])
    table(["final gold at KL coefficient", *COEFFICIENTS], rows)

    rows = []
    for method in (*METHODS, "oracle-segment", "oracle-bandit"):
        coefficient = best.get(method, ".03")
        draws = policies[f"{method}-kl{coefficient}"]
        row = [f"{method} ({coefficient})", str(len(draws))]
        row += [cell(by_draw(draws, measure).values()) for measure in (first, at_20, final)]
        row.append(cell(by_draw(draws, final_kl).values(), ".1f"))
        for limit in (3, 4, 6, 8):                       # at whichever coefficient is best there
            reached = [list(by_draw(policies[f"{method}-kl{kl}"], gold_within, limit).values())
                       for kl in COEFFICIENTS]
            reached = [values for values in reached if values]
            row.append(cell(max(reached, key=np.mean, default=[])))
        rows.append(row)
    table(["reward (best KL coefficient)", "draws", "gold, first iteration", "at iteration 20",
           "final", "final KL", "best gold at KL ≤ 3", "≤ 4", "≤ 6", "≤ 8"], rows)
    print()
    for when, measure in (("at iteration 20", at_20), ("at the end", final)):
        ahead(policies, "segment-kl.03", "bandit-kl.03", when, measure)
        ahead(policies, "segment-kl.03", "token-kl.03", when, measure)
        ahead(policies, "oracle-segment-kl.03", "oracle-bandit-kl.03", when, measure)

    rows = []
    for name in sorted(name for name in policies if "-kl" not in name):
        gaps = []                                        # against the run of the same draw and seed
        for draw, seeds in policies[name].items():
            for run in seeds:
                gaps += [final(run) - final(other) for other in policies["segment-kl.03"][draw]
                         if other["seed"] == run["seed"]]
        kl = cell(by_draw(policies[name], final_kl).values(), ".1f")
        rows.append([name, str(len(policies[name])), cell(gaps), kl])
    table(["change (to segment-kl.03)", "draws", "final gold, difference", "final KL"], rows)

    rows = []
    for name, lines in sorted(reward_models.items()):
        used = [run["scale"] for seeds in policies[f"{name[3:]}-kl.03"].values() for run in seeds]
        rows.append([name, str(len(lines)), cell([line["accuracy"] for line in lines], ".2f"),
                     cell([line["correlation"] for line in lines]), cell(used, ".1f")])
    table(["reward model", "draws", "held-out accuracy", "correlation with clause values", "S"], rows)
    lines = reward_models["rm-segment"]
    if lines:
        f1 = {cutoff: np.mean([line["f1"][cutoff] for line in lines]) for cutoff in lines[0]["f1"]}
        print("\nboundary F1 by cutoff: " + ", ".join(f"{c}: {f:.3f}" for c, f in f1.items()))
    return best


# --------------------------------------------------------------------------------------------------
# pictures
# --------------------------------------------------------------------------------------------------
def curves(policies, name, key):
    """(iterations,) mean and deviation over draws and seeds"""
    runs = np.array([run[key] for seeds in policies[name].values() for run in seeds])
    return runs.mean(0), runs.std(0)


def picture(policies, reward_models, best):
    """results.png: gold against iterations, gold against KL, learned against true clause rewards."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4))
    for name in [name for name in policies if "-kl" in name and policies[name]]:
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
    boxes = []
    for line in reward_models["rm-segment"][:1]:
        for value, (low, q1, median, q3, high) in line["by_value"].items():
            boxes.append({"whislo": low, "q1": q1, "med": median, "q3": q3, "whishi": high,
                          "label": value})
    right.bxp(boxes, showfliers=False)
    right.set(title="learned reward of a clause (5, 25, 50, 75, 95 %)", xlabel="its gold value")
    figure.tight_layout()
    figure.savefig(f"{HERE}/results.png", dpi=110)


# --------------------------------------------------------------------------------------------------
# a response, its segments coloured by their learned rewards
# --------------------------------------------------------------------------------------------------
def response(args):
    import torch
    from segment import (LanguageModel, encode_chats, is_finished, load_model, load_pairs,
                         load_tokenizer, map_rows, response_mask, segment_ends, segment_texts, setup,
                         trained_how)
    from train_rm import ScalarModel
    device = setup()
    tokenizer, stops = load_tokenizer(args.model)
    prompt, chosen, _, where = load_pairs(args.data, args.row)[-1]
    rows = encode_chats(tokenizer, stops, [(prompt, [chosen], where)], 2048, 1024)
    granularity, cutoff = trained_how(args.reward_model, "segment", args.cutoff)
    sft = load_model(args.model, LanguageModel, device, torch.float32)
    _, entropy = map_rows(sft, rows, 16384, device)                                      # (1, R)
    model = load_model(args.reward_model, ScalarModel, device, torch.float32)
    scalars = map_rows(model, rows, 16384, device)                                       # (1, R)
    mask, finished = response_mask(rows, device), is_finished(rows, stops).to(device)
    ends = segment_ends(entropy, mask, finished, cutoff, granularity)[0].tolist()
    tokens = segment_texts(tokenizer, rows[0][1], np.ones(len(ends)))                    # R texts
    content = range(len(ends) - int(finished))
    paint(args.picture, prompt[-1]["content"], [tokens[r] for r in content], ends,
          entropy[0].tolist(), scalars[0].tolist(), cutoff)


def paint(path, prompt, tokens, ends, entropy, scalars, cutoff):
    """Running text on coloured boxes, and under each token a bar: the entropy after it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch
    width, margin, line_height, ink, grey = 800, 20, 48, "#1f2328", "#6e7781"        # pixels
    figure = plt.figure(figsize=(8, 1), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    renderer = figure.canvas.get_renderer()
    largest = max(abs(scalars[r]) for r in range(len(tokens)) if ends[r])

    def write(x, y, text, size=11.0, color=ink, weight="normal"):
        """Write text and return where it ends."""
        axes.text(x, y, text, size=size, color=color, weight=weight, va="baseline", zorder=3)
        font = matplotlib.font_manager.FontProperties(size=size, weight=weight)
        return x + renderer.get_text_width_height_descent(text, font, False)[0]

    def box(left, right, y, color):
        axes.add_patch(FancyBboxPatch((left - 3, y - 17), right - left + 6, 24, lw=0, color=color,
                                      boxstyle="round,pad=0,rounding_size=5", zorder=1))

    y = 34
    x = write(margin, y, "user  ", color=grey, weight="bold")
    write(x, y, prompt)
    x, y, r = margin, y + 44, 0
    while r < len(tokens):                               # a segment at a time
        last = ends.index(True, r)
        score = scalars[last]
        color = plt.get_cmap("RdYlGn")(0.5 + 0.42 * score / largest, alpha=0.55)
        start, words = x, [*tokens[r:last + 1], f" {score:+.1f}"]
        for k, word in enumerate(words):
            is_score = k == len(words) - 1
            style = {"size": 9.0, "weight": "bold"} if is_score else {}
            end = write(x, y, word if x > start else word.lstrip(), **style)
            if end > width - margin:                     # it does not fit: once more, below
                axes.texts[-1].remove()
                if x > start:
                    box(start, x, y, color)
                start, x, y = margin, margin, y + line_height
                end = write(x, y, word.lstrip(), **style)
            if not is_score:
                height = 16 * min(1.0, entropy[r + k] / max(entropy[:len(tokens)]))
                axes.add_patch(plt.Rectangle((end - 3, y + 26 - height), 3, height, color=ink))
            x = end
        box(start, x, y, color)
        x, r = x + 12, last + 1
    y += 58
    write(margin, y, f"boxes: segments and their learned rewards      bars: the SFT model's entropy "
          f"after each token; a segment ends above {cutoff:g} nat", size=8.5, color=grey)
    height = y + 18
    figure.set_size_inches(8, height / 100)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    figure.savefig(path, dpi=200)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=f"{HERE}/results.jsonl")
    commands = parser.add_subparsers(dest="command")
    one = commands.add_parser("response", help="draw one response")
    one.add_argument("picture")
    one.add_argument("--model", default=f"{ROOT}/data/reviews/sft")
    one.add_argument("--reward_model", default=f"{ROOT}/out/rm/model")
    one.add_argument("--cutoff", type=float, default=1.0, help="if the reward model does not say")
    one.add_argument("--data", default=f"{ROOT}/data/reviews/pairs_test.jsonl")
    one.add_argument("--row", type=int, default=4, help="the chosen response of this row")
    args = parser.parse_args()
    if args.command == "response":
        return response(args)
    policies, reward_models = read_results(args.results)
    picture(policies, reward_models, tables(policies, reward_models))


if __name__ == "__main__":
    main()
