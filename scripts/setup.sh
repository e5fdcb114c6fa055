# Sourced by the other scripts: makes .venv in the repository and installs a requirements file
# into it, once for each version of that file. Use: source scripts/setup.sh requirements.txt
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/python ]; then
    echo "Making a virtual environment in .venv"
    rm -rf .venv
    python3 -m venv .venv
fi
stamp=".venv/$1.sha256"
wanted=$(cat requirements*.txt pyproject.toml | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing $1 (a few minutes, mostly downloads)"
    .venv/bin/python -m pip install --disable-pip-version-check -r "$1" |
        grep --line-buffered -v "already satisfied"
    echo "$wanted" > "$stamp"
fi
source .venv/bin/activate
