"""How fast is this, next to what you would pick instead? Same machine, shapes, data and precision, taking turns.

    pip install trl==1.12.0 accelerate && python assets/bench.py          # about 15 minutes of one CPU core
    python assets/bench.py --only rm --rounds 1                    # or decode, ppo, ppo_ragged, ppo_bf16, memory

Ours and theirs run in turn, in processes of their own, so that whatever else the machine does hits both; the table has
medians over rounds and steps, without the first step of a process. A random Llama of 4 layers, d = 256, V = 1024, fp32:
    decode  tokens/s of 64 responses to prompts of 32-96 tokens, temperature 1, response lengths geometric (mean 66,
            at most 192): train_ppo.generate | Hugging Face model.generate
    rm      real (unpadded) tokens/s of a training step on 16 pairs whose responses have log-normal lengths (median
            100, sigma 0.7, at most 512 tokens with the prompt): train_rm.py | TRL's RewardTrainer on the same pairs
    ppo     real tokens/s of one iteration, from sampling to the last optimizer step: 64 rollouts x (64 prompt + 64
            response tokens), one epoch of 4 minibatches: train_ppo.py | TRL's PPOTrainer (1.12 is the last with one);
            ppo_ragged: responses stop, geometric lengths, mean 28, at most 64; ppo_bf16: both in bf16, TRL's default
    memory  extra peak memory, forward and backward, of log-probs and entropies of 4,096 tokens at V = 128,256, d = 64:
            segment.token_logprobs_and_entropy | log_softmax of all the logits at once (needs 12 GB free)

TRL's RewardTrainer runs without gradient checkpointing (its PPOTrainer never uses it), both on whole minibatches. Ours
cuts a step into micro-batches of --micro_tokens 2048, sorted by length, and gets the same gradient.
"""
import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig,
                          TokenizersBackend, TrainerCallback)

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import segment, train_ppo, train_rm                       # noqa: E401, E402

V, PAIRS, STEPS, ITERATIONS, DECODES = 1024, 16, 10, 4, 5     # the last three: of rm, ppo and decode in one turn


def stop_probability(world):
    return 1 / 32 if world.endswith("ragged") else 1e-9


def make_world(world):
    """Tokenizer, SFT model, reward model with reward.json, pairs and prompts, in a folder."""
    stop, special = stop_probability(world), ["<pad>", "<eos>", "<user>", "<assistant>"]
    words = [f"w{i}" for i in range(V - len(special))]
    lookup = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + words)}, unk_token="<pad>"))
    lookup.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = TokenizersBackend(tokenizer_object=lookup, pad_token="<pad>", eos_token="<eos>",
                                  additional_special_tokens=special[2:])
    tokenizer.chat_template = ("{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eos> {% endfor %}"
                               "{% if add_generation_prompt %}<assistant> {% endif %}")
    config = LlamaConfig(vocab_size=V, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_labels=1,
                         num_attention_heads=4, max_position_embeddings=512, pad_token_id=0, bos_token_id=None,
                         eos_token_id=1, tie_word_embeddings=False)
    torch.manual_seed(0)
    sft, rm = (kind.from_config(config) for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification))
    with torch.no_grad():                                 # hidden[0] becomes a constant, 16, so the head has a bias
        sft.model.embed_tokens.weight[:, 0] = 100.0
        for layer in sft.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        sft.lm_head.weight[:, 0] = 0.0
        sft.lm_head.weight[:4, 0] = -2.0                  # special tokens never come, <eos> may
        sft.lm_head.weight[1, 0] = math.log(stop / (1 - stop) * V) / 16
    for model, name in ((sft, "sft"), (rm, "rm"), (tokenizer, "sft"), (tokenizer, "rm")):
        model.save_pretrained(f"{world}/{name}")
    random = np.random.default_rng(0)

    def message(role, n):
        return {"role": role, "content": " ".join(random.choice(words, n))}

    with open(f"{world}/pairs.jsonl", "w") as f:
        for lengths in random.lognormal(np.log(100), 0.7, (PAIRS * STEPS + 64, 2)):   # + 64: held out, to calibrate on
            prompt = message("user", 13)                  # 16 tokens with the template's
            sides = ([prompt, message("assistant", min(int(n), 495))] for n in lengths)
            f.write(json.dumps(dict(zip(("chosen", "rejected"), sides))) + "\n")
    with open(f"{world}/prompts.jsonl", "w") as f:
        f.writelines(json.dumps({"prompt": [message("user", 61)]}) + "\n" for _ in range(64 * ITERATIONS))
    train_rm.main(train_rm.Config(calibrate_only=True, reward_model=f"{world}/rm", **rm_flags(world)))


