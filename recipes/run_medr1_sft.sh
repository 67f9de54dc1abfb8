#!/usr/bin/env bash
# The supervised baseline: verl's own SFT trainer on the rows that GRPO trains on, same prompt, loss on the answer only.
#
#   bash recipes/run_medr1_sft.sh                                  no GPU, nothing set: the embedded default
#   DATA_DIR=data/omnimedvqa bash recipes/run_medr1_sft.sh         with GPUs: Qwen2-VL-2B-Instruct on your parquet
#   SHUFFLE_IMAGES=1 ... bash recipes/run_medr1_sft.sh             control: every row with another row's image
#   more arguments go to hydra last, and win
#
# Every variable below can be set from the environment.
{ # bash reads to the closing brace before it starts: an edit or a git pull does not reach a run that is on
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[[ "${1:-}" == -h || "${1:-}" == --help ]] && { sed -n '2,9p' "${BASH_SOURCE[0]}"; grep -E '^[A-Z_]+="\$\{' "${BASH_SOURCE[0]}" | sed 's/^/  /'; exit 0; }

choose_profile

RUN_NAME="${RUN_NAME:-medr1-sft-$PROFILE}"    # outputs go to RUNS_DIR/RUN_NAME; the same name resumes
RUNS_DIR="${RUNS_DIR:-$ROOT/runs}"
SEED="${SEED:-42}"
MODEL_PATH="${MODEL_PATH:-}"                  # Hugging Face folder or name; GPU default: Qwen/Qwen2-VL-2B-Instruct
DATA_DIR="${DATA_DIR:-}"                      # folder with train.parquet and test.parquet
STYLE="${STYLE:-}"                            # think | no-think | think-after; default: the rows' own
N_GPUS="${N_GPUS:-}"                          # GPUs of this node; default: all. On CPU: 1
NNODES="${NNODES:-1}"                         # several nodes: start the trainer by torchrun yourself, see DRY_RUN=1
SHUFFLE_IMAGES="${SHUFFLE_IMAGES:-0}"         # 1: control, nothing can be learned from the images
EVALUATE="${EVALUATE:-1}"                     # 0: no evaluation after training
EVAL_LIMIT="${EVAL_LIMIT:-}"                  # rows of the test file that the evaluation answers; empty: all
DRY_RUN="${DRY_RUN:-}"                        # 1: print verl's command line, one argument a line, and end
EMBEDDED="${EMBEDDED:-}"                      # 1: the embedded default (drawn images, tiny model), on a GPU too

[[ -z "$STYLE" ]] || require_one_of STYLE think no-think think-after
require_run_name
require_integer SEED 0
require_one_of SHUFFLE_IMAGES 0 1
require_one_of EVALUATE 0 1
[[ "$NNODES" == 1 ]] || die "NNODES=$NNODES: this recipe trains on one node; DRY_RUN=1 prints the arguments for your own torchrun"
choose_data_and_model
if [[ -z "$EMBEDDED" ]]; then
  # The released baseline's settings: learning rate 2e-5, cosine, a tenth of it warm-up, one epoch, batches of 128.
  TRAIN_BATCH_SIZE="${TRAIN_BATCH_SIZE:-128}"
  LR="${LR:-2e-5}"
  TOTAL_STEPS="${TOTAL_STEPS:-}"              # empty: TOTAL_EPOCHS decides
  MAX_PROMPT_LENGTH="${MAX_PROMPT_LENGTH:-1024}"
  MAX_RESPONSE_LENGTH="${MAX_RESPONSE_LENGTH:-256}"  # of the evaluation
else
  TRAIN_BATCH_SIZE="${TRAIN_BATCH_SIZE:-16}"
  LR="${LR:-3e-4}"
  TOTAL_STEPS="${TOTAL_STEPS:-40}"
  MAX_PROMPT_LENGTH="${MAX_PROMPT_LENGTH:-320}"
  MAX_RESPONSE_LENGTH="${MAX_RESPONSE_LENGTH:-40}"
  EVAL_LIMIT="${EVAL_LIMIT:-128}"
fi
TOTAL_EPOCHS="${TOTAL_EPOCHS:-1}"
SAVE_FREQ="${SAVE_FREQ:-200}"                 # the last step is saved in any case
for name in TRAIN_BATCH_SIZE MAX_PROMPT_LENGTH MAX_RESPONSE_LENGTH TOTAL_EPOCHS SAVE_FREQ; do require_integer "$name" 1; done
[[ -z "$TOTAL_STEPS" ]] || require_integer TOTAL_STEPS 1
if [[ "$PROFILE" == gpu ]]; then N_GPUS="${N_GPUS:-$(count_gpus)}"; else N_GPUS="${N_GPUS:-1}"; fi
require_integer N_GPUS 1
(( TRAIN_BATCH_SIZE % N_GPUS == 0 )) || die "TRAIN_BATCH_SIZE=$TRAIN_BATCH_SIZE is not a multiple of N_GPUS=$N_GPUS"

choose_python "$PROFILE,report"
RUN_DIR="$RUNS_DIR/$RUN_NAME"
hold_run_name "$RUN_DIR"
[[ -z "$EMBEDDED" || -n "$DRY_RUN" ]] || prepare_embedded

MODEL=(model.path="$MODEL_PATH")
choose_attention model
ENGINE=(
  engine.strategy=fsdp2
  engine.seed="$SEED"
  optim.lr="$LR"
  optim.lr_scheduler_type=cosine
  optim.lr_warmup_steps_ratio=0.1
  optim.weight_decay=0.0
  optim.clip_grad=1.0
)
DATA=(
  data.train_files="$RUN_DIR/train.sft.parquet"
  data.train_batch_size="$TRAIN_BATCH_SIZE"
  data.use_dynamic_bsz=True
  data.max_length=$((MAX_PROMPT_LENGTH + 32))
  data.max_token_len_per_gpu="${TOKENS_PER_GPU:-$((8 * (MAX_PROMPT_LENGTH + 32)))}"
  data.pad_mode=no_padding
  data.truncation=error
)
TRAINER=(
  trainer.project_name=medr1
  trainer.experiment_name="$RUN_NAME"
  trainer.logger='[console,file]'
  trainer.default_local_dir="$RUN_DIR/checkpoints"
  trainer.seed="$SEED"
  trainer.save_freq="$SAVE_FREQ"
  trainer.test_freq=-1
  trainer.max_ckpt_to_keep="${KEEP_CHECKPOINTS:-2}"
  trainer.n_gpus_per_node="$N_GPUS"
  trainer.total_epochs="$TOTAL_EPOCHS"
  trainer.resume_mode=auto
)
[[ -z "$TOTAL_STEPS" ]] || TRAINER+=(trainer.total_training_steps="$TOTAL_STEPS" trainer.total_epochs=1000)
if [[ "$PROFILE" == cpu ]]; then
  ENGINE+=(+engine.mixed_precision.param_dtype=fp32 engine.use_torch_compile=False)
  DATA+=(data.num_workers=0)
  TRAINER+=(trainer.device=cpu)
fi

TRAINING=("$PYTHON" -m torch.distributed.run --standalone --nnodes=1 --nproc_per_node="$N_GPUS" -m verl.trainer.sft_trainer
  "${MODEL[@]}" "${ENGINE[@]}" "${DATA[@]}" "${TRAINER[@]}"
  hydra.run.dir="$RUN_DIR" hydra.output_subdir=config hydra.job_logging.handlers.file.filename="$RUN_DIR/logs/driver.log" "$@")
if [[ -n "$DRY_RUN" ]]; then printf '%s\n' "${TRAINING[@]:1}"; exit 0; fi

mkdir -p "$RUN_DIR/logs"
settings="MODEL_PATH=$MODEL_PATH DATA_DIR=$DATA_DIR STYLE=$STYLE SEED=$SEED SHUFFLE_IMAGES=$SHUFFLE_IMAGES"
if [[ -f "$RUN_DIR/settings" && "$(cat "$RUN_DIR/settings")" != "$settings" ]]; then
  die "$RUN_DIR holds a run with $(cat "$RUN_DIR/settings"); set RUN_NAME to start another"
fi
echo "$settings" >"$RUN_DIR/settings"
if [[ ! -f "$RUN_DIR/model/config.json" ]]; then
  shuffle=()
  (( SHUFFLE_IMAGES )) && shuffle=(--shuffle-images "$SEED")
  rows="$("$PYTHON" -m medr1_verl.sft_rows --train "$DATA_DIR/train.parquet" --output "$RUN_DIR/train.sft.parquet" \
    ${STYLE:+--style "$STYLE"} "${shuffle[@]}" 9>&-)"
  (( rows >= TRAIN_BATCH_SIZE )) || die "$DATA_DIR/train.parquet has $rows rows, fewer than TRAIN_BATCH_SIZE=$TRAIN_BATCH_SIZE"
  say "Training $RUN_NAME: $(basename "$MODEL_PATH") on $rows rows, $PROFILE profile, logs in $RUN_DIR/logs"
  "$PYTHON" -m medr1_verl.supervise --run-dir "$RUN_DIR" \
    --steps "${TOTAL_STEPS:-$((rows / TRAIN_BATCH_SIZE * TOTAL_EPOCHS))}" -- "${TRAINING[@]}" 9>&-

  say "Merging the last checkpoint into a Hugging Face model"
  "$PYTHON" -m medr1_verl.merge "$RUN_DIR" 9>&-
fi

if [[ "$EVALUATE" == 1 ]]; then
  MODEL_PATH="$RUN_DIR/model" EVAL_NAME="$RUN_NAME" NO_TABLES=1 N_GPUS=1 EVAL_LIMIT="$EVAL_LIMIT" MAX_RESPONSE_LENGTH="$MAX_RESPONSE_LENGTH" \
    RUNS_DIR="$RUNS_DIR" RUN_NAME="$RUN_NAME" DATA_DIR="$DATA_DIR" STYLE="$STYLE" SEED="$SEED" DRY_RUN="" \
    bash "$ROOT/recipes/evaluate.sh" --pass none:0 blank:0 none:1 >"$RUN_DIR/logs/evaluate.log" 9>&-
fi
say "Done"
"$PYTHON" -m medr1_verl.summary "$RUN_DIR" --model "$MODEL_PATH" --seed "$SEED" 9>&-
tell_of_run "$RUN_DIR" "$DATA_DIR"
exit
}
