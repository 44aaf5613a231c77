"""Writes ``tests/golden/drawn_folds.txt``: how far drawn networks fold, a line for each seed.

Run from the repository's root: ``python tools/drawn_folds.py`` folds the listed seeds anew.
``--choose N --among M`` chooses N of the first M seeds: in turn the one that executes most of the
rules' statements, or gives most of the reasons, that fewest of those before it did (greedy multi
cover). Rare paths of rare rules are so in the list, not the same common ones a hundred times.
"""

from __future__ import annotations

import argparse
import heapq
import multiprocessing
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import mutate  # noqa: E402

ENOUGH = 8  # seeds that a statement or a reason is wanted in
_hits: set[int] = set()


def folded(seed: int) -> tuple[int, str, frozenset[object]]:
    """The line of a seed, and what it exercises; an empty line where there is none."""
    from refold.fuzz.program import Unsuited
    from tests.fuzz.test_drawn_folds import line_of

    _hits.clear()
    try:
        line = line_of(seed)
    except Unsuited:
        return seed, "", frozenset()
    _, _, said = line.partition("|")
    reasons = {re.sub(r"%?\w*\d\w*", "_", part) for part in re.split("[|;]", said)}
    return seed, line, frozenset({*_hits, *reasons})


def chosen(found: dict[int, frozenset[object]], count: int) -> list[int]:
    """Seeds that together exercise most, each of it in a few of them."""
    times: Counter[object] = Counter()

    def gain(seed: int) -> float:
        return sum(2.0 ** -times[f] for f in found[seed] if times[f] < ENOUGH)

    queue = [(-gain(seed), seed) for seed in found]
    heapq.heapify(queue)
    taken: list[int] = []
    while queue and len(taken) < count:
        _, seed = heapq.heappop(queue)
        now = gain(seed)
        if queue and now < -queue[0][0]:
            heapq.heappush(queue, (-now, seed))
            continue
        if not now:
            break
        taken.append(seed)
        times.update(found[seed])
    return sorted(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--choose", type=int, default=0)
    parser.add_argument("--among", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    global _hits
    mutate.preload()
    from tests.fuzz.test_drawn_folds import GOLDEN, LINES, line_of

    line_of(0)  # imports what is to be probed
    seeds = list(LINES)
    if arguments.choose:
        _, _hits = mutate.Coverage(mutate.sources())._probe()
        seeds = list(range(arguments.among))
    with multiprocessing.get_context("fork").Pool(arguments.workers, maxtasksperchild=2000) as pool:
        results = {s: (line, used) for s, line, used in pool.imap_unordered(folded, seeds, 10)}
    seeds = [s for s in seeds if results[s][0]]  # what is drawn otherwise may not run
    if arguments.choose:
        seeds = chosen({s: results[s][1] for s in seeds}, arguments.choose)
    GOLDEN.write_text("".join(f"{results[seed][0]}\n" for seed in seeds))
    print(f"{len(seeds)} lines in {GOLDEN.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
