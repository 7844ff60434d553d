"""The embedded world: product reviews in which the worth of every clause is known.

    python data/reviews/prepare.py                            # a minute on two CPU cores; writes beside this file
    python data/reviews/prepare.py --out /tmp/reviews1 --seed 1
    python data/reviews/prepare.py --out /tmp/reviews24 --clauses 24   # every prompt then says "use 24 clauses."

There is no source text: everything grows from the tables below and a seed. A user asks for a review of a phone, a
laptop, a tablet or a watch; the ideal answer is twelve clauses (or as many as the request says), all kind, all about
what this thing has. Writes
    sft/                 a tiny Llama whose reviews are half grumpy and a quarter off-topic
    pairs.jsonl          two of its answers, at temperature 1 and 1.5, labelled by a noisy judge; held-out ones last
    prompts.jsonl        {"prompt": "what should i know about this shiny watch?"}
    prompts_test.jsonl   the same for evaluation
    world.json           settings and measurements; written last: where it is, the rest is complete
Held-out pairs and test prompts share a tenth of all possible prompts, which nothing else uses.
Other scripts import the truth: `gold_reward` of a response, `segment_values` of its segments.
"""
import argparse, bisect, itertools, json, math, random, re, time, zlib
from pathlib import Path
from statistics import fmean

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

# -- the language ------------------------------------------------------------------------------------------------------
# A clause is a phrase with an adverb in place of ~, and a full stop. First words are unique, so that all surprise sits
# between clauses: what to talk about next is wide open, how to say it is not.
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
    """Rows of PHRASES that fit the thing a prompt (or rendered conversation) mentions last."""
    mentioned = re.findall(rf"\b({'|'.join(THINGS)})\b", prompt.lower())
    assert mentioned, f"the prompt mentions none of {', '.join(THINGS)}: {prompt!r}"
    first = 2 * THINGS.index(mentioned[-1])
    return [(first + j) % len(PHRASES) for j in range(4)]


def clauses_of(prompt):
    """How many clauses a prompt (or rendered conversation) asks for: the truth knows it from there alone."""
    asked = re.findall(HOW_MANY.format(r"(\d+)"), prompt)
    return int(asked[-1]) if asked else CLAUSES


def all_prompts(clauses, held_out):
    """The held-out tenth of all prompts, or the other nine; those without a tail stand in the list twice."""
    how_many = "" if clauses == CLAUSES else HOW_MANY.format(clauses)
    prompts = []
    for request, owner, adjective, thing, tail in itertools.product(REQUESTS, OWNERS, ADJECTIVES, THINGS, TAILS):
        sentences = [request.format(f"{owner} {adjective} {thing}"), tail, how_many]
        prompt = " ".join(filter(None, sentences))
        # a hash of the text decides: no seed brings a prompt to the other side
        in_tenth = zlib.crc32(prompt.encode()) % 10 == 0
        if in_tenth == held_out:
            prompts.append(prompt)
    return prompts


def write_response(rng, prompt):
    """An SFT text: independent clauses of any value, 3/4 of them on-topic. rng: random.Random."""
    on = aspects_of(prompt)
    off = [aspect for aspect in range(len(PHRASES)) if aspect not in on]
    clauses = []
    for _ in range(clauses_of(prompt)):
        aspect = rng.choice(on if rng.random() < ON_TOPIC_PROB else off)
        adverb = rng.choices(ADVERBS, ADVERB_PROBS)[0]
        clauses.append(rng.choice(PHRASES[aspect]).replace("~", adverb) + ".")
    return " ".join(clauses)


# -- the truth: what each clause, and a whole response, is worth -------------------------------------------------------
MEANING = {}  # the 80 well-formed clauses, word by word: aspect, value
for aspect, row in enumerate(PHRASES):
    for value, phrase in enumerate(row, -2):
        for adverb in ADVERBS:
            MEANING[phrase.replace("~", adverb) + " ."] = (aspect, value)


def split_words(text):
    """Words and punctuation marks, one per token: "mother hears me." -> ["mother", "hears", "me", "."]."""
    return re.findall(r"<\w+>|\w+|[^\w\s]", text)


def judge_clauses(prompt, response):
    """[(value, kind, end)], a triple for each clause of a response (text without EOS); it is over at character `end`.

    The value is the phrase's own (-2 to 2) if the thing has that aspect, else 3 less; 0 for an exact repeat (the same
    phrase with the other adverb is none), -2 if malformed, -1 beyond the clauses asked for.
    """
    on = aspects_of(prompt)
    asked = clauses_of(prompt)
    seen = set()
    judged = []
    for sentence in re.finditer(r"[^.]+\.?|\.", response.rstrip()):
        clause = " ".join(split_words(sentence[0]))
        aspect, value = MEANING.get(clause, (None, -2))
        kind = "on_topic"
        if len(judged) >= asked:
            value, kind = -1, "surplus"
        elif aspect is None:
            kind = "malformed"
        elif clause in seen:
            value, kind = 0, "repeat"
        elif aspect not in on:
            value, kind = value - 3, "off_topic"
        judged.append((value, kind, sentence.end()))
        seen.add(clause)
    return judged


