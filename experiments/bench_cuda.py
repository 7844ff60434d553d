"""The CUDA part of bench.py: how much of what a GPU can do do decoding and training reach?"""
import gc
import os
import statistics
import sys
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from bench_world import LLAMA_8B, WORLDS, make_world, our_ppo, our_rm  # noqa: E402
from train_ppo import cuda_graph, generate  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def start_over():
    """Free what earlier parts left, and measure the peak from here."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb():
    return torch.cuda.max_memory_allocated() / 1e9       # 0 without CUDA


def seconds(function):
    """The fastest of 5 calls, after one to warm up."""
    times = []
    for _ in range(6):
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
    """256 steps of 64 rows behind prompts of 512 tokens, step by step and replayed from a graph."""
    rows, P, steps = 64, 512, 256
    if tiny:
        rows, P, steps = 4, 16, 32
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
    ways = {"step by step": None}
    if DEVICE == "cuda":
        ways["replayed"] = cuda_graph
    for way, record in ways.items():
        taken = []
        for R in (64, 64, 64 + steps):                   # the first one warms up
            began = time.time()
            tokens, _, _ = generate(model, prompts, torch.tensor([1]), R, seeds, banned=banned,
                                    record=record)
            tokens.sum().item()                          # here the CPU waits for the GPU
            taken.append(time.time() - began)
        step = (taken[2] - taken[1]) / steps
        share = read / step / bandwidth
        print(f"  {way}: {rows / step:,.0f} tokens/s, {1000 * step:.1f} ms a step, {share:.0%} of "
              "the copy bandwidth", flush=True)


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
    tokens = row["response_tokens"] + work["rollouts"] * work["prompt"]
    flop = 12 * body * tokens + 6 * head * row["response_tokens"]
    share = flop / row["time_train"] / matmul
    print(f"  PPO iteration of {tokens:,} tokens, {peak_gb():.1f} GB at most:")
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
