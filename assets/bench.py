"""How fast is this, next to what you would pick instead? Same machine, shapes, data and precision, taking turns.

    pip install trl==1.12.0 accelerate && python assets/bench.py          # about 15 minutes of one CPU core
    python assets/bench.py --only rm --rounds 1                           # one of: decode, rm, ppo, memory

Every side runs in a process of its own, ours and theirs in turn, so that whatever else the machine does hits both;
the table has the median over rounds and steps, without each process's first step. The model is a random Llama of
4 layers, d = 256, V = 1024, in fp32. Measured:

    decode  tokens/s of 64 responses to prompts of 32-96 tokens, response lengths geometric (mean 66, at most 192)
            and the same on both sides: train_ppo.generate | Hugging Face model.generate, both at temperature 1
    rm      real (unpadded) tokens/s of a training step on 16 pairs whose responses have log-normal lengths (median
            100, sigma 0.7, at most 512 tokens with the prompt): train_rm.py | TRL's RewardTrainer on the same ids
    ppo     tokens/s of one iteration: 64 rollouts x (64 prompt + 64 response tokens), one epoch of 4 minibatches, from
            sampling to the last optimizer step: train_ppo.py | TRL's PPOTrainer (experimental; 1.12 was its last release)
    memory  extra peak memory, forward and backward, of log-probs and entropies of 4,096 tokens at V = 128,256, d = 64:
            segment.token_logprobs_and_entropy | log_softmax of all the logits at once

TRL runs without gradient checkpointing (its default would cost it a third) and in fp32. It steps on all pairs at once,
as its users do; ours cuts the step into micro-batches of --micro_tokens 2048, sorted by length, to the same gradient.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
V, PAIRS, STEPS, ITERATIONS, DECODES = 1024, 16, 10, 3, 3                    # steps, iterations, decodes a round


# ------------------------------------------------------------------------------------------------------------
# A small world on disk: tokenizer, SFT model, reward model, pairs, prompts
# ------------------------------------------------------------------------------------------------------------
def make_world(world):
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig,
                              PreTrainedTokenizerFast)
    special = ["<pad>", "<eos>", "<user>", "<assistant>"]
    words = [f"w{i}" for i in range(V - len(special))]
    words_to_ids = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + words)}, unk_token="<pad>"))
    words_to_ids.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_to_ids, pad_token="<pad>", eos_token="<eos>",
                                        additional_special_tokens=special[2:])
    tokenizer.chat_template = ("{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eos> {% endfor %}"
                               "{% if add_generation_prompt %}<assistant> {% endif %}")
    config = LlamaConfig(vocab_size=V, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_labels=1,
                         num_attention_heads=4, max_position_embeddings=1024, pad_token_id=0, bos_token_id=None,
                         eos_token_id=1, tie_word_embeddings=False)
    torch.manual_seed(0)
    for kind, name in ((AutoModelForCausalLM, "sft"), (AutoModelForSequenceClassification, "rm")):
        kind.from_config(config, dtype=torch.float32).save_pretrained(f"{world}/{name}")
        tokenizer.save_pretrained(f"{world}/{name}")
    random = np.random.default_rng(0)

    def text(n):
        return " ".join(random.choice(words, n))

    def message(role, n):
        return {"role": role, "content": text(n)}

    with open(f"{world}/pairs.jsonl", "w") as f:
        for _ in range(PAIRS * STEPS + 64):                                  # + 64: held out, and to calibrate on
            prompt = message("user", 13)                                     # 16 tokens with the template's
            sides = [max(1, min(495, int(n) - 1)) for n in random.lognormal(np.log(100), 0.7, 2)]
            f.write(json.dumps({side: [prompt, message("assistant", n)] for side, n in zip(("chosen", "rejected"), sides)}) + "\n")
    with open(f"{world}/prompts.jsonl", "w") as f:
        f.writelines(json.dumps({"prompt": [message("user", 61)]}) + "\n" for _ in range(64 * ITERATIONS + 64))
    import train_rm
    train_rm.main(train_rm.Config(calibrate_only=True, reward_model=f"{world}/rm", **rm_flags(world)))


def rm_flags(world):
    return dict(model=f"{world}/sft", data=f"{world}/pairs.jsonl", eval_data="", cache=f"{world}/cache", max_tokens=512,
                max_prompt_tokens=64, batch_size=PAIRS, micro_tokens=2048, epochs=1, max_steps=STEPS)


def read_metrics(out):
    with open(f"{out}/metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def step_clock():
    """A Trainer callback, and the list of times at which its steps ended."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        times = []

        def on_step_end(self, args, state, control, **kwargs):
            self.times.append(time.time())

    return Clock(), Clock.times


# ------------------------------------------------------------------------------------------------------------
# The contestants. Each returns one number for each step it ran
# ------------------------------------------------------------------------------------------------------------
def decode(world, ours):
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM
    from train_ppo import generate
    model = AutoModelForCausalLM.from_pretrained(f"{world}/sft", dtype=torch.float32).eval()
    random, speeds = np.random.default_rng(0), []
    prompts = [random.integers(4, V, random.integers(32, 97)) for _ in range(64)]
    lengths = torch.from_numpy(np.minimum(random.geometric(1 / 66, 64), 192))
    P, eos = max(map(len, prompts)), torch.tensor([0])
    uniforms = 0.01 + 0.99 * torch.rand(64, 192)          # sampling is by inverse CDF: 0 draws token 0, more draws others
    uniforms[torch.arange(64), lengths - 1] = 0.0
    ids, mask = torch.zeros(64, P, dtype=torch.long), torch.zeros(64, P, dtype=torch.long)
    for b, p in enumerate(prompts):
        ids[b, P - len(p):], mask[b, P - len(p):] = torch.from_numpy(p), 1
    for _ in range(DECODES + 1):
        tick = time.time()
        if ours:
            assert generate(model, prompts, eos, 192, uniforms)[2].equal(lengths)
        else:
            model.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, temperature=1.0, max_new_tokens=192,
                           eos_token_id=None, pad_token_id=0,
                           stopping_criteria=[lambda tokens, scores: tokens.shape[1] - P >= lengths])
        speeds.append(int(lengths.sum()) / (time.time() - tick))
    return speeds[1:]


