"""Chapter 2 of 4: a reward model that scores segments, learned from preferences between responses.

    python train_rm.py                                             # the embedded world, a minute
    python train_rm.py --granularity bandit --out out/rm-bandit    # the classical reward model
    torchrun --nproc_per_node=8 train_rm.py @config/llama3.1-8b-rm.args          # 8 GPUs

The idea (arXiv 2501.02790, section 2.2): a scalar head reads the backbone at every token. The
scalar at a segment's last token is the segment's reward, a response scores the mean of its
segments' rewards, and Bradley-Terry pushes the chosen response's score above the rejected one's.
No segment is ever labelled.

What differs from the authors' code: the SFT model's entropies are computed inside the step; both
sides of a pair see the same prompt, with its BOS; the last pairs are held out, and their prompts
are not trained on, so that the accuracy on them and chapter 3's calibration are honest.
"""
import fcntl
import importlib.util
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                     get_state_dict)
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification

from segment import (Dtype, Granularity, LanguageModel, check_context, cut_rows, encode_chats, fail,
                     load_model, load_pairs, load_tokenizer, map_rows, micro_batches, never_sampled,
                     pad, parse, parts_of, rank, read_config, row_lengths, say, sequence_score,
                     set_precision, setup, warn_of_world_values)


@dataclass
class Config:
    # what to train on what
    model: str = "data/reviews/sft"            # the SFT model: the backbone's start, the entropies
    data: str = "data/reviews/pairs.jsonl"     # preferences (paper: hendrydong/preference_700K)
    eval_data: str = ""                        # held-out preferences; default: the last of --data,
    held_out: int = 400                        # this many pairs
    out: str = "out/rm"                        # output folder
    granularity: Granularity = "segment"       # what gets a reward: segment, token, bandit
    cutoff: float = 1.0                        # nats; segment.py helps (paper: Llama-3 2.0)
    max_samples: int = 0                       # read at most this many pairs (0: all)
    max_tokens: int = 256                      # prompt + response (paper: 2048)
    max_prompt_tokens: int = 128               # longer ones lose what follows BOS (paper: 1728)
    # optimisation
    batch_size: int = 32                       # pairs a step, over all GPUs (paper: 128)
    epochs: int = 2                            # over the pairs (paper: 1)
    max_steps: int = 0                         # steps (0: as many as the epochs have)
    lr: float = 1e-3                           # peak (paper: 1e-6)
    seed: int = 0                              # of the order of the pairs
    # hardware
    micro_batch_size: int = 8                  # rows in one forward pass of one GPU, 2 a pair
    dtype: Dtype = "auto"                      # to compute in: bf16 on CUDA, fp32 on CPU
    grad_checkpoint: bool = False              # less memory, a third more time
    # bookkeeping
    save_every: int = 100                      # steps between checkpoints, each with an evaluation
    wandb: str = ""                            # log to this wandb project too


# -- The method: a scalar at every token, and the loss ---------------------------------------------
class ScalarModel(LanguageModel):
    """In place of the head over V tokens one d -> 1, without bias: a scalar at each response token.
    It shares only the constructor with LanguageModel."""
    auto_class = AutoModelForSequenceClassification
    settings = {"num_labels": 1}
    shift = 0                            # the critic of chapter 3 reads one position earlier

    def forward(self, ids, prompt_lens, response_lens):
        """As segment.pad makes them: ids (B, T); lens (B,), on the CPU. Returns fp32 (B, R)."""
        hidden = self.hf.base_model(input_ids=ids, use_cache=False).last_hidden_state    # (B, T, d)
        scalars = (hidden.float() @ self.hf.score.weight.float().T)[..., 0]              # (B, T)
        of_responses = parts_of(scalars, prompt_lens + self.shift, response_lens)        # B x (r,)
        return pad_sequence(of_responses, batch_first=True)                              # (B, R)

    def check(self, path):
        assert self.hf.score.bias is None, f"{path}: the head `score` has a bias"


def bradley_terry(scores_chosen, scores_rejected):
    """-log sigmoid(chosen - rejected), equation (3). (B,) each"""
    return -F.logsigmoid(scores_chosen - scores_rejected)


def ranked_right(scores_chosen, scores_rejected):
    """1 where the chosen response scores higher, 0 where lower, 1/2 for a tie. (B,) each"""
    return (1 + (scores_chosen - scores_rejected).sign()) / 2


