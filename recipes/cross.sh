# Sourced by run_cross_modality.sh and run_cross_task.sh, which set BY: train on one slice, test on all, for every slice.
# shellcheck shell=bash
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$ROOT/recipes/presets.sh"
[[ "${1:-}" == -h || "${1:-}" == --help ]] && { sed -n '2,9p' "$0"; grep -hE '^[A-Z_]+="\$\{' "${BASH_SOURCE[0]}" | sed 's/^/  /'; exit 0; }

choose_profile

METHOD="${METHOD:-grpo}"                      # grpo | sft: how each run is trained
RUN_NAME="${RUN_NAME:-cross-$BY-$PROFILE}"    # outputs go to RUNS_DIR/RUN_NAME; the same name goes on
RUNS_DIR="${RUNS_DIR:-$ROOT/runs}"
SLICES="${SLICES:-}"                          # train on these slices only, for example "ct mri"; default: all
MODEL_PATH="${MODEL_PATH:-}"                  # the base model; GPU default: Qwen/Qwen2-VL-2B-Instruct
DATA_DIR="${DATA_DIR:-}"                      # one train.parquet and test.parquet, or one folder for each slice
STYLE="${STYLE:-}"
SEED="${SEED:-42}"
CONTROLS="${CONTROLS:-none blank shuffled}"   # what each model is asked; none is the plain question
N_GPUS="${N_GPUS:-}"                          # GPUs of one run; default: all of the node over PARALLEL
NNODES="${NNODES:-1}"
PARALLEL="${PARALLEL:-1}"                     # runs at a time, each on its own GPUs
EVAL_LIMIT="${EVAL_LIMIT:-}"                  # test rows that each model answers; empty: all
EMBEDDED="${EMBEDDED:-}"                      # 1: drawn images and a tiny model; the default without GPU and data
DRY_RUN="${DRY_RUN:-}"                        # 1: print the plan and what it costs, and end

require_one_of METHOD grpo sft
[[ -z "$STYLE" ]] || require_one_of STYLE think no-think think-after
require_run_name
require_integer SEED 0
require_integer PARALLEL 1
require_integer NNODES 1
(( PARALLEL == 1 || NNODES == 1 )) || die "PARALLEL=$PARALLEL with NNODES=$NNODES: several runs at a time need a node of their own each"
[[ -z "$EVAL_LIMIT" ]] || require_integer EVAL_LIMIT 1
if [[ "$PROFILE" == gpu ]]; then
  gpus_here="$(count_gpus)"
  N_GPUS="${N_GPUS:-$((gpus_here / PARALLEL))}"
  (( N_GPUS >= 1 && (NNODES > 1 || N_GPUS * PARALLEL <= gpus_here) )) || die "PARALLEL=$PARALLEL runs of N_GPUS=$N_GPUS do not fit on $gpus_here GPUs"
else
  (( PARALLEL == 1 )) || die "PARALLEL=$PARALLEL: without GPUs one run at a time takes the whole machine"
  N_GPUS="${N_GPUS:-1}"
fi
choose_data_and_model
if [[ -z "$EMBEDDED" ]]; then
  if [[ "$METHOD" == grpo ]]; then apply_preset; else default TRAIN_BATCH_SIZE 128; default MAX_RESPONSE_LENGTH 256; fi
  export TRAIN_BATCH_SIZE MAX_RESPONSE_LENGTH
else
  # Few steps: every cell of the matrix is exercised for real, nobody learns much.
  export MAX_PROMPT_LENGTH="${MAX_PROMPT_LENGTH:-320}" MAX_RESPONSE_LENGTH="${MAX_RESPONSE_LENGTH:-40}" TEST_FREQ="${TEST_FREQ:--1}"
  export SAVE_FREQ="${SAVE_FREQ:-100}" VAL_SAMPLES="${VAL_SAMPLES:-8}" LR="${LR:-3e-4}" KL_COEF="${KL_COEF:-0.001}" ROLLOUT_N="${ROLLOUT_N:-4}"
  if [[ "$METHOD" == grpo ]]; then export TOTAL_STEPS="${TOTAL_STEPS:-3}" TRAIN_BATCH_SIZE="${TRAIN_BATCH_SIZE:-8}"
  else export TOTAL_STEPS="${TOTAL_STEPS:-20}" TRAIN_BATCH_SIZE="${TRAIN_BATCH_SIZE:-16}"; fi
  EVAL_LIMIT="${EVAL_LIMIT:-80}"
