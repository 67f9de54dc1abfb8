#!/usr/bin/env bash
# GRPO on one GPU, measured: step time by phase, tokens a second, peak memory beside the calculated one, agreement of
# rollout and actor; then TRL's GRPOTrainer with the same model, rows, batch and lengths, on the same GPU.
#
#   bash benchmarks/gpu_grpo.sh                              Qwen2-VL-2B with random weights, drawn images, 10 steps
#   DATA_DIR=data/omnimedvqa bash benchmarks/gpu_grpo.sh     your converted rows
#   PROFILE=cpu SHAPE=tiny STEPS=2 bash benchmarks/gpu_grpo.sh     a rehearsal where there is no GPU
#
# Random weights cost the same time and memory as trained ones; their answers run to the length limit, which a trained
# model's do not, so a step here is the longest there is. Nothing is downloaded. Variables of the recipe apply.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../recipes/common.sh"
source "$ROOT/recipes/presets.sh"
[[ "${1:-}" == -h || "${1:-}" == --help ]] && { sed -n '2,11p' "${BASH_SOURCE[0]}"; exit 0; }

choose_profile
default SHAPE Qwen/Qwen2-VL-2B-Instruct       # a Qwen2-VL or Qwen2.5-VL of docs/memory.md, or tiny
default STEPS 10
default SEED 42
default PRESET paper
default N_GPUS 1
default OUTPUT "$ROOT/runs/gpu-benchmark"     # data, model, runs and result.json
default DATA_DIR ""
default TRL_PYTHON ""                         # an interpreter that has trl and this package's requirements; default: the recipe's
require_integer STEPS 1
require_integer SEED 0
require_integer N_GPUS 1
apply_preset
choose_python "$PROFILE,report"
mkdir -p "$OUTPUT" || die "cannot write to OUTPUT=$OUTPUT"
OUTPUT="$(cd "$OUTPUT" && pwd)"
measure() { "$PYTHON" "$ROOT/benchmarks/gpu_grpo.py" "$@"; }

if [[ -z "$DATA_DIR" ]]; then
  DATA_DIR="$OUTPUT/data"
  if [[ ! -f "$DATA_DIR/train.parquet" ]]; then
    say "Drawing images and converting them at 384 x 384"
    "$PYTHON" -m medr1_verl.embedded.phantoms --output "$OUTPUT/raw" --seed "$SEED" --images-per-modality 40
    "$PYTHON" -m medr1_verl.cli convert --input "$OUTPUT/raw" --output "$DATA_DIR" --image-size 384 --seed "$SEED"
  fi
fi
[[ -f "$DATA_DIR/train.parquet" ]] || die "DATA_DIR=$DATA_DIR has no train.parquet; convert the data first"
MODEL="$OUTPUT/${SHAPE##*/}"
[[ -f "$MODEL/config.json" ]] || { say "Making $SHAPE with random weights"; measure model --shape "$SHAPE" --rows "$DATA_DIR/train.parquet" --output "$MODEL" --seed "$SEED"; }

export PROFILE PRESET SEED N_GPUS DATA_DIR TRAIN_BATCH_SIZE ROLLOUT_N MAX_PROMPT_LENGTH MAX_RESPONSE_LENGTH
say "$STEPS steps of the recipe, PRESET=$PRESET"
# GUARD=warn: answers of random weights have no format and no reward, which is what the guards look for.
measure watch --output "$OUTPUT/memory.json" -- env MODEL_PATH="$MODEL" RUNS_DIR="$OUTPUT" RUN_NAME=recipe RESUME=disable GUARD=warn EVALUATE=0 \
  TOTAL_STEPS="$STEPS" TEST_FREQ=-1 SAVE_FREQ="$STEPS" VAL_SAMPLES=4 KEEP_CHECKPOINTS=1 bash "$ROOT/recipes/run_medr1_grpo.sh" "$@"

default TRL_PYTHON "$PYTHON"
if "$TRL_PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("trl") is None)'; then
  say "$STEPS steps of TRL's GRPOTrainer, the same batch"
  PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" "$TRL_PYTHON" "$ROOT/benchmarks/gpu_grpo.py" trl --model "$MODEL" --rows "$DATA_DIR/train.parquet" --steps "$STEPS" --seed "$SEED" \
    --prompts "$TRAIN_BATCH_SIZE" --answers "$ROLLOUT_N" --max-response "$MAX_RESPONSE_LENGTH" --kl "$KL_COEF" --lr "$LR" --output "$OUTPUT/trl.json"
else
  say "TRL is not in $TRL_PYTHON, so nothing is compared; set TRL_PYTHON to an interpreter that has it"
fi
measure report --folder "$OUTPUT" --model "$MODEL"
