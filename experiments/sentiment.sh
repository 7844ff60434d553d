#!/usr/bin/env bash
# Segment, token and bandit rewards for a real language model whose answers are worth their
# sentences' sentiment (experiments/sentiment.py).
#
#     pip install vaderSentiment
#     bash experiments/sentiment.sh MODEL [OUT [JOBS]]     # out/sentiment, 2 jobs at a time
#     python experiments/sentiment_figures.py              # tables, samples and a picture
#
# It goes on where it was, as run.sh does: what has a line in experiments/results.jsonl is not run
# again, and what was interrupted goes on from its checkpoint. Paths are the repository's. The flags
# of a method can be tried on a seed that the experiment does not use, with the same reward models:
#
#     RESULTS=/tmp/pilot.jsonl SEEDS=9 METHODS='segment:.1 bandit:.03' \
#         PPO_FLAGS='--max_steps 8' bash experiments/sentiment.sh MODEL
set -eu -o pipefail
cd "$(dirname "$0")/.."
export MODEL=${1:?a chat model: a folder or a hub id} OUT=${2:-out/sentiment} JOBS=${3:-2}
export RESULTS=${RESULTS:-experiments/results.jsonl} TRUTH=experiments/sentiment.py
export WORLD_FLAGS=${WORLD_FLAGS:-} RM_FLAGS=${RM_FLAGS:-} PPO_FLAGS=${PPO_FLAGS:-}
export DTYPE=${DTYPE:-bf16} OMP_NUM_THREADS=1
SEEDS=${SEEDS:-0 1 2}
# each at the KL coefficient that should bring it to a similar KL
METHODS=${METHODS:-segment:.03 token:.1 bandit:.03 oracle-segment:.03 oracle-bandit:.01}
export RM="--lr 2e-4 --epochs 1 --batch_size 16"
export PPO="--max_steps 15 --rollout_batch_size 32 --batch_size 8 --actor_lr 5e-5 --critic_lr 3e-4"

has_line() {      # NAME SEED
    grep -qF "\"name\": \"$1\", \"draw\": 0, \"seed\": $2," "$RESULTS"
}
value() { python -c "import json; print(json.load(open('$OUT/world.json'))['$1'])"; }
reward_model() {  # GRANULARITY
    local run=$OUT/rm-$1
    [ -e "$run/model" ] && [ ! -e "$run/checkpoint" ] && has_line "sentiment-rm-$1" 0 && return
    { python train_rm.py --model "$MODEL" --data "$OUT/pairs.jsonl" --out "$run" --dtype "$DTYPE" \
          --granularity "$1" --cutoff "$CUTOFF" --held_out "$HELD_OUT" --save_every 100 \
          --max_prompt_tokens "$P" --max_tokens $((P + R)) $RM $RM_FLAGS &&
      { has_line "sentiment-rm-$1" 0 ||
        python experiments/collect.py "$run" "sentiment-rm-$1" 0 0 "$RM $RM_FLAGS" "$RESULTS"; }
    } > "$run.log" 2>&1 || { echo "failed: $run.log"; exit 255; }    # 255: xargs stops
}
policy() {        # METHOD:KL_COEFFICIENT SEED
    local method=${1%:*} kl=${1#*:} seed=$2
    local name=sentiment-$method-kl$kl run=$OUT/$method-kl$kl-s$seed g=${method#oracle-}
    local judge=$OUT/rm-$g/model reward=("$OUT/rm-$g/model")
    has_line "$name" "$seed" && return
    if [ "$method" != "$g" ]; then
        judge=$TRUTH:gold_reward
        reward=("$TRUTH:segment_values" --granularity "$g" --cutoff "$CUTOFF"
                --calibration_data "$OUT/pairs.jsonl:train[-$HELD_OUT:]")
        # true values sum to the gold reward; less the mean at their location they would not
        [ "$g" = bandit ] || reward+=(--normalizer none)
    fi
    local lengths="--max_prompt_tokens $P --max_new_tokens $R --generation_batch_size 32"
    # most answers are cut: a price for that would be noise
    { python train_ppo.py --model "$MODEL" --data "$OUT/prompts.jsonl" --out "$run" --seed "$seed" \
          --reward_model "${reward[@]}" --gold $TRUTH:gold_reward --kl_coef "$kl" \
          --missing_eos_reward 0 --dtype "$DTYPE" $lengths $PPO $PPO_FLAGS &&
      python evaluate.py --model "$run/model" --baseline "$OUT/answers.json" --judge "$judge" \
          --data "$OUT/prompts_test.jsonl" --out "$run-answers" --html true --dtype "$DTYPE" \
          $lengths &&
      python experiments/collect.py "$run" "$name" 0 "$seed" "--kl_coef $kl $PPO $PPO_FLAGS" \
          "$RESULTS"
    } > "$run.log" 2>&1 || echo "failed: $run.log"
}
export -f has_line reward_model policy
in_parallel() { xargs -r -d '\n' -P "$JOBS" -I{} bash -c "$1 {}"; }

mkdir -p "$OUT"
touch "$RESULTS"
[ -e "$OUT/world.json" ] ||
    torchrun --nproc_per_node="$JOBS" $TRUTH --model "$MODEL" --out "$OUT" --dtype "$DTYPE" \
        $WORLD_FLAGS > "$OUT.log" 2>&1 || { echo "failed: $OUT.log"; exit 1; }
CUTOFF=$(value cutoff) HELD_OUT=$(value held_out) P=$(value prompt_tokens) R=$(value answer_tokens)
export CUTOFF HELD_OUT P R
for method in $METHODS; do echo "${method%:*}"; done | { grep -v oracle || true; } | sort -u |
    in_parallel reward_model
for seed in $SEEDS; do for method in $METHODS; do echo "$method $seed"; done; done |
    in_parallel policy
echo "$(wc -l < "$RESULTS") lines in $RESULTS"
