#!/usr/bin/env bash
# SnowNLP(text).sentiments is the probability that a Chinese shop review is positive, so it is a tempting reward. You
# expect 没有 (not) and 非常 (very) to count: 我喜欢 and 我没有喜欢 say opposite things.
# snownlp 0.12.3 removes a list of stop words before it scores, and 没有, 非常 and 问题 (problem) are on it. Wherever they
# appear, the score is the same as without them, to the last digit; if nothing else is left, it is 0.5262. Such a reward
# teaches a model that it may deny everything that it praises. 不 isn't on the list.
# Source: Sentiment.handle in snownlp/sentiment/__init__.py calls normal.filter_stop; snownlp/normal/stopwords.txt.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile snownlp==0.12.3
venv/bin/python - <<'PY'
from importlib.metadata import version

from snownlp import SnowNLP

print("snownlp", version("snownlp"))
same = []
for text, other in (("我喜欢", "我没有喜欢"), ("让人失望", "没有让人失望"), ("好", "非常好"), ("喜欢", "不喜欢")):
    scores = [SnowNLP(each).sentiments for each in (text, other)]
    same.append(scores[0] == scores[1])
    print(f"{text} {scores[0]:.4f}, {other} {scores[1]:.4f}: expected different, found", "equal" if same[-1] else "different")
if same != [True, True, True, False]:
    raise SystemExit("The behaviour has changed")
PY
