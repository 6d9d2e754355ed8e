"""Rank completions, best first, to train a reward model on (tools.train_reward_model).

    python -m tools.rank --model_name uer/gpt2-chinese-cluecorpussmall --prompts "刚收到货,感觉" --out rankings.jsonl
    python -m tools.rank --run runs/NAME --out rankings.jsonl            completions of a run's trained model
    python -m tools.rank --simulate 300 --judge DIR --out rankings.jsonl         a classifier ranks instead of you

Each ranking is saved at once, as a line {"prompt": ..., "texts": [completions, best first], "ties": [[i, j], ...]} that
also says where it came from. To continue, run the same command again; no set of completions is shown twice.
"""

import argparse
import functools
import itertools
import json
import os
import re
import statistics
import time
import unicodedata
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from config import PPOConfig
from support.common.files import FIX_LINE, append_line, damaged, path_errors, read_lines, read_text
from support.run.settings import load_config
from tools import exits_on_user_error

HINT = "100 make a usable reward model, 300 a good one, see docs/reward_model.md"
HELP = "best first, such as 3 1 4 2, or 3 1=4 2 for a tie; s to skip, u to undo, q to stop > "
BLOCK = 32  # sets sampled at once
CLOSE = 0.05  # difference in score below which --judge calls two completions a tie


