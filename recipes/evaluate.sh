#!/usr/bin/env bash
# One model over every slice of the test data, with controls, and its tables.
#
#   MODEL_PATH=runs/NAME/model DATA_DIR=data/omnimedvqa bash recipes/evaluate.sh
#   MODEL_PATH=Qwen/Qwen2-VL-72B-Instruct BASE_URL=http://host:8000/v1 DATA_DIR=... bash recipes/evaluate.sh
#   more arguments go to `medr1 evaluate`; what is answered already is not asked again
{ # bash reads to the closing brace before it starts: an edit or a git pull does not reach a run that is on
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[[ "${1:-}" == -h || "${1:-}" == --help ]] && { sed -n '2,6p' "${BASH_SOURCE[0]}"; grep -E '^[A-Z_]+="\$\{' "${BASH_SOURCE[0]}" | sed 's/^/  /'; exit 0; }

choose_profile

MODEL_PATH="${MODEL_PATH:-}"                # Hugging Face folder or name; with BASE_URL the served name
DATA_DIR="${DATA_DIR:-}"                    # folder with test.parquet, or with one folder for each slice
RUNS_DIR="${RUNS_DIR:-$ROOT/runs}"
RUN_NAME="${RUN_NAME:-}"                    # outputs go to RUNS_DIR/RUN_NAME; default: eval- and the model's name
CONTROLS="${CONTROLS:-none blank shuffled text-only}"
MAX_RESPONSE_LENGTH="${MAX_RESPONSE_LENGTH:-256}"
STYLE="${STYLE:-}"                          # think | no-think | think-after; default: the rows' own
SEED="${SEED:-42}"
EVAL_LIMIT="${EVAL_LIMIT:-}"                # so many rows only, spread over modalities and question types
AUDIT_KEY="${AUDIT_KEY:-}"                  # Ed25519 private key (file) that signs the audit log
BASE_URL="${BASE_URL:-}"                    # ask this OpenAI-compatible server instead of loading the model here
N_GPUS="${N_GPUS:-1}"                       # GPUs to split the model over
NNODES="${NNODES:-1}"                       # evaluation runs on one node
DRY_RUN="${DRY_RUN:-}"                      # 1: print the commands and end

[[ -n "$MODEL_PATH" ]] || die "MODEL_PATH is not set; give a Hugging Face model, for example runs/NAME/model"
[[ -n "$DATA_DIR" ]] || die "DATA_DIR is not set; give the folder that data_prep/omnimedvqa_to_parquet.py wrote"
[[ -z "$STYLE" ]] || require_one_of STYLE think no-think think-after
if [[ -z "$RUN_NAME" ]]; then
  RUN_NAME="$(basename "${MODEL_PATH%/}")"
  [[ "$RUN_NAME" == model && -d "$MODEL_PATH" ]] && RUN_NAME="$(basename "$(dirname "$(cd "$MODEL_PATH" && pwd)")")"
  RUN_NAME="eval-$RUN_NAME"
fi
require_run_name
require_integer SEED 0
require_integer MAX_RESPONSE_LENGTH 1
require_integer N_GPUS 1
[[ "$NNODES" == 1 ]] || die "NNODES=$NNODES: evaluation runs on one node; use N_GPUS, or a server and BASE_URL"
[[ -z "$EVAL_LIMIT" ]] || require_integer EVAL_LIMIT 1

choose_python "$PROFILE,report"
RUN_DIR="$RUNS_DIR/$RUN_NAME"
read -ra controls <<<"$CONTROLS"
EVALUATION=("$PYTHON" -m medr1_verl.cli evaluate --model "$MODEL_PATH" --data "$DATA_DIR" --output "$RUN_DIR"
  --control "${controls[@]}" --max-tokens "$MAX_RESPONSE_LENGTH" --seed "$SEED" --name "${EVAL_NAME:-$RUN_NAME}"
  --audit ${AUDIT_KEY:+--audit-key "$AUDIT_KEY"}
  ${EVAL_LIMIT:+--limit "$EVAL_LIMIT"} ${STYLE:+--style "$STYLE"} ${BASE_URL:+--base-url "$BASE_URL"})
[[ "$PROFILE" == gpu && -z "$BASE_URL" ]] && EVALUATION+=(--tensor-parallel "$N_GPUS" --gpu-memory "${EVAL_GPU_MEMORY:-0.85}")
EVALUATION+=("$@")
TABLES=("$PYTHON" -m medr1_verl.cli tables "$RUN_DIR" --output "$RUN_DIR/tables")
[[ -f "$DATA_DIR/train.parquet" ]] || compgen -G "$DATA_DIR/*/train.parquet" >/dev/null && TABLES+=(--train "$DATA_DIR")
if [[ -n "$DRY_RUN" ]]; then printf '%q ' "${EVALUATION[@]:1}"; echo; printf '%q ' "${TABLES[@]:1}"; echo; exit 0; fi

say "Evaluating $MODEL_PATH on $DATA_DIR"
"${EVALUATION[@]}"
# Recipes that evaluate several times, or sum up afterwards, make tables, page and cards themselves.
[[ -n "${NO_TABLES:-}" ]] || { say "Tables, page and cards"; "${TABLES[@]}" | tail -n 1; tell_of_run "$RUN_DIR" "$DATA_DIR"; }
exit
}
