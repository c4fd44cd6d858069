"""The environment in which bench/speed.py and bench/gpu.py run kshot beside other libraries of few-shot learning.

    python bench/peers/environment.py [--folder DIR] [--learn2learn SOURCE]

Prints the path of its Python. The environment is layered on the one that runs this script, so that all libraries use
the same torch. learn2learn is built from its source with regenerated C files, because the package does not build here;
SOURCE is a git repository, by default its public one. In that Python, `import_peers` imports them all.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import types
import venv
from pathlib import Path

PACKAGES = ("easyfsl==1.5.0", "higher==0.2.1", "torchopt==0.7.3")
ALSO = ("optree>=0.4.1", "graphviz", "tqdm", "pandas", "scipy", "requests")  # what these and learn2learn import
BUILD = ("cython==0.29.37", "setuptools<81")
LEARN2LEARN = "https://github.com/learnables/learn2learn"
COMMIT = "db5cee3795490071282bbdfa81179ef732349196"
FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kshot-peers"


def prepare(folder: Path = FOLDER, learn2learn: str = LEARN2LEARN) -> Path:
    """The environment's Python; the first time, everything is installed and built."""
    python, ready = folder / "bin" / "python", folder / ".ready"
    wanted = "\n".join((*PACKAGES, COMMIT, sysconfig.get_path("purelib"), sys.version))
    if ready.exists() and ready.read_text() == wanted:
        return python
    print(f"installing the peers in {folder} (once)", file=sys.stderr, flush=True)
    venv.EnvBuilder(clear=True, with_pip=True).create(folder)
    source = folder / "learn2learn"
    _call("git", "clone", "--quiet", "--no-checkout", learn2learn, source)
    _call("git", "-C", source, "checkout", "--quiet", COMMIT, "--", "learn2learn", "setup.py", "README.md")
    own = Path(_call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    _call(python, "-m", "pip", "install", "--quiet", *BUILD)
    _call(python, "setup.py", "build_ext", "--inplace", cwd=source)
    # Below what is installed here: the environment that kshot runs in, its .pth files included.
    (own / "layers.pth").write_text(f"{source}\nimport site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    _call(python, "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES)
    _call(python, "-m", "pip", "install", "--quiet", *ALSO)
    ready.write_text(wanted)
    return python


def import_peers() -> tuple[types.ModuleType, ...]:
    """easyfsl, learn2learn, higher and torchopt, with what keeps them from torch 2.13 mended."""
    import torch.utils.data

    from kshot import torchvision

    torchvision()  # its import fails beside a CPU build of torch, unless by way of this
    for name in ("learn2learn.gym", "learn2learn.text"):  # need a gym and a tokenizer, which nothing here uses
        sys.modules[name] = types.ModuleType(name)
    torch.utils.data.Sampler.__init__ = lambda self, data_source=None: None  # easyfsl passes what torch took until 2.2
    import easyfsl.methods
    import easyfsl.samplers
    import easyfsl.utils
    import higher
    import learn2learn
    import torchopt

    return easyfsl, learn2learn, higher, torchopt


def _call(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--learn2learn", default=LEARN2LEARN, metavar="SOURCE", help="a git repository with its source")
    options = parser.parse_args()
    print(prepare(options.folder, options.learn2learn))
