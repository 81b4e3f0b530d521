"""Bring numerics.json up to what the code computes (make numerics).

Entries that the code still agrees with, within their tolerance, keep their numbers and digests. Of
those that change it says by how much, and which results become stale; a reason is asked for, and
kept in the file.
"""

import argparse
import sys
from datetime import date

from rotlib.disk import write_json
from rotlib.study import numerics
from rotlib.study.canaries import CANARIES, INPUTS, plain
from rotlib.study.files import spec_hash
from rotlib.study.numerics import distance
from rotlib.study.store import load_results


def rewritten() -> tuple[dict[str, dict], list[str]]:
    """(every stage's entry as the code is now, the stages whose digest changes).

    An entry within its tolerance keeps its numbers and digest. The others' reasons end without one
    for this change.
    """
    before = numerics.entries() if numerics.FILE.exists() else {}
    after, changed = {}, []
    for stage, found in (INPUTS | CANARIES).items():
        numbers, old = plain(found.numbers()), before.get(stage)
        entry = {"numbers": numbers, "constants": found.constants}
        if old is None:
            after[stage] = entry | {"digest": spec_hash(entry), "reasons": []}
            continue
        kept = {
            name: value
            for name, value in old["numbers"].items()
            if distance(numbers.get(name), value) <= found.allowed(name)
        }
        same = len(kept) == len(old["numbers"]) and all(
            found.constants.get(name) == value for name, value in old["constants"].items()
        )
        entry["numbers"] |= kept
        if not same:
            changed.append(stage)
        digest = old["digest"] if same else spec_hash(entry)
        after[stage] = entry | {"digest": digest, "reasons": old["reasons"]}
    changed += [stage for stage in before if stage not in after]
    return after, changed


def write(stages: dict[str, dict]) -> None:
    """Write the file, atomically."""
    file = {"format": numerics.FORMAT, "sum": spec_hash(stages, 64), "stages": stages}
    write_json(numerics.FILE, file, sort_keys=True)
    numerics.forget()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rotlib.study.renew",
        description="Bring numerics.json up to what the code computes, and say what is stale then.",
    )
    parser.add_argument("--reason", default="", help="why the numbers change; asked for if needed")
    options = parser.parse_args(arguments)
    try:
        after, changed = rewritten()
    except ValueError as error:
        parser.error(str(error))
    before = numerics.entries() if numerics.FILE.exists() else {}
    if after == before:
        print("every stage computes what its entry says")
        return 0
    if changed:
        stale = [r for r in load_results() if set(changed) & set(r.provenance["stages"])]
        for stage in changed:
            what = numerics.drift(stage) if stage in after else "it is no stage any more"
            count = sum(stage in result.provenance["stages"] for result in stale)
            print(f"{stage}: {what}; {count} results read it")
        print(f"{len(stale)} results become stale")
        reason = options.reason or (input("why? ") if sys.stdin.isatty() else "")
        if not reason.strip():
            parser.error("say why: make numerics REASON='...'")
        told = {"date": date.today().isoformat(), "reason": reason.strip()}
        for stage in set(changed) & after.keys():
            after[stage]["reasons"] = [
                *after[stage]["reasons"],
                told | {"was": before[stage]["digest"]},
            ]
    write(after)
    added = sorted(after.keys() - before.keys())
    print(f"{numerics.FILE.name}: {len(changed)} stages changed, {len(added)} new")
    return 0


if __name__ == "__main__":
    sys.exit(main())
