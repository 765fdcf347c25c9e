# What .ci/run and .ci/release-check share. Sourced, not run.

say() { printf '\n== [%4d s] %s\n' "$SECONDS" "$*"; }

# A copy of the tree (tracked and new files, none that git ignores) and a new virtual environment, both gone at the end.
fresh_checkout() {
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
  python3 -m venv "$scratch/venv"
  export VIRTUAL_ENV="$scratch/venv" PATH="$scratch/venv/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
  unset PYTHONPATH PYTHONHOME TRITON_INTERPRET || true
}

# The n-th ```bash block of the README: what users are told to type is what is checked.
readme_command() {
  awk -v wanted="$1" '/^```bash/ { n++; inside = n == wanted; next } /^```/ { inside = 0 } inside' README.md
}