# -- Training: what both trainers share ------------------------------------------------------------
def learning_rate(step, steps, warmup=0.03):
    """Factor on the peak: linear warm-up, then a cosine to 10 %. step counts from 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / (steps - rise)
    return 0.1 + 0.45 * (1 + np.cos(np.pi * progress))


def make_optimizer(models, device):
    """AdamW with a group of parameters for each model; optimizer_step gives the rates."""
    groups = [{"params": list(model.parameters())} for model in models]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0,
                             fused=device.type == "cuda")


def optimizer_step(optimizer, rates):
    """Clip each group's gradient to norm 1, step, forget. Returns the norms before, (groups,)."""
    norms = torch.stack([nn.utils.clip_grad_norm_(group["params"], 1.0).full_tensor()
                         for group in optimizer.param_groups])                       # (groups,)
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    if not norms.isfinite().all():
        fail("the gradient is not finite: lower the learning rates; the last checkpoint is kept")
    optimizer.step()
    optimizer.zero_grad()
    return norms


def shuffled(n, steps, batch_size, *seed):
    """Which of n rows each step takes, (steps, batch_size): all in random order, over and over."""
    epochs = 1 + steps * batch_size // n
    orders = [np.random.default_rng([*seed, epoch]).permutation(n) for epoch in range(epochs)]
    return np.concatenate(orders)[:steps * batch_size].reshape(steps, batch_size)


# == Plumbing. Data: pair i is the rows 2i (chosen) and 2i + 1 (rejected) ==========================
def encode_pairs(tokenizer, stops, pairs, cfg, held_out_rows=()):
    """Pairs -> rows (prompt ids, response ids). Dropped: pairs of equal tokens, they teach nothing;
    pairs whose prompt is held out, for then the accuracy there would measure memory."""
    chats = [(prompt, responses, where) for prompt, *responses, where in pairs]
    rows = encode_chats(tokenizer, stops, chats, cfg.max_tokens, cfg.max_prompt_tokens)
    held_out_prompts = {p.tobytes() for p, _ in held_out_rows}
    kept = []
    for (p, chosen), (_, rejected) in zip(rows[0::2], rows[1::2]):
        if p.tobytes() not in held_out_prompts and not np.array_equal(chosen, rejected):
            kept += [(p, chosen), (p, rejected)]
    say(f"dropped {len(pairs) - len(kept) // 2} of {len(pairs)} pairs: their responses have equal "
        "tokens, or their prompt is held out")
    return kept


# -- Plumbing. A run's folder: start, go on, finish ------------------------------------------------
MAY_DIFFER = ("out", "micro_batch_size", "generation_batch_size", "grad_checkpoint", "save_every",
              "sample_every", "wandb")                       # these change rounding at most


def check_out(cfg):
    """Before anything is touched: may this run go to OUT? True if it is finished there."""
    out = Path(cfg.out)
    place = out.absolute()                               # the part of OUT's path that exists
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        fail(f"--out {out} cannot be written")
    if cfg.wandb and not importlib.util.find_spec("wandb"):
        fail("--wandb needs the package: pip install wandb")
    names = {path.name for path in out.glob("*")}
    old = {}
    if "config.json" in names:
        old = json.loads((out / "config.json").read_text())
    differs = [name for name, value in asdict(cfg).items()
               if name not in MAY_DIFFER and old.get(name) != value]
    # config.json.tmp by itself is what a kill leaves at the very start
    if names - {"config.json.tmp"} and differs:
        fail(f"{out} holds another run, or other files (--{differs[0]} was {old.get(differs[0])}); "
             "give another --out")
    finished = "model" in names and "checkpoint" not in names
    if finished:
        say(f"{out}: already finished (delete the folder to run again)")
    return finished


