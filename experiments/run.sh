#!/usr/bin/env bash
# Segment, token and bandit rewards in the embedded world: the runs behind experiments/README.md.
#
#     bash experiments/run.sh [OUT [DRAWS [JOBS]]]   # out/experiments, 5 draws, 2 jobs at a time
#     python experiments/figures.py                  # tables and pictures (needs matplotlib)
#
# A draw is an SFT model, its preference pairs and its reward models. Every finished run becomes one
# line of experiments/results.jsonl, and what has a line there is not run again. So an interrupted
# experiment goes on when the command is repeated; to measure anew, delete the lines first. Models
# and logs go to OUT, which is not committed. To try the script out in a minute:
#
#     RESULTS=/tmp/r.jsonl ONLY='^(rm-segment|segment-kl.03|oracle-.*)$' \
#         RM_FLAGS='--max_steps 9' PPO_FLAGS='--max_steps 2' bash experiments/run.sh /tmp/out 1
set -eu -o pipefail
cd "$(dirname "$0")/.."
export OUT=${1:-out/experiments} DRAWS=${2:-5} JOBS=${3:-2} OMP_NUM_THREADS=1
export RESULTS=${RESULTS:-experiments/results.jsonl} ONLY=${ONLY:-.}
export WORLD_FLAGS=${WORLD_FLAGS:-} RM_FLAGS=${RM_FLAGS:-} PPO_FLAGS=${PPO_FLAGS:-}
export JUDGE=data/reviews/prepare.py

# --------------------------------------------------------------------------------------------------
# what is run: DRAW NAME SEED REWARD_MODEL flags...
# --------------------------------------------------------------------------------------------------
few() { seq $((DRAWS < 3 ? DRAWS : 3)); }            # the draws of the ablations

reward_models() {
    for d in $(seq "$DRAWS"); do
        for g in segment token bandit; do echo "$d rm-$g 0 - --granularity $g"; done
    done
    for d in $(few); do
        for c in .5 3; do echo "$d rm-cutoff$c 0 - --cutoff $c"; done
    done
}
policies() {
    for kl in .03 .1 .01; do for s in 0 1; do for d in $(seq "$DRAWS"); do
        for g in segment token bandit; do echo "$d $g-kl$kl $s rm-$g --kl_coef $kl"; done
    done; done; done
    # the oracle: true clause values, given segment by segment or as one number
    for s in 0 1; do for d in $(seq "$DRAWS"); do for g in segment bandit; do
        echo "$d oracle-$g-kl.03 $s oracle --granularity $g --cutoff 1"
    done; done; done
    # ablations, to compare with segment-kl.03
    for d in $(few); do
        for n in global last none; do echo "$d normalizer-$n 0 rm-segment --normalizer $n"; done
        for i in repeat end; do echo "$d interpolation-$i 0 rm-segment --interpolation $i"; done
        for c in .5 3; do echo "$d cutoff$c 0 rm-cutoff$c"; done
        echo "$d segment-as-bandit 0 rm-segment --granularity bandit"
        echo "$d bandit-as-segment 0 rm-bandit --granularity segment --cutoff 1"
        echo "$d paper-scale 0 rm-segment --reward_scale none --kl_coef .01"
    done
}

# --------------------------------------------------------------------------------------------------
# how it is run
# --------------------------------------------------------------------------------------------------
missing() {  # of the runs on stdin, those that are wanted and have no line yet
    while read -r draw name seed rest; do
        [[ $name =~ $ONLY ]] || continue
        grep -qF "\"name\": \"$name\", \"draw\": $draw, \"seed\": $seed," "$RESULTS" ||
            echo "$draw $name $seed $rest"
    done
}
collect() { python experiments/collect.py "$@" "$RESULTS"; }

world() {  # DRAW
    [ -e "$OUT/draw$1/world.json" ] ||
        python $JUDGE --out "$OUT/draw$1" --seed "$1" $WORLD_FLAGS > "$OUT/draw$1.log" 2>&1 ||
        { echo "failed: $OUT/draw$1.log"; exit 255; }        # 255: xargs, and so this script, stops
}
reward_model() {  # DRAW NAME SEED - flags...
    local w=$OUT/draw$1 draw=$1 name=$2 seed=$3
    shift 4
    { python train_rm.py --model "$w/sft" --data "$w/pairs.jsonl" \
          --eval_data "$w/pairs_test.jsonl" --out "$w/$name" --seed "$seed" --save_every 1000 \
          --resume true "$@" $RM_FLAGS &&
      collect "$w/$name" "$name" "$draw" "$seed" "$*"
    } > "$w/$name.log" 2>&1 || { echo "failed: $w/$name.log"; exit 255; }
}
policy() {  # DRAW NAME SEED REWARD_MODEL flags...
    local w=$OUT/draw$1 draw=$1 name=$2 seed=$3 model=$OUT/draw$1/$4/model
    [ "$4" != oracle ] || model=$JUDGE:clause_values
    shift 4
    { python train_ppo.py --model "$w/sft" --data "$w/prompts.jsonl" --reward_model "$model" \
          --calibration_data "$w/pairs_test.jsonl" --gold $JUDGE:gold_reward --seed "$seed" \
          --out "$w/$name-s$seed" --save_every 1000 --sample_every 1000 --resume true "$@" \
          $PPO_FLAGS &&
      collect "$w/$name-s$seed" "$name" "$draw" "$seed" "$*"
    } > "$w/$name-s$seed.log" 2>&1 || echo "failed: $w/$name-s$seed.log"
}
export -f collect world reward_model policy
in_parallel() { xargs -r -d '\n' -P "$JOBS" -I{} bash -c "$1 {}"; }

mkdir -p "$OUT"
touch "$RESULTS"
todo=$(policies | missing)
# reward models without a line, and those that a policy still needs
needed=$(reward_models | while read -r draw name seed rest; do
    if grep -q "^$draw .* $name\( \|$\)" <<< "$todo"; then echo "$draw $name $seed $rest"; fi
done)
models=$({ reward_models | missing; echo "$needed"; } | sed '/^$/d' | sort -u)
{ echo "$todo"; echo "$models"; } | sed '/^$/d' | cut -d' ' -f1 | sort -u | in_parallel world
echo "$models" | sed '/^$/d' | in_parallel reward_model
echo "$todo" | sed '/^$/d' | in_parallel policy
echo "$(wc -l < "$RESULTS") lines in $RESULTS"
