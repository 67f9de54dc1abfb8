#!/usr/bin/env bash
# Does the blank-image control tell a model that looks from one that does not? On phantoms: the warm-started tiny model,
# GRPO from it, supervised training from it, and supervised training on shuffled images, in one table.
#
#   bash benchmarks/image_control.sh               20-40 minutes on 2 cores; what is done already is not done again
#   RUNS_DIR=... MODEL_PATH=... DATA_DIR=... bash benchmarks/image_control.sh    a model and data of yours
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../recipes/common.sh"
export PROFILE=cpu RUNS_DIR="${RUNS_DIR:-$ROOT/runs/image-control}" SEED="${SEED:-42}" EVAL_LIMIT="${EVAL_LIMIT:-512}"
export MAX_PROMPT_LENGTH="${MAX_PROMPT_LENGTH:-320}" MAX_RESPONSE_LENGTH="${MAX_RESPONSE_LENGTH:-40}"
choose_profile
choose_python "cpu,report"
if [[ -z "${MODEL_PATH:-}" ]]; then
  embedded="$("$PYTHON" -m medr1_verl.embedded.prepare --root "${EMBEDDED_DIR:-$ROOT/data/embedded}" --seed "$SEED")"
  MODEL_PATH="$embedded/model" DATA_DIR="$embedded/data"
fi
export MODEL_PATH DATA_DIR
mkdir -p "$RUNS_DIR"

CONTROLS="none blank" NO_TABLES=1 RUN_NAME=warm-start bash "$ROOT/recipes/evaluate.sh"
for run in sft sft-shuffled-images; do
  [[ -f "$RUNS_DIR/$run/summary.json" ]] || SHUFFLE_IMAGES=$([[ $run == sft ]] && echo 0 || echo 1) RUN_NAME=$run \
    TRAIN_BATCH_SIZE=16 TOTAL_STEPS="${SFT_STEPS:-40}" LR="${SFT_LR:-3e-4}" bash "$ROOT/recipes/run_medr1_sft.sh"
done
# GRPO as the embedded default does it, unless the model and the data are yours.
[[ -f "$RUNS_DIR/grpo/summary.json" ]] || EMBEDDED="${embedded:+1}" RUN_NAME=grpo TOTAL_STEPS="${GRPO_STEPS:-50}" EVALUATE=0 bash "$ROOT/recipes/run_medr1_grpo.sh"
CONTROLS="none blank" NO_TABLES=1 RUN_NAME=grpo MODEL_PATH="$RUNS_DIR/grpo/model" bash "$ROOT/recipes/evaluate.sh"
"$PYTHON" -m medr1_verl.cli tables warm-start="$RUNS_DIR/warm-start" grpo="$RUNS_DIR/grpo" sft="$RUNS_DIR/sft" \
  sft-shuffled-images="$RUNS_DIR/sft-shuffled-images" --base warm-start --train "$DATA_DIR" --output "$RUNS_DIR/tables"
