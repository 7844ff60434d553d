#!/usr/bin/env bash
# Segment, token and bandit rewards in the embedded world: the runs behind experiments/README.md.
#
#     bash experiments/run.sh [OUT [DRAWS [JOBS]]]   # out/experiments, 5 draws, 2 jobs at a time
#     python experiments/figures.py                  # tables and pictures (needs matplotlib)
#
# A draw is an SFT model, its preference pairs and its reward models. Every finished run becomes one
# line of experiments/results.jsonl, and what has a line there is not run again. So an interrupted
# experiment goes on when the command is repeated; to measure anew, delete the lines first. Models
# and logs go to OUT, which is not committed. To try the script out in two minutes:
#
#     RESULTS=/tmp/r.jsonl ONLY='^(rm-segment|segment-kl.03|oracle-.*)$' \
#         RM_FLAGS='--max_steps 9' PPO_FLAGS='--max_steps 2' bash experiments/run.sh /tmp/out 1
set -eu -o pipefail
cd "$(dirname "$0")/.."
export OUT=${1:-out/experiments} DRAWS=${2:-5} JOBS=${3:-2} OMP_NUM_THREADS=1
export RESULTS=${RESULTS:-experiments/results.jsonl} ONLY=${ONLY:-.}
export WORLD_FLAGS=${WORLD_FLAGS:-} RM_FLAGS=${RM_FLAGS:-} PPO_FLAGS=${PPO_FLAGS:-}
export TRUTH=data/reviews/prepare.py

# --------------------------------------------------------------------------------------------------
# what is run, in this order: DRAW WORLD NAME SEED REWARD_MODEL flags...
# --------------------------------------------------------------------------------------------------
draws() { seq "$1" $((DRAWS < $2 ? DRAWS : $2)); }

methods() {    # FIRST_DRAW LAST_DRAW SEED
    for d in $(draws "$1" "$2"); do
        for kl in .03 .1 .01; do for g in segment token bandit; do
            echo "$d plain $g-kl$kl $3 rm-$g --kl_coef $kl"
        done; done
        # the oracle: true clause values, given segment by segment or as one number
        for g in segment bandit; do
            echo "$d plain oracle-$g-kl.03 $3 oracle --granularity $g --cutoff 1"
        done
    done
}
amounts() {    # of preference data; 4,400 pairs are the plain world's
    for d in $(draws 1 3); do for pairs in 1000 12000; do
        for run in segment-kl.03 token-kl.1 bandit-kl.01; do
            echo "$d pairs$pairs pairs$pairs-$run 0 rm-${run%-*} --kl_coef ${run#*-kl}"
        done
    done; done
}
lengths() {    # of responses; those of the plain world have 12 clauses
    for d in $(draws 1 3); do
        for run in segment-kl.03 token-kl.1 bandit-kl.01 segment-kl.1 token-kl.3 bandit-kl.03; do
            echo "$d plain $run 0 rm-${run%-*} --kl_coef ${run#*-kl}"
            for clauses in 4 24; do
                echo "$d clauses$clauses clauses$clauses-$run 0 rm-${run%-*}" \
                    "--kl_coef ${run#*-kl} --max_new_tokens $((10 * clauses + 4))"
            done
        done
    done
}
ablations() {  # SEED; to compare with segment-kl.03
    for d in $(draws 1 3); do
        for n in global last none; do
            echo "$d plain normalizer-$n $1 rm-segment --normalizer $n"
        done
        for i in repeat end; do
            echo "$d plain interpolation-$i $1 rm-segment --interpolation $i"
        done
        for c in .5 3; do echo "$d plain cutoff$c $1 rm-cutoff$c"; done
        echo "$d plain segment-as-bandit $1 rm-segment --granularity bandit"
        echo "$d plain bandit-as-segment $1 rm-bandit --granularity segment --cutoff 1"
        echo "$d plain paper-scale $1 rm-segment --reward_scale none --kl_coef .01"
    done
}

