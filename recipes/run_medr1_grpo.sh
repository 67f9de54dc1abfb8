#!/usr/bin/env bash
# Med-R1: GRPO on Qwen2-VL with verl's own FSDP trainer and vLLM rollouts.
#
#   bash recipes/run_medr1_grpo.sh                                       no GPU, nothing set: the embedded default
#   DATA_DIR=data/omnimedvqa bash recipes/run_medr1_grpo.sh              with GPUs: Qwen2-VL-2B-Instruct on your parquet
#   DATA_DIR=... bash recipes/run_medr1_grpo.sh trainer.test_freq=50     more arguments go to hydra last, and win
#
# Every variable below can be set from the environment.
{ # bash reads to the closing brace before it starts: an edit or a git pull does not reach a run that is on
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$ROOT/recipes/presets.sh"
[[ "${1:-}" == -h || "${1:-}" == --help ]] && {
  sed -n '2,8p' "${BASH_SOURCE[0]}"
  grep -E '^[A-Z_]+="\$\{' "${BASH_SOURCE[0]}" | sed 's/^/  /'
  sed -n '/^# What the paper/,$p' "$ROOT/recipes/presets.sh"
  exit 0
}

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
ROLLOUT_TP="${ROLLOUT_TP:-1}"                 # GPUs that share one engine's weights; 1 while the model fits on one
RESUME="${RESUME:-auto}"                      # auto: go on from the last checkpoint of this name; disable: start anew
GUARD="${GUARD:-stop}"                        # stop | warn | off: what to do when rollout and actor disagree
DRY_RUN="${DRY_RUN:-}"                        # 1: print verl's command line, one argument a line, and end
EMBEDDED="${EMBEDDED:-}"                      # 1: the embedded default (drawn images, tiny model), on a GPU too
REWARD="${REWARD:-verifiable}"                # verifiable | random: paid by a coin, the control for what a reward teaches
PRESET="${PRESET:-paper}"                     # paper | verl: two sets of defaults for training, below and in presets.sh
LORA_RANK="${LORA_RANK:-0}"                   # 0: every weight is trained; else adapters of this rank on the language model
LORA_ALPHA="${LORA_ALPHA:-}"                  # adapters are scaled by LORA_ALPHA / LORA_RANK; default: twice the rank
LORA_TARGETS="${LORA_TARGETS:-all-linear}"    # layers that get adapters: all-linear, or names as [q_proj,v_proj]
MODEL_DTYPE="${MODEL_DTYPE:-fp32}"            # fp32 | bf16: what weights and optimizer are kept in; bf16 with LoRA only
TRAIN_VISION="${TRAIN_VISION:-}"              # 0: the vision tower stays as it is; default: 1, with LoRA 0
MERGE="${MERGE:-last}"                        # last | best: the checkpoint that becomes model/; best by validation accuracy
KEEP_CHECKPOINTS="${KEEP_CHECKPOINTS:-2}"     # the last so many are kept, and the best

require_one_of RESUME auto disable
require_one_of GUARD stop warn off
require_one_of REWARD verifiable random
require_one_of PRESET paper verl
require_integer LORA_RANK 0
default LORA_ALPHA $((2 * LORA_RANK))
require_integer LORA_ALPHA $((LORA_RANK > 0))   # 0 would scale the adapters away
require_one_of MODEL_DTYPE fp32 bf16
[[ "$MODEL_DTYPE" == fp32 || "$LORA_RANK" != 0 ]] \
  || die "MODEL_DTYPE=bf16 with LORA_RANK=0: updates of 1e-6 are lost in bf16 weights; MODEL_DTYPE=fp32 works, and so does LORA_RANK=32"
default TRAIN_VISION $((LORA_RANK == 0))
require_one_of TRAIN_VISION 0 1
require_one_of MERGE last best
require_integer KEEP_CHECKPOINTS 1
[[ -z "$STYLE" ]] || require_one_of STYLE think no-think think-after
require_run_name
require_integer SEED 0
require_integer NNODES 1
require_integer ROLLOUT_TP 1
choose_data_and_model

# --- how to train ------------------------------------------------------------------------------------------------
if [[ -n "$EMBEDDED" ]]; then
  # What teaches a model of a million parameters within minutes; docs/embedded.md has the curve.
  default TRAIN_BATCH_SIZE 16
  # Many small updates: at four times the learning rate, the policy collapses onto a few answers.
  default MINI_BATCH_SIZE $((TRAIN_BATCH_SIZE % 4 ? TRAIN_BATCH_SIZE : TRAIN_BATCH_SIZE / 4))
  default TOTAL_STEPS 50
  default ROLLOUT_N 8
  default LR 1e-4
  default KL_COEF 0.001
  default LR_SCHEDULE cosine
  default WEIGHT_DECAY 0.01
  default MAX_PROMPT_LENGTH 320
  default MAX_RESPONSE_LENGTH 40
  default TOKENS_PER_GPU 11520          # the 32 answers of an update in one forward pass
  default TEST_FREQ 5                   # a curve for each modality; a divisor of SAVE_FREQ, for MERGE=best
  default SAVE_FREQ 25
  default VAL_SAMPLES 128
  default EVAL_LIMIT 512
fi
apply_preset
TOTAL_STEPS="${TOTAL_STEPS:-}"                # empty: TOTAL_EPOCHS decides
EVALUATE="${EVALUATE:-1}"                     # 0: no evaluation after training
EVAL_LIMIT="${EVAL_LIMIT:-}"                  # rows of the test file that the final evaluation answers; empty: all
AUDIT_KEY="${AUDIT_KEY:-}"                    # Ed25519 private key (file) that signs the audit log
for name in TRAIN_BATCH_SIZE ROLLOUT_N MAX_PROMPT_LENGTH MAX_RESPONSE_LENGTH TOTAL_EPOCHS MINI_BATCH_SIZE SAVE_FREQ; do require_integer "$name" 1; done
[[ -z "$TOTAL_STEPS" ]] || require_integer TOTAL_STEPS 1
TOKENS_PER_GPU="${TOKENS_PER_GPU:-$((8 * (MAX_PROMPT_LENGTH + MAX_RESPONSE_LENGTH)))}"  # tokens of one forward pass
require_integer TOKENS_PER_GPU 1
require_one_of EVALUATE 0 1
require_one_of FILTER_GROUPS 0 1
require_one_of LR_SCHEDULE constant cosine
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

for name in LR KL_COEF CLIP_RATIO_HIGH WEIGHT_DECAY TEMPERATURE; do require_number "$name"; done
[[ "$TEST_FREQ" == -1 ]] || require_integer TEST_FREQ 1
if [[ "$MERGE" == best ]]; then
  # Saved and validated at the same steps, or there is nothing to choose from.
  (( TEST_FREQ > 0 )) || die "MERGE=best needs validation during training, and TEST_FREQ=$TEST_FREQ; TEST_FREQ=$SAVE_FREQ works"
  (( SAVE_FREQ % TEST_FREQ == 0 )) || die "MERGE=best needs checkpoints that are validated, and SAVE_FREQ=$SAVE_FREQ is no multiple of TEST_FREQ=$TEST_FREQ; SAVE_FREQ=$TEST_FREQ works"
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
  --tokens-per-gpu "$TOKENS_PER_GPU" --tensor-parallel "$ROLLOUT_TP" --lora-rank "$LORA_RANK" --train-vision "$TRAIN_VISION" 9>&-

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
  actor_rollout_ref.actor.fsdp_config.model_dtype="$MODEL_DTYPE"  # a GPU computes in bf16 all the same
  actor_rollout_ref.actor.optim.lr="$LR"
  actor_rollout_ref.actor.optim.lr_scheduler_type="$LR_SCHEDULE"
  actor_rollout_ref.actor.optim.weight_decay="$WEIGHT_DECAY"
  actor_rollout_ref.actor.ppo_mini_batch_size="$MINI_BATCH_SIZE"
  actor_rollout_ref.actor.loss_agg_mode="$LOSS_AGG"
  actor_rollout_ref.actor.clip_ratio_low=0.2
  actor_rollout_ref.actor.clip_ratio_high="$CLIP_RATIO_HIGH"
  actor_rollout_ref.actor.entropy_coeff=0
  # Batches by tokens. By rows, verl 0.9.1 cannot split the ragged 3-D position ids of Qwen2-VL (pytorch#153238).
  actor_rollout_ref.actor.use_dynamic_bsz=True
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu="$TOKENS_PER_GPU"
  actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True
  actor_rollout_ref.ref.log_prob_max_token_len_per_gpu="$TOKENS_PER_GPU"
  actor_rollout_ref.actor.data_loader_seed="$SEED"
)
if [[ "$KL_COEF" =~ ^0*\.?0*$ ]]; then
  ACTOR+=(actor_rollout_ref.actor.use_kl_loss=False)  # no reference policy then, neither its memory nor its forward pass