def rm_flags(world):
    return dict(model=f"{world}/sft", data=f"{world}/pairs.jsonl", eval_data="", cache=f"{world}/cache",
                max_tokens=512, max_prompt_tokens=64, batch_size=PAIRS, micro_tokens=2048, epochs=1, max_steps=STEPS)


CLOCK, TIMES = TrainerCallback(), []                          # the times at which TRL's steps ended
CLOCK.on_step_end = lambda *args, **kwargs: TIMES.append(time.time())


def trl_flags(world):
    return dict(output_dir=f"{world}/trl", bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none",
                save_strategy="no", disable_tqdm=True, logging_steps=1)


def decode(world, ours):
    """This and what follows are the contestants: each returns one number for each step it ran."""
    model, random, result = AutoModelForCausalLM.from_pretrained(f"{world}/sft"), np.random.default_rng(0), []
    model.lm_head.weight.data[1, 0] = math.log(V / 69) / 16                   # 1 of 70; cut at 192, a mean of 66
    prompts = [random.integers(4, V, n) for n in random.integers(32, 97, 64)]
    P = max(map(len, prompts))
    ids = torch.stack([torch.from_numpy(np.pad(p, (P - len(p), 0))) for p in prompts])
    for turn in range(DECODES + 1):
        tick = time.time()
        if ours:
            luck = train_ppo.draw_luck([(turn, b) for b in range(64)], 192)
            tokens = int(train_ppo.generate(model, prompts, torch.tensor([1]), 192, luck)[2].sum())
        else:
            out = model.generate(input_ids=ids, attention_mask=(ids > 0).long(), do_sample=True, top_k=0,
                                 temperature=1.0, max_new_tokens=192, eos_token_id=1, pad_token_id=0)
            tokens = int((out[:, P:] != 0).sum())
        result.append(tokens / (time.time() - tick))
    return result[1:]


def rm(world, ours):
    if ours:
        train_rm.main(train_rm.Config(out=(out := tempfile.mkdtemp(dir=world)), **rm_flags(world)))
        return [json.loads(line)["tokens_per_second"] for line in open(f"{out}/metrics.jsonl")][1:]
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(f"{world}/rm"), callbacks=[CLOCK],
        processing_class=AutoTokenizer.from_pretrained(f"{world}/sft"),
        train_dataset=Dataset.from_json(f"{world}/pairs.jsonl", cache_dir=f"{world}/cache"),
        args=RewardConfig(per_device_train_batch_size=PAIRS, max_steps=STEPS, max_length=512, **trl_flags(world)))
    trainer.train()
    tokens = [row["num_tokens"] for row in trainer.state.log_history if "loss" in row]
    return [(b - a) / (t - s) for a, b, s, t in zip(tokens, tokens[1:], TIMES, TIMES[1:])]


