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
import gc
import importlib.util
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          LlamaConfig, PreTrainedTokenizerFast, TrainerCallback)

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train_ppo  # noqa: E402
import train_rm  # noqa: E402
from segment import token_logprobs_and_entropy  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# --------------------------------------------------------------------------------------------------
# the worlds: a random Llama, pairs and prompts of chosen lengths
# --------------------------------------------------------------------------------------------------
SMALL = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
         "num_attention_heads": 4, "max_position_embeddings": 512}
TINY = SMALL | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
LLAMA_1B = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 4096}
LLAMA_8B = LLAMA_1B | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
# pairs and responses of a step, tokens of a prompt and of a response (for pairs: the median)
WORK = {"pairs": 16, "steps": 10, "median": 100, "max_tokens": 512, "prompt": 64, "response": 64,
        "rollouts": 64, "batch": 16, "iterations": 4, "stop": 1e-9, "flags": {}}
WORLDS = {
    "even": (SMALL, WORK),
    "ragged": (SMALL, WORK | {"stop": 1 / 32}),
    "tiny": (TINY, WORK | {"pairs": 4, "steps": 3, "rollouts": 8, "batch": 4, "iterations": 2}),
    "1B": (LLAMA_1B, {"pairs": 64, "steps": 5, "median": 400, "max_tokens": 2048, "prompt": 512,
                      "response": 512, "rollouts": 128, "batch": 32, "iterations": 2, "stop": 1e-9,
                      "flags": {"grad_checkpoint": True, "micro_batch_size": 8}})}


def make_world(world):
    """Tokenizer, SFT model, reward model, pairs and prompts; the folder's name is one of WORLDS."""
    shape, work = WORLDS[os.path.basename(world)]
    V, special = shape["vocab_size"], ["<pad>", "<eos>", "<user>", "<assistant>"]
    words = [f"w{i}" for i in range(V - len(special))]
    ids = {word: i for i, word in enumerate(special + words)}
    lookup = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    lookup.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=lookup, pad_token="<pad>",
                                        eos_token="<eos>", extra_special_tokens=special[2:])
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}")
    config = LlamaConfig(**shape, num_labels=1, pad_token_id=0, bos_token_id=None, eos_token_id=1,
                         tie_word_embeddings=False)
    torch.manual_seed(0)
    with torch.device(DEVICE), torch.no_grad():
        dtype = torch.bfloat16 if V > 100000 else torch.float32
        sft = AutoModelForCausalLM.from_config(config, dtype=dtype)
        set_stop_probability(sft, work["stop"])
        sft.save_pretrained(f"{world}/sft")
        config.update({"segment_granularity": "segment", "segment_cutoff": 1.0})
        rm = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
        rm.save_pretrained(f"{world}/rm")
    tokenizer.save_pretrained(f"{world}/sft")
    tokenizer.save_pretrained(f"{world}/rm")

    random = np.random.default_rng(0)

    def message(role, n):
        drawn = random.choice(words, n)
        return {"role": role, "content": " ".join(drawn)}

    n_pairs = {"pairs": work["pairs"] * work["steps"], "pairs_test": 32}
    for name, n in n_pairs.items():
        with open(f"{world}/{name}.jsonl", "w") as f:
            for lengths in random.lognormal(np.log(work["median"]), 0.7, (n, 2)):
                lengths = np.minimum(lengths, work["max_tokens"] - 17).astype(int) + 1
                prompt = message("user", 13)             # 16 tokens with the template's
                chosen, rejected = [[prompt, message("assistant", n)] for n in lengths]
                f.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
    with open(f"{world}/prompts.jsonl", "w") as f:
        for _ in range(work["rollouts"] * work["iterations"]):
            prompt = message("user", work["prompt"] - 3)
            f.write(json.dumps({"prompt": [prompt]}) + "\n")


def set_stop_probability(sft, stop):
    """Make hidden[0] a constant, sqrt(d), so that the head has a bias: <eos> comes with probability
    `stop`, other special tokens never."""
    root, V = math.sqrt(sft.config.hidden_size), sft.config.vocab_size
    sft.model.embed_tokens.weight[:, 0] = 1000.0
    for layer in sft.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    sft.lm_head.weight[:, 0] = 0.0
    sft.lm_head.weight[:4, 0] = -32.0 / root
    sft.lm_head.weight[1, 0] = math.log(stop / (1 - stop) * V) / root


# --------------------------------------------------------------------------------------------------
# our scripts in them: the lines of their metrics.jsonl, without the first
# --------------------------------------------------------------------------------------------------
def run_script(script, world, **flags):
    """A chapter's main, without its checkpoints."""
    script.save = lambda *args: None
    out = tempfile.mkdtemp(dir=world)
    script.main(script.Config(model=f"{world}/sft", out=out, **flags))
    with open(f"{out}/metrics.jsonl") as f:
        return [json.loads(line) for line in f][1:]


