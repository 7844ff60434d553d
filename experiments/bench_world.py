"""The worlds of bench.py (a random Llama, pairs and prompts of chosen lengths) and our scripts."""
import json
import math
import os
import sys
import tempfile

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig,
                          TokenizersBackend)

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train_ppo, train_rm                                       # noqa: E401, E402

SMALL = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
         "num_attention_heads": 4, "max_position_embeddings": 512}
TINY = SMALL | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
LLAMA_1B = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 4096}
LLAMA_8B = LLAMA_1B | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
# pairs and responses of a step, tokens of a prompt and of a response (for pairs: the median)
WORK = {"pairs": 16, "steps": 10, "median": 100, "max_tokens": 512, "prompt": 64, "response": 64,
        "rollouts": 64, "batch": 16, "iterations": 4, "micro": 2048, "stop": 1e-9}
WORLDS = {
    "even": (SMALL, WORK),
    "ragged": (SMALL, WORK | {"stop": 1 / 32}),
    "tiny": (TINY, WORK | {"pairs": 4, "steps": 3, "rollouts": 8, "batch": 4, "iterations": 2}),
    "1B": (LLAMA_1B, {"pairs": 64, "steps": 5, "median": 400, "max_tokens": 2048, "prompt": 512,
                      "response": 512, "rollouts": 128, "batch": 32, "iterations": 2,
                      "micro": 16384, "stop": 1e-9})}


def make_world(world):
    """Tokenizer, SFT model, reward model, pairs and prompts; the folder's name is one of WORLDS."""
    shape, work = WORLDS[os.path.basename(world)]
    V, special = shape["vocab_size"], ["<pad>", "<eos>", "<user>", "<assistant>"]
    words = [f"w{i}" for i in range(V - len(special))]
    ids = {word: i for i, word in enumerate(special + words)}
    lookup = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    lookup.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = TokenizersBackend(tokenizer_object=lookup, pad_token="<pad>", eos_token="<eos>",
                                  additional_special_tokens=special[2:])
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}")
    config = LlamaConfig(**shape, num_labels=1, pad_token_id=0, bos_token_id=None, eos_token_id=1,
                         tie_word_embeddings=False)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.no_grad():
        dtype = torch.bfloat16 if V > 100000 else torch.float32
        sft = AutoModelForCausalLM.from_config(config, dtype=dtype)
        set_stop_probability(sft, work["stop"])
        sft.save_pretrained(f"{world}/sft")
        config.update({"segment_granularity": "segment", "segment_cutoff": 1.0,
                       "segment_model": f"{world}/sft"})
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
# our scripts in it: the lines of their metrics.jsonl, without the first
# --------------------------------------------------------------------------------------------------
def run_script(script, world, **flags):
    """A chapter's main, without its checkpoints."""
    work = WORLDS[os.path.basename(world)][1]
    script.save = lambda *args: None
    out = tempfile.mkdtemp(dir=world)
    script.main(script.Config(model=f"{world}/sft", out=out, micro_tokens=work["micro"],
                              grad_checkpoint=world.endswith("1B"), **flags))
    with open(f"{out}/metrics.jsonl") as f:
        return [json.loads(line) for line in f][1:]


def our_rm(world):
    work = WORLDS[os.path.basename(world)][1]
    return run_script(train_rm, world, data=f"{world}/pairs.jsonl", max_prompt_tokens=64,
                      eval_data=f"{world}/pairs_test.jsonl", max_tokens=work["max_tokens"],
                      batch_size=work["pairs"], epochs=1)


def our_ppo(world, dtype):
    work = WORLDS[os.path.basename(world)][1]
    return run_script(train_ppo, world, reward_model=f"{world}/rm", data=f"{world}/prompts.jsonl",
                      calibration_data=f"{world}/pairs_test.jsonl", dtype=dtype,
                      max_prompt_tokens=work["prompt"], max_new_tokens=work["response"],
                      generation_batch_size=64, rollout_batch_size=work["rollouts"],
                      batch_size=work["batch"], max_steps=work["iterations"], actor_lr=1e-6,
                      critic_lr=1e-6)
