"""A child of `math_pool`: a JSON line ``[truth, answer]`` in, a JSON line true or false out, until its input ends."""

from __future__ import annotations

import json
import sys

from math_verify import parse, verify


def equal(truth: str, answer: str) -> bool:
    """Whether math-verify finds the two equal, each read as the content of a box."""
    gold, told = (parse("\\boxed{" + text + "}") for text in (truth, answer))
    return bool(gold and told and verify(gold, told))


def main() -> None:
    """Answer line by line."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        try:
            found = equal(*json.loads(line))
        except BaseException as error:  # its own time-out is no Exception; the parent wants an answer whatever happens
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            found = False
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
