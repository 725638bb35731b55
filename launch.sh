#!/usr/bin/env bash
# Set up and run: ./launch.sh [RECIPE] [ARGUMENTS] · ./launch.sh compare · study · advise · check · test · --help
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd -P)
here=$root/  # paths in ARGUMENTS are relative to the working directory, so it is not changed
[ "$(pwd -P)" != "$root" ] || here=""

usage() {
  cat <<EOF
./launch.sh [RECIPE] [ARGUMENTS]   pre-train, then compare the result by k-NN
./launch.sh compare [ARGUMENTS]    pre-train six recipes, evaluate them alike
                                   beside their controls, write a report
./launch.sh study [ARGUMENTS]      the denoising study in miniature: its arms,
                                   tuned, at equal compute, on the digits
./launch.sh study --full [ARGS]    the study at its largest, with a verdict: for
                                   GPUs, with --data cifar10
./launch.sh advise --data PATH     does pre-training help on your images? From
                                   scratch against published weights or
                                   --backbone RUN, frozen and fine-tuned
./launch.sh check                  ruff, codespell, mypy, the examples in the
                                   docstrings, the commands in the documents
./launch.sh test [ARGUMENTS]       run the tests; --all adds the large matrices;
                                   ARGUMENTS go to pytest
./launch.sh --help                 print this; nothing is set up

RECIPE is the name of a file in recipes/, without .yaml, or the path of your own
file. The default is mae. The recipes are:
$(recipes | fold -s -w 76 | sed 's/^/  /; s/ *$//')

ARGUMENTS go to ssl_vit/pretrain.py:
  --data NAME|PATH|OWNER/NAME   images other than the digits: cifar10, a folder
  --output DIR                  the run directory
                                (default: runs/RECIPE-DATA[-HASH]-sSEED)
  key=value                     any setting: train.epochs=20 optim.lr=1e-3
For example: ./launch.sh dino-photos --data ~/photos train.epochs=20

compare and study take --data and key=value too, and --seeds N; all options are
in 'python eval/study.py --help'. On the digits and two cores compare takes half
an hour, study 40 minutes. Both may be stopped and started again: finished work
is not repeated, and runs/PLAN-DATA[-HASH]/progress.txt says how far they are.
The report is report/report.html in the same folder. PLAN is compare, denoising
or denoising-full; 'python eval/study.py PLAN' runs the others of recipes/study,
such as denoising-small for two cores and denoising-gpu for one GPU. --plan
prints what a plan would cost on this machine, without running it.

What a run does:
  1. Set-up, once: makes .venv and installs the project there, in the exact
     versions of constraints.txt (several gigabytes, a few minutes). An active
     environment (venv, or conda other than base) is used instead, with the
     lower bounds of pyproject.toml; its torch is kept. Later calls skip the
     set-up until pyproject.toml, setup.py, constraints.txt or the Python
     changes.
  2. python ssl_vit/pretrain.py --recipe RECIPE ARGUMENTS, on a GPU if torch
     can use one, on several by Accelerate, else on the CPU. If you have an
     'accelerate config', it is respected.
  3. The same with train.steps=0: the control, random initialisation.
  4. python eval/knn.py: k-NN of the run beside the control and raw pixels.
     Images without labels: python eval/embed.py instead of 3 and 4.
If pre-training fails or is stopped, the rest is not run, and the exit code is
the launcher's, which is not 0.

Environment variables:
  PYTHON   the interpreter that makes .venv (3.11 or newer; default: the newest
           that is found)
EOF
}

die() {
  echo "launch.sh: $1" >&2
  exit "${2:-1}"
}

show() {  # print a command as one could type it, then run it
  local name child code=0 again
  printf '\n$'
  printf ' %q' "$@"
  printf '\n'
  # A signal to this shell alone would end it and leave the command running. From a terminal SIGINT reaches both.
  for name in TERM HUP USR1 USR2; do
    # shellcheck disable=SC2064  # the name is this one's
    trap "signalled=yes; kill -$name \$child 2>/dev/null || :" "$name"
  done
  trap 'signalled=yes' INT
  signalled="" child=""
  (
    trap - INT QUIT TERM HUP USR1 USR2
    exec "$@"
  ) <&0 &
  child=$!
  [ -z "$signalled" ] || kill -TERM "$child" 2>/dev/null || :
  wait "$child" || code=$?
  while [ -n "$signalled" ]; do  # it ended that wait, and the command may still be saving
    signalled="" again=0
    wait "$child" 2>/dev/null || again=$?
    [ "$again" -eq 127 ] || code=$again  # 127: it had ended
  done
  trap - INT TERM HUP USR1 USR2
  return "$code"
}

