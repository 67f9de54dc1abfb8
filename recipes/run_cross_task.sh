#!/usr/bin/env bash
# The paper's cross-task protocol: train on one of the 5 question types, test on all, for each; then the tables.
#
#   bash recipes/run_cross_task.sh                                   no GPU, nothing set: drawn images, tiny model, few steps
#   DATA_DIR=data/omnimedvqa bash recipes/run_cross_task.sh          with GPUs: Qwen2-VL-2B-Instruct on your parquet
#   DRY_RUN=1 ... bash recipes/run_cross_task.sh                     the plan and what it costs
#   METHOD=sft ... bash recipes/run_cross_task.sh                    the supervised baseline instead of GRPO
#
# The same command goes on where it stopped. Variables of run_medr1_grpo.sh and evaluate.sh apply to every run.
set -euo pipefail
BY=question_type
source "$(dirname "${BASH_SOURCE[0]}")/cross.sh"
