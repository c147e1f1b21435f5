"""Write the hash-locked requirements: what `make up` installs, and what developing needs."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
FILES = {
    "requirements.txt": ("embedded", "build"),
    "requirements-dev.txt": ("embedded", "build", "test", "dev"),
}


def main() -> int:
    """Compile each file from pyproject.toml, without naming any package index."""
    for name, extras in FILES.items():
        command = [sys.executable, "-m", "piptools", "compile", "--quiet", "--upgrade"]
        command += ["--generate-hashes", "--allow-unsafe", "--strip-extras", "--no-header"]
        command += ["--no-emit-index-url", "--no-emit-find-links", "--no-emit-trusted-host"]
        command += ["--no-annotate", "--no-emit-options", "--resolver", "backtracking"]
        command += [f"--extra={extra}" for extra in extras]
        command += ["--output-file", str(FOLDER / name), "pyproject.toml"]
        code = subprocess.run(command, cwd=FOLDER.parent, check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