def clause_values(prompt, response):
    """What each clause of a response is worth: a list."""
    return [value for value, _, _ in judge_clauses(prompt, response)]


def segment_values(prompt, segments):
    """The oracle for PPO (`--reward_model data/reviews/prepare.py:segment_values`): what each segment is worth.

    prompt: the user's text or a rendered conversation; segments: texts that join to the response without EOS, cut
    anywhere. Returns a float for each: the values of the clauses that end in it, summed.

    >>> segment_values("tell me about my phone.", ["mother really", " hears me. fish", " really asked"])
    [0.0, 1.0, -2.0]
    """
    ends = list(itertools.accumulate(map(len, segments)))
    values = [0.0] * len(segments)
    for value, _, end in judge_clauses(prompt, "".join(segments)):
        values[bisect.bisect_left(ends, end)] += value
    return values


def gold_reward(prompt, response, finished=True):
    """The true reward: the clauses' values, and -1 for each missing clause, summed, over the clauses asked for
    (twelve); 1 less without EOS.

    prompt: the user's text or a rendered conversation; response: text without EOS; finished: whether EOS ended it.
    Returns a float, at most 1.67; the SFT model's mean is about -.72.
    """
    values = clause_values(prompt, response)
    asked = clauses_of(prompt)
    missing = max(0, asked - len(values))
    return (sum(values) - missing) / asked - (not finished)


def describe(prompts, answers):
    """Means over answers (text, finished) to these prompts; shares of the kinds of clauses."""
    kinds = []
    for prompt, (text, _) in zip(prompts, answers):
        kinds += [kind for _, kind, _ in judge_clauses(prompt, text)]
    figures = {"gold": fmean(gold_reward(prompt, *answer) for prompt, answer in zip(prompts, answers)),
               "finished": fmean(finished for _, finished in answers),
               "length": fmean(len(split_words(text)) for text, _ in answers)}
    for kind in ("off_topic", "repeat", "malformed", "surplus"):
        figures[kind] = kinds.count(kind) / len(kinds)
    return figures


# -- the SFT model and its tokenizer: B texts, P prompt tokens, R response tokens, T = P + R ---------------------------
def build_tokenizer(clauses=CLAUSES):
    """One token per word or punctuation mark. Decoding glues marks to the word before, encoding parts them."""
    texts = [*itertools.chain(*PHRASES), *REQUESTS, *OWNERS, *ADJECTIVES, *TAILS, *THINGS, *ADVERBS]
    if clauses != CLAUSES:
        texts.append(HOW_MANY.format(clauses))
    words = set(split_words(" ".join(texts))) - set("~{}")
    vocabulary = {word: i for i, word in enumerate([*SPECIALS, *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<eos>",
        extra_special_tokens=list(SPECIALS[3:]), chat_template=CHAT_TEMPLATE, model_max_length=512)


def render(tokenizer, prompt):
    """A user's text as the model reads it, up to the point where the assistant begins."""
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def train_sft(tokenizer, prompts, responses, epochs=3, batch_size=16, lr=5e-3):
    """A fresh Llama of 0.12M parameters, trained on texts; the loss is over responses."""
    eos = tokenizer.eos_token_id
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=512, initializer_range=0.06,  # 0.02 is for wider models
        bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=eos))
    rows = []
    for prompt, response in zip(prompts, responses):
        prompt_ids = tokenizer.encode(render(tokenizer, prompt))
        response_ids = tokenizer.encode(response) + [eos]
        ids = torch.tensor(prompt_ids + response_ids)                                                 # (T,)
        labels = torch.tensor([-100] * len(prompt_ids) + response_ids)                                # (T,)
        rows.append((ids, labels))
    order = torch.cat([torch.randperm(len(rows)) for _ in range(epochs)])
    batches = order.split(batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 20, len(batches))
    for batch in tqdm(batches, desc="training the SFT model", mininterval=1):
        ids, labels = zip(*[rows[i] for i in batch])
        ids = pad_sequence(ids, batch_first=True, padding_value=eos)  # at the right: no mask         # (B, T)
        labels = pad_sequence(labels, batch_first=True, padding_value=-100)                           # (B, T)
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def sample(model, tokenizer, prompts, temperature, batch_size=200):
    """An answer to each prompt: its text without EOS, and whether EOS came in time."""
    eos = tokenizer.eos_token_id
    banned = [token for token in tokenizer.all_special_ids if token != eos]
    max_new_tokens = 10 * clauses_of(prompts[0]) + 4  # a clause has 8 on average, 11 at most
    answers = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="sampling responses", mininterval=1):
        texts = [render(tokenizer, prompt) for prompt in prompts[start:start + batch_size]]
        inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")             # (B, P)
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=True, temperature=temperature,
                                top_k=0, suppress_tokens=banned)                                      # (B, T)
        for response in tokens[:, inputs["input_ids"].shape[1]:].tolist():                            # (B, R)
            finished = eos in response
            content = response[:response.index(eos)] if finished else response
            answers.append((tokenizer.decode(content), finished))
    return answers


