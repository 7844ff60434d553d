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
            gap = difference(of(f"{ahead}-kl.03", *where), of(f"{behind}-kl.03", *where))
            row.append(cell(gap))
        rows.append(row)
    table(["gold, difference (KL coefficient .03)", "at iteration 20", "final"], rows)

    for draw, seeds in policies["segment-kl.03"].items():            # ablations have one seed, 0
        policies["plain"][draw] = [run for run in seeds if run["seed"] == 0]
    plain = by_draw(policies.pop("plain", {}), mean_of, *FINAL)
    rows = []
    for name in sorted(policies):
        if "-kl" not in name:
            gap = difference(of(name, *FINAL), plain)
            rows.append([name, str(len(gap)), cell(gap), cell(of(name, *FINAL_KL), ".1f")])
    table(["change (to segment-kl.03)", "draws", "final gold, difference", "final KL"], rows)

    rows = []
    for name, lines in sorted(reward_models.items()):
        row = [name, str(len(lines))]
        for key in ("accuracy", "correlation"):
            row.append(cell({line["draw"]: line[key] for line in lines}, ".2f"))
        used = policies[name.replace("rm-", "") + "-kl.03"]
        rows.append(row + [cell(by_draw(used, lambda run: run["scale"]), ".1f")])
    table(["reward model", "draws", "held-out accuracy", "correlation with clause values", "S"],
          rows)
    lines, rows = reward_models["rm-segment"], []
    for cutoff in lines[0]["f1"] if lines else ():
        rows.append([cutoff, cell({line["draw"]: line["f1"][cutoff] for line in lines}, ".3f")])
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


# --------------------------------------------------------------------------------------------------
# a response, its segments coloured by their learned rewards
# --------------------------------------------------------------------------------------------------
def response(args):
    import torch
    from segment import (LanguageModel, encode_chats, is_finished, load_model, load_pairs,
                         load_tokenizer, map_rows, response_mask, segment_ends, segment_texts,
                         setup, trained_how)
    from train_rm import ScalarModel
    device = setup()
    tokenizer, stops = load_tokenizer(args.model)
    prompt, chosen, _, where = load_pairs(args.data, args.row)[-1]
    rows = encode_chats(tokenizer, stops, [(prompt, [chosen], where)], 2048, 1024)
    granularity, cutoff = trained_how(args.reward_model, None, None)
    sft = load_model(args.model, LanguageModel, device, torch.float32)
    _, entropy = map_rows(sft, rows, 16384, device)                                      # (1, R)
    model = load_model(args.reward_model, ScalarModel, device, torch.float32)
    scalars = map_rows(model, rows, 16384, device)                                       # (1, R)
    mask, finished = response_mask(rows, device), is_finished(rows, stops).to(device)
    ends = segment_ends(entropy, mask, finished, cutoff, granularity)[0].tolist()
    tokens = segment_texts(tokenizer, rows[0][1], np.ones(len(ends)))                    # R texts
    n_content = len(ends) - int(finished)
    paint(args.picture, prompt[-1]["content"], tokens[:n_content], ends,
          entropy[0, :n_content].tolist(), scalars[0].tolist(), cutoff)


def paint(path, prompt, tokens, ends, entropy, scalars, cutoff):
    """Running text on coloured boxes, and under each token a bar: the entropy after it."""
    import matplotlib.pyplot as plt
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import FancyBboxPatch
    left, right, line_height, ink, grey = 20, 784, 50, "#1f2328", "#6e7781"          # pixels
    figure = plt.figure(figsize=(8, 1), dpi=200)         # two of its dots make one pixel
    axes = figure.add_axes((0, 0, 1, 1))
    largest, tallest = max(map(abs, scalars)), max(entropy)

    def write(x, y, text, size=10.4, color=ink, weight="normal"):
        """Write text; where does it end? (y below the picture: only measure.)"""
        axes.text(x, y, text, size=size, color=color, weight=weight, va="baseline", clip_on=True)
        font, renderer = FontProperties(size=size, weight=weight), figure.canvas.get_renderer()
        return x + renderer.get_text_width_height_descent(text, font, False)[0] / 2

    def box(start, end, y, color):
        axes.add_patch(FancyBboxPatch((start - 4, y - 17), end - start + 8, 24, lw=0, color=color,
                                      boxstyle="round,pad=0,rounding_size=5"))

    box(left, write(left, 32, prompt), 32, "#e8ebef")
    x, y, r = left, 80, 0
    while r < len(tokens):                               # a segment at a time
        last = ends.index(True, r)
        color = plt.get_cmap("RdYlGn")(0.5 + 0.42 * scalars[last] / largest, alpha=0.55)
        note = f" {scalars[last]:+.1f}".replace("-", "\u2212")
        text = "".join(tokens[r:last + 1]).strip() + note
        if x > left and write(x, -99, text) > right:
            x, y = left, y + line_height
        start = x
        for token in tokens[r:last + 1]:
            if x == start:
                token = token.lstrip()
            if write(x, -99, token) > right:             # a segment longer than a line
                box(start, x, y, color)
                start, x, y = left, left, y + line_height
                token = token.lstrip()
            x = write(x, y, token)
            bar = 17 * entropy[r] / tallest
            axes.add_patch(plt.Rectangle((x - 3, y + 26.6 - bar), 4, bar, color="#57606a", lw=0))
            r += 1
        axes.plot([start, x], [y + 27, y + 27], color="#d0d7de", lw=0.8)
        x = write(x, y, note, size=9.0, weight="bold")
        box(start, x, y, color)
        x += 14
    y += 60
    write(left, y, "box: a segment and its learned reward      bar: the SFT model's entropy after "
          f"a token; above {cutoff:g} nat the segment ends", 8.5, grey)
    figure.set_size_inches(8, (y + 16) / 100)
    axes.set(xlim=(0, 800), ylim=(y + 16, 0))
    axes.axis("off")
    figure.savefig(path)


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
        return response(args)
    policies, reward_models = read_results(args.results)
    if not policies:
        sys.exit(f"{args.results}: no results yet; run experiments/run.sh")
    folder = os.path.dirname(os.path.abspath(args.results))
    best = tables(policies, reward_models)
    picture(f"{folder}/learning.png", policies, reward_models, best)


if __name__ == "__main__":
    main()