def rm(world, ours):
    if ours:
        import train_rm
        out = tempfile.mkdtemp(dir=world)
        train_rm.main(train_rm.Config(out=out, **rm_flags(world)))
        return [row["tokens_per_second"] for row in read_metrics(out)][1:]
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer
    data, tokenizer = Dataset.from_json(f"{world}/pairs.jsonl"), AutoTokenizer.from_pretrained(f"{world}/sft")
    clock, times = step_clock()
    args = RewardConfig(output_dir=f"{world}/trl", per_device_train_batch_size=PAIRS, max_steps=STEPS, max_length=512,
                        bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", save_strategy="no",
                        disable_tqdm=True, logging_steps=1)
    model = AutoModelForSequenceClassification.from_pretrained(f"{world}/rm")
    trainer = RewardTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[clock])
    trainer.train()
    tokens = [0.0] + [row["num_tokens"] for row in trainer.state.log_history if "num_tokens" in row]
    return [(b - a) / (t - s) for a, b, s, t in zip(tokens[1:], tokens[2:], times, times[1:])]


def ppo(world, ours):
    import torch
    if ours:
        import train_ppo
        out = tempfile.mkdtemp(dir=world)
        train_ppo.main(train_ppo.Config(
            model=f"{world}/sft", reward_model=f"{world}/rm", data=f"{world}/prompts.jsonl", out=out, max_prompt_tokens=64,
            max_new_tokens=64, rollout_batch_size=64, batch_size=16, max_steps=ITERATIONS + 1, actor_lr=1e-6, critic_lr=1e-6))
        return [row["tokens_per_second"] for row in read_metrics(out)][1:]
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    tokenizer = AutoTokenizer.from_pretrained(f"{world}/sft")
    data = Dataset.from_json(f"{world}/prompts.jsonl").map(lambda row: {"input_ids": tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, return_dict=False)}, remove_columns="prompt")
    clock, times = step_clock()
    args = PPOConfig(output_dir=f"{world}/trl", per_device_train_batch_size=64, num_mini_batches=4, num_ppo_epochs=1,
                     total_episodes=64 * (ITERATIONS + 1), response_length=64, temperature=1.0, learning_rate=1e-6,
                     local_rollout_forward_batch_size=64, num_sample_generations=0, bf16=False, use_cpu=True,
                     gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True)
    policy, reference = (AutoModelForCausalLM.from_pretrained(f"{world}/sft", dtype=torch.float32) for _ in range(2))
    reward, value = (AutoModelForSequenceClassification.from_pretrained(f"{world}/rm", dtype=torch.float32) for _ in range(2))
    PPOTrainer(args=args, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
               value_model=value, train_dataset=data, eval_dataset=data, callbacks=[clock]).train()
    return [64 * 128 / (t - s) for s, t in zip(times, times[1:])]


def memory(world, ours, n=4096, vocabulary=128256):
    import resource
    import torch
    from segment import token_logprobs_and_entropy

    def naive(hidden, weight, targets):
        logp = (hidden @ weight.T).log_softmax(-1)                           # (N, V)
        return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    def step(n, vocabulary):
        hidden, weight = torch.randn(n, 64).requires_grad_(), torch.randn(vocabulary, 64).requires_grad_()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        logp, entropy = (token_logprobs_and_entropy if ours else naive)(hidden, weight, torch.zeros(n, dtype=torch.long))
        (logp + entropy).sum().backward()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 10

    step(64, 64)                                                             # libraries load now
    return [step(n, vocabulary)]


# ------------------------------------------------------------------------------------------------------------
# Turns, medians, the table
# ------------------------------------------------------------------------------------------------------------
BENCHES = {"decode": (decode, "tokens/s", "Hugging Face generate"), "rm": (rm, "tokens/s", "TRL RewardTrainer"),
           "ppo": (ppo, "tokens/s", "TRL PPOTrainer"), "memory": (memory, "MiB extra", "all logits at once")}


def run(world, threads, *task):
    """This file again, in a process of its own."""
    path = f"{world}/result.json"
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__, "--worker", world, *task], env=env, stderr=subprocess.STDOUT,
                          stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(task)} failed:\n{done.stdout[-3000:]}")
    with open(path) as f:
        return json.load(f)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=BENCHES, help="this one alone")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        world, name, *side = args.worker
        result = BENCHES[name][0](world, side == ["ours"]) if side else make_world(world)
        with open(f"{world}/result.json", "w") as f:
            return json.dump(result, f)
    from importlib.metadata import version
    print(", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "trl", "accelerate")), f"| {args.threads} thread(s)")
    with tempfile.TemporaryDirectory() as world:
        run(world, args.threads, "world")
        print(f"{'':8}{'':10}{'ours':>10}{'theirs':>10}{'ratio':>8}   theirs is")
        for name, (_, unit, theirs) in BENCHES.items():
            if args.only in (None, name):
                numbers = {"ours": [], "theirs": []}
                for _ in range(args.rounds if name != "memory" else 1):
                    for side in numbers:
                        numbers[side] += run(world, args.threads, name, side)
                a, b = (statistics.median(x) for x in numbers.values())
                print(f"{name:8}{unit:10}{a:10,.0f}{b:10,.0f}{a / b:8.2f}   {theirs}", flush=True)


if __name__ == "__main__":
    main()
