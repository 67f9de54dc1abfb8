# Sourced by every recipe: messages, the profile (gpu or cpu), data and model, the Python environment, the CPU platform.
# shellcheck shell=bash

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

say() { printf '\033[1m[%s]\033[0m %s\n' "$(date +%H:%M:%S)" "$*"; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 2; }

# require_integer NAME MINIMUM: the variable NAME holds a whole number of at least MINIMUM.
require_integer() {
  local value="${!1}"
  [[ "$value" =~ ^[0-9]+$ ]] && (( value >= $2 )) || die "$1=$value is not a whole number >= $2"
}

# require_number NAME: the variable NAME holds a number of at least 0, such as 0.04 or 1e-6.
require_number() {
  [[ "${!1}" =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$ ]] || die "$1=${!1} is not a number such as 0.04 or 1e-6"
}

# require_one_of NAME WORD...: the variable NAME holds one of the words.
require_one_of() {
  local name="$1" value="${!1}" word
  shift
  for word in "$@"; do [[ "$value" == "$word" ]] && return 0; done
  die "$name=$value is not one of: $*"
}

# require_run_name: RUN_NAME can be a folder's name and a hydra value as it is.
require_run_name() {
  [[ "$RUN_NAME" =~ ^[A-Za-z0-9._-]+$ ]] || die "RUN_NAME=$RUN_NAME may have letters, digits, '.', '_' and '-' only"
}