def our_rm(world):
    work = WORLDS[os.path.basename(world)][1]
    return run_script(train_rm, world, data=f"{world}/pairs.jsonl", max_prompt_tokens=64,
                      eval_data=f"{world}/pairs_test.jsonl", max_tokens=work["max_tokens"],
                      batch_size=work["pairs"], epochs=1, **work["flags"])


def our_ppo(world, dtype):
    work = WORLDS[os.path.basename(world)][1]
    return run_script(train_ppo, world, reward_model=f"{world}/rm", data=f"{world}/prompts.jsonl",
                      calibration_data=f"{world}/pairs_test.jsonl", dtype=dtype,
                      max_prompt_tokens=work["prompt"], max_new_tokens=work["response"],
                      generation_batch_size=64, rollout_batch_size=work["rollouts"],
                      batch_size=work["batch"], max_steps=work["iterations"], actor_lr=1e-6,
                      critic_lr=1e-6, **work["flags"])


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
            _, _, lengths = train_ppo.generate(model, prompts, torch.tensor([1]), 192, seeds)
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


# --------------------------------------------------------------------------------------------------
# CUDA: how much of what a GPU can do do decoding and training reach?
# --------------------------------------------------------------------------------------------------
def start_over():
    """Free what earlier parts left, and measure the peak from here."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb():
    return torch.cuda.max_memory_allocated() / 1e9       # 0 without CUDA


def seconds(function, calls=5):
    """The fastest call, after one to warm up."""
    times = []
    for _ in range(1 + calls):
        began = time.time()
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.time() - began)
    return min(times[1:])


def rates(tiny):
    """Bytes/s of a copy, read and write counted, and FLOP/s of a bf16 matrix product."""
    n, d = 2 ** 31, 8192
    if tiny:
        n, d = 2 ** 24, 256
    a, b = torch.zeros(2, n, dtype=torch.uint8, device=DEVICE)
    x = torch.randn(d, d, device=DEVICE, dtype=torch.bfloat16)
    copies = seconds(lambda: b.copy_(a))
    products = seconds(lambda: x @ x)
    return 2 * n / copies, 2 * d ** 3 / products


def cuda_decode(shape, bandwidth, tiny):
    """256 steps of 64 rows behind prompts of 512 tokens and 64 of their responses."""
    rows, P, steps = 64, 512, 256
    if tiny:
        rows, P, steps = 4, 16, 32
    start_over()
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16).eval()
        banned = torch.arange(shape["vocab_size"]) == 1          # the stop token: no row ends
    prompts = [np.arange(P) + 4] * rows
    seeds = [(0, b) for b in range(rows)]
    config, embedding = model.config, model.get_input_embeddings().weight
    weights = sum(p.numel() for p in model.parameters()) - embedding.numel()
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    cache = rows * (P + 64 + steps / 2) * token          # keys and values, half-way
    read = 2 * (weights + cache)                         # bytes in a step

    def to(R):
        train_ppo.generate(model, prompts, torch.tensor([1]), R, seeds, banned=banned)

    step = (seconds(lambda: to(64 + steps), 1) - seconds(lambda: to(64), 1)) / steps
    print(f"  {rows / step:,.0f} tokens/s, {1000 * step:.1f} ms a step, "
          f"{read / step / bandwidth:.0%} of the copy bandwidth, {peak_gb():.1f} GB at most",
          flush=True)


def cuda_train(world, matmul):
    """A reward model's step and a PPO iteration, by their scripts."""
    make_world(world)
    shape, work = WORLDS[os.path.basename(world)]
    with torch.device("meta"):
        sft = AutoModelForCausalLM.from_config(LlamaConfig(**shape))
    head = sft.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in sft.parameters()) - 2 * head
    start_over()
    rate = statistics.median([row["tokens_per_second"] for row in our_rm(world)])
    share = rate * (8 * body + 2 * head) / matmul
    print(f"  reward model step: {rate:,.0f} real tokens/s, {share:.0%} of the matmul rate, "
          f"{peak_gb():.1f} GB at most", flush=True)
    start_over()
    row = our_ppo(world, "auto")[-1]
    responses = row["response_length"] * work["rollouts"]                    # their tokens
    tokens = responses + work["prompt"] * work["rollouts"]
    share = (12 * body * tokens + 6 * head * responses) / row["time_train"] / matmul
    print(f"  PPO iteration of {tokens:,.0f} tokens, {peak_gb():.1f} GB at most:")
    for phase in ("generate", "score", "train"):
        print(f"    {phase} {row[f'time_{phase}']:.1f} s")
    print(f"    training at {share:.0%} of the matmul rate", flush=True)


def cuda(tiny, folder):
    bandwidth, matmul = rates(tiny)
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"{name}: copies {bandwidth / 1e12:.3f} TB/s, bf16 matmul {matmul / 1e12:.3g} TFLOP/s")
    small = "tiny" if tiny else "1B"
    print(f"decoding, {small}:")
    cuda_decode(WORLDS[small][0], bandwidth, tiny)
    if not tiny:
        print("decoding, 8B:")
        cuda_decode(LLAMA_8B, bandwidth, tiny)
    print(f"training, {small}:")
    cuda_train(f"{folder}/{small}", matmul)


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
