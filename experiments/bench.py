"""How fast is this, next to what you would pick instead? On a CPU, and on a GPU.

    python experiments/bench.py --only decode     # or one of the rows below
    pip install trl==1.12.0 accelerate && python experiments/bench.py    # all: 20 minutes of a core
    python experiments/bench.py --cuda            # one GPU of 80 GB: 8 minutes
    python experiments/bench.py --cuda --tiny     # does that part run? A minute on a CPU

CPU: ours and theirs take turns, each in a process of its own, so that whatever else the machine
does hits both; medians over rounds and steps, without a process's first. A random Llama of 4
layers, d = 256, V = 1024; fp32, one thread. Without TRL its side of the table stays empty.
    decode  tokens/s of 64 responses, geometric lengths of mean 66: generate | Hugging Face generate
    rm      real tokens/s of a step on 16 pairs of log-normal lengths: train_rm.py, the SFT model's
            forward pass for the entropies included | TRL's RewardTrainer, which needs none
    ppo     real tokens/s of an iteration, 64 rollouts x (64 + 64): train_ppo.py | TRL's PPOTrainer;
            ppo_ragged: geometric lengths, mean 28, at most 64; ppo_bf16: in bf16, TRL's default
    memory  MiB for log-probs and entropies, forward and backward, of 4,096 tokens at V = 128,256:
            token_logprobs_and_entropy | log_softmax of all logits at once (needs 12 GB free)

CUDA: Llamas of 1B and 8B, random weights, bf16. Decoding against the copy bandwidth (a step must
read the weights and the cache), training against the bf16 matmul rate (6 FLOP a parameter and real
token, 2 in a forward pass; attention not counted). Both rates are measured first.
"""
import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          TrainerCallback)

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from bench_cuda import cuda  # noqa: E402
from bench_world import WORLDS, make_world, our_ppo, our_rm, set_stop_probability  # noqa: E402
from segment import token_logprobs_and_entropy  # noqa: E402
from train_ppo import generate  # noqa: E402


# --------------------------------------------------------------------------------------------------
# the contestants: each returns one number for each step it ran
# --------------------------------------------------------------------------------------------------
CLOCK, TIMES = TrainerCallback(), []                     # the times at which TRL's steps ended
CLOCK.on_step_end = lambda *args, **kwargs: TIMES.append(time.time())


def trl_flags(world):
    return {"output_dir": f"{world}/trl", "bf16": False, "gradient_checkpointing": False,
            "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
            "logging_steps": 1}


def decode(world, ours):
    model = AutoModelForCausalLM.from_pretrained(f"{world}/sft")
    with torch.no_grad():
        set_stop_probability(model, 1 / 70)              # cut at 192 tokens: a mean of 66
    random, result = np.random.default_rng(0), []
    prompts = [random.integers(4, 1024, n) for n in random.integers(32, 97, 64)]
    P = max(len(p) for p in prompts)
    ids = torch.stack([torch.from_numpy(np.pad(p, (P - len(p), 0))) for p in prompts])   # (B, P)
    for turn in range(4):
        began = time.time()
        if ours:
            seeds = [(turn, b) for b in range(64)]
            _, _, lengths = generate(model, prompts, torch.tensor([1]), 192, seeds)
            tokens = int(lengths.sum())
        else:
            out = model.generate(input_ids=ids, attention_mask=(ids > 0).long(), do_sample=True,
                                 top_k=0, temperature=1.0, max_new_tokens=192, eos_token_id=1,
                                 pad_token_id=0)
            tokens = int((out[:, P:] != 0).sum())
        result.append(tokens / (time.time() - began))
    return result[1:]


def rm(world, ours):
    if ours:
        return [row["tokens_per_second"] for row in our_rm(world)]
    work = WORLDS[os.path.basename(world)][1]
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(f"{world}/rm"), callbacks=[CLOCK],
        processing_class=AutoTokenizer.from_pretrained(f"{world}/sft"),
        train_dataset=Dataset.from_json(f"{world}/pairs.jsonl", cache_dir=f"{world}/cache"),
        args=RewardConfig(per_device_train_batch_size=work["pairs"], max_steps=work["steps"],
                          max_length=work["max_tokens"], **trl_flags(world)))
    trainer.train()
    tokens = [row["num_tokens"] for row in trainer.state.log_history if "loss" in row]
    return list(np.diff(tokens) / np.diff(TIMES))


