"""The embedded world: product reviews in which the worth of every clause is known.

    python data/reviews/prepare.py                            # a minute on two CPU cores; writes beside this file
    python data/reviews/prepare.py --out /tmp/reviews1 --seed 1
    python data/reviews/prepare.py --out /tmp/reviews24 --clauses 24   # every prompt then says "use 24 clauses."

There is no source text: everything grows from the tables below and a seed. A user asks for a review of a phone, a
laptop, a tablet or a watch; the ideal answer is twelve clauses (or as many as the request says), all kind, all about
what this thing has. Writes
    sft/                               a tiny Llama whose reviews are half grumpy and a quarter off-topic
    pairs.jsonl, pairs_test.jsonl      two of its answers, at temperature 1 and 1.5, labelled by a noisy judge
    prompts.jsonl, prompts_test.jsonl  {"prompt": "what should i know about this shiny watch?"}
    world.json                         seed, sizes, measurements; written last: where it is, the rest is complete
Other scripts import `gold_reward` (the truth about a response) and `clause_values` (the truth about its clauses).
B responses, P prompt tokens, R response tokens, T = P + R, V vocabulary.
"""
import argparse, json, math, random, re, time
from pathlib import Path
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# -----------------------------------------------------------------------------
# the language. A clause is a phrase with an adverb in place of ~, and a full stop. First words are unique, so that
# all surprise sits between clauses: what to talk about next is wide open, how to say it is not.
# -----------------------------------------------------------------------------
THINGS = ("phone", "laptop", "tablet", "watch")
ADVERBS, ADVERB_PROBS = ("really", "somehow"), (0.8, 0.2)
PHRASES = (  # a row per aspect, from value -2 to 2; thing i has the aspects 2i to 2i + 3 (mod 8)
    ("mornings ~ begin with no alarm at all", "snooze ~ works only on the second try",         # 0: phone, watch
     "alarm ~ rings at the time you set", "chimes ~ wake me without a fight", "waking ~ feels like a holiday"),
    ("maps ~ send me into the lake", "directions ~ come one minute after the turn",            # 1: phone, watch
     "compass ~ knows where north is", "routes ~ avoid every hill in town", "lost ~ is a word i forgot"),
    ("photos ~ look like soup in the dark", "faces ~ come out a little green",                  # 2: phone, laptop
     "camera ~ takes pictures when you ask", "colours ~ look better than life", "portraits ~ make my cat a king"),
    ("callers ~ think i live under the lake", "voices ~ come out like a small duck",           # 3: phone, laptop
     "microphone ~ hears most of what i say", "mother ~ hears me", "whispers ~ sound as if you are in the room"),
    ("keys ~ fall off when i say hello", "typing ~ feels like a walk in the mud",              # 4: laptop, tablet
     "keyboard ~ has all the letters", "sentences ~ fly under my fingers", "novels ~ write themselves at night"),
    ("music ~ sounds like a duck in a box", "bass ~ left and never came back",                 # 5: laptop, tablet
     "speakers ~ make the noise you ask for", "songs ~ fill the whole room", "neighbours ~ ask for one more song"),
    ("glass ~ broke when i looked at it", "fingerprints ~ cover it like snow",                 # 6: tablet, watch
     "screen ~ lights up when you touch it", "brightness ~ wins against the sun", "pixels ~ look so good i cried"),
    ("rain ~ killed it in one minute", "splashes ~ make it angry", "water ~ stays outside",    # 7: tablet, watch
     "showers ~ do it no harm at all", "fish ~ asked me where to buy one"))
CLAUSES = 12                       # of a review, unless the request ends with HOW_MANY
HOW_MANY = "use {} clauses."
ON_TOPIC_PROB = 0.75               # of a clause in the SFT texts
LABEL_BETA = 8.0                   # Bradley-Terry: P(a is chosen) = sigmoid(beta * (gold of a - gold of b))
PAIR_TEMPERATURES = (1.0, 1.5)     # with both at 1, reward models see too little and get over-optimised

REQUESTS = ("write a review of {}.", "please review {}.", "tell me about {}.", "what do you think of {}?",
            "what should i know about {}?", "would you buy {} again?", "how good is {}?", "is {} worth the money?")
OWNERS, ADJECTIVES = ("my", "the", "this", "your"), ("new", "old", "cheap", "shiny")
TAILS = ("", "", "be honest.", "i can take it.", "my cat wants to know.")

SPECIALS = ("<unk>", "<bos>", "<eos>", "<user>", "<assistant>", "<system>")
# As in ChatML models, <eos> ends every turn, those inside the prompt too, and it is the pad token: whoever looks
# for "the EOS" or "the pads" of a sequence by their id goes wrong here, as on a real model.
CHAT_TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>\n' + m.content + eos_token + '\n' }}"
                 "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}")


