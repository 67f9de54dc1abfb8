#!/usr/bin/env bash
# Med-R1: GRPO on Qwen2-VL with verl's own FSDP trainer and vLLM rollouts.
#
#   bash recipes/run_medr1_grpo.sh                                       no GPU, nothing set: the embedded default
#   DATA_DIR=data/omnimedvqa bash recipes/run_medr1_grpo.sh              with GPUs: Qwen2-VL-2B-Instruct on your parquet
#   DATA_DIR=... bash recipes/run_medr1_grpo.sh trainer.test_freq=50     more arguments go to hydra last, and win
#
# Every variable below can be set from the environment.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[[ "${1:-}" == -h || "${1:-}" == --help ]] && { sed -n '2,9p' "${BASH_SOURCE[0]}"; grep -E '^[A-Z_]+="\$\{' "${BASH_SOURCE[0]}" | sed 's/^/  /'; exit 0; }

choose_profile

# --- what to run: variable, default, meaning ---------------------------------------------------------------------
RUN_NAME="${RUN_NAME:-medr1-grpo-$PROFILE}"   # outputs go to RUNS_DIR/RUN_NAME; the same name resumes
RUNS_DIR="${RUNS_DIR:-$ROOT/runs}"
SEED="${SEED:-42}"
MODEL_PATH="${MODEL_PATH:-}"                  # Hugging Face folder or name; GPU default: Qwen/Qwen2-VL-2B-Instruct
DATA_DIR="${DATA_DIR:-}"                      # folder with train.parquet and test.parquet
STYLE="${STYLE:-}"                            # think | no-think | think-after; default: the rows' own
N_GPUS="${N_GPUS:-}"                          # GPUs of each node; default: all. On CPU: logical ones, 1
NNODES="${NNODES:-1}"
RESUME="${RESUME:-auto}"                      # auto: go on from the last checkpoint of this name; disable: start anew
GUARD="${GUARD:-stop}"                        # stop | warn | off: what to do when rollout and actor disagree
DRY_RUN="${DRY_RUN:-}"                        # 1: print verl's command line, one argument a line, and end
EMBEDDED="${EMBEDDED:-}"                      # 1: the embedded default (drawn images, tiny model), on a GPU too

require_one_of RESUME auto disable
require_one_of GUARD stop warn off
[[ -z "$STYLE" ]] || require_one_of STYLE think no-think think-after
require_run_name
require_integer SEED 0
require_integer NNODES 1
choose_data_and_model

# --- how to train ------------------------------------------------------------------------------------------------
if [[ -n "$EMBEDDED" ]]; then
  TRAIN_BATCH_SIZE="${TRAIN_BATCH_SIZE:-8}"   # prompts a step
  TOTAL_STEPS="${TOTAL_STEPS:-20}"
  ROLLOUT_N="${ROLLOUT_N:-4}"                 # answers a prompt: the group of GRPO
  LR="${LR:-1e-4}"
  KL_COEF="${KL_COEF:-0.001}"
  MAX_PROMPT_LENGTH="${MAX_PROMPT_LENGTH:-320}"
  MAX_RESPONSE_LENGTH="${MAX_RESPONSE_LENGTH:-40}"
  TEST_FREQ="${TEST_FREQ:--1}"                # validate at the start and the end only
  SAVE_FREQ="${SAVE_FREQ:-10}"
  VAL_SAMPLES="${VAL_SAMPLES:-64}"
  EVAL_LIMIT="${EVAL_LIMIT:-128}"
else
  # The paper's settings: 4 prompts x 4 answers a step, one epoch, temperature 1, KL 0.04 in the loss.
  TRAIN_BATCH_SIZE="${TRAIN_BATCH_SIZE:-4}"
  TOTAL_STEPS="${TOTAL_STEPS:-}"              # empty: TOTAL_EPOCHS decides
  ROLLOUT_N="${ROLLOUT_N:-4}"
  LR="${LR:-1e-6}"
  KL_COEF="${KL_COEF:-0.04}"
  MAX_PROMPT_LENGTH="${MAX_PROMPT_LENGTH:-1024}"
  MAX_RESPONSE_LENGTH="${MAX_RESPONSE_LENGTH:-256}"
  TEST_FREQ="${TEST_FREQ:-100}"
  SAVE_FREQ="${SAVE_FREQ:-200}"
  VAL_SAMPLES="${VAL_SAMPLES:-512}"           # rows of the test file used for the validation curve; -1: all