else
  ACTOR+=(
    actor_rollout_ref.actor.use_kl_loss=True
    actor_rollout_ref.actor.kl_loss_coef="$KL_COEF"
    actor_rollout_ref.actor.kl_loss_type=low_var_kl   # the k3 estimator, as in the paper's code
  )
fi
if (( LORA_RANK > 0 )); then
  # The engine loads the base from disk (load_format below) and gets the adapters alone after each step. With FSDP2 only
  # these are gathered for it, so rollout.layered_summon has nothing to save.
  MODEL+=(
    actor_rollout_ref.model.lora_rank="$LORA_RANK"
    actor_rollout_ref.model.lora_alpha="$LORA_ALPHA"
    actor_rollout_ref.model.target_modules="$LORA_TARGETS"
    actor_rollout_ref.model.exclude_modules='.*visual.*'  # verl does not tell vLLM to load the vision tower's adapters
  )
elif [[ "$TRAIN_VISION" == 0 ]]; then
  # verl reads this key nowhere; medr1_verl.frozen_vision obeys it.
  ACTOR+=(actor_rollout_ref.actor.freeze_vision_tower=True)
fi
ROLLOUT=(
  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.n="$ROLLOUT_N"
  actor_rollout_ref.rollout.temperature="$TEMPERATURE"
  actor_rollout_ref.rollout.tensor_model_parallel_size="$ROLLOUT_TP"
  actor_rollout_ref.rollout.max_model_len=$((MAX_PROMPT_LENGTH + MAX_RESPONSE_LENGTH))
  # verl's default, dummy, leaves vLLM >= 0.28 with random pixel normalisation: a blind engine, and no error.
  actor_rollout_ref.rollout.load_format=auto
  actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True   # must equal the actor's
  actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu="$TOKENS_PER_GPU"
  actor_rollout_ref.rollout.calculate_log_probs=True        # for training/rollout_actor_probs_pearson_corr
  actor_rollout_ref.rollout.seed="$SEED"
  actor_rollout_ref.rollout.val_kwargs.do_sample=True       # the validation curve is sampled as in training
  actor_rollout_ref.rollout.val_kwargs.temperature=1.0
  # Nobody reads along, yet by default every token of every answer goes through the server's process by itself.
  +actor_rollout_ref.rollout.engine_kwargs.vllm.stream_interval=1000000
)
REWARD_FUNCTION=(
  reward.custom_reward_function.path=pkg://medr1_verl.reward
  reward.custom_reward_function.name=compute_score
)
[[ "$REWARD" == verifiable ]] || REWARD_FUNCTION+=(reward.custom_reward_function.path=pkg://medr1_verl.random_reward)
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
  trainer.max_actor_ckpt_to_keep="$KEEP_CHECKPOINTS"
  trainer.total_epochs="$TOTAL_EPOCHS"
  trainer.resume_mode="$RESUME"
)
[[ -z "$TOTAL_STEPS" ]] || TRAINER+=(trainer.total_training_steps="$TOTAL_STEPS" trainer.total_epochs=1000)
if (( FILTER_GROUPS )); then
  # By the whole reward: groups that have no advantage, not only those of one accuracy. verl samples until the batch is
  # full, so a run whose every group is alike never ends a step: STALL_SECONDS then does.
  TRAINER+=(algorithm.filter_groups.enable=True algorithm.filter_groups.metric=score)