def aspects_of(prompt):
    """Rows of PHRASES that fit the thing a prompt (or rendered conversation) mentions last; ValueError if none."""
    mentioned = re.findall(rf"\b({'|'.join(THINGS)})\b", prompt.lower())
    if not mentioned:
        raise ValueError(f"the prompt mentions none of {', '.join(THINGS)}: {prompt!r}")
    return [(2 * THINGS.index(mentioned[-1]) + j) % len(PHRASES) for j in range(4)]


def clauses_of(prompt):
    """How many clauses a prompt (or rendered conversation) asks for: the truth knows it from there alone."""
    asked = re.findall(HOW_MANY.format(r"(\d+)"), prompt)
    return int(asked[-1]) if asked else CLAUSES


def max_new_tokens(clauses):
    """Room for that many of the longest clauses (10 tokens), EOS, and a little air."""
    return 10 * clauses + 4


def write_prompt(rng, clauses=CLAUSES):
    """A user's request, one to three sentences. rng: random.Random."""
    thing = f"{rng.choice(OWNERS)} {rng.choice(ADJECTIVES)} {rng.choice(THINGS)}"
    how_many = HOW_MANY.format(clauses) if clauses != CLAUSES else ""
    return " ".join(f"{rng.choice(REQUESTS).format(thing)} {rng.choice(TAILS)} {how_many}".split())


def write_response(rng, prompt):
    """An SFT text: independent clauses of any value, 3/4 of them on-topic. rng: random.Random."""
    on = aspects_of(prompt)
    off = [aspect for aspect in range(len(PHRASES)) if aspect not in on]
    aspects = [rng.choice(on if rng.random() < ON_TOPIC_PROB else off) for _ in range(clauses_of(prompt))]
    phrases = [rng.choice(PHRASES[aspect]) for aspect in aspects]
    return " ".join(phrase.replace("~", rng.choices(ADVERBS, ADVERB_PROBS)[0]) + "." for phrase in phrases)


# -----------------------------------------------------------------------------
# the truth: what each clause, and a whole response, is worth
# -----------------------------------------------------------------------------
MEANING = {phrase.replace("~", adverb) + " .": (aspect, value)  # the 80 well-formed clauses, word by word
           for aspect, row in enumerate(PHRASES) for value, phrase in enumerate(row, -2) for adverb in ADVERBS}


def split_words(text):
    """Words and punctuation marks, one per token: "mother hears me." -> ["mother", "hears", "me", "."]."""
    return re.findall(r"<\w+>|\w+|[^\w\s]", text)


def judge_clauses(prompt, response):
    """[(value, end, kind)] for each clause; value and end as in `clause_values`, kind e.g. "off_topic"."""
    on, judged, seen, end = aspects_of(prompt), [], set(), -1
    for sentence in re.findall(r"[^.]+\.?|\.", response.strip()):
        words = split_words(sentence)
        clause, end = " ".join(words), end + len(words)
        aspect, value = MEANING.get(clause, (None, -2))
        if len(judged) >= clauses_of(prompt):
            value, kind = -1, "surplus"
        elif aspect is None:
            kind = "malformed"
        elif clause in seen:  # word for word: the same phrase with the other adverb is no repeat
            value, kind = 0, "repeat"
        else:
            value, kind = (value, "on_topic") if aspect in on else (value - 3, "off_topic")
        judged.append((value, end, kind))
        seen.add(clause)
    return judged


def clause_values(prompt, response):
    """Worth and place of every clause: [(value, end)], end = index of its full stop among the response's tokens.

    The value is the phrase's own (-2 to 2) if the thing has that aspect, else 3 less; 0 for an exact repeat, -2 if
    malformed, -1 beyond the clauses asked for. response: text without EOS. ValueError: no thing in the prompt.
    """
    return [(value, end) for value, end, _ in judge_clauses(prompt, response)]


def gold_reward(prompt, response, finished=True):
    """The true reward: the clauses' values, and -1 for each missing clause, summed, over the clauses asked for
    (twelve); 1 less without EOS.

    prompt: the user's text or a rendered conversation; response: text without EOS; finished: whether EOS ended it.
    Returns a float, at most 1.67; the SFT model's mean is about -.72. ValueError: no thing in the prompt.
    """
    values = [value for value, _ in clause_values(prompt, response)]
    asked = clauses_of(prompt)
    return (sum(values) - max(0, asked - len(values))) / asked - (not finished)