fi
export TOTAL_EPOCHS="${TOTAL_EPOCHS:-1}" STYLE SEED N_GPUS NNODES

choose_python "$PROFILE,report"
DIR="$RUNS_DIR/$RUN_NAME"
hold_run_name "$DIR"
[[ -z "$EMBEDDED" ]] || prepare_embedded ${DRY_RUN:+--data-only}

# --- the plan ----------------------------------------------------------------------------------------------------
slices="$("$PYTHON" -m medr1_verl.slices --data "$DATA_DIR" --output "$DIR/data" --by "$BY" 9>&-)"
declare -A train_rows=()
trained=()
test_rows=0
while read -r slug train test; do
  train_rows[$slug]=$train
  test_rows=$((test_rows + test))
  if (( train > 0 )) && [[ -z "$SLICES" || " $SLICES " == *" $slug "* ]]; then trained+=("$slug"); fi
done <<<"$slices"
for slug in $SLICES; do [[ " ${trained[*]-} " == *" $slug "* ]] || die "SLICES names $slug, which has no training rows in $DATA_DIR"; done
for slug in "${trained[@]-}"; do
  [[ -z "$slug" ]] || (( train_rows[$slug] >= TRAIN_BATCH_SIZE )) \
    || die "$slug has ${train_rows[$slug]} training rows, fewer than TRAIN_BATCH_SIZE=$TRAIN_BATCH_SIZE; set SLICES without it, or a smaller batch"
