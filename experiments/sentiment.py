"""A real language model in a world whose truth is known, sentence by sentence.

    pip install vaderSentiment                           # the truth; only this experiment needs it
    torchrun --nproc_per_node=2 experiments/sentiment.py --model MODEL     # sentiment.sh calls this

A chat model answers everyday requests ("Write three sentences about the bus driver.") in 48 tokens.
What an answer is worth is the mean sentiment of its sentences: VADER's compound score, -1 to 1, of
a lexicon with rules for negation and emphasis. Two answers to a request make a pair, labelled by
Bradley-Terry. Writes into OUT
    pairs.jsonl          two of the model's answers at temperature 1; held-out pairs last
    prompts.jsonl        for PPO
    prompts_test.jsonl   requests about other subjects: nothing is trained on these
    answers.json         the model's own answers to them, as evaluate.py reads them
    world.json           settings and measurements; written last: where it is, the rest is complete
Held-out pairs and test prompts are about a fifth of the subjects, which nothing else speaks of.

Few answers end within 48 tokens, so two things need care.
- The unfinished last sentence counts as a sentence: it was read, and its tokens need a reason.
- As text, an answer that was cut looks finished: the chat template ends it. So all prompts have one
  length P, and --max_tokens P + 48 cuts what was sampled again where sampling had cut it. Answers
  whose text gives other tokens than those sampled are drawn again.
In bf16 another number of ranks rounds otherwise, so it samples other answers.
"""
import argparse
import functools
import itertools
import json
import math
import os
import random
import re
import sys
import time
import zlib
from bisect import bisect_left
from collections import Counter
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
import torch.distributed as dist

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from segment import (LanguageModel, answer_text, cut_rows, encode_chats,  # noqa: E402
                     encode_prompts, fail, load_model, load_tokenizer, map_rows, messages_of,
                     rank, say, set_precision, setup)
from train_rm import write_json  # noqa: E402
from train_ppo import plain_copy, sample  # noqa: E402

ANSWER_TOKENS = 48
SEGMENT_TOKENS = 8                                       # what the cutoff aims at
LABEL_BETA = 8.0         # P(a is chosen) = sigmoid(beta * (gold of a - gold of b)), as in reviews/

# Two words a subject and six beside it: with most tokenizers most prompts have the same length
TEMPLATES = (
    "Write three sentences about the {}.", "Tell me something about the {}.",
    "Describe the {} in three sentences.", "Say three things about the {}.",
    "Write three lines about the {}.", "Tell a story about the {}.", "Write a review of the {}.",
    "What is the {} really like?", "What happened to the {} today?", "How do you like the {}?")
SUBJECTS = """
    bus driver, new neighbour, school play, old bridge, city library, train station, corner shop,
    night shift, morning run, rainy day, summer holiday, birthday party, family dinner, swim coach,
    football match, swimming pool, public park, vegetable garden, kitchen table, washing machine,
    coffee shop, hotel room, train ride, village doctor, old farmer, piano teacher, math exam,
    job interview, first date, long walk, camping trip, flat tire, lost dog, stray cat, pet rabbit,
    used car, mobile phone, television show, radio station, movie theater, art museum, market day,
    street market, chicken soup, birthday cake, winter coat, waiting room, power cut, snow storm,
    mountain path, city bus, soccer coach, garden fence, front door, bus stop, night train, new job,
    office party, team meeting, phone call, wedding cake, empty house, broken window, paper map,
    blue bicycle, wooden chair, spring morning, local band, school bus, fishing boat, old clock,
    tax letter, computer game, dinner table, dance class, post office, traffic light, apple tree,
    cooking class, road trip, small village, warm bath, guest room, town hall, language course,
    history book, garden party, hair cut, big storm, quiet street""".replace("\n", " ").split(",")


# -- the truth: what each sentence, and a whole response, is worth ---------------------------------
@functools.cache
def lexicon():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    return SentimentIntensityAnalyzer()