recipes() {  # all of them, or with an argument those directly in recipes/
  local file files=("$root"/recipes/*.yaml) names=()
  [ $# -gt 0 ] || files+=("$root"/recipes/imagenet/*.yaml)
  for file in "${files[@]}"; do
    [ ! -f "$file" ] || { file=${file#"$root"/recipes/}; names+=("${file%.yaml}"); }
  done
  [ ${#names[@]} -eq 0 ] || echo "${names[@]}"
}

close() {  # of the names $2 … the one nearest to $1
  "${PYTHON:-python3}" -c 'import difflib, sys; print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1, 0))' "$@"
}

check_recipe() {
  local known nearest
  [ ! -f "$root/recipes/$1.yaml" ] || return 0
  [[ $1 != *.yaml || ! -f $1 ]] || return 0
  known=$(recipes)
  # shellcheck disable=SC2086  # one argument per name
  nearest=$(close "$1" $known compare study advise check test 2>/dev/null) || nearest="mae"
  die "there is no recipe '$1'; the nearest name is '$nearest' (recipes: $known; other commands: compare, study, advise, check, test, --help)." 2
}

# ---- set-up ----

version() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {  # the newest suitable interpreter
  local candidate minor best="" best_minor=10
  if [ -n "${PYTHON:-}" ]; then
    recent "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.11 or newer: name another one, or unset PYTHON."
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11; do
    # Being on the PATH is not enough: a pyenv shim exists for versions that it then refuses to run.
    minor=$("$candidate" -c 'import sys; print(sys.version_info[1])' 2>/dev/null) || continue
    if [ "$minor" -gt "$best_minor" ]; then best=$candidate best_minor=$minor; fi
  done
  [ -n "$best" ] || die "Python 3.11 or newer is needed and none was found: install one \
('sudo apt install python3.11 python3.11-venv', 'brew install python@3.13', 'conda create -n ssl_vit python=3.13') \
or name one: PYTHON=/path/to/python3."
  echo "$best"
}

wanted_python() {  # is .venv of the version that PYTHON asks for, if it does?
  [ -z "${PYTHON:-}" ] || [ "$(version "$PYTHON")" = "$(version "$prefix/bin/python")" ]
}

make_venv() {  # unless it is there
  local interpreter release
  # pip names its own path, which tells a whole .venv from one that is unfinished, moved or copied with the project.
  if [[ "$("$prefix/bin/pip" --version 2>/dev/null)" == *" $prefix/"* ]] &&
    recent "$prefix/bin/python" && wanted_python; then return; fi
  interpreter=$(find_python)
  release=$(version "$interpreter")
  "$interpreter" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$interpreter cannot make virtual environments: install its package, e.g. \
'sudo apt install python${release%.*}-venv', or activate an environment of your own."
  echo "Making .venv with Python $release."
  "$interpreter" -m venv --clear "$prefix" || die "'$interpreter -m venv' failed (see above)."
}

fingerprint() {  # of what a set-up depends on, but for the extras; the path counts, since the install points to it
  "$prefix/bin/python" - "$root" <<'EOF'
import hashlib, sys
files = [open(f"{sys.argv[1]}/{name}", "rb").read() for name in ("pyproject.toml", "setup.py", "constraints.txt")]
print(hashlib.sha256(repr((sys.version, sys.argv[1], *files)).encode()).hexdigest())
EOF
}

set_up() {  # $1: "", "[test]" or "[dev]"
  local extras=$1 own=$root/.venv quiet=-q stamp now torch
  prefix=${VIRTUAL_ENV:-}
  if [ -z "$prefix" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then prefix=${CONDA_PREFIX:-}; fi
  if [ -z "$prefix" ] || [ "$prefix" -ef "$own" ]; then prefix=$own; fi
  stamp=$prefix/.ssl_vit-stamp
  [ ! -t 1 ] || quiet=--progress-bar=on  # a log has no use for progress bars

  if [ "$prefix" != "$own" ]; then
    [ -x "$prefix/bin/python" ] ||
      die "the active environment $prefix has no Python: leave it ('deactivate') or activate another."
    recent "$prefix/bin/python" ||
      die "the active environment $prefix has a Python older than 3.11: leave it ('deactivate'), and .venv is used, or \
activate one with a newer Python."
  fi
  if [ -f "$stamp" ] && now=$(fingerprint 2>/dev/null) && { [ "$prefix" != "$own" ] || wanted_python; }; then
    case $(cat "$stamp") in
      "$now$extras" | "${now}[dev]") return ;;  # the dev extras include the others
      "${now}[test]") [ "$extras" = "[dev]" ] || return 0 ;;
    esac
  fi

  if [ "$prefix" = "$own" ]; then
    make_venv
    rm -f "$stamp"
    now=$(fingerprint)
    echo "Installing the project into .venv: several gigabytes, a few minutes, once."
    (cd "$root" && "$prefix/bin/python" -m pip install "$quiet" -e ".$extras" -c constraints.txt) ||
      die "the installation failed (see above); the next call goes on from here."
  else
    "$prefix/bin/python" -m pip --version >/dev/null 2>&1 ||
      die "the active environment $prefix has no pip: install it ('python -m ensurepip' or 'uv pip install pip'), \
or leave the environment ('deactivate'), and .venv is used."
    rm -f "$stamp"
    now=$(fingerprint)
    torch=$("$prefix/bin/python" -c 'from importlib.metadata import version as v; print(v("torch"))' 2>/dev/null) ||
      torch=""
    echo "Installing the project into the active environment $prefix${torch:+, keeping its torch $torch}."
    (cd "$root" && "$prefix/bin/python" -m pip install "$quiet" -e ".$extras" ${torch:+"torch==$torch"}) ||
      die "the active environment $prefix cannot take the project${torch:+ beside its torch $torch} (see above; the \
lower bounds are in pyproject.toml): update it, or leave it ('deactivate'), and .venv is used."
  fi
  # A torchvision built for another torch installs without complaint and fails here.
  "$prefix/bin/python" -c 'import torchvision' ||
    die "torchvision does not fit the torch in $prefix: install both from the same place."
  echo "$now$extras" >"$stamp"  # last, so that an interrupted set-up is never believed complete
}

ready() {  # set up, then enter the environment and say what it computes on
  local found
  exec 9<"$root/pyproject.toml"  # one set-up at a time
  if command -v flock >/dev/null && ! flock -n 9; then
    echo "Waiting for another launch.sh that installs."
    flock 9 || :
  fi
  set_up "$@"
  exec 9<&-
  export PATH="$prefix/bin:$PATH"
  found=$(python "$root/ssl_vit/describe_device.py")  # how many processes; on what, maybe with a warning on stderr
  processes=${found%%$'\n'*}
  echo "${found#*$'\n'}"
}

# ---- commands ----

run_check() {  # every part, even if one fails
  local failed=0
  ready "[dev]"
  cd "$root"
  show ruff check . || failed=1
  show ruff format --check . || failed=1
  show codespell || failed=1
  show mypy || failed=1
  show python -m pytest -q --doctest-modules ssl_vit eval tests/test_docs.py || failed=1
  exit "$failed"
}

run_tests() {
  local arg workers="-n auto"
  for arg in "$@"; do
    case $arg in -n* | --numprocesses* | no:xdist) workers="" ;; esac
  done
  ready "[test]"
  # One worker per core, so one thread per worker: more would only wait for each other.
  [ -z "$workers" ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  cd "$root"
  # shellcheck disable=SC2086  # two words
  show python -m pytest -q $workers "$@"
}

run_plan() {  # $1: a file in recipes/study/
  ready ""
  show python "${here}eval/study.py" "$@"
}

run_recipe() {
  local recipe=$1 arg before="" skip="" run random config launch control imports file
  shift
  ready ""
  for arg in "$@"; do
    case $arg in
      --plan | --print-*)
        show python "${here}ssl_vit/pretrain.py" --recipe "$recipe" "$@"
        return
        ;;
    esac
  done

  # a single process needs no launcher; launcher.py, unlike accelerate's, waits for processes that save
  launch=(python)
  config=${HF_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/huggingface}/accelerate/default_config
  if [ -f "$config.yaml" ] || [ -f "$config.json" ]; then
    launch=(python "${here}ssl_vit/launcher.py" -q)
  elif [ "$processes" -gt 1 ]; then  # what is left open here, it warns about
    launch=(python "${here}ssl_vit/launcher.py" --num_processes "$processes" --num_machines 1)
    launch+=(--mixed_precision no --dynamo_backend no --multi_gpu)
  fi

  # The control is the same run without what would give it trained weights or the same folder.
  control=() imports=()
  for arg in "$@"; do
    if [ "$before" = --import ]; then imports+=(--import "$arg"); fi
    case $arg in --import=*) imports+=("$arg") ;; esac
    before=$arg
    if [ -n "$skip" ]; then skip=""; continue; fi
    case $arg in
      --output | --init-from) skip=yes ;;
      --output=* | --init-from=* | backbone.init_from=*) ;;
      *) control+=("$arg") ;;
    esac
  done
  control+=(train.flops=null train.steps=0)  # flops would win over steps
  file=$root/recipes/$recipe.yaml
  [ -f "$file" ] || file=$recipe
  if grep -v '^ *#' "$file" | grep 'init_from:' | grep -qv 'init_from: *null'; then
    control+=(backbone.init_from=null)
  fi

  local pretrain=("${here}ssl_vit/pretrain.py" --recipe "$recipe")
  run=$(python "${pretrain[@]}" "$@" --print-output)  # a wrong argument is refused here, before the launcher starts
  random=$(python "${pretrain[@]}" "${control[@]}" --print-output)
  show "${launch[@]}" "${pretrain[@]}" "$@"
  if grep -qs '^  classes: null' "$run/recipe.yaml"; then
    printf '\nThe images have no labels, so k-NN cannot compare.\n'
    show python "${here}eval/embed.py" ${imports[@]+"${imports[@]}"} --backbone "$run"
    return
  fi
  if [ "$run" = "$random" ]; then
    show python "${here}eval/knn.py" ${imports[@]+"${imports[@]}"} --backbone "$run" pixels
  else
    show "${launch[@]}" "${pretrain[@]}" "${control[@]}"
    show python "${here}eval/knn.py" ${imports[@]+"${imports[@]}"} --backbone "$run" "$random" pixels
  fi

  printf '\nNext:\n'
  [ "$prefix" != "$root/.venv" ] || echo "  in a new shell    . ${here}.venv/bin/activate, before commands of your own"
  cat <<EOF
  another recipe    ./launch.sh NAME: $(recipes small),
                    or one of recipes/imagenet
  your own images   ./launch.sh $recipe --data FOLDER
  CIFAR-10          ./launch.sh $recipe --data cifar10
  all of them       ./launch.sh compare
  the tests         ./launch.sh test
README.md explains the rest.
EOF
}

command=${1:-mae}
case $command in
  check)
    [ $# -eq 1 ] || die "check takes no arguments." 2
    run_check
    ;;
  test)
    shift
    run_tests "$@"
    ;;
  compare | study)
    shift
    for arg in "$@"; do
      case $arg in -h | --help) usage; exit ;; esac
    done
    plan=compare
    [ "$command" = compare ] || plan=denoising
    args=()
    for arg in "$@"; do
      if [ "$command $arg" = "study --full" ]; then plan=denoising-full; else args+=("$arg"); fi
    done
    run_plan "$plan" ${args[@]+"${args[@]}"}
    ;;
  advise)
    shift
    ready ""
    show python "${here}eval/advise.py" "$@"
    ;;
  help) usage ;;
  *)
    for arg in "$@"; do
      case $arg in -h | --help) usage; exit ;; esac
    done
    case $command in
      -* | *=*) command=mae ;;  # arguments without a recipe
      *) [ $# -eq 0 ] || shift ;;
    esac
    check_recipe "$command"
    run_recipe "$command" "$@"
    ;;
esac
