"""Bugs in judging and drawing."""

NEAREST = {  # file: the tests nearest to it
    "support/evaluation.py": "evaluation judging train",
    "plot_rewards.py": "plot",
}
E, P = "support/evaluation.py", "plot_rewards.py"
BUGS = [  # (file, what stands there, the bug)
    # evaluate
    (E, "draws = (n, SEED, 0)", "draws = (n, trainer.config.seed, 0)"),
    (E, "trainer.kl_to_reference(model, [", "trainer.kl_to_reference(trainer.model, ["),
    (E, "[queries[i] for i in prompt_index], responses)\n\n", "[queries[0]] * n, responses)\n\n"),
    (E, "bool(response[-1] == tokenizer.sep_token_id)", "len(response) < trainer.config.gen_len"),
    (E, "1.96 * rewards.std().item() / math.sqrt(n)", "1.96 * rewards.std().item()"),
    (E, "len(set(zip(prompt_index, completions))) / n", "len(set(completions)) / n"),
    (E, "sum(len(response) for response in responses) / n", "sum(len(text) for text in completions) / n"),
    (E, "masked_mean(ref_logprobs, mask).item()", "ref_logprobs.mean().item()"),
    (E, "[prompts[i] + text, count] for", "[text, count] for"),
    (
        E,
        "Counter(zip(prompt_index, completions)).most_common(10)",
        "list(Counter(zip(prompt_index, completions)).items())[:10]",
    ),
    (E, "prompt_index = [i % len(prompts) for", "prompt_index = [i * len(prompts) // n for"),
    (
        E,
        "trainer.generate([queries[i] for i in prompt_index], model, seed, step)",
        "trainer.generate([queries[i] for i in prompt_index], None, seed, step)",
    ),
    (E, "score_texts(reward, [prompts[i] + text for i", "score_texts(reward, [text for i"),
    # distinct
    (
        E,
        "for text in texts for i in range(len(text) - n + 1)]",
        'for text in ["".join(texts)] for i in range(len(text) - n + 1)]',
    ),
    # the Gibbs policy
    (
        E,
        "weights = [(group / beta).softmax(0) for group in groups]",
        "weights = [group.softmax(0) for group in groups]",
    ),
    (E, "groups = [rewards[prompt_index == i] for i in prompt_index.unique()]", "groups = [rewards]"),
    (E, '"effective_samples": min(', '"effective_samples": max('),
    (E, "beta * (len(w) * w - 1) for", "(len(w) * w - 1) for"),
    (E, "torch.tensor([prompts.index(prompt) for", "torch.tensor([0 for"),
    # gain
    (
        E,
        "rewards, prompt_index = scores_and_prompts(before, prompts)\n    best",
        "rewards, prompt_index = scores_and_prompts(after, prompts)\n    best",
    ),
    (E, '"J": after["reward"] - beta * after["kl"]', '"J": after["reward"] - after["kl"]'),
    (E, 'if best["effective_samples"] < 100:', "if len(rewards) < 100:"),
    (E, "if possible < 0.01:", "if possible <= 0:"),
    (E, "(1 - share) * rewards[order]", "(1 - share) * rewards"),
    (E, '- beta * torch.tensor(after["kls"])', '- torch.tensor(after["kls"])'),
    # frontier and yardsticks
    (E, 'if p["effective_samples"] >= 20]', 'if p["effective_samples"] >= 100]'),
    (
        E,
        'gain(results["before"], results["after"], prompts, beta)',
        'gain(results["after"], results["before"], prompts, beta)',
    ),
    (E, 'frontier(results["before"], prompts)', 'frontier(results["after"], prompts)'),
    (E, "fewest = min(Counter(prompt for prompt, *_ in", "fewest = max(Counter(prompt for prompt, *_ in"),
    (E, "if n <= fewest]", "if n < fewest]"),
    # best of n
    (
        E,
        'scores_and_prompts(results["before"], prompts)\n    best = []',
        'scores_and_prompts(results["after"], prompts)\n    best = []',
    ),
    (E, "best.append((ways * ordered).sum())", "best.append(ordered[-1])"),
    (E, "rewards[prompt_index == i].sort().values", "rewards.sort().values"),
    (E, '(reward - run["beta"] * kl - run["J_before"])', '(reward - run["J_before"])'),
    (E, 'if run["gain"] is not None:', "if True:"),
    # what is printed and written
    (E, "{before[key]:>10{form}}{after[key]:>10{form}}", "{after[key]:>10{form}}{before[key]:>10{form}}"),
    (E, '("distinct-2, pairs of characters", "distinct_2"', '("distinct-2, pairs of characters", "distinct_1"'),
    (E, "{result['J_before']:>10.3f}{result['J']:>10.3f}", "{result['J']:>10.3f}{result['J_before']:>10.3f}"),
    (E, 'if "J" in result:', 'if result["gain"] is not None:'),
    (E, '>= 0.01 * judged["n"]', '> 0.01 * judged["n"]'),
    (E, "judged = evaluation[when]", 'judged = evaluation["after"]'),
    (E, "{old} | {old_score:.2f} | {new} | {new_score:.2f}", "{old} | {new_score:.2f} | {new} | {old_score:.2f}"),
    (E, '" ".join(text.split())', "text.strip()"),
    (E, "ensure_ascii=False, indent=1", "indent=1"),
    (E, "write_whole(path, json", "path.write_text(json"),
    # plot_rewards: which runs, which file
    (P, 'args.out or runs[0] / "rewards.png"', 'args.out or Path("rewards.png")'),
    (P, 'text[: text.rfind("\\n") + 1].splitlines()', "text.splitlines()"),
    (P, "except (OSError, UnicodeDecodeError) as error:\n        raise", "except OSError as error:\n        raise"),
    (P, '"episodes", "env/reward_mean", "objective/kl"} <=', '"env/reward_mean"} <='),
    (P, "except (TypeError, ValueError):", "except ValueError:"),
    (P, "except (OSError, ValueError):\n        return {}", "except OSError:\n        return {}"),
    # plot_rewards: the curves
    (P, "max(1, len(values) // 20)", "max(1, len(values) // 5)"),
    (P, "min(half, i, last - i)", "min(half, i)"),
    (P, "draw_reward(reward_axes, metrics, colour, number)", "draw_reward(reward_axes, metrics, colour, 0)"),
    (P, 'colour = f"C{number % 10}"', 'colour = f"C{0 % 10}"'),
    (P, "run.resolve().name", "run.name"),
    (P, "changes(panel[1], [metrics for _, metrics, _ in data])", "changes(panel[1], [data[0][1]])"),
    (P, 'axes.plot(metrics["step"], metrics[column], style', 'axes.plot(metrics["step"], metrics[columns[0]], style'),
    (P, '["ppo/policy/clipfrac", "ppo/val/clipfrac"]', '["ppo/val/clipfrac", "ppo/policy/clipfrac"]'),
    (P, 'STYLES = ["-", "--", ":"]', 'STYLES = ["-", "-", ":"]'),
    (P, 'episodes, mean = metrics["episodes"]', 'episodes, mean = metrics["step"]'),
    (P, 'metrics["env/reward_p10"], metrics["env/reward_p90"],', 'metrics["env/reward_p10"], mean,'),
    (P, "(-1, mean[-10:].mean(), (8", "(-1, mean[-1], (8"),
    (P, "(place[0], -16 * number)", "(place[0], 0)"),
    # plot_rewards: the plane and the histogram
    (
        P,
        'axes.scatter(metrics["objective/kl"], metrics["env/reward_mean"], s=10',
        'axes.scatter(metrics["env/reward_mean"], metrics["objective/kl"], s=10',
    ),
    (P, 'if best and not any(what.endswith("drafts") for what in key):', "if best:"),
    (
        P,
        'axes.plot([p["kl"] for p in points], [p["reward"] for p in points]',
        'axes.plot([p["beta"] for p in points], [p["reward"] for p in points]',
    ),
    (P, '(("before", "o"), ("after", "*"))', '(("before", "*"), ("after", "o"))'),
    (P, 'axes.scatter(limit["kl"], limit["reward"]', 'axes.scatter(limit["reward"], limit["kl"]'),
    (
        P,
        "scores = np.array([score for *_, score in evaluation[when]",
        'scores = np.array([score for *_, score in evaluation["before"]',
    ),
    (P, "np.full(len(scores), 1 / len(scores))", "np.ones(len(scores))"),
    (P, "np.linspace(min(0, scores.min()), max(1, scores.max()), 41)", "np.linspace(0, 1, 41)"),
    (
        P,
        '(("before", dict(histtype="step", linewidth=1.5)), ("after", dict(alpha=0.45)))',
        '(("after", dict(histtype="step", linewidth=1.5)), ("before", dict(alpha=0.45)))',
    ),
    # plot_rewards: the figure
    (P, "n_rows = -(-len(panels) // 4)", "n_rows = len(panels) // 4"),
    (P, "            plt.close(fig)", "            pass"),
    (P, 'matplotlib.use("Agg")', "pass"),
    (P, 'format=out.suffix[1:] or "png"', 'format="png"'),
    (P, "name if len(fonts()) > 1 else name", "name if len(fonts()) > 0 else name"),
]
SAME = [  # (file, what stands there, what may as well stand there, why it is the same program)
    (
        E,
        "beta * (len(w) * w - 1) for",
        "beta * len(w) * w for",
        "only its variance is asked for: a shift does not matter",
    ),
]
