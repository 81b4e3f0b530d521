"""The last migration: from hashes of source code to the digests of canaries. Python 3.11, once.

    python results/migrate.py

Until commit 25dd3ab a result was stamped with a hash over the source of the modules that it read,
and refactorings that changed no number were waved through by stamping results anew by hand
(`provenance.restamped`). Here every result of results/study gets the digests of the stages that it
reads (`rotlib/study/numerics.json`), if its stamp is the one that the last commit before the
canaries computes; another one would be stale, and is refused.

What a hand has stamped proves nothing. So each result's recorded commit is checked out, and its own
code asked for the stamp: where that is another one than the result carries, or the commit is gone,
the result is `unverified`, with the reason. Run again, the script changes nothing.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from functools import lru_cache
from io import BytesIO

from rotlib.study import numerics
from rotlib.disk import ROOT, write_text

BEFORE = "25dd3ab"  # the last commit whose results carry hashes of source code
_ASK = """
import inspect, json, sys
from rotlib import store
asked = json.load(sys.stdin)
takes = len(inspect.signature(store.code_fingerprint).parameters)
print(json.dumps([store.code_fingerprint(*pair[:takes]) for pair in asked]))
"""


@lru_cache
def stamps(commit: str, pairs: tuple[tuple[str, str | None], ...]) -> list[str] | None:
    """The stamps that a commit's code gives to results of these tasks and rotations."""
    archive = subprocess.run(
        ["git", "-C", ROOT, "archive", commit, "rotlib"], capture_output=True, check=False
    )
    if archive.returncode:
        return None
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
        asked = subprocess.run(
            [sys.executable, "-c", _ASK],
            input=json.dumps(pairs),
            cwd=folder,  # where its own rotlib is found first
            capture_output=True,
            text=True,
            check=True,
        )
    return json.loads(asked.stdout)


def main() -> None:
    paths = sorted((ROOT / "results" / "study").glob("*.json"))
    results = {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    old = {path: result for path, result in results.items() if "code" in result["provenance"]}
    if not old:
        print(f"all {len(results)} results carry digests already")
        return
    specs = [result["spec"] for result in old.values()]
    pairs = tuple(sorted({(spec["task"], spec.get("rotation")) for spec in specs}, key=str))
    unverified = 0
    for path, result in old.items():
        spec, provenance = result["spec"], result["provenance"]
        place = pairs.index((spec["task"], spec.get("rotation")))
        stamp = provenance.pop("code")
        if stamp != stamps(BEFORE, pairs)[place]:
            sys.exit(f"{path.name} was stale before the migration: delete it or run it again")
        by_its_commit = stamps(provenance["commit"], pairs)
        provenance.pop("restamped", None)
        provenance["stages"] = numerics.digests(numerics.stages_of(spec))
        commit = provenance["commit"][:7]
        if by_its_commit is None:
            provenance["unverified"] = f"its commit {commit} isn't in this repository"
        elif by_its_commit[place] != stamp:
            provenance["unverified"] = f"it was stamped by hand since it ran at commit {commit}"
        unverified += "unverified" in provenance
        write_text(path, json.dumps(result, indent=1, sort_keys=True) + "\n")
    print(f"{len(old)} results carry digests now; {unverified} of them are unverified")


if __name__ == "__main__":
    main()