def judge_sentences(response):
    """[(compound, end)], a pair for each sentence of a response; it is over at character `end`.
    A sentence ends behind . ! or ? (and quotes) where a space or nothing follows, and at the end of
    a line. What holds no letter, a list's "1." say, belongs to the next sentence.

    >>> judge_sentences('1. I love it! It costs 3.50 and is "awful." The rest')
    [(0.6696, 13), (-0.4588, 43), (0.0, 52)]
    """
    judged = []
    start = 0
    for match in re.finditer(r"[.!?]+[\"'”’)\]*]*(?=\s|$)|\S(?=\s*\n|\s*$)", response):
        sentence = response[start:match.end()]
        if re.search(r"[^\W\d_]", sentence):
            compound = lexicon().polarity_scores(sentence)["compound"]
            judged.append((compound, match.end()))
            start = match.end()
    return judged


def gold_reward(prompt, response, finished=True):
    """The true reward: the mean compound of the response's sentences, -1 to 1; 0 without any. An
    end in time is worth nothing by itself: few answers have one."""
    judged = judge_sentences(response)
    return fmean(compound for compound, _ in judged) if judged else 0.0


def segment_values(prompt, segments):
    """The oracle for PPO (`--reward_model experiments/sentiment.py:segment_values`): each segment
    gets the compounds of the sentences that end in it, over the number of the response's sentences.
    So one without an end is worth 0, and, as in the embedded world, the sum over the segments is
    what is judged, here the gold reward itself. segments: texts that join to the response.

    >>> values = segment_values("", ["I love", " it! Bad", " idea. It", " is"])
    >>> [round(value, 2) for value in values]
    [0.0, 0.22, -0.18, 0.0]
    """
    judged = judge_sentences("".join(segments))
    ends = list(itertools.accumulate(map(len, segments)))
    values = [0.0] * len(segments)
    for compound, end in judged:
        values[bisect_left(ends, end)] += compound / len(judged)
    return values


# -- the world: prompts -> answers -> labels -> files ----------------------------------------------
def all_prompts(tokenizer):
    """Prompts to train on, prompts to test on, and their length in tokens: the commonest one."""
    prompts = []                                         # (prompt, is it a test prompt?)
    for subject in map(str.strip, SUBJECTS):
        # a hash decides: no seed brings a subject to the other side
        is_test = zlib.crc32(subject.encode()) % 5 == 0
        prompts += [(template.format(subject), is_test) for template in TEMPLATES]
    messages = [messages_of(prompt, "user") for prompt, _ in prompts]
    lengths = [len(ids) for ids in encode_prompts(tokenizer, messages, 1000, "prompts")]
    P = Counter(lengths).most_common(1)[0][0]
    train, test = [], []
    for (prompt, is_test), length in zip(prompts, lengths):
        if length == P and is_test:
            test.append(prompt)
        elif length == P:
            train.append(prompt)
    return train, test, P


def sample_answers(model, tokenizer, stops, batch_size, prompts, seeds):
    """[(text, finished, faithful)], an answer to each prompt; faithful: its text gives the very
    tokens that were sampled. All ranks share in it."""
    messages = [messages_of(prompt, "user") for prompt in prompts]
    encoded = encode_prompts(tokenizer, messages, 1000, "prompts")
    tokens, _, lengths = sample(model, tokenizer, encoded, stops, ANSWER_TOKENS, seeds, batch_size)
    answers = []
    for row, length in zip(tokens, lengths):
        text = answer_text(tokenizer, stops, row[:length])
        ids = row[:length].tolist()
        finished = ids[-1] in stops
        content = ids[:-1] if finished else ids
        again = tokenizer(text, add_special_tokens=False)["input_ids"]
        answers.append((text, finished, again == content))
    return answers


def label_pair(rng, prompt, responses):
    """A row of pairs.jsonl. The better response has the better chances, no more."""
    golds = [gold_reward(prompt, response) for response in responses]
    first_wins = 1 / (1 + math.exp(LABEL_BETA * (golds[1] - golds[0])))
    chosen = 0 if rng.random() < first_wins else 1
    return {"prompt": prompt, "chosen": responses[chosen], "rejected": responses[1 - chosen],
            "chosen_gold": golds[chosen], "rejected_gold": golds[1 - chosen]}