fi
TOTAL_EPOCHS="${TOTAL_EPOCHS:-1}"
MINI_BATCH_SIZE="${MINI_BATCH_SIZE:-$TRAIN_BATCH_SIZE}"
TOKENS_PER_GPU="${TOKENS_PER_GPU:-$((8 * (MAX_PROMPT_LENGTH + MAX_RESPONSE_LENGTH)))}"  # tokens of one forward pass
TEMPERATURE="${TEMPERATURE:-1.0}"
EVALUATE="${EVALUATE:-1}"                     # 0: no evaluation after training
EVAL_LIMIT="${EVAL_LIMIT:-}"                  # rows of the test file that the final evaluation answers; empty: all
AUDIT_KEY="${AUDIT_KEY:-}"                    # Ed25519 private key (file) that signs the audit log
for name in TRAIN_BATCH_SIZE ROLLOUT_N MAX_PROMPT_LENGTH MAX_RESPONSE_LENGTH TOTAL_EPOCHS MINI_BATCH_SIZE; do require_integer "$name" 1; done
[[ -z "$TOTAL_STEPS" ]] || require_integer TOTAL_STEPS 1
require_one_of EVALUATE 0 1
(( ROLLOUT_N > 1 )) || die "ROLLOUT_N=1: GRPO compares the answers of a group, so it needs at least 2"
if [[ "$PROFILE" == gpu ]]; then
  gpus_here="$(count_gpus)"
  N_GPUS="${N_GPUS:-$gpus_here}"
  require_integer N_GPUS 1
  (( NNODES > 1 || N_GPUS <= gpus_here )) || die "N_GPUS=$N_GPUS, but this machine has $gpus_here"
else
  N_GPUS="${N_GPUS:-1}"
  require_integer N_GPUS 1
fi

choose_python "$PROFILE,report"
RUN_DIR="$RUNS_DIR/$RUN_NAME"
hold_run_name "$RUN_DIR"
[[ -z "$EMBEDDED" || -n "$DRY_RUN" ]] || prepare_embedded
TRAIN_FILE="$DATA_DIR/train.parquet"
VAL_FILE="$DATA_DIR/test.parquet"

[[ -n "$DRY_RUN" ]] || "$PYTHON" -m medr1_verl.preflight --profile "$PROFILE" --run-dir "$RUN_DIR" \
  --train "$TRAIN_FILE" --val "$VAL_FILE" --model "$MODEL_PATH" --train-batch "$TRAIN_BATCH_SIZE" --mini-batch "$MINI_BATCH_SIZE" \
  --samples "$ROLLOUT_N" --gpus $((N_GPUS * NNODES)) --max-prompt "$MAX_PROMPT_LENGTH" --max-response "$MAX_RESPONSE_LENGTH" \
  --tokens-per-gpu "$TOKENS_PER_GPU" 9>&-