# --------------------------------------------------------------------------------------------------
# how it is run
# --------------------------------------------------------------------------------------------------
folder() { if [ "$2" = plain ]; then echo "$OUT/draw$1"; else echo "$OUT/draw$1-$2"; fi; }
has_line() {      # NAME DRAW SEED
    grep -qF "\"name\": \"$1\", \"draw\": $2, \"seed\": $3," "$RESULTS"
}
collect() {       # FOLDER NAME DRAW SEED FLAGS: one line, also for a model that is made again
    has_line "$2" "$3" "$4" || python experiments/collect.py "$@" "$RESULTS"
}
missing() {       # of the runs on stdin, those that are wanted and have no line yet
    while read -r draw world name seed rest; do
        [[ $name =~ $ONLY ]] || continue
        has_line "$name" "$draw" "$seed" || echo "$draw $world $name $seed $rest"
    done
}

world() {         # DRAW WORLD
    local w; w=$(folder "$@")
    local flags=''
    case $2 in
        pairs*) flags="--pairs ${2#pairs}" ;;
        clauses*) flags="--clauses ${2#clauses}" ;;
    esac
    [ -e "$w/world.json" ] ||
        python $TRUTH --out "$w" --seed "$1" $flags $WORLD_FLAGS > "$w.log" 2>&1 ||
        { echo "failed: $w.log"; exit 255; }             # 255: xargs, and so this script, stops
}
reward_model() {  # DRAW WORLD NAME
    local w draw=$1 world=$2 name=$3 flags
    w=$(folder "$draw" "$world")
    case $name in
        rm-cutoff*) flags="--cutoff ${name#rm-cutoff}" ;;
        *) flags="--granularity ${name#rm-}" ;;
    esac
    [ "$world" != clauses24 ] || flags+=" --max_tokens 384"
    [ "$world" = plain ] || name=$world-$name
    # finished: a model and no checkpoint
    if [ -e "$w/$3/model" ] && [ ! -e "$w/$3/checkpoint" ] && has_line "$name" "$draw" 0; then
        return
    fi
    { python train_rm.py --model "$w/sft" --data "$w/pairs.jsonl" --out "$w/$3" --save_every 1000 \
          $flags $RM_FLAGS &&
      collect "$w/$3" "$name" "$draw" 0 "$flags"
    } > "$w/$3.log" 2>&1 || { echo "failed: $w/$3.log"; exit 255; }
}
policy() {        # DRAW WORLD NAME SEED REWARD_MODEL flags...
    local w draw=$1 name=$3 seed=$4 reward
    w=$(folder "$1" "$2")
    reward=("$w/$5/model")                               # it knows which pairs were held out
    [ "$5" != oracle ] ||
        reward=("$TRUTH:segment_values" --calibration_data "$w/pairs.jsonl:train[-400:]")
    shift 5
    { python train_ppo.py --model "$w/sft" --data "$w/prompts.jsonl" --seed "$seed" \
          --reward_model "${reward[@]}" --gold $TRUTH:gold_reward --out "$w/$name-s$seed" \
          --save_every 1000 --sample_every 1000 "$@" $PPO_FLAGS &&
      collect "$w/$name-s$seed" "$name" "$draw" "$seed" "$*"
    } > "$w/$name-s$seed.log" 2>&1 || echo "failed: $w/$name-s$seed.log"
}
export -f folder has_line collect world reward_model policy
in_parallel() { sed '/^$/d' | xargs -r -d '\n' -P "$JOBS" -I{} bash -c "$1 {}"; }

stage() {         # the runs on stdin: first their worlds, then their reward models, then they
    local todo; todo=$(missing)
    cut -d' ' -f1-2 <<< "$todo" | sort -u | in_parallel world
    cut -d' ' -f1,2,5 <<< "$todo" | { grep -v oracle || true; } | sort -u | in_parallel reward_model
    in_parallel policy <<< "$todo"
}

mkdir -p "$OUT"
touch "$RESULTS"
methods 1 3 0 | stage
methods 1 3 1 | stage
ablations 0 | stage
ablations 1 | stage
methods 4 5 0 | stage
methods 4 5 1 | stage
amounts | stage
lengths | stage
echo "$(wc -l < "$RESULTS") lines in $RESULTS"
