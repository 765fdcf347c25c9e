# What .ci/run and .ci/release-check share. Sourced, not run.

say() { printf '\n== [%4d s] %s\n' "$SECONDS" "$*"; }

# A copy of the tree (tracked and new files, none that git ignores), gone at the end.
fresh_copy() {
  scratch=$(mktemp -d "${TMPDIR:-/tmp}/fastmae-ci.XXXXXX")
  trap 'rm -rf "$scratch"' EXIT
  mkdir "$scratch/tree"
  if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
      # Deleted but not yet committed files are still listed.
      if [ -e "$file" ] || [ -L "$file" ]; then printf '%s\0' "$file"; fi
    done | tar --null --no-recursion -T - -cf - | tar -xf - -C "$scratch/tree"
  else
    cp -a . "$scratch/tree"
  fi
  cd "$scratch/tree"
  unset PYTHONPATH PYTHONHOME VIRTUAL_ENV TRITON_INTERPRET
  export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
}

# Run the n-th ```bash block of the README, which must name the given word: what users are told to type is what is
# checked. It makes a virtual environment, .venv, which is the one that the rest of the script uses.
run_readme_command() {
  local command
  command=$(awk -v wanted="$1" '/^```bash/ { n++; inside = n == wanted; next } /^```/ { inside = 0 } inside' README.md)
  if [[ "$command" != *"$2"* ]]; then
    echo "bash block $1 of README.md should run '$2', it is: $command" >&2
    exit 1
  fi
  say "README: $command"
  bash -euo pipefail -c "$command"
  export PATH="$PWD/.venv/bin:$PATH"
}
