#!/usr/bin/env bash
# Segment, token and bandit rewards on the embedded world: the figures and tables of the README.
#     bash assets/experiment.sh OUT [DRAWS] [JOBS]         # 5 draws, 2 jobs at a time: 1.5 hours on 2 cores
#     python assets/figures.py OUT                         # tables and pictures (needs matplotlib)
# A draw is an SFT model, its preference pairs and three reward models. Every stage skips what is finished, so an
# interrupted experiment goes on where it was when the command is given again.
set -eu
export OUT=$1 DRAWS=${2:-5} JOBS=${3:-2} OMP_NUM_THREADS=1
GOLD=data/reviews/prepare.py

draw() { # the world and its reward models
    local w=$OUT/draw$1
    [ -e $w/world.json ] || python data/reviews/prepare.py --out $w --seed $1
    for g in segment token bandit; do
        python train_rm.py --model $w/sft --data $w/pairs.jsonl --eval_data $w/pairs_test.jsonl --cache $w/cache \
            --granularity $g --out $w/rm-$g --seed $1 --resume true
    done
    python train_rm.py --model $w/sft --data $w/pairs.jsonl --eval_data $w/pairs_test.jsonl --cache $w/cache \
        --calibrate_only --oracle $GOLD:clause_values --out $w/rm-oracle --seed $1
}
ppo() { # ppo DRAW NAME REWARD_MODEL SEED flags...
    local w=$OUT/draw$1 name=$2 rm=$3 seed=$4; shift 4
    python train_ppo.py --model $w/sft --data $w/prompts.jsonl --reward_model $w/rm-$rm/model --out $w/$name-s$seed --seed $seed \
        --gold $GOLD:gold_reward --save_every 1000 --sample_every 1000 --resume true "$@" > $w/$name-s$seed.log 2>&1 ||
        echo "failed: $w/$name-s$seed.log"
}
export -f draw ppo; export GOLD
mkdir -p $OUT
seq $DRAWS | xargs -P $JOBS -I{} bash -c 'draw {} > $OUT/draw{}.log 2>&1 || echo "failed: $OUT/draw{}.log"'

methods() { # each method at this KL coefficient, two seeds
    for s in 0 1; do for d in $(seq $DRAWS); do for g in segment token bandit; do
        echo "ppo $d $g-kl$1 $g $s --kl_coef $1"
    done; done; done
}
{   for kl in .03 .1 .01; do methods $kl; done
    # the oracle: true clause rewards, at two placements
    for s in 0 1; do for d in $(seq $DRAWS); do for g in segment bandit; do
        echo "ppo $d oracle-$g oracle $s --oracle $GOLD:clause_values --granularity $g"
    done; done; done
    # ablations on the segment reward model: what else the paper varies, and what we added; compare with segment-kl.03
    for d in $(seq $((DRAWS < 3 ? DRAWS : 3))); do for s in 0; do
        for n in global last none; do echo "ppo $d normalizer-$n segment $s --normalizer $n"; done
        for i in repeat end; do echo "ppo $d interpolation-$i segment $s --interpolation $i"; done
        echo "ppo $d segment-as-bandit segment $s --granularity bandit"
        echo "ppo $d bandit-as-segment bandit $s --granularity segment"
        echo "ppo $d paper-scale segment $s --reward_scale none --kl_coef .01"
        echo "ppo $d critic-warmup segment $s --critic_warmup 3"
        echo "ppo $d critic-from-rm segment $s --critic_init reward_model"
    done; done
    # other cutoffs need their own reward model
    for d in $(seq $((DRAWS < 3 ? DRAWS : 3))); do for c in 0.5 3; do
        w=$OUT/draw$d
        echo "python train_rm.py --model $w/sft --data $w/pairs.jsonl --eval_data $w/pairs_test.jsonl --cache $w/cache --cutoff $c" \
             "--out $w/rm-cutoff$c --seed $d --resume true > $w/rm-cutoff$c.log 2>&1;" \
             "ppo $d cutoff-$c cutoff$c 0"
    done; done
} | xargs -d '\n' -P $JOBS -I{} bash -c '{}'