def ppo(world, ours, dtype="fp32"):
    if ours:
        train_ppo.main(train_ppo.Config(
            model=f"{world}/sft", reward_model=f"{world}/rm", data=f"{world}/prompts.jsonl", micro_tokens=2048,
            out=(out := tempfile.mkdtemp(dir=world)), max_prompt_tokens=64, max_new_tokens=64, rollout_batch_size=64,
            batch_size=16, max_steps=ITERATIONS, actor_lr=1e-6, critic_lr=1e-6, dtype=dtype))
        return [json.loads(line)["tokens_per_second"] for line in open(f"{out}/metrics.jsonl")][1:]
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    tokenizer = AutoTokenizer.from_pretrained(f"{world}/sft")
    data = Dataset.from_json(f"{world}/prompts.jsonl", cache_dir=f"{world}/cache").map(lambda row: {
        "input_ids": tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)},
        remove_columns="prompt")
    args = PPOConfig(per_device_train_batch_size=64, num_mini_batches=4, num_ppo_epochs=1, total_episodes=len(data),
                     response_length=64, temperature=1.0, local_rollout_forward_batch_size=64, learning_rate=1e-6,
                     num_sample_generations=0, stop_token="eos", **trl_flags(world) | {"bf16": dtype == "bf16"})
    models = {name: AutoModelForCausalLM.from_pretrained(f"{world}/sft") for name in ("model", "ref_model")}
    models |= {name: AutoModelForSequenceClassification.from_pretrained(f"{world}/rm")
               for name in ("reward_model", "value_model")}
    PPOTrainer(args=args, processing_class=tokenizer, train_dataset=data, eval_dataset=data, callbacks=[CLOCK],
               **models).train()
    length = (1 - (1 - stop_probability(world)) ** 64) / stop_probability(world)     # not logged: the expected one
    return [64 * (64 + length) / (t - s) for s, t in zip(TIMES, TIMES[1:])]


def memory(world, ours):
    def naive(hidden, weight, targets):
        logp = (hidden @ weight.T).log_softmax(-1)                            # (N, V)
        return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    f, peaks = segment.token_logprobs_and_entropy if ours else naive, []
    for n, vocabulary in ((64, 64), (4096, 128256)):                          # the small one loads the libraries
        hidden, weight = torch.randn(n, 64).requires_grad_(), torch.randn(vocabulary, 64).requires_grad_()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sum(f(hidden, weight, torch.zeros(n, dtype=torch.long))).sum().backward()
        peaks.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 10)
    return peaks[1:]


BENCHES = {"decode": (decode, "tokens/s", "Hugging Face generate"), "rm": (rm, "tokens/s", "TRL RewardTrainer"),
           "ppo": (ppo, "tokens/s", "TRL PPOTrainer"), "ppo_ragged": (ppo, "tokens/s", "TRL PPOTrainer"),
           "ppo_bf16": (partial(ppo, dtype="bf16"), "tokens/s", "TRL PPOTrainer"),
           "memory": (memory, "MiB extra", "all logits at once")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=BENCHES)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)          # world, bench, side
    args = parser.parse_args()
    if args.worker:
        world, name, side = args.worker
        with open(f"{world}/result.json", "w") as f:
            return json.dump(BENCHES[name][0](world, side == "ours") if name in BENCHES else make_world(world), f)

    def run(*task):
        """This file again, in a process of its own."""
        env = os.environ | dict(OMP_NUM_THREADS="1", TRL_EXPERIMENTAL_SILENCE="1", CUDA_VISIBLE_DEVICES="")
        done = subprocess.run([sys.executable, __file__, "--worker", *task], env=env, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            sys.exit(f"{' '.join(task)} failed:\n{done.stdout[-3000:]}")
        with open(f"{task[0]}/result.json") as f:
            return json.load(f)

    print(*(f"{p} {version(p)}," for p in ("torch", "transformers", "trl", "accelerate")), "1 thread")
    print(f"{'':22}{'ours':>10}{'theirs':>10}{'ratio':>8}   theirs is")
    with tempfile.TemporaryDirectory() as even, tempfile.TemporaryDirectory(suffix="ragged") as ragged:
        for name in [args.only] if args.only else BENCHES:
            world, (_, unit, theirs), numbers = ragged if name == "ppo_ragged" else even, BENCHES[name], ([], [])
            if not os.listdir(world):
                run(world, "make", "both")
            for _ in range(args.rounds if name != "memory" else 1):
                for side, result in zip(("ours", "theirs"), numbers):
                    result += run(world, name, side)
            a, b = map(statistics.median, numbers)
            print(f"{name:12}{unit:10}{a:10,.0f}{b:10,.0f}{a / b:8.2f}   {theirs}", flush=True)


if __name__ == "__main__":
    main()