@path_errors()
def main(argv: list[str] | None = None) -> None:
    raw, defaults = argparse.RawDescriptionHelpFormatter, PPOConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--model_name", default=defaults.model_name, help="GPT-2: a Hub id, a folder, or 'demo'")
    parser.add_argument("--run", type=Path, help="a run's folder: use its trained model, prompts and gen_len")
    parser.add_argument("--prompts", nargs="+", help="prompts, taken in turn (default: the run's or the article's)")
    parser.add_argument("--n", type=int, choices=range(2, 10), default=4, help="completions in a set (default: 4)")
    parser.add_argument("--out", type=Path, default=Path("rankings.jsonl"), help="file to write")
    parser.add_argument("--seed", type=int, default=1, help="decides which completions are drawn (default: 1)")
    parser.add_argument("--simulate", type=int, default=0, help="let --judge rank until there are this many rankings")
    parser.add_argument("--judge", default=defaults.reward_model_name, help="classifier: a Hub id, a folder, or 'demo'")
    args = parser.parse_args(argv)
    records, config = read_lines(args.out), load_config(args.run / "config.json") if args.run else defaults
    model, prompts = str(args.run / "model") if args.run else args.model_name, args.prompts or config.prompts
    answer_to = load_judge(args.judge) if args.simulate else ask
    draw = load_sets(model, prompts, args.n, args.seed, config)
    print(progress(records, args.out))
    while not args.simulate or sum(map(is_ranking, records)) < args.simulate:
        prompt, texts = prompts[len(records) % len(prompts)], draw(len(records))
        started = time.monotonic()
        answer = answer_to(prompt, texts) if len(texts) > 1 else "s"
        if answer == "q":
            break
        if answer == "u":
            if records:
                records.pop()
                os.truncate(args.out, args.out.read_bytes()[:-1].rfind(b"\n") + 1)
            continue
        order, ties = (range(len(texts)), []) if answer == "s" else answer
        record = {"prompt": prompt, "texts": [texts[i] for i in order], "ties": ties, "skipped": answer == "s"}
        record |= {"model": model, "seed": args.seed, "time": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        took = {"judge": args.judge} if args.simulate else {"seconds": round(time.monotonic() - started, 1)}
        records.append(record | took)
        append_line(args.out, records[-1])
    print("\n" + progress(records, args.out))


def is_ranking(record: dict) -> bool:
    return not record.get("skipped")


def progress(records: list[dict], path: Path) -> str:
    seconds = [record["seconds"] for record in records if is_ranking(record) and "seconds" in record]
    pace = f", {statistics.median(seconds):.1f} s each" if seconds else ""
    return f"{sum(map(is_ranking, records))} rankings in {path}{pace}; {HINT}"


def load_sets(model: str, prompts: list[str], n: int, seed: int, config: PPOConfig):
    """Return a function from a set's number to its distinct completions; a number always gives the same ones."""
    from support.run.text_trainer import TextPPOTrainer

    config = PPOConfig(gen_len=config.gen_len, temperature=config.temperature)
    trainer = TextPPOTrainer.from_pretrained(model, config)

    @functools.lru_cache(maxsize=1)
    def block(number: int) -> list[str]:
        sets = [prompts[(number * BLOCK + i) % len(prompts)] for i in range(BLOCK)]
        queries = trainer.encode([prompt for prompt in sets for _ in range(n)])
        return trainer.decode(trainer.generate(queries, seed=seed, step=number))

    def draw(number: int) -> list[str]:
        first = number % BLOCK * n
        return list(dict.fromkeys(block(number // BLOCK)[first : first + n]))

    return draw


def load_judge(name: str):
    """Return a function that answers like `ask`, but ranks by a classifier's scores."""
    from reward import SentimentReward, read_classifier_folder
    from support.models.hub import model_folder

    reward = SentimentReward(model_folder(name, "--judge", lambda path: read_classifier_folder(path, None)), "cpu")

    def rank(prompt: str, texts: list[str]):
        scores = reward([prompt + text for text in texts])
        order = scores.argsort(descending=True, stable=True).tolist()
        pairs = list(itertools.combinations(range(len(texts)), 2))
        ties = [[i, j] for i, j in pairs if scores[order[i]] - scores[order[j]] < CLOSE]
        return (order, ties) if len(ties) < len(pairs) else "s"

    return rank


def ask(prompt: str, texts: list[str]):
    """Show completions and read what a person types: a ranking (see `parse_ranking`), "s", "u" or "q"."""
    print(f"\n{prompt}", *(f"  {number}  {text}" for number, text in enumerate(texts, 1)), sep="\n")
    while True:
        try:
            answer = unicodedata.normalize("NFKC", input(HELP)).strip().lower()
            return answer if answer in ("s", "u", "q") else parse_ranking(answer, len(texts))
        except ValueError as error:
            print(error)
        except (EOFError, KeyboardInterrupt):
            return "q"


def parse_ranking(answer: str, n: int) -> tuple[list[int], list[list[int]]]:
    """Read "3 1=4 2" as an order, [2, 0, 3, 1], and the pairs of its places that are tied, [[1, 2]]. Raises ValueError
    unless each number from 1 to n occurs exactly once."""
    compact = re.sub(r"[\s,>]", "", answer)
    found = re.findall(r"\d(?:=\d)*", compact)
    groups = [[int(number) - 1 for number in group.split("=")] for group in found]
    order = sum(groups, [])
    if sorted(order) != list(range(n)) or "".join(found) != compact:
        raise ValueError(f"type each number from 1 to {n} once, best first")
    ranks = [rank for rank, group in enumerate(groups) for _ in group]
    return order, [[i, j] for i, j in itertools.combinations(range(n), 2) if ranks[i] == ranks[j]]


# ----------------------------------------------------------------------------------------------
# Reading rankings


@dataclass
class Ranking:
    """texts: each a prompt with its completion, best first. better: (i, j) if text i is better than text j."""

    texts: list[str]
    better: list[tuple[int, int]]


def read_rankings(path: Path) -> list[Ranking]:
    """Read a file written by `main`, or one in the article's format: one ranking per line, tab-separated, best first.

    An incomplete last line and rankings that have only ties are left out, and a message says so. Raises UserError, with
    the line number, if a ranking can't be used.
    """
    lines = [line for line in read_text(path, "save it as UTF-8").replace("\r\n", "\n").split("\n") if line.strip()]
    rankings, prompts = [], set()
    for number, line in enumerate(lines, 1):
        if number == len(lines) and line.startswith("{") and not line.rstrip().endswith("}"):
            print(f"the last line of {path} is incomplete and is ignored")
            continue
        with damaged(f"line {number} of {path}", FIX_LINE):
            record = json.loads(line) if line.startswith("{") else {"prompt": "", "texts": line.split("\t")}
            if is_ranking(record):
                prompts.add(record["prompt"])
                rankings.append(read_ranking(record, prompts))
    useful = [ranking for ranking in rankings if ranking.better]
    if len(useful) < len(rankings):
        print(f"{len(rankings) - len(useful)} of {len(rankings)} rankings have only ties and are ignored")
    return useful


def read_ranking(record: dict, prompts: set[str]) -> Ranking:
    """Check a ranking from a file. prompts: those of the file so far. Raises ValueError, KeyError or TypeError."""
    texts, n = record["texts"], len(record["texts"])
    if n < 2 or len(set(texts)) < n:
        raise ValueError("a ranking needs at least two texts, all different")
    for prompt in filter(None, prompts):
        if all(text.startswith(prompt) for text in texts):
            raise ValueError(f"its texts begin with the prompt {prompt!r}, but they must contain only what follows it")
    pairs, tied = list(itertools.combinations(range(n), 2)), {tuple(sorted(tie)) for tie in record.get("ties", [])}
    if not tied <= set(pairs):
        raise ValueError(f"ties must be pairs of positions from 0 to {n - 1}")
    return Ranking([record["prompt"] + text for text in texts], [pair for pair in pairs if pair not in tied])


if __name__ == "__main__":
    with exits_on_user_error("rank"):
        main()