def training_state(model, optimizer):
    """Weights and moments, sharded. These are the live tensors: dcp.load writes into them, and that
    is all there is to do. Rates, the order of data and random draws are functions of the step."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def begin_run(cfg, model, optimizer, **notes):
    """Called when every input could be read. Makes OUT, writes OUT/config.json, with notes, and
    goes on from the newest checkpoint. Returns the step to start from and OUT/metrics.jsonl, open
    on rank 0 (else None). What the log says of later steps is cut off: it will come again."""
    out = Path(cfg.out)
    log = None
    # a checkpoint's .metadata is written last: without it a kill came before the end
    saved = [int(path.parent.name[5:]) for path in out.glob("checkpoint/step_*/.metadata")]
    step = max(saved, default=0)
    if rank() == 0:
        write_json(out / "config.json", asdict(cfg) | notes)
        os.makedirs(out / "checkpoint", exist_ok=True)   # finish_run removes it
        log = open(out / "metrics.jsonl", "a+")
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)          # until this process ends
        except BlockingIOError:
            fail(f"{out} is in use by another process")
        log.seek(0)
        for _ in range(step):
            log.readline()
        log.truncate(log.tell())
    if step:
        dcp.load(training_state(model, optimizer), checkpoint_id=out / f"checkpoint/step_{step}")
        say(f"{out}: going on after step {step}")
    return step, log


def write_json(path, value):
    """From rank 0. The file is there as a whole or not at all."""
    if rank() == 0:
        tmp = Path(f"{path}.tmp")
        tmp.parent.mkdir(parents=True, exist_ok=True)
        tmp.write_text(json.dumps(value, indent=1))
        tmp.replace(path)


def log_metrics(cfg, log, row, steps, shown):
    """A step's row: all of it into metrics.jsonl, as one JSON object a line (a number that does not
    exist, NaN, becomes null); the names in `shown` on the screen."""
    numbers = [f"{name} {row[name]:,.3f}," for name in shown if name in row]
    left = row["time_step"] * (steps - row["step"])
    say(f"step {row['step']}/{steps}:", *numbers, f"{row['tokens_per_second']:,.0f} tokens/s,",
        f"{left:,.0f} s left")
    if log:
        line = json.dumps(row, default=float).replace("NaN", "null")
        print(line, file=log, flush=True)
        if cfg.wandb:
            import wandb
            wandb.run or wandb.init(project=cfg.wandb, config=asdict(cfg), name=cfg.out)
            wandb.log(row, step=row["step"])


def save(cfg, step, trained, optimizer, exported, tokenizer, dtype):
    """OUT/model, to use, and OUT/checkpoint/step_N, to go on from; then the older one goes."""
    export(exported, tokenizer, f"{cfg.out}/model", dtype)
    newest = Path(cfg.out, f"checkpoint/step_{step}")
    dcp.save(training_state(trained, optimizer), checkpoint_id=newest)
    if rank() == 0:
        for folder in newest.parent.iterdir():
            if folder != newest:
                shutil.rmtree(folder)


def export(model, tokenizer, folder, dtype):
    """A Hugging Face checkpoint, there as a whole or not at all. All gather, rank 0 writes."""
    hf = model.hf
    tmp = f"{folder}.tmp"
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(hf, options=options)
    if rank() == 0:
        # of tied weights (embedding and head) only the one is stored that the others are tied to
        weights = {name: w.to(dtype) for name, w in weights.items()
                   if name not in hf.all_tied_weights_keys}
        hf.save_pretrained(tmp, state_dict=weights)
        hf.config.dtype = dtype                          # save_pretrained noted the masters' fp32
        hf.config.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(tmp, folder)


def finish_run(cfg):
    """A finished run has a model and no checkpoint."""
    folder = Path(cfg.out, "checkpoint")
    if rank() == 0:
        renamed = folder.replace(f"{folder}.tmp")        # at once: no kill leaves half of it
        shutil.rmtree(renamed)
    say(f"wrote {cfg.out}/model")


def run(main, cfg):
    """A trainer as a script."""
    try:
        main(cfg)
    except KeyboardInterrupt:
        say(f"\nstopped; the same command goes on from the last checkpoint in {cfg.out}")
        raise SystemExit(130)
    dist.destroy_process_group()


def note_training(cfg, tokenizer, stops, config, held_out):
    """Note in config and tokenizer, which every export writes, what later chapters and the class of
    transformers must know. Write the pairs to OUT/held_out.jsonl: PPO calibrates on them."""
    source = Path(cfg.out, "held_out.jsonl").absolute()
    if rank() == 0:
        with open(source, "w") as f:
            for prompt, chosen, rejected, _ in held_out:
                row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
                print(json.dumps(row), file=f)
    # The class scores the last token that is not the pad token. Were a stop token the pad token, it
    # would skip a response's end: so take another special token, or add one where the embedding has
    # a row to spare.
    if tokenizer.pad_token_id in [None, *stops.tolist()]:
        spare = never_sampled(tokenizer, stops)
        if len(spare):
            tokenizer.pad_token_id = int(spare[-1])
        elif len(tokenizer) < config.vocab_size:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        else:
            say("warning: no token to pad with: transformers' class will misread the model")
    folder = Path(cfg.model)                             # or a hub id, which is no folder
    config.update({
        "segment_granularity": cfg.granularity,
        "segment_cutoff": cfg.cutoff if cfg.granularity == "segment" else None,
        "segment_model": str(folder.absolute()) if folder.exists() else cfg.model,
        "segment_held_out": str(source),
        "eos_token_id": stops.tolist(),                  # generation_config.json is not exported
        "pad_token_id": tokenizer.pad_token_id})


# == The run =======================================================================================
def main(cfg):
    device = setup()
    if check_out(cfg):
        return
    dtype = set_precision(cfg.dtype, device)
    ranks = dist.get_world_size()
    B = cfg.batch_size                                           # pairs a step, of all ranks
    tokenizer, stops = load_tokenizer(cfg.model)
    check_context(cfg.model, cfg.max_tokens, cfg.max_prompt_tokens)
    warn_of_world_values(cfg)

    # data, as rows 2i (chosen) and 2i + 1 (rejected)
    pairs = load_pairs(cfg.data, cfg.max_samples)
    if cfg.eval_data:
        eval_pairs = load_pairs(cfg.eval_data)
    else:
        border = max(0, len(pairs) - cfg.held_out)
        eval_pairs, pairs = pairs[border:], pairs[:border]
    eval_rows = encode_pairs(tokenizer, stops, eval_pairs, cfg)              # 2m, of m pairs
    rows = encode_pairs(tokenizer, stops, pairs, cfg, eval_rows)
    n = len(rows) // 2
    if n < B or B % ranks or not eval_rows:
        fail(f"{cfg.data}: {n} pairs, besides {len(eval_rows) // 2} held out, must fill a batch: "
             f"--batch_size {B}, a multiple of {ranks} ranks; at least one must be held out")
    steps = cfg.max_steps or cfg.epochs * n // B
    order = shuffled(n, steps, B, cfg.seed)                      # (steps, B) numbers of pairs
    say(f"{n} pairs to train, {len(eval_rows) // 2} held out; {steps} steps x {B} pairs")
    if len(eval_rows) < 200:
        say("warning: so few held-out pairs say little, and PPO calibrates on them")

    # the reward model, whose head begins with a standard deviation of 1/(d+1), as the authors have
    # it, and the frozen SFT model, whose entropies cut the segments
    head_std = 1 / (read_config(cfg.model).get_text_config().hidden_size + 1)
    model = load_model(cfg.model, ScalarModel, device, dtype, train=True,
                       grad_checkpoint=cfg.grad_checkpoint, head_std=head_std)
    sft = load_model(cfg.model, LanguageModel, device, dtype)
    optimizer = make_optimizer([model], device)
    first_step, log = begin_run(cfg, model, optimizer)
    note_training(cfg, tokenizer, stops, model.hf.config, eval_pairs)
    _, eval_entropy = map_rows(sft, eval_rows, cfg.micro_batch_size, device)             # (2m, R)
    eval_ends = cut_rows(eval_rows, eval_entropy, tokenizer, stops,
                         cfg.cutoff, cfg.granularity)                                    # (2m, R)

    # training: Bradley-Terry on the mean of the segment rewards
    lengths = row_lengths(rows).reshape(n, 2)                                            # (n, 2)
    for step in range(first_step, steps):
        began = time.time()
        minibatch = order[step]                                  # (B,)
        sums = 0                                 # (2,) of losses, of pairs ranked right
        longer = lengths[minibatch].max(1)                       # (B,) of a pair's two rows
        for micro in micro_batches(longer, max(1, cfg.micro_batch_size // 2)):
            mb = [rows[2 * i + side] for i in minibatch[micro] for side in (0, 1)]       # 2b rows
            batch = pad(mb, device)
            scalars = model(*batch)                                                      # (2b, r)
            entropy = torch.zeros_like(scalars)                                          # (2b, r)
            if cfg.granularity == "segment":
                _, entropy = sft(*batch)
            ends = cut_rows(mb, entropy, tokenizer, stops, cfg.cutoff, cfg.granularity)  # (2b, r)
            chosen, rejected = sequence_score(scalars, ends).view(-1, 2).T               # (b,)
            losses = bradley_terry(chosen, rejected)                                     # (b,)
            # FSDP averages gradients over the ranks, so each pair weighs ranks / B
            (losses.sum() * ranks / B).backward()
            sums += torch.stack([losses, ranked_right(chosen, rejected)]).detach().sum(1)
        rate = cfg.lr * learning_rate(step, steps)
        [grad_norm] = optimizer_step(optimizer, [rate])
        dist.all_reduce(sums)

        # what happened
        done = step + 1
        loss, accuracy = sums / B
        seconds = time.time() - began
        row = {"step": done, "loss": loss, "accuracy": accuracy, "grad_norm": grad_norm, "lr": rate,
               "time_step": seconds, "tokens_per_second": lengths[minibatch].sum() / seconds}
        must_save = done % cfg.save_every == 0 or done == steps
        if must_save:
            scalars = map_rows(model, eval_rows, cfg.micro_batch_size, device)           # (2m, R)
            chosen, rejected = sequence_score(scalars, eval_ends).view(-1, 2).T          # (m,)
            row["eval_accuracy"] = ranked_right(chosen, rejected).mean()
        log_metrics(cfg, log, row, steps, ("loss", "accuracy", "grad_norm", "eval_accuracy"))
        if must_save:
            save(cfg, done, model, optimizer, model, tokenizer, dtype)
    finish_run(cfg)


if __name__ == "__main__":
    run(main, parse(Config))