# Number of GPUs that the driver lists here. (Counted to the end: with pipefail, grep -q would break the pipe.)
count_gpus() { { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true; }

# Sets PROFILE to gpu or cpu (PROFILE=auto: gpu where the driver lists one).
choose_profile() {
  PROFILE="${PROFILE:-auto}"
  require_one_of PROFILE auto gpu cpu
  if [[ "$PROFILE" == auto ]]; then
    if (( $(count_gpus) > 0 )); then PROFILE=gpu; else PROFILE=cpu; fi
  fi
  if [[ "$PROFILE" == gpu ]] && (( $(count_gpus) == 0 )); then
    die "PROFILE=gpu, but nvidia-smi lists no GPU here; PROFILE=cpu runs the same trainer and engine without one"
  fi
  export PROFILE
}

# install_with_progress VENV EXTRAS: this project with its extras, a line for every 20th package that pip looks at.
install_with_progress() {
  local log="$1/install.log"
  if ! "$1/bin/python" -m pip install --disable-pip-version-check --progress-bar off -e "$ROOT[$2]" 2>&1 | tee "$log" \
    | awk '/^Collecting/ { if (++n % 20 == 0) { printf "  %d packages found, now %s\n", n, $2; fflush() } }
           /^Installing collected/ { print "  unpacking them"; fflush() }'; then
    grep -E '^ERROR' "$log" >&2
    die "the installation into $1 failed, see $log. Where the package index has no CPU build of torch, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels"
  fi
}

# Sets PYTHON to an interpreter that has verl, the engine and this package; makes one where there is none.
#   $PYTHON if set; else an active environment that has verl (OWN_VENV=1: not that one); else .venv-gpu or .venv-cpu here.
choose_python() {
  local venv="${MEDR1_VENV:-$ROOT/.venv-$PROFILE}" stamp extra="${1:-$PROFILE}"
  if [[ -n "${PYTHON:-}" ]]; then
    "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("verl") is None)' 2>/dev/null \
      || die "PYTHON=$PYTHON cannot import verl; install it there (pip install '$ROOT[$PROFILE]') or unset PYTHON"
  elif [[ -z "${OWN_VENV:-}" ]] && python3 -c 'import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in ("verl", "vllm", "ray")))' 2>/dev/null; then
    PYTHON="$(command -v python3)"
  else
    # The stamp names what was installed: a half-made environment, or one of older pins, is made again.
    stamp="$venv/.medr1-$(cat "$ROOT/pyproject.toml" <(echo "$extra") | sha256sum | cut -c1-16)"
    if [[ ! -e "$stamp" ]]; then
      local base="${BASE_PYTHON:-python3}"
      "$base" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' 2>/dev/null \
        || die "$base is not Python 3.10, 3.11 or 3.12; set BASE_PYTHON to one that is"
      say "Setting up $venv with the extras $extra (once; a few minutes and 4 GB)"
      "$base" -m venv "$venv" || die "cannot make a virtual environment in $venv (Debian: apt-get install python3-venv)"
      install_with_progress "$venv" "$extra"
      touch "$stamp"
    fi
    PYTHON="$venv/bin/python"
  fi
  export PYTHON
  # The package may not be installed in an environment that the user brought: this checkout serves.
  "$PYTHON" -c 'import medr1_verl' 2>/dev/null || export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
  if [[ "$PROFILE" == cpu ]]; then
    local line
    while IFS= read -r line; do export "${line?}"; done \
      < <("$PYTHON" -c 'from medr1_verl import cpu; print("\n".join(f"{k}={v}" for k, v in cpu.environ().items()))')
  fi
  # verl's entry-point loading hides failures; named here, a plugin that cannot register stops the run.
  [[ ",${VERL_USE_EXTERNAL_MODULES:-}," == *,medr1_verl.plugin,* ]] \
    || export VERL_USE_EXTERNAL_MODULES="${VERL_USE_EXTERNAL_MODULES:+$VERL_USE_EXTERNAL_MODULES,}medr1_verl.plugin"
}

# Data and model where they are not named. Without a GPU and with neither named it is the embedded default (EMBEDDED=1);
# with a GPU nothing is guessed: the commands that get the data are told.
choose_data_and_model() {
  if [[ "$PROFILE" == cpu && -z "$DATA_DIR$MODEL_PATH" ]]; then EMBEDDED=1; fi
  [[ -z "$EMBEDDED" ]] || return 0
  [[ -n "$DATA_DIR" ]] || die "DATA_DIR is not set. Unpack OmniMedVQA, then
  python data_prep/omnimedvqa_to_parquet.py --input OmniMedVQA --output data/omnimedvqa
  DATA_DIR=data/omnimedvqa bash recipes/$(basename "$0")
or see the whole thing run with drawn images and a tiny model:  EMBEDDED=1 bash recipes/$(basename "$0")"
  [[ "$PROFILE" == gpu || -n "$MODEL_PATH" ]] || die "DATA_DIR is set but MODEL_PATH is not: on a CPU, name a model that a CPU can train"
  MODEL_PATH="${MODEL_PATH:-Qwen/Qwen2-VL-2B-Instruct}"
}

# hold_run_name DIR: no other run of this name from here on. The lock is file 9 of this shell and ends with it; what
# the recipe starts is started with 9>&-, so that a process left behind does not keep the name.
hold_run_name() {
  mkdir -p "$RUNS_DIR" 2>/dev/null && exec 9>>"$RUNS_DIR/.$RUN_NAME.lock" \
    || die "cannot write to RUNS_DIR=$RUNS_DIR; set it to a folder that can be written"
  flock -n 9 || die "$1 is in use by another run; wait for it or set RUN_NAME"
}

# prepare_embedded [--data-only]: the embedded default: drawn images, converted like any data set, and a tiny Qwen2-VL
# (for a plan, the data will do). Sets embedded to their folder.
prepare_embedded() {
  say "Embedded default: drawn images of 8 modalities$([[ -n "${1:-}" ]] || echo " and a tiny Qwen2-VL") (made once, then kept)"
  embedded="$("$PYTHON" -m medr1_verl.embedded.prepare --root "${EMBEDDED_DIR:-$ROOT/data/embedded}" --seed "$SEED" "$@" 9>&-)"
  DATA_DIR="${DATA_DIR:-$embedded/data}"
  MODEL_PATH="${MODEL_PATH:-$embedded/model}"
}

# choose_attention PREFIX: attention, padding and gradient checkpointing, added to MODEL under this prefix of verl's keys.
choose_attention() {
  if [[ "$PROFILE" == gpu ]] && "$PYTHON" -c 'import flash_attn' 2>/dev/null; then
    MODEL+=("$1.use_remove_padding=True")
  else
    # flash-attn mostly has to be compiled; without it padding stays in the batch, which costs time, not accuracy.
    [[ "$PROFILE" == cpu ]] || say "flash-attn is not installed: sdpa and padded batches instead; the same result, slower, more memory (medr1 doctor counts it)" >&2
    MODEL+=("$1.use_remove_padding=False" "+$1.override_config.attn_implementation=sdpa")
  fi
  # Activations are computed again in the backward pass: a third more time, a fraction of the memory.
  if [[ "$PROFILE" == gpu ]]; then MODEL+=("$1.enable_gradient_checkpointing=True"); else MODEL+=("$1.enable_gradient_checkpointing=False"); fi
}

# tell_of_run RUN_DIR DATA [ANSWERS...]: the run's page with the answers to the rows in DATA (and others to compare),
# the audit log of its validation answers, and the cards of its model and its data.
tell_of_run() {
  local run="$1" data="$2" folder="$2" medr1=("$PYTHON" -m medr1_verl.cli)
  [[ -d "$folder" ]] || folder="$(dirname "$folder")"
  if compgen -G "$run/validation/*.jsonl" >/dev/null; then
    "${medr1[@]}" audit record "$run/validation" --data "$data" --output "$run/validation-audit.jsonl" --again ${AUDIT_KEY:+--key "$AUDIT_KEY"} 9>&- || return
  fi
  "${medr1[@]}" report "$run" "${@:3}" --data "$data" 9>&- || return
  [[ ! -d "$run/model" ]] || "${medr1[@]}" card model "$run" --data "$folder" 9>&- || return
  [[ ! -f "$folder/manifest.json" ]] || "${medr1[@]}" card data "$folder" --output "$run/data-card.md" 9>&-
}