# --- what verl is told ---------------------------------------------------------------------------------------------
DATA=(
  data.train_files="$TRAIN_FILE"
  data.val_files="$VAL_FILE"
  data.image_key=images
  data.train_batch_size="$TRAIN_BATCH_SIZE"
  data.val_max_samples="$VAL_SAMPLES"
  data.max_prompt_length="$MAX_PROMPT_LENGTH"
  data.max_response_length="$MAX_RESPONSE_LENGTH"
  data.seed="$SEED"
  data.shuffle=True               # OmniMedVQA's files are grouped by data set
  data.filter_overlong_prompts=False  # the filter drops a row on any exception, without a count
  data.truncation=error
)
MODEL=(actor_rollout_ref.model.path="$MODEL_PATH")
choose_attention actor_rollout_ref.model
ACTOR=(
  actor_rollout_ref.actor.strategy=fsdp2
  actor_rollout_ref.actor.optim.lr="$LR"
  actor_rollout_ref.actor.ppo_mini_batch_size="$MINI_BATCH_SIZE"
  actor_rollout_ref.actor.use_kl_loss=True
  actor_rollout_ref.actor.kl_loss_coef="$KL_COEF"
  actor_rollout_ref.actor.kl_loss_type=low_var_kl           # the k3 estimator, as in the paper's code
  actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean # original GRPO: mean over tokens, then over answers
  actor_rollout_ref.actor.entropy_coeff=0
  # Batches by tokens. By rows, verl 0.9.1 cannot split the ragged 3-D position ids of Qwen2-VL (pytorch#153238).
  actor_rollout_ref.actor.use_dynamic_bsz=True
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu="$TOKENS_PER_GPU"
  actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True
  actor_rollout_ref.ref.log_prob_max_token_len_per_gpu="$TOKENS_PER_GPU"
  actor_rollout_ref.actor.data_loader_seed="$SEED"
)
ROLLOUT=(
  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.n="$ROLLOUT_N"
  actor_rollout_ref.rollout.temperature="$TEMPERATURE"
  actor_rollout_ref.rollout.tensor_model_parallel_size="${ROLLOUT_TP:-1}"
  actor_rollout_ref.rollout.max_model_len=$((MAX_PROMPT_LENGTH + MAX_RESPONSE_LENGTH))
  # verl's default, dummy, leaves vLLM >= 0.28 with random pixel normalisation: a blind engine, and no error.
  actor_rollout_ref.rollout.load_format=auto
  actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True   # must equal the actor's
  actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu="$TOKENS_PER_GPU"
  actor_rollout_ref.rollout.calculate_log_probs=True        # for training/rollout_actor_probs_pearson_corr
  actor_rollout_ref.rollout.seed="$SEED"
  actor_rollout_ref.rollout.val_kwargs.do_sample=True       # the validation curve is sampled as in training
  actor_rollout_ref.rollout.val_kwargs.temperature=1.0
)
REWARD=(
  reward.custom_reward_function.path=pkg://medr1_verl.reward
  reward.custom_reward_function.name=compute_score
)
TRAINER=(
  algorithm.adv_estimator=grpo
  algorithm.use_kl_in_reward=False
  trainer.project_name=medr1
  trainer.experiment_name="$RUN_NAME"
  trainer.logger='[console,file]'
  trainer.default_local_dir="$RUN_DIR/checkpoints"
  trainer.validation_data_dir="$RUN_DIR/validation"
  trainer.n_gpus_per_node="$N_GPUS"
  trainer.nnodes="$NNODES"
  trainer.val_before_train=True
  trainer.test_freq="$TEST_FREQ"
  trainer.save_freq="$SAVE_FREQ"
  trainer.max_actor_ckpt_to_keep="${KEEP_CHECKPOINTS:-2}"
  trainer.total_epochs="$TOTAL_EPOCHS"
  trainer.resume_mode="$RESUME"
)
[[ -z "$TOTAL_STEPS" ]] || TRAINER+=(trainer.total_training_steps="$TOTAL_STEPS" trainer.total_epochs=1000)
[[ -z "$STYLE" ]] || {
  DATA+=(data.custom_cls.path=pkg://medr1_verl.dataset data.custom_cls.name=MedVQADataset +data.medr1.style="$STYLE")
  REWARD+=(+reward.custom_reward_function.reward_kwargs.style="$STYLE")
}

if [[ "$PROFILE" == gpu ]]; then
  ACTOR+=(actor_rollout_ref.ref.fsdp_config.param_offload=True)
  ROLLOUT+=(
    actor_rollout_ref.rollout.gpu_memory_utilization="${GPU_MEMORY_UTILIZATION:-0.6}"
    actor_rollout_ref.rollout.enable_chunked_prefill=False      # an image must not be split over two chunks
    actor_rollout_ref.rollout.max_num_batched_tokens="${MAX_BATCHED_TOKENS:-8192}"
    actor_rollout_ref.rollout.enforce_eager=False
    actor_rollout_ref.rollout.free_cache_engine=True
  )
else
  # Everything the CPU needs and a GPU does not. The rest of the CPU platform is in medr1_verl/cpu.
  ACTOR+=(
    actor_rollout_ref.actor.fsdp_config.model_dtype=fp32
    actor_rollout_ref.actor.fsdp_config.dtype=float32           # bf16 autocast is no faster here, and less exact
    actor_rollout_ref.ref.fsdp_config.dtype=float32
    actor_rollout_ref.actor.use_torch_compile=False
    actor_rollout_ref.actor.fsdp_config.use_torch_compile=False
  )
  ROLLOUT+=(
    actor_rollout_ref.rollout.dtype=float32
    actor_rollout_ref.rollout.enforce_eager=True
    +actor_rollout_ref.rollout.enable_sleep_mode=False
    actor_rollout_ref.rollout.free_cache_engine=False
    actor_rollout_ref.rollout.max_num_batched_tokens=8192
    actor_rollout_ref.rollout.agent.num_workers=1
    actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes="${BUCKET_MEGABYTES:-512}"
  )
  DATA+=(data.dataloader_num_workers=0)
  REWARD+=(reward.num_workers=1)
  TRAINER+=(trainer.device=cpu)
  RAY=(
    # verl counts Ray's "GPU" only, and TransferQueue reserves more CPUs than a laptop has: both are logical here.
    +ray_kwargs.ray_init.num_gpus="$N_GPUS"
    ray_kwargs.ray_init.num_cpus=16
    transfer_queue.backend.SimpleStorage.num_data_storage_units=1
  )
fi
if [[ -z "${RAY_ADDRESS:-}" ]]; then
  # A cluster of this run's own, whatever an earlier run left behind under the name of "the current cluster".
  RAY+=(+ray_kwargs.ray_init.address=local +ray_kwargs.ray_init.include_dashboard=False)
else
  RAY+=("+ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES='$VERL_USE_EXTERNAL_MODULES'")
fi

TRAINING=("$PYTHON" -m verl.trainer.main_ppo
  "${DATA[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${REWARD[@]}" "${TRAINER[@]}" "${RAY[@]}"
  hydra.run.dir="$RUN_DIR" hydra.output_subdir=config hydra.job_logging.handlers.file.filename="$RUN_DIR/logs/driver.log" "$@")
if [[ -n "$DRY_RUN" ]]; then printf '%s\n' "${TRAINING[@]:1}"; exit 0; fi

# --- train, merge, evaluate, sum up --------------------------------------------------------------------------------
say "Training $RUN_NAME: $(basename "$MODEL_PATH") on $TRAIN_FILE, $PROFILE profile, logs in $RUN_DIR/logs"
"$PYTHON" -m medr1_verl.run_folder open "$RUN_DIR" --resume "$RESUME" ${TOTAL_STEPS:+--total-steps "$TOTAL_STEPS"} \
  --setting MODEL_PATH="$MODEL_PATH" --setting DATA_DIR="$DATA_DIR" --setting STYLE="$STYLE" --setting SEED="$SEED" 9>&-
"$PYTHON" -m medr1_verl.supervise --run-dir "$RUN_DIR" ${TOTAL_STEPS:+--steps "$TOTAL_STEPS"} \
  --length-limit "$MAX_RESPONSE_LENGTH" -- "${TRAINING[@]}" 9>&-

say "Merging the last checkpoint into a Hugging Face model"
checkpoint="$("$PYTHON" -m medr1_verl.run_folder checkpoint "$RUN_DIR")"
rm -rf "$RUN_DIR/model.partial"
"$PYTHON" -m verl.model_merger merge --backend fsdp --local_dir "$checkpoint/actor" --target_dir "$RUN_DIR/model.partial" \
  >"$RUN_DIR/logs/merge.log" 2>&1 9>&- || { tail -n 3 "$RUN_DIR/logs/merge.log" >&2; die "merging failed, see $RUN_DIR/logs/merge.log"; }
rm -rf "$RUN_DIR/model" && mv "$RUN_DIR/model.partial" "$RUN_DIR/model"

if [[ "$EVALUATE" == 1 ]]; then
  EVALUATION=("$PYTHON" -m medr1_verl.cli evaluate --data "$VAL_FILE" --pass none:0 blank:0 none:1
    --max-tokens "$MAX_RESPONSE_LENGTH" --seed "$SEED" ${EVAL_LIMIT:+--limit "$EVAL_LIMIT"} ${STYLE:+--style "$STYLE"})
  [[ "$PROFILE" == gpu ]] && EVALUATION+=(--gpu-memory "${EVAL_GPU_MEMORY:-0.85}")
  before="${embedded:-$RUN_DIR}/before.jsonl"
  say "Evaluating the model before training (kept for the next run where nothing changed)"
  "${EVALUATION[@]}" --model "$MODEL_PATH" --name before --output "$before" >"$RUN_DIR/logs/evaluate_before.log" 9>&-
  say "Evaluating the trained model"
  "${EVALUATION[@]}" --model "$RUN_DIR/model" --name "$RUN_NAME" --output "$RUN_DIR/predictions.jsonl" \
    --audit ${AUDIT_KEY:+--audit-key "$AUDIT_KEY"} >"$RUN_DIR/logs/evaluate.log" 9>&-
fi

say "Done"
"$PYTHON" -m medr1_verl.run_folder join "$RUN_DIR" 9>&-
"$PYTHON" -m medr1_verl.summary "$RUN_DIR" --model "$MODEL_PATH" --seed "$SEED" ${before:+--before "$before"} 9>&-
# The embedded default keeps the answers before training beside its data; else they are in the run folder.
"$PYTHON" -m medr1_verl.cli report "$RUN_DIR" ${embedded:+${before:+"$before"}} --data "$VAL_FILE" 9>&-