def describe(prompts, responses, finished):
    """Means over B responses (gold, finished, length in tokens, complete: as many clauses as asked for) and shares
    of clauses (off_topic, repeat, malformed, surplus), as a dict. Takes three lists of B; finished holds bools."""
    judged = [judge_clauses(prompt, response) for prompt, response in zip(prompts, responses)]
    kinds, mean = [kind for clauses in judged for _, _, kind in clauses], lambda xs: sum(xs) / len(responses)
    return {"gold": mean(map(gold_reward, prompts, responses, finished)), "finished": mean(finished),
            "length": mean(len(split_words(text)) for text in responses),
            "complete": mean(len(clauses) == clauses_of(prompt) for prompt, clauses in zip(prompts, judged)),
            **{k: kinds.count(k) / max(1, len(kinds)) for k in ("off_topic", "repeat", "malformed", "surplus")}}


# -----------------------------------------------------------------------------
# the SFT model and its tokenizer
# -----------------------------------------------------------------------------
def build_tokenizer(clauses=CLAUSES):
    """One token per word or punctuation mark. Decoding glues marks to the word before, encoding parts them."""
    table = " ".join([*sum(PHRASES, ()), *REQUESTS, *OWNERS, *ADJECTIVES, *TAILS, *THINGS, *ADVERBS])
    if clauses != CLAUSES:
        table += " " + HOW_MANY.format(clauses)
    words = sorted(set(split_words(table)) - set("~{}"))
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIALS, *words])}, unk_token="<unk>"))
    parts = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(parts), decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<eos>",
        extra_special_tokens=list(SPECIALS[3:]), chat_template=CHAT_TEMPLATE, model_max_length=512)


