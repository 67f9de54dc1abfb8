# Sourced by the GRPO recipes: how to train, as two sets of defaults. A variable that is set in the environment wins.
# shellcheck shell=bash

# default NAME VALUE: sets the variable unless it has a value.
default() { [[ -n "${!1:-}" ]] || printf -v "$1" '%s' "$2"; }

# What the paper's code and curves say; where they are silent, what its trainer (TRL 0.14) does by default.
preset_paper() {
  default TRAIN_BATCH_SIZE 4             # prompts a step: the published curves end at a quarter of the rows
  default MINI_BATCH_SIZE "$TRAIN_BATCH_SIZE" # one update a rollout, strictly on-policy
  default ROLLOUT_N 4                    # answers a prompt: num_generations of its scripts
  default LOSS_AGG seq-mean-token-mean   # original GRPO: mean over the tokens of an answer, then over answers
  default KL_COEF 0.04                   # beta of its trainer: k3 estimator in the loss, against the first model
  default CLIP_RATIO_HIGH 0.2            # never reached: with one update a rollout the ratio is 1
  default FILTER_GROUPS 0                # a group without an advantage stays in the batch
  default LR_SCHEDULE cosine             # its decay is linear, which verl does not have; this has the same ends and mean
  default WEIGHT_DECAY 0.0
  default TEST_FREQ 100
  default SAVE_FREQ 200
}

# A GRPO as it is done since DAPO (arXiv 2503.14476), within what verl's own trainer offers.
preset_verl() {
  default TRAIN_BATCH_SIZE 128           # larger batches: less noise in the gradient, and the GPUs are busy
  # Two updates a rollout, where the batch has two halves.
  default MINI_BATCH_SIZE $((TRAIN_BATCH_SIZE % 2 ? TRAIN_BATCH_SIZE : TRAIN_BATCH_SIZE / 2))
  default ROLLOUT_N 8                    # more answers: a better baseline, fewer groups in which all earn the same
  default LOSS_AGG token-mean            # a token counts the same in a long answer as in a short one
  default KL_COEF 0                      # a rule cannot be hacked as a reward model can; saves the reference policy
  default CLIP_RATIO_HIGH 0.28           # clip-higher: rare tokens may gain more than 20 % a step, entropy lasts
  default FILTER_GROUPS 1                # a group whose answers all earn the same is replaced by another prompt
  default LR_SCHEDULE constant
  default WEIGHT_DECAY 0.01              # verl's default
  default TEST_FREQ 10
  default SAVE_FREQ 20
}

# The preset, and what both have in common.
apply_preset() {
  default PRESET paper
  require_one_of PRESET paper verl
  [[ -z "${TRAIN_BATCH_SIZE:-}" ]] || require_integer TRAIN_BATCH_SIZE 1
  "preset_$PRESET"
  # Adapters start from zero and take ten times the learning rate (verl's documentation of LoRA).
  if (( ${LORA_RANK:-0} > 0 )); then default LR 1e-5; else default LR 1e-6; fi
  default TEMPERATURE 1.0                # the distribution that is sampled is the one that is trained
  default MAX_PROMPT_LENGTH 1024
  default MAX_RESPONSE_LENGTH 256
  default VAL_SAMPLES 512                # rows of the test file used for the validation curve; -1: all
  default TOTAL_EPOCHS 1
}