def sample_pairs(rng, answer, prompts, n, *seed):
    """n rows of pairs.jsonl, each about one of these prompts. answer: of (prompts, seeds)"""
    rows = []
    sampled = 0
    while len(rows) < n:
        asked = rng.choices(prompts, k=n - len(rows))
        seeds = [(*seed, sampled + i) for i in range(2 * len(asked))]
        sampled += len(seeds)
        answers = answer(asked + asked, seeds)
        for prompt, first, second in zip(asked, answers, answers[len(asked):]):
            texts = [first[0], second[0]]
            faithful = first[2] and second[2]
            if faithful and texts[0] != texts[1] and texts[0].strip() and texts[1].strip():
                rows.append(label_pair(rng, prompt, texts))
        say(f"{len(rows)} of {n} pairs from {sampled} answers")
        if not rows:
            fail("no answer's text gives the tokens that were sampled: take another model")
    return rows


def choose_cutoff(entropy, rows, tokenizer, stops):
    """The cutoff, in steps of a quarter, that gives segments of about SEGMENT_TOKENS; their length.
    entropy: (B, R), of the rows"""
    tokens = cut_rows(rows, entropy, tokenizer, stops, 0.0, "token").sum()
    lengths = {}
    for cutoff in np.arange(0.25, 10.25, 0.25).tolist():
        segments = cut_rows(rows, entropy, tokenizer, stops, cutoff, "segment").sum()
        lengths[cutoff] = (tokens / segments).item()
    return min(lengths.items(), key=lambda item: abs(item[1] - SEGMENT_TOKENS))


def main(args):
    began = time.time()
    world = vars(args).copy()
    out = Path(world.pop("out"))
    if (out / "world.json").exists():
        return say(f"{out} holds a world already")
    device = setup()
    dtype = set_precision(args.dtype, device)
    tokenizer, stops = load_tokenizer(args.model)
    train, test, P = all_prompts(tokenizer)
    sft = load_model(args.model, LanguageModel, device, dtype)
    model = plain_copy(sft, dtype, device)
    rng = random.Random(args.seed)
    rng.shuffle(train)
    rng.shuffle(test)

    # training pairs are drawn last: their number changes nothing else
    answer = functools.partial(sample_answers, model, tokenizer, stops, args.batch_size)
    test_prompts = test[:args.prompts_test]
    answers = answer(test_prompts, [(args.seed, 0, b) for b in range(len(test_prompts))])
    held_out = sample_pairs(rng, answer, test, args.held_out, args.seed, 1)
    pairs = sample_pairs(rng, answer, train, args.pairs, args.seed, 2) + held_out
    chats = [(messages_of(row["prompt"], "user"), [row["chosen"], row["rejected"]], "a pair")
             for row in held_out]
    rows = encode_chats(tokenizer, stops, chats, P + ANSWER_TOKENS, P)
    _, entropy = map_rows(sft, rows, 8, device)                                          # (2n, R)
    cutoff, segment_tokens = choose_cutoff(entropy, rows, tokenizer, stops)

    golds = [row[f"{side}_gold"] for row in pairs for side in ("chosen", "rejected")]
    differ = [row for row in pairs if row["chosen_gold"] != row["rejected_gold"]]
    world |= {
        "prompt_tokens": P, "answer_tokens": ANSWER_TOKENS, "prompts": len(train),
        "gold": fmean(golds), "gold_deviation": pstdev(golds),
        "finished": fmean(bool(r[-1] in stops) for _, r in rows),
        "label_agreement": fmean(row["chosen_gold"] > row["rejected_gold"] for row in differ),
        "cutoff": cutoff, "tokens_per_segment": segment_tokens,
        "seconds": round(time.time() - began)}
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        files = {"pairs": pairs, "prompts": [{"prompt": prompt} for prompt in train],
                 "prompts_test": [{"prompt": prompt} for prompt in test_prompts]}
        for name, lines in files.items():
            Path(out, f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    write_json(out / "answers.json", [
        {"instruction": prompt, "output": text, "generator": "sft", "finished": finished}
        for prompt, (text, finished, _) in zip(test_prompts, answers)])
    write_json(out / "world.json", world)
    say(json.dumps(world, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="auto")
    defaults = {"out": "out/sentiment", "seed": 0, "pairs": 1400, "held_out": 400,
                "prompts_test": 100, "batch_size": 32}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default,
                            help=f"default {default}")
    main(parser.parse_args())