done
(( ${#trained[@]} )) || die "$DATA_DIR has no training rows of any $BY"
asked=$(( EVAL_LIMIT && EVAL_LIMIT < test_rows ? EVAL_LIMIT : test_rows ))
read -ra controls <<<"$CONTROLS"
[[ " $CONTROLS " == *" none "* ]] || die "CONTROLS=$CONTROLS lacks none, the plain question that the others are compared with"

is_trained() { [[ -f "$DIR/$METHOD-$1/model/config.json" && -f "$DIR/$METHOD-$1/summary.json" ]]; }
steps_of() { [[ -n "${TOTAL_STEPS:-}" ]] && echo "$TOTAL_STEPS" || echo $(( train_rows[$1] * TOTAL_EPOCHS / TRAIN_BATCH_SIZE )); }
print_plan() {
  local slug steps all=0 left=0 seconds
  say "Plan of $RUN_NAME: $METHOD on each of ${#trained[@]} slices by $BY, tested on all; $PARALLEL at a time, $N_GPUS GPU(s) each, in $DIR"
  for slug in "${trained[@]}"; do
    steps="$(steps_of "$slug")"
    all=$((all + steps))
    is_trained "$slug" || left=$((left + steps))
    printf '  %-30s %7d training rows %7d steps%s\n' "$METHOD-$slug" "${train_rows[$slug]}" "$steps" "$(is_trained "$slug" && echo '  (done)')"
  done
  printf '  %-30s %7d steps of %d rows' "all training" "$all" "$TRAIN_BATCH_SIZE"
  [[ "$METHOD" == grpo ]] && printf ', %d sampled answers' $((all * TRAIN_BATCH_SIZE * ROLLOUT_N))
  printf '; %d steps are left\n' "$left"
  printf '  %-30s %7d answers: %d test rows x (%d runs and the base) x %d controls, %d new tokens at most\n' "evaluation" \
    $((asked * (${#trained[@]} + 1) * ${#controls[@]})) "$asked" "${#trained[@]}" "${#controls[@]}" "$MAX_RESPONSE_LENGTH"
  seconds="$("$PYTHON" - "$DIR" "$METHOD" <<'PY'
import json, pathlib, sys
runs = [json.loads(p.read_text()) for p in pathlib.Path(sys.argv[1]).glob(f"{sys.argv[2]}-*/summary.json")]
steps, seconds = sum(r["steps"] for r in runs), sum(r["seconds"] for r in runs)
print(f"{seconds / steps:.1f}" if steps else "")
PY
)"
  (( left > 0 )) || return 0
  if [[ -n "$seconds" ]]; then
    printf '  %-30s %s s a step, start-up included: about %.1f h of training are left\n' "measured on finished runs" "$seconds" \
      "$(awk "BEGIN { print $seconds * $left / $PARALLEL / 3600 }")"
  else
    printf '  %-30s no run has finished yet; the time is told from the first one on\n' "measured"
  fi
}
print_plan
[[ -z "$DRY_RUN" ]] || exit 0

# --- train and evaluate, each run where it stopped -----------------------------------------------------------------
evaluate_one() { # name, model
  MODEL_PATH="$2" DATA_DIR="$DIR/data" RUNS_DIR="$DIR" RUN_NAME="$1" EVAL_NAME="$1" NO_TABLES=1 CONTROLS="$CONTROLS" EVAL_LIMIT="$EVAL_LIMIT" \
    NNODES=1 bash "$ROOT/recipes/evaluate.sh"
}
one_slice() {
  local slug="$1" name="$METHOD-$1"
  if ! is_trained "$slug"; then
    say "$name: training"
    MODEL_PATH="$MODEL_PATH" DATA_DIR="$DIR/data/$slug" RUNS_DIR="$DIR" RUN_NAME="$name" EVALUATE=0 EMBEDDED="" \
      bash "$ROOT/recipes/run_medr1_$METHOD.sh" || return 1
  fi
  say "$name: evaluation on all slices"
  evaluate_one "$name" "$DIR/$name/model" && tell_of_run "$DIR/$name" "$DIR/data"
}
lane() { # number: every PARALLEL-th slice, on this lane's GPUs
  local number="$1" index failed=0
  if [[ "$PROFILE" == gpu && "$NNODES" == 1 ]]; then
    CUDA_VISIBLE_DEVICES="$(seq -s, $((number * N_GPUS)) $(((number + 1) * N_GPUS - 1)))"
    export CUDA_VISIBLE_DEVICES
  fi
  (( number == 0 )) && { say "base: evaluation on all slices"; evaluate_one base "$MODEL_PATH" || failed=1; }
  for (( index = number; index < ${#trained[@]}; index += PARALLEL )); do
    one_slice "${trained[index]}" || { echo "${trained[index]} failed; the others go on" >&2; failed=1; }
  done
  return $failed
}
# Ctrl-C or a kill ends everything that was started, at once: a lane is a process group of its own.
lanes=()
end_lanes() { # and wait, a minute at most, until what they had started has cleaned up
  local pid
  for pid in "${lanes[@]-}"; do [[ -z "$pid" ]] || kill -- "-$pid" 2>/dev/null || true; done
  wait
  for pid in "${lanes[@]-}"; do
    for _ in {1..300}; do [[ -n "$pid" ]] && kill -0 -- "-$pid" 2>/dev/null || break; sleep 0.2; done
  done
}
trap end_lanes EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
set -m
for (( number = 0; number < PARALLEL; number++ )); do { set +m; lane "$number"; } 9>&- & lanes+=($!); done
set +m
for pid in "${lanes[@]}"; do wait "$pid" || failed=1; done
lanes=()
[[ -z "${failed:-}" ]] || die "some runs failed, see above; the same command goes on with what is missing"

say "Tables"
[[ ! -f "$DATA_DIR/manifest.json" ]] || "$PYTHON" -m medr1_verl.cli card data "$DATA_DIR" --output "$DIR/data-card.md" 9>&-
"$PYTHON" -m medr1_verl.cli tables "$DIR/base" "${trained[@]/#/$DIR/$METHOD-}" --base base --train "$DIR/data" --output "$DIR/tables" 9>&- | tail -n 1
say "Done: $DIR/tables/tables.md"
