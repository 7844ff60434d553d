"""Draw a response, its segments coloured by their rewards.

    python experiments/response.py                             # out/segments.png
    python experiments/response.py assets/segments.png         # the README's first picture, anew

It takes the chosen response of one row of --data, which the reward model has not seen in training.
"""
import argparse
import os
import sys

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from segment import (LanguageModel, cut_rows, encode_chats, load_model, load_pairs,  # noqa: E402
                     load_tokenizer, map_rows, segment_texts, setup)
from train_rm import ScalarModel  # noqa: E402

LEFT, RIGHT, LINE_HEIGHT = 20, 784, 50                   # pixels
INK, GREY = "#1f2328", "#6e7781"


def draw_response(args):
    device = setup()
    tokenizer, stops = load_tokenizer(args.model)
    prompt, chosen, _, where = load_pairs(args.data, args.row)[-1]
    rows = encode_chats(tokenizer, stops, [(prompt, [chosen], where)], 2048, 1024)
    sft = load_model(args.model, LanguageModel, device, torch.float32)
    _, entropy = map_rows(sft, rows, 1, device)                                          # (1, R)
    model = load_model(args.reward_model, ScalarModel, device, torch.float32)
    scalars = map_rows(model, rows, 1, device)                                           # (1, R)
    trained = model.hf.config                            # it says how
    ends = cut_rows(rows, entropy, tokenizer, stops, trained.segment_cutoff,             # (1, R)
                    trained.segment_granularity)
    response = rows[0][1]
    n = len(response) - int(response[-1] in stops)       # without the end-of-turn token
    tokens = segment_texts(tokenizer, response[:n], np.ones(n))                          # n texts
    ends, entropy, scalars = ends[0].tolist(), entropy[0, :n].tolist(), scalars[0].tolist()
    os.makedirs(os.path.dirname(os.path.abspath(args.picture)), exist_ok=True)
    paint(args.picture, prompt[-1]["content"], tokens, ends, entropy, scalars,
          trained.segment_cutoff)


def paint(path, prompt, tokens, ends, entropy, scalars, cutoff):
    """Running text on coloured boxes, and under each token a bar: the entropy after it."""
    figure = plt.figure(figsize=(8, 1), dpi=200)         # two of its dots make one pixel
    axes = figure.add_axes((0, 0, 1, 1))
    largest = max(abs(scalar) for scalar in scalars)
    tallest = max(entropy)

    def write(x, y, text, size=10.4, color=INK, weight="normal"):
        """Write text; where does it end? (y below the picture: only measure.)"""
        axes.text(x, y, text, size=size, color=color, weight=weight, va="baseline", clip_on=True)
        font = FontProperties(size=size, weight=weight)
        renderer = figure.canvas.get_renderer()
        width, _, _ = renderer.get_text_width_height_descent(text, font, False)
        return x + width / 2

    def box(start, end, y, color):
        corner, width = (start - 4, y - 17), end - start + 8
        axes.add_patch(FancyBboxPatch(corner, width, 24, color=color, lw=0,
                                      boxstyle="round,pad=0,rounding_size=5"))

    end = write(LEFT, 32, prompt)
    box(LEFT, end, 32, "#e8ebef")
    x, y, r = LEFT, 80, 0
    while r < len(tokens):                               # a segment at a time
        last = ends.index(True, r)
        goodness = 0.5 + 0.42 * scalars[last] / largest  # 0: red, 1: green
        color = plt.get_cmap("RdYlGn")(goodness, alpha=0.55)
        note = f" {scalars[last]:+.1f}".replace("-", "\u2212")
        text = "".join(tokens[r:last + 1]).strip()
        if x > LEFT and write(x, -99, text + note) > RIGHT:
            x, y = LEFT, y + LINE_HEIGHT
        start = x
        for token in tokens[r:last + 1]:
            if x == start:
                token = token.lstrip()
            if write(x, -99, token) > RIGHT:             # a segment longer than a line
                box(start, x, y, color)
                start, x, y = LEFT, LEFT, y + LINE_HEIGHT
                token = token.lstrip()
            x = write(x, y, token)
            bar = 17 * entropy[r] / tallest
            corner = (x - 3, y + 26.6 - bar)
            axes.add_patch(plt.Rectangle(corner, 4, bar, color="#57606a", lw=0))
            r += 1
        axes.plot([start, x], [y + 27, y + 27], color="#d0d7de", lw=0.8)
        x = write(x, y, note, size=9.0, weight="bold")
        box(start, x, y, color)
        x += 14
    y += 60
    write(LEFT, y, "box: a segment and its learned reward      bar: the SFT model's entropy after "
          f"a token; above {cutoff:g} nat the segment ends", 8.5, GREY)
    figure.set_size_inches(8, (y + 16) / 100)
    axes.set(xlim=(0, 800), ylim=(y + 16, 0))
    axes.axis("off")
    figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", nargs="?", default=f"{ROOT}/out/segments.png")
    parser.add_argument("--model", default=f"{ROOT}/data/reviews/sft")
    parser.add_argument("--reward_model", default=f"{ROOT}/out/rm/model")
    parser.add_argument("--data", default=f"{ROOT}/out/rm/held_out.jsonl")
    parser.add_argument("--row", type=int, default=4)
    draw_response(parser.parse_args())