fi
[[ -z "$STYLE" ]] || {
  DATA+=(data.custom_cls.path=pkg://medr1_verl.dataset data.custom_cls.name=MedVQADataset +data.medr1.style="$STYLE")
  REWARD_FUNCTION+=(+reward.custom_reward_function.reward_kwargs.style="$STYLE")
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
    # As fast as bf16 here, and exact. verl reads fsdp_config.dtype nowhere.
    +actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32
    +actor_rollout_ref.ref.fsdp_config.mixed_precision.param_dtype=fp32
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
  # No worker beside the engine's process (VLLM_ENABLE_V1_MULTIPROCESSING in medr1_verl/cpu allows it); verl asks for one.
  (( ROLLOUT_TP > 1 )) || ROLLOUT+=(+actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend=uni)
  DATA+=(data.dataloader_num_workers=0)
  REWARD_FUNCTION+=(reward.num_workers=1)
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
  "${DATA[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${REWARD_FUNCTION[@]}" "${TRAINER[@]}" "${RAY[@]}"
  hydra.run.dir="$RUN_DIR" hydra.output_subdir=config hydra.job_logging.handlers.file.filename="$RUN_DIR/logs/driver.log" "$@")
if [[ -n "$DRY_RUN" ]]; then printf '%s\n' "${TRAINING[@]:1}"; exit 0; fi

# --- train, merge, evaluate, sum up --------------------------------------------------------------------------------
say "Training $RUN_NAME: $(basename "$MODEL_PATH") on $TRAIN_FILE, $PROFILE profile, logs in $RUN_DIR/logs"
"$PYTHON" -m medr1_verl.run_folder open "$RUN_DIR" --resume "$RESUME" ${TOTAL_STEPS:+--total-steps "$TOTAL_STEPS"} --keep "$KEEP_CHECKPOINTS" \
  --setting MODEL_PATH="$MODEL_PATH" --setting DATA_DIR="$DATA_DIR" --setting STYLE="$STYLE" --setting SEED="$SEED" \
  --setting REWARD="$REWARD" --setting LORA_RANK="$LORA_RANK" --setting TRAIN_VISION="$TRAIN_VISION" --setting N_GPUS="$N_GPUS" --setting NNODES="$NNODES" 9>&-
"$PYTHON" -m medr1_verl.supervise --run-dir "$RUN_DIR" ${TOTAL_STEPS:+--steps "$TOTAL_STEPS"} \
  --length-limit "$MAX_RESPONSE_LENGTH" -- "${TRAINING[@]}" 9>&-

say "Merging the $MERGE checkpoint into a Hugging Face model"
"$PYTHON" -m medr1_verl.merge "$RUN_DIR" --checkpoint "$MERGE" 9>&-

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
tell_of_run "$RUN_DIR" "$VAL_FILE" ${embedded:+${before:+"$before"}}
exit
}