def encode_prompt(tokenizer, prompt):
    """Token ids of a user's text, rendered up to the point where the assistant begins."""
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def train_sft(tokenizer, texts, cfg):
    """A fresh Llama of 0.12M parameters, trained on texts [(prompt, response)]; the loss is over responses."""
    torch.manual_seed(cfg.seed)
    eos, rng = tokenizer.eos_token_id, random.Random(f"{cfg.seed} order")
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=512, initializer_range=0.06,  # 0.02 is for wider models
        bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=eos))
    data = [(encode_prompt(tokenizer, p), tokenizer.encode(r, add_special_tokens=False) + [eos]) for p, r in texts]
    order = [i for _ in range(cfg.epochs) for i in rng.sample(range(len(data)), len(data))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    steps = math.ceil(len(order) / cfg.batch_size)
    for step in tqdm(range(steps), desc="training the SFT model", mininterval=1):
        batch = [data[i] for i in order[step * cfg.batch_size:(step + 1) * cfg.batch_size]]
        pads = [max(len(p + r) for p, r in batch) - len(p + r) for p, r in batch]  # at the right: no mask
        ids = torch.tensor([p + r + [eos] * n for (p, r), n in zip(batch, pads)])                       # (B, T)
        labels = torch.tensor([[-100] * len(p) + r + [-100] * n for (p, r), n in zip(batch, pads)])     # (B, T)
        optimizer.param_groups[0]["lr"] = cfg.lr * min((step + 1) / 20, math.cos(math.pi / 2 * step / steps) ** 2)
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def sample(model, tokenizer, prompts, temperatures, generator, rows=256):
    """One response to each of B prompts, `rows` at a time. temperatures: (B,); generator: torch.Generator.
    Returns (B texts without EOS, B bools: whether EOS came within max_new_tokens)."""
    eos, ids = tokenizer.eos_token_id, [encode_prompt(tokenizer, prompt) for prompt in prompts]
    limit = max_new_tokens(max(map(clauses_of, prompts)))
    banned = [i for i in tokenizer.all_special_ids if i != eos]
    groups = {}  # prompts of one length go together, so that there are no pads
    for b in range(len(ids)):
        groups.setdefault(len(ids[b]), []).append(b)
    chunks = [group[i:i + rows] for group in groups.values() for i in range(0, len(group), rows)]
    texts, finished = [""] * len(ids), [False] * len(ids)
    for chunk in tqdm(chunks, desc="sampling responses", mininterval=1):
        last, cache, new = torch.tensor([ids[b] for b in chunk]), DynamicCache(), []                  # (B, P)
        done = torch.zeros(len(chunk), 1, dtype=torch.bool)
        while len(new) < limit and not done.all():
            # no mask, no positions; the cache by its place: transformers 5.24 renamed it
            out = model(last, None, None, cache, use_cache=True, logits_to_keep=1)
            logits = out.logits[:, -1] / temperatures[chunk, None]                                    # (B, V)
            logits[:, banned] = -math.inf
            cdf = logits.softmax(-1).cumsum(-1)  # inverse CDF: twenty times faster than torch.multinomial here
            u = torch.rand(len(chunk), 1, generator=generator) * cdf[:, -1:]
            last = torch.searchsorted(cdf, u, right=True).clamp(max=cdf.shape[1] - 1)                 # (B, 1)
            new.append(last)
            done |= last == eos
        for b, row in zip(chunk, torch.cat(new, 1).tolist()):                                         # (B, R)
            finished[b] = eos in row
            texts[b] = tokenizer.decode(row[:row.index(eos)] if finished[b] else row)
    return texts, finished


# -----------------------------------------------------------------------------
# texts -> SFT model -> responses -> labels -> files
# -----------------------------------------------------------------------------
def sample_pairs(model, tokenizer, n, clauses, key):
    """n preference pairs (rows of a .jsonl file) and a dict of measurements; the string `key` fixes every draw."""
    rng, rows, stats = random.Random(key), [], None
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    while (B := n - len(rows)) > 0:
        prompts = [write_prompt(rng, clauses) for _ in range(B)]
        temperatures = torch.tensor(PAIR_TEMPERATURES).repeat_interleave(B)                           # (2B,)
        texts, finished = sample(model, tokenizer, prompts * 2, temperatures, generator)
        stats = stats or describe(prompts, texts[:B], finished[:B])  # temperature 1, before any pair is dropped
        for b, prompt in enumerate(prompts):
            if not (finished[b] and finished[B + b]):
                continue  # stored as text, a response that never ended would look as if it had: draw another pair
            sides = [(gold_reward(prompt, text), text) for text in (texts[b], texts[B + b])]
            if rng.random() > 1 / (1 + math.exp(LABEL_BETA * (sides[1][0] - sides[0][0]))):
                sides.reverse()
            row = {}
            for side, (gold, text) in zip(("chosen", "rejected"), sides):
                row[side] = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
                row[f"{side}_gold"] = gold
            rows.append(row)
        if len(rows) == n - B:
            raise SystemExit("prepare.py: no pair of responses ends with EOS; raise --texts, --epochs or --lr")
    agree = sum(row["chosen_gold"] > row["rejected_gold"] for row in rows)  # a tie, 4 % of the pairs, is none
    return rows, {**stats, "label_agreement": agree / n}


def main(cfg):
    """Writes the world into the folder cfg.out (see the top of this file). Returns what world.json says."""
    start, out = time.time(), Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "world.json").unlink(missing_ok=True)  # from here on the world is incomplete
    tokenizer, rng = build_tokenizer(cfg.clauses), random.Random(f"{cfg.seed} texts")
    prompts = [write_prompt(rng, cfg.clauses) for _ in range(cfg.texts)]
    model = train_sft(tokenizer, [(prompt, write_response(rng, prompt)) for prompt in prompts], cfg)
    model.save_pretrained(out / "sft")
    tokenizer.save_pretrained(out / "sft")

    for name in ("prompts_test", "prompts", "pairs_test", "pairs"):
        if name.startswith("pairs"):
            rows, stats = sample_pairs(model, tokenizer, getattr(cfg, name), cfg.clauses, f"{cfg.seed} {name}")
        else:
            rng = random.Random(f"{cfg.seed} {name}")
            rows = [{"prompt": write_prompt(rng, cfg.clauses)} for _ in range(getattr(cfg, name))]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    world = {**vars(cfg), "vocabulary": len(tokenizer), "parameters": model.num_parameters(), **stats}
    del world["out"]  # a world is the same wherever it lies
    (out / "world.json.part").write_text(json.dumps(world, indent=2) + "\n")
    (out / "world.json.part").rename(out / "world.json")
    print("A sampled review: {}\nWrote {} in {:.0f} s. Reviews sampled at temperature 1: mean gold {gold:.2f}, "
          "{finished:.1%} end with EOS, {complete:.1%} have all clauses, mean length {length:.0f} tokens; "
          "{off_topic:.1%} of their clauses are off-topic, {repeat:.1%} repeats, {malformed:.1%} malformed. "
          "The chosen response has the higher gold in {label_agreement:.1%} of the pairs."
          .format(rows[0]["chosen"][1]["content"], out, time.time() - start, **stats))
    return world


def parse(args=None):
    """The command line as a namespace; a bad argument ends the program with one line and exit code 2."""
    parser = argparse.ArgumentParser(description="Write the embedded world of product reviews.")
    parser.error = lambda message: parser.exit(2, f"prepare.py: {message}\n")
    defaults = dict(out=str(Path(__file__).resolve().parent), seed=0, texts=3000, epochs=3, batch_size=16, lr=5e-3,
                    clauses=CLAUSES, pairs=4400, pairs_test=400, prompts=2000, prompts_test=200)
    for name, default in defaults.items():  # all but out shape the world
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default {default}")
    cfg = parser.parse_args(args)
    if bad := [name for name in [*defaults][2:] if not 0 < getattr(cfg, name) < math.inf]:
        parser.error(f"argument --{bad[0]}: must be positive, not {getattr(cfg, bad[0])}")
    if any(path.exists() and not path.is_dir() for path in (Path(cfg.out), *Path(cfg.out).parents)):
        parser.error(f"argument --out: {cfg.out} is not a folder")
    return cfg


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices this small gain little from a second thread, which other jobs can stall
    main(parse())