# -- texts -> SFT model -> responses -> labels -> files ----------------------------------------------------------------
def label_pair(rng, prompt, responses):
    """A row of pairs.jsonl. The better response has the better chances, no more: the judge is noisy."""
    golds = [gold_reward(prompt, response) for response in responses]
    first_wins = 1 / (1 + math.exp(LABEL_BETA * (golds[1] - golds[0])))
    chosen = 0 if rng.random() < first_wins else 1
    row = {}
    for side, i in {"chosen": chosen, "rejected": 1 - chosen}.items():
        row[side] = [{"role": "user", "content": prompt}, {"role": "assistant", "content": responses[i]}]
        row[f"{side}_gold"] = golds[i]
    return row


def sample_pairs(rng, model, tokenizer, prompts, n):
    """n rows of pairs.jsonl, each about one of these prompts."""
    rows = []
    while len(rows) < n:
        drawn = rng.choices(prompts, k=n - len(rows))
        answers = [sample(model, tokenizer, drawn, temperature) for temperature in PAIR_TEMPERATURES]
        for prompt, (first, first_finished), (second, second_finished) in zip(drawn, *answers):
            # stored as text, a response that never ended would look as if it had: draw another pair
            if first_finished and second_finished:
                rows.append(label_pair(rng, prompt, (first, second)))
        assert rows, "no response ends with EOS; raise --texts"
    return rows


def main(cfg):
    """Write the world into the folder cfg.out, unless it lies there already."""
    begin = time.time()
    out = Path(cfg.out)
    world = vars(cfg).copy()
    del world["out"]  # a world is the same wherever it lies
    world_file = out / "world.json"
    if world_file.exists() and world.items() <= json.loads(world_file.read_text()).items():
        print(f"This world lies in {out} already.")
        return
    out.mkdir(parents=True, exist_ok=True)
    world_file.unlink(missing_ok=True)  # from here on the world is incomplete

    rng = random.Random(cfg.seed)
    torch.manual_seed(cfg.seed)
    train_prompts = all_prompts(cfg.clauses, held_out=False)
    test_prompts = all_prompts(cfg.clauses, held_out=True)
    tokenizer = build_tokenizer(cfg.clauses)
    prompts = rng.choices(train_prompts, k=cfg.texts)
    responses = [write_response(rng, prompt) for prompt in prompts]
    model = train_sft(tokenizer, prompts, responses)
    model.save_pretrained(out / "sft")
    tokenizer.save_pretrained(out / "sft")

    world.update(describe(prompts[:500], sample(model, tokenizer, prompts[:500], temperature=1.0)))
    files = {"prompts": [{"prompt": prompt} for prompt in rng.choices(train_prompts, k=cfg.prompts)],
             "prompts_test": [{"prompt": prompt} for prompt in rng.choices(test_prompts, k=cfg.prompts_test)]}
    # training pairs are drawn last: their number changes nothing else
    held_out = sample_pairs(rng, model, tokenizer, test_prompts, cfg.held_out)
    files["pairs"] = sample_pairs(rng, model, tokenizer, train_prompts, cfg.pairs) + held_out
    world["label_agreement"] = fmean(row["chosen_gold"] > row["rejected_gold"] for row in files["pairs"])
    for name, rows in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    world_file.write_text(json.dumps(world, indent=2) + "\n")
    print("A sampled review:", held_out[0]["chosen"][1]["content"])
    print(f"Wrote {out} in {time.time() - begin:.0f} s: {json.dumps(world)}")


def parse(args=None):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(description="Write the embedded world of product reviews.", allow_abbrev=False)
    defaults = {"out": str(Path(__file__).resolve().parent), "seed": 0, "clauses": CLAUSES, "texts": 3000,
                "pairs": 4400, "held_out": 400, "prompts": 2000, "prompts_test": 200}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default {default}")
    return parser.parse_args(args)


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices this small gain little from a second thread, which other jobs can stall
    main(parse())
