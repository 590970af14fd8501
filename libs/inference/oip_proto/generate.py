"""Generate the Python of the ``.proto`` files here, or check that it is current (``--check``)."""

import argparse
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]


def main() -> None:
    """Write the generated files, or say which are out of date."""
    parser = argparse.ArgumentParser(prog="python -m libs.inference.oip_proto.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a file is out of date")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        made = _generate(Path(folder))
        stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    if check and stale:
        sys.exit(f"out of date, run make proto: {', '.join(str(path.relative_to(ROOT)) for path in stale)}")
    for path in stale:
        path.write_text(made[path])


def _generate(folder: Path) -> dict[Path, str]:
    from grpc_tools import protoc  # a tool of developers, not a dependency of the platform

    sources = sorted(str(path.relative_to(ROOT)) for path in FOLDER.glob("*.proto"))
    code: int = protoc.main(
        ["protoc", f"-I{ROOT}", f"--python_out={folder}", f"--pyi_out={folder}", *(str(ROOT / name) for name in sources)]
    )
    if code:
        sys.exit(f"protoc ended with {code}")
    return {ROOT / path.relative_to(folder): path.read_text() for path in sorted(folder.rglob("*_pb2.py*"))}


if __name__ == "__main__":
    main()