def ppo(world, ours, dtype="fp32"):
    if ours:
        return [row["tokens_per_second"] for row in our_ppo(world, dtype)]
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    tokenizer = AutoTokenizer.from_pretrained(f"{world}/sft")

    def encode(row):
        return {"input_ids": tokenizer.apply_chat_template(row["prompt"], return_dict=False,
                                                           add_generation_prompt=True)}

    data = Dataset.from_json(f"{world}/prompts.jsonl", cache_dir=f"{world}/cache")
    data = data.map(encode, remove_columns="prompt")
    flags = trl_flags(world) | {"bf16": dtype == "bf16"}
    args = PPOConfig(per_device_train_batch_size=64, num_mini_batches=4, num_ppo_epochs=1,
                     total_episodes=len(data), response_length=64, temperature=1.0,
                     local_rollout_forward_batch_size=64, learning_rate=1e-6,
                     num_sample_generations=0, stop_token="eos", **flags)
    parts = {}
    for name in ("model", "ref_model"):
        parts[name] = AutoModelForCausalLM.from_pretrained(f"{world}/sft")
    for name in ("reward_model", "value_model"):
        parts[name] = AutoModelForSequenceClassification.from_pretrained(f"{world}/rm")
    PPOTrainer(args=args, processing_class=tokenizer, train_dataset=data, eval_dataset=data,
               callbacks=[CLOCK], **parts).train()
    stop = WORLDS[os.path.basename(world)][1]["stop"]
    length = (1 - (1 - stop) ** 64) / stop               # it logs no lengths: the expected one
    return [64 * (64 + length) / seconds for seconds in np.diff(TIMES)]


def ppo_bf16(world, ours):
    return ppo(world, ours, "bf16")


def memory(world, ours):
    def naive(hidden, weight, targets):
        logp = (hidden @ weight.T).log_softmax(-1)                           # (N, V)
        return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    function = token_logprobs_and_entropy if ours else naive
    for n, V in ((64, 64), (4096, 128256)):              # the small one loads the libraries
        hidden, weight = torch.randn(n, 64).requires_grad_(), torch.randn(V, 64).requires_grad_()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        logp, entropy = function(hidden, weight, torch.zeros(n, dtype=torch.long))
        (logp + entropy).sum().backward()
    return [(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 10]


# --------------------------------------------------------------------------------------------------
# the table
# --------------------------------------------------------------------------------------------------
ROWS = {"decode": (decode, "tokens/s", "Hugging Face generate"),
        "rm": (rm, "tokens/s", "TRL RewardTrainer"),
        "ppo": (ppo, "tokens/s", "TRL PPOTrainer"),
        "ppo_ragged": (ppo, "tokens/s", "TRL PPOTrainer"),
        "ppo_bf16": (ppo_bf16, "tokens/s", "TRL PPOTrainer"),
        "memory": (memory, "MiB", "all logits at once")}


def worker(world, name, side):
    """What a process of its own does: one side of one row."""
    if not os.path.exists(world):
        make_world(world)
    with open(f"{world}/result.json", "w") as f:
        json.dump(ROWS[name][0](world, side == "ours"), f)


def in_a_process(world, name, side):
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__, "--worker", world, name, side], env=env,
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{name}, {side} failed:\n{done.stdout[-3000:]}")
    with open(f"{world}/result.json") as f:
        return json.load(f)


def row(name, folder, rounds):
    """Ours and theirs take turns; prints a line of the table."""
    _, unit, theirs = ROWS[name]
    world = f"{folder}/{'ragged' if name == 'ppo_ragged' else 'even'}"
    sides = {"ours": [], "theirs": []}
    if "TRL" in theirs and not importlib.util.find_spec("trl"):
        del sides["theirs"]
    for _ in range(1 if name == "memory" else rounds):
        for side, numbers in sides.items():
            numbers += in_a_process(world, name, side)
    cells = [f"{statistics.median(numbers):10,.0f}" for numbers in sides.values()]
    print(f"{name:12}{unit:10}{''.join(cells):20}   {theirs}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ROWS)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--cuda", action="store_true", help="the part for a GPU")
    parser.add_argument("--tiny", action="store_true", help="with --cuda: sizes for a CPU")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)         # world, row, side
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker)
    with tempfile.TemporaryDirectory() as folder:
        if args.cuda:
            return cuda(args.tiny, folder)
        print(f"torch {torch.__version__}, 1 thread")
        print(f"{'':22}{'ours':>10}{'theirs':>10}   theirs is")
        for name in [args.only] if args.only else ROWS:
            row(name, folder, args.rounds)


if __name__ == "__main__":
    main()
